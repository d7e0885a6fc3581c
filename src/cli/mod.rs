//! For people: the command line of the binary that Nomad starts as its plugin. Each command is one file.

mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs commands and job files the way Nomad's tasks with the driver "exec2" run: in a systemd scope of their own, confined by Landlock.
#[derive(Debug, Parser)]
#[command(
    name = "nomad-driver-exec2",
    version,
    after_help = "Without a command this is a plugin for Nomad: put it into the agent's plugin_dir and Nomad starts it."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Run),
}

/// Told from what a command itself exits with, as env(1) and timeout(1) do.
const COULD_NOT_RUN: u8 = 125;

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let Command::Run(run) = Arguments::parse().command;
    match run.main() {
        Ok(code) => code,
        Err(error) => {
            run::terminal::say(error);
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn a_run_is_of_a_command_or_of_a_job_file() {
        Arguments::command().debug_assert();
        let is_taken = |line: &str| {
            let words = format!("nomad-driver-exec2 run {line}");
            Arguments::try_parse_from(words.split_whitespace()).is_ok()
        };
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
