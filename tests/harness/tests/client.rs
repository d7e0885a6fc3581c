//! The Nomad-shaped client, tried on a driver that is good or has one fault: what Nomad would choke on, the client reports.
//! Needs root, since it mounts.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::nomad::{Agent, Config, RpcError, Version};

const BATCH: &str = r#"
job "batch" {
  type = "batch"
  group "main" {
    task "main" {
      driver = "exec2"
      config {
        command = "/bin/sh"
        args    = ["-c", "echo out of ${NOMAD_TASK_NAME} in $NOMAD_TASK_DIR; echo err >&2; exit 7"]
      }
    }
  }
}
"#;

const SERVICE: &str = r#"
job "service" {
  group "main" {
    task "main" {
      driver       = "exec2"
      kill_timeout = "1s"
      config {
        command = "sleep"
        args    = ["300"]
      }
    }
  }
}
"#;

const PLAIN_DRIVER: &str = env!("CARGO_BIN_EXE_plain-driver");

async fn agent(fault: &str) -> anyhow::Result<Agent> {
    let config = Config {
        base: std::env::temp_dir(),
        args: vec!["--fault".into(), fault.into()],
        ..Config::default()
    };
    Agent::start(PLAIN_DRIVER, config).await
}

/// Runs a service for a moment on a driver with a fault, and gives what the client found.
async fn found_with(fault: &str) -> String {
    let agent = agent(fault).await.unwrap();
    if let Ok(alloc) = agent.run(SERVICE).await {
        let task = alloc.only_task().unwrap();
        task.inspect().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        alloc.stop().await.unwrap();
    }
    agent
        .finish()
        .await
        .map_or_else(|error| error.to_string(), |()| String::new())
}

