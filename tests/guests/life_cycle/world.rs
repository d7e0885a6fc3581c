//! An agent with its plugin and up to four tasks, each compared with the model after every step.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::Context;
use harness::leaks::{Ground, Leak};
use harness::nomad::proto::driver::{TaskConfig, TaskHandle, TaskState};
use harness::nomad::{Agent, Exit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tonic::Status;

use super::model::{
    Blow, Call, Deed, End, INT, KILL, Kind, Life, Op, Patience, STOP, Sequence, State, TASKS_MAX,
    number,
};
use crate::calls::{Calls, Descriptors, Place, with_script};
use crate::nomad::{Scope, agent, status, until};

/// A StopTask for a task that ends by its signal.
const AMPLE: Duration = Duration::from_secs(20);
/// A StopTask for one that does not.
const SHORT: Duration = Duration::from_millis(30);
/// What goes without being waited for is gone after this.
const SETTLING: Duration = Duration::from_secs(5);
/// Where a plugin's socket is: one, of the plugin that runs.
const SOCKETS: &str = "/run/nomad-driver-exec2/plugin";

#[derive(Debug)]
pub struct World {
    /// As it was before there was an agent.
    before: Ground,
    ground: Ground,
    descriptors: Descriptors,
    agent: Option<Agent>,
    slots: Vec<Slot>,
    keys: u32,
}

/// Where one task after the other is.
#[derive(Debug)]
struct Slot {
    place: Place,
    /// Of the last task.
    id: String,
    task: Option<Task>,
}

#[derive(Debug)]
struct Task {
    life: Life,
    config: TaskConfig,
    handle: TaskHandle,
    ends: Ends,
    scope: Scope,
    pid: String,
    waiters: Vec<JoinHandle<Result<Exit, Status>>>,
}

/// Our ends of what a task looks at and makes.
#[derive(Debug)]
struct Ends {
    fifo: PathBuf,
    up: PathBuf,
    /// Held, as what is in a FIFO goes with whoever has it open last.
    tell: File,
}

/// Which handles a new plugin is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handles {
    /// An agent that was restarted has forgotten the driver's configuration.
    Stored,
    InMemory,
}

/// Whether it is the plugin process that there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plugin {
    Same,
    New,
}

impl World {
    pub async fn new(context: &Context) -> Result<World> {
        let before = Ground::survey()?;
        let agent = agent(context).await?;
        let mut slots = Vec::new();
        for _ in 0..TASKS_MAX {
            let place = Place::new(&agent).await?;
            slots.push(Slot {
                id: place.task("").id,
                place,
                task: None,
            });
        }
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        Ok(World {
            before,
            ground: Ground::survey()?,
            descriptors: Descriptors::of(plugin)?,
            agent: Some(agent),
            slots,
            keys: 0,
        })
    }

    /// Does one after the other, looks after each, and leaves no task.
    pub async fn live(&mut self, sequence: &Sequence) -> Result<()> {
        for (index, op) in sequence.ops.iter().enumerate() {
            self.step(sequence.tasks, *op)
                .await
                .with_context(|| format!("step {index}, {op:?}"))?;
        }
        self.clear().await.context("after the last step")
    }

    pub async fn finish(mut self) -> Result<()> {
        for slot in &self.slots {
            slot.place.close().await?;
        }
        self.agent
            .take()
            .context("there is no agent")?
            .finish()
            .await
    }

    /// Ends whatever there is, without a word to the driver.
    pub fn abandon(self) {
        let leaks = self.before.left().unwrap_or_default();
        leaks.iter().for_each(Leak::clear);
    }

    async fn step(&mut self, tasks: usize, op: Op) -> Result<()> {
        match op {
            Op::Task(index, deed) => self.do_to(index % tasks, deed).await?,
            Op::RestartPlugin => self.restart_plugin().await?,
            Op::KillPlugin => self.kill_plugin(None).await?,
            Op::CrashAgent => self.crash_agent().await?,
        }
        let calls = self.calls()?;
        for slot in &mut self.slots {
            slot.settle(&calls).await?;
            slot.look(&calls).await?;
        }
        Ok(())
    }

