//! The unveil rules as a Landlock ruleset. Paths are opened with the task's rights, in the final view, and each rule is made for
//! what was opened: by the helper, which costs the task nothing, and by the task's process where only that can.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, RestrictSelfAttr,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::{FileType, OFlags, Stat, fstat, fstatfs, stat};
use rustix::io::Errno;

use super::place::TaskRoot;
use super::report::{At, Failure};
use crate::plan::steps::{Access, Denials, Order, Place, Rule, Source, Step};

/// Since kernels 5.19 and 6.2. An older one denies every rename between directories, and governs no truncation.
const LATER: BitFlags<AccessFs> = make_bitflags!(AccessFs::{Refer | Truncate});
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate});
/// Device nodes are not in it: their creation is handled, and granted by nothing.
const CREATE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    MakeReg | MakeDir | MakeSym | MakeFifo | MakeSock | RemoveFile | RemoveDir | Refer
});

/// linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;
const CGROUP_MAGIC: u64 = 0x0027_e0eb;
const CGROUP2_MAGIC: u64 = 0x6367_7270;
const PROC: &str = "/proc";
const CGROUP: &str = "/sys/fs/cgroup";

const OF_THE_OPERATOR: &str = "an entry of the operator's unveil_paths";

/// A ruleset, and the descriptors without which some of its rules would be lost.
#[derive(Debug)]
pub(super) struct Rules {
    ruleset: RulesetCreated,
    held: Vec<OwnedFd>,
    /// What the operator opened so far, it is open so far, by whatever other name a job calls it.
    operators: BTreeSet<(u64, u64)>,
    /// Of the order's rules those that the helper left to the task's process, by their index.
    left: Vec<usize>,
}

impl Rules {
    /// Opens the rules of an order that mean the same to the helper as to the task. Below /proc lies what is the process' own,
    /// and over /sys/fs/cgroup the scope's own is laid later; what cannot be opened, the task's process judges. `pipes` are the
    /// task's log pipes, which it may reopen whatever else is unveiled.
    pub fn open<'a>(
        order: &Order,
        root: &TaskRoot,
        pipes: impl Iterator<Item = &'a OwnedFd>,
    ) -> Result<Rules, Failure> {
        let mut rules = Rules {
            ruleset: empty_ruleset(order).map_err(|error| refused(Step::Rules, &error))?,
            held: Vec::new(),
            operators: BTreeSet::new(),
            left: Vec::new(),
        };
        for (index, rule) in order.rules.iter().enumerate() {
            // A rule of the operator's that is left may be for the same object, and comes first.
            if rule.source == Source::Task && rules.leaves_operators(order) {
                rules.left.push(index);
                continue;
            }
            match root.open_without_magic(&rule.place) {
                Ok(object) => {
                    let status = fstat(&object).at_path(Step::Rules, &rule.written)?;
                    if is_of_a_process(&object).at_path(Step::Rules, &rule.written)? {
                        rules.left.push(index);
                    } else {
                        rules.grant(rule, &object, &status)?;
                    }
                }
                Err(Errno::NOENT) if is_skipped(rule) => {}
                Err(_) => rules.left.push(index),
            }
        }
        for pipe in pipes {
            (&mut rules.ruleset)
                .add_rule(PathBeneath::new(pipe, WRITE))
                .map_err(|error| refused(Step::Rules, &error))?;
        }
        Ok(rules)
    }

    fn leaves_operators(&self, order: &Order) -> bool {
        let mut left = self.left.iter().filter_map(|index| order.rules.get(*index));
        left.any(|rule| rule.source == Source::Plugin)
    }

    /// The same ruleset with the others in it, opened as the task's process.
    pub fn completed(&self, order: &Order, root: &TaskRoot) -> Result<Rules, Failure> {
        let mut rules = Rules {
            ruleset: self.ruleset.try_clone().at(Step::OwnRules)?,
            held: Vec::new(),
            operators: self.operators.clone(),
            left: Vec::new(),
        };
        let proc = stat(PROC).at_path(Step::OwnRules, PROC)?.st_dev;
        for rule in self.left.iter().filter_map(|index| order.rules.get(*index)) {
            let Some(object) = open(rule, root, order.uid)? else {
                continue;
            };
            let status = fstat(&object).at_path(Step::OwnRules, &rule.written)?;
            rules.grant(rule, &object, &status)?;
            // The kernel makes a new inode for an entry of /proc when it has forgotten the one that the rule is for.
            if status.st_dev == proc {
                rules.held.push(object);
            }
        }
        Ok(rules)
    }

    fn grant(&mut self, rule: &Rule, object: &OwnedFd, status: &Stat) -> Result<(), Failure> {
        let inode = (status.st_dev, status.st_ino);
        match rule.source {
            Source::Plugin => {
                self.operators.insert(inode);
            }
            Source::Task if self.operators.contains(&inode) => return Ok(()),
            _ => {}
        }
        let kind = FileType::from_raw_mode(status.st_mode);
        add(&mut self.ruleset, rule, object, kind)
    }

    /// What the supervisor keeps for the task: the ruleset, for others to join it, and the rules that would be lost.
    pub fn hold(
        &self,
        keep: impl FnOnce(&[BorrowedFd<'_>]) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let ruleset: Option<OwnedFd> = self.ruleset.try_clone().at(Step::Restrict)?.into();
        let held: Vec<_> = ruleset.iter().chain(&self.held).map(AsFd::as_fd).collect();
        keep(&held).at(Step::Restrict)
    }

    /// Sets no_new_privs and restricts the calling thread, for good.
    pub fn restrict(self, denials: Denials) -> Result<(), Failure> {
        let (new_exec, subdomains) = (
            denials == Denials::Logged,
            // A program's own sandbox inside of ours is its own affair, and no entry of a job would allow what that denies.
            denials == Denials::Unlogged,
        );
        let status = self
            .ruleset
            .log_new_exec(new_exec)
            .and_then(|ruleset| ruleset.log_subdomains(subdomains)?.restrict_self())
            .map_err(|error| refused(Step::Restrict, &error))?;
        if status.ruleset == RulesetStatus::NotEnforced || !status.no_new_privs {
            return Err(
                Failure::new(Step::Restrict, 0).note("the kernel did not enforce the rules")
            );
        }
        Ok(())
    }
}

/// For landlock_restrict_self(2) itself, what [`Rules::restrict`] asks the library for.
pub(super) fn log_flags(denials: Denials) -> u32 {
    const LOG_NEW_EXEC_ON: u32 = 1 << 1;
    const LOG_SUBDOMAINS_OFF: u32 = 1 << 2;
    match denials {
        Denials::Logged => LOG_NEW_EXEC_ON | LOG_SUBDOMAINS_OFF,
        Denials::Unlogged => 0,
    }
}

fn empty_ruleset(order: &Order) -> Result<RulesetCreated, landlock::RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(LATER)?;
    // Signals are not scoped: a session has a domain of its own, and may signal what else runs in the task.
    if order.closes_abstract_sockets() {
        ruleset = ruleset.scope(Scope::AbstractUnixSocket)?;
    }
    ruleset.create()
}

