//! What one task is told, and what the plugin alone knows, as words that occur nowhere else, searched for wherever others can look.
//! That a task cannot open its supervisor's memory is a case of `view`.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation, Config};

use crate::case;
use crate::nomad::{Job, Scope, agent, refusal, said, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_secret_is_where_its_owner_is_and_nowhere_else),
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
    /// In the agent's environment, and kept from tasks by Nomad.
    plugin: String,
}

impl Canaries {
    fn new() -> Result<Canaries> {
        Ok(Canaries {
            env: canary("env")?,
            file: canary("file")?,
            plugin: canary("plugin")?,
        })
    }

    fn ensure_none_in(&self, what: &str, bytes: &[u8]) -> Result<()> {
        for canary in [&self.env, &self.file, &self.plugin] {
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
            look_at_processes(&canaries, &agent, &alloc).await?;
            look_at_files(&canaries, &alloc)?;
            look_from_a_neighbour(&canaries, &agent, &alloc).await?;
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

async fn look_at_processes(canaries: &Canaries, agent: &Agent, alloc: &Allocation) -> Result<()> {
    let scope = Scope::of(alloc.only_task()?)?;
    let (supervisor, main) = (scope.supervisor()?, scope.main()?);
    let plugin = agent.plugin_pid().await.context("the plugin runs")?;
    let mut owners = (0, 0);
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        canaries.ensure_none_in(&format!("the arguments of {pid}"), &read("cmdline"))?;
        let environ = read("environ");
        ensure!(!holds(&environ, &canaries.file), "the environment of {pid}");
        if holds(&environ, &canaries.env) {
            ensure!(pid == main, "{pid} has the task's environment");
            owners.0 += 1;
        }
        if holds(&environ, &canaries.plugin) {
            ensure!(pid == plugin, "{pid} has the plugin's environment");
            owners.1 += 1;
        }
    }
    ensure!(owners == (1, 1), "nothing was looked at: {owners:?}");
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

fn nothing_of_ours_leaves_a_core(context: &Context) -> Result<()> {
    let handler = Handler::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent
            .run(&Job::shell("echo up; exec sleep 600").text())
            .await?;
        let supervisor = Scope::of(alloc.only_task()?)?.supervisor()?;
        // Nobody can make PID 1 of a namespace crash from outside.
        until("the supervisor has given up its capabilities", || {
            let caps = crate::nomad::status(supervisor, "CapPrm").ok()?;
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

        let plugin = agent.abort_plugin().await?;
        until("the plugin has crashed", || {
            let state = crate::nomad::status(plugin, "State").unwrap_or_default();
            (state.is_empty() || state.starts_with('Z')).then_some(())
        })
        .await?;
        let failed = agent.kill_plugin().await?;
        ensure!(failed.is_empty(), "{failed:?}");
        ensure!(
            !handler.taken().contains(&plugin.to_string()),
            "the plugin left a core"
        );
        alloc.stop().await?;
        agent.finish().await
    })
}
