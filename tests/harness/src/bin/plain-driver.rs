//! A driver that starts a command and does nothing else: no scope, no sandbox. The client is tried on it, good and with one
//! fault at a time (`--fault NAME`), since a client that notices nothing proves nothing. It is never shipped.

#![allow(clippy::unwrap_used, missing_debug_implementations)]

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use nomad_driver_exec2::proto::hashicorp::nomad::plugins::base::proto as base;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as driver;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::shared::{hclspec, structs};
use nomad_driver_exec2::proto::plugin;
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Clone, Default)]
struct Plain {
    fault: String,
    shutdown: Arc<Notify>,
    tasks: Arc<Mutex<HashMap<String, Task>>>,
}

#[derive(Clone)]
struct Task {
    pid: i32,
    exit: watch::Receiver<Option<(i32, i32)>>,
}

#[derive(serde::Deserialize)]
struct Options {
    command: String,
    args: Option<Vec<String>>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    if std::env::var("NOMAD_PLUGIN_MAGIC_COOKIE").is_err() {
        eprintln!("this is a plugin");
        std::process::exit(1);
    }
    let plain = Plain {
        fault: args
            .iter()
            .skip_while(|arg| *arg != "--fault")
            .nth(1)
            .cloned()
            .unwrap_or_default(),
        ..Plain::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plugin");
    let listener = UnixListener::bind(&path).unwrap();
    log("up");
    match plain.fault.as_str() {
        "raw-log" => eprintln!("a raw line"),
        "bad-handshake" => println!("1|1|unix|{}|grpc|", path.display()),
        "no-handshake" => std::process::exit(3),
        "leaks-stderr" => drop(Command::new("sleep").arg("6").stdout(Stdio::null()).spawn()),
        _ => {}
    }
    println!("1|2|unix|{}|grpc|", path.display());
    let shutdown = plain.shutdown.clone();
    let served = tonic::transport::Server::builder()
        .add_service(base::base_plugin_server::BasePluginServer::new(
            plain.clone(),
        ))
        .add_service(driver::driver_server::DriverServer::new(plain.clone()))
        .add_service(plugin::grpc_controller_server::GrpcControllerServer::new(
            plain.clone(),
        ))
        .add_service(plugin::grpc_broker_server::GrpcBrokerServer::new(
            plain.clone(),
        ))
        .add_service(plugin::grpc_stdio_server::GrpcStdioServer::new(plain))
        .serve_with_incoming(UnixListenerStream::new(listener));
    tokio::select! {
        result = served => result.unwrap(),
        () = shutdown.notified() => sleep(Duration::from_millis(50)).await,
    }
}

fn log(message: &str) {
    eprintln!(r#"{{"@level":"info","@message":"{message}","@module":"plain"}}"#);
}

fn timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    Some(time.into())
}

fn open<T: Send + 'static>(first: Vec<T>) -> Answers<T> {
    Box::pin(tokio_stream::iter(first.into_iter().map(Ok)).chain(tokio_stream::pending()))
}

impl Plain {
    fn has(&self, fault: &str) -> bool {
        self.fault == fault
    }

    fn task(&self, id: &str) -> Result<Task, Status> {
        let tasks = self.tasks.lock().unwrap();
        tasks
            .get(id)
            .cloned()
            .ok_or_else(|| Status::unknown(format!("task does not exist: {id}")))
    }

    fn begin(&self, config: &driver::TaskConfig) -> Result<i32, Status> {
        let options: Options =
            rmp_serde::from_slice(&config.msgpack_driver_config).map_err(|error| {
                Status::unknown(format!("failed to decode driver task config: {error}"))
            })?;
        let stream = |path: &str| -> Result<Stdio, Status> {
            let open = || {
                std::fs::OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
            };
            for _ in 0..100 {
                match open() {
                    Ok(file) => return Ok(file.into()),
                    // The reader's thread is on its way.
                    Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Err(error) => return Err(Status::unknown(format!("{path}: {error}"))),
                }
            }
            Err(Status::unknown(format!("{path} has no reader")))
        };
        let mut child = Command::new(&options.command)
            .args(options.args.unwrap_or_default())
            .env_clear()
            .envs(&config.env)
            .stdin(Stdio::null())
            .stdout(stream(&config.stdout_path)?)
            .stderr(stream(&config.stderr_path)?)
            .spawn()
            .map_err(|error| {
                Status::unknown(format!(
                    "failed to start task: {}: {error}",
                    options.command
                ))
            })?;
        let pid = child.id() as i32;
        let (ended, exit) = watch::channel(None);
        std::thread::spawn(move || {
            let status = child.wait().unwrap();
            ended.send_replace(Some((
                status.code().unwrap_or(0),
                status.signal().unwrap_or(0),
            )));
        });
        self.tasks
            .lock()
            .unwrap()
            .insert(config.id.clone(), Task { pid, exit });
        Ok(pid)
    }
}

