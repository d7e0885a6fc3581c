//! Calls of the driver's service one by one, for cases that want another order than Nomad's, or many tasks at little cost.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use harness::nomad::proto::driver::{
    DestroyTaskRequest, InspectTaskRequest, InspectTaskResponse, RecoverTaskRequest,
    SignalTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig, TaskHandle, WaitTaskRequest,
};
use harness::nomad::{Agent, Allocation, Connection, Exit};
use nomad_driver_exec2::job::request::{new_alloc_id, new_task_id};
use tonic::Status;

use crate::nomad::Job;

/// Catches hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// An allocation whose own task has come and gone: directories in which others can be started, without logs.
#[derive(Debug)]
pub struct Place {
    alloc: Allocation,
    config: TaskConfig,
}

impl Place {
    pub async fn new(agent: &Agent) -> Result<Place> {
        let job = Job::shell("eval \"$SCRIPT\"").resources("cpu = 100\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        task.wait().await?;
        let config = task.handle().and_then(|handle| handle.config);
        let config = TaskConfig {
            stdout_path: "/dev/null".into(),
            stderr_path: "/dev/null".into(),
            ..config.context("a handle has its configuration")?
        };
        Ok(Place { alloc, config })
    }

    /// A task that passes for one of an allocation of its own.
    pub fn task(&self, script: &str) -> TaskConfig {
        let alloc_id = new_alloc_id();
        TaskConfig {
            id: new_task_id(&alloc_id, &self.config.name),
            alloc_id,
            ..with_script(self.config.clone(), script)
        }
    }

    /// What the task sees as `local`.
    pub fn local(&self) -> Result<&Path> {
        Ok(&self.alloc.only_task()?.paths().local)
    }

    pub async fn close(&self) -> Result<()> {
        self.alloc.stop().await
    }
}

pub fn with_script(mut config: TaskConfig, script: &str) -> TaskConfig {
    config.env.insert("SCRIPT".into(), script.into());
    config
}

/// One connection; each call is answered or fails, and never hangs.
#[derive(Debug, Clone)]
pub struct Calls(Connection);

impl Calls {
    pub fn of(agent: &Agent) -> Result<Calls> {
        Ok(Calls(agent.connection()?))
    }

    pub async fn start(&self, config: TaskConfig) -> Result<TaskHandle, Status> {
        let request = StartTaskRequest { task: Some(config) };
        let answer = soon(self.0.driver().start_task(request)).await?;
        let handle = answer.into_inner().handle;
        handle.ok_or_else(|| Status::internal("StartTask without a handle"))
    }

    pub async fn recover(&self, handle: TaskHandle) -> Result<(), Status> {
        let request = RecoverTaskRequest {
            task_id: String::new(),
            handle: Some(handle),
        };
        soon(self.0.driver().recover_task(request)).await.map(drop)
    }

    /// Waits as long as it takes.
    pub async fn wait(&self, id: &str) -> Result<Exit, Status> {
        let request = WaitTaskRequest { task_id: id.into() };
        let answer = self.0.driver().wait_task(request).await?.into_inner();
        let result = answer
            .result
            .ok_or_else(|| Status::internal("WaitTask without a result"))?;
        Ok(Exit {
            code: result.exit_code,
            signal: result.signal,
            oom_killed: result.oom_killed,
            message: answer.err,
        })
    }

    /// The same for a task that must end now.
    pub async fn end(&self, id: &str) -> Result<Exit, Status> {
        soon(self.wait(id)).await
    }

    pub async fn stop(&self, id: &str, signal: &str, timeout: Duration) -> Result<(), Status> {
        let request = StopTaskRequest {
            task_id: id.into(),
            timeout: prost_types::Duration::try_from(timeout).ok(),
            signal: signal.into(),
        };
        soon(self.0.driver().stop_task(request)).await.map(drop)
    }

    pub async fn destroy(&self, id: &str, force: bool) -> Result<(), Status> {
        let request = DestroyTaskRequest {
            task_id: id.into(),
            force,
        };
        soon(self.0.driver().destroy_task(request)).await.map(drop)
    }

    pub async fn signal(&self, id: &str, signal: &str) -> Result<(), Status> {
        let request = SignalTaskRequest {
            task_id: id.into(),
            signal: signal.into(),
        };
        soon(self.0.driver().signal_task(request)).await.map(drop)
    }

    pub async fn inspect(&self, id: &str) -> Result<InspectTaskResponse, Status> {
        let request = InspectTaskRequest { task_id: id.into() };
        let answer = soon(self.0.driver().inspect_task(request)).await?;
        Ok(answer.into_inner())
    }
}

async fn soon<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {PATIENCE:?}"
        ))),
    }
}

/// How many descriptors of each kind a process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors(BTreeMap<String, usize>);

impl Descriptors {
    pub fn of(pid: u32) -> Result<Descriptors> {
        let mut kinds = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            // One may be closed between the list and the look.
            let Ok(target) = fs::read_link(entry?.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            // `socket:[1234]`, but `anon_inode:[pidfd]`.
            let kind = match target.split_once(":[") {
                Some((kind, number)) if number.starts_with(char::is_numeric) => kind,
                _ => &target,
            };
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(Descriptors(kinds))
    }

    /// One more of this kind is as good.
    pub fn and_one(mut self, kind: &str) -> Descriptors {
        *self.0.entry(kind.to_owned()).or_default() += 1;
        self
    }

    /// The kinds of which the process has more by now.
    pub fn grown(&self, pid: u32) -> Result<Vec<String>> {
        let more = |(kind, count): (String, usize)| {
            let before = self.0.get(&kind).copied().unwrap_or(0);
            (count > before).then(|| format!("{count} descriptors of {kind} instead of {before}"))
        };
        let now = Descriptors::of(pid)?;
        Ok(now.0.into_iter().filter_map(more).collect())
    }
}
