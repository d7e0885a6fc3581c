//! The runner of the guest cases. The same executable is the host half, which plans, boots and counts, and the guest
//! half (`inside`), which it carries into each guest.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::case::{Case, Subject};
use super::inside::{self, Report};
use super::report::Tally;
use super::{Boot, Exit, Guest, GuestName, Kind, PAYLOAD_DIR, Payload, Tier, child};

/// What is run, and with what.
#[derive(Debug)]
pub struct Suite<'a> {
    pub cases: &'a [Case],
    pub driver: &'a Path,
    /// Where the journal and console of a guest with failed cases are kept.
    pub logs: &'a Path,
}

/// The whole command line of a guest test executable.
pub fn main(suite: &Suite<'_>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--inside", guest, seconds, ..] => run_inside(guest, seconds, &arguments[3..]),
        ["--case", guest, name] => guest
            .parse()
            .and_then(|guest| inside::run_here(suite.cases, guest, name))
            .map(|()| ExitCode::SUCCESS),
        words => Selection::parse(words).and_then(|selection| selection.run(suite)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn run_inside(guest: &str, seconds: &str, names: &[String]) -> Result<ExitCode> {
    inside::run_all(guest.parse()?, seconds.parse()?, names)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Default)]
struct Selection {
    guests: Vec<GuestName>,
    substrings: Vec<String>,
    list: bool,
    matrix: bool,
}

impl Selection {
    fn parse(words: &[&str]) -> Result<Selection> {
        let mut selection = Selection::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--guest" => selection
                    .guests
                    .push(words.next().context("--guest needs a name")?.parse()?),
                "--matrix" => selection.matrix = true,
                "--list" => selection.list = true,
                // cargo test hands the same options to every test executable.
                "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q" => {}
                option if option.starts_with('-') => {
                    bail!(
                        "unknown option {option}; known: --guest NAME, --matrix, --list, and parts of case names"
                    )
                }
                part => selection.substrings.push(part.to_owned()),
            }
        }
        Ok(selection)
    }

    fn guests(&self) -> Vec<GuestName> {
        if !self.guests.is_empty() {
            return self.guests.clone();
        }
        GuestName::all()
            .filter(|name| self.matrix || name.release.tier == Tier::Test)
            .collect()
    }

    fn plan(&self, cases: &[Case], agent: Option<&Path>) -> Vec<(GuestName, Vec<&'static str>)> {
        let wanted = |case: &&Case| {
            self.substrings.is_empty()
                || self
                    .substrings
                    .iter()
                    .any(|part| case.name.contains(part.as_str()))
        };
        let possible = |case: &&Case| case.subject == Subject::Ours || agent.is_some();
        let for_guest = |guest: GuestName| -> Vec<&'static str> {
            cases
                .iter()
                .filter(wanted)
                .filter(possible)
                .filter(|case| case.needs.met_by(guest))
                .map(|case| case.name)
                .collect()
        };
        self.guests()
            .into_iter()
            .map(|guest| (guest, for_guest(guest)))
            .filter(|(_, names)| !names.is_empty())
            .collect()
    }

    fn run(&self, suite: &Suite<'_>) -> Result<ExitCode> {
        let agent = agent()?;
        let plan = self.plan(suite.cases, agent.as_deref());
        if self.list {
            for (guest, names) in &plan {
                names.iter().for_each(|name| println!("{guest} {name}"));
            }
            return Ok(ExitCode::SUCCESS);
        }
        match &agent {
            Some(path) => println!("the real agent is {}", path.display()),
            None => println!(
                "no `nomad` on PATH or in NOMAD=: the cases that need the real agent are not run and not counted"
            ),
        }
        let mut files = vec![
            ("guests", Path::new("/proc/self/exe")),
            ("nomad-driver-exec2", suite.driver),
        ];
        files.extend(agent.as_deref().map(|path| ("nomad", path)));
        let payload = Payload::new(&files)?;
        let tally = Tally::default();
        let run = Run {
            plan: &plan,
            payload: &payload,
            logs: suite.logs,
            tally: &tally,
        };
        run.guests();
        Ok(tally.conclude())
    }
}

/// `NOMAD=` or the first `nomad` on PATH.
pub fn agent() -> Result<Option<PathBuf>> {
    if let Some(named) = std::env::var_os("NOMAD").filter(|named| !named.is_empty()) {
        let path = PathBuf::from(named);
        if !path.is_file() {
            bail!("NOMAD={} is not a file", path.display());
        }
        return Ok(Some(path));
    }
    let path: OsString = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::split_paths(&path)
        .map(|dir| dir.join("nomad"))
        .find(|file| file.is_file()))
}

struct Run<'a> {
    plan: &'a [(GuestName, Vec<&'static str>)],
    payload: &'a Payload,
    logs: &'a Path,
    tally: &'a Tally,
}

