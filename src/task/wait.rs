//! How a task ended: woken by the supervisor's pidfd, told by its record.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::log::of_task;
use super::oom;
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
            let traces = Traces::of(&task);
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
            let ended = tasks.conclude(&task, record, traces).await;
            tasks.tell_end(&task, &ended);
            tasks.unfollow(&task);
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
pub(super) async fn ended(pidfd: OwnedFd) -> io::Result<()> {
    let _ready = sys::readable(pidfd)?.readable().await?;
    Ok(())
}

async fn readable(pidfd: &OwnedFd) -> io::Result<()> {
    ended(pidfd.try_clone()?).await
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

/// What the kernel tells of an end, beside the record.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Traces {
    /// The signal that killed the supervisor, if it was our child.
    supervisor_killed_by: Option<i32>,
    /// The main process' exit, by a pidfd that was opened before it.
    main: Option<Exit>,
}

/// An exit code, or the number of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exit {
    code: i32,
    signal: i32,
}

impl Exit {
    const KILLED: Exit = Exit {
        code: 0,
        signal: signal::KILL,
    };

    /// By a wait(2) status.
    fn of_status(status: i32) -> Exit {
        if libc::WIFSIGNALED(status) {
            Exit {
                code: 0,
                signal: libc::WTERMSIG(status),
            }
        } else {
            Exit {
                code: libc::WEXITSTATUS(status),
                signal: 0,
            }
        }
    }
}

impl Traces {
    fn of(task: &Task) -> Traces {
        let pidfd = task.main_pidfd.as_ref();
        Traces {
            supervisor_killed_by: task.supervisor_pidfd.as_ref().and_then(reap),
            main: pidfd
                .and_then(|pidfd| sys::exit_status(pidfd.as_fd()))
                .map(Exit::of_status),
        }
    }

    /// Where there is no record. Whoever kills the supervisor kills its whole PID namespace: the main process has died of
    /// SIGKILL, too, unless the kernel knows better.
    fn exit(self) -> Option<Exit> {
        let killed = self.supervisor_killed_by.map(|_| Exit::KILLED);
        self.main.or(killed)
    }
}

impl TaskTable {
    /// The truth about an end, and what an operator should know of it. A missing or torn record is a failure, never success.
    pub(super) async fn conclude(&self, task: &Task, record: Record, traces: Traces) -> Ended {
        let (exit, at, kills) = match (record, traces.exit()) {
            (Record::Exited(exit), _) => {
                let at = UNIX_EPOCH + Duration::from_nanos(exit.ended_unix_nanos);
                let (code, signal) = (exit.code, exit.signal);
                (Exit { code, signal }, at, Some(exit))
            }
            (Record::Open | Record::Torn, Some(exit)) => (exit, SystemTime::now(), None),
            (Record::Open | Record::Torn, None) => {
                let error = format!(
                    "{} ended without an exit record: its supervisor was killed, or /run was emptied",
                    task.unit
                );
                return Ended {
                    result: ExitResult {
                        code: 1,
                        error: Some(error),
                        ..ExitResult::default()
                    },
                    at: SystemTime::now(),
                };
            }
        };
        let oom_killed = match &kills {
            Some(record) if record.oom_kills > 0 => self.blame(task, exit, record, at).await,
            _ => false,
        };
        let is_ours = task.is_stopping.load(Ordering::Relaxed);
        let is_killed = traces.supervisor_killed_by.is_some() || exit == Exit::KILLED;
        if kills.is_none() && is_killed && !is_ours {
            self.tell(
                task,
                format!(
                    "{0} was killed from outside of Nomad, with its supervisor: by `systemctl stop` because it did not end on SIGTERM, by `systemctl kill`, or by systemd-oomd; see `journalctl -u {0}`",
                    task.unit
                ),
            );
        }
        if kills.is_some_and(|record| record.was_terminated) && !is_ours {
            self.tell(
                task,
                format!(
                    "{0} was stopped from outside of Nomad: all of it got SIGTERM, as by `systemctl stop` or when the host shuts down; see `journalctl -u {0}`",
                    task.unit
                ),
            );
        }
        Ended {
            result: ExitResult {
                // 128 + n is what a shell and Nomad's own executor say of signal n.
                code: if exit.signal == 0 {
                    exit.code
                } else {
                    128 + exit.signal
                },
                signal: exit.signal,
                oom_killed,
                error: None,
            },
            at,
        }
    }

    /// Tells of the OOM killer's kills; whether the end is its doing.
    async fn blame(
        &self,
        task: &Task,
        exit: Exit,
        record: &record::Exit,
        ended_at: SystemTime,
    ) -> bool {
        let victims = oom::victims(task.cgroup.path_in_hierarchy()).await;
        let (max, peak) = (record.memory_max_bytes, record.memory_peak_bytes);
        self.tell_kills(task, record.oom_kills, &victims, max, peak);
        let is_killed = task.is_killed.load(Ordering::Relaxed);
        let main_was_killed = exit.signal == signal::KILL && !is_killed;
        // What Nomad asked to end has ended for that.
        let is_ours = is_killed || task.is_stopping.load(Ordering::Relaxed);
        if (exit.code, exit.signal) == (0, 0) || is_ours && !main_was_killed {
            return false;
        }
        let ago = ended_at.elapsed().unwrap_or_default();
        let ended_at = oom::now().saturating_sub(ago);
        oom::is_to_blame(
            task.main.pid,
            main_was_killed,
            // For want of the kernel's word nobody else is blamed for what Nomad wanted.
            if is_ours {
                victims.len() as u64
            } else {
                record.oom_kills
            },
            &victims,
            ended_at,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_word_comes_before_what_a_killed_supervisor_implies() {
        let killed = Some(signal::KILL);
        let exited = Exit::of_status(7 << 8);
        let traces = |supervisor_killed_by, main| Traces {
            supervisor_killed_by,
            main,
        };
        assert_eq!(traces(killed, Some(exited)).exit(), Some(exited));
        assert_eq!((exited.code, exited.signal), (7, 0));
        assert_eq!(traces(killed, None).exit(), Some(Exit::KILLED));
        assert_eq!(
            traces(None, Some(Exit::of_status(9))).exit(),
            Some(Exit::KILLED)
        );
        assert_eq!(traces(None, None).exit(), None);
    }
}
