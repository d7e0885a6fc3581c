//! The mount view: the whole tree read-only, nosuid and nodev, with the writable set cloned before and laid over it again,
//! and with masks over what must not be reached. It runs in a mount namespace of its own, as root.

use std::ffi::CStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use super::files;
use super::layers::{self, Finish, Layer, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};
use super::place::{TaskRoot, open_resolved};
use super::report::{At, Failure};
use super::volumes::Volumes;
use crate::mountinfo::{self, Mount};
use crate::plan::managers::{MANAGERS, kept};
use crate::plan::steps::{Order, RunMask, Step, TaskDir, Tree, View, Write};

const TERMINALS: &str = "/dev/pts";

/// Builds the view and returns the task's directory as it is in it.
pub(super) fn build(order: &Order, mut volumes: Volumes) -> Result<TaskRoot, Failure> {
    let view = &order.view;
    let_go_of_others(&order.task_dir)?;
    let root = TaskRoot::open(&order.task_dir, Step::View)?;
    // A volume that lies there has files of its own.
    let replaced = order.replaced.iter();
    let replaced: Vec<_> = replaced.filter(|file| !volumes.cover(&file.path)).collect();
    let mut layers = layers_of(view, &root, &order.task_dir.alloc_dir, &mut volumes)?;
    layers.extend(files::layers(&replaced)?);
    if view.tree == Tree::ReadOnly {
        let set = READ_ONLY | NO_SUID | NO_DEV;
        layers::set_attributes(c"/", libc::AT_RECURSIVE, set).at_path(Step::View, "/")?;
    }
    layers::lay(Step::View, layers)?;
    let root = TaskRoot::open(&order.task_dir, Step::View)?;
    close_logs(&root)?;
    volumes.lay_own(&root)?;
    Ok(root)
}

/// Everything that is laid over the tree, copied from it while it still is the host's.
fn layers_of(
    view: &View,
    root: &TaskRoot,
    alloc_dir: &Path,
    volumes: &mut Volumes,
) -> Result<Vec<Layer>, Failure> {
    let task_dir = resolve(&root.path(""))?.unwrap_or_else(|| root.path(""));
    let alloc_dir = resolve(alloc_dir)?.unwrap_or_else(|| alloc_dir.to_owned());
    let mut wanted = Wanted::all(view)?;
    for want in &mut wanted {
        // Nomad works there as root, and follows what it finds: a task writes by way of its own directory.
        if want.path.starts_with(&alloc_dir) && !want.path.starts_with(&task_dir) {
            want.write = Write::Denied;
        }
    }
    let brought = |path: &Path| wanted.iter().any(|want| path.starts_with(&want.path));
    let hidden: Vec<Mask> = Mask::all(view.run)?
        .into_iter()
        .filter(|mask| mask.is_kept() || !brought(&mask.path))
        .collect();
    let is_hidden = |path: &Path| hidden.iter().any(|mask| path.starts_with(&mask.path));

    let is_writable = |path: &Path| {
        view.tree == Tree::AsIs
            || wanted
                .iter()
                .any(|want| want.write == Write::Allowed && path.starts_with(&want.path))
    };
    let mut layers = volumes.mirrors(is_hidden, is_writable)?;
    layers.push(Layer {
        finish: Finish::Own,
        ..layer(
            task_dir.clone(),
            layers::clone_tree(root.fd(), NO_SUID | NO_DEV),
        )?
    });
    layers.push(proc(view)?);
    for path in view.masked.iter().filter(|path| path.exists()) {
        layers.push(unreadable(path)?);
    }
    let is_mirrored = layers
        .iter()
        .any(|layer| layer.path.parent() == Some(Path::new("/dev")));
    if view.tree == Tree::ReadOnly && !brought(Path::new("/dev")) && !is_mirrored {
        layers.extend(dev()?);
    }
    if !is_hidden(&alloc_dir) {
        layers.extend(copy(alloc_dir.clone(), Write::Denied)?);
    }
    for mask in &hidden {
        layers.push(mask.layer(root)?);
    }
    for path in exceptions(view.run)?
        .into_iter()
        .filter(|path| is_hidden(path))
    {
        layers.extend(copy(path, Write::Denied)?);
    }
    for want in &wanted {
        let writable = view.tree == Tree::ReadOnly && want.write == Write::Allowed;
        let needed = writable || is_hidden(&want.path);
        let covered = wanted.iter().any(|other| other.covers(want));
        let is_other = want.path.starts_with(&task_dir) || volumes.cover(&want.path);
        if needed && !covered && !is_other {
            layers.extend(copy(want.path.clone(), want.write)?);
        }
    }
    layers.extend(volumes.layers([&task_dir, &alloc_dir])?);
    Ok(layers)
}

