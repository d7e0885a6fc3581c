//! A case: one behaviour, looked at from inside a guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::payload::{PACKAGES, RPM};
use super::release::RELEASES;
use super::{GuestName, Kind, PAYLOAD_DIR};

/// Where a case has something to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// A real systemd at native speed: containers.
    Speed,
    /// Memory, cpu and io controllers, OOM kills, a reboot: machines.
    Limits,
    /// Likewise, and differs with the release's kernel or systemd.
    Kernel,
    /// Real programs, at native speed: containers of the release that has them.
    Programs,
    /// Real programs that look at their limits: machines of that release.
    ProgramLimits,
    /// A real systemd; machines show little more than containers, and are asked with full reach only.
    Both,
    /// Differs between the two and with the release's kernel, which no container has of its own, or is too important to see
    /// only once.
    Everywhere,
}

/// How many machines a case of limits is run in. Emulated, each takes ten times a host's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// That of the default release; those of the others for what differs with their kernels.
    Usual,
    /// Every one.
    Full,
}

impl Needs {
    fn met_by(self, guest: GuestName, reach: Reach) -> bool {
        let container = guest.kind == Kind::Nspawn;
        let full = reach == Reach::Full;
        match self {
            Needs::Speed => container,
            Needs::Programs => container && guest.release.has_programs(),
            Needs::ProgramLimits => !container && guest.release.has_programs(),
            Needs::Limits => !container && (full || guest.release == &RELEASES[0]),
            Needs::Kernel => !container,
            Needs::Both => container || full,
            Needs::Everywhere => true,
        }
    }
}

/// Who plays the agent in a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Nobody, or our own client: runs everywhere.
    Ours,
    /// A real `nomad`, where there is one.
    Agent,
}

/// How long a case may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Short,
    /// It does so much that a busy machine needs several times as long as others get.
    Long,
    /// Minutes in a machine, where it is run with full reach only.
    Minutes,
}

impl Length {
    fn patience(self) -> u64 {
        match self {
            Length::Short => 1,
            Length::Long | Length::Minutes => 4,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub needs: Needs,
    pub subject: Subject,
    pub length: Length,
    pub run: fn(&Context) -> Result<()>,
    /// What is looked at after a reboot of the guest. `run` then comes before it, leaves what there is to see, and keeps on
    /// the guest's disk what this has to know.
    pub after_reboot: Option<fn(&Context) -> Result<()>>,
}

/// How much of a case is run: one that reboots its guest comes in two halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    BeforeReboot,
    AfterReboot,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Whole => "whole",
            Part::BeforeReboot => "before-reboot",
            Part::AfterReboot => "after-reboot",
        }
    }
}

impl FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Part> {
        [Part::Whole, Part::BeforeReboot, Part::AfterReboot]
            .into_iter()
            .find(|part| part.name() == name)
            .with_context(|| format!("{name} is no part of a case"))
    }
}

impl Case {
    pub(super) fn is_for(&self, guest: GuestName, reach: Reach) -> bool {
        let is_too_long =
            self.length == Length::Minutes && guest.kind == Kind::Qemu && reach == Reach::Usual;
        self.needs.met_by(guest, reach) && !is_too_long
    }

    /// The case of a name, which may have the version of an agent.
    pub(super) fn find<'a>(cases: &'a [Case], name: &str) -> Result<&'a Case> {
        let function = name
            .split_once(AT_AGENT)
            .map_or(name, |(function, _)| function);
        let found = cases.iter().find(|case| case.name == function);
        found.with_context(|| format!("there is no case {function}"))
    }

    /// When it counts as hanging.
    pub(super) fn patience(&self, guest: GuestName, effort: Effort) -> Duration {
        let usual = match guest.kind {
            Kind::Nspawn => 120,
            Kind::Qemu => 300,
        };
        let sequences = effort.sequences.unwrap_or(0);
        Duration::from_secs(usual * self.length.patience()) + SEQUENCE_PATIENCE * sequences
    }
}

/// What each sequence that is asked for adds to the patience with a case.
const SEQUENCE_PATIENCE: Duration = Duration::from_secs(4);

/// How much the cases of random sequences do, where whoever runs them wants more or other than usual.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effort {
    /// How many sequences each of them tries.
    pub sequences: Option<u32>,
    /// The seed of the first, in place of new ones; without a number of sequences it is the only one.
    pub seed: Option<u64>,
}

/// What a case may ask of the guest it runs in.
#[derive(Debug)]
pub struct Context {
    guest: GuestName,
    /// Version of the real agent.
    agent: Option<String>,
    effort: Effort,
}

/// Between the name of a case and the version of the real agent that it is run with.
pub(super) const AT_AGENT: char = '@';

/// The real agent of this version in the payload.
pub(super) fn payload_name(version: &str) -> String {
    format!("nomad-{version}")
}

impl Context {
    pub(super) fn new(guest: GuestName, agent: Option<&str>, effort: Effort) -> Context {
        Context {
            guest,
            agent: agent.map(str::to_owned),
            effort,
        }
    }

    pub fn effort(&self) -> Effort {
        self.effort
    }

    pub fn guest(&self) -> GuestName {
        self.guest
    }

    /// The driver under test.
    pub fn driver(&self) -> PathBuf {
        self.payload("nomad-driver-exec2")
    }

    /// The real agent. Only for cases of `Subject::Agent`.
    pub fn agent(&self) -> PathBuf {
        self.payload(&payload_name(self.agent.as_deref().unwrap_or_default()))
    }

    /// The Debian package under test.
    pub fn package(&self) -> Result<PathBuf> {
        let files = fs::read_dir(self.payload(PACKAGES))?.flatten();
        let mut paths = files.map(|file| file.path());
        let found = paths.find(|path| !path.to_string_lossy().contains("-dbgsym_"));
        found.context("there is no package among the files under test: `make packages` comes first")
    }

    /// Where `rpm` is, and the .rpm under test as `now.rpm` and, of a later version, `next.rpm`.
    pub fn rpm(&self, name: &str) -> Result<PathBuf> {
        let path = self.payload(RPM).join(name);
        let found = path.exists().then_some(path);
        found.context("there is no .rpm among the files under test: `make packages` comes first")
    }

    pub fn payload(&self, name: &str) -> PathBuf {
        Path::new(PAYLOAD_DIR).join(name)
    }

    /// A line that is printed below the case even when it passes: measurements, versions.
    pub fn note(&self, text: impl AsRef<str>) {
        for line in text.as_ref().lines() {
            println!("{NOTE}{line}");
        }
    }

    /// Runs an async case on a runtime of its own.
    pub fn block_on<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(work)
    }
}

/// Marks the lines of a case's output that are notes. Not `note:`, which a panic prints too.
pub(super) const NOTE: &str = "##note ";