#[tonic::async_trait]
impl base::base_plugin_server::BasePlugin for Plain {
    async fn plugin_info(
        &self,
        _: Request<base::PluginInfoRequest>,
    ) -> Answer<base::PluginInfoResponse> {
        Ok(Response::new(base::PluginInfoResponse {
            r#type: base::PluginType::Driver.into(),
            plugin_api_versions: vec!["v0.1.0".into()],
            plugin_version: "v0.1.0".into(),
            name: "exec2".into(),
        }))
    }

    async fn config_schema(
        &self,
        _: Request<base::ConfigSchemaRequest>,
    ) -> Answer<base::ConfigSchemaResponse> {
        Ok(Response::new(base::ConfigSchemaResponse {
            spec: Some(object(&[
                ("greeting", "string", false),
                ("tries", "number", false),
            ])),
        }))
    }

    async fn set_config(
        &self,
        request: Request<base::SetConfigRequest>,
    ) -> Answer<base::SetConfigResponse> {
        #[derive(serde::Deserialize)]
        struct Config {
            greeting: Option<String>,
        }
        let config: Config = rmp_serde::from_slice(&request.get_ref().msgpack_config).unwrap();
        match config.greeting.as_deref() {
            Some("refuse") => Err(Status::unknown("SetConfig failed: greeting: refused")),
            _ => Ok(Response::new(Default::default())),
        }
    }
}

fn object(attributes: &[(&str, &str, bool)]) -> hclspec::Spec {
    let attribute = |(name, kind, required): &(&str, &str, bool)| {
        let attr = hclspec::Attr {
            name: (*name).into(),
            r#type: (*kind).into(),
            required: *required,
        };
        (
            (*name).to_owned(),
            hclspec::Spec {
                block: Some(hclspec::spec::Block::Attr(attr)),
            },
        )
    };
    let attributes = attributes.iter().map(attribute).collect();
    hclspec::Spec {
        block: Some(hclspec::spec::Block::Object(hclspec::Object { attributes })),
    }
}

#[tonic::async_trait]
impl driver::driver_server::Driver for Plain {
    type FingerprintStream = Answers<driver::FingerprintResponse>;
    type TaskStatsStream = Answers<driver::TaskStatsResponse>;
    type TaskEventsStream = Answers<driver::DriverTaskEvent>;
    type ExecTaskStreamingStream = Answers<driver::ExecTaskStreamingResponse>;

    async fn task_config_schema(
        &self,
        _: Request<driver::TaskConfigSchemaRequest>,
    ) -> Answer<driver::TaskConfigSchemaResponse> {
        let spec = object(&[
            ("command", "string", true),
            ("args", "list(string)", false),
            ("unveil", "list(string)", false),
            ("oom_score_adj", "number", false),
        ]);
        Ok(Response::new(driver::TaskConfigSchemaResponse {
            spec: Some(spec),
        }))
    }

    async fn capabilities(
        &self,
        _: Request<driver::CapabilitiesRequest>,
    ) -> Answer<driver::CapabilitiesResponse> {
        let capabilities = driver::DriverCapabilities {
            send_signals: true,
            fs_isolation: driver::driver_capabilities::FsIsolation::Unveil.into(),
            network_isolation_modes: vec![3, 0, 1],
            dynamic_workload_users: true,
            ..driver::DriverCapabilities::default()
        };
        Ok(Response::new(driver::CapabilitiesResponse {
            capabilities: Some(capabilities),
        }))
    }

