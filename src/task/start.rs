//! StartTask as a transaction: steps 1 to 3 of `plan::steps` and the last one here, the rest in the helper. Whatever fails,
//! and whenever we die, nothing stays.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};
use tracing::debug;

use super::cpus;
use super::denials::Asked;
use super::events::Phases;
use super::exec;
use super::helper::{Helper, failed};
use super::log::of_task;
use super::state::{self, DriverState, Process, boot_id, invocation_id};
use super::stop::scopes;
use super::table::{Task, TaskTable, create_record, keep_record, record_path};
use super::takeover;
use super::types::{DriverError, Saved, TaskRequest};
use super::wait;
use crate::breakpoint;
use crate::cgroup::{Cgroup, Mark};
use crate::launch::Idle;
use crate::launch::report::{self, Message};
use crate::plan::Plan;
use crate::plan::steps::{Order, Stdio, Step};
use crate::plan::unit::UnitName;
use crate::systemd::{Scope, SystemdError};
use crate::text::{UnitText, one_line};

/// How often, and after which pause, the helper's cgroup is looked at where systemd's answer was lost.
const LOST_ANSWER_PAUSES: u32 = 100;
const LOST_ANSWER_PAUSE: Duration = Duration::from_millis(20);
/// Of an error in the log.
pub(super) const ERROR_BYTES: usize = 1_000;
/// Where a task's output goes.
#[derive(Debug)]
pub enum Output {
    /// To the FIFOs that the request names.
    Logs,
    /// To these descriptors, stdout and stderr.
    Given([OwnedFd; 2]),
}

/// Somebody who sees a task's system calls: `run --learn`, and never Nomad.
pub struct Tracing {
    /// At which calls the task stops for it.
    pub calls: Vec<u32>,
    /// Traces the parked helper, whose pid and order these are, to the task that it forks.
    pub attach: Attach,
}

type Attach = Box<dyn FnOnce(i32, &Order) -> io::Result<()> + Send>;

impl fmt::Debug for Tracing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracing").finish_non_exhaustive()
    }
}

impl TaskTable {
    /// Starts a task; on return its command has been executed.
    pub async fn start_with(
        &self,
        request: TaskRequest,
        output: Output,
    ) -> Result<Saved, DriverError> {
        self.start_traced(request, output, None).await
    }

    pub async fn start_traced(
        &self,
        request: TaskRequest,
        output: Output,
        tracing: Option<Tracing>,
    ) -> Result<Saved, DriverError> {
        let (id, names) = (request.id.clone(), request.names.clone());
        self.reserve(&id)?;
        match self.start_reserved(request, output, tracing).await {
            Ok(Started {
                task,
                state,
                phases,
            }) => {
                let task = self.insert(task);
                self.tell_start(&task, &phases);
                self.follow(task);
                self.prepare_helper();
                Ok(Saved {
                    version: state::VERSION,
                    driver_state: state.encode(),
                })
            }
            Err(error) => {
                self.prepare_helper();
                let unit = UnitName::of_task(id.as_str());
                // The paths in it are a job's.
                let sentence = one_line(&error.to_string(), ERROR_BYTES);
                of_task!(warn, names, unit, "task not started: {sentence}");
                // An earlier start of this id may still be there, and Nomad may never ask about it again. What belongs to another
                // owner is not ours to clear.
                if self.expect_own(&unit).is_ok()
                    && let Err(left) = self.clear(&unit).await
                {
                    of_task!(
                        warn,
                        names,
                        unit,
                        "a failed start leaves its scope behind: {left}"
                    );
                }
                self.remove(&id);
                Err(error)
            }
        }
    }

    async fn start_reserved(
        &self,
        request: TaskRequest,
        output: Output,
        mut tracing: Option<Tracing>,
    ) -> Result<Started, DriverError> {
        let mut phases = Phases::new();
        breakpoint::at(Step::Plan);
        // Before anything of the task could be denied.
        self.denials();
        takeover::expect_no_copy(&request)?;
        self.end_copies(&request).await?;
        let mut plan = self.plan(&request).await?;
        phases.end("plan");
        let output = match output {
            Output::Logs => None,
            Output::Given(descriptors) => {
                plan.order.stdio = Stdio::Given;
                Some(descriptors)
            }
        };
        if let Some(tracing) = &mut tracing {
            plan.order.traced_calls = std::mem::take(&mut tracing.calls);
        }
        self.launch(&request, Arc::new(plan), (output, tracing), phases)
            .await
    }

