//! The ground the other cases stand on: what the guests offer.

use std::collections::HashSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};

use crate::case;

pub const CASES: &[Case] = &[
    case!(
        Everywhere,
        Ours,
        the_guest_runs_the_systemd_its_release_ships
    ),
    case!(Kernel, Ours, the_guest_has_the_controllers_that_limits_need),
    case!(Limits, Ours, a_restored_guest_knows_the_time),
];

fn the_guest_runs_the_systemd_its_release_ships(context: &Context) -> Result<()> {
    let version = said("systemctl", &["--version"])?;
    let version = version
        .split_whitespace()
        .nth(1)
        .context("systemctl names no version")?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let landlock = landlock_abi()?;
    context.note(format!(
        "systemd {version}, kernel {}, Landlock ABI {landlock}",
        kernel.trim()
    ));

    let at_least = match context.guest().release.codename {
        "bookworm" => 252,
        "trixie" => 257,
        _ => 258,
    };
    ensure!(
        version.parse::<u32>()? >= at_least,
        "systemd {version} is older than {at_least}"
    );
    ensure!(
        fs::read_to_string("/proc/1/comm")?.trim() == "systemd",
        "systemd is not PID 1"
    );
    ensure!(landlock >= 2, "the kernel offers Landlock ABI {landlock}");
    Ok(())
}

fn the_guest_has_the_controllers_that_limits_need(context: &Context) -> Result<()> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    context.note(format!("controllers: {}", controllers.trim()));
    let have: HashSet<&str> = controllers.split_whitespace().collect();
    for needed in ["cpu", "cpuset", "io", "memory", "pids"] {
        ensure!(
            have.contains(needed),
            "no {needed} controller: {controllers}"
        );
    }
    Ok(())
}

/// The journal of the restored system has entries from before; the clock must be ahead of them, and near the payload's
/// date, which the host wrote a moment ago.
fn a_restored_guest_knows_the_time(context: &Context) -> Result<()> {
    let written = fs::metadata(context.payload("guests"))?.modified()?;
    let age = SystemTime::now()
        .duration_since(written)
        .context("the guest's clock is behind the host's")?;
    ensure!(
        age < Duration::from_secs(3600),
        "the payload is {age:?} old: the clock is wrong"
    );
    ensure!(
        context.guest().kind == Kind::Qemu,
        "only machines are restored"
    );
    Ok(())
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// What the kernel offers. Perl is in every Debian and calls the kernel without a line of unsafe code here:
/// landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION).
fn landlock_abi() -> Result<u32> {
    Ok(said("perl", &["-e", "print syscall 444, 0, 0, 1"])?.parse()?)
}
