//! The cases that need a real systemd, run inside guests this machine boots for them. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod agent_faults;
mod ahead;
mod attacks;
mod bad_input;
mod bench;
mod bus;
mod calls;
mod check;
mod compat;
mod cores;
mod dbus;
mod denials;
mod drop_ins;
mod endurance;
mod examples;
mod exec;
mod faults;
mod fitness;
mod ground;
mod hostile;
mod jobs;
mod journal;
mod leaks;
mod learn;
mod life;
mod life_cycle;
mod nomad;
mod packages;
mod programs;
mod reboot;
mod recovery;
mod run;
mod run_job;
mod scopes;
mod secrets;
mod session_steps;
mod shortage;
mod steps;
mod surroundings;
mod takeover;
mod tasks;
mod told;
mod transcripts;
mod truth;
mod upgrades;
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
        exec::CASES,
        life::CASES,
        cores::CASES,
        examples::CASES,
        programs::CASES,
        packages::CASES,
        upgrades::CASES,
        drop_ins::CASES,
        bad_input::CASES,
        hostile::CASES,
        attacks::CASES,
        attacks::around::CASES,
        compat::CASES,
        versions::CASES,
        agent::CASES,
        agent_faults::CASES,
        ahead::CASES,
        view::CASES,
        secrets::CASES,
        recovery::CASES,
        bus::CASES,
        steps::CASES,
        session_steps::CASES,
        takeover::CASES,
        truth::CASES,
        life_cycle::CASES,
        endurance::CASES,
        bench::CASES,
        run::CASES,
        run_job::CASES,
        learn::CASES,
        faults::CASES,
        shortage::CASES,
        tasks::CASES,
        transcripts::CASES,
        check::CASES,
        dbus::CASES,
        denials::CASES,
        // Last: they take the guest's journal and bus away for a while.
        journal::CASES,
        fitness::CASES,
        reboot::CASES,
    ]
    .concat();
    for case in &mut cases {
        // The name of this executable, which module_path! puts first.
        case.name = case.name.trim_start_matches("guests::");
    }
    guest::main(&Suite {
        cases: &cases,
        driver: Path::new(env!("CARGO_BIN_EXE_nomad-driver-exec2")),
        packages: &Path::new(env!("CARGO_MANIFEST_DIR")).join("target/package"),
        logs: &Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests"),
    })
}

/// A row of a case table: the name is the module's and the function's. With a second function it is a case that reboots the
/// guest in between.
macro_rules! case {
    ($needs:ident, $subject:ident, $function:ident) => {
        case!(@ $needs, $subject, $function, Short, None)
    };
    ($needs:ident, $subject:ident, $function:ident, Long) => {
        case!(@ $needs, $subject, $function, Long, None)
    };
    ($needs:ident, $subject:ident, $function:ident, Minutes) => {
        case!(@ $needs, $subject, $function, Minutes, None)
    };
    ($needs:ident, $subject:ident, $function:ident, $after_reboot:ident) => {
        case!(@ $needs, $subject, $function, Short, Some($after_reboot))
    };
    (@ $needs:ident, $subject:ident, $function:ident, $length:ident, $after_reboot:expr) => {
        harness::guest::Case {
            name: concat!(module_path!(), "::", stringify!($function)),
            needs: harness::guest::Needs::$needs,
            subject: harness::guest::Subject::$subject,
            length: harness::guest::Length::$length,
            run: $function,
            after_reboot: $after_reboot,
        }
    };
}
use case;
