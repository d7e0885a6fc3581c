//! The calls about one task, and what Nomad would trip over in the answers.

use std::path::PathBuf;
use std::time::Duration;

use prost::Message;
use tonic::{Code, Status, Streaming};

use nomad_driver_exec2::proto::google::rpc;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::shared::structs;
use nomad_driver_exec2::task::types::{ExitResult, MemoryMax};

use crate::client::{Client, DRIVER};
use crate::served::{ID, serve, task};

#[tokio::test]
async fn a_started_task_gives_nomad_back_everything_it_needs_to_recover_it() {
    let served = serve().await;
    let answer = served.start(task("/bin/sleep")).await.unwrap();
    let handle = answer.handle.unwrap();
    assert_eq!(handle.version, 1);
    assert_eq!(handle.state(), wire::TaskState::Running);
    assert_eq!(handle.driver_state, b"state");
    assert_eq!(handle.config, Some(task("/bin/sleep")));
    assert_eq!(answer.result, 0);
}

#[tokio::test]
async fn a_task_arrives_in_our_own_terms() {
    let served = serve().await;
    served.start(task("/bin/sleep")).await.unwrap();
    let requests = served.tasks.requests.lock().unwrap();
    let request = &requests[0];
    assert_eq!(request.id.as_str(), ID);
    assert_eq!(request.options.command, "/bin/sleep");
    assert_eq!(request.env["EMPTY"], "");
    assert_eq!(request.user, "nomad-80001");
    assert_eq!(request.resources.cpu_mhz, 100);
    assert_eq!(request.resources.memory_max_mib, MemoryMax::Unlimited);
    assert_eq!(request.resources.cpuset, "3,5");
    assert_eq!(
        request.network_namespace,
        Some(PathBuf::from("/var/run/netns/1f4a"))
    );
}

#[tokio::test]
async fn a_mistake_in_the_job_is_one_sentence_and_a_passing_trouble_is_recoverable() {
    let served = serve().await;
    let mut unreadable = task("x");
    unreadable.msgpack_driver_config = b"\x81\xa4args\xa1y".to_vec();
    let error = served.start(unreadable).await.unwrap_err();
    assert_eq!(
        error.message(),
        "failed to decode driver task config: args = \"y\" is not a list; write it as a list of texts"
    );
    let permanent = served.start(task("permanent")).await.unwrap_err();
    assert_eq!(permanent.message(), "no\\nway");
    assert!(permanent.details().is_empty());
    let transient = served.start(task("transient")).await.unwrap_err();
    let details = rpc::Status::decode(transient.details()).unwrap();
    assert!(details.details[0].type_url.ends_with(".RecoverableError"));
    let flag = structs::RecoverableError::decode(&details.details[0].value[..]).unwrap();
    assert!(flag.recoverable);
    for error in [error, permanent, transient] {
        assert_eq!(error.code(), Code::Unknown);
    }
}

