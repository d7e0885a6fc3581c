//! The Debian package as an operator meets it: installed by apt, upgraded, downgraded and removed under running tasks of a real agent.
//! What both packages do to running tasks is in `upgrades`, with our own client as the agent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::real::{RealAgent, RealConfig};
use harness::nomad::{Agent, Config};

use crate::agent::{messages, scope_of, to_end};
use crate::case;
use crate::nomad::{Job, Scope, proc_file, said, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, apt_installs_it_with_what_a_host_has),
    case!(Speed, Ours, apt_swaps_it_with_hashicorps_package),
    case!(Limits, Ours, a_drop_in_of_its_slice_holds_for_running_tasks),
    case!(
        ProgramLimits,
        Agent,
        what_the_readme_says_installs_it_and_upgrades_it_under_a_task,
        Long
    ),
    case!(
        ProgramLimits,
        Agent,
        a_downgrade_and_a_removal_leave_tasks_running,
        Minutes
    ),
];

pub const NAME: &str = "nomad-driver-exec2-systemd";
/// Of the `rpm` that guests are given.
const RPM_DB: &str = "/var/tmp/rpmdb";
const THEIRS: &str = "nomad-driver-exec2";
pub const DRIVER: &str = "/usr/bin/nomad-driver-exec2";
const DATA: &str = "/opt/nomad/data";
pub const LINK: &str = "/opt/nomad/data/plugins/nomad-driver-exec2";
const EXAMPLE: &str = "/usr/share/doc/nomad-driver-exec2-systemd/examples/nomad-driver-exec2.hcl";
const README: &str = include_str!("../../README.md");
/// Higher than any of ours.
pub const NEXT: &str = "99.0.0-1";

/// What a case installs goes with it, however it ends: the slices would be those of all later cases.
pub struct Installed;

impl Installed {
    /// Before anything is.
    pub fn new() -> Result<Installed> {
        ensure!(!Path::new(DRIVER).exists(), "{DRIVER} is there already");
        Ok(Installed)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = said("dpkg", &["--purge", NAME, THEIRS]);
        let _ = said("/payload/rpm/rpm", &["-e", NAME]);
        let _ = fs::remove_dir_all(RPM_DB);
        let _ = said("systemctl", &["daemon-reload"]);
        // Nomad's own, of allocations that it has not cleared up when its agent stops.
        for mount in fs::read_to_string("/proc/mounts")
            .unwrap_or_default()
            .lines()
        {
            let at = mount.split(' ').nth(1).unwrap_or_default();
            if at.starts_with("/opt/nomad/") {
                let _ = said("umount", &["--lazy", at]);
            }
        }
        let _ = fs::remove_dir_all("/opt/nomad");
        // No package has it in its list, so that dpkg removes it when it is empty.
        let _ = fs::create_dir_all("/opt");
    }
}

/// Offline, as these guests are: what is not installed is not to be had.
fn apt(deb: &Path) -> Result<()> {
    let deb = deb.to_str().context("a path")?;
    said("apt-get", &["-y", "--allow-downgrades", "install", deb])?;
    said("systemctl", &["daemon-reload"]).map(drop)
}

pub fn installed(package: &str) -> Option<String> {
    let format = "-f${Version} ${db:Status-Status}";
    let answer = said("dpkg-query", &["-W", format, package]).ok()?;
    Some(answer.strip_suffix(" installed")?.to_owned())
}

/// The same files as another version.
pub fn as_version(deb: &Path, version: &str) -> Result<PathBuf> {
    let tree = tempfile::tempdir()?;
    let made = PathBuf::from(format!("/var/tmp/{NAME}_{version}.deb"));
    let script = format!(
        "dpkg-deb -R {} {1} && sed -i 's/^Version:.*/Version: {version}/' {1}/DEBIAN/control && dpkg-deb -Znone -b {1} {2}",
        deb.display(),
        tree.path().join("tree").display(),
        made.display()
    );
    said("sh", &["-ec", &script])?;
    Ok(made)
}

