//! The options that go with a job file, whatever is done with it.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::values::{assignment, mebibytes, volume};

/// What wins over a job file, and what it needs to be complete.
#[derive(Debug, Args)]
pub struct Given {
    /// Memory limit: a number of MiB, or with K, M or G [default: the job's, or 300M]
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub(super) memory: Option<u64>,
    /// CPU limit in MHz, as in a job's `resources` [default: the job's, or 1000]
    #[arg(long, value_name = "MHZ", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) cpu: Option<u64>,
    /// Unveil a path, as in `r:/srv`; the mode is any of r, w, x, c [repeatable]
    #[arg(long, value_name = "MODE:PATH")]
    pub(super) unveil: Vec<String>,
    /// User to run as, by name [default: the job's, or a dynamic one]
    #[arg(long, value_name = "USER", value_hint = ValueHint::Username)]
    pub user: Option<String>,
    /// Set a variable of the task's environment [repeatable]
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    pub(super) env: Vec<(String, String)>,
    #[command(flatten)]
    pub of_job: OfJob,
}

impl Given {
    /// The name of an option that was given, for a command that has no use for it.
    pub fn first_set(&self) -> Option<&'static str> {
        let OfJob {
            task,
            var,
            volume,
            meta,
            payload,
            ignore,
        } = &self.of_job;
        let options = [
            ("--memory", self.memory.is_some()),
            ("--cpu", self.cpu.is_some()),
            ("--unveil", !self.unveil.is_empty()),
            ("--user", self.user.is_some()),
            ("--env", !self.env.is_empty()),
            ("--task", task.is_some()),
            ("--var", !var.is_empty()),
            ("--volume", !volume.is_empty()),
            ("--meta", !meta.is_empty()),
            ("--payload", payload.is_some()),
            ("--ignore", !ignore.is_empty()),
        ];
        let set = options.into_iter().find(|(_, is_set)| *is_set);
        set.map(|(name, _)| name)
    }
}

/// What only a job file can use.
#[derive(Debug, Args)]
#[command(next_help_heading = "For a job file")]
pub struct OfJob {
    /// Only this task, as TASK or GROUP/TASK
    #[arg(long)]
    pub task: Option<String>,
    /// Give one of the file's variables a value, as `nomad job run -var` does [repeatable]
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    pub var: Vec<(String, String)>,
    /// The directory of this host that is a volume of the job [repeatable]
    #[arg(long, value_name = "NAME=/PATH", value_parser = volume)]
    pub volume: Vec<(String, PathBuf)>,
    /// Metadata for a parameterized job, as `nomad job dispatch -meta` gives it [repeatable]
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    pub(super) meta: Vec<(String, String)>,
    /// Payload for a parameterized job
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) payload: Option<PathBuf>,
    /// Do without a block that needs a cluster, as in `artifact` [repeatable]
    #[arg(long, value_name = "BLOCK")]
    pub(super) ignore: Vec<String>,
}
