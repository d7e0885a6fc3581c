//! Never two copies of a task. Nomad starts one anew, under a new id, when it has lost the handle of the last start: its agent
//! died between our answer and its own note of it, or another driver's plugin stood in our place for a while.

use std::fs;
use std::sync::Arc;

use super::log::of_task;
use super::stop::scopes;
use super::table::{Task, TaskTable};
use super::types::{DriverError, TaskRequest};
use crate::cgroup::{Cgroup, Mark};
use crate::plan::unit::{self, RESERVE_SLICE, SHARE_SLICE, SLICE, UnitName};

impl TaskTable {
    /// Ends what still runs of other starts of the task that is to be started now.
    pub(super) async fn end_copies(&self, request: &TaskRequest) -> Result<(), DriverError> {
        let unit = UnitName::of_task(request.id.as_str());
        let owner = self.owner(&request.names);
        for other in others(&unit) {
            let known = self.running().into_iter().find(|task| task.unit == other);
            // A name has but eight characters of an allocation's id.
            if known.as_deref().is_some_and(|task| !is_of(task, request)) || !lives(&other, &owner)
            {
                continue;
            }
            of_task!(
                warn,
                request.names,
                other,
                "Nomad starts the task anew and does not know that it still runs; this copy is ended"
            );
            self.end_copy(&other, known).await?;
        }
        Ok(())
    }

    async fn end_copy(&self, unit: &UnitName, known: Option<Arc<Task>>) -> Result<(), DriverError> {
        let ended = match &known {
            Some(task) => self.destroy_now(&task.id, Some(task)).await,
            None => self.clear(unit).await,
        };
        ended.map_err(|error| {
            DriverError::Transient(format!(
                "an earlier start of the task still runs, and there must not be two: {error}"
            ))
        })
    }
}

fn is_of(task: &Task, request: &TaskRequest) -> bool {
    (&task.names.alloc_id, &task.names.task) == (&request.names.alloc_id, &request.names.task)
}

/// Scopes that are named as this one but for the id of the start.
fn others(unit: &UnitName) -> Vec<UnitName> {
    let Some(parts) = unit.parts() else {
        return Vec::new();
    };
    [SHARE_SLICE, RESERVE_SLICE]
        .iter()
        .filter_map(|slice| fs::read_dir(Cgroup::at(&format!("{SLICE}/{slice}")).path()).ok())
        .flatten()
        .filter_map(|entry| UnitName::existing(entry.ok()?.file_name().to_str()?))
        .filter(|other| other != unit && other.parts() == Some(parts))
        .collect()
}

/// Whether a scope is this owner's and has processes.
fn lives(unit: &UnitName, owner: &str) -> bool {
    let is_ours = |scope: &Cgroup| scope.mark(Mark::Owner).as_deref() == Some(owner);
    let is_populated = |scope: &Cgroup| matches!(scope.is_populated(), Ok(true));
    owner != unit::RUN
        && scopes(unit)
            .iter()
            .any(|scope| is_ours(scope) && is_populated(scope))
}
