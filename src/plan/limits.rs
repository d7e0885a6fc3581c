//! From what a job asks for (MHz, cores, MiB) to what systemd and the kernel take.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

/// What the job's `resources` block says, as Nomad hands it on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_mhz: u64,
    pub memory_mib: u64,
    pub memory_max_mib: MemoryMax,
    /// CPUs of a task with `cores`, as a kernel list (`3,5-7`); empty without.
    pub cpuset: String,
}

/// The job's `memory_max`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MemoryMax {
    /// 0 or absent: `memory` is the limit.
    #[default]
    Unset,
    Mib(u64),
    /// -1.
    Unlimited,
}

/// The node's computing power, by which MHz become a share of its CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    pub total_mhz: u64,
    pub cores: u64,
}

/// How finely systemd keeps a CPU quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaGrain {
    /// systemd 257: hundredths of a percent survive a daemon-reload.
    Fine,
    /// Older: a reload reads the quota back from whole percents (and 0 % as no limit at all), so it is rounded up to one.
    WholePercent,
}

/// A limit as a cgroup file has it: `Some(None)` is no limit, `None` is no such file.
pub type InForce = Option<Option<u64>>;

/// CPUs by number, as the kernel counts them.
pub type Cpus = BTreeSet<u16>;

/// The limits of one scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// CPU time per second of wall clock.
    pub cpu_quota_usec_per_sec: u64,
    /// `None`: no limit.
    pub memory_max_bytes: Option<u64>,
    /// Kept for the task while others are reclaimed; 0 if it has a hard limit only.
    pub memory_low_bytes: u64,
    /// Processes and threads.
    pub tasks_max: u64,
    /// Its own, of a task with `cores`; of any other those that nobody reserved. `None`: all of the host's.
    pub allowed_cpus: Option<Cpus>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitError {
    #[error(
        "cpu = {0}: the agent told no CPU topology to turn MHz into a share of; set client.cpu_total_compute in its configuration"
    )]
    NoCompute(u64),
    #[error("cpu = 0: a task needs a share of the CPU; give at least 1 MHz")]
    NoCpu,
    #[error("memory = 0: a task needs memory; give at least 10 MiB")]
    NoMemory,
    #[error("cores: {0:?} is no list of CPUs")]
    Cpuset(String),
}

/// Period of the quota, the kernel's and systemd's default.
pub const QUOTA_PERIOD_USEC: u64 = 100_000;
/// The kernel refuses a quota below 1 ms per period.
const MIN_QUOTA_USEC_PER_SEC: u64 = 10_000;
const USEC_PER_SEC: u64 = 1_000_000;
const MIB: u64 = 1 << 20;

impl Limits {
    /// `share` are the CPUs of a task without `cores`, as in `allowed_cpus`.
    pub fn new(
        resources: &Resources,
        compute: Option<Compute>,
        grain: QuotaGrain,
        share: Option<&Cpus>,
        pids_max: u32,
    ) -> Result<Self, LimitError> {
        if resources.memory_mib == 0 {
            return Err(LimitError::NoMemory);
        }
        let reserved = resources.memory_mib.saturating_mul(MIB);
        let (memory_low_bytes, memory_max_bytes) = match resources.memory_max_mib {
            MemoryMax::Unset => (0, Some(reserved)),
            MemoryMax::Mib(max) => (reserved, Some(max.saturating_mul(MIB))),
            MemoryMax::Unlimited => (reserved, None),
        };
        let own = cpus(&resources.cpuset)?;
        let cpu_quota_usec_per_sec = match &own {
            // Whole CPUs: their MHz are theirs alone, whatever the average core of the node has.
            Some(own) => own.len() as u64 * USEC_PER_SEC,
            None => quota(resources.cpu_mhz, compute, grain)?,
        };
        Ok(Self {
            cpu_quota_usec_per_sec,
            memory_max_bytes,
            memory_low_bytes,
            tasks_max: pids_max.into(),
            allowed_cpus: own.or_else(|| share.cloned()),
        })
    }

