//! Names to ids. A look-up may ask the network (LDAP, SSSD), so callers keep it off the reactor and bound its time.

use std::path::PathBuf;

use nix::unistd::{Uid, User};
use thiserror::Error;

/// The user that a task runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
    /// A dynamic workload user: the host has no entry for it.
    pub is_dynamic: bool,
}

#[derive(Debug, Error)]
pub enum UserError {
    #[error("user must be set")]
    Unset,
    #[error(
        "user {0:?} does not exist on this host; create it, or leave the user out for a dynamic one"
    )]
    Unknown(String),
    #[error("user {0:?} cannot be looked up: {1}")]
    Lookup(String, #[source] nix::Error),
    #[error(
        "user {name:?} is no dynamic workload user: {why}; leave the user out for one that nobody else has"
    )]
    NotDynamic { name: String, why: &'static str },
}

/// Below it live the host's own users, on every distribution. Nomad does not check the range of `nomad-<uid>`, and any
/// job may name one.
pub const LOWEST_DYNAMIC_UID: u32 = 65_536;

/// Looks up the user of a task: `nomad-<uid>` needs no entry anywhere, any other name needs one.
pub fn look_up(name: &str) -> Result<Account, UserError> {
    if name.is_empty() {
        return Err(UserError::Unset);
    }
    let of = |error| UserError::Lookup(name.to_owned(), error);
    let Some(uid) = dynamic_uid(name) else {
        let user = User::from_name(name)
            .map_err(of)?
            .ok_or_else(|| UserError::Unknown(name.to_owned()))?;
        return Ok(Account {
            name: user.name,
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            home: user.dir,
            is_dynamic: false,
        });
    };
    let refused = |why| {
        Err(UserError::NotDynamic {
            name: name.to_owned(),
            why,
        })
    };
    if uid < LOWEST_DYNAMIC_UID {
        return refused("those have ids from 65536 on, below live the host's own");
    }
    if User::from_uid(Uid::from_raw(uid)).map_err(of)?.is_some() {
        return refused("the host has a user with this id");
    }
    Ok(dynamic(uid))
}

/// The dynamic workload user with this id.
pub fn dynamic(uid: u32) -> Account {
    Account {
        name: format!("nomad-{uid}"),
        uid,
        gid: uid,
        home: PathBuf::from("/nonexistent"),
        is_dynamic: true,
    }
}

/// Nomad's rule: `nomad-` and a number up to 2^31-1.
fn dynamic_uid(name: &str) -> Option<u32> {
    let digits = name
        .strip_prefix("nomad-")
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits
        .parse()
        .ok()
        .filter(|uid| *uid <= i32::MAX.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_user_needs_no_entry_in_passwd() {
        assert_eq!(look_up("nomad-80123").unwrap(), dynamic(80_123));
    }

    #[test]
    fn root_is_found_by_name() {
        let root = look_up("root").unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
    }

    #[test]
    fn a_job_cannot_name_itself_a_host_user_by_number() {
        for name in ["nomad-0", "nomad-1000", "nomad-65534"] {
            let error = look_up(name).unwrap_err().to_string();
            assert!(error.contains("is no dynamic workload user"), "{error}");
        }
    }

    #[test]
    fn a_missing_user_is_a_sentence_with_its_name() {
        let error = look_up("no-such-user").unwrap_err().to_string();
        assert!(
            error.starts_with("user \"no-such-user\" does not exist on this host"),
            "{error}"
        );
        assert_eq!(look_up("").unwrap_err().to_string(), "user must be set");
    }
}
