//! What README.md and the manual page show of a terminal is what a host shows: every transcript is typed again.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation};
use harness::transcript::{Transcript, mask, transcripts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case;
use crate::nomad::{Scope, agent, said, until};

pub const CASES: &[Case] = &[
    case!(
        Limits,
        Ours,
        a_task_is_in_the_hosts_tools_as_the_manual_shows
    ),
    case!(Limits, Ours, tasks_lists_what_the_manual_shows),
    case!(Limits, Ours, a_run_prints_what_the_manual_shows),
    case!(Limits, Ours, learning_prints_what_the_manual_shows),
    case!(
        ProgramLimits,
        Ours,
        check_tells_of_host_and_job_what_the_manual_shows
    ),
];

const README: &str = include_str!("../../README.md");
const SERVICE: &str = include_str!("../nomad/service.nomad.hcl");
const EXIT7: &str = include_str!("../nomad/exit7.nomad.hcl");
const NGINX: &str = include_str!("../nomad/nginx.nomad.hcl");
const AGENT_CONFIG: &str = "/etc/nomad.d/nomad.hcl";
const PLUGINS: &str = "/opt/nomad/plugins";
/// Has run for a while, and then exits with 3.
const DUMP: &str = r#"
job "dump" {
  type = "batch"
  group "dump" {
    task "dump" {
      driver = "exec2"
      config {
        command = "/bin/sh"
        args    = ["-c", "until [ -e local/go ]; do sleep 0.05; done; exit 3"]
      }
    }
  }
}
"#;

/// Between the outputs of two commands.
const END: &str = "--8<--";

fn transcript(name: &str) -> Result<Transcript> {
    let found = transcripts(README)?;
    found
        .into_iter()
        .find(|transcript| transcript.name == name)
        .with_context(|| format!("README.md has no transcript {name}"))
}

/// Types every command in one shell, and compares what it prints, until it is what is shown: a `sleep 1` may be between two.
async fn compare(context: &Context, name: &str, units: &[String]) -> Result<()> {
    let transcript = transcript(name)?;
    let shown = transcript.shown()?;
    ensure!(!shown.is_empty(), "{name} shows nothing");
    let mut script = String::from("status=0\n");
    for one in &shown {
        let command = &one.command;
        // Each command finds in `$?` how the one before it ended.
        script += &format!(
            "( exit $status )\n{}\nstatus=$?; echo '{END}'\n",
            actual(command, units)
        );
    }
    let mut last = String::new();
    let type_it = || {
        let printed = typed(context, &script).ok()?;
        let outputs: Vec<&str> = printed.split(&format!("{END}\n")).collect();
        let is_same = outputs.len() == shown.len() + 1
            && shown
                .iter()
                .zip(&outputs)
                .all(|(one, output)| mask(&one.output) == mask(output));
        last = printed;
        is_same.then_some(())
    };
    if until("it prints that", type_it).await.is_err() {
        bail!(
            "{name}: README.md shows\n{}\nand the host prints\n{last}",
            transcript.text
        );
    }
    Ok(())
}

/// The unit of the same task, for the one that is written.
fn actual(command: &str, units: &[String]) -> String {
    let words = command.split(' ').map(|word| {
        let task = |unit: &str| {
            let stem = unit.strip_suffix(".scope")?.rsplitn(3, '-').nth(2)?;
            Some(stem.to_owned())
        };
        let unit =
            task(word).and_then(|of| units.iter().find(|unit| task(unit) == Some(of.clone())));
        unit.map_or(word, String::as_str)
    });
    words.collect::<Vec<_>>().join(" ")
}

fn typed(context: &Context, script: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    fs::create_dir_all(dir.path().join("tests/nomad"))?;
    fs::write(dir.path().join("tests/nomad/exit7.nomad.hcl"), EXIT7)?;
    fs::write(dir.path().join("tests/nomad/nginx.nomad.hcl"), NGINX)?;
    symlink(context.driver(), dir.path().join("nomad-driver-exec2"))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .current_dir(dir.path())
        .env("PATH", format!("{}:{path}", dir.path().display()))
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()?;
    Ok(String::from_utf8(output.stdout)?)
}

async fn service(agent: &Agent) -> Result<(Allocation, String)> {
    let alloc = agent.run(SERVICE).await?;
    let unit = Scope::of(alloc.only_task()?)?.unit;
    until("it serves", || {
        let printed = alloc.stdout("web").ok()?;
        printed.starts_with("serving").then_some(())
    })
    .await?;
    Ok((alloc, unit))
}

fn a_task_is_in_the_hosts_tools_as_the_manual_shows(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        // systemd keeps a slice for as long as nobody stops it: the manual shows a host without reserved cores.
        let _ = said("systemctl", &["stop", "exec2-reserve.slice"]);
        let (alloc, unit) = service(&agent).await?;
        compare(context, "service", &[unit]).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn tasks_lists_what_the_manual_shows(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let dump = agent.run(DUMP).await?;
        let (web, _) = service(&agent).await?;
        let mut run = run_of_sleep(context)?;
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        let task = dump.only_task()?;
        let scope = Scope::of(task)?;
        fs::write(task.paths().local.join("go"), "")?;
        until("it has ended", || (!scope.dir.exists()).then_some(())).await?;
        let compared = compare(context, "tasks", &[]).await;
        kill(Pid::from_raw(run.id().try_into()?), Signal::SIGINT)?;
        run.wait()?;
        compared?;
        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        dump.stop().await?;
        web.stop().await?;
        agent.finish().await
    })
}

fn run_of_sleep(context: &Context) -> Result<Child> {
    let run = Command::new(context.driver())
        .args(["run", "--memory=64M", "--cpu=500", "--", "sleep", "600"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    Ok(run)
}

fn a_run_prints_what_the_manual_shows(context: &Context) -> Result<()> {
    ensure!(!Path::new("/nope").exists());
    context.block_on(compare(context, "run", &[]))
}

fn learning_prints_what_the_manual_shows(context: &Context) -> Result<()> {
    context.block_on(compare(context, "learn", &[]))
}

fn check_tells_of_host_and_job_what_the_manual_shows(context: &Context) -> Result<()> {
    fs::create_dir_all(PLUGINS)?;
    fs::create_dir_all(Path::new(AGENT_CONFIG).parent().context("a parent")?)?;
    let plugin = Path::new(PLUGINS).join("nomad-driver-exec2");
    symlink(context.driver(), &plugin)?;
    let compared = context.block_on(async {
        configure(r#"["r:/srv/shared"]"#)?;
        compare(context, "check", &[]).await?;
        configure(r#"["r:/etc/ssl/openssl.cnf"]"#)?;
        compare(context, "check-job", &[]).await
    });
    fs::remove_file(plugin)?;
    fs::remove_file(AGENT_CONFIG)?;
    compared
}

fn configure(unveil_paths: &str) -> Result<()> {
    let text = format!(
        r#"plugin_dir = "{PLUGINS}"

client {{
  enabled           = true
  cpu_total_compute = 2000
}}

plugin "nomad-driver-exec2" {{
  config {{
    unveil_by_task = true
    unveil_paths   = {unveil_paths}
  }}
}}
"#
    );
    Ok(fs::write(AGENT_CONFIG, text)?)
}
