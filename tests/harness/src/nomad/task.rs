//! One task's life, in the order of Nomad's task runner: StartTask, then WaitTask and TaskStats held; DestroyTask as soon as
//! WaitTask has answered, whether the task was stopped or ended by itself.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nomad_driver_exec2::job::alloc_dir::TaskPaths;
use nomad_driver_exec2::job::request::new_task_id;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::agent::{Handles, Shared};
use super::logmon::Logmon;
use super::proto::driver::{
    DestroyTaskRequest, InspectTaskRequest, InspectTaskResponse, RecoverTaskRequest,
    SignalTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig, TaskHandle, TaskState,
    TaskStats, TaskStatsRequest, WaitTaskRequest,
};
use super::violations::is_lost;
use super::{Connection, RpcError, check};

/// Nomad waits without limit; no test does.
const EXIT_WAIT: Duration = Duration::from_secs(120);
const STATS_INTERVAL: Duration = Duration::from_secs(1);
const KILL_TIMEOUT_MAX: Duration = Duration::from_secs(30);

/// How a task ended, as Nomad has it from WaitTask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    pub signal: i32,
    pub oom_killed: bool,
    /// The driver's own words, or those of the call that failed.
    pub message: String,
}

impl Exit {
    pub fn success(&self) -> bool {
        self.code == 0 && self.signal == 0 && self.message.is_empty()
    }
}

/// A task of an allocation.
#[derive(Debug, Clone)]
pub struct Task(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    agent: std::sync::Weak<Shared>,
    name: String,
    paths: TaskPaths,
    logs: PathBuf,
    kill_signal: String,
    kill_timeout: Duration,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    stats: Mutex<Vec<TaskStats>>,
}

#[derive(Debug)]
struct State {
    config: TaskConfig,
    handle: Option<TaskHandle>,
    logmons: Vec<Logmon>,
}

/// What a task is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub paths: TaskPaths,
    pub logs: PathBuf,
    pub kill_signal: String,
    pub kill_timeout: Duration,
    pub config: TaskConfig,
}

impl Task {
    pub(super) fn new(agent: &Arc<Shared>, parts: Parts) -> Self {
        Task(Arc::new(Inner {
            agent: Arc::downgrade(agent),
            name: parts.config.name.clone(),
            paths: parts.paths,
            logs: parts.logs,
            kill_signal: parts.kill_signal,
            kill_timeout: parts.kill_timeout.min(KILL_TIMEOUT_MAX),
            state: Mutex::new(State {
                config: parts.config,
                handle: None,
                logmons: Vec::new(),
            }),
            exit: watch::Sender::new(None),
            stats: Mutex::default(),
        }))
    }

    pub(super) fn is(&self, other: &Task) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The id of its last start.
    pub fn id(&self) -> String {
        self.state().config.id.clone()
    }

    pub fn user(&self) -> String {
        self.state().config.user.clone()
    }

    /// A restarted agent does not tell a dynamic user again: the next start comes without one.
    pub(super) fn forget_user(&self) {
        self.state().config.user.clear();
    }

    /// What Nomad keeps of it.
    pub fn handle(&self) -> Option<TaskHandle> {
        self.state().handle.clone()
    }

    pub fn paths(&self) -> &TaskPaths {
        &self.0.paths
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        self.0.exit.borrow().clone()
    }

    /// Ends its log collectors while it runs.
    pub fn kill_collectors(&self) {
        self.state().logmons.iter().for_each(Logmon::kill);
    }

