//! The process: how it is started, what it prints, what it leaves behind.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tonic::Streaming;

use nomad_driver_exec2::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::base::proto as base;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use nomad_driver_exec2::proto::plugin::{ConnInfo, Empty, StdioData};

use crate::client::{BASE, Client, DRIVER, Plugin, binary, ended_well};

const DEFAULT_CONFIG: &[u8] =
    b"\x83\xaeunveil_by_task\xc2\xafunveil_defaults\xc3\xacunveil_paths\xc0";

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

async fn info(client: &Client) -> base::PluginInfoResponse {
    client
        .call(BASE, "PluginInfo", base::PluginInfoRequest {})
        .await
        .unwrap()
}

async fn shut_down(client: &Client) -> Empty {
    client
        .call("/plugin.GRPCController", "Shutdown", Empty {})
        .await
        .unwrap()
}

async fn set_config(client: &Client, nomad_config: Option<base::NomadConfig>) {
    let request = base::SetConfigRequest {
        msgpack_config: DEFAULT_CONFIG.to_vec(),
        nomad_config,
        plugin_api_version: "v0.1.0".into(),
    };
    let _: base::SetConfigResponse = client.call(BASE, "SetConfig", request).await.unwrap();
}

fn real() -> Option<base::NomadConfig> {
    Some(base::NomadConfig {
        driver: Some(base::NomadDriverConfig::default()),
    })
}

#[test]
fn without_nomads_cookie_it_says_what_it_is_and_fails() {
    for cookie in ["", "wrong"] {
        let mut command = binary();
        if !cookie.is_empty() {
            command.env("NOMAD_PLUGIN_MAGIC_COOKIE", cookie);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("nomad-driver-exec2 is a plugin of the Nomad agent"));
        assert!(text.contains("--help"));
    }
}

#[test]
fn help_and_version_are_answered_without_nomad() {
    let answer = |argument: &str| {
        let output = binary().arg(argument).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(answer("--help").contains("systemd scope"));
    assert_eq!(
        answer("--version"),
        concat!("nomad-driver-exec2 ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

/// The plugin block's `args`: whatever they are, the agent waits for a handshake.
#[tokio::test]
async fn with_nomads_cookie_it_is_a_plugin_whatever_its_arguments_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = binary();
    command.args(["--version", "run", "-x"]);
    let plugin = Plugin::spawn(command, "PLUGIN_UNIX_SOCKET_DIR", dir.path());
    info(&Client::connect(&plugin.socket).await).await;
}

#[tokio::test]
async fn the_handshake_is_one_exact_line_and_stdout_is_silent_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    let socket = plugin.socket.display();
    assert_eq!(plugin.line, format!("1|2|unix|{socket}|grpc|\n"));
    assert!(plugin.socket.starts_with(dir.path()));
    let client = Client::connect(&plugin.socket).await;
    info(&client).await;
    let stdout = fs::read_link(format!("/proc/{}/fd/1", plugin.pid())).unwrap();
    assert_eq!(stdout, Path::new("/dev/null"));
    shut_down(&client).await;
    assert!(ended_well(plugin.exit().await));
    assert_eq!(plugin.rest_of_stdout(), "");
}

#[tokio::test]
async fn without_a_directory_from_nomad_the_socket_is_where_only_its_owner_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::spawn(binary(), "TMPDIR", dir.path());
    let parent = fs::metadata(plugin.socket.parent().unwrap()).unwrap();
    assert_eq!(parent.mode() & 0o777, 0o700);
    assert_eq!(parent.uid(), nix::unistd::geteuid().as_raw());
    info(&Client::connect(&plugin.socket).await).await;
    plugin.signal(Signal::SIGTERM);
    assert!(ended_well(plugin.exit().await));
    assert!(!plugin.socket.exists());
    assert_eq!(entries(dir.path()), 0);
}

#[tokio::test]
async fn shutdown_ends_it_within_two_seconds_with_every_stream_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    let client = Client::connect(&plugin.socket).await;
    let _fingerprints: Streaming<wire::FingerprintResponse> = client
        .stream(DRIVER, "Fingerprint", wire::FingerprintRequest {})
        .await
        .unwrap();
    let _events: Streaming<wire::DriverTaskEvent> = client
        .stream(DRIVER, "TaskEvents", wire::TaskEventsRequest {})
        .await
        .unwrap();
    let _broker: Streaming<ConnInfo> = client
        .talk("/plugin.GRPCBroker", "StartStream", None::<ConnInfo>)
        .await
        .unwrap();
    let _stdio: Streaming<StdioData> = client
        .stream("/plugin.GRPCStdio", "StreamStdio", ())
        .await
        .unwrap();
    let _health: Streaming<HealthCheckResponse> = client
        .stream(
            "/grpc.health.v1.Health",
            "Watch",
            HealthCheckRequest::default(),
        )
        .await
        .unwrap();
    let begin = Instant::now();
    shut_down(&client).await;
    assert!(ended_well(plugin.exit().await));
    assert!(begin.elapsed() < Duration::from_secs(1));
    assert!(!plugin.socket.exists());
}

