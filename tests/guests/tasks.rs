//! `tasks` for people: it tells what runs and what is left over, as the kernel and the records have it, and removes nothing.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context, Kind};
use harness::leaks::Ground;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_exec2::cli::tasks::COLUMNS;
use nomad_driver_exec2::record;
use serde_json::Value;

use crate::case;
use crate::nomad::{Job, Scope, agent, said, until};

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_running_task_is_listed_with_what_it_uses_and_may_use
    ),
    case!(Limits, Ours, the_throttling_that_is_listed_is_the_kernels),
    case!(Speed, Ours, an_end_is_listed_until_nomad_collects_it),
    case!(Speed, Ours, what_is_left_over_is_listed_and_left_alone),
    case!(Speed, Ours, a_run_is_listed_beside_a_task),
    case!(Speed, Ours, without_a_bus_units_have_their_names),
    case!(Speed, Ours, only_root_is_told_and_nothing_is_no_failure),
    case!(Speed, Ours, a_watch_goes_on_until_it_is_stopped),
    case!(Speed, Ours, colours_are_for_terminals_that_want_them),
    case!(Speed, Ours, a_watched_terminal_gets_what_it_has_room_for),
];

const RECORDS: &str = "/run/nomad-driver-exec2/records";

fn tasks(context: &Context, arguments: &[&str]) -> Command {
    let mut command = Command::new(context.driver());
    command
        .arg("tasks")
        .args(arguments)
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
    command
}

/// What is written to stdout by one that has nothing to complain of.
fn listed(context: &Context, arguments: &[&str]) -> Result<String> {
    let output = tasks(context, arguments).output()?;
    ensure!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn objects(json: &str) -> Result<Vec<Value>> {
    match serde_json::from_str(json)? {
        Value::Array(objects) => Ok(objects),
        other => bail!("no array: {other}"),
    }
}

fn find(objects: &[Value], unit: &str) -> Result<Value> {
    let mut found = objects.iter().filter(|object| object["unit"] == unit);
    let object = found
        .next()
        .with_context(|| format!("no {unit} in {objects:?}"))?;
    ensure!(found.next().is_none(), "{unit} is there twice");
    Ok(object.clone())
}

/// The object of a unit, and its line in the table.
fn told(context: &Context, unit: &str) -> Result<(Value, String)> {
    let object = find(&objects(&listed(context, &["--json"])?)?, unit)?;
    let table = listed(context, &[])?;
    let mut lines = table.lines();
    let header: Vec<&str> = lines
        .next()
        .context("a header")?
        .split_whitespace()
        .collect();
    ensure!(header == COLUMNS, "{table}");
    let line = lines
        .find(|line| line.starts_with(unit))
        .with_context(|| format!("no {unit} in {table}"))?;
    Ok((object, line.to_owned()))
}

fn a_running_task_is_listed_with_what_it_uses_and_may_use(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("echo up; sleep 600 & wait").resources("cpu = 500\n memory = 64");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let (object, line) = told(context, &scope.unit)?;
        context.note(&line);
        ensure!(
            object["state"] == "running" && object["exit_code"].is_null(),
            "{object}"
        );
        ensure!(object["task"] == "case/g/t", "{object}");
        ensure!(object["alloc"] == alloc.id()[..8], "{object}");
        ensure!(object["pid"] == scope.main()?, "{object}");
        ensure!(object["age_sec"].as_u64() < Some(60), "{object}");
        ensure!(object["cpu_usec"].as_u64() > Some(0), "{object}");
        let owner = object["owner"].as_str().context("an owner")?;
        ensure!(owner.starts_with("node ") && owner.len() == 41, "{object}");
        let description = scope.show(&["Description"])?;
        ensure!(object["description"] == description["Description"].as_str());
        let words: Vec<&str> = line.split_whitespace().collect();
        let pid = scope.main()?.to_string();
        ensure!(
            words[1..5] == ["running", "case/g/t", &alloc.id()[..8], &pid],
            "{line}"
        );
        if context.guest().kind == Kind::Qemu {
            let quota = scope.file("cpu.max")?;
            ensure!(object["memory_max_bytes"] == 64 << 20, "{object}");
            ensure!(object["memory_bytes"].as_u64() > Some(0), "{object}");
            let per_sec = object["cpu_quota_usec_per_sec"].as_u64().context("quota")?;
            ensure!(
                quota == format!("{} 100000", per_sec / 10),
                "{quota}: {object}"
            );
            ensure!(words[6].ends_with("/64M"), "{line}");
            ensure!(
                words[7].ends_with(&format!("/{}%", per_sec / 10_000)),
                "{line}"
            );
        } else {
            ensure!(object["memory_max_bytes"].is_null(), "{object}");
            ensure!(words[6] == "-", "{line}");
        }
        ensure!(task.exit().is_none(), "it was touched");
        alloc.stop().await?;
        agent.finish().await
    })
}

