//! A view of one scope's cgroup, plus `cgroup.kill`, and cgroups below it. Files only: no policy, no systemd.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where systemd mounts the unified hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What is kept of a task on its scope, beside systemd's own trusted.invocation_id: it goes with the scope, and a later
/// plugin finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Whose task it is.
    Owner,
    /// Nomad has asked for its end.
    Stopping,
    /// How many kills of the OOM killer an event has told of.
    OomKillsTold,
    /// The kernel's number of its Landlock domain, which it tells only once.
    Domain,
}

impl Mark {
    pub fn name(self) -> &'static str {
        match self {
            Mark::Owner => "trusted.nomad-driver-exec2.owner",
            Mark::Stopping => "trusted.nomad-driver-exec2.stopping",
            Mark::OomKillsTold => "trusted.nomad-driver-exec2.oom-kills-told",
            Mark::Domain => "trusted.nomad-driver-exec2.domain",
        }
    }
}

/// One cgroup's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

/// Bytes, from memory.current and its neighbours. `None`: this kernel or cgroup has no such file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub usage_bytes: Option<u64>,
    pub swap_bytes: Option<u64>,
    pub peak_bytes: Option<u64>,
    pub anon_bytes: Option<u64>,
    pub file_bytes: Option<u64>,
    pub kernel_bytes: Option<u64>,
}

/// From cpu.stat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cpu {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    /// Absent without the controller, as are the next two; those of 100 ms, as systemd sets quotas, in which a process ran.
    pub periods: Option<u64>,
    pub throttled_periods: Option<u64>,
    pub throttled_usec: Option<u64>,
}

impl Cgroup {
    /// The cgroup that a process is in.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = unified(&text)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 entry"))?;
        Ok(Self::at(path))
    }

    /// A cgroup by its path as /proc/PID/cgroup shows it.
    pub fn at(path: &str) -> Self {
        Self {
            path: Path::new(ROOT).join(path.trim_start_matches('/')),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path below the root of the hierarchy, as /proc/PID/cgroup shows it.
    pub fn path_in_hierarchy(&self) -> String {
        let below = self.path.strip_prefix(ROOT).unwrap_or(&self.path);
        format!("/{}", below.display())
    }

    /// The name of the unit that owns the cgroup: its last component, for a scope.
    pub fn unit(&self) -> Option<&str> {
        self.path.file_name()?.to_str()
    }

    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Controllers in force here.
    pub fn controllers(&self) -> io::Result<Vec<String>> {
        Ok(self
            .read("cgroup.controllers")?
            .split_whitespace()
            .map(str::to_owned)
            .collect())
    }

    /// Whether a live process is in it or below it; a cgroup that is gone has none.
    pub fn is_populated(&self) -> io::Result<bool> {
        match self.read("cgroup.events") {
            Ok(events) => Ok(field(&events, "populated") == Some(1)),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether it is to stand still, whatever its ancestors are.
    pub fn is_frozen(&self) -> bool {
        self.number("cgroup.freeze") == Some(1)
    }

    /// Whether all of it stands still by now, its own way or an ancestor's.
    pub fn stands_still(&self) -> bool {
        let events = self.read("cgroup.events");
        events.is_ok_and(|events| field(&events, "frozen") == Some(1))
    }

    /// Lets its processes run again, unless an ancestor is frozen.
    pub fn thaw(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "0")
    }

    /// The processes in it, without those below it; none if it is gone.
    pub fn members(&self) -> Vec<u32> {
        let own = self.read("cgroup.procs").unwrap_or_default();
        own.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// The processes in it and below it; none if it is gone.
    pub fn processes(&self) -> Vec<u32> {
        let mut pids = self.members();
        for below in self.below() {
            pids.extend(below.processes());
        }
        pids
    }

    /// The cgroups right below it.
    pub fn below(&self) -> Vec<Self> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories
            .map(|entry| Self { path: entry.path() })
            .collect()
    }

    /// Makes one right below it, which must not be there.
    pub fn make_below(&self, name: &str) -> io::Result<Self> {
        let path = self.path.join(name);
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    /// Removes it, if it is empty; it may be gone already.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// For another process to write to.
    pub fn open_for_writing(&self, file: &str) -> io::Result<fs::File> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.path.join(file))
    }

    /// Whether a process is in it or below it.
    pub fn holds(&self, pid: u32) -> bool {
        Self::of_process(pid).is_ok_and(|cgroup| cgroup.path.starts_with(&self.path))
    }

    /// SIGKILL to every process in it and below it (Linux 5.14); none are left to kill if it is gone.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// `None` once the cgroup is gone.
    pub fn gauges(&self) -> Option<Gauges> {
        let open = |file| fs::File::open(self.path.join(file)).ok();
        Some(Gauges {
            cpu_stat: open("cpu.stat")?,
            memory_current: open("memory.current"),
            memory_swap: open("memory.swap.current"),
            memory_peak: open("memory.peak"),
            memory_stat: open("memory.stat"),
        })
    }

    /// Processes in it and below it that the OOM killer ended; `None` without the controller, and once the cgroup is gone.
    pub fn oom_kills(&self) -> Option<u64> {
        field(&self.read("memory.events").ok()?, "oom_kill")
    }

    /// Highest memory use (memory.peak, Linux 5.19).
    pub fn memory_peak_bytes(&self) -> Option<u64> {
        self.number("memory.peak")
    }

    /// The hard limit in force; `Some(None)` is no limit, `None` is no such file.
    pub fn memory_max_bytes(&self) -> Option<Option<u64>> {
        self.limit("memory.max")
    }

    /// What a file with one number limits, likewise.
    pub fn limit(&self, file: &str) -> Option<Option<u64>> {
        let text = self.read(file).ok()?;
        Some(text.trim().parse().ok())
    }

    /// The quota in force, in µs per second; `Some(None)` is no limit, `None` is no such file.
    pub fn cpu_quota_usec_per_sec(&self) -> Option<Option<u64>> {
        let text = self.read("cpu.max").ok()?;
        let (quota, period) = text.trim().split_once(' ')?;
        let period: u64 = period.parse().ok()?;
        Some(
            quota
                .parse::<u64>()
                .ok()
                .and_then(|quota| quota.saturating_mul(1_000_000).checked_div(period)),
        )
    }

    /// What `set_mark` wrote, if it did.
    pub fn mark(&self, mark: Mark) -> Option<String> {
        let mut value = [0; 256];
        let length = rustix::fs::getxattr(&self.path, mark.name(), &mut value).ok()?;
        Some(String::from_utf8_lossy(&value[..length]).into_owned())
    }

    /// Marks a scope for as long as it exists. Only root can read or write a mark.
    pub fn set_mark(&self, mark: Mark, value: &str) -> io::Result<()> {
        use rustix::fs::{XattrFlags, setxattr};
        let flags = XattrFlags::empty();
        Ok(setxattr(&self.path, mark.name(), value.as_bytes(), flags)?)
    }

    /// The CPUs asked for, as the kernel lists them; empty if its parent's, `None` without such a file.
    pub fn cpus(&self) -> Option<String> {
        self.read("cpuset.cpus").ok()
    }

    /// The CPUs in force, as the kernel lists them; `None` without such a file.
    pub fn effective_cpus(&self) -> Option<String> {
        self.read("cpuset.cpus.effective").ok()
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file).ok()?.trim().parse().ok()
    }
}