#[tokio::test]
async fn an_interrupt_of_the_agents_terminal_is_not_for_the_plugin() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    for _ in 0..3 {
        plugin.signal(Signal::SIGINT);
    }
    assert!(plugin.exit().await.is_none());
    info(&Client::connect(&plugin.socket).await).await;
}

/// An ignored signal stays ignored through exec, and SIGINT is what stops a task.
#[test]
fn what_it_executes_does_not_learn_to_ignore_signals() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::launch(dir.path());
    let mask = |name: &str| u64::from_str_radix(&plugin.status(name), 16).unwrap();
    let bit = |signal: Signal| 1u64 << (signal as i32 - 1);
    // Of nohup, for one, under which tests may run.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let own = u64::from_str_radix(own.unwrap().trim(), 16).unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        assert_eq!(mask("SigIgn") & bit(signal) & !own, 0, "{signal}");
        assert_eq!(mask("SigBlk") & bit(signal), 0, "{signal}");
    }
    assert_ne!(mask("SigCgt") & bit(Signal::SIGINT), 0);
}

#[tokio::test]
async fn sigterm_ends_it_like_a_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    plugin.signal(Signal::SIGTERM);
    assert!(ended_well(plugin.exit().await));
    assert_eq!(entries(dir.path()), 0);
}

/// A task that held on to the agent's pipes would keep it from ever stopping.
#[tokio::test]
async fn no_descriptor_of_its_own_survives_an_exec() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::launch(dir.path());
    let client = Client::connect(&plugin.socket).await;
    info(&client).await;
    let flags = |pid: &str, number: &str| -> Option<u32> {
        let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    };
    let closes = |flags: u32| flags & libc::O_CLOEXEC.cast_unsigned() != 0;
    let pid = plugin.pid().to_string();
    let mut seen = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let number = path.file_name().unwrap().to_str().unwrap();
        let target = fs::read_link(&path).unwrap();
        // What whoever runs the tests left open is not the plugin's.
        let inherited = fs::read_link(format!("/proc/self/fd/{number}")).ok() == Some(target)
            && flags("self", number).is_some_and(|flags| !closes(flags));
        if matches!(number, "0" | "1" | "2") || inherited {
            continue;
        }
        assert!(closes(flags(&pid, number).unwrap()), "descriptor {path:?}");
        seen += 1;
    }
    assert!(seen > 5);
}

#[tokio::test]
async fn a_restarted_agent_finds_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::launch(dir.path());
    let client = Client::connect(&plugin.socket).await;
    info(&client).await;
    drop(client);
    // Before it dials, the agent looks whether anybody listens.
    for _ in 0..5 {
        drop(UnixStream::connect(&plugin.socket).unwrap());
    }
    let again = Client::connect(&plugin.socket).await;
    assert_eq!(info(&again).await.name, "exec2");
    for _ in 0..2 {
        let mut stdio: Streaming<StdioData> = again
            .stream("/plugin.GRPCStdio", "StreamStdio", ())
            .await
            .unwrap();
        assert!(crate::client::stays_open(&mut stdio).await);
    }
}

#[tokio::test]
async fn it_lives_on_when_the_agent_no_longer_reads_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    drop(plugin.stderr.take());
    let client = Client::connect(&plugin.socket).await;
    set_config(&client, real()).await;
    set_config(&client, real()).await;
    assert_eq!(info(&client).await.name, "exec2");
}

#[tokio::test]
async fn every_line_of_its_log_is_one_the_agent_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::launch(dir.path());
    set_config(&Client::connect(&plugin.socket).await, real()).await;
    plugin.signal(Signal::SIGTERM);
    assert!(ended_well(plugin.exit().await));
    let log = plugin.log();
    assert!(log.lines().count() >= 2, "{log}");
    for line in log.lines() {
        assert!(line.len() < 64 << 10);
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let level = line["@level"].as_str().unwrap();
        assert!(["trace", "debug", "info", "warn", "error"].contains(&level));
        assert!(!line["@message"].as_str().unwrap().is_empty());
        assert!(line["@module"].as_str().unwrap().starts_with("exec2"));
        let at = line["@timestamp"].as_str().unwrap();
        let shape: String = at
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
    }
}

/// An agent's start: one instance to ask who it is, one to check the configuration, one that stays.
#[tokio::test]
async fn the_three_launches_of_an_agents_start_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    for launch in ["ask", "check", "stay"] {
        let mut plugin = Plugin::launch(dir.path());
        let client = Client::connect(&plugin.socket).await;
        assert_eq!(info(&client).await.name, "exec2");
        let schema: base::ConfigSchemaResponse = client
            .call(BASE, "ConfigSchema", base::ConfigSchemaRequest {})
            .await
            .unwrap();
        assert!(schema.spec.is_some());
        match launch {
            "check" => {
                set_config(&client, None).await;
                set_config(&client, None).await;
            }
            "stay" => set_config(&client, real()).await,
            _ => {}
        }
        shut_down(&client).await;
        assert!(ended_well(plugin.exit().await), "{launch}");
        assert_eq!(entries(dir.path()), 0, "{launch}");
    }
}
