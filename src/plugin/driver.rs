//! The Driver service: each call is converted, handed to one verb of `task`, and its answer converted back. What an unknown
//! task means to each call is decided here.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{convert, errors, exec, hclspec};
use crate::config::schema;
use crate::config::task::TaskOptions;
use crate::plan::unit::UnitName;
use crate::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use crate::proto::hashicorp::nomad::plugins::drivers::proto::driver_capabilities::{
    FsIsolation, MountConfigs,
};
use crate::proto::hashicorp::nomad::plugins::drivers::proto::network_isolation_spec::NetworkIsolationMode;
use crate::task::Tasks;
use crate::task::log::of_task;
use crate::task::types::{Destroy, DriverError, Fingerprint, Saved, TaskId, TaskRequest};

/// A fingerprint that did not change is told again this often.
const FINGERPRINT_PERIOD: Duration = Duration::from_secs(90);
/// Nomad's default, where it asks for samples but names no interval.
const STATS_INTERVAL: Duration = Duration::from_secs(1);
/// Of a job that names no kill_signal.
const KILL_SIGNAL: &str = "SIGINT";

type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Debug)]
pub struct Driver<T> {
    pub tasks: Arc<T>,
}

impl<T: Tasks> Driver<T> {
    /// Runs a verb to its end even if the call is dropped halfway, as it is when the agent dies: half a start or half a
    /// stop would leave what nobody knows of.
    async fn carry<V, R>(
        &self,
        verb: impl FnOnce(Arc<T>) -> V,
    ) -> Result<Result<R, DriverError>, Status>
    where
        V: Future<Output = Result<R, DriverError>> + Send + 'static,
        R: Send + 'static,
    {
        let verb = tokio::spawn(verb(Arc::clone(&self.tasks)));
        verb.await
            .map_err(|error| errors::permanent(format!("the driver failed: {error}")))
    }

    /// Carried to its end, too; but a task that the agent did not live to hear of is one that nobody will ever stop.
    async fn start(&self, task: TaskRequest) -> Result<Result<Saved, DriverError>, Status> {
        let (answer, answered) = oneshot::channel();
        let (tasks, id, names) = (Arc::clone(&self.tasks), task.id.clone(), task.names.clone());
        tokio::spawn(async move {
            let started = tasks.start(task).await;
            if let Err(Ok(_)) = answer.send(started) {
                let unit = UnitName::of_task(id.as_str());
                of_task!(
                    warn,
                    names,
                    unit,
                    "the agent went away during a start; the task is destroyed"
                );
                if let Err(error) = tasks.destroy(&id, Destroy::EvenIfRunning).await {
                    of_task!(error, names, unit, "it cannot be destroyed: {error}");
                }
            }
        });
        let answered = answered.await;
        answered.map_err(|error| errors::permanent(format!("the driver failed: {error}")))
    }
}

/// An unknown task has nothing left to stop, to signal or to destroy. Nomad knows its own "not found" only inside one
/// process, so any other answer would be retried for minutes.
fn gone_is_done(outcome: Result<(), DriverError>) -> Result<(), Status> {
    match outcome {
        Ok(()) | Err(DriverError::UnknownTask) => Ok(()),
        Err(error) => Err(errors::status(error)),
    }
}

fn options(msgpack: &[u8]) -> Result<TaskOptions, Status> {
    TaskOptions::decode(msgpack)
        .map_err(|error| errors::permanent(format!("failed to decode driver task config: {error}")))
}

/// Nomad reopens this stream at once whenever it ends, so it does not.
async fn tell_fingerprints(
    mut state: watch::Receiver<Fingerprint>,
    sender: mpsc::Sender<Result<wire::FingerprintResponse, Status>>,
    period: Duration,
) {
    loop {
        let response = convert::fingerprint(&state.borrow_and_update());
        if sender.send(Ok(response)).await.is_err() {
            return;
        }
        tokio::select! {
            () = change(&mut state) => {}
            () = tokio::time::sleep(period) => {}
            () = sender.closed() => return,
        }
    }
}

async fn change(state: &mut watch::Receiver<Fingerprint>) {
    // Once nobody is left to change it, an error comes back at once each time.
    if state.changed().await.is_err() {
        std::future::pending().await
    }
}

#[tonic::async_trait]
impl<T: Tasks> wire::driver_server::Driver for Driver<T> {
    async fn task_config_schema(
        &self,
        _: Request<wire::TaskConfigSchemaRequest>,
    ) -> Result<Response<wire::TaskConfigSchemaResponse>, Status> {
        Ok(Response::new(wire::TaskConfigSchemaResponse {
            spec: Some(hclspec::spec(schema::TASK)),
        }))
    }

