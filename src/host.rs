//! What this host offers: root, cgroup v2, Landlock, systemd's version, the agent's unit, CPU power. Read, never changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::audit::{self, Audit};
use crate::cgroup::{self, Cgroup};
use crate::plan::denials::FIRST_ABI;
use crate::plan::files::Resolver;
use crate::plan::limits::{self, Compute, QuotaGrain};

/// The controllers that limits are made of.
pub const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// cgroup.kill came with it.
pub const OLDEST_KERNEL: (u32, u32) = (5, 14);
/// The oldest one that is tested; the packages demand it, too.
const OLDEST_SYSTEMD: u32 = 252;
/// The first systemd whose CPU quota survives a daemon-reload to the hundredth of a percent.
const FINE_QUOTA_SYSTEMD: u32 = 257;

/// Whether tasks can run here, and if not, why, with the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fitness {
    Fit,
    /// Something that tasks need is missing for now.
    Unhealthy(String),
    /// This is no host for the driver.
    Undetected(String),
}

/// What tasks need of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Root,
    /// As the init system.
    Systemd,
    Unified,
    Landlock,
    /// And systemd's answer on it, of a version that will do.
    Bus,
    Controllers(&'static [&'static str]),
}

/// Facts that do not need systemd's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub is_root: bool,
    pub runs_systemd: bool,
    pub is_unified: bool,
    pub missing_controllers: Vec<&'static str>,
    /// Whether tasks can be kept on CPUs; without, they can run all the same.
    pub has_cpuset: bool,
    /// Landlock's ABI; `None` if the kernel has none or it is off.
    pub landlock_abi: Option<u32>,
    /// `None` where Landlock tells it nothing.
    pub audit: Option<Audit>,
}

/// sd_booted(3).
pub fn runs_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

impl Host {
    pub fn read() -> Self {
        let controllers = Cgroup::at("/").controllers();
        let has = |name: &str| {
            controllers
                .as_ref()
                .is_ok_and(|all| all.iter().any(|one| one == name))
        };
        let landlock_abi = crate::sys::landlock_abi();
        let tells = landlock_abi.is_some_and(|abi| abi >= FIRST_ABI);
        Self {
            is_root: nix::unistd::geteuid().is_root(),
            runs_systemd: runs_systemd(),
            is_unified: controllers.is_ok(),
            missing_controllers: CONTROLLERS.into_iter().filter(|name| !has(name)).collect(),
            has_cpuset: has("cpuset"),
            landlock_abi,
            audit: tells.then(audit::status),
        }
    }

    /// Judges the host; `systemd` is its version, or why it did not answer.
    pub fn fitness(&self, systemd: &Result<String, String>) -> Fitness {
        let lack = |need: Need| self.lack(need, systemd);
        let undetected = [Need::Root, Need::Systemd, Need::Unified, Need::Landlock];
        if let Some(text) = undetected.into_iter().find_map(lack) {
            return Fitness::Undetected(text);
        }
        let unhealthy = [Need::Bus, Need::Controllers(&CONTROLLERS)];
        match unhealthy.into_iter().find_map(lack) {
            Some(text) => Fitness::Unhealthy(text),
            None => Fitness::Fit,
        }
    }

