//! From a job file to the plan of each of its tasks: the very one that StartTask would carry out, with words in the place of what
//! only a start on a client can tell.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::CheckError;
use super::agent::Agent;
use super::findings;
use super::report::{self, Line, Status};
use super::view::View;
use super::work_dir;
use crate::cli::run::job::{self as run_job, JobTask, last};
use crate::cli::run::{DYNAMIC, Given, RunError, inherited, node};
use crate::cli::terminal::{Colours, MAX_SENTENCE_BYTES};
use crate::config::plugin::PluginConfig;
use crate::host;
use crate::job::alloc_dir::TaskPaths;
use crate::job::environment;
use crate::job::select::select;
use crate::job::{self, Effect, Group, Job, Logs, Task, Value, options, template};
use crate::plan::Plan;
use crate::plan::limits::{Compute, Cpus};
use crate::plan::steps::Source;
use crate::task::types::TaskRequest;
use crate::task::{Ahead, TaskTable};
use crate::text::one_line;
use crate::users::{self, Account};

/// Stands for the id of the allocation.
pub const ALLOC_ID: &str = "00000000-0000-0000-0000-000000000000";

/// What is told of one task.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// `GROUP/TASK`; `None` if the file itself is at fault.
    pub task: Option<String>,
    /// `None` if there is none, for an error among the findings.
    pub plan: Option<View>,
    pub findings: Vec<Line>,
    /// What only a start on a client can tell.
    pub at_start: Vec<String>,
}

impl Checked {
    fn of_file(error: &RunError) -> Self {
        Self {
            task: None,
            plan: None,
            findings: vec![Line::error("job", error.to_string())],
            at_start: Vec::new(),
        }
    }

    pub fn text(&self, file: &Path, colours: Colours) -> String {
        let worst = self.findings.iter().map(|line| line.status).max();
        let verdict = match worst {
            Some(Status::Error) => "would not start",
            _ => "would start",
        };
        let title = match &self.task {
            Some(task) => format!("task {task} of {}: {verdict}", file.display()),
            None => format!("{}: {verdict}", file.display()),
        };
        let plan = self.plan.as_ref().map(View::text).unwrap_or_default();
        let open = self.at_start.iter();
        let open: String = open
            .map(|what| {
                format!(
                    "  {:13} {}\n",
                    "at the start",
                    one_line(what, MAX_SENTENCE_BYTES)
                )
            })
            .collect();
        let findings = report::text(&self.findings, colours);
        format!(
            "{}\n{plan}{open}{findings}",
            one_line(&title, MAX_SENTENCE_BYTES)
        )
    }
}

/// Everything beside the task that a plan is made of.
struct Surroundings<'a> {
    file: &'a Path,
    given: &'a Given,
    agent: &'a Agent,
    /// Of the plugin block.
    label: String,
    config: Result<PluginConfig, String>,
    compute: Compute,
    inherited: BTreeMap<String, String>,
    tasks: TaskTable,
}

