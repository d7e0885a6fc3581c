//! What Landlock denies to tasks, told: as events, and in the journal of the task's unit. The kernel's records name a domain; whose
//! that is, is told once, with the first denial of it.

mod ear;
mod heard;
mod told;

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::table::{Task, TaskTable, lock};
use super::types::{TaskId, TaskRequest};
use crate::audit::{self, Denial, Process, Record, What};
use crate::cgroup::{Cgroup, Mark};
use crate::plan::denials::{self, Denied, Unveiled};
use crate::plan::steps::Denials as Logging;
use crate::sys;
use crate::text::fnv1a;
use ear::{Ear, FIRST_PAUSE};
use heard::{Event, Heard};
pub(super) use told::Told;
use told::{End, Verdict};

/// After each batch.
const BREATH: Duration = Duration::from_millis(10);
/// How often what is kept is looked at again.
const TICK: Duration = Duration::from_millis(200);
/// How long it may take until the task of a domain is known: the kernel may be heard before the helper.
const STRANGE_FOR: Duration = Duration::from_secs(5);
const MOST_STRANGE: usize = 64;
/// Beyond that, those of strangers and of tasks that have ended are forgotten.
const MOST_DOMAINS: usize = 256;
const MOST_SESSIONS: usize = 256;
/// Between two words on lost records.
const BETWEEN_LOSSES: Duration = Duration::from_secs(60);
/// As our helpers call themselves when they restrict themselves.
const HELPERS: &str = "exec2-";

/// What is known of those who are denied something.
#[derive(Debug, Default)]
pub(super) struct Denials {
    hears: Arc<AtomicBool>,
    /// By the kernel's number of a domain; `None` is that of a stranger. A task that Nomad has destroyed meanwhile is told of, too.
    domains: Mutex<HashMap<u64, Option<Arc<Task>>>>,
    /// The processes of sessions that were started last. They may be gone before their denials are heard.
    sessions: Mutex<VecDeque<(u32, TaskId)>>,
}

/// What a job asked for, as far as it makes a difference to what it should ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Its `unveil`.
    unveil: Vec<String>,
    /// As text, which any handle can tell.
    task_dir: String,
}

impl Asked {
    pub fn new(unveil: &[String], task_dir: &Path) -> Self {
        Self {
            unveil: unveil.to_owned(),
            task_dir: task_dir.to_string_lossy().into_owned(),
        }
    }

    /// Of a task whose handle does not tell: Nomad may have forgotten its `unveil`, and its variables may say anything. For advice alone.
    pub fn by(request: &TaskRequest) -> Self {
        let local = request.env.get("NOMAD_TASK_DIR").map(Path::new);
        let task_dir = local.and_then(Path::parent).unwrap_or(Path::new(""));
        Self::new(&request.options.unveil, task_dir)
    }
}

impl Denials {
    /// The domain of a task that an earlier plugin has found out: the kernel tells no second time.
    pub fn recall(&self, task: &Arc<Task>) {
        let mark = task.cgroup.mark(Mark::Domain);
        if let Some(domain) = mark.and_then(|mark| u64::from_str_radix(&mark, 16).ok()) {
            self.know(domain, Some(task.clone()));
        }
    }

    fn know(&self, domain: u64, owner: Option<Arc<Task>>) {
        let mut domains = lock(&self.domains);
        // The record that a domain is gone may get lost.
        if domains.len() >= MOST_DOMAINS {
            domains.retain(|_, owner| owner.as_ref().is_some_and(|task| task.ended().is_none()));
        }
        domains.insert(domain, owner);
    }

    pub fn add_session(&self, pid: u32, task: &Task) {
        let mut sessions = lock(&self.sessions);
        if sessions.len() >= MOST_SESSIONS {
            sessions.pop_front();
        }
        sessions.push_back((pid, task.id.clone()));
    }

    fn session(&self, pid: u32) -> Option<TaskId> {
        let sessions = lock(&self.sessions);
        // The last one first: pids come back.
        let found = sessions.iter().rev().find(|(its, _)| *its == pid);
        found.map(|(_, id)| id.clone())
    }
}

/// What is kept between two batches.
#[derive(Debug, Default)]
struct Kept {
    heard: Heard,
    /// Of domains whose task is not known yet.
    strange: VecDeque<(Instant, Event)>,
    /// Tasks of which something was left out.
    short: Vec<Arc<Task>>,
    loss_told: Option<Instant>,
}

impl Kept {
    fn is_empty(&self) -> bool {
        self.heard.is_empty() && self.strange.is_empty() && self.short.is_empty()
    }
}

