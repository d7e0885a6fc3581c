//! What is wrong with a list of unveil rules on this host, or useless in it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::getxattr;

use super::{managers, work_dir};
use crate::plan::Plan;
use crate::plan::command::{candidates, search_path};
use crate::plan::steps::{Access, Order, Place, Rule, Source};
use crate::plan::unveil::Overruled;

/// Below the task's directory, and read-only whatever is unveiled.
const LOGS: &str = "alloc/logs";

/// Something about one rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub source: Source,
    /// Where it was written.
    pub key: &'static str,
    /// No task with this rule starts.
    pub is_error: bool,
    pub sentence: String,
}

/// Whose words the sentences are for.
#[derive(Debug, Clone, Copy)]
pub enum Mode<'a> {
    OfOperator(Useless),
    OfTask(&'a Plan),
}

/// Entries of the operator's that another one covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Useless {
    Told,
    /// They keep jobs from widening their paths.
    Untold,
}

impl<'a> Mode<'a> {
    /// That of the task that opens the rules, if there is one.
    pub fn order(self) -> Option<&'a Order> {
        match self {
            Mode::OfOperator(_) => None,
            Mode::OfTask(plan) => Some(&plan.order),
        }
    }

    /// Whether it is the reader's to mend, where it keeps nothing from starting.
    pub fn writes(self, source: Source) -> bool {
        match self {
            Mode::OfOperator(_) => source == Source::Plugin,
            Mode::OfTask(_) => source == Source::Task,
        }
    }

    fn is_work_dirs(self, rule: &Rule) -> bool {
        let own = match self {
            Mode::OfOperator(_) => None,
            Mode::OfTask(plan) => work_dir::rule(plan),
        };
        own.is_some_and(|own| std::ptr::eq(own, rule))
    }
}

/// A rule with what its path is on this host.
#[derive(Debug)]
pub struct Seen<'a> {
    pub rule: &'a Rule,
    /// The path that the kernel sees; of one below the task's directory its own name.
    pub real: PathBuf,
    is_file: bool,
}

/// Judges the rules that an operator or a job author wrote; those of the driver and the defaults are taken as they are.
pub fn of_rules(rules: &[Rule], mode: Mode<'_>) -> Vec<Finding> {
    let order = mode.order();
    let mut findings = Vec::new();
    let mut seen = Vec::new();
    for rule in rules {
        let is_written = matches!(rule.source, Source::Plugin | Source::Task);
        let is_written = is_written && !mode.is_work_dirs(rule);
        let mut add = |is_error, sentence: String| {
            if is_written && (is_error || mode.writes(rule.source)) {
                findings.push(finding(rule, mode, is_error, sentence));
            }
        };
        let path = match &rule.place {
            Place::Host(path) => path,
            Place::Task(path) => {
                if path.starts_with(LOGS) && (rule.access.changes() || rule.access.execute) {
                    let start = start(rule, mode);
                    add(
                        false,
                        format!(
                            "{start}: has no effect, as {LOGS} is read-only to tasks, and Nomad writes there; leave the entry out, and write to alloc/data"
                        ),
                    );
                }
                continue;
            }
        };
        // Not the host's file then.
        if order.is_some_and(|order| is_laid_over(order, path)) {
            continue;
        }
        let (real, is_file) = match fs::canonicalize(path).and_then(|real| {
            let is_file = !fs::metadata(&real)?.is_dir();
            Ok((real, is_file))
        }) {
            Ok(found) => found,
            Err(error) => {
                let (start, problem) = (start(rule, mode), problem(&error));
                add(
                    true,
                    format!("{start}: {problem}; correct the path, or make what it names"),
                );
                continue;
            }
        };
        if let Some(Order {
            uid, gid, ambient, ..
        }) = order
            && ambient & PASSES == 0
            && !reaches(&real, *uid, *gid)
        {
            let start = start(rule, mode);
            add(
                true,
                format!(
                    "{start}: permission denied (uid {uid} cannot reach it); let its directories be passed (chmod o+x), or run the task as their owner"
                ),
            );
        }
        if is_file && rule.access.create {
            let only_create = Access {
                create: true,
                ..Access::default()
            };
            match rule.access == only_create {
                true => add(
                    true,
                    format!(
                        "{}: \"c\" allows nothing on a file; it is for directories",
                        start(rule, mode)
                    ),
                ),
                false => add(
                    false,
                    format!(
                        "{}: \"c\" has no effect on a file; leave the letter out",
                        start(rule, mode)
                    ),
                ),
            }
        }
        seen.push(Seen {
            rule,
            real,
            is_file,
        });
    }
    findings.extend(managers::of_rules(&seen, mode));
    for (index, one) in seen.iter().enumerate() {
        if !matches!(mode, Mode::OfOperator(Useless::Untold))
            && mode.writes(one.rule.source)
            && !mode.is_work_dirs(one.rule)
            && !has_other_effect(&one.real)
            && let Some(other) = covering(one, index, &seen)
        {
            let (spelled, of) = (spelled(other.rule), whose(other.rule.source));
            findings.push(finding(
                one.rule,
                mode,
                false,
                format!(
                    "{}: all of it is open already by {spelled} of {of}; leave the entry out",
                    start(one.rule, mode)
                ),
            ));
        }
    }
    findings
}