/// Checks the tasks of a file that are this driver's, or the one that is named.
pub async fn check(file: &Path, given: &Given, agent: &Agent) -> Result<Vec<Checked>, CheckError> {
    let job = match run_job::parse(file, given) {
        Ok(job) => job,
        // No client would take it either: that is the answer, and no failure to give one.
        Err(error @ RunError::Job { .. }) => return Ok(vec![Checked::of_file(&error)]),
        Err(error) => return Err(error.into()),
    };
    let wanted = given.of_job.task.as_deref();
    let chosen: Vec<(Group, Task)> = match wanted {
        Some(name) => {
            let of_file = |error| RunError::Job {
                file: file.to_owned(),
                error,
            };
            let selected = select(&job, Some(name)).map_err(of_file)?;
            vec![(selected.group.clone(), selected.task.clone())]
        }
        None => {
            let groups = job.groups.iter();
            let all = groups.flat_map(|group| group.tasks.iter().map(move |task| (group, task)));
            all.map(|(group, task)| (group.clone(), task.clone()))
                .collect()
        }
    };
    let ours: Vec<_> = chosen
        .into_iter()
        .filter(|(_, task)| run_job::is_ours(task))
        .collect();
    if ours.is_empty() {
        return Err(CheckError::NoTask {
            file: file.to_owned(),
            what: wanted.map_or(format!("job {}", job.id), |name| format!("task {name}")),
        });
    }
    let label = agent.label();
    let config = agent.plugin(&label);
    let mut compute = host::compute();
    if let Some(total_mhz) = agent.config.cpu_total_compute {
        compute.total_mhz = total_mhz;
    }
    let tasks = TaskTable::new(Ahead::None)?;
    let known = config.clone().unwrap_or_default();
    tasks.set_up(known, Some(compute), Cpus::new()).await;
    let environment = agent.running.first().map(|agent| &agent.environment);
    let inherited = match environment.filter(|it| !it.is_empty()) {
        Some(environment) => environment::inherited(environment.iter().cloned()),
        None => inherited().collect(),
    };
    let around = Surroundings {
        file,
        given,
        agent,
        label,
        config,
        compute,
        inherited,
        tasks,
    };
    let checked = ours
        .into_iter()
        .map(|(group, task)| around.check(&job, group, task));
    Ok(checked.collect())
}

