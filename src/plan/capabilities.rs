//! What a task may be beyond its user: the capability bounding set, and what it is given by name. capabilities(7) and
//! include/uapi/linux/capability.h have the numbers.

use thiserror::Error;

/// By number. A kernel that has more knows them by number too, and no job gets those.
const NAMES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// What ordinary programs started as root need, and nothing that reaches beyond the task's own files and processes.
const USUAL_OF_ROOT: [&str; 13] = [
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "audit_write",
    "setfcap",
];

const NET_ADMIN: u64 = 1 << 12;

/// A set of capabilities: bit n is capability n.
pub type Mask = u64;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum CapabilityError {
    #[error(
        "{key}: {name:?} is no capability; write one as \"net_bind_service\" or \"CAP_NET_BIND_SERVICE\""
    )]
    Unknown { key: &'static str, name: String },
    #[error(
        "cap_add: task requested capability {name:?} not in driver allow_caps; the operator adds it there to allow it"
    )]
    NotAllowed { name: String },
}

/// The capabilities of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// What anything in the task may ever have. Root has all of it.
    pub bounding: Mask,
    /// What a user other than root has.
    pub ambient: Mask,
}

/// Whose task it is, as far as its capabilities go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    pub is_root: bool,
    /// Its network namespace is not the host's: its root may administer it.
    pub owns_network: bool,
}

impl Capabilities {
    /// `allow` is the operator's list, `add` and `drop` are the job's.
    pub fn new(
        subject: Subject,
        allow: &[String],
        add: &[String],
        drop: &[String],
    ) -> Result<Self, CapabilityError> {
        let allowed = mask("allow_caps", allow)?;
        for name in add {
            if mask("cap_add", std::slice::from_ref(name))? & !allowed != 0 {
                return Err(CapabilityError::NotAllowed { name: name.clone() });
            }
        }
        let dropped = if drop.iter().any(|name| normal(name) == "all") {
            Mask::MAX
        } else {
            mask("cap_drop", drop)?
        };
        let given = mask("cap_add", add)?;
        if subject.is_root {
            // A job that drops all and adds some has these.
            let own = if subject.owns_network { NET_ADMIN } else { 0 };
            let bounding = (usual_of_root() | own | allowed) & !dropped;
            let back = if dropped == Mask::MAX { given } else { 0 };
            return Ok(Self {
                bounding: bounding | back,
                ambient: 0,
            });
        }
        let ambient = if dropped == Mask::MAX {
            given
        } else {
            given & !dropped
        };
        Ok(Self {
            bounding: ambient,
            ambient,
        })
    }
}

/// Checks the operator's own list before any task is there.
pub fn check(allow_caps: &[String]) -> Result<(), CapabilityError> {
    mask("allow_caps", allow_caps).map(drop)
}

/// A list as jobs and operators see it in node attributes: normal names, sorted, once.
pub fn listed(names: &[String]) -> String {
    let mut names: Vec<String> = names.iter().map(|name| normal(name)).collect();
    names.sort();
    names.dedup();
    names.join(",")
}

/// The capabilities in a mask, by name.
pub fn names(mask: Mask) -> Vec<&'static str> {
    let named = NAMES.iter().enumerate();
    named
        .filter(|(number, _)| mask & (1 << number) != 0)
        .map(|(_, name)| *name)
        .collect()
}

fn usual_of_root() -> Mask {
    USUAL_OF_ROOT
        .iter()
        .filter_map(|name| number(name))
        .fold(0, |mask, number| mask | 1 << number)
}

fn mask(key: &'static str, names: &[String]) -> Result<Mask, CapabilityError> {
    names.iter().try_fold(0, |mask, name| {
        let number = number(&normal(name)).ok_or_else(|| CapabilityError::Unknown {
            key,
            name: name.clone(),
        })?;
        Ok(mask | 1 << number)
    })
}

fn number(name: &str) -> Option<usize> {
    NAMES.iter().position(|known| *known == name)
}

