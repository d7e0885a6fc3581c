//! The check that follows every case, tried with one leak of each kind.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::{Descriptors, Ground, Leak};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::case;

pub const CASES: &[Case] = &[
    case!(Speed, Ours, each_kind_of_leak_is_found_and_cleared),
    case!(Both, Ours, descriptors_that_are_kept_are_found),
];

fn each_kind_of_leak_is_found_and_cleared(_: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    ensure!(
        ground.left()?.is_empty(),
        "without any leak: {:?}",
        ground.left()?
    );

    let mut process = Command::new("sleep").arg("600").spawn()?;
    let pid = process.id().cast_signed();
    // spawn returns while the kernel has yet to fill in the command line, and what has none counts as a zombie.
    while fs::read(format!("/proc/{pid}/cmdline"))?.is_empty() {
        std::thread::yield_now();
    }
    expect_one(
        &ground,
        |leak| matches!(leak, Leak::Process { pid: found, .. } if *found == pid),
    )?;
    process.wait()?;

    let file = PathBuf::from("/run/nomad-driver-exec2/records/planted");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(file.parent().unwrap_or(&file))?;
    fs::write(&file, "")?;
    expect_one(&ground, |leak| *leak == Leak::File(file.clone()))?;

    let target = Path::new("/mnt");
    said("mount", &["-t", "tmpfs", "planted", "/mnt"])?;
    expect_one(
        &ground,
        |leak| matches!(leak, Leak::Mount { target: found, .. } if found == target),
    )?;

    let cgroup = PathBuf::from("/sys/fs/cgroup/exec2.slice/planted.scope");
    fs::create_dir_all(&cgroup)?;
    expect_one(&ground, |leak| *leak == Leak::Cgroup(cgroup.clone()))?;

    let dropped_in = PathBuf::from("/run/systemd/system.control/exec2-planted.scope.d");
    fs::create_dir_all(&dropped_in)?;
    expect_one(&ground, |leak| *leak == Leak::File(dropped_in.clone()))?;

    // A unit comes with its cgroup, its process and its file.
    let mut scope = Command::new("systemd-run")
        .args([
            "--scope",
            "--slice=exec2.slice",
            "--unit=exec2-planted.scope",
            "sleep",
            "601",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let unit = Leak::Unit("exec2-planted.scope".into());
    while !said("systemctl", &["list-units", "--plain", "exec2-*"])?.contains("exec2-planted") {
        ensure!(scope.try_wait()?.is_none(), "systemd-run made no scope");
    }
    let left = ground.left()?;
    ensure!(left.contains(&unit) && left.len() == 4, "{left:?}");
    unit.clear();
    scope.wait()?;
    ensure!(ground.left()?.is_empty(), "{:?}", ground.left()?);
    Ok(())
}

fn descriptors_that_are_kept_are_found(_: &Context) -> Result<()> {
    // systemd watches a path for as long as the unit is there.
    let ground = Ground::survey()?;
    let watch = "--path-property=PathExists=/run/planted";
    said("systemd-run", &["--quiet", "--unit=planted", watch, "true"])?;
    let left = ground.left()?;
    said("systemctl", &["stop", "planted.path"])?;
    let is_inotify = |leak: &Leak| matches!(leak, Leak::Descriptors { pid: 1, kind, more: 1 } if kind.contains("inotify"));
    ensure!(left.len() == 1 && left.iter().all(is_inotify), "{left:?}");
    ensure!(ground.left()?.is_empty(), "{:?}", ground.left()?);

    let own = || Descriptors::of(std::process::id());
    let before = own()?;
    let mut child = Command::new("sleep").arg("600").spawn()?;
    let pid = Pid::from_child(&child);
    let open = || File::open(format!("/proc/{}/stat", child.id()));
    let kept = (open()?, open()?, pidfd_open(pid, PidfdFlags::empty())?);
    let alive = own()?.beyond(&before);
    child.kill()?;
    child.wait()?;
    let reaped = own()?.beyond(&before);
    drop(kept);
    let more = |kind: &str, more| Leak::Descriptors {
        pid: std::process::id(),
        kind: kind.into(),
        more,
    };
    let stats = more("/proc//stat", 2);
    let pidfd = more("anon_inode:[pidfd]", 1);
    ensure!(alive == [stats.clone(), pidfd], "{alive:?}");
    let pidfd = more("anon_inode:[pidfd] of no process", 1);
    ensure!(reaped == [stats, pidfd], "{reaped:?}");
    ensure!(own()? == before);
    Ok(())
}

fn expect_one(ground: &Ground, is_it: impl Fn(&Leak) -> bool) -> Result<()> {
    let left = ground.left()?;
    ensure!(left.len() == 1 && left.iter().all(is_it), "{left:?}");
    left.iter().for_each(Leak::clear);
    ensure!(ground.left()?.is_empty(), "it is not cleared: {left:?}");
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
