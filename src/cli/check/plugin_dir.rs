//! The directory from which the agent starts its plugins: what in it is this driver, and what keeps the agent from starting.

use std::fs;
use std::io::{Error, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use memchr::memmem;

use super::report::Line;
use crate::agent::open_regular;
use crate::cgroup::Mark;

const NAME: &str = "plugin_dir";
/// In every binary of a driver with this name, HashiCorp's and ours.
const EXEC2: &[u8] = b"nomad-driver-exec2";

/// What one file in it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Dangling {
        target: PathBuf,
    },
    NotExecutable,
    /// This driver.
    Ours,
    /// Something else that has the driver's name in it.
    Exec2,
    Foreign,
    Unreadable(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    pub kind: Kind,
}

impl Entry {
    /// By which the agent's configuration names it.
    pub fn label(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_suffix(".exe").unwrap_or(&name).to_owned()
    }
}

pub fn read(dir: &Path) -> std::io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let kind = match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => continue,
            Ok(meta) if meta.permissions().mode() & 0o111 == 0 => Kind::NotExecutable,
            Ok(_) => content(&path).unwrap_or_else(|error| Kind::Unreadable(error.to_string())),
            Err(_) => Kind::Dangling {
                target: fs::read_link(&path).unwrap_or_default(),
            },
        };
        entries.push(Entry { path, kind });
    }
    entries.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(entries)
}

/// Told by what is in the file: nothing of it is executed.
fn content(path: &Path) -> std::io::Result<Kind> {
    let file = open_regular(path)?;
    let meta = file.metadata()?;
    let own = fs::metadata("/proc/self/exe");
    if own.is_ok_and(|own| (own.dev(), own.ino()) == (meta.dev(), meta.ino())) {
        return Ok(Kind::Ours);
    }
    let (mut is_exec2, mut is_ours) = (false, false);
    let ours = memmem::Finder::new(Mark::Owner.name());
    let exec2 = memmem::Finder::new(EXEC2);
    let overlap = Mark::Owner.name().len();
    let mut file = file.take(meta.len());
    let mut chunk = Vec::new();
    loop {
        let kept = chunk.len().min(overlap);
        chunk.drain(..chunk.len() - kept);
        if file.by_ref().take(1 << 20).read_to_end(&mut chunk)? == 0 {
            break;
        }
        is_exec2 |= exec2.find(&chunk).is_some();
        is_ours |= ours.find(&chunk).is_some();
    }
    Ok(match (is_ours, is_exec2) {
        (true, _) => Kind::Ours,
        (_, true) => Kind::Exec2,
        _ => Kind::Foreign,
    })
}

/// Why the directory's files could not be looked at.
pub fn unread(dir: &Path, error: &Error) -> Line {
    let dir = dir.display();
    let sentence = match error.kind() {
        ErrorKind::NotFound => format!(
            "{dir} does not exist; make it and install nomad-driver-exec2 in it, or set plugin_dir"
        ),
        ErrorKind::PermissionDenied => format!("{dir} cannot be read ({error}); try sudo"),
        _ => format!("{dir} cannot be read ({error}); set plugin_dir"),
    };
    Line::error(NAME, sentence)
}