fn apt_installs_it_with_what_a_host_has(context: &Context) -> Result<()> {
    let package = Installed::new()?;
    apt(&context.package()?)?;
    ensure!(fs::read_link(LINK)? == Path::new(DRIVER));
    let ran = said(
        "nomad-driver-exec2",
        &["run", "--", "sh", "-c", "echo as $USER"],
    )?;
    ensure!(ran.starts_with("as nomad-"), "{ran}");
    for slice in ["exec2.slice", "exec2-share.slice", "exec2-reserve.slice"] {
        let shown = said("systemctl", &["cat", slice])?;
        let file = format!("/lib/systemd/system/{slice}\n");
        // Debian 12 has it by the name without /usr.
        ensure!(shown.contains(&file) && shown.contains("[Unit]"), "{shown}");
        let shown = crate::scopes::show(slice, &["Description", "Documentation", "LoadState"])?;
        ensure!(
            shown["LoadState"] == "loaded"
                && shown["Description"].starts_with("Nomad tasks of the exec2 driver")
                && shown["Documentation"].trim_matches('"') == "man:nomad-driver-exec2(8)",
            "{shown:?}"
        );
    }
    // Nothing was enabled, started or reported as failed.
    ensure!(
        said("systemctl", &["list-unit-files", "--no-legend", "exec2*"])?
            .lines()
            .all(|line| line.contains(" static"))
    );
    drop(package);
    for gone in ["/opt/nomad", DRIVER, "/var/lib/nomad-driver-exec2"] {
        ensure!(!Path::new(gone).exists(), "{gone} is left");
    }
    Ok(())
}

/// A stand-in for HashiCorp's package, with its two scripts.
fn theirs() -> Result<PathBuf> {
    let tree = tempfile::tempdir()?;
    let script = format!(
        "cd {}; mkdir -p t/DEBIAN t/usr/bin; echo theirs >t{DRIVER}; cd t/DEBIAN
        printf 'Package: {THEIRS}\\nVersion: 0.1.2-1\\nArchitecture: all\\nMaintainer: x <x@example.org>\\nDescription: a stand-in\\n' >control
        printf '#!/bin/bash\\nmkdir -p {DATA}/plugins\\nln -s {DRIVER} {LINK}\\n' >postinst
        printf '#!/bin/bash\\nrm {LINK}\\n' >postrm
        chmod 755 postinst postrm; dpkg-deb -Znone -b ../../t /var/tmp/theirs.deb",
        tree.path().display()
    );
    said("sh", &["-ec", &script])?;
    Ok("/var/tmp/theirs.deb".into())
}

fn apt_swaps_it_with_hashicorps_package(context: &Context) -> Result<()> {
    let (ours, theirs) = (context.package()?, theirs()?);
    let _package = Installed::new()?;
    for (deb, there, gone) in [
        (&theirs, THEIRS, NAME),
        (&ours, NAME, THEIRS),
        (&theirs, THEIRS, NAME),
        (&ours, NAME, THEIRS),
    ] {
        apt(deb)?;
        ensure!(
            installed(there).is_some() && installed(gone).is_none(),
            "{there}"
        );
        ensure!(
            fs::read_link(LINK).ok().as_deref() == Some(Path::new(DRIVER)),
            "{there}"
        );
        let size = fs::metadata(DRIVER)?.len();
        ensure!((size == 7) == (there == THEIRS), "{there}: {size} bytes");
    }
    said("apt-get", &["-y", "purge", THEIRS])?;
    ensure!(installed(NAME).is_some() && fs::read_link(LINK)? == Path::new(DRIVER));
    Ok(())
}

