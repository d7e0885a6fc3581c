//! An allocation's directories, laid out and owned as Nomad does it for a driver that unveils paths: the allocation below one
//! root, and each task's own view of it, made of bind mounts, below another. Root only. Whatever was mounted is unmounted
//! when the value goes away.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::mountinfo;

/// Owner of the directories that every task of the group may write. 65534 on every distribution we know.
const NOBODY: u32 = 65534;
const SECRETS_MIB: u32 = 1;

/// Where allocations live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// Nomad's `alloc_dir`: one directory for each allocation.
    pub allocs: PathBuf,
    /// Nomad's `alloc_mounts_dir`: one directory for each task.
    pub mounts: PathBuf,
}

/// The paths of one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskPaths {
    /// M, parent of the next three and of `tmp`: what the task sees.
    pub root: PathBuf,
    pub local: PathBuf,
    pub alloc: PathBuf,
    pub secrets: PathBuf,
    /// The log FIFOs, or /dev/null.
    pub stdout: PathBuf,
    pub stderr: PathBuf,
}

/// Who a task runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}")]
pub struct AllocDirError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// One allocation's directories.
#[derive(Debug)]
pub struct AllocDir {
    path: PathBuf,
    mounts: PathBuf,
    /// M of each task.
    roots: Vec<PathBuf>,
}

impl AllocDir {
    /// Makes the part that the tasks of a group share. `mounts` of the roots must be traversable by the tasks' users.
    pub fn create(roots: &Roots, alloc_id: &str) -> Result<Self, AllocDirError> {
        make_all(&roots.allocs)?;
        make_all(&roots.mounts)?;
        let dir = AllocDir {
            path: roots.allocs.join(alloc_id),
            mounts: roots.mounts.clone(),
            roots: Vec::new(),
        };
        make(&dir.path, 0o755)?;
        let shared = dir.path.join("alloc");
        for path in [
            shared.clone(),
            shared.join("logs"),
            shared.join("tmp"),
            shared.join("data"),
        ] {
            make_owned(
                &path,
                0o777,
                Owner {
                    uid: NOBODY,
                    gid: NOBODY,
                },
            )?;
        }
        Ok(dir)
    }

    /// `alloc_dir` of the request.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the logs of all tasks are.
    pub fn logs(&self) -> PathBuf {
        self.path.join("alloc/logs")
    }

    /// Makes one task's directories and its view of them. Its log paths are /dev/null until [`AllocDir::fifos`].
    pub fn task(&mut self, name: &str, owner: Owner) -> Result<TaskPaths, AllocDirError> {
        let nobody = Owner {
            uid: NOBODY,
            gid: NOBODY,
        };
        let dir = self.path.join(name);
        make(&dir, 0o777)?;
        make_owned(&dir.join("local"), 0o777, nobody)?;
        make_owned(&dir.join("tmp"), 0o1777, nobody)?;
        make(&dir.join("alloc"), 0o755)?;
        for private in ["secrets", "private"] {
            make(&dir.join(private), 0o700)?;
            mount_private(&dir.join(private))?;
        }
        own(&dir.join("secrets"), 0o710, owner)?;

        let alloc_id = self.path.file_name().unwrap_or_default().to_string_lossy();
        let root = self.mounts.join(format!("{alloc_id}-{name}"));
        make(&root, 0o710)?;
        self.roots.push(root.clone());
        bind(&dir, &root)?;
        // Through the bind mount this reaches the directory below `allocs` as well.
        own(&root, 0o710, owner)?;
        bind(&self.path.join("alloc"), &root.join("alloc"))?;
        bind(&dir.join("secrets"), &root.join("secrets"))?;
        Ok(TaskPaths {
            local: root.join("local"),
            alloc: root.join("alloc"),
            secrets: root.join("secrets"),
            root,
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
        })
    }

    /// Makes a task's log FIFOs, which belong to root until the driver hands them on.
    pub fn fifos(&self, name: &str, paths: &mut TaskPaths) -> Result<(), AllocDirError> {
        paths.stdout = self.logs().join(format!(".{name}.stdout.fifo"));
        paths.stderr = self.logs().join(format!(".{name}.stderr.fifo"));
        for fifo in [&paths.stdout, &paths.stderr] {
            match fs::remove_file(fifo) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", fifo, error));
                }
                _ => {}
            }
            mkfifo(fifo, Mode::from_bits_truncate(0o600))
                .map_err(|errno| failed("create FIFO", fifo, errno.into()))?;
        }
        Ok(())
    }

    /// Lets everything be, as something still runs in it.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Unmounts and removes everything, and says what could not be.
    pub fn remove(mut self) -> Result<(), AllocDirError> {
        self.clear()
    }

    fn clear(&mut self) -> Result<(), AllocDirError> {
        let mut trees = std::mem::take(&mut self.roots);
        trees.push(self.path.clone());
        for tree in &trees {
            unmount_below(tree)?;
        }
        for tree in &trees {
            match fs::remove_dir_all(tree) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", tree, error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for AllocDir {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> AllocDirError {
    AllocDirError {
        action,
        path: path.to_owned(),
        source,
    }
}

fn make_all(path: &Path) -> Result<(), AllocDirError> {
    // Readable by root only, but traversable: a task reaches its own directory and lists no other.
    let made = DirBuilder::new().recursive(true).mode(0o711).create(path);
    made.map_err(|error| failed("create", path, error))
}

/// The mode is set again after mkdir, past the umask.
fn make(path: &Path, mode: u32) -> Result<(), AllocDirError> {
    fs::create_dir(path).map_err(|error| failed("create", path, error))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|error| failed("change the mode of", path, error))
}

