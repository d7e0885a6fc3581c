//! Dispatch, and nothing else: the helper first, then the people's commands, else the plugin that Nomad starts.

use std::ffi::OsStr;
use std::process::ExitCode;

use nomad_driver_exec2::{cli, launch, plugin, task};

fn main() -> ExitCode {
    let first = std::env::args_os().nth(1);
    match first.as_deref().and_then(OsStr::to_str) {
        // Before any thread, runtime, argument parser or logger exists: from here on it is root inside a task.
        Some(launch::SUBCOMMAND) => launch::run(),
        Some(launch::session::SUBCOMMAND) => launch::session::run(),
        // The operator's `args` of the plugin block are no commands of ours.
        Some(_) if !plugin::is_started_by_nomad() => cli::main(),
        _ => plugin::run(|| task::TaskTable::new(task::Ahead::One)),
    }
}
