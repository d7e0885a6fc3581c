//! One task at a time: what is done to it, and what must come of that.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use harness::nomad::proto::driver::{TaskConfig, TaskHandle, TaskState};
use harness::nomad::{Agent, Exit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Status;

use super::model::{Blow, Call, Deed, End, INT, KILL, Kind, Life, Patience, STOP, State, number};
use crate::calls::{Calls, Place, with_script};
use crate::nomad::{Scope, said, status, until};

/// A StopTask for a task that ends by its signal.
const AMPLE: Duration = Duration::from_secs(20);
/// A StopTask for one that does not.
const SHORT: Duration = Duration::from_millis(30);
/// When an answer that is due counts as lost.
const ANSWER: Duration = Duration::from_secs(5);

/// Where one task after the other is.
#[derive(Debug)]
pub struct Slot {
    pub place: Place,
    /// Of the last task.
    pub id: String,
    pub task: Option<Task>,
    attempts: u32,
}

#[derive(Debug)]
pub struct Task {
    pub life: Life,
    config: TaskConfig,
    handle: TaskHandle,
    ends: Ends,
    scope: Scope,
    pid: String,
    waiters: Vec<JoinHandle<Result<Exit, Status>>>,
}

/// Our ends of what a task looks at and makes.
#[derive(Debug)]
pub struct Ends {
    fifo: PathBuf,
    up: PathBuf,
    /// Held, as what is in a FIFO goes with whoever has it open last.
    tell: File,
}

/// Which handles a new plugin is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handles {
    /// An agent that was restarted has forgotten the driver's configuration.
    Stored,
    InMemory,
}

impl Slot {
    pub async fn new(agent: &Agent) -> Result<Slot> {
        let place = Place::new(agent).await?;
        Ok(Slot {
            id: place.task("").id,
            place,
            task: None,
            attempts: 0,
        })
    }

    pub async fn undergo(&mut self, calls: &Calls, deed: Deed) -> Result<()> {
        match deed {
            Deed::Start { kind, again } => self.start(calls, kind, again).await,
            Deed::StartTwice(kind) => self.start_twice(calls, kind).await,
            Deed::StartDuring(kind, call) => self.start_during(calls, kind, call).await,
            Deed::Signal(name) => self.signal(calls, name).await,
            Deed::Tell => self.strike(calls, Blow::Tell).await,
            Deed::Strike(blow) => self.strike(calls, blow).await,
            Deed::Stop(name, patience) => self.stop(calls, name, patience).await,
            Deed::Destroy { force } => self.destroy(calls, force).await,
            Deed::Together(one, other) => self.together(calls, one, other).await,
            Deed::Wait(waiters) => {
                self.wait(calls, waiters);
                Ok(())
            }
        }
    }

    /// What StartTask gets, with an id that is new unless the task is to be started `again`.
    pub fn prepare(&mut self, kind: Kind, again: bool) -> Result<(TaskConfig, Ends)> {
        self.attempts += 1;
        let key = self.attempts.to_string();
        let mut config = with_script(self.place.task(""), &kind.script(&key));
        if again {
            config.id = self.id.clone();
        }
        if kind == Kind::Stranger {
            config.user = "nobody-of-this-host".into();
        }
        self.id = config.id.clone();
        Ok((config, Ends::new(self.place.local()?, &key)?))
    }

    async fn start(&mut self, calls: &Calls, kind: Kind, again: bool) -> Result<()> {
        let (config, ends) = self.prepare(kind, again || self.task.is_some())?;
        let answer = calls.start(config).await;
        if self.is_known() {
            ends.remove();
            refused(answer, &already_started(&self.id))
        } else if kind == Kind::Stranger {
            ends.remove();
            refused(answer, "nobody-of-this-host")
        } else {
            self.started(calls, kind, answer.context("StartTask")?, ends)
                .await
        }
    }

    async fn start_twice(&mut self, calls: &Calls, kind: Kind) -> Result<()> {
        if self.is_known() || kind == Kind::Stranger {
            return self.start(calls, kind, true).await;
        }
        let again = self.task.is_some();
        let (config, ends) = self.prepare(kind, again)?;
        let (handle, other) = match tokio::join!(calls.start(config.clone()), calls.start(config)) {
            (Ok(handle), other) => (handle, other),
            (other, Ok(handle)) => (handle, other),
            (one, other) => bail!("both starts failed: {one:?}, {other:?}"),
        };
        refused(other, &already_started(&self.id))?;
        self.started(calls, kind, handle, ends).await
    }

