//! What a task may open: the `rwxc:/path` grammar, the default paths, and the list of rules of one task.
//!
//! Rules on different paths unite, as in the kernel: a path is open for whatever any rule on it or on a directory above it
//! allows. Of several rules on the same path the first counts, as in exec2: an operator can narrow a path for all jobs.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use super::managers::leads_to_manager;
use super::steps::{Access, Place, Rule, RunMask, Source, Tree, View};

/// Entries in one list, well below what the kernel takes and far above what a job needs.
pub const MAX_ENTRIES: usize = 1_000;
/// PATH_MAX of the kernel, with its NUL.
const MAX_PATH_BYTES: usize = 4_095;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnveilError {
    #[error(
        "{key}: path {entry:?} does not contain mode prefix; write it as \"r:{entry}\", with any of r, w, x, c before the colon"
    )]
    NoMode { key: &'static str, entry: String },
    #[error(
        "{key}: {entry:?} has an unknown letter {letter:?} in its mode; a mode is any of r, w, x, c"
    )]
    UnknownLetter {
        key: &'static str,
        entry: String,
        letter: char,
    },
    #[error("{key}: {entry:?} has an empty mode; put any of r, w, x, c before the colon")]
    EmptyMode { key: &'static str, entry: String },
    #[error("{key}: {entry:?} {problem}")]
    Path {
        key: &'static str,
        entry: String,
        problem: &'static str,
    },
    #[error("{key} has {count} entries; at most {MAX_ENTRIES} are taken")]
    TooMany { key: &'static str, count: usize },
    #[error(
        "task set unveil paths but driver config does not allow this; the operator sets unveil_by_task = true to allow it"
    )]
    NotByTask,
}

/// The operator's part of the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate<'a> {
    pub paths: &'a [String],
    /// What volumes and devices open.
    pub volumes: &'a [Rule],
    pub defaults: Defaults,
    pub by_task: ByTask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defaults {
    Unveiled,
    Veiled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByTask {
    Allowed,
    Refused,
}

/// A directory of the task's own by a name that it has on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    pub host: PathBuf,
    /// The same, relative to the task's directory.
    pub own: PathBuf,
}

impl Alias {
    pub fn new(host: &Path, own: &str) -> Self {
        Self {
            host: host.to_owned(),
            own: own.into(),
        }
    }

    fn below(&self, path: &Path) -> Option<PathBuf> {
        let rest = path.strip_prefix(&self.host).ok()?;
        Some(self.own.join(rest))
    }
}

/// A rule that counts for nothing, and the one on the same path that does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overruled {
    pub rule: Rule,
    pub by: Rule,
}

/// The rules of one task, in the order operator, driver, volumes, task, defaults.
///
/// A path below one of `aliases` counts as one of the task's own, as `${NOMAD_TASK_DIR}/data` for one: an earlier run may have
/// planted links there, and they must not lead out.
pub fn rules(
    gate: Gate<'_>,
    by_task: &[String],
    aliases: &[Alias],
) -> Result<(Vec<Rule>, Vec<Overruled>), UnveilError> {
    if !by_task.is_empty() && gate.by_task == ByTask::Refused {
        return Err(UnveilError::NotByTask);
    }
    let mut rules = list("unveil_paths", gate.paths, Source::Plugin)?;
    rules.extend(own().map(|(mode, place, path)| Rule {
        place,
        written: path.into(),
        access: mode,
        source: Source::Driver,
    }));
    rules.extend(gate.volumes.iter().cloned());
    rules.extend(list("unveil", by_task, Source::Task)?);
    if gate.defaults == Defaults::Unveiled {
        let defaults = DEFAULTS
            .iter()
            .flat_map(|(mode, paths)| paths.iter().map(move |path| (mode, path)));
        rules.extend(defaults.map(|(mode, path)| Rule {
            place: Place::Host(PathBuf::from(path)),
            written: path.into(),
            access: letters(mode),
            source: Source::Default,
        }));
    }
    for rule in &mut rules {
        if let Place::Host(path) = &rule.place
            && let Some(own) = own_place(path, aliases)
        {
            rule.place = Place::Task(own);
        }
    }
    let (mut first, mut overruled) = (BTreeMap::new(), Vec::new());
    let mut kept: Vec<Rule> = Vec::new();
    for rule in rules {
        match first.entry(spelled_once(&rule.place)) {
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(rule);
            }
            Entry::Occupied(index) => overruled.push(Overruled {
                rule,
                by: kept[*index.get()].clone(),
            }),
        }
    }
    Ok((kept, overruled))
}

