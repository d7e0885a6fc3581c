//! The cases that need a real systemd, run inside guests this machine boots for them. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod bad_input;
mod calls;
mod compat;
mod cores;
mod dbus;
mod endurance;
mod examples;
mod fitness;
mod ground;
mod hostile;
mod jobs;
mod leaks;
mod life;
mod life_cycle;
mod nomad;
mod programs;
mod recovery;
mod run;
mod run_job;
mod scopes;
mod surroundings;
mod versions;
mod view;

use std::path::Path;
use std::process::ExitCode;

use harness::guest::{self, Case, Suite};

fn main() -> ExitCode {
    let mut cases: Vec<Case> = [
        ground::CASES,
        leaks::CASES,
        scopes::CASES,
        surroundings::CASES,
        jobs::CASES,
        life::CASES,
        cores::CASES,
        examples::CASES,
        programs::CASES,
        bad_input::CASES,
        hostile::CASES,
        compat::CASES,
        versions::CASES,
        agent::CASES,
        view::CASES,
        recovery::CASES,
        life_cycle::CASES,
        endurance::CASES,
        run::CASES,
        run_job::CASES,
        dbus::CASES,
        // Last: it takes the guest's bus away for a while.
        fitness::CASES,
    ]
    .concat();
    for case in &mut cases {
        // The name of this executable, which module_path! puts first.
        case.name = case.name.trim_start_matches("guests::");
    }
    guest::main(&Suite {
        cases: &cases,
        driver: Path::new(env!("CARGO_BIN_EXE_nomad-driver-exec2")),
        logs: &Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests"),
    })
}

/// A row of a case table: the name is the module's and the function's.
macro_rules! case {
    ($needs:ident, $subject:ident, $function:ident) => {
        case!($needs, $subject, $function, Short)
    };
    ($needs:ident, $subject:ident, $function:ident, $length:ident) => {
        harness::guest::Case {
            name: concat!(module_path!(), "::", stringify!($function)),
            needs: harness::guest::Needs::$needs,
            subject: harness::guest::Subject::$subject,
            length: harness::guest::Length::$length,
            run: $function,
        }
    };
}
use case;
