//! `run --learn`: what the command has to have unveiled. It runs with everything unveiled, and is watched.

mod calls;
mod list;
mod look;
mod prune;
mod trace;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Instant;

use clap::Args;

use self::list::{Entry, Ground, List, list};
use self::prune::End;
use self::trace::{Traced, Unseen};
use super::attend::{Attendance, By};
use super::{RunError, Subject, Unveil};
use crate::cli::terminal::{Stops, say};
use crate::plan::managers::leads_to_manager;
use crate::plan::steps::{Access, Order, Place, Source};
use crate::plan::unveil;
use crate::task::Tracing;
use crate::task::types::ExitResult;

/// What the command is given to learn what it uses.
pub const EVERYTHING: &str = "rwxc:/";
/// Of hidden paths that were missed, in one sentence.
const MOST_MISSED: usize = 5;

/// How to learn what a command has to have unveiled.
#[derive(Debug, Args)]
#[command(next_help_heading = "To learn what to unveil")]
pub struct Learn {
    /// Run with everything unveiled, and print an `unveil` list under which the command could do what it did; to
    /// standard error, or into FILE
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        require_equals = true
    )]
    learn: Option<Option<PathBuf>>,
    /// Run a command that ends with status 0 again without each entry and each letter, and leave out those without which it still does, and prints the same if it does so twice
    #[arg(long, requires = "learn")]
    prune: bool,
    /// Say by a shell command when a server works: it is tried until it succeeds, and then the task is stopped
    #[arg(long, value_name = "COMMAND", requires = "learn")]
    probe: Option<String>,
}

/// Where the list goes.
#[derive(Debug)]
pub enum Target {
    Stderr,
    File(PathBuf, File),
}

impl Learn {
    /// The list's file, before anything is run. An earlier list stays in it until there is a new one.
    pub fn list(&self) -> Result<Option<Target>, RunError> {
        let path = match &self.learn {
            None => return Ok(None),
            Some(None) => return Ok(Some(Target::Stderr)),
            Some(Some(path)) => path.clone(),
        };
        let mut options = File::options();
        match options.write(true).create(true).truncate(false).open(&path) {
            Ok(file) => Ok(Some(Target::File(path, file))),
            Err(error) => Err(RunError::List { path, error }),
        }
    }
}

impl Target {
    fn write(self, text: &str) -> Result<(), RunError> {
        match self {
            // As with all that is said, nobody may read.
            Target::Stderr => {
                let _ = io::stderr().write_all(text.as_bytes());
                Ok(())
            }
            Target::File(path, mut file) => {
                let is_file = file.metadata().is_ok_and(|about| about.is_file());
                let cut = if is_file { file.set_len(0) } else { Ok(()) };
                cut.and_then(|()| file.write_all(text.as_bytes()))
                    .map_err(|error| RunError::List { path, error })
            }
        }
    }
}

pub async fn learn(
    mut subject: Subject<'_>,
    options: &Learn,
    target: Target,
    stops: &mut Stops,
) -> Result<ExitResult, RunError> {
    let begun = Instant::now();
    let (send, receive) = mpsc::channel();
    let tracing = Tracing {
        calls: calls::numbers(),
        attach: Box::new(move |helper, order| {
            let tracer = trace::attach(helper).map_err(explained)?;
            let _ = send.send((tracer, order.clone()));
            Ok(())
        }),
    };
    let attendance = Attendance {
        tracing: Some(tracing),
        probe: options.probe.as_deref(),
        ..Attendance::default()
    };
    let attended = subject.once(Unveil::Everything, attendance, stops).await?;
    let took = begun.elapsed();
    let Some((traced, order)) = receive.try_recv().ok().and_then(joined) else {
        return Err(io::Error::other("the tracer ended before the command").into());
    };
    let listed = list(&traced.seen, &ground(&order));
    remark(&traced, &order, &listed);
    let List {
        mut entries,
        proc_files,
        ..
    } = listed;
    let mut state = State::Learned;
    let end = End::of(&attended);
    if options.prune && attended.by == By::Person {
        say(
            "the command was stopped before it ended: there is no end to compare, and nothing is pruned",
        );
    } else if options.probe.is_some() && attended.by == By::Itself {
        let pruned = match options.prune {
            true => ", and nothing is pruned",
            false => "",
        };
        say(format_args!(
            "--probe: the command ended before it succeeded{pruned}; see why it ended"
        ));
    } else if options.prune && !end.is_success() {
        say(format_args!(
            "the command comes to {}: without an entry it may do so as well and have done nothing, and nothing is pruned. Have it end with 0 when it has worked, or say with --probe when it works",
            end.described()
        ));
    } else if options.prune {
        if let Some(job) = &mut subject.job {
            job.is_told = true;
        }
        let pruning = prune::Pruning::new(&subject, &attended, took, options.probe.as_deref());
        // What was learned is not lost with an attempt that cannot be made.
        match pruning.prune(entries.clone(), stops).await {
            Ok(pruned) => {
                entries = pruned;
                state = State::Pruned;
            }
            Err(prune::Unpruned(why)) => say(why),
        }
    }
    target.write(&hcl(&comments(state, &entries, &proc_files), &entries))?;
    Ok(attended.exit)
}