/// The operator's rules alone.
pub fn operators(unveil_paths: &[String]) -> Result<Vec<Rule>, UnveilError> {
    list("unveil_paths", unveil_paths, Source::Plugin)
}

/// The path relative to the task's directory, if it is one below any name of that.
pub fn own_place(path: &Path, aliases: &[Alias]) -> Option<PathBuf> {
    aliases.iter().find_map(|alias| alias.below(path))
}

/// The same place for `/a/b`, `/a//b/` and `/a/./b`, and for `b` and `./b`. Links are left to the kernel, which unites what leads
/// to one file.
pub(super) fn spelled_once(place: &Place) -> Place {
    let plain = |path: &Path| {
        let parts = path.components();
        parts.filter(|part| *part != Component::CurDir).collect()
    };
    match place {
        Place::Task(path) => Place::Task(plain(path)),
        Place::Host(path) => Place::Host(plain(path)),
    }
}

/// Checks the operator's own entries before any task is there.
pub fn check(unveil_paths: &[String]) -> Result<(), UnveilError> {
    operators(unveil_paths).map(drop)
}

/// What every task needs to work at all, whatever the operator veils.
fn own() -> impl Iterator<Item = (Access, Place, &'static str)> {
    let below = |dir| (letters("rwxc"), Place::Task(PathBuf::from(dir)), dir);
    let null = "/dev/null";
    let null = (letters("rw"), Place::Host(PathBuf::from(null)), null);
    ["local", "alloc", "secrets", "tmp"]
        .map(below)
        .into_iter()
        .chain([null])
}

/// The default paths: those of exec2, and the task's own /dev/shm, /proc and /sys/fs/cgroup. Only those that exist at launch count.
pub const DEFAULTS: [(&str, &[&str]); 6] = [
    (
        "rx",
        &[
            "/bin",
            "/usr/bin",
            "/usr/local/bin",
            "/lib",
            "/lib64",
            "/usr/lib",
            "/usr/lib64",
            "/usr/libexec",
            "/usr/local/lib",
            "/usr/local/lib64",
        ],
    ),
    ("rw", &["/dev/full", "/dev/stdin", "/dev/stdout"]),
    ("w", &["/dev/log"]),
    ("rwxc", &["/dev/shm"]),
    (
        "r",
        &[
            "/dev/zero",
            "/dev/fd",
            "/dev/urandom",
            // The task's own: its processes, and its scope's limits, by which runtimes size themselves.
            "/proc",
            "/sys/fs/cgroup",
        ],
    ),
    (
        "r",
        &[
            "/etc/ld.so.conf",
            "/etc/ld.so.cache",
            "/etc/ld.so.conf.d",
            "/usr/share/locale",
            "/usr/share/zoneinfo",
            "/usr/share/common-licenses",
            "/etc/hosts",
            "/etc/hostname",
            "/etc/services",
            "/etc/protocols",
            "/etc/resolv.conf",
            "/etc/ssl/certs",
            "/etc/pki/tls/certs",
            "/sys/etc/security/cacerts",
            "/etc/ssl/ca-bundle.pem",
            "/etc/pki/tls/cacert.pem",
            "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
            "/etc/ssl/cert.pem",
        ],
    ),
];

fn list(key: &'static str, entries: &[String], source: Source) -> Result<Vec<Rule>, UnveilError> {
    if entries.len() > MAX_ENTRIES {
        return Err(UnveilError::TooMany {
            key,
            count: entries.len(),
        });
    }
    entries
        .iter()
        .map(|entry| {
            parse(key, entry).map(|(access, place)| Rule {
                written: place.as_path().to_owned(),
                place,
                access,
                source,
            })
        })
        .collect()
}

/// One entry, `mode:path`. The mode ends at the first colon, so that a path may contain one.
fn parse(key: &'static str, entry: &str) -> Result<(Access, Place), UnveilError> {
    let shown = || entry.chars().take(120).collect::<String>();
    let Some((mode, path)) = entry.split_once(':') else {
        return Err(UnveilError::NoMode {
            key,
            entry: shown(),
        });
    };
    if mode.is_empty() {
        return Err(UnveilError::EmptyMode {
            key,
            entry: shown(),
        });
    }
    if let Some(letter) = mode.chars().find(|letter| !"rwxc".contains(*letter)) {
        return Err(UnveilError::UnknownLetter {
            key,
            entry: shown(),
            letter,
        });
    }
    let place = place(path).map_err(|problem| UnveilError::Path {
        key,
        entry: shown(),
        problem,
    })?;
    Ok((letters(mode), place))
}

