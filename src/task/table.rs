//! All tasks of this driver: the table, one task, and what both are made with.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tracing::warn;

use super::ahead::{Ahead, Helpers};
use super::denials::{Asked, Denials, Told};
use super::fingerprint;
use super::state::Process;
use super::types::{DriverError, ExitResult, Fingerprint, Names, TaskEvent, TaskId};
use super::watches::Watches;
use crate::cgroup::Cgroup;
use crate::config::plugin::PluginConfig;
use crate::plan::limits::{Compute, Cpus, QuotaGrain};
use crate::plan::unit::{self, UnitName};
use crate::record;
use crate::sys;
use crate::systemd::Systemd;

/// Everything of ours under /run: root's alone.
pub const RUN_DIR: &str = "/run/nomad-driver-exec2";

/// All tasks of this driver, and what they are made with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TaskTable {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) systemd: Systemd,
    /// Our own image: an upgrade may replace the file while we run, and plugin and helper must agree.
    pub(super) program: OwnedFd,
    /// RLIMIT_NOFILE as the plugin was started with, for the tasks.
    pub(super) open_files: (u64, u64),
    pub(super) settings: Mutex<Settings>,
    pub(super) table: Mutex<HashMap<TaskId, Entry>>,
    pub(super) events: broadcast::Sender<TaskEvent>,
    pub(super) fingerprint: watch::Sender<Fingerprint>,
    /// As of the systemd that the fingerprint was last taken of.
    pub(super) grain: Mutex<QuotaGrain>,
    pub(super) is_watching_host: AtomicBool,
    /// Whose tasks ours are, as soon as the first one tells.
    pub(super) owner: Mutex<Option<String>>,
    /// Something may have changed that the CPUs of tasks without `cores` follow.
    pub(super) cpus_changed: Notify,
    /// Of cgroup files, from the first task on; `None` if there can be none.
    pub(super) watches: OnceLock<Option<Arc<Watches>>>,
    /// Likewise, of what Landlock denies.
    pub(super) denials: OnceLock<Option<Arc<Denials>>>,
    pub(super) helpers: Helpers,
    /// Of memory, once no task has come for a while.
    giving_back: Mutex<Option<AbortHandle>>,
}

/// What SetConfig brought.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    pub(super) config: PluginConfig,
    pub(super) compute: Option<Compute>,
    /// CPUs that the agent gives to tasks; empty if it told none.
    pub(super) usable: Cpus,
}

#[derive(Debug)]
pub(super) enum Entry {
    /// Its id is taken, so that no second copy starts, and so is its dynamic user.
    Starting(Option<Claim>),
    Running(Arc<Task>),
}

/// A dynamic workload user, and the allocation that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) uid: u32,
    pub(super) alloc_id: String,
}

/// A task that was started, running or ended.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) names: Names,
    pub(super) unit: UnitName,
    pub(super) cgroup: Cgroup,
    pub(super) started_at: SystemTime,
    pub(super) main: Process,
    /// Of its command.
    pub(super) uid: u32,
    /// Signals go through descriptors, never to a number that a stranger may have got. `None` after its end.
    pub(super) main_pidfd: Option<OwnedFd>,
    pub(super) supervisor_pidfd: Option<OwnedFd>,
    /// The CPUs that systemd was last asked to give it; `None` if it never was.
    pub(super) cpus: Mutex<Option<Cpus>>,
    /// Nomad asked for its end.
    pub(super) is_stopping: AtomicBool,
    /// We sent it SIGKILL, so that its end by one is not the OOM killer's.
    pub(super) is_killed: AtomicBool,
    /// Kills of the OOM killer that an event has told of.
    pub(super) oom_kills_told: Mutex<u64>,
    /// Held by whoever looks for such kills.
    pub(super) oom_turn: Arc<Semaphore>,
    /// A permit for each session that may be opened besides those that are.
    pub(super) sessions: Arc<Semaphore>,
    /// What is told of what was denied to it.
    pub(super) denials: Mutex<Told>,
    pub(super) asked: Asked,
    pub(super) exit: watch::Sender<Option<Ended>>,
}

/// How and when a task ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) result: ExitResult,
    pub(super) at: SystemTime,
}

/// From the last task to giving back what it and the others took: by then the calls about them have ended, too.
const GIVE_BACK: Duration = Duration::from_secs(2);

