//! A reserved CPU is its task's alone: what the kernel lets each task run on, as reservations come and go.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Config, Task};

use crate::case;
use crate::nomad::{Job, Scope, agent, agent_with, said, status, until};

pub const CASES: &[Case] = &[
    case!(Kernel, Ours, a_reserved_cpu_is_its_tasks_alone),
    case!(
        Limits,
        Ours,
        reservations_are_followed_through_restarts_and_reloads,
        Minutes
    ),
    case!(
        Limits,
        Ours,
        a_bus_that_is_away_delays_a_change_of_cpus_only
    ),
    case!(Limits, Ours, nomads_cgroups_may_come_after_the_plugin),
    case!(Limits, Ours, an_operators_cpus_win_and_are_told),
    case!(Limits, Ours, cores_that_the_operator_keeps_are_nobodys),
    case!(Limits, Ours, many_tasks_leave_a_reserved_cpu_soon),
    case!(Speed, Ours, cores_without_a_controller_are_told),
];

/// A guest has two CPUs.
const ALL: &str = "0-1";
const NOMAD_SHARE: &str = "/sys/fs/cgroup/nomad.slice/share.slice/cpuset.cpus";

fn sleeper() -> Job {
    Job::command("sleep", &["600"])
}

fn with_cores() -> Job {
    sleeper().resources("cores = 1\n memory = 64")
}

/// What the kernel lets a task's command run on.
fn cpus(task: &Task) -> Result<String> {
    cpus_in(&Scope::of(task)?)
}

fn cpus_in(scope: &Scope) -> Result<String> {
    status(scope.main()?, "Cpus_allowed_list")
}

fn reserved(task: &Task) -> Result<Scope> {
    let unit = Scope::of(task)?.unit;
    let dir = Path::new("/sys/fs/cgroup/exec2.slice/exec2-reserve.slice").join(&unit);
    Ok(Scope { unit, dir })
}

async fn comes_to(task: &Task, wanted: &str) -> Result<()> {
    until(&format!("{} has CPUs {wanted}", task.id()), || {
        (cpus(task).ok()? == wanted).then_some(())
    })
    .await
}

/// What systemd keeps on disk of units of ours.
fn kept_by_systemd() -> Result<Vec<String>> {
    let found = said(
        "find",
        &["/run/systemd", "/etc/systemd", "-name", "*exec2*"],
    )?;
    Ok(found.lines().map(str::to_owned).collect())
}

fn a_reserved_cpu_is_its_tasks_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let before = agent.run(&sleeper().text()).await?;
        ensure!(cpus(before.only_task()?)? == ALL);
        let shown = Scope::of(before.only_task()?)?.show(&["AllowedCPUs"])?;
        ensure!(shown["AllowedCPUs"].is_empty(), "{shown:?}");

        let owner = agent.run(&with_cores().text()).await?;
        let scope = reserved(owner.only_task()?)?;
        let own = cpus_in(&scope)?;
        let other = if own == "0" { "1" } else { "0" };
        ensure!(["0", "1"].contains(&own.as_str()), "{own}");
        // One whole CPU, in every file that says so.
        ensure!(scope.file("cpuset.cpus")? == own && scope.file("cpuset.cpus.effective")? == own);
        ensure!(
            scope.file("cpu.max")? == "100000 100000",
            "{}",
            scope.file("cpu.max")?
        );
        let shown = scope.show(&["AllowedCPUs", "Slice"])?;
        ensure!(
            shown["AllowedCPUs"] == own && shown["Slice"] == "exec2-reserve.slice",
            "{shown:?}"
        );

        comes_to(before.only_task()?, other).await?;
        let after = agent.run(&sleeper().text()).await?;
        // Not in a while: before its command ran.
        ensure!(cpus(after.only_task()?)? == other);
        let first = agent
            .run(
                &Job::shell("grep Cpus_allowed_list /proc/self/status")
                    .unveil(&["r:/proc"])
                    .text(),
            )
            .await?;
        first.only_task()?.wait().await?;
        first.stop().await?;
        ensure!(
            first.stdout("t")?.split_whitespace().last() == Some(other),
            "{}",
            first.stdout("t")?
        );

        owner.stop().await?;
        comes_to(before.only_task()?, ALL).await?;
        comes_to(after.only_task()?, ALL).await?;
        let warnings: Vec<_> = events(&agent)?
            .into_iter()
            .filter(|message| message.contains("cpuset"))
            .collect();
        ensure!(warnings.is_empty(), "{warnings:?}");
        before.stop().await?;
        after.stop().await?;
        let kept = kept_by_systemd()?;
        ensure!(kept.is_empty(), "{kept:?}");
        agent.finish().await
    })
}