    async fn start_during(&mut self, calls: &Calls, kind: Kind, call: Call) -> Result<()> {
        if self.task.is_some() || kind == Kind::Stranger {
            return self.start(calls, kind, true).await;
        }
        let (config, ends) = self.prepare(kind, false)?;
        let id = config.id.clone();
        let (started, called) = tokio::join!(calls.start(config), call_once(calls, &id, call));
        match called {
            Err(error)
                if call == Call::Destroy && format!("{error:#}").contains("is being started") => {}
            called => called.with_context(|| format!("{call:?}"))?,
        }
        match started {
            Ok(handle) => self.known(calls, kind, handle, ends).await?,
            // There was nothing left to start.
            Err(_) if call == Call::Destroy => ends.remove(),
            Err(status) => return Err(status).context("StartTask"),
        }
        if let (Some(task), Call::Stop) = (&mut self.task, call) {
            task.life.signalled_early(INT);
        }
        self.together(calls, call, call).await
    }

    pub async fn started(
        &mut self,
        calls: &Calls,
        kind: Kind,
        handle: TaskHandle,
        ends: Ends,
    ) -> Result<()> {
        if kind.says_when_it_is_up() {
            until("the task is up", || ends.up.exists().then_some(())).await?;
        }
        self.known(calls, kind, handle, ends).await
    }

    /// As the driver has it from now on.
    async fn known(
        &mut self,
        calls: &Calls,
        kind: Kind,
        handle: TaskHandle,
        ends: Ends,
    ) -> Result<()> {
        let seen = calls.inspect(&self.id).await.context("InspectTask")?;
        let driver = seen.driver.context("a driver's status")?;
        self.forget();
        self.task = Some(Task {
            life: Life::started(kind),
            config: handle.config.clone().context("a handle's configuration")?,
            handle,
            ends,
            scope: Scope::of_id(&self.id)?,
            pid: driver.attributes.get("pid").context("a pid")?.clone(),
            waiters: Vec::new(),
        });
        Ok(())
    }

    fn is_known(&self) -> bool {
        self.task.as_ref().is_some_and(|task| task.life.is_known())
    }

    pub fn running(&mut self) -> Option<&mut Task> {
        self.task.as_mut().filter(|task| task.life.is_running())
    }

    async fn signal(&mut self, calls: &Calls, name: &str) -> Result<()> {
        let answer = calls.signal(&self.id, name).await;
        let Some(signal) = number(name) else {
            return refused(answer, &format!("signal {name:?} is unknown"));
        };
        answer.context("SignalTask")?;
        if let Some(task) = self.running() {
            task.life.signalled(signal);
            if signal == STOP {
                let pid = task.pid.parse()?;
                let is_stopped = || status(pid, "State").ok()?.starts_with('T').then_some(());
                until("the task is stopped", is_stopped).await?;
            }
        }
        Ok(())
    }

    async fn strike(&mut self, calls: &Calls, blow: Blow) -> Result<()> {
        let Some(task) = self.running() else {
            return Ok(());
        };
        task.strike(blow)?;
        if blow == Blow::KillSupervisor {
            // Of a supervisor that is not the plugin's child the kernel alone can tell, since 6.15.
            let ends = match task.life.is_ours {
                true => vec![End::KILLED],
                false => vec![End::KILLED, End::UNKNOWN],
            };
            task.ended(calls, &ends, false).await?;
        }
        Ok(())
    }

    pub async fn stop(&mut self, calls: &Calls, name: &str, patience: Patience) -> Result<()> {
        // A name that it does not know counts as SIGINT.
        let signal = number(name).unwrap_or(INT);
        let Some(task) = self.running() else {
            let answer = calls.stop(&self.id, name, AMPLE).await;
            return answer.context("StopTask of what does not run");
        };
        let timeout = match patience {
            Patience::None => Duration::ZERO,
            Patience::Ample if task.life.would_end_by(signal) => AMPLE,
            Patience::Ample => SHORT,
        };
        let answer = calls.stop(&task.config.id, name, timeout).await;
        answer.context("StopTask")?;
        ensure!(
            task.is_empty(),
            "stopped, and yet {:?}",
            task.scope.processes()
        );
        task.life.stopped(signal, patience);
        Ok(())
    }

