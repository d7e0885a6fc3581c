//! A reboot of the host: tasks end with it, and nobody takes what comes after for what was before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::proto::driver::{DestroyTaskRequest, RecoverTaskRequest, TaskHandle};
use harness::nomad::real::{RealAgent, RealConfig};
use prost::Message as _;

use crate::case;
use crate::faults::nothing_left;
use crate::nomad::{Job, Scope, agent, to_end, until};

pub const CASES: &[Case] = &[
    case!(
        Limits,
        Ours,
        a_task_of_another_boot_is_refused,
        and_nothing_of_it_is_left
    ),
    case!(
        Limits,
        Agent,
        a_real_agents_job_runs_again_after_a_reboot,
        and_runs_once
    ),
];

/// What the half after a reboot has to know.
const KEPT: &str = "/var/lib/kept-for-after-the-reboot";

fn keep(name: &str, content: impl AsRef<[u8]>) -> Result<()> {
    fs::create_dir_all(KEPT)?;
    Ok(fs::write(Path::new(KEPT).join(name), content)?)
}

fn kept(name: &str) -> Result<Vec<u8>> {
    Ok(fs::read(Path::new(KEPT).join(name))?)
}

fn a_task_of_another_boot_is_refused(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        ensure!(Scope::of(task)?.processes()?.len() == 2);
        keep("handle", task.handle().context("a handle")?.encode_to_vec())?;
        keep("data", agent.data_dir().to_string_lossy().as_bytes())?;
        // Nobody tidies up before a reboot.
        std::process::exit(0)
    })
}

fn and_nothing_of_it_is_left(context: &Context) -> Result<()> {
    let handle = TaskHandle::decode(&*kept("handle")?)?;
    let data = PathBuf::from(String::from_utf8(kept("data")?)?);
    fs::remove_dir_all(data)?;
    fs::remove_dir_all(KEPT)?;
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let id = handle.config.as_ref().context("a config")?.id.clone();
        let mut driver = agent.connection()?.driver();
        let request = RecoverTaskRequest {
            task_id: String::new(),
            handle: Some(handle),
        };
        let error = driver.recover_task(request).await.err();
        let error = error.context("it was recovered")?;
        let sentence = "the host was rebooted, and the task ended with it";
        ensure!(error.message().ends_with(sentence), "{error}");
        let request = DestroyTaskRequest {
            task_id: id.clone(),
            force: true,
        };
        driver.destroy_task(request).await?;
        Scope::of_id(&id)?.expect_gone()?;
        nothing_left(&ground).await?;

        let ended = to_end(&agent, &Job::shell("exit 4")).await?;
        ensure!(ended.exit.code == 4, "{ended:?}");
        nothing_left(&ground).await?;
        agent.finish().await
    })
}

fn config(context: &Context) -> RealConfig {
    RealConfig {
        plugin_config: "unveil_by_task = true".into(),
        total_compute_mhz: Some(2_000),
        ..RealConfig::new(context.agent(), context.driver())
    }
}

fn a_real_agents_job_runs_again_after_a_reboot(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = RealAgent::start(config(context)).await?;
        fs::create_dir_all(KEPT)?;
        let script = format!("cat /proc/sys/kernel/random/boot_id >>{KEPT}/boots; exec sleep 600");
        let job = Job::shell(&script)
            .user("root")
            .unveil(&[&format!("rwc:{KEPT}"), "r:/proc/sys/kernel/random"])
            .text()
            .replace("\"batch\"", "\"service\"")
            .replace(
                "attempts = 0\n unlimited = false",
                "delay = \"5s\"\n delay_function = \"constant\"\n unlimited = true",
            );
        let ids = agent.run(&job).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        until("it runs", || (boots().len() == 1).then_some(())).await?;
        keep("alloc", id)?;
        keep("data", agent.leave().to_string_lossy().as_bytes())
    })
}

fn and_runs_once(context: &Context) -> Result<()> {
    let data = PathBuf::from(String::from_utf8(kept("data")?)?);
    let id = String::from_utf8(kept("alloc")?)?;
    context.block_on(async {
        let agent = RealAgent::take_up(config(context), data).await?;
        until("it runs again", || (boots().len() == 2).then_some(())).await?;
        let told: Vec<String> = agent
            .events(&id, "t")
            .await?
            .into_iter()
            .map(|event| format!("{}: {}", event.kind, event.message))
            .collect();
        context.note(told.join("\n"));
        ensure!(told.iter().any(|line| line.contains("reboot")), "{told:?}");
        let ids = agent.allocations_of("case").await?;
        ensure!(ids.len() == 2, "{ids:?}");
        let other = ids
            .iter()
            .find(|other| **other != id)
            .context("another allocation")?;
        agent.wait_for(other, &["running"]).await?;
        // Not a second time.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let boots = boots();
        let this = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        ensure!(
            boots.len() == 2 && boots[0] != boots[1] && boots[1] == this.trim(),
            "{boots:?}"
        );
        agent.stop("case").await?;
        agent.collect().await?;
        fs::remove_dir_all(KEPT)?;
        agent.finish().await
    })
}

/// The boots that the job ran in.
fn boots() -> Vec<String> {
    let text = fs::read_to_string(Path::new(KEPT).join("boots")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}