/// A path that the job or the operator asked for: to be writable, or to be seen in spite of a mask.
#[derive(Debug)]
struct Wanted {
    path: PathBuf,
    write: Write,
}

impl Wanted {
    fn all(view: &View) -> Result<Vec<Wanted>, Failure> {
        let paths = view.writable.iter().map(|path| (path, Write::Allowed));
        let paths = paths.chain(view.kept.iter().map(|path| (path, Write::Denied)));
        let mut all = Vec::new();
        // The task has its own of these, whoever unveils them.
        let is_own = |path: &Path| path.starts_with("/proc") || path.starts_with(TERMINALS);
        // A path that is missing is for the unveil rules to name, or to skip.
        for (written, write) in paths.filter(|(path, _)| !is_own(path)) {
            let Some(path) = resolve(written)? else {
                continue;
            };
            if path == Path::new("/") {
                return Err(Failure::new(Step::View, 0)
                    .on(written.display().to_string())
                    .note("it is a link to /; unveil / itself"));
            }
            all.push(Wanted { path, write });
        }
        let managers = managers()?;
        // By a link, what is not unveiled for writing could lead to what only that brings back.
        all.retain(|want| want.write == Write::Allowed || !want.meets(&managers));
        all.sort_by(|a, b| a.path.cmp(&b.path).then(b.write.cmp(&a.write)));
        all.dedup_by(|later, first| later.path == first.path);
        Ok(all)
    }

    fn meets(&self, others: &[PathBuf]) -> bool {
        others
            .iter()
            .any(|other| other.starts_with(&self.path) || self.path.starts_with(other))
    }

    fn covers(&self, other: &Wanted) -> bool {
        self.path != other.path && other.path.starts_with(&self.path) && self.write >= other.write
    }
}

/// A directory of the host that the task sees something else in place of.
#[derive(Debug)]
struct Mask {
    path: PathBuf,
    instead: Instead,
}

#[derive(Debug, Clone, Copy)]
enum Instead {
    Nothing,
    TaskTmp,
    SharedMemory,
    MessageQueues,
    Terminals,
}

impl Mask {
    /// Also where what it hides is unveiled.
    fn is_kept(&self) -> bool {
        matches!(self.instead, Instead::Terminals)
    }

    /// All masks that have something to hide on this host.
    fn all(run: RunMask) -> Result<Vec<Mask>, Failure> {
        let mut candidates = vec![
            (PathBuf::from("/tmp"), Instead::TaskTmp),
            (PathBuf::from("/dev/shm"), Instead::SharedMemory),
            (PathBuf::from("/dev/mqueue"), Instead::MessageQueues),
            // Those of the host belong to whoever is logged in, and chmod is not Landlock's business.
            (PathBuf::from(TERMINALS), Instead::Terminals),
        ];
        for base in run_directories()? {
            match run {
                RunMask::All => candidates.push((base, Instead::Nothing)),
                RunMask::Managers => {
                    candidates.extend(MANAGERS.map(|name| (base.join(name), Instead::Nothing)));
                }
            }
        }
        let mut masks = Vec::new();
        for (path, instead) in candidates {
            masks.extend(resolve(&path)?.map(|path| Mask { path, instead }));
        }
        Ok(masks)
    }

