//! The agent: three launches of the plugin at its start, one connection, the tasks that run, and the ways an agent or its
//! plugin comes to an end and back.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::Code;

use super::allocation::{self, Allocation};
use super::cgroup::Cgroups;
use super::hclog::Line;
use super::launch::info;
use super::process::{Log, Process};
use super::proto::driver::{FingerprintResponse, ShutdownRequest, TaskConfig};
use super::task::Task;
use super::{Connection, Profile, RpcError, Version, Violations};

const DRIVER_SHUTDOWN_WAIT: Duration = Duration::from_secs(2);

/// How an agent is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// What stands inside `plugin "nomad-driver-exec2" { config { … } }`.
    pub plugin: String,
    /// Sent in its place, past the schema's check.
    pub plugin_values: Option<Vec<(String, hcl::Value)>>,
    pub block: PluginBlock,
    /// Arguments of the plugin block.
    pub args: Vec<String>,
    /// Added to the agent's own environment, which plugin and tasks inherit.
    pub env: Vec<(String, String)>,
    pub profile: Profile,
    pub version: Version,
    /// `telemetry { publish_allocation_metrics }`.
    pub metrics: Metrics,
    /// Below this the agent makes its data directory; never /tmp, which a task sees as its own.
    pub base: PathBuf,
    /// Speed of each core.
    pub core_mhz: u64,
    /// `client.reserved.cores`: not for tasks.
    pub reserved_cores: Vec<u32>,
    /// `host_volume` blocks of the client: name and path.
    pub host_volumes: Vec<(String, PathBuf)>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            plugin: String::new(),
            plugin_values: None,
            block: PluginBlock::Written,
            args: Vec::new(),
            env: Vec::new(),
            profile: Profile::Nomad,
            version: Version::V2_0,
            metrics: Metrics::Published,
            base: "/opt".into(),
            core_mhz: 1000,
            reserved_cores: Vec::new(),
            host_volumes: Vec::new(),
        }
    }
}

/// Whether the agent's configuration names the plugin at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PluginBlock {
    Written,
    Absent,
}

/// Whether the agent publishes what its allocations use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metrics {
    Published,
    Unpublished,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent(pub(super) Arc<Shared>);

/// What tasks and allocations know of their agent.
#[derive(Debug)]
pub(super) struct Shared {
    pub binary: PathBuf,
    pub config: Config,
    pub data: TempDir,
    pub violations: Violations,
    pub cgroups: Cgroups,
    pub log: Log,
    /// The operator's configuration, encoded by the schema that the first instance told.
    pub plugin_bytes: Mutex<Vec<u8>>,
    pub plugin: tokio::sync::Mutex<Option<Process>>,
    pub connection: RwLock<Option<Connection>>,
    pub tasks: Mutex<Vec<Task>>,
    pub allocations: Mutex<Vec<Weak<allocation::Inner>>>,
}

/// An agent that died and left its plugin behind.
#[derive(Debug)]
pub struct Crashed(Arc<Shared>);