    /// What the host lacks of one need, as a sentence that ends with the remedy after a semicolon.
    pub fn lack(&self, need: Need, systemd: &Result<String, String>) -> Option<String> {
        let text = match need {
            Need::Root if !self.is_root => "Driver must run as root",
            Need::Systemd if !self.runs_systemd => {
                "systemd is not the init system of this host; the driver needs it to start a scope for each task"
            }
            Need::Unified if !self.is_unified => {
                "cgroup v2 is not mounted at /sys/fs/cgroup; boot with systemd.unified_cgroup_hierarchy=1"
            }
            Need::Landlock if self.landlock_abi.is_none() => {
                let (major, minor) = OLDEST_KERNEL;
                return Some(format!(
                    "Landlock is not available; it needs Linux {major}.{minor} or newer with landlock in the kernel's lsm= list"
                ));
            }
            Need::Bus => {
                return match systemd {
                    Ok(version) => too_old(version),
                    Err(reason) => Some(reason.clone()),
                };
            }
            Need::Controllers(needed) => {
                let is_missing = |name: &&&str| self.missing_controllers.contains(*name);
                let missing: Vec<_> = needed.iter().filter(is_missing).copied().collect();
                return (!missing.is_empty()).then(|| {
                    format!(
                        "cgroup v2 has no {} controller, so limits are not in force; check cgroup_disable= and v1 mounts",
                        missing.join(", ")
                    )
                });
            }
            _ => return None,
        };
        Some(text.into())
    }

    /// What this kernel cannot enforce although tasks can run.
    pub fn degraded(&self) -> Vec<&'static str> {
        let lacks = [self.ungoverned(), self.cpuset_lack()];
        lacks.into_iter().flatten().collect()
    }

    /// Why nobody hears what Landlock denies; nothing if somebody does.
    pub fn denials_lack(&self) -> Option<&'static str> {
        match self.audit {
            Some(Audit::On) => None,
            None => Some("Landlock tells of none before ABI 7 (Linux 6.15)"),
            Some(Audit::Off) => Some(
                "kernel audit is off; auditctl -e 1 turns it on, for tasks that run already, too",
            ),
            Some(Audit::Absent) => Some("there is no kernel audit; boot with audit=1"),
            Some(Audit::Refused) => Some("kernel audit is not told to this process"),
        }
    }

    pub fn cpuset_lack(&self) -> Option<&'static str> {
        (!self.has_cpuset).then_some("no cpuset controller, so reserved cores are not exclusive")
    }

    /// What this kernel's Landlock does not govern.
    pub fn ungoverned(&self) -> Option<&'static str> {
        match self.landlock_abi {
            Some(1) => Some("no rename between directories; truncate is not restricted"),
            Some(2) => Some("truncate is not restricted"),
            _ => None,
        }
    }
}

/// How finely this systemd keeps a CPU quota, from its version string.
pub fn quota_grain(version: &str) -> QuotaGrain {
    if systemd_number(version).is_some_and(|number| number >= FINE_QUOTA_SYSTEMD) {
        QuotaGrain::Fine
    } else {
        QuotaGrain::WholePercent
    }
}

/// 257 of `257.13-1~deb13u1`, and of the `v257-rc1` of a build from source.
fn systemd_number(version: &str) -> Option<u32> {
    let version = version.strip_prefix('v').unwrap_or(version);
    let number = version.split(|c: char| !c.is_ascii_digit()).next()?;
    number.parse().ok()
}

/// A version that is no number may be any.
fn too_old(version: &str) -> Option<String> {
    let is_old = systemd_number(version).is_some_and(|number| number < OLDEST_SYSTEMD);
    is_old.then(|| {
        format!("systemd {version} is too old; install a system with {OLDEST_SYSTEMD} or newer")
    })
}

/// The service that a process of the agent runs in; we are one.
pub fn agent_unit(process: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let unit = Path::new(cgroup::unified(&text)?).file_name()?.to_str()?;
    unit.ends_with(".service").then(|| unit.to_owned())
}

/// The resolver's files; one that is missing or no text is empty.
pub fn resolver() -> Resolver {
    let read = |path: &str| fs::read_to_string(path).ok();
    Resolver {
        configured: read("/etc/resolv.conf").unwrap_or_default(),
        upstream: read("/run/systemd/resolve/resolv.conf"),
    }
}

/// CPU power as the kernel tells it, for a start without an agent. The 1,000 MHz of a CPU that does not tell its speed
/// make `cpu = 1000` one whole CPU.
pub fn compute() -> Compute {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let khz = fs::read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq");
    let mhz = khz
        .ok()
        .and_then(|khz| khz.trim().parse::<u64>().ok())
        .map_or(1_000, |khz| (khz / 1_000).max(1));
    Compute {
        total_mhz: mhz * cores,
        cores,
    }
}

