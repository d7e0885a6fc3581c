//! An allocation: the job's group placed on this node, its directories, users, cores and cgroups, and its tasks' requests.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nomad_driver_exec2::job::alloc_dir::{AllocDir, Owner, Roots};
use nomad_driver_exec2::job::environment::{Node, Placed, inherited};
use nomad_driver_exec2::job::request::{Request, new_alloc_id};
use nomad_driver_exec2::job::{self, Group, Job, Logs, template};

use super::agent::Shared;
use super::network::{Namespace, Network};
use super::proto::driver::driver_capabilities::{FsIsolation, MountConfigs};
use super::proto::driver::{
    AllocatedCpuResources, AllocatedMemoryResources, AllocatedTaskResources, CapabilitiesRequest,
    LinuxResources, Mount, Resources, TaskConfig, TaskConfigSchemaRequest,
};
use super::proto::hclspec::Spec;
use super::task::{Parts, Task};
use super::{encode, schema};

/// A running group of tasks.
#[derive(Debug)]
pub struct Allocation(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    id: String,
    agent: std::sync::Weak<Shared>,
    tasks: Vec<Task>,
    cgroups: Vec<(String, PathBuf)>,
    namespace: Mutex<Option<Namespace>>,
    dir: Mutex<Option<AllocDir>>,
    /// The log files by name, kept when the directory goes.
    logs: Mutex<BTreeMap<String, String>>,
}

impl Allocation {
    pub(super) async fn run(
        agent: &Arc<Shared>,
        text: &str,
        change: &impl Fn(&mut TaskConfig),
    ) -> Result<Self> {
        let job = job::parse(text, &[])?;
        let bridged = |entry: &job::Unsupported| entry.message.contains("network mode `bridge`");
        let missing =
            |entry: &&job::Unsupported| entry.effect == job::Effect::Missing && !bridged(entry);
        if let Some(entry) = job.unsupported.iter().find(missing) {
            bail!("{entry}");
        }
        let [group] = job.groups.as_slice() else {
            bail!("job {} has more than one group", job.id);
        };
        let mut group = group.clone();
        for task in &group.tasks {
            ensure!(
                hook(task) != Some("poststop"),
                "this client runs no poststop task"
            );
        }
        group.tasks.sort_by_key(|task| match hook(task) {
            Some("prestart") => 0,
            None => 1,
            _ => 2,
        });
        let network = match job.unsupported.iter().any(bridged) {
            true => Network::Own,
            false => Network::Host,
        };
        let allocation = Allocation::place(agent, &job, &group, network, change).await?;
        let known = Arc::downgrade(&allocation.0);
        agent
            .allocations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(known);
        for (task, of_job) in allocation.0.tasks.iter().zip(&group.tasks) {
            if let Err(error) = start(task, of_job).await {
                // A task that never started gets no DestroyTask.
                allocation.stop_started().await?;
                allocation.tear_down()?;
                return Err(error);
            }
            agent
                .tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(task.clone());
        }
        Ok(allocation)
    }

    /// Everything before the first call that starts a task.
    async fn place(
        agent: &Arc<Shared>,
        job: &Job,
        group: &Group,
        network: Network,
        change: &impl Fn(&mut TaskConfig),
    ) -> Result<Self> {
        let spec = task_schema(agent, group).await?;
        let roots = Roots {
            allocs: agent.data.path().join("data/alloc"),
            mounts: agent.data.path().join("alloc_mounts"),
        };
        let id = new_alloc_id();
        let mut dir = AllocDir::create(&roots, &id)?;
        let namespace = match network {
            Network::Host => None,
            Network::Own => Some(Namespace::new(&id)?),
        };
        let node = Node {
            ports: group.ports.iter().zip(FIRST_PORT..).map(port).collect(),
            ..Node::default()
        };
        let node_mhz = (agent.config.core_mhz * agent.cgroups.online().len() as u64) as f64;
        let (mut tasks, mut cgroups) = (Vec::new(), Vec::new());
        let host: Vec<_> = std::env::vars()
            .chain(agent.config.env.iter().cloned())
            .collect();
        for task in &group.tasks {
            let user = task.user.clone().unwrap_or_else(dynamic_user);
            let mut paths = dir.task(&task.name, owner(&user)?)?;
            if task.logs == Logs::Collected {
                dir.fifos(&task.name, &mut paths)?;
            }
            let key = format!("{id}/{}", task.name);
            let cpuset = agent.cgroups.reserve(&key, task.resources.cores)?;
            let cpu_mhz = match task.resources.cores {
                0 => task.resources.cpu_mhz,
                cores => agent.config.core_mhz * u64::from(cores),
            };
            let cgroup = agent.cgroups.make(&id, &task.name, &cpuset);
            cgroups.push((key, cgroup.clone()));
            let placed = Placed {
                job,
                group,
                task,
                alloc_id: &id,
                alloc_index: 0,
                cpu_mhz,
                cpuset: &cpuset,
                paths: &paths,
                node: &node,
            };
            let templates = template::write(&placed)?;
            let request = Request::new(
                &placed,
                dir.path().to_owned(),
                user,
                &inherited(host.clone()),
                &templates,
            )?;
            let given: Vec<_> = request
                .config
                .iter()
                .map(|(key, setting)| (key.clone(), setting.value.clone()))
                .collect();
            let values = schema::decode(&spec, &given)
                .with_context(|| format!("Failed Validation: task {}", task.name))?;
            let driver_config = encode(&values, agent.config.profile);
            let mut config = {
                let cgroup = cgroup.to_string_lossy().into_owned();
                task_config(&request, driver_config, cgroup, cpu_mhz as f64 / node_mhz)
            };
            config.mounts = mounts(&request.mounts, group, &agent.config.host_volumes)?;
            config.network_isolation_spec = namespace.as_ref().map(Namespace::spec);
            change(&mut config);
            agent.config.version.word(&mut config)?;
            tasks.push(Task::new(
                agent,
                Parts {
                    paths,
                    logs: dir.logs(),
                    kill_signal: request.kill_signal,
                    kill_timeout: request.kill_timeout,
                    config,
                },
            ));
        }
        Ok(Allocation(Arc::new(Inner {
            id,
            agent: Arc::downgrade(agent),
            tasks,
            cgroups,
            namespace: Mutex::new(namespace),
            dir: Mutex::new(Some(dir)),
            logs: Mutex::default(),
        })))
    }