    async fn capabilities(
        &self,
        _: Request<wire::CapabilitiesRequest>,
    ) -> Result<Response<wire::CapabilitiesResponse>, Status> {
        let capabilities = wire::DriverCapabilities {
            send_signals: true,
            exec: true,
            fs_isolation: FsIsolation::Unveil.into(),
            network_isolation_modes: vec![
                NetworkIsolationMode::None.into(),
                NetworkIsolationMode::Host.into(),
                NetworkIsolationMode::Group.into(),
            ],
            must_create_network: false,
            mount_configs: MountConfigs::UnknownMounts.into(),
            disable_log_collection: false,
            dynamic_workload_users: true,
        };
        Ok(Response::new(wire::CapabilitiesResponse {
            capabilities: Some(capabilities),
        }))
    }

    type FingerprintStream = Flow<wire::FingerprintResponse>;

    async fn fingerprint(
        &self,
        _: Request<wire::FingerprintRequest>,
    ) -> Result<Response<Self::FingerprintStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let state = self.tasks.fingerprint();
        tokio::spawn(tell_fingerprints(state, sender, FINGERPRINT_PERIOD));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn recover_task(
        &self,
        request: Request<wire::RecoverTaskRequest>,
    ) -> Result<Response<wire::RecoverTaskResponse>, Status> {
        let Some(handle) = request.into_inner().handle else {
            return Err(errors::permanent("handle cannot be nil"));
        };
        let Some(config) = handle.config else {
            return Err(errors::permanent("the handle has no task configuration"));
        };
        // A restarted agent has forgotten the job's block; the task was started from it and does not need it again.
        let options = TaskOptions::decode(&config.msgpack_driver_config).unwrap_or_default();
        let task = convert::request(config, options);
        let saved = Saved {
            version: handle.version,
            driver_state: handle.driver_state,
        };
        self.carry(|tasks| async move { tasks.recover(task, saved).await })
            .await?
            .map_err(errors::status)?;
        Ok(Response::new(wire::RecoverTaskResponse {}))
    }

    async fn start_task(
        &self,
        request: Request<wire::StartTaskRequest>,
    ) -> Result<Response<wire::StartTaskResponse>, Status> {
        let Some(config) = request.into_inner().task else {
            return Err(errors::permanent("the request has no task configuration"));
        };
        let options = options(&config.msgpack_driver_config)?;
        let task = convert::request(config.clone(), options);
        let saved = self.start(task).await?.map_err(errors::status)?;
        // Nomad keeps this handle, not its own: without the whole configuration in it nothing can be recovered.
        let handle = wire::TaskHandle {
            version: saved.version,
            config: Some(config),
            state: wire::TaskState::Running.into(),
            driver_state: saved.driver_state,
        };
        Ok(Response::new(wire::StartTaskResponse {
            result: wire::start_task_response::Result::Success.into(),
            driver_error_msg: String::new(),
            handle: Some(handle),
            network_override: None,
        }))
    }

    async fn wait_task(
        &self,
        request: Request<wire::WaitTaskRequest>,
    ) -> Result<Response<wire::WaitTaskResponse>, Status> {
        let id = TaskId::new(request.into_inner().task_id);
        match self.tasks.wait(&id).await {
            Ok(exit) => Ok(Response::new(wire::WaitTaskResponse {
                result: Some(convert::exit_result(&exit)),
                err: exit.error.unwrap_or_default(),
            })),
            Err(DriverError::UnknownTask) => {
                Err(errors::permanent(format!("task does not exist: {id}")))
            }
            Err(error) => Err(errors::status(error)),
        }
    }

    async fn stop_task(
        &self,
        request: Request<wire::StopTaskRequest>,
    ) -> Result<Response<wire::StopTaskResponse>, Status> {
        let mut request = request.into_inner();
        let id = TaskId::new(request.task_id);
        let timeout = convert::duration(request.timeout);
        if request.signal.is_empty() {
            request.signal = KILL_SIGNAL.into();
        }
        let stopped = self
            .carry(|tasks| async move { tasks.stop(&id, timeout, &request.signal).await })
            .await?;
        gone_is_done(stopped)?;
        Ok(Response::new(wire::StopTaskResponse {}))
    }

    async fn destroy_task(
        &self,
        request: Request<wire::DestroyTaskRequest>,
    ) -> Result<Response<wire::DestroyTaskResponse>, Status> {
        let request = request.into_inner();
        let id = TaskId::new(request.task_id);
        let how = if request.force {
            Destroy::EvenIfRunning
        } else {
            Destroy::OnlyIfEnded
        };
        let destroyed = self
            .carry(|tasks| async move { tasks.destroy(&id, how).await })
            .await?;
        gone_is_done(destroyed)?;
        Ok(Response::new(wire::DestroyTaskResponse {}))
    }

