//! Pure: configuration in, one `Plan` out that says everything that will happen. No I/O, no clock, no environment.

pub mod capabilities;
pub mod environment;
pub mod limits;
pub mod signal;
pub mod steps;
pub mod unit;
pub mod unveil;

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::plugin::PluginConfig;
use crate::config::task::TaskOptions;
use crate::task::types::TaskRequest;
use crate::text::UnitText;
use crate::users::Account;
use limits::{Compute, LimitError, Limits, QuotaGrain};
use steps::{Order, Place, Stdio, TaskDir};
use unit::UnitName;
use unveil::{ByTask, Defaults, Gate, UnveilError};

/// What was found out about the host and the task before anything is decided.
#[derive(Debug, Clone)]
pub struct Facts {
    pub account: Account,
    pub task_dir: TaskDir,
    pub compute: Option<Compute>,
    pub grain: QuotaGrain,
    /// The service that the agent runs in.
    pub agent_unit: Option<String>,
    /// RLIMIT_NOFILE, soft and hard, that the plugin was started with.
    pub open_files: (u64, u64),
}

/// Everything that will happen when a task starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub unit: UnitName,
    pub description: UnitText,
    pub slice: &'static str,
    /// The unit that systemd stops first when the host shuts down.
    pub before: Option<String>,
    pub limits: Limits,
    pub order: Order,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("command must be set to a path, or to a name in the task's PATH")]
    NoCommand,
    #[error("{key} contains a NUL byte, which no process can be given")]
    Nul { key: &'static str },
    #[error("{key} has {count} entries; at most {max} are taken")]
    TooMany {
        key: &'static str,
        count: usize,
        max: usize,
    },
    #[error(
        "oom_score_adj = {0}: must be 0 to 1000; a task may volunteer to be killed first, not hide from the kernel"
    )]
    OomScore(i16),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Unveil(#[from] UnveilError),
}

/// Arguments of a command; the kernel's own bound is on their bytes.
const MAX_ARGS: usize = 10_000;

impl Plan {
    pub fn new(
        config: &PluginConfig,
        request: &TaskRequest,
        facts: &Facts,
    ) -> Result<Self, PlanError> {
        let options = &request.options;
        let rules = unveil::rules(gate(config), &options.unveil)?;
        let limits = Limits::new(&request.resources, facts.compute, facts.grain)?;
        let uid = facts.account.uid;
        let slice = if limits.allowed_cpus.is_some() {
            unit::RESERVE_SLICE
        } else {
            unit::SHARE_SLICE
        };
        let order = Order {
            command: command(options)?,
            args: args(options)?,
            env: environment(request, facts)?,
            work_dir: Place::Task(PathBuf::new()),
            uid,
            gid: facts.account.gid,
            oom_score_adj: oom_score_adj(options)?,
            bounding: capabilities::bounding(request.network_namespace.is_some()),
            ambient: 0,
            network_namespace: request.network_namespace.clone(),
            stdio: stdio(&request.stdout_path, &request.stderr_path),
            task_dir: facts.task_dir.clone(),
            view: unveil::view(&rules, uid),
            rules,
            open_files: facts.open_files,
        };
        Ok(Self {
            unit: UnitName::of_task(request.id.as_str()),
            description: unit::description(&request.names),
            slice,
            before: facts.agent_unit.clone(),
            limits,
            order,
        })
    }
}

fn gate(config: &PluginConfig) -> Gate<'_> {
    Gate {
        paths: &config.unveil_paths,
        defaults: if config.unveil_defaults {
            Defaults::Unveiled
        } else {
            Defaults::Veiled
        },
        by_task: if config.unveil_by_task {
            ByTask::Allowed
        } else {
            ByTask::Refused
        },
    }
}

fn command(options: &TaskOptions) -> Result<String, PlanError> {
    if options.command.is_empty() {
        return Err(PlanError::NoCommand);
    }
    no_nul("command", &options.command)?;
    Ok(options.command.clone())
}

fn args(options: &TaskOptions) -> Result<Vec<String>, PlanError> {
    if options.args.len() > MAX_ARGS {
        return Err(PlanError::TooMany {
            key: "args",
            count: options.args.len(),
            max: MAX_ARGS,
        });
    }
    options
        .args
        .iter()
        .try_for_each(|arg| no_nul("args", arg))?;
    Ok(options.args.clone())
}

fn environment(request: &TaskRequest, facts: &Facts) -> Result<Vec<(String, String)>, PlanError> {
    let tmp = facts.task_dir.path.join("tmp");
    let env =
        environment::environment(&request.env, &facts.account.name, &facts.account.home, &tmp);
    env.iter()
        .flat_map(|(name, value)| [name, value])
        .try_for_each(|text| no_nul("env", text))?;
    Ok(env)
}

fn oom_score_adj(options: &TaskOptions) -> Result<i16, PlanError> {
    let score = options.oom_score_adj;
    if (0..=1000).contains(&score) {
        Ok(score)
    } else {
        Err(PlanError::OomScore(score))
    }
}

/// Nomad names /dev/null for a task whose logs are disabled.
fn stdio(stdout: &Path, stderr: &Path) -> Stdio {
    let null = |path: &Path| path == Path::new("") || path == Path::new("/dev/null");
    if null(stdout) && null(stderr) {
        return Stdio::Null;
    }
    Stdio::Fifos {
        stdout: stdout.into(),
        stderr: stderr.into(),
    }
}

fn no_nul(key: &'static str, text: &str) -> Result<(), PlanError> {
    if text.contains('\0') {
        Err(PlanError::Nul { key })
    } else {
        Ok(())
    }
}
