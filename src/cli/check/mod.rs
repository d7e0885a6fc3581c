//! `check`: is this host fit for the driver, and what would a job's tasks be given. Looks, and changes nothing.

mod agent;
mod findings;
mod host;
mod job;
mod managers;
mod plugin_dir;
mod report;
mod view;
mod work_dir;

use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueHint};
use thiserror::Error;

use self::agent::Agent;
use self::report::{Line, Status};
use super::run::{Given, RunError};
use super::terminal::{colours, say};
use crate::host::Host;
use crate::systemd::Systemd;

/// Check whether this host is fit for the driver, or what a job's tasks would be given on it; nothing is run or changed
#[derive(Debug, Args)]
#[command(
    override_usage = "nomad-driver-exec2 check [--json] [--config PATH]...\n       \
        nomad-driver-exec2 check [OPTIONS] JOB.nomad.hcl",
    after_help = "\
Without a job file there is a line for each fact about the host and its Nomad agent: ok, warning or
error, what was found, and what to do about it. The agent's configuration is that of the agent that
runs, else what is in /etc/nomad.d. As another user than root it tells what it can.

With a job file each of its tasks with the driver exec2, or that of --task, is planned as a start by
Nomad would be: user, command, directory, scope and limits, capabilities, network, volumes,
environment and every unveiled path with who unveils it; then what would keep it from starting, and
what in its unveil has no effect. What only a start on a client can tell (ports, the dynamic user,
ids, templates with functions) is named, and shown with a word or number in its place.

Examples:
  nomad-driver-exec2 check
  nomad-driver-exec2 check --json | jq -r '.[] | select(.status == \"error\") | .remedy'
  nomad-driver-exec2 check --config /etc/nomad.d/client.hcl
  nomad-driver-exec2 check --volume data=/srv/data web.nomad.hcl

The exit status is 0 if all is well or there are only warnings, and 1 if there is an error: in the
host, the agent's configuration or the job file. It is 125 if nothing could be checked, as the file
cannot be read or has no such task, and 2 for wrong options; both are told on standard error, and
nothing else is printed."
)]
pub struct Check {
    /// Print an array of objects in one line
    #[arg(long)]
    json: bool,
    /// The agent's configuration, a file or a directory [repeatable; default: that of the agent that runs, or /etc/nomad.d]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    config: Vec<PathBuf>,
    /// The job file
    #[arg(value_name = "JOB.nomad.hcl", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    #[command(flatten)]
    given: Given,
}

#[derive(Debug, Error)]
pub enum CheckError {
    #[error(transparent)]
    Host(#[from] io::Error),
    #[error(transparent)]
    Job(#[from] RunError),
    #[error("{}: {what} has no task with driver = \"exec2\", so that there is nothing to check", file.display())]
    NoTask { file: PathBuf, what: String },
    #[error("{0} is about a job: name the job file, too")]
    NoFile(&'static str),
}

/// What is wrong was found.
const FOUND: u8 = 1;
/// As clap has it.
const WRONG_OPTIONS: u8 = 2;

impl Check {
    pub fn main(self) -> Result<ExitCode, CheckError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (shown, is_well) = match runtime.block_on(self.look()) {
            Err(error @ CheckError::NoFile(_)) => {
                say(error);
                return Ok(ExitCode::from(WRONG_OPTIONS));
            }
            looked => looked?,
        };
        match self.print(&shown) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
        Ok(ExitCode::from(if is_well { 0 } else { FOUND }))
    }

    /// What is printed, and whether there is no error in it.
    async fn look(&self) -> Result<(String, bool), CheckError> {
        let is_well = |lines: &[Line]| lines.iter().all(|line| line.status != Status::Error);
        let json = |value: serde_json::Result<String>| value.map_err(io::Error::from);
        let Some(file) = &self.file else {
            if let Some(option) = self.given.first_set() {
                return Err(CheckError::NoFile(option));
            }
            let lines = self.host().await;
            let shown = match self.json {
                true => json(serde_json::to_string(&lines))? + "\n",
                false => report::text(&lines, colours()),
            };
            return Ok((shown, is_well(&lines)));
        };
        let agent = Agent::read(&self.config);
        let tasks = job::check(file, &self.given, &agent).await?;
        let shown = match self.json {
            true => json(serde_json::to_string(&tasks))? + "\n",
            false => tasks
                .iter()
                .map(|task| task.text(file, colours()))
                .collect(),
        };
        Ok((shown, tasks.iter().all(|task| is_well(&task.findings))))
    }

    async fn host(&self) -> Vec<Line> {
        let host = Host::read();
        let systemd = Systemd::new().version().await;
        let facts = host::Facts::read(systemd.map_err(|error| error.to_string()));
        let mut lines = host::lines(&host, &facts);
        lines.extend(Agent::read(&self.config).lines());
        lines
    }

    fn print(&self, shown: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(shown.as_bytes())?;
        stdout.flush()
    }
}
