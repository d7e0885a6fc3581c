//! Reads a job file. Every block and attribute is either understood, or listed as what needs a cluster, or an error with its
//! line: nothing is passed over in silence. Pure.

use std::time::Duration;

use ::hcl::Value;
use ::hcl::edit::parser;
use ::hcl::edit::structure::Block;

use self::reader::{Content, Entry, Reader, block_of, label, missing, named};
use super::{Group, Job, Kind, Logs, Resources, Target, Task, Template, Unsupported};

mod reader;

pub(super) use self::reader::as_string;

/// Blocks and attributes of Nomad that are a cluster's business.
const CLUSTER_JOB: &str = "affinity all_at_once constraint consul_token migrate multiregion node_pool parameterized periodic \
    priority reschedule spread ui update vault vault_token";
const CLUSTER_GROUP: &str = "affinity constraint consul disconnect ephemeral_disk max_client_disconnect migrate network \
    prevent_reschedule_on_lost reschedule restart scaling service shutdown_delay spread \
    stop_after_client_disconnect update vault volume";
const CLUSTER_TASK: &str = "action affinity artifact constraint consul csi_plugin device dispatch_payload identity kind leader \
    lifecycle restart scaling schedule secret service shutdown_delay vault volume_mount";
const CLUSTER_RESOURCES: &str = "device disk iops network numa secrets";

/// Why a job file was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    #[error("line {line}: {message}")]
    Syntax { line: usize, message: String },
    #[error("line {line}: `{key}` is nothing that {place} can have")]
    Unknown {
        line: usize,
        key: String,
        place: String,
    },
    #[error("line {line}: `{key}`: {message}")]
    Value {
        line: usize,
        key: String,
        message: String,
    },
    #[error("line {line}: {place} has no `{key}`")]
    Missing {
        line: usize,
        place: String,
        key: String,
    },
    #[error("{0}")]
    NotAJob(&'static str),
}

/// Reads a job file; `variables` override the defaults of its `variable` blocks, as `nomad job run -var` does.
pub fn parse(text: &str, variables: &[(String, String)]) -> Result<Job, JobError> {
    let body = parser::parse_body(text).map_err(|error| JobError::Syntax {
        line: error.location().line(),
        message: error.message().to_owned(),
    })?;
    let mut reader = Reader::new(text);
    reader.names(&body, variables)?;
    let mut job = None;
    for entry in reader.entries(&body) {
        match (entry.key, &entry.content) {
            ("job", Content::Block(block)) if job.is_none() => {
                job = Some(reader.job(block, entry.line)?)
            }
            ("job", _) => {
                return Err(JobError::NotAJob(
                    "a job file holds exactly one `job` block",
                ));
            }
            ("variable" | "variables" | "locals", _) => {}
            _ => return Err(entry.unknown("a job file")),
        }
    }
    let mut job: Job = job.ok_or(JobError::NotAJob("the file has no `job` block"))?;
    job.unsupported = reader.unsupported;
    Ok(job)
}

