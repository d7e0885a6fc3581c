//! What an operator says of slices and scopes, in drop-ins or at once, and where systemd's own tools lead from there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::nomad::Agent;
use serde_json::Value;

use crate::case;
use crate::nomad::{Job, Scope, agent, said, until};
use crate::run_job::SERVICE;
use crate::scopes::show;

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_slice_is_given_to_systemd_oomd_while_tasks_run),
    case!(
        Limits,
        Ours,
        memory_high_of_the_slice_holds_back_a_running_task
    ),
    case!(
        Everywhere,
        Ours,
        a_drop_in_for_the_scopes_of_a_name_wins_and_is_told,
        Long
    ),
    case!(Speed, Ours, systemctl_help_of_a_scope_opens_the_manual),
];

const SLICE: &str = "exec2.slice";
const MANUAL: &str = include_str!("../../packaging/man/nomad-driver-exec2.8");

/// A drop-in of an operator's. It goes with the case, or it would be that of all later ones.
struct DropIn(PathBuf);

impl DropIn {
    fn new(unit: &str, text: &str) -> Result<DropIn> {
        let drop_in = DropIn(Path::new("/etc/systemd/system").join(format!("{unit}.d")));
        fs::create_dir_all(&drop_in.0)?;
        fs::write(drop_in.0.join("50-operator.conf"), text)?;
        said("systemctl", &["daemon-reload"])?;
        Ok(drop_in)
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        let _ = said("systemctl", &["daemon-reload"]);
    }
}

/// What was set at once.
struct Set;

impl Set {
    fn new(properties: &[&str]) -> Result<Set> {
        said(
            "systemctl",
            &[&["set-property", SLICE], properties].concat(),
        )?;
        Ok(Set)
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        let _ = said("systemctl", &["revert", SLICE]);
    }
}

fn events(agent: &Agent) -> Result<Vec<String>> {
    let events = agent.connection()?.events();
    Ok(events.into_iter().map(|event| event.message).collect())
}

