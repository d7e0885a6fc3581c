//! The session's helper: brings one more process into a task that runs already, under the very rules, limits and user of the
//! task, and tells how that ended. It stays outside of the task's namespaces and scope, where the task neither sees it nor
//! slows it down.

mod spawn;
mod step_in;
mod watch;

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::exec::Command;
use super::place::open_host;
use super::report::{At, Failure};
use super::{give_up, parse, seccomp};
use crate::breakpoint;
use crate::plan::session::{SessionOrder, SessionStep};
use crate::plan::steps::{Identity, Step};
use crate::sys;
use crate::sys::clone::{self, Fork};
pub use spawn::{Entrance, Helper, SUBCOMMAND, spawn};
use step_in::Prepared;
use watch::Watch;

/// What `spawn` puts where, after /dev/null as 0, 1 and 2.
const CONTROL: RawFd = 3;
const ORDER: RawFd = 4;
const TASK: RawFd = 5;
const RULESET: RawFd = 6;
const SUPERVISOR: RawFd = 7;
/// The session's cgroup: its cgroup.procs and cgroup.kill, opened for writing.
const PROCESSES: RawFd = 8;
const KILL: RawFd = 9;
/// The command's standard descriptors, unless it has a terminal.
const STDIO: [RawFd; 3] = [10, 11, 12];
/// A debug build's alone, for tests.
const BREAKPOINTS: RawFd = 13;

/// The helper's whole life. `main` calls it before there is any thread, parser or logger.
pub fn run() -> ! {
    sys::reset_signals();
    let control = sys::inherited(CONTROL)
        .ok()
        .filter(|fd| sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET));
    let Some(control) = control else {
        eprintln!(
            "\"{SUBCOMMAND}\" is how the plugin starts a session's helper; it does nothing by hand."
        );
        sys::exit_now(2);
    };
    breakpoint::adopt(sys::inherited(BREAKPOINTS));
    match prepare().and_then(fork) {
        Ok((prepared, _, channel, Fork::Child)) => {
            drop(control);
            let Err(failure) = step_in::step_in(prepared, &channel);
            give_up(&channel, &failure)
        }
        Ok((prepared, kill, channel, Fork::Parent { child })) => {
            // The child's ends of pipes and its copy of the ruleset are the child's alone from here on.
            drop(prepared);
            watch::run(Watch {
                control,
                channel,
                child,
                kill,
            })
        }
        Err(failure) => give_up(&control, &failure),
    }
}

/// What happens outside of the task. Nothing of the task's is opened here.
fn prepare() -> Result<(Prepared, File), Failure> {
    rustix::thread::set_name(c"exec2-session").at(Step::Open)?;
    // A signal to the plugin's process group is not for the session.
    rustix::process::setsid().at(Step::Open)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    breakpoint::at(SessionStep::Orders);
    // Kept across the fork, until the user changes: the task's processes, root among them, cannot open what /proc shows of it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Open)?;
    let inherited = |number| sys::inherited(number).at(Step::Open);
    let order: SessionOrder = parse(&inherited(ORDER)?)?;
    let task: Identity = parse(&inherited(TASK)?)?;
    // The task's own is read-only, and of its namespace: oom_score_adj is written through this one.
    let host_proc = open_host("/proc".as_ref(), OFlags::DIRECTORY).at_path(Step::Open, "/proc")?;
    let stdio = match order.terminal {
        Some(_) => None,
        None => Some(stdio()?),
    };
    let prepared = Prepared {
        command: Command::new(&order.command, &order.args, &task.env, task.uid)?,
        terminal: order.terminal,
        task,
        ruleset: inherited(RULESET)?,
        supervisor: inherited(SUPERVISOR)?,
        processes: File::from(inherited(PROCESSES)?),
        host_proc,
        stdio,
    };
    let kill = File::from(inherited(KILL)?);
    breakpoint::at(SessionStep::TakeFilter);
    // Before the session's cgroup, so that the task does not pay for it.
    seccomp::install(prepared.task.user_namespaces)?;
    Ok((prepared, kill))
}

fn stdio() -> Result<[OwnedFd; 3], Failure> {
    let [input, output, errors] = STDIO.map(|number| sys::inherited(number).at(Step::Open));
    Ok([input?, output?, errors?])
}

fn fork((prepared, kill): (Prepared, File)) -> Result<(Prepared, File, OwnedFd, Fork), Failure> {
    breakpoint::at(SessionStep::EnterPids);
    setns(&prepared.supervisor, CloneFlags::CLONE_NEWPID).at(Step::Unshare)?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .at(Step::Fork)?;
    breakpoint::at(SessionStep::ForkSession);
    match clone::fork() {
        Ok(Fork::Child) => Ok((prepared, kill, theirs, Fork::Child)),
        Ok(parent) => Ok((prepared, kill, ours, parent)),
        // The kernel's word for a namespace whose PID 1 is ending.
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
            Err(Failure::new(Step::Fork, libc::ENOMEM).note("is the task ending?"))
        }
        Err(error) => Err(error).at(Step::Fork),
    }
}
