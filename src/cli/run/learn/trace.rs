//! The tracer: a thread of `run` that follows a parked helper to the task it forks, and writes down which files the task's calls named,
//! of those that succeeded. It changes nothing: parents, signals and exit codes are as without it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::calls::{self, Call, Flags, Named};
use super::list::{Seen, Use};
use super::look::{Last, Thread};
use crate::plan::steps::Access;
use crate::plan::unveil::letters;
use crate::sys::trace::{self, Resume, Stop};

/// sockaddr_un.
const ADDRESS_BYTES: usize = 110;
const FAMILY_BYTES: usize = 2;

/// What the tracer has seen.
#[derive(Debug, Default)]
pub struct Traced {
    pub seen: Seen,
    /// What was not found, or was not writable, below /run: it may be hidden from the task alone.
    pub missed: BTreeSet<PathBuf>,
    pub unseen: BTreeSet<Unseen>,
    /// Why the tracer ended before the command, which the kernel has killed then.
    pub broken_off: Option<io::Error>,
}

/// What the command did, and the tracer cannot tell files of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unseen {
    IoUring,
    /// Calls of another architecture.
    Foreign,
    AbstractSocket,
}

/// Traces the parked helper of this pid, from before it goes on. The thread ends with the last process of the task.
pub fn attach(helper: i32) -> io::Result<JoinHandle<Traced>> {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name("tracer".into());
    let thread = thread.spawn(move || {
        let seized = trace::seize(helper);
        let is_seized = seized.is_ok();
        let _ = tell.send(seized);
        let mut tracer = Tracer::default();
        // An error ends this thread, and the kernel kills with it whatever it still traces.
        if is_seized && let Ok(Some(task)) = follow_to_task(helper) {
            let number = Thread(task).own_number();
            tracer.traced.seen.first = number.map(|number| Path::new("/proc").join(number));
            tracer.traced.broken_off = tracer.follow().err();
        }
        tracer.traced
    })?;
    told.recv()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
    Ok(thread)
}

/// Follows the helper until it has forked the task, which is traced from its first instruction on. `None` if it did not come that far.
fn follow_to_task(helper: i32) -> io::Result<Option<i32>> {
    loop {
        // Its end is for whoever started it to reap.
        if trace::is_ending(helper)? {
            return Ok(None);
        }
        match trace::wait(helper)? {
            Some((_, Stop::Child(task))) => {
                // As the supervisor it must not be killed with us, before it has written how the task ended.
                trace::detach(helper)?;
                return Ok(Some(task));
            }
            Some((_, stop)) => go_on(helper, stop, Resume::Freely),
            None => return Ok(None),
        }
    }
}

fn go_on(thread: i32, stop: Stop, how: Resume) {
    let (how, signal) = match stop {
        Stop::Signal(signal) => (how, signal),
        Stop::Group => (Resume::Listening, 0),
        _ => (how, 0),
    };
    // It may have been killed meanwhile.
    let _ = trace::resume(thread, how, signal);
}

/// A call that has not returned yet, with what has to be known from before it.
#[derive(Debug)]
enum Begun {
    Open {
        named: Option<PathBuf>,
        flags: i32,
        existed: bool,
    },
    Make(Option<PathBuf>),
    Remove(Option<PathBuf>),
    Rename {
        from: Option<PathBuf>,
        to: Option<PathBuf>,
        exchange: bool,
    },
    Link {
        from: Option<PathBuf>,
        to: Option<PathBuf>,
    },
    Execute(Vec<PathBuf>),
    Truncate(Option<PathBuf>),
    Change(Option<PathBuf>),
    Connect(Option<PathBuf>),
    Unseen(Unseen),
}

#[derive(Debug, Default)]
struct Tracer {
    begun: BTreeMap<i32, Begun>,
    /// What the task has made: no entry can name it.
    made: BTreeSet<PathBuf>,
    traced: Traced,
}

