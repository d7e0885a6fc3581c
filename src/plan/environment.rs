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

/// What depends on the task's user and directories.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    pub user: &'a str,
    pub home: &'a Path,
    pub tmp: &'a Path,
    pub work_dir: &'a Path,
}

/// `devices` are the variables that device plugins ask for; they win, since they name what was reserved.
pub fn environment(
    given: &BTreeMap<String, String>,
    devices: &BTreeMap<String, String>,
    own: &Own<'_>,
) -> Vec<(String, String)> {
    let mut env: BTreeMap<String, String> = given
        .iter()
        .chain(devices)
        .filter(|(name, _)| !name.starts_with("LD_") && !DROPPED.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    env.insert("USER".into(), own.user.into());
    for (name, path) in [
        ("HOME", own.home),
        ("TMPDIR", own.tmp),
        ("NOMAD_WORK_DIR", own.work_dir),
    ] {
        env.insert(name.into(), path.display().to_string());
    }
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
        let devices = BTreeMap::from([("A".to_owned(), "device".to_owned())]);
        let own = Own {
            user: "nomad-80001",
            home: Path::new("/nonexistent"),
            tmp: Path::new("/m/tmp"),
            work_dir: Path::new("/m"),
        };
        let env = environment(&given, &devices, &own);
        let expected = [
            ("A", "device"),
            ("EMPTY", ""),
            ("HOME", "/nonexistent"),
            ("NOMAD_WORK_DIR", "/m"),
            ("TMPDIR", "/m/tmp"),
            ("USER", "nomad-80001"),
        ];
        assert_eq!(
            env,
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }
}
