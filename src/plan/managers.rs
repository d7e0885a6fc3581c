//! The services of the host that a path below /run leads to: what hides them from a task, and what an unveil entry brings back.

use std::path::{Path, PathBuf};

use super::steps::{Access, RunMask};

/// Below /run, by which a process reaches a manager of the host. They are shown only to who unveils them for writing.
pub const MANAGERS: [&str; 3] = ["dbus", "systemd", "user"];

/// What stays of a masked /run, for every task: the resolver's files, and the sockets that take a log.
const KEPT: [&str; 4] = [
    "systemd/resolve",
    "systemd/journal/socket",
    "systemd/journal/dev-log",
    "systemd/journal/stdout",
];

/// Below /run, by which root has the host, and what to call it.
const OF_ROOT: [(&str, &str); 7] = [
    ("dbus/system_bus_socket", "the system bus"),
    ("systemd/private", "systemd"),
    ("user", "the managers of users"),
    ("docker.sock", "Docker"),
    ("containerd", "containerd"),
    ("podman", "Podman"),
    ("crio", "CRI-O"),
];

/// What the masks of /run leave in place, relative to it.
pub fn kept(run: RunMask) -> impl Iterator<Item = &'static str> {
    let also = match run {
        RunMask::All => "nscd",
        RunMask::Managers => "systemd/userdb",
    };
    KEPT.into_iter().chain([also])
}

/// The path relative to /run, if it is that or below it.
fn below_run(path: &Path) -> Option<&Path> {
    let below = |top: &str| path.strip_prefix(top).ok();
    below("/run").or_else(|| below("/var/run"))
}

/// Whether a path comes back from under a mask only for whoever unveils it for writing.
pub fn leads_to_manager(path: &Path) -> bool {
    below_run(path).is_some_and(|below| {
        below == Path::new("") || MANAGERS.iter().any(|name| below.starts_with(name))
    })
}

/// What a task sees at a path that is unveiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    Shown,
    /// A directory, in which little is left.
    Emptied,
    Nothing,
}

/// Of an entry by itself. `path` is without links, `written` as its author wrote it.
pub fn sight(path: &Path, written: &Path, access: Access, run: RunMask) -> Sight {
    let Some(below) = below_run(path) else {
        return Sight::Shown;
    };
    // Where all of it is masked, what is unveiled for reading comes back by name, and not by a link.
    let is_lost = run == RunMask::All
        && below_run(written).is_none()
        && below != Path::new("")
        && !access.changes()
        && !kept(run).any(|name| below.starts_with(name));
    if is_lost {
        return Sight::Nothing;
    }
    if !leads_to_manager(path) {
        return Sight::Shown;
    }
    let is_run = below == Path::new("");
    let is_mask = match run {
        RunMask::All => is_run,
        RunMask::Managers => MANAGERS.iter().any(|name| below == Path::new(name)),
    };
    let leads_to_kept = |name: &str| Path::new(name).starts_with(below);
    if access.changes()
        || kept(run).any(|name| below.starts_with(name))
        || (is_run && run == RunMask::Managers)
    {
        Sight::Shown
    } else if is_mask || kept(run).any(leads_to_kept) {
        Sight::Emptied
    } else {
        Sight::Nothing
    }
}

/// What would let the task of a user out of its sandbox, and an entry brings back: paths, of which not all need to be there, and what
/// to call them. `path` is without links, `written` as its author wrote it.
pub fn brought_back(
    path: &Path,
    written: &Path,
    access: Access,
    uid: u32,
) -> Vec<(PathBuf, &'static str)> {
    if below_run(path).is_none() {
        return Vec::new();
    }
    let run = Path::new("/run");
    let ways: Vec<(PathBuf, &str)> = match uid {
        0 => OF_ROOT
            .map(|(name, called)| (run.join(name), called))
            .into(),
        uid => vec![(run.join(format!("user/{uid}")), "the manager of its user")],
    };
    // Nothing else of /run is hidden from users, and whoever unveils all of it for reading gets nothing back.
    let is_shown = |way: &Path| {
        let is_named = uid == 0 && path != run && below_run(written).is_some();
        access.changes() || is_named && !leads_to_manager(way)
    };
    ways.into_iter()
        .filter(|(way, _)| way.starts_with(path) || path.starts_with(way))
        .filter(|(way, _)| is_shown(way))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::unveil::letters;
    use super::*;

    #[test]
    fn what_leads_to_a_manager_is_hidden_unless_it_is_unveiled_for_writing() {
        use RunMask::{All, Managers};
        for (entry, run, expected) in [
            ("r:/run/dbus", Managers, Sight::Emptied),
            ("r:/run/dbus", All, Sight::Nothing),
            ("rx:/run/dbus/system_bus_socket", Managers, Sight::Nothing),
            ("w:/run/dbus/system_bus_socket", All, Sight::Shown),
            ("r:/run", Managers, Sight::Shown),
            ("r:/run", All, Sight::Emptied),
            ("r:/run/systemd", All, Sight::Emptied),
            ("r:/run/systemd/journal/socket", All, Sight::Shown),
            ("r:/run/systemd/userdb", All, Sight::Nothing),
            ("r:/run/systemd/userdb", Managers, Sight::Shown),
            ("r:/run/docker.sock", All, Sight::Shown),
            ("r:/srv", All, Sight::Shown),
        ] {
            let (mode, path) = entry.split_once(':').unwrap_or_default();
            let path = Path::new(path);
            let seen = sight(path, path, letters(mode), run);
            assert_eq!(seen, expected, "{entry} {run:?}");
        }
        let by_link = |mode, run| {
            let (path, written) = (Path::new("/run/lock"), Path::new("/var/lock"));
            sight(path, written, letters(mode), run)
        };
        assert_eq!(by_link("r", All), Sight::Nothing);
        assert_eq!(by_link("rw", All), Sight::Shown);
        assert_eq!(by_link("r", Managers), Sight::Shown);
    }

    #[test]
    fn an_entry_brings_back_what_it_is_above_or_below() {
        let of = |uid, mode, path: &str| -> Vec<&str> {
            let path = Path::new(path);
            let back = brought_back(path, path, letters(mode), uid);
            back.into_iter().map(|(_, called)| called).collect()
        };
        assert_eq!(of(0, "w", "/run/dbus"), ["the system bus"]);
        assert_eq!(of(0, "r", "/run/docker.sock"), ["Docker"]);
        assert_eq!(of(0, "w", "/run").len(), OF_ROOT.len());
        assert_eq!(of(7, "w", "/run/user/7/bus"), ["the manager of its user"]);
        for (uid, mode, path) in [
            (0, "r", "/run/dbus"),
            (0, "r", "/run"),
            (0, "rwxc", "/"),
            (0, "w", "/run/systemd/journal/socket"),
            (0, "w", "/run/postgresql"),
            (7, "w", "/run/dbus"),
            (7, "w", "/run/user/8"),
            (7, "w", "/run/docker.sock"),
        ] {
            assert!(of(uid, mode, path).is_empty(), "{uid} {mode}:{path}");
        }
        // By a link, only what is unveiled for writing comes back.
        let engine = Path::new("/run/docker.sock");
        let by_link = |mode| brought_back(engine, Path::new("/srv/link"), letters(mode), 0).len();
        assert_eq!((by_link("r"), by_link("rw")), (0, 1));
    }
}
