//! A machine that has finished booting, frozen: its disk and its memory. Every run goes on from there with a disk of its
//! own on top, so the files stay as they were written.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::build::Built;
use super::child::{self, Exit};
use super::qemu::{self, Disks, MACHINE, Machine};
use super::release::Release;
use super::{cache, payload, progress};

const BOOT_PATIENCE: Duration = Duration::from_secs(600);

/// Leaves the programs every test needs in the guest's page cache, and nothing half written.
const SETTLE: &str = r#"set -eu
systemd-run --quiet --wait --pipe --collect true
systemd-run --quiet --scope true
perl -e 1
busctl tree --list org.freedesktop.systemd1 >/dev/null
journalctl --sync
sync
"#;

#[derive(Debug)]
pub struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.qcow2")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

/// It lives inside the entry of its root file system: its disk means nothing without that.
pub fn take(release: &Release, built: &Built) -> Result<Snapshot> {
    let version = child::succeed(
        Command::new("qemu-system-x86_64").arg("--version"),
        BOOT_PATIENCE,
    )?;
    let machine = MACHINE.join(" ");
    let arguments = qemu::kernel_arguments(release);
    let key = cache::key(&[&version, &machine, &arguments, payload::IMAGE_SIZE, SETTLE]);
    let dir = cache::entry(built.dir(), "snapshot", &key, |dir| {
        progress::step(
            &format!("{}: booting once for the snapshot", release.codename),
            || freeze(built, dir, &arguments),
        )
    })?;
    Ok(Snapshot { dir })
}

fn freeze(built: &Built, dir: &Path, kernel_arguments: &str) -> Result<()> {
    let disk = dir.join("disk.qcow2");
    // Relative to the new disk, which is renamed together with its directory.
    qemu::overlay(&Path::new("..").join(Built::DISK), "raw", &disk)?;
    let blank = dir.join("blank");
    child::succeed(
        Command::new("truncate")
            .args(["-s", payload::IMAGE_SIZE])
            .arg(&blank),
        BOOT_PATIENCE,
    )?;
    let disks = Disks {
        system: &disk,
        payload: &blank,
        state: None,
        kernel_arguments,
    };
    let mut machine = Machine::start(built, &disks, &[], dir)?;
    await_running(&machine).with_context(|| {
        format!(
            "the machine did not boot\n{}",
            child::tail(&machine.console(), 30)
        )
    })?;
    child::succeed(
        &mut machine.ssh.command(&[], &["sh", "-c", SETTLE]),
        BOOT_PATIENCE,
    )?;
    machine.ssh.hang_up()?;
    machine.monitor.save("state", BOOT_PATIENCE)?;
    drop(machine);
    File::open(dir.join("state"))?.sync_all()?;
    std::fs::remove_file(blank)?;
    Ok(())
}

pub fn await_running(machine: &Machine) -> Result<()> {
    let deadline = Instant::now() + BOOT_PATIENCE;
    while Instant::now() < deadline {
        let mut said = String::new();
        let asked = machine
            .ssh
            .command(&[], &["systemctl", "is-system-running", "--wait"]);
        let exit = child::stream(&mut { asked }, BOOT_PATIENCE, &mut |line| {
            said = line.to_owned()
        })?;
        match (said.as_str(), exit) {
            ("running", Exit::Code(0)) => return Ok(()),
            ("degraded", _) => {
                let failed = child::succeed(
                    &mut machine
                        .ssh
                        .command(&[], &["systemctl", "--failed", "--no-legend"]),
                    BOOT_PATIENCE,
                )?;
                bail!("failed units:\n{failed}");
            }
            // Nobody listens yet.
            _ => thread::sleep(Duration::from_millis(500)),
        }
    }
    bail!("it is not up after {BOOT_PATIENCE:?}")
}
