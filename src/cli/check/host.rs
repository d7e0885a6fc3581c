//! Whether tasks can run on this host: the facts behind the driver's fingerprint, one by one and in its words.

use std::fs;

use super::report::Line;
use crate::host::{CONTROLLERS, Host, Need, OLDEST_KERNEL};

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
    Line::ok(
        "bus",
        format!("systemd {version} answers on the system bus"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::report::tests::told;
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

    const NO_BUS: &str = "systemd cannot be reached on the system bus: gone; is dbus running (systemctl status dbus)?";

    const OK: [&str; 11] = [
        "ok root: this command runs as root",
        "ok kernel: Linux 6.12.9-amd64",
        "ok landlock: ABI 6, in the kernel's lsm= list (capability,landlock)",
        "ok denials: not told: Landlock tells of none before ABI 7 (Linux 6.15)",
        "ok cgroup: cgroup v2 is mounted at /sys/fs/cgroup",
        "ok cpu: the cpu controller is there",
        "ok memory: the memory controller is there",
        "ok pids: the pids controller is there",
        "ok cpuset: the cpuset controller is there",
        "ok systemd: systemd is the init system",
        "ok bus: systemd 257.13-1 answers on the system bus",
    ];

    #[test]
    fn a_fit_host_has_a_line_for_each_fact() {
        assert_eq!(told(&lines(&FIT, &facts())), OK);
    }

    /// One fact apart from a fit host, and the whole of what differs.
    #[test]
    fn what_is_missing_is_told_with_its_remedy_and_the_rest_is_looked_at() {
        type Case = (fn(&mut Host, &mut Facts), &'static [&'static str]);
        let cases: &[Case] = &[
            (
                |host, _| host.is_root = false,
                &[
                    "error root: Driver must run as root, and this command does not; try sudo, as not all can be seen without",
                ],
            ),
            (
                |_, facts| facts.kernel = "5.10.0-28-amd64".into(),
                &["error kernel: Linux 5.10.0-28-amd64 is too old; boot 5.14 or newer"],
            ),
            (
                |_, facts| facts.kernel = "5.14.0-570.el9".into(),
                &["ok kernel: Linux 5.14.0-570.el9"],
            ),
            (
                |_, facts| facts.kernel = String::new(),
                &["warning kernel: \"\" is no version of Linux; look at uname -r"],
            ),
            (
                |host, _| host.landlock_abi = None,
                &[
                    "error landlock: Landlock is not available; it needs Linux 5.14 or newer with landlock in the kernel's lsm= list",
                ],
            ),
            (|_, facts| facts.lsm = None, &["ok landlock: ABI 6"]),
            (
                |host, _| host.landlock_abi = Some(2),
                &[
                    "warning landlock: ABI 2, in the kernel's lsm= list (capability,landlock): truncate is not restricted; Linux 6.2 or newer governs that",
                ],
            ),
            (
                |host, _| host.landlock_abi = Some(1),
                &[
                    "warning landlock: ABI 1, in the kernel's lsm= list (capability,landlock): no rename between directories, truncate is not restricted; Linux 6.2 or newer governs that",
                ],
            ),
            (
                |host, _| host.audit = Some(Audit::On),
                &[
                    "ok denials: kernel audit is on, and what Landlock denies is told, unless report_denials is false",
                ],
            ),
            (
                |host, _| host.audit = Some(Audit::Off),
                &[
                    "ok denials: not told: kernel audit is off; auditctl -e 1 turns it on, for tasks that run already, too",
                ],
            ),
            (
                |host, _| host.audit = Some(Audit::Absent),
                &["ok denials: not told: there is no kernel audit; boot with audit=1"],
            ),
            (
                |host, _| host.audit = Some(Audit::Refused),
                &["ok denials: not told: kernel audit is not told to this process"],
            ),
            (
                |host, _| host.missing_controllers = vec!["memory", "pids"],
                &[
                    "error memory: cgroup v2 has no memory controller, so limits are not in force; check cgroup_disable= and v1 mounts",
                    "error pids: cgroup v2 has no pids controller, so limits are not in force; check cgroup_disable= and v1 mounts",
                ],
            ),
            (
                |host, _| host.missing_controllers = vec!["cpu"],
                &[
                    "error cpu: cgroup v2 has no cpu controller, so limits are not in force; check cgroup_disable= and v1 mounts",
                ],
            ),
            (
                |host, _| host.has_cpuset = false,
                &[
                    "warning cpuset: no cpuset controller, so reserved cores are not exclusive; check cgroup_disable= and v1 mounts",
                ],
            ),
            // Of what hangs on it nothing is said.
            (
                |host, _| host.is_unified = false,
                &[
                    "error cgroup: cgroup v2 is not mounted at /sys/fs/cgroup; boot with systemd.unified_cgroup_hierarchy=1",
                ],
            ),
            (
                |host, _| host.runs_systemd = false,
                &[
                    "error systemd: systemd is not the init system of this host; the driver needs it to start a scope for each task",
                ],
            ),
            (
                |_, facts| facts.systemd = Ok("249.11-0ubuntu3".into()),
                &[
                    "error bus: systemd 249.11-0ubuntu3 is too old; install a system with 252 or newer",
                ],
            ),
            (
                |_, facts| facts.systemd = Err(NO_BUS.into()),
                &[
                    "error bus: systemd cannot be reached on the system bus: gone; is dbus running (systemctl status dbus)?",
                ],
            ),
        ];
        for (change, differs) in cases {
            let (mut host, mut facts) = (FIT, facts());
            change(&mut host, &mut facts);
            let mut told = told(&lines(&host, &facts));
            told.retain(|line| !OK.contains(&line.as_str()));
            assert_eq!(told, *differs);
        }
    }

    #[test]
    fn what_hangs_on_a_missing_thing_has_no_line() {
        let host = Host {
            is_unified: false,
            runs_systemd: false,
            ..FIT
        };
        let lines = lines(&host, &facts());
        let names: Vec<_> = lines.iter().map(|line| line.name).collect();
        assert_eq!(
            names,
            ["root", "kernel", "landlock", "denials", "cgroup", "systemd"]
        );
        let errors = lines.iter().filter(|line| line.status == Status::Error);
        assert_eq!(errors.count(), 2);
    }
}
