//! Tasks that exist in memory only, to see what the plugin makes of calls and answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nomad_driver_exec2::config::plugin::PluginConfig;
use nomad_driver_exec2::task::types::{
    Attribute, CpuUsage, Destroy, DriverError, ExitResult, Fingerprint, Health, MemoryUsage, Saved,
    SessionInput, SessionOutput, Severity, Streams, TaskEvent, TaskId, TaskRequest, TaskState,
    TaskStatus, Topology, Usage,
};
use nomad_driver_exec2::task::{Flow, Session, Tasks};
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

pub struct Memory {
    pub configured: Mutex<Vec<(PluginConfig, Option<Topology>)>>,
    pub requests: Mutex<Vec<TaskRequest>>,
    pub recovered: Mutex<Vec<(TaskRequest, Saved)>>,
    /// Every stop, signal and destroy of a known task, in words.
    pub verbs: Mutex<Vec<String>>,
    pub exits: Mutex<BTreeMap<TaskId, watch::Sender<Option<ExitResult>>>>,
    pub fingerprint: watch::Sender<Fingerprint>,
    pub events: broadcast::Sender<TaskEvent>,
    /// A task whose command is `slow` starts when this has a permit.
    pub gate: Semaphore,
    /// A session was let go of before its end.
    pub sessions_closed: Arc<Notify>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            configured: Mutex::default(),
            requests: Mutex::default(),
            recovered: Mutex::default(),
            verbs: Mutex::default(),
            exits: Mutex::default(),
            fingerprint: watch::Sender::new(Fingerprint {
                health: Health::Healthy,
                description: "Healthy".into(),
                attributes: [("driver.exec2.unveil.tasks".into(), Attribute::Bool(true))].into(),
            }),
            events: broadcast::Sender::new(8),
            gate: Semaphore::new(0),
            sessions_closed: Arc::default(),
        }
    }
}

impl Memory {
    pub fn exit(&self, id: &str, exit: ExitResult) {
        let exits = self.exits.lock().unwrap();
        exits[&TaskId::new(id)].send_replace(Some(exit));
    }

    fn known(&self, id: &TaskId) -> Result<watch::Receiver<Option<ExitResult>>, DriverError> {
        let exits = self.exits.lock().unwrap();
        let exit = exits.get(id).ok_or(DriverError::UnknownTask)?;
        Ok(exit.subscribe())
    }

    fn note(&self, id: &TaskId, verb: String) -> Result<(), DriverError> {
        self.known(id)?;
        self.verbs.lock().unwrap().push(verb);
        Ok(())
    }
}

impl Tasks for Memory {
    async fn configure(
        &self,
        config: PluginConfig,
        topology: Option<Topology>,
    ) -> Result<(), DriverError> {
        self.configured.lock().unwrap().push((config, topology));
        Ok(())
    }

    fn fingerprint(&self) -> watch::Receiver<Fingerprint> {
        self.fingerprint.subscribe()
    }

    async fn leave(&self) {}

    async fn start(&self, request: TaskRequest) -> Result<Saved, DriverError> {
        match request.options.command.as_str() {
            "transient" => return Err(DriverError::Transient("no bus".into())),
            "permanent" => return Err(DriverError::Permanent("no\nway".into())),
            "slow" => self.gate.acquire().await.unwrap().forget(),
            _ => {}
        }
        let mut exits = self.exits.lock().unwrap();
        exits.insert(request.id.clone(), watch::Sender::new(None));
        self.requests.lock().unwrap().push(request);
        Ok(Saved {
            version: 1,
            driver_state: b"state".to_vec(),
        })
    }

    async fn recover(&self, request: TaskRequest, saved: Saved) -> Result<(), DriverError> {
        self.recovered.lock().unwrap().push((request, saved));
        Ok(())
    }

    async fn wait(&self, id: &TaskId) -> Result<ExitResult, DriverError> {
        let mut exit = self.known(id)?;
        let ended = exit.wait_for(Option::is_some).await;
        Ok(ended.ok().and_then(|exit| exit.clone()).unwrap_or_default())
    }

