//! Kernel audit, as far as it tells what Landlock denies: whether it is on, and its records as they come. Nothing of it is
//! ever changed here. Listening is by the multicast group of the log, beside auditd and without its duties.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom, send,
    socket_with, sockopt,
};

// linux/audit.h, as are the types of records.
const GET: u16 = 1000;
const READLOG_GROUP: u32 = 1;
const SYSCALL: u16 = 1300;
const END: u16 = 1320;
const ACCESS: u16 = 1423;
const DOMAIN: u16 = 1424;
// linux/netlink.h.
const ERROR: u16 = 2;
const REQUEST: u16 = 1;
const HEADER_BYTES: usize = 16;
/// Longest record, with its header; a longer one is cut, and the rest of it says nothing that is asked for here.
pub const RECORD_BYTES: usize = 16 << 10;
/// Some thousand records, of which a burst has room; nothing is used while none come.
const BUFFER_BYTES: usize = 2 << 20;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_millis(200);

/// What can be heard of audit in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {
    On,
    /// It can be turned on.
    Off,
    /// The kernel has none, or was booted with audit=0.
    Absent,
    /// It is told only to root of the host itself, not to containers.
    Refused,
}

/// Asks the kernel.
pub fn status() -> Audit {
    match ask() {
        Ok(true) => Audit::On,
        Ok(false) => Audit::Off,
        Err(Errno::PROTONOSUPPORT) => Audit::Absent,
        Err(_) => Audit::Refused,
    }
}

fn ask() -> Result<bool, Errno> {
    let socket = open()?;
    let mut request = Vec::with_capacity(HEADER_BYTES);
    request.extend((HEADER_BYTES as u32).to_ne_bytes());
    request.extend(GET.to_ne_bytes());
    request.extend(REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    send(&socket, &request, SendFlags::empty())?;
    let patience = Timespec::try_from(PATIENCE).map_err(|_| Errno::INVAL)?;
    let mut polled = [PollFd::new(&socket, PollFlags::IN)];
    if poll(&mut polled, Some(&patience))? == 0 {
        return Err(Errno::TIMEDOUT);
    }
    let mut answer = [0; 512];
    let (length, _, _) = recvfrom(&socket, &mut answer, RecvFlags::empty())?;
    let answer = &answer[..length];
    match kind(answer) {
        // struct audit_status: a mask, and then whether it is enabled; 2 is enabled for good.
        Some(GET) => Ok(word(answer, HEADER_BYTES + 4).is_some_and(|enabled| enabled != 0)),
        Some(ERROR) => Err(Errno::CONNREFUSED),
        _ => Err(Errno::PROTO),
    }
}

fn open() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::AUDIT),
    )
}

/// A socket to which every record comes. Non-blocking. Needs CAP_AUDIT_READ on the host itself.
pub fn listen() -> io::Result<OwnedFd> {
    let socket = open()?;
    // Without the capability to exceed net.core.rmem_max the buffer stays as it is.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES);
    bind(&socket, &SocketAddrNetlink::new(0, READLOG_GROUP))?;
    Ok(socket)
}

/// The next record, or `None` for one that says nothing of Landlock. `WouldBlock` passes through, and so does ENOBUFS: records
/// were lost.
pub fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<Record>> {
    let (length, _, sender) = recvfrom(socket, &mut *buffer, RecvFlags::empty())?;
    // Root of the host could send to a socket of ours, too.
    let is_kernel = sender
        .and_then(|sender| SocketAddrNetlink::try_from(sender).ok())
        .is_some_and(|sender| sender.pid() == 0);
    let message = &buffer[..length.min(buffer.len())];
    Ok(kind(message)
        .filter(|_| is_kernel)
        .and_then(|kind| parse(kind, &message[HEADER_BYTES..])))
}

