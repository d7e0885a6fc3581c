//! Volumes and devices: copied from the host while its mounts are still heard of, laid into the view at the paths that the
//! job chose, for which a place is made where there is none. The host's own tree is never changed.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, mkdirat, symlinkat};
use rustix::io::Errno;

use super::layers::{self, Attributes, Finish, Layer, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};
use super::mounts::{is_of_an_allocation, layer, resolve};
use super::place::{TaskRoot, open_host, open_resolved};
use super::report::{At, Failure};
use crate::plan::steps::{Bind, BindKind, Order, Place, Propagation, Step, Write};

/// Each entry of a mirrored directory is a mount.
const MAX_MIRRORED: usize = 1_000;

/// Detached copies, with the paths that they are for.
#[derive(Debug)]
pub(super) struct Volumes {
    elsewhere: Vec<(PathBuf, OwnedFd)>,
    /// Relative to the task's directory.
    own: Vec<(PathBuf, OwnedFd)>,
}

/// To be called before propagation is cut: a copy made later would hear of no mount.
pub(super) fn open(order: &Order) -> Result<Volumes, Failure> {
    for bind in &order.binds {
        beside_the_allocations(bind, order)?;
    }
    let mut volumes = Volumes {
        elsewhere: Vec::new(),
        own: Vec::new(),
    };
    for bind in &order.binds {
        let tree = copy(bind)?;
        match &bind.target {
            Place::Host(path) => volumes.elsewhere.push((path.clone(), tree)),
            Place::Task(path) => volumes.own.push((path.clone(), tree)),
        }
    }
    volumes.own.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(volumes)
}

/// What holds the allocations would bring back their logs, for writing, and the secrets of others.
fn beside_the_allocations(bind: &Bind, order: &Order) -> Result<(), Failure> {
    let Some(source) = resolve(&bind.source)? else {
        return Ok(());
    };
    let task_dir = &order.task_dir;
    let holds = [&task_dir.alloc_dir, &task_dir.path]
        .into_iter()
        .any(|own| own.starts_with(&source));
    if holds || is_of_an_allocation(&source, task_dir) {
        return Err(Failure::new(Step::View, 0)
            .on(bind.source.display().to_string())
            .note("no source for a volume: it holds Nomad's allocations, or is in one; choose a directory beside them"));
    }
    Ok(())
}

fn copy(bind: &Bind) -> Result<OwnedFd, Failure> {
    let fail = |errno: Errno| {
        let target = bind.target.as_path().display();
        let what = match bind.kind {
            BindKind::Volume => "volume",
            BindKind::Device => "device",
        };
        Failure::new(Step::View, errno.raw_os_error())
            .on(bind.source.display().to_string())
            .note(format!("the host's side of the {what} at {target}"))
    };
    let source = open_host(&bind.source, OFlags::empty()).map_err(fail)?;
    let kind = FileType::from_raw_mode(fstat(&source).map_err(fail)?.st_mode);
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    if bind.kind == BindKind::Device && !is_device {
        return Err(Failure {
            errno: 0,
            ..fail(Errno::NXIO).note(format!("{} is no device", bind.source.display()))
        });
    }
    let propagation = match bind.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    layers::copy_as(source, attributes(bind, is_device), propagation).map_err(fail)
}

/// A volume that is a device, as CSI's block volumes are, or a part of /dev, is one whose devices work.
fn attributes(bind: &Bind, is_device: bool) -> Attributes {
    let mut set = NO_SUID;
    if is_device || bind.source.starts_with("/dev") {
        // They are written to all the same; nobody changes their owners and modes.
        set |= READ_ONLY;
    } else {
        set |= NO_DEV;
    }
    if bind.write == Write::Denied {
        set |= READ_ONLY;
    }
    set
}

impl Volumes {
    /// What comes before everything else: directories in which a mount point is missing, as they are, but with room for it.
    /// `is_made` tells the paths below which the view makes mount points by itself, `is_writable` those that the task may write.
    pub fn mirrors(
        &self,
        is_made: impl Fn(&Path) -> bool,
        is_writable: impl Fn(&Path) -> bool,
    ) -> Result<Vec<Layer>, Failure> {
        let mut mirrored: Vec<PathBuf> = Vec::new();
        for (path, _) in &self.elsewhere {
            let (there, missing) = split(path)?;
            let is_in_another = self
                .elsewhere
                .iter()
                .any(|(other, _)| other != path && path.starts_with(other));
            if !missing.as_os_str().is_empty() && !is_in_another && !is_made(path) {
                mirrored.push(there);
            }
        }
        mirrored.sort();
        mirrored.dedup();
        let mut layers = Vec::new();
        for directory in mirrored {
            layers.extend(mirror(&directory, &is_writable)?);
        }
        Ok(layers)
    }

