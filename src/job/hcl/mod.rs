//! Reads a job file. Every block and attribute is either understood, or listed as what needs a cluster, or an error with its
//! line: nothing is passed over in silence. Pure.

use std::time::Duration;

use ::hcl::Value;
use ::hcl::edit::parser;
use ::hcl::edit::structure::Block;

use self::cluster::{GROUP, JOB, TASK};
use self::reader::{Content, Entry, Reader, label, missing, named};
use super::{Effect, Group, Job, JobError, Kind, Logs, Resources, Setting, Task};

mod blocks;
mod cluster;
mod reader;
mod variables;

pub(super) use self::reader::as_string;

/// Of a job file: far more than people write, far less than would hurt.
pub const MAX_FILE_BYTES: u64 = 2 << 20;

/// Reads a job file; `variables` override the defaults of its `variable` blocks, as `nomad job run -var` does.
pub fn parse(text: &str, variables: &[(String, String)]) -> Result<Job, JobError> {
    let body = parser::parse_body(text).map_err(|error| {
        let line = error.location().line();
        JobError::new(line, error.message().replace('\n', "; "))
    })?;
    let mut reader = Reader::new(text);
    reader.names(&body, variables)?;
    let mut job = None;
    for entry in reader.entries(&body) {
        match (entry.key, &entry.content) {
            ("job", Content::Block(block)) if job.is_none() => {
                job = Some(reader.job(block, entry.line)?)
            }
            ("job", _) => return Err(entry.wrong("a job file holds exactly one")),
            ("variable" | "variables" | "locals", _) => {}
            _ => return Err(entry.unknown("a job file")),
        }
    }
    let mut job: Job = job.ok_or_else(|| JobError::new(1, "the file has no `job` block"))?;
    job.unsupported = reader.unsupported;
    Ok(job)
}

impl Reader {
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
            parameterized: None,
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
                    self.group = named(&entry)?.1.into();
                    let task = self.task(&entry)?;
                    self.group = None;
                    job.groups.push(Group {
                        name: task.name.clone(),
                        meta: Vec::new(),
                        volumes: Vec::new(),
                        ports: Vec::new(),
                        own_network: None,
                        tasks: vec![task],
                    });
                }
                "parameterized" => job.parameterized = Some(self.parameterized(&entry)?),
                "reschedule" => self.attempts(&entry, &place)?,
                _ => self.cluster(&entry, &JOB, &place)?,
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
            meta: Vec::new(),
            volumes: Vec::new(),
            ports: Vec::new(),
            own_network: None,
            tasks: Vec::new(),
        };
        self.group = Some(group.name.clone());
        for entry in self.entries(&block.body) {
            match entry.key {
                "count" => {
                    let count: u32 = self.number(&entry)?;
                    if count != 1 {
                        let message =
                            format!("{place}: count = {count}, but a run is one instance");
                        self.note(&entry, Effect::None, message);
                    }
                }
                "meta" => group.meta = self.strings(&entry)?,
                "task" => {
                    let task = self.task(&entry)?;
                    if group.tasks.iter().any(|other| other.name == task.name) {
                        return Err(entry.wrong(format!("{place} has two tasks {}", task.name)));
                    }
                    group.tasks.push(task);
                }
                "network" => {
                    let (ports, own) = self.network(&entry, &place)?;
                    group.ports.extend(ports);
                    group.own_network = own.or(group.own_network);
                }
                "volume" => {
                    let volume = self.volume(&entry)?;
                    group.volumes.push(volume);
                }
                "service" => self.service(&entry, &place)?,
                "restart" | "reschedule" => self.attempts(&entry, &place)?,
                _ => self.cluster(&entry, &GROUP, &place)?,
            }
        }
        self.group = None;
        if group.tasks.is_empty() {
            return Err(missing(entry.line, &place, "task"));
        }
        Ok(group)
    }

    fn task(&mut self, entry: &Entry<'_>) -> Result<Task, JobError> {
        let (block, name) = named(entry)?;
        directory_name(entry, &name)?;
        let place = format!("task {name}");
        self.task = Some(name.clone());
        let mut task = Task {
            name,
            line: entry.line,
            driver: Setting {
                value: Value::Null,
                line: entry.line,
            },
            user: None,
            lifecycle: None,
            config: Vec::new(),
            env: Vec::new(),
            resources: Resources::default(),
            kill_signal: String::new(),
            kill_timeout: Duration::from_secs(5),
            logs: Logs::Collected,
            templates: Vec::new(),
            volume_mounts: Vec::new(),
            payload_file: None,
            meta: Vec::new(),
        };
        for entry in self.entries(&block.body) {
            match entry.key {
                "driver" => task.driver = self.text(&entry)?,
                "user" => task.user = Some(self.string(&entry)?).filter(|user| !user.is_empty()),
                "config" => task.config = self.settings(&entry)?,
                "env" => task.env = self.texts(&entry)?,
                "meta" => task.meta = self.strings(&entry)?,
                "kill_signal" => task.kill_signal = self.string(&entry)?,
                "kill_timeout" => task.kill_timeout = self.duration(&entry)?,
                "resources" => task.resources = self.resources(&entry, &place)?,
                "logs" => task.logs = self.logs(&entry)?,
                "template" => {
                    let template = self.template(&entry, &place)?;
                    task.templates.extend(template);
                }
                "volume_mount" => {
                    let mount = self.volume_mount(&entry)?;
                    task.volume_mounts.push(mount);
                }
                "lifecycle" => task.lifecycle = Some(self.lifecycle(&entry)?),
                "dispatch_payload" => task.payload_file = self.payload_file(&entry)?,
                "service" => self.service(&entry, &place)?,
                "identity" => self.identity(&entry, &place)?,
                "restart" => self.attempts(&entry, &place)?,
                _ => self.cluster(&entry, &TASK, &place)?,
            }
        }
        self.task = None;
        if task.driver.value == Value::Null {
            return Err(missing(entry.line, &place, "driver"));
        }
        Ok(task)
    }
}

/// The name is a directory's, beside the allocation's own.
fn directory_name(entry: &Entry<'_>, name: &str) -> Result<(), JobError> {
    if matches!(name, "" | "." | ".." | "alloc") || name.contains(['/', '\\', '\0']) {
        return Err(entry.wrong(format!("{name:?} is no name for a task")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