fn kind(message: &[u8]) -> Option<u16> {
    let bytes = message.get(4..6)?;
    (message.len() >= HEADER_BYTES).then(|| u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn word(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// A record. Those of one event, a system call for the most part, have one number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub event: u64,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Denial(Denial),
    /// Told with the first denial of a domain: who restricted itself with it.
    Domain {
        domain: u64,
        creator: Process,
    },
    /// Nothing is left that was restricted by this domain.
    Gone(u64),
    /// Who made the system call that was denied something.
    Caller(Process),
    /// No more records of this event come.
    End,
}

/// What a domain has denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    pub domain: u64,
    /// The rights that were missing, as `fs.read_file`.
    pub blockers: Vec<String>,
    /// To what; as its process sees it. `None` for what has no path.
    pub path: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// On the host.
    pub pid: u32,
    /// As it called itself.
    pub name: OsString,
}

/// Reads the text of a record: `audit(SECONDS:EVENT): key=value …`. A value that is not the kernel's own is in quotes, or in
/// hexadecimal digits if anything in it could end it.
pub fn parse(kind: u16, text: &[u8]) -> Option<Record> {
    if ![ACCESS, DOMAIN, SYSCALL, END].contains(&kind) {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?.trim_end_matches('\0');
    let (stamp, fields) = text.strip_prefix("audit(")?.split_once("):")?;
    let event = stamp.rsplit_once(':')?.1.parse().ok()?;
    let field = |name: &str| {
        fields
            .split(' ')
            .find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    let domain = || u64::from_str_radix(field("domain")?, 16).ok();
    let process = || {
        Some(Process {
            pid: field("pid")?.parse().ok()?,
            name: OsString::from_vec(field("comm").and_then(untrusted).unwrap_or_default()),
        })
    };
    let what = match kind {
        ACCESS => What::Denial(Denial {
            domain: domain()?,
            blockers: field("blockers")?.split(',').map(str::to_owned).collect(),
            path: field("path")
                .and_then(untrusted)
                .map(|path| OsString::from_vec(path).into()),
        }),
        DOMAIN => match field("status")? {
            "allocated" => What::Domain {
                domain: domain()?,
                creator: process()?,
            },
            "deallocated" => What::Gone(domain()?),
            _ => return None,
        },
        SYSCALL => What::Caller(process()?),
        _ => What::End,
    };
    Some(Record { event, what })
}

fn untrusted(value: &str) -> Option<Vec<u8>> {
    if let Some(quoted) = value.strip_prefix('"') {
        return quoted
            .strip_suffix('"')
            .map(|text| text.as_bytes().to_vec());
    }
    let digits = value.as_bytes();
    let pairs = digits.chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).ok()?;
        let is_digits = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_digits.then(|| u8::from_str_radix(pair, 16).ok())?
    });
    pairs
        .collect::<Option<Vec<u8>>>()
        .filter(|bytes| !bytes.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn what(kind: u16, text: &str) -> Option<What> {
        parse(kind, format!("audit(1795832468.698:2): {text}").as_bytes()).map(|record| {
            assert_eq!(record.event, 2);
            record.what
        })
    }

    #[test]
    fn a_denial_has_its_domain_the_missing_rights_and_the_path() {
        let text =
            r#"domain=18c9f6f43 blockers=fs.execute,fs.read_file path="/opt/x" dev="vda" ino=737"#;
        let denial = Denial {
            domain: 0x1_8c9f_6f43,
            blockers: vec!["fs.execute".into(), "fs.read_file".into()],
            path: Some("/opt/x".into()),
        };
        assert_eq!(what(ACCESS, text), Some(What::Denial(denial)));
    }

    #[test]
    fn a_path_that_could_end_its_field_comes_in_digits() {
        let path = |value: &str| {
            let text = format!("domain=1 blockers=fs.read_dir path={value} dev=\"vda\"");
            match what(ACCESS, &text) {
                Some(What::Denial(denial)) => denial.path,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(path("2F746D702F612062"), Some("/tmp/a b".into()));
        assert_eq!(
            path("2F22ff0A"),
            Some(OsString::from_vec(b"/\"\xff\n".to_vec()).into())
        );
        for none in ["(null)", "2F7", "", "\"/unfinished"] {
            assert_eq!(path(none), None, "{none}");
        }
        let without = what(ACCESS, "domain=1 blockers=ptrace opid=1 ocomm=\"systemd\"");
        assert!(matches!(without, Some(What::Denial(denial)) if denial.path.is_none()));
    }

    #[test]
    fn a_domain_is_told_with_who_made_it_and_when_it_is_gone() {
        let process = |pid, name: &str| Process {
            pid,
            name: name.into(),
        };
        assert_eq!(
            what(
                DOMAIN,
                r#"domain=a status=allocated mode=enforcing pid=5268 uid=0 exe="/x" comm="exec2-launch""#
            ),
            Some(What::Domain {
                domain: 10,
                creator: process(5268, "exec2-launch"),
            })
        );
        assert_eq!(
            what(DOMAIN, "domain=a status=deallocated denials=17"),
            Some(What::Gone(10))
        );
        assert_eq!(
            what(
                SYSCALL,
                r#"arch=c000003e syscall=257 success=no ppid=5268 pid=5269 uid=0 comm="cat" exe="/usr/bin/cat" key=(null)"#
            ),
            Some(What::Caller(process(5269, "cat")))
        );
        assert_eq!(what(END, ""), Some(What::End));
    }

    #[test]
    fn other_records_and_torn_ones_say_nothing() {
        assert_eq!(what(1327, "proctitle=636174"), None);
        assert_eq!(what(ACCESS, "blockers=fs.read_dir path=\"/\""), None);
        assert_eq!(what(DOMAIN, "domain=a status=paused"), None);
        for torn in ["", "audit(", "audit(1:x): domain=1", "audit(1:2)"] {
            assert_eq!(parse(ACCESS, torn.as_bytes()), None, "{torn}");
        }
        assert_eq!(parse(ACCESS, b"audit(1:2): domain=\xff"), None);
    }
}
