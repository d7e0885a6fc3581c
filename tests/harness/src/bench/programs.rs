//! Other ways to start the same command, for scale: what systemd, bubblewrap and the kernel alone take.

use std::process::{Child, Command, Stdio};

use std::io::Read as _;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::STAMP;
use super::bus::Bus;
use super::kernel::{self, millis, now_nanos};
use super::raw::Who;

/// What makes a service about as confined as a task.
const SERVICE: &[&str] = &[
    "--quiet",
    "--wait",
    "--pipe",
    "--collect",
    "--property=DynamicUser=yes",
    "--property=NoNewPrivileges=yes",
    "--property=PrivateDevices=yes",
    "--property=PrivateIPC=yes",
    "--property=PrivateTmp=yes",
    "--property=ProcSubset=pid",
    "--property=ProtectHome=yes",
    "--property=ProtectProc=invisible",
    "--property=ProtectSystem=strict",
    "--property=CapabilityBoundingSet=",
];

const BWRAP: &[&str] = &[
    "--ro-bind",
    "/",
    "/",
    "--dev",
    "/dev",
    "--proc",
    "/proc",
    "--tmpfs",
    "/tmp",
    "--unshare-pid",
    "--unshare-ipc",
    "--new-session",
    "--die-with-parent",
    "--uid",
    "65534",
    "--gid",
    "65534",
    "--unshare-user",
    "--cap-drop",
    "ALL",
];

fn command(who: Who) -> Result<Command> {
    let (program, options) = match who {
        Who::SystemdRunScope => ("systemd-run", &["--quiet", "--scope", "--collect"][..]),
        Who::SystemdRunService => ("systemd-run", SERVICE),
        Who::Bwrap => ("bwrap", BWRAP),
        Who::ForkExec => return Ok(Command::new(STAMP)),
        _ => anyhow::bail!("{who:?} is no program"),
    };
    let mut command = Command::new(program);
    command.args(options).arg("--").arg(STAMP).arg("and-exit");
    Ok(command)
}

/// Milliseconds from the fork to the first instruction.
pub fn first_instruction(who: Who) -> Result<f64> {
    let begun = now_nanos()?;
    let mut child = spawn(&mut command(who)?)?;
    let first = moment(&mut child)?;
    if who == Who::ForkExec {
        end(&mut child)?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{who:?}: {status}");
    Ok(millis(begun, first))
}

/// Milliseconds of CPU from the fork until the command waits: what an exec of it costs by itself.
pub fn cpu_of_exec() -> Result<f64> {
    let mut child = waiting()?;
    std::thread::sleep(std::time::Duration::from_millis(2));
    let cpu = kernel::cpu_of_process_millis(child.id())?;
    end(&mut child)?;
    child.wait()?;
    Ok(cpu)
}

/// The command, once it waits.
pub fn waiting() -> Result<Child> {
    let mut child = spawn(&mut Command::new(STAMP))?;
    moment(&mut child)?;
    Ok(child)
}

/// Milliseconds that systemd takes to put a waiting process into a scope.
pub async fn round_trip(bus: &Bus) -> Result<f64> {
    let mut child = waiting()?;
    let taken = bus.scopes(&[in_scope(&child)]).await;
    end(&mut child)?;
    child.wait()?;
    Ok(taken?.as_secs_f64() * 1e3)
}

/// Milliseconds that systemd takes for so many at once.
pub async fn round_trips(bus: &Bus, count: u64) -> Result<f64> {
    let mut children = Vec::new();
    for _ in 0..count {
        let mut command = Command::new(STAMP);
        // What it tells is nobody's, and a pipe for each would be many.
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        children.push(child.context(STAMP)?);
    }
    let processes: Vec<_> = children.iter().map(in_scope).collect();
    let taken = bus.scopes(&processes).await;
    for child in &mut children {
        child.kill()?;
        child.wait()?;
    }
    Ok(taken?.as_secs_f64() * 1e3)
}

fn in_scope(child: &Child) -> (String, u32) {
    let unit = format!("bench-{}-{}.scope", std::process::id(), child.id());
    (unit, child.id())
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{:?}", command.get_program()))
}

fn moment(child: &mut Child) -> Result<u64> {
    let mut moment = [0; 8];
    let stdout = child.stdout.as_mut().context("stdout is a pipe")?;
    stdout.read_exact(&mut moment)?;
    Ok(u64::from_le_bytes(moment))
}

fn end(child: &mut Child) -> Result<()> {
    Ok(kill(
        Pid::from_raw(child.id().cast_signed()),
        Signal::SIGTERM,
    )?)
}
