//! The plugin, the helper and the supervisor are killed at each step of a task's start and end. The driver, a debug build,
//! tells each step before it takes it, and waits for an answer.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, fchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::proto::driver::{
    DestroyTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig,
};
use harness::nomad::{Agent, Allocation, Config, RpcError};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use nomad_driver_exec2::plan::steps::Step;
use nomad_driver_exec2::task::StopStep;
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

use crate::case;
use crate::nomad::{Job, Scope, said, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_start_takes_its_steps_in_their_order),
    case!(Speed, Ours, an_end_takes_its_steps_in_their_order),
    case!(Speed, Ours, a_plugin_that_dies_in_a_start_leaves_nothing),
    case!(
        Speed,
        Ours,
        a_start_that_is_tried_again_makes_one_copy_whenever_the_first_died
    ),
    case!(
        Speed,
        Ours,
        a_start_that_is_tried_again_needs_a_collector_that_listens
    ),
    case!(Speed, Ours, a_helper_that_dies_in_a_start_leaves_nothing),
    case!(
        Speed,
        Ours,
        a_start_that_is_refused_gives_the_log_pipes_back
    ),
    case!(Speed, Ours, a_plugin_that_dies_in_a_stop_loses_nothing),
    case!(Speed, Ours, a_plugin_that_dies_in_a_destroy_can_do_it_again),
];

const PATIENCE: Duration = Duration::from_secs(20);

/// Where the driver stops and asks.
pub struct Breakpoints {
    _dir: TempDir,
    pub config: Config,
    reached: UnboundedReceiver<Reached>,
}

/// A step that is about to be taken, by whoever waits at the other end.
pub struct Reached {
    step: String,
    who: UnixStream,
}

impl Reached {
    pub fn go_on(mut self) {
        // Whoever was killed meanwhile does not hear it.
        let _ = self.who.write_all(&[0]);
    }
}

impl Breakpoints {
    pub fn new() -> Result<Breakpoints> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("breakpoints");
        let listener = UnixListener::bind(&socket)?;
        let (sender, reached) = unbounded_channel();
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let sender = sender.clone();
                thread::spawn(move || hear(&connection, &sender));
            }
        });
        let variable = "NOMAD_DRIVER_EXEC2_BREAKPOINTS".to_owned();
        Ok(Breakpoints {
            config: Config {
                env: vec![(variable, socket.display().to_string())],
                ..Config::default()
            },
            _dir: dir,
            reached,
        })
    }

    async fn next(&mut self) -> Result<Reached> {
        let next = timeout(PATIENCE, self.reached.recv()).await;
        next.context("no step for long")?
            .context("the listener ended")
    }

    /// Lets every step pass until this one.
    pub async fn until(&mut self, step: impl std::fmt::Debug) -> Result<Reached> {
        let wanted = format!("{step:?}");
        loop {
            let reached = self
                .next()
                .await
                .with_context(|| format!("until {wanted}"))?;
            if reached.step == wanted {
                return Ok(reached);
            }
            reached.go_on();
        }
    }

    /// Lets everything pass while `work` is done; the steps.
    pub async fn all<T>(
        &mut self,
        work: impl Future<Output = Result<T>>,
    ) -> Result<(T, Vec<String>)> {
        let mut steps = Vec::new();
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok((done?, steps)),
                Some(reached) = self.reached.recv() => {
                    steps.push(reached.step.clone());
                    reached.go_on();
                }
            }
        }
    }
}

fn hear(connection: &UnixStream, sender: &UnboundedSender<Reached>) {
    for line in BufReader::new(connection).lines() {
        let (Ok(step), Ok(who)) = (line, connection.try_clone()) else {
            return;
        };
        if sender.send(Reached { step, who }).is_err() {
            return;
        }
    }
}

/// An allocation whose task runs, and requests to start others beside it that only this test knows of.
struct Stage {
    agent: Agent,
    alloc: Allocation,
    task: TaskConfig,
    fifos: Vec<fs::File>,
    ground: Ground,
    starts: u32,
}

