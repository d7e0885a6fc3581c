//! Jobs on a real agent: run, read, signalled, stopped, all through its API; and what its log says about our plugin.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::setup::PLUGIN;
use super::{POLL, RealAgent};
use crate::nomad::Level;

const STATUS_WAIT: Duration = Duration::from_secs(120);

/// One task's event, as `nomad alloc status` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub kind: String,
    pub message: String,
    pub unix_nanos: i64,
    pub details: Vec<(String, String)>,
}

impl RealAgent {
    /// The node as the API shows it: `Attributes`, `Drivers`, `Events`.
    pub async fn node(&self) -> Result<Value> {
        self.api.get(&format!("/v1/node/{}", self.node)).await
    }

    /// Registers a job file and gives the ids of its allocations.
    pub async fn run(&self, job: &str) -> Result<Vec<String>> {
        let parsed = self
            .api
            .post(
                "/v1/jobs/parse",
                &json!({"JobHCL": job, "Canonicalize": true}),
            )
            .await?;
        let id = text(&parsed["ID"]);
        let count = parsed["TaskGroups"].as_array().map_or(0, |groups| {
            groups
                .iter()
                .filter_map(|group| group["Count"].as_u64())
                .sum()
        });
        let registered = self.api.post("/v1/jobs", &json!({"Job": parsed})).await?;
        let evaluation = text(&registered["EvalID"]);
        let started = Instant::now();
        loop {
            let allocations = self
                .api
                .get(&format!("/v1/evaluation/{evaluation}/allocations"))
                .await?;
            let ids: Vec<_> = allocations
                .as_array()
                .into_iter()
                .flatten()
                .map(|alloc| text(&alloc["ID"]))
                .collect();
            if ids.len() as u64 == count && count > 0 {
                return Ok(ids);
            }
            let state = self
                .api
                .get(&format!("/v1/evaluation/{evaluation}"))
                .await?;
            let failed = &state["FailedTGAllocs"];
            ensure!(failed.is_null(), "job {id} was not placed: {failed}");
            ensure!(
                started.elapsed() < STATUS_WAIT,
                "job {id}: {} of {count} allocations",
                ids.len()
            );
            sleep(POLL).await;
        }
    }

    /// `nomad alloc status -json`.
    pub async fn allocation(&self, id: &str) -> Result<Value> {
        self.api.get(&format!("/v1/allocation/{id}")).await
    }

    /// Waits until an allocation's client status is one of these: `running`, `complete`, `failed`.
    pub async fn wait_for(&self, id: &str, wanted: &[&str]) -> Result<String> {
        let started = Instant::now();
        loop {
            let allocation = self.allocation(id).await?;
            let status = text(&allocation["ClientStatus"]);
            if wanted.contains(&status.as_str()) {
                return Ok(status);
            }
            let states = &allocation["TaskStates"];
            let ended = ["complete", "failed", "lost"].contains(&status.as_str());
            ensure!(
                !ended && started.elapsed() < STATUS_WAIT,
                "allocation {id} is {status}, not {wanted:?}: {states}"
            );
            sleep(POLL).await;
        }
    }

    /// What happened to a task, oldest first.
    pub async fn events(&self, id: &str, task: &str) -> Result<Vec<Event>> {
        let allocation = self.allocation(id).await?;
        let events = allocation["TaskStates"][task]["Events"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let event = |event: Value| Event {
            kind: text(&event["Type"]),
            message: text(&event["DisplayMessage"]),
            unix_nanos: event["Time"].as_i64().unwrap_or_default(),
            details: event["Details"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.clone(), text(value)))
                .collect(),
        };
        Ok(events.into_iter().map(event).collect())
    }

    /// A task's log so far; `stream` is stdout or stderr.
    pub async fn logs(&self, id: &str, task: &str, stream: &str) -> Result<String> {
        let path = format!("/v1/client/fs/logs/{id}?task={task}&type={stream}&plain=true");
        self.api.text("GET", &path, None).await
    }

    pub async fn signal(&self, id: &str, task: &str, signal: &str) -> Result<()> {
        let body = json!({"Signal": signal, "Task": task});
        self.api
            .post(&format!("/v1/client/allocation/{id}/signal"), &body)
            .await
            .map(drop)
    }

    /// Restarts a task in place.
    pub async fn restart_task(&self, id: &str, task: &str) -> Result<()> {
        let body = json!({"TaskName": task});
        self.api
            .post(&format!("/v1/client/allocation/{id}/restart"), &body)
            .await
            .map(drop)
    }

    /// Stops a job and waits for the end of its allocations.
    pub async fn stop(&self, job: &str) -> Result<()> {
        self.api.delete(&format!("/v1/job/{job}")).await?;
        for id in self.allocations_of(job).await? {
            self.wait_for(&id, &["complete", "failed", "lost"]).await?;
        }
        Ok(())
    }

    /// The ids of a job's allocations.
    pub async fn allocations_of(&self, job: &str) -> Result<Vec<String>> {
        let found = self.api.get(&format!("/v1/job/{job}/allocations")).await?;
        let found = found.as_array().into_iter().flatten();
        Ok(found.map(|allocation| text(&allocation["ID"])).collect())
    }

    /// Collects finished allocations: their directories and mounts go.
    pub async fn collect(&self) -> Result<()> {
        self.api
            .text("PUT", "/v1/system/gc", None)
            .await
            .map(drop)?;
        self.api.get("/v1/client/gc").await.map(drop)
    }

    /// What the agent's log has from our plugin at this level or above, from its loader as well; and what the agent itself says
    /// about our driver.
    pub fn plugin_lines(&self, at_least: Level) -> Result<Vec<String>> {
        let log = std::fs::read_to_string(self.log_file())?;
        Ok(log
            .lines()
            .filter(|line| is_plugin_line(line, at_least))
            .map(str::to_owned)
            .collect())
    }
}

fn is_plugin_line(line: &str, at_least: Level) -> bool {
    let Ok(entry) = serde_json::from_str::<Value>(line) else {
        return false;
    };
    let level = match entry["@level"].as_str() {
        Some("trace") => Level::Trace,
        Some("debug") => Level::Debug,
        Some("info") => Level::Info,
        Some("warn") => Level::Warn,
        Some("error") => Level::Error,
        _ => return false,
    };
    let ours = entry["@module"]
        .as_str()
        .is_some_and(|module| module.ends_with(PLUGIN))
        || entry["driver"].as_str() == Some("exec2");
    ours && level >= at_least
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_our_plugin_are_told_from_the_agent_s() {
        let line = |level: &str, module: &str| {
            format!(r#"{{"@level":"{level}","@message":"x","@module":"{module}"}}"#)
        };
        assert!(is_plugin_line(
            &line("error", "client.driver_mgr.nomad-driver-exec2"),
            Level::Warn
        ));
        assert!(is_plugin_line(
            &line("warn", "agent.plugin_loader.nomad-driver-exec2"),
            Level::Warn
        ));
        assert!(!is_plugin_line(
            &line("info", "client.driver_mgr.nomad-driver-exec2"),
            Level::Warn
        ));
        assert!(!is_plugin_line(&line("error", "client"), Level::Warn));
        let mention =
            r#"{"@level":"error","@message":"x","@module":"client.driver_mgr","driver":"exec2"}"#;
        assert!(is_plugin_line(mention, Level::Warn));
    }
}