impl TaskTable {
    /// The ear, from the first task on: Nomad starts plugins that must touch nothing. `None` where there is nothing to hear.
    pub(super) fn denials(&self) -> Option<Arc<Denials>> {
        let open = || {
            let config = self.settings().config;
            if denials::logged(&config, sys::landlock_abi()) == Logging::Unlogged {
                return None;
            }
            let denials = Arc::new(Denials::default());
            let ear = Ear::new(audit::listen, denials.hears.clone(), FIRST_PAUSE);
            tokio::spawn(self.clone().keep_telling(denials.clone(), ear));
            Some(denials)
        };
        self.shared.denials.get_or_init(open).clone()
    }

    /// Whether nothing is heard although there are tasks.
    pub(super) fn is_deaf(&self) -> bool {
        let ear = self.shared.denials.get();
        ear.is_some_and(|ear| {
            ear.as_ref()
                .is_none_or(|ear| !ear.hears.load(Ordering::Relaxed))
        })
    }

    async fn keep_telling<Open: Fn() -> io::Result<OwnedFd>>(
        self,
        denials: Arc<Denials>,
        mut ear: Ear<Open>,
    ) {
        let mut buffer = vec![0; audit::RECORD_BYTES];
        let mut kept = Kept::default();
        loop {
            let heard = ear.hear(&mut buffer);
            let batch = if kept.is_empty() {
                Some(heard.await)
            } else {
                timeout(TICK, heard).await.ok()
            };
            let now = Instant::now();
            // What is heard now may open a new minute, in which the last one's count would wait.
            self.tell_short(&mut kept.short, now);
            let has_heard = batch.is_some();
            if let Some(batch) = batch {
                if batch.has_lost {
                    tell_loss(&mut kept.loss_told, now);
                }
                for record in batch.records {
                    self.take(&denials, &mut kept, record, now);
                }
            }
            while let Some(event) = kept.heard.ripe(now) {
                self.judge(&denials, &mut kept, event, now);
            }
            self.look_again(&denials, &mut kept, now);
            if has_heard {
                sleep(BREATH).await;
            }
        }
    }

    fn take(&self, denials: &Denials, kept: &mut Kept, record: Record, now: Instant) {
        match &record.what {
            // At once: a task that ends is destroyed before its event is whole.
            What::Domain { domain, creator } => {
                self.owner_by(denials, *domain, creator);
            }
            What::Gone(domain) => {
                while let Some(event) = kept.heard.oldest() {
                    self.judge(denials, kept, event, now);
                }
                lock(&denials.domains).remove(domain);
                return;
            }
            What::Denial(_) | What::Caller(_) | What::End => {}
        }
        if let Some(event) = kept.heard.take(record, now) {
            self.judge(denials, kept, event, now);
        }
    }

    /// Tells of an event, or keeps it until its domain's task is known.
    fn judge(&self, denials: &Denials, kept: &mut Kept, event: Event, now: Instant) {
        let strange = &kept.strange;
        let is_strange = |domain| {
            let mut denials = strange.iter().flat_map(|(_, event)| &event.denials);
            denials.any(|denial| denial.domain == domain)
        };
        let mut later = Vec::new();
        for denial in &event.denials {
            let known = lock(&denials.domains).get(&denial.domain).cloned();
            let owner = match known {
                Some(None) => continue,
                Some(Some(task)) => Some(task),
                None if is_strange(denial.domain) && event.creators.is_empty() => None,
                None => self.owner_of(denials, &event, denial.domain),
            };
            match owner {
                Some(task) => self.tell_of(&mut kept.short, &task, denial, &event, now),
                None => later.push(denial.clone()),
            }
        }
        if later.is_empty() {
            return;
        }
        if kept.strange.len() >= MOST_STRANGE {
            // Who made a domain is told once, and its later denials hang on it.
            let names_none = |(_, event): &(Instant, Event)| event.creators.is_empty();
            let oldest = kept.strange.iter().position(names_none);
            kept.strange.remove(oldest.unwrap_or(0));
        }
        let rest = Event {
            denials: later,
            ..event
        };
        kept.strange.push_back((now, rest));
    }

    fn look_again(&self, denials: &Denials, kept: &mut Kept, now: Instant) {
        for (since, mut event) in std::mem::take(&mut kept.strange) {
            let mut still_strange = Vec::new();
            for denial in std::mem::take(&mut event.denials) {
                if let Some(task) = self.owner_of(denials, &event, denial.domain) {
                    self.tell_of(&mut kept.short, &task, &denial, &event, now);
                } else if now.duration_since(since) < STRANGE_FOR {
                    still_strange.push(denial);
                } else {
                    denials.know(denial.domain, None);
                }
            }
            if !still_strange.is_empty() {
                event.denials = still_strange;
                kept.strange.push_back((since, event));
            }
        }
    }

