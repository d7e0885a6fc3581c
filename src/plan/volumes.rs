//! Volumes of the host and of CSI plugins, and devices of device plugins: what is laid into the task's view, and unveiled
//! with it.

use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use super::steps::{Access, Bind, BindKind, Place, Propagation, Rule, Source, Write};
use super::unveil::{Alias, own_place};
use crate::task::types::{Device, Mount, MountMode};

#[derive(Debug, Error, PartialEq, Eq)]
pub enum VolumeError {
    #[error("volume_mount: destination = {destination:?} {problem}")]
    Destination {
        destination: PathBuf,
        problem: &'static str,
    },
    #[error(
        "volume_mount {destination:?}: propagation_mode = {mode:?} is not possible, as a task must not mount onto the host; write \"private\" or \"host-to-task\""
    )]
    Propagation { destination: PathBuf, mode: String },
    #[error(
        "volume_mount {destination:?}: propagation_mode = \"host-to-task\" is not possible for root, to whom a later mount of the host would come with its own set-uid files and devices; write \"private\", or run the task as another user"
    )]
    SlaveForRoot { destination: PathBuf },
    #[error(
        "volume_mount {destination:?}: selinux_label = {label:?} is not possible, as no file is relabelled; leave it out"
    )]
    Label { destination: PathBuf, label: String },
    #[error("device {path:?}: its path in the task {problem}")]
    Device {
        path: PathBuf,
        problem: &'static str,
    },
}

/// What is laid into the view, and the rules that open it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Volumes {
    pub binds: Vec<Bind>,
    pub rules: Vec<Rule>,
}

/// `aliases` are the names of the task's own directory.
pub fn volumes(
    mounts: &[Mount],
    devices: &[Device],
    is_root: bool,
    aliases: &[Alias],
) -> Result<Volumes, VolumeError> {
    let mut volumes = Volumes::default();
    for mount in mounts {
        let (bind, access) = volume(mount, aliases)?;
        if is_root && bind.propagation == Propagation::Slave {
            let destination = mount.task_path.clone();
            return Err(VolumeError::SlaveForRoot { destination });
        }
        volumes.add(bind, &mount.task_path, access);
    }
    for given in devices {
        let (bind, access) = device(given)?;
        volumes.add(bind, &given.task_path, access);
    }
    Ok(volumes)
}

impl Volumes {
    fn add(&mut self, bind: Bind, written: &Path, access: Access) {
        self.rules.push(Rule {
            place: bind.target.clone(),
            written: written.to_owned(),
            access,
            source: Source::Driver,
        });
        self.binds.push(bind);
    }
}

fn volume(mount: &Mount, aliases: &[Alias]) -> Result<(Bind, Access), VolumeError> {
    let destination = mount.task_path.clone();
    let propagation = match mount.propagation.as_str() {
        "" | "private" => Propagation::Private,
        "host-to-task" => Propagation::Slave,
        mode => {
            return Err(VolumeError::Propagation {
                destination,
                mode: mode.into(),
            });
        }
    };
    if !mount.selinux_label.is_empty() {
        return Err(VolumeError::Label {
            destination,
            label: mount.selinux_label.clone(),
        });
    }
    let target = target(&destination, aliases).map_err(|problem| VolumeError::Destination {
        destination: destination.clone(),
        problem,
    })?;
    let write = match mount.mode {
        MountMode::ReadOnly => Write::Denied,
        MountMode::ReadWrite => Write::Allowed,
    };
    let access = Access {
        read: true,
        execute: true,
        write: write == Write::Allowed,
        create: write == Write::Allowed,
    };
    let bind = Bind {
        kind: BindKind::Volume,
        source: mount.host_path.clone(),
        target,
        write,
        propagation,
    };
    Ok((bind, access))
}

/// Permissions are those of the device cgroup, `rwm`; the m, to make nodes, is nobody's.
fn device(device: &Device) -> Result<(Bind, Access), VolumeError> {
    let target = target(&device.task_path, &[]).map_err(|problem| VolumeError::Device {
        path: device.host_path.clone(),
        problem,
    })?;
    let may =
        |letter| device.cgroup_permissions.is_empty() || device.cgroup_permissions.contains(letter);
    let access = Access {
        read: may('r'),
        write: may('w'),
        ..Access::default()
    };
    let bind = Bind {
        kind: BindKind::Device,
        source: device.host_path.clone(),
        target,
        // A device is written to all the same: this is about its owner and mode.
        write: Write::Denied,
        propagation: Propagation::Private,
    };
    Ok((bind, access))
}

/// Directories in which the view has something of its own, which no volume may replace.
const TAKEN: [&str; 5] = ["/", "/dev", "/etc", "/run", "/var/run"];
/// Neither these nor anything below.
const TAKEN_WHOLE: [&str; 2] = ["/proc", "/sys"];
const OWN_TAKEN: [&str; 3] = ["", "alloc", "alloc/logs"];