    /// Whether one is to be at the path, or above it.
    pub fn cover(&self, path: &Path) -> bool {
        self.elsewhere
            .iter()
            .any(|(volume, _)| path.starts_with(volume))
    }

    /// Those outside of the task's directory. `own` are directories that must stay in sight.
    pub fn layers(&mut self, own: [&Path; 2]) -> Result<Vec<Layer>, Failure> {
        let volumes = std::mem::take(&mut self.elsewhere).into_iter();
        let layers = volumes.map(|(path, tree)| {
            let (there, missing) = split(&path)?;
            if own.iter().any(|own| own.starts_with(there.join(&missing))) {
                return Err(Failure::new(Step::View, 0)
                    .on(path.display().to_string())
                    .note("no place for a volume: the task's own directory lies in it"));
            }
            // A joined empty path would end in a slash, which makes it one of a directory.
            layer(
                there.components().chain(missing.components()).collect(),
                Ok(tree),
            )
        });
        layers.collect()
    }

    /// Those in it, once it is as the task sees it. A task may have planted links there.
    pub fn lay_own(self, root: &TaskRoot) -> Result<(), Failure> {
        for (path, tree) in &self.own {
            mount_point(root, path, tree)
                .and_then(|point| layers::move_onto(tree, point))
                .at_path(Step::View, root.path(path))?;
        }
        Ok(())
    }
}

fn mount_point(root: &TaskRoot, path: &Path, tree: &OwnedFd) -> Result<OwnedFd, Errno> {
    match (root.beneath(path, OFlags::empty()), path.file_name()) {
        (Err(Errno::NOENT), Some(name)) => {
            layers::make_entry(&directory(root, path.parent())?, name, tree)
        }
        (found, _) => found,
    }
}

fn directory(root: &TaskRoot, path: Option<&Path>) -> Result<OwnedFd, Errno> {
    let path = path.unwrap_or(Path::new(""));
    match (root.beneath(path, OFlags::DIRECTORY), path.file_name()) {
        (Err(Errno::NOENT), Some(name)) => {
            let parent = directory(root, path.parent())?;
            mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
            root.beneath(path, OFlags::DIRECTORY)
        }
        (found, _) => found,
    }
}

/// The part of a path that is there, with links followed, and the part that is missing.
fn split(path: &Path) -> Result<(PathBuf, PathBuf), Failure> {
    for ancestor in path.ancestors() {
        if let Some(there) = resolve(ancestor)? {
            let missing = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return Ok((there, missing.to_owned()));
        }
    }
    Ok((PathBuf::from("/"), path.to_owned()))
}

/// A directory of ours with everything in it that the host's has.
fn mirror(path: &Path, is_writable: &impl Fn(&Path) -> bool) -> Result<Vec<Layer>, Failure> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).at_path(Step::View, path)?;
    let options = [
        ("mode", format!("{:o}", meta.mode() & 0o7777)),
        ("uid", meta.uid().to_string()),
        ("gid", meta.gid().to_string()),
    ];
    let options: Vec<(&str, &str)> = options
        .iter()
        .map(|(key, value)| (*key, &**value))
        .collect();
    let top = layers::new_filesystem(c"tmpfs", &options, NO_SUID | NO_DEV | NO_EXEC)
        .at_path(Step::View, path)?;
    let mut entries = Vec::new();
    for entry in fs::read_dir(path).at_path(Step::View, path)? {
        let entry = entry.at_path(Step::View, path)?.path();
        if entries.len() == MAX_MIRRORED {
            let note = format!(
                "a volume's destination is missing in it, and it has more than {MAX_MIRRORED} entries; create the destination on the host"
            );
            return Err(Failure::new(Step::View, 0)
                .on(path.display().to_string())
                .note(note));
        }
        if let Ok(link) = fs::read_link(&entry) {
            let name = entry.file_name().unwrap_or_default();
            symlinkat(&link, &top, name).at_path(Step::View, &entry)?;
            continue;
        }
        let mut set = NO_SUID;
        if !entry.starts_with("/dev") {
            set |= NO_DEV;
        }
        if !is_writable(&entry) {
            set |= READ_ONLY;
        }
        let copied = open_resolved(&entry).and_then(|place| layers::clone_tree(place, set));
        match copied {
            // It went away meanwhile.
            Err(Errno::NOENT) => {}
            copied => entries.push(layer(entry, copied)?),
        }
    }
    entries.push(Layer {
        finish: Finish::Seal,
        ..layer(path.to_owned(), Ok(top))?
    });
    Ok(entries)
}