    pub fn id(&self) -> &str {
        &self.0.id
    }

    pub fn task(&self, name: &str) -> Result<&Task> {
        let task = self.0.tasks.iter().find(|task| task.name() == name);
        task.with_context(|| format!("there is no task {name:?}"))
    }

    /// The only task.
    pub fn only_task(&self) -> Result<&Task> {
        match self.0.tasks.as_slice() {
            [task] => Ok(task),
            tasks => bail!("{} tasks, not one", tasks.len()),
        }
    }

    pub fn stdout(&self, task: &str) -> Result<String> {
        self.logs(task, "stdout")
    }

    pub fn stderr(&self, task: &str) -> Result<String> {
        self.logs(task, "stderr")
    }

    /// A task's log so far; still there after [`Allocation::stop`].
    pub fn logs(&self, task: &str, stream: &str) -> Result<String> {
        let name = format!("{task}.{stream}.0");
        let dir = self.0.dir.lock().unwrap_or_else(PoisonError::into_inner);
        match dir.as_ref() {
            Some(dir) => read_log(&dir.logs().join(&name)),
            None => {
                let kept = self.0.logs.lock().unwrap_or_else(PoisonError::into_inner);
                kept.get(&name)
                    .cloned()
                    .with_context(|| format!("no log {name}"))
            }
        }
    }

    /// Stops every task, then takes away what the agent made: cgroups, mounts, directories. Fails if they are still in use.
    pub async fn stop(&self) -> Result<()> {
        self.stop_started().await?;
        self.tear_down()
    }

    async fn stop_started(&self) -> Result<()> {
        for task in self.0.tasks.iter().filter(|task| task.handle().is_some()) {
            task.stop().await?;
        }
        Ok(())
    }

    fn tear_down(&self) -> Result<()> {
        if let Some(agent) = self.0.agent.upgrade() {
            let mut known = agent.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|task| !self.0.tasks.iter().any(|ours| ours.is(task)));
            for (key, path) in &self.0.cgroups {
                agent.cgroups.remove(key, path);
            }
        }
        self.0
            .namespace
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(dir) = self
            .0
            .dir
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        else {
            return Ok(());
        };
        let mut kept = self.0.logs.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in fs::read_dir(dir.logs())? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                kept.insert(
                    entry.file_name().to_string_lossy().into_owned(),
                    read_log(&entry.path())?,
                );
            }
        }
        Ok(dir.remove()?)
    }
}

fn hook(task: &job::Task) -> Option<&str> {
    Some(task.lifecycle.as_ref()?.hook.as_str())
}

/// Nomad picks ports from here on where a job leaves the choice.
const FIRST_PORT: u16 = 20_000;

fn port((port, free): (&job::Port, u16)) -> (String, u16) {
    (port.label.clone(), port.fixed.unwrap_or(free))
}

/// A prestart task that is no sidecar is waited for, and has to succeed.
async fn start(task: &Task, of_job: &job::Task) -> Result<()> {
    task.start_first().await?;
    let lifecycle = of_job.lifecycle.as_ref();
    if lifecycle.is_some_and(|lifecycle| lifecycle.hook == "prestart" && !lifecycle.sidecar) {
        let exit = task.wait().await?;
        ensure!(exit.success(), "prestart task {}: {exit:?}", task.name());
    }
    Ok(())
}

