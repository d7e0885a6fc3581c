//! `run` for people: one command through the very plan, scope and helper of a Nomad task.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::leaks::{Ground, Leak};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case;
use crate::nomad::said;

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_command_runs_as_it_would_by_itself),
    case!(Speed, Ours, options_are_those_of_a_job),
    case!(Limits, Ours, the_kernel_has_the_limits_of_the_options),
    case!(Both, Ours, ctrl_c_stops_the_task),
    case!(Speed, Ours, a_second_ctrl_c_kills_it),
    case!(Speed, Ours, a_mistake_is_told_on_the_terminal),
    case!(Speed, Ours, a_reader_that_goes_away_ends_the_task),
    case!(Speed, Ours, standard_streams_are_those_of_a_task),
    case!(
        Speed,
        Ours,
        a_killed_run_leaves_a_scope_that_systemctl_stops
    ),
];

fn run(context: &Context, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(context.driver());
    command.arg("run").args(arguments).env("LC_ALL", "C");
    Ok(command.stdin(Stdio::null()).output()?)
}

/// Runs a shell's script with options before it.
fn sh(context: &Context, options: &[&str], script: &str) -> Result<Output> {
    run(context, &[options, &["--", "sh", "-c", script]].concat())
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn a_command_runs_as_it_would_by_itself(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let output = sh(context, &[], "echo to stdout; echo to stderr >&2; exit 7")?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    let said = err(&output);
    let (warnings, own): (Vec<&str>, Vec<&str>) = said
        .lines()
        .partition(|line| line.starts_with("nomad-driver-exec2: "));
    ensure!(
        out(&output) == "to stdout\n" && own == ["to stderr"],
        "{output:?}"
    );
    // Of a limit that is not in force, and of nothing else.
    let missing = match context.guest().kind {
        Kind::Nspawn => ["memory.max", "cpu.max", "pids.max"].as_slice(),
        Kind::Qemu => &[],
    };
    ensure!(
        warnings.len() == missing.len()
            && missing
                .iter()
                .all(|file| said.contains(&format!("{file} is not there"))),
        "{output:?}"
    );
    for (script, code) in [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", 143)] {
        let output = sh(context, &[], script)?;
        ensure!(output.status.code() == Some(code), "{script}: {output:?}");
    }
    // More than any pipe holds.
    let output = run(context, &["--", "head", "-c", "3000000", "/dev/zero"])?;
    ensure!(output.stdout.len() == 3_000_000, "{}", output.stdout.len());
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn options_are_those_of_a_job(context: &Context) -> Result<()> {
    let output = run(context, &["--", "cat", "/etc/passwd"])?;
    ensure!(
        output.status.code() == Some(1) && err(&output).contains("Permission denied"),
        "{output:?}"
    );
    let output = run(
        context,
        &["--unveil", "r:/etc/passwd", "--", "cat", "/etc/passwd"],
    )?;
    // And its own entry.
    ensure!(
        output.stdout.starts_with(&fs::read("/etc/passwd")?),
        "{output:?}"
    );

    let who = "id -u; id -G; echo $USER";
    let output = sh(context, &["--user", "root"], who)?;
    ensure!(out(&output) == "0\n0\nroot\n", "{output:?}");
    let output = sh(context, &["--user", "nobody"], who)?;
    ensure!(out(&output) == "65534\n65534\nnobody\n", "{output:?}");
    let output = sh(context, &[], who)?;
    let seen = out(&output);
    let uid: u32 = seen.lines().next().context("a uid")?.parse()?;
    ensure!(
        (80_000..90_000).contains(&uid) && seen == format!("{uid}\n{uid}\nnomad-{uid}\n"),
        "{output:?}"
    );

    let output = sh(
        context,
        &["--env", "A=b c", "--env", "EMPTY="],
        "echo \"$A, ${EMPTY-unset}\"",
    )?;
    ensure!(out(&output) == "b c, \n", "{output:?}");
    Ok(())
}

fn the_kernel_has_the_limits_of_the_options(context: &Context) -> Result<()> {
    let options = ["--memory", "64M", "--cpu", "500"];
    let output = sh(
        context,
        &options,
        "cd /sys/fs/cgroup && cat memory.max cpu.max",
    )?;
    ensure!(out(&output) == "67108864\n50000 100000\n", "{output:?}");
    Ok(())
}

/// A `run` whose command has said that it is up.
fn started(context: &Context, script: &str) -> Result<Child> {
    let mut child = Command::new(context.driver())
        .args(["run", "--", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.as_mut().context("stdout")?;
    // What follows is short enough for the pipe.
    BufReader::with_capacity(3, stdout).read_line(&mut line)?;
    ensure!(line == "up\n", "{line:?}");
    Ok(child)
}

fn interrupt(child: &Child) -> Result<()> {
    Ok(kill(
        Pid::from_raw(child.id().cast_signed()),
        Signal::SIGINT,
    )?)
}

fn ctrl_c_stops_the_task(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    for (script, code) in [
        ("echo up; exec sleep 600", 130),
        (
            "trap 'exit 3' INT; echo up; while :; do sleep 0.05; done",
            3,
        ),
    ] {
        let mut child = started(context, script)?;
        interrupt(&child)?;
        let status = child.wait()?;
        ensure!(status.code() == Some(code), "{script}: {status}");
        let left = ground.left()?;
        ensure!(left.is_empty(), "{script}: {left:?}");
    }
    Ok(())
}

fn a_second_ctrl_c_kills_it(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let mut child = started(
        context,
        "trap '' INT; echo up; while :; do sleep 0.05; done",
    )?;
    let begun = Instant::now();
    interrupt(&child)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(child.try_wait()?.is_none(), "it ended at the first");
    interrupt(&child)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(137), "{status}");
    ensure!(
        begun.elapsed() < Duration::from_millis(4_500),
        "it waited for the kill timeout: {:?}",
        begun.elapsed()
    );
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_mistake_is_told_on_the_terminal(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let cases: [(&[&str], i32, &str); 11] = [
        (
            &["--", "no-such-command"],
            125,
            "command \"no-such-command\": not found in PATH",
        ),
        (
            &["--unveil", "q:/", "--", "true"],
            125,
            "unknown letter 'q'",
        ),
        (
            &["--unveil", "r:/no/such", "--", "true"],
            125,
            "unveil r:/no/such: no such file or directory",
        ),
        (
            &["--user", "no-such-user", "--", "true"],
            125,
            "user \"no-such-user\" does not exist",
        ),
        (
            &["--user", "nomad-0", "--", "true"],
            125,
            "is no dynamic workload user",
        ),
        (&["--memory", "0", "--", "true"], 2, "a size is at least 1M"),
        (
            &["--memory", "1.5G", "--", "true"],
            2,
            "a size is a whole number with K, M or G",
        ),
        (
            &["--env", "=x", "--", "true"],
            2,
            "it is written NAME=VALUE",
        ),
        (
            &["true"],
            125,
            "true: no such job file; a command to run stands after `--`",
        ),
        (&["--task", "web", "--", "true"], 2, "cannot be used with"),
        (&[], 2, "Usage: nomad-driver-exec2 run"),
    ];
    for (arguments, code, sentence) in cases {
        let output = run(context, arguments)?;
        ensure!(
            output.status.code() == Some(code) && err(&output).contains(sentence),
            "{arguments:?}: {output:?}"
        );
        ensure!(output.stdout.is_empty(), "{output:?}");
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(context.driver())
        .args(["run", "--", "true"])
        .output()?;
    ensure!(
        output.status.code() == Some(125) && err(&output).contains("run needs root"),
        "{output:?}"
    );
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// As in `run -- yes | head`.
fn a_reader_that_goes_away_ends_the_task(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let mut child = Command::new(context.driver())
        .args(["run", "--", "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut reader = child.stdout.take().context("a pipe")?;
    std::io::Read::read_exact(&mut reader, &mut [0; 4])?;
    drop(reader);
    let status = child.wait()?;
    // SIGPIPE, or the error that yes makes of it.
    ensure!(matches!(status.code(), Some(141 | 1)), "{status:?}");
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn standard_streams_are_those_of_a_task(context: &Context) -> Result<()> {
    for user in ["root", "nobody"] {
        let output = sh(
            context,
            &["--user", user],
            "cat; echo out >/dev/stdout; echo err >/dev/stderr",
        )?;
        ensure!(output.status.success(), "{user}: {output:?}");
        ensure!(out(&output) == "out\n", "{user}: {output:?}");
        ensure!(err(&output).contains("err\n"), "{user}: {output:?}");
    }
    Ok(())
}

/// Nobody can clean up after SIGKILL. What stays is in systemd's hands, under a name that says what it is.
fn a_killed_run_leaves_a_scope_that_systemctl_stops(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let mut child = started(context, "echo up; exec sleep 600")?;
    // Until its record has a name, the task ends with whoever started it.
    let has_record = |leak: &Leak| matches!(leak, Leak::File(path) if path.starts_with("/run/nomad-driver-exec2/records"));
    let begun = Instant::now();
    while !ground.left()?.iter().any(has_record) {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "it has no record"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()?;
    let left = ground.left()?;
    let units: Vec<&String> = left
        .iter()
        .filter_map(|leak| match leak {
            Leak::Unit(unit) => Some(unit),
            _ => None,
        })
        .collect();
    ensure!(
        units.len() == 1 && units[0].starts_with("exec2-sh-"),
        "{left:?}"
    );
    said("systemctl", &["stop", units[0]])?;
    let left = ground.left()?;
    ensure!(
        left.iter()
            .all(|leak| matches!(leak, Leak::Mount { .. } | Leak::File(_))),
        "{left:?}"
    );
    for leak in &left {
        context.note(format!("stays: {leak}"));
    }
    // Mounts before the directories they are on.
    left.iter()
        .rev()
        .filter(|leak| matches!(leak, Leak::Mount { .. }))
        .for_each(Leak::clear);
    left.iter().for_each(Leak::clear);
    Ok(())
}