impl Agent {
    /// Starts an agent, which starts the plugin three times and keeps the third.
    pub async fn start(binary: impl AsRef<Path>, config: Config) -> Result<Self> {
        ensure!(
            config.block == PluginBlock::Written || config.version.launches_unconfigured_plugins(),
            "plugin not referenced in the agent configuration file, loading skipped"
        );
        let data = tempfile::Builder::new()
            .prefix("nomad-")
            .tempdir_in(&config.base)?;
        // Tasks pass through it on their way to alloc_mounts.
        std::fs::set_permissions(
            data.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        let cgroups = Cgroups::new(&config.reserved_cores);
        let shared = Arc::new(Shared {
            // By the name in plugin_dir, as Nomad: a link leads elsewhere after an upgrade.
            binary: std::path::absolute(binary)?,
            config,
            data,
            violations: Violations::default(),
            cgroups,
            log: Log::default(),
            plugin_bytes: Mutex::default(),
            plugin: tokio::sync::Mutex::default(),
            connection: RwLock::default(),
            tasks: Mutex::default(),
            allocations: Mutex::default(),
        });
        shared
            .load()
            .await
            .context("failed to create plugin loader")?;
        shared.launch().await?;
        Ok(Agent(shared))
    }

    /// Runs a job of one group with one instance.
    pub async fn run(&self, job: &str) -> Result<Allocation> {
        self.run_with(job, |_| {}).await
    }

    /// The same, with a last word on each task's request before it is sent.
    pub async fn run_with(
        &self,
        job: &str,
        change: impl Fn(&mut TaskConfig),
    ) -> Result<Allocation> {
        Allocation::run(&self.0, job, &change).await
    }

    /// The connection, for calls that Nomad does not make by itself.
    pub fn connection(&self) -> Result<Connection> {
        self.0.connection()
    }

    pub fn fingerprint(&self) -> Option<FingerprintResponse> {
        self.0.connection().ok()?.fingerprint()
    }

    /// The plugin's log so far, of all its instances.
    pub fn log(&self) -> Vec<Line> {
        self.0.log.lines()
    }

    pub async fn plugin_pid(&self) -> Option<u32> {
        self.0.plugin.lock().await.as_ref().map(|plugin| plugin.pid)
    }

    pub fn violations(&self) -> &Violations {
        &self.0.violations
    }

    /// Where allocations live: `<data>/alloc` and `<data>/alloc_mounts`.
    pub fn data_dir(&self) -> &Path {
        self.0.data.path()
    }

    /// `systemctl restart nomad`: the plugin ends, tasks stay, a new instance recovers them from their stored handles.
    /// Returns the tasks that could not be recovered, with the driver's reason.
    pub async fn restart(&self) -> Result<Vec<(Task, RpcError)>> {
        self.0.restore()?;
        self.0.end_plugin().await?;
        self.0.load().await?;
        self.0.launch().await?;
        self.0.recover(Handles::Stored).await
    }

    /// SIGKILL of the agent: the plugin stays, with nobody listening.
    pub async fn crash(self) -> Crashed {
        if let Some(connection) = self
            .0
            .connection
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            connection.drop_streams();
        }
        if let Some(plugin) = self.0.plugin.lock().await.as_mut() {
            plugin.abandon_pipes();
        }
        Crashed(self.0)
    }

    /// SIGKILL of the plugin: the agent starts a new instance, which gets the handles that the agent has in memory.
    pub async fn kill_plugin(&self) -> Result<Vec<(Task, RpcError)>> {
        self.0.kill_plugin().await?;
        self.0.launch().await?;
        self.0.recover(Handles::InMemory).await
    }

    /// SIGABRT of the plugin. Its streams end with it, which is then no news; `kill_plugin` starts a new instance.
    pub async fn abort_plugin(&self) -> Result<u32> {
        let plugin = self.plugin_pid().await.context("there is no plugin")?;
        self.0.connection()?.close();
        kill(Pid::from_raw(plugin.cast_signed()), Signal::SIGABRT)?;
        Ok(plugin)
    }

    /// SIGKILL of the plugin while a call is under way. Whoever made the call finds out, and starts a new instance.
    pub async fn kill_plugin_in_call(&self) -> Result<()> {
        self.0.connection()?.close();
        match self.0.plugin.lock().await.as_mut() {
            Some(process) => process.kill_in_place().await,
            None => bail!("there is no plugin to kill"),
        }
    }

