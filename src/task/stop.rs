//! Ends tasks: StopTask, SignalTask, DestroyTask. A kill hits the main process first, so that the supervisor can still
//! write the record, and then the whole scope.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::time::timeout;
use tracing::warn;

use super::log::of_task;
use super::state::Process;
use super::table::{Task, TaskTable, lock, record_path, remove_record, send};
use super::thread::in_thread;
use super::types::{Destroy, DriverError, TaskId};
use crate::breakpoint;
use crate::cgroup::{Cgroup, Mark};
use crate::plan::signal;
use crate::plan::unit::{RESERVE_SLICE, RUN, SHARE_SLICE, SLICE, UnitName};
use crate::text::UnitText;

/// The steps of a task's end, in the order in which they happen: 1 to 6 are StopTask's, 7 and 8 DestroyTask's, which makes
/// sure of 4 to 6 before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopStep {
    Thaw,
    Signal,
    Grace,
    Kill,
    KillAll,
    Empty,
    Forget,
    Unit,
}

impl StopStep {
    /// Every step with what it does, in order: the list that the README quotes.
    pub const ALL: [(StopStep, &'static str); 8] = [
        (
            StopStep::Thaw,
            "let a frozen task run again, so that it hears the signal",
        ),
        (
            StopStep::Signal,
            "send `kill_signal`, and SIGCONT after it to a task that was stopped",
        ),
        (
            StopStep::Grace,
            "wait for the main process' end, at most for `kill_timeout`",
        ),
        (
            StopStep::Kill,
            "send SIGKILL to the main process: its supervisor records the end",
        ),
        (
            StopStep::KillAll,
            "send SIGKILL to the whole scope, if that has not ended it within 2 s",
        ),
        (
            StopStep::Empty,
            "wait until no process of the scope is left, at most 10 s",
        ),
        (StopStep::Forget, "remove the exit record"),
        (StopStep::Unit, "have systemd stop the empty scope"),
    ];
}

/// How long a killed process may take to end before the rest of its scope is killed. Only one in uninterruptible sleep
/// takes longer than a moment.
const AFTER_KILL: Duration = Duration::from_secs(2);
/// How long the scope may take to empty after that; then the call fails and Nomad tries again.
const AFTER_KILL_ALL: Duration = Duration::from_secs(10);

/// How long systemd may take to thaw a scope.
const THAW_PATIENCE: Duration = Duration::from_secs(2);
/// How long the processes of a task that keeps forking are signalled.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(1);

/// Before a destroy that failed is tried again.
const DESTROY_AGAIN: Duration = Duration::from_secs(10);

impl TaskTable {
    /// Sends `signal`, and kills the task if it has not ended after `patience`. Returns when its scope is empty.
    pub(super) async fn stop_task(
        &self,
        id: &TaskId,
        patience: Duration,
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
                self.tell(&task, format!("kill_signal: {error}; SIGINT is sent"));
                signal::DEFAULT_KILL
            }),
        };
        task.mark_stopping();
        of_task!(
            info,
            task.names,
            task.unit,
            signal = number,
            kill_timeout_s = patience.as_secs_f64(),
            "task is being stopped"
        );
        breakpoint::at(StopStep::Thaw);
        self.thaw(&task).await;
        breakpoint::at(StopStep::Signal);
        self.signal_now(&task, number).await?;
        if task.main.is_stopped() {
            task.signal(signal::CONT)?;
        }
        breakpoint::at(StopStep::Grace);
        if !task.ends_within(patience).await {
            let message = format!(
                "{} has not ended within {} s of signal {number}, and is killed",
                task.unit,
                patience.as_secs_f64()
            );
            self.tell(&task, message);
            task.kill().await?;
        }
        task.empty().await
    }

    /// Sends a signal, to whom the operator wants.
    pub(super) async fn signal_task(&self, id: &TaskId, signal: &str) -> Result<(), DriverError> {
        let number =
            signal::parse(signal).map_err(|error| DriverError::Permanent(error.to_string()))?;
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        self.signal_now(&task, number).await
    }

    async fn signal_now(&self, task: &Arc<Task>, number: i32) -> Result<(), DriverError> {
        if self.settings().config.signal_all {
            let all = task.clone();
            // There may be thousands.
            if in_thread(move || all.signal_all(number)).await.is_err() {
                task.signal_all(number);
            }
        }
        // Alone, or last: whatever it starts in answer is not signalled.
        task.signal(number)
    }

    /// A frozen process hears nothing but SIGKILL, and a frozen supervisor records nothing.
    async fn thaw(&self, task: &Task) {
        if !task.cgroup.is_frozen() {
            return;
        }
        // systemd first: it keeps in mind what it has frozen. It answers when the scope runs again, which an ancestor may forbid.
        let thawed = timeout(THAW_PATIENCE, self.shared.systemd.thaw(&task.unit)).await;
        let reason = match thawed {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", THAW_PATIENCE.as_secs()),
        };
        of_task!(
            warn,
            task.names,
            task.unit,
            "a frozen scope is thawed without systemd: {reason}"
        );
        if let Err(error) = task.cgroup.thaw() {
            of_task!(warn, task.names, task.unit, "cgroup.freeze: {error}");
        }
    }

    /// Forgets a task and removes all that is left of it. An id that we do not know is cleaned up by its name alone: after
    /// a failed recovery Nomad has nothing else.
    pub(super) async fn destroy_task(&self, id: &TaskId, how: Destroy) -> Result<(), DriverError> {
        let task = self.find(id);
        if how == Destroy::OnlyIfEnded && task.as_ref().is_some_and(|task| task.ended().is_none()) {
            return Err(DriverError::Permanent("cannot destroy running task".into()));
        }
        if task.is_none() && self.knows(id) {
            return Err(DriverError::Permanent(format!(
                "task {id} is being started; stop or destroy it when that is done"
            )));
        }
        if task.is_none() {
            self.expect_own(&UnitName::of_task(id.as_str()))?;
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

    pub(super) async fn destroy_now(
        &self,
        id: &TaskId,
        task: Option<&Task>,
    ) -> Result<(), DriverError> {
        let unit = match task {
            Some(task) => {
                if task.ended().is_none() {
                    task.mark_stopping();
                    self.thaw(task).await;
                    task.kill().await?;
                }
                task.empty().await?;
                task.unit.clone()
            }
            None => UnitName::of_task(id.as_str()),
        };
        self.clear(&unit).await?;
        if let Some(task) = task {
            of_task!(info, task.names, unit, "task destroyed");
        }
        self.forget(id);
        Ok(())
    }

    /// By its name alone, a scope could be another agent's, or of `run`.
    pub(super) fn expect_own(&self, unit: &UnitName) -> Result<(), DriverError> {
        let own = lock(&self.shared.owner).clone();
        let Some(other) = scopes(unit)
            .into_iter()
            .find_map(|scope| scope.mark(Mark::Owner))
        else {
            return Ok(());
        };
        let is_own = own.map_or(other != RUN, |own| own == other);
        if is_own {
            return Ok(());
        }
        Err(DriverError::Permanent(format!(
            "{unit} belongs to {}, and is left alone",
            UnitText::new(&other)
        )))
    }

    /// Removes a scope with all that runs in it, and its record. Without systemd too: Nomad does not ask again, and an empty
    /// scope is collected as soon as systemd can be reached.
    pub(super) async fn clear(&self, unit: &UnitName) -> Result<(), DriverError> {
        for scope in scopes(unit) {
            empty(&scope, unit).await?;
        }
        breakpoint::at(StopStep::Forget);
        remove_record(&record_path(unit));
        breakpoint::at(StopStep::Unit);
        if let Err(error) = self.shared.systemd.stop(unit).await {
            warn!(%unit, "systemd could not be told to stop an empty scope: {error}");
        }
        Ok(())
    }
}

impl Task {
    /// Whatever ends it from here on, Nomad wanted it: a later plugin finds that on the scope.
    fn mark_stopping(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        if let Err(error) = self.cgroup.set_mark(Mark::Stopping, "1") {
            of_task!(
                debug,
                self.names,
                self.unit,
                "the scope cannot be marked: {error}"
            );
        }
    }

    /// Sends a signal to the main process.
    fn signal(&self, number: i32) -> Result<(), DriverError> {
        if number == signal::KILL {
            self.is_killed.store(true, Ordering::Relaxed);
        }
        send(self.main_pidfd.as_ref(), number).map_err(|error| {
            DriverError::Permanent(format!("failed to signal {}: {error}", self.unit))
        })
    }

    /// Sends a signal to every process but the main one, the supervisor, which is none of the task's, and those of sessions,
    /// which are below. Until no new one appears: some may fork meanwhile.
    fn signal_all(&self, number: i32) {
        let supervisor = self.supervisor_pidfd.as_ref();
        let supervisor = supervisor.and_then(|pidfd| Process::of_pidfd(pidfd.as_fd()));
        let mut seen: BTreeSet<u32> = supervisor
            .into_iter()
            .chain([self.main])
            .map(|process| process.pid)
            .collect();
        let begun = Instant::now();
        while begun.elapsed() < SIGNAL_PATIENCE {
            let new: Vec<u32> = self
                .cgroup
                .members()
                .into_iter()
                .filter(|pid| seen.insert(*pid))
                .collect();
            if new.is_empty() {
                return;
            }
            for pid in new {
                let pidfd = i32::try_from(pid)
                    .ok()
                    .and_then(Pid::from_raw)
                    .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                // The pid may have come to a stranger before it was opened.
                if let Some(pidfd) = pidfd.filter(|_| self.cgroup.holds(pid))
                    && let Err(error) = send(Some(&pidfd), number)
                {
                    of_task!(
                        warn,
                        self.names,
                        self.unit,
                        pid,
                        "cannot be signalled: {error}"
                    );
                }
            }
        }
    }

    /// SIGKILL to the main process, then to the scope.
    async fn kill(&self) -> Result<(), DriverError> {
        let failed = |error: std::io::Error| {
            DriverError::Permanent(format!("failed to kill {}: {error}", self.unit))
        };
        breakpoint::at(StopStep::Kill);
        self.signal(signal::KILL)?;
        if self.ends_within(AFTER_KILL).await {
            return Ok(());
        }
        breakpoint::at(StopStep::KillAll);
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
        breakpoint::at(StopStep::Empty);
        empty(&self.cgroup, &self.unit).await
    }
}

/// Where a scope of this name can be.
pub(super) fn scopes(unit: &UnitName) -> [Cgroup; 2] {
    [SHARE_SLICE, RESERVE_SLICE].map(|slice| Cgroup::at(&format!("{SLICE}/{slice}/{unit}")))
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
    timeout(AFTER_KILL_ALL, emptied)
        .await
        .unwrap_or_else(|_| {
            Err(DriverError::Permanent(format!(
                "{name} is not empty after SIGKILL to all of it: a process of it is in uninterruptible sleep (state D in ps)"
            )))
        })
}
