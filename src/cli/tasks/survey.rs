//! What there is: scopes in the cgroup tree, processes in them, and records under /run, put together by the unit's name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::time::{sleep, timeout};

use crate::cgroup::{Cgroup, Gauges, Mark};
use crate::plan::signal;
use crate::plan::unit::{self, RESERVE_SLICE, SHARE_SLICE, SLICE, UnitName};
use crate::record::{self, Exit, Record};
use crate::systemd::Systemd;
use crate::task::RUN_DIR;
use crate::task::state::Process;
use crate::text::UnitText;

/// For what is in the middle of a start or an end: it looks like something left over for a moment.
const SECOND_LOOK: Duration = Duration::from_millis(200);
/// For systemd to tell descriptions, which are not worth a longer wait.
const PATIENCE: Duration = Duration::from_secs(3);
/// Of the times in /proc, on every architecture that we run on.
const TICKS_PER_SECOND: u64 = 100;

#[derive(Debug)]
pub struct Survey {
    pub tasks: Vec<Task>,
    pub warning: Option<String>,
}

/// A task, or what is left over of one; in this order the columns, by these names the keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Task {
    pub unit: String,
    pub state: State,
    /// As Nomad is told it: 128 + n after signal n.
    pub exit_code: Option<i32>,
    pub exit_signal: Option<String>,
    /// `job/group/task`, or what is known of that.
    pub task: String,
    /// The first characters of the allocation's id.
    pub alloc: Option<String>,
    pub pid: Option<u32>,
    pub age_sec: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub memory_max_bytes: Option<u64>,
    pub cpu_usec: Option<u64>,
    pub cpu_quota_usec_per_sec: Option<u64>,
    /// Of the quota's periods in which the task ran, and of these those at whose end it had to wait for the next.
    pub cpu_periods: Option<u64>,
    pub cpu_throttled_periods: Option<u64>,
    pub cpu_throttled_usec: Option<u64>,
    pub owner: Option<String>,
    pub description: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    #[default]
    Running,
    Frozen,
    Starting,
    Ended,
    Orphan,
    Leftover,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Frozen => "frozen",
            State::Starting => "starting",
            State::Ended => "ended",
            State::Orphan => "orphan",
            State::Leftover => "leftover",
        }
    }

    /// What a start or an end looks like, too, while it happens.
    fn is_passing(self) -> bool {
        matches!(self, State::Orphan | State::Leftover)
    }
}

/// All tasks, by the names of their units.
pub async fn survey(systemd: &Systemd) -> Survey {
    let mut tasks = look_at(&names());
    if tasks.iter().any(|task| task.state.is_passing()) {
        sleep(SECOND_LOOK).await;
        tasks = look_at(&names());
    }
    let warning = if tasks.iter().any(|task| task.has_scope()) {
        describe(&mut tasks, systemd).await.err()
    } else {
        None
    };
    Survey { tasks, warning }
}

fn look_at(names: &BTreeSet<UnitName>) -> Vec<Task> {
    names.iter().filter_map(look).collect()
}

fn records() -> PathBuf {
    Path::new(RUN_DIR).join("records")
}

fn names() -> BTreeSet<UnitName> {
    let slices = [SHARE_SLICE, RESERVE_SLICE].map(|slice| Cgroup::at(&format!("{SLICE}/{slice}")));
    let dirs = slices.iter().map(|slice| slice.path().to_owned());
    let entries = dirs
        .chain([records()])
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    entries
        .filter_map(|entry| UnitName::existing(entry.file_name().to_str()?))
        .collect()
}

