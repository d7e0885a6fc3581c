//! A real `nomad` agent with our plugin, driven and read from outside through its API. Root only; meant for a guest.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::sleep;

mod consul;
mod http;
mod jobs;
mod setup;

pub use consul::{Consul, Update};
pub use jobs::Event;

use http::Api;
use jobs::text;
use setup::PLUGIN;

/// A node is ready 14 to 35 s after its start in an emulated guest.
const READY_WAIT: Duration = Duration::from_secs(180);
const END_WAIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);

/// How a real agent is set up.
#[derive(Debug, Clone)]
pub struct RealConfig {
    /// The `nomad` executable.
    pub nomad: PathBuf,
    /// The plugin's executable, copied into a plugin_dir of its own.
    pub plugin: PathBuf,
    /// Nomad's data_dir, with a plugin in the default plugin_dir, in place of directories of this agent's own with a copy of `plugin`.
    pub data_dir: Option<PathBuf>,
    /// The whole plugin block, as somebody wrote it, in place of the one with the next two.
    pub plugin_block: Option<String>,
    /// What stands in the plugin block's `config`.
    pub plugin_config: String,
    /// The plugin block's `args`.
    pub plugin_args: Vec<String>,
    pub start: Start,
    pub base: PathBuf,
    /// Ports of HTTP, RPC and gossip: this one and the next two.
    pub port: u16,
    /// MHz of the whole node, where its processors do not tell.
    pub total_compute_mhz: Option<u64>,
    /// Further lines of the `client` block.
    pub client: String,
    /// Where Consul's agent is, which most have no need of.
    pub consul: Option<SocketAddr>,
    /// Variables of the agent's environment, which the plugin inherits.
    pub env: Vec<(String, String)>,
}

impl RealConfig {
    pub fn new(nomad: impl Into<PathBuf>, plugin: impl Into<PathBuf>) -> Self {
        RealConfig {
            nomad: nomad.into(),
            plugin: plugin.into(),
            data_dir: None,
            plugin_block: None,
            plugin_config: String::new(),
            plugin_args: Vec::new(),
            start: Start::Service("nomad".into()),
            base: "/opt".into(),
            port: 4646,
            total_compute_mhz: None,
            client: String::new(),
            consul: None,
            env: Vec::new(),
        }
    }
}

/// Who starts the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// systemd, as a service of this name with the settings of Nomad's packages.
    Service(String),
    /// We do.
    Child,
}

/// Goes with the agent.
#[derive(Debug)]
struct DataDir(PathBuf);

impl DataDir {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// How an agent ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Graceful,
    Crash,
}

/// A running real agent.
#[derive(Debug)]
pub struct RealAgent {
    config: RealConfig,
    data: DataDir,
    child: Option<Child>,
    api: Api,
    node: String,
    /// Bytes of the log that are of earlier starts.
    log_start: usize,
}

impl RealAgent {
    /// Starts the agent and waits until its node takes jobs for our driver.
    pub async fn start(config: RealConfig) -> Result<Self> {
        let mut agent = RealAgent::launch(config).await?;
        if let Err(error) = agent.ready("Healthy").await {
            let log = std::fs::read_to_string(agent.log_file()).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            agent.end(End::Crash).await?;
            return Err(error.context(format!(
                "the agent's last lines, newest first:\n{}",
                tail.join("\n")
            )));
        }
        Ok(agent)
    }

