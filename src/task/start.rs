//! StartTask as a transaction: steps 1 to 3 of `plan::steps` here, the rest in the helper. Whatever fails, nothing stays.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::cpus;
use super::dir::{self, Found};
use super::state::{self, DriverState, Process, boot_id, invocation_id};
use super::table::{Task, TaskTable, create_record, lock, record_path, remove_record, send};
use super::takeover;
use super::types::{DriverError, Saved, TaskRequest};
use crate::cgroup::Cgroup;
use crate::host;
use crate::launch::report::{self, Failure, Message};
use crate::launch::{self, Parked};
use crate::plan::files::Resolver;
use crate::plan::steps::Stdio;
use crate::plan::{Facts, Plan, signal};
use crate::sys;
use crate::systemd::{Scope, SystemdError};
use crate::text::UnitText;
use crate::users::{self, Account, UserError};

/// How long the helper may take for one of its halves: paths of a hung NFS server stall it, and must stall nothing else.
const HELPER_PATIENCE: Duration = Duration::from_secs(60);
/// How long a killed helper may take to end before the start goes on without it; it is reaped whenever it does.
const AFTER_KILL: Duration = Duration::from_secs(2);
/// How often, and after which pause, the helper's cgroup is looked at where systemd's answer was lost.
const LOST_ANSWER_PAUSES: u32 = 100;
const LOST_ANSWER_PAUSE: Duration = Duration::from_millis(20);
/// How long a user or a directory may take to be looked up.
const LOOK_UP_PATIENCE: Duration = Duration::from_secs(15);

/// Where a task's output goes.
#[derive(Debug)]
pub enum Output {
    /// To the FIFOs that the request names.
    Logs,
    /// To these descriptors, stdout and stderr.
    Given([OwnedFd; 2]),
}

impl TaskTable {
    /// Starts a task; on return its command has been executed.
    pub async fn start_with(
        &self,
        request: TaskRequest,
        output: Output,
    ) -> Result<Saved, DriverError> {
        let id = request.id.clone();
        self.reserve(&id)?;
        match self.start_reserved(request, output).await {
            Ok((task, state)) => {
                let task = self.insert(task);
                self.tell_start(&task);
                self.watch(task);
                self.follow_cpus();
                Ok(Saved {
                    version: state::VERSION,
                    driver_state: state.encode(),
                })
            }
            Err(error) => {
                self.remove(&id);
                Err(error)
            }
        }
    }

    async fn start_reserved(
        &self,
        request: TaskRequest,
        output: Output,
    ) -> Result<(Task, DriverState), DriverError> {
        takeover::expect_no_copy(&request)?;
        let mut plan = self.plan(&request).await?;
        let output = match output {
            Output::Logs => None,
            Output::Given(descriptors) => {
                plan.order.stdio = Stdio::Given;
                Some(descriptors)
            }
        };
        let plan = Arc::new(plan);
        let path = record_path(&plan.unit);
        let record = create_record(&path)
            .map_err(|error| DriverError::Transient(format!("{}: {error}", path.display())))?;
        let result = self.launch(&request, &plan, record, output).await;
        if result.is_err() {
            remove_record(&path);
        }
        result
    }

    /// Step 1: finds out the facts and plans.
    async fn plan(&self, request: &TaskRequest) -> Result<Plan, DriverError> {
        let settings = self.settings();
        let asked = request.clone();
        let (account, found) = timeout(LOOK_UP_PATIENCE, spawn_blocking(move || look_up(&asked)))
            .await
            .map_err(|_| {
                DriverError::Transient(format!(
                    "user {:?} or the task's directory could not be looked up within {} s",
                    request.user,
                    LOOK_UP_PATIENCE.as_secs()
                ))
            })?
            .map_err(|error| DriverError::Permanent(error.to_string()))??;
        let resolver = if request.network_namespace.is_some() || request.dns.is_some() {
            host::resolver()
        } else {
            Resolver::default()
        };
        let facts = Facts {
            resolver,
            account,
            task_dir: found.task_dir,
            aliases: found.aliases,
            compute: settings.compute,
            grain: *lock(&self.shared.grain),
            share_cpus: self.share_cpus(),
            agent_unit: host::agent_unit(),
            open_files: self.shared.open_files,
        };
        Plan::new(&settings.config, request, &facts)
            .map_err(|error| DriverError::Permanent(error.to_string()))
    }

