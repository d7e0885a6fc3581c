//! The session's process, from the fork to the command. Until its user changes it is root inside of the task's namespaces:
//! nothing below the task's directory is opened before that, and of the rest only its terminals.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, fstatfs};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::super::confine::log_flags;
use super::super::exec::Command;
use super::super::place::{TaskRoot, open_resolved};
use super::super::report::{self, At, Failure};
use super::super::{privileges, task};
use crate::breakpoint;
use crate::plan::session::{SessionStep, WindowSize};
use crate::plan::steps::{Identity, Step};
use crate::sys;

/// Of the task's own terminals, whatever lies beside them in /dev.
const TERMINALS: &str = "/dev/pts/ptmx";
/// statfs type of devpts.
const DEVPTS_MAGIC: u64 = 0x1cd1;

#[derive(Debug)]
pub(super) struct Prepared {
    pub command: Command,
    /// `None` if it has `stdio`.
    pub terminal: Option<WindowSize>,
    pub task: Identity,
    pub ruleset: OwnedFd,
    /// A pidfd of the task's supervisor, whose namespaces are the task's, whatever the task has made of its own.
    pub supervisor: OwnedFd,
    pub processes: File,
    pub host_proc: OwnedFd,
    pub stdio: Option<[OwnedFd; 3]>,
}

/// Becomes the command. `channel` leads to the helper and closes at exec.
pub(super) fn step_in(mut prepared: Prepared, channel: &OwnedFd) -> Result<Infallible, Failure> {
    let task = prepared.task;
    breakpoint::at(SessionStep::Lead);
    setsid().at(Step::Session)?;
    breakpoint::at(SessionStep::TakeScore);
    // Before the scope: at its memory limit, the OOM killer would pass over a newcomer with the agent's score. And before the user
    // changes: after that, /proc/self belongs to root until exec.
    privileges::set_oom_score_adj(&prepared.host_proc, task.oom_score_adj)
        .at_path(Step::OomScore, task.oom_score_adj.to_string())?;
    breakpoint::at(SessionStep::EnterScope);
    // 0 is whoever writes it.
    prepared.processes.write_all(b"0").map_err(|error| {
        Failure::new(Step::Scope, error.raw_os_error().unwrap_or(0)).note("is the task ending?")
    })?;
    breakpoint::at(SessionStep::EnterNamespaces);
    setns(
        &prepared.supervisor,
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .at(Step::Unshare)?;
    breakpoint::at(SessionStep::Terminal);
    let terminal = match (prepared.terminal, prepared.stdio) {
        (Some(size), _) => Some(terminal(size, &task)?),
        (None, Some(stdio)) => {
            hand_over(&stdio, &task)?;
            None
        }
        (None, None) => None,
    };
    breakpoint::at(SessionStep::TakeLimits);
    // With the capability to raise them: the agent's may have been lowered since the task started.
    task::set_limits(task.open_files)?;
    breakpoint::at(SessionStep::TakeUser);
    // As at the task's start, its user need not be able to reach it by its path.
    let root = TaskRoot::open(&task.task_dir, Step::WorkDir)?;
    privileges::leave_session_keyring()?;
    privileges::cut_bounding(task.bounding)?;
    privileges::set_groups([task.gid; 3])?;
    privileges::set_user(task.uid)?;
    privileges::keep_only(task.uid, task.bounding, task.ambient)?;
    breakpoint::at(SessionStep::TakeWorkDir);
    task::enter_work_dir(&task.work_dir, &root)?;
    breakpoint::at(SessionStep::TakeRules);
    rustix::thread::set_no_new_privs(true).at(Step::Restrict)?;
    // The domain that this makes is a sibling of the task's, with the same rights.
    sys::landlock_restrict_self(prepared.ruleset.as_fd(), log_flags(task.denials))
        .at(Step::Restrict)?;
    breakpoint::at(SessionStep::Execute);
    report::session_ready(channel, terminal.as_ref().map(AsFd::as_fd)).at(Step::Session)?;
    sys::close_on_exec_from(3).at(Step::Signals)?;
    Err(prepared.command.execute())
}

/// A terminal of the task's own, controlled by this process, as its standard descriptors. Returns the master.
fn terminal(size: WindowSize, task: &Identity) -> Result<OwnedFd, Failure> {
    let found = open_resolved(TERMINALS.as_ref()).at_path(Step::Session, TERMINALS)?;
    if fstatfs(&found).at_path(Step::Session, TERMINALS)?.f_type as u64 != DEVPTS_MAGIC {
        return Err(Failure::new(Step::Session, 0)
            .on(TERMINALS)
            .note("no terminals are there"));
    }
    let master = rustix::fs::open(
        TERMINALS,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at_path(Step::Session, TERMINALS)?;
    unlockpt(&master).at_path(Step::Session, TERMINALS)?;
    // By the master: at a path there may be another.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).at_path(Step::Session, TERMINALS)?;
    fchown(
        &slave,
        Some(Uid::from_raw(task.uid)),
        Some(Gid::from_raw(task.gid)),
    )
    .and_then(|()| fchmod(&slave, Mode::from_raw_mode(0o620)))
    .at_path(Step::Session, TERMINALS)?;
    let window = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, window).at(Step::Session)?;
    ioctl_tiocsctty(&slave).at(Step::Session)?;
    install([&slave, &slave, &slave])?;
    Ok(master)
}

/// Pipes as the standard descriptors, the task's own, so that it can open them again as /dev/stdout. A descriptor of a file of the host
/// would let root in the task change that, past its view and its rules.
fn hand_over(stdio: &[OwnedFd; 3], task: &Identity) -> Result<(), Failure> {
    for pipe in stdio {
        let mode = fstat(pipe).at(Step::Session)?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::Fifo {
            return Err(Failure::new(Step::Session, 0).note("a stream of it is no pipe"));
        }
        let (user, group) = (Uid::from_raw(task.uid), Gid::from_raw(task.gid));
        fchown(pipe, Some(user), Some(group)).at(Step::Session)?;
    }
    let [input, output, errors] = stdio;
    install([input, output, errors])
}

fn install([input, output, errors]: [&OwnedFd; 3]) -> Result<(), Failure> {
    nix::unistd::dup2_stdin(input).at(Step::Session)?;
    nix::unistd::dup2_stdout(output).at(Step::Session)?;
    nix::unistd::dup2_stderr(errors).at(Step::Session)
}
