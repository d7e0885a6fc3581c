//! What a person writes: a job file, turned into the request that Nomad would send to the driver, and the directories that
//! Nomad would have made for it. Used by the people's commands and by the tests. It starts nothing and knows no gRPC.

pub mod alloc_dir;
pub mod environment;
mod evaluate;
mod hcl;
pub mod options;
pub mod request;
pub mod select;
pub mod template;

use std::time::Duration;

pub use ::hcl::Value;
pub use evaluate::{RunTime, open_name};
pub use hcl::{MAX_FILE_BYTES, parse};

/// Something wrong in a job file, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct JobError {
    pub line: usize,
    /// One sentence with the key, the value and the remedy.
    pub message: String,
}

impl JobError {
    pub fn new(line: usize, message: impl Into<String>) -> Self {
        JobError {
            line,
            message: message.into(),
        }
    }
}

/// A job as its file says. Strings in `config`, `env` and templates may still hold `${NOMAD_…}`: see [`RunTime`].
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: String,
    pub name: String,
    pub namespace: String,
    pub region: String,
    pub datacenter: String,
    pub kind: Kind,
    pub meta: Vec<(String, String)>,
    pub groups: Vec<Group>,
    pub parameterized: Option<Parameterized>,
    /// What the file asks for and only a cluster can give, in the order of the file.
    pub unsupported: Vec<Unsupported>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Service,
    Batch,
    System,
    Sysbatch,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub name: String,
    pub meta: Vec<(String, String)>,
    pub volumes: Vec<Volume>,
    pub ports: Vec<Port>,
    /// The mode of a network that is the allocation's own; `None` is the host's.
    pub own_network: Option<String>,
    pub tasks: Vec<Task>,
}

/// A `volume` of a group, which a Nomad client or a CSI plugin would give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub name: String,
    /// `host` or `csi`.
    pub kind: String,
    /// What the client or the plugin calls it.
    pub source: String,
    pub access: Access,
    pub line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// A `volume_mount` of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// The name of one of the group's volumes.
    pub volume: String,
    pub destination: String,
    pub access: Access,
    /// `private`, `host-to-task` or `bidirectional`.
    pub propagation: String,
    pub selinux_label: String,
    pub line: usize,
}

/// A `port` of a group's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub label: String,
    /// `None` leaves the choice to the scheduler.
    pub fixed: Option<u16>,
    pub line: usize,
}

/// What a dispatch must and may give to the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameterized {
    pub payload: Payload,
    pub meta_required: Vec<String>,
    pub meta_optional: Vec<String>,
    pub line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    Optional,
    Required,
    Forbidden,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    pub name: String,
    pub line: usize,
    pub driver: Setting,
    /// `None` asks for a dynamic workload user.
    pub user: Option<String>,
    /// `None` for a main task.
    pub lifecycle: Option<Lifecycle>,
    /// The driver's own keys, in the order of the file.
    pub config: Vec<(String, Setting)>,
    pub env: Vec<(String, Setting)>,
    pub resources: Resources,
    /// Empty leaves the choice to the driver.
    pub kill_signal: String,
    pub kill_timeout: Duration,
    pub logs: Logs,
    pub templates: Vec<Template>,
    pub volume_mounts: Vec<VolumeMount>,
    /// Where below `local` the payload of a dispatch goes.
    pub payload_file: Option<Setting>,
    pub meta: Vec<(String, String)>,
}

/// When a task runs that is not its group's main one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    /// `prestart`, `poststart` or `poststop`.
    pub hook: String,
    /// It runs beside the main tasks, as long as they do.
    pub sidecar: bool,
    pub line: usize,
}

/// A value and the line it stands on.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    pub value: Value,
    pub line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logs {
    Collected,
    /// `logs { disabled = true }`: both streams go to /dev/null.
    Disabled,
}

/// What a task may use. The defaults are Nomad's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    pub cpu_mhz: u64,
    /// Exclusive cores; with any, `cpu_mhz` is what these cores sum up to.
    pub cores: u32,
    pub memory_mib: u64,
    /// 0 sets none, -1 means unlimited.
    pub memory_max_mib: i64,
}

impl Default for Resources {
    fn default() -> Self {
        Resources {
            cpu_mhz: 100,
            cores: 0,
            memory_mib: 300,
            memory_max_mib: 0,
        }
    }
}

/// A `template` block whose text is used as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pub data: String,
    /// Relative to the task's directory, as in `local/app.conf`.
    pub destination: String,
    pub mode: u32,
    /// `None` leaves it to root.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub target: Target,
    pub line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    File,
    /// `env = true`: the file's `KEY=value` lines also become the task's environment.
    Environment,
}

/// Something in the file that only a cluster can give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    pub key: String,
    /// One sentence, with the remedy where there is one.
    pub message: String,
    pub line: usize,
    pub effect: Effect,
    /// Whose it is; `None` where it holds for the whole job, or for the whole group.
    pub group: Option<String>,
    pub task: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// One run is the same without it.
    None,
    /// Without it the task is not what the file says.
    Missing,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}