    fn layer(&self, root: &TaskRoot) -> Result<Layer, Failure> {
        let filesystem = |kind: &CStr, options: &[(&str, &str)]| {
            layers::new_filesystem(kind, options, NO_SUID | NO_DEV)
        };
        let made = match self.instead {
            Instead::Nothing => {
                return Ok(Layer {
                    finish: Finish::Seal,
                    ..layer(self.path.clone(), layers::empty())?
                });
            }
            Instead::TaskTmp => {
                let tmp = root
                    .beneath("tmp", OFlags::DIRECTORY)
                    .at_path(Step::View, root.path("tmp"))?;
                layers::clone_tree(tmp, NO_SUID | NO_DEV)
            }
            Instead::SharedMemory => filesystem(c"tmpfs", &[("mode", "1777")]),
            Instead::MessageQueues => filesystem(c"mqueue", &[]),
            // /dev/ptmx finds its terminals in the `pts` beside it.
            Instead::Terminals => layers::new_filesystem(
                c"devpts",
                &[("mode", "0600"), ("ptmxmode", "0666")],
                NO_SUID | NO_EXEC,
            ),
        };
        Ok(Layer {
            finish: Finish::Own,
            ..layer(self.path.clone(), made)?
        })
    }
}

/// What leads to managers of the host, where it is.
fn managers() -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for base in run_directories()? {
        for name in MANAGERS {
            paths.extend(resolve(&base.join(name))?);
        }
    }
    Ok(paths)
}

/// What the masks of /run leave in place.
fn exceptions(run: RunMask) -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for base in run_directories()? {
        paths.extend(kept(run).map(|name| base.join(name)));
    }
    // NetworkManager, resolvconf and others keep the resolver's configuration in /run too.
    paths.extend(resolve(Path::new("/etc/resolv.conf"))?);
    Ok(paths)
}

/// /run, and /var/run where it is not a link to it.
fn run_directories() -> Result<Vec<PathBuf>, Failure> {
    let mut directories = Vec::new();
    for path in ["/run", "/var/run"] {
        directories.extend(resolve(Path::new(path))?);
    }
    directories.dedup();
    Ok(directories)
}

/// The task's own /proc. Read-only, as chmod of an entry in it is a chmod in every other /proc.
fn proc(view: &View) -> Result<Layer, Failure> {
    let writable = view.writable.iter().any(|path| path.starts_with("/proc"));
    let set = match view.tree {
        Tree::ReadOnly if !writable => NO_SUID | NO_DEV | NO_EXEC | READ_ONLY,
        _ => NO_SUID | NO_DEV | NO_EXEC,
    };
    layer("/proc".into(), layers::new_filesystem(c"proc", &[], set))
}

/// A device where devices do not work: nobody can open it.
fn unreadable(path: &Path) -> Result<Layer, Failure> {
    let null = open_resolved(Path::new("/dev/null")).at_path(Step::View, "/dev/null")?;
    layer(
        path.to_owned(),
        layers::clone_tree(null, NO_SUID | NO_DEV | NO_EXEC | READ_ONLY),
    )
}

/// /dev as it is, but read-only: devices are written to all the same, and nobody changes their owners and modes.
fn dev() -> Result<Option<Layer>, Failure> {
    match open_resolved(Path::new("/dev")) {
        Err(Errno::NOENT) => Ok(None),
        place => {
            let place = place.at_path(Step::View, "/dev")?;
            layer(
                "/dev".into(),
                layers::clone_tree(place, NO_SUID | READ_ONLY),
            )
            .map(Some)
        }
    }
}

