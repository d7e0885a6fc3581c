//! What was built once is kept outside the tree and found again by a hash of all that went into it. An entry appears
//! under its name only when it is complete, so a killed build leaves nothing that counts as built.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest, Sha256};

/// An entry nobody used for this long is of a forgotten version.
const KEPT_UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);

/// The directory everything is kept in.
pub fn dir() -> Result<PathBuf> {
    let base =
        match std::env::var_os("XDG_CACHE_HOME") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            _ => PathBuf::from(std::env::var_os("HOME").context(
                "neither XDG_CACHE_HOME nor HOME is set: no place for the guests' cache",
            )?)
            .join(".cache"),
        };
    let dir = base.join("nomad-driver-exec2");
    fs::create_dir_all(&dir)
        .with_context(|| format!("cannot create the cache directory {}", dir.display()))?;
    Ok(dir)
}

/// A short hash of everything an entry depends on.
pub fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // The length keeps ("ab", "c") apart from ("a", "bc").
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The entry `name-key` below `parent`, built now if it is not there. Other processes that want it wait for us.
pub fn entry(
    parent: &Path,
    name: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let path = parent.join(format!("{name}-{key}"));
    if path.exists() {
        touch(&path);
        return Ok(path);
    }
    let lock = File::create(parent.join(format!(".{name}-{key}.lock")))?;
    lock.lock()?;
    if path.exists() {
        return Ok(path);
    }
    let unfinished = parent.join(format!(".{name}-{key}.unfinished"));
    remove(&unfinished)?;
    fs::create_dir(&unfinished)?;
    build(&unfinished)?;
    fs::rename(&unfinished, &path)?;
    forget_unused(parent, name, &path);
    Ok(path)
}

fn touch(path: &Path) {
    // Only for forget_unused: a failure costs a rebuild at most.
    let _ = File::open(path).and_then(|dir| dir.set_modified(SystemTime::now()));
}

fn forget_unused(parent: &Path, name: &str, just_built: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_str().is_some_and(|found| {
            found
                .rsplit_once('-')
                .is_some_and(|(prefix, _)| prefix == name)
        });
        let unused = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|when| when.elapsed().ok())
            .is_some_and(|age| age > KEPT_UNUSED);
        if ours && unused && entry.path() != just_built {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!(
                "cannot remove what is left of an earlier one, {}: {error}",
                path.display()
            )
        }
        _ => Ok(()),
    }
}

/// A directory for one run, removed at its end; the remains of killed runs are removed at the start of the next.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _held: File,
}

impl RunDir {
    pub fn new() -> Result<RunDir> {
        let runs = dir()?.join("runs");
        fs::create_dir_all(&runs)?;
        for old in fs::read_dir(&runs)?.flatten() {
            // A live run holds the lock of its directory.
            if File::open(old.path()).is_ok_and(|dir| dir.try_lock().is_ok()) {
                let _ = fs::remove_dir_all(old.path());
            }
        }
        // Made under another name first: a neighbour's sweep must never see it without its lock.
        let path = runs.join(format!(
            "{}-{}",
            std::process::id(),
            SystemTime::UNIX_EPOCH.elapsed()?.as_nanos()
        ));
        let aside = dir()?.join(format!(".run-{}", std::process::id()));
        remove(&aside)?;
        fs::create_dir(&aside)?;
        let held = File::open(&aside)?;
        held.lock()?;
        fs::rename(&aside, &path)?;
        Ok(RunDir { path, _held: held })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_build_that_fails_leaves_no_entry_and_the_next_one_starts_clean() {
        let parent = tempfile::tempdir().unwrap();
        let failed = entry(parent.path(), "thing", "1", |dir| {
            fs::write(dir.join("half"), "")?;
            bail!("killed")
        });
        assert!(failed.is_err());
        let path = entry(parent.path(), "thing", "1", |dir| {
            assert!(!dir.join("half").exists());
            fs::write(dir.join("whole"), "").map_err(Into::into)
        })
        .unwrap();
        assert!(path.join("whole").exists());
    }

    #[test]
    fn a_complete_entry_is_not_built_again() {
        let parent = tempfile::tempdir().unwrap();
        entry(parent.path(), "thing", "1", |_| Ok(())).unwrap();
        entry(parent.path(), "thing", "1", |_| bail!("built twice")).unwrap();
    }

    #[test]
    fn keys_tell_apart_what_only_joins_to_the_same_text() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    }
}