    /// Every sample so far, one a second.
    pub fn stats(&self) -> Vec<TaskStats> {
        self.0
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits for its end; its logs are whole then.
    pub async fn wait(&self) -> Result<Exit> {
        let mut exit = self.0.exit.subscribe();
        let ended = timeout(EXIT_WAIT, exit.wait_for(Option::is_some)).await;
        let ended = ended
            .with_context(|| format!("task {} did not end within {EXIT_WAIT:?}", self.name()))?;
        ended?.clone().context("an exit")
    }

    /// Stops it as `nomad alloc stop` does, with the job's signal and timeout.
    pub async fn stop(&self) -> Result<Exit> {
        if let Some(exit) = self.exit() {
            return Ok(exit);
        }
        let agent = self.agent()?;
        let request = StopTaskRequest {
            task_id: self.id(),
            timeout: Some(duration(self.0.kill_timeout)),
            signal: self.0.kill_signal.clone(),
        };
        let stopped = agent.connection()?.driver().stop_task(request).await;
        stopped.map_err(|status| agent.violations.status("StopTask", status))?;
        self.wait().await
    }

    /// Starts it again under a new id, stopping it first if it runs.
    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        let config = {
            let mut state = self.state();
            state.config.id = new_task_id(&state.config.alloc_id, &self.0.name);
            state.config.clone()
        };
        self.start(config).await
    }

    /// `nomad alloc signal`.
    pub async fn signal(&self, signal: &str) -> Result<()> {
        let agent = self.agent()?;
        let request = SignalTaskRequest {
            task_id: self.id(),
            signal: signal.into(),
        };
        let sent = agent.connection()?.driver().signal_task(request).await;
        sent.map_err(|status| agent.violations.status("SignalTask", status))?;
        Ok(())
    }

    pub async fn inspect(&self) -> Result<InspectTaskResponse> {
        let agent = self.agent()?;
        let request = InspectTaskRequest { task_id: self.id() };
        let answer = agent.connection()?.driver().inspect_task(request).await;
        let answer = answer
            .map_err(|status| agent.violations.status("InspectTask", status))?
            .into_inner();
        check::inspected(&answer, &agent.violations);
        Ok(answer)
    }

    pub(super) async fn start_first(&self) -> Result<()> {
        let config = self.state().config.clone();
        self.start(config).await
    }

