//! The part of a plan that the helper carries out: its `Order`, and the numbered steps of a start. Values only: what is
//! written here has been decided, and nobody who reads it decides again.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The steps of a task's start, in the order in which they happen. Steps 1 to 3 and the last are the plugin's; 4 to 10 are the
/// helper's while it is still charged to the plugin; from 12 on it is inside the scope; from 15 on it is the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    Plan,
    Spawn,
    Scope,
    Open,
    Network,
    Unshare,
    Propagation,
    View,
    Filter,
    Rules,
    Release,
    Cgroup,
    Journal,
    Fork,
    Session,
    OomScore,
    Keyring,
    Bounding,
    Groups,
    User,
    Ambient,
    WorkDir,
    OwnRules,
    Restrict,
    Signals,
    Exec,
    Commit,
}

impl Step {
    /// Every step with what it does, in order: the list that the README quotes.
    pub const ALL: [(Step, &'static str); 27] = [
        (
            Step::Plan,
            "decide everything that will happen, from the job, the plugin's configuration and facts of the host",
        ),
        (
            Step::Spawn,
            "give the order to a helper that was spawned into a PID namespace of its own, with an empty environment: now, or ahead of the start",
        ),
        (
            Step::Scope,
            "start the scope over D-Bus around the helper, with all limits in the one call",
        ),
        (
            Step::Open,
            "open the task's directory, its log pipes and its network namespace by descriptor",
        ),
        (Step::Network, "join the allocation's network namespace"),
        (Step::Unshare, "leave the host's mount and IPC namespaces"),
        (
            Step::Propagation,
            "cut mount propagation, from the host and to it",
        ),
        (
            Step::View,
            "build the mount view: everything read-only but what is unveiled for writing; own /proc, /tmp, /dev/shm; /run masked; volumes, devices and files of its own laid over it",
        ),
        (
            Step::Filter,
            "install the system call filter: no user namespaces, unless they are allowed; no persistent keyring",
        ),
        (
            Step::Rules,
            "open the unveiled paths, with the rights of the task's user, in the final view",
        ),
        (Step::Release, "wait until the scope is there"),
        (
            Step::Cgroup,
            "leave the host's cgroup namespace: /sys/fs/cgroup is the scope's own directory, read-only",
        ),
        (
            Step::Journal,
            "connect to the journal, if the job's logs are disabled: what connects inside the scope is logged as the scope's",
        ),
        (
            Step::Fork,
            "fork: the parent stays as the supervisor, the child becomes the task",
        ),
        (Step::Session, "start a session of its own"),
        (
            Step::OomScore,
            "set oom_score_adj, which is never inherited from the agent",
        ),
        (
            Step::Keyring,
            "join a fresh session keyring, of root's: users may have few",
        ),
        (Step::Bounding, "cut the capability bounding set"),
        (Step::Groups, "drop supplementary groups and set the group"),
        (Step::User, "set the user"),
        (
            Step::Ambient,
            "raise the ambient capabilities that the operator allows",
        ),
        (Step::WorkDir, "enter the working directory"),
        (
            Step::OwnRules,
            "open those below /proc and /sys/fs/cgroup, which are the task's own",
        ),
        (
            Step::Restrict,
            "set no_new_privs and restrict itself with Landlock",
        ),
        (
            Step::Signals,
            "reset signal mask, dispositions and resource limits",
        ),
        (Step::Exec, "exec the command"),
        (
            Step::Commit,
            "keep the task: until here the supervisor ends it if the plugin dies, and nothing of it stays",
        ),
    ];

    /// Its number in the list, counted from 1.
    pub fn number(self) -> usize {
        self as usize + 1
    }

    /// What the step acts on, for the start of an error sentence.
    pub fn subject(self) -> &'static str {
        match self {
            Step::Plan => "plan",
            Step::Spawn => "helper",
            Step::Scope => "scope",
            Step::Open => "task directory and logs",
            Step::Network => "network namespace",
            Step::Unshare => "namespaces",
            Step::Propagation => "mount propagation",
            Step::View => "mount view",
            Step::Filter => "system call filter",
            Step::Release => "release",
            Step::Cgroup => "cgroup view",
            Step::Journal => "journal",
            Step::Fork => "fork",
            Step::Session => "session",
            Step::OomScore => "oom_score_adj",
            Step::Bounding => "capability bounding set",
            Step::Groups => "group",
            Step::User => "user",
            Step::Keyring => "session keyring",
            Step::Ambient => "ambient capabilities",
            Step::WorkDir => "work_dir",
            Step::Rules | Step::OwnRules => "unveil",
            Step::Restrict => "Landlock",
            Step::Signals => "signals and limits",
            Step::Exec => "command",
            Step::Commit => "commit",
        }
    }
}

