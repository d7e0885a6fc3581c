//! The request that starts one task: everything Nomad would put into its StartTask call, as plain values. Pure but for
//! [`new_alloc_id`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::environment::{Placed, variables};
use super::{Access, JobError, RunTime, Setting, VolumeMount};

/// One task, ready to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// `<alloc id>/<task>/<8 hex digits>`, new for each start.
    pub id: String,
    pub name: String,
    pub user: String,
    /// The driver's own keys, filled in.
    pub config: Vec<(String, Setting)>,
    pub env: BTreeMap<String, String>,
    pub cpu_mhz: u64,
    pub cpuset: String,
    pub memory_mib: u64,
    pub memory_max_mib: i64,
    pub mounts: Vec<VolumeMount>,
    pub alloc_dir: PathBuf,
    pub stdout: PathBuf,
    pub stderr: PathBuf,
    pub alloc_id: String,
    pub group: String,
    pub job_id: String,
    pub job_name: String,
    pub namespace: String,
    pub kill_signal: String,
    pub kill_timeout: Duration,
}

impl Request {
    /// Fills in the job's strings. `inherited` is the agent's environment, `templates` what its templates add to it; the
    /// task's own `env` wins over both.
    pub fn new(
        placed: &Placed<'_>,
        alloc_dir: PathBuf,
        user: String,
        inherited: &BTreeMap<String, String>,
        templates: &BTreeMap<String, String>,
    ) -> Result<Self, JobError> {
        let Placed {
            job, group, task, ..
        } = placed;
        let mut env = inherited.clone();
        env.extend(variables(placed));
        let facts = || placed.node.facts.clone().into_iter();
        let known = RunTime::new(env.clone().into_iter().chain(facts()).collect());
        for (name, Setting { value, .. }) in &task.env {
            let text = super::hcl::as_string(value.clone()).unwrap_or_default();
            env.insert(name.clone(), known.env(&text));
        }
        for (name, value) in templates {
            env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        let known = RunTime::new(env.clone().into_iter().chain(facts()).collect());
        let fill = |(name, Setting { value, line }): &(String, Setting)| {
            let value = known.config(value, *line)?;
            Ok((name.clone(), Setting { value, line: *line }))
        };
        let mounts = task.volume_mounts.iter().map(|mount| {
            let volume = group.volumes.iter().find(|it| it.name == mount.volume);
            let volume = volume.ok_or_else(|| {
                let message = format!(
                    "volume_mount: group {} has no volume `{}`",
                    group.name, mount.volume
                );
                JobError::new(mount.line, message)
            })?;
            Ok(VolumeMount {
                destination: known.string(&mount.destination, mount.line)?,
                access: match volume.access {
                    Access::ReadOnly => Access::ReadOnly,
                    Access::ReadWrite => mount.access,
                },
                ..mount.clone()
            })
        });
        Ok(Request {
            mounts: mounts.collect::<Result<_, JobError>>()?,
            id: new_task_id(placed.alloc_id, &task.name),
            name: task.name.clone(),
            user,
            config: task.config.iter().map(fill).collect::<Result<_, _>>()?,
            env,
            cpu_mhz: placed.cpu_mhz,
            cpuset: placed.cpuset.to_owned(),
            memory_mib: task.resources.memory_mib,
            memory_max_mib: task.resources.memory_max_mib,
            alloc_dir,
            stdout: placed.paths.stdout.clone(),
            stderr: placed.paths.stderr.clone(),
            alloc_id: placed.alloc_id.to_owned(),
            group: group.name.clone(),
            job_id: job.id.clone(),
            job_name: job.name.clone(),
            namespace: job.namespace.clone(),
            kill_signal: task.kill_signal.clone(),
            kill_timeout: task.kill_timeout,
        })
    }
}

/// A fresh id for a start of a task.
pub fn new_task_id(alloc_id: &str, task: &str) -> String {
    let random = new_alloc_id();
    format!("{alloc_id}/{task}/{}", random.get(..8).unwrap_or(&random))
}

/// A random UUID, from the kernel.
pub fn new_alloc_id() -> String {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    // Without /proc nothing of ours runs; the nil id fails later with a message that names it.
    uuid.map_or_else(
        |_| "00000000-0000-0000-0000-000000000000".into(),
        |uuid| uuid.trim().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::job::alloc_dir::TaskPaths;
    use crate::job::environment::Node;
    use crate::job::{Job, Value, parse};

    const JOB: &str = r#"
job "shop" {
  group "front" {
    task "web" {
      driver = "exec2"
      env {
        LISTEN = "${NOMAD_ALLOC_INDEX}:80"
        PATH   = "/opt/bin"
      }
      config {
        command = "/bin/echo"
        args    = ["${NOMAD_TASK_DIR}", "${LISTEN}", "${NOMAD_BOGUS}"]
      }
    }
  }
}
"#;

    fn request(job: &Job) -> Result<Request, JobError> {
        let paths = TaskPaths {
            root: "/m".into(),
            local: "/m/local".into(),
            alloc: "/m/alloc".into(),
            secrets: "/m/secrets".into(),
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
        };
        let placed = Placed {
            job,
            group: &job.groups[0],
            task: &job.groups[0].tasks[0],
            alloc_id: "5a6f1c22-0000-4000-8000-000000000000",
            alloc_index: 0,
            cpu_mhz: 100,
            cpuset: "",
            paths: &paths,
            node: &Node::default(),
        };
        let inherited = BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]);
        let templates = BTreeMap::from([("FROM_TEMPLATE".to_owned(), "yes".to_owned())]);
        Request::new(
            &placed,
            "/allocs/5a6f".into(),
            "nomad-80001".into(),
            &inherited,
            &templates,
        )
    }