/// Whether it is on a procfs or a cgroup filesystem, wherever that is mounted.
fn is_of_a_process(object: &OwnedFd) -> Result<bool, Errno> {
    let kind = fstatfs(object)?.f_type as u64;
    Ok([PROC_MAGIC, CGROUP_MAGIC, CGROUP2_MAGIC].contains(&kind))
}

/// Whether it counts for nothing, now and later, that its path is not there.
fn is_skipped(rule: &Rule) -> bool {
    let path = rule.place.as_path();
    rule.source == Source::Default && !path.starts_with(PROC) && !path.starts_with(CGROUP)
}

/// What a rule is for, or nothing if it is a default whose path is not there for this user.
fn open(rule: &Rule, root: &TaskRoot, uid: u32) -> Result<Option<OwnedFd>, Failure> {
    let errno = match root.open_place(&rule.place, OFlags::empty()) {
        Ok(object) => return Ok(Some(object)),
        Err(errno) => errno,
    };
    let failure = Failure::new(Step::Rules, errno.raw_os_error()).on(spelled(rule));
    match (errno, rule.source, &rule.place) {
        (Errno::NOENT | Errno::ACCESS | Errno::NOTDIR | Errno::LOOP, Source::Default, _) => {
            Ok(None)
        }
        (Errno::ACCESS, ..) => Err(failure.note(format!("uid {uid} cannot reach it"))),
        // "Cross-device link", says the kernel.
        (Errno::XDEV, _, Place::Task(_)) => Err(Failure {
            errno: 0,
            ..failure.note("it leads out of the task's directory")
        }),
        _ => Err(failure),
    }
    // A job author looks for it in the job.
    .map_err(|failure| match (rule.source, &failure.note) {
        (Source::Plugin, None) => failure.note(OF_THE_OPERATOR),
        (Source::Plugin, Some(note)) => {
            let note = format!("{note}; {OF_THE_OPERATOR}");
            failure.note(note)
        }
        _ => failure,
    })
}