impl Tracer {
    fn follow(&mut self) -> io::Result<()> {
        while let Some((thread, stop)) = trace::wait(-1)? {
            let how = match stop {
                Stop::Call(trace::FOREIGN) => {
                    self.traced.unseen.insert(Unseen::Foreign);
                    Resume::Freely
                }
                Stop::Call(_) => match begin(Thread(thread)) {
                    Some(begun) => {
                        self.begun.insert(thread, begun);
                        Resume::ToReturn
                    }
                    None => Resume::Freely,
                },
                Stop::Return => {
                    if let Some(begun) = self.begun.remove(&thread) {
                        let result = trace::returned(thread).unwrap_or(Err(libc::ESRCH));
                        self.ended(Thread(thread), begun, result);
                    }
                    Resume::Freely
                }
                // The thread that called exec has become the first of its process.
                Stop::Exec(caller) => {
                    let begun = self.begun.remove(&caller);
                    self.begun.remove(&thread);
                    self.executed(Thread(thread), begun);
                    Resume::Freely
                }
                Stop::Ended => {
                    self.begun.remove(&thread);
                    continue;
                }
                Stop::Child(_) | Stop::Signal(_) | Stop::Group | Stop::Other => Resume::Freely,
            };
            go_on(thread, stop, how);
        }
        Ok(())
    }

    fn executed(&mut self, thread: Thread, begun: Option<Begun>) {
        let mut files = thread.mapped();
        if let Some(Begun::Execute(programs)) = begun {
            files.extend(programs);
        }
        // To execute is to read: the kernel opens the file for both.
        for file in files {
            self.used(&file, letters("rx"));
        }
    }

    fn ended(&mut self, thread: Thread, begun: Begun, result: Result<i64, i32>) {
        let value = match result {
            Ok(value) => value,
            Err(libc::EINPROGRESS) => 0,
            Err(errno) => {
                self.failed(begun, errno);
                return;
            }
        };
        match begun {
            Begun::Open { flags, existed, .. } => self.opened(thread, value, flags, existed),
            Begun::Make(Some(path)) => self.makes(&path),
            Begun::Remove(Some(path)) => self.removes(&path),
            Begun::Rename {
                from: Some(from),
                to: Some(to),
                exchange,
            } => {
                self.moves(&from, &to);
                self.removes(&from);
                if exchange {
                    self.moves(&to, &from);
                    self.makes(&from);
                }
                self.makes(&to);
            }
            Begun::Link { from, to: Some(to) } => {
                if let Some(from) = from {
                    self.moves(&from, &to);
                }
                self.makes(&to);
            }
            Begun::Truncate(Some(path)) => self.used(&path, letters("w")),
            Begun::Change(Some(path)) => self.at(&path).changes = true,
            Begun::Connect(Some(path)) => self.at(&path).connects = true,
            Begun::Unseen(what) => {
                self.traced.unseen.insert(what);
            }
            _ => {}
        }
    }

    /// Of root all of /run is hidden, of others what leads to the host's managers.
    fn failed(&mut self, begun: Begun, errno: i32) {
        let named = match begun {
            Begun::Open { named, .. } | Begun::Make(named) | Begun::Connect(named) => named,
            _ => None,
        };
        let is_hidden = |path: &PathBuf| {
            matches!(errno, libc::ENOENT | libc::EROFS)
                && ["/run", "/var/run"].iter().any(|run| path.starts_with(run))
        };
        self.traced.missed.extend(named.filter(is_hidden));
    }

    fn opened(&mut self, thread: Thread, descriptor: i64, flags: i32, existed: bool) {
        // Landlock is not asked about a mere place.
        if flags & libc::O_PATH != 0 {
            return;
        }
        let Some(path) = i32::try_from(descriptor)
            .ok()
            .and_then(|number| thread.descriptor(number))
        else {
            return;
        };
        let mut access = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => letters("r"),
            libc::O_WRONLY => letters("w"),
            _ => letters("rw"),
        };
        access.write |= flags & libc::O_TRUNC != 0;
        let is_temporary = flags & libc::O_TMPFILE == libc::O_TMPFILE;
        if is_temporary {
            // It has no name in the directory; its rights are those of what is below.
            if let Some(dir) = path.parent() {
                self.used(dir, access);
            }
            return;
        }
        if !existed {
            self.makes(&path);
        }
        self.used(&path, access);
    }

    fn makes(&mut self, path: &Path) {
        self.removes(path);
        self.made.insert(path.to_owned());
    }

    fn removes(&mut self, path: &Path) {
        if let Some(dir) = path.parent() {
            self.used(dir, letters("c"));
        }
    }

    fn moves(&mut self, from: &Path, to: &Path) {
        let dir = |path: &Path| path.parent().map(|dir| self.anchor(dir).to_owned());
        if let (Some(from), Some(to)) = (dir(from), dir(to))
            && from != to
        {
            self.traced.seen.moves.insert((from, to));
        }
    }

    fn used(&mut self, path: &Path, access: Access) {
        let entry = self.at(path);
        entry.access = entry.access.with(access);
    }

    fn at(&mut self, path: &Path) -> &mut Use {
        let path = self.anchor(path).to_owned();
        self.traced.seen.uses.entry(path).or_default()
    }

    /// The path itself, or of what the task has made the directory that was there before.
    fn anchor<'a>(&self, path: &'a Path) -> &'a Path {
        let made = path
            .ancestors()
            .filter(|above| self.made.contains(*above))
            .last();
        made.and_then(Path::parent).unwrap_or(path)
    }
}

