//! For people: the command line of the binary that Nomad starts as its plugin. Each command is one file.

pub mod check;
mod run;
pub mod tasks;
mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Checks a host and jobs for Nomad's driver "exec2", lists its tasks, and runs commands and job files the way these run: in a systemd scope of their own, confined by Landlock.
#[derive(Debug, Parser)]
#[command(
    name = "nomad-driver-exec2",
    version,
    after_help = "\
Without a command this is a plugin for Nomad: put it into the agent's plugin_dir to have it started.

Examples:
  nomad-driver-exec2 check
  nomad-driver-exec2 run --memory 64M --unveil r:/srv -- ls -l /srv

The manual is man nomad-driver-exec2."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(Box<check::Check>),
    Run(Box<run::Run>),
    Tasks(tasks::Tasks),
}

/// Told from what a command itself exits with, as env(1) and timeout(1) do.
const COULD_NOT_RUN: u8 = 125;

/// The command line's definition, for manual pages and shell completion.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Check(check) => check.main().map_err(|error| error.to_string()),
        Command::Run(run) => run.main().map_err(|error| error.to_string()),
        Command::Tasks(tasks) => tasks.main().map_err(|error| error.to_string()),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            terminal::say(error);
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_taken(line: &str) -> bool {
        let words = format!("nomad-driver-exec2 {line}");
        Arguments::try_parse_from(words.split_whitespace()).is_ok()
    }

    #[test]
    fn tasks_are_watched_every_two_or_so_many_seconds() {
        for line in ["tasks", "tasks --json --watch", "tasks --watch=10"] {
            assert!(is_taken(line), "{line}");
        }
        for line in ["tasks x", "tasks --watch=0", "tasks --watch 10"] {
            assert!(!is_taken(line), "{line}");
        }
    }

    #[test]
    fn a_check_is_of_the_host_or_of_a_job_file() {
        for line in [
            "check",
            "check --json --config /a --config /b",
            "check --task g/t --var a=1 --volume d=/srv --memory 64M web.nomad.hcl",
        ] {
            assert!(is_taken(line), "{line}");
        }
        for line in ["check a.hcl b.hcl", "check --watch", "check --config"] {
            assert!(!is_taken(line), "{line}");
        }
    }

    #[test]
    fn a_run_is_of_a_command_or_of_a_job_file() {
        Arguments::command().debug_assert();
        let is_taken = |line: &str| is_taken(&format!("run {line}"));
        for line in [
            "-- true",
            "--memory 64M --unveil r:/srv -- ls -l",
            "web.nomad.hcl",
            "--var a=1 --var b=[1] --task g/t --volume d=/srv --env A= web.nomad.hcl",
            "web.nomad.hcl --meta a=b --payload x --ignore artifact",
        ] {
            assert!(is_taken(line), "{line}");
        }
        for line in [
            "",
            "web.nomad.hcl -- true",
            "--task t -- true",
            "--var a=1 -- true",
            "--volume d=/srv -- true",
            "--volume d=srv web.nomad.hcl",
            "--ignore artifact -- true",
            "web.nomad.hcl other.nomad.hcl",
        ] {
            assert!(!is_taken(line), "{line}");
        }
    }
}
