//! A task that HashiCorp's exec2 started, before this driver took its place. No supervisor, record or scope of ours can be
//! put around a process that runs already, so the task is ended, and Nomad starts it anew. Nothing of its handle is
//! believed but that some processes of Nomad's cgroup of this very task, where none of ours ever is, are the main ones.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, getpgid, pidfd_open};
use serde::Deserialize;

use super::state::VERSION;
use super::stop;
use super::table::send;
use super::types::{DriverError, Names, Saved, TaskRequest};
use crate::cgroup::Cgroup;
use crate::plan::signal;

/// How long a task may take to end by itself: Nomad's default kill_timeout. The agent's start waits for it.
const AFTER_SIGNAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);
/// Where Nomad makes a cgroup for each task.
const SLICES: [&str; 3] = [
    "nomad.slice/share.slice",
    "nomad.slice/reserve.slice",
    "nomad.slice",
];
/// Of a handle, in which a task's whole configuration stands.
const MAX_DEPTH: usize = 64;

/// What exec2 keeps of a task, by the name of the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Theirs {
    /// Of the process that it started, which leads a process group.
    #[serde(rename = "PID")]
    pid: i32,
}

/// What became of the task.
#[derive(Debug)]
enum Fate {
    Gone,
    Ended,
    Killed,
    Stuck(DriverError),
    Unknown,
}

impl Theirs {
    /// A handle of exec2's: a map in MessagePack. Ours begin with a brace.
    pub(super) fn decode(saved: &Saved) -> Option<Self> {
        let is_map = matches!(saved.driver_state.first(), Some(0x80..=0x8f | 0xde | 0xdf));
        if saved.version != VERSION || !is_map {
            return None;
        }
        let mut reader = rmp_serde::Deserializer::from_read_ref(&saved.driver_state);
        reader.set_max_depth(MAX_DEPTH);
        Self::deserialize(&mut reader).ok()
    }

    /// Ends what is left of the task, and tells why it was not recovered.
    pub(super) async fn end(self, request: &TaskRequest) -> DriverError {
        let fate = match left_of(request) {
            None => Fate::Unknown,
            Some(left) if left.is_empty() => Fate::Gone,
            Some(left) => self.end_all(&left).await,
        };
        DriverError::Permanent(format!("the task was started by HashiCorp's exec2, {fate}"))
    }

    /// As exec2 stops a task, but for the job's own signal and timeout, which a recovery does not tell.
    async fn end_all(self, left: &[Cgroup]) -> Fate {
        let sent: usize = left.iter().map(|cgroup| self.interrupt(cgroup)).sum();
        if sent > 0 && empties(left).await {
            return Fate::Ended;
        }
        for cgroup in left {
            if let Err(error) = stop::empty(cgroup, cgroup.path().display()).await {
                return Fate::Stuck(error);
            }
        }
        Fate::Killed
    }

    /// SIGINT to the process group of the main process; how many got it.
    fn interrupt(self, cgroup: &Cgroup) -> usize {
        let pids = cgroup.processes();
        // All are opened before the first one may end.
        let group: Vec<_> = pids
            .into_iter()
            .filter_map(|pid| self.member(pid, cgroup))
            .collect();
        let sent = group
            .iter()
            .filter(|pidfd| send(Some(pidfd), signal::DEFAULT_KILL).is_ok());
        sent.count()
    }

    /// The process, if it is one of the cgroup and of the main process' group. Both are looked at after the open: should the
    /// number be a stranger's by then, the descriptor is not.
    fn member(self, pid: u32, cgroup: &Cgroup) -> Option<OwnedFd> {
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).ok()?;
        let is_of_group = getpgid(Some(number)).ok()?.as_raw_nonzero().get() == self.pid;
        (is_of_group && Cgroup::of_process(pid).ok()? == *cgroup).then_some(pidfd)
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fate::Gone => f.write_str("and nothing of it runs any more; Nomad can start it anew"),
            Fate::Ended => f.write_str(
                "whose processes this driver cannot take over; it was sent SIGINT and has ended, so that Nomad can start it anew",
            ),
            Fate::Killed => f.write_str(
                "whose processes this driver cannot take over; it was killed, as no SIGINT ended it, so that Nomad can start it anew",
            ),
            Fate::Stuck(error) => write!(
                f,
                "whose processes this driver cannot take over; it was killed and has not ended, and is not started anew before it has: {error}"
            ),
            Fate::Unknown => f.write_str(
                "and its handle does not name the cgroup that Nomad made for it, so that nothing was touched; end by hand what still runs of it",
            ),
        }
    }
}

