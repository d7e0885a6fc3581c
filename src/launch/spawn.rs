//! The plugin's end of a start: clones the helper into its PID namespace and hands it its order. Blocking, a millisecond.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::Serialize;

use super::report::{At, EXEC_FAILED, Failure, Message};
use super::{BREAKPOINTS, CONTROL, report};
use crate::breakpoint;
use crate::plan::steps::{Order, Step};
use crate::sys::clone::{self, Program};

/// What EAGAIN of a new process or thread is about.
pub const NO_PROCESS: &str =
    "there may be no more processes: TasksMax= of the agent's unit, or kernel.pid_max of the host";
/// First argument that makes the program the helper.
pub const SUBCOMMAND: &str = "launch";
const ARGV: [&CStr; 2] = [c"nomad-driver-exec2", c"launch"];

/// A helper that prepares itself and then waits for `report::release`, and after it has started the command, for
/// `report::commit`. If `control` is dropped before, it ends by itself, the command with it, and leaves nothing. It is this process' child: whoever holds it reaps it, by `pidfd`.
#[derive(Debug)]
pub struct Parked {
    pub pidfd: OwnedFd,
    /// Its pid in this process' PID namespace.
    pub pid: i32,
    /// For `report::receive`; non-blocking.
    pub control: OwnedFd,
}

/// A helper that has no order yet. It ends by itself when this is dropped, but is not reaped.
#[derive(Debug)]
pub struct Idle(Parked);

impl Idle {
    /// `program` is an O_PATH descriptor of /proc/self/exe, so that a package upgrade cannot put another version in its place.
    pub fn spawn(program: BorrowedFd<'_>) -> Result<Idle, Failure> {
        idle(program).map(Idle)
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.0.pidfd.as_fd()
    }

    /// Lets it end. To be reaped by the pidfd.
    pub fn dismiss(self) -> OwnedFd {
        self.0.pidfd
    }

    /// Gives it its order. `record` is a file of `record::open()`; `output` the task's stdout and stderr for `Stdio::Given`. One
    /// that cannot be given anything comes back with the reason.
    pub fn take(
        self,
        order: &Order,
        record: &File,
        output: Option<&[OwnedFd; 2]>,
    ) -> Result<Parked, (Idle, Failure)> {
        let given = sealed(c"exec2-order", order).and_then(|order| {
            let mut descriptors = vec![record.as_fd(), order.as_fd()];
            descriptors.extend(output.into_iter().flatten().map(AsFd::as_fd));
            report::order(&self.0.control, &descriptors).at(Step::Spawn)
        });
        match given {
            Ok(()) => Ok(self.0),
            Err(failure) => {
                // Its own word counts more than that it does not listen.
                let failure = match report::receive(&self.0.control) {
                    Ok(Some((Message::Failed(its), _))) => its,
                    _ => failure,
                };
                Err((self, failure))
            }
        }
    }
}

fn idle(program: BorrowedFd<'_>) -> Result<Parked, Failure> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .at_path(Step::Spawn, "/dev/null")?;
    let (ours, theirs) = control()?;
    let null = null.as_fd();
    let mut descriptors = vec![null, null, null, theirs.as_fd()];
    let test = breakpoint::for_helper();
    if let Some(test) = &test {
        debug_assert_eq!(descriptors.len(), BREAKPOINTS as usize);
        descriptors.push(test.as_fd());
    }
    let (pid, pidfd) = execute(&Program {
        namespaces: libc::CLONE_NEWPID,
        file: program,
        argv: &ARGV,
        descriptors: &descriptors,
        failure_to: CONTROL,
        failure_tag: EXEC_FAILED,
    })?;
    Ok(Parked {
        pidfd,
        pid,
        control: ours,
    })
}

/// Our end of a helper's control socket, non-blocking, and its own.
pub(super) fn control() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .at(Step::Spawn)?;
    rustix::io::ioctl_fionbio(&ours, true).at(Step::Spawn)?;
    Ok((ours, theirs))
}

pub(super) fn execute(program: &Program<'_>) -> Result<(i32, OwnedFd), Failure> {
    with_signals_blocked(|| clone::spawn(program).map_err(not_spawned))
}

fn not_spawned(error: std::io::Error) -> Failure {
    let failure = Failure::new(Step::Spawn, error.raw_os_error().unwrap_or(0));
    match error.raw_os_error() {
        Some(libc::EAGAIN) => failure.note(NO_PROCESS),
        Some(_) => failure,
        None => failure.note(error.to_string()),
    }
}

/// An order in memory that nobody can change any more.
pub(super) fn sealed(name: &CStr, order: &impl Serialize) -> Result<OwnedFd, Failure> {
    let bytes = rmp_serde::to_vec_named(order)
        .map_err(|error| Failure::new(Step::Spawn, 0).note(error.to_string()))?;
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .at(Step::Spawn)?;
    let mut file = File::from(memory);
    file.write_all(&bytes).at(Step::Spawn)?;
    file.rewind().at(Step::Spawn)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals).at(Step::Spawn)?;
    Ok(file.into())
}

/// Between clone and exec the child has this process' signal handlers, and a handler may write into our pipes.
fn with_signals_blocked<T>(spawn: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .at(Step::Spawn)?;
    let result = spawn();
    before.thread_set_mask().at(Step::Spawn)?;
    result
}
