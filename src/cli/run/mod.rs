//! `run`: a command, or a task of a job file, through the very plan, scope and helper of a Nomad task, on any host with systemd.

mod attend;
mod given;
pub mod job;
mod learn;
pub mod node;
mod values;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueHint};
use thiserror::Error;

pub use self::attend::Ending;
use self::attend::{Attendance, Attended, attend};
pub use self::given::Given;
use self::job::JobTask;
use self::learn::Learn;
use super::terminal::{Stops, say};
use crate::config::plugin::PluginConfig;
use crate::config::task::TaskOptions;
use crate::host;
use crate::job::JobError;
use crate::job::alloc_dir::{AllocDir, AllocDirError, Owner, Roots, TaskPaths};
use crate::job::request::{new_alloc_id, new_task_id};
use crate::plan::capabilities;
use crate::plan::limits::{Cpus, MemoryMax, Resources};
use crate::task::types::{DriverError, ExitResult, Names, TaskId, TaskRequest};
use crate::task::{Ahead, TaskTable, Tasks};
use crate::users::{self, Account, UserError};

/// Run a command, or a task of a job file, as a task: in its own systemd scope, limited, and with nothing open to it but
/// what is unveiled
#[derive(Debug, Args)]
#[command(
    override_usage = "nomad-driver-exec2 run [OPTIONS] -- COMMAND [ARGUMENT]...\n       \
        nomad-driver-exec2 run [OPTIONS] JOB.nomad.hcl",
    after_help = "\
Examples:
  nomad-driver-exec2 run --memory 64M --cpu 500 --unveil r:/srv -- ls -l /srv
  nomad-driver-exec2 run web.nomad.hcl
  nomad-driver-exec2 run --task front/web --var port=8080 --volume data=/srv/data shop.nomad.hcl

Of a job file one task is run, its only main one or that of --task, once, with its user,
environment, templates, resources and signals. What only a cluster gives is named with its line: as
a warning where the task is the same without it, else as an error with what to do about it. A `port`
without `static` is a free one of this host. `cores` are the first that no other task has reserved.

The exit status is the command's, 128 + n if signal n ended it, and 125 if it could not be run at
all. Standard input is /dev/null, as for a task. Ctrl-C stops the task as Nomad does: with the job's
kill_signal or SIGINT, and with SIGKILL if it has not ended after kill_timeout or 5 seconds; a
second Ctrl-C kills it at once."
)]
pub struct Run {
    // Before the options, whose headings hold for all that follows.
    /// The job file
    #[arg(
        value_name = "JOB.nomad.hcl",
        value_hint = ValueHint::FilePath,
        conflicts_with = "command",
        required_unless_present = "command"
    )]
    file: Option<PathBuf>,
    /// The command and its arguments
    #[arg(
        last = true,
        value_name = "COMMAND",
        conflicts_with_all = ["task", "var", "volume", "meta", "payload", "ignore"]
    )]
    command: Vec<String>,
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    learn: Learn,
}

