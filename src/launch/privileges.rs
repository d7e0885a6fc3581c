//! What a process may do by itself: its group, user, capabilities, session keyring and place in the OOM killer's list. Each
//! function is one step, for the calling process.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, getgid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::report::{At, Failure};
use crate::plan::steps::{Order, Step};
use crate::sys;

/// `proc` is a /proc that may be written to.
pub(super) fn set_oom_score_adj(proc: &OwnedFd, value: i16) -> Result<(), Errno> {
    let file = openat(
        proc,
        "self/oom_score_adj",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::io::write(file, value.to_string().as_bytes())?;
    Ok(())
}

/// Takes from the bounding set what is not in `bounding`, and whatever this kernel knows that we do not.
pub(super) fn cut_bounding(bounding: u64) -> Result<(), Failure> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if bounding & capability.bits() != 0 {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // The kernel knows no capability of this number, nor of a higher one.
            Err(Errno::INVAL) => return Ok(()),
            result => result.at(Step::Bounding)?,
        }
    }
    Ok(())
}

/// Drops all supplementary groups and takes these as real, effective and saved one.
pub(super) fn set_groups(groups: [u32; 3]) -> Result<(), Failure> {
    let [real, effective, saved] = groups.map(Gid::from_raw);
    set_thread_groups(&[]).at(Step::Groups)?;
    set_thread_res_gid(real, effective, saved).at(Step::Groups)
}

/// Opens files with the rights that the task will have, and takes the helper's own back. Its real user stays root, so that no process
/// of that user may signal it.
pub(super) fn as_task<T>(
    order: &Order,
    open: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let (root, group) = (Uid::ROOT, getgid());
    let own = capabilities(None).at(Step::Rules)?;
    set_thread_groups(&[]).at(Step::Rules)?;
    set_thread_res_gid(group, Gid::from_raw(order.gid), group).at(Step::Rules)?;
    if order.uid == 0 {
        let effective = own.permitted & CapabilitySet::from_bits_retain(order.bounding);
        set_capabilities(None, CapabilitySets { effective, ..own }).at(Step::Rules)?;
    } else {
        // The kernel empties the effective capabilities with it, and makes the process as dumpable as fs.suid_dumpable says.
        set_thread_res_uid(root, Uid::from_raw(order.uid), root).at(Step::Rules)?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Rules)?;
    }
    let opened = open();
    set_thread_res_uid(root, root, root).at(Step::Rules)?;
    set_capabilities(None, own).at(Step::Rules)?;
    set_thread_res_gid(group, group, group).at(Step::Rules)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Rules)?;
    opened
}

/// Takes `uid`, keeping permitted capabilities for `keep_only` to choose from.
pub(super) fn set_user(uid: u32) -> Result<(), Failure> {
    let user = Uid::from_raw(uid);
    set_keep_capabilities(true).at(Step::User)?;
    set_thread_res_uid(user, user, user).at(Step::User)?;
    // The kernel resets it to what fs.suid_dumpable says; up to here the permitted capabilities keep the user's other processes
    // from what may be the supervisor's memory as well.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::User)?;
    set_keep_capabilities(false).at(Step::User)
}

/// Root keeps its bounding set, which is what it would get at exec. Another user keeps `ambient`, across exec.
pub(super) fn keep_only(uid: u32, bounding: u64, ambient: u64) -> Result<(), Failure> {
    clear_ambient_capability_set().at(Step::Ambient)?;
    let held = capabilities(None).at(Step::Ambient)?.permitted;
    let (kept, inheritable) = match uid {
        0 => (
            held & CapabilitySet::from_bits_retain(bounding),
            CapabilitySet::empty(),
        ),
        _ => {
            let ambient = CapabilitySet::from_bits_retain(ambient);
            (ambient, ambient)
        }
    };
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable,
        },
    )
    .map_err(|errno| {
        Failure::new(Step::Ambient, errno.raw_os_error())
            .note("does the plugin itself have these capabilities?")
    })?;
    for capability in inheritable.iter() {
        configure_capability_in_ambient_set(capability, true).at(Step::Ambient)?;
    }
    Ok(())
}

/// Drops all capabilities but these.
pub(super) fn keep_capabilities(kept: CapabilitySet) -> Result<(), Errno> {
    let kept = kept & capabilities(None)?.permitted;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
}

/// Without its own, a task would share the agent's session keyring with all others. It is whose user makes it: kernel.keys.maxkeys gives
/// each user but root 200, for all tasks together. Whoever has it as theirs may use it all the same, and nobody else of the user's.
pub(super) fn leave_session_keyring() -> Result<(), Failure> {
    match sys::join_new_session_keyring() {
        // A kernel without keyrings has none to share.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result.at(Step::Keyring),
    }
}
