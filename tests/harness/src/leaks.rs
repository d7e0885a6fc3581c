//! What a case leaves behind in a guest: processes, units, mounts, cgroups and files that were not there before it, and
//! descriptors that PID 1 keeps. Looks only at what the driver could have made; it asks the guest, never the driver.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CGROUPS: &str = "/sys/fs/cgroup";
const SLICE: &str = "/sys/fs/cgroup/exec2.slice";
const UNITS: &str = "exec2-*.scope";
/// The driver's own place under /run. Its directories may stay.
const RUN_DIR: &str = "/run/nomad-driver-exec2";
/// The directories of `run` for people.
const RUN_ALLOCS: [&str; 2] = [
    "/var/lib/nomad-driver-exec2/run/alloc",
    "/var/lib/nomad-driver-exec2/run/alloc_mounts",
];
/// Where systemd keeps transient units, and what was set on units at run time.
const UNIT_FILES: [&str; 2] = ["/run/systemd/transient", "/run/systemd/system.control"];
const SYSTEMD: u32 = 1;
/// systemd closes what it no longer needs between its other work.
const SETTLE: Duration = Duration::from_secs(5);
const SOCKET: &str = "socket";
const PIPE: &str = "pipe:[]";
const PIDFD: &str = "anon_inode:[pidfd]";
const TIMERFD: &str = "anon_inode:[timerfd]";
/// Connections come and go with whoever talks to systemd, the pipes hold back services of Type=idle until its next job is
/// done, a live process is a service's.
const SYSTEMDS_OWN: [&str; 3] = [SOCKET, PIPE, PIDFD];
/// Its event loop makes a timer for each clock when it first needs one (sd_event_add_time(3)), and keeps it.
const CLOCKS: usize = 5;

/// One thing too many.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leak {
    Process {
        pid: i32,
        command: String,
    },
    Unit(String),
    Mount {
        target: PathBuf,
        what: String,
    },
    Cgroup(PathBuf),
    File(PathBuf),
    /// So many more of one kind than before.
    Descriptors {
        pid: u32,
        kind: String,
        more: usize,
    },
}

/// What there was before.
#[derive(Debug)]
pub struct Ground {
    things: BTreeSet<Leak>,
    descriptors: Descriptors,
}

impl Ground {
    pub fn survey() -> Result<Ground> {
        Ok(Ground {
            things: everything()?,
            descriptors: Descriptors::of(SYSTEMD)?,
        })
    }

    /// What came since, and is still there. Descriptors only when there is nothing else: what is left has some of its own.
    pub fn left(&self) -> Result<Vec<Leak>> {
        let left: Vec<Leak> = everything()?.difference(&self.things).cloned().collect();
        if !left.is_empty() {
            return Ok(left);
        }
        let begun = Instant::now();
        loop {
            let mut more = Descriptors::of(SYSTEMD)?.beyond(&self.descriptors);
            more.retain(|leak| match leak {
                Leak::Descriptors { kind, more, .. } if kind == TIMERFD => *more > CLOCKS,
                Leak::Descriptors { kind, .. } => !SYSTEMDS_OWN.contains(&kind.as_str()),
                _ => true,
            });
            if more.is_empty() || begun.elapsed() > SETTLE {
                return Ok(more);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// How many descriptors a process has, by kind: what /proc shows of each, without numbers. A pidfd whose process has been
/// reaped is a kind of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors {
    pid: u32,
    counts: BTreeMap<String, usize>,
}

impl Descriptors {
    pub fn of(pid: u32) -> Result<Descriptors> {
        let dir = PathBuf::from(format!("/proc/{pid}/fd"));
        let entries = fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
        let mut counts = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            // Closed since the directory was read.
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let info = Path::new("/proc").join(pid.to_string()).join("fdinfo");
            let info = fs::read_to_string(info.join(entry.file_name())).unwrap_or_default();
            *counts
                .entry(kind(&target.to_string_lossy(), &info))
                .or_default() += 1;
        }
        Ok(Descriptors { pid, counts })
    }

    /// What there is more of than there was.
    pub fn beyond(&self, before: &Descriptors) -> Vec<Leak> {
        let more = |(kind, count): (&String, &usize)| {
            let more = count.saturating_sub(before.counts.get(kind).copied().unwrap_or(0));
            (more > 0).then(|| Leak::Descriptors {
                pid: self.pid,
                kind: kind.clone(),
                more,
            })
        };
        self.counts.iter().filter_map(more).collect()
    }
}

/// `socket:[4711]` is a socket, `/proc/4711/stat` a stat. Paths of tasks keep their numbers, which tell whose they are.
fn kind(target: &str, info: &str) -> String {
    if target.starts_with("socket:") {
        return SOCKET.into();
    }
    // Since 6.9 some kernels say pidfd:[4711].
    if target == PIDFD || target.starts_with("pidfd:") {
        let is_reaped = info
            .lines()
            .any(|line| line.strip_prefix("Pid:").map(str::trim) == Some("-1"));
        return match is_reaped {
            true => format!("{PIDFD} of no process"),
            false => PIDFD.into(),
        };
    }
    match target.contains("exec2") {
        true => target.into(),
        false => target.replace(|char: char| char.is_ascii_digit(), ""),
    }
}

impl Leak {
    /// Ends it, so that whatever comes next starts on clean ground.
    pub fn clear(&self) {
        match self {
            Leak::Process { pid, .. } => {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                let begun = Instant::now();
                while is_alive(*pid) && begun.elapsed() < Duration::from_secs(2) {
                    thread::sleep(Duration::from_millis(2));
                }
            }
            Leak::Unit(unit) => {
                let _ = Command::new("systemctl")
                    .args(["kill", "--signal=SIGKILL", unit])
                    .output();
                let _ = Command::new("systemctl").args(["stop", unit]).output();
            }
            Leak::Mount { target, .. } => {
                let _ = umount2(target, MntFlags::MNT_DETACH);
            }
            Leak::Cgroup(path) => {
                let _ = fs::write(path.join("cgroup.kill"), "1");
                let _ = fs::remove_dir(path);
            }
            Leak::File(path) => {
                let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
            }
            // Only its owner can close it.
            Leak::Descriptors { .. } => {}
        }
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Leak::Process { pid, command } => write!(f, "process {pid} ({command})"),
            Leak::Unit(unit) => write!(f, "unit {unit}"),
            Leak::Mount { target, what } => write!(f, "mount {} ({what})", target.display()),
            Leak::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Leak::File(path) => write!(f, "file {}", path.display()),
            Leak::Descriptors { pid, kind, more } => {
                write!(f, "{more} descriptors of process {pid} ({kind})")
            }
        }
    }
}

fn everything() -> Result<BTreeSet<Leak>> {
    let mut all = BTreeSet::new();
    // Every process a case starts is in our own cgroup unless systemd moved it to a scope.
    let own = own_cgroup()?;
    processes_in(&own, &ancestors(), &mut all);
    processes_in(Path::new(SLICE), &BTreeSet::new(), &mut all);
    units(&mut all)?;
    mounts(&mut all)?;
    scopes_in(Path::new(SLICE), &mut all);
    files_in(Path::new(RUN_DIR), &mut all);
    for dir in RUN_ALLOCS {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        all.extend(entries.map(|entry| Leak::File(entry.path())));
    }
    for dir in UNIT_FILES {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let of_scope = entries.filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("exec2-") && name.contains(".scope")
        });
        all.extend(of_scope.map(|entry| Leak::File(entry.path())));
    }
    Ok(all)
}

