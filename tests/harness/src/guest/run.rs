//! The runner of the guest cases. The same executable is the host half, which plans, boots and counts, and the guest
//! half (`inside`), which it carries into each guest.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::case::{AT_AGENT, Case, Effort, Part, Reach, Subject, payload_name};
use super::inside::{self, Report};
use super::qemu::PANIC;
use super::report::Tally;
use super::{Boot, Exit, Guest, GuestName, Kind, PAYLOAD_DIR, Payload, Tier, child};

/// What is run, and with what.
#[derive(Debug)]
pub struct Suite<'a> {
    pub cases: &'a [Case],
    pub driver: &'a Path,
    /// Where `make packages` leaves the packages.
    pub packages: &'a Path,
    /// Where the journal and console of a guest with failed cases are kept.
    pub logs: &'a Path,
}

/// The whole command line of a guest test executable.
pub fn main(suite: &Suite<'_>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--inside", part, guest, effort, ..] => {
            run_inside(suite, part, (guest, effort), &arguments[4..])
        }
        ["--case", part, guest, effort, name] => run_case(suite, part, (guest, effort), name),
        words => Selection::parse(words).and_then(|selection| selection.run(suite)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn run_inside(
    suite: &Suite<'_>,
    part: &str,
    (guest, effort): (&str, &str),
    names: &[String],
) -> Result<ExitCode> {
    let effort = serde_json::from_str(effort)?;
    inside::run_all(suite.cases, part.parse()?, guest.parse()?, effort, names)?;
    Ok(ExitCode::SUCCESS)
}

fn run_case(
    suite: &Suite<'_>,
    part: &str,
    (guest, effort): (&str, &str),
    name: &str,
) -> Result<ExitCode> {
    let effort = serde_json::from_str(effort)?;
    inside::run_here(suite.cases, part.parse()?, guest.parse()?, effort, name)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Default)]
struct Selection {
    guests: Vec<GuestName>,
    substrings: Vec<String>,
    list: bool,
    matrix: bool,
    effort: Effort,
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
                "--sequences" => {
                    let count = words.next().context("--sequences needs a number")?;
                    let count = count.parse().context("--sequences needs a number")?;
                    selection.effort.sequences = Some(count);
                }
                "--seed" => {
                    let seed = words.next().context("--seed needs a number")?;
                    let seed = seed.parse().context("--seed needs a number")?;
                    selection.effort.seed = Some(seed);
                }
                "--list" => selection.list = true,
                // cargo test hands the same options to every test executable.
                "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q" => {}
                option if option.starts_with('-') => {
                    bail!(
                        "unknown option {option}; known: --guest NAME, --matrix, --list, --sequences COUNT, --seed SEED, and parts of case names"
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

    fn reach(&self) -> Reach {
        match self.matrix || !self.guests.is_empty() {
            true => Reach::Full,
            false => Reach::Usual,
        }
    }

    /// The matrix has every agent that is named; other runs have the first.
    fn agents(&self, mut all: Vec<RealAgent>) -> Vec<RealAgent> {
        if !self.matrix {
            all.truncate(1);
        }
        all
    }

    fn plan(&self, cases: &[Case], agents: &[RealAgent]) -> Vec<(GuestName, Vec<String>)> {
        let wanted = |name: &String| {
            self.substrings.is_empty()
                || self
                    .substrings
                    .iter()
                    .any(|part| name.contains(part.as_str()))
        };
        // A case of the real agent is run, and counted, once with each.
        let runs = |case: &Case| -> Vec<String> {
            match case.subject {
                Subject::Ours => vec![case.name.to_owned()],
                Subject::Agent => agents
                    .iter()
                    .map(|agent| format!("{}{AT_AGENT}{}", case.name, agent.version))
                    .collect(),
            }
        };
        let for_guest = |guest: GuestName| -> Vec<String> {
            cases
                .iter()
                .filter(|case| case.is_for(guest, self.reach()))
                .flat_map(runs)
                .filter(wanted)
                .collect()
        };
        self.guests()
            .into_iter()
            .map(|guest| (guest, for_guest(guest)))
            .filter(|(_, names)| !names.is_empty())
            .collect()
    }

    fn run(&self, suite: &Suite<'_>) -> Result<ExitCode> {
        let agents = self.agents(agents()?);
        let plan = self.plan(suite.cases, &agents);
        if self.list {
            for (guest, names) in &plan {
                names.iter().for_each(|name| println!("{guest} {name}"));
            }
            return Ok(ExitCode::SUCCESS);
        }
        for agent in &agents {
            println!(
                "a real agent is {} ({})",
                agent.path.display(),
                agent.version
            );
        }
        if agents.is_empty() {
            println!(
                "no `nomad` on PATH or in NOMAD=: the cases that need the real agent are not run and not counted"
            );
        }
        let payload_names: Vec<String> = agents
            .iter()
            .map(|agent| payload_name(&agent.version))
            .collect();
        let mut files = vec![
            ("guests", Path::new("/proc/self/exe")),
            ("nomad-driver-exec2", suite.driver),
        ];
        let agents = payload_names.iter().zip(&agents);
        files.extend(agents.map(|(name, agent)| (name.as_str(), agent.path.as_path())));
        let payload = Payload::new(&files)?
            .with_small_disk()?
            .with_packages(suite.packages)?;
        let tally = Tally::default();
        let run = Run {
            cases: suite.cases,
            plan: &plan,
            payload: &payload,
            logs: suite.logs,
            tally: &tally,
            effort: self.effort,
        };
        run.guests();
        Ok(tally.conclude())
    }
}

/// A `nomad` of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealAgent {
    pub path: PathBuf,
    /// As it says itself, without the `v`.
    pub version: String,
}

/// The colon-separated list in `NOMAD=`, or the first `nomad` on PATH.
pub fn agents() -> Result<Vec<RealAgent>> {
    let named = std::env::var_os("NOMAD").filter(|named| !named.is_empty());
    let paths: Vec<PathBuf> = match &named {
        Some(named) => std::env::split_paths(named).collect(),
        None => {
            let path: OsString = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path)
                .map(|dir| dir.join("nomad"))
                .find(|file| file.is_file())
                .into_iter()
                .collect()
        }
    };
    let mut agents: Vec<RealAgent> = Vec::new();
    for path in paths {
        let version = version(&path)?;
        if let Some(other) = agents.iter().find(|agent| agent.version == version) {
            bail!(
                "NOMAD= names version {version} twice: {} and {}; leave one out",
                other.path.display(),
                path.display()
            );
        }
        agents.push(RealAgent { path, version });
    }
    Ok(agents)
}