    /// What the kernel's files of the scope will say.
    pub fn files(&self) -> Vec<(&'static str, String)> {
        let quota = u128::from(self.cpu_quota_usec_per_sec) * u128::from(QUOTA_PERIOD_USEC)
            / u128::from(USEC_PER_SEC);
        // The kernel keeps whole pages, of which our numbers are a multiple.
        let max = |limit: Option<u64>| limit.map_or("max".into(), |limit| limit.to_string());
        let mut files = vec![
            ("cpu.max", format!("{quota} {QUOTA_PERIOD_USEC}")),
            ("memory.low", self.memory_low_bytes.to_string()),
            ("memory.max", max(self.memory_max_bytes)),
            ("memory.swap.max", max(None)),
            ("pids.max", self.tasks_max.to_string()),
        ];
        if let Some(cpus) = &self.allowed_cpus {
            files.push(("cpuset.cpus", List(cpus).to_string()));
        }
        files
    }

    /// Where what is in force (a file's number, no limit, or no such file) is not what was asked for, as sentences. `limit` tells
    /// it of a file with one number.
    pub fn differences(
        &self,
        limit: impl Fn(&str) -> InForce,
        cpu_quota_usec_per_sec: InForce,
        effective_cpus: Option<&Cpus>,
    ) -> Vec<String> {
        let with_their_controller = [
            ("memory.low", Some(self.memory_low_bytes)),
            // A kernel may keep no account of swap.
            ("memory.swap.max", None),
        ];
        let mut asked = vec![
            (
                "memory.max",
                "bytes",
                self.memory_max_bytes,
                limit("memory.max"),
            ),
            (
                "cpu.max",
                "µs per second",
                Some(self.cpu_quota_usec_per_sec),
                cpu_quota_usec_per_sec,
            ),
            (
                "pids.max",
                "processes and threads",
                Some(self.tasks_max),
                limit("pids.max"),
            ),
        ];
        for (file, bytes) in with_their_controller {
            if let Some(found) = limit(file) {
                asked.push((file, "bytes", bytes, Some(found)));
            }
        }
        let different = asked
            .into_iter()
            .filter(|(file, _, asked, found)| match (asked, found) {
                (Some(asked), Some(Some(found))) if *file == "pids.max" => asked != found,
                // The kernel keeps whole pages, and whole µs in a period.
                (Some(asked), Some(Some(found))) => asked.abs_diff(*found) > asked / 100,
                (None, Some(None)) => false,
                _ => true,
            });
        let shown = |limit: Option<u64>, unit: &str| {
            limit.map_or("no limit".into(), |limit| format!("{limit} {unit}"))
        };
        let sentence = |(file, unit, asked, found): (&str, &str, Option<u64>, InForce)| {
            let found = found.map_or("not there (no controller)".into(), |found| {
                shown(found, unit)
            });
            let whose = match file {
                "pids.max" => "pids_max",
                "memory.swap.max" => "the driver",
                _ => "the job",
            };
            format!("{file} is {found}, {whose} asks for {}", shown(asked, unit))
        };
        different
            .map(sentence)
            .chain(self.other_cpus(effective_cpus))
            .collect()
    }

    fn other_cpus(&self, effective: Option<&Cpus>) -> Option<String> {
        let given = self.allowed_cpus.as_ref()?;
        let found = match effective {
            Some(effective) if effective == given => return None,
            Some(effective) => List(effective).to_string(),
            None => "not there (no controller)".into(),
        };
        let given = List(given);
        Some(format!(
            "cpuset.cpus.effective is {found}, Nomad gives the task CPUs {given}"
        ))
    }
}