/// All that this host says of the rules of a task.
pub fn of_plan(plan: &Plan) -> Vec<Finding> {
    let mode = Mode::OfTask(plan);
    let mut findings = work_dir::judge(plan);
    findings.extend(of_rules(&plan.order.rules, mode));
    findings.extend(of_overruled(&plan.overruled, mode));
    findings
}

/// What is written twice, where the second has no effect.
pub fn of_overruled(overruled: &[Overruled], mode: Mode<'_>) -> Vec<Finding> {
    let written = overruled
        .iter()
        .filter(|it| mode.writes(it.rule.source) && !mode.is_work_dirs(&it.rule));
    written
        .map(|Overruled { rule, by }| {
            let (winner, of) = (spelled(by), whose(by.source));
            let sentence = format!(
                "{}: has no effect, as {winner} of {of} is for the same path and comes first; leave the entry out",
                start(rule, mode)
            );
            finding(rule, mode, false, sentence)
        })
        .collect()
}

pub fn finding(rule: &Rule, mode: Mode<'_>, is_error: bool, sentence: String) -> Finding {
    Finding {
        source: rule.source,
        key: match rule.source {
            Source::Plugin => "unveil_paths",
            _ if mode.is_work_dirs(rule) => work_dir::KEY,
            _ => "unveil",
        },
        is_error,
        sentence,
    }
}

/// In the words of the launcher, which fails on it.
pub fn start(rule: &Rule, mode: Mode<'_>) -> String {
    let spelled = spelled(rule);
    match (rule.source, mode) {
        (Source::Plugin, Mode::OfOperator(_)) => spelled,
        (Source::Plugin, Mode::OfTask(_)) => {
            format!("unveil {spelled} (an entry of the operator's unveil_paths)")
        }
        _ if mode.is_work_dirs(rule) => format!("work_dir {}", rule.written.display()),
        _ => format!("unveil {spelled}"),
    }
}

pub fn spelled(rule: &Rule) -> String {
    format!("{}:{}", rule.access, rule.written.display())
}

pub fn whose(source: Source) -> &'static str {
    match source {
        Source::Plugin => "unveil_paths",
        Source::Driver => "the driver",
        Source::Task => "the job",
        Source::Default => "the defaults",
    }
}

/// In the launcher's words.
pub fn problem(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let mut characters = text.chars();
    let first = characters.next().map(|first| first.to_ascii_lowercase());
    first.into_iter().chain(characters).collect()
}

/// Whether a volume or a device of the task's lies there.
pub fn is_laid_over(order: &Order, path: &Path) -> bool {
    order.binds.iter().any(|bind| match &bind.target {
        Place::Host(target) => path.starts_with(target),
        Place::Task(_) => false,
    })
}

/// CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
pub const PASSES: u64 = 1 << 1 | 1 << 2;

/// Whether a user passes all directories above a path, by their modes.
pub fn reaches(path: &Path, uid: u32, gid: u32) -> bool {
    uid == 0
        || path
            .ancestors()
            .skip(1)
            .all(|dir| may_execute(dir, uid, gid))
}

/// Whether a user may pass a directory or execute a file; what an ACL lets them do is the kernel's to tell.
pub fn may_execute(path: &Path, uid: u32, gid: u32) -> bool {
    let Ok(meta) = fs::metadata(path) else {
        return false;
    };
    let shift = match (meta.uid() == uid, meta.gid() == gid) {
        (true, _) => 6,
        (_, true) => 3,
        _ => 0,
    };
    let is_roots = uid == 0 && meta.mode() & 0o111 != 0;
    is_roots || meta.mode() >> shift & 1 != 0 || has_acl(path)
}

fn has_acl(path: &Path) -> bool {
    getxattr(path, "system.posix_acl_access", &mut [0_u8; 0]).is_ok_and(|bytes| bytes > 0)
}

