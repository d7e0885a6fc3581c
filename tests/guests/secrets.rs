//! What one task is told, and what the plugin alone knows, as words that occur nowhere else, searched for wherever others can look.
//! That a task cannot open its supervisor's memory is a case of `view`.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation, Config};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_exec2::plan::steps::Step;

use crate::calls::{Calls, Place};
use crate::case;
use crate::exec::Talk;
use crate::nomad::{Job, Scope, proc_file, refusal, said, status, until};
use crate::steps::Breakpoints;

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_secret_is_where_its_owner_is_and_nowhere_else),
    case!(Speed, Ours, an_exit_record_holds_no_secret),
    case!(Limits, Ours, nothing_of_ours_leaves_a_core),
];

/// Of a file below /run; the journal's are the largest.
const MAX_FILE_BYTES: u64 = 32 << 20;

fn canary(name: &str) -> Result<String> {
    let random = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(format!("canary-{name}-{}", random.trim()))
}

struct Canaries {
    /// In the task's environment.
    env: String,
    /// In a file of its secrets.
    file: String,
    /// Typed into a session, and in the environment of its command.
    session: String,
    /// In the agent's environment, and kept from tasks by Nomad.
    plugin: String,
}

impl Canaries {
    fn new() -> Result<Canaries> {
        Ok(Canaries {
            env: canary("env")?,
            file: canary("file")?,
            session: canary("session")?,
            plugin: canary("plugin")?,
        })
    }

    fn ensure_none_in(&self, what: &str, bytes: &[u8]) -> Result<()> {
        for canary in [&self.env, &self.file, &self.session, &self.plugin] {
            ensure!(!holds(bytes, canary), "{canary} is in {what}");
        }
        Ok(())
    }

    fn job(&self, script: &str) -> Job {
        Job::shell(script)
            .task(&format!("env {{\n EXEC2_CANARY = \"{}\"\n }}", self.env))
            .task(&format!(
                "template {{\n data = \"{}\\n\"\n destination = \"secrets/file\"\n }}",
                self.file
            ))
    }
}

fn holds(bytes: &[u8], word: &str) -> bool {
    bytes
        .windows(word.len())
        .any(|window| window == word.as_bytes())
}

