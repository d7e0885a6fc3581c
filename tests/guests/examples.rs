//! The example jobs, run as they stand and looked at from outside.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Config};

use crate::case;
use crate::nomad::{Job, Scope, agent, said, status, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_host_volume_keeps_what_a_task_writes),
    case!(Speed, Ours, a_sidecar_reads_what_its_neighbour_writes),
    case!(
        Speed,
        Ours,
        a_prestart_task_ends_well_before_the_main_one_starts
    ),
    case!(Speed, Ours, a_secret_is_in_memory_and_nobody_elses),
    case!(Limits, Ours, a_core_is_its_tasks_alone),
    case!(Limits, Ours, a_task_may_have_more_than_is_kept_for_it),
    case!(
        Speed,
        Ours,
        a_bridged_server_answers_in_its_own_network_alone
    ),
];

pub const VOLUMES: &str = include_str!("../nomad/volumes.nomad.hcl");
pub const CORES: &str = include_str!("../nomad/cores.nomad.hcl");
pub const SIDECAR: &str = include_str!("../nomad/sidecar.nomad.hcl");
pub const SECRET: &str = include_str!("../nomad/secret.nomad.hcl");
pub const OVERSUBSCRIPTION: &str = include_str!("../nomad/oversubscription.nomad.hcl");
pub const BRIDGE: &str = include_str!("../nomad/bridge.nomad.hcl");

async fn printed_by(agent: &Agent, job: &str) -> Result<String> {
    let alloc = agent.run(job).await?;
    let task = alloc.only_task()?;
    let exit = task.wait().await?;
    alloc.stop().await?;
    ensure!(exit.success(), "{exit:?}: {}", alloc.stderr(task.name())?);
    alloc.stdout(task.name())
}

fn a_host_volume_keeps_what_a_task_writes(context: &Context) -> Result<()> {
    let data = Path::new("/srv/data");
    fs::create_dir_all(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o777))?;
    let done = context.block_on(async {
        let config = Config {
            host_volumes: vec![("data".into(), data.into())],
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        ensure!(printed_by(&agent, VOLUMES).await? == "1\n");
        // Another allocation finds what was there.
        ensure!(printed_by(&agent, VOLUMES).await? == "2\n");
        ensure!(fs::read_to_string(data.join("runs"))? == "run\nrun\n");
        ensure!(!Path::new("/data").exists());
        agent.finish().await
    });
    fs::remove_dir_all(data)?;
    done
}

fn a_sidecar_reads_what_its_neighbour_writes(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(SIDECAR).await?;
        until("the sidecar reads it", || {
            (alloc.stdout("reader").ok()? == "hello\n").then_some(())
        })
        .await?;
        // Each in a scope of its own, and seen by the other as no process.
        let scopes = [alloc.task("web")?, alloc.task("reader")?].map(Scope::of);
        let [web, reader] = scopes;
        ensure!(web?.unit != reader?.unit);
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_prestart_task_ends_well_before_the_main_one_starts(context: &Context) -> Result<()> {
    let with_prestart = |script: &str| {
        let job = Job::shell("cat alloc/data/ready").text();
        let task = format!(
            "task \"init\" {{\n driver = \"exec2\"\n lifecycle {{\n hook = \"prestart\"\n }}\n \
             config {{\n command = \"sh\"\n args = [\"-c\", \"{script}\"]\n }}\n }}\n task \"t\""
        );
        job.replacen("task \"t\"", &task, 1)
    };
    context.block_on(async {
        let agent = agent(context).await?;
        let job = with_prestart("sleep 0.2; echo ready >alloc/data/ready");
        let alloc = agent.run(&job).await?;
        ensure!(
            alloc
                .task("init")?
                .exit()
                .is_some_and(|exit| exit.success())
        );
        let exit = alloc.task("t")?.wait().await?;
        ensure!(
            exit.success() && alloc.stdout("t")? == "ready\n",
            "{exit:?}"
        );
        alloc.stop().await?;
        let refused = agent.run(&with_prestart("exit 3")).await.err();
        let refused = refused.context("the main task started")?.to_string();
        ensure!(refused.starts_with("prestart task init: "), "{refused}");
        agent.finish().await
    })
}

fn a_secret_is_in_memory_and_nobody_elses(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(SECRET).await?;
        let task = alloc.only_task()?;
        let exit = task.wait().await?;
        ensure!(exit.success(), "{exit:?}");
        let printed = alloc.stdout("reader")?;
        ensure!(printed == "tmpfs\n28\n", "{printed}");

        let file = task.paths().secrets.join("token");
        let path = file.to_string_lossy();
        let own = task.user();
        let own = own.strip_prefix("nomad-").context("a dynamic user")?;
        let seen = read_as(own, &path)?;
        ensure!(seen.stdout.len() == 28, "its own user: {seen:?}");
        let seen = read_as("65534", &path)?;
        let told = String::from_utf8_lossy(&seen.stderr);
        ensure!(
            seen.stdout.is_empty() && told.contains("Permission denied"),
            "another user: {seen:?}"
        );
        alloc.stop().await?;
        ensure!(!file.exists(), "{path} is left");
        agent.finish().await
    })
}