#[tokio::test]
async fn a_batch_job_runs_and_its_logs_and_exit_code_are_read() {
    let agent = agent("none").await.unwrap();
    let alloc = agent.run(BATCH).await.unwrap();
    let exit = alloc.task("main").unwrap().wait().await.unwrap();
    assert_eq!((exit.code, exit.signal), (7, 0));
    let root = &alloc.task("main").unwrap().paths().root.clone();
    let out = format!("out of main in {}/local\n", root.display());
    assert_eq!(alloc.stdout("main").unwrap(), out);
    alloc.stop().await.unwrap();
    assert_eq!(alloc.stderr("main").unwrap(), "err\n");
    assert!(!root.exists());
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_stopped_service_ends_by_its_signal_and_can_be_started_again() {
    let agent = agent("none").await.unwrap();
    let alloc = agent.run(SERVICE).await.unwrap();
    let task = alloc.only_task().unwrap();
    let first = task.id();
    assert_eq!(task.stop().await.unwrap().signal, libc::SIGTERM);
    task.restart().await.unwrap();
    assert_ne!(task.id(), first);
    assert_eq!(task.exit(), None);
    alloc.stop().await.unwrap();
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn tasks_are_recovered_after_an_agent_s_restart_and_a_plugin_s_death() {
    let agent = agent("none").await.unwrap();
    let alloc = agent.run(SERVICE).await.unwrap();
    let task = alloc.only_task().unwrap();
    let before = agent.plugin_pid().await;
    assert!(agent.restart().await.unwrap().is_empty());
    assert_ne!(agent.plugin_pid().await, before);
    assert!(agent.kill_plugin().await.unwrap().is_empty());
    assert_eq!(task.exit(), None);
    assert!(task.stop().await.unwrap().success());
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn the_agent_of_1_8_does_not_survive_the_restore_of_a_dynamic_user() {
    let config = Config {
        base: std::env::temp_dir(),
        version: Version::V1_8,
        ..Config::default()
    };
    let agent = Agent::start(PLAIN_DRIVER, config).await.unwrap();
    let alloc = agent.run(SERVICE).await.unwrap();
    let error = agent.restart().await.unwrap_err().to_string();
    assert!(error.contains("panics on restoring main"), "{error}");
    alloc.stop().await.unwrap();
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_crashed_agent_finds_its_plugin_again_or_starts_another() {
    let agent = agent("none").await.unwrap();
    let alloc = agent.run(SERVICE).await.unwrap();
    let before = agent.plugin_pid().await;
    let (agent, lost) = agent.crash().await.reattach().await.unwrap();
    assert!(lost.is_empty());
    assert_eq!(agent.plugin_pid().await, before);

    let crashed = agent.crash().await;
    crashed.kill_plugin().await.unwrap();
    let (agent, lost) = crashed.reattach().await.unwrap();
    assert!(lost.is_empty());
    assert_ne!(agent.plugin_pid().await, before);
    alloc.stop().await.unwrap();
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_task_that_cannot_be_recovered_is_destroyed_and_reported() {
    let agent = agent("recovers-nothing").await.unwrap();
    let alloc = agent.run(SERVICE).await.unwrap();
    let lost = agent.restart().await.unwrap();
    assert!(lost[0].1.message.contains("it is gone"));
    let task = alloc.only_task().unwrap();
    assert!(!task.exit().unwrap().success());

    // This driver left the process behind, and the client saw it by the log.
    let leaked = |violation: &str| violation.contains("FIFO is still open");
    assert_eq!(agent.violations().all().len(), 2);
    agent.violations().forgive(leaked);
    let state = String::from_utf8(task.handle().unwrap().driver_state).unwrap();
    let pid = nix::unistd::Pid::from_raw(state.parse().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_plugin_that_dies_in_a_start_is_started_again_with_the_task() {
    let agent = agent("dies-in-start").await.unwrap();
    let before = agent.plugin_pid().await;
    let alloc = agent.run(SERVICE).await.unwrap();
    assert_eq!(alloc.only_task().unwrap().exit(), None);
    assert_ne!(agent.plugin_pid().await, before);
    agent
        .violations()
        .forgive(|violation| violation.contains(" ended"));
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_gives_the_driver_s_words_and_leaves_nothing() {
    let agent = agent("none").await.unwrap();
    let error = agent
        .run(&BATCH.replace("/bin/sh", "/no/such"))
        .await
        .unwrap_err();
    let error = error.downcast::<RpcError>().unwrap();
    assert!(error.message.contains("/no/such"), "{error}");
    let left = std::fs::read_dir(agent.data_dir().join("alloc_mounts"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_wrong_key_never_reaches_the_driver() {
    let agent = agent("none").await.unwrap();
    let error = agent
        .run(&BATCH.replace("command", "comand"))
        .await
        .unwrap_err();
    assert!(format!("{error:#}").contains("Invalid label"), "{error:#}");
    agent.finish().await.unwrap();
}

#[tokio::test]
async fn a_refused_configuration_fails_the_agent_s_start() {
    let config = Config {
        base: std::env::temp_dir(),
        plugin: "greeting = \"refuse\"".into(),
        ..Config::default()
    };
    let error = Agent::start(PLAIN_DRIVER, config).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("greeting: refused"),
        "{error:#}"
    );
}

#[tokio::test]
async fn a_plugin_without_a_proper_handshake_is_refused() {
    for fault in ["bad-handshake", "no-handshake"] {
        let error = format!("{:#}", agent(fault).await.unwrap_err());
        assert!(error.contains("handshake"), "{error}");
    }
}

#[tokio::test]
async fn what_nomad_chokes_on_is_found() {
    for (fault, words) in [
        ("none", ""),
        ("raw-log", "a raw line"),
        ("fingerprint-ends", "Fingerprint ended"),
        ("stdio-ends", "StreamStdio ended"),
        ("ignores-shutdown", "did not exit within 2 s"),
        ("leaks-stderr", "still holds the plugin's stderr"),
        ("unavailable", "dead plugin"),
        ("forgets-config", "handle.config is missing"),
        ("no-result", "WaitTask: result"),
        ("no-time", "task.completed_at is missing"),
        ("no-memory", "memory is missing"),
    ] {
        let found = found_with(fault).await;
        assert!(found.contains(words), "{fault}: {found}");
        assert_eq!(found.is_empty(), words.is_empty(), "{fault}: {found}");
    }
}
