//! `run`: one command through the very plan, scope and helper of a Nomad task, on any host with systemd.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Args;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_stream::StreamExt;

use crate::config::plugin::PluginConfig;
use crate::config::task::TaskOptions;
use crate::host;
use crate::job::alloc_dir::{AllocDir, AllocDirError, Owner, Roots, TaskPaths};
use crate::job::request::{new_alloc_id, new_task_id};
use crate::plan::limits::{Cpus, MemoryMax, Resources};
use crate::task::types::{
    Destroy, DriverError, ExitResult, Names, Severity, TaskEvent, TaskId, TaskRequest,
};
use crate::task::{Flow, Output, TaskTable, Tasks};
use crate::users::{self, Account, UserError};

/// Run a command as a task: in its own systemd scope, limited, and with nothing open to it but what is unveiled
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nomad-driver-exec2 run --memory 64M --cpu 500 --unveil r:/srv -- ls -l /srv

The exit status is the command's, 128 + n if signal n ended it, and 125 if it could not be run at all. Standard input is
/dev/null, as for a task. Ctrl-C stops the task as Nomad does: with SIGINT, and with SIGKILL if it has not ended 5 seconds
later; a second Ctrl-C kills it at once.")]
pub struct Run {
    /// Memory limit: a number of MiB, or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "300M", value_parser = mebibytes)]
    memory: u64,
    /// CPU limit in MHz, as in a job's `resources`
    #[arg(long, value_name = "MHZ", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    cpu: u64,
    /// Unveil a path, as in `r:/srv`; the mode is any of r, w, x, c [repeatable]
    #[arg(long, value_name = "MODE:PATH")]
    unveil: Vec<String>,
    /// User to run as, by name; a dynamic one if absent
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Set a variable of the command's environment [repeatable]
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Error)]
pub enum RunError {
    #[error("run needs root, as Nomad's client does; try sudo")]
    NotRoot,
    #[error("systemd is not the init system of this host, so that nothing here can make a scope")]
    NoSystemd,
    #[error(transparent)]
    Host(#[from] io::Error),
    #[error(transparent)]
    Directories(#[from] AllocDirError),
    #[error(transparent)]
    Task(#[from] DriverError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("every dynamic user from {first} to {last} has processes on this host; name one with --user", first = DYNAMIC.0, last = DYNAMIC.1)]
    NoUser,
}

/// Nomad's own range for dynamic workload users.
const DYNAMIC: (u32, u32) = (80_000, 89_999);
/// Nomad's default kill_timeout.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Below it the directories of one run, as Nomad's below its data_dir. Traversable, since the command's user passes through.
const BASE: &str = "/var/lib/nomad-driver-exec2/run";

impl Run {
    pub fn main(self) -> Result<ExitCode, RunError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(RunError::NotRoot);
        }
        if !host::runs_systemd() {
            return Err(RunError::NoSystemd);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let result = runtime.block_on(self.run(TaskTable::new()?))?;
        if let Some(error) = &result.error {
            let _ = writeln!(io::stderr(), "nomad-driver-exec2: {error}");
        }
        Ok(ExitCode::from(u8::try_from(result.code).unwrap_or(1)))
    }

    async fn run(self, tasks: TaskTable) -> Result<ExitResult, RunError> {
        // Before anything exists, so that no Ctrl-C can leave it behind.
        let mut stops = Stops::listen()?;
        let account = match &self.user {
            Some(name) => users::look_up(name)?,
            None => users::dynamic(unused_uid()?),
        };
        let alloc_id = new_alloc_id();
        let name = Path::new(&self.command[0])
            .file_name()
            .map_or("task".into(), |name| name.to_string_lossy().into_owned());
        let roots = Roots {
            allocs: Path::new(BASE).join("alloc"),
            mounts: Path::new(BASE).join("alloc_mounts"),
        };
        let mut dir = AllocDir::create(&roots, &alloc_id)?;
        let paths = dir.task(
            &name,
            Owner {
                uid: account.uid,
                gid: account.gid,
            },
        )?;
        let request = self.request(&account, &alloc_id, name, dir.path(), &paths);
        let (compute, usable) = (Some(host::compute()), Cpus::new());
        tasks.set_up(config(), compute, usable).await;
        let id = request.id.clone();
        let ended = attend(&tasks, request, &mut stops).await;
        // What is known of its end is told, whatever becomes of the directories. A task that could not be destroyed, and is
        // still known therefore, keeps them.
        if tasks.inspect(&id).await.is_ok() {
            dir.leave();
        } else if let Err(error) = dir.remove() {
            complain(&error);
        }
        ended
    }

    fn request(
        self,
        account: &Account,
        alloc_id: &str,
        name: String,
        alloc_dir: &Path,
        paths: &TaskPaths,
    ) -> TaskRequest {
        let path = |path: &Path| path.display().to_string();
        let mut env = BTreeMap::from([
            ("NOMAD_TASK_DIR".to_owned(), path(&paths.local)),
            ("NOMAD_ALLOC_DIR".to_owned(), path(&paths.alloc)),
            ("NOMAD_SECRETS_DIR".to_owned(), path(&paths.secrets)),
            ("NOMAD_ALLOC_ID".to_owned(), alloc_id.to_owned()),
            ("NOMAD_TASK_NAME".to_owned(), name.clone()),
            ("NOMAD_CPU_LIMIT".to_owned(), self.cpu.to_string()),
            ("NOMAD_MEMORY_LIMIT".to_owned(), self.memory.to_string()),
        ]);
        let inherited = ["PATH", "LANG", "TERM"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
        env.extend(inherited.chain(self.env));
        let (command, args) = self
            .command
            .split_first()
            .map(|(first, rest)| (first.clone(), rest.to_vec()))
            .unwrap_or_default();
        TaskRequest {
            id: TaskId::new(new_task_id(alloc_id, &name)),
            options: TaskOptions {
                command,
                args,
                unveil: self.unveil,
                ..TaskOptions::default()
            },
            names: Names {
                task: name,
                group: "run".into(),
                job: "run".into(),
                job_id: "run".into(),
                alloc_id: alloc_id.to_owned(),
                namespace: "local".into(),
                ..Names::default()
            },
            env,
            device_env: BTreeMap::new(),
            user: account.name.clone(),
            alloc_dir: alloc_dir.to_owned(),
            stdout_path: "/dev/null".into(),
            stderr_path: "/dev/null".into(),
            resources: Resources {
                cpu_mhz: self.cpu,
                memory_mib: self.memory,
                memory_max_mib: MemoryMax::Unset,
                cpuset: String::new(),
            },
            nomad_cgroup: "".into(),
            network_namespace: None,
            dns: None,
            mounts: Vec::new(),
            devices: Vec::new(),
        }
    }
}

/// The caller is root and the operator at once: what it unveils is allowed.
fn config() -> PluginConfig {
    PluginConfig {
        unveil_by_task: true,
        ..PluginConfig::default()
    }
}

/// Starts the task and stays with it to its end.
async fn attend(
    tasks: &TaskTable,
    request: TaskRequest,
    stops: &mut Stops,
) -> Result<ExitResult, RunError> {
    let id = request.id.clone();
    let (stdout, copy_stdout) = copied_to(io::stdout())?;
    let (stderr, copy_stderr) = copied_to(io::stderr())?;
    let mut events = tasks.events();
    tasks
        .start_with(request, Output::Given([stdout, stderr]))
        .await?;
    print_warnings(&mut events).await;
    let ended = follow(tasks, &id, stops).await;
    print_warnings(&mut events).await;
    // Until the task is destroyed, something could still write.
    match tasks.destroy(&id, Destroy::EvenIfRunning).await {
        Ok(()) => {
            for copy in [copy_stdout, copy_stderr] {
                let _ = copy.join();
            }
        }
        Err(error) => complain(&error),
    }
    Ok(ended?)
}

fn complain(error: &dyn std::error::Error) {
    let _ = writeln!(io::stderr(), "nomad-driver-exec2: {error}");
}

/// What the events so far warn of: a limit that is not in force, an end by the OOM killer.
async fn print_warnings(events: &mut Flow<TaskEvent>) {
    // A timeout of nothing polls once: it gives what is there, and does not wait for more.
    while let Ok(Some(event)) = timeout(Duration::ZERO, events.next()).await {
        if event.severity == Severity::Warning {
            let _ = writeln!(io::stderr(), "nomad-driver-exec2: {}", event.message);
        }
    }
}

async fn follow(
    tasks: &TaskTable,
    id: &TaskId,
    stops: &mut Stops,
) -> Result<ExitResult, DriverError> {
    tokio::select! {
        result = tasks.wait(id) => result,
        name = stops.next() => {
            tokio::select! {
                stopped = tasks.stop(id, KILL_TIMEOUT, name) => stopped?,
                _ = stops.next() => tasks.stop(id, Duration::ZERO, "SIGKILL").await?,
            }
            tasks.wait(id).await
        }
    }
}

/// A pipe whose other end is copied to `target`. The terminal itself is never handed to a task: it could push keystrokes
/// into it (TIOCSTI).
fn copied_to(mut target: impl Write + Send + 'static) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let copy = std::thread::spawn(move || {
        let mut source = std::fs::File::from(read);
        // When the reader goes away, so does the pipe: the task is told by SIGPIPE, as it would be without us.
        let _ = io::copy(&mut source, &mut target);
        let _ = target.flush();
    });
    Ok((write, copy))
}

/// The signals by which people and init systems stop a program.
#[derive(Debug)]
struct Stops {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
}

impl Stops {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// The name of the one to pass on.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }
}

/// A dynamic user that nothing on this host runs as.
fn unused_uid() -> Result<u32, RunError> {
    let used =
        |entry: io::Result<std::fs::DirEntry>| entry.ok()?.metadata().ok().map(|meta| meta.uid());
    let used: std::collections::BTreeSet<u32> =
        std::fs::read_dir("/proc")?.filter_map(used).collect();
    let (first, last) = DYNAMIC;
    let span = last - first + 1;
    let start = std::process::id() % span;
    (0..span)
        .map(|step| first + (start + step) % span)
        .find(|uid| !used.contains(uid))
        .ok_or(RunError::NoUser)
}

/// `64`, `64M` and `1G` are MiB; `65536K` is 64.
fn mebibytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size is a number, as in 64M".to_owned())?;
    let mib = match unit {
        "" | "M" | "m" | "MiB" => Some(number),
        "K" | "k" | "KiB" => Some(number.div_ceil(1024)),
        "G" | "g" | "GiB" => number.checked_mul(1024),
        _ => {
            return Err(format!(
                "a size is a whole number with K, M or G, as in 64M; {unit:?} is no unit"
            ));
        }
    };
    mib.filter(|mib| *mib > 0)
        .ok_or_else(|| "a size is at least 1M".to_owned())
}

fn variable(text: &str) -> Result<(String, String), String> {
    let wrong = "a variable is NAME=VALUE";
    let (name, value) = text.split_once('=').ok_or(wrong)?;
    if name.is_empty() {
        return Err(wrong.into());
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, mib) in [
            ("64", 64),
            ("64M", 64),
            ("1G", 1024),
            ("65536K", 64),
            ("1K", 1),
        ] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for text in ["", "M", "0", "1T", "-1", "1.5G", "99999999999999999999"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