/// Judges the directory; `is_named` tells whether the agent's configuration has a block for a label.
pub fn lines(dir: &Path, entries: &[Entry], is_named: impl Fn(&str) -> bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for entry in entries {
        let (path, label) = (entry.path.display(), entry.label());
        let line = match &entry.kind {
            Kind::Dangling { target } => Line::error(
                NAME,
                format!(
                    "{path} is a link to {}, which is not there, so that the agent does not start; remove the link, or install what it names",
                    target.display()
                ),
            ),
            Kind::NotExecutable if is_named(&label) => Line::error(
                NAME,
                format!(
                    "{path} is not executable, so that the agent passes it over; chmod 755 {path}"
                ),
            ),
            Kind::NotExecutable => Line::warning(
                NAME,
                format!("{path} is not executable, and no plugin; keep it elsewhere"),
            ),
            Kind::Exec2 => Line::warning(
                NAME,
                format!(
                    "{path} offers exec2, too, or starts what does, and is not this driver; keep one of them, as Nomad takes the one with the higher version"
                ),
            ),
            Kind::Foreign if !is_named(&label) => Line::warning(
                NAME,
                format!(
                    "{path} is in no plugin block, and an agent before Nomad 1.10 starts it all the same and fails if it is no plugin; keep nothing but plugins there"
                ),
            ),
            Kind::Unreadable(error) => {
                Line::warning(NAME, format!("{path} cannot be read ({error}); try sudo"))
            }
            Kind::Ours | Kind::Foreign => continue,
        };
        lines.push(line);
    }
    let ours = entries.iter().filter(|entry| entry.kind == Kind::Ours);
    let ours: Vec<String> = ours.map(|entry| entry.path.display().to_string()).collect();
    let own = match ours.as_slice() {
        [] => Line::error(
            NAME,
            format!(
                "{dir} holds no nomad-driver-exec2; install -m 755 nomad-driver-exec2 {dir}/",
                dir = dir.display()
            ),
        ),
        [one] => Line::ok(NAME, format!("{one} is this driver")),
        several => Line::warning(
            NAME,
            format!(
                "{} are all this driver; keep one of them",
                several.join(" and ")
            ),
        ),
    };
    lines.insert(0, own);
    lines
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::report::Status;
    use super::super::report::tests::told;
    use super::*;

    fn file(dir: &Path, name: &str, text: &str, mode: u32) {
        fs::write(dir.join(name), text).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn each_file_is_told_for_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        file(dir, "a-other", "#!/bin/sh\n", 0o755);
        file(dir, "b-exec2", "nomad-driver-exec2", 0o755);
        file(dir, "c-notes.txt", "x", 0o644);
        std::os::unix::fs::symlink("/no/such", dir.join("d-gone")).unwrap();
        fs::create_dir(dir.join("e-dir")).unwrap();
        std::os::unix::fs::symlink("/proc/self/exe", dir.join("nomad-driver-exec2")).unwrap();
        let long = format!("{}{}", "x".repeat(1 << 20), Mark::Owner.name());
        file(dir, "z-copy", &long, 0o755);
        let entries = read(dir).unwrap();
        let kinds: Vec<_> = entries.iter().map(|entry| entry.kind.clone()).collect();
        let gone = Kind::Dangling {
            target: "/no/such".into(),
        };
        assert_eq!(
            kinds,
            [
                Kind::Foreign,
                Kind::Exec2,
                Kind::NotExecutable,
                gone,
                Kind::Ours,
                Kind::Ours
            ]
        );
        let statuses = |named: &str| -> Vec<Status> {
            let lines = lines(dir, &entries, |label| label == named);
            lines.iter().map(|line| line.status).collect()
        };
        use Status::{Error, Warning};
        assert_eq!(statuses("a-other"), [Warning, Warning, Warning, Error]);
        assert_eq!(
            statuses("c-notes.txt"),
            [Warning, Warning, Warning, Error, Error]
        );
    }

    #[test]
    fn each_kind_of_file_has_its_sentence() {
        let of = |entries: &[(&str, Kind)]| {
            let entries: Vec<Entry> = entries
                .iter()
                .map(|(name, kind)| Entry {
                    path: Path::new("/p").join(name),
                    kind: kind.clone(),
                })
                .collect();
            told(&lines(Path::new("/p"), &entries, |label| label == "named"))
        };
        let gone = Kind::Dangling {
            target: "/no/such".into(),
        };
        let unreadable = Kind::Unreadable("Permission denied (os error 13)".into());
        assert_eq!(
            of(&[
                ("ours", Kind::Ours),
                ("gone", gone),
                ("named", Kind::NotExecutable),
                ("notes.txt", Kind::NotExecutable),
                ("theirs", Kind::Exec2),
                ("other", Kind::Foreign),
                ("secret", unreadable),
            ]),
            [
                "ok plugin_dir: /p/ours is this driver",
                "error plugin_dir: /p/gone is a link to /no/such, which is not there, so that the agent does not start; remove the link, or install what it names",
                "error plugin_dir: /p/named is not executable, so that the agent passes it over; chmod 755 /p/named",
                "warning plugin_dir: /p/notes.txt is not executable, and no plugin; keep it elsewhere",
                "warning plugin_dir: /p/theirs offers exec2, too, or starts what does, and is not this driver; keep one of them, as Nomad takes the one with the higher version",
                "warning plugin_dir: /p/other is in no plugin block, and an agent before Nomad 1.10 starts it all the same and fails if it is no plugin; keep nothing but plugins there",
                "warning plugin_dir: /p/secret cannot be read (Permission denied (os error 13)); try sudo",
            ]
        );
        assert_eq!(
            of(&[
                ("a", Kind::Ours),
                ("b", Kind::Ours),
                ("named", Kind::Foreign)
            ]),
            ["warning plugin_dir: /p/a and /p/b are all this driver; keep one of them"]
        );
        assert_eq!(
            of(&[]),
            [
                "error plugin_dir: /p holds no nomad-driver-exec2; install -m 755 nomad-driver-exec2 /p/"
            ]
        );
    }

    #[test]
    fn a_directory_that_cannot_be_read_is_an_error() {
        for (error, sentence) in [
            (
                ErrorKind::NotFound,
                "/p does not exist; make it and install nomad-driver-exec2 in it, or set plugin_dir",
            ),
            (
                ErrorKind::PermissionDenied,
                "/p cannot be read (permission denied); try sudo",
            ),
            (
                ErrorKind::NotADirectory,
                "/p cannot be read (not a directory); set plugin_dir",
            ),
        ] {
            let line = unread(Path::new("/p"), &error.into());
            assert_eq!(told(&[line]), [format!("error plugin_dir: {sentence}")]);
        }
    }
}