/// What is seen of one unit. The scope comes before the record: what leaves its scope has written its record.
fn look(unit: &UnitName) -> Option<Task> {
    let scopes =
        [SHARE_SLICE, RESERVE_SLICE].map(|slice| Cgroup::at(&format!("{SLICE}/{slice}/{unit}")));
    let scope = scopes.into_iter().find(Cgroup::exists);
    let pids = scope.as_ref().map(Cgroup::processes).unwrap_or_default();
    let processes: Vec<Member> = pids.into_iter().filter_map(Member::read).collect();
    let path = records().join(unit.as_str());
    let record = fs::read(&path).ok().map(|page| record::read(&page));
    let (state, exit) = judge(record, scope.is_some(), &processes)?;
    let state = match &scope {
        Some(scope) if state == State::Running && scope.stands_still() => State::Frozen,
        _ => state,
    };
    let changed = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let since = match (exit, processes.iter().map(|one| one.start_ticks).min()) {
        (Some(exit), _) => Some(UNIX_EPOCH + Duration::from_nanos(exit.ended_unix_nanos)),
        (None, Some(ticks)) => booted().map(|at| at + since_boot(ticks)),
        (None, None) => changed(&path).or_else(|| changed(scope.as_ref()?.path())),
    };
    let parts = unit.parts();
    Some(Task {
        unit: unit.to_string(),
        state,
        exit_code: exit.map(|exit| match exit.signal {
            0 => exit.code,
            signal => 128 + signal,
        }),
        exit_signal: exit.and_then(|exit| (exit.signal != 0).then(|| signal::name(exit.signal))),
        task: parts.map_or(unit.as_str(), |(task, _)| task).to_owned(),
        alloc: parts.map(|(_, alloc)| alloc.to_owned()),
        pid: main_process(&processes),
        age_sec: since.map(|at| at.elapsed().unwrap_or_default().as_secs()),
        ..scope.as_ref().map(usage).unwrap_or_default()
    })
}

/// What the scope's own files tell.
fn usage(scope: &Cgroup) -> Task {
    let gauges = scope.gauges();
    let cpu = gauges.as_ref().and_then(Gauges::cpu);
    let quota = scope.cpu_quota_usec_per_sec().flatten();
    // Without a quota all are 0, which says nothing.
    let limited = cpu.filter(|_| quota.is_some());
    Task {
        memory_bytes: gauges.and_then(|gauges| gauges.memory().usage_bytes),
        memory_max_bytes: scope.memory_max_bytes().flatten(),
        cpu_usec: cpu.map(|cpu| cpu.usage_usec),
        cpu_quota_usec_per_sec: quota,
        cpu_periods: limited.and_then(|cpu| cpu.periods),
        cpu_throttled_periods: limited.and_then(|cpu| cpu.throttled_periods),
        cpu_throttled_usec: limited.and_then(|cpu| cpu.throttled_usec),
        owner: scope
            .mark(Mark::Owner)
            .map(|owner| UnitText::new(&owner).to_string()),
        ..Task::default()
    }
}

/// A process in a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    /// Its pids in the namespaces from ours inwards.
    pids: Vec<u32>,
    parent: u32,
    start_ticks: u64,
}

impl Member {
    fn read(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        Some(Self {
            pids: field("NSpid:")?
                .split_whitespace()
                .map(|pid| pid.parse().ok())
                .collect::<Option<_>>()?,
            parent: field("PPid:")?.trim().parse().ok()?,
            start_ticks: Process::of_pid(pid)?.start_ticks,
        })
    }

    fn pid(&self) -> u32 {
        self.pids.first().copied().unwrap_or_default()
    }

    /// PID 1 of a namespace that is a child of ours: whatever a task makes is further in.
    fn is_supervisor(&self) -> bool {
        matches!(self.pids[..], [_, 1])
    }
}

/// The supervisor's first child: those that it adopts came later.
fn main_process(processes: &[Member]) -> Option<u32> {
    let supervisor = processes.iter().find(|one| one.is_supervisor())?;
    let children = processes
        .iter()
        .filter(|one| one.parent == supervisor.pid());
    children
        .min_by_key(|one| (one.start_ticks, one.pids.last().copied()))
        .map(Member::pid)
}