fn a_drop_in_of_its_slice_holds_for_running_tasks(context: &Context) -> Result<()> {
    let _package = Installed::new()?;
    apt(&context.package()?)?;
    let drop_in = Path::new("/etc/systemd/system/exec2.slice.d/50-operator.conf");
    let done = context.block_on(async {
        let agent = Agent::start(Path::new(DRIVER), Config::default()).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let main = scope.main()?;
        let slice = Path::new("/sys/fs/cgroup/exec2.slice");
        let file = |name: &str| -> Result<String> {
            Ok(fs::read_to_string(slice.join(name))?.trim_end().to_owned())
        };
        ensure!(file("memory.high")? == "max", "{}", file("memory.high")?);
        let holds = |high: &str, weight: &str| {
            let weights = ["io.weight", "io.bfq.weight"].map(|name| file(name).unwrap_or_default());
            let mut weights = weights
                .iter()
                .map(|line| line.trim_start_matches("default "));
            let is_high = file("memory.high").ok()? == high;
            (is_high && weights.any(|one| one == weight)).then_some(())
        };
        // At once.
        let properties = ["MemoryHigh=40M", "IOWeight=60"];
        said(
            "systemctl",
            &[&["set-property", "exec2.slice"][..], &properties].concat(),
        )?;
        until("it holds at once", || holds("41943040", "60")).await?;
        said("systemctl", &["revert", "exec2.slice"])?;
        // systemd applies what is written by hand when it next starts something in the slice.
        fs::create_dir_all(drop_in.parent().context("a directory")?)?;
        fs::write(drop_in, "[Slice]\nMemoryHigh=48M\nIOWeight=50\n")?;
        said("systemctl", &["daemon-reload"])?;
        let another = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        until("it holds from the next start on", || {
            holds("50331648", "50")
        })
        .await?;
        another.stop().await?;
        // The task runs on below it.
        ensure!(scope.main()? == main && scope.dir.starts_with(slice));
        alloc.stop().await?;
        agent.finish().await
    });
    let _ = fs::remove_dir_all(drop_in.parent().context("a directory")?);
    done
}

/// A block of HCL that README.md shows, by how it begins.
fn of_readme(begin: &str) -> Result<&'static str> {
    let fences = README.split("\n```hcl\n").skip(1);
    let mut found = fences.filter(|fence| fence.starts_with(begin));
    let fence = found.next().with_context(|| format!("no {begin}"))?;
    let (block, _) = fence.split_once("```").context("its end")?;
    Ok(block)
}

/// The agent of HashiCorp's package, as far as plugins go: that data_dir and its own plugin_dir.
async fn agent(context: &Context, plugin_block: &str) -> Result<RealAgent> {
    RealAgent::start(RealConfig {
        data_dir: Some(DATA.into()),
        plugin_block: Some(plugin_block.to_owned()),
        total_compute_mhz: Some(2_000),
        ..RealConfig::new(context.agent(), context.driver())
    })
    .await
}

/// Starts a task that ends with 7 on SIGHUP, under this name.
async fn started(agent: &RealAgent, name: &str) -> Result<(String, Scope)> {
    let job = Job::shell("trap 'exit 7' HUP; while :; do sleep 0.1; done").text();
    let ids = agent
        .run(&job.replace("\"case\"", &format!("{name:?}")))
        .await?;
    let id = ids.first().context("no allocation")?.clone();
    agent.wait_for(&id, &["running"]).await?;
    let scope = scope_of(&id, "t")?;
    Ok((id, scope))
}

/// Its end is told as it was.
async fn ends_with_7(agent: &RealAgent, id: &str) -> Result<()> {
    agent.signal(id, "t", "SIGHUP").await?;
    agent.wait_for(id, &["failed"]).await?;
    let told = messages(agent, id, "t").await?;
    ensure!(
        told.iter().any(|line| line == "Terminated: Exit Code: 7"),
        "{told:?}"
    );
    Ok(())
}

/// A task that starts now runs.
async fn runs_another(agent: &RealAgent, name: &str) -> Result<()> {
    let job = Job::shell("exit 3")
        .text()
        .replace("\"case\"", &format!("{name:?}"));
    let (id, _) = to_end(agent, &job).await?;
    let told = messages(agent, &id, "t").await?;
    ensure!(
        told.iter().any(|line| line == "Terminated: Exit Code: 3"),
        "{told:?}"
    );
    Ok(())
}

/// The executable of the plugin that serves the agent; one that was replaced or removed is ` (deleted)`.
fn plugin() -> Result<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = proc_file(pid, "cmdline").unwrap_or_default();
        if line.split('\0').next() == Some(LINK) {
            found.push(
                fs::read_link(format!("/proc/{pid}/exe"))?
                    .display()
                    .to_string(),
            );
        }
    }
    ensure!(found.len() == 1, "{found:?} are the plugin");
    Ok(found.remove(0))
}