fn events(agent: &Agent) -> Result<Vec<String>> {
    let events = agent.connection()?.events();
    Ok(events.into_iter().map(|event| event.message).collect())
}

fn reservations_are_followed_through_restarts_and_reloads(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let shared = agent.run(&sleeper().text()).await?;
        let task = shared.only_task()?;
        let owner = agent.run(&with_cores().text()).await?;
        let own = cpus_in(&reserved(owner.only_task()?)?)?;
        let other = if own == "0" { "1" } else { "0" };
        comes_to(task, other).await?;

        said("systemctl", &["daemon-reload"])?;
        ensure!(cpus(task)? == other, "a reload undid it");
        ensure!(cpus_in(&reserved(owner.only_task()?)?)? == own);

        for how in ["restart", "kill"] {
            let lost = match how {
                "restart" => agent.restart().await?,
                _ => agent.kill_plugin().await?,
            };
            ensure!(lost.is_empty(), "{how}: {lost:?}");
            ensure!(cpus(task)? == other, "a {how} of the plugin undid it");
        }
        said("systemctl", &["daemon-reload"])?;
        ensure!(cpus(task)? == other);

        // A later plugin goes on to follow, and finds what changed while there was none.
        owner.stop().await?;
        comes_to(task, ALL).await?;
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        fs::write(NOMAD_SHARE, other)?;
        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        comes_to(task, other).await?;
        fs::write(NOMAD_SHARE, ALL)?;
        comes_to(task, ALL).await?;
        said("systemctl", &["daemon-reload"])?;
        ensure!(cpus(task)? == ALL);
        shared.stop().await?;
        agent.finish().await
    })
}

fn a_bus_that_is_away_delays_a_change_of_cpus_only(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let shared = agent.run(&sleeper().text()).await?;
        let task = shared.only_task()?;
        said("systemctl", &["stop", "dbus.socket", "dbus.service"])?;
        fs::write(NOMAD_SHARE, "1")?;
        let warned = until("the delay is told", || {
            let log = agent.log();
            log.iter()
                .any(|line| line.message.contains("trying again"))
                .then_some(())
        })
        .await;
        let seen = cpus(task);
        said("systemctl", &["start", "dbus.socket", "dbus.service"])?;
        warned?;
        ensure!(seen? == ALL);
        comes_to(task, "1").await?;
        fs::write(NOMAD_SHARE, ALL)?;
        comes_to(task, ALL).await?;
        shared.stop().await?;
        agent.finish().await
    })
}

fn nomads_cgroups_may_come_after_the_plugin(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let slice = Path::new("/sys/fs/cgroup/nomad.slice");
        for dir in ["share.slice", "reserve.slice", ""] {
            fs::remove_dir(slice.join(dir)).with_context(|| dir.to_owned())?;
        }
        let job = sleeper().text();
        let shared = agent.run_with(&job, |_| {}).await?;
        let task = shared.only_task()?;
        ensure!(cpus(task)? == ALL);
        ensure!(!slice.exists());

        // In the agent's order.
        let enable = "+cpuset +cpu +io +memory +pids";
        fs::create_dir(slice)?;
        fs::write(slice.join("cgroup.subtree_control"), enable)?;
        for dir in ["share.slice", "reserve.slice"] {
            fs::create_dir(slice.join(dir))?;
            fs::write(slice.join(dir).join("cgroup.subtree_control"), enable)?;
        }
        fs::write(NOMAD_SHARE, "0")?;
        comes_to(task, "0").await?;
        // Empty is what its parent has.
        fs::write(NOMAD_SHARE, "\n")?;
        comes_to(task, ALL).await?;
        shared.stop().await?;
        agent.finish().await
    })
}