#[tokio::test]
async fn a_start_that_the_agent_does_not_live_to_hear_of_is_undone() {
    let served = serve().await;
    let doomed = Client::connect(&served.socket).await;
    let call = tokio::spawn(async move {
        let task = Some(task("slow"));
        let request = wire::StartTaskRequest { task };
        let answer: Result<wire::StartTaskResponse, Status> =
            doomed.call(DRIVER, "StartTask", request).await;
        answer
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    call.abort();
    let _ = call.await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.tasks.gate.add_permits(1);
    tokio::time::sleep(Duration::from_millis(100)).await;
    // Not broken off halfway, and not left to nobody.
    assert_eq!(served.tasks.requests.lock().unwrap().len(), 1);
    let verbs = served.tasks.verbs.lock().unwrap();
    assert_eq!(*verbs, ["destroy EvenIfRunning"]);
}

#[tokio::test]
async fn every_waiter_gets_the_same_result_also_after_the_exit() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let exit = ExitResult {
        code: 137,
        signal: 9,
        oom_killed: true,
        error: Some("out of memory".into()),
    };
    let ended = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        served.tasks.exit(ID, exit);
    };
    let (first, second, ()) = tokio::join!(served.wait(ID), served.wait(ID), ended);
    let expected = wire::WaitTaskResponse {
        result: Some(wire::ExitResult {
            exit_code: 137,
            signal: 9,
            oom_killed: true,
        }),
        err: "out of memory".into(),
    };
    for answer in [first, second, served.wait(ID).await] {
        assert_eq!(answer.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_success_still_has_a_result() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    served.tasks.exit(ID, ExitResult::default());
    let answer = served.wait(ID).await.unwrap();
    assert_eq!(answer.result, Some(wire::ExitResult::default()));
}

#[tokio::test]
async fn an_unknown_task_cannot_be_waited_for_or_inspected() {
    let served = serve().await;
    let error = served.wait("ghost").await.unwrap_err();
    assert_eq!(error.message(), "task does not exist: ghost");
    assert_eq!(error.code(), Code::Unknown);
    let request = wire::InspectTaskRequest {
        task_id: "ghost".into(),
    };
    let answer: Result<wire::InspectTaskResponse, Status> =
        served.driver("InspectTask", request).await;
    assert_eq!(answer.unwrap_err().message(), "task not found for given id");
}

fn stop(id: &str, signal: &str) -> wire::StopTaskRequest {
    wire::StopTaskRequest {
        task_id: id.into(),
        timeout: Some(prost_types::Duration {
            seconds: 5,
            nanos: 0,
        }),
        signal: signal.into(),
    }
}

#[tokio::test]
async fn an_unknown_task_counts_as_stopped_signalled_and_destroyed() {
    let served = serve().await;
    let ghost = || "ghost".to_string();
    let _: wire::StopTaskResponse = served
        .driver("StopTask", stop("ghost", "SIGTERM"))
        .await
        .unwrap();
    let signal = wire::SignalTaskRequest {
        task_id: ghost(),
        signal: "SIGHUP".into(),
    };
    let _: wire::SignalTaskResponse = served.driver("SignalTask", signal).await.unwrap();
    let destroy = wire::DestroyTaskRequest {
        task_id: ghost(),
        force: true,
    };
    let _: wire::DestroyTaskResponse = served.driver("DestroyTask", destroy).await.unwrap();
    let stats = wire::TaskStatsRequest {
        task_id: ghost(),
        collection_interval: None,
    };
    let mut stats: Streaming<wire::TaskStatsResponse> = served
        .client
        .stream(DRIVER, "TaskStats", stats)
        .await
        .unwrap();
    assert_eq!(stats.message().await.unwrap(), None);
}

#[tokio::test]
async fn stop_signal_and_destroy_reach_the_task_as_asked() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let _: wire::StopTaskResponse = served.driver("StopTask", stop(ID, "")).await.unwrap();
    let _: wire::StopTaskResponse = served
        .driver("StopTask", stop(ID, "SIGTERM"))
        .await
        .unwrap();
    let signal = |signal: &str| wire::SignalTaskRequest {
        task_id: ID.into(),
        signal: signal.into(),
    };
    let _: wire::SignalTaskResponse = served.driver("SignalTask", signal("SIGHUP")).await.unwrap();
    let unset: Result<wire::SignalTaskResponse, Status> =
        served.driver("SignalTask", signal("")).await;
    assert_eq!(unset.unwrap_err().message(), "signal must be set");
    for force in [false, true] {
        let destroy = wire::DestroyTaskRequest {
            task_id: ID.into(),
            force,
        };
        let _: wire::DestroyTaskResponse = served.driver("DestroyTask", destroy).await.unwrap();
    }
    assert_eq!(
        *served.tasks.verbs.lock().unwrap(),
        [
            "stop 5s SIGINT",
            "stop 5s SIGTERM",
            "signal SIGHUP",
            "destroy OnlyIfEnded",
            "destroy EvenIfRunning"
        ]
    );
}

#[tokio::test]
async fn a_running_task_is_inspected_without_a_hole_in_the_answer() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let request = wire::InspectTaskRequest { task_id: ID.into() };
    let answer: wire::InspectTaskResponse = served.driver("InspectTask", request).await.unwrap();
    let status = answer.task.unwrap();
    assert_eq!(status.state(), wire::TaskState::Running);
    assert_eq!(status.result, Some(wire::ExitResult::default()));
    assert_eq!(status.started_at.unwrap().seconds, 1);
    assert_eq!(status.completed_at.unwrap().seconds, -62_135_596_800);
    assert_eq!(answer.driver.unwrap().attributes["pid"], "42");
}

fn handle(config: Option<wire::TaskConfig>) -> wire::RecoverTaskRequest {
    wire::RecoverTaskRequest {
        task_id: String::new(),
        handle: Some(wire::TaskHandle {
            version: 1,
            config,
            state: wire::TaskState::Running.into(),
            driver_state: b"state".to_vec(),
        }),
    }
}

#[tokio::test]
async fn a_task_is_recovered_without_its_block() {
    let served = serve().await;
    for block in [&b""[..], b"\xc1 not a block"] {
        let mut config = task("x");
        config.msgpack_driver_config = block.to_vec();
        let _: wire::RecoverTaskResponse = served
            .driver("RecoverTask", handle(Some(config)))
            .await
            .unwrap();
    }
    let recovered = served.tasks.recovered.lock().unwrap();
    assert_eq!(recovered.len(), 2);
    let (request, saved) = &recovered[0];
    assert_eq!(request.id.as_str(), ID);
    assert_eq!(
        request.alloc_dir,
        PathBuf::from("/opt/nomad/data/alloc/1f4a")
    );
    assert_eq!((saved.version, &saved.driver_state[..]), (1, &b"state"[..]));
}

#[tokio::test]
async fn a_request_without_its_parts_is_an_error_not_a_crash() {
    let served = serve().await;
    let empty: Result<wire::StartTaskResponse, Status> = served
        .driver("StartTask", wire::StartTaskRequest { task: None })
        .await;
    let nil = wire::RecoverTaskRequest::default();
    let nil: Result<wire::RecoverTaskResponse, Status> = served.driver("RecoverTask", nil).await;
    let bare: Result<wire::RecoverTaskResponse, Status> =
        served.driver("RecoverTask", handle(None)).await;
    assert_eq!(empty.unwrap_err().code(), Code::Unknown);
    assert_eq!(nil.unwrap_err().message(), "handle cannot be nil");
    assert_eq!(bare.unwrap_err().code(), Code::Unknown);
}

#[tokio::test]
async fn an_environment_beyond_four_megabytes_arrives() {
    let served = serve().await;
    let mut large = task("x");
    large.env.insert("LARGE".into(), "x".repeat(6 << 20));
    let answer = served.start(large).await.unwrap();
    let config = answer.handle.unwrap().config.unwrap();
    assert_eq!(config.env["LARGE"].len(), 6 << 20);
}
