//! The network namespace of an allocation in bridge mode, with nothing in it but its loopback: addresses and routes are CNI's
//! business, not a driver's.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::proto::driver::NetworkIsolationSpec;
use super::proto::driver::network_isolation_spec::NetworkIsolationMode;

/// Whose network a group's tasks are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    Host,
    Own,
}

/// Where ip(8) and Nomad keep them.
const DIRECTORY: &str = "/run/netns";

#[derive(Debug)]
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    pub fn new(alloc_id: &str) -> Result<Self> {
        let namespace = Namespace {
            name: alloc_id.to_owned(),
        };
        ip(&["netns", "add", alloc_id])?;
        ip(&["-n", alloc_id, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    pub fn spec(&self) -> NetworkIsolationSpec {
        NetworkIsolationSpec {
            mode: NetworkIsolationMode::Group.into(),
            path: Path::new(DIRECTORY)
                .join(&self.name)
                .to_string_lossy()
                .into_owned(),
            ..NetworkIsolationSpec::default()
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
        // The first `add` mounts it; only the last one out takes it away.
        if std::fs::read_dir(DIRECTORY).is_ok_and(|mut all| all.next().is_none()) {
            let _ = nix::mount::umount(DIRECTORY);
            let _ = std::fs::remove_dir(DIRECTORY);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    ensure!(output.status.success(), "ip {arguments:?}: {output:?}");
    Ok(())
}
