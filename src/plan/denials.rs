//! Why Landlock denied something, and what would allow it: from the rights that were missing, the path, and what is unveiled.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use super::steps::{Access, Denials, Place, Source};
use super::unveil::{self, Alias, ByTask, Defaults, Gate};
use crate::config::plugin::PluginConfig;
use crate::text::{UnitText, one_line};

/// The first ABI of Landlock that tells of denials (Linux 6.15).
pub const FIRST_ABI: u32 = 7;

/// Of a path or an entry in a sentence.
const PATH_BYTES: usize = 400;

/// Whether the kernel is told to log what it denies to a task. It does so only while audit is on, which may be later.
pub fn logged(config: &PluginConfig, landlock_abi: Option<u32>) -> Denials {
    if config.report_denials && landlock_abi.is_some_and(|abi| abi >= FIRST_ABI) {
        Denials::Logged
    } else {
        Denials::Unlogged
    }
}

/// A right by the kernel's name for it, what a process does that needs it, and the letters of a mode that give it.
const RIGHTS: [(&str, &str, &str); 20] = [
    ("fs.read_file", "read", "r"),
    ("fs.read_dir", "list", "r"),
    ("fs.write_file", "write to", "w"),
    ("fs.truncate", "truncate", "w"),
    ("fs.execute", "execute", "x"),
    // Whoever makes a file writes to it.
    ("fs.make_reg", "make a file in", "wc"),
    ("fs.make_dir", "make a directory in", "c"),
    ("fs.make_sym", "make a symbolic link in", "c"),
    ("fs.make_fifo", "make a FIFO in", "c"),
    ("fs.make_sock", "make a socket in", "c"),
    ("fs.remove_file", "remove a file from", "c"),
    ("fs.remove_dir", "remove a directory from", "c"),
    ("fs.refer", "move or link between directories at", "c"),
    ("fs.make_char", "make a device node in", ""),
    ("fs.make_block", "make a device node in", ""),
    ("fs.change_topology", "change the mounts at", ""),
    ("fs.ioctl_dev", "control the device", ""),
    ("fs.resolve_unix", "connect to the socket", ""),
    ("ptrace", "trace a process", ""),
    ("scope.abstract_unix_socket", "reach an abstract socket", ""),
];

/// The letters that give a right; none if no mode does.
pub fn letters(right: &str) -> &'static str {
    let found = RIGHTS.iter().find(|(name, ..)| *name == right);
    found.map_or("", |(_, _, letters)| letters)
}

/// What is unveiled, as far as it makes a difference to the entry that allows more.
#[derive(Debug, Clone, Copy)]
pub struct Unveiled<'a> {
    pub config: &'a PluginConfig,
    /// The job's entries.
    pub entries: &'a [String],
    /// As the task sees it.
    pub task_dir: &'a Path,
}

/// What was denied to a task.
#[derive(Debug, Clone, Copy)]
pub struct Denied<'a> {
    /// As the process called itself; empty if it is not known.
    pub process: &'a OsStr,
    /// By the kernel's names.
    pub rights: &'a [String],
    pub path: Option<&'a Path>,
}

/// What would allow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    Entry {
        /// `mode:path`.
        entry: String,
        whose: Whose,
        /// The entry on the same path whose place it takes: of two, the first counts.
        instead_of: Option<String>,
    },
    /// Why no entry does.
    Nothing(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// In the job's `unveil`.
    Job,
    /// In the operator's `unveil_paths`.
    Operator,
}