/// Paths that a rule brings back into the view or unmasks by its very name, beside opening them.
fn has_other_effect(path: &Path) -> bool {
    ["/run", "/var/run", "/tmp", "/dev/shm", "/proc"]
        .iter()
        .any(|top| path.starts_with(top))
}

fn covering<'a>(one: &Seen<'_>, index: usize, all: &'a [Seen<'a>]) -> Option<&'a Seen<'a>> {
    let asked = match one.is_file {
        true => Access {
            create: false,
            ..one.rule.access
        },
        false => one.rule.access,
    };
    all.iter().enumerate().find_map(|(other, it)| {
        // Of two for one path by different names only the later one is told of.
        let is_above = it.real != one.real && one.real.starts_with(&it.real);
        let is_twin = it.real == one.real && other < index;
        let is_open = includes(it.rule.access, asked);
        // The view makes writable only what is unveiled by others than the defaults.
        let writes = asked.write || asked.create;
        let is_effective = !writes || it.rule.source != Source::Default;
        ((is_above || is_twin) && is_open && is_effective).then_some(it)
    })
}

pub fn includes(all: Access, part: Access) -> bool {
    (all.read || !part.read)
        && (all.write || !part.write)
        && (all.execute || !part.execute)
        && (all.create || !part.create)
}

/// What this host says of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Found(String),
    /// In a directory of the task's own, or on a volume: only a start can tell.
    Own,
    /// In the launcher's words.
    Wrong(String),
}

/// Finds the command as the launcher does, as far as the host's files tell.
pub fn command(order: &Order) -> Command {
    let mut denied = None;
    for candidate in candidates(&order.command, &order.env) {
        let path = Path::new(&candidate);
        let is_own = path.is_relative()
            || path.starts_with(&order.task_dir.path)
            || (path.starts_with("/tmp") && !path.exists());
        if is_laid_over(order, path) || is_own {
            return Command::Own;
        }
        let Ok(real) = fs::canonicalize(path) else {
            continue;
        };
        let (uid, gid) = (order.uid, order.gid);
        let is_program = fs::metadata(&real).is_ok_and(|meta| meta.is_file())
            && (order.ambient & PASSES != 0
                || may_execute(&real, uid, gid) && reaches(&real, uid, gid));
        let is_open = order.rules.iter().any(|rule| match &rule.place {
            Place::Host(open) => {
                rule.access.execute
                    && fs::canonicalize(open).is_ok_and(|open| real.starts_with(open))
            }
            Place::Task(_) => false,
        });
        if is_program && is_open {
            return Command::Found(candidate);
        }
        denied.get_or_insert(candidate);
    }
    let name = &order.command;
    let sentence = match (denied, search_path(&order.command, &order.env)) {
        (Some(found), search) => {
            let found = search.map_or(String::new(), |_| format!("found as {found}; "));
            format!(
                "command {name:?}: permission denied ({found}is it unveiled with \"rx\", its interpreter and libraries too, and executable by uid {}?)",
                order.uid
            )
        }
        (None, Some(path)) => format!("command {name:?}: not found in PATH {path:?}"),
        (None, None) => format!("command {name:?}: no such file or directory"),
    };
    Command::Wrong(sentence)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::unveil;

    fn told(entries: &[&str]) -> Vec<(bool, String)> {
        let entries: Vec<String> = entries.iter().map(|entry| (*entry).to_owned()).collect();
        let rules = unveil::operators(&entries).unwrap();
        of_rules(&rules, Mode::OfOperator(Useless::Told))
            .into_iter()
            .map(|finding| (finding.is_error, finding.sentence))
            .collect()
    }

    #[test]
    fn what_is_wrong_with_an_entry_is_told_with_its_remedy() {
        assert!(told(&["r:/etc", "rw:/var/lib", "rw:/etc/hostname"]).is_empty());
        let error = |sentence: &str| (true, sentence.to_owned());
        let warning = |sentence: &str| (false, sentence.to_owned());
        assert_eq!(
            told(&["r:/no/such"]),
            [error(
                "r:/no/such: no such file or directory; correct the path, or make what it names"
            )]
        );
        assert_eq!(
            told(&["c:/etc/hosts", "rc:/etc/hosts"])[..1],
            [error(
                "c:/etc/hosts: \"c\" allows nothing on a file; it is for directories"
            )]
        );
        assert_eq!(
            told(&["rc:/etc/hosts"]),
            [warning(
                "rc:/etc/hosts: \"c\" has no effect on a file; leave the letter out"
            )]
        );
        assert_eq!(
            told(&["rx:/etc", "r:/etc/hosts"]),
            [warning(
                "r:/etc/hosts: all of it is open already by rx:/etc of unveil_paths; leave the entry out"
            )]
        );
    }
}