impl Stage {
    async fn new(context: &Context) -> Result<Stage> {
        let agent = Agent::start(context.driver(), Config::default()).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let handle = alloc.only_task()?.handle();
        let mut task = handle
            .and_then(|handle| handle.config)
            .context("a stored configuration")?;
        // Log pipes of its own, with whose reader the test is.
        let mut fifos = Vec::new();
        for path in [&mut task.stdout_path, &mut task.stderr_path] {
            *path = path.replace(".fifo", ".steps.fifo");
            mkfifo(Path::new(path), Mode::from_bits_truncate(0o600))?;
            let mut options = fs::OpenOptions::new();
            fifos.push(options.read(true).write(true).open(path)?);
        }
        Ok(Stage {
            task,
            fifos,
            ground: Ground::survey()?,
            alloc,
            agent,
            starts: 0,
        })
    }

    /// A request that no start has had before.
    fn request(&mut self) -> StartTaskRequest {
        self.starts += 1;
        let mut task = self.task.clone();
        let (alloc, _) = task.id.split_once('/').unwrap_or_default();
        // Another one, so that nobody takes it for a copy of the one that runs.
        task.id = format!("{alloc}/u/{:08x}", self.starts);
        StartTaskRequest { task: Some(task) }
    }

    /// Once committed, they stay the task's user's.
    fn take_log_pipes_back(&self) -> Result<()> {
        for fifo in &self.fifos {
            fchown(fifo, Some(0), Some(0))?;
        }
        Ok(())
    }

    async fn expect_nothing_left(&self, after: &str) -> Result<()> {
        let left = || -> Result<Vec<String>> {
            let mut left: Vec<String> = self
                .ground
                .left()?
                .iter()
                .map(ToString::to_string)
                .collect();
            for fifo in &self.fifos {
                let owner = fifo.metadata()?.uid();
                if owner != 0 {
                    left.push(format!("a log pipe of uid {owner}"));
                }
            }
            Ok(left)
        };
        until(after, || left().ok()?.is_empty().then_some(()))
            .await
            .with_context(|| format!("after {after}: {:?}", left()))
    }

    async fn finish(self) -> Result<()> {
        self.alloc.stop().await?;
        self.agent.finish().await
    }
}

async fn start(agent: &Agent, request: StartTaskRequest) -> Result<()> {
    agent.connection()?.driver().start_task(request).await?;
    Ok(())
}

async fn destroy(agent: &Agent, id: &str) -> Result<()> {
    let request = DestroyTaskRequest {
        task_id: id.into(),
        force: true,
    };
    agent.connection()?.driver().destroy_task(request).await?;
    Ok(())
}

fn id_of(request: &StartTaskRequest) -> String {
    request
        .task
        .as_ref()
        .map(|task| task.id.clone())
        .unwrap_or_default()
}

fn names(steps: impl IntoIterator<Item = impl std::fmt::Debug>) -> Vec<String> {
    steps.into_iter().map(|step| format!("{step:?}")).collect()
}

/// Plugin and helper work at the same time, each in the order of the list.
fn a_start_takes_its_steps_in_their_order(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
        let job = Job::command("sleep", &["600"]).text();
        let (alloc, steps) = breakpoints.all(agent.run(&job)).await?;
        let all = names(Step::ALL.iter().map(|(step, _)| step));
        let plugins = names([Step::Plan, Step::Spawn, Step::Scope, Step::Commit]);
        let by = |is_plugins: bool, steps: &[String]| -> Vec<String> {
            let of = steps
                .iter()
                .filter(|step| plugins.contains(step) == is_plugins);
            of.cloned().collect()
        };
        for is_plugins in [true, false] {
            let (taken, listed) = (by(is_plugins, &steps), by(is_plugins, &all));
            ensure!(taken == listed, "{taken:?} is not {listed:?}");
        }
        breakpoints.all(alloc.stop()).await?;
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}

