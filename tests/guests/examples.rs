//! The example jobs, run as they stand and looked at from outside.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Config};

use crate::case;
use crate::nomad::{Scope, agent, said, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_host_volume_keeps_what_a_task_writes),
    case!(Speed, Ours, a_sidecar_reads_what_its_neighbour_writes),
    case!(Speed, Ours, a_secret_is_in_memory_and_nobody_elses),
    case!(Limits, Ours, a_task_may_have_more_than_is_kept_for_it),
    case!(
        Speed,
        Ours,
        a_bridged_server_answers_in_its_own_network_alone
    ),
];

const VOLUMES: &str = include_str!("../nomad/volumes.nomad.hcl");
const SIDECAR: &str = include_str!("../nomad/sidecar.nomad.hcl");
const SECRET: &str = include_str!("../nomad/secret.nomad.hcl");
const OVERSUBSCRIPTION: &str = include_str!("../nomad/oversubscription.nomad.hcl");
const BRIDGE: &str = include_str!("../nomad/bridge.nomad.hcl");

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
        // The next run is another user's, and finds what was there.
        fs::set_permissions(data.join("runs"), fs::Permissions::from_mode(0o666))?;
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

fn a_secret_is_in_memory_and_nobody_elses(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let printed = printed_by(&agent, SECRET).await?;
        ensure!(printed == "tmpfs\n28\n", "{printed}");
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
