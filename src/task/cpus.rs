//! Keeps tasks without `cores` off the CPUs that others have reserved. Nomad writes what is left into a file of its own
//! cgroup tree whenever an allocation with `cores` starts or stops; each scope gets it at its start, and again when it changes.
//!
//! Each scope, not their slice: what systemd writes for a property of a running unit goes with a transient one, while it would
//! stay for the slice, and an operator's AllowedCPUs for the slice bounds those of its scopes.

use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::WatchFlags;
use tracing::warn;

use super::log::of_task;
use super::table::{Task, TaskTable, lock};
use super::watches::Watches;
use crate::cgroup::Cgroup;
use crate::plan::limits::{self, Cpus, List};
use crate::plan::unit::{SHARE_SLICE, SLICE};
use crate::systemd::SystemdError;

const NOMAD_SLICE: &str = "/nomad.slice";
const NOMAD_SHARE: &str = "/nomad.slice/share.slice";
/// Before a change that did not get through is tried again: for want of a bus, and at most, if systemd refuses it.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);

impl TaskTable {
    /// The CPUs for a task without `cores` that starts now; `None` if nothing keeps it off any.
    pub(super) fn share_cpus(&self) -> Option<Cpus> {
        let all = all()?;
        let share = limits::share(nomads_share().as_ref(), &self.settings().usable, &all);
        (share != all).then_some(share)
    }

    /// Brings running tasks to the CPUs that they are left now, and goes on to for as long as we live.
    pub(super) async fn keep_cpus(self, watches: Option<Arc<Watches>>) {
        let (mut is_done, mut pause) = (true, AGAIN);
        loop {
            if let Some(watches) = &watches {
                // Before the look, so that no change after it goes unseen.
                watch_nomad(watches);
            }
            let fitted = self.fit_all().await;
            // Once, however long the bus is away.
            if let Err(error) = &fitted
                && is_done
            {
                warn!("tasks cannot be kept off reserved CPUs yet, trying again: {error}");
            }
            is_done = fitted.is_ok();
            pause = match fitted {
                Err(error) if !error.is_unanswered() => (pause * 2).min(AGAIN_AT_MOST),
                _ => AGAIN,
            };
            tokio::select! {
                () = self.shared.cpus_changed.notified() => {}
                () = tokio::time::sleep(pause), if !is_done => {}
            }
        }
    }

    /// The last error if not every task has what it should.
    async fn fit_all(&self) -> Result<(), SystemdError> {
        let Some(all) = all() else { return Ok(()) };
        let share = limits::share(nomads_share().as_ref(), &self.settings().usable, &all);
        let mut fitted = Ok(());
        for task in self.running() {
            if !task.is_shared() || *lock(&task.cpus).as_ref().unwrap_or(&all) == share {
                continue;
            }
            match self.fit(&task, &share).await {
                Ok(()) => {}
                // Without a bus the others would fare no better.
                Err(error) if error.is_unanswered() => return Err(error),
                Err(error) => fitted = Err(error),
            }
        }
        fitted
    }

    async fn fit(&self, task: &Arc<Task>, share: &Cpus) -> Result<(), SystemdError> {
        let in_force = asked(&task.cgroup);
        let is_ours = in_force == *lock(&task.cpus);
        // An operator's drop-in for the scope has the last word. An answer that was lost had its effect all the same.
        if is_ours && in_force.as_ref() != Some(share) {
            self.shared.systemd.allow_cpus(&task.unit, share).await?;
            of_task!(
                debug,
                task.names,
                task.unit,
                "CPUs changed to {}",
                List(share)
            );
        }
        if is_ours || in_force.as_ref() == Some(share) {
            *lock(&task.cpus) = Some(share.clone());
        }
        Ok(())
    }
}

impl Task {
    fn is_shared(&self) -> bool {
        let slice = Cgroup::at(&format!("{SLICE}/{SHARE_SLICE}"));
        self.cgroup.path().starts_with(slice.path())
    }
}

/// All CPUs of the host; `None` without the controller.
fn all() -> Option<Cpus> {
    effective(&Cgroup::at("/"))
}

/// What Nomad leaves to tasks without `cores`; `None` before its first reservation, and where it lets all have all.
fn nomads_share() -> Option<Cpus> {
    asked(&Cgroup::at(NOMAD_SHARE))
}

/// The CPUs that were asked for a cgroup; `None` if none were.
pub(super) fn asked(cgroup: &Cgroup) -> Option<Cpus> {
    limits::cpus(&cgroup.cpus()?).ok().flatten()
}

/// The CPUs that a cgroup has; `None` without the controller.
pub(super) fn effective(cgroup: &Cgroup) -> Option<Cpus> {
    limits::cpus(&cgroup.effective_cpus()?).ok().flatten()
}

/// Nomad's file, and the directories that it may first have to appear in. From the outside in: what appears after the look
/// at its place raises an event there.
fn watch_nomad(watches: &Watches) {
    let path = |cgroup: &str| Cgroup::at(cgroup).path().to_owned();
    watches.add(&path("/"), WatchFlags::CREATE);
    watches.add(&path(NOMAD_SLICE), WatchFlags::CREATE);
    // Only what userspace writes raises an event, and this file Nomad writes.
    watches.add(&path(NOMAD_SHARE).join("cpuset.cpus"), WatchFlags::MODIFY);
}