fn mounts(
    wanted: &[job::VolumeMount],
    group: &Group,
    given: &[(String, PathBuf)],
) -> Result<Vec<Mount>> {
    let mount = |mount: &job::VolumeMount| {
        let volume = group.volumes.iter().find(|it| it.name == mount.volume);
        let volume = volume.with_context(|| format!("no volume {:?}", mount.volume))?;
        ensure!(
            volume.kind == "host",
            "volume {:?}: this client has host volumes only, none of type {:?}",
            volume.name,
            volume.kind
        );
        let given = given.iter().find(|(name, _)| *name == volume.source);
        let (_, path) = given.with_context(|| format!("no host volume {:?}", volume.source))?;
        Ok(Mount {
            task_path: mount.destination.clone(),
            host_path: path.to_string_lossy().into_owned(),
            readonly: mount.access == job::Access::ReadOnly,
            propagation_mode: mount.propagation.clone(),
            selinux_label: mount.selinux_label.clone(),
            ..Mount::default()
        })
    };
    wanted.iter().map(mount).collect()
}

fn read_log(path: &std::path::Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Schema and capabilities, which Nomad asks for each new allocation.
async fn task_schema(agent: &Shared, group: &Group) -> Result<Spec> {
    let mut driver = agent.connection()?.driver();
    let answer = driver.task_config_schema(TaskConfigSchemaRequest {}).await;
    let answer = answer.map_err(|status| agent.violations.status("TaskConfigSchema", status))?;
    let spec = answer
        .into_inner()
        .spec
        .context("TaskConfigSchema without a spec")?;
    let answer = driver.capabilities(CapabilitiesRequest {}).await;
    let answer = answer.map_err(|status| agent.violations.status("Capabilities", status))?;
    let capabilities = answer
        .into_inner()
        .capabilities
        .context("Capabilities without capabilities")?;
    ensure!(
        capabilities.fs_isolation() == FsIsolation::Unveil && capabilities.dynamic_workload_users,
        "this client lays out allocations for drivers that unveil and take dynamic users, not for {capabilities:?}"
    );
    let has_mounts = group
        .tasks
        .iter()
        .any(|task| !task.volume_mounts.is_empty());
    ensure!(
        !has_mounts || capabilities.mount_configs() != MountConfigs::NoMounts,
        "task driver \"exec2\" does not support host volumes"
    );
    Ok(spec)
}

/// One that is not taken, of the client's `users` block: 80000 to 89999 by default.
fn dynamic_user() -> String {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let taken = TAKEN.fetch_add(1, Ordering::Relaxed);
    let number = std::process::id().wrapping_add(taken) % 10_000;
    format!("nomad-{}", 80_000 + number)
}

fn owner(user: &str) -> Result<Owner> {
    if let Some(id) = user
        .strip_prefix("nomad-")
        .and_then(|id| id.parse::<i32>().ok())
    {
        let id = u32::try_from(id)?;
        return Ok(Owner { uid: id, gid: id });
    }
    let found = nix::unistd::User::from_name(user)?;
    let found = found.with_context(|| format!("Failed to lookup user {user:?}"))?;
    Ok(Owner {
        uid: found.uid.as_raw(),
        gid: found.gid.as_raw(),
    })
}

/// `share` is the task's part of the node's MHz, from 0 to 1.
pub(super) fn task_config(
    request: &Request,
    driver_config: Vec<u8>,
    cgroup: String,
    share: f64,
) -> TaskConfig {
    let cpu_shares = i64::try_from(request.cpu_mhz).unwrap_or(i64::MAX);
    let memory_mb = i64::try_from(request.memory_mib).unwrap_or(i64::MAX);
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    TaskConfig {
        id: request.id.clone(),
        name: request.name.clone(),
        msgpack_driver_config: driver_config,
        env: request.env.clone().into_iter().collect(),
        resources: Some(Resources {
            allocated_resources: Some(AllocatedTaskResources {
                cpu: Some(AllocatedCpuResources { cpu_shares }),
                memory: Some(AllocatedMemoryResources {
                    memory_mb,
                    memory_max_mb: request.memory_max_mib,
                }),
                networks: Vec::new(),
            }),
            linux_resources: Some(LinuxResources {
                cpu_shares,
                memory_limit_bytes: memory_mb.max(request.memory_max_mib) * 1024 * 1024,
                cpuset_cpus: request.cpuset.clone(),
                percent_ticks: share,
                cpuset_cgroup: cgroup,
                ..LinuxResources::default()
            }),
            ports: Vec::new(),
        }),
        user: request.user.clone(),
        alloc_dir: text(&request.alloc_dir),
        stdout_path: text(&request.stdout),
        stderr_path: text(&request.stderr),
        task_group_name: request.group.clone(),
        job_name: request.job_name.clone(),
        alloc_id: request.alloc_id.clone(),
        job_id: request.job_id.clone(),
        namespace: request.namespace.clone(),
        node_name: "harness".into(),
        node_id: "8a1f9c1e-0000-4000-8000-000000000000".into(),
        ..TaskConfig::default()
    }
}