    async fn stop(&self, id: &TaskId, timeout: Duration, signal: &str) -> Result<(), DriverError> {
        self.note(id, format!("stop {timeout:?} {signal}"))
    }

    async fn destroy(&self, id: &TaskId, how: Destroy) -> Result<(), DriverError> {
        self.note(id, format!("destroy {how:?}"))
    }

    async fn inspect(&self, id: &TaskId) -> Result<TaskStatus, DriverError> {
        self.known(id)?;
        Ok(TaskStatus {
            id: id.clone(),
            name: "web".into(),
            state: TaskState::Running,
            started_at: Some(UNIX_EPOCH + Duration::from_secs(1)),
            completed_at: None,
            exit: None,
            attributes: [("pid".into(), "42".into())].into(),
        })
    }

    async fn signal(&self, id: &TaskId, signal: &str) -> Result<(), DriverError> {
        self.note(id, format!("signal {signal}"))
    }

    /// Says how it was asked for, echoes what it is told, and ends at its input's end with 3.
    async fn exec(
        &self,
        id: &TaskId,
        command: Vec<String>,
        streams: Streams,
    ) -> Result<Session, DriverError> {
        self.note(id, format!("exec {command:?} {streams:?}"))?;
        let (input, mut inputs) = mpsc::channel(1);
        let (outputs, output) = mpsc::channel(1);
        let closed = Arc::clone(&self.sessions_closed);
        tokio::spawn(async move {
            let tell = async |said| outputs.send(Ok(said)).await;
            let merged = streams == Streams::Merged;
            if command == ["loud"] {
                for number in 0..10_000 {
                    let line = format!("{number}\n").into_bytes();
                    let _ = tell(SessionOutput::Stdout(line)).await;
                }
            }
            let listens = !merged && command != ["quiet"];
            loop {
                if !listens {
                    break;
                }
                let said = tokio::select! {
                    said = inputs.recv() => said,
                    () = outputs.closed() => break,
                };
                match said {
                    Some(SessionInput::Data(data)) => {
                        let _ = tell(SessionOutput::Stdout(data)).await;
                    }
                    Some(SessionInput::Resize(size)) => {
                        let size = format!("{size:?}").into_bytes();
                        let _ = tell(SessionOutput::Stderr(size)).await;
                    }
                    Some(SessionInput::End) | None => break,
                }
            }
            if command == ["quiet"] {
                outputs.closed().await;
            }
            for said in [
                SessionOutput::StdoutEnd,
                SessionOutput::StderrEnd,
                SessionOutput::Exited(ExitResult {
                    code: 3,
                    ..ExitResult::default()
                }),
            ] {
                if tell(said).await.is_err() {
                    closed.notify_one();
                }
            }
        });
        Ok(Session { input, output })
    }

    fn stats(&self, id: &TaskId, interval: Duration) -> Flow<Usage> {
        if self.known(id).is_err() {
            return Box::pin(tokio_stream::empty());
        }
        let usage = Usage {
            at: UNIX_EPOCH + interval,
            cpu: CpuUsage {
                percent: Some(12.5),
                ..Default::default()
            },
            memory: MemoryUsage {
                usage_bytes: Some(4_096),
                swap_bytes: Some(0),
                ..Default::default()
            },
        };
        Box::pin(tokio_stream::once(usage).chain(tokio_stream::pending()))
    }

    fn events(&self) -> Flow<TaskEvent> {
        Box::pin(BroadcastStream::new(self.events.subscribe()).filter_map(Result::ok))
    }
}

pub fn event(message: &str) -> TaskEvent {
    TaskEvent {
        severity: Severity::Info,
        task_id: TaskId::new("a/web/1"),
        alloc_id: "a".into(),
        task_name: "web".into(),
        at: SystemTime::now(),
        message: message.into(),
        annotations: BTreeMap::new(),
    }
}