fn the_throttling_that_is_listed_is_the_kernels(context: &Context) -> Result<()> {
    const FIELDS: [(&str, &str); 3] = [
        ("cpu_periods", "nr_periods"),
        ("cpu_throttled_periods", "nr_throttled"),
        ("cpu_throttled_usec", "throttled_usec"),
    ];
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("while :; do :; done").resources("cpu = 200\n memory = 64");
        let alloc = agent.run(&job.text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let kernels = || -> Result<[u64; 3]> {
            let stat = scope.file("cpu.stat")?;
            let mut values = [0; 3];
            for (value, (_, name)) in values.iter_mut().zip(FIELDS) {
                let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
                let line = lines.find(|(key, _)| *key == name);
                *value = line.context("cpu.stat")?.1.parse()?;
            }
            Ok(values)
        };
        until("it is throttled", || (kernels().ok()?[1] > 5).then_some(())).await?;
        // Once while it runs, and once while the numbers stand still.
        for stands_still in [false, true] {
            if stands_still {
                said("systemctl", &["freeze", &scope.unit])?;
                // The kernel still counts the periods that it had begun, of 100 ms each.
                let mut last = None;
                until("the kernel counts no more", || {
                    let now = kernels().ok()?;
                    std::thread::sleep(Duration::from_millis(300));
                    (last.replace(now) == Some(now)).then_some(())
                })
                .await?;
            }
            let before = kernels()?;
            let (object, line) = told(context, &scope.unit)?;
            let after = kernels()?;
            context.note(&line);
            for (index, (key, _)) in FIELDS.into_iter().enumerate() {
                let told = object[key].as_u64().with_context(|| format!("{object}"))?;
                ensure!(
                    told > 0 && (before[index]..=after[index]).contains(&told),
                    "{key} is {told}, the kernel's {before:?} to {after:?}"
                );
            }
            if stands_still {
                ensure!(before == after && object["state"] == "frozen", "{object}");
                let [periods, throttled, _] = after;
                let shown = line.split_whitespace().nth(8).context("THROTTLED")?;
                let percent = (throttled * 100).div_ceil(periods);
                ensure!(shown == format!("{percent}%"), "{line}: {after:?}");
            }
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

fn an_end_is_listed_until_nomad_collects_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let mut allocs = Vec::new();
        for end in ["exit 9", "kill -QUIT $$"] {
            let script = format!("while ! [ -e local/go ]; do sleep 0.05; done; {end}");
            allocs.push(agent.run(&Job::shell(&script).text()).await?);
        }
        let mut scopes = Vec::new();
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        for alloc in &allocs {
            let task = alloc.only_task()?;
            fs::write(task.paths().local.join("go"), "")?;
            let scope = Scope::of(task)?;
            until("the scope is empty", || (!scope.dir.exists()).then_some(())).await?;
            scopes.push(scope);
        }
        for (scope, code, signal, shown) in [
            (&scopes[0], 9, Value::Null, "ended (9)"),
            (&scopes[1], 131, "SIGQUIT".into(), "ended (SIGQUIT)"),
        ] {
            let (object, line) = told(context, &scope.unit)?;
            context.note(&line);
            ensure!(object["state"] == "ended", "{object}");
            ensure!(object["exit_code"] == code && object["exit_signal"] == signal);
            ensure!(object["pid"].is_null() && object["task"] == "t", "{object}");
            ensure!(object["age_sec"].as_u64() < Some(60), "{object}");
            ensure!(line.contains(shown), "{line}");
        }
        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        let exit = allocs[0].only_task()?.wait().await?;
        ensure!(exit.code == 9, "{exit:?}");
        for alloc in &allocs {
            alloc.stop().await?;
        }
        let output = tasks(context, &["--json"]).output()?;
        ensure!(output.stdout == b"[]\n", "{output:?}");
        agent.finish().await
    })
}

