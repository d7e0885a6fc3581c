//! What a guest is given: the files under test. A directory for the containers, and the same as a disk image for the
//! machines. The image's size is part of the snapshot; its content is not, because nothing reads it before the restore.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::cache::{self, RunDir};
use super::child;

/// Room for test executables with line tables and a real agent.
pub const IMAGE_SIZE: &str = "1536M";

/// A file in a payload with an empty ext4 file system in it: not every guest can make one.
pub const SMALL_DISK: &str = "small.ext4";

/// The directory in a payload with what `make packages` has built.
pub const PACKAGES: &str = "packages";

/// The directory in a payload with an `rpm` that runs in any guest, and the .rpm in two versions.
pub const RPM: &str = "rpm";

/// Fills it.
const MAKE_RPM: &str = include_str!("rpm.sh");

#[derive(Debug)]
pub struct Payload {
    run: RunDir,
    image: Mutex<Option<PathBuf>>,
}

impl Payload {
    /// An executable for each pair: its name inside, and where it is now.
    pub fn new(files: &[(&str, &Path)]) -> Result<Payload> {
        let run = RunDir::new()?;
        let dir = run.path().join("payload");
        fs::create_dir(&dir)?;
        for (name, from) in files {
            let to = dir.join(name);
            fs::copy(from, &to).with_context(|| {
                format!("cannot copy {} into the guests' payload", from.display())
            })?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Payload {
            run,
            image: Mutex::new(None),
        })
    }

    /// Adds the file system that a case may mount, and freeze.
    pub fn with_small_disk(self) -> Result<Payload> {
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-F", "-t", "ext4"]);
        command.arg(self.dir().join(SMALL_DISK)).arg("4M");
        child::succeed(&mut command, Duration::from_secs(60))?;
        Ok(self)
    }

    /// Adds the packages, where there are some.
    pub fn with_packages(self, built: &Path) -> Result<Payload> {
        let dir = self.dir().join(PACKAGES);
        fs::create_dir(&dir)?;
        let mut has_rpm = false;
        for entry in fs::read_dir(built).into_iter().flatten() {
            let path = entry?.path();
            has_rpm |= path.extension() == Some("rpm".as_ref());
            if let Some(name) = path
                .file_name()
                .filter(|_| path.extension() == Some("deb".as_ref()))
            {
                fs::copy(&path, dir.join(name))?;
            }
        }
        if has_rpm {
            let mut command = Command::new("sh");
            command.args(["-c", MAKE_RPM, "rpm.sh"]);
            command.arg(built).arg(self.dir().join(RPM));
            child::succeed(&mut command, Duration::from_secs(120))?;
        }
        Ok(self)
    }

    pub fn dir(&self) -> PathBuf {
        self.run.path().join("payload")
    }

    /// An empty directory of this run for everything that belongs to one guest. One that is booted once more begins anew.
    pub fn scratch(&self, guest: &str) -> Result<PathBuf> {
        let dir = self.run.path().join(guest);
        cache::remove(&dir)?;
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }

    /// The image, written at the first call.
    pub fn image(&self) -> Result<PathBuf> {
        let mut known = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = &*known {
            return Ok(image.clone());
        }
        let image = self.run.path().join("payload.ext4");
        let mut command = Command::new("mke2fs");
        command.args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-N",
            "256",
            "-m",
            "0",
            "-d",
        ]);
        command.arg(self.dir()).arg(&image).arg(IMAGE_SIZE);
        child::succeed(&mut command, Duration::from_secs(300))?;
        Ok(known.insert(image).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_booted_once_more_begins_anew() -> Result<()> {
        let payload = Payload::new(&[])?;
        fs::write(
            payload.scratch("guest")?.join("console.log"),
            "Kernel panic",
        )?;
        assert_eq!(fs::read_dir(payload.scratch("guest")?)?.count(), 0);
        Ok(())
    }
}