    async fn inspect_task(
        &self,
        request: Request<wire::InspectTaskRequest>,
    ) -> Result<Response<wire::InspectTaskResponse>, Status> {
        let id = TaskId::new(request.into_inner().task_id);
        match self.tasks.inspect(&id).await {
            Ok(status) => Ok(Response::new(convert::inspection(status))),
            Err(DriverError::UnknownTask) => Err(errors::permanent("task not found for given id")),
            Err(error) => Err(errors::status(error)),
        }
    }

    type TaskStatsStream = Flow<wire::TaskStatsResponse>;

    async fn task_stats(
        &self,
        request: Request<wire::TaskStatsRequest>,
    ) -> Result<Response<Self::TaskStatsStream>, Status> {
        let request = request.into_inner();
        let id = TaskId::new(request.task_id);
        let interval = match convert::duration(request.collection_interval) {
            Duration::ZERO => STATS_INTERVAL,
            interval => interval,
        };
        let usage = self.tasks.stats(&id, interval);
        Ok(Response::new(Box::pin(
            usage.map(move |usage| Ok(convert::stats(&id, &usage))),
        )))
    }

    type TaskEventsStream = Flow<wire::DriverTaskEvent>;

    async fn task_events(
        &self,
        _: Request<wire::TaskEventsRequest>,
    ) -> Result<Response<Self::TaskEventsStream>, Status> {
        let events = self.tasks.events().map(|event| Ok(convert::event(event)));
        // It must not end either.
        Ok(Response::new(Box::pin(
            events.chain(tokio_stream::pending()),
        )))
    }

    async fn signal_task(
        &self,
        request: Request<wire::SignalTaskRequest>,
    ) -> Result<Response<wire::SignalTaskResponse>, Status> {
        let request = request.into_inner();
        if request.signal.is_empty() {
            return Err(errors::permanent("signal must be set"));
        }
        let id = TaskId::new(request.task_id);
        gone_is_done(self.tasks.signal(&id, &request.signal).await)?;
        Ok(Response::new(wire::SignalTaskResponse {}))
    }

    async fn exec_task(
        &self,
        request: Request<wire::ExecTaskRequest>,
    ) -> Result<Response<wire::ExecTaskResponse>, Status> {
        let request = request.into_inner();
        let id = TaskId::new(request.task_id);
        let limit = convert::duration(request.timeout);
        let (stdout, exit) = exec::to_end(&self.tasks, &id, request.command, limit).await?;
        Ok(Response::new(wire::ExecTaskResponse {
            stdout,
            stderr: Vec::new(),
            result: Some(convert::exit_result(&exit)),
        }))
    }

    type ExecTaskStreamingStream = Flow<wire::ExecTaskStreamingResponse>;

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<wire::ExecTaskStreamingRequest>>,
    ) -> Result<Response<Self::ExecTaskStreamingStream>, Status> {
        let answers = exec::stream(&self.tasks, request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn create_network(
        &self,
        _: Request<wire::CreateNetworkRequest>,
    ) -> Result<Response<wire::CreateNetworkResponse>, Status> {
        Err(errors::permanent(
            "CreateNetwork RPC not supported by driver",
        ))
    }

    async fn destroy_network(
        &self,
        _: Request<wire::DestroyNetworkRequest>,
    ) -> Result<Response<wire::DestroyNetworkResponse>, Status> {
        Err(errors::permanent(
            "DestroyNetwork RPC not supported by driver",
        ))
    }

    async fn init(
        &self,
        _: Request<wire::InitRequest>,
    ) -> Result<Response<wire::InitResponse>, Status> {
        Ok(Response::new(wire::InitResponse {}))
    }

    /// Tasks outlive us, and the process ends by go-plugin's own call: nothing is to be done.
    async fn shutdown(
        &self,
        _: Request<wire::ShutdownRequest>,
    ) -> Result<Response<wire::ShutdownResponse>, Status> {
        Ok(Response::new(wire::ShutdownResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::types::Health;

    #[tokio::test]
    async fn a_fingerprint_is_told_again_even_if_nothing_changes_any_more() {
        let (state, seen) = watch::channel(Fingerprint {
            health: Health::Healthy,
            description: "Healthy".into(),
            attributes: Default::default(),
        });
        drop(state);
        let (sender, mut receiver) = mpsc::channel(1);
        let told = tokio::spawn(tell_fingerprints(seen, sender, Duration::from_millis(20)));
        let begin = tokio::time::Instant::now();
        for _ in 0..3 {
            assert!(receiver.recv().await.is_some());
        }
        assert!(begin.elapsed() >= Duration::from_millis(40));
        drop(receiver);
        assert!(told.await.is_ok());
    }
}
