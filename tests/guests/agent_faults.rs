//! What goes wrong, through a real Nomad agent: the state of a task as Nomad shows it is what happened.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::real::{RealAgent, RealConfig};
use nomad_driver_exec2::plan::steps::Step;

use crate::agent::{agent, logged, messages, scope_of, to_end};
use crate::case;
use crate::nomad::{Job, proc_file, said, status, until};
use crate::steps::Breakpoints;

pub const CASES: &[Case] = &[
    case!(Limits, Agent, a_real_agent_tells_why_a_task_ended),
    case!(
        Limits,
        Agent,
        a_real_agents_task_outlasts_plugin_bus_and_systemd
    ),
    case!(
        Limits,
        Agent,
        a_real_agents_start_survives_the_plugins_death
    ),
];

/// Bodies of the script and words of the events.
fn a_real_agent_tells_why_a_task_ended(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("exec tail /dev/zero").resources("cpu = 1000\n memory = 32");
        let (id, state) = to_end(&agent, &job.text()).await?;
        let told = messages(&agent, &id, "t").await?;
        context.note(told.join("\n"));
        let has = |told: &[String], words: &[&str]| {
            told.iter()
                .any(|line| words.iter().all(|word| line.contains(word)))
        };
        ensure!(state == "failed", "{told:?}");
        ensure!(
            has(
                &told,
                &[
                    "Driver: The kernel's OOM killer ended process",
                    "(tail) of exec2-t-",
                    "memory limit of 32 MiB"
                ]
            ),
            "{told:?}"
        );
        ensure!(
            has(&told, &["Terminated: Exit Code: 137, Signal: 9"]),
            "{told:?}"
        );
        let events = agent.events(&id, "t").await?;
        let killed = ("oom_killed".to_owned(), "true".to_owned());
        ensure!(
            events.iter().any(|event| event.details.contains(&killed)),
            "{events:?}"
        );

        for (how, words) in [
            (
                ["stop", ""],
                ["Driver: exec2-t-", "was stopped from outside of Nomad"],
            ),
            (
                ["kill", "--signal=SIGKILL"],
                ["Driver: exec2-t-", "was killed from outside of Nomad"],
            ),
        ] {
            // An unchanged job that has failed is not run again.
            let text = Job::command("sleep", &["600"]).text();
            let text = text.replace("job \"case\"", &format!("job \"{}\"", how[0]));
            let ids = agent.run(&text).await?;
            let id = ids.first().context("no allocation")?;
            agent.wait_for(id, &["running"]).await?;
            let unit = scope_of(id, "t")?.unit;
            let [verb, option] = how;
            let command: Vec<&str> = [verb, option, &unit]
                .into_iter()
                .filter(|word| !word.is_empty())
                .collect();
            said("systemctl", &command)?;
            ensure!(agent.wait_for(id, &["complete", "failed"]).await? == "failed");
            let told = messages(&agent, id, "t").await?;
            ensure!(has(&told, &words), "{how:?}: {told:?}");
        }
        agent.collect().await?;
        agent.finish().await
    })
}

fn a_real_agents_task_outlasts_plugin_bus_and_systemd(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let script =
            "trap 'echo hup' HUP; trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done";
        let job = Job::shell(script).task("kill_signal = \"SIGTERM\"");
        let ids = agent.run(&job.text()).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        logged(&agent, id, 1).await?;
        let scope = scope_of(id, "t")?;
        let main = scope.main()?;
        let mut lines = 1;
        for fault in ["the plugin", "dbus", "systemd"] {
            match fault {
                "the plugin" => {
                    let plugin = plugin_of(&agent)?;
                    said("kill", &["-KILL", &plugin.to_string()])?;
                    until("Nomad starts another plugin", || {
                        plugin_of(&agent).ok().filter(|other| *other != plugin)
                    })
                    .await?;
                }
                "dbus" => drop(said("systemctl", &["restart", "dbus"])?),
                _ => drop(said("systemctl", &["daemon-reexec"])?),
            }
            ensure!(scope.main()? == main, "after the end of {fault}");
            // Nomad needs a moment to find its tasks again.
            lines += 1;
            let heard = async {
                loop {
                    if agent.signal(id, "t", "SIGHUP").await.is_ok() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), heard)
                .await
                .context(fault)?;
            logged(&agent, id, lines).await?;
        }
        let told = messages(&agent, id, "t").await?;
        ensure!(
            !told.iter().any(|line| line.starts_with("Terminated")),
            "{told:?}"
        );
        agent.stop("case").await?;
        let told = messages(&agent, id, "t").await?;
        ensure!(
            told.iter().any(|line| line == "Terminated: Exit Code: 5"),
            "{told:?}"
        );
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        agent.collect().await?;
        agent.finish().await
    })
}

