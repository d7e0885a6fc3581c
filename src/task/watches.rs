//! Files of cgroups that change: one inotify instance for all of them, as a host has 128 for each user.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::table::{Task, TaskTable, lock};
use crate::sys;

#[derive(Debug)]
pub(super) struct Watches {
    inotify: AsyncFd<OwnedFd>,
    /// By the number of the watch on their memory.events.
    tasks: Mutex<HashMap<i32, Weak<Task>>>,
}

impl Watches {
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            inotify: sys::readable(inotify)?,
            tasks: Mutex::default(),
        })
    }

    /// Watches what is there by now; what is watched already stays so.
    pub fn add(&self, path: &Path, what: WatchFlags) -> Option<i32> {
        match inotify::add_watch(self.inotify.as_fd(), path, what) {
            Ok(watch) => Some(watch),
            Err(Errno::NOENT) => None,
            Err(error) => {
                warn!("inotify: {}: {error}", path.display());
                None
            }
        }
    }

    /// Kills of the OOM killer raise an event there.
    pub fn add_task(&self, task: &Arc<Task>) {
        // What happens before the watch is known waits for the lock.
        let mut tasks = lock(&self.tasks);
        let events = task.cgroup.path().join("memory.events");
        if let Some(watch) = self.add(&events, WatchFlags::MODIFY) {
            tasks.insert(watch, Arc::downgrade(task));
        }
    }

    /// A file of a cgroup that is removed keeps its watch, and its inode with it.
    pub fn remove_task(&self, task: &Arc<Task>) {
        let mut tasks = lock(&self.tasks);
        let is_its = |other: &Weak<Task>| other.as_ptr() == Arc::as_ptr(task);
        let watch = tasks
            .iter()
            .find(|(_, other)| is_its(other))
            .map(|(watch, _)| *watch);
        if let Some(watch) = watch {
            tasks.remove(&watch);
            // Gone already on a kernel that does take it away.
            let _ = inotify::remove_watch(self.inotify.as_fd(), watch);
        }
    }

    /// Waits for changes: whether anything but tasks has, and the tasks.
    async fn changes(&self) -> io::Result<(bool, Vec<Arc<Task>>)> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let read = |inotify: &OwnedFd| {
            let mut reader = inotify::Reader::new(inotify.as_fd(), &mut buffer);
            let (mut other, mut changed) = (false, Vec::new());
            let mut tasks = lock(&self.tasks);
            loop {
                // One buffer at a time: what is left wakes us again.
                if reader.is_buffer_empty() && (other || !changed.is_empty()) {
                    return Ok((other, changed));
                }
                let event = reader.next().map_err(io::Error::from)?;
                let watch = event.wd();
                match tasks.get(&watch).map(Weak::upgrade) {
                    Some(_) if event.events().contains(ReadFlags::IGNORED) => {
                        tasks.remove(&watch);
                    }
                    Some(task) => changed.extend(task),
                    None => other = true,
                }
            }
        };
        self.inotify.async_io(Interest::READABLE, read).await
    }
}

impl TaskTable {
    /// Acts on what changes, for as long as we live.
    pub(super) async fn keep_watching(self, watches: Arc<Watches>) {
        loop {
            match watches.changes().await {
                Ok((other, tasks)) => {
                    if other {
                        self.shared.cpus_changed.notify_one();
                    }
                    for task in tasks {
                        self.look_for_kills(task);
                    }
                }
                Err(error) => {
                    warn!("inotify: {error}");
                    return;
                }
            }
        }
    }
}
