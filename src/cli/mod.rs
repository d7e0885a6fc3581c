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
            // Rust ignores SIGPIPE, and eprintln! panics when nobody reads.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("nomad-driver-exec2: {error}\n"),
            );
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}
