//! A plugin served within the test, with tasks that exist in memory only.

use std::path::PathBuf;
use std::sync::Arc;

use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::Status;

use nomad_driver_exec2::plugin;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::base::proto as base;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;

use crate::client::{BASE, Client, DRIVER};
use crate::memory::Memory;

pub const ID: &str = "1f4a/web/0a1b2c3d";

/// A served plugin, a connection to it, and its tasks from the inside.
pub struct Served {
    pub client: Client,
    pub tasks: Arc<Memory>,
    pub server: JoinHandle<()>,
    pub stop: Arc<Notify>,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

pub async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let tasks = Arc::new(Memory::default());
    let stop = Arc::new(Notify::new());
    let (served, stopped) = (Arc::clone(&tasks), Arc::clone(&stop));
    let server = tokio::spawn(async move {
        plugin::serve(listener, served, stopped.notified())
            .await
            .unwrap();
    });
    Served {
        client: Client::connect(&socket).await,
        tasks,
        server,
        stop,
        socket,
        _dir: dir,
    }
}

impl Served {
    pub async fn base<Q, R>(&self, method: &str, message: Q) -> Result<R, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        self.client.call(BASE, method, message).await
    }

    pub async fn driver<Q, R>(&self, method: &str, message: Q) -> Result<R, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        self.client.call(DRIVER, method, message).await
    }

    pub async fn start(&self, task: wire::TaskConfig) -> Result<wire::StartTaskResponse, Status> {
        let request = wire::StartTaskRequest { task: Some(task) };
        self.driver("StartTask", request).await
    }

    pub async fn wait(&self, id: &str) -> Result<wire::WaitTaskResponse, Status> {
        let request = wire::WaitTaskRequest { task_id: id.into() };
        self.driver("WaitTask", request).await
    }

    pub async fn set_config(
        &self,
        bytes: &[u8],
        driver: Option<base::NomadDriverConfig>,
    ) -> Result<base::SetConfigResponse, Status> {
        let request = base::SetConfigRequest {
            msgpack_config: bytes.to_vec(),
            nomad_config: driver.map(|driver| base::NomadConfig {
                driver: Some(driver),
            }),
            plugin_api_version: "v0.1.0".into(),
        };
        self.base("SetConfig", request).await
    }
}

/// A task as Nomad describes it, that runs `command`.
pub fn task(command: &str) -> wire::TaskConfig {
    let mut block = b"\x84\xa4args\xc0\xa7command".to_vec();
    block.push(0xa0 | u8::try_from(command.len()).unwrap());
    block.extend(command.as_bytes());
    block.extend(b"\xadoom_score_adj\xc0\xa6unveil\xc0");
    let allocated = wire::AllocatedTaskResources {
        cpu: Some(wire::AllocatedCpuResources { cpu_shares: 100 }),
        memory: Some(wire::AllocatedMemoryResources {
            memory_mb: 64,
            memory_max_mb: -1,
        }),
        networks: vec![],
    };
    wire::TaskConfig {
        id: ID.into(),
        name: "web".into(),
        msgpack_driver_config: block,
        env: [("EMPTY".into(), String::new()), ("A".into(), "b".into())].into(),
        resources: Some(wire::Resources {
            allocated_resources: Some(allocated),
            linux_resources: Some(wire::LinuxResources {
                cpuset_cpus: "3,5".into(),
                ..Default::default()
            }),
            ports: vec![],
        }),
        user: "nomad-80001".into(),
        alloc_dir: "/opt/nomad/data/alloc/1f4a".into(),
        stdout_path: "/opt/nomad/data/alloc/1f4a/alloc/logs/.web.stdout.fifo".into(),
        stderr_path: "/dev/null".into(),
        alloc_id: "1f4a".into(),
        namespace: "default".into(),
        network_isolation_spec: Some(wire::NetworkIsolationSpec {
            mode: wire::network_isolation_spec::NetworkIsolationMode::Group.into(),
            path: "/var/run/netns/1f4a".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}