fn a_secret_is_where_its_owner_is_and_nowhere_else(context: &Context) -> Result<()> {
    let canaries = Canaries::new()?;
    context.block_on(async {
        let config = Config {
            plugin: "unveil_by_task = true".into(),
            env: vec![("VAULT_TOKEN".into(), canaries.plugin.clone())],
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        for user in ["root", "nobody"] {
            let job = canaries.job(
                "grep -c canary- secrets/file
                 cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -a canary-
                 echo up; exec sleep 600",
            );
            let alloc = agent.run(&job.user(user).unveil(&["r:/proc"]).text()).await?;
            until("the task is up", || {
                alloc.stdout("t").ok()?.ends_with("up\n").then_some(())
            })
            .await?;
            look_inside(&canaries, &alloc)?;
            let session = session(&canaries, &agent, &alloc).await?;
            look_at_processes(&canaries, &agent, &alloc).await?;
            look_at_files(&canaries, &alloc)?;
            look_from_a_neighbour(&canaries, &agent, &alloc).await?;
            drop(session);
            alloc.stop().await?;
        }
        let refused = refusal(&agent, &canaries.job("true").unveil(&["r:/nope"])).await?;
        canaries.ensure_none_in("a refusal", refused.message.as_bytes())?;
        look_at_logs(&canaries, &agent)?;
        agent.finish().await
    })
}

/// The task has both of its own, in its processes, and not the plugin's.
fn look_inside(canaries: &Canaries, alloc: &Allocation) -> Result<()> {
    let seen = alloc.stdout("t")?;
    ensure!(
        seen.starts_with("1\n") && seen.contains(&canaries.env),
        "{seen}"
    );
    ensure!(!seen.contains(&canaries.plugin), "{seen}");
    Ok(())
}

/// Open until it is dropped. Its command has what the task has, and what was typed.
async fn session(canaries: &Canaries, agent: &Agent, alloc: &Allocation) -> Result<Talk> {
    let script = "read word; export EXEC2_SESSION=\"$word\"; echo ready; exec sleep 600";
    let mut talk = Talk::shell(agent, alloc.only_task()?, script).await?;
    talk.send(format!("{}\n", canaries.session).as_bytes())
        .await?;
    talk.says("ready").await?;
    let scope = Scope::of(alloc.only_task()?)?;
    until("the command has it", || {
        let environ = fs::read(format!("/proc/{}/environ", in_session(&scope)?)).ok()?;
        holds(&environ, &canaries.session).then_some(())
    })
    .await?;
    Ok(talk)
}

/// The one process of the task's one session.
fn in_session(scope: &Scope) -> Option<u32> {
    let pids = fs::read_to_string(scope.dir.join("exec-1/cgroup.procs")).ok()?;
    pids.trim_end().parse().ok()
}

fn pids() -> Result<Vec<u32>> {
    let names = fs::read_dir("/proc")?
        .flatten()
        .map(|entry| entry.file_name());
    Ok(names
        .filter_map(|name| name.to_string_lossy().parse().ok())
        .collect())
}

/// Processes of the driver's that have this name.
fn named(name: &str) -> Result<Vec<u32>> {
    let mut pids = pids()?;
    pids.retain(|pid| proc_file(*pid, "comm").is_ok_and(|comm| comm == name));
    Ok(pids)
}

async fn look_at_processes(canaries: &Canaries, agent: &Agent, alloc: &Allocation) -> Result<()> {
    let scope = Scope::of(alloc.only_task()?)?;
    let (supervisor, main) = (scope.supervisor()?, scope.main()?);
    let session = in_session(&scope).context("a session")?;
    let plugin = agent.plugin_pid().await.context("the plugin runs")?;
    for name in ["exec2-session", "exec2-idle"] {
        ensure!(named(name)?.len() == 1, "{name}: {:?}", named(name)?);
    }
    let (mut told, mut typed, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for pid in pids()? {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        canaries.ensure_none_in(&format!("the arguments of {pid}"), &read("cmdline"))?;
        let environ = read("environ");
        ensure!(!holds(&environ, &canaries.file), "the environment of {pid}");
        for (canary, owners) in [
            (&canaries.env, &mut told),
            (&canaries.session, &mut typed),
            (&canaries.plugin, &mut own),
        ] {
            if holds(&environ, canary) {
                owners.push(pid);
            }
        }
    }
    let mut of_the_task = vec![main, session];
    of_the_task.sort_unstable();
    told.sort_unstable();
    ensure!(told == of_the_task, "{told:?}, not {of_the_task:?}");
    ensure!(typed == [session], "{typed:?}, not {session}");
    ensure!(own == [plugin], "{own:?}, not {plugin}");
    ensure!(fs::read(format!("/proc/{supervisor}/environ"))?.is_empty());
    Ok(())
}

fn look_at_files(canaries: &Canaries, alloc: &Allocation) -> Result<()> {
    let scope = Scope::of(alloc.only_task()?)?;
    let units = said("systemctl", &["show", "--all", "*"])?;
    ensure!(
        units.contains(&format!("Id={}", scope.unit)),
        "no scope in {units}"
    );
    canaries.ensure_none_in("the properties of units", units.as_bytes())?;
    let handle = alloc.only_task()?.handle().context("a handle")?;
    ensure!(!handle.driver_state.is_empty());
    canaries.ensure_none_in("the driver's state", &handle.driver_state)?;
    let secrets = alloc.only_task()?.paths().root.join("secrets");
    let mut count = 0;
    let device = fs::metadata("/run")?.dev();
    walk(Path::new("/run"), device, &mut |path, bytes| {
        count += 1;
        if path.starts_with(&secrets) {
            return Ok(());
        }
        canaries.ensure_none_in(&path.display().to_string(), bytes)
    })?;
    ensure!(count > 5, "{count} files below /run");
    let record = Path::new("/run/nomad-driver-exec2/records").join(&scope.unit);
    ensure!(record.exists(), "{} was not looked at", record.display());
    Ok(())
}

fn walk(dir: &Path, device: u64, look: &mut dyn FnMut(&Path, &[u8]) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        // Others make and remove files meanwhile.
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        if meta.is_dir() && meta.dev() == device {
            walk(&path, device, look)?;
        } else if meta.is_file() {
            let mut bytes = Vec::new();
            if let Ok(file) = fs::File::open(&path) {
                let _ = file.take(MAX_FILE_BYTES).read_to_end(&mut bytes);
            }
            look(&path, &bytes)?;
        }
    }
    Ok(())
}

/// As root, with all of /proc and the very file unveiled.
async fn look_from_a_neighbour(
    canaries: &Canaries,
    agent: &Agent,
    alloc: &Allocation,
) -> Result<()> {
    let task = alloc.only_task()?;
    let file = task.paths().root.join("secrets/file");
    ensure!(fs::read_to_string(&file)?.contains(&canaries.file));
    let main = Scope::of(task)?.main()?;
    let script = format!(
        "export LC_ALL=C; cat {file} /proc/{main}/environ 2>&1
         cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -ac EXEC2_NEIGHBOUR; echo end",
        file = file.display()
    );
    let job = Job::shell(&script)
        .user("root")
        .task("env {\n EXEC2_NEIGHBOUR = \"1\"\n }")
        .unveil(&["r:/proc", &format!("r:{}", task.paths().root.display())]);
    let neighbour = agent.run(&job.text()).await?;
    neighbour.only_task()?.wait().await?;
    neighbour.stop().await?;
    let seen = neighbour.stdout("t")?;
    ensure!(
        seen.ends_with("end\n") && seen.contains("No such file"),
        "{seen}"
    );
    canaries.ensure_none_in("a neighbour's sight", seen.as_bytes())
}

/// At every level: it is the agent that leaves lines out.
fn look_at_logs(canaries: &Canaries, agent: &Agent) -> Result<()> {
    let log = format!("{:?}", agent.log());
    ensure!(log.contains("task started"), "{log}");
    canaries.ensure_none_in("the log", log.as_bytes())?;
    said("journalctl", &["--sync"])?;
    let journal = Command::new("journalctl")
        .args(["--all", "-o", "export"])
        .output()?;
    ensure!(holds(&journal.stdout, "nomad-driver-exec2"));
    canaries.ensure_none_in("the journal", &journal.stdout)
}

/// It lies there until Nomad has heard of the end.
fn an_exit_record_holds_no_secret(context: &Context) -> Result<()> {
    let canaries = Canaries::new()?;
    context.block_on(async {
        let agent = crate::nomad::agent(context).await?;
        let place = Place::new(&agent).await?;
        let calls = Calls::of(&agent)?;
        let mut config = place.task("test -n \"$EXEC2_CANARY\" && sleep 0.5 && exit 43");
        config
            .env
            .insert("EXEC2_CANARY".into(), canaries.env.clone());
        let id = config.id.clone();
        calls.start(config).await?;
        let record = Path::new("/run/nomad-driver-exec2/records").join(Scope::of_id(&id)?.unit);
        let before = fs::read(&record)?;
        let exit = calls.end(&id).await?;
        ensure!(exit.code == 43, "{exit:?}");
        let after = fs::read(&record)?;
        ensure!(before != after, "the end is not in it: {after:?}");
        for bytes in [before, after] {
            canaries.ensure_none_in("the exit record", &bytes)?;
        }
        calls.destroy(&id, false).await?;
        place.close().await?;
        agent.finish().await
    })
}

/// The kernel's handler of cores, put back with the value.
struct Handler {
    dir: tempfile::TempDir,
    before: String,
}

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl Handler {
    /// A handler takes a core whatever its process's limits are, and from whichever namespace.
    fn new() -> Result<Handler> {
        let dir = tempfile::tempdir_in("/opt")?;
        let script = dir.path().join("handler");
        let taken = dir.path().join("taken").display().to_string();
        fs::write(
            &script,
            format!("#!/bin/sh\necho \"$1\" >>{taken}\ncat >/dev/null\n"),
        )?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let before = fs::read_to_string(PATTERN)?;
        fs::write(PATTERN, format!("|{} %P", script.display()))?;
        Ok(Handler { dir, before })
    }

    fn taken(&self) -> Vec<String> {
        let taken = fs::read_to_string(self.dir.path().join("taken")).unwrap_or_default();
        taken.lines().map(str::to_owned).collect()
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = fs::write(PATTERN, &self.before);
    }
}

/// Whether root without CAP_SYS_PTRACE may look into a process without capabilities: only if that could be dumped.
fn is_open(pid: u32) -> Result<bool> {
    let environ = format!("/proc/{pid}/environ");
    let output = Command::new("setpriv")
        .args(["--bounding-set=-sys_ptrace", "cat", &environ])
        .env("LC_ALL", "C")
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() || error.contains("Permission denied"),
        "{error}"
    );
    Ok(output.status.success())
}

