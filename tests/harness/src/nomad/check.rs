//! What must be in a driver's answers: Nomad dereferences these parts without a look.

use super::proto::driver::{
    DriverTaskEvent, FingerprintResponse, InspectTaskResponse, StartTaskResponse,
    TaskStatsResponse, WaitTaskResponse, fingerprint_response::HealthState,
};
use super::{Version, Violations};

/// Notes what is missing.
struct Must<'a>(&'a Violations, &'static str);

impl Must<'_> {
    fn have(&self, part: &str, there: bool) {
        if !there {
            self.0.note(format!("{}: {part} is missing", self.1));
        }
    }
}

pub(super) fn fingerprint(answer: &FingerprintResponse, violations: &Violations) {
    let must = Must(violations, "Fingerprint");
    for (name, attribute) in &answer.attributes {
        must.have(
            &format!("the value of attribute {name}"),
            attribute.value.is_some(),
        );
    }
    must.have(
        "a known health",
        HealthState::try_from(answer.health).is_ok(),
    );
    must.have("a description", !answer.health_description.is_empty());
    if !answer.err.is_empty() {
        violations.note(format!("Fingerprint: err is set: {}", answer.err));
    }
}

pub(super) fn event(answer: &DriverTaskEvent, violations: &Violations) {
    let must = Must(violations, "TaskEvents");
    // Nomad finds the task by these two; an event without them goes nowhere.
    must.have("alloc_id", !answer.alloc_id.is_empty());
    must.have("task_name", !answer.task_name.is_empty());
    must.have("task_id", !answer.task_id.is_empty());
    must.have("timestamp", answer.timestamp.is_some());
    must.have("message", !answer.message.is_empty());
}

/// The handle is all that is left after an agent's restart.
pub(super) fn started(answer: &StartTaskResponse, id: &str, violations: &Violations) {
    let must = Must(violations, "StartTask");
    let handle = answer.handle.as_ref();
    must.have("handle", handle.is_some());
    must.have(
        "handle.version",
        handle.is_some_and(|handle| handle.version != 0),
    );
    must.have(
        "handle.driver_state",
        handle.is_some_and(|handle| !handle.driver_state.is_empty()),
    );
    let config = handle.and_then(|handle| handle.config.as_ref());
    must.have("handle.config", config.is_some());
    must.have(
        "handle.config.id of the task",
        config.is_some_and(|config| config.id == id),
    );
    must.have(
        "handle.config.resources",
        config.is_some_and(|config| config.resources.is_some()),
    );
}

/// The agents before 1.11 panic; the others make a success of it, which is no better.
pub(super) fn waited(answer: &WaitTaskResponse, version: Version, violations: &Violations) {
    let part = match version.survives_a_wait_without_result() {
        true => "result, without which the task counts as a success,",
        false => "result, whose absence panics this version of Nomad,",
    };
    Must(violations, "WaitTask").have(part, answer.result.is_some());
}

pub(super) fn inspected(answer: &InspectTaskResponse, violations: &Violations) {
    let must = Must(violations, "InspectTask");
    let task = answer.task.as_ref();
    must.have("task", task.is_some());
    must.have(
        "task.result",
        task.is_some_and(|task| task.result.is_some()),
    );
    must.have(
        "task.started_at",
        task.is_some_and(|task| task.started_at.is_some()),
    );
    must.have(
        "task.completed_at",
        task.is_some_and(|task| task.completed_at.is_some()),
    );
    must.have("driver", answer.driver.is_some());
}

pub(super) fn stats(answer: &TaskStatsResponse, violations: &Violations) {
    let must = Must(violations, "TaskStats");
    let stats = answer.stats.as_ref();
    must.have("stats", stats.is_some());
    must.have(
        "stats.timestamp",
        stats.is_some_and(|stats| stats.timestamp.is_some()),
    );
    let total = stats.and_then(|stats| stats.agg_resource_usage.as_ref());
    must.have("stats.agg_resource_usage", total.is_some());
    let by_pid = stats
        .iter()
        .flat_map(|stats| stats.resource_usage_by_pid.values());
    for usage in total.into_iter().chain(by_pid) {
        must.have("cpu", usage.cpu.is_some());
        must.have("memory", usage.memory.is_some());
    }
}
