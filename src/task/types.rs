//! What goes in and out of the life of a task, in our own terms: values only, nothing of the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;

use thiserror::Error;

use crate::config::task::TaskOptions;
pub use crate::plan::limits::{Compute, MemoryMax, Resources};
pub use crate::plan::session::WindowSize;

/// Nomad's id of one start of a task: `<alloc id>/<task>/<8 hex>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(String);

impl TaskId {
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Everything Nomad tells of a task that is to be started or taken over.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskRequest {
    pub id: TaskId,
    /// What the job wrote in the task's `config` block. All defaults where Nomad has forgotten it, as it does when a
    /// task is recovered by a restarted agent.
    pub options: TaskOptions,
    pub names: Names,
    /// The task's whole environment, with the agent's own variables.
    pub env: BTreeMap<String, String>,
    /// Variables that device plugins ask for.
    pub device_env: BTreeMap<String, String>,
    /// Empty after an agent's restart, for a dynamic workload user.
    pub user: String,
    /// The allocation's directory, parent of the task's own.
    pub alloc_dir: PathBuf,
    /// A FIFO that Nomad reads, or /dev/null.
    pub stdout_path: PathBuf,
    pub stderr_path: PathBuf,
    pub resources: Resources,
    /// The cgroup that Nomad made for the task and that we do not use; empty if it made none.
    pub nomad_cgroup: PathBuf,
    /// The allocation's network namespace; `None` is the host's.
    pub network_namespace: Option<PathBuf>,
    /// The task's name in its own network, where a network plugin gives one.
    pub hosts: Option<Hosts>,
    pub dns: Option<Dns>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
}

/// Whose task it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    pub task: String,
    pub group: String,
    pub job: String,
    pub job_id: String,
    pub alloc_id: String,
    pub namespace: String,
    pub node: String,
    pub node_id: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// A name and its address, for /etc/hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    pub hostname: String,
    pub address: String,
}

/// A volume of the host or of a CSI plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub task_path: PathBuf,
    pub host_path: PathBuf,
    pub mode: MountMode,
    /// `private`, `host-to-task`, `bidirectional` or empty.
    pub propagation: String,
    pub selinux_label: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountMode {
    ReadOnly,
    ReadWrite,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub task_path: PathBuf,
    pub host_path: PathBuf,
    pub cgroup_permissions: String,
}

/// The state that Nomad keeps for us between two plugin processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Of the encoding of `driver_state`; 0 is reserved by Nomad.
    pub version: i32,
    pub driver_state: Vec<u8>,
}

/// How a task ended. A success has code 0, signal 0 and no error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExitResult {
    pub code: i32,
    pub signal: i32,
    pub oom_killed: bool,
    /// A sentence for `nomad alloc status` where the code alone does not tell.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroy {
    OnlyIfEnded,
    EvenIfRunning,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskStatus {
    pub id: TaskId,
    pub name: String,
    pub state: TaskState,
    pub started_at: Option<SystemTime>,
    pub completed_at: Option<SystemTime>,
    pub exit: Option<ExitResult>,
    pub attributes: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    Unknown,
    Running,
    Exited,
}

/// One sample of what a task uses. `None` is a value that was not measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Usage {
    pub at: SystemTime,
    pub cpu: CpuUsage,
    pub memory: MemoryUsage,
}

/// Percentages are of one core.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CpuUsage {
    pub system_percent: Option<f64>,
    pub user_percent: Option<f64>,
    pub percent: Option<f64>,
    /// What Nomad calls ticks.
    pub total_mhz: Option<f64>,
    pub throttled_periods: Option<u64>,
    pub throttled_nanos: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    pub rss_bytes: Option<u64>,
    pub cache_bytes: Option<u64>,
    pub max_usage_bytes: Option<u64>,
    pub kernel_usage_bytes: Option<u64>,
    pub kernel_max_usage_bytes: Option<u64>,
    pub usage_bytes: Option<u64>,
    pub swap_bytes: Option<u64>,
}

/// A line for the task's events in `nomad alloc status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    pub task_id: TaskId,
    pub alloc_id: String,
    pub task_name: String,
    pub at: SystemTime,
    pub severity: Severity,
    pub message: String,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Info,
    /// Something is not as the job asks for it.
    Warning,
}

/// Where a session's command reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streams {
    /// A terminal of this size.
    Terminal(WindowSize),
    Pipes,
    /// It reads nothing, and both of its outputs are told as stdout, in the order in which they were written.
    Merged,
}

/// What a session's client sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionInput {
    Data(Vec<u8>),
    /// There will be no more data.
    End,
    Resize(WindowSize),
}

/// What a session's client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionOutput {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    StdoutEnd,
    StderrEnd,
    /// The last.
    Exited(ExitResult),
}

/// Whether tasks can run here, and what a job can constrain on.
#[derive(Debug, Clone, PartialEq)]
pub struct Fingerprint {
    pub health: Health,
    /// The reason and the remedy where it is not `Healthy`.
    pub description: String,
    pub attributes: BTreeMap<String, Attribute>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Undetected,
    Unhealthy,
    Healthy,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    Bool(bool),
    Integer(i64),
    Text(String),
}

/// The node's CPUs as the agent counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    pub compute: Compute,
    /// CPUs that the agent gives to tasks.
    pub usable_cpus: BTreeSet<u16>,
}

/// Why a verb failed, as the operator reads it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DriverError {
    /// Nobody here knows the id. `plugin` words it, or takes it for done, as each call wants.
    #[error("task not found")]
    UnknownTask,
    /// A mistake in the job or on the host: trying again will not help.
    #[error("{0}")]
    Permanent(String),
    /// Something that passes, such as a lost bus: the job's restart policy applies.
    #[error("{0}")]
    Transient(String),
}