/// What is no instruction, twice, and how far before the address at which a system call returns the first has to be.
#[cfg(target_arch = "x86_64")]
const NO_INSTRUCTION: (&[u8], u64) = (&[0x0f, 0x0b, 0x0f, 0x0b], 2);
#[cfg(target_arch = "aarch64")]
const NO_INSTRUCTION: (&[u8], u64) = (&[0; 8], 4);

/// Has a process that waits in a system call fault. No other signal from outside than SIGKILL ends PID 1 of a namespace.
async fn fault(what: &str, pid: u32) -> Result<()> {
    let call = proc_file(pid, "syscall")?;
    let (_, at) = call
        .rsplit_once(" 0x")
        .with_context(|| format!("{what} waits for nothing: {call}"))?;
    let (bytes, before) = NO_INSTRUCTION;
    let memory = fs::File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(bytes, u64::from_str_radix(at, 16)? - before)?;
    // The call is begun again.
    let target = Pid::from_raw(pid.cast_signed());
    kill(target, Signal::SIGSTOP)?;
    until("it is stopped", || {
        status(pid, "State").ok()?.starts_with('T').then_some(())
    })
    .await?;
    kill(target, Signal::SIGCONT)?;
    gone(what, pid).await
}

/// Crashes the one process of the driver's of this name, which knows what a task was told. It must leave nothing.
async fn crash(handler: &Handler, name: &str) -> Result<()> {
    let found = named(name)?;
    let [pid] = found[..] else {
        bail!("{name}: {found:?}")
    };
    fault(name, pid).await?;
    ensure!(
        !handler.taken().contains(&pid.to_string()),
        "{name} left a core"
    );
    Ok(())
}