impl Reader<'_> {
    fn job(&mut self, block: &Block, line: usize) -> Result<Job, JobError> {
        let id = label(block).ok_or_else(|| missing(line, "a job", "name"))?;
        let mut job = Job {
            name: id.clone(),
            id,
            namespace: "default".into(),
            region: "global".into(),
            datacenter: "dc1".into(),
            kind: Kind::Service,
            meta: Vec::new(),
            groups: Vec::new(),
            unsupported: Vec::new(),
        };
        let place = format!("job {}", job.id);
        for entry in self.entries(&block.body) {
            match entry.key {
                "id" => job.id = self.string(&entry)?,
                "name" => job.name = self.string(&entry)?,
                "namespace" => job.namespace = self.string(&entry)?,
                "region" => job.region = self.string(&entry)?,
                "datacenters" => job.datacenter = self.datacenter(&entry)?,
                "type" => job.kind = self.kind(&entry)?,
                "meta" => job.meta = self.strings(&entry)?,
                "group" => {
                    let group = self.group(&entry)?;
                    job.groups.push(group);
                }
                // Short form: a task outside any group stands in a group of its own name.
                "task" => {
                    let task = self.task(&entry)?;
                    job.groups.push(Group {
                        name: task.name.clone(),
                        count: 1,
                        meta: Vec::new(),
                        tasks: vec![task],
                    });
                }
                _ => self.cluster(&entry, CLUSTER_JOB, &place)?,
            }
        }
        if job.groups.is_empty() {
            return Err(missing(line, &place, "group"));
        }
        Ok(job)
    }

    fn group(&mut self, entry: &Entry<'_>) -> Result<Group, JobError> {
        let (block, name) = named(entry)?;
        let place = format!("group {name}");
        let mut group = Group {
            name,
            count: 1,
            meta: Vec::new(),
            tasks: Vec::new(),
        };
        for entry in self.entries(&block.body) {
            match entry.key {
                "count" => group.count = self.number(&entry)?,
                "meta" => group.meta = self.strings(&entry)?,
                "task" => {
                    let task = self.task(&entry)?;
                    group.tasks.push(task);
                }
                _ => self.cluster(&entry, CLUSTER_GROUP, &place)?,
            }
        }
        if group.tasks.is_empty() {
            return Err(missing(entry.line, &place, "task"));
        }
        Ok(group)
    }

    fn task(&mut self, entry: &Entry<'_>) -> Result<Task, JobError> {
        let (block, name) = named(entry)?;
        let place = format!("task {name}");
        let mut task = Task {
            name,
            line: entry.line,
            driver: String::new(),
            user: None,
            config: Vec::new(),
            env: Vec::new(),
            resources: Resources::default(),
            kill_signal: String::new(),
            kill_timeout: Duration::from_secs(5),
            logs: Logs::Collected,
            templates: Vec::new(),
            meta: Vec::new(),
        };
        for entry in self.entries(&block.body) {
            match entry.key {
                "driver" => task.driver = self.string(&entry)?,
                "user" => task.user = Some(self.string(&entry)?).filter(|user| !user.is_empty()),
                "config" => task.config = self.settings(&entry)?,
                "env" => task.env = self.settings(&entry)?,
                "meta" => task.meta = self.strings(&entry)?,
                "kill_signal" => task.kill_signal = self.string(&entry)?,
                "kill_timeout" => task.kill_timeout = self.duration(&entry)?,
                "resources" => task.resources = self.resources(&entry, &place)?,
                "logs" => task.logs = self.logs(&entry)?,
                "template" => {
                    let template = self.template(&entry, &place)?;
                    task.templates.extend(template);
                }
                _ => self.cluster(&entry, CLUSTER_TASK, &place)?,
            }
        }
        if task.driver.is_empty() {
            return Err(missing(entry.line, &place, "driver"));
        }
        Ok(task)
    }

    fn resources(&mut self, entry: &Entry<'_>, place: &str) -> Result<Resources, JobError> {
        let mut resources = Resources::default();
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "cpu" => resources.cpu_mhz = self.number(&entry)?,
                "cores" => resources.cores = self.number(&entry)?,
                "memory" => resources.memory_mib = self.number(&entry)?,
                "memory_max" => resources.memory_max_mib = self.number(&entry)?,
                _ => self.cluster(&entry, CLUSTER_RESOURCES, place)?,
            }
        }
        Ok(resources)
    }

    fn logs(&mut self, entry: &Entry<'_>) -> Result<Logs, JobError> {
        let mut logs = Logs::Collected;
        for entry in self.entries(&block_of(entry)?.body) {
            match (entry.key, &entry.content) {
                // Rotation is the agent's business, not the driver's.
                ("max_files" | "max_file_size" | "enabled", _) => {}
                ("disabled", Content::Attribute(value)) => {
                    if self.value(&entry, value)? == Value::from(true) {
                        logs = Logs::Disabled;
                    }
                }
                _ => return Err(entry.unknown("logs")),
            }
        }
        Ok(logs)
    }

    fn template(&mut self, entry: &Entry<'_>, place: &str) -> Result<Option<Template>, JobError> {
        let mut template = Template {
            data: String::new(),
            destination: String::new(),
            mode: 0o644,
            target: Target::File,
            line: entry.line,
        };
        for entry in self.entries(&block_of(entry)?.body) {
            match (entry.key, &entry.content) {
                ("data", _) => template.data = self.string(&entry)?,
                ("destination", _) => template.destination = self.string(&entry)?,
                ("perms", _) => {
                    let octal = self.string(&entry)?;
                    template.mode = u32::from_str_radix(&octal, 8)
                        .map_err(|_| entry.wrong("not an octal mode"))?;
                }
                ("env", Content::Attribute(value)) => {
                    if self.value(&entry, value)? == Value::from(true) {
                        template.target = Target::Environment;
                    }
                }
                // What happens when a text changes: this one does not change.
                (
                    "change_mode"
                    | "change_signal"
                    | "change_script"
                    | "splay"
                    | "wait"
                    | "error_on_missing_key"
                    | "once",
                    _,
                ) => {}
                _ => self.cluster(
                    &entry,
                    "source left_delimiter right_delimiter uid gid vault_grace",
                    place,
                )?,
            }
        }
        if template.data.contains("{{") {
            self.unsupported.push(Unsupported {
                what: format!(
                    "{place}: template {}, whose text has `{{{{ }}}}` in it",
                    template.destination
                ),
                line: entry.line,
            });
            return Ok(None);
        }
        Ok(Some(template))
    }
}

#[cfg(test)]
mod tests;