    fn calls(&self) -> Result<Calls> {
        Calls::of(self.agent()?)
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("there is no agent")
    }

    fn key(&mut self) -> String {
        self.keys += 1;
        self.keys.to_string()
    }

    async fn do_to(&mut self, index: usize, deed: Deed) -> Result<()> {
        let calls = self.calls()?;
        let key = self.key();
        let slot = &mut self.slots[index];
        match deed {
            Deed::Start { kind, again } => slot.start(&calls, &key, kind, again).await,
            Deed::StartTwice(kind) => slot.start_twice(&calls, &key, kind).await,
            Deed::Signal(name) => slot.signal(&calls, name).await,
            Deed::Tell => slot.strike(&calls, Blow::Tell).await,
            Deed::Strike(blow) => slot.strike(&calls, blow).await,
            Deed::Stop(name, patience) => slot.stop(&calls, name, patience).await,
            Deed::Destroy { force } => slot.destroy(&calls, force).await,
            Deed::Together(one, other) => slot.together(&calls, one, other).await,
            Deed::Wait(waiters) => {
                slot.wait(&calls, waiters);
                Ok(())
            }
            Deed::StrikeUnseen(blow) => self.strike_unseen(index, blow).await,
            Deed::StartThroughCrash(kind, after) => {
                self.start_through_crash(index, kind, Duration::from_millis(after))
                    .await
            }
            Deed::CallThroughCrash(call, after) => {
                self.call_through_crash(index, call, Duration::from_millis(after))
                    .await
            }
        }
    }

    fn forget_waiters(&mut self) {
        for task in self.slots.iter_mut().filter_map(|slot| slot.task.as_mut()) {
            task.waiters.drain(..).for_each(|waiter| waiter.abort());
        }
    }

    async fn restart_plugin(&mut self) -> Result<()> {
        self.forget_waiters();
        self.agent()?.restart().await?;
        self.recover(Handles::Stored, Plugin::New, None).await
    }

    async fn kill_plugin(&mut self, but: Option<usize>) -> Result<()> {
        self.forget_waiters();
        self.agent()?.kill_plugin().await?;
        self.recover(Handles::InMemory, Plugin::New, but).await
    }

    async fn crash_agent(&mut self) -> Result<()> {
        self.forget_waiters();
        let agent = self.agent.take().context("there is no agent")?;
        let (agent, _) = agent.crash().await.reattach().await?;
        self.agent = Some(agent);
        self.recover(Handles::Stored, Plugin::Same, None).await
    }

