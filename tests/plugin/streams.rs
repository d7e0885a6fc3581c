//! Calls that stay open: Nomad reopens some of them at once when they end, and none may keep the process alive.

use std::time::Duration;

use tonic::{Status, Streaming};

use nomad_driver_exec2::proto::hashicorp::nomad::plugins::base::proto as base;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::shared::structs;
use nomad_driver_exec2::proto::plugin::{ConnInfo, Empty};
use nomad_driver_exec2::task::types::Health;

use crate::client::{DRIVER, stays_open};
use crate::memory::event;
use crate::served::{ID, serve, task};

use wire::cpu_usage::Fields as Cpu;
use wire::fingerprint_response::HealthState;
use wire::memory_usage::Fields as Mem;

#[tokio::test]
async fn a_sample_has_all_its_parts_and_names_what_was_measured() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let request = wire::TaskStatsRequest {
        task_id: ID.into(),
        collection_interval: None,
    };
    let mut samples: Streaming<wire::TaskStatsResponse> = served
        .client
        .stream(DRIVER, "TaskStats", request)
        .await
        .unwrap();
    let stats = samples.message().await.unwrap().unwrap().stats.unwrap();
    assert_eq!(stats.id, ID);
    assert_eq!(stats.timestamp.unwrap().seconds, 1);
    let usage = stats.agg_resource_usage.unwrap();
    let (cpu, memory) = (usage.cpu.unwrap(), usage.memory.unwrap());
    assert_eq!((cpu.percent, memory.usage), (12.5, 4_096));
    assert_eq!(cpu.measured_fields, [Cpu::Percent as i32]);
    assert_eq!(
        memory.measured_fields,
        [Mem::Swap as i32, Mem::Usage as i32]
    );
}

#[tokio::test]
async fn fingerprints_come_at_once_and_on_change_and_never_end() {
    let served = serve().await;
    let mut stream: Streaming<wire::FingerprintResponse> = served
        .client
        .stream(DRIVER, "Fingerprint", wire::FingerprintRequest {})
        .await
        .unwrap();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.health(), HealthState::Healthy);
    assert_eq!(first.health_description, "Healthy");
    let attribute = first.attributes["driver.exec2.unveil.tasks"].clone();
    assert_eq!(
        attribute.value,
        Some(structs::attribute::Value::BoolVal(true))
    );
    assert!(stays_open(&mut stream).await);
    served.tasks.fingerprint.send_modify(|fingerprint| {
        fingerprint.health = Health::Unhealthy;
        fingerprint.description = "the bus is gone".into();
    });
    let second = stream.message().await.unwrap().unwrap();
    assert_eq!(second.health(), HealthState::Unhealthy);
    assert_eq!(second.health_description, "the bus is gone");
    assert!(stays_open(&mut stream).await);
}

#[tokio::test]
async fn events_flow_and_never_end() {
    let served = serve().await;
    let mut stream: Streaming<wire::DriverTaskEvent> = served
        .client
        .stream(DRIVER, "TaskEvents", wire::TaskEventsRequest {})
        .await
        .unwrap();
    assert!(stays_open(&mut stream).await);
    served.tasks.events.send(event("throttled")).unwrap();
    let told = stream.message().await.unwrap().unwrap();
    assert_eq!(
        (told.message.as_str(), told.task_name.as_str()),
        ("throttled", "web")
    );
    assert!(told.timestamp.is_some());
    assert!(stays_open(&mut stream).await);
}

#[tokio::test]
async fn the_brokers_stream_is_held_open_whatever_is_said_in_it() {
    let served = serve().await;
    let mut broker: Streaming<ConnInfo> = served
        .client
        .talk(
            "/plugin.GRPCBroker",
            "StartStream",
            Some(ConnInfo::default()),
        )
        .await
        .unwrap();
    assert!(stays_open(&mut broker).await);
}

/// Each task holds a wait open as long as it lives, all on one connection; many servers stop at 100 or 200.
#[tokio::test]
async fn a_thousand_waiting_calls_leave_room_for_the_next_one() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    for _ in 0..1_000 {
        let client = served.client.clone();
        tokio::spawn(async move {
            let request = wire::WaitTaskRequest { task_id: ID.into() };
            let _: Result<wire::WaitTaskResponse, Status> =
                client.call(DRIVER, "WaitTask", request).await;
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let next = served.base("PluginInfo", base::PluginInfoRequest {});
    let answer: Result<base::PluginInfoResponse, Status> =
        tokio::time::timeout(Duration::from_secs(5), next)
            .await
            .unwrap();
    assert_eq!(answer.unwrap().name, "exec2");
}

#[tokio::test]
async fn shutdown_does_not_wait_for_tasks() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let client = served.client.clone();
    let waiting = tokio::spawn(async move {
        let request = wire::WaitTaskRequest { task_id: ID.into() };
        let _: Result<wire::WaitTaskResponse, Status> =
            client.call(DRIVER, "WaitTask", request).await;
    });
    let stats = wire::TaskStatsRequest {
        task_id: ID.into(),
        collection_interval: None,
    };
    let _stats: Streaming<wire::TaskStatsResponse> = served
        .client
        .stream(DRIVER, "TaskStats", stats)
        .await
        .unwrap();
    let _: Empty = served
        .client
        .call("/plugin.GRPCController", "Shutdown", Empty {})
        .await
        .unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(2), served.server).await;
    assert!(ended.is_ok());
    assert!(!waiting.is_finished());
}
