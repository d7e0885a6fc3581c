//! From what a command did to a list that allows it, and in which each entry allows something that no other does. Pure: every path in it is the kernel's own, without links.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::plan::managers::leads_to_manager;
use crate::plan::steps::Access;
use crate::plan::unveil;

/// More files than this in one directory, each only read or executed, are listed as the directory.
pub const MOST_FILES: usize = 16;

const ROOT: &str = "/";
const PROC: &str = "/proc";
/// Of use only to who may create user namespaces, which goes by /proc itself.
const MAPS: [&str; 4] = ["uid_map", "gid_map", "projid_map", "setgroups"];

/// What was done at one path. What the command made itself counts as done at the directory in which it was made: there will be no
/// such file for an entry to name when it is run again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Use {
    pub access: Access,
    /// Of owner, mode, times or attributes: no right is asked for, but the view must not be read-only.
    pub changes: bool,
    /// To a socket: no right is asked for, but it must be there.
    pub connects: bool,
}

/// All that was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub uses: BTreeMap<PathBuf, Use>,
    /// Files that went, or were linked, from one directory to another.
    pub moves: BTreeSet<(PathBuf, PathBuf)>,
    /// The directory below /proc of the task's first process.
    pub first: Option<PathBuf>,
}

/// What is open without any entry of the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ground {
    pub open: Vec<(PathBuf, Access)>,
    /// An entry for one of these very paths takes its place.
    pub defaults: Vec<(PathBuf, Access)>,
    /// The task has its own in place of the host's.
    pub private: Vec<PathBuf>,
    /// What the command was given on top, and may have brought back what is hidden.
    pub given: Vec<PathBuf>,
    pub task_dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub access: Access,
    pub path: PathBuf,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.access, self.path.display())
    }
}

/// The list, by path, and what has to be known about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    pub entries: Vec<Entry>,
    pub remarks: Vec<String>,
    /// The names of files of processes for which /proc is to be writable.
    pub proc_files: BTreeSet<String>,
}

type Needs = BTreeMap<PathBuf, Access>;

impl Ground {
    fn grants(&self, path: &Path) -> Access {
        let is_given = self.given.iter().any(|given| path.starts_with(given));
        if !is_given && self.private.iter().any(|own| path.starts_with(own)) {
            return unveil::letters("rwxc");
        }
        let rules = self.open.iter().chain(&self.defaults);
        granted(rules.map(|(at, access)| (at, *access)), path)
    }
}

/// Rules on a path and on all above it unite.
fn granted<'a>(rules: impl Iterator<Item = (&'a PathBuf, Access)>, path: &Path) -> Access {
    rules
        .filter(|(at, _)| path.starts_with(at))
        .fold(Access::default(), |all, (_, access)| all.with(access))
}

fn granted_by(needs: &Needs, path: &Path) -> Access {
    granted(needs.iter().map(|(at, access)| (at, *access)), path)
}

fn add(needs: &mut Needs, path: &Path, access: Access) {
    if !access.is_none() {
        let entry = needs.entry(path.to_owned()).or_default();
        *entry = entry.with(access);
    }
}

pub fn list(seen: &Seen, ground: &Ground) -> List {
    let (mut remarks, mut proc_files) = (Vec::new(), BTreeSet::new());
    let mut needs = accesses(seen, ground, &mut remarks, &mut proc_files);
    moves(seen, ground, &mut needs, &mut remarks);
    changes(seen, ground, &mut needs);
    let mut needs = uncovered(needs);
    crowds(&mut needs, &mut remarks);
    let mut entries = Vec::new();
    for (path, access) in uncovered(needs) {
        if path.to_str().is_none() {
            remarks.push(format!(
                "{}: no job file can name it, as it is not UTF-8; it is not in the list",
                path.display()
            ));
            continue;
        }
        let default = ground.defaults.iter().filter(|(at, _)| *at == path);
        let access = default.fold(access, |all, (_, access)| all.with(*access));
        let path = match path.strip_prefix(&ground.task_dir) {
            Ok(own) if own == Path::new("") => ".".into(),
            Ok(own) if !ground.task_dir.as_os_str().is_empty() => own.to_owned(),
            _ => path,
        };
        entries.push(Entry { access, path });
    }
    List {
        entries,
        remarks,
        proc_files,
    }
}

