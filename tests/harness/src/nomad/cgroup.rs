//! What Nomad's agent does to cgroup v2 by plain file I/O: its `nomad.slice`, an empty directory for each task, and the
//! cpusets of reserved cores. Every error is ignored, as Nomad ignores it. On a host without all five controllers it does
//! nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 5] = ["cpuset", "cpu", "io", "memory", "pids"];

/// The agent's view of the host's cores and cgroups.
#[derive(Debug)]
pub(super) struct Cgroups {
    mode: Mode,
    online: BTreeSet<u32>,
    /// Those that tasks get.
    usable: BTreeSet<u32>,
    /// Exclusive cores by allocation id and task.
    reserved: Mutex<BTreeMap<String, BTreeSet<u32>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    V2,
    Off,
}

impl Cgroups {
    /// `kept` are cores that the operator keeps from tasks.
    pub fn new(kept: &[u32]) -> Self {
        let controllers =
            fs::read_to_string(format!("{ROOT}/cgroup.controllers")).unwrap_or_default();
        let all = CONTROLLERS
            .iter()
            .all(|name| controllers.split_whitespace().any(|there| there == *name));
        let online =
            fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_else(|_| "0".into());
        let online = cores(online.trim());
        let cgroups = Cgroups {
            mode: if all { Mode::V2 } else { Mode::Off },
            usable: online
                .iter()
                .copied()
                .filter(|core| !kept.contains(core))
                .collect(),
            online,
            reserved: Mutex::default(),
        };
        if cgroups.mode == Mode::V2 {
            cgroups.init();
        }
        cgroups
    }

    pub fn online(&self) -> &BTreeSet<u32> {
        &self.online
    }

    pub fn usable(&self) -> &BTreeSet<u32> {
        &self.usable
    }

    fn init(&self) {
        let slice = Path::new(ROOT).join("nomad.slice");
        let enable = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
        for dir in [
            Path::new(ROOT),
            &slice,
            &slice.join("share.slice"),
            &slice.join("reserve.slice"),
        ] {
            let _ = fs::create_dir(dir);
            let _ = fs::write(dir.join("cgroup.subtree_control"), &enable);
        }
        let _ = fs::write(slice.join("cpuset.cpus"), list(&self.usable));
    }

    /// Takes exclusive cores for a task and gives their list, empty if it asks for none.
    pub fn reserve(&self, task: &str, count: u32) -> anyhow::Result<String> {
        if count == 0 {
            return Ok(String::new());
        }
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let taken: BTreeSet<u32> = reserved.values().flatten().copied().collect();
        let free: BTreeSet<u32> = self
            .usable
            .difference(&taken)
            .copied()
            .take(count as usize)
            .collect();
        anyhow::ensure!(
            free.len() == count as usize,
            "no {count} free cores for {task}"
        );
        let chosen = list(&free);
        reserved.insert(task.to_owned(), free);
        self.write_cpusets(&reserved);
        Ok(chosen)
    }

    fn write_cpusets(&self, reserved: &BTreeMap<String, BTreeSet<u32>>) {
        if self.mode == Mode::Off {
            return;
        }
        let taken: BTreeSet<u32> = reserved.values().flatten().copied().collect();
        let shared = self.usable.difference(&taken).copied().collect();
        let slice = Path::new(ROOT).join("nomad.slice");
        let _ = fs::write(slice.join("share.slice/cpuset.cpus"), list(&shared));
        let _ = fs::write(slice.join("reserve.slice/cpuset.cpus"), list(&taken));
    }

    /// Makes a task's own directory and gives its path.
    pub fn make(&self, alloc_id: &str, task: &str, cpuset: &str) -> PathBuf {
        let part = match (self.mode, cpuset) {
            (Mode::Off, _) => "nomad.slice",
            (Mode::V2, "") => "nomad.slice/share.slice",
            (Mode::V2, _) => "nomad.slice/reserve.slice",
        };
        let path = Path::new(ROOT)
            .join(part)
            .join(format!("{alloc_id}.{task}.scope"));
        if self.mode == Mode::V2 {
            let _ = fs::create_dir(&path);
        }
        path
    }

    /// Removes it, and gives the task's cores back.
    pub fn remove(&self, task: &str, path: &Path) {
        if self.mode == Mode::V2 {
            let _ = fs::write(path.join("cgroup.kill"), "1");
            let _ = fs::remove_dir(path);
        }
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        if reserved.remove(task).is_some() {
            self.write_cpusets(&reserved);
        }
    }
}

/// Reads `0-2,5`.
fn cores(list: &str) -> BTreeSet<u32> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<u32>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

fn list(cores: &BTreeSet<u32>) -> String {
    cores
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lists_of_cores_are_read_and_written() {
        assert_eq!(list(&cores("0-2,5")), "0,1,2,5");
        assert_eq!(list(&cores("0")), "0");
        assert_eq!(list(&cores("")), "");
    }

    #[test]
    fn a_reserved_core_is_given_out_once() {
        let cgroups = Cgroups {
            mode: Mode::Off,
            online: BTreeSet::from([0, 1]),
            usable: BTreeSet::from([0, 1]),
            reserved: Mutex::default(),
        };
        assert_eq!(cgroups.reserve("a", 1).unwrap(), "0");
        assert_eq!(cgroups.reserve("b", 1).unwrap(), "1");
        cgroups.reserve("c", 1).unwrap_err();
        cgroups.remove("a", Path::new("/none"));
        assert_eq!(cgroups.reserve("c", 1).unwrap(), "0");
        assert_eq!(cgroups.reserve("d", 0).unwrap(), "");
    }
}
