//! Ends tasks: StopTask, SignalTask, DestroyTask. A kill hits the main process first, so that the supervisor can still
//! write the record, and then the whole scope.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::warn;

use super::table::{Task, TaskTable, record_path, remove_record, send};
use super::types::{Destroy, DriverError, TaskId};
use crate::cgroup::Cgroup;
use crate::plan::signal;
use crate::plan::unit::{RESERVE_SLICE, SHARE_SLICE, SLICE, UnitName};
use crate::text::UnitText;

/// How long a killed process may take to end before the rest of its scope is killed. Only one in uninterruptible sleep
/// takes longer than a moment.
const AFTER_KILL: Duration = Duration::from_secs(2);
/// How long the scope may take to empty after that; then the call fails and Nomad tries again.
const AFTER_KILL_ALL: Duration = Duration::from_secs(10);

/// Before a destroy that failed is tried again.
const DESTROY_AGAIN: Duration = Duration::from_secs(10);

impl TaskTable {
    /// Sends `signal` to the main process, and kills the task if it has not ended after `timeout`. Returns when its scope
    /// is empty.
    pub(super) async fn stop_task(
        &self,
        id: &TaskId,
        timeout: Duration,
        signal: &str,
    ) -> Result<(), DriverError> {
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        if task.ended().is_some() {
            return Ok(());
        }
        let number = match signal {
            "" => signal::DEFAULT_KILL,
            // A misspelt kill_signal must not make a task unstoppable.
            name => signal::parse(name).unwrap_or_else(|error| {
                warn!(task_id = %UnitText::new(id.as_str()), "kill_signal: {error}; SIGINT is sent");
                signal::DEFAULT_KILL
            }),
        };
        task.signal(number)?;
        if !task.ends_within(timeout).await {
            task.kill().await?;
        }
        task.empty().await
    }

    /// Sends a signal to the main process.
    pub(super) fn signal_task(&self, id: &TaskId, signal: &str) -> Result<(), DriverError> {
        let number =
            signal::parse(signal).map_err(|error| DriverError::Permanent(error.to_string()))?;
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        task.signal(number)
    }

    /// Forgets a task and removes all that is left of it. An id that we do not know is cleaned up by its name alone: after
    /// a failed recovery Nomad has nothing else.
    pub(super) async fn destroy_task(&self, id: &TaskId, how: Destroy) -> Result<(), DriverError> {
        let task = self.find(id);
        if how == Destroy::OnlyIfEnded && task.as_ref().is_some_and(|task| task.ended().is_none()) {
            return Err(DriverError::Permanent("cannot destroy running task".into()));
        }
        let destroyed = self.destroy_now(id, task.as_deref()).await;
        if destroyed.is_err() {
            // Nomad asks once, whatever the answer.
            let (tasks, id) = (self.clone(), id.clone());
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(DESTROY_AGAIN).await;
                    // A start of this id since then has seen to what was left, and owns the name.
                    let is_started_anew = task.is_none() && tasks.knows(&id);
                    if is_started_anew || tasks.destroy_now(&id, task.as_deref()).await.is_ok() {
                        return;
                    }
                }
            });
        }
        destroyed
    }

    async fn destroy_now(&self, id: &TaskId, task: Option<&Task>) -> Result<(), DriverError> {
        let unit = match task {
            Some(task) => {
                if task.ended().is_none() {
                    task.kill().await?;
                }
                task.empty().await?;
                task.unit.clone()
            }
            None => UnitName::of_task(id.as_str()),
        };
        self.clear(&unit).await?;
        self.forget(id);
        Ok(())
    }

    /// Removes a scope with all that runs in it, and its record. Without systemd too: Nomad does not ask again, and an empty
    /// scope is collected as soon as systemd can be reached.
    pub(super) async fn clear(&self, unit: &UnitName) -> Result<(), DriverError> {
        for slice in [SHARE_SLICE, RESERVE_SLICE] {
            empty(&Cgroup::at(&format!("{SLICE}/{slice}/{unit}")), unit).await?;
        }
        if let Err(error) = self.shared.systemd.stop(unit).await {
            warn!(%unit, "systemd could not be told to stop an empty scope: {error}");
        }
        remove_record(&record_path(unit));
        Ok(())
    }
}

impl Task {
    /// Sends a signal to the main process.
    fn signal(&self, number: i32) -> Result<(), DriverError> {
        if number == signal::KILL {
            self.is_killed.store(true, Ordering::Relaxed);
        }
        send(self.main_pidfd.as_ref(), number).map_err(|error| {
            DriverError::Permanent(format!("failed to signal {}: {error}", self.unit))
        })
    }

    /// SIGKILL to the main process, then to the scope.
    async fn kill(&self) -> Result<(), DriverError> {
        let failed = |error: std::io::Error| {
            DriverError::Permanent(format!("failed to kill {}: {error}", self.unit))
        };
        self.signal(signal::KILL)?;
        if self.ends_within(AFTER_KILL).await {
            return Ok(());
        }
        self.cgroup.kill().map_err(failed)?;
        if self.ends_within(AFTER_KILL_ALL).await {
            return Ok(());
        }
        Err(DriverError::Permanent(format!(
            "{} does not end after SIGKILL: a process of it is in uninterruptible sleep (state D in ps), as on a hung NFS mount",
            self.unit
        )))
    }

    /// Until no process of the scope is left. The supervisor's end implies it for all that share its PID namespace.
    async fn empty(&self) -> Result<(), DriverError> {
        empty(&self.cgroup, &self.unit).await
    }
}

/// Kills whatever is in a cgroup until nothing is.
pub(super) async fn empty(cgroup: &Cgroup, name: impl fmt::Display) -> Result<(), DriverError> {
    let failed =
        |error: std::io::Error| DriverError::Permanent(format!("failed to empty {name}: {error}"));
    let emptied = async {
        while cgroup.is_populated().map_err(failed)? {
            cgroup.kill().map_err(failed)?;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    };
    tokio::time::timeout(AFTER_KILL_ALL, emptied)
        .await
        .unwrap_or_else(|_| {
            Err(DriverError::Permanent(format!(
                "{name} is not empty after SIGKILL to all of it: a process of it is in uninterruptible sleep (state D in ps)"
            )))
        })
}
