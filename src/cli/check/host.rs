//! Whether tasks can run on this host: the facts behind the driver's fingerprint, one by one and in its words.

use std::fs;

use super::report::Line;
use crate::host::{CONTROLLERS, Host, Need};

/// cgroup.kill came with it.
const OLDEST_KERNEL: (u32, u32) = (5, 14);
const OLDEST_SYSTEMD: u32 = 247;

/// What one look tells beside [`Host`].
#[derive(Debug, Clone)]
pub struct Facts {
    pub kernel: String,
    /// The kernel's security modules; `None` if it does not show them.
    pub lsm: Option<String>,
    /// systemd's version, or why it did not answer.
    pub systemd: Result<String, String>,
}

impl Facts {
    pub fn read(systemd: Result<String, String>) -> Self {
        let read = |path: &str| Some(fs::read_to_string(path).ok()?.trim().to_owned());
        Self {
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            lsm: read("/sys/kernel/security/lsm"),
            systemd,
        }
    }
}

pub fn lines(host: &Host, facts: &Facts) -> Vec<Line> {
    let judge = |name, need, found: String| match host.lack(need, &facts.systemd) {
        Some(sentence) => Line::error(name, sentence),
        None => Line::ok(name, found),
    };
    let mut lines = vec![match host.lack(Need::Root, &facts.systemd) {
        Some(sentence) => Line::error(
            "root",
            format!(
                "{sentence}, and this command does not; try sudo, as not all can be seen without"
            ),
        ),
        None => Line::ok("root", "this command runs as root"),
    }];
    lines.push(kernel(&facts.kernel));
    lines.push(landlock(host, facts));
    lines.push(denials(host));
    lines.push(judge(
        "cgroup",
        Need::Unified,
        "cgroup v2 is mounted at /sys/fs/cgroup".into(),
    ));
    if host.is_unified {
        for (name, controller) in CONTROLLER_NAMES.into_iter().zip(&CONTROLLERS) {
            let need = Need::Controllers(std::slice::from_ref(controller));
            lines.push(judge(
                name,
                need,
                format!("the {controller} controller is there"),
            ));
        }
        lines.push(match host.cpuset_lack() {
            Some(lack) => Line::warning(
                "cpuset",
                format!("{lack}; check cgroup_disable= and v1 mounts"),
            ),
            None => Line::ok("cpuset", "the cpuset controller is there"),
        });
    }
    lines.push(judge(
        "systemd",
        Need::Systemd,
        "systemd is the init system".into(),
    ));
    if host.runs_systemd {
        lines.push(bus(host, facts));
    }
    lines
}

/// In the order of [`CONTROLLERS`].
const CONTROLLER_NAMES: [&str; 3] = ["cpu", "memory", "pids"];

fn kernel(release: &str) -> Line {
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST_KERNEL => {
            let (major, minor) = OLDEST_KERNEL;
            Line::error(
                "kernel",
                format!("Linux {release} is too old; boot {major}.{minor} or newer"),
            )
        }
        (Some(_), Some(_)) => Line::ok("kernel", format!("Linux {release}")),
        _ => Line::warning(
            "kernel",
            format!("{release:?} is no version of Linux; look at uname -r"),
        ),
    }
}

fn landlock(host: &Host, facts: &Facts) -> Line {
    if let Some(sentence) = host.lack(Need::Landlock, &facts.systemd) {
        return Line::error("landlock", sentence);
    }
    let abi = host.landlock_abi.unwrap_or_default();
    let listed = match &facts.lsm {
        Some(list) if list.split(',').any(|name| name == "landlock") => {
            format!("ABI {abi}, in the kernel's lsm= list ({list})")
        }
        _ => format!("ABI {abi}"),
    };
    match host.ungoverned() {
        None => Line::ok("landlock", listed),
        Some(what) => Line::warning(
            "landlock",
            format!(
                "{listed}: {}; Linux 6.2 or newer governs that",
                what.replace("; ", ", ")
            ),
        ),
    }
}