    pub async fn destroy(&mut self, calls: &Calls, force: bool) -> Result<()> {
        let answer = calls.destroy(&self.id, force).await;
        if !force && self.running().is_some() {
            return refused(answer, "cannot destroy running task");
        }
        answer.context("DestroyTask")?;
        self.destroyed(&[End::KILLED]).await
    }

    /// `ends` are those that whoever waits may hear of.
    async fn destroyed(&mut self, ends: &[End]) -> Result<()> {
        if let Some(task) = &mut self.task {
            task.answered(ends).await?;
            task.scope.expect_gone()?;
        }
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        if let Some(task) = self.task.take() {
            task.ends.remove();
        }
    }

    pub async fn together(&mut self, calls: &Calls, one: Call, other: Call) -> Result<()> {
        let answers = tokio::join!(
            call_once(calls, &self.id, one),
            call_once(calls, &self.id, other)
        );
        answers.0.with_context(|| format!("{one:?}"))?;
        answers.1.with_context(|| format!("{other:?}"))?;
        let mut ends = Vec::new();
        if let Some(task) = self.running() {
            match (one, other) {
                (Call::Kill, Call::Kill) => task.life.signalled(KILL),
                _ => task.life.stopped(INT, Patience::None),
            }
            ends = task.life.due().unwrap_or_default();
        }
        if [one, other].contains(&Call::Destroy) {
            self.destroyed(&ends).await?;
        }
        Ok(())
    }

    pub fn forget_waiters(&mut self) {
        let waiters = self.task.iter_mut().flat_map(|task| task.waiters.drain(..));
        waiters.for_each(|waiter| waiter.abort());
    }

    fn wait(&mut self, calls: &Calls, waiters: u8) {
        let Some(task) = self.running() else { return };
        for _ in 0..waiters {
            let (calls, id) = (calls.clone(), task.config.id.clone());
            let waiter = tokio::spawn(async move { calls.wait(&id).await });
            task.waiters.push(waiter);
        }
    }

    /// Sees a task end whose time has come.
    pub async fn settle(&mut self, calls: &Calls) -> Result<()> {
        if let Some(task) = &mut self.task
            && let Some(due) = task.life.due()
        {
            task.ended(calls, &due, true).await?;
        }
        Ok(())
    }

    /// Compares what there is with what must be.
    pub async fn look(&self, calls: &Calls) -> Result<()> {
        let inspected = calls.inspect(&self.id).await;
        let task = match &self.task {
            Some(task) if task.life.is_known() => task,
            _ => {
                refused(inspected, "task not found for given id")?;
                return refused(calls.end(&self.id).await, "task does not exist");
            }
        };
        let inspected = inspected.context("InspectTask")?;
        let told = inspected.task.context("a task's status")?;
        let driver = inspected.driver.context("a driver's status")?;
        ensure!(driver.attributes["pid"] == task.pid, "{driver:?}");
        ensure!(driver.attributes["unit"] == task.scope.unit, "{driver:?}");
        match &task.life.state {
            State::Running { .. } => {
                ensure!(told.state() == TaskState::Running, "{told:?}");
                ensure!(task.waiters.iter().all(|waiter| !waiter.is_finished()));
                let found = task.scope.processes()?;
                ensure!(found.len() == task.life.kind.processes(), "{found:?}");
            }
            State::Ended { end, .. } => {
                ensure!(told.state() == TaskState::Exited, "{told:?}");
                let result = told.result.context("a result")?;
                ensure!(
                    (result.exit_code, result.signal) == (end.code, end.signal),
                    "{result:?}"
                );
                let exit = calls.end(&self.id).await.context("WaitTask")?;
                ensure!(seen(&exit) == *end, "first {end:?}, then {exit:?}");
                let (begun, ended) = (
                    told.started_at.context("a start")?,
                    told.completed_at.context("an end")?,
                );
                ensure!(
                    (begun.seconds, begun.nanos) <= (ended.seconds, ended.nanos),
                    "{begun:?}, {ended:?}"
                );
            }
            State::Lost => {}
        }
        Ok(())
    }
}