/// A place of the host as it is now, to be laid over the read-only tree or into a mask.
fn copy(path: PathBuf, write: Write) -> Result<Option<Layer>, Failure> {
    let place = match open_resolved(&path) {
        Err(Errno::NOENT) => return Ok(None),
        place => place.at_path(Step::View, &path)?,
    };
    let kind = FileType::from_raw_mode(fstat(&place).at_path(Step::View, &path)?.st_mode);
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    let among_devices = path.starts_with("/dev");
    if is_device && among_devices {
        // Works read-only where it is; and /dev/ptmx in a mount of its own finds no terminals beside it.
        return Ok(None);
    }
    let mut set = NO_SUID;
    if !is_device && !among_devices {
        set |= NO_DEV;
    }
    if is_device || write == Write::Denied {
        set |= READ_ONLY;
    }
    layer(path, layers::clone_tree(place, set)).map(Some)
}

/// Nomad's root process writes and rotates the logs; whoever could create a link there would write through it as root.
fn close_logs(root: &TaskRoot) -> Result<(), Failure> {
    let path = root.path("alloc/logs");
    let logs = root
        .beneath("alloc/logs", OFlags::DIRECTORY)
        .at_path(Step::View, &path)?;
    layers::clone_tree(&logs, NO_SUID | NO_DEV | NO_EXEC | READ_ONLY)
        .and_then(|tree| layers::move_onto(&tree, &logs))
        .at_path(Step::View, &path)
}

/// Lets go of what belongs to other allocations: their secrets, their views, the network namespaces. In a tree that hears
/// nothing of the host's unmounts they would live on for as long as this task, and within its reach.
fn let_go_of_others(task_dir: &TaskDir) -> Result<(), Failure> {
    let table = "/proc/self/mountinfo";
    let text = fs::read(table).at_path(Step::View, table)?;
    let text = String::from_utf8_lossy(&text);
    let others: Vec<PathBuf> = mountinfo::parse(&text)
        .filter(|mount| is_of_others(mount, task_dir))
        .map(|mount| mount.point)
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    layers::leave_out(&others).map_err(|errno| {
        let failure = Failure::new(Step::View, errno.raw_os_error()).on("/");
        match errno {
            Errno::INVAL => failure
                .note("mounts of other allocations cannot be left out; is the root the initramfs?"),
            _ => failure,
        }
    })
}

fn is_of_others(mount: &Mount, task_dir: &TaskDir) -> bool {
    let point = &mount.point;
    if point.starts_with(&task_dir.path) || task_dir.path.starts_with(point) {
        return false;
    }
    mount.filesystem == "nsfs" || is_of_an_allocation(point, task_dir)
}

/// Whether a path is one of an allocation's, or below it: this one's, or another's beside it.
pub(super) fn is_of_an_allocation(path: &Path, task_dir: &TaskDir) -> bool {
    [&task_dir.path, &task_dir.alloc_dir]
        .into_iter()
        .any(|own| {
            let below = own.parent().and_then(|base| path.strip_prefix(base).ok());
            let first = below.and_then(|below| below.components().next());
            path.starts_with(own)
                || first.is_some_and(|first| begins_with_uuid(first.as_os_str().as_bytes()))
        })
}

/// Nomad names an allocation's directories by its id; whatever else lies beside them is not Nomad's.
fn begins_with_uuid(name: &[u8]) -> bool {
    name.len() >= 36
        && name[..36].iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

pub(super) fn layer(path: PathBuf, tree: Result<OwnedFd, Errno>) -> Result<Layer, Failure> {
    let tree = tree.at_path(Step::View, &path)?;
    Ok(Layer {
        path,
        tree,
        finish: Finish::Keep,
    })
}

/// The path with all links followed; `None` if there is nothing.
pub(super) fn resolve(path: &Path) -> Result<Option<PathBuf>, Failure> {
    match fs::canonicalize(path) {
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
                || error.raw_os_error() == Some(libc::ELOOP) =>
        {
            Ok(None)
        }
        result => result.map(Some).at_path(Step::View, path),
    }
}