fn an_operators_cpus_win_and_are_told(context: &Context) -> Result<()> {
    let drop_ins = Path::new("/run/systemd/system/exec2-share.slice.d");
    fs::create_dir_all(drop_ins)?;
    fs::write(
        drop_ins.join("60-operator.conf"),
        "[Slice]\nAllowedCPUs=0\n",
    )?;
    said("systemctl", &["daemon-reload"])?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let shared = agent.run(&sleeper().text()).await?;
        let task = shared.only_task()?;
        // After a reload, 257 gives it to a slice that is already there with the next change below it only.
        comes_to(task, "0").await?;
        fs::write(NOMAD_SHARE, "1")?;
        let later = agent.run(&sleeper().text()).await?;
        ensure!(cpus(later.only_task()?)? == "0");
        let told = "cpuset.cpus.effective is 0, Nomad gives the task CPUs 1";
        until("the difference is told", || {
            events(&agent)
                .ok()?
                .iter()
                .any(|line| line == told)
                .then_some(())
        })
        .await?;
        fs::write(NOMAD_SHARE, ALL)?;
        ensure!(cpus(task)? == "0");
        shared.stop().await?;
        later.stop().await?;
        agent.finish().await
    });
    fs::remove_dir_all(drop_ins)?;
    said("systemctl", &["daemon-reload"])?;
    said("systemctl", &["stop", "exec2.slice"])?;
    done
}

fn cores_that_the_operator_keeps_are_nobodys(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = Config {
            reserved_cores: vec![0],
            ..Config::default()
        };
        let agent = agent_with(context, config).await?;
        // Without any reservation, and where an earlier one left more in the file.
        for left in ["\n", ALL] {
            fs::write(NOMAD_SHARE, left)?;
            let shared = agent.run(&sleeper().text()).await?;
            ensure!(cpus(shared.only_task()?)? == "1");
            shared.stop().await?;
        }
        agent.finish().await
    })
}

/// One call to systemd for each task; a measure, and a bound that catches a timeout.
fn many_tasks_leave_a_reserved_cpu_soon(context: &Context) -> Result<()> {
    const TASKS: usize = 12;
    context.block_on(async {
        let agent = agent(context).await?;
        let mut allocs = Vec::new();
        for _ in 0..TASKS {
            allocs.push(agent.run(&sleeper().text()).await?);
        }
        let tasks = allocs
            .iter()
            .map(|alloc| Scope::of(alloc.only_task()?)?.main())
            .collect::<Result<BTreeSet<u32>>>()?;
        for wanted in ["1", ALL] {
            let begun = Instant::now();
            fs::write(NOMAD_SHARE, wanted)?;
            until("all have left it", || {
                tasks
                    .iter()
                    .all(|pid| status(*pid, "Cpus_allowed_list").is_ok_and(|now| now == wanted))
                    .then_some(())
            })
            .await?;
            let took = begun.elapsed();
            context.note(format!("{TASKS} tasks have CPUs {wanted} after {took:.0?}"));
            ensure!(took < Duration::from_secs(20), "{took:?}");
        }
        for alloc in allocs {
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn cores_without_a_controller_are_told(context: &Context) -> Result<()> {
    context.block_on(async {
        ensure!(!Path::new("/sys/fs/cgroup/cpuset.cpus.effective").exists());
        let agent = agent(context).await?;
        let owner = agent.run(&with_cores().text()).await?;
        ensure!(reserved(owner.only_task()?)?.main()? > 0);
        let told =
            "cpuset.cpus.effective is not there (no controller), Nomad gives the task CPUs 0";
        until("the difference is told", || {
            events(&agent)
                .ok()?
                .iter()
                .any(|line| line == told)
                .then_some(())
        })
        .await?;
        owner.stop().await?;
        agent.finish().await
    })
}
