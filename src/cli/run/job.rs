//! From a job file to the request of one of its tasks, with everything named that the run leaves out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::{Ending, Given, RunError, inherited, node};
use crate::cli::terminal::say;
use crate::host;
use crate::job::alloc_dir::TaskPaths;
use crate::job::environment::{Node, Placed};
use crate::job::options::options;
use crate::job::request::Request;
use crate::job::select::select;
use crate::job::{
    self, Access, Effect, Group, Job, JobError, MAX_FILE_BYTES, Payload, Setting, Task,
    Unsupported, Value, template,
};
use crate::plan::limits::{MemoryMax, Resources};
use crate::plan::signal;
use crate::task::types::{Mount, MountMode, Names, TaskId, TaskRequest};
use crate::users::{self, Account};

/// What Nomad takes as the payload of a dispatch.
const MAX_PAYLOAD_BYTES: u64 = 16 << 10;

/// One task of a job file, with the options of the command line applied.
#[derive(Debug, Clone)]
pub struct JobTask {
    file: PathBuf,
    job: Job,
    group: Group,
    task: Task,
    payload: Vec<u8>,
    cpuset: String,
    /// The volumes of the task that are known, and their directories.
    volumes: Vec<(String, PathBuf)>,
    /// It was told already.
    pub(super) is_told: bool,
}

impl JobTask {
    /// Reads and judges the file before anything exists.
    pub fn read(file: &Path, given: &Given) -> Result<Self, RunError> {
        let of_file = |error| of_file(file, error);
        let job = parse(file, given)?;
        let selected = select(&job, given.of_job.task.as_deref()).map_err(of_file)?;
        for other in &selected.left_out {
            let kind = other
                .lifecycle
                .as_ref()
                .map_or("main", |it| it.hook.as_str());
            tell(
                file,
                other.line,
                &format!("task {} ({kind}) stays out of this run", other.name),
            );
        }
        let (group, task) = (selected.group.clone(), selected.task.clone());
        if !is_ours(&task) {
            let message = format!(
                "task {}: driver = {}, but only exec2 can be run here",
                task.name, task.driver.value
            );
            return Err(of_file(JobError::new(task.driver.line, message)));
        }
        judge(file, &job.unsupported, &group, &task, &given.of_job.ignore)?;
        given_volumes(&group, &task, given).map_err(of_file)?;
        let volumes = given.of_job.volume.clone();
        Self::new(file, (job, group, task), given, volumes)
    }

    /// A task of a job that was read, with the options of the command line applied.
    pub fn new(
        file: &Path,
        (mut job, group, mut task): (Job, Group, Task),
        given: &Given,
        volumes: Vec<(String, PathBuf)>,
    ) -> Result<Self, RunError> {
        let of_file = |error| of_file(file, error);
        let payload = dispatch(&mut job, given, of_file)?;
        check_signal(&task).map_err(of_file)?;
        let cpuset = apply(given, &mut task).map_err(of_file)?;
        Ok(JobTask {
            file: file.to_owned(),
            job,
            group,
            task,
            payload,
            cpuset,
            volumes,
            is_told: false,
        })
    }

    pub fn name(&self) -> &str {
        &self.task.name
    }

    /// The account of the file's user, if it names one.
    pub fn account(&self) -> Result<Option<Account>, RunError> {
        let account = self.task.user.as_deref().map(users::look_up).transpose();
        account.map_err(|error| RunError::Job {
            file: self.file.clone(),
            error: JobError::new(self.task.line, format!("task {}: {error}", self.task.name)),
        })
    }

    /// Writes what the task finds in its directory, and makes the request that Nomad would.
    pub fn request(
        self,
        given: &Given,
        account: &Account,
        alloc_id: &str,
        alloc_dir: &Path,
        paths: &TaskPaths,
    ) -> Result<(TaskRequest, Ending), RunError> {
        let of_file = |error| of_file(&self.file, error);
        let ports = &self.group.ports;
        let node = node::node(&self.job, ports, node::free_port).map_err(of_file)?;
        if let Some(port) = ports
            .iter()
            .find(|port| port.fixed.is_none() && !self.is_told)
        {
            let told = format!("ports of this run: {}", node::shown_ports(&node.ports));
            tell(&self.file, port.line, &told);
        }
        let placed = self.placed(alloc_id, paths, &node);
        let templates = template::write(&placed).map_err(of_file)?;
        template::write_payload(&placed, &self.payload).map_err(of_file)?;
        let inherited: BTreeMap<_, _> = inherited().collect();
        let made = self.fill_in(given, &placed, (account, alloc_dir), &inherited, &templates);
        let (request, ending) = made.map_err(of_file)?;
        for (line, sentence) in self.open_names(&request).iter().filter(|_| !self.is_told) {
            tell(&self.file, *line, sentence);
        }
        Ok((request, ending))
    }

