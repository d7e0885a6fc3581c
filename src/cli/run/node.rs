//! What Nomad's client would know of this host, and what its scheduler would hand out, as far as one host can tell.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;

use crate::host;
use crate::job::environment::Node;
use crate::job::{Job, JobError, Port};

/// Nomad's own range for ports that a job leaves to the scheduler.
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=32_000;
const ADDRESS: &str = "127.0.0.1";

/// The node as a job may name it; `choose` finds a port that is not among the taken ones.
pub fn node(
    job: &Job,
    ports: &[Port],
    choose: impl Fn(&BTreeSet<u16>) -> Option<u16>,
) -> Result<Node, JobError> {
    let read = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let compute = host::compute();
    let release = read("/etc/os-release");
    let of_release = |key: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(key));
        value.unwrap_or_default().trim_matches('"').to_owned()
    };
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let hostname = read("/proc/sys/kernel/hostname");
    let facts = [
        ("attr.kernel.name", "linux".to_owned()),
        ("attr.kernel.version", read("/proc/sys/kernel/osrelease")),
        ("attr.kernel.arch", std::env::consts::ARCH.to_owned()),
        ("attr.cpu.arch", arch.to_owned()),
        ("attr.cpu.numcores", compute.cores.to_string()),
        ("attr.cpu.totalcompute", compute.total_mhz.to_string()),
        ("attr.os.name", of_release("ID=")),
        ("attr.os.version", of_release("VERSION_ID=")),
        ("attr.unique.hostname", hostname.clone()),
        ("attr.unique.network.ip-address", ADDRESS.to_owned()),
        ("node.unique.name", hostname),
        ("node.datacenter", job.datacenter.clone()),
        ("node.region", job.region.clone()),
    ];
    let facts = facts.into_iter().filter(|(_, value)| !value.is_empty());
    let mut node = Node {
        facts: facts
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        ports: Vec::new(),
        address: ADDRESS.to_owned(),
    };
    let mut taken: BTreeSet<u16> = ports.iter().filter_map(|port| port.fixed).collect();
    for port in ports {
        let number = port.fixed.or_else(|| choose(&taken)).ok_or_else(|| {
            let message = format!("port `{}`: this host has no free port", port.label);
            JobError::new(port.line, message)
        })?;
        taken.insert(number);
        node.ports.push((port.label.clone(), number));
    }
    Ok(node)
}

/// One that nobody on this host listens on.
pub fn free_port(taken: &BTreeSet<u16>) -> Option<u16> {
    // The second for a host without IPv6; where there is one, `::` stands for both.
    let bound =
        |port| TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    let mut ports = PORTS;
    ports.find(|port| !taken.contains(port) && bound(*port).is_ok())
}

/// One that stands for what a scheduler picks.
pub fn some_port(taken: &BTreeSet<u16>) -> Option<u16> {
    PORTS.into_iter().find(|port| !taken.contains(port))
}

/// The first CPUs that no other task has reserved, as a kernel list.
pub fn cpuset(cores: u32) -> Result<String, String> {
    let free = host::free_cpus();
    let first: Vec<String> = free
        .iter()
        .take(cores as usize)
        .map(u16::to_string)
        .collect();
    if first.len() < cores as usize {
        return Err(format!(
            "cores = {cores}: this host has {} CPUs that no task has reserved; ask for fewer, or give --cpu",
            free.len()
        ));
    }
    Ok(first.join(","))
}

/// The ports of a run, for a person to read.
pub fn shown_ports(ports: &[(String, u16)]) -> String {
    let shown = ports
        .iter()
        .map(|(label, port)| format!("{label} = {port}"));
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_port_has_a_number_of_its_own() {
        let port = |label: &str, fixed| Port {
            label: label.into(),
            fixed,
            line: 1,
        };
        let job = "job \"j\" {\ngroup \"g\" {\ntask \"t\" {\ndriver = \"exec2\"\n}\n}\n}";
        let job = crate::job::parse(job, &[]).unwrap();
        let ports = [port("a", None), port("b", Some(20_001)), port("c", None)];
        let node = node(&job, &ports, free_port).unwrap();
        let numbers: BTreeSet<u16> = node.ports.iter().map(|(_, number)| *number).collect();
        assert_eq!(numbers.len(), 3, "{:?}", node.ports);
        assert_eq!(node.ports[1], ("b".into(), 20_001));
        assert_eq!(node.facts["attr.kernel.name"], "linux");
    }

    #[test]
    fn more_cores_than_there_are_is_an_error_with_their_number() {
        let error = cpuset(9_000).unwrap_err();
        assert!(error.starts_with("cores = 9000: this host has "), "{error}");
    }
}
