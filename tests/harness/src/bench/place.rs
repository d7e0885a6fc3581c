//! Where a driver's tasks are started: an allocation's directories, with log pipes whose other end is ours.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use nomad_driver_exec2::job::request::{new_alloc_id, new_task_id};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::STAMP;
use super::kernel::Cgroup;
use super::raw::Who;
use super::subject::PATIENCE;
use crate::nomad::proto::driver::TaskConfig;
use crate::nomad::{Agent, Allocation};

/// The job whose task is started again and again.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub command: &'static str,
    pub args: &'static [&'static str],
    pub cpu_mhz: u64,
    pub memory_mib: u64,
    /// Whoever runs it; a dynamic one if empty, which only one task of a place can have at a time.
    pub user: &'static str,
}

impl Job {
    /// Says when it runs, and waits for a signal. Its limits are out of its way.
    pub const STAMP: Job = Job {
        command: STAMP,
        args: &[],
        cpu_mhz: 3_200,
        memory_mib: 32,
        user: "",
    };
    /// The same many times at once.
    pub const CROWD: Job = Job {
        user: "nobody",
        ..Job::STAMP
    };
    /// Ends at once.
    pub const SHORT: Job = Job {
        args: &["and-exit"],
        ..Job::STAMP
    };

    fn text(&self) -> String {
        format!(
            "job \"bench\" {{\n type = \"batch\"\n group \"g\" {{\n task \"t\" {{\n driver = \"exec2\"\n user = {:?}\n config {{\n command = {:?}\n args = {:?}\n }}\n resources {{\n cpu = {}\n memory = {}\n }}\n }}\n }}\n}}\n",
            self.user, self.command, self.args, self.cpu_mhz, self.memory_mib
        )
    }
}

/// An allocation whose own task has come and gone.
#[derive(Debug)]
pub struct Place {
    who: Who,
    alloc: Allocation,
    config: TaskConfig,
    stdout: pipe::Receiver,
    _stderr: pipe::Receiver,
}

/// A task as the driver is asked for it.
#[derive(Debug)]
pub struct Asked {
    pub config: TaskConfig,
    pub cgroup: Cgroup,
    /// Nomad's own directory for it.
    nomads: Option<PathBuf>,
}

impl Place {
    pub async fn new(who: Who, agent: &Agent, job: Job) -> Result<Place> {
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        task.stop().await?;
        let config = task.handle().and_then(|handle| handle.config);
        let mut config = config.context("a handle has its configuration")?;
        // What another driver has not ended yet holds the first task's, and so does who collects its logs.
        let stdout = new_pipe(&mut config.stdout_path)?;
        let stderr = new_pipe(&mut config.stderr_path)?;
        Ok(Place {
            who,
            stdout,
            _stderr: stderr,
            config,
            alloc,
        })
    }

    /// A task that passes for one of an allocation of its own.
    pub fn task(&self) -> Result<Asked> {
        let alloc_id = new_alloc_id();
        let mut config = TaskConfig {
            id: new_task_id(&alloc_id, &self.config.name),
            alloc_id: alloc_id.clone(),
            ..self.config.clone()
        };
        let linux = config
            .resources
            .as_mut()
            .and_then(|resources| resources.linux_resources.as_mut());
        let linux = linux.context("a task has resources")?;
        let nomads = Path::new(&linux.cpuset_cgroup)
            .with_file_name(format!("{alloc_id}.{}.scope", self.config.name));
        linux.cpuset_cgroup = nomads.to_string_lossy().into_owned();
        // Nomad makes one for each task, where there are the controllers.
        let nomads = std::fs::create_dir(&nomads).is_ok().then_some(nomads);
        let cgroup = match self.who {
            Who::Ours => Cgroup::at(&scope_of(&config.id)?),
            _ => Cgroup::at(nomads.as_deref().unwrap_or(Path::new(""))),
        };
        Ok(Asked {
            config,
            cgroup,
            nomads,
        })
    }

    /// The next moment that a task of this place has told.
    pub async fn moment_nanos(&mut self) -> Result<u64> {
        let mut moment = [0; 8];
        timeout(PATIENCE, self.stdout.read_exact(&mut moment))
            .await
            .with_context(|| format!("{:?}: the command tells no moment", self.who))??;
        Ok(u64::from_le_bytes(moment))
    }

    pub async fn close(self) -> Result<()> {
        self.alloc.stop().await
    }
}

impl Asked {
    /// To be called when it has been destroyed.
    pub fn clear(&self) {
        if let Some(nomads) = &self.nomads {
            let _ = std::fs::remove_dir(nomads);
        }
    }
}

/// Beside Nomad's, and with a name like its. Open for writing too, so that it has no end between two tasks.
fn new_pipe(path: &mut String) -> Result<pipe::Receiver> {
    *path = path.replace(".fifo", ".bench.fifo");
    mkfifo(path.as_str(), Mode::S_IRUSR | Mode::S_IWUSR).with_context(|| path.clone())?;
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(&*path)
        .with_context(|| path.clone())
}

/// By the rule that operators are told: `exec2-<task>-<8 of the alloc's id>-<8 of the start's>.scope`.
fn scope_of(id: &str) -> Result<PathBuf> {
    let mut parts = id.split('/');
    let (Some(alloc), Some(name), Some(start)) = (parts.next(), parts.next(), parts.next()) else {
        anyhow::bail!("{id} is no id of a task")
    };
    let unit = format!("exec2-{name}-{}-{start}.scope", &alloc[..8]);
    Ok(Path::new("exec2.slice/exec2-share.slice").join(unit))
}