#[derive(Debug, Error)]
pub enum RunError {
    #[error("{}:{}: {}", file.display(), error.line, error.message)]
    Job { file: PathBuf, error: JobError },
    #[error("--learn: {}: {error}", path.display())]
    List { path: PathBuf, error: io::Error },
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    #[error(
        "--probe: `{0}` succeeds before the command is started, so that it does not tell whether it works"
    )]
    Probe(String),
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
pub const DYNAMIC: (u32, u32) = (80_000, 89_999);
/// Of a command.
const CPU_MHZ: u64 = 1000;
const MEMORY_MIB: u64 = 300;
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
        let result = runtime.block_on(self.run(TaskTable::new(Ahead::None)?))?;
        if let Some(error) = &result.error {
            say(error);
        }
        Ok(ExitCode::from(u8::try_from(result.code).unwrap_or(1)))
    }

    async fn run(self, tasks: TaskTable) -> Result<ExitResult, RunError> {
        // Before anything exists, so that no Ctrl-C can leave it behind.
        let mut stops = Stops::listen()?;
        let job = match &self.file {
            Some(file) => Some(JobTask::read(file, &self.given)?),
            None => None,
        };
        let of_job = || job.as_ref().map_or(Ok(None), JobTask::account);
        let account = match &self.given.user {
            Some(name) => Some(users::look_up(name)?),
            None => of_job()?,
        };
        let account = match account {
            Some(account) => account,
            None => users::dynamic(unused_uid()?),
        };
        let subject = Subject {
            run: &self,
            job,
            account,
            tasks,
        };
        match self.learn.list()? {
            Some(list) => learn::learn(subject, &self.learn, list, &mut stops).await,
            None => {
                let attempt = subject.once(Unveil::AsGiven, Attendance::default(), &mut stops);
                Ok(attempt.await?.exit)
            }
        }
    }

    fn request(
        &self,
        account: &Account,
        alloc_id: &str,
        name: String,
        alloc_dir: &Path,
        paths: &TaskPaths,
    ) -> TaskRequest {
        let path = |path: &Path| path.display().to_string();
        let (cpu_mhz, memory_mib) = (
            self.given.cpu.unwrap_or(CPU_MHZ),
            self.given.memory.unwrap_or(MEMORY_MIB),
        );
        let mut env = BTreeMap::from([
            ("NOMAD_TASK_DIR".to_owned(), path(&paths.local)),
            ("NOMAD_ALLOC_DIR".to_owned(), path(&paths.alloc)),
            ("NOMAD_SECRETS_DIR".to_owned(), path(&paths.secrets)),
            ("NOMAD_ALLOC_ID".to_owned(), alloc_id.to_owned()),
            ("NOMAD_TASK_NAME".to_owned(), name.clone()),
            ("NOMAD_CPU_LIMIT".to_owned(), cpu_mhz.to_string()),
            ("NOMAD_MEMORY_LIMIT".to_owned(), memory_mib.to_string()),
        ]);
        env.extend(inherited().chain(self.given.env.iter().cloned()));
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
                unveil: self.given.unveil.clone(),
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
                cpu_mhz,
                memory_mib,
                memory_max_mib: MemoryMax::Unset,
                cpuset: String::new(),
            },
            nomad_cgroup: "".into(),
            network_namespace: None,
            hosts: None,
            dns: None,
            mounts: Vec::new(),
            devices: Vec::new(),
        }
    }
}

/// What is run, as often as it is.
#[derive(Debug)]
struct Subject<'a> {
    run: &'a Run,
    job: Option<JobTask>,
    account: Account,
    tasks: TaskTable,
}

/// What one attempt unveils to the command.
#[derive(Debug, Clone, Copy)]
enum Unveil<'a> {
    AsGiven,
    /// On top of what is given.
    Everything,
    /// In place of what is given.
    Only(&'a [String]),
}

impl Subject<'_> {
    /// Runs it once, in directories of its own.
    async fn once(
        &self,
        unveil: Unveil<'_>,
        attendance: Attendance<'_>,
        stops: &mut Stops,
    ) -> Result<Attended, RunError> {
        let (run, account) = (self.run, &self.account);
        let alloc_id = new_alloc_id();
        let name = match (&self.job, run.command.first()) {
            (Some(job), _) => job.name().to_owned(),
            (None, Some(command)) => Path::new(command)
                .file_name()
                .filter(|name| *name != "alloc")
                .map_or("task".into(), |name| name.to_string_lossy().into_owned()),
            (None, None) => "task".into(),
        };
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
        let (mut request, ending) = match self.job.clone() {
            Some(job) => job.request(&run.given, account, &alloc_id, dir.path(), &paths)?,
            None => (
                run.request(account, &alloc_id, name, dir.path(), &paths),
                Ending::default(),
            ),
        };
        match unveil {
            Unveil::AsGiven => {}
            // First, as the first of two entries for one path counts.
            Unveil::Everything => request.options.unveil.insert(0, learn::EVERYTHING.into()),
            Unveil::Only(list) => request.options.unveil = list.to_vec(),
        }
        let (compute, usable) = (Some(host::compute()), Cpus::new());
        self.tasks
            .set_up(config(&request.options.cap_add), compute, usable)
            .await;
        let id = request.id.clone();
        let ended = attend(&self.tasks, request, &ending, attendance, stops).await;
        // What is known of its end is told, whatever becomes of the directories. A task that could not be destroyed, and is
        // still known therefore, keeps them.
        if self.tasks.inspect(&id).await.is_ok() {
            dir.leave();
        } else if let Err(error) = dir.remove() {
            say(error);
        }
        ended
    }
}

/// What a task gets of the caller's environment.
pub fn inherited() -> impl Iterator<Item = (String, String)> {
    ["PATH", "LANG", "TERM"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
}

/// The caller is root and the operator at once: what it unveils and the capabilities that it asks for are allowed. Names that are
/// none are the job's mistake, and told as such.
fn config(cap_add: &[String]) -> PluginConfig {
    let known = |name: &&String| capabilities::check(std::slice::from_ref(*name)).is_ok();
    PluginConfig {
        unveil_by_task: true,
        // There is no plugin's log for what they tell.
        report_denials: false,
        allow_caps: cap_add.iter().filter(known).cloned().collect(),
        ..PluginConfig::default()
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