impl Task {
    pub fn handle(&self, handles: Handles) -> TaskHandle {
        let mut handle = TaskHandle {
            state: TaskState::Running.into(),
            ..self.handle.clone()
        };
        if let (Some(config), Handles::Stored) = (&mut handle.config, handles) {
            config.msgpack_driver_config.clear();
        }
        handle
    }

    pub fn is_empty(&self) -> bool {
        self.scope
            .processes()
            .map_or(true, |found| found.is_empty())
    }

    /// From outside. The end of a supervisor is the caller's to judge.
    pub fn strike(&mut self, blow: Blow) -> Result<()> {
        let end = |pid: i32| kill(Pid::from_raw(pid), Signal::SIGKILL);
        match blow {
            Blow::Nothing => {}
            Blow::Tell => {
                self.ends.tell.write_all(b"\n")?;
                self.life.is_told();
            }
            Blow::KillMain => {
                end(self.pid.parse()?)?;
                self.life.signalled(KILL);
            }
            Blow::KillSupervisor => end(self.scope.supervisor()?.cast_signed())?,
            Blow::StopScope => {
                said("systemctl", &["stop", &self.scope.unit])?;
                self.life.stopped_by_systemd();
            }
        }
        Ok(())
    }

    /// It must have ended by one of these, with nothing left in its scope, and whoever waited must have been told the same.
    async fn ended(&mut self, calls: &Calls, due: &[End], is_recorded: bool) -> Result<()> {
        let exit = calls.end(&self.config.id).await.context("WaitTask")?;
        ensure!(due.contains(&seen(&exit)), "{exit:?} is none of {due:?}");
        ensure!(!exit.oom_killed, "{exit:?}");
        ensure!(
            self.is_empty(),
            "ended, and yet {:?}",
            self.scope.processes()
        );
        self.answered(&[seen(&exit)]).await?;
        self.life.ended(seen(&exit), is_recorded);
        Ok(())
    }

    async fn answered(&mut self, ends: &[End]) -> Result<()> {
        for waiter in self.waiters.drain(..) {
            let answer = timeout(ANSWER, waiter).await.context("a WaitTask hangs")?;
            let exit = answer?.context("WaitTask")?;
            ensure!(ends.contains(&seen(&exit)), "told {exit:?}, not {ends:?}");
        }
        Ok(())
    }
}

impl Ends {
    fn new(local: &Path, key: &str) -> Result<Ends> {
        let fifo = local.join(key);
        mkfifo(&fifo, Mode::empty())?;
        fs::set_permissions(&fifo, Permissions::from_mode(0o666))?;
        let mut open = OpenOptions::new();
        let tell = open.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        Ok(Ends {
            tell: tell.open(&fifo)?,
            up: local.join(format!("{key}.up")),
            fifo,
        })
    }

    pub fn remove(&self) {
        for file in [&self.fifo, &self.up] {
            let _ = fs::remove_file(file);
        }
    }
}

pub async fn call_once(calls: &Calls, id: &str, call: Call) -> Result<(), Status> {
    match call {
        Call::Stop => calls.stop(id, "SIGINT", Duration::ZERO).await,
        Call::Kill => calls.signal(id, "SIGKILL").await,
        Call::Destroy => calls.destroy(id, true).await,
    }
}

fn seen(exit: &Exit) -> End {
    End {
        code: exit.code,
        signal: exit.signal,
        is_explained: !exit.message.is_empty(),
    }
}

fn already_started(id: &str) -> String {
    format!("task with ID {id} already started")
}

/// It must have failed with a sentence that has these words.
pub fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, words: &str) -> Result<()> {
    match answer {
        Ok(answer) => bail!("not refused with {words:?}: {answer:?}"),
        Err(status) => {
            ensure!(
                status.message().contains(words) && status.code() == tonic::Code::Unknown,
                "refused with {status:?}, not {words:?}"
            );
            Ok(())
        }
    }
}

/// A call that was cut off, not one that was answered.
pub fn expect_lost(status: &Status) -> Result<()> {
    let is_lost = std::error::Error::source(status).is_some();
    ensure!(is_lost, "refused, before the plugin was killed: {status:?}");
    Ok(())
}
