//! The plugin and the session's helper are killed at each step into a task: the task goes on, nothing of the session stays,
//! and whoever asked for it is told. The driver, a debug build, waits before each step.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::ExecTaskRequest;
use harness::nomad::{Agent, Allocation, Task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_exec2::plan::session::SessionStep;
use tonic::Status;

use crate::case;
use crate::nomad::{Job, Scope, said, until};
use crate::steps::Breakpoints;

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_session_takes_its_steps_in_their_order),
    case!(
        Speed,
        Ours,
        a_helper_that_dies_in_a_session_leaves_the_task_alone
    ),
    case!(
        Speed,
        Ours,
        a_plugin_that_dies_in_a_session_leaves_the_task_alone
    ),
];

/// What a session runs, and nothing else in the guest.
const COMMAND: &str = "exec sleep 603";

async fn script(agent: &Agent, id: &str, script: &str) -> Result<i32, Status> {
    let request = ExecTaskRequest {
        task_id: id.into(),
        command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        timeout: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
    };
    let connection = agent.connection().expect("a connection");
    let answer = connection.driver().exec_task(request).await?.into_inner();
    Ok(answer.result.expect("Nomad dereferences it").exit_code)
}

/// A task, and an agent whose plugin and helpers wait before each step.
async fn running(context: &Context) -> Result<(Breakpoints, Agent, Allocation)> {
    let mut breakpoints = Breakpoints::new()?;
    let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
    let job = Job::command("sleep", &["600"]).text();
    let (alloc, _) = breakpoints.all(agent.run(&job)).await?;
    Ok((breakpoints, agent, alloc))
}

fn a_session_takes_its_steps_in_their_order(context: &Context) -> Result<()> {
    context.block_on(async {
        let (mut breakpoints, agent, alloc) = running(context).await?;
        let id = alloc.only_task()?.id();
        let session = async { Ok(script(&agent, &id, "exit 3").await?) };
        let (code, mut steps) = breakpoints.all(session).await?;
        ensure!(code == 3, "{code}");
        let all: Vec<String> = SessionStep::ALL
            .iter()
            .map(|(step, _)| format!("{step:?}"))
            .collect();
        // The helper begins to wait while the command runs.
        steps.sort_by_key(|step| all.iter().position(|other| other == step));
        ensure!(steps == all, "{steps:?} is not {all:?}");
        breakpoints.all(alloc.stop()).await?;
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}

/// The plugin lives, and can open the next one.
fn a_helper_that_dies_in_a_session_leaves_the_task_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let (mut breakpoints, agent, alloc) = running(context).await?;
        let task = alloc.only_task()?;
        let before = Survey::of(task)?;
        let (id, plugin) = (task.id(), agent.plugin_pid().await.context("a plugin")?);
        // The first two are the plugin's.
        for (step, _) in &SessionStep::ALL[2..] {
            let told = {
                let session = script(&agent, &id, COMMAND);
                tokio::pin!(session);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    ended = &mut session => bail!("{step:?} was not taken: {ended:?}"),
                };
                kill(Pid::from_raw(helper(plugin)?), Signal::SIGKILL)?;
                reached.go_on();
                breakpoints.all(async { Ok(session.await) }).await?.0
            };
            let told = told.err().with_context(|| format!("{step:?}: no error"))?;
            let sentence = told.message();
            ensure!(sentence.contains("helper"), "{step:?}: {sentence}");
            let after = format!("the helper's death at {step:?}");
            breakpoints.all(before.expect(task, &after)).await?;
            let next = async { Ok(script(&agent, &id, "exit 4").await?) };
            let (code, _) = breakpoints.all(next).await?;
            ensure!(code == 4, "{step:?}: {code}");
            breakpoints.all(before.expect(task, "the next one")).await?;
        }
        breakpoints.all(alloc.stop()).await?;
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}

/// The next one recovers the task, and clears up.
fn a_plugin_that_dies_in_a_session_leaves_the_task_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let (mut breakpoints, agent, alloc) = running(context).await?;
        let task = alloc.only_task()?;
        let before = Survey::of(task)?;
        let id = task.id();
        for (step, _) in SessionStep::ALL {
            {
                let session = script(&agent, &id, COMMAND);
                tokio::pin!(session);
                let reached = tokio::select! {
                    reached = breakpoints.until(step) => reached?,
                    ended = &mut session => bail!("{step:?} was not taken: {ended:?}"),
                };
                let lost = agent.kill_plugin().await?;
                ensure!(lost.is_empty(), "{step:?}: {lost:?}");
                reached.go_on();
                let (told, _) = breakpoints.all(async { Ok(session.await) }).await?;
                ensure!(told.is_err(), "an answer after {step:?}");
            }
            let after = format!("the plugin's death at {step:?}");
            breakpoints.all(before.expect(task, &after)).await?;
            let next = async { Ok(script(&agent, &id, "exit 5").await?) };
            let (code, _) = breakpoints.all(next).await?;
            ensure!(code == 5, "{step:?}: {code}");
            breakpoints.all(before.expect(task, "the next one")).await?;
        }
        breakpoints.all(alloc.stop()).await?;
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}

/// What is there of a task that has no session.
struct Survey {
    scope: Scope,
    processes: Vec<u32>,
}

impl Survey {
    fn of(task: &Task) -> Result<Survey> {
        let scope = Scope::of(task)?;
        let processes = scope.processes()?;
        ensure!(processes.len() == 2, "{processes:?}");
        Ok(Survey { scope, processes })
    }

    /// The task runs as it did, and of the session there is neither process nor cgroup.
    async fn expect(&self, task: &Task, after: &str) -> Result<()> {
        let left = || -> Result<Vec<String>> {
            let mut left = Vec::new();
            let processes = self.scope.processes()?;
            if processes != self.processes {
                left.push(format!("the scope's processes are {processes:?}"));
            }
            for entry in fs::read_dir(&self.scope.dir)?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("exec-") {
                    left.push(name);
                }
            }
            if let Ok(found) = said("pgrep", &["-fx", "sleep 603"]) {
                left.push(format!("the command: {found}"));
            }
            for pid in named("exec2-session")? {
                left.push(format!("helper {pid}"));
            }
            Ok(left)
        };
        until(after, || left().ok()?.is_empty().then_some(()))
            .await
            .with_context(|| format!("after {after}: {:?}", left()))?;
        ensure!(task.exit().is_none(), "after {after}: the task ended");
        Ok(())
    }
}

/// Processes of a name, the dead ones among them.
fn named(name: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            let pid: Option<i32> = entry.file_name().to_string_lossy().parse().ok();
            found.extend(pid);
        }
    }
    Ok(found)
}

/// The one that stays outside of the task.
fn helper(plugin: u32) -> Result<i32> {
    let is_child = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("PPid:\t{plugin}\n"))
    };
    let found: Vec<i32> = named("exec2-session")?
        .into_iter()
        .filter(is_child)
        .collect();
    match found.as_slice() {
        [helper] => Ok(*helper),
        other => bail!("{other:?} are the helpers"),
    }
}
