//! One helper ahead of the starts: executed already, and waiting for an order, so that the next start need not wait until it is.
//! It is cloned after the first start, as Nomad starts plugins that must touch nothing, and ends with the plugin.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::helper::PATIENCE;
use super::table::{TaskTable, lock};
use super::thread::in_thread;
use super::types::DriverError;
use super::wait;
use crate::launch::Idle;
use crate::launch::report::Failure;

/// After a start: the task that was started comes first.
const PAUSE: Duration = Duration::from_millis(10);

/// Whether a helper is kept ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    One,
    /// As for a process that starts one task, or none.
    None,
}

#[derive(Debug)]
pub(super) struct Helpers {
    ahead: Ahead,
    /// With what watches over it.
    idle: Mutex<Option<(Idle, AbortHandle)>>,
    /// Held by whoever makes one; closed when no more are made.
    making: Semaphore,
}

/// How long the last one may take to end with the plugin.
const FAREWELL: Duration = Duration::from_millis(500);

impl Helpers {
    pub fn new(ahead: Ahead) -> Self {
        Self {
            ahead,
            idle: Mutex::default(),
            making: Semaphore::new(1),
        }
    }
}

impl TaskTable {
    pub(super) fn idle_helper(&self) -> Option<Idle> {
        let (idle, watch) = lock(&self.shared.helpers.idle).take()?;
        // Whoever has it reaps it, and of a supervisor learns how it ended.
        watch.abort();
        Some(idle)
    }

    /// Keeps it until the next start. If somebody kills it before, it is reaped at once, and the next start makes one for itself.
    fn keep_helper(&self, idle: Idle) {
        let Ok(pidfd) = idle.pidfd().try_clone_to_owned() else {
            tokio::spawn(wait::reaped(idle.dismiss()));
            return;
        };
        let tasks = self.clone();
        let watch = tokio::spawn(async move {
            if let Err(error) = wait::ended(pidfd).await {
                debug!("the helper ahead cannot be watched: {error}");
                return;
            }
            // There is one thread: had it been taken, this would not go on.
            let ended = lock(&tasks.shared.helpers.idle).take();
            if let Some((idle, _)) = ended {
                debug!("the helper ahead has ended by itself");
                wait::reaped(idle.dismiss()).await;
            }
        });
        *lock(&self.shared.helpers.idle) = Some((idle, watch.abort_handle()));
    }

    /// In a thread of its own, as it waits until the helper is executed.
    pub(super) async fn new_helper(&self) -> Result<Result<Idle, Failure>, DriverError> {
        let tasks = self.clone();
        let spawned = in_thread(move || Idle::spawn(tasks.shared.program.as_fd()));
        timeout(PATIENCE, spawned)
            .await
            .map_err(|_| {
                DriverError::Transient(format!(
                    "the helper was not executed within {} s; does the file system of the driver hang?",
                    PATIENCE.as_secs()
                ))
            })?
            .map_err(|error| DriverError::Transient(format!("the helper: {error}")))
    }

    /// Sees to it that the next start finds one.
    pub(super) fn prepare_helper(&self) {
        let helpers = &self.shared.helpers;
        if helpers.ahead == Ahead::None {
            return;
        }
        let tasks = self.clone();
        tokio::spawn(async move {
            sleep(PAUSE).await;
            let helpers = &tasks.shared.helpers;
            let Ok(_turn) = helpers.making.try_acquire() else {
                return;
            };
            if lock(&helpers.idle).is_some() {
                return;
            }
            match tasks.new_helper().await {
                Ok(Ok(idle)) => tasks.keep_helper(idle),
                Ok(Err(error)) => debug!("no helper ahead: {error}"),
                Err(error) => debug!("no helper ahead: {error}"),
            }
        });
    }

    /// Sees it to its end, and makes none any more.
    pub(super) async fn dismiss_helper(&self) {
        let helpers = &self.shared.helpers;
        let ended = timeout(FAREWELL, async {
            // One that is being made is waited for.
            let _turn = helpers.making.acquire().await;
            helpers.making.close();
            if let Some(idle) = self.idle_helper() {
                wait::reaped(idle.dismiss()).await;
            }
        });
        if ended.await.is_err() {
            debug!("the helper ahead has not ended yet");
        }
    }
}
