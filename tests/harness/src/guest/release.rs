//! Which guests there are. The only place that names Debian's releases.

use std::fmt;
use std::str::FromStr;

/// How often a release is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// In every run.
    Test,
    /// In `make test-matrix`.
    Matrix,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Release {
    pub codename: &'static str,
    pub tier: Tier,
    /// Real programs that cases run as jobs. One release has them: they make it four times as large.
    pub programs: &'static [&'static str],
    /// What of kernel audit its machines have.
    pub audit: Audit,
}

/// Of a machine, by the arguments of its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {
    /// None until the next boot: it would only write.
    Never,
    /// Off, and a case may turn it on: this kernel's Landlock tells it of denials.
    Off,
}

impl Release {
    pub fn has_programs(&self) -> bool {
        !self.programs.is_empty()
    }
}

const PROGRAMS: &[&str] = &[
    // What the benchmark sets a start against.
    "bubblewrap",
    "nginx",
    "nodejs",
    "openjdk-21-jdk-headless",
    "postgresql",
    "python3",
    "redis-server",
    "redis-tools",
];

/// trixie is the default; bookworm the floor (systemd 252, Landlock ABI 2); sid the newest there is.
pub const RELEASES: &[Release] = &[
    Release {
        codename: "trixie",
        tier: Tier::Test,
        programs: PROGRAMS,
        audit: Audit::Never,
    },
    Release {
        codename: "bookworm",
        tier: Tier::Test,
        programs: &[],
        audit: Audit::Never,
    },
    Release {
        codename: "sid",
        tier: Tier::Matrix,
        programs: &[],
        audit: Audit::Off,
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container: native speed, no memory, cpu or io controller.
    Nspawn,
    /// A software-emulated machine: slow, complete.
    Qemu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestName {
    pub release: &'static Release,
    pub kind: Kind,
}

impl GuestName {
    pub fn all() -> impl Iterator<Item = GuestName> {
        [Kind::Nspawn, Kind::Qemu].into_iter().flat_map(|kind| {
            RELEASES
                .iter()
                .map(move |release| GuestName { release, kind })
        })
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Nspawn => "nspawn",
            Kind::Qemu => "qemu",
        };
        f.pad(&format!("{}-{kind}", self.release.codename))
    }
}

impl FromStr for GuestName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<GuestName> {
        GuestName::all()
            .find(|name| name.to_string() == text)
            .ok_or_else(|| {
                let known: Vec<String> = GuestName::all().map(|name| name.to_string()).collect();
                anyhow::anyhow!("there is no guest {text}; there are {}", known.join(", "))
            })
    }
}
