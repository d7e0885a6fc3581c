//! What the plugin says of itself, its configuration, and what it does not do.

use std::time::Duration;

use tonic::{Code, Status};

use nomad_driver_exec2::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::base::proto as base;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::shared::hclspec;

use crate::served::serve;

fn attr(name: &str, kind: &str, required: bool) -> hclspec::Spec {
    hclspec::Spec {
        block: Some(hclspec::spec::Block::Attr(hclspec::Attr {
            name: name.into(),
            r#type: kind.into(),
            required,
        })),
    }
}

fn defaulted(name: &str, kind: &str, literal: &str) -> hclspec::Spec {
    let literal = hclspec::Literal {
        value: literal.into(),
    };
    hclspec::Spec {
        block: Some(hclspec::spec::Block::Default(Box::new(hclspec::Default {
            primary: Some(Box::new(attr(name, kind, false))),
            default: Some(Box::new(hclspec::Spec {
                block: Some(hclspec::spec::Block::Literal(literal)),
            })),
        }))),
    }
}

fn object<const N: usize>(attributes: [(&str, hclspec::Spec); N]) -> hclspec::Spec {
    let attributes = attributes.map(|(name, spec)| (name.to_string(), spec));
    hclspec::Spec {
        block: Some(hclspec::spec::Block::Object(hclspec::Object {
            attributes: attributes.into(),
        })),
    }
}