    pub fn placed<'a>(
        &'a self,
        alloc_id: &'a str,
        paths: &'a TaskPaths,
        node: &'a Node,
    ) -> Placed<'a> {
        Placed {
            job: &self.job,
            group: &self.group,
            task: &self.task,
            alloc_id,
            alloc_index: 0,
            cpu_mhz: self.task.resources.cpu_mhz,
            cpuset: &self.cpuset,
            paths,
            node,
        }
    }

    /// What of the file's `env` this host does not know.
    fn open_names(&self, request: &TaskRequest) -> Vec<(usize, String)> {
        let open = self.task.env.iter().filter_map(|(name, setting)| {
            let open = job::open_name(request.env.get(name)?)?;
            let sentence = format!(
                "env {name}: this host does not know ${{{open}}}, which stays as it stands"
            );
            Some((setting.line, sentence))
        });
        open.collect()
    }

    /// The request that Nomad would make.
    pub fn fill_in(
        &self,
        given: &Given,
        placed: &Placed<'_>,
        (account, alloc_dir): (&Account, &Path),
        inherited: &BTreeMap<String, String>,
        templates: &BTreeMap<String, String>,
    ) -> Result<(TaskRequest, Ending), JobError> {
        let task = &self.task;
        let user = account.name.clone();
        let request = Request::new(placed, alloc_dir.to_owned(), user, inherited, templates)?;
        let mut options = options(&request.config, task.line)?;
        options.unveil.extend(given.unveil.iter().cloned());
        let ending = Ending {
            signal: Some(task.kill_signal.clone()),
            timeout: task.kill_timeout,
            logs: task.logs,
        };
        let mounts = request.mounts.iter().filter_map(|mount| {
            let (_, host_path) = last(&self.volumes, &mount.volume)?;
            Some(Mount {
                task_path: (&mount.destination).into(),
                host_path: host_path.clone(),
                mode: match mount.access {
                    Access::ReadOnly => MountMode::ReadOnly,
                    Access::ReadWrite => MountMode::ReadWrite,
                },
                propagation: mount.propagation.clone(),
                selinux_label: mount.selinux_label.clone(),
            })
        });
        let request = TaskRequest {
            mounts: mounts.collect(),
            id: TaskId::new(request.id),
            options,
            names: Names {
                task: request.name,
                group: request.group,
                job: request.job_name,
                job_id: request.job_id,
                alloc_id: request.alloc_id,
                namespace: request.namespace,
                ..Names::default()
            },
            env: request.env,
            device_env: BTreeMap::new(),
            user: request.user,
            alloc_dir: request.alloc_dir,
            stdout_path: "/dev/null".into(),
            stderr_path: "/dev/null".into(),
            resources: Resources {
                cpu_mhz: request.cpu_mhz,
                memory_mib: request.memory_mib,
                memory_max_mib: match u64::try_from(request.memory_max_mib) {
                    Ok(0) => MemoryMax::Unset,
                    Ok(mib) => MemoryMax::Mib(mib),
                    Err(_) => MemoryMax::Unlimited,
                },
                cpuset: request.cpuset,
            },
            nomad_cgroup: "".into(),
            network_namespace: None,
            hosts: None,
            dns: None,
            devices: Vec::new(),
        };
        Ok((request, ending))
    }
}

fn tell(file: &Path, line: usize, sentence: &str) {
    say(format_args!("{}:{line}: {sentence}", file.display()));
}

fn of_file(file: &Path, error: JobError) -> RunError {
    RunError::Job {
        file: file.to_owned(),
        error,
    }
}

/// Reads a job file.
pub fn parse(file: &Path, given: &Given) -> Result<Job, RunError> {
    let text = String::from_utf8(bytes(file, MAX_FILE_BYTES)?).map_err(|_| RunError::File {
        path: file.to_owned(),
        problem: "is not text, so that it can be no job file".into(),
    })?;
    job::parse(&text, &given.of_job.var).map_err(|error| of_file(file, error))
}

/// Whether a task is this driver's.
pub fn is_ours(task: &Task) -> bool {
    task.driver.value == Value::from("exec2")
}

pub fn last<'a, V>(options: &'a [(String, V)], name: &str) -> Option<&'a (String, V)> {
    options.iter().rev().find(|(given, _)| given == name)
}

/// The whole file, if it is no longer than that.
fn bytes(path: &Path, max: u64) -> Result<Vec<u8>, RunError> {
    let failed = |problem: String| RunError::File {
        path: path.to_owned(),
        problem,
    };
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            failed("no such job file; a command to run stands after `--`".into())
        }
        _ => failed(error.to_string()),
    })?;
    let mut bytes = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > max {
        return Err(failed(format!(
            "is longer than the {} KiB that are read",
            max >> 10
        )));
    }
    Ok(bytes)
}

/// Names what this run leaves out, and fails if the task would not be what the file says.
fn judge(
    file: &Path,
    unsupported: &[Unsupported],
    group: &Group,
    task: &Task,
    ignore: &[String],
) -> Result<(), RunError> {
    let concerns = |entry: &&Unsupported| {
        entry.group.as_ref().is_none_or(|name| *name == group.name)
            && entry.task.as_ref().is_none_or(|name| *name == task.name)
    };
    let mut failure: Option<JobError> = None;
    for entry in unsupported.iter().filter(concerns) {
        let is_error = entry.effect == Effect::Missing && !ignore.contains(&entry.key);
        match is_error {
            true => {
                if let Some(earlier) =
                    failure.replace(JobError::new(entry.line, entry.message.clone()))
                {
                    tell(file, earlier.line, &earlier.message);
                }
            }
            false if entry.effect == Effect::Missing => {
                tell(file, entry.line, &format!("{} is left out", entry.key));
            }
            false => tell(file, entry.line, &entry.message),
        }
    }
    match failure {
        Some(error) => Err(RunError::Job {
            file: file.to_owned(),
            error,
        }),
        None => Ok(()),
    }
}

