//! Opening paths: those of the task's directory beneath it and without links, as a task could have planted them; those of
//! the host as they are written.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use super::report::{At, Failure};
use crate::plan::steps::{Place, Step, TaskDir};

/// The task's directory, verified.
#[derive(Debug)]
pub(super) struct TaskRoot {
    directory: OwnedFd,
    path: PathBuf,
}

impl TaskRoot {
    /// Opens it in the present mount namespace: a descriptor from another one would lead into that one's mounts.
    pub fn open(expected: &TaskDir, step: Step) -> Result<TaskRoot, Failure> {
        let path = expected.path.clone();
        let directory =
            open_host(&path, OFlags::DIRECTORY | OFlags::NOFOLLOW).at_path(step, &path)?;
        let found = fstat(&directory).at_path(step, &path)?;
        if (found.st_dev, found.st_ino) != (expected.device, expected.inode) {
            return Err(Failure::new(step, 0)
                .on(path.display().to_string())
                .note("another directory took its place after it was verified"));
        }
        Ok(TaskRoot { directory, path })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.path.join(below)
    }

    /// An O_PATH descriptor of what is at `path` beneath the directory. A symbolic link anywhere in it is ELOOP.
    pub fn beneath(&self, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd, Errno> {
        open_without_links(
            &self.directory,
            non_empty(path.as_ref()),
            flags,
            ResolveFlags::BENEATH,
        )
    }

    /// An O_PATH descriptor of a place, with the rights of the calling process. Links in the task's directory may have been
    /// planted: one that leads out is EXDEV.
    pub fn open_place(&self, place: &Place, flags: OFlags) -> Result<OwnedFd, Errno> {
        match place {
            Place::Task(path) => open_beneath(
                &self.directory,
                non_empty(path),
                flags,
                ResolveFlags::BENEATH,
            ),
            Place::Host(path) => open_host(path, flags),
        }
    }

    /// Likewise, and no link of /proc is followed either: it leads to what is the calling process' own.
    pub fn open_without_magic(&self, place: &Place) -> Result<OwnedFd, Errno> {
        match place {
            Place::Task(_) => self.open_place(place, OFlags::empty()),
            Place::Host(path) => open_beneath(CWD, path, OFlags::empty(), ResolveFlags::empty()),
        }
    }
}

fn non_empty(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// An O_PATH descriptor of a path of the host, following links.
pub(super) fn open_host(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// An O_PATH descriptor of an absolute path of which no component is a link.
pub(super) fn open_resolved(path: &Path) -> Result<OwnedFd, Errno> {
    open_without_links(CWD, path, OFlags::empty(), ResolveFlags::empty())
}

pub(super) fn open_without_links(
    directory: impl AsFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let found = open_beneath(
        directory,
        path,
        flags | OFlags::NOFOLLOW,
        resolve | ResolveFlags::NO_SYMLINKS,
    )?;
    // Of a link at the very end, O_PATH and O_NOFOLLOW give the link itself.
    match FileType::from_raw_mode(fstat(&found)?.st_mode) {
        FileType::Symlink => Err(Errno::LOOP),
        _ => Ok(found),
    }
}

fn open_beneath(
    directory: impl AsFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    loop {
        match openat2(
            &directory,
            path,
            flags | OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            resolve | ResolveFlags::NO_MAGICLINKS,
        ) {
            // The kernel could not rule out an escape because something was renamed meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}