impl Surroundings<'_> {
    fn check(&self, job: &Job, group: Group, task: Task) -> Checked {
        let mut checked = Checked {
            task: Some(one_line(
                &format!("{}/{}", group.name, task.name),
                MAX_SENTENCE_BYTES,
            )),
            plan: None,
            findings: Vec::new(),
            at_start: self.at_start(job, &group, &task),
        };
        checked.findings.extend(self.agent.problems());
        let written = task.clone();
        let safe = |what: String| one_line(&what, MAX_SENTENCE_BYTES);
        match self.plan(job, group, task, &mut checked) {
            Ok((request, account, plan)) => {
                self.judge(&written, &request, account, &plan, &mut checked)
            }
            Err(error) => checked.findings.push(Line::error("start", error)),
        }
        checked.at_start = checked.at_start.into_iter().map(safe).collect();
        checked
    }

    /// What the file leaves to a cluster.
    fn at_start(&self, job: &Job, group: &Group, task: &Task) -> Vec<String> {
        let mut open = Vec::new();
        let at = |line: usize, what: String| format!("{}:{line}: {what}", self.file.display());
        for entry in &job.unsupported {
            let concerns = entry.group.as_ref().is_none_or(|name| *name == group.name)
                && entry.task.as_ref().is_none_or(|name| *name == task.name);
            if concerns && entry.effect == Effect::Missing {
                open.push(at(
                    entry.line,
                    format!("what {} gives is a client's", entry.key),
                ));
            }
        }
        for port in group.ports.iter().filter(|port| port.fixed.is_none()) {
            open.push(at(
                port.line,
                format!("the number of port {} is the scheduler's", port.label),
            ));
        }
        if task.user.is_none() && self.given.user.is_none() {
            let (first, last) = DYNAMIC;
            open.push(format!(
                "the dynamic user is Nomad's choice, nomad-{first} to nomad-{last}; shown as nomad-{first}"
            ));
        }
        if task.resources.cores > 0 {
            open.push("which CPUs are reserved for cores is the scheduler's choice".into());
        }
        if self.agent.config.cpu_total_compute.is_none() {
            let mhz = self.compute.total_mhz;
            open.push(format!(
                "the node's CPU power is what the agent finds; shown for {mhz} MHz"
            ));
        }
        if !self.agent.config.plugins.contains_key(&self.label) {
            open.push(
                "what the plugin is configured with, as no plugin block was found; shown for its defaults"
                    .into(),
            );
        }
        open
    }

    fn plan(
        &self,
        job: &Job,
        group: Group,
        mut task: Task,
        checked: &mut Checked,
    ) -> Result<(TaskRequest, Account, Plan), String> {
        self.config.as_ref().map_err(Clone::clone)?;
        let sentence = |error: RunError| error.to_string();
        let of_line = |line: usize, error: &dyn std::fmt::Display| {
            format!("{}:{line}: {error}", self.file.display())
        };
        let of_job = |error: job::JobError| of_line(error.line, &error.message);
        let user = self.given.user.as_deref().or(task.user.as_deref());
        let account = match user {
            Some(name) => users::look_up(name)
                .map_err(|error| of_line(task.line, &format!("task {}: {error}", task.name)))?,
            None => users::dynamic(DYNAMIC.0),
        };
        let volumes = self.volumes(&group, &task, checked).map_err(of_job)?;
        let facts = open_facts(&mut task);
        for name in &facts {
            checked
                .at_start
                .push(format!("${{{name}}} is the node's; shown as <{name}>"));
        }
        let network = group.own_network.clone();
        let config_lines = task.config.clone();
        let (line, mounts) = (task.line, task.volume_mounts.clone());
        let ports = group.ports.clone();
        let name = task.name.clone();
        let job_task = JobTask::new(self.file, (job.clone(), group, task), self.given, volumes)
            .map_err(sentence)?;
        let (allocs, mounts_dir) = self.agent.config.alloc_dirs();
        let alloc_dir = allocs.join(ALLOC_ID);
        let dir = mounts_dir.join(format!("{ALLOC_ID}-{name}"));
        let paths = TaskPaths {
            local: dir.join("local"),
            alloc: dir.join("alloc"),
            secrets: dir.join("secrets"),
            stdout: alloc_dir.join(format!("alloc/logs/.{name}.stdout.fifo")),
            stderr: alloc_dir.join(format!("alloc/logs/.{name}.stderr.fifo")),
            root: dir.clone(),
        };
        let mut node = node::node(job, &ports, node::some_port).map_err(of_job)?;
        for name in facts {
            let shown = format!("<{name}>");
            node.facts.entry(name).or_insert(shown);
        }
        let placed = job_task.placed(ALLOC_ID, &paths, &node);
        let templates = template::environment(&placed).map_err(of_job)?;
        let place = (&account, alloc_dir.as_path());
        let (mut request, ending) = job_task
            .fill_in(self.given, &placed, place, &self.inherited, &templates)
            .map_err(of_job)?;
        if ending.logs == Logs::Collected {
            (request.stdout_path, request.stderr_path) = (paths.stdout, paths.stderr);
        }
        // Its second half is random.
        request.id = crate::task::types::TaskId::new(format!("{ALLOC_ID}/{name}/00000000"));
        request.network_namespace = network.map(|mode| format!("<{mode} network>").into());
        let process = self
            .agent
            .running
            .first()
            .map(|agent| agent.pid.to_string());
        let unit = process.and_then(|pid| host::agent_unit(&pid));
        let plan = self.tasks.foresee(&request, account.clone(), &dir, unit);
        let plan = plan.map_err(|error| {
            let sentence = error.to_string();
            let of_mount = mounts.iter().find(|mount| {
                sentence.starts_with("volume_mount") && sentence.contains(&mount.destination)
            });
            let named = options::line_of(&config_lines, &sentence)
                .or_else(|| unveil_line(&config_lines, &sentence))
                .or(of_mount.map(|mount| mount.line));
            of_line(named.unwrap_or(line), &sentence)
        })?;
        Ok((request, account, plan))
    }

    /// The directories of the task's volumes: the caller's, else the agent's own, else only a name.
    fn volumes(
        &self,
        group: &Group,
        task: &Task,
        checked: &mut Checked,
    ) -> Result<Vec<(String, PathBuf)>, job::JobError> {
        let mut volumes = Vec::new();
        for mount in &task.volume_mounts {
            let volume = group.volumes.iter().find(|it| it.name == mount.volume);
            let volume = volume.ok_or_else(|| {
                let message = format!(
                    "volume_mount: group {} has no volume `{}`",
                    group.name, mount.volume
                );
                job::JobError::new(mount.line, message)
            })?;
            let of_agent = self.agent.config.host_volumes.get(&volume.source);
            let given = last(&self.given.of_job.volume, &mount.volume).map(|(_, path)| path);
            let path = match given.or(of_agent.filter(|_| volume.kind == "host")) {
                Some(path) if path.is_dir() => path.clone(),
                Some(path) => {
                    let message = format!(
                        "volume_mount: {}, the directory of volume `{}`, is no directory of this host; make it",
                        path.display(),
                        mount.volume
                    );
                    return Err(job::JobError::new(mount.line, message));
                }
                None => {
                    checked.at_start.push(format!(
                        "{}:{}: the directory of volume {} is a client's; name it with --volume {}=/PATH",
                        self.file.display(),
                        mount.line,
                        mount.volume,
                        mount.volume
                    ));
                    format!("<volume {}>", mount.volume).into()
                }
            };
            volumes.push((mount.volume.clone(), path));
        }
        Ok(volumes)
    }

    /// What this host says of the plan.
    fn judge(
        &self,
        written: &Task,
        request: &TaskRequest,
        account: Account,
        plan: &Plan,
        checked: &mut Checked,
    ) {
        let order = &plan.order;
        for finding in findings::of_plan(plan) {
            let of_job = written
                .config
                .iter()
                .filter(|_| finding.source == Source::Task);
            let mut named = of_job.filter(|(name, _)| name == finding.key);
            let at = named.next().map(|(_, setting)| setting.line);
            let sentence = match at {
                Some(line) => format!("{}:{line}: {}", self.file.display(), finding.sentence),
                None => finding.sentence,
            };
            checked.findings.push(match finding.is_error {
                true => Line::error(finding.key, sentence),
                false => Line::warning(finding.key, sentence),
            });
        }
        checked.at_start.extend(work_dir::at_start(order));
        let command = findings::command(order);
        match &command {
            findings::Command::Found(_) => {}
            findings::Command::Own => checked.at_start.push(format!(
                "whether command {:?} is there, as it is in a directory of the task's own",
                order.command
            )),
            findings::Command::Wrong(sentence) => {
                let line = written.config.iter().find(|(name, _)| name == "command");
                let line = line.map_or(written.line, |(_, setting)| setting.line);
                let sentence = format!("{}:{line}: {sentence}", self.file.display());
                checked.findings.push(Line::error("command", sentence));
            }
        }
        let mut view = View::new(plan, request, account, &command);
        view.keep_names(written);
        checked.plan = Some(view);
    }
}

/// The line of `unveil` or `work_dir`, which rules come from.
fn unveil_line(settings: &[(String, job::Setting)], sentence: &str) -> Option<usize> {
    let find = |key: &str| settings.iter().find(|(name, _)| name == key);
    let found = find("unveil").or_else(|| find("work_dir"));
    found
        .filter(|_| sentence.contains("unveil paths"))
        .map(|(_, setting)| setting.line)
}

/// Names of the node's that the task's `config` has in it, and that a client will know.
fn open_facts(task: &mut Task) -> Vec<String> {
    fn names(value: &Value, all: &mut Vec<String>) {
        match value {
            Value::String(text) => {
                let starts = text.match_indices("${").map(|(at, _)| &text[at + 2..]);
                let named = starts.filter_map(|rest| rest.split_once('}').map(|(name, _)| name));
                let ours = named.filter(|name| {
                    ["attr.", "meta.", "node."]
                        .iter()
                        .any(|prefix| name.starts_with(prefix))
                });
                all.extend(ours.map(str::to_owned));
            }
            Value::Array(items) => items.iter().for_each(|item| names(item, all)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    for (_, setting) in &task.config {
        names(&setting.value, &mut all);
    }
    all.sort();
    all.dedup();
    all
}
