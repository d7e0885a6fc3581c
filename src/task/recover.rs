//! From a handle that Nomad kept back to a live task, or to one that has ended meanwhile. Only what is proven to be the
//! same process of the same boot is touched.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

use super::denials::Asked;
use super::log::of_task;
use super::start::ERROR_BYTES;
use super::state::{DriverState, Process, boot_id, invocation_id};
use super::stop::scopes;
use super::table::{Claim, Task, TaskTable};
use super::takeover::Theirs;
use super::types::{DriverError, Saved, TaskRequest};
use super::wait::Traces;
use super::{cpus, exec, wait};
use crate::cgroup::{Cgroup, Mark};
use crate::plan::unit::UnitName;
use crate::record::Record;
use crate::text::UnitText;
use crate::text::one_line;
use crate::users;

impl TaskTable {
    /// Takes over a task of an earlier plugin process; one that we have already is fine as it is.
    pub(super) async fn take_over(
        &self,
        request: TaskRequest,
        saved: Saved,
    ) -> Result<(), DriverError> {
        if self.find(&request.id).is_some() {
            return Ok(());
        }
        self.owner(&request.names);
        let state = match DriverState::decode(saved.version, &saved.driver_state) {
            Ok(state) => state,
            Err(error) => {
                return Err(match Theirs::decode(&saved) {
                    Some(theirs) => theirs.end(&request).await,
                    None => DriverError::Permanent(error.to_string()),
                });
            }
        };
        self.reserve(&request.id)?;
        match revive(&request, &state) {
            Ok((task, end)) => {
                of_task!(info, task.names, task.unit, "task recovered");
                // Their plugin is gone, and their helpers with it, unless those were killed.
                exec::end_sessions(&task);
                if let Some(record) = end {
                    let ended = self.conclude(&task, record, Traces::default()).await;
                    self.tell_end(&task, &ended);
                    task.exit.send_replace(Some(ended));
                    self.insert(task);
                } else {
                    let task = self.insert(task);
                    self.warn_if_shared(&request, &task);
                    self.follow(task);
                }
                Ok(())
            }
            Err(error) => {
                let unit = UnitName::of_task(request.id.as_str());
                // No warning: Nomad offers tasks that have ended as well, and counts nothing on the answer.
                of_task!(
                    info,
                    request.names,
                    unit,
                    "task not recovered: {}",
                    one_line(&error.to_string(), ERROR_BYTES)
                );
                self.remove(&request.id);
                Err(error)
            }
        }
    }

    /// Until it was recovered, its dynamic user was nobody's, and a start could get it.
    fn warn_if_shared(&self, request: &TaskRequest, task: &Task) {
        let claim = Claim {
            uid: task.uid,
            alloc_id: task.names.alloc_id.clone(),
        };
        let user = users::dynamic(task.uid).name;
        // Nomad names no dynamic user after an agent's restart. That of a command which has just ended is not known.
        let is_dynamic = request.user.is_empty() || request.user == user;
        if !is_dynamic || task.uid < users::LOWEST_DYNAMIC_UID {
            return;
        }
        if let Some(other) = self.sharer(&claim) {
            self.tell(
                task,
                format!(
                    "user {user:?} is that of a task of allocation {other}, too, so that each can change the other's files and processes; stop one of the two allocations"
                ),
            );
        }
    }
}

/// The task, and its record if it has ended.
fn revive(
    request: &TaskRequest,
    state: &DriverState,
) -> Result<(Task, Option<Record>), DriverError> {
    let gone = |why: &str| {
        DriverError::Permanent(format!(
            "{} cannot be recovered: {why}",
            UnitText::new(&state.unit)
        ))
    };
    let unit = UnitName::existing(&state.unit)
        .ok_or_else(|| gone("its handle names no unit of this driver"))?;
    if state.boot_id != boot_id() {
        return Err(gone("the host was rebooted, and the task ended with it"));
    }
    let cgroup = Cgroup::at(&state.cgroup);
    // All of it is killed when the task is stopped.
    if !scopes(&unit).contains(&cgroup) {
        return Err(gone("its handle names a cgroup that is not its unit's"));
    }
    let now = invocation_id(unit.as_str());
    let is_known = !now.is_empty() && !state.invocation_id.is_empty();
    if is_known && now != state.invocation_id {
        return Err(gone("another unit has its name by now"));
    }
    let supervisor_pidfd = open(state.supervisor);
    let told = cgroup.mark(Mark::OomKillsTold);
    let told = told.and_then(|told| told.parse().ok());
    let task = Task {
        id: request.id.clone(),
        names: request.names.clone(),
        cpus: Mutex::new(cpus::asked(&cgroup)),
        started_at: UNIX_EPOCH + Duration::from_nanos(state.started_unix_nanos),
        main: state.main,
        // Its command's as long as that is there, and then nobody has it.
        uid: state.main.uid().unwrap_or(0),
        main_pidfd: open(state.main),
        supervisor_pidfd,
        is_stopping: AtomicBool::new(cgroup.mark(Mark::Stopping).is_some()),
        is_killed: AtomicBool::new(false),
        oom_kills_told: Mutex::new(told.unwrap_or(0)),
        oom_turn: Arc::new(Semaphore::new(1)),
        sessions: Arc::new(Semaphore::new(exec::MOST_SESSIONS)),
        denials: Mutex::default(),
        asked: state.asked.clone().unwrap_or_else(|| Asked::by(request)),
        exit: watch::Sender::new(None),
        cgroup,
        unit,
    };
    if task.supervisor_pidfd.is_some() {
        return Ok((task, None));
    }
    match wait::read_record(&task.unit) {
        Ok(record @ Record::Exited(_)) => Ok((task, Some(record))),
        Ok(_) => Err(gone("its supervisor is gone and left no exit record")),
        // Whoever watches it will read it.
        Err(_) => Ok((task, None)),
    }
}

/// A pidfd of this very process. The start time is compared after the open: a pid cannot change its process under an
/// open pidfd, but it can before.
fn open(process: Process) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.pid).ok()?)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
    process.is_alive().then_some(pidfd)
}