/// Everything the helper does, decided. Sent to it as MessagePack with named fields in a sealed memfd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The command as the job wrote it: a path, or a name to be found in the PATH of `env`.
    pub command: String,
    /// Arguments after the command's own name.
    pub args: Vec<String>,
    /// The task's whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory in the final view.
    pub work_dir: Place,
    pub uid: u32,
    pub gid: u32,
    /// -1000 to 1000; written always, so that the agent's own -1000 is never inherited.
    pub oom_score_adj: i16,
    /// Capability bounding set, as a mask of capability numbers.
    pub bounding: u64,
    /// Capabilities kept across exec for a user other than root, as a mask.
    pub ambient: u64,
    /// Network namespace file to join; `None` stays in the host's.
    pub network_namespace: Option<PathBuf>,
    pub stdio: Stdio,
    pub task_dir: TaskDir,
    pub view: View,
    /// Volumes and devices that are laid into the view.
    pub binds: Vec<Bind>,
    /// Files of the host that read otherwise in the view.
    pub replaced: Vec<Replaced>,
    pub rules: Vec<Rule>,
    pub user_namespaces: UserNamespaces,
    /// Soft and hard RLIMIT_NOFILE that the plugin was started with, given back to the task.
    pub open_files: (u64, u64),
    #[serde(default)]
    pub denials: Denials,
    /// System calls at which the task stops for whoever traces it. None, but for `run --learn`.
    pub traced_calls: Vec<u32>,
}

/// Whether the kernel logs what Landlock denies, while audit is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Denials {
    #[default]
    Unlogged,
    Logged,
}

impl Order {
    /// Whether abstract sockets that others made are out of reach. The kernel asks for no right to connect to one, so that for
    /// root each is an open door. In an allocation's own network they are those of its tasks, which may talk.
    pub fn closes_abstract_sockets(&self) -> bool {
        self.uid == 0 && self.network_namespace.is_none() && self.view.tree == Tree::ReadOnly
    }
}

/// The part of a task's `Order` that a session takes over. The supervisor keeps the order's bytes for as long as the task runs,
/// and a later release reads them: none of these fields is ever renamed, and a new one has a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Identity {
    pub env: Vec<(String, String)>,
    pub work_dir: Place,
    pub uid: u32,
    pub gid: u32,
    pub oom_score_adj: i16,
    pub bounding: u64,
    pub ambient: u64,
    pub task_dir: TaskDir,
    pub open_files: (u64, u64),
    #[serde(default)]
    pub user_namespaces: UserNamespaces,
    #[serde(default)]
    pub denials: Denials,
}

/// M, the task's own directory, which the task sees at `path`: parent of local, alloc, secrets and tmp.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskDir {
    pub path: PathBuf,
    /// The allocation's directory, which backs this one: Nomad's root processes work there, tasks do not.
    pub alloc_dir: PathBuf,
    /// Device and inode seen when the directory was verified; another one means that it was swapped.
    pub device: u64,
    pub inode: u64,
}

