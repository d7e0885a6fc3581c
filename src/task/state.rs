//! DriverState: what Nomad keeps of a task for us, so that any later plugin finds it again. Versioned, self-contained and
//! additive: a field is never renamed or removed, a new one has a default, unknown ones are ignored.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::denials::Asked;
use crate::text::{UnitText, one_line};

/// Version of the handle, as Nomad stores it beside the bytes.
pub const VERSION: i32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverState {
    pub unit: String,
    /// Path of the scope below /sys/fs/cgroup, as /proc/PID/cgroup shows it.
    pub cgroup: String,
    /// systemd's id of this very start of the unit.
    #[serde(default)]
    pub invocation_id: String,
    /// Ids of processes mean nothing after a reboot.
    pub boot_id: String,
    pub supervisor: Process,
    pub main: Process,
    pub record: PathBuf,
    pub started_unix_nanos: u64,
    /// After a restart of the agent, Nomad knows the job's configuration no more.
    #[serde(default)]
    pub asked: Option<Asked>,
}

/// A process that is known again: a bare pid is reused by strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// Clock ticks from boot to its start: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
}

#[derive(Debug, Error)]
pub enum StateError {
    #[error(
        "the task's handle has version {found}, this driver reads {VERSION}; it was written by another driver or a newer release"
    )]
    Version { found: i32 },
    #[error("the task's handle cannot be read: {0}")]
    Garbled(String),
}

impl DriverState {
    pub fn encode(&self) -> Vec<u8> {
        // Strings and numbers only: it cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn decode(version: i32, bytes: &[u8]) -> Result<Self, StateError> {
        if version != VERSION {
            return Err(StateError::Version { found: version });
        }
        // The parser quotes what it found, however long that is.
        serde_json::from_slice(bytes)
            .map_err(|error| StateError::Garbled(one_line(&error.to_string(), UnitText::MAX_BYTES)))
    }
}

impl Process {
    /// The process that has this pid now.
    pub fn of_pid(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        start_ticks(&stat).map(|start_ticks| Self { pid, start_ticks })
    }

    /// The process behind a pidfd, if it has not been reaped.
    pub fn of_pidfd(pidfd: BorrowedFd<'_>) -> Option<Self> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
        let pid = info
            .lines()
            .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())?;
        Self::of_pid(pid)
    }

    /// Its real user. The owner of its directory in /proc is root if its program may not be read.
    pub fn uid(self) -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        let uid = uids.split_whitespace().next()?.parse().ok();
        uid.filter(|_| self.is_alive())
    }

    /// Whether a signal has stopped it (SIGSTOP and its like).
    pub fn is_stopped(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        start_ticks(&stat) == Some(self.start_ticks)
            && state.is_some_and(|state| state.starts_with('T'))
    }

    /// Whether the pid still is this process, running or not yet reaped.
    pub fn is_alive(self) -> bool {
        Self::of_pid(self.pid) == Some(self)
    }
}

/// The 22nd field, counted from behind the command's name, which may contain anything.
fn start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// systemd's invocation id of a unit; it keeps a link for each.
pub fn invocation_id(unit: &str) -> String {
    let link = fs::read_link(format!("/run/systemd/units/invocation:{unit}"));
    link.ok()
        .and_then(|id| id.to_str().map(str::to_owned))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> DriverState {
        DriverState {
            unit: "exec2-web-0a1b2c3d-deadbeef.scope".into(),
            cgroup: "/exec2.slice/exec2-share.slice/exec2-web-0a1b2c3d-deadbeef.scope".into(),
            invocation_id: "00".into(),
            boot_id: "b".into(),
            supervisor: Process {
                pid: 10,
                start_ticks: 1,
            },
            main: Process {
                pid: 11,
                start_ticks: 2,
            },
            record: "/run/x".into(),
            started_unix_nanos: 3,
            asked: Some(Asked::new(&["rw:/srv".into()], "/a/web".as_ref())),
        }
    }

    #[test]
    fn a_state_reads_back_as_written() {
        assert_eq!(
            DriverState::decode(VERSION, &state().encode()).unwrap(),
            state()
        );
    }

    #[test]
    fn a_state_of_the_first_release_and_one_with_fields_of_a_later_one_are_read() {
        let stored = r#"{"unit":"exec2-web-0a1b2c3d-deadbeef.scope","cgroup":"/c","boot_id":"b","supervisor":{"pid":10,"start_ticks":1},
            "main":{"pid":11,"start_ticks":2},"record":"/run/x","started_unix_nanos":3,"of_a_later_release":[1]}"#;
        assert_eq!(
            DriverState::decode(VERSION, stored.as_bytes())
                .unwrap()
                .main
                .pid,
            11
        );
    }

    #[test]
    fn another_version_and_garbage_are_refused_with_a_sentence() {
        for (version, bytes) in [
            (2, state().encode()),
            (0, vec![]),
            (1, vec![]),
            (1, b"\x83\xa3PID\x01".to_vec()),
        ] {
            let error = DriverState::decode(version, &bytes)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("the task's handle"), "{error}");
        }
    }

    #[test]
    fn what_is_no_state_is_refused_in_a_short_sentence() {
        let long = format!("{{\"unit\":1,\"{}\":2}}", "x".repeat(9000));
        let text = format!("\"{}\"", "ex".repeat(9000));
        for garbled in [long, text, "[".repeat(9000), String::new()] {
            let error = DriverState::decode(VERSION, garbled.as_bytes()).unwrap_err();
            let sentence = error.to_string();
            assert!(sentence.starts_with("the task's handle cannot be read: "));
            assert!(sentence.len() < 300, "{sentence}");
        }
    }

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_pid() {
        let us = Process::of_pid(std::process::id()).unwrap();
        assert!(us.is_alive());
        assert!(
            !Process {
                start_ticks: us.start_ticks + 1,
                ..us
            }
            .is_alive()
        );
    }

    #[test]
    fn a_command_named_like_a_stat_line_does_not_confuse() {
        let stat = "7 (a) R 1 2) S 1 7 7 0 -1 4194560 100 0 0 0 1 2 3 4 20 0 1 0 987 100 5";
        assert_eq!(start_ticks(stat), Some(987));
    }
}