fn make_owned(path: &Path, mode: u32, owner: Owner) -> Result<(), AllocDirError> {
    make(path, mode)?;
    own(path, mode, owner)
}

fn own(path: &Path, mode: u32, owner: Owner) -> Result<(), AllocDirError> {
    chown(path, Some(owner.uid), Some(owner.gid))
        .map_err(|error| failed("change the owner of", path, error))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|error| failed("change the mode of", path, error))
}

fn bind(from: &Path, to: &Path) -> Result<(), AllocDirError> {
    let mounted = mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    mounted.map_err(|errno| failed("bind-mount", to, errno.into()))
}

/// Mounts the small tmpfs that holds secrets. `noswap` exists since Linux 6.4; before, secrets may reach the swap.
fn mount_private(path: &Path) -> Result<(), AllocDirError> {
    let try_mount = |data: String| {
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            MsFlags::MS_NOEXEC,
            Some(data.as_str()),
        )
    };
    try_mount(format!("size={SECRETS_MIB}m,noswap"))
        .or_else(|_| try_mount(format!("size={SECRETS_MIB}m")))
        .map_err(|errno| failed("mount a tmpfs on", path, errno.into()))?;
    let marker = path.join(".nomad-mount");
    fs::write(&marker, "").map_err(|error| failed("write", &marker, error))
}

/// Unmounts what the mount table shows below a path, last mounted first: where `/` is shared, mounts made in a task's root
/// appear below the allocation's directory as well, and go away with either of the two.
fn unmount_below(tree: &Path) -> Result<(), AllocDirError> {
    let table = Path::new("/proc/self/mountinfo");
    loop {
        let text = fs::read_to_string(table).map_err(|error| failed("read", table, error))?;
        let points = mountinfo::parse(&text).map(|mount| mount.point);
        let Some(last) = points.rev().find(|point| point.starts_with(tree)) else {
            return Ok(());
        };
        umount2(&last, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| failed("unmount", &last, errno.into()))?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    fn mounts_below(path: &Path) -> usize {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mountinfo::parse(&table)
            .filter(|mount| mount.point.starts_with(path))
            .count()
    }

    #[test]
    fn a_task_s_directories_are_nomad_s_and_leave_nothing_behind() {
        assert!(nix::unistd::geteuid().is_root(), "needs root");
        let base = tempfile::tempdir().unwrap();
        let roots = Roots {
            allocs: base.path().join("alloc"),
            mounts: base.path().join("alloc_mounts"),
        };
        let owner = Owner {
            uid: 81234,
            gid: 81234,
        };
        let mut dir = AllocDir::create(&roots, "5a6f").unwrap();
        let mut paths = dir.task("my web", owner).unwrap();
        dir.fifos("my web", &mut paths).unwrap();

        let seen = |path: &Path| {
            let meta = fs::metadata(path).unwrap();
            (meta.uid(), meta.mode() & 0o7777, meta.ino())
        };
        let below = dir.path().join("my web");
        assert_eq!(seen(&paths.root), seen(&below));
        assert_eq!(seen(&paths.root).0, 81234);
        assert_eq!(seen(&paths.root).1, 0o710);
        assert_eq!(seen(&paths.local), seen(&below.join("local")));
        assert_eq!(seen(&paths.local).1, 0o777);
        assert_eq!(seen(&paths.secrets), seen(&below.join("secrets")));
        assert_eq!(seen(&paths.secrets).0, 81234);
        assert_eq!(seen(&paths.alloc), seen(&dir.path().join("alloc")));
        assert_eq!(seen(&paths.root.join("tmp")).1, 0o1777);
        assert!(fs::metadata(&paths.stdout).unwrap().file_type().is_fifo());
        assert!(mounts_below(base.path()) >= 5);

        dir.remove().unwrap();
        assert_eq!(mounts_below(base.path()), 0);
        assert_eq!(fs::read_dir(&roots.allocs).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&roots.mounts).unwrap().count(), 0);
    }
}
