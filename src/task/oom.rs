//! What the kernel's OOM killer did to a task: counted by the scope's cgroup, told in the kernel's log.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::table::{Task, TaskTable, lock};
use super::thread::in_thread;
use crate::cgroup::Mark;
use crate::text::UnitText;

/// A task whose workers are killed again and again is told of once in so long.
const BETWEEN_EVENTS: Duration = Duration::from_secs(10);
/// After a look that found nothing new.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// An end so soon after a kill is that kill's doing, though it hit another process of the task.
const SOON: Duration = Duration::from_secs(5);
/// Longest record of the kernel's log.
const RECORD_BYTES: usize = 8192;

/// A process that the OOM killer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Victim {
    /// On the host.
    pub pid: u32,
    /// As the process called itself.
    pub name: String,
    pub cause: Cause,
    /// Time since boot without suspends, by the clock of the kernel's log.
    pub at: Duration,
}

/// Which limit was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    /// That of this cgroup, by its path in the hierarchy.
    Cgroup(String),
    /// The host had no memory left.
    Host,
}

/// What is told of kills.
#[derive(Debug)]
pub(super) struct Kills<'a> {
    pub unit: &'a str,
    /// Path of the scope in the hierarchy.
    pub cgroup: &'a str,
    /// Kills that are news.
    pub count: u64,
    /// The last of them, if the kernel's log still has it.
    pub last: Option<&'a Victim>,
    /// 0 if unknown, or without a limit.
    pub max_bytes: u64,
    pub peak_bytes: u64,
}

impl fmt::Display for Kills<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("The kernel's OOM killer ended ")?;
        match (self.last, self.count) {
            (Some(last), _) => write!(f, "process {} ({})", last.pid, UnitText::new(&last.name))?,
            (None, 1) => f.write_str("a process")?,
            (None, count) => write!(f, "{count} processes")?,
        }
        if self.last.is_some() && self.count > 1 {
            write!(f, " and {} more", self.count - 1)?;
        }
        write!(f, " of {}: ", self.unit)?;
        let max = (self.max_bytes > 0).then_some(Bytes(self.max_bytes));
        match (self.last.map(|last| &last.cause), max) {
            (Some(Cause::Host), _) => f.write_str("the host had no memory left"),
            (Some(Cause::Cgroup(path)), _) if path != self.cgroup => {
                write!(f, "{} had reached its memory limit", UnitText::new(path))
            }
            (Some(Cause::Cgroup(_)), Some(max)) => {
                write!(f, "it had reached its memory limit of {max}")
            }
            (Some(Cause::Cgroup(_)), None) => f.write_str("it had reached its memory limit"),
            (None, Some(max)) => write!(
                f,
                "it had reached its memory limit of {max}, or the host had no memory left"
            ),
            (None, None) => f.write_str("the host had no memory left"),
        }?;
        if self.peak_bytes > 0 {
            write!(f, " (its peak is {})", Bytes(self.peak_bytes))?;
        }
        Ok(())
    }
}

/// `63.9 MiB`.
#[derive(Debug)]
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if self.0.is_multiple_of(1 << 20) {
            write!(f, "{mib:.0} MiB")
        } else {
            write!(f, "{mib:.1} MiB")
        }
    }
}

/// Whether an end is the OOM killer's doing. `main_was_killed`: the main process died of a SIGKILL that we did not send.
/// `kills` are all that the scope's cgroup has counted, `victims` those of them that the kernel's log still tells of.
pub(super) fn is_to_blame(
    main_pid: u32,
    main_was_killed: bool,
    kills: u64,
    victims: &[Victim],
    ended_at: Duration,
) -> bool {
    let untold = kills > victims.len() as u64;
    if main_was_killed {
        return untold || victims.iter().any(|victim| victim.pid == main_pid);
    }
    let is_soon = |victim: &Victim| ended_at.abs_diff(victim.at) <= SOON;
    victims.last().is_some_and(is_soon)
}

