//! The parent of a task, PID 1 of its namespace: reports whether the command was executed, reaps orphans, and writes the exit
//! record. It keeps what the task's rules need alive, holds no capability once the start is
//! committed, and outlives the plugin.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, set_dumpable_behavior,
    wait,
};
use rustix::thread::CapabilitySet;

use super::cgroup::Memory;
use super::report::{self, At, Failure, News, Word};
use super::stdio::Reader;
use super::{give_up, privileges};
use crate::plan::steps::Step;
use crate::record::{self, Exit};
use crate::sys::{self, SharedPage};

/// The kernel's OOM killer takes it only when there is nothing else to take.
const OOM_SCORE_ADJ: i16 = -999;
/// Real, effective and saved group, taken before the fork. prlimit(2) without CAP_SYS_RESOURCE wants the caller's group to be all three, and a root
/// task, which may take any group, can be only one.
pub(super) const GROUPS: [u32; 3] = [65534, 65533, 65532];

/// What the supervisor needs of the helper that it was.
#[derive(Debug)]
pub(super) struct Watch {
    pub child: i32,
    /// The child's end of this closes when the command is executed.
    pub channel: OwnedFd,
    pub host_proc: OwnedFd,
    pub memory: Memory,
    pub page: SharedPage,
    /// Held for sessions, which are to be what the task is.
    pub order: OwnedFd,
    /// Held, so that the task's log pipes always have a reader.
    pub log_readers: Vec<Reader>,
}

pub(super) fn run(control: OwnedFd, mut watch: Watch) -> ! {
    let Some(main) = Pid::from_raw(watch.child) else {
        sys::exit_now(1);
    };
    let started = withdraw(&watch.host_proc).and_then(|()| {
        let pidfd = pidfd_open(main, PidfdFlags::empty()).at(Step::Fork)?;
        Ok((pidfd, await_exec(&watch.channel, main)?))
    });
    drop((watch.channel, watch.host_proc));
    // For sessions, as long as the task runs.
    let _order = watch.order;
    // Landlock rules below /proc die with their inodes, which these descriptors hold.
    let _held = match started {
        Ok((pidfd, held)) => {
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

/// Becomes as uninteresting as possible, to the task and to the OOM killer.
fn withdraw(host_proc: &OwnedFd) -> Result<(), Failure> {
    let _ = rustix::thread::set_name(c"exec2-supervise");
    // Refused where the plugin itself may not lower it (no CAP_SYS_RESOURCE); then it keeps what it has.
    let _ = privileges::set_oom_score_adj(host_proc, OOM_SCORE_ADJ);
    // What it takes to give Nomad's log pipes back, until the start is done.
    privileges::keep_capabilities(CapabilitySet::CHOWN).at(Step::Fork)?;
    // From here on a SIGTERM of the outside is not lost, but waits to be found: systemd sends it to all of a scope.
    sys::block_signal(libc::SIGTERM).at(Step::Fork)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Fork)
}

/// Follows the child until its command is executed. Returns the descriptors that it wants held.
fn await_exec(channel: &OwnedFd, main: Pid) -> Result<Vec<OwnedFd>, Failure> {
    let mut held = Vec::new();
    loop {
        match report::news(channel).at(Step::Exec)? {
            News::Hold(more) => held.extend(more),
            News::Failed(failure) => {
                reap_until(main);
                return Err(failure);
            }
            // The child hands over its ruleset before it executes anything.
            News::Closed if held.is_empty() => {
                let status = reap_until(main);
                return Err(Failure::new(Step::Fork, 0).note(death(status)));
            }
            News::Closed => return Ok(held),
        }
    }
}

fn death(status: WaitStatus) -> String {
    match status.terminating_signal() {
        Some(signal) => format!(
            "the task's process was killed by signal {signal} before its command ran (is its memory limit too low?)"
        ),
        None => "the task's process ended before its command ran".into(),
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