    /// Stops what still runs, ends the plugin, and fails if anything broke Nomad's contract on the way.
    pub async fn finish(self) -> Result<()> {
        let allocations = std::mem::take(
            &mut *self
                .0
                .allocations
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for inner in allocations.iter().filter_map(Weak::upgrade) {
            Allocation(inner).stop().await?;
        }
        self.0.end_plugin().await?;
        self.0.violations.check()
    }
}

impl Crashed {
    /// A new agent on the same data: it looks at the binary, then reattaches to the old plugin, which keeps its configuration.
    /// Without one it starts a new instance.
    pub async fn reattach(self) -> Result<(Agent, Vec<(Task, RpcError)>)> {
        let shared = self.0;
        shared.restore()?;
        shared.load().await?;
        let socket = shared
            .plugin
            .lock()
            .await
            .as_ref()
            .map(|plugin| plugin.socket.clone());
        let alive = match &socket {
            // go-plugin tries the socket with a connection on which it says nothing.
            Some(socket) => UnixStream::connect(socket).await.is_ok(),
            None => false,
        };
        match socket.filter(|_| alive) {
            Some(socket) => {
                let connection = Connection::open(&socket, shared.violations.clone()).await?;
                info(&connection, &shared.violations).await?;
                shared.adopt(connection).await?;
            }
            None => shared.launch().await?,
        }
        let lost = shared.recover(Handles::Stored).await?;
        Ok((Agent(shared), lost))
    }

    /// The plugin dies as well.
    pub async fn kill_plugin(&self) -> Result<()> {
        self.0.kill_plugin().await
    }
}

/// Which handles a recovery gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handles {
    /// From the agent's database, which does not keep the driver's configuration.
    Stored,
    InMemory,
}

impl Shared {
    pub fn connection(&self) -> Result<Connection> {
        let connection = self
            .connection
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        connection.clone().context("the agent has no plugin")
    }

    /// What a new agent makes of the tasks in its database, before it asks the plugin.
    fn restore(&self) -> Result<()> {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        for task in tasks.iter().filter(|task| is_dynamic(&task.user())) {
            ensure!(
                self.config.version.restores_dynamic_users(),
                "this version of the agent panics on restoring {}, which has a dynamic user",
                task.name()
            );
            task.forget_user();
        }
        Ok(())
    }

    /// The graceful end.
    async fn end_plugin(&self) -> Result<()> {
        let connection = self
            .connection
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let process = self.plugin.lock().await.take();
        let (Some(connection), Some(process)) = (connection, process) else {
            return Ok(());
        };
        connection.close();
        if self.config.version.announces_itself() {
            let mut driver = connection.driver();
            match timeout(DRIVER_SHUTDOWN_WAIT, driver.shutdown(ShutdownRequest {})).await {
                Err(_) => self.violations.note("Driver/Shutdown took longer than 2 s"),
                Ok(Err(status)) if status.code() != Code::Unimplemented => {
                    self.violations.note(format!("Driver/Shutdown: {status}"));
                }
                Ok(_) => {}
            }
        }
        process.shut_down(&connection).await?;
        Ok(())
    }

    async fn kill_plugin(&self) -> Result<()> {
        if let Some(connection) = self
            .connection
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            connection.close();
        }
        match self.plugin.lock().await.take() {
            Some(process) => process.kill().await,
            None => bail!("there is no plugin to kill"),
        }
    }

    /// Whether the plugin died by itself; a call that failed is then tried again on a new one.
    pub async fn plugin_has_died(&self) -> bool {
        match self.plugin.lock().await.as_mut() {
            Some(process) => process.has_exited().await,
            None => false,
        }
    }

    /// Offers the handle of every task whose allocation is still there. A running one that fails is destroyed by its old id;
    /// of a finished one, which a restarted agent offers as well, the answer counts for nothing.
    async fn recover(&self, handles: Handles) -> Result<Vec<(Task, RpcError)>> {
        let tasks = self
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let connection = self.connection()?;
        let mut lost = Vec::new();
        for task in tasks {
            match (task.exit(), handles) {
                (None, _) => {
                    let refused = task.recover(&connection, handles).await?.err();
                    lost.extend(refused.map(|error| (task, error)));
                }
                (Some(_), Handles::Stored) => task.offer_finished(&connection).await?,
                (Some(_), Handles::InMemory) => {}
            }
        }
        Ok(lost)
    }
}

fn is_dynamic(user: &str) -> bool {
    user.strip_prefix("nomad-")
        .is_some_and(|id| id.parse::<u32>().is_ok())
}