/// A relative path is one below the task's directory, where a task starts.
fn place(path: &str) -> Result<Place, &'static str> {
    if path.is_empty() {
        return Err("has no path after its mode");
    }
    if path.contains('\0') {
        return Err("contains a NUL byte");
    }
    if path.len() > MAX_PATH_BYTES {
        return Err("has a path longer than 4095 bytes");
    }
    // What counts as hidden, as a manager's, or as the same path is told by its words.
    if Path::new(path)
        .components()
        .any(|part| part == Component::ParentDir)
    {
        return Err("has a \"..\" in it; write the path without");
    }
    if path.starts_with('/') {
        return Ok(Place::Host(PathBuf::from(path)));
    }
    Ok(Place::Task(PathBuf::from(path)))
}

/// What the letters of a mode allow; others count for nothing.
pub fn letters(mode: &str) -> Access {
    let has = |letter| mode.contains(letter);
    Access {
        read: has('r'),
        write: has('w'),
        execute: has('x'),
        create: has('c'),
    }
}

/// What /proc shows of the whole host's memory, keys and kernel. Hidden, unless unveiled by its very name.
const HOSTS_PROC: [&str; 11] = [
    "/proc/kcore",
    "/proc/key-users",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/vmallocinfo",
];

/// What of /run is hidden from a user.
pub fn run_mask(uid: u32) -> RunMask {
    if uid == 0 {
        RunMask::All
    } else {
        RunMask::Managers
    }
}