/// What can be named in a list, for what comes and goes: a process' directory, a terminal, and who makes terminals.
fn lasting(path: &Path, seen: &Seen) -> PathBuf {
    // A rule on it is on the file of the process that becomes the command, whatever that executes.
    let of_first = path
        .file_name()
        .filter(|_| path.parent() == seen.first.as_deref());
    if let Some(name) = of_first
        && !MAPS.iter().any(|map| name == *map)
    {
        return Path::new(PROC).join("self").join(name);
    }
    let is_number = |part: Component<'_>| {
        let digits = part.as_os_str().as_encoded_bytes();
        // The slave that a master's ioctl opens is at no path of any call.
        digits.iter().all(u8::is_ascii_digit) || path == Path::new("/dev/pts/ptmx")
    };
    [PROC, "/dev/pts"]
        .into_iter()
        .map(Path::new)
        .find(|top| {
            let mut below = path
                .strip_prefix(top)
                .into_iter()
                .flat_map(Path::components);
            below.next().is_some_and(is_number)
        })
        .unwrap_or(path)
        .to_owned()
}

fn accesses(
    seen: &Seen,
    ground: &Ground,
    remarks: &mut Vec<String>,
    proc_files: &mut BTreeSet<String>,
) -> Needs {
    let mut needs = Needs::new();
    for (at, used) in &seen.uses {
        let path = &lasting(at, seen);
        let mut access = used.access.without(ground.grants(path));
        // What is hidden comes back for an entry alone, and what leads to a manager for one with `w`.
        let is_given = ground.given.iter().any(|given| path.starts_with(given));
        let is_used = used.connects || !used.access.is_none();
        access.write |= is_given && is_used && (used.connects || leads_to_manager(path));
        if path == Path::new(ROOT) && !access.is_none() {
            remarks.push(format!(
                "{access}:/ is not in the list, as it would unveil the whole host: what the command did in the directory / itself fails without"
            ));
            continue;
        }
        if path == Path::new(PROC)
            && access.write
            && let Some(name) = at.file_name()
        {
            proc_files.insert(name.to_string_lossy().into_owned());
        }
        add(&mut needs, path, access);
    }
    needs
}

/// A file goes from one directory to another only within one mount, that of one entry, and only to where it gains no rights.
fn moves(seen: &Seen, ground: &Ground, needs: &mut Needs, remarks: &mut Vec<String>) {
    let create = unveil::letters("c");
    let is_open = |path: &Path| ground.grants(path).create;
    let across = seen
        .moves
        .iter()
        .filter(|(from, to)| from != to && !(is_open(from) && is_open(to)));
    let across: Vec<_> = across.collect();
    for (from, to) in &across {
        let common: PathBuf = from
            .components()
            .zip(to.components())
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one)
            .collect();
        let (from, to) = (from.display(), to.display());
        if common == Path::new(ROOT) {
            remarks.push(format!(
                "a file went from {from} to {to}: with any list but c:/ these are two mounts, and it fails with EXDEV"
            ));
            continue;
        }
        if !granted_by(needs, &common).create {
            remarks.push(format!(
                "c:{} is for a file that went from {from} to {to}",
                common.display()
            ));
        }
        add(needs, &common, create);
    }
    // Rights that are added for one may be gained by the next.
    loop {
        let before = needs.clone();
        for (from, to) in &across {
            let gained = granted_by(needs, to).without(granted_by(needs, from));
            add(needs, from, gained);
        }
        if *needs == before {
            break;
        }
    }
}

fn changes(seen: &Seen, ground: &Ground, needs: &mut Needs) {
    for (path, _) in seen.uses.iter().filter(|(_, used)| used.changes) {
        let path = &lasting(path, seen);
        let open = ground.grants(path).with(granted_by(needs, path));
        if !open.changes() && path != Path::new(ROOT) {
            add(needs, path, unveil::letters("w"));
        }
    }
}

/// Without what an entry above grants. In the order of paths a directory comes before what is in it.
fn uncovered(needs: Needs) -> Needs {
    let mut kept = Needs::new();
    for (path, access) in needs {
        let left = access.without(granted_by(&kept, &path));
        add(&mut kept, &path, left);
    }
    kept
}