    /// Offers every task `but` one to the plugin.
    async fn recover(
        &mut self,
        handles: Handles,
        plugin: Plugin,
        but: Option<usize>,
    ) -> Result<()> {
        let calls = self.calls()?;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(task) = slot.task.as_mut().filter(|_| but != Some(index)) else {
                continue;
            };
            let answer = calls.recover(task.handle(handles)).await;
            if plugin == Plugin::New {
                task.life.is_ours = false;
            }
            if task.life.can_be_recovered() || plugin == Plugin::Same && task.life.is_known() {
                answer.with_context(|| format!("RecoverTask of {:?}", task.life))?;
            } else {
                refused(answer, "left no exit record")?;
                task.life.state = State::Lost;
            }
        }
        Ok(())
    }

    async fn strike_unseen(&mut self, index: usize, blow: Blow) -> Result<()> {
        self.forget_waiters();
        let agent = self.agent.take().context("there is no agent")?;
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        if let Some(task) = self.slots[index]
            .task
            .as_mut()
            .filter(|it| it.life.is_running())
        {
            task.strike(blow)?;
            if blow == Blow::KillSupervisor {
                task.life.ended(End::UNKNOWN, false);
            }
            if blow == Blow::KillSupervisor || task.life.due().is_some() {
                until("the scope is empty", || task.is_empty().then_some(())).await?;
            }
        }
        let (agent, _) = crashed.reattach().await?;
        self.agent = Some(agent);
        self.recover(Handles::Stored, Plugin::New, None).await
    }

    /// Nomad starts it again under the same id if it has no answer.
    async fn start_through_crash(
        &mut self,
        index: usize,
        kind: Kind,
        after: Duration,
    ) -> Result<()> {
        if self.slots[index].task.is_some() || kind == Kind::Stranger {
            return self.kill_plugin(None).await;
        }
        let (first, second) = (self.key(), self.key());
        let (config, ends) = self.slots[index].prepare(&first, kind, false)?;
        let calls = self.calls()?;
        let start = tokio::spawn(async move { calls.start(config).await });
        sleep(after).await;
        self.kill_plugin(None).await?;
        let calls = self.calls()?;
        let slot = &mut self.slots[index];
        match start.await? {
            Ok(handle) => {
                calls.recover(handle.clone()).await.context("RecoverTask")?;
                slot.started(&calls, kind, handle, ends).await?;
                if let Some(task) = &mut slot.task {
                    task.life.is_ours = false;
                }
                Ok(())
            }
            Err(status) => {
                expect_lost(&status)?;
                ends.remove();
                let (config, ends) = slot.prepare(&second, kind, true)?;
                let handle = calls.start(config).await.context("StartTask, once more")?;
                slot.started(&calls, kind, handle, ends).await
            }
        }
    }

    /// The next plugin is called once more.
    async fn call_through_crash(
        &mut self,
        index: usize,
        call: Call,
        after: Duration,
    ) -> Result<()> {
        let calls = self.calls()?;
        let id = self.slots[index].id.clone();
        let called = tokio::spawn(async move { call_once(&calls, &id, call).await });
        sleep(after).await;
        // A task that is half destroyed may be recovered, or not.
        let but = (call == Call::Destroy).then_some(index);
        self.kill_plugin(but).await?;
        if let Err(status) = called.await? {
            expect_lost(&status)?;
        }
        let calls = self.calls()?;
        let slot = &mut self.slots[index];
        if let (Some(task), Some(_)) = (&mut slot.task, but) {
            task.life.is_ours = false;
            let _ = calls.recover(task.handle(Handles::InMemory)).await;
        }
        slot.together(&calls, call, call).await
    }

    async fn clear(&mut self) -> Result<()> {
        let calls = self.calls()?;
        for slot in &mut self.slots {
            slot.stop(&calls, "SIGINT", Patience::None).await?;
            slot.settle(&calls).await?;
            slot.destroy(&calls, true).await?;
        }
        let agent = self.agent()?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let left = || -> Result<String> {
            let is_left = |leak: &Leak| match leak {
                Leak::Process { pid, .. } => *pid != plugin.cast_signed(),
                Leak::File(path) => !path.starts_with(SOCKETS),
                _ => true,
            };
            let leaks = self.ground.left()?;
            let mut left: Vec<String> = leaks
                .iter()
                .filter(|it| is_left(it))
                .map(Leak::to_string)
                .collect();
            let sockets = fs::read_dir(SOCKETS).map_or(0, Iterator::count);
            if sockets > 1 {
                left.push(format!("{sockets} sockets of plugins"));
            }
            left.extend(self.descriptors.grown(plugin)?);
            Ok(left.join(", "))
        };
        let begun = std::time::Instant::now();
        while let left = left()?
            && !left.is_empty()
        {
            ensure!(begun.elapsed() < SETTLING, "left behind: {left}");
            sleep(Duration::from_millis(20)).await;
        }
        agent.violations().check()
    }
}

impl Slot {
    /// What StartTask gets, with an id that is new unless the task is to be started `again`.
    fn prepare(&mut self, key: &str, kind: Kind, again: bool) -> Result<(TaskConfig, Ends)> {
        let mut config = with_script(self.place.task(""), &kind.script(key));
        if again {
            config.id = self.id.clone();
        }
        if kind == Kind::Stranger {
            config.user = "nobody-of-this-host".into();
        }
        self.id = config.id.clone();
        Ok((config, Ends::new(self.place.local()?, key)?))
    }

