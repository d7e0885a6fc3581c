//! The helper that a plugin keeps ready for its next start: used once, missed by nobody, and gone with the plugin.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case;
use crate::life::join_all;
use crate::nomad::{Job, Scope, agent, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, the_next_start_finds_it_and_leaves_another),
    case!(Speed, Ours, one_that_was_killed_is_not_missed),
    case!(
        Speed,
        Ours,
        one_that_was_killed_is_no_zombie_until_the_next_start
    ),
    case!(Speed, Ours, starts_at_once_leave_one),
    case!(Speed, Ours, it_ends_with_its_plugin),
];

fn sleeping() -> String {
    Job::command("sleep", &["600"]).text()
}

/// The idle helpers of a plugin, dead ones too.
fn idle_helpers(plugin: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let is_child = status.contains(&format!("PPid:\t{plugin}\n"));
        if is_child && status.starts_with("Name:\texec2-idle\n") {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The one helper that waits for a start.
pub async fn ahead(plugin: u32) -> Result<u32> {
    until(
        "a helper is ahead",
        || match idle_helpers(plugin).ok()?[..] {
            [one] => Some(one),
            _ => None,
        },
    )
    .await
}

fn the_next_start_finds_it_and_leaves_another(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        ensure!(idle_helpers(plugin)?.is_empty(), "before any start");
        let mut expected = None;
        for round in 0..5 {
            let alloc = agent.run(&sleeping()).await?;
            let supervisor = Scope::of(alloc.only_task()?)?.supervisor()?;
            if let Some(expected) = expected {
                ensure!(
                    supervisor == expected,
                    "start {round}: {supervisor}, not {expected}"
                );
            }
            let next = ahead(plugin).await?;
            ensure!(next != supervisor);
            expected = Some(next);
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn one_that_was_killed_is_not_missed(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        agent.run(&sleeping()).await?.stop().await?;
        for _ in 0..3 {
            let killed = ahead(plugin).await?;
            kill(Pid::from_raw(killed.cast_signed()), Signal::SIGKILL)?;
            let alloc = agent.run(&sleeping()).await?;
            let supervisor = Scope::of(alloc.only_task()?)?.supervisor()?;
            ensure!(supervisor != killed);
            // The dead one is no zombie any more, or there were two.
            ensure!(ahead(plugin).await? != killed);
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn one_that_was_killed_is_no_zombie_until_the_next_start(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let descriptors = || Some(fs::read_dir(format!("/proc/{plugin}/fd")).ok()?.count());
        let mut with_one = None;
        for _ in 0..3 {
            agent.run(&sleeping()).await?.stop().await?;
            let killed = ahead(plugin).await?;
            with_one = with_one.max(descriptors());
            kill(Pid::from_raw(killed.cast_signed()), Signal::SIGKILL)?;
            until("it is reaped", || {
                idle_helpers(plugin).ok()?.is_empty().then_some(())
            })
            .await?;
            until("nothing is kept of it", || {
                (descriptors() < with_one).then_some(())
            })
            .await?;
        }
        agent.finish().await
    })
}

fn starts_at_once_leave_one(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        for _ in 0..3 {
            let job = sleeping();
            let starts = join_all((0..10).map(|_| agent.run(&job)).collect()).await;
            ahead(plugin).await?;
            for alloc in starts {
                alloc?.stop().await?;
            }
        }
        agent.finish().await
    })
}

fn it_ends_with_its_plugin(context: &Context) -> Result<()> {
    context.block_on(async {
        let ground = Ground::survey()?;
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let alloc = agent.run(&sleeping()).await?;
        let idle = ahead(plugin).await?;
        agent.kill_plugin().await?;
        until("it has ended", || {
            (!Path::new("/proc").join(idle.to_string()).exists()).then_some(())
        })
        .await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        ensure!(idle_helpers(plugin)?.is_empty(), "before its first start");
        alloc.stop().await?;
        agent.run(&sleeping()).await?.stop().await?;
        ahead(plugin).await?;
        agent.finish().await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