impl Denied<'_> {
    pub fn remedy(&self, unveiled: Unveiled<'_>) -> Remedy {
        let letters: Vec<&str> = self.rights.iter().map(|right| letters(right)).collect();
        if letters.iter().any(|letters| letters.is_empty()) {
            return Remedy::Nothing(self.reason());
        }
        let Some(path) = self.path.filter(|path| path.is_absolute()) else {
            return Remedy::Nothing("it has no path");
        };
        let Some(text) = path.to_str() else {
            return Remedy::Nothing("its path is not UTF-8");
        };
        if text.ends_with(" (deleted)") {
            return Remedy::Nothing("it is deleted");
        }
        entry(unveil::letters(&letters.concat()), path, unveiled)
    }

    /// Why no mode gives what was missing.
    fn reason(&self) -> &'static str {
        let lacks = |name: &str| self.rights.iter().any(|right| right == name);
        if lacks("ptrace") {
            return "a task and each session in it trace only their own processes";
        }
        if lacks("scope.abstract_unix_socket") {
            return "root in the host's network reaches only the task's own";
        }
        if lacks("fs.change_topology") {
            return "no task mounts anything";
        }
        "no mode has that right"
    }

    /// The missing rights, as the kernel lists them.
    pub fn access(&self) -> String {
        UnitText::new(&self.rights.join(",")).to_string()
    }

    /// Empty without one.
    pub fn shown_path(&self) -> String {
        let path = self.path.map(|path| path.to_string_lossy());
        one_line(&path.unwrap_or_default(), PATH_BYTES)
    }

    pub fn sentence(&self, remedy: &Remedy) -> String {
        format!("{self}; {remedy}")
    }
}

impl Remedy {
    /// `mode:path`; empty without one, and where it cannot be taken as it is shown.
    pub fn shown_entry(&self) -> String {
        match self {
            Remedy::Entry { entry, .. } if is_plain(entry) => entry.clone(),
            Remedy::Entry { .. } | Remedy::Nothing(_) => String::new(),
        }
    }
}

/// Whether a text is the same in a sentence, between quotes of a job file and on one line. A task may name a file
/// `x", "rwxc:/`, and somebody is to copy what is told.
fn is_plain(text: &str) -> bool {
    let means_something = ["\"", "\\", "${", "%{"];
    one_line(text, PATH_BYTES) == text && !means_something.iter().any(|it| text.contains(it))
}

fn entry(missing: Access, path: &Path, unveiled: Unveiled<'_>) -> Remedy {
    let aliases = [Alias::new(unveiled.task_dir, "")];
    let path = of_all_processes(path);
    let place = match unveil::own_place(&path, &aliases) {
        Some(own) => Place::Task(own),
        None => Place::Host(path),
    };
    let by_task = unveiled.config.unveil_by_task;
    let gate = Gate {
        paths: &unveiled.config.unveil_paths,
        volumes: &[],
        defaults: if unveiled.config.unveil_defaults {
            Defaults::Unveiled
        } else {
            Defaults::Veiled
        },
        by_task: ByTask::Allowed,
    };
    let rules = unveil::rules(gate, unveiled.entries, &aliases);
    let rules = rules.map(|(rules, _)| rules).unwrap_or_default();
    let same = rules
        .into_iter()
        .find(|rule| unveil::spelled_once(&rule.place) == unveil::spelled_once(&place));
    let has = same.as_ref().map(|rule| rule.access).unwrap_or_default();
    let mode = Access {
        read: has.read || missing.read,
        write: has.write || missing.write,
        execute: has.execute || missing.execute,
        create: has.create || missing.create,
    };
    let whose = match same.as_ref().map(|rule| rule.source) {
        Some(Source::Plugin | Source::Driver) => Whose::Operator,
        _ if by_task => Whose::Job,
        _ => Whose::Operator,
    };
    let written = match place.as_path() {
        path if path == Path::new("") => Path::new("."),
        path => path,
    };
    Remedy::Entry {
        entry: format!("{mode}:{}", written.display()),
        whose,
        instead_of: same
            .filter(|rule| matches!(rule.source, Source::Plugin | Source::Task))
            .map(|rule| format!("{}:{}", rule.access, rule.written.display())),
    }
}

/// `/proc` for what is a process' own there: its number is another one next time.
fn of_all_processes(path: &Path) -> PathBuf {
    let mut parts = path.components().skip(1);
    let is_number = |part: Component<'_>| {
        let name = part.as_os_str().as_encoded_bytes();
        !name.is_empty() && name.iter().all(u8::is_ascii_digit)
    };
    let is_a_process = parts.next() == Some(Component::Normal(OsStr::new("proc")))
        && parts.next().is_some_and(is_number);
    if is_a_process {
        "/proc".into()
    } else {
        path.to_owned()
    }
}

