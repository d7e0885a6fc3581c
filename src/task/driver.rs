//! The verbs of the driver as `plugin` calls them, each carried out by its own file of this room.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

use super::exec::Session;
use super::start::Output;
use super::table::TaskTable;
use super::types::{
    Destroy, DriverError, ExitResult, Fingerprint, Saved, Streams, TaskEvent, TaskId, TaskRequest,
    TaskState, TaskStatus, Topology, Usage,
};
use super::{Flow, Tasks};
use crate::config::plugin::PluginConfig;
use crate::plan::limits::Cpus;

impl Tasks for TaskTable {
    async fn configure(
        &self,
        config: PluginConfig,
        topology: Option<Topology>,
    ) -> Result<(), DriverError> {
        let (compute, usable) = match topology {
            Some(topology) => (Some(topology.compute), topology.usable_cpus),
            None => (None, Cpus::new()),
        };
        self.set_up(config, compute, usable).await;
        Ok(())
    }

    fn fingerprint(&self) -> watch::Receiver<Fingerprint> {
        self.shared.fingerprint.subscribe()
    }

    async fn leave(&self) {
        self.dismiss_helper().await;
    }

    async fn start(&self, request: TaskRequest) -> Result<Saved, DriverError> {
        self.start_with(request, Output::Logs).await
    }

    async fn recover(&self, request: TaskRequest, saved: Saved) -> Result<(), DriverError> {
        self.take_over(request, saved).await
    }

    async fn wait(&self, id: &TaskId) -> Result<ExitResult, DriverError> {
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        Ok(task.wait().await.result)
    }

    async fn stop(&self, id: &TaskId, timeout: Duration, signal: &str) -> Result<(), DriverError> {
        self.stop_task(id, timeout, signal).await
    }

    async fn destroy(&self, id: &TaskId, how: Destroy) -> Result<(), DriverError> {
        self.destroy_task(id, how).await
    }

    async fn inspect(&self, id: &TaskId) -> Result<TaskStatus, DriverError> {
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        let ended = task.ended();
        Ok(TaskStatus {
            id: id.clone(),
            name: task.names.task.clone(),
            state: if ended.is_some() {
                TaskState::Exited
            } else {
                TaskState::Running
            },
            started_at: Some(task.started_at),
            // A short command ends before its start is known to have succeeded.
            completed_at: ended.as_ref().map(|ended| ended.at.max(task.started_at)),
            exit: ended.map(|ended| ended.result),
            attributes: BTreeMap::from([
                ("pid".to_owned(), task.main.pid.to_string()),
                ("unit".to_owned(), task.unit.to_string()),
            ]),
        })
    }

    async fn signal(&self, id: &TaskId, signal: &str) -> Result<(), DriverError> {
        self.signal_task(id, signal).await
    }

    async fn exec(
        &self,
        id: &TaskId,
        command: Vec<String>,
        streams: Streams,
    ) -> Result<Session, DriverError> {
        self.open_session(id, command, streams).await
    }

    fn stats(&self, id: &TaskId, interval: Duration) -> Flow<Usage> {
        self.samples(id, interval)
    }

    fn events(&self) -> Flow<TaskEvent> {
        // A reader that lags loses the oldest events, never the stream: Nomad would open it again without pause.
        Box::pin(BroadcastStream::new(self.shared.events.subscribe()).filter_map(Result::ok))
    }
}
