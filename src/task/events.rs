//! What an operator reads in `nomad alloc status` about a task, besides Nomad's own words.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use super::log::of_task;
use super::table::{Ended, Task, TaskTable};
use super::types::{Names, Severity, TaskEvent, TaskId};
use crate::plan::denials::{Denied, Remedy};
use crate::plan::unit::UnitName;

impl TaskTable {
    pub(super) fn tell_start(&self, task: &Task, phases: &Phases) {
        of_task!(
            info,
            task.names,
            task.unit,
            pid = task.main.pid,
            %phases,
            "task started"
        );
        let message = format!("Started in {}", task.unit);
        self.event(task, Severity::Info, message);
    }

    pub(super) fn tell_end(&self, task: &Task, ended: &Ended) {
        let result = &ended.result;
        of_task!(
            info,
            task.names,
            task.unit,
            exit_code = result.code,
            signal = result.signal,
            oom_killed = result.oom_killed,
            "task ended"
        );
    }

    /// Something about a task that an operator should see.
    pub(super) fn tell(&self, task: &Task, message: String) {
        self.warn(&task.id, &task.names, &task.unit, message);
    }

    /// The same about one that is being started.
    pub(super) fn warn(&self, id: &TaskId, names: &Names, unit: &UnitName, message: String) {
        of_task!(warn, names, unit, "{message}");
        self.send(id, names, unit, Severity::Warning, message);
    }

    /// In the journal: of what Landlock denied there can be much, and Nomad keeps few events.
    pub(super) fn tell_denial(&self, task: &Task, denied: &Denied<'_>, remedy: &Remedy) {
        of_task!(
            info,
            task.names,
            task.unit,
            access = %denied.access(),
            path = %denied.shown_path(),
            entry = %remedy.shown_entry(),
            "{}",
            denied.sentence(remedy)
        );
    }

    pub(super) fn event_of_denial(&self, task: &Task, denied: &Denied<'_>, remedy: &Remedy) {
        self.event(task, Severity::Warning, denied.sentence(remedy));
    }

    pub(super) fn event_of_more_denials(&self, task: &Task) {
        let message = format!(
            "Landlock denied more; journalctl -u {} tells what",
            task.unit
        );
        self.event(task, Severity::Warning, message);
    }

    pub(super) fn tell_left_out(&self, task: &Task, count: u64) {
        of_task!(
            info,
            task.names,
            task.unit,
            "Landlock denied {count} times more, which is left out here"
        );
    }

    fn event(&self, task: &Task, severity: Severity, message: String) {
        self.send(&task.id, &task.names, &task.unit, severity, message);
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

/// How long each part of a start took.
#[derive(Debug)]
pub(super) struct Phases {
    last: Instant,
    ended: Vec<(&'static str, Duration)>,
}

impl Phases {
    pub fn new() -> Self {
        Self {
            last: Instant::now(),
            ended: Vec::new(),
        }
    }

    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.ended.push((name, now.duration_since(self.last)));
        self.last = now;
    }
}

/// `plan 0.3 ms, spawn 1.2 ms`.
impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, time)) in self.ended.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {:.1} ms", time.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}
