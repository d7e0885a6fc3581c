//! The child's way from the fork to the command: one step after another, each irrevocable. It never returns in success.

use std::convert::Infallible;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::process::{Resource, Rlimit, fchdir, setrlimit, setsid};

use super::confine::Rules;
use super::exec::Command;
use super::place::TaskRoot;
use super::privileges;
use super::report::{self, At, Failure};
use super::stdio::Standard;
use super::supervise;
use crate::breakpoint;
use crate::plan::steps::{Order, Place, Step};
use crate::sys;

/// What the helper prepared for the child before the fork.
#[derive(Debug)]
pub(super) struct Prepared {
    pub order: Order,
    pub root: TaskRoot,
    pub host_proc: OwnedFd,
    pub stdio: Standard,
    pub rules: Rules,
    pub command: Command,
    /// The order's own bytes.
    pub kept: OwnedFd,
}

/// Becomes the task. `channel` leads to the supervisor and closes at exec. The memory is the supervisor's until then, which stands
/// still meanwhile and goes on with it: nothing in it is taken or dropped here, but what was made here.
pub(super) fn become_task(prepared: &Prepared, channel: &OwnedFd) -> Result<Infallible, Failure> {
    let Prepared {
        order,
        root,
        host_proc,
        stdio,
        rules,
        command,
        kept: _,
    } = prepared;
    breakpoint::at(Step::Session);
    supervise::undo_ready()?;
    setsid().at(Step::Session)?;
    stdio.install()?;
    breakpoint::at(Step::OomScore);
    // Before the user changes: after that, /proc/self belongs to root until exec.
    privileges::set_oom_score_adj(host_proc, order.oom_score_adj)
        .at_path(Step::OomScore, order.oom_score_adj.to_string())?;
    breakpoint::at(Step::Keyring);
    privileges::leave_session_keyring()?;
    breakpoint::at(Step::Bounding);
    privileges::cut_bounding(order.bounding)?;
    breakpoint::at(Step::Groups);
    privileges::set_groups([order.gid; 3])?;
    breakpoint::at(Step::User);
    privileges::set_user(order.uid)?;
    breakpoint::at(Step::Ambient);
    privileges::keep_only(order.uid, order.bounding, order.ambient)?;
    breakpoint::at(Step::WorkDir);
    enter_work_dir(&order.work_dir, root)?;
    breakpoint::at(Step::OwnRules);
    let rules = rules.completed(order, root)?;
    rules.hold(|descriptors| report::hold(channel, descriptors))?;
    breakpoint::at(Step::Restrict);
    rules.restrict(order.denials)?;
    breakpoint::at(Step::Signals);
    // Signals were reset when the helper began, where it cost the task nothing; no code since has changed them.
    set_limits(order.open_files)?;
    sys::close_on_exec_from(3).at(Step::Signals)?;
    breakpoint::at(Step::Exec);
    if !order.traced_calls.is_empty() {
        // Last of all: from here on those calls need the tracer.
        sys::trace::stop_at(&order.traced_calls).at_path(Step::Exec, "seccomp")?;
    }
    Err(command.execute())
}

pub(super) fn enter_work_dir(work_dir: &Place, root: &TaskRoot) -> Result<(), Failure> {
    root.open_place(work_dir, OFlags::DIRECTORY)
        .and_then(fchdir)
        .at_path(Step::WorkDir, work_dir.as_path())
}

/// The limits that the plugin was started with, not those it gave itself; and no real-time priority, which would run past
/// the scope's CPU limit.
pub(super) fn set_limits((current, maximum): (u64, u64)) -> Result<(), Failure> {
    let limit = |value| (value != libc::RLIM_INFINITY).then_some(value);
    let files = Rlimit {
        current: limit(current),
        maximum: limit(maximum),
    };
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Nofile, files).at_path(Step::Signals, "RLIMIT_NOFILE")?;
    setrlimit(Resource::Rtprio, none).at_path(Step::Signals, "RLIMIT_RTPRIO")
}
