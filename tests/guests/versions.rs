//! The whole life of jobs under an agent of each version of Nomad that we serve.

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::{Agent, Config, Metrics, PluginBlock, Version};

use crate::case;
use crate::nomad::{Job, Scope, agent_with, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, every_version_runs_a_batch_job_and_a_service),
    case!(Speed, Ours, metrics_are_asked_for_as_the_version_does),
    case!(
        Speed,
        Ours,
        an_agent_without_a_plugin_block_has_the_defaults
    ),
    case!(
        Speed,
        Ours,
        a_dynamic_user_is_found_again_when_a_restarted_agent_forgets_it
    ),
];

const ENV: &str = include_str!("../nomad/env.nomad.hcl");

fn with(version: Version) -> Config {
    Config {
        version,
        ..Config::default()
    }
}

fn every_version_runs_a_batch_job_and_a_service(context: &Context) -> Result<()> {
    context.block_on(async {
        for version in Version::ALL {
            let ground = Ground::survey()?;
            let agent = agent_with(context, with(version)).await?;
            batch(&agent)
                .await
                .with_context(|| format!("{version:?}: batch"))?;
            let agent = service(agent)
                .await
                .with_context(|| format!("{version:?}: service"))?;
            agent
                .finish()
                .await
                .with_context(|| format!("{version:?}"))?;
            let left = ground.left()?;
            ensure!(left.is_empty(), "{version:?}: {left:?}");
        }
        Ok(())
    })
}

async fn batch(agent: &Agent) -> Result<()> {
    let alloc = agent.run(ENV).await?;
    let exit = alloc.only_task()?.wait().await?;
    ensure!(exit.success(), "{exit:?}");
    alloc.stop().await?;
    let log = alloc.stdout("env")?;
    ensure!(log.contains("\nNOMAD_TASK_NAME=env\n"), "{log}");
    Ok(())
}

/// Start, statistics, signal, restart of the agent, crash of the plugin and of the agent, stop, and a start again.
async fn service(agent: Agent) -> Result<Agent> {
    let script = "trap 'echo hup' HUP; trap 'exit 3' INT; echo up; while :; do sleep 0.05; done";
    // Named, because 1.8 panics when it restores a dynamic one.
    let alloc = agent.run(&Job::shell(script).user("nobody").text()).await?;
    let task = alloc.only_task()?;
    let scope = Scope::of(task)?;
    let says =
        async |text: &str| until(text, || (alloc.stdout("t").ok()? == text).then_some(())).await;
    says("up\n").await?;
    until("a sample", || task.stats().first().cloned()).await?;
    task.signal("SIGHUP").await?;
    says("up\nhup\n").await?;
    let main = scope.main()?;

    let lost = agent.restart().await?;
    ensure!(
        lost.is_empty() && scope.main()? == main,
        "restart: {lost:?}"
    );
    let lost = agent.kill_plugin().await?;
    ensure!(lost.is_empty() && scope.main()? == main, "plugin: {lost:?}");
    let (agent, lost) = agent.crash().await.reattach().await?;
    ensure!(lost.is_empty() && scope.main()? == main, "crash: {lost:?}");
    task.signal("SIGHUP").await?;
    says("up\nhup\nhup\n").await?;

    let exit = task.stop().await?;
    ensure!((exit.code, exit.signal) == (3, 0), "{exit:?}");
    scope.expect_gone()?;
    task.restart().await?;
    ensure!(Scope::of(task)?.processes()?.len() >= 2);
    alloc.stop().await?;
    Ok(agent)
}

fn metrics_are_asked_for_as_the_version_does(context: &Context) -> Result<()> {
    context.block_on(async {
        for version in Version::ALL {
            let config = Config {
                metrics: Metrics::Unpublished,
                ..with(version)
            };
            let agent = agent_with(context, config).await?;
            let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
            let task = alloc.only_task()?;
            if version == Version::V1_8 {
                until("a sample", || task.stats().first().cloned()).await?;
            } else {
                tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
                ensure!(task.stats().is_empty(), "{version:?} asked for samples");
            }
            alloc.stop().await?;
            agent.finish().await?;
        }
        Ok(())
    })
}

fn an_agent_without_a_plugin_block_has_the_defaults(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = |version| Config {
            block: PluginBlock::Absent,
            ..with(version)
        };
        let agent = Agent::start(context.driver(), config(Version::V1_8)).await?;
        batch(&agent).await?;
        let refused = agent
            .run(&Job::command("true", &[]).unveil(&["r:/etc"]).text())
            .await;
        ensure!(refused.is_err(), "a task may unveil");
        agent.finish().await?;
        let skipped = Agent::start(context.driver(), config(Version::V1_10)).await;
        ensure!(skipped.is_err_and(|error| error.to_string().contains("loading skipped")));
        Ok(())
    })
}

/// Nomad picks the user once: a restarted agent asks for the task's next start with none at all.
fn a_dynamic_user_is_found_again_when_a_restarted_agent_forgets_it(
    context: &Context,
) -> Result<()> {
    context.block_on(async {
        let agent = agent_with(context, with(Version::V2_0)).await?;
        let alloc = agent
            .run(&Job::shell("id -u; exec sleep 600").text())
            .await?;
        let task = alloc.only_task()?;
        let user = until("the first user", || {
            alloc.stdout("t").ok().filter(|log| !log.is_empty())
        })
        .await?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        task.restart().await?;
        ensure!(task.user().is_empty(), "the client told it");
        until("the same user", || {
            (alloc.stdout("t").ok()? == user.repeat(2)).then_some(())
        })
        .await?;
        alloc.stop().await?;
        agent.finish().await
    })
}