fn target(path: &Path, aliases: &[Alias]) -> Result<Place, &'static str> {
    if path.as_os_str().is_empty() {
        return Err("is empty; write an absolute path");
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err("contains a NUL byte");
    }
    if path.as_os_str().len() > 4_095 {
        return Err("is longer than 4095 bytes");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err("has a \"..\" in it; write the path without");
    }
    let plain: PathBuf = path.components().collect();
    let own = if plain.is_relative() {
        Some(plain.clone())
    } else {
        own_place(&plain, aliases)
    };
    let taken = "is a directory of the driver's own; choose one below it, or another";
    match own {
        Some(own) => {
            let is_taken = OWN_TAKEN.iter().any(|taken| own == Path::new(taken))
                || own.starts_with("alloc/logs");
            if is_taken {
                Err(taken)
            } else {
                Ok(Place::Task(own))
            }
        }
        None if TAKEN.iter().any(|taken| plain == Path::new(taken))
            || TAKEN_WHOLE.iter().any(|taken| plain.starts_with(taken)) =>
        {
            Err(taken)
        }
        None => Ok(Place::Host(plain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(task_path: &str) -> Mount {
        Mount {
            task_path: task_path.into(),
            host_path: "/srv/data".into(),
            mode: MountMode::ReadWrite,
            propagation: String::new(),
            selinux_label: String::new(),
        }
    }

    fn of(mount: Mount) -> Result<Volumes, VolumeError> {
        volumes(&[mount], &[], false, &[Alias::new(Path::new("/m"), "")])
    }

    #[test]
    fn a_volume_is_unveiled_with_the_right_mode_wherever_it_is() {
        let data = of(mount("/data/")).unwrap();
        assert_eq!(data.binds[0].target, Place::Host("/data".into()));
        assert_eq!(data.rules[0].access.to_string(), "rwxc");
        let read_only = Mount {
            mode: MountMode::ReadOnly,
            propagation: "host-to-task".into(),
            ..mount("/m/local/data")
        };
        let read_only = of(read_only).unwrap();
        assert_eq!(read_only.binds[0].target, Place::Task("local/data".into()));
        assert_eq!(read_only.binds[0].propagation, Propagation::Slave);
        assert_eq!(read_only.rules[0].access.to_string(), "rx");
        let relative = of(mount("local/data")).unwrap();
        assert_eq!(relative.binds[0].target, Place::Task("local/data".into()));
    }

    #[test]
    fn a_volume_that_cannot_be_is_a_sentence() {
        for (path, problem) in [
            ("", "is empty"),
            ("/", "is a directory of the driver's own"),
            ("/proc/sys", "is a directory of the driver's own"),
            ("/dev", "is a directory of the driver's own"),
            ("/etc", "is a directory of the driver's own"),
            ("/run", "is a directory of the driver's own"),
            ("/sys/fs", "is a directory of the driver's own"),
            ("/m", "is a directory of the driver's own"),
            ("/m/alloc/logs/x", "is a directory of the driver's own"),
            ("/srv/../etc", "has a \"..\" in it"),
            ("/a\0b", "contains a NUL byte"),
        ] {
            let error = of(mount(path)).unwrap_err().to_string();
            assert!(error.contains(problem), "{path}: {error}");
        }
        let propagation = Mount {
            propagation: "bidirectional".into(),
            ..mount("/data")
        };
        let error = of(propagation).unwrap_err().to_string();
        assert!(error.starts_with("volume_mount \"/data\": propagation_mode = \"bidirectional\""));
        let slave = Mount {
            propagation: "host-to-task".into(),
            ..mount("/data")
        };
        let error = volumes(&[slave], &[], true, &[]).unwrap_err().to_string();
        assert!(error.contains("is not possible for root"), "{error}");
        let label = Mount {
            selinux_label: "z".into(),
            ..mount("/data")
        };
        assert!(
            of(label)
                .unwrap_err()
                .to_string()
                .contains("selinux_label = \"z\"")
        );
    }

    #[test]
    fn a_device_has_the_permissions_that_its_plugin_gives() {
        let device = |permissions: &str| {
            let device = Device {
                task_path: "/dev/card0".into(),
                host_path: "/dev/dri/card0".into(),
                cgroup_permissions: permissions.into(),
            };
            let volumes = volumes(&[], &[device], true, &[]).unwrap();
            assert_eq!(volumes.binds[0].source, Path::new("/dev/dri/card0"));
            volumes.rules[0].access.to_string()
        };
        assert_eq!(device("rwm"), "rw");
        assert_eq!(device("r"), "r");
        assert_eq!(device(""), "rw");
    }
}
