//! `make demo`, the part inside the guest: the README's first job and a long-running one, and what systemd and the kernel
//! make of them. Nothing is checked here; the cases do that.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::nomad::real::{RealAgent, RealConfig};
use crate::nomad::{Agent, Config};

const ENV: &str = include_str!("../../nomad/env.nomad.hcl");
const SERVICE: &str = include_str!("../../nomad/service.nomad.hcl");

/// Runs both jobs through a real agent if there is one, else through our own client.
pub async fn play(driver: &Path, nomad: Option<&Path>) -> Result<()> {
    say("the guest");
    show("sh", &["-c", "systemctl --version | head -n 1; uname -sr"])?;
    match nomad {
        Some(nomad) => with_real_agent(driver, nomad).await?,
        None => with_our_client(driver).await?,
    }
    say("what is left: no scope, no process");
    show(
        "systemctl",
        &[
            "list-units",
            "--no-pager",
            "--all",
            "--no-legend",
            "exec2-*.scope",
        ],
    )?;
    show("systemd-cgls", &["--no-pager", "/exec2.slice"])
}

async fn with_real_agent(driver: &Path, nomad: &Path) -> Result<()> {
    show(path(nomad)?, &["version"])?;
    println!("Starting it takes about half a minute in an emulated machine.");
    let agent = RealAgent::start(RealConfig {
        total_compute_mhz: Some(2000),
        ..RealConfig::new(nomad, driver)
    })
    .await?;
    say("the driver, as the node shows it");
    let node = agent.node().await?;
    println!("{:#}", node["Drivers"]["exec2"]);

    say("job env: what nomad alloc status says, and its log");
    let ids = agent.run(ENV).await?;
    let id = ids.first().context("job env has no allocation")?;
    agent.wait_for(id, &["complete", "failed"]).await?;
    for event in agent.events(id, "env").await? {
        println!("{:<18} {}", event.kind, event.message);
    }
    println!("{}", agent.logs(id, "env", "stdout").await?);

    say("job service");
    let ids = agent.run(SERVICE).await?;
    let id = ids.first().context("job service has no allocation")?;
    agent.wait_for(id, &["running"]).await?;
    look_at_scope()?;
    say("nomad job stop service");
    agent.stop("service").await?;
    agent.wait_for(id, &["complete", "failed"]).await?;
    for event in agent.events(id, "web").await? {
        println!("{:<18} {}", event.kind, event.message);
    }
    agent.finish().await
}

async fn with_our_client(driver: &Path) -> Result<()> {
    println!("No nomad on PATH or in NOMAD=: a client of our own does what the agent does.");
    let agent = Agent::start(driver, Config::default()).await?;
    say("job env: its log");
    let alloc = agent.run(ENV).await?;
    let exit = alloc.task("env")?.wait().await?;
    println!("{}", alloc.stdout("env")?);
    println!("{exit:?}");
    alloc.stop().await?;

    say("job service");
    let alloc = agent.run(SERVICE).await?;
    look_at_scope()?;
    say("stopping it");
    println!("{:?}", alloc.task("web")?.stop().await?);
    alloc.stop().await?;
    agent.finish().await
}

/// The scope of the service, as the host's own tools and the kernel show it.
fn look_at_scope() -> Result<()> {
    let list = said(
        "systemctl",
        &["list-units", "--plain", "--no-legend", "exec2-web-*.scope"],
    )?;
    let unit = list
        .split_whitespace()
        .next()
        .context("the service has no scope")?;
    say(&format!("systemctl status {unit}"));
    show("systemctl", &["status", "--no-pager", "--full", unit])?;
    say("systemd-cgls /exec2.slice");
    show("systemd-cgls", &["--no-pager", "/exec2.slice"])?;
    say("the limits as the kernel has them");
    for file in ["memory.max", "memory.low", "cpu.max", "pids.max"] {
        let path = format!("/sys/fs/cgroup/exec2.slice/exec2-share.slice/{unit}/{file}");
        match fs::read_to_string(&path) {
            Ok(limit) => println!("{file:<12} {}", limit.trim()),
            Err(_) => println!("{file:<12} not there: a container has no such controller"),
        }
    }
    Ok(())
}

fn say(what: &str) {
    println!("\n== {what}");
}

/// Runs a program that prints for itself. Its exit status is part of what is shown.
fn show(program: &str, arguments: &[&str]) -> Result<()> {
    Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| program.to_owned())?;
    Ok(())
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| program.to_owned())?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