    #[test]
    fn a_task_s_strings_are_filled_in() {
        let job = parse(&JOB.replace(", \"${NOMAD_BOGUS}\"", ""), &[]).unwrap();
        let request = request(&job).unwrap();
        assert_eq!(request.env["LISTEN"], "0:80");
        assert_eq!(request.env["PATH"], "/opt/bin");
        assert_eq!(request.env["FROM_TEMPLATE"], "yes");
        assert_eq!(
            request.config[1].1.value,
            Value::from(vec!["/m/local", "0:80"])
        );
        assert!(
            request
                .id
                .starts_with("5a6f1c22-0000-4000-8000-000000000000/web/")
        );
        assert_eq!(request.id.len(), 36 + 5 + 8);
    }

    #[test]
    fn an_unknown_name_in_the_configuration_is_an_error_with_its_line() {
        let job = parse(JOB, &[]).unwrap();
        let error = request(&job).unwrap_err().to_string();
        assert!(
            error.contains("line 12") && error.contains("NOMAD_BOGUS"),
            "{error}"
        );
    }

    #[test]
    fn a_volume_is_mounted_where_and_as_the_job_says() {
        let volumes =
            "group \"front\" {\nvolume \"data\" {\nread_only = true\n}\nvolume \"work\" {\n}";
        let mounts = "task \"web\" {\nvolume_mount {\nvolume = \"data\"\ndestination = \"${NOMAD_TASK_DIR}/data\"\n}\n\
            volume_mount {\nvolume = \"work\"\ndestination = \"/work\"\npropagation_mode = \"host-to-task\"\n}";
        let text = JOB
            .replace(", \"${NOMAD_BOGUS}\"", "")
            .replace("group \"front\" {", volumes)
            .replace("task \"web\" {", mounts);
        let request = request(&parse(&text, &[]).unwrap()).unwrap();
        let seen: Vec<_> = request
            .mounts
            .iter()
            .map(|it| (it.destination.as_str(), it.access, it.propagation.as_str()))
            .collect();
        assert_eq!(
            seen,
            [
                ("/m/local/data", Access::ReadOnly, "private"),
                ("/work", Access::ReadWrite, "host-to-task"),
            ]
        );
    }
}
