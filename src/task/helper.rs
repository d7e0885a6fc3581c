//! The plugin's hold on a helper, from its spawn to the commit of the start.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::time::timeout;

use super::log::of_task;
use super::table::{Task, send};
use super::types::{DriverError, TaskRequest};
use super::wait;
use crate::launch::Parked;
use crate::launch::report::{self, Failure, Message};
use crate::plan::unit::UnitName;
use crate::plan::{Plan, signal};
use crate::sys;
use crate::systemd::Scope;

/// How long it may take for one of its halves: paths of a hung NFS server stall it, and must stall nothing else.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How long one that nobody waits for may take to end by itself.
const BY_ITSELF: Duration = Duration::from_millis(500);
/// How long a killed one may take to end before the start goes on without it; it is reaped whenever it does.
const AFTER_KILL: Duration = Duration::from_secs(2);

/// The helper between its spawn and the command's exec.
#[derive(Debug)]
pub(super) struct Helper {
    pub parked: Parked,
    /// Without a name yet.
    pub record: File,
}

impl Helper {
    /// The scope to start around it.
    pub fn scope<'a>(&'a self, plan: &'a Plan) -> Scope<'a> {
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
    pub async fn next(&self) -> Result<(Message, Option<OwnedFd>), DriverError> {
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
        match timeout(PATIENCE, heard).await {
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => Err(DriverError::Transient(
                "the helper ended before the command was executed; was it killed, or is the task's memory limit too low?".into(),
            )),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(DriverError::Transient(format!(
                "the helper has not started the command within {} s; does a path that the task unveils hang?",
                PATIENCE.as_secs()
            ))),
        }
    }

    /// Ends it and reaps it. All that it made, namespaces and mounts, goes with it.
    pub async fn kill(self, request: &TaskRequest, unit: &UnitName) {
        let Parked { pidfd, control, .. } = self.parked;
        // It ends by itself when nobody is there, and gives back what it took of Nomad's.
        drop(control);
        let killer = pidfd.try_clone();
        let mut reaped = tokio::spawn(wait::reaped(pidfd));
        if timeout(BY_ITSELF, &mut reaped).await.is_ok() {
            return;
        }
        if let Err(error) = killer.and_then(|pidfd| send(Some(&pidfd), signal::KILL)) {
            of_task!(
                warn,
                request.names,
                unit,
                "a helper cannot be killed: {error}"
            );
        }
        if timeout(AFTER_KILL, reaped).await.is_err() {
            of_task!(
                warn,
                request.names,
                unit,
                "a killed helper has not ended yet: uninterruptible sleep, as on a hung NFS mount?"
            );
        }
    }

    /// The helper has become the task's supervisor.
    pub fn into_task(self, task: Task) -> Task {
        Task {
            supervisor_pidfd: Some(self.parked.pidfd),
            ..task
        }
    }
}

/// Why the helper failed, as Nomad is told it. What the host lacks for a moment is worth another try.
pub(super) fn failed(failure: &Failure) -> DriverError {
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