fn a_slice_is_given_to_systemd_oomd_while_tasks_run(context: &Context) -> Result<()> {
    const PRESSURE: &str = "ManagedOOMMemoryPressure";
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let main = scope.main()?;
        let shown = || -> Result<String> { Ok(show(SLICE, &[PRESSURE])?[PRESSURE].clone()) };
        ensure!(shown()? == "auto", "{}", shown()?);
        {
            let _set = Set::new(&["ManagedOOMMemoryPressure=kill"])?;
            ensure!(shown()? == "kill", "{}", shown()?);
        }
        ensure!(shown()? == "auto", "{}", shown()?);
        // Written by hand, and with it how long the pressure must last.
        let text = "[Slice]\nManagedOOMMemoryPressure=kill\nManagedOOMMemoryPressureLimit=50%\n";
        let _drop_in = DropIn::new(SLICE, text)?;
        let another = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        ensure!(shown()? == "kill", "{}", shown()?);
        // It is the slice's: what is killed is a task below it, as the scopes leave the choice to it.
        let of_scope = scope.show(&[PRESSURE, "ManagedOOMPreference"])?;
        ensure!(
            of_scope[PRESSURE] == "auto" && of_scope["ManagedOOMPreference"] == "none",
            "{of_scope:?}"
        );
        ensure!(scope.main()? == main);
        another.stop().await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn memory_high_of_the_slice_holds_back_a_running_task(context: &Context) -> Result<()> {
    const FILL_BYTES: u64 = 32 << 20;
    context.block_on(async {
        let agent = agent(context).await?;
        // Its file stays in memory, and is written and read again and again.
        let script =
            "while :; do head -c 33554432 /dev/zero >local/fill; cat local/fill >/dev/null; done";
        let alloc = agent
            .run(
                &Job::shell(script)
                    .resources("cpu = 1000\n memory = 64")
                    .text(),
            )
            .await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let main = scope.main()?;
        let slice = Path::new("/sys/fs/cgroup").join(SLICE);
        let used = || scope.file("memory.current").ok()?.parse::<u64>().ok();
        let high = || -> Option<u64> {
            let events = fs::read_to_string(slice.join("memory.events")).ok()?;
            let mut lines = events.lines().filter_map(|line| line.split_once(' '));
            lines.find(|(name, _)| *name == "high")?.1.parse().ok()
        };
        until("it uses more", || (used()? > FILL_BYTES).then_some(())).await?;
        let before = high().context("memory.events")?;
        let _set = Set::new(&["MemoryHigh=16M"])?;
        until("the slice is held back", || {
            (high()? > before).then_some(())
        })
        .await
        .with_context(|| format!("{before}, then {:?}; {:?} bytes", high(), used()))?;
        context.note(format!("high: {before}, then {:?}", high()));
        // It is slowed down and not ended, and its own limit is the job's.
        ensure!(scope.main()? == main && scope.file("memory.max")? == (64u64 << 20).to_string());
        // Only what is set is in force at once; what is reverted, with the next start.
        said("systemctl", &["set-property", SLICE, "MemoryHigh=infinity"])?;
        until("it uses more again", || {
            (used()? > FILL_BYTES).then_some(())
        })
        .await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_drop_in_for_the_scopes_of_a_name_wins_and_is_told(context: &Context) -> Result<()> {
    const MAX_BYTES: u64 = 48 << 20;
    let job = tempfile::Builder::new().suffix(".nomad.hcl").tempfile()?;
    fs::write(job.path(), SERVICE)?;
    let driver = |arguments: &[&str]| -> Result<Vec<Value>> {
        let output = Command::new(context.driver())
            .args(arguments)
            .arg("--json")
            .output()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
    };
    context.block_on(async {
        let agent = agent(context).await?;
        let before = agent.run(SERVICE).await?;
        let drop_in = DropIn::new("exec2-web-.scope", "[Scope]\nMemoryMax=48M\nTasksMax=99\n")?;
        let alloc = agent.run(SERVICE).await?;
        let other = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scopes = [&before, &alloc, &other]
            .map(|alloc| alloc.only_task().and_then(Scope::of));
        let [before_scope, scope, other_scope] = scopes;
        let (before_scope, scope, other_scope) = (before_scope?, scope?, other_scope?);
        let shown = scope.show(&["MemoryMax", "MemoryLow", "TasksMax"])?;
        ensure!(
            shown["MemoryMax"] == MAX_BYTES.to_string()
                && shown["TasksMax"] == "99"
                // What it does not name is the job's.
                && shown["MemoryLow"] == (64u64 << 20).to_string(),
            "{shown:?}"
        );
        // Of a task of another name nothing is changed.
        let shown = other_scope.show(&["MemoryMax", "TasksMax"])?;
        ensure!(
            shown["MemoryMax"] == (64u64 << 20).to_string() && shown["TasksMax"] == "16384",
            "{shown:?}"
        );
        // What `check` tells is what systemd is asked for.
        let told = driver(&["check", job.path().to_str().context("a path")?])?;
        let files = &told[0]["plan"]["cgroup"];
        ensure!(files["memory.max"] == "134217728" && files["pids.max"] == "16384", "{files}");

        if context.guest().kind == Kind::Qemu {
            let in_force = |scope: &Scope| -> Result<(String, String)> {
                Ok((scope.file("memory.max")?, scope.file("pids.max")?))
            };
            let wanted = (MAX_BYTES.to_string(), "99".to_owned());
            ensure!(in_force(&scope)? == wanted, "{:?}", in_force(&scope)?);
            // It ran before the reload.
            let of_older = in_force(&before_scope)?;
            context.note(format!("of one that ran before: {of_older:?}"));
            for sentence in [
                "memory.max is 50331648 bytes, the job asks for 134217728 bytes",
                "pids.max is 99 processes and threads, pids_max asks for 16384 processes and threads",
            ] {
                let is_told = || {
                    let events = events(&agent).ok()?;
                    events.iter().any(|line| line == sentence).then_some(())
                };
                until(sentence, is_told)
                    .await
                    .with_context(|| format!("{:?}", events(&agent)))?;
            }
            let tasks = driver(&["tasks"])?;
            let limit = tasks.iter().find(|task| task["unit"] == scope.unit.as_str());
            let limit = limit.context("it is not listed")?;
            ensure!(limit["memory_max_bytes"] == MAX_BYTES, "{limit}");
        }
        drop(drop_in);
        for alloc in [before, alloc, other] {
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

/// The guest has no `man`: a stand-in tells how it is called, and finds the page as `man` would, by section and name.
fn systemctl_help_of_a_scope_opens_the_manual(context: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pages = dir.path().join("man8");
    fs::create_dir(&pages)?;
    fs::write(pages.join("nomad-driver-exec2.8"), MANUAL)?;
    let man = dir.path().join("man");
    let script = format!(
        "#!/bin/sh\necho \"asked for $*\"\ncat {}/man\"$1/$2.$1\"\n",
        dir.path().display()
    );
    fs::write(&man, script)?;
    fs::set_permissions(&man, fs::Permissions::from_mode(0o755))?;
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let path = std::env::var("PATH")?;
        let output = Command::new("systemctl")
            .args(["help", "--no-pager", &scope.unit])
            .env("PATH", format!("{}:{path}", dir.path().display()))
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let documentation = &scope.show(&["Documentation"])?["Documentation"];
        context.note(format!("Documentation={documentation}"));
        ensure!(
            output.status.success()
                && said.starts_with("asked for 8 nomad-driver-exec2\n")
                && said.contains(".SH TASKS IN THE HOST'S TOOLS"),
            "{documentation}: {output:?}"
        );
        alloc.stop().await?;
        agent.finish().await
    })
}