fn add(
    ruleset: &mut RulesetCreated,
    rule: &Rule,
    object: &OwnedFd,
    kind: FileType,
) -> Result<(), Failure> {
    let fail = |errno| Failure::new(Step::Rules, errno).on(spelled(rule));
    let access = rights(rule.access, kind);
    if access.is_empty() {
        return Err(fail(0).note("\"c\" allows nothing on a file; it is for directories"));
    }
    match ruleset.add_rule(PathBeneath::new(object, access)) {
        Ok(_) => Ok(()),
        // An anonymous pipe, /dev/stdout perhaps: Landlock takes no rule for it, and does not govern it.
        Err(error) if errno_of(&error) == libc::EBADFD => match rule.source {
            Source::Default => Ok(()),
            _ => Err(fail(0).note("it is an anonymous pipe or socket, which needs no unveiling")),
        },
        Err(error) => Err(refused(Step::Rules, &error).on(spelled(rule))),
    }
}

/// The rights of a mode: a file has none of a directory's, and the kernel refuses a rule that grants them.
fn rights(access: Access, kind: FileType) -> BitFlags<AccessFs> {
    let on_directory = |rights: BitFlags<AccessFs>| match kind {
        FileType::Directory => rights,
        _ => BitFlags::EMPTY,
    };
    let granted = [
        (
            access.read,
            on_directory(AccessFs::ReadDir.into()) | AccessFs::ReadFile,
        ),
        (access.write, WRITE),
        (access.execute, AccessFs::Execute.into()),
        (access.create, on_directory(CREATE)),
    ];
    granted
        .into_iter()
        .filter_map(|(asked, rights)| asked.then_some(rights))
        .fold(BitFlags::EMPTY, |all, rights| all | rights)
}

/// A rule as a job author writes it.
fn spelled(rule: &Rule) -> String {
    format!("{}:{}", rule.access, rule.written.display())
}

fn refused(step: Step, error: &landlock::RulesetError) -> Failure {
    match errno_of(error) {
        0 => Failure::new(step, 0).note(format!("{error} (is Landlock enabled in the kernel?)")),
        errno => Failure::new(step, errno),
    }
}

/// The errno at the bottom of an error, or 0.
fn errno_of(error: &(dyn Error + 'static)) -> i32 {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(errno) = error.downcast_ref().and_then(io::Error::raw_os_error) {
            return errno;
        }
        next = error.source();
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::denials::letters;

    fn mode(letters: &str) -> Access {
        Access {
            read: letters.contains('r'),
            write: letters.contains('w'),
            execute: letters.contains('x'),
            create: letters.contains('c'),
        }
    }

    #[test]
    fn modes_grant_what_the_kind_of_file_can_have() {
        use AccessFs::*;
        let cases = [
            ("r", FileType::Directory, ReadFile | ReadDir),
            ("r", FileType::RegularFile, ReadFile.into()),
            ("w", FileType::Directory, WriteFile | Truncate),
            ("w", FileType::Fifo, WriteFile | Truncate),
            ("x", FileType::RegularFile, Execute.into()),
            ("c", FileType::Directory, CREATE),
            ("c", FileType::RegularFile, BitFlags::EMPTY),
            (
                "rwxc",
                FileType::RegularFile,
                ReadFile | WriteFile | Truncate | Execute,
            ),
        ];
        for (letters, kind, granted) in cases {
            assert_eq!(
                rights(mode(letters), kind),
                granted,
                "{letters} on {kind:?}"
            );
        }
    }

    #[test]
    fn letters_that_are_told_to_give_a_right_give_it() {
        let all = AccessFs::from_all(ABI::V3);
        for right in all {
            // As the kernel's log names it.
            let mut name = String::from("fs.");
            for (index, letter) in format!("{right:?}").char_indices() {
                if letter.is_uppercase() && index > 0 {
                    name.push('_');
                }
                name.push(letter.to_ascii_lowercase());
            }
            let letters = letters(&name);
            let granted = rights(mode(letters), FileType::Directory);
            let is_grantable = rights(mode("rwxc"), FileType::Directory).contains(right);
            assert_eq!(granted.contains(right), is_grantable, "{name}: {letters:?}");
            assert_eq!(letters.is_empty(), !is_grantable, "{name}");
        }
    }

    #[test]
    fn no_mode_grants_device_nodes() {
        let all = rights(mode("rwxc"), FileType::Directory);
        assert!(!all.intersects(AccessFs::MakeChar | AccessFs::MakeBlock));
    }
}
