//! The parent of a task, PID 1 of its namespace: reports whether the command was executed, reaps orphans, and writes the exit
//! record. It keeps what the task's rules need alive, holds no capability once the start is
//! committed, and outlives the plugin.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{
    DumpableBehavior, Pid, WaitOptions, WaitStatus, set_dumpable_behavior, wait,
};
use rustix::thread::CapabilitySet;

use super::cgroup::Memory;
use super::report::{self, At, Failure, News, Word};
use super::stdio::{Reader, Standard};
use super::{give_up, privileges};
use crate::plan::steps::Step;
use crate::record::{self, Exit};
use crate::sys::{self, SharedPage};

/// The kernel's OOM killer takes it only when there is nothing else to take.
const OOM_SCORE_ADJ: i16 = -999;
/// Real, effective and saved group, taken before the fork. prlimit(2) without CAP_SYS_RESOURCE wants the caller's group to be all three, and a root
/// task, which may take any group, can be only one.
const GROUPS: [u32; 3] = [65534, 65533, 65532];

#[derive(Debug)]
pub(super) struct Child {
    pub pid: i32,
    pub pidfd: OwnedFd,
    /// Or has begun to, so that only the kernel could end it then. Otherwise it has ended.
    pub has_executed: bool,
    /// The child's end of this closes when the command is executed.
    pub channel: OwnedFd,
}

/// What the supervisor needs of the helper that it was.
#[derive(Debug)]
pub(super) struct Watch {
    pub child: Child,
    pub memory: Memory,
    pub page: SharedPage,
    /// Held for sessions, which are to be what the task is.
    pub order: OwnedFd,
    /// Held, so that the task's log pipes always have a reader.
    pub log_readers: Vec<Reader>,
}

/// What cannot wait until the command runs: that is before this process goes on. Until it has withdrawn, it is the capabilities of the
/// PID namespace's init that keep the task from it, and that it is not dumpable.
pub(super) fn make_ready() -> Result<(), Failure> {
    // The command could limit its supervisor otherwise.
    privileges::set_groups(GROUPS)?;
    // With its group the kernel resets this.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Fork)?;
    // A SIGTERM of the outside is not lost, but waits to be found: systemd sends it to all of a scope.
    outside_signal().thread_block().at(Step::Fork)
}

/// The child's part of it: its groups change later.
pub(super) fn undo_ready() -> Result<(), Failure> {
    outside_signal().thread_unblock().at(Step::Session)
}

fn outside_signal() -> SigSet {
    SigSet::from(Signal::SIGTERM)
}

/// Gives the log pipes back and tells why a child has ended without executing the command, and ends.
pub(super) fn bury(control: &OwnedFd, child: &Child, stdio: Standard) -> ! {
    let main = main(child);
    drop(stdio);
    if let Some(signal) = reap_until(main).terminating_signal() {
        // It may have died halfway through an allocation of what is this process' heap, too.
        let _ = report::child_killed(control, signal);
        sys::exit_now(127);
    }
    let failure = match follow(&child.channel) {
        Err(failure) => failure,
        // What it wanted to say did not arrive.
        Ok(_) => Failure::new(Step::Exec, 0).note("the command was not executed"),
    };
    give_up(control, &failure)
}

fn main(child: &Child) -> Pid {
    // clone(2) gave it.
    Pid::from_raw(child.pid).unwrap_or_else(|| sys::exit_now(1))
}

pub(super) fn run(control: OwnedFd, mut watch: Watch) -> ! {
    let main = main(&watch.child);
    let Child { pidfd, channel, .. } = watch.child;
    let started = withdraw().and_then(|()| follow(&channel));
    drop(channel);
    // For sessions, as long as the task runs.
    let _order = watch.order;
    // Landlock rules below /proc die with their inodes, which these descriptors hold.
    let _held = match started {
        Ok(held) => {
            commit(control, pidfd.as_fd(), &mut watch.log_readers);
            held
        }
        Err(failure) => {
            drop(watch.log_readers);
            give_up(&control, &failure)
        }
    };
    sys::trim_heap();

    let status = reap_until(main);
    let exit = Exit {
        code: status.exit_status().unwrap_or(0),
        signal: status.terminating_signal().unwrap_or(0),
        oom_kills: watch.memory.oom_kills(),
        memory_peak_bytes: watch.memory.peak_bytes(),
        memory_max_bytes: watch.memory.max_bytes(),
        was_terminated: sys::take_signal_of_outside(libc::SIGTERM),
        ended_unix_nanos: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64),
    };
    record::write(watch.page.bytes(), &exit);
    // The kernel kills whatever is left in the namespace.
    sys::exit_now(0)
}

/// Hands the task over to the plugin. If that died before it could find the task again, nothing of the task stays.
fn commit(control: OwnedFd, main: BorrowedFd<'_>, log_readers: &mut Vec<Reader>) {
    let word = report::started(&control, main).and_then(|()| report::wait_for_commit(&control));
    if !matches!(word, Ok(Word::Given)) {
        log_readers.clear();
        // The kernel ends the command, and whatever it has started by now.
        sys::exit_now(1);
    }
    log_readers.iter_mut().for_each(Reader::keep);
    if privileges::keep_capabilities(CapabilitySet::empty()).is_err() {
        sys::exit_now(1);
    }
}

/// Before the scope: the OOM killer passes over a child that shares memory until it executes, and with the agent's -1000 for the
/// helper there would be nobody in the scope to end when its memory is used up.
pub(super) fn spare_from_oom_killer(host_proc: &OwnedFd) {
    // Refused where the plugin itself may not lower it (no CAP_SYS_RESOURCE); then it keeps what it has.
    let _ = privileges::set_oom_score_adj(host_proc, OOM_SCORE_ADJ);
}

/// Becomes as uninteresting to the task as possible.
fn withdraw() -> Result<(), Failure> {
    let _ = rustix::thread::set_name(c"exec2-supervise");
    // What it takes to give Nomad's log pipes back, until the start is done.
    privileges::keep_capabilities(CapabilitySet::CHOWN).at(Step::Fork)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Fork)
}

/// Hears what the child says, until it executes the command or ends. Returns the descriptors that it wants held.
fn follow(channel: &OwnedFd) -> Result<Vec<OwnedFd>, Failure> {
    let mut held = Vec::new();
    loop {
        match report::news(channel).at(Step::Exec)? {
            News::Hold(more) => held.extend(more),
            News::Failed(failure) => return Err(failure),
            // It hands over its ruleset before it executes anything.
            News::Closed if held.is_empty() => {
                let ended = "the task's process ended before its command ran";
                return Err(Failure::new(Step::Fork, 0).note(ended));
            }
            News::Closed => return Ok(held),
        }
    }
}

/// Reaps whatever ends in the namespace, until that is the main process.
fn reap_until(main: Pid) -> WaitStatus {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == main => return status,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // The main process is a child until it is reaped, so there is always one to wait for.
            Err(_) => sys::exit_now(1),
        }
    }
}