    async fn fingerprint(
        &self,
        _: Request<driver::FingerprintRequest>,
    ) -> Answer<Self::FingerprintStream> {
        let attribute = structs::Attribute {
            value: Some(structs::attribute::Value::BoolVal(true)),
            unit: String::new(),
        };
        let healthy = driver::FingerprintResponse {
            attributes: HashMap::from([("driver.exec2.plain".into(), attribute)]),
            health: driver::fingerprint_response::HealthState::Healthy.into(),
            health_description: "Healthy".into(),
            err: String::new(),
        };
        match self.fault.as_str() {
            "fingerprint-ends" => Ok(Response::new(Box::pin(tokio_stream::iter([Ok(healthy)])))),
            _ => Ok(Response::new(open(vec![healthy]))),
        }
    }

    async fn recover_task(
        &self,
        request: Request<driver::RecoverTaskRequest>,
    ) -> Answer<driver::RecoverTaskResponse> {
        let handle = request.into_inner().handle.unwrap();
        let config = handle.config.unwrap();
        if self.tasks.lock().unwrap().contains_key(&config.id) {
            return Ok(Response::new(Default::default()));
        }
        let pid: i32 = String::from_utf8(handle.driver_state)
            .unwrap()
            .parse()
            .unwrap();
        let proc = format!("/proc/{pid}");
        if !std::path::Path::new(&proc).exists() || self.has("recovers-nothing") {
            return Err(Status::unknown("failed to recover task: it is gone"));
        }
        let (ended, exit) = watch::channel(None);
        std::thread::spawn(move || {
            while std::path::Path::new(&proc).exists() {
                std::thread::sleep(Duration::from_millis(20));
            }
            ended.send_replace(Some((0, 0)));
        });
        self.tasks
            .lock()
            .unwrap()
            .insert(config.id, Task { pid, exit });
        Ok(Response::new(Default::default()))
    }

    async fn start_task(
        &self,
        request: Request<driver::StartTaskRequest>,
    ) -> Answer<driver::StartTaskResponse> {
        let config = request.into_inner().task.unwrap();
        match self.fault.as_str() {
            "unavailable" => return Err(Status::unavailable("no bus")),
            "dies-in-start"
                if std::fs::create_dir(format!("{}/died", config.alloc_dir)).is_ok() =>
            {
                std::process::exit(9);
            }
            _ => {}
        }
        let pid = self.begin(&config)?;
        let handle = driver::TaskHandle {
            version: 1,
            config: (self.fault != "forgets-config").then_some(config),
            state: driver::TaskState::Running.into(),
            driver_state: pid.to_string().into_bytes(),
        };
        Ok(Response::new(driver::StartTaskResponse {
            handle: Some(handle),
            ..Default::default()
        }))
    }

    async fn wait_task(
        &self,
        request: Request<driver::WaitTaskRequest>,
    ) -> Answer<driver::WaitTaskResponse> {
        let mut exit = self.task(&request.get_ref().task_id)?.exit;
        let (exit_code, signal) = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        let result = driver::ExitResult {
            exit_code,
            signal,
            oom_killed: false,
        };
        Ok(Response::new(driver::WaitTaskResponse {
            result: (self.fault != "no-result").then_some(result),
            err: String::new(),
        }))
    }

