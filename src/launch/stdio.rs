//! The task's standard descriptors: Nomad's log FIFOs, descriptors handed over by the plugin, or /dev/null.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, fstat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, send,
    shutdown, socket_with,
};

use super::place::{open_host, open_without_links};
use super::report::{At, Failure};
use crate::plan::steps::{Order, Stdio, Step};

/// How long Nomad's log collector may take to open its end.
const READER_PATIENCE: Duration = Duration::from_secs(5);
const READER_POLL: Duration = Duration::from_millis(5);

/// Where one output of the task goes.
#[derive(Debug)]
pub(super) enum Output {
    /// A pipe whose reader is there; and a reader of ours.
    Fifo {
        pipe: OwnedFd,
        reader: Reader,
    },
    Given(OwnedFd),
    /// The journal's socket, until `join_journal`.
    Journal(OwnedFd),
    Null,
}

/// A reader of Nomad's FIFO, which never reads: as long as there is one, a task whose log collector dies gets no SIGPIPE.
/// The FIFO is the task's user's for as long as the start goes well.
#[derive(Debug)]
pub(super) struct Reader {
    fifo: OwnedFd,
    /// Whom it goes back to.
    owner: Option<(Uid, Gid)>,
}

/// Descriptors 0, 1 and 2 of the task.
#[derive(Debug)]
pub(super) struct Standard {
    pub input: OwnedFd,
    pub outputs: [Output; 2],
}

/// Opens what lies on the host, before the view changes what paths mean.
/// `output` is what the plugin handed over for `Stdio::Given`.
pub(super) fn open(order: &Order, output: Vec<OwnedFd>) -> Result<[Output; 2], Failure> {
    match &order.stdio {
        Stdio::Null => Ok([Output::Null, Output::Null]),
        Stdio::Journal { .. } => Ok([journal_socket()?, journal_socket()?]),
        Stdio::Given => match <[OwnedFd; 2]>::try_from(output) {
            Ok([stdout, stderr]) => Ok([given(stdout, order)?, given(stderr, order)?]),
            Err(_) => Err(Failure::new(Step::Open, 0).note("no output was handed over")),
        },
        Stdio::Fifos { stdout, stderr } => Ok([fifo(stdout, order)?, fifo(stderr, order)?]),
    }
}

/// Completes them inside the view: through a descriptor opened before, root could still chmod the host's /dev/null.
pub(super) fn in_view(outputs: [Output; 2]) -> Result<Standard, Failure> {
    let input = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .at_path(Step::View, "/dev/null")?;
    Ok(Standard { input, outputs })
}

/// Where journald takes the output of services, one stream for each.
const JOURNAL: &str = "/run/systemd/journal/stdout";

/// Found on the host: at its path in the view may be a volume, and root would connect the task to what that leads to. Without
/// a journal there is none to write to, and the job asked for no logs.
fn journal_socket() -> Result<Output, Failure> {
    match open_host(Path::new(JOURNAL), OFlags::empty()) {
        Ok(socket) => Ok(Output::Journal(socket)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(Output::Null),
        Err(errno) => Err(errno).at_path(Step::Open, JOURNAL),
    }
}

/// To be called inside the scope: journald asks the kernel which cgroup its peer is in.
pub(super) fn join_journal(order: &Order, standard: &mut Standard) -> Result<(), Failure> {
    let Stdio::Journal { unit, identifier } = &order.stdio else {
        return Ok(());
    };
    for (output, priority) in standard.outputs.iter_mut().zip(PRIORITIES) {
        let Output::Journal(socket) = output else {
            continue;
        };
        *output = match journal(socket, unit, identifier, priority) {
            Ok(stream) => Output::Given(stream),
            // It is down, or has more streams than it takes.
            Err(Errno::CONNREFUSED | Errno::PIPE) => Output::Null,
            Err(errno) => return Err(errno).at_path(Step::Journal, JOURNAL),
        };
    }
    Ok(())
}

/// syslog(3)'s LOG_INFO and LOG_WARNING, for stdout and stderr; a line that begins with `<n>` says its own.
const PRIORITIES: [u8; 2] = [6, 4];

fn journal(socket: &OwnedFd, unit: &str, identifier: &str, priority: u8) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(itself(socket))?;
    let stream = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    let deadline = Instant::now() + READER_PATIENCE;
    loop {
        match connect(&stream, &address) {
            // Its queue is full.
            Err(Errno::AGAIN) if Instant::now() < deadline => sleep(READER_POLL),
            result => break result?,
        }
    }
    // The header of the stream protocol: identifier, unit, priority, whether lines may begin with one, and whether to forward
    // to syslog, kmsg and the console.
    let header = format!("{identifier}\n{unit}\n{priority}\n1\n0\n0\n0\n");
    send(&stream, header.as_bytes(), SendFlags::NOSIGNAL)?;
    shutdown(&stream, Shutdown::Read)?;
    rustix::fs::fcntl_setfl(&stream, OFlags::RDWR)?;
    Ok(stream)
}

