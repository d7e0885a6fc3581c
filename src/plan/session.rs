//! A session (`nomad alloc exec`): what it runs in a task that runs already, and the numbered steps into it. Values only.

use serde::{Deserialize, Serialize};

/// The steps of a session, in the order in which they happen. The first two are the plugin's; 3 to 6 and the last are the
/// helper's, outside of the task; from 7 on it is the session's process, which the task sees and cannot touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionStep {
    Find,
    SpawnSession,
    Orders,
    TakeFilter,
    EnterPids,
    ForkSession,
    Lead,
    TakeScore,
    EnterScope,
    EnterNamespaces,
    Terminal,
    TakeLimits,
    TakeUser,
    TakeWorkDir,
    TakeRules,
    Execute,
    Watch,
}

impl SessionStep {
    /// Every step with what it does, in order: the list that the README quotes.
    pub const ALL: [(SessionStep, &'static str); 17] = [
        (
            SessionStep::Find,
            "make a cgroup `exec-1`, `exec-2`, … below the scope",
        ),
        (
            SessionStep::SpawnSession,
            "take the task's order and its Landlock ruleset from the supervisor, and spawn the session's helper, with an empty environment, outside of the scope",
        ),
        (
            SessionStep::Orders,
            "read what the task was ordered to be, and become undumpable",
        ),
        (
            SessionStep::TakeFilter,
            "install the task's system call filter",
        ),
        (
            SessionStep::EnterPids,
            "enter the task's PID namespace, by the supervisor's pidfd",
        ),
        (
            SessionStep::ForkSession,
            "fork: the parent stays outside, the child becomes the command",
        ),
        (SessionStep::Lead, "start a session of its own"),
        (SessionStep::TakeScore, "set the task's oom_score_adj"),
        (SessionStep::EnterScope, "enter the session's cgroup"),
        (
            SessionStep::EnterNamespaces,
            "enter the task's mount, IPC, network and cgroup namespaces",
        ),
        (
            SessionStep::Terminal,
            "with a terminal: make it in the task's own /dev/pts, and control it",
        ),
        (SessionStep::TakeLimits, "set the task's resource limits"),
        (
            SessionStep::TakeUser,
            "take a fresh session keyring, and the task's bounding set, group, user and ambient capabilities",
        ),
        (
            SessionStep::TakeWorkDir,
            "enter the task's working directory",
        ),
        (
            SessionStep::TakeRules,
            "set no_new_privs and restrict itself with the task's own ruleset",
        ),
        (
            SessionStep::Execute,
            "close what is not the command's, and exec it, with the task's environment",
        ),
        (
            SessionStep::Watch,
            "wait for its end, or for that of the plugin or its client; then kill all of the session's cgroup, and remove it",
        ),
    ];

    /// Its number in the list, counted from 1.
    pub fn number(self) -> usize {
        self as usize + 1
    }
}

/// What a session runs. Sent to its helper as MessagePack with named fields in a sealed memfd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionOrder {
    /// A path, or a name to be found in the task's PATH.
    pub command: String,
    pub args: Vec<String>,
    /// `None`: its standard descriptors are handed over.
    pub terminal: Option<WindowSize>,
}

/// Of a terminal, in characters; 0 is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_steps_is_in_the_order_of_the_type() {
        for (index, (step, _)) in SessionStep::ALL.iter().enumerate() {
            assert_eq!(step.number(), index + 1);
        }
    }
}