impl TaskTable {
    /// No task yet, and no configuration. Opens our own image, as it is now.
    pub fn new(ahead: Ahead) -> io::Result<Self> {
        sys::keep_one_heap();
        let (events, _) = broadcast::channel(256);
        let shared = Shared {
            systemd: Systemd::new(),
            program: own_program()?,
            open_files: raise_open_files(),
            settings: Mutex::default(),
            table: Mutex::default(),
            events,
            fingerprint: watch::Sender::new(fingerprint::unconfigured()),
            grain: Mutex::new(QuotaGrain::WholePercent),
            is_watching_host: AtomicBool::new(false),
            owner: Mutex::default(),
            cpus_changed: Notify::new(),
            watches: OnceLock::new(),
            denials: OnceLock::new(),
            helpers: Helpers::new(ahead),
            giving_back: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Takes the operator's configuration, the node's CPU power and the CPUs that tasks may use, for the starts that follow.
    pub async fn set_up(&self, config: PluginConfig, compute: Option<Compute>, usable: Cpus) {
        *lock(&self.shared.settings) = Settings {
            config,
            compute,
            usable,
        };
        self.refresh_fingerprint().await;
        if !self.shared.is_watching_host.swap(true, Ordering::Relaxed) {
            tokio::spawn(self.clone().watch_host());
        }
    }

    pub(super) fn settings(&self) -> Settings {
        lock(&self.shared.settings).clone()
    }

    pub(super) fn find(&self, id: &TaskId) -> Option<Arc<Task>> {
        match lock(&self.shared.table).get(id) {
            Some(Entry::Running(task)) => Some(task.clone()),
            _ => None,
        }
    }

    pub(super) fn running(&self) -> Vec<Arc<Task>> {
        let running = |entry: &Entry| match entry {
            Entry::Running(task) if task.ended().is_none() => Some(task.clone()),
            _ => None,
        };
        lock(&self.shared.table)
            .values()
            .filter_map(running)
            .collect()
    }

    /// Those that have ended, too.
    pub(super) fn all(&self) -> Vec<Arc<Task>> {
        let task = |entry: &Entry| match entry {
            Entry::Running(task) => Some(task.clone()),
            Entry::Starting(_) => None,
        };
        lock(&self.shared.table).values().filter_map(task).collect()
    }

    /// Ends what `follow` began for a task that has ended.
    pub(super) fn unfollow(&self, task: &Arc<Task>) {
        if let Some(Some(watches)) = self.shared.watches.get() {
            watches.remove_task(task);
        }
    }

    /// Whether a task has this id, or a start of one.
    pub(super) fn knows(&self, id: &TaskId) -> bool {
        lock(&self.shared.table).contains_key(id)
    }

    /// Whose task it is, and with it, whose all of ours are.
    pub(super) fn owner(&self, names: &Names) -> String {
        let owner = unit::owner(names);
        *lock(&self.shared.owner) = Some(owner.clone());
        owner
    }

    /// Takes an id for a start, or says that it is taken.
    pub(super) fn reserve(&self, id: &TaskId) -> Result<(), DriverError> {
        let mut table = lock(&self.shared.table);
        if table.contains_key(id) {
            return Err(DriverError::Permanent(format!(
                "task with ID {id} already started"
            )));
        }
        table.insert(id.clone(), Entry::Starting(None));
        Ok(())
    }

    /// Takes a dynamic user for a start whose id is reserved, or says which allocation has it: one that runs, or starts.
    pub(super) fn claim(&self, id: &TaskId, claim: Claim) -> Result<(), String> {
        let mut table = lock(&self.shared.table);
        if let Some(other) = holder(&table, &claim) {
            return Err(other);
        }
        table.insert(id.clone(), Entry::Starting(Some(claim)));
        Ok(())
    }

    /// Another allocation that has a user, too.
    pub(super) fn sharer(&self, claim: &Claim) -> Option<String> {
        holder(&lock(&self.shared.table), claim)
    }

    pub(super) fn insert(&self, task: Task) -> Arc<Task> {
        let task = Arc::new(task);
        lock(&self.shared.table).insert(task.id.clone(), Entry::Running(task.clone()));
        task
    }

    /// Takes notice of all that happens to a task that runs. The first one starts what watches over them: Nomad starts plugins
    /// that must touch nothing.
    pub(super) fn follow(&self, task: Arc<Task>) {
        let watches = self.shared.watches.get_or_init(|| match Watches::new() {
            Ok(watches) => {
                let watches = Arc::new(watches);
                tokio::spawn(self.clone().keep_watching(watches.clone()));
                tokio::spawn(self.clone().keep_cpus(Some(watches.clone())));
                Some(watches)
            }
            Err(error) => {
                warn!(
                    "inotify: {error}; running tasks learn of newly reserved CPUs at the next start of a task only, and OOM kills are told of when a task ends"
                );
                tokio::spawn(self.clone().keep_cpus(None));
                None
            }
        });
        if let Some(watches) = watches {
            watches.add_task(&task);
            // Of what happened before there was a watch.
            self.look_for_kills(task.clone());
        }
        if let Some(denials) = self.denials() {
            denials.recall(&task);
        }
        self.shared.cpus_changed.notify_one();
        self.watch(task);
    }

    pub(super) fn remove(&self, id: &TaskId) {
        lock(&self.shared.table).remove(id);
    }

    /// Unless a start of it is under way, whose entry keeps a second one out.
    pub(super) fn forget(&self, id: &TaskId) {
        let mut table = lock(&self.shared.table);
        if let Some(Entry::Running(_)) = table.get(id) {
            table.remove(id);
        }
        if table.is_empty() {
            table.shrink_to_fit();
            let tasks = self.clone();
            let giving_back = tokio::spawn(async move {
                sleep(GIVE_BACK).await;
                if lock(&tasks.shared.table).is_empty() {
                    sys::trim_memory();
                }
            });
            let earlier = lock(&self.shared.giving_back).replace(giving_back.abort_handle());
            if let Some(earlier) = earlier {
                earlier.abort();
            }
        }
    }
}

/// The allocation that has the user which another one claims.
fn holder(table: &HashMap<TaskId, Entry>, claim: &Claim) -> Option<String> {
    table.values().find_map(|entry| {
        let (uid, alloc_id) = match entry {
            Entry::Starting(Some(other)) => (other.uid, &other.alloc_id),
            Entry::Running(task) if task.ended().is_none() => (task.uid, &task.names.alloc_id),
            Entry::Starting(None) | Entry::Running(_) => return None,
        };
        (uid == claim.uid && *alloc_id != claim.alloc_id).then(|| alloc_id.clone())
    })
}

impl Task {
    pub(super) fn ended(&self) -> Option<Ended> {
        self.exit.borrow().clone()
    }
}

fn own_program() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, open};
    Ok(open(
        "/proc/self/exe",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// A task's record, one file for each under /run.
pub(super) fn record_path(unit: &UnitName) -> PathBuf {
    Path::new(RUN_DIR).join("records").join(unit.as_str())
}

/// Makes the record's page, all of it allocated: its writer must not fail for a full /run. It has no name until `keep_record`.
pub(super) fn create_record(path: &Path) -> io::Result<File> {
    let dir = path.parent().unwrap_or(path);
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(dir)?;
    file.write_all_at(&record::open(), 0)?;
    Ok(file)
}

/// Gives the record its name.
pub(super) fn keep_record(record: &File, path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, linkat};
    // One of an earlier life of this very id is stale.
    remove_record(path);
    let itself = format!("/proc/self/fd/{}", record.as_raw_fd());
    Ok(linkat(CWD, itself, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

pub(super) fn remove_record(path: &Path) {
    let _ = fs::remove_file(path);
}

/// Raises our soft limit of descriptors to the hard one and returns what it was. The agent's 1,024 would end at some 300
/// tasks.
fn raise_open_files() -> (u64, u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let was = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: was.maximum,
            maximum: was.maximum,
        },
    );
    (
        was.current.unwrap_or(u64::MAX),
        was.maximum.unwrap_or(u64::MAX),
    )
}

/// No code of ours panics while it holds a lock; if it did, the value would still be whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a signal; a process that has ended needs none.
pub(super) fn send(pidfd: Option<&OwnedFd>, signal: i32) -> io::Result<()> {
    match pidfd.map(|pidfd| sys::pidfd_send_signal(pidfd.as_fd(), signal)) {
        Some(Err(error)) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}