impl Run<'_> {
    /// Builds what is missing, one thread per release. Returns the guests that cannot be had, and why.
    fn prepare(&self) -> Vec<(GuestName, String)> {
        let mut releases: BTreeMap<&str, Vec<GuestName>> = BTreeMap::new();
        for (guest, _) in self.plan {
            releases
                .entry(guest.release.codename)
                .or_default()
                .push(*guest);
        }
        let build = |guests: Vec<GuestName>| -> Vec<(GuestName, String)> {
            let failed = |guest| Some((guest, format!("{:#}", super::prepare(guest).err()?)));
            guests.into_iter().filter_map(failed).collect()
        };
        thread::scope(|threads| {
            let builders: Vec<_> = releases
                .into_values()
                .map(|guests| threads.spawn(move || build(guests)))
                .collect();
            builders
                .into_iter()
                .flat_map(|builder| builder.join().unwrap_or_default())
                .collect()
        })
    }

    /// Containers first and one at a time: what they measure must not be disturbed by emulators.
    fn guests(&self) {
        let unbuilt = self.prepare();
        let (unbuilt, built): (Vec<_>, Vec<_>) = self
            .plan
            .iter()
            .map(|(guest, names)| {
                let why = unbuilt.iter().find(|(failed, _)| failed == guest);
                (*guest, names, why.map(|(_, why)| why.as_str()))
            })
            .partition(|(_, _, why)| why.is_some());
        for (guest, names, why) in unbuilt {
            self.tally
                .did_not_run(guest, names, why.unwrap_or_default());
        }
        let (containers, machines): (Vec<_>, Vec<_>) = built
            .into_iter()
            .partition(|(guest, ..)| guest.kind == Kind::Nspawn);
        for (guest, names, _) in containers {
            self.guest(guest, names);
        }
        thread::scope(|threads| {
            for (guest, names, _) in machines {
                threads.spawn(move || self.guest(guest, names));
            }
        });
    }

    fn guest(&self, name: GuestName, names: &[&'static str]) {
        let mut reported = Vec::new();
        let why = match self.boot_and_run(name, names, &mut reported) {
            Ok(()) => "the runner inside said nothing of it".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        let missing: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| !reported.iter().any(|done| done == name))
            .collect();
        self.tally.did_not_run(name, &missing, &why);
    }

    fn boot_and_run(
        &self,
        name: GuestName,
        names: &[&'static str],
        reported: &mut Vec<String>,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut guest = super::boot(
            name,
            &Boot {
                payload: self.payload,
                forwards: &[],
            },
        )?;
        println!("{name}: ready in {:.2} s", begun.elapsed().as_secs_f64());
        let case_seconds: u64 = match name.kind {
            Kind::Nspawn => 60,
            Kind::Qemu => 300,
        };
        let (runner, seconds, guest_name) = (
            format!("{PAYLOAD_DIR}/guests"),
            case_seconds.to_string(),
            name.to_string(),
        );
        let mut argv = vec![runner.as_str(), "--inside", &guest_name, &seconds];
        argv.extend(names);
        let patience = Duration::from_secs(60 + case_seconds * names.len() as u64);
        let (mut last, mut chatter) = (String::new(), String::new());
        let mut failures = 0;
        let exit = guest.run(
            &argv,
            patience,
            &mut |line| match serde_json::from_str(line) {
                Ok(Report::Running { case, seconds }) => {
                    if seconds > 0.0 {
                        println!("{name:<16} {case}: still running ({seconds:.0} s)");
                    }
                    last = case;
                }
                Ok(Report::Ended(ended)) => {
                    failures += usize::from(ended.failure.is_some());
                    reported.push(ended.case.clone());
                    self.tally.ended(name, ended);
                }
                Err(_) => chatter.push_str(&format!("{line}\n")),
            },
        )?;
        if failures > 0 || exit != Exit::Code(0) {
            self.keep_logs(&mut *guest);
        }
        if exit != Exit::Code(0) {
            bail!(
                "the runner inside ended with {exit:?} in {last}\n{}",
                child::tail(&chatter, 40)
            );
        }
        Ok(())
    }

    fn keep_logs(&self, guest: &mut dyn Guest) {
        let dir = self.logs.join(guest.name().to_string());
        let mut journal = String::new();
        let asked = guest.run(
            &["journalctl", "--no-pager", "--boot"],
            Duration::from_secs(60),
            &mut |line| {
                journal.push_str(line);
                journal.push('\n');
            },
        );
        let kept = fs::create_dir_all(&dir)
            .and_then(|()| fs::write(dir.join("journal.txt"), journal))
            .and_then(|()| fs::write(dir.join("console.txt"), guest.console()));
        match (asked, kept) {
            (Ok(_), Ok(())) => println!(
                "{}: journal and console are in {}",
                guest.name(),
                dir.display()
            ),
            (Err(error), _) => println!("{}: no journal: {error}", guest.name()),
            (_, Err(error)) => println!("{}: cannot keep its logs: {error}", guest.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::Needs;

    const CASES: &[Case] = &[
        Case {
            name: "a::fast",
            needs: Needs::Speed,
            subject: Subject::Ours,
            run: |_| Ok(()),
        },
        Case {
            name: "a::limited",
            needs: Needs::Limits,
            subject: Subject::Ours,
            run: |_| Ok(()),
        },
        Case {
            name: "b::real",
            needs: Needs::Limits,
            subject: Subject::Agent,
            run: |_| Ok(()),
        },
    ];

    fn plan(words: &[&str], agent: Option<&Path>) -> Vec<String> {
        let plan = Selection::parse(words).unwrap().plan(CASES, agent);
        plan.iter()
            .map(|(guest, names)| format!("{guest}: {}", names.join(" ")))
            .collect()
    }

    #[test]
    fn each_case_goes_where_it_has_something_to_see() {
        let expected = [
            "trixie-nspawn: a::fast",
            "bookworm-nspawn: a::fast",
            "trixie-qemu: a::limited",
            "bookworm-qemu: a::limited",
        ];
        assert_eq!(plan(&[], None), expected);
    }

    #[test]
    fn cases_of_the_real_agent_need_one() {
        assert_eq!(plan(&["b::"], None), Vec::<String>::new());
        let agent = Some(Path::new("/usr/bin/nomad"));
        assert_eq!(
            plan(&["b::", "--guest", "trixie-qemu"], agent),
            ["trixie-qemu: b::real"]
        );
    }

    #[test]
    fn an_unknown_guest_is_refused_with_the_known_ones() {
        let error = Selection::parse(&["--guest", "potato-qemu"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("trixie-qemu"), "{error}");
    }
}