/// Refuses a start beside a copy of the same task that another driver left in Nomad's cgroup.
pub(super) fn expect_no_copy(request: &TaskRequest) -> Result<(), DriverError> {
    match nomads_cgroups(&request.names).into_iter().find(lives) {
        Some(cgroup) => Err(DriverError::Transient(format!(
            "a copy of the task that another driver started still runs in {}, and there must not be two; a 1 written to cgroup.kill there ends it",
            cgroup.path().display()
        ))),
        None => Ok(()),
    }
}

/// Nomad's cgroups of this very task that are not empty; `None` if the request names none of them as the task's. All are
/// looked at, as the client's next start may choose another slice for a task than the one before.
fn left_of(request: &TaskRequest) -> Option<Vec<Cgroup>> {
    let all = nomads_cgroups(&request.names);
    all.iter()
        .any(|cgroup| cgroup.path() == request.nomad_cgroup)
        .then(|| all.into_iter().filter(lives).collect())
}

fn nomads_cgroups(names: &Names) -> Vec<Cgroup> {
    let scope = format!("{}.{}.scope", names.alloc_id, names.task);
    if names.alloc_id.is_empty() || names.task.is_empty() || scope.contains('/') {
        return Vec::new();
    }
    SLICES
        .iter()
        .map(|slice| Cgroup::at(&format!("{slice}/{scope}")))
        .collect()
}

/// One that cannot be made for the length of its name, say, is empty.
fn lives(cgroup: &Cgroup) -> bool {
    matches!(cgroup.is_populated(), Ok(true))
}