fn joined((tracer, order): (JoinHandle<Traced>, Order)) -> Option<(Traced, Order)> {
    Some((tracer.join().ok()?, order))
}

fn explained(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::other(format!(
            "{error}; --learn needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3"
        )),
        _ => error,
    }
}

/// What is open whatever the list says.
fn ground(order: &Order) -> Ground {
    let task_dir = order.task_dir.path.clone();
    let place = |place: &Place| match place {
        Place::Task(own) => task_dir.join(own),
        Place::Host(path) => without_links(path),
    };
    let mut ground = Ground {
        task_dir: task_dir.clone(),
        private: vec!["/tmp".into(), "/dev/shm".into()],
        ..Ground::default()
    };
    for rule in &order.rules {
        let path = place(&rule.place);
        match rule.source {
            Source::Task if path == Path::new("/") || rule.place == order.work_dir => {}
            Source::Task => ground.given.push(path),
            Source::Default => {}
            Source::Driver | Source::Plugin => ground.open.push((path, rule.access)),
        }
    }
    if let Place::Host(dir) = &order.work_dir {
        ground
            .open
            .push((without_links(dir), unveil::letters("rwxc")));
    }
    // All of them, also where an entry of the caller took one's place.
    let defaults = unveil::DEFAULTS
        .iter()
        .flat_map(|(mode, paths)| paths.iter().map(move |path| (path, unveil::letters(mode))));
    let defaults: Vec<(PathBuf, Access)> = defaults
        .map(|(path, access)| (without_links(Path::new(path)), access))
        .collect();
    ground.defaults = defaults;
    ground
}

fn without_links(path: &Path) -> PathBuf {
    // Links there lead to what is open in this very process.
    if path.starts_with("/dev") {
        return path.to_owned();
    }
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// Says what the list does not.
fn remark(traced: &Traced, order: &Order, list: &List) {
    list.remarks.iter().for_each(say);
    if let Some(error) = &traced.broken_off {
        say(format_args!(
            "the tracer failed and the command was killed with it ({error}): the list ends there"
        ));
    }
    for unseen in &traced.unseen {
        match unseen {
            Unseen::IoUring => say(
                "the command uses io_uring: no call tells which files it opens that way, so the list may lack some",
            ),
            Unseen::Foreign => say(
                "the command makes system calls of another architecture or ABI (a 32-bit program?): the list lacks what they did",
            ),
            // Only root in the host's network is kept from them.
            Unseen::AbstractSocket if order.uid == 0 && order.network_namespace.is_none() => say(
                "the command connects to an abstract Unix socket, which no list opens to root but one with w:/ or c:/",
            ),
            Unseen::AbstractSocket => {}
        }
    }
    let missed: Vec<String> = traced
        .missed
        .iter()
        .filter(|path| is_hidden(path, order.uid))
        .take(MOST_MISSED)
        .map(|path| path.display().to_string())
        .collect();
    if !missed.is_empty() {
        say(format_args!(
            "hidden from the command, which looked for it: {}; if it is to have it, learn again with --unveil",
            missed.join(", ")
        ));
    }
}

/// Whether it is the view that made something missing.
fn is_hidden(path: &Path, uid: u32) -> bool {
    let is_there = |path: &Path| fs::symlink_metadata(path).is_ok();
    match uid {
        0 => is_there(path) || path.parent().is_some_and(is_there),
        _ => leads_to_manager(path) && is_there(path),
    }
}

/// How a list came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Learned,
    Pruned,
}