    async fn start(&self, config: TaskConfig) -> Result<()> {
        let agent = self.agent()?;
        self.0.exit.send_replace(None);
        self.start_logmons()?;
        let request = StartTaskRequest {
            task: Some(config.clone()),
        };
        let mut connection = agent.connection()?;
        let mut answer = connection.driver().start_task(request.clone()).await;
        // A plugin that dies in the call is started again, and so is the task, once and under the same id.
        if answer.as_ref().is_err_and(is_lost) && agent.plugin_has_died().await {
            connection.close();
            agent.launch().await?;
            connection = agent.connection()?;
            answer = connection.driver().start_task(request).await;
        }
        let answer = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                self.state().logmons.clear();
                return Err(agent.violations.status("StartTask", status).into());
            }
        };
        check::started(&answer, &config.id, &agent.violations);
        self.state().handle = answer.handle.map(|handle| TaskHandle {
            state: TaskState::Running.into(),
            ..handle
        });
        self.follow(&agent, &connection);
        Ok(())
    }

    /// Offers the task to a new instance; the inner error is the driver's refusal.
    pub(super) async fn recover(
        &self,
        connection: &Connection,
        handles: Handles,
    ) -> Result<Result<(), RpcError>> {
        let agent = self.agent()?;
        let request = self.recovery(handles)?;
        match connection.driver().recover_task(request).await {
            Ok(_) => {
                self.follow(&agent, connection);
                Ok(Ok(()))
            }
            Err(status) => {
                let error = agent.violations.status("RecoverTask", status);
                self.destroy(&agent, connection).await;
                self.end(Exit {
                    code: 0,
                    signal: 0,
                    oom_killed: false,
                    message: error.to_string(),
                })
                .await;
                Ok(Err(error))
            }
        }
    }

    /// The same for a task that has ended.
    pub(super) async fn offer_finished(&self, connection: &Connection) -> Result<()> {
        let agent = self.agent()?;
        let request = self.recovery(Handles::Stored)?;
        if let Err(status) = connection.driver().recover_task(request).await {
            agent.violations.status("RecoverTask", status);
        }
        Ok(())
    }

    fn recovery(&self, handles: Handles) -> Result<RecoverTaskRequest> {
        let mut handle = self.handle().context("a started task has a handle")?;
        if let (Some(config), Handles::Stored) = (handle.config.as_mut(), handles) {
            config.msgpack_driver_config.clear();
        }
        Ok(RecoverTaskRequest {
            // Nomad never fills it in.
            task_id: String::new(),
            handle: Some(handle),
        })
    }

    fn start_logmons(&self) -> Result<()> {
        let mut logmons = Vec::new();
        for (fifo, stream) in [
            (&self.0.paths.stdout, "stdout"),
            (&self.0.paths.stderr, "stderr"),
        ] {
            if fifo.as_os_str() != "/dev/null" {
                let log = self.0.logs.join(format!("{}.{stream}.0", self.0.name));
                logmons.push(Logmon::start(fifo, &log)?);
            }
        }
        self.state().logmons = logmons;
        Ok(())
    }

    fn follow(&self, agent: &Arc<Shared>, connection: &Connection) {
        tokio::spawn(self.clone().wait_for_end(agent.clone(), connection.clone()));
        if agent.config.version.asks_for_stats(agent.config.metrics) {
            tokio::spawn(
                self.clone()
                    .collect_stats(agent.clone(), connection.clone()),
            );
        }
    }

    async fn wait_for_end(self, agent: Arc<Shared>, connection: Connection) {
        let request = WaitTaskRequest { task_id: self.id() };
        let answer = connection.driver().wait_task(request).await;
        // The agent or the plugin is gone; whoever recovers the task waits for it again, and a dead agent hears no answer of
        // a plugin that outlived it.
        if connection.is_closing() {
            return;
        }
        let exit = match answer {
            Ok(answer) => {
                let answer = answer.into_inner();
                check::waited(&answer, agent.config.version, &agent.violations);
                let result = answer.result.unwrap_or_default();
                Exit {
                    code: result.exit_code,
                    signal: result.signal,
                    oom_killed: result.oom_killed,
                    message: answer.err,
                }
            }
            Err(status) => {
                let message = agent.violations.status("WaitTask", status).to_string();
                Exit {
                    code: 0,
                    signal: 0,
                    oom_killed: false,
                    message,
                }
            }
        };
        self.destroy(&agent, &connection).await;
        self.end(exit).await;
    }

    async fn destroy(&self, agent: &Shared, connection: &Connection) {
        let request = DestroyTaskRequest {
            task_id: self.id(),
            force: true,
        };
        if let Err(status) = connection.driver().destroy_task(request).await
            && !connection.is_closing()
        {
            // Nomad only logs it; a driver that cannot clean up has still failed.
            agent
                .violations
                .note(agent.violations.status("DestroyTask", status).to_string());
        }
    }

    async fn end(&self, exit: Exit) {
        let logmons = std::mem::take(&mut self.state().logmons);
        for logmon in &logmons {
            if !logmon.ended().await
                && let Ok(agent) = self.agent()
            {
                agent.violations.note(format!(
                    "task {}: its log FIFO is still open after DestroyTask",
                    self.name()
                ));
            }
        }
        self.0.exit.send_replace(Some(exit));
    }

    async fn collect_stats(self, agent: Arc<Shared>, connection: Connection) {
        let request = TaskStatsRequest {
            task_id: self.id(),
            collection_interval: Some(duration(STATS_INTERVAL)),
        };
        let over =
            || connection.is_closing() || self.exit().is_some() || self.id() != request.task_id;
        while !over() {
            match connection.driver().task_stats(request.clone()).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    while let Ok(Some(answer)) = stream.message().await {
                        check::stats(&answer, &agent.violations);
                        let mut stats = self.0.stats.lock().unwrap_or_else(PoisonError::into_inner);
                        stats.extend(answer.stats);
                    }
                }
                Err(_) if over() => {}
                Err(status) => {
                    agent.violations.status("TaskStats", status.clone());
                    agent.violations.note(format!("TaskStats: {status}"));
                }
            }
            sleep(STATS_INTERVAL).await;
        }
    }

    fn agent(&self) -> Result<Arc<Shared>> {
        self.0.agent.upgrade().context("the agent is gone")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}