/// A task that does not hear, in a scope whose slice is frozen: every step is needed.
fn an_end_takes_its_steps_in_their_order(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
        let job = Job::shell("trap '' INT; echo up; while :; do sleep 0.05; done");
        let job = job.task("kill_timeout = \"100ms\"");
        let (alloc, _) = breakpoints.all(agent.run(&job.text())).await?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let slice = "/sys/fs/cgroup/exec2.slice/cgroup.freeze";
        fs::write(slice, "1")?;
        let stopped = breakpoints
            .all(async { alloc.only_task()?.stop().await })
            .await;
        fs::write(slice, "0")?;
        let (exit, mut steps) = stopped?;
        ensure!((exit.code, exit.signal) == (137, 9), "{exit:?}");
        let (_, destroyed) = breakpoints.all(alloc.stop()).await?;
        steps.extend(destroyed);
        // DestroyTask makes sure of what StopTask has done.
        steps.dedup();
        let all = names(StopStep::ALL.iter().map(|(step, _)| step));
        ensure!(steps == all, "{steps:?} is not {all:?}");
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}

/// Nobody tries again: what was begun goes by itself.
fn a_plugin_that_dies_in_a_start_leaves_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut stage = Stage::new(context).await?;
        for (step, _) in Step::ALL {
            let mut breakpoints = Breakpoints::new()?;
            let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
            let request = stage.request();
            {
                let starting = start(&agent, request);
                tokio::pin!(starting);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    started = &mut starting => bail!("{step:?} was not taken: {started:?}"),
                };
                // The next one removes the dead one's socket.
                agent.kill_plugin().await?;
                reached.go_on();
                // What the helper goes on to do, if it does.
                let (answer, _) = breakpoints.all(async { Ok(starting.await) }).await?;
                ensure!(answer.is_err(), "an answer after {step:?}");
            }
            agent.finish().await?;
            breakpoints
                .all(stage.expect_nothing_left(&format!("the plugin's death at {step:?}")))
                .await?;
        }
        stage.finish().await
    })
}

/// At once, by a new plugin and under the same id, as Nomad does it.
fn a_start_that_is_tried_again_makes_one_copy_whenever_the_first_died(
    context: &Context,
) -> Result<()> {
    context.block_on(async {
        let mut stage = Stage::new(context).await?;
        for (step, _) in Step::ALL {
            let mut breakpoints = Breakpoints::new()?;
            let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
            let request = stage.request();
            let id = id_of(&request);
            {
                let starting = start(&agent, request.clone());
                tokio::pin!(starting);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    started = &mut starting => bail!("{step:?} was not taken: {started:?}"),
                };
                agent.kill_plugin().await?;
                reached.go_on();
                ensure!(starting.await.is_err(), "an answer after {step:?}");
            }
            let again = breakpoints.all(start(&agent, request)).await;
            again.with_context(|| format!("after {step:?}"))?;
            let scope = Scope::of_id(&id)?;
            let processes = scope.processes()?;
            ensure!(processes.len() == 2, "{step:?}: {processes:?}");
            let copies = said("pgrep", &["-fx", "sleep 600"])?;
            // One of them is the stage's own.
            ensure!(copies.lines().count() == 2, "{step:?}: {copies}");
            breakpoints.all(destroy(&agent, &id)).await?;
            scope.expect_gone()?;
            breakpoints.all(agent.finish()).await?;
            stage.take_log_pipes_back()?;
            stage.expect_nothing_left(&format!("{step:?}")).await?;
        }
        stage.finish().await
    })
}