/// A process of the host that has this user and nothing else.
fn read_as(uid: &str, path: &str) -> Result<Output> {
    let ids = [format!("--reuid={uid}"), format!("--regid={uid}")];
    let mut command = Command::new("setpriv");
    command
        .args(ids)
        .args(["--clear-groups", "cat", path])
        .env("LC_ALL", "C");
    Ok(command.output()?)
}

fn a_core_is_its_tasks_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let other = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let alloc = agent.run(CORES).await?;
        let mut scope = Scope::of(alloc.only_task()?)?;
        scope.dir = Path::new("/sys/fs/cgroup/exec2.slice/exec2-reserve.slice").join(&scope.unit);
        let own = status(scope.main()?, "Cpus_allowed_list")?;
        until("the task tells its CPU", || {
            (alloc.stdout("pinned").ok()? == format!("CPU {own}, 1 of them\n")).then_some(())
        })
        .await?;
        let rest = if own == "0" { "1" } else { "0" };
        let other = Scope::of(other.only_task()?)?;
        until("the other task is off that CPU", || {
            (status(other.main().ok()?, "Cpus_allowed_list").ok()? == rest).then_some(())
        })
        .await?;
        agent.finish().await
    })
}

fn a_task_may_have_more_than_is_kept_for_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let printed = printed_by(&agent, OVERSUBSCRIPTION).await?;
        ensure!(
            printed == format!("{}\n{}\n", 32 << 20, 64 << 20),
            "{printed}"
        );
        agent.finish().await
    })
}

fn a_bridged_server_answers_in_its_own_network_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(BRIDGE).await?;
        until("the server answers", || {
            get(alloc.id())?
                .contains("hello from the bridge")
                .then_some(())
        })
        .await?;
        ensure!(
            std::net::TcpStream::connect("127.0.0.1:8006").is_err(),
            "the host is reached"
        );
        let main = Scope::of(alloc.only_task()?)?.main()?;
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
        ensure!(of(&main.to_string())? != of("1")?);
        let own = said("ip", &["netns", "identify", &main.to_string()])?;
        ensure!(own.trim() == alloc.id(), "{own}");
        alloc.stop().await?;
        agent.finish().await.context("the end")
    })
}

/// As any client of the allocation's network.
pub fn get(alloc_id: &str) -> Option<String> {
    let script = "use IO::Socket::INET; my $s = IO::Socket::INET->new('127.0.0.1:8006') or exit 1; print $s \"GET / HTTP/1.0\\r\\n\\r\\n\"; print <$s>";
    let mut command = Command::new("ip");
    command.args(["netns", "exec", alloc_id, "perl", "-e", script]);
    let output = command.output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}
