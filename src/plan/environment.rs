//! The task's environment: what Nomad hands on, less what would leak from the agent or act on a program before its
//! `main`, plus what depends on the user.

use std::collections::BTreeMap;
use std::path::Path;

/// Variables that are about the agent, not the task, and that Nomad passes on with its whole environment: of its session,
/// and of its service (systemd.exec(5)), whose journal stream, memory pressure and notification socket are not the task's.
const DROPPED: [&str; 20] = [
    "COLORTERM",
    "CREDENTIALS_DIRECTORY",
    "DISPLAY",
    "FDSTORE",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LS_COLORS",
    "MAIL",
    "MAINPID",
    "MANAGERPID",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "XAUTHORITY",
];

pub fn environment(
    given: &BTreeMap<String, String>,
    user: &str,
    home: &Path,
    tmp: &Path,
) -> Vec<(String, String)> {
    let mut env: BTreeMap<String, String> = given
        .iter()
        .filter(|(name, _)| !name.starts_with("LD_") && !DROPPED.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    env.insert("USER".into(), user.into());
    env.insert("HOME".into(), home.display().to_string());
    env.insert("TMPDIR".into(), tmp.display().to_string());
    env.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_set_and_the_agents_session_is_dropped() {
        let given = [
            ("LD_PRELOAD", "/x.so"),
            ("MAIL", "/m"),
            ("NOTIFY_SOCKET", "/n"),
            ("JOURNAL_STREAM", "9:1"),
            ("USER", "root"),
            ("EMPTY", ""),
            ("A", "b"),
        ];
        let given = given
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let env = environment(
            &given,
            "nomad-80001",
            Path::new("/nonexistent"),
            Path::new("/m/tmp"),
        );
        let expected = [
            ("A", "b"),
            ("EMPTY", ""),
            ("HOME", "/nonexistent"),
            ("TMPDIR", "/m/tmp"),
            ("USER", "nomad-80001"),
        ];
        assert_eq!(
            env,
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }
}