/// Adds what a dispatch gives to a parameterized job, and returns the payload.
fn dispatch(
    job: &mut Job,
    given: &Given,
    of_file: impl Fn(JobError) -> RunError,
) -> Result<Vec<u8>, RunError> {
    let (meta, payload) = (&given.of_job.meta, &given.of_job.payload);
    let wrong = |line: usize, message: String| Err(of_file(JobError::new(line, message)));
    let Some(parameterized) = &job.parameterized else {
        if !meta.is_empty() || payload.is_some() {
            let message =
                "the job is not parameterized, so that it takes no --meta and no --payload";
            return wrong(1, message.into());
        }
        return Ok(Vec::new());
    };
    let line = parameterized.line;
    let required = &parameterized.meta_required;
    if let Some(name) = required.iter().find(|name| last(meta, name).is_none()) {
        return wrong(line, format!("meta_required: give --meta {name}=VALUE"));
    }
    let optional = &parameterized.meta_optional;
    let is_known = |name: &String| required.contains(name) || optional.contains(name);
    if let Some((name, _)) = meta.iter().find(|(name, _)| !is_known(name)) {
        return wrong(line, format!("--meta {name}: the job takes no `{name}`"));
    }
    match (parameterized.payload, payload) {
        (Payload::Required, None) => {
            return wrong(line, "payload = \"required\": give --payload FILE".into());
        }
        (Payload::Forbidden, Some(_)) => {
            return wrong(line, "payload = \"forbidden\": leave --payload out".into());
        }
        _ => {}
    }
    job.meta.extend(meta.iter().cloned());
    match payload {
        Some(path) => bytes(path, MAX_PAYLOAD_BYTES),
        None => Ok(Vec::new()),
    }
}

/// Whether each volume of the task has its directory, and each directory its volume.
fn given_volumes(group: &Group, task: &Task, given: &Given) -> Result<(), JobError> {
    let volumes = &given.of_job.volume;
    for mount in &task.volume_mounts {
        let name = &mount.volume;
        if group.volumes.iter().all(|volume| volume.name != *name) {
            let message = format!("volume_mount: group {} has no volume `{name}`", group.name);
            return Err(JobError::new(mount.line, message));
        }
        let Some((_, path)) = last(volumes, name) else {
            let message = format!(
                "volume_mount: volume `{name}` is a Nomad client's; name a directory of this host with --volume {name}=/PATH"
            );
            return Err(JobError::new(mount.line, message));
        };
        if !path.is_dir() {
            let message = format!("--volume {name}={}: no such directory", path.display());
            return Err(JobError::new(mount.line, message));
        }
    }
    let is_mounted = |name: &str| task.volume_mounts.iter().any(|mount| mount.volume == name);
    match volumes.iter().find(|(name, _)| !is_mounted(name)) {
        Some((name, _)) => Err(JobError::new(
            task.line,
            format!("--volume {name}: task {} mounts no such volume", task.name),
        )),
        None => Ok(()),
    }
}

fn check_signal(task: &Task) -> Result<(), JobError> {
    if task.kill_signal.is_empty() {
        return Ok(());
    }
    let parsed = signal::parse(&task.kill_signal).map(drop);
    parsed.map_err(|error| JobError::new(task.line, format!("kill_signal: {error}")))
}

/// Lets the command line win over the file; returns the CPUs of a task with `cores`.
fn apply(given: &Given, task: &mut Task) -> Result<String, JobError> {
    let line = task.line;
    if let Some(mib) = given.memory {
        task.resources.memory_mib = mib;
        task.resources.memory_max_mib = 0;
    }
    if let Some(mhz) = given.cpu {
        task.resources.cpu_mhz = mhz;
        task.resources.cores = 0;
    }
    for (name, text) in &given.env {
        let value = Value::from(text.as_str());
        task.env.retain(|(earlier, _)| earlier != name);
        task.env.push((name.clone(), Setting { value, line }));
    }
    let max = task.resources.memory_max_mib;
    if max > 0 && u64::try_from(max).is_ok_and(|max| max < task.resources.memory_mib) {
        let message = format!(
            "memory_max = {max} is below memory = {}",
            task.resources.memory_mib
        );
        return Err(JobError::new(line, message));
    }
    if task.resources.cores == 0 {
        return Ok(String::new());
    }
    let cpus =
        node::cpuset(task.resources.cores).map_err(|message| JobError::new(line, message))?;
    let compute = host::compute();
    let core_mhz = compute.total_mhz / compute.cores.max(1);
    task.resources.cpu_mhz = core_mhz * u64::from(task.resources.cores);
    Ok(cpus)
}
