//! What an operator reads in `nomad alloc status` about a task, besides Nomad's own words.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::log::of_task;
use super::table::{Ended, Task, TaskTable};
use super::types::{Names, Severity, TaskEvent, TaskId, TaskRequest};
use crate::plan::unit::UnitName;

impl TaskTable {
    pub(super) fn tell_start(&self, task: &Task) {
        of_task!(
            info,
            task.names,
            task.unit,
            pid = task.main.pid,
            "task started"
        );
        let message = format!("Started in {}", task.unit);
        self.send(&task.id, &task.names, &task.unit, Severity::Info, message);
    }

    pub(super) fn tell_end(&self, task: &Task, ended: &Ended) {
        if ended.result.oom_killed {
            let message = format!(
                "{} was ended by the kernel's OOM killer: it reached its memory limit, or the host had none left",
                task.unit
            );
            self.send(
                &task.id,
                &task.names,
                &task.unit,
                Severity::Warning,
                message,
            );
        }
    }

    /// About a task that is being started.
    pub(super) fn warn(&self, request: &TaskRequest, unit: &UnitName, message: String) {
        self.send(
            &request.id,
            &request.names,
            unit,
            Severity::Warning,
            message,
        );
    }

    fn send(
        &self,
        id: &TaskId,
        names: &Names,
        unit: &UnitName,
        severity: Severity,
        message: String,
    ) {
        let event = TaskEvent {
            task_id: id.clone(),
            alloc_id: names.alloc_id.clone(),
            task_name: names.task.clone(),
            at: SystemTime::now(),
            severity,
            message,
            annotations: BTreeMap::from([("unit".to_owned(), unit.to_string())]),
        };
        // Nobody listens while no agent is connected.
        let _ = self.shared.events.send(event);
    }
}