/// As exec2 takes them: any case, with or without the kernel's prefix.
fn normal(name: &str) -> String {
    let lower = name.trim().to_ascii_lowercase();
    lower.strip_prefix("cap_").unwrap_or(&lower).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Subject = Subject {
        is_root: true,
        owns_network: false,
    };
    const USER: Subject = Subject {
        is_root: false,
        owns_network: false,
    };
    const BIND: Mask = 1 << 10;
    const SYS_NICE: Mask = 1 << 23;

    fn of(subject: Subject, allow: &[&str], add: &[&str], drop: &[&str]) -> Capabilities {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        Capabilities::new(subject, &list(allow), &list(add), &list(drop)).unwrap()
    }

    fn refused(allow: &[&str], add: &[&str], drop: &[&str]) -> String {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let refused = Capabilities::new(USER, &list(allow), &list(add), &list(drop));
        refused.unwrap_err().to_string()
    }

    #[test]
    fn a_user_has_none_but_those_it_asks_for_and_may_have() {
        assert_eq!(of(USER, &["sys_nice"], &[], &[]).ambient, 0);
        let given = of(
            USER,
            &["CAP_NET_BIND_SERVICE", "sys_nice"],
            &["Net_Bind_Service"],
            &[],
        );
        assert_eq!((given.ambient, given.bounding), (BIND, BIND));
        let less = of(
            USER,
            &["net_bind_service", "sys_nice"],
            &["net_bind_service", "sys_nice"],
            &["sys_nice"],
        );
        assert_eq!(less.ambient, BIND);
    }

    #[test]
    fn root_has_the_usual_ones_and_what_the_operator_allows_less_what_the_job_drops() {
        let usual = of(ROOT, &[], &[], &[]).bounding;
        assert_eq!(
            (usual & SYS_NICE, usual & BIND, usual & NET_ADMIN),
            (0, BIND, 0)
        );
        assert_eq!(of(ROOT, &["sys_nice"], &[], &[]).bounding, usual | SYS_NICE);
        assert_eq!(
            of(ROOT, &[], &[], &["net_bind_service"]).bounding,
            usual & !BIND
        );
        assert_eq!(
            of(ROOT, &["net_bind_service"], &["net_bind_service"], &["ALL"]).bounding,
            BIND
        );
        let owner = Subject {
            owns_network: true,
            ..ROOT
        };
        assert_eq!(of(owner, &[], &[], &[]).bounding, usual | NET_ADMIN);
    }

    #[test]
    fn never_by_default_is_what_reaches_beyond_the_task() {
        let usual = of(ROOT, &[], &[], &[]).bounding;
        for name in [
            "sys_admin",
            "sys_module",
            "sys_rawio",
            "bpf",
            "perfmon",
            "mknod",
            "sys_boot",
            "sys_nice",
            "sys_resource",
            "sys_ptrace",
            "dac_read_search",
            "syslog",
        ] {
            assert_eq!(usual & 1 << number(name).unwrap(), 0, "{name}");
        }
    }

    #[test]
    fn a_wrong_list_is_a_sentence_with_its_key() {
        assert_eq!(
            refused(&[], &["net_raw"], &[]),
            "cap_add: task requested capability \"net_raw\" not in driver allow_caps; the operator adds it there to allow it"
        );
        assert!(refused(&["root"], &[], &[]).starts_with("allow_caps: \"root\" is no capability"));
        assert!(refused(&[], &["a\nb"], &[]).starts_with("cap_add: \"a\\nb\" is no"));
        assert!(refused(&[], &[], &[""]).starts_with("cap_drop: \"\" is no"));
        assert!(check(&["CAP_SYS_NICE".into()]).is_ok());
    }

    #[test]
    fn the_attribute_has_normal_names() {
        assert_eq!(
            listed(&["CAP_SYS_NICE".into(), "chown".into(), "Chown".into()]),
            "chown,sys_nice"
        );
        assert_eq!(listed(&[]), "");
    }
}