/// `Landlock denied cat to read /etc/passwd`.
impl fmt::Display for Denied<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let process = match self.process.to_string_lossy() {
            name if name.is_empty() => "a process".into(),
            name => name,
        };
        write!(f, "Landlock denied {} to ", UnitText::new(&process))?;
        let mut seen: Vec<&str> = Vec::new();
        for right in self.rights {
            let verb = RIGHTS.iter().find(|(name, ..)| name == right);
            let verb = verb.map_or(right.as_str(), |(_, verb, _)| verb);
            if seen.contains(&verb) {
                continue;
            }
            let and = if seen.is_empty() { "" } else { " and " };
            write!(f, "{and}{}", UnitText::new(verb))?;
            seen.push(verb);
        }
        match self.path {
            Some(_) => write!(f, " {}", self.shown_path()),
            None => Ok(()),
        }
    }
}

/// `unveil = ["r:/etc/passwd"] would allow it`.
impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whose, instead_of) = match self {
            Remedy::Nothing(reason) => {
                return write!(f, "no unveil entry would allow it, as {reason}");
            }
            Remedy::Entry {
                whose, instead_of, ..
            } => (whose, instead_of),
        };
        let key = match whose {
            Whose::Job => "unveil",
            Whose::Operator => "the operator's unveil_paths",
        };
        let shown = self.shown_entry();
        match instead_of {
            _ if shown.is_empty() => write!(
                f,
                "an entry in {key} would allow it, but this path has characters to be written by hand"
            ),
            Some(old) => write!(
                f,
                "\"{}\" in place of \"{}\" in {key} would allow it",
                shown,
                one_line(old, PATH_BYTES)
            ),
            None => write!(f, "\"{shown}\" in {key} would allow it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PluginConfig {
        PluginConfig {
            unveil_by_task: true,
            ..PluginConfig::default()
        }
    }

    /// Rights are words; what is unveiled is the job's.
    fn told(config: &PluginConfig, entries: &[&str], rights: &str, path: &str) -> String {
        let rights: Vec<String> = rights.split(' ').map(str::to_owned).collect();
        let entries: Vec<String> = entries.iter().map(|entry| (*entry).to_owned()).collect();
        let denied = Denied {
            process: "cat".as_ref(),
            rights: &rights,
            path: Some(Path::new(path)).filter(|path| *path != Path::new("")),
        };
        let remedy = denied.remedy(Unveiled {
            config,
            entries: &entries,
            task_dir: Path::new("/m/web"),
        });
        denied.sentence(&remedy)
    }

    #[test]
    fn a_denial_is_a_sentence_with_the_entry_that_would_allow_it() {
        for (rights, path, sentence) in [
            (
                "fs.read_file",
                "/etc/passwd",
                r#"read /etc/passwd; "r:/etc/passwd" in unveil would allow it"#,
            ),
            (
                "fs.execute fs.read_file",
                "/opt/x",
                r#"execute and read /opt/x; "rx:/opt/x" in unveil would allow it"#,
            ),
            (
                "fs.make_dir",
                "/srv",
                r#"make a directory in /srv; "c:/srv" in unveil would allow it"#,
            ),
            (
                "fs.make_reg",
                "/srv",
                r#"make a file in /srv; "wc:/srv" in unveil would allow it"#,
            ),
            (
                "fs.write_file fs.truncate",
                "/srv/x",
                r#"write to and truncate /srv/x; "w:/srv/x" in unveil would allow it"#,
            ),
        ] {
            assert_eq!(
                told(&config(), &[], rights, path),
                format!("Landlock denied cat to {sentence}")
            );
        }
    }

    #[test]
    fn what_is_the_tasks_own_is_named_relative_to_its_directory() {
        let own = |path| told(&config(), &[], "fs.read_dir", path);
        assert!(own("/m/web").ends_with(r#"; "r:." in unveil would allow it"#));
        assert!(own("/m/web/x y").ends_with(r#"; "r:x y" in unveil would allow it"#));
        assert!(own("/m/webs").ends_with(r#"; "r:/m/webs" in unveil would allow it"#));
    }

    #[test]
    fn an_entry_on_the_same_path_is_replaced_as_only_the_first_counts() {
        let widened = told(&config(), &["r:/data/"], "fs.write_file", "/data");
        assert!(
            widened.ends_with(r#"; "rw:/data" in place of "r:/data/" in unveil would allow it"#),
            "{widened}"
        );
        // A default is replaced by any entry on its path, and keeps its letters in it.
        let default = told(&config(), &[], "fs.write_file", "/dev/urandom");
        assert!(default.ends_with(r#"; "rw:/dev/urandom" in unveil would allow it"#));
    }

    #[test]
    fn what_only_the_operator_can_allow_is_told_so() {
        let strict = PluginConfig::default();
        assert!(
            told(&strict, &[], "fs.read_file", "/etc/passwd")
                .ends_with(r#"; "r:/etc/passwd" in the operator's unveil_paths would allow it"#)
        );
        let ruled = PluginConfig {
            unveil_paths: vec!["r:/data".into()],
            ..config()
        };
        assert!(told(&ruled, &["rw:/data"], "fs.write_file", "/data").ends_with(
            r#"; "rw:/data" in place of "r:/data" in the operator's unveil_paths would allow it"#
        ));
    }

    #[test]
    fn a_process_own_files_are_those_of_all_processes() {
        let veiled = PluginConfig {
            unveil_defaults: false,
            ..config()
        };
        let told = |path| told(&veiled, &[], "fs.read_file", path);
        assert!(told("/proc/5270/mounts").ends_with(r#"; "r:/proc" in unveil would allow it"#));
        assert!(told("/proc/sys/x").ends_with(r#"; "r:/proc/sys/x" in unveil would allow it"#));
    }

    #[test]
    fn what_no_entry_allows_is_told_with_the_reason() {
        for (rights, path, reason) in [
            ("fs.make_char", "/dev", "no mode has that right"),
            ("fs.change_topology", "/", "no task mounts anything"),
            (
                "ptrace",
                "",
                "a task and each session in it trace only their own processes",
            ),
            (
                "scope.abstract_unix_socket",
                "",
                "root in the host's network reaches only the task's own",
            ),
            ("net.connect_tcp", "", "no mode has that right"),
            ("fs.read_file", "", "it has no path"),
            ("fs.execute", "/memfd:x (deleted)", "it is deleted"),
            ("fs.later fs.read_file", "/x", "no mode has that right"),
        ] {
            let told = told(&config(), &[], rights, path);
            assert!(
                told.ends_with(&format!("; no unveil entry would allow it, as {reason}")),
                "{told}"
            );
        }
    }

    #[test]
    fn nothing_that_acts_on_a_reader_is_in_a_sentence() {
        let told = told(&config(), &[], "fs.read_file", "/x\n\u{202e}y");
        assert!(told.contains("read /x<U+000A><U+202E>y; "), "{told}");
    }

    #[test]
    fn an_entry_that_would_not_be_read_as_it_is_shown_is_not_shown() {
        let long = format!("/{}", "x".repeat(PATH_BYTES));
        for path in [
            "/x\ny",
            "/vol/x\", \"rwxc:/",
            "/x\\u0041",
            "/${x}",
            "/%{x}",
            &long,
        ] {
            let told = told(&config(), &[], "fs.read_file", path);
            assert!(
                told.ends_with("; an entry in unveil would allow it, but this path has characters to be written by hand"),
                "{told}"
            );
        }
    }

    #[test]
    fn the_kernel_logs_where_it_can_and_the_operator_wants_it() {
        let off = PluginConfig {
            report_denials: false,
            ..config()
        };
        assert_eq!(logged(&config(), Some(7)), Denials::Logged);
        assert_eq!(logged(&config(), Some(6)), Denials::Unlogged);
        assert_eq!(logged(&config(), None), Denials::Unlogged);
        assert_eq!(logged(&off, Some(10)), Denials::Unlogged);
    }
}
