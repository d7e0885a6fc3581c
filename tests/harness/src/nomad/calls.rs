//! Calls of the driver's service one by one, for whoever wants another order than Nomad's, or many tasks at little cost.

use std::time::Duration;

use anyhow::Result;
use tonic::Status;

use super::proto::base::PluginInfoRequest;
use super::proto::driver::{
    DestroyTaskRequest, InspectTaskRequest, InspectTaskResponse, RecoverTaskRequest,
    SignalTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig, TaskHandle, TaskStatsRequest,
    TaskStatsResponse, WaitTaskRequest,
};
use super::{Agent, Connection, Exit};

/// Catches hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// One connection; each call is answered or fails, and never hangs.
#[derive(Debug, Clone)]
pub struct Calls {
    connection: Connection,
    patience: Duration,
}

impl Calls {
    pub fn of(agent: &Agent) -> Result<Calls> {
        Ok(Calls {
            connection: agent.connection()?,
            patience: PATIENCE,
        })
    }

    pub fn with_patience(self, patience: Duration) -> Calls {
        Calls { patience, ..self }
    }

    /// What PluginInfo calls the plugin's version.
    pub async fn version(&self) -> Result<String, Status> {
        let mut base = self.connection.base();
        let answer = self.soon(base.plugin_info(PluginInfoRequest {})).await?;
        Ok(answer.into_inner().plugin_version)
    }

    pub async fn start(&self, config: TaskConfig) -> Result<TaskHandle, Status> {
        let request = StartTaskRequest { task: Some(config) };
        let answer = self
            .soon(self.connection.driver().start_task(request))
            .await?;
        let handle = answer.into_inner().handle;
        handle.ok_or_else(|| Status::internal("StartTask without a handle"))
    }

    pub async fn recover(&self, handle: TaskHandle) -> Result<(), Status> {
        let request = RecoverTaskRequest {
            task_id: String::new(),
            handle: Some(handle),
        };
        self.soon(self.connection.driver().recover_task(request))
            .await
            .map(drop)
    }

    /// Waits as long as it takes.
    pub async fn wait(&self, id: &str) -> Result<Exit, Status> {
        let request = WaitTaskRequest { task_id: id.into() };
        let answer = self
            .connection
            .driver()
            .wait_task(request)
            .await?
            .into_inner();
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
        self.soon(self.wait(id)).await
    }

    pub async fn stop(&self, id: &str, signal: &str, timeout: Duration) -> Result<(), Status> {
        let request = StopTaskRequest {
            task_id: id.into(),
            timeout: prost_types::Duration::try_from(timeout).ok(),
            signal: signal.into(),
        };
        self.soon(self.connection.driver().stop_task(request))
            .await
            .map(drop)
    }

    pub async fn destroy(&self, id: &str, force: bool) -> Result<(), Status> {
        let request = DestroyTaskRequest {
            task_id: id.into(),
            force,
        };
        self.soon(self.connection.driver().destroy_task(request))
            .await
            .map(drop)
    }

    pub async fn signal(&self, id: &str, signal: &str) -> Result<(), Status> {
        let request = SignalTaskRequest {
            task_id: id.into(),
            signal: signal.into(),
        };
        self.soon(self.connection.driver().signal_task(request))
            .await
            .map(drop)
    }

    pub async fn inspect(&self, id: &str) -> Result<InspectTaskResponse, Status> {
        let request = InspectTaskRequest { task_id: id.into() };
        let answer = self
            .soon(self.connection.driver().inspect_task(request))
            .await?;
        Ok(answer.into_inner())
    }

    /// A stream of samples; it ends with the task.
    pub async fn stats(
        &self,
        id: &str,
        interval: Duration,
    ) -> Result<tonic::Streaming<TaskStatsResponse>, Status> {
        let request = TaskStatsRequest {
            task_id: id.into(),
            collection_interval: prost_types::Duration::try_from(interval).ok(),
        };
        let stream = self
            .soon(self.connection.driver().task_stats(request))
            .await?;
        Ok(stream.into_inner())
    }

    async fn soon<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        match tokio::time::timeout(self.patience, call).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded(format!(
                "no answer within {:?}",
                self.patience
            ))),
        }
    }
}