/// The mount view that goes with the rules.
pub fn view(rules: &[Rule], uid: u32) -> View {
    let asked: Vec<(&Path, Access)> = rules
        .iter()
        .filter(|rule| matches!(rule.source, Source::Plugin | Source::Task))
        .filter_map(|rule| match &rule.place {
            Place::Host(path) => Some((path.as_path(), rule.access)),
            Place::Task(_) => None,
        })
        .collect();
    let writable = Access::changes;
    let hidden = |path: &Path| {
        ["/run", "/var/run", "/tmp", "/dev/shm"]
            .iter()
            .any(|top| path.starts_with(top))
    };
    let paths = |keep: &dyn Fn(&Path, Access) -> bool| {
        let mut paths: Vec<PathBuf> = asked
            .iter()
            .filter(|(path, access)| keep(path, *access))
            .map(|(path, _)| path.to_path_buf())
            .collect();
        paths.sort();
        paths.dedup();
        paths
    };
    let all = asked
        .iter()
        .any(|(path, access)| *path == Path::new("/") && writable(*access));
    View {
        tree: if all { Tree::AsIs } else { Tree::ReadOnly },
        writable: paths(&|path, access| writable(access) && path != Path::new("/")),
        run: run_mask(uid),
        kept: paths(&|path, access| hidden(path) && (writable(access) || !leads_to_manager(path))),
        masked: HOSTS_PROC
            .map(PathBuf::from)
            .into_iter()
            .filter(|masked| asked.iter().all(|(path, _)| path != masked))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(
        gate: Gate<'_>,
        by_task: &[String],
        aliases: &[Alias],
    ) -> Result<Vec<Rule>, UnveilError> {
        super::rules(gate, by_task, aliases).map(|(rules, _)| rules)
    }

    const OPEN: Gate<'_> = Gate {
        paths: &[],
        volumes: &[],
        defaults: Defaults::Veiled,
        by_task: ByTask::Allowed,
    };

    fn aliases() -> Vec<Alias> {
        [("/m", ""), ("/d/web", ""), ("/d/alloc", "alloc")]
            .map(|(host, own)| Alias {
                host: host.into(),
                own: own.into(),
            })
            .into()
    }

    fn of(entry: &str) -> Result<Rule, UnveilError> {
        let rules = rules(OPEN, &[entry.to_owned()], &aliases())?;
        Ok(rules
            .into_iter()
            .find(|rule| rule.source == Source::Task)
            .unwrap())
    }

    #[test]
    fn a_mode_is_any_of_four_letters_in_any_order() {
        let rule = of("xrr:/opt").unwrap();
        assert_eq!(
            rule.access,
            Access {
                read: true,
                execute: true,
                ..Access::default()
            }
        );
        assert_eq!(rule.place, Place::Host("/opt".into()));
        assert_eq!(of("cwxr:/opt").unwrap().access.to_string(), "rwxc");
    }

    #[test]
    fn a_path_may_contain_a_colon_and_may_be_relative() {
        assert_eq!(of("r:/a:b").unwrap().place, Place::Host("/a:b".into()));
        assert_eq!(
            of("r:local/x").unwrap().place,
            Place::Task("local/x".into())
        );
    }

    #[test]
    fn a_path_of_the_tasks_directory_is_the_tasks_however_it_is_written() {
        for (entry, place) in [
            ("r:/m/local/x", Place::Task("local/x".into())),
            ("r:/m//local/./x/", Place::Task("local/x".into())),
            ("r:/m", Place::Task("".into())),
            ("r:/d/web/local/x", Place::Task("local/x".into())),
            ("r:/d/alloc/data", Place::Task("alloc/data".into())),
            ("r:/mm/x", Place::Host("/mm/x".into())),
        ] {
            assert_eq!(of(entry).unwrap().place, place);
        }
        let rules = rules(OPEN, &["rwc:/m/local".to_owned()], &aliases()).unwrap();
        assert_eq!(view(&rules, 0).writable, Vec::<PathBuf>::new());
    }

    #[test]
    fn a_bad_entry_is_a_sentence_with_key_value_and_remedy() {
        let long = format!("r:/{}", "x".repeat(5000));
        let cases = [
            (
                "/etc/passwd",
                "unveil: path \"/etc/passwd\" does not contain mode prefix; write it as",
            ),
            (
                "rz:/etc",
                "unveil: \"rz:/etc\" has an unknown letter 'z' in its mode; a mode is any of r, w, x, c",
            ),
            (":/etc", "unveil: \":/etc\" has an empty mode"),
            ("r:", "unveil: \"r:\" has no path after its mode"),
            ("r:/a\0b", "contains a NUL byte"),
            ("r:../etc", "unveil: \"r:../etc\" has a \"..\" in it"),
            (
                "r:/run/lock/../dbus",
                "has a \"..\" in it; write the path without",
            ),
            (&long, "longer than 4095 bytes"),
        ];
        for (entry, sentence) in cases {
            let error = of(entry).unwrap_err().to_string();
            assert!(error.contains(sentence), "{entry:.20}: {error}");
            assert!(error.len() < 400 && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_task_unveils_only_where_the_operator_lets_it() {
        let gate = Gate {
            by_task: ByTask::Refused,
            ..OPEN
        };
        assert_eq!(
            rules(gate, &["r:/x".to_owned()], &aliases()),
            Err(UnveilError::NotByTask)
        );
        assert!(rules(gate, &[], &aliases()).is_ok());
    }

    #[test]
    fn ten_thousand_entries_are_refused() {
        let many = vec!["r:/x".to_owned(); 10_000];
        assert_eq!(
            rules(OPEN, &many, &aliases()),
            Err(UnveilError::TooMany {
                key: "unveil",
                count: 10_000
            })
        );
    }

    #[test]
    fn the_tasks_own_directories_are_open_without_the_defaults() {
        let rules = rules(OPEN, &[], &aliases()).unwrap();
        let places: Vec<_> = rules.iter().map(|rule| rule.place.clone()).collect();
        for dir in ["local", "alloc", "secrets", "tmp"] {
            assert!(places.contains(&Place::Task(dir.into())), "{dir}");
        }
        assert!(places.contains(&Place::Host("/dev/null".into())));
        assert!(!places.contains(&Place::Host("/usr/bin".into())));
    }

    #[test]
    fn secrets_of_the_host_are_in_no_default() {
        let defaults: Vec<&str> = DEFAULTS
            .iter()
            .flat_map(|(_, paths)| paths.iter().copied())
            .collect();
        for path in [
            "/etc",
            "/etc/passwd",
            "/etc/shadow",
            "/tmp",
            "/",
            "/sys",
            "/run",
            "/root",
            "/home",
        ] {
            assert!(!defaults.contains(&path), "{path}");
        }
    }

    #[test]
    fn what_is_unveiled_for_writing_stays_writable_and_nothing_else() {
        let entries = ["rwc:/srv/data", "rx:/opt", "w:/var/log/x.log"].map(str::to_owned);
        let view = view(&rules(OPEN, &entries, &aliases()).unwrap(), 80_001);
        assert_eq!(
            view.writable,
            [PathBuf::from("/srv/data"), PathBuf::from("/var/log/x.log")]
        );
        assert_eq!((view.tree, view.run), (Tree::ReadOnly, RunMask::Managers));
    }

    #[test]
    fn of_several_rules_on_one_path_the_first_counts() {
        let operators = ["r:/data".to_owned(), "r:/usr/bin".to_owned()];
        let gate = Gate {
            paths: &operators,
            volumes: &[],
            defaults: Defaults::Unveiled,
            by_task: ByTask::Allowed,
        };
        let asked = [
            "rw:/data//",
            "rwx:/data/./",
            "w:/data/sub",
            "r:/srv",
            "x:/srv",
            "r:/m/local",
        ];
        let rules = rules(gate, &asked.map(str::to_owned), &aliases()).unwrap();
        let of = |place: Place| {
            let mut on = rules
                .iter()
                .filter(|rule| spelled_once(&rule.place) == place);
            let first = on.next().map(|rule| (rule.access.to_string(), rule.source));
            assert!(on.next().is_none(), "{place:?}");
            first.unwrap()
        };
        assert_eq!(
            of(Place::Host("/data".into())),
            ("r".into(), Source::Plugin)
        );
        assert_eq!(
            of(Place::Host("/data/sub".into())),
            ("w".into(), Source::Task)
        );
        assert_eq!(
            of(Place::Host("/usr/bin".into())),
            ("r".into(), Source::Plugin)
        );
        assert_eq!(of(Place::Host("/srv".into())), ("r".into(), Source::Task));
        assert_eq!(
            of(Place::Task("local".into())),
            ("rwxc".into(), Source::Driver)
        );
    }

    #[test]
    fn an_operator_narrows_a_directory_of_the_task_by_any_of_its_names() {
        for entry in ["r:local", "r:./local", "r:local/./", "r:/m/./local"] {
            let operators = [entry.to_owned()];
            let gate = Gate {
                paths: &operators,
                ..OPEN
            };
            let rules = rules(gate, &[], &aliases()).unwrap();
            let local = Place::Task("local".into());
            let on: Vec<_> = rules
                .iter()
                .filter(|rule| spelled_once(&rule.place) == local)
                .map(|rule| (rule.access.to_string(), rule.source))
                .collect();
            assert_eq!(on, [("r".into(), Source::Plugin)], "{entry}");
        }
    }

    #[test]
    fn what_proc_tells_of_the_host_is_masked_unless_named() {
        let masked = |entry: &str| {
            let view = view(&rules(OPEN, &[entry.to_owned()], &aliases()).unwrap(), 0);
            view.masked.contains(&PathBuf::from("/proc/kcore"))
        };
        assert!(masked("r:/proc"));
        assert!(masked("r:/"));
        assert!(!masked("r:/proc/kcore"));
    }

    #[test]
    fn a_socket_of_a_manager_comes_back_only_when_unveiled_for_writing() {
        let kept =
            |entry: &str| view(&rules(OPEN, &[entry.to_owned()], &aliases()).unwrap(), 0).kept;
        assert_eq!(kept("r:/run/dbus"), Vec::<PathBuf>::new());
        assert_eq!(kept("r:/run"), Vec::<PathBuf>::new());
        assert_eq!(kept("r:/var/run/systemd/private"), Vec::<PathBuf>::new());
        assert_eq!(kept("rw:/run/dbus"), [PathBuf::from("/run/dbus")]);
        assert_eq!(
            kept("r:/run/app/config"),
            [PathBuf::from("/run/app/config")]
        );
        assert_eq!(kept("rwc:/tmp"), [PathBuf::from("/tmp")]);
    }

    #[test]
    fn the_whole_tree_is_left_alone_only_for_a_task_that_may_write_all_of_it() {
        assert_eq!(
            view(&rules(OPEN, &["rw:/".to_owned()], &aliases()).unwrap(), 0).tree,
            Tree::AsIs
        );
        assert_eq!(
            view(&rules(OPEN, &["rx:/".to_owned()], &aliases()).unwrap(), 0).tree,
            Tree::ReadOnly
        );
    }
}
