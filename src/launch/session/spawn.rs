//! The plugin's end of a session: takes from the task's supervisor what makes a process one of the task's, and spawns the
//! helper with it. Blocking, a millisecond.

use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::super::report::{At, EXEC_FAILED, Failure};
use super::super::spawn::{control, execute, sealed};
use super::{BREAKPOINTS, CONTROL, STDIO};
use crate::breakpoint;
use crate::plan::session::SessionOrder;
use crate::plan::steps::Step;
use crate::sys::clone::Program;

/// First argument that makes the program the session's helper.
pub const SUBCOMMAND: &str = "session";
const ARGV: [&CStr; 2] = [c"nomad-driver-exec2", c"session"];
/// What /proc shows of the two descriptors that a supervisor keeps.
const RULESET: &str = "anon_inode:[landlock-ruleset]";
const ORDER: &str = "/memfd:exec2-order (deleted)";

/// Where a session goes.
#[derive(Debug)]
pub struct Entrance<'a> {
    /// A pidfd of the task's supervisor.
    pub supervisor: BorrowedFd<'a>,
    /// cgroup.procs of the session's cgroup, opened for writing.
    pub processes: BorrowedFd<'a>,
    /// Its cgroup.kill.
    pub kill: BorrowedFd<'a>,
}

/// A session's helper. It is this process' child: whoever holds it reaps it, by `pidfd`. When `control` is dropped, it kills
/// the session and ends.
#[derive(Debug)]
pub struct Helper {
    pub pidfd: OwnedFd,
    /// Its pid in this process' PID namespace.
    pub pid: i32,
    /// For `report::receive`; non-blocking.
    pub control: OwnedFd,
}

/// Starts the helper. `stdio` are the command's standard descriptors, which it does not have with a terminal.
pub fn spawn(
    program: BorrowedFd<'_>,
    entrance: &Entrance<'_>,
    order: &SessionOrder,
    stdio: Option<[OwnedFd; 3]>,
) -> Result<Helper, Failure> {
    let kept = Kept::of(entrance.supervisor)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .at_path(Step::Spawn, "/dev/null")?;
    let (ours, theirs) = control()?;
    let order = sealed(c"exec2-session", order)?;
    let null = null.as_fd();
    let mut descriptors = vec![
        null,
        null,
        null,
        theirs.as_fd(),
        order.as_fd(),
        kept.order.as_fd(),
        kept.ruleset.as_fd(),
        entrance.supervisor,
        entrance.processes,
        entrance.kill,
    ];
    if let Some(stdio) = &stdio {
        debug_assert_eq!(descriptors.len(), STDIO[0] as usize);
        descriptors.extend(stdio.iter().map(AsFd::as_fd));
    }
    let test = breakpoint::for_helper();
    if let Some(test) = &test {
        descriptors.resize(BREAKPOINTS as usize, null);
        descriptors.push(test.as_fd());
    }
    let (pid, pidfd) = execute(&Program {
        namespaces: 0,
        file: program,
        argv: &ARGV,
        descriptors: &descriptors,
        failure_to: CONTROL,
        failure_tag: EXEC_FAILED,
    })?;
    Ok(Helper {
        pidfd,
        pid,
        control: ours,
    })
}

/// What a supervisor keeps of its task's start. Nobody else can add to it or change it.
#[derive(Debug)]
struct Kept {
    order: OwnedFd,
    ruleset: OwnedFd,
}

impl Kept {
    fn of(supervisor: BorrowedFd<'_>) -> Result<Kept, Failure> {
        let ending = || Failure::new(Step::Spawn, 0).note("the task is ending");
        let pid = pid(supervisor).ok_or_else(ending)?;
        let dir = format!("/proc/{pid}/fd");
        let open: Vec<_> = fs::read_dir(&dir)
            .map_err(|_| ending())?
            .flatten()
            .collect();
        // It lives with at least the two, or is dead.
        if open.is_empty() {
            return Err(ending());
        }
        let number = |name: &str| -> Option<i32> {
            open.iter().find_map(|entry| {
                let is_it = fs::read_link(entry.path()).is_ok_and(|link| link == Path::new(name));
                is_it.then(|| entry.file_name().to_str()?.parse().ok())?
            })
        };
        let take = |name: &str| {
            let number = number(name).ok_or_else(|| {
                Failure::new(Step::Spawn, 0).note(
                    "the task's supervisor keeps no rules for sessions; restart the task, so that this release of the driver starts it",
                )
            })?;
            // Through the pidfd: should the pid have become another's meanwhile, this fails.
            pidfd_getfd(supervisor, number, PidfdGetfdFlags::empty()).map_err(|errno| {
                let failure = Failure::new(Step::Spawn, errno.raw_os_error());
                match errno {
                    rustix::io::Errno::PERM => failure.note(
                        "the driver may not read the task's rules: it needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
                    ),
                    _ => failure,
                }
            })
        };
        Ok(Kept {
            order: take(ORDER)?,
            ruleset: take(RULESET)?,
        })
    }
}

/// `None` once it has been reaped.
fn pid(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}
