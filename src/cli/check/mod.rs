//! `check`: is this host fit for the driver, and what would a job's tasks be given. Looks, and changes nothing.

mod agent;
mod findings;
mod host;
mod plugin_dir;
mod report;

use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use thiserror::Error;

use self::agent::Agent;
use self::report::{Line, Status};
use super::terminal::colours;
use crate::host::Host;
use crate::systemd::Systemd;

/// Check whether this host is fit for the driver
#[derive(Debug, Args)]
pub struct Check {
    /// Print an array of objects in one line
    #[arg(long)]
    json: bool,
    /// The agent's configuration, a file or a directory [repeatable; default: that of the agent that runs, or /etc/nomad.d]
    #[arg(long, value_name = "PATH")]
    config: Vec<PathBuf>,
}

#[derive(Debug, Error)]
pub enum CheckError {
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// What is wrong was found.
const FOUND: u8 = 1;

impl Check {
    pub fn main(self) -> Result<ExitCode, CheckError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let lines = runtime.block_on(self.host());
        match self.print(&lines) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
        let is_fit = lines.iter().all(|line| line.status != Status::Error);
        Ok(ExitCode::from(if is_fit { 0 } else { FOUND }))
    }

    async fn host(&self) -> Vec<Line> {
        let host = Host::read();
        let systemd = Systemd::new().version().await;
        let facts = host::Facts::read(systemd.map_err(|error| error.to_string()));
        let mut lines = host::lines(&host, &facts);
        lines.extend(Agent::read(&self.config).lines());
        lines
    }

    fn print(&self, lines: &[Line]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut stdout, lines)?;
            return writeln!(stdout);
        }
        stdout.write_all(report::text(lines, colours()).as_bytes())?;
        stdout.flush()
    }
}