/// A scope that nobody has a record of, and a record of which there is no scope.
#[derive(Debug)]
struct Planted {
    scope: Child,
    orphan: String,
    record: PathBuf,
}

impl Planted {
    const LEFTOVER: &str = "exec2-gone-0a1b2c3d-0badcafe.scope";

    fn new(description: &str) -> Result<Planted> {
        let orphan = "exec2-t-12345678-0badcafe.scope";
        let scope = Command::new("systemd-run")
            .args(["--scope", "--slice=exec2-share.slice"])
            .arg(format!("--unit={orphan}"))
            .arg(format!("--description={description}"))
            .args(["sleep", "600"])
            .stderr(Stdio::null())
            .spawn()?;
        fs::create_dir_all(RECORDS)?;
        let record = Path::new(RECORDS).join(Planted::LEFTOVER);
        fs::write(&record, record::open())?;
        Ok(Planted {
            scope,
            orphan: orphan.into(),
            record,
        })
    }

    fn dir(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/exec2.slice/exec2-share.slice").join(&self.orphan)
    }

    async fn is_up(&self) -> Result<()> {
        // systemd-run is in the scope before it becomes the command.
        let name = format!("/proc/{}/comm", self.scope.id());
        let is_up = || fs::read_to_string(&name).is_ok_and(|name| name == "sleep\n");
        until("the planted scope is up", || is_up().then_some(())).await
    }

    fn clear(mut self) -> Result<()> {
        fs::remove_file(&self.record)?;
        said("systemctl", &["stop", &self.orphan])?;
        self.scope.wait()?;
        Ok(())
    }
}

fn what_is_left_over_is_listed_and_left_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut planted =
            Planted::new("Nomad task t\u{1b}[2J of default/job/\u{202e}g (alloc 12345678)")?;
        planted.is_up().await?;
        // What is no name of ours is not ours.
        fs::write(Path::new(RECORDS).join("x\ny"), "")?;
        let ground = Ground::survey()?;
        let owner = "node 8f3c2a10-1111-2222-3333-444455556666";
        rustix::fs::setxattr(
            planted.dir(),
            "trusted.nomad-driver-exec2.owner",
            owner.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )?;

        let (object, line) = told(context, &planted.orphan)?;
        context.note(&line);
        ensure!(
            object["state"] == "orphan" && object["pid"].is_null(),
            "{object}"
        );
        ensure!(object["task"] == "job/<U+202E>g/t<U+001B>[2J", "{object}");
        ensure!(object["owner"] == owner, "{object}");
        ensure!(line.ends_with("node 8f3c2a10"), "{line}");
        let (object, line) = told(context, Planted::LEFTOVER)?;
        context.note(&line);
        ensure!(
            object["state"] == "leftover" && object["alloc"] == "0a1b2c3d",
            "{object}"
        );
        ensure!(object["owner"].is_null() && line.ends_with('-'), "{object}");
        ensure!(objects(&listed(context, &["--json"])?)?.len() == 2);

        ensure!(planted.scope.try_wait()?.is_none(), "the orphan was ended");
        ensure!(planted.record.exists(), "the record was removed");
        ensure!(ground.left()?.is_empty() && Ground::survey()?.left()?.is_empty());
        fs::remove_file(Path::new(RECORDS).join("x\ny"))?;
        planted.clear()
    })
}

