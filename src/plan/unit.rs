//! Names in systemd: a task's scope, its slice and its description. A name derives from the task id alone, because the
//! only clean-up call after a failed recovery brings nothing else.

use std::fmt;

use crate::task::types::Names;
use crate::text::{UnitText, fnv1a};

/// The slice of all tasks. Never below `nomad.slice`, whose directory Nomad manages by hand.
pub const SLICE: &str = "exec2.slice";
/// Tasks that share the CPUs nobody reserved.
pub const SHARE_SLICE: &str = "exec2-share.slice";
/// Tasks with `cores` of their own.
pub const RESERVE_SLICE: &str = "exec2-reserve.slice";

/// The owner of a task that no agent started.
pub const RUN: &str = "run";

/// Longest unit name we make. systemd takes 255, but keeps no invocation link for more than 244.
const MAX_NAME_BYTES: usize = 200;

/// The name of a scope unit, `exec2-<task>-<8 of the alloc id>-<8 hex>.scope`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitName(String);

impl UnitName {
    /// From a task id of Nomad, `<alloc id>/<task>/<8 hex>`; any other text is escaped whole.
    pub fn of_task(id: &str) -> Self {
        let (task, suffix) = match split(id) {
            Some((alloc, task, attempt)) => (task, format!("-{}-{attempt}.scope", &alloc[..8])),
            None => (id, format!("-{:016x}.scope", fnv1a(id.as_bytes()))),
        };
        let room = MAX_NAME_BYTES - "exec2-".len() - suffix.len();
        Self(format!(
            "exec2-{}{suffix}",
            shorten(&escape(task), task, room)
        ))
    }

    /// A name that systemd told us, or that an earlier plugin stored.
    pub fn existing(name: &str) -> Option<Self> {
        let safe = name.bytes().all(|byte| is_literal(byte) || byte == b'\\');
        (name.starts_with("exec2-")
            && name.ends_with(".scope")
            && name.len() <= MAX_NAME_BYTES
            && safe)
            .then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The task and the first characters of its allocation's id, of a name that derives from an id of Nomad's.
    pub fn parts(&self) -> Option<(&str, &str)> {
        let rest = self.0.strip_prefix("exec2-")?.strip_suffix(".scope")?;
        let (rest, attempt) = rest.rsplit_once('-')?;
        let (task, alloc) = rest.rsplit_once('-')?;
        [alloc, attempt]
            .iter()
            .all(|id| id.len() == 8 && is_hex(id))
            .then_some((task, alloc))
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose tasks they are, where an agent, another one and `run` share a host: `node <id>`, or `run` for a task of no node.
pub fn owner(names: &Names) -> String {
    match names.node_id.as_str() {
        "" => RUN.into(),
        node => format!("node {}", UnitText::new(node)),
    }
}

/// What `systemctl status` and the journal show of a task.
pub fn description(names: &Names) -> UnitText {
    let Names {
        namespace,
        job,
        group,
        task,
        alloc_id,
        ..
    } = names;
    let alloc = alloc_id.get(..8).unwrap_or(alloc_id);
    UnitText::new(&format!(
        "Nomad task {task} of {namespace}/{job}/{group} (alloc {alloc})"
    ))
}

/// `job/group/task` of a description; a task's name may have any words in it, a namespace none.
pub fn path_in(description: &str) -> Option<String> {
    let (names, _) = description
        .strip_prefix("Nomad task ")?
        .rsplit_once(" (alloc ")?;
    names.match_indices(" of ").find_map(|(at, of)| {
        let (namespace, path) = names[at + of.len()..].split_once('/')?;
        let is_namespace = !namespace.contains(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        is_namespace.then(|| format!("{path}/{}", &names[..at]))
    })
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn split(id: &str) -> Option<(&str, &str, &str)> {
    let (alloc, rest) = id.split_once('/')?;
    let (task, attempt) = rest.rsplit_once('/')?;
    (alloc.len() >= 8
        && is_hex(alloc.get(..8)?)
        && attempt.len() == 8
        && is_hex(attempt)
        && !task.is_empty())
    .then_some((alloc, task, attempt))
}

/// systemd's escaping, but `-` stays itself: it is what makes drop-ins for `exec2-web-.scope.d` possible.
fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut name, byte| {
        if is_literal(byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("\\x{byte:02x}"));
        }
        name
    })
}

fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'_' | b'.' | b'-')
}

fn shorten(escaped: &str, original: &str, room: usize) -> String {
    if escaped.len() <= room {
        return escaped.to_owned();
    }
    let hash = format!("-{:016x}", fnv1a(original.as_bytes()));
    // An escape may be cut in two: still a valid name, since a backslash is one of systemd's literal characters.
    format!("{}{hash}", &escaped[..room - hash.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALLOC: &str = "0a1b2c3d-1111-2222-3333-444455556666";

    #[test]
    fn a_name_shows_task_alloc_and_attempt() {
        let name = UnitName::of_task(&format!("{ALLOC}/web-1/deadbeef"));
        assert_eq!(name.as_str(), "exec2-web-1-0a1b2c3d-deadbeef.scope");
    }

    #[test]
    fn what_systemd_would_not_take_is_escaped() {
        let name = UnitName::of_task(&format!("{ALLOC}/we b\n%n@\\/deadbeef"));
        assert_eq!(
            name.as_str(),
            "exec2-we\\x20b\\x0a\\x25n\\x40\\x5c-0a1b2c3d-deadbeef.scope"
        );
    }

    #[test]
    fn a_long_name_keeps_both_suffixes_and_stays_distinct() {
        let long = "é".repeat(120);
        let one = UnitName::of_task(&format!("{ALLOC}/{long}1/deadbeef"));
        let two = UnitName::of_task(&format!("{ALLOC}/{long}2/deadbeef"));
        assert_ne!(one, two);
        assert!(one.as_str().ends_with("-0a1b2c3d-deadbeef.scope"));
        assert!(one.as_str().len() <= MAX_NAME_BYTES);
    }

    #[test]
    fn a_name_and_a_description_tell_whose_they_are() {
        let name = UnitName::of_task(&format!("{ALLOC}/web-1/deadbeef"));
        assert_eq!(name.parts(), Some(("web-1", "0a1b2c3d")));
        assert_eq!(UnitName::of_task("no id of Nomad's").parts(), None);
        let mut names = Names {
            namespace: "default".into(),
            job: "shop".into(),
            group: "g of x/y".into(),
            task: "web".into(),
            alloc_id: ALLOC.into(),
            ..Names::default()
        };
        let path = |names: &Names| path_in(description(names).as_str());
        assert_eq!(path(&names).as_deref(), Some("shop/g of x/y/web"));
        names.task = "one of two".into();
        names.group = "g".into();
        assert_eq!(path(&names).as_deref(), Some("shop/g/one of two"));
        assert_eq!(path_in("/usr/bin/sleep 600"), None);
    }

    #[test]
    fn only_names_of_ours_are_taken_back() {
        assert!(UnitName::existing("exec2-web-0a1b2c3d-deadbeef.scope").is_some());
        assert!(UnitName::existing("ssh.service").is_none());
        assert!(UnitName::existing("exec2-a/../b.scope").is_none());
    }

    proptest! {
        #[test]
        fn any_id_gives_a_name_that_is_ours(id in any::<String>()) {
            let name = UnitName::of_task(&id);
            prop_assert_eq!(UnitName::existing(name.as_str()), Some(name));
        }
    }
}
