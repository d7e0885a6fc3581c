//! One helper ahead of the starts: executed already, and waiting for an order, so that the next start need not wait until it is.
//! It is cloned after the first start, as Nomad starts plugins that must touch nothing, and ends with the plugin.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::sleep;
use tracing::debug;

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
    idle: Mutex<Option<Idle>>,
    is_cloning: AtomicBool,
}

impl Helpers {
    pub fn new(ahead: Ahead) -> Self {
        Self {
            ahead,
            idle: Mutex::default(),
            is_cloning: AtomicBool::new(false),
        }
    }
}

impl TaskTable {
    pub(super) fn idle_helper(&self) -> Option<Idle> {
        lock(&self.shared.helpers.idle).take()
    }

    /// In a thread of its own, as it waits until the helper is executed.
    pub(super) async fn new_helper(&self) -> Result<Result<Idle, Failure>, DriverError> {
        let tasks = self.clone();
        in_thread(move || Idle::spawn(tasks.shared.program.as_fd()))
            .await
            .map_err(|error| DriverError::Transient(format!("the helper: {error}")))
    }

    /// Sees to it that the next start finds one.
    pub(super) fn prepare_helper(&self) {
        let helpers = &self.shared.helpers;
        let is_wanted = helpers.ahead == Ahead::One && lock(&helpers.idle).is_none();
        if !is_wanted || helpers.is_cloning.swap(true, Ordering::Relaxed) {
            return;
        }
        let tasks = self.clone();
        tokio::spawn(async move {
            sleep(PAUSE).await;
            let made = tasks.new_helper().await;
            let helpers = &tasks.shared.helpers;
            match made {
                Ok(Ok(idle)) => {
                    let former = lock(&helpers.idle).replace(idle);
                    if let Some(former) = former {
                        tokio::spawn(wait::reaped(former.dismiss()));
                    }
                }
                Ok(Err(error)) => debug!("no helper ahead: {error}"),
                Err(error) => debug!("no helper ahead: {error}"),
            }
            helpers.is_cloning.store(false, Ordering::Relaxed);
        });
    }
}