/// The state, and the exit of what has ended; `None` for what is no more.
fn judge(
    record: Option<Record>,
    has_scope: bool,
    processes: &[Member],
) -> Option<(State, Option<Exit>)> {
    let state = match (record, processes.is_empty()) {
        (Some(Record::Exited(exit)), _) => return Some((State::Ended, Some(exit))),
        (Some(Record::Open), false) => State::Running,
        (Some(_), true) => State::Leftover,
        (None, true) if has_scope => State::Leftover,
        (None, true) => return None,
        // A helper whose plugin is there to finish the start.
        (None, false)
            if processes
                .iter()
                .any(|one| one.is_supervisor() && one.parent != 1) =>
        {
            State::Starting
        }
        (None | Some(Record::Torn), false) => State::Orphan,
    };
    Some((state, None))
}

fn since_boot(ticks: u64) -> Duration {
    Duration::from_millis(ticks * (1000 / TICKS_PER_SECOND))
}

/// When the host was booted, by today's clock.
fn booted() -> Option<SystemTime> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let seconds = uptime.split_whitespace().next()?.parse().ok()?;
    SystemTime::now().checked_sub(Duration::try_from_secs_f64(seconds).ok()?)
}

impl Task {
    /// cpu.stat is in every cgroup, whatever its controllers.
    fn has_scope(&self) -> bool {
        self.cpu_usec.is_some()
    }
}

/// Puts systemd's words for the names of the units.
async fn describe(tasks: &mut [Task], systemd: &Systemd) -> Result<(), String> {
    let told = timeout(PATIENCE, systemd.descriptions("exec2-*.scope")).await;
    let told: BTreeMap<String, String> = match told {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => return Err(format!("{error}; tasks have the names of their units here")),
        Err(_) => {
            return Err(format!(
                "systemd has not answered within {} s; tasks have the names of their units here",
                PATIENCE.as_secs()
            ));
        }
    };
    for task in tasks {
        if let Some(description) = told.get(&task.unit) {
            let description = UnitText::new(description).to_string();
            task.task = unit::path_in(&description).unwrap_or_else(|| description.clone());
            task.description = Some(description);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(pids: &[u32], parent: u32, start_ticks: u64) -> Member {
        Member {
            pids: pids.to_vec(),
            parent,
            start_ticks,
        }
    }

    #[test]
    fn a_state_follows_from_scope_processes_and_record() {
        let exit = Exit {
            code: 7,
            ..Exit::default()
        };
        let helper = |parent| vec![member(&[500, 1], parent, 10)];
        let judged = |record, has_scope, processes: &[Member]| {
            judge(record, has_scope, processes).map(|(state, _)| state)
        };
        for (record, has_scope, processes, state) in [
            (Some(Record::Open), true, helper(1), Some(State::Running)),
            (
                Some(Record::Exited(exit)),
                false,
                vec![],
                Some(State::Ended),
            ),
            (
                Some(Record::Exited(exit)),
                true,
                helper(1),
                Some(State::Ended),
            ),
            (None, true, helper(77), Some(State::Starting)),
            (None, true, helper(1), Some(State::Orphan)),
            (None, true, vec![member(&[500], 77, 1)], Some(State::Orphan)),
            (Some(Record::Torn), true, helper(77), Some(State::Orphan)),
            (Some(Record::Open), false, vec![], Some(State::Leftover)),
            (Some(Record::Open), true, vec![], Some(State::Leftover)),
            (Some(Record::Torn), false, vec![], Some(State::Leftover)),
            (None, true, vec![], Some(State::Leftover)),
            (None, false, vec![], None),
        ] {
            assert_eq!(
                judged(record, has_scope, &processes),
                state,
                "{record:?} {has_scope} {processes:?}"
            );
        }
        let ended = judge(Some(Record::Exited(exit)), false, &[]);
        assert_eq!(ended, Some((State::Ended, Some(exit))));
    }

    #[test]
    fn the_main_process_is_the_supervisors_first_child() {
        let processes = [
            member(&[503, 4], 501, 14),
            // Adopted, with a pid from after a wrap.
            member(&[40, 9], 500, 13),
            member(&[501, 2], 500, 12),
            member(&[500, 1], 1, 11),
            // PID 1 of a namespace that the task made.
            member(&[504, 5, 1], 503, 15),
        ];
        assert_eq!(main_process(&processes), Some(501));
        assert_eq!(main_process(&processes[..3]), None);
    }
}