/// The CPUs of a task without `cores`: those that the agent gives to tasks (all of the host's if it told none), without what
/// others have reserved. `nomads` is what Nomad's share.slice has; `None` if that is absent or empty.
pub fn share(nomads: Option<&Cpus>, usable: &Cpus, all: &Cpus) -> Cpus {
    let usable = if usable.is_empty() { all } else { usable };
    // Nomad writes the file at the next reservation only, when the operator may have changed `usable` since the last.
    let left = nomads.map(|nomads| nomads & usable);
    left.filter(|left| !left.is_empty())
        .unwrap_or_else(|| usable.clone())
}

/// CPUs as the kernel lists them, `0-3,7`.
#[derive(Debug)]
pub struct List<'a>(pub &'a Cpus);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if(|next| *next == last + 1) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

fn quota(cpu_mhz: u64, compute: Option<Compute>, grain: QuotaGrain) -> Result<u64, LimitError> {
    if cpu_mhz == 0 {
        return Err(LimitError::NoCpu);
    }
    // Whole MHz per core, as exec2 divides: a job keeps the share it has there.
    let per_core_mhz = compute
        .and_then(|compute| compute.total_mhz.checked_div(compute.cores))
        .unwrap_or(0);
    if per_core_mhz == 0 {
        return Err(LimitError::NoCompute(cpu_mhz));
    }
    let exact =
        u64::try_from(u128::from(cpu_mhz) * u128::from(USEC_PER_SEC) / u128::from(per_core_mhz))
            .unwrap_or(u64::MAX / 2);
    let quota = match grain {
        // systemd keeps the hundredth part of a percent, 100 µs per second.
        QuotaGrain::Fine => exact,
        QuotaGrain::WholePercent => exact
            .div_ceil(USEC_PER_SEC / 100)
            .saturating_mul(USEC_PER_SEC / 100),
    };
    Ok(quota.max(MIN_QUOTA_USEC_PER_SEC))
}