/// What is to be known by who takes the list.
fn comments(state: State, entries: &[Entry], proc_files: &BTreeSet<String>) -> Vec<String> {
    let (whole, instead) = match state {
        State::Learned => (
            "what the command used; it may be able to do without some of it (see --prune)",
            "--prune tells whether the command can do without",
        ),
        State::Pruned => (
            "without any letter of it the command ends otherwise",
            "a smaller entry does for a program that is the command itself, or that a script executes in its place by `exec`",
        ),
    };
    let mut comments = vec![whole.to_owned()];
    let opens_maps =
        |entry: &&Entry| entry.access.write && Path::new("/proc").starts_with(&entry.path);
    if let Some(entry) = entries.iter().find(opens_maps) {
        let files: Vec<String> = proc_files
            .iter()
            .map(|name| format!("/proc/PID/{name}"))
            .collect();
        let what_for = match files.is_empty() {
            true => String::new(),
            false => format!("is for {}, and ", files.join(", ")),
        };
        comments.push(format!(
            "the w of {entry} {what_for}lets the task create user namespaces, too: {instead}"
        ));
    }
    if entries.iter().any(|entry| is_template(&entry.to_string())) {
        comments.push(
            "Nomad reads a job's strings twice, and a path that has ${ or %{ is written so that it comes out right; --unveil takes it as it is".into(),
        );
    }
    comments
}

fn is_template(text: &str) -> bool {
    text.contains("${") || text.contains("%{")
}

/// As it stands in a job file.
fn hcl(comments: &[String], entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "unveil = []\n".into();
    }
    let comments: String = comments.iter().map(|line| format!("// {line}\n")).collect();
    let mut text = format!("{comments}unveil = [\n");
    for entry in entries {
        text += &format!("  {},\n", quoted(&entry.to_string()));
    }
    text + "]\n"
}

/// A string of HCL in a task's `config`. Nomad reads it when it reads the file, and what came of that again as a template when the task
/// is started: what would begin something stands in a string of an interpolation that the first reading leaves alone.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let after = rest.trim_start_matches(['$', '%']);
        let marks = &rest[..rest.len() - after.len()];
        if !marks.is_empty() {
            match after.starts_with('{') {
                true => quoted += &format!("$${{\\\"{marks}\\\"}}"),
                false => quoted += marks,
            }
            rest = after;
            continue;
        }
        rest = &rest[character.len_utf8()..];
        match character {
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '"' | '\\' => quoted.extend(['\\', character]),
            _ if character.is_control() => quoted += &format!("\\u{:04x}", character as u32),
            _ => quoted.push(character),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::job::RunTime;
    use std::collections::BTreeMap;

    fn entries(paths: &[&str]) -> Vec<Entry> {
        let entry = |path: &&str| Entry {
            access: unveil::letters("rw"),
            path: path.into(),
        };
        paths.iter().map(entry).collect()
    }

    #[test]
    fn a_task_gets_each_path_as_it_is_whatever_is_in_it() {
        let paths = [
            "/a b",
            "/a\"b\\c",
            "/a\\b\\f\\u0041\u{c}",
            "/${x}%{y}",
            "/$${x}$%%{if y}$ %% $$z%",
            "/${\"\\",
            "/a\nb\tc\u{8}\u{1}\u{85}",
            "/ä${",
            "/$",
        ];
        let text = hcl(&["one".into(), "two".into()], &entries(&paths));
        assert!(text.starts_with("// one\n// two\nunveil = [\n"), "{text}");
        let context = hcl::eval::Context::new();
        let body: BTreeMap<String, Vec<String>> = hcl::eval::from_str(&text, &context).unwrap();
        let run_time = RunTime::new(BTreeMap::new());
        for (item, path) in body["unveil"].iter().zip(paths) {
            let read = run_time.string(item, 1).unwrap();
            assert_eq!(read, format!("rw:{path}"), "{text}");
        }
        assert_eq!(body["unveil"].len(), paths.len());
        assert_eq!(hcl(&["c".into()], &[]), "unveil = []\n");
    }

    #[test]
    fn who_takes_the_list_is_told_what_else_it_opens() {
        let files = BTreeSet::from(["coredump_filter".to_owned()]);
        let of = |state, paths: &[&str]| comments(state, &entries(paths), &files)[1..].join("\n");
        for state in [State::Learned, State::Pruned] {
            let told = of(state, &["/a", "/proc"]);
            assert!(told.starts_with("the w of rw:/proc is for /proc/PID/coredump_filter, and lets the task create user namespaces"), "{told}");
            assert_eq!(of(state, &["/a", "/proc/self/coredump_filter"]), "");
            assert!(of(state, &["/%{x}"]).contains("twice"));
        }
    }
}