fn own_cgroup() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("the guest has no cgroup version 2")?;
    Ok(Path::new(CGROUPS).join(own))
}

/// Ourselves and whoever started us.
fn ancestors() -> BTreeSet<i32> {
    let mut pids = BTreeSet::new();
    let mut next = Some(std::process::id().cast_signed());
    while let Some(pid) = next.filter(|pid| *pid > 0 && pids.insert(*pid)) {
        next = fs::read_to_string(format!("/proc/{pid}/status"))
            .ok()
            .and_then(|status| {
                let parent = status
                    .lines()
                    .find_map(|line| line.strip_prefix("PPid:"))?
                    .trim()
                    .parse();
                parent.ok()
            });
    }
    pids
}

/// A zombie has no command line.
fn is_alive(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty())
}

/// Whether it is the helper that a plugin keeps for its next start: with the plugin it has to go.
fn is_ahead(pid: i32) -> bool {
    let comm = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let is_of_a_plugin = parent.is_some_and(|pid| comm(pid.trim()).starts_with("nomad-driver-ex"));
    // It gives itself the first of these names as soon as it can, and the second with its order.
    is_of_a_plugin && comm(&pid.to_string()) != "exec2-launch\n"
}

fn processes_in(cgroup: &Path, except: &BTreeSet<i32>, all: &mut BTreeSet<Leak>) {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse().ok()) {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .replace('\0', " ");
        // Without a command line it is a zombie on its way.
        if !except.contains(&pid) && !command.is_empty() && !is_ahead(pid) {
            let command = command.trim_end().to_owned();
            all.insert(Leak::Process { pid, command });
        }
    }
    for dir in directories(cgroup) {
        processes_in(&dir, except, all);
    }
}

fn units(all: &mut BTreeSet<Leak>) -> Result<()> {
    let listed = Command::new("systemctl")
        .args(["list-units", "--all", "--plain", "--no-legend", UNITS])
        .output()?;
    ensure!(
        listed.status.success(),
        "systemctl cannot list units: {listed:?}"
    );
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    all.extend(names.map(|name| Leak::Unit(name.to_owned())));
    Ok(())
}

/// Of the guest's PID 1: what a task mounts in its own namespace must never get there.
fn mounts(all: &mut BTreeSet<Leak>) -> Result<()> {
    let mountinfo = fs::read_to_string("/proc/1/mountinfo")?;
    for line in mountinfo.lines() {
        // id parent major:minor root target options … - type source options
        let words: Vec<&str> = line.split(' ').collect();
        let (Some(root), Some(target)) = (words.get(3), words.get(4)) else {
            continue;
        };
        let kind = words
            .iter()
            .position(|word| *word == "-")
            .and_then(|dash| words.get(dash + 1));
        all.insert(Leak::Mount {
            target: target.into(),
            what: format!("{} {root}", kind.unwrap_or(&"?")),
        });
    }
    Ok(())
}

fn scopes_in(cgroup: &Path, all: &mut BTreeSet<Leak>) {
    for dir in directories(cgroup) {
        if dir.extension().is_some_and(|kind| kind == "scope") {
            all.insert(Leak::Cgroup(dir));
        } else {
            scopes_in(&dir, all);
        }
    }
}

fn files_in(dir: &Path, all: &mut BTreeSet<Leak>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_in(&entry.path(), all);
        } else {
            all.insert(Leak::File(entry.path()));
        }
    }
}

fn directories(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}