/// Looks at a call that is about to be made. `None` if it is of no interest.
fn begin(thread: Thread) -> Option<Begun> {
    let (number, arguments) = trace::call(thread.0).ok()?;
    let entry = |named: Named| {
        let path = thread.named(named, &arguments)?;
        thread.resolve_entry(&path)
    };
    let there = |named: Named| {
        let path = thread.named(named, &arguments)?;
        let found = thread.resolve(&path, Last::Followed);
        found.or_else(|| thread.resolve(&path, Last::Taken))
    };
    Some(match calls::of_number(number)? {
        Call::Open(named, flags) => {
            let flags = open_flags(thread, flags, &arguments);
            let path = thread.named(named, &arguments);
            let may_make = flags & libc::O_CREAT != 0;
            let existed = path.as_deref().is_none_or(|path| {
                !may_make || is_link_to_open(path) || thread.resolve(path, Last::Followed).is_some()
            });
            Begun::Open {
                named: path,
                flags,
                existed,
            }
        }
        Call::Make(named) => Begun::Make(entry(named)),
        Call::Remove(named) => Begun::Remove(entry(named)),
        Call::Rename(from, to, flags) => Begun::Rename {
            from: entry(from),
            to: entry(to),
            exchange: flags.is_some_and(|at| arguments[at] & u64::from(libc::RENAME_EXCHANGE) != 0),
        },
        Call::Link(from, to) => Begun::Link {
            from: entry(from),
            to: entry(to),
        },
        Call::Execute(named) => {
            let path = thread.named(named, &arguments);
            Begun::Execute(path.map_or_else(Vec::new, |path| thread.programs(&path)))
        }
        Call::Truncate(named) => Begun::Truncate(there(named)),
        Call::Change(named) => Begun::Change(there(named)),
        Call::ChangeOpen(at) => Begun::Change(thread.descriptor(arguments[at] as i32)),
        Call::Bind(at, length) => match address(thread, arguments[at], arguments[length])? {
            Address::Path(path) => {
                Begun::Make(thread.resolve_entry(&thread.absolute(None, &path)?))
            }
            Address::Abstract => return None,
        },
        Call::Connect(at, length) => match address(thread, arguments[at], arguments[length])? {
            Address::Path(path) => {
                let path = thread.absolute(None, &path)?;
                let found = thread.resolve(&path, Last::Followed);
                Begun::Connect(Some(found.unwrap_or(path)))
            }
            Address::Abstract => Begun::Unseen(Unseen::AbstractSocket),
        },
        Call::IoUring => Begun::Unseen(Unseen::IoUring),
    })
}

/// Such a name stands for what is open already, and cannot be looked up from outside.
fn is_link_to_open(path: &Path) -> bool {
    [
        "/proc",
        "/dev/fd",
        "/dev/stdin",
        "/dev/stdout",
        "/dev/stderr",
    ]
    .iter()
    .any(|top| path.starts_with(top))
}

fn open_flags(thread: Thread, flags: Flags, arguments: &[u64; 6]) -> i32 {
    match flags {
        Flags::Argument(at) => arguments[at] as i32,
        Flags::Creat => libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC,
        Flags::How(at) => {
            let bytes = thread.bytes(arguments[at], size_of::<u64>());
            let word = bytes.try_into().map_or(0, u64::from_ne_bytes);
            word as i32
        }
    }
}

/// The address of a Unix socket.
#[derive(Debug)]
enum Address {
    Path(PathBuf),
    Abstract,
}

fn address(thread: Thread, at: u64, length: u64) -> Option<Address> {
    let length = usize::try_from(length).ok()?.min(ADDRESS_BYTES);
    let bytes = thread.bytes(at, length);
    let (family, name) = bytes.split_at_checked(FAMILY_BYTES)?;
    if i32::from(u16::from_ne_bytes(family.try_into().ok()?)) != libc::AF_UNIX || name.is_empty() {
        return None;
    }
    let name = name.split(|byte| *byte == 0).next()?;
    if name.is_empty() {
        return Some(Address::Abstract);
    }
    Some(Address::Path(PathBuf::from(std::ffi::OsStr::from_bytes(
        name,
    ))))
}
