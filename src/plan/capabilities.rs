//! What root may be in a task: the capability bounding set. capabilities(7) has the numbers.

/// What ordinary programs started as root need, and nothing that reaches beyond the task's own files and processes.
const BOUNDING: [u8; 13] = [
    0,  // CAP_CHOWN
    1,  // CAP_DAC_OVERRIDE
    3,  // CAP_FOWNER
    4,  // CAP_FSETID
    5,  // CAP_KILL
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP
    10, // CAP_NET_BIND_SERVICE
    13, // CAP_NET_RAW
    18, // CAP_SYS_CHROOT
    29, // CAP_AUDIT_WRITE
    31, // CAP_SETFCAP
];

const NET_ADMIN: u8 = 12;

/// The bounding set as a mask; a task in a network namespace of its own may administer it.
pub fn bounding(own_network: bool) -> u64 {
    let own = if own_network { 1 << NET_ADMIN } else { 0 };
    BOUNDING
        .iter()
        .fold(own, |mask, capability| mask | 1 << capability)
}