fn a_run_is_listed_beside_a_task(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let mut run = Command::new(context.driver())
            .args(["run", "--", "sh", "-c", "echo up; exec sleep 600"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(run.stdout.as_mut().context("stdout")?).read_line(&mut line)?;
        ensure!(line == "up\n", "{line:?}");
        // The command may speak before its start is done.
        let all_run = || {
            let objects = objects(&listed(context, &["--json"]).ok()?).ok()?;
            let all = objects.iter().all(|object| object["state"] == "running");
            (all && objects.len() == 2).then_some(objects)
        };
        let objects = until("both are running", all_run).await?;
        ensure!(find(&objects, &scope.unit)?["task"] == "case/g/t");
        let of_run = objects.iter().find(|object| object["task"] == "run/run/sh");
        let of_run = of_run.with_context(|| format!("{objects:?}"))?;
        ensure!(of_run["owner"] == "run", "{of_run}");
        kill(Pid::from_raw(run.id().cast_signed()), Signal::SIGINT)?;
        run.wait()?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn without_a_bus_units_have_their_names(context: &Context) -> Result<()> {
    context.block_on(async {
        let planted = Planted::new("Nomad task t of default/job/g (alloc 12345678)")?;
        planted.is_up().await?;
        let output = tasks(context, &["--json"])
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/socket")
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        let warning = String::from_utf8_lossy(&output.stderr);
        ensure!(
            warning
                .starts_with("nomad-driver-exec2: systemd cannot be reached on the system bus: ")
                && warning
                    .trim_end()
                    .ends_with("; tasks have the names of their units here")
                && warning.lines().count() == 1,
            "{warning}"
        );
        let objects = objects(std::str::from_utf8(&output.stdout)?)?;
        let object = find(&objects, &planted.orphan)?;
        ensure!(
            object["task"] == "t" && object["alloc"] == "12345678",
            "{object}"
        );
        ensure!(object["description"].is_null(), "{object}");
        planted.clear()
    })
}

fn only_root_is_told_and_nothing_is_no_failure(context: &Context) -> Result<()> {
    let output: Output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(context.driver())
        .arg("tasks")
        .output()?;
    let sentence =
        "nomad-driver-exec2: tasks needs root: what it reads is root's alone; try sudo\n";
    ensure!(
        output.status.code() == Some(125)
            && output.stdout.is_empty()
            && output.stderr == sentence.as_bytes(),
        "{output:?}"
    );
    let nothing = "nomad-driver-exec2: no task is here, and nothing is left over of one\n";
    for (arguments, stdout) in [([].as_slice(), ""), (&["--json"], "[]\n")] {
        let output = tasks(context, arguments).output()?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(output.stdout == stdout.as_bytes(), "{output:?}");
        ensure!(output.stderr == nothing.as_bytes(), "{output:?}");
    }
    Ok(())
}

fn a_watch_goes_on_until_it_is_stopped(context: &Context) -> Result<()> {
    let planted = Planted::new("x")?;
    let mut watch = tasks(context, &["--json", "--watch=1"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("stdout")?).lines();
    for _ in 0..3 {
        let line = lines.next().context("no more lines")??;
        find(&objects(&line)?, Planted::LEFTOVER)?;
    }
    kill(Pid::from_raw(watch.id().cast_signed()), Signal::SIGINT)?;
    let status = watch.wait()?;
    ensure!(status.success(), "{status:?}");
    // A reader that has seen enough ends it, too.
    let mut watch = tasks(context, &["--watch=1"])
        .stdout(Stdio::piped())
        .spawn()?;
    drop(watch.stdout.take());
    let status = watch.wait()?;
    ensure!(status.success(), "{status:?}");
    planted.clear()
}

/// What is written to a terminal of a size, or of one that tells none, and how it ended.
pub fn drawn(mut command: Command, size: Option<&Winsize>) -> Result<(String, ExitStatus)> {
    let pty = openpty(size, None)?;
    command.stdout(pty.slave.as_fd().try_clone_to_owned()?);
    let mut child = command.spawn()?;
    drop((command, pty.slave));
    let mut text = Vec::new();
    // EIO is a terminal's end.
    let _ = fs::File::from(pty.master).read_to_end(&mut text);
    Ok((String::from_utf8(text)?, child.wait()?))
}

/// Of one that has nothing to complain of.
fn well_drawn(command: Command, size: Option<&Winsize>) -> Result<String> {
    let (text, status) = drawn(command, size)?;
    ensure!(status.success(), "{status}: {text:?}");
    Ok(text)
}

fn colours_are_for_terminals_that_want_them(context: &Context) -> Result<()> {
    let planted = Planted::new("x")?;
    let red = "\x1b[31mleftover  \x1b[0m";
    let text = well_drawn(tasks(context, &[]), None)?;
    ensure!(text.contains(red), "{text:?}");
    let mut plain = tasks(context, &[]);
    plain.env("NO_COLOR", "1");
    let text = well_drawn(plain, None)?;
    ensure!(
        text.contains("leftover") && !text.contains('\x1b'),
        "{text:?}"
    );
    ensure!(!listed(context, &[])?.contains('\x1b'));

    let text = well_drawn(watch(context), None)?;
    let frames: Vec<&str> = text.split("\x1b[H").skip(1).collect();
    ensure!(frames.len() >= 2, "{text:?}");
    let end = "\x1b[K\r\n\x1b[?7h\x1b[J";
    ensure!(
        frames
            .iter()
            .all(|frame| frame.contains(red) && frame.ends_with(end)),
        "{frames:?}"
    );
    planted.clear()
}

/// Ends as by Ctrl-C when it has been drawn more than twice, or twice where a start takes seconds.
fn watch(context: &Context) -> Command {
    let mut watch = Command::new("timeout");
    watch
        .args(["--signal=INT", "--preserve-status", "6"])
        .arg(context.driver())
        .args(["tasks", "--watch=1"])
        .env_remove("NO_COLOR");
    watch
}

fn a_watched_terminal_gets_what_it_has_room_for(context: &Context) -> Result<()> {
    let planted = Planted::new("x")?;
    let more: Vec<PathBuf> = (0..5)
        .map(|number| Path::new(RECORDS).join(format!("exec2-gone-0a1b2c3d-0000000{number}.scope")))
        .collect();
    for record in &more {
        fs::write(record, record::open())?;
    }
    let size = Winsize {
        ws_row: 6,
        ws_col: 41,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let mut plain = watch(context);
    plain.env("NO_COLOR", "1");
    let text = well_drawn(plain, Some(&size))?;
    let frames: Vec<&str> = text.split("\x1b[H").skip(1).collect();
    ensure!(frames.len() >= 2, "{text:?}");
    for frame in frames {
        let frame = frame.replace("\x1b[?7l", "").replace("\x1b[?7h\x1b[J", "");
        let lines: Vec<&str> = frame.split_terminator("\x1b[K\r\n").collect();
        // Seven tasks; the last row is the cursor's, and the last column stays free.
        ensure!(lines.len() == 5, "{lines:?}");
        ensure!(lines[4] == "4 more have no room here", "{lines:?}");
        ensure!(lines[0].starts_with("UNIT "), "{lines:?}");
        ensure!(lines.iter().all(|line| line.len() <= 40), "{lines:?}");
        ensure!(lines[1].len() == 40, "{lines:?}");
    }
    // One that is no terminal gets all of it.
    let table = listed(context, &[])?;
    ensure!(table.lines().count() == 8, "{table}");
    ensure!(table.lines().all(|line| line.len() > 40), "{table}");
    for record in more {
        fs::remove_file(record)?;
    }
    planted.clear()
}