/// A log collector of Nomad's ends with the first writer that it has had: a start that died before it opened the pipes is
/// tried again and done, a later one is refused as passing, and the restart policy brings a new collector with the next try.
fn a_start_that_is_tried_again_needs_a_collector_that_listens(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let job = Job::command("sleep", &["600"]).text();
        for (step, is_listening) in [(Step::Spawn, true), (Step::Exec, false)] {
            let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
            let tried_again = {
                let running = agent.run(&job);
                tokio::pin!(running);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    done = &mut running => bail!("{step:?} was not taken: {:?}", done.err()),
                };
                agent.kill_plugin_in_call().await?;
                reached.go_on();
                breakpoints.all(async { Ok(running.await) }).await?.0
            };
            let alloc = match tried_again {
                Ok(alloc) if is_listening => alloc,
                Err(error) if !is_listening => {
                    let told = error.downcast_ref::<RpcError>();
                    let is_passing = told.is_some_and(|told| {
                        told.recoverable && told.message.contains("nobody opened the log pipe")
                    });
                    ensure!(is_passing, "{step:?}: {error:#}");
                    breakpoints.all(agent.run(&job)).await?.0
                }
                other => bail!("{step:?}: {:?}", other.err()),
            };
            let processes = Scope::of(alloc.only_task()?)?.processes()?;
            ensure!(processes.len() == 2, "{step:?}: {processes:?}");
            breakpoints.all(alloc.stop()).await?;
            breakpoints.all(agent.finish()).await?;
        }
        Ok(())
    })
}

/// The plugin lives, says so, and can start the task the next moment.
fn a_helper_that_dies_in_a_start_leaves_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut stage = Stage::new(context).await?;
        let mut breakpoints = Breakpoints::new()?;
        let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
        stage.ground = Ground::survey()?;
        let plugins = names([Step::Plan, Step::Spawn, Step::Scope, Step::Commit]);
        for (step, _) in Step::ALL {
            if plugins.contains(&format!("{step:?}")) {
                continue;
            }
            let request = stage.request();
            let id = id_of(&request);
            let error = {
                let starting = start(&agent, request.clone());
                tokio::pin!(starting);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    started = &mut starting => bail!("{step:?} was not taken: {started:?}"),
                };
                let plugin = agent.plugin_pid().await.context("a plugin")?;
                let helper = helpers(plugin)?;
                ensure!(helper.len() == 1, "{step:?}: {helper:?}");
                kill(Pid::from_raw(helper[0]), Signal::SIGKILL)?;
                reached.go_on();
                breakpoints.all(async { Ok(starting.await) }).await?.0
            };
            let error = error
                .err()
                .with_context(|| format!("{step:?}: it started"))?;
            let status = error.downcast_ref::<tonic::Status>();
            let sentence = status.context("a status")?.message();
            ensure!(sentence.contains("helper"), "{step:?}: {sentence}");
            // Nomad gave the pipe to nobody, and gives it to the same user again.
            stage.take_log_pipes_back()?;
            breakpoints
                .all(stage.expect_nothing_left(&format!("the helper's death at {step:?}")))
                .await?;
            breakpoints.all(start(&agent, request)).await?;
            breakpoints.all(destroy(&agent, &id)).await?;
            stage.take_log_pipes_back()?;
        }
        breakpoints.all(agent.finish()).await?;
        stage.finish().await
    })
}

/// Refused by another owner's scope of that name, when the helper has opened the log pipes long ago.
fn a_start_that_is_refused_gives_the_log_pipes_back(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut stage = Stage::new(context).await?;
        let request = stage.request();
        let scope = Scope::of_id(&id_of(&request))?;
        let mut other = std::process::Command::new("systemd-run")
            .args(["--scope", "--quiet", "--slice=exec2-share.slice"])
            .args([&format!("--unit={}", scope.unit), "sleep", "601"])
            .spawn()?;
        until("the other one's scope is there", || {
            scope.dir.exists().then_some(())
        })
        .await?;
        let owner = "trusted.nomad-driver-exec2.owner";
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&scope.dir, owner, b"node of-another", flags)?;
        let refused = start(&stage.agent, request)
            .await
            .err()
            .context("it started")?;
        let status = refused
            .downcast_ref::<tonic::Status>()
            .context("a status")?;
        ensure!(
            status.message().contains("belongs to node of-another"),
            "{status}"
        );
        ensure!(other.try_wait()?.is_none(), "the other one was touched");
        said("systemctl", &["stop", &scope.unit])?;
        other.wait()?;
        stage.expect_nothing_left("a refused start").await?;
        stage.finish().await
    })
}

