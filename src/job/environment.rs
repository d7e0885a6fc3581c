//! The variables that Nomad gives to a task. Pure.

use std::collections::BTreeMap;

use super::alloc_dir::TaskPaths;
use super::{Group, Job, Task};

/// What Nomad keeps from tasks when they inherit its own environment.
const DENIED: [&str; 16] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_METADATA_URL",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CONSUL_HTTP_TOKEN",
    "CONSUL_LICENSE",
    "CONSUL_LICENSE_PATH",
    "CONSUL_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_OAUTH_ACCESS_TOKEN",
    "NOMAD_LICENSE",
    "NOMAD_LICENSE_PATH",
    "NOMAD_TOKEN",
    "VAULT_LICENSE",
    "VAULT_LICENSE_PATH",
    "VAULT_TOKEN",
];

/// One task of one allocation, and what the scheduler gave to it.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    pub job: &'a Job,
    pub group: &'a Group,
    pub task: &'a Task,
    pub alloc_id: &'a str,
    /// Counted from 0 in the group.
    pub alloc_index: u32,
    /// MHz: the task's share, or what its exclusive cores sum up to.
    pub cpu_mhz: u64,
    /// The exclusive cores, as `3,5`; empty without any.
    pub cpuset: &'a str,
    pub paths: &'a TaskPaths,
    pub node: &'a Node,
}

/// What is known of the node that the task runs on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// By the names that a job has for them, as `attr.kernel.name`.
    pub facts: BTreeMap<String, String>,
    /// The ports of the group, by label.
    pub ports: Vec<(String, u16)>,
    pub address: String,
}

/// The agent's own environment as tasks inherit it.
pub fn inherited(host: impl IntoIterator<Item = (String, String)>) -> BTreeMap<String, String> {
    let kept = |(name, _): &(String, String)| !DENIED.contains(&name.as_str());
    host.into_iter().filter(kept).collect()
}

/// The NOMAD_ variables of a task.
pub fn variables(placed: &Placed<'_>) -> BTreeMap<String, String> {
    let Placed {
        job, group, task, ..
    } = placed;
    let short_id = placed.alloc_id.get(..8).unwrap_or(placed.alloc_id);
    let text = |value: &str| value.to_owned();
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let mut variables = BTreeMap::from(
        [
            ("ALLOC_DIR", path(&placed.paths.alloc)),
            ("ALLOC_ID", text(placed.alloc_id)),
            ("ALLOC_INDEX", placed.alloc_index.to_string()),
            (
                "ALLOC_NAME",
                format!("{}.{}[{}]", job.name, group.name, placed.alloc_index),
            ),
            ("CPU_LIMIT", placed.cpu_mhz.to_string()),
            ("DC", text(&job.datacenter)),
            ("GROUP_NAME", text(&group.name)),
            ("JOB_ID", text(&job.id)),
            ("JOB_NAME", text(&job.name)),
            ("MEMORY_LIMIT", task.resources.memory_mib.to_string()),
            ("NAMESPACE", text(&job.namespace)),
            ("PARENT_CGROUP", text("nomad.slice")),
            ("REGION", text(&job.region)),
            ("SECRETS_DIR", path(&placed.paths.secrets)),
            ("SHORT_ALLOC_ID", text(short_id)),
            ("TASK_DIR", path(&placed.paths.local)),
            ("TASK_NAME", text(&task.name)),
        ]
        .map(|(name, value)| (format!("NOMAD_{name}"), value)),
    );
    // Without exclusive cores Nomad 2.0 sets it to one blank.
    let cores = Some(placed.cpuset).filter(|cores| !cores.is_empty());
    variables.insert("NOMAD_CPU_CORES".into(), text(cores.unwrap_or(" ")));
    if task.resources.memory_max_mib != 0 {
        let limit = task.resources.memory_max_mib.to_string();
        variables.insert("NOMAD_MEMORY_MAX_LIMIT".into(), limit);
    }
    for (label, port) in &placed.node.ports {
        let ip = &placed.node.address;
        for (name, value) in [
            ("PORT", port.to_string()),
            ("IP", ip.clone()),
            ("ADDR", format!("{ip}:{port}")),
        ] {
            variables.insert(format!("NOMAD_{name}_{label}"), value.clone());
            variables.insert(format!("NOMAD_HOST_{name}_{label}"), value);
        }
    }
    // The task's own meta wins over the group's, and that over the job's.
    for (key, value) in job.meta.iter().chain(&group.meta).chain(&task.meta) {
        let key = key.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "_");
        variables.insert(format!("NOMAD_META_{}", key.to_uppercase()), value.clone());
        variables.insert(format!("NOMAD_META_{key}"), value.clone());
    }
    variables
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::job::parse;

    #[test]
    fn a_task_learns_who_it_is_and_what_it_may_use() {
        let text = r#"
            job "shop" {
              meta {
                team-name = "blue"
              }
              group "front" {
                task "web" {
                  driver = "exec2"
                  resources {
                    memory_max = 64
                  }
                }
              }
            }"#;
        let job = parse(text, &[]).unwrap();
        let group = &job.groups[0];
        let paths = TaskPaths {
            root: "/m".into(),
            local: "/m/local".into(),
            alloc: "/m/alloc".into(),
            secrets: "/m/secrets".into(),
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
        };
        let variables = variables(&Placed {
            job: &job,
            group,
            task: &group.tasks[0],
            alloc_id: "5a6f1c22-0000-4000-8000-000000000000",
            alloc_index: 2,
            cpu_mhz: 100,
            cpuset: "",
            paths: &paths,
            node: &Node::default(),
        });
        let get = |name: &str| variables.get(name).map(String::as_str);
        assert_eq!(get("NOMAD_ALLOC_NAME"), Some("shop.front[2]"));
        assert_eq!(get("NOMAD_SHORT_ALLOC_ID"), Some("5a6f1c22"));
        assert_eq!(get("NOMAD_TASK_DIR"), Some("/m/local"));
        assert_eq!(get("NOMAD_MEMORY_LIMIT"), Some("300"));
        assert_eq!(get("NOMAD_MEMORY_MAX_LIMIT"), Some("64"));
        assert_eq!(get("NOMAD_META_TEAM_NAME"), Some("blue"));
        assert_eq!(get("NOMAD_CPU_CORES"), Some(" "));
    }

    #[test]
    fn tokens_of_the_agent_are_not_inherited() {
        let host = [("PATH", "/bin"), ("VAULT_TOKEN", "s.1")];
        let host = host.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let names: Vec<_> = inherited(host).into_keys().collect();
        assert_eq!(names, ["PATH"]);
    }
}