/// The files of what a cgroup uses, kept open by who reads them again and again: to open one takes the kernel longer than to
/// read it.
#[derive(Debug)]
pub struct Gauges {
    cpu_stat: fs::File,
    memory_current: Option<fs::File>,
    memory_swap: Option<fs::File>,
    memory_peak: Option<fs::File>,
    memory_stat: Option<fs::File>,
}

impl Gauges {
    /// `None` once the cgroup is gone.
    pub fn cpu(&self) -> Option<Cpu> {
        let stat = now(&self.cpu_stat)?;
        Some(Cpu {
            usage_usec: field(&stat, "usage_usec")?,
            user_usec: field(&stat, "user_usec")?,
            system_usec: field(&stat, "system_usec")?,
            periods: field(&stat, "nr_periods"),
            throttled_periods: field(&stat, "nr_throttled"),
            throttled_usec: field(&stat, "throttled_usec"),
        })
    }

    pub fn memory(&self) -> Memory {
        let number = |file: &Option<fs::File>| now(file.as_ref()?)?.trim().parse().ok();
        let stat = self.memory_stat.as_ref().and_then(now).unwrap_or_default();
        Memory {
            usage_bytes: number(&self.memory_current),
            swap_bytes: number(&self.memory_swap),
            peak_bytes: number(&self.memory_peak),
            anon_bytes: field(&stat, "anon"),
            file_bytes: field(&stat, "file"),
            kernel_bytes: field(&stat, "kernel"),
        }
    }
}

/// What a file of a cgroup says now. Of memory.stat, which may be longer, the first lines are wanted.
fn now(file: &fs::File) -> Option<String> {
    let mut text = vec![0; 4096];
    let length = file.read_at(&mut text, 0).ok()?;
    text.truncate(length);
    String::from_utf8(text).ok()
}

/// The v2 path in the text of /proc/PID/cgroup.
pub fn unified(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// A removed cgroup answers ENODEV to descriptors that were open, ENOENT to paths.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_line_is_found_among_those_of_v1() {
        assert_eq!(
            unified("5:memory:/a\n0::/exec2.slice/x.scope\n"),
            Some("/exec2.slice/x.scope")
        );
        assert_eq!(unified("5:memory:/a\n"), None);
    }

    #[test]
    fn numbers_are_read_as_the_kernel_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: dir.path().to_owned(),
        };
        fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
        fs::write(
            dir.path().join("memory.stat"),
            "anon 1\nanon_thp 9\nfile 2\nkernel 3\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("cpu.stat"),
            "usage_usec 10\nuser_usec 6\nsystem_usec 4\n",
        )
        .unwrap();
        fs::write(dir.path().join("cpu.max"), "25000 100000\n").unwrap();
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        let gauges = cgroup.gauges().unwrap();
        let memory = gauges.memory();
        assert_eq!(
            (memory.usage_bytes, memory.anon_bytes, memory.peak_bytes),
            (Some(4096), Some(1), None)
        );
        let cpu = gauges.cpu().unwrap();
        assert_eq!((cpu.user_usec, cpu.throttled_periods), (6, None));
        fs::write(dir.path().join("memory.current"), "8192\n").unwrap();
        assert_eq!(gauges.memory().usage_bytes, Some(8192));
        assert_eq!(cgroup.cpu_quota_usec_per_sec(), Some(Some(250_000)));
        assert_eq!(cgroup.memory_max_bytes(), Some(None));
    }

    #[test]
    fn a_cgroup_that_is_gone_is_empty_and_killed() {
        let cgroup = Cgroup::at("/exec2.slice/never-there.scope");
        assert!(!cgroup.is_populated().unwrap());
        cgroup.kill().unwrap();
        assert!(cgroup.gauges().is_none());
    }
}
