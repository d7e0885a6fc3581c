//! `tasks`: what runs on this host, and what is left over. Looks, and changes nothing.

mod frame;
mod survey;
mod table;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use rustix::termios::tcgetwinsize;
use thiserror::Error;

use super::terminal::{MAX_SENTENCE_BYTES, Stops, colours, say};
use crate::systemd::Systemd;
use crate::text::one_line;
use frame::Size;
use survey::Survey;
pub use survey::Task;
pub use table::COLUMNS;

/// List the tasks on this host, those of Nomad's and of `run`, and what is left over of some
#[derive(Debug, Args)]
#[command(after_help = "\
The states:
  running   its processes are there
  frozen    the same, and stand still until `systemctl thaw UNIT`
  starting  its scope is there, its start not done yet
  ended     with an exit code or by a signal, and Nomad has not collected that yet
  orphan    processes without a record, as of a start that nobody finished; `systemctl stop UNIT`
            ends them
  leftover  a scope or a record without a process and without an end, as after a SIGKILL to the
            supervisor; Nomad's next call about the task removes it; of a `run`, remove
            /run/nomad-driver-exec2/records/UNIT

AGE is the time since the start, or since the end of what has ended. MEMORY is what is used and the
limit, CPU the time used so far and the limit in percent of one core, THROTTLED how many of the
periods of that limit (100 ms) in which the task ran ended early because it was used up. OWNER is
the Nomad node whose agent started the task, or `run`. What is not known is `-`.

Examples:
  nomad-driver-exec2 tasks
  nomad-driver-exec2 tasks --watch=5
  nomad-driver-exec2 tasks --json | jq -r '.[] | select(.state != \"running\") | .unit'")]
pub struct Tasks {
    /// Print an array of objects in one line, with null for what is not known or not limited
    #[arg(long)]
    json: bool,
    /// Print again every so many seconds, 2 if none are named, until Ctrl-C; a terminal is shown as much as fits
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    watch: Option<u64>,
}

#[derive(Debug, Error)]
pub enum TasksError {
    #[error("tasks needs root: what it reads is root's alone; try sudo")]
    NotRoot,
    #[error(transparent)]
    Host(#[from] io::Error),
}

const NOTHING: &str = "no task is here, and nothing is left over of one";

impl Tasks {
    pub fn main(self) -> Result<ExitCode, TasksError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(TasksError::NotRoot);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        match runtime.block_on(self.show()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            shown => Ok(shown.map(|()| ExitCode::SUCCESS)?),
        }
    }

    async fn show(&self) -> io::Result<()> {
        let systemd = Systemd::new();
        let Some(seconds) = self.watch else {
            return self.print(&survey::survey(&systemd).await);
        };
        let mut stops = Stops::listen()?;
        loop {
            let survey = survey::survey(&systemd).await;
            if !self.json && io::stdout().is_terminal() {
                redraw(&survey)?;
            } else {
                self.print(&survey)?;
            }
            tokio::select! {
                _ = stops.next() => return Ok(()),
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
            }
        }
    }

    fn print(&self, survey: &Survey) -> io::Result<()> {
        notes(survey).for_each(say);
        let mut stdout = io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut stdout, &survey.tasks)?;
            return writeln!(stdout);
        }
        stdout.write_all(table::table(&survey.tasks, colours()).as_bytes())?;
        stdout.flush()
    }
}

fn notes(survey: &Survey) -> impl Iterator<Item = &str> {
    let nothing = survey.tasks.is_empty().then_some(NOTHING);
    survey.warning.as_deref().into_iter().chain(nothing)
}

fn redraw(survey: &Survey) -> io::Result<()> {
    let table = table::table(&survey.tasks, colours());
    let notes = notes(survey).map(|note| one_line(note, MAX_SENTENCE_BYTES));
    let mut stdout = io::stdout().lock();
    let size = tcgetwinsize(&stdout)?;
    let size = Size {
        rows: size.ws_row.into(),
        columns: size.ws_col.into(),
    };
    let frame = frame::frame(&table, &notes.collect::<Vec<_>>(), size);
    stdout.write_all(frame.as_bytes())?;
    stdout.flush()
}