    /// Steps 2 and 3, then the helper's.
    async fn launch(
        &self,
        request: &TaskRequest,
        plan: &Arc<Plan>,
        record: File,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<(Task, DriverState), DriverError> {
        let helper = self.spawn(plan, record, output).await?;
        // The scope is made around a parked helper while the helper prepares what charges nothing to the task.
        let released = async {
            let scope = helper.scope(plan);
            let (started, parked) = tokio::join!(self.shared.systemd.start(&scope), helper.next());
            // A helper that failed comes first: systemd then says no more than that there was no process.
            match parked? {
                (Message::Parked, _) => {}
                (Message::Failed(failure), _) => return Err(failed(&failure)),
                (Message::Started, _) => {
                    return Err(DriverError::Permanent(
                        "the helper started before it was released".into(),
                    ));
                }
            }
            let started = match started {
                // Not before the helper has opened the log pipes: their reader leaves with the last writer.
                Err(SystemdError::Exists(_)) => self.replace(&scope).await,
                started => started,
            };
            let cgroup = self.entered(&helper, plan, started).await?;
            // While the helper holds it: the cgroup of a command that ends at once is gone before anything else is done.
            let differences = differences(plan, &cgroup);
            report::release(&helper.parked.control).map_err(|error| {
                DriverError::Transient(format!("the helper cannot be released: {error}"))
            })?;
            match helper.next().await? {
                (Message::Started, Some(main)) => {
                    for difference in differences {
                        self.warn(request, &plan.unit, difference);
                    }
                    assemble(request, plan, &helper, cgroup, main)
                }
                (Message::Failed(failure), _) => Err(failed(&failure)),
                // `Started` without its descriptor: there was none left to receive it with.
                _ => Err(DriverError::Transient(
                    "the helper's answer did not arrive whole".into(),
                )),
            }
        };
        match released.await {
            Ok((task, state)) => Ok((helper.into_task(task), state)),
            Err(error) => {
                helper.kill().await;
                if let Err(left) = self.clear(&plan.unit).await {
                    warn!(unit = %plan.unit, "a failed start leaves its scope behind: {left}");
                }
                Err(error)
            }
        }
    }

    /// Step 2. In a thread of its own: a clone of our address space takes a moment.
    async fn spawn(
        &self,
        plan: &Arc<Plan>,
        record: File,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Helper, DriverError> {
        let (tasks, plan) = (self.clone(), plan.clone());
        let spawned = spawn_blocking(move || {
            launch::spawn(tasks.shared.program.as_fd(), &plan.order, &record, output)
        })
        .await;
        let parked = spawned
            .map_err(|error| DriverError::Permanent(error.to_string()))?
            .map_err(|error| {
                DriverError::Transient(format!("the helper cannot be spawned: {error}"))
            })?;
        Ok(Helper { parked })
    }

    /// Step 3, once more: the name derives from the task's id, so what has it is this very task, of a start whose plugin
    /// died.
    async fn replace(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        warn!(unit = %scope.name, "an earlier start of this task is still there; it is removed");
        let cgroup = Cgroup::at(&format!(
            "{}/{}/{}",
            crate::plan::unit::SLICE,
            scope.slice,
            scope.name
        ));
        if let Err(error) = cgroup.kill() {
            warn!(unit = %scope.name, "cgroup.kill: {error}");
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

/// Limits are read back, because an operator's drop-in may win over the call, and a controller may be missing.
fn differences(plan: &Plan, cgroup: &Cgroup) -> Vec<String> {
    plan.limits.differences(
        cgroup.memory_max_bytes(),
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
    // A command that ended at once has left no pid; its record has the result.
    let main_process = Process::of_pidfd(main.as_fd());
    let main_process = main_process.unwrap_or(Process {
        pid: 0,
        start_ticks: 0,
    });
    let started_at = SystemTime::now();
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
    };
    debug!(task_id = %UnitText::new(request.id.as_str()), unit = %plan.unit, pid = main_process.pid, "task started");
    let task = Task {
        id: request.id.clone(),
        names: request.names.clone(),
        unit: plan.unit.clone(),
        cgroup,
        started_at,
        main: main_process,
        main_pidfd: Some(main),
        supervisor_pidfd: None,
        is_killed: AtomicBool::new(false),
        cpus: Mutex::new(plan.limits.allowed_cpus.clone()),
        exit: watch::Sender::new(None),
    };
    Ok((task, state))
}

/// Why the helper failed, as Nomad is told it. What the host lacks for a moment is worth another try.
fn failed(failure: &Failure) -> DriverError {
    const PASSING: [i32; 5] = [
        libc::EAGAIN,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOSPC,
    ];
    if PASSING.contains(&failure.errno) {
        DriverError::Transient(failure.to_string())
    } else {
        DriverError::Permanent(failure.to_string())
    }
}

/// A failure of systemd's as Nomad is told it: the restart policy applies to what passes.
pub(super) fn refused(error: SystemdError) -> DriverError {
    if error.is_transient() {
        DriverError::Transient(error.to_string())
    } else {
        DriverError::Permanent(error.to_string())
    }
}

/// Facts that need the host's files: the user and the task's directory.
fn look_up(request: &TaskRequest) -> Result<(Account, Found), DriverError> {
    let found = dir::find(&request.alloc_dir, &request.names.task, &request.env)
        .map_err(|error| DriverError::Permanent(error.to_string()))?;
    let account = match users::look_up(&request.user) {
        // After an agent restart Nomad forgets the dynamic user it picked, but the directory still belongs to it.
        Err(UserError::Unset) => {
            users::look_up(&users::dynamic(found.owner).name).map_err(|_| UserError::Unset)
        }
        account => account,
    };
    let account = account.map_err(|error| match error {
        // A directory service that restarts.
        UserError::Lookup(..) => DriverError::Transient(error.to_string()),
        _ => DriverError::Permanent(error.to_string()),
    })?;
    Ok((account, found))
}

/// The helper between its spawn and the command's exec.
#[derive(Debug)]
struct Helper {
    parked: Parked,
}

impl Helper {
    /// The scope to start around it.
    fn scope<'a>(&'a self, plan: &'a Plan) -> Scope<'a> {
        Scope {
            name: &plan.unit,
            description: &plan.description,
            slice: plan.slice,
            before: plan.before.as_deref(),
            limits: &plan.limits,
            pid: self.parked.pid.unsigned_abs(),
            pidfd: self.parked.pidfd.as_fd(),
        }
    }

    /// Its next message.
    async fn next(&self) -> Result<(Message, Option<OwnedFd>), DriverError> {
        let failed = |error: io::Error| {
            DriverError::Transient(format!("the helper cannot be heard: {error}"))
        };
        let control = self
            .parked
            .control
            .try_clone()
            .and_then(sys::readable)
            .map_err(failed)?;
        let heard = control.async_io(Interest::READABLE, |control| report::receive(control));
        match timeout(HELPER_PATIENCE, heard).await {
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => Err(DriverError::Transient(
                "the helper ended before the command was executed; was it killed?".into(),
            )),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(DriverError::Transient(format!(
                "the helper has not started the command within {} s; does a path that the task unveils hang?",
                HELPER_PATIENCE.as_secs()
            ))),
        }
    }

    /// Ends it and reaps it. All that it made, namespaces and mounts, goes with it.
    async fn kill(self) {
        if let Err(error) = send(Some(&self.parked.pidfd), signal::KILL) {
            warn!("a helper cannot be killed: {error}");
        }
        let pidfd = self.parked.pidfd;
        let reaped = tokio::spawn(super::wait::reaped(pidfd));
        if timeout(AFTER_KILL, reaped).await.is_err() {
            warn!(
                "a killed helper has not ended yet: uninterruptible sleep, as on a hung NFS mount?"
            );
        }
    }

    /// The helper has become the task's supervisor.
    fn into_task(self, task: Task) -> Task {
        Task {
            supervisor_pidfd: Some(self.parked.pidfd),
            ..task
        }
    }
}
