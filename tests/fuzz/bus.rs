//! What comes over the bus: a bus of our own gives one answer, whatever it is, and hangs up.

use std::env;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use nomad_driver_exec2::plan::unit::{UnitName, path_in};
use nomad_driver_exec2::systemd::{Systemd, SystemdError};

use crate::mutate::Target;
use crate::names::assert_unit;
use crate::task::assert_sentence;

/// Far less than a call's own time limit: a bus that hung up is no reason to wait.
const PATIENCE: Duration = Duration::from_secs(20);
const SOCKET: &str = "FUZZ_BUS";

/// `return SIGNATURE` or `error NAME`, a newline, and the body; or `raw`, a newline, and the whole message.
static ANSWER: Mutex<Vec<u8>> = Mutex::new(Vec::new());

#[test]
fn bus_answer() {
    let Ok(socket) = env::var(SOCKET) else {
        return again();
    };
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // One that hangs up first is no matter.
            let _ = serve(stream.unwrap());
        }
    });
    let target = Target {
        name: "bus_answer",
        samples: &[],
        tokens: b"return error raw a(ssssssouso) v o s as a{sv} ay h \n \0\0\0\0 \xff\xff\xff\xff \xff\xff\xff\x03 org.freedesktop.DBus.Error.NoReply \
            org.freedesktop.systemd1.NoSuchUnit exec2-x.scope /org/freedesktop/systemd1/job/1 \x01s\0 \x01v\0",
        run: ask,
    };
    // It is a bus for the driver, too.
    let (_, listed) = target
        .samples()
        .into_iter()
        .find(|(file, _)| file.ends_with("list"))
        .unwrap();
    *ANSWER.lock().unwrap() = listed;
    let units = live(Systemd::new().descriptions("exec2-*")).unwrap();
    assert_eq!(
        units["exec2-web-0a1b2c3d-deadbeef.scope"],
        "Nomad task web of default/shop/front (alloc 0a1b2c3d)"
    );
    target.fuzz();
}

/// zbus takes the address from the environment, which a process with threads cannot change: in a process of its own.
fn again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bus");
    let status = Command::new(env::current_exe().unwrap())
        .args(["bus::bus_answer", "--exact", "--nocapture"])
        .env(
            "DBUS_SYSTEM_BUS_ADDRESS",
            format!("unix:path={}", socket.display()),
        )
        .env(SOCKET, &socket)
        .status();
    assert!(status.unwrap().success(), "its words are above");
}

fn live<T>(call: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, call)
            .await
            .expect("it hangs")
    })
}

fn ask(bytes: &[u8]) {
    *ANSWER.lock().unwrap() = bytes.to_vec();
    let unit = UnitName::of_task("0a1b2c3d-1111-2222-3333-444455556666/web/deadbeef");
    if let Some(units) = told(live(Systemd::new().descriptions("exec2-*"))) {
        for (name, description) in units {
            UnitName::existing(&name).iter().for_each(assert_unit);
            path_in(&description);
        }
    }
    told(live(Systemd::new().version()));
    told(live(Systemd::new().knows(&unit)));
    told(live(Systemd::new().stop(&unit)));
}

fn told<T>(answer: Result<T, SystemdError>) -> Option<T> {
    answer.map_err(assert_sentence).ok()
}

fn serve(mut stream: UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_exact(&mut [0])?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.split_whitespace().next() {
            Some("AUTH") => stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n")?,
            Some("NEGOTIATE_UNIX_FD") => stream.write_all(b"AGREE_UNIX_FD\r\n")?,
            Some("BEGIN") => break,
            _ => return Ok(()),
        }
    }
    loop {
        let mut head = [0; 16];
        reader.read_exact(&mut head)?;
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let (body, serial, fields) = (number(4), number(8), number(12));
        let mut rest = vec![0; fields.next_multiple_of(8) as usize + body as usize];
        reader.read_exact(&mut rest)?;
        let calls = |member: &str| {
            rest.windows(member.len())
                .any(|window| window == member.as_bytes())
        };
        let name = b"\x04\0\0\0:1.1\0";
        if calls("Hello") || calls("GetNameOwner") {
            stream.write_all(&message(2, serial, b"s", None, name))?;
        } else if calls("AddMatch") {
            stream.write_all(&message(2, serial, b"", None, b""))?;
        } else {
            return stream.write_all(&answer(serial));
        }
    }
}

fn answer(serial: u32) -> Vec<u8> {
    let given = ANSWER.lock().unwrap();
    let end = given
        .iter()
        .position(|byte| *byte == b'\n')
        .unwrap_or(given.len());
    let (line, body) = given.split_at(end);
    let body = body.get(1..).unwrap_or_default();
    if let Some(signature) = line.strip_prefix(b"return ") {
        message(2, serial, signature, None, body)
    } else if let Some(name) = line.strip_prefix(b"error ") {
        message(3, serial, b"s", Some(name), body)
    } else {
        body.to_vec()
    }
}

/// As the D-Bus specification has it, little-endian.
fn message(kind: u8, serial: u32, signature: &[u8], error: Option<&[u8]>, body: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let mut fields = vec![5, 1, b'u', 0];
    fields.extend(serial.to_le_bytes());
    if let Some(name) = error {
        fields.extend([4, 1, b's', 0]);
        fields.extend(length(name));
        fields.extend(name);
        fields.push(0);
        fields.resize(fields.len().next_multiple_of(8), 0);
    }
    let signature = &signature[..signature.len().min(255)];
    fields.extend([8, 1, b'g', 0, signature.len() as u8]);
    fields.extend(signature);
    fields.push(0);
    let mut message = vec![b'l', kind, 1, 1];
    message.extend(length(body));
    message.extend(1_u32.to_le_bytes());
    message.extend(length(&fields));
    message.extend(&fields);
    message.resize(message.len().next_multiple_of(8), 0);
    message.extend(body);
    message
}
