//! The client held against messages recorded from a real agent (Nomad 2.0.6-dev, which ran the two jobs that lie beside them,
//! through `record-proxy`): what it sends for the same job must be the same, field by field and byte by byte.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nomad_driver_exec2::job::alloc_dir::TaskPaths;
use nomad_driver_exec2::job::environment::{Node, Placed};
use nomad_driver_exec2::job::request::Request;
use nomad_driver_exec2::job::{self, Job};
use prost::Message;

use super::allocation::task_config;
use super::proto::base::{ConfigSchemaResponse, SetConfigRequest};
use super::proto::driver::{
    DestroyTaskRequest, RecoverTaskRequest, StartTaskRequest, StartTaskResponse, StopTaskRequest,
    TaskConfig, TaskConfigSchemaResponse, TaskState, TaskStatsRequest, WaitTaskRequest,
};
use super::{Profile, encode, schema};

fn file(name: &str) -> Vec<u8> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nomad/recorded/nomad-2.0.6-dev");
    std::fs::read(dir.join(name)).unwrap()
}

fn message<M: Message + Default>(name: &str) -> M {
    M::decode(file(name).as_slice()).unwrap()
}

/// Decoding drops what `proto/` does not know, so a message that is as long when it is encoded again was known whole.
fn is_known<M: Message + Default>(name: &str) -> bool {
    message::<M>(name).encoded_len() == file(name).len()
}

#[test]
fn proto_knows_every_field_that_nomad_sends() {
    assert!(is_known::<SetConfigRequest>("set-config.bin"));
    assert!(is_known::<StartTaskRequest>("start-task-env.bin"));
    assert!(is_known::<StartTaskRequest>("start-task-service.bin"));
    assert!(is_known::<RecoverTaskRequest>("recover-task-service.bin"));
    assert!(is_known::<StopTaskRequest>("stop-task.bin"));
    assert!(is_known::<DestroyTaskRequest>("destroy-task.bin"));
    assert!(is_known::<TaskStatsRequest>("task-stats.bin"));
    assert!(is_known::<WaitTaskRequest>("wait-task.bin"));
}

#[test]
fn the_plugin_s_configuration_is_encoded_as_nomad_does() {
    let spec = message::<ConfigSchemaResponse>("config-schema-answer.bin")
        .spec
        .unwrap();
    let given = [
        ("unveil_by_task".to_owned(), hcl::Value::from(true)),
        (
            "unveil_paths".to_owned(),
            hcl::Value::from(vec!["r:/etc/mime.types"]),
        ),
    ];
    let ours = encode(&schema::decode(&spec, &given).unwrap(), Profile::Nomad);
    let validation: SetConfigRequest = message("set-config-validation.bin");
    let real: SetConfigRequest = message("set-config.bin");
    assert_eq!(validation.msgpack_config, ours);
    assert_eq!(validation.nomad_config, None);
    assert_eq!(real.msgpack_config, ours);
    assert!(
        real.nomad_config
            .unwrap()
            .driver
            .unwrap()
            .topology
            .is_some()
    );
}

/// What the client sends for the only task of a job, with the ids, paths and outside variables of a recorded request.
fn ours(job: &Job, recorded: &TaskConfig) -> TaskConfig {
    let group = &job.groups[0];
    let local = PathBuf::from(&recorded.env["NOMAD_TASK_DIR"]);
    let root = local.parent().unwrap().to_owned();
    let paths = TaskPaths {
        local,
        alloc: root.join("alloc"),
        secrets: root.join("secrets"),
        root,
        stdout: recorded.stdout_path.clone().into(),
        stderr: recorded.stderr_path.clone().into(),
    };
    let task = &group.tasks[0];
    let placed = Placed {
        job,
        group,
        task,
        alloc_id: &recorded.alloc_id,
        alloc_index: 0,
        cpu_mhz: task.resources.cpu_mhz,
        cpuset: "",
        paths: &paths,
        node: &Node::default(),
    };
    let outside = recorded
        .env
        .iter()
        .filter(|(name, _)| !name.starts_with("NOMAD_"));
    let outside: BTreeMap<_, _> = outside
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let alloc_dir = recorded.alloc_dir.clone().into();
    let request = Request::new(
        &placed,
        alloc_dir,
        recorded.user.clone(),
        &outside,
        &BTreeMap::new(),
    )
    .unwrap();

    let spec = message::<TaskConfigSchemaResponse>("task-config-schema-answer.bin")
        .spec
        .unwrap();
    let given: Vec<_> = request
        .config
        .iter()
        .map(|(key, setting)| (key.clone(), setting.value.clone()))
        .collect();
    let config = encode(&schema::decode(&spec, &given).unwrap(), Profile::Nomad);
    let cgroup = format!(
        "/sys/fs/cgroup/nomad.slice/share.slice/{}.{}.scope",
        recorded.alloc_id, task.name
    );
    // The node had two cores of 1000 MHz.
    let share = task.resources.cpu_mhz as f64 / 2000.0;
    TaskConfig {
        id: recorded.id.clone(),
        node_name: recorded.node_name.clone(),
        node_id: recorded.node_id.clone(),
        ..task_config(&request, config, cgroup, share)
    }
}

#[test]
fn a_start_is_asked_for_as_nomad_does() {
    for name in ["env", "service"] {
        let text = String::from_utf8(file(&format!("{name}.nomad.hcl"))).unwrap();
        let job = job::parse(&text, &[]).unwrap();
        let recorded: StartTaskRequest = message(&format!("start-task-{name}.bin"));
        let recorded = recorded.task.unwrap();
        assert_eq!(ours(&job, &recorded), recorded, "{name}");
    }
}

#[test]
fn a_recovery_after_a_restart_brings_the_handle_without_the_driver_s_configuration() {
    let started: StartTaskResponse = message("start-task-service-answer.bin");
    let mut kept = started.handle.unwrap();
    kept.config.as_mut().unwrap().msgpack_driver_config.clear();
    kept.state = TaskState::Running.into();
    let recorded: RecoverTaskRequest = message("recover-task-service.bin");
    assert_eq!(recorded.task_id, "");
    assert_eq!(recorded.handle.unwrap(), kept);
}