    /// Starts the agent and does not wait.
    pub async fn launch(config: RealConfig) -> Result<Self> {
        let data = tempfile::Builder::new()
            .prefix("nomad-")
            .tempdir_in(&config.base)?;
        let data = DataDir(data.keep());
        std::fs::set_permissions(
            data.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        let plugins = data.path().join("plugins");
        std::fs::create_dir(&plugins)?;
        if config.data_dir.is_none() {
            std::fs::copy(&config.plugin, plugins.join(PLUGIN))
                .with_context(|| config.plugin.display().to_string())?;
        }
        let text = setup::agent_hcl(&config, data.path())?;
        std::fs::write(data.path().join("agent.hcl"), text)?;
        RealAgent::spawned(config, data).await
    }

    async fn spawned(config: RealConfig, data: DataDir) -> Result<Self> {
        let api = Api { port: config.port };
        let mut agent = RealAgent {
            config,
            data,
            child: None,
            api,
            node: String::new(),
            log_start: 0,
        };
        agent.spawn().await?;
        Ok(agent)
    }

    async fn spawn(&mut self) -> Result<()> {
        let log = self.log_file();
        self.log_start = std::fs::read(&log).map_or(0, |log| log.len());
        let hcl = self.data.path().join("agent.hcl");
        match &self.config.start {
            Start::Child => {
                let log = std::fs::OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(log)?;
                let mut command = Command::new(&self.config.nomad);
                command
                    .args(["agent", "-config"])
                    .arg(hcl)
                    .stdin(Stdio::null())
                    .kill_on_drop(true);
                let env = self.config.env.iter().map(|(name, value)| (name, value));
                command.envs(env).stdout(log.try_clone()?).stderr(log);
                self.child = Some(command.spawn().context("start nomad")?);
            }
            Start::Service(unit) => {
                let path = unit_file(unit);
                let nomad = self.config.nomad.canonicalize()?;
                std::fs::write(path, setup::unit(&nomad, &hcl, &log, &self.config.env))?;
                run(Command::new("systemctl").arg("daemon-reload")).await?;
                run(Command::new("systemctl").args(["start", unit])).await?;
            }
        }
        Ok(())
    }

    /// Waits until the node is ready and our driver's health description starts with these words.
    pub async fn ready(&mut self, description: &str) -> Result<()> {
        let started = Instant::now();
        loop {
            let seen = self.health().await.unwrap_or_default();
            if self.has_registered() && seen.0 == "ready" && seen.1.starts_with(description) {
                self.node = seen.2;
                return Ok(());
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("nomad ended: {status}");
            }
            ensure!(
                started.elapsed() < READY_WAIT,
                "after {READY_WAIT:?} the node is {seen:?}"
            );
            sleep(POLL).await;
        }
    }

    /// Whether this start of the agent has told the server about its node: what the API shows before is of the last one.
    fn has_registered(&self) -> bool {
        let log = std::fs::read(self.log_file()).unwrap_or_default();
        let since = log.get(self.log_start..).unwrap_or_default();
        String::from_utf8_lossy(since).contains("node registration complete")
    }

    /// The node's status, our driver's health description, and the node's id.
    async fn health(&self) -> Result<(String, String, String)> {
        let nodes = self.api.get("/v1/nodes").await?;
        let id = text(&nodes[0]["ID"]);
        ensure!(!id.is_empty(), "no node yet");
        let node = self.api.get(&format!("/v1/node/{id}")).await?;
        let driver = &node["Drivers"]["exec2"];
        Ok((
            text(&node["Status"]),
            text(&driver["HealthDescription"]),
            id,
        ))
    }

    /// `systemctl restart nomad`: tasks stay.
    pub async fn restart(&mut self) -> Result<()> {
        self.restart_as("Healthy").await
    }

    /// The same, until our driver's health description starts with these words; a node without the driver has none.
    pub async fn restart_as(&mut self, description: &str) -> Result<()> {
        self.end(End::Graceful).await?;
        self.spawn().await?;
        self.ready(description).await
    }

    /// SIGKILL of the agent, and another on the same data.
    pub async fn crash(&mut self) -> Result<()> {
        self.end(End::Crash).await?;
        self.spawn().await?;
        self.ready("Healthy").await
    }

    /// Leaves the agent running, for a reboot to end. Its data directory is the argument of [`RealAgent::take_up`].
    pub fn leave(self) -> PathBuf {
        let dir = self.data.path().to_owned();
        std::mem::forget(self);
        dir
    }

    /// An agent on the data that one before a reboot left, set up in the same way.
    pub async fn take_up(config: RealConfig, data: PathBuf) -> Result<Self> {
        let mut agent = RealAgent::spawned(config, DataDir(data)).await?;
        agent.ready("Healthy").await?;
        Ok(agent)
    }

    /// Ends the agent, which leaves running tasks alone.
    pub async fn finish(mut self) -> Result<()> {
        self.end(End::Graceful).await?;
        if let Start::Service(unit) = &self.config.start {
            std::fs::remove_file(unit_file(unit))?;
            run(Command::new("systemctl").arg("daemon-reload")).await?;
            // An interrupted agent exits with 1, which systemd remembers.
            let _ = run(Command::new("systemctl").args(["reset-failed", unit])).await;
        }
        unmount_below(self.config.data_dir.as_deref().unwrap_or(self.data.path()))
    }

    async fn end(&mut self, how: End) -> Result<()> {
        match (&mut self.child, &self.config.start) {
            (Some(child), _) => {
                let signal = match how {
                    End::Graceful => Signal::SIGINT,
                    End::Crash => Signal::SIGKILL,
                };
                if let Some(pid) = child.id() {
                    kill(Pid::from_raw(i32::try_from(pid)?), signal)?;
                }
                child.wait().await?;
                self.child = None;
            }
            (None, Start::Service(unit)) => {
                let words: &[&str] = match how {
                    End::Graceful => &["stop"],
                    End::Crash => &["kill", "--kill-whom=main", "--signal=SIGKILL"],
                };
                run(Command::new("systemctl").args(words).arg(unit)).await?;
                let started = Instant::now();
                while run(Command::new("systemctl").args(["is-active", unit]))
                    .await
                    .is_ok()
                {
                    ensure!(started.elapsed() < END_WAIT, "{unit} does not end");
                    sleep(POLL).await;
                }
            }
            (None, Start::Child) => {}
        }
        Ok(())
    }

    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    fn log_file(&self) -> PathBuf {
        self.data.path().join("agent.log")
    }
}

/// The agent of a case that failed: to systemd the next one, of the same name, would be running already.
impl Drop for RealAgent {
    fn drop(&mut self) {
        let Start::Service(unit) = &self.config.start else {
            return;
        };
        let file = unit_file(unit);
        if !file.exists() {
            return;
        }
        for words in [["kill", "--signal=SIGKILL"].as_slice(), &["stop"]] {
            let _ = std::process::Command::new("systemctl")
                .args(words)
                .arg(unit)
                .status();
        }
        let _ = std::fs::remove_file(file);
    }
}

fn unit_file(unit: &str) -> PathBuf {
    Path::new("/run/systemd/system").join(format!("{unit}.service"))
}

async fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().await?;
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let both = String::from_utf8_lossy(&both).trim().to_owned();
    ensure!(
        output.status.success(),
        "{:?}: {}: {both}",
        command.as_std(),
        output.status
    );
    Ok(both)
}

/// Nomad unmounts when it collects an allocation; what it had no time for would keep the directory busy.
fn unmount_below(tree: &Path) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points
        .filter(|point| Path::new(point).starts_with(tree))
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
    {
        let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
    }
    Ok(())
}
