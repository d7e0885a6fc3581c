//! What the node says of this driver: fit or not, why not, and what jobs can constrain on.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::nomad::proto::driver::FingerprintResponse;
use harness::nomad::proto::driver::fingerprint_response::HealthState;
use harness::nomad::proto::structs::attribute::Value;
use harness::nomad::{Agent, Config};

use crate::case;
use crate::nomad::{Job, Scope, agent, agent_with, printed, refusal, said, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, the_node_tells_what_this_host_offers),
    case!(Speed, Ours, a_plugin_that_is_not_root_says_so),
    case!(Speed, Ours, a_kernel_without_landlock_is_no_host),
    case!(Speed, Ours, a_host_without_a_bus_is_unhealthy),
    case!(Both, Ours, a_lost_bus_is_told_and_so_is_its_return),
];

/// How long a change of the host may take to be told; it is looked for every two seconds while something is wrong.
const TELL: Duration = Duration::from_secs(40);

fn fingerprint(agent: &Agent) -> Result<FingerprintResponse> {
    agent.fingerprint().context("no fingerprint")
}

fn attributes(fingerprint: &FingerprintResponse) -> HashMap<&str, Value> {
    let values = fingerprint.attributes.iter();
    values
        .filter_map(|(name, attribute)| {
            let name = name.strip_prefix("driver.exec2.")?;
            Some((name, attribute.value.clone()?))
        })
        .collect()
}

fn the_node_tells_what_this_host_offers(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let seen = fingerprint(&agent)?;
        match context.guest().kind {
            Kind::Qemu => ensure!(
                seen.health() == HealthState::Healthy && seen.health_description == "Healthy",
                "{seen:?}"
            ),
            // The machine under a container of ours has these controllers on cgroup v1.
            Kind::Nspawn => {
                let offered = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
                let missing: Vec<&str> = ["cpu", "memory", "pids"]
                    .into_iter()
                    .filter(|name| !offered.split_whitespace().any(|word| word == *name))
                    .collect();
                ensure!(seen.health() == HealthState::Unhealthy, "{seen:?}");
                let sentence = format!("cgroup v2 has no {} controller", missing.join(", "));
                ensure!(seen.health_description.starts_with(&sentence), "{seen:?}");
            }
        }
        let told = attributes(&seen);
        ensure!(told["unveil.defaults"] == Value::BoolVal(true), "{told:?}");
        ensure!(told["unveil.tasks"] == Value::BoolVal(true), "{told:?}");
        let systemd = said("systemctl", &["--version"])?;
        let Value::StringVal(version) = &told["systemd.version"] else {
            anyhow::bail!("{told:?}")
        };
        ensure!(
            !version.is_empty() && systemd.contains(&format!("({version})")),
            "{version} is not in {systemd}"
        );
        let abi = said("perl", &["-e", "print syscall 444, 0, 0, 1"])?.parse()?;
        ensure!(told["landlock.abi"] == Value::IntVal(abi), "{told:?}");
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
        let has_cpuset = controllers.split_whitespace().any(|one| one == "cpuset");
        let degraded = [
            (abi == 2, "truncate is not restricted"),
            (
                !has_cpuset,
                "no cpuset controller, so reserved cores are not exclusive",
            ),
        ];
        let degraded: Vec<_> = degraded
            .into_iter()
            .filter_map(|(is_so, what)| is_so.then_some(what))
            .collect();
        ensure!(
            told["degraded"] == Value::StringVal(degraded.join("; ")),
            "{told:?}"
        );
        agent.finish().await
    })
}

/// A plugin that is started through a script.
fn wrapped(context: &Context, how: &str) -> Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir_in("/opt")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let path = dir.path().join("plugin");
    let driver = context.driver();
    fs::write(
        &path,
        format!("#!/bin/sh\nexec {how} {}\n", driver.display()),
    )?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok((dir, path))
}