fn what_the_readme_says_installs_it_and_upgrades_it_under_a_task(context: &Context) -> Result<()> {
    let deb = context.package()?;
    let next = as_version(&deb, NEXT)?;
    let _package = Installed::new()?;
    apt(&deb)?;
    context.block_on(async {
        // `systemctl start nomad`.
        let mut agent = agent(context, of_readme("plugin ")?).await?;
        let (id, scope) = started(&agent, "upgrade").await?;
        let main = scope.main()?;
        let (env, state) = to_end(&agent, of_readme("job \"env\"")?).await?;
        ensure!(
            state == "complete",
            "{:?}",
            messages(&agent, &env, "env").await?
        );
        let printed = agent.logs(&env, "env", "stdout").await?;
        ensure!(printed.contains("NOMAD_TASK_NAME=env\n"), "{printed}");

        apt(&next)?;
        ensure!(installed(NAME).as_deref() == Some(NEXT));
        // The agent goes on with the plugin that it has, whose file is another by now.
        ensure!(plugin()?.ends_with(" (deleted)"), "{}", plugin()?);
        ensure!(scope.main()? == main, "after the upgrade");
        agent.restart().await?;
        ensure!(plugin()? == DRIVER, "{}", plugin()?);
        ensure!(scope.main()? == main, "after the restart of the agent");
        ends_with_7(&agent, &id).await?;
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        agent.collect().await?;
        agent.finish().await
    })
}

fn a_downgrade_and_a_removal_leave_tasks_running(context: &Context) -> Result<()> {
    let deb = context.package()?;
    let _package = Installed::new()?;
    apt(&as_version(&deb, NEXT)?)?;
    context.block_on(async {
        let mut agent = agent(context, &fs::read_to_string(EXAMPLE)?).await?;
        let (id, scope) = started(&agent, "downgrade").await?;
        let main = scope.main()?;
        apt(&deb)?;
        ensure!(installed(NAME).is_some_and(|version| version != NEXT));
        ensure!(scope.main()? == main, "after the downgrade");
        ensure!(plugin()?.ends_with(" (deleted)"), "{}", plugin()?);
        runs_another(&agent, "downgraded-before").await?;
        agent.restart().await?;
        ensure!(plugin()? == DRIVER, "{}", plugin()?);
        ensure!(scope.main()? == main, "after the restart of the agent");
        runs_another(&agent, "downgraded-after").await?;
        ends_with_7(&agent, &id).await?;
        until("the scope is gone", || scope.expect_gone().ok()).await?;

        let (id, scope) = started(&agent, "removal").await?;
        let main = scope.main()?;
        said("apt-get", &["-y", "purge", NAME])?;
        ensure!(!Path::new(DRIVER).exists() && fs::symlink_metadata(LINK).is_err());
        ensure!(scope.main()? == main, "after the removal");
        ensure!(plugin()?.ends_with(" (deleted)"), "{}", plugin()?);
        runs_another(&agent, "removed").await?;

        agent.restart_as("").await?;
        ensure!(plugin().is_err());
        ensure!(
            scope.main()? == main,
            "after a restart of the agent without the driver"
        );
        // Nomad gives it up, and the operator ends it.
        agent.wait_for(&id, &["failed"]).await?;
        ensure!(scope.main()? == main, "after Nomad has given it up");
        said("systemctl", &["stop", &scope.unit])?;
        until("the scope is gone", || (!scope.dir.exists()).then_some(())).await?;
        fs::remove_file(Path::new("/run/nomad-driver-exec2/records").join(&scope.unit))?;

        // What starts after the driver is back runs on it.
        apt(&deb)?;
        agent.restart().await?;
        runs_another(&agent, "back").await?;
        // Its client still knew of the one that was given up, and has started it anew.
        agent.stop("removal").await?;
        let copies = format!("exec2-t-{}-*.scope", &id[..8]);
        until("no copy of it is left", || {
            let listed = said("systemctl", &["list-units", "--no-legend", &copies]).ok()?;
            listed.is_empty().then_some(())
        })
        .await?;
        agent.collect().await?;
        agent.finish().await
    })
}
