//! Joins the allocation's network namespace and leaves the host's mount and IPC namespaces. The PID namespace is made by the
//! clone that starts the helper.

use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, mount_change};

use super::report::{At, Failure};
use crate::plan::steps::{Order, Step};

pub(super) fn join_network(order: &Order) -> Result<(), Failure> {
    let Some(path) = &order.network_namespace else {
        return Ok(());
    };
    // Whatever lies at the path, opening it does not block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let namespace = rustix::fs::open(path, flags, Mode::empty()).at_path(Step::Network, path)?;
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| {
        let failure = Failure::new(Step::Network, errno as i32).on(path.display().to_string());
        match errno {
            nix::errno::Errno::EINVAL => failure.note("it is not a network namespace"),
            _ => failure,
        }
    })
}

pub(super) fn unshare() -> Result<(), Failure> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC).at(Step::Unshare)?;
    // A relative path would still lead into the plugin's directory.
    rustix::process::chdir("/").at(Step::Unshare)
}

/// Not a slave: what the host mounts later would arrive writable in the read-only view, another task's `alloc` with its logs
/// among it. The price is that a file system which the host unmounts stays in use until the task ends.
pub(super) fn cut_propagation() -> Result<(), Failure> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .at_path(Step::Propagation, "/")
}