    async fn start(&mut self, calls: &Calls, key: &str, kind: Kind, again: bool) -> Result<()> {
        let (config, ends) = self.prepare(key, kind, again || self.task.is_some())?;
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

    async fn start_twice(&mut self, calls: &Calls, key: &str, kind: Kind) -> Result<()> {
        if self.is_known() || kind == Kind::Stranger {
            return self.start(calls, key, kind, true).await;
        }
        let again = self.task.is_some();
        let (config, ends) = self.prepare(key, kind, again)?;
        let (handle, other) = match tokio::join!(calls.start(config.clone()), calls.start(config)) {
            (Ok(handle), other) => (handle, other),
            (other, Ok(handle)) => (handle, other),
            (one, other) => bail!("both starts failed: {one:?}, {other:?}"),
        };
        refused(other, &already_started(&self.id))?;
        self.started(calls, kind, handle, ends).await
    }

    async fn started(
        &mut self,
        calls: &Calls,
        kind: Kind,
        handle: TaskHandle,
        ends: Ends,
    ) -> Result<()> {
        if kind.says_when_it_is_up() {
            until("the task is up", || ends.up.exists().then_some(())).await?;
        }
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

    fn running(&mut self) -> Option<&mut Task> {
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
            let end = match task.life.is_ours {
                true => End::KILLED,
                false => End::UNKNOWN,
            };
            task.ended(calls, &[end], false).await?;
        }
        Ok(())
    }

    async fn stop(&mut self, calls: &Calls, name: &str, patience: Patience) -> Result<()> {
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

    async fn destroy(&mut self, calls: &Calls, force: bool) -> Result<()> {
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

    async fn together(&mut self, calls: &Calls, one: Call, other: Call) -> Result<()> {
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

    fn wait(&mut self, calls: &Calls, waiters: u8) {
        let Some(task) = self.running() else { return };
        for _ in 0..waiters {
            let (calls, id) = (calls.clone(), task.config.id.clone());
            let waiter = tokio::spawn(async move { calls.wait(&id).await });
            task.waiters.push(waiter);
        }
    }

    /// Sees a task end whose time has come.
    async fn settle(&mut self, calls: &Calls) -> Result<()> {
        if let Some(task) = &mut self.task
            && let Some(due) = task.life.due()
        {
            task.ended(calls, &due, true).await?;
        }
        Ok(())
    }

    /// Compares what there is with what must be.
    async fn look(&self, calls: &Calls) -> Result<()> {
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
                    (begun.seconds, begun.nanos) <= (ended.seconds, ended.nanos)
                        || matches!(task.life.kind, Kind::EndsAtOnce(_)),
                    "{begun:?}, {ended:?}"
                );
            }
            State::Lost => {}
        }
        Ok(())
    }
}

impl Task {
    fn handle(&self, handles: Handles) -> TaskHandle {
        let mut handle = TaskHandle {
            state: TaskState::Running.into(),
            ..self.handle.clone()
        };
        if let (Some(config), Handles::Stored) = (&mut handle.config, handles) {
            config.msgpack_driver_config.clear();
        }
        handle
    }

    fn is_empty(&self) -> bool {
        self.scope
            .processes()
            .map_or(true, |found| found.is_empty())
    }

    /// From outside. The end of a supervisor is the caller's to judge.
    fn strike(&mut self, blow: Blow) -> Result<()> {
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
                crate::nomad::said("systemctl", &["stop", &self.scope.unit])?;
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
            let answer = timeout(SETTLING, waiter)
                .await
                .context("a WaitTask hangs")?;
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

    fn remove(&self) {
        for file in [&self.fifo, &self.up] {
            let _ = fs::remove_file(file);
        }
    }
}

async fn call_once(calls: &Calls, id: &str, call: Call) -> Result<(), Status> {
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
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, words: &str) -> Result<()> {
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
fn expect_lost(status: &Status) -> Result<()> {
    let is_lost = std::error::Error::source(status).is_some();
    ensure!(is_lost, "refused, before the plugin was killed: {status:?}");
    Ok(())
}