/// Many files of one directory become the directory, from the innermost on; never one that lies in / itself.
fn crowds(needs: &mut Needs, remarks: &mut Vec<String>) {
    let depth = |path: &Path| path.components().count();
    let deepest = needs.keys().map(|path| depth(path)).max().unwrap_or(0);
    for level in (4..=deepest).rev() {
        let mut crowds: BTreeMap<(PathBuf, String), Vec<PathBuf>> = BTreeMap::new();
        for (path, access) in needs.iter() {
            if let Some(parent) = path.parent()
                && depth(path) == level
                && !access.changes()
            {
                let crowd = crowds.entry((parent.to_owned(), access.to_string()));
                crowd.or_default().push(path.clone());
            }
        }
        for ((parent, mode), crowd) in crowds {
            if crowd.len() <= MOST_FILES {
                continue;
            }
            remarks.push(format!(
                "{mode}:{} stands for {} paths in it",
                parent.display(),
                crowd.len()
            ));
            for path in &crowd {
                needs.remove(path);
            }
            add(needs, &parent, unveil::letters(&mode));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ground() -> Ground {
        let rules = |rules: &[(&str, &str)]| -> Vec<(PathBuf, Access)> {
            let parsed = rules
                .iter()
                .map(|(mode, path)| (PathBuf::from(path), unveil::letters(mode)));
            parsed.collect()
        };
        Ground {
            open: rules(&[
                ("rwxc", "/m/local"),
                ("rwxc", "/m/tmp"),
                ("rw", "/dev/null"),
            ]),
            defaults: rules(&[("rx", "/usr/bin"), ("rx", "/usr/lib"), ("r", "/proc")]),
            private: vec!["/tmp".into(), "/dev/shm".into()],
            given: Vec::new(),
            task_dir: "/m".into(),
        }
    }

    fn seen(uses: &[&str]) -> Seen {
        let mut seen = Seen::default();
        for text in uses {
            let (mode, path) = text.split_once(':').unwrap_or(("", text));
            let used = seen.uses.entry(path.into()).or_default();
            used.access = used.access.with(unveil::letters(mode));
            used.changes |= mode.contains('m');
            used.connects |= mode.contains('s');
        }
        seen
    }

    fn of(uses: &[&str]) -> Vec<String> {
        shown(&list(&seen(uses), &ground()))
    }

    fn shown(list: &List) -> Vec<String> {
        list.entries.iter().map(Entry::to_string).collect()
    }

    #[test]
    fn what_is_open_anyway_is_not_listed() {
        let uses = [
            "rx:/usr/bin/cat",
            "r:/usr/lib/libc.so.6",
            "rw:/dev/null",
            "r:/proc/7/status",
            "rw:/tmp/x",
            "c:/tmp",
            "rwc:/m/local",
        ];
        assert_eq!(of(&uses), <[&str; 0]>::default());
    }

    #[test]
    fn letters_of_one_path_are_one_entry() {
        assert_eq!(
            of(&["r:/srv/a", "w:/srv/a", "x:/srv/b"]),
            ["rw:/srv/a", "x:/srv/b"]
        );
    }

    #[test]
    fn what_a_directory_covers_is_not_listed_again() {
        let uses = ["rc:/srv", "r:/srv/a", "rw:/srv/b", "c:/srv/d", "r:/srvx"];
        assert_eq!(of(&uses), ["rc:/srv", "w:/srv/b", "r:/srvx"]);
    }

    #[test]
    fn an_entry_for_a_default_path_keeps_what_that_allows() {
        assert_eq!(of(&["c:/usr/lib"]), ["rxc:/usr/lib"]);
        assert_eq!(of(&["w:/proc/7/oom_score_adj"]), ["rw:/proc"]);
    }

    #[test]
    fn of_the_commands_own_files_in_proc_one_is_enough() {
        let of = |uses: &[&str]| {
            let mut seen = seen(uses);
            seen.first = Some("/proc/2".into());
            list(&seen, &ground())
        };
        let own = of(&["rw:/proc/2/coredump_filter", "r:/proc/2/maps"]);
        assert_eq!(shown(&own), ["w:/proc/self/coredump_filter"]);
        assert!(own.proc_files.is_empty(), "{own:?}");
        let childs = of(&["rw:/proc/3/coredump_filter", "rw:/proc/2/task/4/comm"]);
        assert_eq!(shown(&childs), ["rw:/proc"]);
        let names: Vec<&str> = childs.proc_files.iter().map(String::as_str).collect();
        assert_eq!(names, ["comm", "coredump_filter"]);
        // User namespaces go by /proc itself.
        assert_eq!(shown(&of(&["w:/proc/2/uid_map"])), ["rw:/proc"]);
    }

    #[test]
    fn the_whole_host_is_never_proposed() {
        let list = list(&seen(&["r:/", "c:/", "m:/", "r:/etc/x"]), &ground());
        assert_eq!(shown(&list), ["r:/etc/x"]);
        assert!(
            list.remarks[0].starts_with("rc:/ is not in the list"),
            "{list:?}"
        );
    }

    #[test]
    fn the_tasks_own_directory_is_relative() {
        assert_eq!(of(&["r:/m", "w:/m/x"]), ["r:.", "w:x"]);
    }

    #[test]
    fn a_change_of_mode_or_owner_needs_a_writable_view_and_no_more() {
        assert_eq!(of(&["m:/srv/a"]), ["w:/srv/a"]);
        assert_eq!(of(&["m:/srv/a", "c:/srv"]), ["c:/srv"]);
        assert_eq!(of(&["m:/tmp/a"]), <[&str; 0]>::default());
    }

    #[test]
    fn many_files_of_a_directory_become_the_directory_and_it_is_said() {
        let files = |count: usize, dir: &str| -> Vec<String> {
            (0..count).map(|at| format!("r:{dir}/{at}")).collect()
        };
        let of = |uses: &[String]| {
            let uses: Vec<&str> = uses.iter().map(String::as_str).collect();
            list(&seen(&uses), &ground())
        };
        assert_eq!(of(&files(MOST_FILES, "/a/b")).entries.len(), MOST_FILES);
        let many = of(&files(MOST_FILES + 1, "/a/b"));
        assert_eq!(shown(&many), ["r:/a/b"]);
        assert_eq!(many.remarks, ["r:/a/b stands for 17 paths in it"]);
        // A directory like /etc has secrets in it.
        assert_eq!(of(&files(40, "/etc")).entries.len(), 40);
        let mut written = files(MOST_FILES, "/a/b");
        written.push("rw:/a/b/w".into());
        assert_eq!(of(&written).entries.len(), MOST_FILES + 1);
    }

    #[test]
    fn a_move_between_directories_needs_one_entry_for_both_and_no_gain_of_rights() {
        let mut seen = seen(&["c:/srv/a", "c:/srv/b", "r:/srv/b"]);
        seen.moves.insert(("/srv/a".into(), "/srv/b".into()));
        let moved = list(&seen, &ground());
        assert_eq!(shown(&moved), ["c:/srv", "r:/srv/a", "r:/srv/b"]);
        assert_eq!(moved.remarks.len(), 1, "{moved:?}");
        seen.moves.insert(("/var/a".into(), "/srv/b".into()));
        let moved = list(&seen, &ground());
        assert!(moved.remarks[1].contains("EXDEV"), "{moved:?}");
    }

    #[test]
    fn what_was_given_and_is_hidden_needs_an_entry_to_come_back() {
        let ground = Ground {
            given: vec!["/run/dbus".into(), "/tmp/x".into()],
            ..ground()
        };
        let seen = seen(&[
            "s:/run/dbus/socket",
            "s:/run/app/socket",
            "r:/tmp/x/y",
            "r:/tmp/z",
        ]);
        let listed = list(&seen, &ground);
        assert_eq!(shown(&listed), ["w:/run/dbus/socket", "r:/tmp/x/y"]);
    }

    fn path() -> impl Strategy<Value = String> {
        proptest::collection::vec(proptest::sample::select(vec!["a", "b", "usr", "lib"]), 1..5)
            .prop_map(|parts| format!("/{}", parts.join("/")))
    }

    proptest! {
        #[test]
        fn all_that_was_done_is_allowed_and_no_letter_is_idle(
            uses in proptest::collection::vec(("[rwxc]{1,3}", path()), 0..20)
        ) {
            let uses: Vec<String> = uses.iter().map(|(mode, path)| format!("{mode}:{path}")).collect();
            let seen = seen(&uses.iter().map(String::as_str).collect::<Vec<_>>());
            // An entry for a default path has more than is needed.
            let ground = Ground { open: ground().defaults, defaults: Vec::new(), ..ground() };
            let List { entries, .. } = list(&seen, &ground);
            let allows = |entries: &[Entry]| {
                let needs: Needs = entries.iter().map(|one| (one.path.clone(), one.access)).collect();
                seen.uses.iter().all(|(path, used)| {
                    let open = ground.grants(path).with(granted_by(&needs, path));
                    used.access.without(open).is_none()
                })
            };
            prop_assert!(allows(&entries), "{entries:?}");
            for at in 0..entries.len() {
                for letter in entries[at].access.to_string().chars() {
                    let mut fewer = entries.clone();
                    let less = unveil::letters(&letter.to_string());
                    fewer[at].access = fewer[at].access.without(less);
                    prop_assert!(!allows(&fewer), "{letter} of {} in {entries:?}", entries[at]);
                }
            }
        }
    }
}