/// Nomad starts the plugin again, and the task with it: once.
fn a_real_agents_start_survives_the_plugins_death(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let config = RealConfig {
            env: breakpoints.config.env.clone(),
            total_compute_mhz: Some(2_000),
            ..RealConfig::new(context.agent(), context.driver())
        };
        let mut agent = RealAgent::start(config).await?;
        for step in [Step::Spawn, Step::Rules, Step::Commit] {
            // Without a plugin the node has no such driver for a moment.
            breakpoints.all(agent.ready("Healthy")).await?;
            let name = format!("{step:?}").to_lowercase();
            let text = Job::command("sleep", &["600"]).text();
            let text = text.replace("job \"case\"", &format!("job {name:?}"));
            // A log collector that has had a writer ends with it; the next one comes with a restart.
            let text = text.replace(
                "attempts = 0\n mode",
                "attempts = 2\n delay = \"1s\"\n mode",
            );
            let ids = agent.run(&text).await?;
            let id = ids.first().context("no allocation")?;
            let reached = breakpoints.until(step).await?;
            let plugin = plugin_of(&agent)?;
            said("kill", &["-KILL", &plugin.to_string()])?;
            until("the plugin is gone", || {
                (status(plugin, "State").map_or(true, |state| state.starts_with('Z'))).then_some(())
            })
            .await?;
            reached.go_on();
            let (state, _) = breakpoints
                .all(agent.wait_for(id, &["running", "failed"]))
                .await?;
            let told = messages(&agent, id, "t").await?;
            ensure!(state == "running", "{step:?}: {told:?}");
            let units = said(
                "systemctl",
                &[
                    "list-units",
                    "--plain",
                    "--no-legend",
                    &format!("exec2-t-{}-*", &id[..8]),
                ],
            )?;
            ensure!(units.lines().count() == 1, "{step:?}: {units}");
            let scope = scope_of(id, "t")?;
            ensure!(
                scope.processes()?.len() == 2,
                "{step:?}: {:?}",
                scope.processes()?
            );
            context.note(format!("{step:?}: {}", told.join("; ")));
            breakpoints.all(agent.stop(&name)).await?;
            let is_gone = || scope.expect_gone().ok();
            breakpoints.all(until("the scope is gone", is_gone)).await?;
        }
        breakpoints.all(agent.collect()).await?;
        breakpoints.all(agent.finish()).await?;
        let records = fs::read_dir("/run/nomad-driver-exec2/records")?.count();
        ensure!(records == 0, "{records} records are left");
        Ok(())
    })
}

/// The process of our plugin that serves this agent: it is no helper, and its parent is no supervisor.
fn plugin_of(agent: &RealAgent) -> Result<u32> {
    let path: PathBuf = agent.data_dir().join("plugins/nomad-driver-exec2");
    let path = path.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = proc_file(pid, "cmdline").unwrap_or_default();
        if line.split('\0').next() == Some(path.as_str()) {
            found.push(pid);
        }
    }
    ensure!(found.len() == 1, "{found:?} are the plugin");
    Ok(found[0])
}
