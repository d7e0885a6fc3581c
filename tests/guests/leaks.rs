//! The check that follows every case, tried with one leak of each kind.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::{Ground, Leak};

use crate::case;

pub const CASES: &[Case] = &[case!(Speed, Ours, each_kind_of_leak_is_found_and_cleared)];

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

    // A unit comes with its cgroup and its process.
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
    ensure!(left.contains(&unit) && left.len() == 3, "{left:?}");
    unit.clear();
    scope.wait()?;
    ensure!(ground.left()?.is_empty(), "{:?}", ground.left()?);
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