    async fn stop_task(
        &self,
        request: Request<driver::StopTaskRequest>,
    ) -> Answer<driver::StopTaskResponse> {
        let request = request.into_inner();
        let mut task = self.task(&request.task_id)?;
        let signal = request
            .signal
            .trim_start_matches("SIG")
            .parse::<i32>()
            .unwrap_or(libc::SIGTERM);
        let signal = nix::sys::signal::Signal::try_from(signal).unwrap();
        let pid = nix::unistd::Pid::from_raw(task.pid);
        let _ = nix::sys::signal::kill(pid, signal);
        let wait = Duration::try_from(request.timeout.unwrap()).unwrap();
        if tokio::time::timeout(wait, task.exit.wait_for(Option::is_some))
            .await
            .is_err()
        {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        Ok(Response::new(Default::default()))
    }

    async fn destroy_task(
        &self,
        request: Request<driver::DestroyTaskRequest>,
    ) -> Answer<driver::DestroyTaskResponse> {
        self.tasks
            .lock()
            .unwrap()
            .remove(&request.get_ref().task_id);
        Ok(Response::new(Default::default()))
    }

    async fn inspect_task(
        &self,
        request: Request<driver::InspectTaskRequest>,
    ) -> Answer<driver::InspectTaskResponse> {
        let id = request.into_inner().task_id;
        self.task(&id)?;
        let status = driver::TaskStatus {
            id,
            state: driver::TaskState::Running.into(),
            started_at: timestamp(SystemTime::now()),
            completed_at: (self.fault != "no-time").then(prost_types::Timestamp::default),
            result: Some(driver::ExitResult::default()),
            ..driver::TaskStatus::default()
        };
        let driver = Some(driver::TaskDriverStatus::default());
        Ok(Response::new(driver::InspectTaskResponse {
            task: Some(status),
            driver,
            network_override: None,
        }))
    }

    async fn task_stats(
        &self,
        request: Request<driver::TaskStatsRequest>,
    ) -> Answer<Self::TaskStatsStream> {
        let usage = driver::TaskResourceUsage {
            cpu: Some(driver::CpuUsage::default()),
            memory: (self.fault != "no-memory").then(driver::MemoryUsage::default),
        };
        let stats = driver::TaskStats {
            id: request.into_inner().task_id,
            timestamp: timestamp(SystemTime::now()),
            agg_resource_usage: Some(usage),
            resource_usage_by_pid: HashMap::new(),
        };
        Ok(Response::new(open(vec![driver::TaskStatsResponse {
            stats: Some(stats),
        }])))
    }

    async fn task_events(
        &self,
        _: Request<driver::TaskEventsRequest>,
    ) -> Answer<Self::TaskEventsStream> {
        Ok(Response::new(open(Vec::new())))
    }

    async fn signal_task(
        &self,
        request: Request<driver::SignalTaskRequest>,
    ) -> Answer<driver::SignalTaskResponse> {
        self.task(&request.get_ref().task_id)?;
        Ok(Response::new(Default::default()))
    }

    async fn exec_task(
        &self,
        _: Request<driver::ExecTaskRequest>,
    ) -> Answer<driver::ExecTaskResponse> {
        Err(Status::unknown("ExecTask is not yet implemented"))
    }

    async fn exec_task_streaming(
        &self,
        _: Request<Streaming<driver::ExecTaskStreamingRequest>>,
    ) -> Answer<Self::ExecTaskStreamingStream> {
        Err(Status::unknown("ExecTaskStreaming is not yet implemented"))
    }

    async fn create_network(
        &self,
        _: Request<driver::CreateNetworkRequest>,
    ) -> Answer<driver::CreateNetworkResponse> {
        Err(Status::unknown("CreateNetwork RPC not supported by driver"))
    }

    async fn destroy_network(
        &self,
        _: Request<driver::DestroyNetworkRequest>,
    ) -> Answer<driver::DestroyNetworkResponse> {
        Err(Status::unknown(
            "DestroyNetwork RPC not supported by driver",
        ))
    }

    async fn init(&self, _: Request<driver::InitRequest>) -> Answer<driver::InitResponse> {
        Ok(Response::new(Default::default()))
    }

    async fn shutdown(
        &self,
        _: Request<driver::ShutdownRequest>,
    ) -> Answer<driver::ShutdownResponse> {
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl plugin::grpc_controller_server::GrpcController for Plain {
    async fn shutdown(&self, _: Request<plugin::Empty>) -> Answer<plugin::Empty> {
        if !self.has("ignores-shutdown") {
            self.shutdown.notify_one();
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl plugin::grpc_broker_server::GrpcBroker for Plain {
    type StartStreamStream = Answers<plugin::ConnInfo>;

    async fn start_stream(
        &self,
        _: Request<Streaming<plugin::ConnInfo>>,
    ) -> Answer<Self::StartStreamStream> {
        Ok(Response::new(open(Vec::new())))
    }
}

#[tonic::async_trait]
impl plugin::grpc_stdio_server::GrpcStdio for Plain {
    type StreamStdioStream = Answers<plugin::StdioData>;

    async fn stream_stdio(&self, _: Request<()>) -> Answer<Self::StreamStdioStream> {
        match self.fault.as_str() {
            "stdio-ends" => Ok(Response::new(Box::pin(tokio_stream::iter([])))),
            _ => Ok(Response::new(open(Vec::new()))),
        }
    }
}