/// Whether every process ends in time.
async fn empties(left: &[Cgroup]) -> bool {
    let emptied = async {
        while left.iter().any(lives) {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(AFTER_SIGNAL, emptied).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::task::TaskOptions;
    use crate::task::types::{Resources, TaskId};
    use proptest::prelude::*;

    const ALLOC: &str = "11111111-2222-3333-4444-555555555555";

    fn saved(driver_state: &[u8]) -> Saved {
        Saved {
            version: VERSION,
            driver_state: driver_state.into(),
        }
    }

    fn pid(driver_state: &[u8]) -> Option<i32> {
        Theirs::decode(&saved(driver_state)).map(|theirs| theirs.pid)
    }

    /// Fields in the order of Go's struct, strings in MessagePack's old form, the time as an extension.
    fn handle(pid: &[u8]) -> Vec<u8> {
        let config = b"\x83\xa2ID\xda\x00\x31\xff2222222-3333-4444-5555-666666666666/web/0badcafe\xa3Env\x81\xa1A\xa1b\xa7Devices\xc0";
        [
            b"\x83\xaaTaskConfig".as_slice(),
            config,
            b"\xa9StartedAt\xd7\xff\x00\x00\x00\x00\x69\x00\x00\x00\xa3PID",
            pid,
        ]
        .concat()
    }

    #[test]
    fn a_handle_of_exec2_is_known_by_its_pid_in_any_width() {
        for number in [
            b"\x07".as_slice(),
            b"\xcd\x00\x07",
            b"\xd3\0\0\0\0\0\0\0\x07",
        ] {
            assert_eq!(pid(&handle(number)), Some(7));
        }
        assert_eq!(pid(b"\x81\xa3PID\x07"), Some(7));
        assert_eq!(pid(b"\xde\x00\x01\xa3PID\x07"), Some(7));
    }

    #[test]
    fn garbage_a_list_and_another_version_are_no_handle_of_exec2() {
        for bytes in [
            b"".as_slice(),
            b"{\"PID\":7}",
            b"\x91\x07",
            b"\x80",
            b"\x81\xa3pid\x07",
            b"\x81\xa3PID\xc0",
            b"\x81\xa3PID\xa17",
            b"\x81\xa3PID\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
            &handle(b"\x07")[..20],
            &[b'\x81', b'\x91'].repeat(10_000),
        ] {
            assert_eq!(pid(bytes), None, "{bytes:?}");
        }
        let newer = Saved {
            version: VERSION + 1,
            ..saved(&handle(b"\x07"))
        };
        assert_eq!(Theirs::decode(&newer), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in any::<Vec<u8>>()) {
            pid(&bytes);
        }
    }

    fn request(nomad_cgroup: &str, alloc_id: &str, task: &str) -> TaskRequest {
        TaskRequest {
            id: TaskId::new(format!("{ALLOC}/web/0badcafe")),
            options: TaskOptions::default(),
            names: Names {
                alloc_id: alloc_id.into(),
                task: task.into(),
                ..Names::default()
            },
            env: Default::default(),
            device_env: Default::default(),
            user: String::new(),
            alloc_dir: "/a".into(),
            stdout_path: "/dev/null".into(),
            stderr_path: "/dev/null".into(),
            resources: Resources::default(),
            nomad_cgroup: nomad_cgroup.into(),
            network_namespace: None,
            hosts: None,
            dns: None,
            mounts: Vec::new(),
            devices: Vec::new(),
        }
    }

    #[test]
    fn nomads_cgroups_of_the_very_task_are_taken() {
        for slice in SLICES {
            let path = format!("/sys/fs/cgroup/{slice}/{ALLOC}.web.scope");
            let left = left_of(&request(&path, ALLOC, "web"));
            assert_eq!(left, Some(Vec::new()), "{path}");
        }
    }

    #[test]
    fn no_other_cgroup_is_taken() {
        let own = format!("{ALLOC}.web.scope");
        for path in [
            "",
            "/",
            "/sys/fs/cgroup",
            "/sys/fs/cgroup/nomad.slice",
            "/sys/fs/cgroup/nomad.slice/share.slice",
            "/sys/fs/cgroup/nomad.slice/share.slice/..",
            "/sys/fs/cgroup/nomad.slice/share.slice/other.web.scope",
            &format!("/sys/fs/cgroup/nomad.slice/share.slice/{ALLOC}.db.scope"),
            &format!("/sys/fs/cgroup/nomad.slice/share.slice/../share.slice/{own}"),
            &format!("/sys/fs/cgroup/nomad.slice/share.slice/{own}/.."),
            &format!("/sys/fs/cgroup/nomad.slice/share.slice/{own}/below"),
            &format!("/sys/fs/cgroup/system.slice/{own}"),
            &format!("/sys/fs/cgroup/{own}"),
            &format!("nomad.slice/share.slice/{own}"),
            &format!("/tmp/nomad.slice/share.slice/{own}"),
        ] {
            assert_eq!(left_of(&request(path, ALLOC, "web")), None, "{path}");
        }
        let share = "/sys/fs/cgroup/nomad.slice/share.slice";
        for (alloc, task, path) in [
            ("", "web", format!("{share}/.web.scope")),
            (ALLOC, "", format!("{share}/{ALLOC}..scope")),
            ("..", "/../../x", format!("{share}/..../../x.scope")),
            ("a/..", "web", format!("{share}/a/...web.scope")),
        ] {
            assert_eq!(left_of(&request(&path, alloc, task)), None, "{path}");
        }
    }

    #[tokio::test]
    async fn a_handle_without_a_cgroup_or_with_an_empty_one_ends_nothing() {
        let theirs = Theirs {
            pid: std::process::id().cast_signed(),
        };
        let said = theirs.end(&request("", ALLOC, "web")).await.to_string();
        assert!(said.contains("nothing was touched"), "{said}");
        let never = format!("/sys/fs/cgroup/nomad.slice/{ALLOC}.web.scope");
        let said = theirs.end(&request(&never, ALLOC, "web")).await.to_string();
        assert!(said.contains("nothing of it runs"), "{said}");
    }
}