fn a_plugin_that_is_not_root_says_so(context: &Context) -> Result<()> {
    let (_dir, plugin) = wrapped(
        context,
        "setpriv --reuid=65534 --regid=65534 --clear-groups --",
    )?;
    context.block_on(async {
        let agent = Agent::start(plugin, Config::default()).await?;
        let seen = fingerprint(&agent)?;
        ensure!(
            seen.health() == HealthState::Undetected
                && seen.health_description == "Driver must run as root",
            "{seen:?}"
        );
        agent.finish().await
    })
}

/// The filter answers as a kernel does that was booted without Landlock in its lsm= list.
fn a_kernel_without_landlock_is_no_host(context: &Context) -> Result<()> {
    let (_dir, plugin) = wrapped(
        context,
        "systemd-run --quiet --collect --pipe --wait \
         --property=SystemCallFilter='~landlock_create_ruleset landlock_add_rule landlock_restrict_self' \
         --property=SystemCallErrorNumber=EOPNOTSUPP \
         --setenv=NOMAD_PLUGIN_MAGIC_COOKIE --setenv=PLUGIN_MIN_PORT --setenv=PLUGIN_MAX_PORT --setenv=PLUGIN_PROTOCOL_VERSIONS",
    )?;
    context.block_on(async {
        let agent = Agent::start(plugin, Config::default()).await?;
        let seen = fingerprint(&agent)?;
        ensure!(
            seen.health() == HealthState::Undetected
                && seen
                    .health_description
                    .starts_with("Landlock is not available; it needs Linux 5.14"),
            "{seen:?}"
        );
        // Whoever starts a task all the same gets no task without its sandbox.
        let error = refusal(&agent, &Job::command("true", &[])).await?;
        ensure!(error.message.contains("Landlock"), "{error}");
        agent.finish().await
    })
}

fn a_host_without_a_bus_is_unhealthy(context: &Context) -> Result<()> {
    let config = Config {
        env: vec![(
            "DBUS_SYSTEM_BUS_ADDRESS".into(),
            "unix:path=/no/such/socket".into(),
        )],
        ..Config::default()
    };
    context.block_on(async {
        let agent = agent_with(context, config).await?;
        let seen = fingerprint(&agent)?;
        ensure!(
            seen.health() == HealthState::Unhealthy
                && seen
                    .health_description
                    .starts_with("systemd cannot be reached on the system bus: ")
                && seen.health_description.contains("is dbus running"),
            "{seen:?}"
        );
        ensure!(attributes(&seen)["systemd.version"] == Value::StringVal(String::new()));
        let error = refusal(&agent, &Job::command("true", &[])).await?;
        ensure!(
            error.recoverable
                && error
                    .message
                    .contains("cannot be reached on the system bus"),
            "{error:?}"
        );
        agent.finish().await
    })
}

fn a_lost_bus_is_told_and_so_is_its_return(context: &Context) -> Result<()> {
    let bus = |verb: &str| said("systemctl", &[verb, "dbus.socket", "dbus.service"]);
    context.block_on(async {
        let agent = agent(context).await?;
        let before = fingerprint(&agent)?;
        let alloc = agent
            .run(&Job::shell("echo up; exec sleep 600").text())
            .await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let connection = agent.connection()?;

        bus("stop")?;
        let lost = connection
            .fingerprint_where(TELL, |seen| seen.health_description.contains("system bus"))
            .await;
        let refused = refusal(&agent, &Job::command("true", &[])).await;
        let running = scope.processes();
        bus("start")?;
        let lost = lost?;
        ensure!(lost.health() == HealthState::Unhealthy, "{lost:?}");
        let refused = refused?;
        ensure!(refused.recoverable, "{refused:?}");
        ensure!(
            running?.len() == 2 && task.exit().is_none(),
            "the task went with the bus"
        );

        let back = connection
            .fingerprint_where(TELL, |seen| {
                seen.health_description == before.health_description
            })
            .await?;
        ensure!(back == before, "{back:?}");
        ensure!(printed(&agent, &Job::command("echo", &["again"])).await? == "again\n");
        let exit = task.stop().await?;
        ensure!((exit.code, exit.signal) == (130, 2), "{exit:?}");
        scope.expect_gone()?;
        agent.finish().await
    })
}