    /// Steps 2 and 3, then the helper's, then the last.
    async fn launch(
        &self,
        request: &TaskRequest,
        plan: Arc<Plan>,
        (output, tracing): (Option<[OwnedFd; 2]>, Option<Tracing>),
        mut phases: Phases,
    ) -> Result<Started, DriverError> {
        let record_path = record_path(&plan.unit);
        let no_record =
            |error| DriverError::Transient(format!("{}: {error}", record_path.display()));
        breakpoint::at(Step::Spawn);
        let record = create_record(&record_path).map_err(no_record)?;
        let helper = self.spawn(&plan, record, output).await?;
        phases.end("spawn");
        let plan = &plan;
        // The scope is made around a parked helper while the helper prepares what charges nothing to the task.
        let released = async {
            breakpoint::at(Step::Scope);
            let owner = self.owner(&request.names);
            let scope = helper.scope(plan);
            let (started, parked) = tokio::join!(self.shared.systemd.start(&scope), helper.next());
            // A helper that failed comes first: systemd then says no more than that there was no process.
            match parked? {
                (Message::Parked, _) => {}
                (Message::Failed(failure), _) => return Err(failed(&failure)),
                (Message::Started(_) | Message::Ended(_), _) => {
                    return Err(DriverError::Permanent(
                        "the helper started before it was released".into(),
                    ));
                }
            }
            let started = match started {
                // A call that was lost on its way, as to a systemd that executes itself anew; it is of no effect any more.
                Err(error)
                    if error.is_unanswered()
                        && self
                            .shared
                            .systemd
                            .knows(&plan.unit)
                            .await
                            .is_ok_and(|it| !it) =>
                {
                    self.shared.systemd.start(&scope).await
                }
                // Not before the helper has opened the log pipes: their reader leaves with the last writer.
                Err(SystemdError::Exists(_)) => self.replace(request, &scope, &owner).await,
                started => started,
            };
            let cgroup = self.entered(&helper, plan, started).await?;
            if let Err(error) = cgroup.set_mark(Mark::Owner, &owner) {
                of_task!(
                    warn,
                    request.names,
                    plan.unit,
                    "the scope cannot be marked as {owner}'s: {error}"
                );
            }
            phases.end("scope");
            // While the helper holds it: the cgroup of a command that ends at once is gone before anything else is done.
            let differences = differences(plan, &cgroup);
            if let Some(tracing) = tracing {
                (tracing.attach)(helper.parked.pid, &plan.order).map_err(|error| {
                    DriverError::Permanent(format!("the command cannot be traced: {error}"))
                })?;
            }
            report::release(&helper.parked.control).map_err(|error| {
                DriverError::Transient(format!("the helper cannot be released: {error}"))
            })?;
            match helper.next().await? {
                (Message::Started(_), Some(main)) => {
                    for difference in differences {
                        self.warn(&request.id, &request.names, &plan.unit, difference);
                    }
                    phases.end("exec");
                    let assembled = assemble(request, plan, &helper, cgroup, main)?;
                    breakpoint::at(Step::Commit);
                    keep_record(&helper.record, &record_path).map_err(no_record)?;
                    // A supervisor that has died meanwhile is found so by whoever watches the task.
                    let _ = report::commit(&helper.parked.control);
                    Ok(assembled)
                }
                (Message::Failed(failure), _) => Err(failed(&failure)),
                // `Started` without its descriptor: there was none left to receive it with.
                _ => Err(DriverError::Transient(
                    "the helper's answer did not arrive whole".into(),
                )),
            }
        };
        match released.await {
            Ok((task, state)) => Ok(Started {
                task: helper.into_task(task),
                state,
                phases,
            }),
            Err(error) => {
                helper.kill(request, &plan.unit).await;
                Err(error)
            }
        }
    }

