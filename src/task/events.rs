//! What an operator reads in `nomad alloc status` about a task, besides Nomad's own words.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::table::{Ended, Task, TaskTable};
use super::types::{Names, TaskEvent, TaskId, TaskRequest};
use crate::plan::unit::UnitName;

impl TaskTable {
    pub(super) fn tell_start(&self, task: &Task) {
        self.publish(task, format!("Started in {}", task.unit));
    }

    pub(super) fn tell_end(&self, task: &Task, ended: &Ended) {
        if ended.result.oom_killed {
            self.publish(
                task,
                format!(
                    "{} was killed by the kernel: it reached its memory limit",
                    task.unit
                ),
            );
        }
    }

    /// About a task that is being started.
    pub(super) fn tell(&self, request: &TaskRequest, unit: &UnitName, message: String) {
        self.send(&request.id, &request.names, unit, message);
    }

    fn publish(&self, task: &Task, message: String) {
        self.send(&task.id, &task.names, &task.unit, message);
    }

    fn send(&self, id: &TaskId, names: &Names, unit: &UnitName, message: String) {
        let event = TaskEvent {
            task_id: id.clone(),
            alloc_id: names.alloc_id.clone(),
            task_name: names.task.clone(),
            at: SystemTime::now(),
            message,
            annotations: BTreeMap::from([("unit".to_owned(), unit.to_string())]),
        };
        // Nobody listens while no agent is connected.
        let _ = self.shared.events.send(event);
    }
}
