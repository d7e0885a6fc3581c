//! Detached mounts and how they are laid over the tree. It knows the mount calls, and nothing of what a task should see.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use super::place::open_resolved;
use super::report::{At, Failure};
use crate::plan::steps::Step;
use crate::sys;

/// Mount attributes, `libc::MOUNT_ATTR_*`.
pub(super) type Attributes = u64;

pub(super) const READ_ONLY: Attributes = libc::MOUNT_ATTR_RDONLY;
pub(super) const NO_SUID: Attributes = libc::MOUNT_ATTR_NOSUID;
pub(super) const NO_DEV: Attributes = libc::MOUNT_ATTR_NODEV;
pub(super) const NO_EXEC: Attributes = libc::MOUNT_ATTR_NOEXEC;

/// What is done to a layer once everything is in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// Nothing. It is the host's: no mount point is made in it.
    Keep,
    /// Nothing. It is the task's own, and mount points may be made in it.
    Own,
    /// It is the task's own, mount points for others were made in it, and now it becomes read-only.
    Seal,
}

/// A detached mount and where it belongs.
#[derive(Debug)]
pub(super) struct Layer {
    pub path: PathBuf,
    pub tree: OwnedFd,
    pub finish: Finish,
}

/// Lays the layers over the tree, outer ones first, and seals those that want it.
pub(super) fn lay(step: Step, mut layers: Vec<Layer>) -> Result<(), Failure> {
    layers.sort_by(|a, b| a.path.cmp(&b.path));
    for (at, layer) in layers.iter().enumerate() {
        let laid = if layer.path == Path::new("/") {
            replace_root(&layer.tree)
        } else {
            attach(layer, lies_in_own(layer, &layers[..at]))
        };
        laid.at_path(step, &layer.path)?;
    }
    for layer in layers.iter().filter(|layer| layer.finish == Finish::Seal) {
        sys::mount_setattr(&layer.tree, c"", libc::AT_EMPTY_PATH, READ_ONLY, 0)
            .at_path(step, &layer.path)?;
    }
    Ok(())
}

/// Whether the uppermost of the layers below it is one of the task's own.
fn lies_in_own(layer: &Layer, earlier: &[Layer]) -> bool {
    let below = earlier
        .iter()
        .filter(|other| layer.path != other.path && layer.path.starts_with(&other.path));
    // Of two at one path the later lies on the earlier.
    let uppermost = below.max_by_key(|other| other.path.as_os_str().len());
    uppermost.is_some_and(|other| other.finish != Finish::Keep)
}

fn attach(layer: &Layer, may_make: bool) -> Result<(), Errno> {
    let target = match open_resolved(&layer.path) {
        Err(Errno::NOENT) if may_make => make_mount_point(layer)?,
        result => result?,
    };
    move_onto(&layer.tree, target)
}

pub(super) fn move_onto(tree: &OwnedFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Where nothing lies under the layer, in one of the task's own: a mask, a mirror, or its tmp.
fn make_mount_point(layer: &Layer) -> Result<OwnedFd, Errno> {
    let (Some(parent), Some(name)) = (layer.path.parent(), layer.path.file_name()) else {
        return Err(Errno::NOENT);
    };
    make_entry(&make_directory(parent)?, name, &layer.tree)
}

/// Makes a directory for a directory to be mounted on, and a file for anything else.
pub(super) fn make_entry(
    parent: &OwnedFd,
    name: impl AsRef<Path>,
    tree: impl AsFd,
) -> Result<OwnedFd, Errno> {
    let name = name.as_ref();
    match FileType::from_raw_mode(fstat(tree)?.st_mode) {
        FileType::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o755))?,
        _ => drop(openat(
            parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )?),
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// The directory at an absolute path, made if it is missing, through no link.
fn make_directory(path: &Path) -> Result<OwnedFd, Errno> {
    match (open_resolved(path), path.parent(), path.file_name()) {
        (Err(Errno::NOENT), Some(parent), Some(name)) => {
            mkdirat(make_directory(parent)?, name, Mode::from_raw_mode(0o755))?;
            open_resolved(path)
        }
        (result, ..) => result,
    }
}

/// A copy of the mounts at an open place.
pub(super) fn clone_tree(place: impl AsFd, set: Attributes) -> Result<OwnedFd, Errno> {
    copy_as(place, set, 0)
}

/// The same with a propagation, `libc::MS_PRIVATE` or `libc::MS_SLAVE`; 0 keeps what it is.
pub(super) fn copy_as(
    place: impl AsFd,
    set: Attributes,
    propagation: u64,
) -> Result<OwnedFd, Errno> {
    let tree = copy_tree(place)?;
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    sys::mount_setattr(&tree, c"", flags, set, propagation).map_err(errno)?;
    Ok(tree)
}

fn copy_tree(place: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    open_tree(place, "", flags)
}

/// A new file system: tmpfs, proc, mqueue.
pub(super) fn new_filesystem(
    kind: &CStr,
    options: &[(&str, &str)],
    set: Attributes,
) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)?;
    }
    fsconfig_create(&context)?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(set as u32),
    )
}

/// An empty directory of its own, to hide what is at a place, or to hold some of it.
pub(super) fn empty() -> Result<OwnedFd, Errno> {
    new_filesystem(c"tmpfs", &[("mode", "0755")], NO_SUID | NO_DEV | NO_EXEC)
}

/// Changes what is mounted at exactly this path.
pub(super) fn set_attributes(path: &CStr, flags: i32, set: Attributes) -> Result<(), Errno> {
    sys::mount_setattr(CWD, path, flags, set, 0).map_err(errno)
}

/// Replaces the whole tree by a copy of it without these mounts and what is on them. To unmount them one by one would wait
/// for an RCU grace period each time, some 0.1 ms; here only the old tree is unmounted, once.
pub(super) fn leave_out(points: &[PathBuf]) -> Result<(), Errno> {
    let root = open_resolved(Path::new("/"))?;
    // An unbindable mount is not copied, nor is what is on it. Where it lies, nothing of these mounts may; and not on the root
    // itself, or the old tree would stay behind it.
    let sink = empty()?;
    move_onto(&sink, open_resolved(Path::new("/sys"))?)?;
    let itself = format!("/proc/self/fd/{}", sink.as_raw_fd());
    mount_change(itself, MountPropagationFlags::UNBINDABLE)?;
    for (number, point) in points.iter().enumerate() {
        // Of several mounts at one place a path leads to the uppermost; moved away, it lays bare the next.
        match sink_mount(point, &sink, &number.to_string()) {
            // It went with the one that it was on.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::INVAL) => {}
            sunk => sunk?,
        }
    }
    replace_root(&copy_tree(&root)?)
}

/// Makes a tree the root of this process' mount namespace, and lets go of the old one.
fn replace_root(tree: &OwnedFd) -> Result<(), Errno> {
    move_onto(tree, open_resolved(Path::new("/"))?)?;
    fchdir(tree)?;
    // With both names the same, the old root comes to lie on the new one.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

fn sink_mount(point: &Path, sink: &OwnedFd, name: &str) -> Result<(), Errno> {
    let mount = open_resolved(point)?;
    let place = make_entry(sink, name, &mount)?;
    move_onto(&mount, place)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