/// Time since boot by a clock that runs as that of the kernel's log does: NTP adjusts neither.
pub(super) fn now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicRaw);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// The victims in a scope, oldest first; none where the kernel's log cannot be read, as in a container.
pub(super) async fn victims(cgroup: String) -> Vec<Victim> {
    let elsewhere = cgroup.clone();
    match in_thread(move || read_log(&elsewhere)).await {
        Ok(victims) => victims,
        // A moment here is better than an end that is not told.
        Err(_) => read_log(&cgroup),
    }
}

fn read_log(cgroup: &str) -> Vec<Victim> {
    let mut options = OpenOptions::new();
    let log = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else {
        return Vec::new();
    };
    let mut victims = Vec::new();
    let mut record = [0; RECORD_BYTES];
    loop {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(length) => {
                victims.extend(victim(&String::from_utf8_lossy(&record[..length]), cgroup));
            }
            // Overwritten while we read: the next read goes on with what is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    victims
}

/// A record `priority,number,µs,flags;oom-kill:constraint=…,oom_memcg=…,task_memcg=…,task=NAME,pid=…,uid=…`.
fn victim(record: &str, cgroup: &str) -> Option<Victim> {
    let (head, text) = record.split_once(';')?;
    let mut head = head.split(',');
    let priority: u32 = head.next()?.parse().ok()?;
    // What others than the kernel write there has a facility, and could say anything.
    if priority >> 3 != 0 {
        return None;
    }
    let at = Duration::from_micros(head.nth(1)?.parse().ok()?);
    let text = text.lines().next()?.strip_prefix("oom-kill:constraint=")?;
    let (constraint, text) = text.split_once(',')?;
    // A name may contain anything, but comes last and is too short for a path of ours.
    let (before, task) = text.rsplit_once(&format!(",task_memcg={cgroup},task="))?;
    let (task, _uid) = task.rsplit_once(",uid=")?;
    let (name, pid) = task.rsplit_once(",pid=")?;
    let cause = match before.split_once(",oom_memcg=") {
        Some((_, limited)) if constraint == "CONSTRAINT_MEMCG" => Cause::Cgroup(limited.into()),
        _ => Cause::Host,
    };
    Some(Victim {
        pid: pid.parse().ok()?,
        name: name.into(),
        cause,
        at,
    })
}

impl TaskTable {
    /// The task's memory.events has changed. One look at a time, and the next one not at once.
    pub(super) fn look_for_kills(&self, task: Arc<Task>) {
        let Ok(turn) = task.oom_turn.clone().try_acquire_owned() else {
            return;
        };
        let tasks = self.clone();
        tokio::spawn(async move {
            let _turn = turn;
            let mut is_quiet = false;
            while task.ended().is_none() {
                // Reclaim at the limit raises events as well, a hundred a second: one small file is read for them, once a second.
                // Without it the scope is gone, and whoever watches the task tells.
                let Some(kills) = task.cgroup.oom_kills() else {
                    return;
                };
                if kills <= *lock(&task.oom_kills_told) {
                    if is_quiet {
                        return;
                    }
                    is_quiet = true;
                    tokio::time::sleep(BETWEEN_LOOKS).await;
                    continue;
                }
                let peak = task.cgroup.memory_peak_bytes().unwrap_or(0);
                let Some(max) = task.cgroup.memory_max_bytes() else {
                    return;
                };
                let victims = victims(task.cgroup.path_in_hierarchy()).await;
                tasks.tell_kills(&task, kills, &victims, max.unwrap_or(0), peak);
                // What happened meanwhile is seen by the next look.
                tokio::time::sleep(BETWEEN_EVENTS).await;
            }
        });
    }

    /// Tells of kills that were not told of yet.
    pub(super) fn tell_kills(
        &self,
        task: &Task,
        kills: u64,
        victims: &[Victim],
        max_bytes: u64,
        peak_bytes: u64,
    ) {
        let count = {
            let mut told = lock(&task.oom_kills_told);
            let count = kills.saturating_sub(*told);
            *told = kills.max(*told);
            count
        };
        if count == 0 {
            return;
        }
        // At the end of a task its scope may be gone, and needs no mark.
        let _ = task.cgroup.set_mark(Mark::OomKillsTold, &kills.to_string());
        let kills = Kills {
            unit: task.unit.as_str(),
            cgroup: &task.cgroup.path_in_hierarchy(),
            count,
            last: victims.last(),
            max_bytes,
            peak_bytes,
        };
        self.tell(task, kills.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCOPE: &str = "/exec2.slice/exec2-share.slice/exec2-web-0a1b2c3d-deadbeef.scope";

    fn record(name: &str) -> String {
        format!(
            "6,1234,5000000,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=exec2-web-0a1b2c3d-deadbeef.scope,mems_allowed=0,\
             oom_memcg={SCOPE},task_memcg={SCOPE},task={name},pid=4711,uid=80001\n SUBSYSTEM=x\n"
        )
    }

    fn killed(at_secs: u64, pid: u32) -> Victim {
        Victim {
            pid,
            name: "python3".into(),
            cause: Cause::Cgroup(SCOPE.into()),
            at: Duration::from_secs(at_secs),
        }
    }

    #[test]
    fn a_victim_is_read_from_the_kernels_record() {
        for name in ["python3", "a,pid=1,uid=0", "task=x"] {
            let found = victim(&record(name), SCOPE).unwrap();
            assert_eq!((found.pid, &*found.name), (4711, name));
            assert_eq!(found.cause, Cause::Cgroup(SCOPE.into()));
            assert_eq!(found.at, Duration::from_secs(5));
        }
        let global = record("x").replace("CONSTRAINT_MEMCG", "CONSTRAINT_NONE");
        let global = global.replace(&format!("oom_memcg={SCOPE},"), "global_oom,");
        assert_eq!(victim(&global, SCOPE).unwrap().cause, Cause::Host);
    }

    #[test]
    fn others_and_what_is_not_the_kernels_are_passed_over() {
        assert_eq!(victim(&record("x"), "/exec2.slice/other.scope"), None);
        let forged = record("x").replacen("6,", "14,", 1);
        assert_eq!(victim(&forged, SCOPE), None);
        for garbage in [
            "",
            ";",
            "6,1;x",
            "6,1,2,-;oom-kill:constraint=",
            "x,y,z;oom-kill:",
        ] {
            assert_eq!(victim(garbage, SCOPE), None, "{garbage}");
        }
    }

    #[test]
    fn the_main_process_is_blamed_on_the_killer_only_if_it_was_its_victim() {
        let end = Duration::from_secs(100);
        let blame =
            |was_killed, kills, victims: &[Victim]| is_to_blame(7, was_killed, kills, victims, end);
        assert!(blame(true, 1, &[killed(99, 7)]));
        // Somebody else's SIGKILL, hours after a worker was killed.
        assert!(!blame(true, 1, &[killed(1, 8)]));
        // The log no longer tells whom.
        assert!(blame(true, 1, &[]));
        assert!(!blame(true, 0, &[]));
        // A shell that ends because its child was killed, and one that ends long after.
        assert!(blame(false, 1, &[killed(99, 8)]));
        assert!(!blame(false, 1, &[killed(1, 8)]));
        assert!(!blame(false, 1, &[]));
    }

    #[test]
    fn kills_read_as_a_sentence_with_process_limit_and_peak() {
        let last = killed(1, 4711);
        let mut kills = Kills {
            unit: "exec2-web-0a1b2c3d-deadbeef.scope",
            cgroup: SCOPE,
            count: 1,
            last: Some(&last),
            max_bytes: 64 << 20,
            peak_bytes: (64 << 20) - 100_000,
        };
        assert_eq!(
            kills.to_string(),
            "The kernel's OOM killer ended process 4711 (python3) of exec2-web-0a1b2c3d-deadbeef.scope: it had reached its memory limit of 64 MiB (its peak is 63.9 MiB)"
        );
        kills.count = 3;
        assert!(kills.to_string().contains("(python3) and 2 more of"));
        kills.last = None;
        assert!(kills.to_string().contains("ended 3 processes of"));
        let by = |cause| Victim {
            cause,
            ..last.clone()
        };
        let host = by(Cause::Host);
        kills.last = Some(&host);
        assert!(kills.to_string().contains("the host had no memory left"));
        let slice = by(Cause::Cgroup("/exec2.slice".into()));
        kills.last = Some(&slice);
        assert!(
            kills
                .to_string()
                .contains(": /exec2.slice had reached its memory limit")
        );
    }
}