/// A pipe or a socket: the descriptor of a file leads past the read-only view, and root could change the file through it.
fn given(output: OwnedFd, order: &Order) -> Result<Output, Failure> {
    match FileType::from_raw_mode(fstat(&output).at(Step::Open)?.st_mode) {
        FileType::Fifo => {
            give_to_user(&output, order).at(Step::Open)?;
            Ok(Output::Given(output))
        }
        FileType::Socket => Ok(Output::Given(output)),
        kind => Err(Failure::new(Step::Open, 0).note(format!(
            "output can be handed over as a pipe or a socket only, this is {kind:?}"
        ))),
    }
}

fn fifo(path: &Path, order: &Order) -> Result<Output, Failure> {
    if path == Path::new("/dev/null") {
        return Ok(Output::Null);
    }
    let fail = |note: &str| {
        Failure::new(Step::Open, 0)
            .on(path.display().to_string())
            .note(note)
    };
    let found = open_log(path).map_err(|errno| {
        let failure = Failure::new(Step::Open, errno.raw_os_error()).on(path.display().to_string());
        match errno {
            Errno::LOOP => failure.note("the log pipe or its directory is a symbolic link"),
            _ => failure,
        }
    })?;
    let status = fstat(&found).at_path(Step::Open, path)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Fifo {
        return Err(fail("it is not a FIFO"));
    }
    // A second name would let whoever holds it pass this pipe off as its own.
    if status.st_nlink != 1 {
        return Err(fail("the FIFO has more than one name"));
    }
    if status.st_uid != 0 && status.st_uid != order.uid {
        return Err(fail(&format!(
            "the FIFO belongs to uid {}, neither root nor the task's user",
            status.st_uid
        )));
    }
    let pipe = open_writer(&found, path)?;
    rustix::fs::fcntl_setfl(&pipe, OFlags::WRONLY).at_path(Step::Open, path)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let reader = rustix::fs::open(itself(&found), flags, Mode::empty());
    let reader = Reader {
        fifo: reader.at_path(Step::Open, path)?,
        owner: Some((Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid))),
    };
    give_to_user(&pipe, order).at_path(Step::Open, path)?;
    Ok(Output::Fifo { pipe, reader })
}

/// The task reopens its output as /dev/stdout, with its own rights.
fn give_to_user(pipe: &OwnedFd, order: &Order) -> Result<(), Errno> {
    let user = Uid::from_raw(order.uid);
    fchown(pipe, Some(user), Some(Gid::from_raw(order.gid)))
}

/// The path is `<alloc>/alloc/logs/<name>`, and tasks own `alloc`: from there on no link is followed.
fn open_log(path: &Path) -> Result<OwnedFd, Errno> {
    let trusted = path.ancestors().nth(2).filter(|_| {
        path.components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    });
    let (Some(trusted), true) = (trusted, path.is_absolute()) else {
        return Err(Errno::INVAL);
    };
    let below = path.strip_prefix(trusted).map_err(|_| Errno::INVAL)?;
    let directory = open_host(trusted, OFlags::DIRECTORY)?;
    open_without_links(&directory, below, OFlags::empty(), ResolveFlags::BENEATH)
}

/// Opens the FIFO that was examined, whatever is at its path by now. A blocking open would wait for a reader for ever.
fn open_writer(found: &OwnedFd, path: &Path) -> Result<OwnedFd, Failure> {
    let deadline = Instant::now() + READER_PATIENCE;
    loop {
        match rustix::fs::open(
            itself(found),
            OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Err(Errno::NXIO) if Instant::now() < deadline => sleep(READER_POLL),
            Err(Errno::NXIO) => {
                let patience = READER_PATIENCE.as_secs();
                return Err(Failure::new(Step::Open, libc::EAGAIN)
                    .on(path.display().to_string())
                    .note(format!(
                        "nobody opened the log pipe for reading within {patience} s (does Nomad's logmon run?)"
                    )));
            }
            result => return result.at_path(Step::Open, path),
        }
    }
}

fn itself(found: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", found.as_raw_fd())
}

impl Reader {
    /// The task has started: its user keeps the FIFO.
    pub fn keep(&mut self) {
        self.owner = None;
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some((user, group)) = self.owner {
            // Whoever cannot give it back any more has said why the start failed.
            let _ = fchown(&self.fifo, Some(user), Some(group));
        }
    }
}

impl Standard {
    /// Puts them in place, in the process that will be the task.
    pub fn install(&self) -> Result<(), Failure> {
        let output = |index: usize| match &self.outputs[index] {
            Output::Fifo { pipe, .. } | Output::Given(pipe) => pipe,
            Output::Journal(_) | Output::Null => &self.input,
        };
        nix::unistd::dup2_stdin(&self.input).at(Step::Signals)?;
        nix::unistd::dup2_stdout(output(0)).at(Step::Signals)?;
        nix::unistd::dup2_stderr(output(1)).at(Step::Signals)
    }

    /// For the supervisor to hold.
    pub fn into_readers(self) -> Vec<Reader> {
        let reader = |output| match output {
            Output::Fifo { reader, .. } => Some(reader),
            Output::Given(_) | Output::Journal(_) | Output::Null => None,
        };
        self.outputs.into_iter().filter_map(reader).collect()
    }

    /// The log pipes, which the task may reopen.
    pub fn fifos(&self) -> impl Iterator<Item = &OwnedFd> {
        self.outputs.iter().filter_map(|output| match output {
            Output::Fifo { pipe, .. } => Some(pipe),
            Output::Given(_) | Output::Journal(_) | Output::Null => None,
        })
    }
}