/// A kernel CPU list, `0-3,7`; `None` if empty.
pub fn cpus(list: &str) -> Result<Option<Cpus>, LimitError> {
    let wrong = || LimitError::Cpuset(list.chars().take(80).collect());
    if list.trim().is_empty() {
        return Ok(None);
    }
    let mut set = Cpus::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let parse = |text: &str| text.trim().parse::<u16>().ok().filter(|cpu| *cpu < 8192);
        let (Some(first), Some(last)) = (parse(first), parse(last)) else {
            return Err(wrong());
        };
        if first > last {
            return Err(wrong());
        }
        set.extend(first..=last);
    }
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Option<Compute> = Some(Compute {
        total_mhz: 8000,
        cores: 4,
    });

    const PIDS_MAX: u32 = 16_384;

    fn in_force<'a>(files: &'a [(&'a str, InForce)]) -> impl Fn(&str) -> InForce + 'a {
        move |file| files.iter().find(|(name, _)| *name == file)?.1
    }

    fn resources(cpu_mhz: u64, memory_max_mib: MemoryMax) -> Resources {
        Resources {
            cpu_mhz,
            memory_mib: 64,
            memory_max_mib,
            cpuset: String::new(),
        }
    }

    #[test]
    fn mhz_are_a_share_of_one_core() {
        let limits = Limits::new(
            &resources(500, MemoryMax::Unset),
            NODE,
            QuotaGrain::Fine,
            None,
            PIDS_MAX,
        )
        .unwrap();
        assert_eq!(limits.cpu_quota_usec_per_sec, 250_000);
        let limits = Limits::new(
            &resources(6000, MemoryMax::Unset),
            NODE,
            QuotaGrain::Fine,
            None,
            PIDS_MAX,
        )
        .unwrap();
        assert_eq!(limits.cpu_quota_usec_per_sec, 3_000_000);
    }

    #[test]
    fn an_old_systemd_gets_whole_percents_rounded_up() {
        for (mhz, quota) in [
            (1, 10_000),
            (20, 10_000),
            (21, 20_000),
            (500, 250_000),
            (501, 260_000),
        ] {
            let limits = Limits::new(
                &resources(mhz, MemoryMax::Unset),
                NODE,
                QuotaGrain::WholePercent,
                None,
                PIDS_MAX,
            )
            .unwrap();
            assert_eq!(limits.cpu_quota_usec_per_sec, quota, "{mhz} MHz");
        }
    }

    #[test]
    fn memory_max_turns_memory_into_a_reservation() {
        let of = |max| {
            let limits =
                Limits::new(&resources(100, max), NODE, QuotaGrain::Fine, None, PIDS_MAX).unwrap();
            (limits.memory_low_bytes, limits.memory_max_bytes)
        };
        assert_eq!(of(MemoryMax::Unset), (0, Some(64 * MIB)));
        assert_eq!(of(MemoryMax::Mib(128)), (64 * MIB, Some(128 * MIB)));
        assert_eq!(of(MemoryMax::Unlimited), (64 * MIB, None));
    }

    #[test]
    fn a_node_without_mhz_is_a_sentence_not_a_division_by_zero() {
        for compute in [
            None,
            Some(Compute {
                total_mhz: 0,
                cores: 4,
            }),
            Some(Compute {
                total_mhz: 100,
                cores: 0,
            }),
        ] {
            let error = Limits::new(
                &resources(100, MemoryMax::Unset),
                compute,
                QuotaGrain::Fine,
                None,
                PIDS_MAX,
            )
            .unwrap_err();
            assert_eq!(error, LimitError::NoCompute(100));
        }
    }

    #[test]
    fn huge_values_do_not_overflow() {
        let resources = Resources {
            cpu_mhz: u64::MAX,
            memory_mib: u64::MAX,
            memory_max_mib: MemoryMax::Mib(u64::MAX),
            cpuset: String::new(),
        };
        for grain in [QuotaGrain::Fine, QuotaGrain::WholePercent] {
            assert!(
                Limits::new(&resources, NODE, grain, None, PIDS_MAX)
                    .unwrap()
                    .cpu_quota_usec_per_sec
                    > 0
            );
        }
    }

    #[test]
    fn limits_that_are_not_in_force_are_told() {
        let limits = Limits::new(
            &resources(667, MemoryMax::Unset),
            NODE,
            QuotaGrain::Fine,
            None,
            PIDS_MAX,
        )
        .unwrap();
        // 333,500 µs per second are 33,350 µs per period.
        let quota = Some(Some(333_500));
        let as_asked: &[(&str, InForce)] = &[
            ("memory.max", Some(Some(64 * MIB))),
            ("memory.low", Some(Some(0))),
            ("memory.swap.max", Some(None)),
            ("pids.max", Some(Some(PIDS_MAX as u64))),
        ];
        let none = Vec::<String>::new();
        assert_eq!(limits.differences(in_force(as_asked), quota, None), none);
        assert_eq!(
            limits.differences(in_force(&[]), None, None),
            [
                "memory.max is not there (no controller), the job asks for 67108864 bytes",
                "cpu.max is not there (no controller), the job asks for 333500 µs per second",
                "pids.max is not there (no controller), pids_max asks for 16384 processes and threads"
            ]
        );
        let by_drop_in: &[(&str, InForce)] = &[
            ("memory.max", Some(None)),
            ("memory.low", Some(Some(MIB))),
            ("memory.swap.max", Some(Some(0))),
            ("pids.max", Some(Some(PIDS_MAX as u64 - 1))),
        ];
        assert_eq!(
            limits.differences(in_force(by_drop_in), Some(None), None),
            [
                "memory.max is no limit, the job asks for 67108864 bytes",
                "cpu.max is no limit, the job asks for 333500 µs per second",
                "pids.max is 16383 processes and threads, pids_max asks for 16384 processes and threads",
                "memory.low is 1048576 bytes, the job asks for 0 bytes",
                "memory.swap.max is 0 bytes, the driver asks for no limit"
            ]
        );
        let unlimited = Limits::new(
            &resources(667, MemoryMax::Unlimited),
            NODE,
            QuotaGrain::Fine,
            None,
            PIDS_MAX,
        )
        .unwrap();
        let as_asked: &[(&str, InForce)] = &[
            ("memory.max", Some(None)),
            ("memory.low", Some(Some(64 * MIB))),
            ("pids.max", Some(Some(PIDS_MAX as u64))),
        ];
        assert_eq!(unlimited.differences(in_force(as_asked), quota, None), none);
    }

    #[test]
    fn cores_are_whole_cpus_whatever_their_mhz() {
        // Faster than the node's average core, slower, and told no speed at all.
        for (mhz, compute) in [(5000, NODE), (3000, NODE), (0, None)] {
            let resources = Resources {
                cpuset: "1,3".into(),
                ..resources(mhz, MemoryMax::Unset)
            };
            for grain in [QuotaGrain::Fine, QuotaGrain::WholePercent] {
                let share = Cpus::from([0, 2]);
                let limits =
                    Limits::new(&resources, compute, grain, Some(&share), PIDS_MAX).unwrap();
                assert_eq!(limits.cpu_quota_usec_per_sec, 2_000_000);
                assert_eq!(limits.allowed_cpus, Some(Cpus::from([1, 3])));
            }
        }
    }

    #[test]
    fn a_task_without_cores_has_those_that_nobody_reserved() {
        let (usable, all) = (Cpus::from([0, 1, 2]), Cpus::from([0, 1, 2, 3]));
        let left = Cpus::from([2]);
        assert_eq!(share(Some(&left), &usable, &all), left);
        assert_eq!(share(Some(&Cpus::from([2, 3])), &usable, &all), left);
        assert_eq!(share(Some(&Cpus::from([3])), &usable, &all), usable);
        assert_eq!(share(None, &usable, &all), usable);
        assert_eq!(share(None, &Cpus::new(), &all), all);
        let shared = resources(500, MemoryMax::Unset);
        let limits = Limits::new(&shared, NODE, QuotaGrain::Fine, Some(&left), PIDS_MAX).unwrap();
        assert_eq!(limits.allowed_cpus, Some(left));
        assert_eq!(limits.cpu_quota_usec_per_sec, 250_000);
    }

    #[test]
    fn cpus_that_are_not_the_task_s_are_told() {
        let shared = resources(500, MemoryMax::Unset);
        let of = |share: Option<&Cpus>, found: Option<&Cpus>| {
            let limits = Limits::new(&shared, NODE, QuotaGrain::Fine, share, PIDS_MAX).unwrap();
            let limit = |file: &str| match file {
                "memory.max" => Some(Some(64 * MIB)),
                "pids.max" => Some(Some(PIDS_MAX.into())),
                _ => None,
            };
            limits.differences(limit, Some(Some(250_000)), found)
        };
        let given = Cpus::from([0, 1, 2, 5]);
        let none: [&str; 0] = [];
        assert_eq!(of(Some(&given), Some(&given)), none);
        assert_eq!(of(None, None), none);
        assert_eq!(
            of(Some(&given), Some(&Cpus::from([0]))),
            ["cpuset.cpus.effective is 0, Nomad gives the task CPUs 0-2,5"]
        );
        assert_eq!(
            of(Some(&given), None),
            ["cpuset.cpus.effective is not there (no controller), Nomad gives the task CPUs 0-2,5"]
        );
    }

    #[test]
    fn cpu_lists_are_written_as_the_kernel_writes_them() {
        for list in ["", "0", "0-1", "3,5-7,9", "0-2,4"] {
            let set = cpus(list).unwrap().unwrap_or_default();
            assert_eq!(List(&set).to_string(), list);
        }
    }

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(cpus("").unwrap(), None);
        assert_eq!(cpus("3,5-7\n").unwrap(), Some(BTreeSet::from([3, 5, 6, 7])));
        for wrong in ["x", "5-3", "1,,2", "99999", "-1"] {
            assert!(cpus(wrong).is_err(), "{wrong}");
        }
    }
}