    /// Step 2.
    async fn spawn(
        &self,
        plan: &Plan,
        record: File,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Helper, DriverError> {
        let give = |idle: Idle| {
            idle.take(&plan.order, &record, output.as_ref())
                .map_err(|(idle, failure)| {
                    tokio::spawn(wait::reaped(idle.dismiss()));
                    failure
                })
        };
        // One that was killed meanwhile is none.
        let ahead = self.idle_helper().and_then(|idle| {
            let given = give(idle);
            given
                .inspect_err(|failure| debug!("the helper ahead: {failure}"))
                .ok()
        });
        let parked = match ahead {
            Some(parked) => Ok(parked),
            None => self.new_helper().await?.and_then(give),
        };
        let parked = parked.map_err(|error| {
            DriverError::Transient(format!("the helper cannot be spawned: {error}"))
        })?;
        Ok(Helper { parked, record })
    }

    /// Step 3, once more: the name derives from the task's id, so what has it is this very task, of a start whose plugin
    /// died.
    async fn replace(
        &self,
        request: &TaskRequest,
        scope: &Scope<'_>,
        owner: &str,
    ) -> Result<(), SystemdError> {
        let cgroups = scopes(scope.name);
        let others = cgroups.iter().filter_map(|cgroup| cgroup.mark(Mark::Owner));
        if let Some(other) = others.into_iter().find(|other| other != owner) {
            return Err(SystemdError::Taken {
                unit: scope.name.clone(),
                owner: UnitText::new(&other).to_string(),
            });
        }
        of_task!(
            warn,
            request.names,
            scope.name,
            "an earlier start of this task is still there; it is removed"
        );
        for cgroup in cgroups {
            if let Err(error) = cgroup.kill() {
                of_task!(warn, request.names, scope.name, "cgroup.kill: {error}");
            }
        }
        self.shared.systemd.stop(scope.name).await?;
        self.shared.systemd.reset_failed(scope.name).await?;
        self.shared.systemd.start(scope).await
    }

    /// The scope's cgroup, once the parked helper is in it: seen in /proc, whatever systemd said. Its answer may be lost with
    /// the bus although it did what it was asked to. Looked at before the release, as the cgroup of a short command may be gone
    /// a moment after it.
    async fn entered(
        &self,
        helper: &Helper,
        plan: &Plan,
        started: Result<(), SystemdError>,
    ) -> Result<Cgroup, DriverError> {
        let pid = helper.parked.pid.unsigned_abs();
        let is_inside = || {
            let cgroup = Cgroup::of_process(pid).ok()?;
            (cgroup.unit() == Some(plan.unit.as_str())).then_some(cgroup)
        };
        match started {
            Ok(()) => is_inside().ok_or_else(|| {
                DriverError::Transient(format!(
                    "systemd started {}, but the helper is not in it; was it killed?",
                    plan.unit
                ))
            }),
            Err(error) if error.is_unanswered() => {
                let known = self.shared.systemd.knows(&plan.unit).await;
                let pauses = if matches!(known, Ok(true)) {
                    LOST_ANSWER_PAUSES
                } else {
                    0
                };
                for _ in 0..pauses {
                    if is_inside().is_some() {
                        break;
                    }
                    tokio::time::sleep(LOST_ANSWER_PAUSE).await;
                }
                is_inside().ok_or_else(|| refused(error))
            }
            Err(error) => Err(refused(error)),
        }
    }
}

/// What a start has made.
#[derive(Debug)]
struct Started {
    task: Task,
    state: DriverState,
    phases: Phases,
}

/// Limits are read back, because an operator's drop-in may win over the call, and a controller may be missing.
fn differences(plan: &Plan, cgroup: &Cgroup) -> Vec<String> {
    plan.limits.differences(
        |file| cgroup.limit(file),
        cgroup.cpu_quota_usec_per_sec(),
        cpus::effective(cgroup).as_ref(),
    )
}

fn assemble(
    request: &TaskRequest,
    plan: &Plan,
    helper: &Helper,
    cgroup: Cgroup,
    main: OwnedFd,
) -> Result<(Task, DriverState), DriverError> {
    // Ours to reap, so it is there even if the command has already ended.
    let supervisor = Process::of_pid(helper.parked.pid.unsigned_abs()).ok_or_else(|| {
        DriverError::Permanent(format!("the supervisor of {} is not in /proc", plan.unit))
    })?;
    // Not yet reaped, unless its whole namespace was killed.
    let main_process = Process::of_pidfd(main.as_fd());
    let main_process = main_process.unwrap_or(Process {
        pid: 0,
        start_ticks: 0,
    });
    let started_at = SystemTime::now();
    let asked = Asked::new(&request.options.unveil, &plan.order.task_dir.path);
    let state = DriverState {
        unit: plan.unit.to_string(),
        cgroup: cgroup.path_in_hierarchy(),
        invocation_id: invocation_id(plan.unit.as_str()),
        boot_id: boot_id(),
        supervisor,
        main: main_process,
        record: record_path(&plan.unit),
        started_unix_nanos: started_at
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
        asked: Some(asked.clone()),
    };
    let task = Task {
        id: request.id.clone(),
        names: request.names.clone(),
        unit: plan.unit.clone(),
        cgroup,
        started_at,
        main: main_process,
        uid: plan.order.uid,
        main_pidfd: Some(main),
        supervisor_pidfd: None,
        is_stopping: AtomicBool::new(false),
        is_killed: AtomicBool::new(false),
        oom_kills_told: Mutex::new(0),
        oom_turn: Arc::new(Semaphore::new(1)),
        sessions: Arc::new(Semaphore::new(exec::MOST_SESSIONS)),
        cpus: Mutex::new(plan.limits.allowed_cpus.clone()),
        denials: Mutex::default(),
        asked,
        exit: watch::Sender::new(None),
    };
    Ok((task, state))
}

/// A failure of systemd's as Nomad is told it: the restart policy applies to what passes.
pub(super) fn refused(error: SystemdError) -> DriverError {
    if error.is_transient() {
        DriverError::Transient(error.to_string())
    } else {
        DriverError::Permanent(error.to_string())
    }
}