/// No fault of a host: tasks run all the same.
fn denials(host: &Host) -> Line {
    let found = match host.denials_lack() {
        None => {
            "kernel audit is on, and what Landlock denies is told, unless report_denials is false"
                .to_owned()
        }
        Some(lack) => format!("not told: {lack}"),
    };
    Line::ok("denials", found)
}

fn bus(host: &Host, facts: &Facts) -> Line {
    if let Some(sentence) = host.lack(Need::Bus, &facts.systemd) {
        return Line::error("bus", sentence);
    }
    let version = facts.systemd.as_deref().unwrap_or_default();
    let number: u32 = version
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0);
    if number < OLDEST_SYSTEMD {
        let sentence = format!("systemd {version} is too old; install {OLDEST_SYSTEMD} or newer");
        return Line::error("bus", sentence);
    }
    Line::ok(
        "bus",
        format!("systemd {version} answers on the system bus"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;
    use crate::audit::Audit;

    const FIT: Host = Host {
        is_root: true,
        runs_systemd: true,
        is_unified: true,
        missing_controllers: Vec::new(),
        has_cpuset: true,
        landlock_abi: Some(6),
        audit: None,
    };

    fn facts() -> Facts {
        Facts {
            kernel: "6.12.9-amd64".into(),
            lsm: Some("capability,landlock".into()),
            systemd: Ok("257.13-1".into()),
        }
    }

    fn not_ok(host: &Host, facts: &Facts) -> Vec<(&'static str, Status)> {
        let lines = lines(host, facts).into_iter();
        lines
            .filter(|line| line.status != Status::Ok)
            .map(|line| (line.name, line.status))
            .collect()
    }

    #[test]
    fn a_fit_host_has_a_line_for_each_fact() {
        let lines = lines(&FIT, &facts());
        assert_eq!(lines.len(), 11, "{lines:?}");
        assert!(
            lines.iter().all(|line| line.status == Status::Ok),
            "{lines:?}"
        );
    }

    #[test]
    fn whether_denials_are_told_is_told_with_what_it_needs() {
        for (audit, found) in [
            (None, "not told: Landlock tells of none before ABI 7"),
            (
                Some(Audit::Off),
                "not told: kernel audit is off; auditctl -e 1",
            ),
            (
                Some(Audit::Absent),
                "not told: there is no kernel audit; boot",
            ),
            (
                Some(Audit::Refused),
                "not told: kernel audit is not told to",
            ),
            (Some(Audit::On), "kernel audit is on"),
        ] {
            let line = denials(&Host { audit, ..FIT });
            assert!(line.found.starts_with(found), "{line:?}");
            assert_eq!(line.status, Status::Ok);
        }
    }

    #[test]
    fn what_is_missing_is_an_error_and_the_rest_is_looked_at() {
        let host = Host {
            is_root: false,
            landlock_abi: None,
            missing_controllers: vec!["memory"],
            ..FIT
        };
        let error = |name| (name, Status::Error);
        assert_eq!(
            not_ok(&host, &facts()),
            [error("root"), error("landlock"), error("memory")]
        );
        let host = Host {
            is_unified: false,
            runs_systemd: false,
            ..FIT
        };
        assert_eq!(not_ok(&host, &facts()), [error("cgroup"), error("systemd")]);
        let silent = Facts {
            systemd: Err("no bus; start it".into()),
            ..facts()
        };
        assert_eq!(not_ok(&FIT, &silent), [error("bus")]);
    }

    #[test]
    fn old_versions_are_told() {
        let old = Facts {
            kernel: "5.10.0-28-amd64".into(),
            systemd: Ok("241 (241)".into()),
            ..facts()
        };
        let error = |name| (name, Status::Error);
        assert_eq!(not_ok(&FIT, &old), [error("kernel"), error("bus")]);
        let host = Host {
            landlock_abi: Some(2),
            has_cpuset: false,
            ..FIT
        };
        let warning = |name| (name, Status::Warning);
        assert_eq!(
            not_ok(&host, &facts()),
            [warning("landlock"), warning("cpuset")]
        );
    }
}
