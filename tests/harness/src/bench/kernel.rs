//! What the kernel says of processes and cgroups.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context as _, Result};
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_gettime};

const CGROUPS: &str = "/sys/fs/cgroup";

/// CLOCK_MONOTONIC, as the measured command tells it.
pub fn now_nanos() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// From one such moment to another.
pub fn millis(from_nanos: u64, to_nanos: u64) -> f64 {
    to_nanos as f64 / 1e6 - from_nanos as f64 / 1e6
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// A cgroup's directory.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    pub fn at(path: &Path) -> Cgroup {
        Cgroup(Path::new(CGROUPS).join(path))
    }

    pub fn of_process(pid: u32) -> Result<Cgroup> {
        let text = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
        Ok(Cgroup::at(Path::new(
            own.context("no cgroup of version 2")?,
        )))
    }

    /// One of nobody's, directly below the root.
    pub fn new(name: &str) -> Result<Cgroup> {
        let cgroup = Cgroup::at(Path::new(name));
        fs::create_dir(&cgroup.0).with_context(|| cgroup.0.display().to_string())?;
        Ok(cgroup)
    }

    /// Once its last process has been reaped.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir(&self.0).with_context(|| self.0.display().to_string())
    }

    /// Moves a process into it; gives the milliseconds of the write.
    pub fn take_in(&self, child: &Child) -> Result<f64> {
        let mut procs = fs::OpenOptions::new()
            .write(true)
            .open(self.0.join("cgroup.procs"))?;
        let begun = now_nanos()?;
        procs.write_all(child.id().to_string().as_bytes())?;
        Ok(millis(begun, now_nanos()?))
    }

    /// CPU time to read `cpu.stat`, in µs: opened for it, and kept open.
    pub fn gauge_micros(&self) -> Result<(f64, f64)> {
        const TIMES: u32 = 500;
        let path = self.0.join("cpu.stat");
        let mut text = [0; 4096];
        let each = |begun: TimeSpec, ended: TimeSpec| {
            (ended - begun).num_nanoseconds() as f64 / 1e3 / f64::from(TIMES)
        };
        let cpu = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        let begun = cpu()?;
        for _ in 0..TIMES {
            fs::File::open(&path)?.read_at(&mut text, 0)?;
        }
        let opened = cpu()?;
        let kept = fs::File::open(&path)?;
        let begun_again = cpu()?;
        for _ in 0..TIMES {
            kept.read_at(&mut text, 0)?;
        }
        Ok((each(begun, opened), each(begun_again, cpu()?)))
    }

    /// CPU time of all that has ever been in it, while it was.
    pub fn cpu_millis(&self) -> Result<f64> {
        let stat = read(&self.0.join("cpu.stat"))?;
        let usec = stat
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        let usec: u64 = usec.context("cpu.stat has no usage_usec")?.parse()?;
        Ok(usec as f64 / 1e3)
    }

    pub fn memory_kib(&self) -> Result<f64> {
        let bytes: u64 = read(&self.0.join("memory.current"))?.trim().parse()?;
        Ok(bytes as f64 / 1024.0)
    }

    /// Its own and those of the cgroups below.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut pids: Vec<u32> = read(&self.0.join("cgroup.procs"))?
            .lines()
            .filter_map(|pid| pid.parse().ok())
            .collect();
        for entry in fs::read_dir(&self.0)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pids.extend(Cgroup(entry.path()).processes()?);
            }
        }
        Ok(pids)
    }
}

/// Memory of processes, added up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub private_kib: f64,
    pub proportional_kib: f64,
}

/// Runnable processes, averaged over the last minute.
pub fn load() -> Result<f64> {
    let text = read(Path::new("/proc/loadavg"))?;
    let first = text.split_whitespace().next().context("/proc/loadavg")?;
    Ok(first.parse()?)
}

/// Whether a process in it executes a file of this name.
pub fn executes(cgroup: &Cgroup, command: &str) -> Result<bool> {
    Ok(cgroup.processes()?.into_iter().any(|pid| {
        let executes = fs::read_link(format!("/proc/{pid}/exe"));
        executes.is_ok_and(|file| file.file_name().is_some_and(|name| name == command))
    }))
}

fn private_kib(pid: u32) -> Result<f64> {
    Ok(rollup(pid, "Private_Clean:")? + rollup(pid, "Private_Dirty:")?)
}

/// Of all but those that execute a file of this name.
pub fn memory_beside(cgroup: &Cgroup, command: &str) -> Result<Memory> {
    let mut sum = Memory::default();
    for pid in cgroup.processes()? {
        let executes = fs::read_link(format!("/proc/{pid}/exe"))?;
        if executes.file_name().is_some_and(|name| name == command) {
            continue;
        }
        sum.private_kib += private_kib(pid)?;
        sum.proportional_kib += rollup(pid, "Pss:")?;
    }
    Ok(sum)
}

/// Not VmRSS, which is a batch of pages behind on each CPU.
pub fn resident_kib(pid: u32) -> Result<f64> {
    rollup(pid, "Rss:")
}

fn rollup(pid: u32, field: &str) -> Result<f64> {
    field_of(&format!("/proc/{pid}/smaps_rollup"), field)
}

pub fn threads(pid: u32) -> Result<f64> {
    field_of(&format!("/proc/{pid}/status"), "Threads:")
}

fn field_of(path: &str, field: &str) -> Result<f64> {
    let text = read(Path::new(path))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    let number = number.with_context(|| format!("{path} has no {field}"))?;
    Ok(number.parse()?)
}

pub fn descriptors(pid: u32) -> Result<f64> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64)
}

/// CPU time of a process with one thread, since it was forked.
pub fn cpu_of_process_millis(pid: u32) -> Result<f64> {
    let text = read(Path::new(&format!("/proc/{pid}/schedstat")))?;
    let nanos: u64 = text
        .split_whitespace()
        .next()
        .context("schedstat")?
        .parse()?;
    Ok(nanos as f64 / 1e6)
}