/// The first line of `nomad version` is `Nomad v1.10.2`.
fn version(nomad: &Path) -> Result<String> {
    let said = Command::new(nomad)
        .arg("version")
        .output()
        .with_context(|| format!("NOMAD={}: cannot be executed", nomad.display()))?;
    let said = String::from_utf8_lossy(&said.stdout);
    let version = said
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.strip_prefix('v'))
        .filter(|version| !version.contains('/'));
    match version {
        Some(version) => Ok(version.to_owned()),
        None => bail!(
            "NOMAD={}: `nomad version` names no version",
            nomad.display()
        ),
    }
}

struct Run<'a> {
    cases: &'a [Case],
    plan: &'a [(GuestName, Vec<String>)],
    payload: &'a Payload,
    logs: &'a Path,
    tally: &'a Tally,
    effort: Effort,
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

    /// Containers first, which mostly wait: what they measure must not be disturbed by emulators.
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
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            self.tally
                .did_not_run(guest, &names, why.unwrap_or_default());
        }
        let (containers, machines): (Vec<_>, Vec<_>) = built
            .into_iter()
            .partition(|(guest, ..)| guest.kind == Kind::Nspawn);
        for guests in [containers, machines] {
            thread::scope(|threads| {
                for (guest, names, _) in guests {
                    threads.spawn(move || self.guest(guest, names));
                }
            });
        }
    }

    fn guest(&self, name: GuestName, names: &[String]) {
        let mut reported = Vec::new();
        let mut missing = names.to_vec();
        let mut why = String::new();
        // An emulated processor jumps into the middle of an instruction once in a while, and the guest's kernel with it. What
        // makes a kernel panic does so again.
        for _ in 0..2 {
            why = match self.boot_and_run(name, &missing, &mut reported) {
                Ok(()) => "the runner inside said nothing of it".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            missing.retain(|name| !reported.contains(name));
            if !why.contains(PANIC) {
                break;
            }
            println!("{name}: {why}; {} cases are left", missing.len());
        }
        let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
        self.tally.did_not_run(name, &missing, &why);
    }

    fn boot_and_run(
        &self,
        name: GuestName,
        names: &[String],
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
        let (rebooting, others): (Vec<String>, Vec<String>) =
            names.iter().cloned().partition(|name| self.reboots(name));
        if !others.is_empty() {
            self.run_part(&mut *guest, Part::Whole, &others, reported)?;
        }
        // Last, as they leave a guest that is no longer the one that was booted.
        for case in rebooting {
            let case = std::slice::from_ref(&case);
            self.run_part(&mut *guest, Part::BeforeReboot, case, reported)?;
            if !reported.contains(&case[0]) {
                guest.reboot()?;
                self.run_part(&mut *guest, Part::AfterReboot, case, reported)?;
            }
        }
        Ok(())
    }

    fn reboots(&self, name: &str) -> bool {
        Case::find(self.cases, name).is_ok_and(|case| case.after_reboot.is_some())
    }

    fn run_part(
        &self,
        guest: &mut dyn Guest,
        part: Part,
        names: &[String],
        reported: &mut Vec<String>,
    ) -> Result<()> {
        let name = guest.name();
        let (runner, guest_name, effort) = (
            format!("{PAYLOAD_DIR}/guests"),
            name.to_string(),
            serde_json::to_string(&self.effort)?,
        );
        let mut argv = vec![
            runner.as_str(),
            "--inside",
            part.name(),
            &guest_name,
            &effort,
        ];
        argv.extend(names.iter().map(String::as_str));
        let mut patience = Duration::from_secs(60);
        for case in names {
            patience += Case::find(self.cases, case)?.patience(name, self.effort);
        }
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
            self.keep_logs(guest);
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
    use crate::guest::{Length, Needs};

    const CASES: &[Case] = &[
        Case {
            name: "a::fast",
            needs: Needs::Speed,
            subject: Subject::Ours,
            length: Length::Short,
            run: |_| Ok(()),
            after_reboot: None,
        },
        Case {
            name: "a::limited",
            needs: Needs::Limits,
            subject: Subject::Ours,
            length: Length::Short,
            run: |_| Ok(()),
            after_reboot: None,
        },
        Case {
            name: "b::real",
            needs: Needs::Limits,
            subject: Subject::Agent,
            length: Length::Short,
            run: |_| Ok(()),
            after_reboot: None,
        },
        Case {
            name: "c::kernel",
            needs: Needs::Kernel,
            subject: Subject::Ours,
            length: Length::Short,
            run: |_| Ok(()),
            after_reboot: None,
        },
        Case {
            name: "d::long",
            needs: Needs::Everywhere,
            subject: Subject::Ours,
            length: Length::Minutes,
            run: |_| Ok(()),
            after_reboot: None,
        },
    ];

    fn agent(version: &str) -> RealAgent {
        RealAgent {
            path: "/usr/bin/nomad".into(),
            version: version.to_owned(),
        }
    }

    fn plan(words: &[&str], agents: &[&str]) -> Vec<String> {
        let selection = Selection::parse(words).unwrap();
        let agents = selection.agents(agents.iter().map(|version| agent(version)).collect());
        let plan = selection.plan(CASES, &agents);
        plan.iter()
            .map(|(guest, names)| format!("{guest}: {}", names.join(" ")))
            .collect()
    }

    #[test]
    fn each_case_goes_where_it_has_something_to_see() {
        let expected = [
            "trixie-nspawn: a::fast d::long",
            "bookworm-nspawn: a::fast d::long",
            "trixie-qemu: a::limited c::kernel",
            "bookworm-qemu: c::kernel",
        ];
        assert_eq!(plan(&[], &[]), expected);
        assert_eq!(
            plan(&["--guest", "bookworm-qemu"], &[]),
            ["bookworm-qemu: a::limited c::kernel d::long"]
        );
        let matrix = plan(&["--matrix"], &[]);
        let machines: Vec<_> = matrix.iter().filter(|line| line.contains("qemu")).collect();
        assert_eq!(machines.len(), 3);
        assert!(
            machines
                .iter()
                .all(|line| line.ends_with(": a::limited c::kernel d::long"))
        );
    }

    #[test]
    fn cases_of_the_real_agent_need_one() {
        assert_eq!(plan(&["b::"], &[]), Vec::<String>::new());
        assert_eq!(
            plan(&["b::", "--guest", "trixie-qemu"], &["2.0.4"]),
            ["trixie-qemu: b::real@2.0.4"]
        );
    }

    #[test]
    fn the_matrix_runs_them_once_with_each_agent_and_other_runs_with_the_first() {
        let agents = ["1.8.4", "2.0.4"];
        assert_eq!(
            plan(&["b::", "--guest", "trixie-qemu"], &agents),
            ["trixie-qemu: b::real@1.8.4"]
        );
        assert_eq!(
            plan(&["--matrix", "b::", "--guest", "trixie-qemu"], &agents),
            ["trixie-qemu: b::real@1.8.4 b::real@2.0.4"]
        );
        assert_eq!(
            plan(&["--matrix", "@2.0", "--guest", "trixie-qemu"], &agents),
            ["trixie-qemu: b::real@2.0.4"]
        );
    }

    #[test]
    fn what_is_no_nomad_is_refused() {
        for path in ["/no/such/nomad", "/bin/true"] {
            let error = version(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }

    #[test]
    fn sequences_and_a_seed_are_numbers() {
        let words = ["--sequences", "500", "--seed", "7"];
        let expected = Effort {
            sequences: Some(500),
            seed: Some(7),
        };
        assert_eq!(Selection::parse(&words).unwrap().effort, expected);
        for words in [["--sequences", "many"], ["--seed", "-1"]] {
            let error = Selection::parse(&words).unwrap_err().to_string();
            assert_eq!(error, format!("{} needs a number", words[0]));
        }
    }

    #[test]
    fn an_unknown_guest_is_refused_with_the_known_ones() {
        let error = Selection::parse(&["--guest", "potato-qemu"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("trixie-qemu"), "{error}");
    }
}