    /// Says of how many denials there is no line, where that can be said.
    fn tell_short(&self, short: &mut Vec<Arc<Task>>, now: Instant) {
        short.retain(|task| {
            let end = match task.ended() {
                Some(_) => End::Reached,
                None => End::Ahead,
            };
            match lock(&task.denials).left_out(now, end) {
                Some(count) => {
                    self.tell_left_out(task, count);
                    false
                }
                None => true,
            }
        });
    }

    /// The task whose domain it is.
    fn owner_of(&self, denials: &Denials, event: &Event, domain: u64) -> Option<Arc<Task>> {
        if let Some(Some(task)) = lock(&denials.domains).get(&domain) {
            return Some(task.clone());
        }
        if let Some((_, creator)) = event.creators.iter().find(|(its, _)| *its == domain) {
            return self.owner_by(denials, domain, creator);
        }
        // Its creator was told while nobody listened, or got lost.
        let task = self.task_of(denials, event.caller.as_ref()?.pid)?;
        denials.know(domain, Some(task.clone()));
        Some(task)
    }

    /// The task whose helper made the domain, and keeps it in mind.
    fn owner_by(&self, denials: &Denials, domain: u64, creator: &Process) -> Option<Arc<Task>> {
        if !creator.name.as_bytes().starts_with(HELPERS.as_bytes()) {
            return None;
        }
        let task = self.task_of(denials, creator.pid)?;
        if creator.pid == task.main.pid {
            // It goes with the scope, as the domain does.
            let _ = task.cgroup.set_mark(Mark::Domain, &format!("{domain:x}"));
        }
        denials.know(domain, Some(task.clone()));
        Some(task)
    }

    fn task_of(&self, denials: &Denials, pid: u32) -> Option<Arc<Task>> {
        let tasks = self.all();
        // Where it is counts first: a number that was one task's may be another's by now.
        let cgroup = Cgroup::of_process(pid).ok();
        let is_its = |task: &&Arc<Task>| {
            let cgroup = cgroup.as_ref();
            cgroup.is_some_and(|cgroup| cgroup.path().starts_with(task.cgroup.path()))
        };
        if let Some(task) = tasks.iter().find(is_its) {
            return Some(task.clone());
        }
        if let Some(task) = tasks.iter().find(|task| task.main.pid == pid) {
            return Some(task.clone());
        }
        self.find(&denials.session(pid)?)
    }

    fn tell_of(
        &self,
        short: &mut Vec<Arc<Task>>,
        task: &Arc<Task>,
        denial: &Denial,
        event: &Event,
        now: Instant,
    ) {
        let verdict = lock(&task.denials).decide(number(denial), now);
        match verdict {
            Verdict::Known => return,
            Verdict::LeftOut => {
                if !short.iter().any(|other| Arc::ptr_eq(other, task)) {
                    short.push(task.clone());
                }
                return;
            }
            Verdict::Line | Verdict::LineAndEvent | Verdict::LineAndHint => {}
        }
        let denied = Denied {
            process: match &event.caller {
                Some(caller) => &caller.name,
                None => OsStr::new(""),
            },
            rights: &denial.blockers,
            path: denial.path.as_deref(),
        };
        let remedy = denied.remedy(Unveiled {
            config: &self.settings().config,
            entries: &task.asked.unveil,
            task_dir: Path::new(&task.asked.task_dir),
        });
        self.tell_denial(task, &denied, &remedy);
        match verdict {
            Verdict::LineAndEvent => self.event_of_denial(task, &denied, &remedy),
            Verdict::LineAndHint => self.event_of_more_denials(task),
            _ => {}
        }
    }
}

/// The same for the same rights and path.
fn number(denial: &Denial) -> u64 {
    let path = denial
        .path
        .as_deref()
        .map(|path| path.as_os_str().as_bytes());
    let parts = [
        denial.blockers.join(",").as_bytes(),
        path.unwrap_or_default(),
    ]
    .join(&0);
    fnv1a(&parts)
}

fn tell_loss(told: &mut Option<Instant>, now: Instant) {
    if told.is_none_or(|told| now.duration_since(told) >= BETWEEN_LOSSES) {
        *told = Some(now);
        warn!("audit: more records came than could be read, so that some denials are not told");
    }
}
