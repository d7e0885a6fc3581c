//! What a person writes: a job file, turned into the request that Nomad would send to the driver, and the directories that
//! Nomad would have made for it. Used by the people's commands and by the tests. It starts nothing and knows no gRPC.

pub mod alloc_dir;
pub mod environment;
mod evaluate;
mod hcl;
pub mod request;
pub mod template;

use std::time::Duration;

pub use ::hcl::Value;
pub use evaluate::{RunTime, RunTimeError};
pub use hcl::{JobError, parse};

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
    pub count: u32,
    pub meta: Vec<(String, String)>,
    pub tasks: Vec<Task>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    pub name: String,
    pub line: usize,
    pub driver: String,
    /// `None` asks for a dynamic workload user.
    pub user: Option<String>,
    /// The driver's own keys, in the order of the file.
    pub config: Vec<(String, Setting)>,
    pub env: Vec<(String, Setting)>,
    pub resources: Resources,
    /// Empty leaves the choice to the driver.
    pub kill_signal: String,
    pub kill_timeout: Duration,
    pub logs: Logs,
    pub templates: Vec<Template>,
    pub meta: Vec<(String, String)>,
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
    /// Where in the job: `group web: service`.
    pub what: String,
    pub line: usize,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {} needs a Nomad cluster", self.line, self.what)
    }
}
