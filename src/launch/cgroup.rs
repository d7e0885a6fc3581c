//! What the task sees of cgroups: its own scope, read-only, as if there were no other. From a descriptor of any other
//! cgroup's directory, root could start processes outside of the scope's limits.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::io::Errno;

use super::layers::{self, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};
use super::place::open_resolved;
use super::report::{At, Failure};
use crate::plan::steps::Step;

const MOUNT: &str = "/sys/fs/cgroup";
/// statfs type of cgroup v2.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// The scope's files that are read once more when the task has ended.
#[derive(Debug)]
pub(super) struct Memory {
    events: Option<File>,
    /// Since kernel 5.19.
    peak: Option<File>,
    max: Option<File>,
}

/// Leaves the host's cgroup namespace for one whose root is the scope, where runtimes look for their limits.
pub(super) fn confine() -> Result<Memory, Failure> {
    let scope = own_cgroup()?;
    let open = |name: &str| File::open(scope.as_ref()?.join(name)).ok();
    let memory = Memory {
        events: open("memory.events"),
        peak: open("memory.peak"),
        max: open("memory.max"),
    };
    nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::Cgroup)?;
    let place = match open_resolved(Path::new(MOUNT)) {
        Err(Errno::NOENT) => return Ok(memory),
        place => place.at_path(Step::Cgroup, MOUNT)?,
    };
    layers::new_filesystem(c"cgroup2", &[], NO_SUID | NO_DEV | NO_EXEC | READ_ONLY)
        .and_then(|own| layers::move_onto(&own, place))
        .at_path(Step::Cgroup, MOUNT)?;
    Ok(memory)
}

/// The directory of this process' cgroup, if cgroup v2 is mounted: alone, or beside v1.
fn own_cgroup() -> Result<Option<PathBuf>, Failure> {
    let list =
        fs::read_to_string("/proc/self/cgroup").at_path(Step::Cgroup, "/proc/self/cgroup")?;
    let Some(path) = list.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Ok(None);
    };
    let mounts = [PathBuf::from(MOUNT), Path::new(MOUNT).join("unified")];
    let mount = mounts.into_iter().find(|mount| {
        rustix::fs::statfs(mount).is_ok_and(|status| status.f_type as u64 == CGROUP2_MAGIC)
    });
    Ok(mount.map(|mount| {
        if path.is_empty() {
            mount
        } else {
            mount.join(path)
        }
    }))
}

impl Memory {
    /// Processes that the kernel's OOM killer ended in the scope.
    pub fn oom_kills(&self) -> u64 {
        let mut buffer = [0; 512];
        let text = text(&self.events, &mut buffer);
        let mut words = text
            .lines()
            .filter_map(|line| line.strip_prefix("oom_kill "));
        words.next().map_or(0, number)
    }

    pub fn peak_bytes(&self) -> u64 {
        number(text(&self.peak, &mut [0; 32]))
    }

    /// 0 for `max`, no limit.
    pub fn max_bytes(&self) -> u64 {
        number(text(&self.max, &mut [0; 32]))
    }
}

/// Read into a buffer of the caller: when memory.max is reached there may be none for the heap.
fn text<'a>(file: &Option<File>, buffer: &'a mut [u8]) -> &'a str {
    let length = file
        .as_ref()
        .and_then(|file| file.read_at(buffer, 0).ok())
        .unwrap_or(0);
    std::str::from_utf8(&buffer[..length]).unwrap_or("")
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}
