//! How a task ended: woken by the supervisor's pidfd, told by its record.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::log::of_task;
use super::table::{Ended, Task, TaskTable, record_path};
use super::types::ExitResult;
use crate::plan::signal;
use crate::plan::unit::UnitName;
use crate::record::{self, Record};
use crate::sys;

/// Before what failed for want of descriptors is tried again.
const AGAIN: Duration = Duration::from_secs(1);

impl TaskTable {
    /// Watches a task until it ends, however long that takes.
    pub(super) fn watch(&self, task: Arc<Task>) {
        let tasks = self.clone();
        tokio::spawn(async move {
            if let Some(pidfd) = &task.supervisor_pidfd {
                over(pidfd, &task).await;
            }
            let killed = task.supervisor_pidfd.as_ref().and_then(reap);
            // Without a descriptor left to read with, the record is there all the same.
            let record = loop {
                match read_record(&task.unit) {
                    Ok(record) => break record,
                    Err(reason) => {
                        of_task!(error, task.names, task.unit, %reason, "the exit record cannot be read; trying again");
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            };
            let ended = outcome(&task, record, killed);
            of_task!(
                info,
                task.names,
                task.unit,
                exit_code = ended.result.code,
                signal = ended.result.signal,
                oom_killed = ended.result.oom_killed,
                "task ended"
            );
            tasks.tell_end(&task, &ended);
            task.exit.send_replace(Some(ended));
        });
    }
}

impl Task {
    pub(super) async fn wait(&self) -> Ended {
        let mut exit = self.exit.subscribe();
        // The sender is a field of `self`, so the channel is open for as long as we wait.
        match exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|ended| ended.clone())
        {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Waits at most so long; whether it ended.
    pub(super) async fn ends_within(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.wait()).await.is_ok()
    }
}

/// Until the process has ended. PID 1 of a PID namespace ends only after every process in it.
async fn readable(pidfd: &OwnedFd) -> io::Result<()> {
    let _ready = sys::readable(pidfd.try_clone()?)?.readable().await?;
    Ok(())
}

/// The same, however long it takes to get a descriptor to watch with: until then the process counts as alive.
async fn over(pidfd: &OwnedFd, task: &Task) {
    while let Err(reason) = readable(pidfd).await {
        of_task!(error, task.names, task.unit, %reason, "the supervisor cannot be watched; trying again");
        tokio::time::sleep(AGAIN).await;
    }
}

/// Until a helper that never became a supervisor has ended and is reaped.
pub(super) async fn reaped(pidfd: OwnedFd) {
    while readable(&pidfd).await.is_err() {
        tokio::time::sleep(AGAIN).await;
    }
    reap(&pidfd);
}

/// A record that is not there is torn; one that cannot be read may be whole.
pub(super) fn read_record(unit: &UnitName) -> io::Result<Record> {
    match fs::read(record_path(unit)) {
        Ok(page) => Ok(record::read(&page)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::Torn),
        Err(error) => Err(error),
    }
}

/// Reaps the supervisor if it is our child, and tells the signal that killed it, if one did.
fn reap(pidfd: &OwnedFd) -> Option<i32> {
    match waitid(
        Id::PIDFd(pidfd.as_fd()),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
    ) {
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal as i32),
        _ => None,
    }
}

/// The truth about an end. A missing or torn record is a failure, never success.
pub(super) fn outcome(task: &Task, record: Record, supervisor_killed_by: Option<i32>) -> Ended {
    let now = SystemTime::now();
    match (record, supervisor_killed_by) {
        (Record::Exited(exit), _) => Ended {
            result: ExitResult {
                // 128 + n is what a shell and Nomad's own executor say of signal n.
                code: if exit.signal == 0 {
                    exit.code
                } else {
                    128 + exit.signal
                },
                signal: exit.signal,
                oom_killed: exit.signal == signal::KILL
                    && exit.oom_kills > 0
                    && !task.is_killed.load(Ordering::Relaxed),
                error: None,
            },
            at: UNIX_EPOCH + Duration::from_nanos(exit.ended_unix_nanos),
        },
        // Whoever kills the supervisor kills its whole PID namespace: the main process has died of SIGKILL, too.
        (Record::Open, Some(_)) => Ended {
            result: ExitResult {
                code: 128 + signal::KILL,
                signal: signal::KILL,
                ..ExitResult::default()
            },
            at: now,
        },
        (Record::Open | Record::Torn, _) => Ended {
            result: ExitResult {
                code: 1,
                error: Some(format!(
                    "{} ended without an exit record: its supervisor was killed, or /run was emptied",
                    task.unit
                )),
                ..ExitResult::default()
            },
            at: now,
        },
    }
}