#[tokio::test]
async fn it_introduces_itself_as_a_newer_exec2() {
    let info: base::PluginInfoResponse = serve()
        .await
        .base("PluginInfo", base::PluginInfoRequest {})
        .await
        .unwrap();
    assert_eq!(info.name, "exec2");
    assert_eq!(info.r#type(), base::PluginType::Driver);
    assert_eq!(info.plugin_api_versions, ["v0.1.0"]);
    assert_eq!(info.plugin_version, "v2.1.0");
}

#[tokio::test]
async fn both_schemas_are_those_of_exec2() {
    let served = serve().await;
    let plugin: base::ConfigSchemaResponse = served
        .base("ConfigSchema", base::ConfigSchemaRequest {})
        .await
        .unwrap();
    let expected = object([
        (
            "unveil_defaults",
            defaulted("unveil_defaults", "bool", "true"),
        ),
        (
            "unveil_by_task",
            defaulted("unveil_by_task", "bool", "false"),
        ),
        ("unveil_paths", attr("unveil_paths", "list(string)", false)),
        ("allow_caps", attr("allow_caps", "list(string)", false)),
        // Keys of our own.
        (
            "allow_user_namespaces",
            defaulted("allow_user_namespaces", "bool", "false"),
        ),
        ("pids_max", defaulted("pids_max", "number", "16384")),
        ("signal_all", defaulted("signal_all", "bool", "false")),
        (
            "report_denials",
            defaulted("report_denials", "bool", "true"),
        ),
    ]);
    assert_eq!(plugin.spec, Some(expected));
    let task: wire::TaskConfigSchemaResponse = served
        .driver("TaskConfigSchema", wire::TaskConfigSchemaRequest {})
        .await
        .unwrap();
    let expected = object([
        ("command", attr("command", "string", true)),
        ("args", attr("args", "list(string)", false)),
        ("unveil", attr("unveil", "list(string)", false)),
        ("oom_score_adj", attr("oom_score_adj", "number", false)),
        ("work_dir", attr("work_dir", "string", false)),
        ("cap_add", attr("cap_add", "list(string)", false)),
        ("cap_drop", attr("cap_drop", "list(string)", false)),
    ]);
    assert_eq!(task.spec, Some(expected));
}

#[tokio::test]
async fn a_configuration_without_nomads_part_is_checked_and_not_taken() {
    let served = serve().await;
    let default = b"\x83\xaeunveil_by_task\xc2\xafunveil_defaults\xc3\xacunveil_paths\xc0";
    served.set_config(default, None).await.unwrap();
    served.set_config(b"", None).await.unwrap();
    assert!(served.tasks.configured.lock().unwrap().is_empty());
    let error = served.set_config(b"\xc1", None).await.unwrap_err();
    assert_eq!(error.code(), Code::Unknown);
    let sentence = error.message();
    assert!(
        sentence.starts_with("SetConfig failed: the block cannot be read"),
        "{sentence}"
    );
}

#[tokio::test]
async fn the_real_configuration_is_taken_with_the_nodes_cpus() {
    let served = serve().await;
    let core = base::ClientTopologyCore {
        core_id: 7,
        base_speed: 2_000,
        ..Default::default()
    };
    let topology = base::ClientTopology {
        cores: vec![core],
        ..Default::default()
    };
    let driver = base::NomadDriverConfig {
        topology: Some(topology),
        ..Default::default()
    };
    served
        .set_config(b"\x81\xaeunveil_by_task\xc3", Some(driver))
        .await
        .unwrap();
    served
        .set_config(b"", Some(base::NomadDriverConfig::default()))
        .await
        .unwrap();
    let configured = served.tasks.configured.lock().unwrap();
    let (config, topology) = &configured[0];
    assert!(config.unveil_by_task && config.unveil_defaults);
    assert_eq!(topology.as_ref().unwrap().compute.total_mhz, 2_000);
    assert_eq!(topology.as_ref().unwrap().usable_cpus, [7].into());
    assert!(configured[1].1.is_none());
}

#[tokio::test]
async fn it_can_what_it_says() {
    let answer: wire::CapabilitiesResponse = serve()
        .await
        .driver("Capabilities", wire::CapabilitiesRequest {})
        .await
        .unwrap();
    let capabilities = answer.capabilities.unwrap();
    assert!(capabilities.send_signals && capabilities.dynamic_workload_users);
    assert!(capabilities.exec && !capabilities.must_create_network);
    assert!(!capabilities.disable_log_collection);
    assert_eq!(capabilities.fs_isolation, 3);
    assert_eq!(capabilities.network_isolation_modes, [3, 0, 1]);
    // Any: with anything else Nomad refuses jobs with volumes.
    assert_eq!(capabilities.mount_configs, 0);
}

#[tokio::test]
async fn it_is_healthy_as_itself_and_unknown_as_another() {
    let served = serve().await;
    let health = "/grpc.health.v1.Health";
    let check = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    for service in ["", "plugin"] {
        let answer: HealthCheckResponse = served
            .client
            .call(health, "Check", check(service))
            .await
            .unwrap();
        assert_eq!(answer.status, 1);
    }
    let answer: Result<HealthCheckResponse, Status> =
        served.client.call(health, "Check", check("other")).await;
    assert_eq!(answer.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn what_it_does_not_do_is_said_in_the_words_nomads_users_know() {
    let served = serve().await;
    let create: Result<wire::CreateNetworkResponse, Status> = served
        .driver("CreateNetwork", wire::CreateNetworkRequest::default())
        .await;
    let destroy: Result<wire::DestroyNetworkResponse, Status> = served
        .driver("DestroyNetwork", wire::DestroyNetworkRequest::default())
        .await;
    for (error, words) in [
        (
            create.unwrap_err(),
            "CreateNetwork RPC not supported by driver",
        ),
        (
            destroy.unwrap_err(),
            "DestroyNetwork RPC not supported by driver",
        ),
    ] {
        assert_eq!((error.message(), error.code()), (words, Code::Unknown));
    }
}

#[tokio::test]
async fn newer_agents_may_announce_themselves_and_take_their_leave() {
    let served = serve().await;
    let _: wire::InitResponse = served.driver("Init", wire::InitRequest {}).await.unwrap();
    let _: wire::ShutdownResponse = served
        .driver("Shutdown", wire::ShutdownRequest {})
        .await
        .unwrap();
    assert!(!served.server.is_finished());
}

#[tokio::test]
async fn it_stops_serving_when_its_owner_says_so() {
    let served = serve().await;
    served.stop.notify_one();
    let ended = tokio::time::timeout(Duration::from_secs(2), served.server).await;
    assert!(ended.is_ok());
}