/// A new plugin recovers the task, says truly what it is, and stops it.
fn a_plugin_that_dies_in_a_stop_loses_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let ground = Ground::survey()?;
        let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
        for (step, _) in StopStep::ALL.iter().take(6) {
            let is_frozen = *step == StopStep::KillAll;
            let job = Job::shell(
                "trap '' INT; trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done",
            );
            let job = job.task("kill_timeout = \"100ms\"");
            let (alloc, _) = breakpoints.all(agent.run(&job.text())).await?;
            let task = alloc.only_task()?;
            let scope = Scope::of(task)?;
            until("the task is up", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            let slice = "/sys/fs/cgroup/exec2.slice/cgroup.freeze";
            if is_frozen {
                fs::write(slice, "1")?;
            }
            let request = StopTaskRequest {
                task_id: task.id(),
                timeout: None,
                signal: "SIGINT".into(),
            };
            {
                let connection = agent.connection()?;
                let mut driver = connection.driver();
                let stopping = driver.stop_task(request);
                tokio::pin!(stopping);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached,
                    stopped = &mut stopping => bail!("{step:?} was not taken: {stopped:?}"),
                };
                if is_frozen {
                    fs::write(slice, "0")?;
                }
                let reached = reached?;
                let lost = agent.kill_plugin().await?;
                ensure!(lost.is_empty(), "{step:?}: {lost:?}");
                reached.go_on();
            }
            // SIGKILL comes with the fourth step.
            let killed = [StopStep::KillAll, StopStep::Empty].contains(step);
            if !killed {
                ensure!(
                    task.exit().is_none() && scope.main().is_ok(),
                    "{step:?}: {:?}",
                    task.exit()
                );
                task.signal("SIGTERM").await?;
            }
            let (exit, _) = breakpoints.all(task.wait()).await?;
            let expected = if killed { (137, 9) } else { (3, 0) };
            ensure!((exit.code, exit.signal) == expected, "{step:?}: {exit:?}");
            ensure!(!exit.oom_killed, "{exit:?}");
            breakpoints.all(alloc.stop()).await?;
            until("nothing is left", || scope.expect_gone().ok()).await?;
        }
        breakpoints.all(agent.finish()).await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

/// Nomad does not ask twice. What can be left is the record of an end, until somebody asks about that very task.
fn a_plugin_that_dies_in_a_destroy_can_do_it_again(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut stage = Stage::new(context).await?;
        for step in [
            StopStep::Kill,
            StopStep::Empty,
            StopStep::Forget,
            StopStep::Unit,
        ] {
            let mut breakpoints = Breakpoints::new()?;
            let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
            let request = stage.request();
            let id = id_of(&request);
            breakpoints.all(start(&agent, request)).await?;
            {
                let destroying = destroy(&agent, &id);
                tokio::pin!(destroying);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    done = &mut destroying => bail!("{step:?} was not taken: {done:?}"),
                };
                agent.kill_plugin().await?;
                reached.go_on();
                ensure!(destroying.await.is_err(), "{step:?}");
            }
            if step == StopStep::Unit {
                // systemd collects the empty scope by itself.
                until("it is gone", || Scope::of_id(&id).ok()?.expect_gone().ok()).await?;
            }
            breakpoints.all(destroy(&agent, &id)).await?;
            stage.take_log_pipes_back()?;
            breakpoints.all(agent.finish()).await?;
            stage
                .expect_nothing_left(&format!("the plugin's death at {step:?}"))
                .await?;
        }
        stage.finish().await
    })
}

/// The children of a plugin that have something to do.
fn helpers(plugin: u32) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let is_child = status.contains(&format!("PPid:\t{plugin}\n"));
        // One that is ahead of the next start may not have its name yet.
        let is_at_work = ["exec2-launch", "exec2-supervise"]
            .iter()
            .any(|name| status.starts_with(&format!("Name:\t{name}\n")));
        if is_child && is_at_work && !status.contains("State:\tZ") {
            found.push(pid);
        }
    }
    Ok(found)
}