/// Where the task's stdout and stderr go; stdin is always /dev/null.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// Nomad's log FIFOs, by absolute path.
    Fifos { stdout: PathBuf, stderr: PathBuf },
    /// Descriptors that were handed to the helper at its start.
    Given,
    /// The journal, as lines of this unit.
    Journal {
        unit: String,
        /// SYSLOG_IDENTIFIER; of one line.
        identifier: String,
    },
    /// Nowhere.
    Null,
}

/// A path, and from where it is opened.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// Relative to the task's directory: opened beneath it. A link that leads out of it is an error.
    Task(PathBuf),
    /// Absolute, on the host: links are followed, as the operator or the job author meant.
    Host(PathBuf),
}

impl Place {
    pub fn as_path(&self) -> &Path {
        match self {
            Place::Task(path) | Place::Host(path) => path,
        }
    }
}

/// One unveiled path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub place: Place,
    /// The path as its author wrote it, for error sentences.
    pub written: PathBuf,
    pub access: Access,
    pub source: Source,
}

/// Who asked for a rule. A default path that does not exist is skipped; any other is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    Default,
    Driver,
    Plugin,
    Task,
}

/// The rights of an unveil mode, any of `r w x c`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Access {
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    pub create: bool,
}

impl Access {
    pub fn with(self, other: Access) -> Access {
        Access {
            read: self.read || other.read,
            write: self.write || other.write,
            execute: self.execute || other.execute,
            create: self.create || other.create,
        }
    }

    pub fn without(self, other: Access) -> Access {
        Access {
            read: self.read && !other.read,
            write: self.write && !other.write,
            execute: self.execute && !other.execute,
            create: self.create && !other.create,
        }
    }

    pub fn is_none(self) -> bool {
        self == Access::default()
    }

    /// Whether a mount in the view has to be writable for it.
    pub fn changes(self) -> bool {
        self.write || self.create
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [
            (self.read, 'r'),
            (self.write, 'w'),
            (self.execute, 'x'),
            (self.create, 'c'),
        ];
        letters
            .iter()
            .filter(|(on, _)| *on)
            .try_for_each(|(_, letter)| write!(f, "{letter}"))
    }
}

/// Whether the task may make user namespaces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserNamespaces {
    #[default]
    Refused,
    Allowed,
}

/// What the task sees of the host's mounts (`design`: the whole tree read-only, with exceptions).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    pub tree: Tree,
    /// Paths that stay writable, besides the task's directory and /dev: what is unveiled `w` or `c`.
    pub writable: Vec<PathBuf>,
    pub run: RunMask,
    /// Paths that are brought back from under a mask (/run, /tmp, /dev/shm): what is unveiled there.
    pub kept: Vec<PathBuf>,
    /// Files of the task's own /proc that nobody in it can open.
    pub masked: Vec<PathBuf>,
}

/// Something of the host that the task has at a path of its own choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub kind: BindKind,
    /// On the host; links are followed, as the operator meant.
    pub source: PathBuf,
    pub target: Place,
    pub write: Write,
    pub propagation: Propagation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BindKind {
    Volume,
    /// A device node, which is one in the task, too.
    Device,
}

/// Whether a mount in the view is read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Write {
    Denied,
    Allowed,
}

/// What becomes of later mounts of the host below a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Private,
    /// They arrive in the task, and nothing arrives on the host.
    Slave,
}

/// A file of the host, and what the task reads in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    pub path: PathBuf,
    pub text: Text,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Text {
    Whole(String),
    /// What the host's file says, and then this.
    Appended(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tree {
    ReadOnly,
    /// `/` itself is unveiled for writing.
    AsIs,
}

/// How much of /run is hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunMask {
    /// What leads to managers of the host: /run/dbus, /run/user, and /run/systemd but resolve, journal and userdb.
    Managers,
    /// All of it but systemd's resolve and journal, and nscd: for uid 0.
    All,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_steps_is_in_the_order_of_the_type() {
        for (index, (step, _)) in Step::ALL.iter().enumerate() {
            assert_eq!(step.number(), index + 1);
        }
    }
}