/// The CPUs that this process may use and no task has reserved: neither Nomad's own nor ours.
pub fn free_cpus() -> BTreeSet<u16> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let list = |text: String| limits::cpus(&text).ok().flatten().unwrap_or_default();
    let status = read(Path::new("/proc/self/status")).unwrap_or_default();
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let mut free = list(allowed.unwrap_or_default().to_owned());
    let ours = Path::new("/sys/fs/cgroup/exec2.slice/exec2-reserve.slice");
    let scopes = fs::read_dir(ours).into_iter().flatten().flatten();
    let reserved = scopes
        .map(|scope| scope.path())
        .chain(["/sys/fs/cgroup/nomad.slice/reserve.slice".into()])
        .filter_map(|dir| read(&dir.join("cpuset.cpus")));
    for cpu in reserved.flat_map(list) {
        free.remove(&cpu);
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIT: Host = Host {
        is_root: true,
        runs_systemd: true,
        is_unified: true,
        missing_controllers: Vec::new(),
        has_cpuset: true,
        landlock_abi: Some(6),
        audit: None,
    };

    #[test]
    fn each_missing_thing_is_named_with_its_remedy() {
        let systemd = Ok("257".to_owned());
        let cases = [
            (
                Host {
                    is_root: false,
                    ..FIT
                },
                Fitness::Undetected("Driver must run as root".into()),
            ),
            (
                Host {
                    runs_systemd: false,
                    ..FIT
                },
                Fitness::Undetected("systemd is not the init system".into()),
            ),
            (
                Host {
                    is_unified: false,
                    ..FIT
                },
                Fitness::Undetected("cgroup v2 is not".into()),
            ),
            (
                Host {
                    landlock_abi: None,
                    ..FIT
                },
                Fitness::Undetected("Landlock is not available; it needs".into()),
            ),
            (
                Host {
                    missing_controllers: vec!["cpu", "memory"],
                    ..FIT
                },
                Fitness::Unhealthy("cgroup v2 has no cpu, memory".into()),
            ),
            (FIT, Fitness::Fit),
        ];
        for (host, expected) in cases {
            match (host.fitness(&systemd), expected) {
                (Fitness::Fit, Fitness::Fit) => {}
                (Fitness::Unhealthy(text), Fitness::Unhealthy(start))
                | (Fitness::Undetected(text), Fitness::Undetected(start)) => {
                    assert!(text.starts_with(&start), "{text}");
                }
                (got, expected) => panic!("{got:?} is not {expected:?}"),
            }
        }
    }

    #[test]
    fn a_lost_bus_is_unhealthy_with_its_reason() {
        assert_eq!(
            FIT.fitness(&Err("no bus".into())),
            Fitness::Unhealthy("no bus".into())
        );
    }

    #[test]
    fn an_old_systemd_is_unhealthy_and_an_unknown_one_is_let_be() {
        for (version, is_fit) in [
            ("251.4-1", false),
            ("v249-rc1", false),
            ("252-55.el9", true),
            ("v258~devel", true),
            ("nonsense", true),
        ] {
            let fitness = FIT.fitness(&Ok(version.into()));
            let old = format!("systemd {version} is too old; install a system with 252 or newer");
            let expected = match is_fit {
                true => Fitness::Fit,
                false => Fitness::Unhealthy(old),
            };
            assert_eq!(fitness, expected, "{version}");
        }
    }

    #[test]
    fn versions_of_distributions_are_understood() {
        assert_eq!(quota_grain("252.39-1~deb12u1"), QuotaGrain::WholePercent);
        assert_eq!(quota_grain("257.13-1~deb13u1"), QuotaGrain::Fine);
        assert_eq!(quota_grain("nonsense"), QuotaGrain::WholePercent);
    }
}
