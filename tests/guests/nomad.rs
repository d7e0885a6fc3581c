//! Short ways for the cases: to an agent, to a job of one task, to what the guest shows of the task's scope.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::Context;
use harness::nomad::{Agent, Config, Exit, RpcError, Task};

/// Catches hangs. Machines without KVM are some ten times slower than containers.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent whose operator lets tasks unveil.
pub async fn agent(context: &Context) -> Result<Agent> {
    agent_with(context, Config::default()).await
}

pub async fn agent_with(context: &Context, config: Config) -> Result<Agent> {
    let config = Config {
        plugin: "unveil_by_task = true".into(),
        ..config
    };
    Agent::start(context.driver(), config).await
}

/// A job of one task, `t`, that runs once.
#[derive(Debug, Clone)]
pub struct Job {
    config: Vec<String>,
    task: Vec<String>,
    resources: String,
}

impl Job {
    pub fn command(command: &str, arguments: &[&str]) -> Job {
        let arguments: Vec<String> = arguments.iter().map(|word| quoted(word)).collect();
        Job {
            config: vec![
                format!("command = {}", quoted(command)),
                format!("args = [{}]", arguments.join(", ")),
            ],
            task: Vec::new(),
            resources: "cpu = 1000\n memory = 64".into(),
        }
    }

    pub fn shell(script: &str) -> Job {
        Job::command("/bin/sh", &["-c", script])
    }

    pub fn user(self, name: &str) -> Job {
        self.task(&format!("user = {}", quoted(name)))
    }

    pub fn unveil(self, entries: &[&str]) -> Job {
        let entries: Vec<String> = entries.iter().map(|entry| quoted(entry)).collect();
        self.config(&format!("unveil = [{}]", entries.join(", ")))
    }

    /// A line of the task's `config` block.
    pub fn config(mut self, line: &str) -> Job {
        self.config.push(line.into());
        self
    }

    /// A line of the task itself.
    pub fn task(mut self, line: &str) -> Job {
        self.task.push(line.into());
        self
    }

    pub fn resources(self, lines: &str) -> Job {
        Job {
            resources: lines.into(),
            ..self
        }
    }

    pub fn text(&self) -> String {
        format!(
            "job \"case\" {{\n type = \"batch\"\n group \"g\" {{\n restart {{\n attempts = 0\n mode = \"fail\"\n }}\n reschedule {{\n attempts = 0\n unlimited = false\n }}\n task \"t\" {{\n driver = \"exec2\"\n {}\n config {{\n {}\n }}\n resources {{\n {}\n }}\n }}\n }}\n}}\n",
            self.task.join("\n "),
            self.config.join("\n "),
            self.resources
        )
    }
}

/// As HCL wants a string; nothing in it is interpolated.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text)
        .to_string()
        .replace("${", "$${")
        .replace("%{", "%%{")
}

/// A task that has ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a job to its end.
pub async fn to_end(agent: &Agent, job: &Job) -> Result<Ended> {
    let alloc = agent.run(&job.text()).await?;
    let exit = alloc.only_task()?.wait().await?;
    alloc.stop().await?;
    Ok(Ended {
        exit,
        stdout: alloc.stdout("t")?,
        stderr: alloc.stderr("t")?,
    })
}

/// Runs a job that must succeed, and gives what it printed.
pub async fn printed(agent: &Agent, job: &Job) -> Result<String> {
    let ended = to_end(agent, job).await?;
    ensure!(ended.exit.success(), "{ended:?}");
    Ok(ended.stdout)
}

/// Why a job did not start, as `nomad alloc status` has it.
pub async fn refusal(agent: &Agent, job: &Job) -> Result<RpcError> {
    match agent.run(&job.text()).await {
        Ok(alloc) => {
            alloc.stop().await?;
            bail!("it counts as started")
        }
        Err(error) => match error.downcast_ref::<RpcError>() {
            Some(error) => Ok(error.clone()),
            None => Err(error),
        },
    }
}

/// A task's scope, as the guest shows it.
#[derive(Debug, Clone)]
pub struct Scope {
    pub unit: String,
    pub dir: PathBuf,
}

impl Scope {
    /// By the rule that operators are told: `exec2-<task>-<8 of the alloc's id>-<8 of the start's>.scope`.
    pub fn of(task: &Task) -> Result<Scope> {
        Scope::of_id(&task.id())
    }

    pub fn of_id(id: &str) -> Result<Scope> {
        let parts: Vec<&str> = id.split('/').collect();
        let [alloc, name, start] = parts.as_slice() else {
            bail!("{id} is no id of a task")
        };
        let unit = format!("exec2-{name}-{}-{start}.scope", &alloc[..8]);
        let dir = Path::new("/sys/fs/cgroup/exec2.slice/exec2-share.slice").join(&unit);
        Ok(Scope { unit, dir })
    }

    pub fn file(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim_end().to_owned())
    }

    pub fn processes(&self) -> Result<Vec<u32>> {
        let pids = self.file("cgroup.procs")?;
        Ok(pids.lines().filter_map(|pid| pid.parse().ok()).collect())
    }

    /// PID 1 of the task's namespace.
    pub fn supervisor(&self) -> Result<u32> {
        let mut found = self.processes()?.into_iter();
        found
            .find(|pid| proc_file(*pid, "comm").is_ok_and(|comm| comm == "exec2-supervise"))
            .context("the scope has no supervisor")
    }

    pub fn main(&self) -> Result<u32> {
        let supervisor = self.supervisor()?.to_string();
        let mut found = self.processes()?.into_iter();
        found
            .find(|pid| status(*pid, "PPid").is_ok_and(|parent| parent == supervisor))
            .context("the supervisor has no child")
    }

    pub fn show(&self, properties: &[&str]) -> Result<HashMap<String, String>> {
        crate::scopes::show(&self.unit, properties)
    }

    /// Nothing of it is left, neither in the kernel nor in systemd.
    pub fn expect_gone(&self) -> Result<()> {
        ensure!(!self.dir.exists(), "{} is still there", self.dir.display());
        let record = Path::new("/run/nomad-driver-exec2/records").join(&self.unit);
        ensure!(!record.exists(), "{} is still there", record.display());
        let listed = said(
            "systemctl",
            &["list-units", "--all", "--plain", "--no-legend"],
        )?;
        ensure!(
            !listed.contains(&self.unit),
            "{} is still loaded",
            self.unit
        );
        Ok(())
    }
}

pub fn proc_file(pid: u32, name: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{name}");
    let text = fs::read_to_string(&path).with_context(|| path)?;
    Ok(text.trim_end().to_owned())
}

/// A field of /proc/PID/status.
pub fn status(pid: u32, field: &str) -> Result<String> {
    let status = proc_file(pid, "status")?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines
        .find(|(name, _)| *name == field)
        .with_context(|| format!("no {field} in the status of {pid}"))?;
    Ok(value.trim().to_owned())
}

pub fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Waits for what comes soon.
pub async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