/// Control: PID 1 of a namespace that did not ask to leave none.
async fn crash_another(handler: &Handler) -> Result<()> {
    let mut unshare = Command::new("unshare")
        .args(["--fork", "--pid", "--kill-child", "sleep", "604"])
        .stdout(Stdio::null())
        .spawn()?;
    let parent = unshare.id().to_string();
    let faulted = async {
        let pid = until("it sleeps", || {
            let mut asleep = named("sleep").ok()?.into_iter();
            asleep.find(|pid| {
                let waits = proc_file(*pid, "syscall").is_ok_and(|call| call.contains(" 0x"));
                waits && status(*pid, "PPid").is_ok_and(|of| of == parent)
            })
        })
        .await?;
        fault("another", pid).await?;
        ensure!(
            handler.taken().contains(&pid.to_string()),
            "no core of another is taken"
        );
        Ok(())
    }
    .await;
    let _ = unshare.kill();
    unshare.wait()?;
    faulted
}

/// A core is taken before its process is a zombie.
async fn gone(what: &str, pid: u32) -> Result<()> {
    until(&format!("{what} has crashed"), || {
        let state = status(pid, "State").unwrap_or_default();
        (state.is_empty() || state.starts_with('Z')).then_some(())
    })
    .await
}

fn nothing_of_ours_leaves_a_core(context: &Context) -> Result<()> {
    let handler = Handler::new()?;
    context.block_on(async {
        let mut breakpoints = Breakpoints::new()?;
        let agent = Agent::start(context.driver(), breakpoints.config.clone()).await?;
        let job = Job::shell("echo up; exec sleep 600").text();
        crash_another(&handler).await?;
        {
            let start = agent.run(&job);
            tokio::pin!(start);
            // It has read what the task is told, and has yet to enter its scope.
            let reached = tokio::select! {
                reached = breakpoints.until(Step::Filter) => reached?,
                ended = &mut start => bail!("no such step: {ended:?}"),
            };
            crash(&handler, "exec2-launch").await?;
            reached.go_on();
            let (started, _) = breakpoints.all(async { Ok(start.await) }).await?;
            let error = started.err().context("a start without a helper")?;
            // Nobody killed it because it took too long.
            let told = format!("{error:#}");
            ensure!(told.contains("the helper ended before"), "{told}");
        }
        let (alloc, _) = breakpoints.all(agent.run(&job)).await?;
        let task = alloc.only_task()?;
        let supervisor = Scope::of(task)?.supervisor()?;
        // Nobody can make PID 1 of a namespace crash from outside.
        until("the supervisor has given up its capabilities", || {
            let caps = status(supervisor, "CapPrm").ok()?;
            (caps.trim_start_matches('0').is_empty()).then_some(())
        })
        .await?;
        ensure!(!is_open(supervisor)?, "the supervisor can be dumped");
        let mut other = Command::new("setpriv")
            .args(["--bounding-set=-all", "sleep", "60"])
            .stdout(Stdio::null())
            .spawn()?;
        let opened = until("any other process can be", || {
            is_open(other.id()).is_ok_and(|open| open).then_some(())
        })
        .await;
        said("kill", &["-ABRT", &other.id().to_string()])?;
        other.wait()?;
        opened?;
        until("a core is taken", || {
            handler
                .taken()
                .contains(&other.id().to_string())
                .then_some(())
        })
        .await?;

        let session = async {
            let mut talk = Talk::shell(&agent, task, "echo up; exec sleep 600").await?;
            talk.says("up").await?;
            Ok(talk)
        };
        let (talk, _) = breakpoints.all(session).await?;
        breakpoints.all(crash(&handler, "exec2-session")).await?;
        drop(talk);
        breakpoints.all(crash(&handler, "exec2-idle")).await?;

        let plugin = agent.abort_plugin().await?;
        gone("the plugin", plugin).await?;
        let (failed, _) = breakpoints.all(agent.kill_plugin()).await?;
        ensure!(failed.is_empty(), "{failed:?}");
        ensure!(
            !handler.taken().contains(&plugin.to_string()),
            "the plugin left a core"
        );
        breakpoints.all(alloc.stop()).await?;
        breakpoints.all(agent.finish()).await?;
        Ok(())
    })
}
