//! Between the wire and our own terms. Nomad dereferences sub-messages without looking, so each one that it reads is
//! set here, even when empty.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;

use crate::config::task::TaskOptions;
use crate::proto::hashicorp::nomad::plugins::base::proto::{ClientTopology, ClientTopologyCore};
use crate::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use crate::proto::hashicorp::nomad::plugins::drivers::proto::network_isolation_spec::NetworkIsolationMode;
use crate::proto::hashicorp::nomad::plugins::shared::structs;
use crate::task::types::{
    Attribute, Compute, CpuUsage, Device, Dns, ExitResult, Fingerprint, Health, Hosts, MemoryMax,
    MemoryUsage, Mount, MountMode, Names, Resources, TaskEvent, TaskId, TaskRequest, TaskState,
    TaskStatus, Topology, Usage,
};

/// Go's zero time. An absent timestamp is an error to Nomad.
const NEVER: Timestamp = Timestamp {
    seconds: -62_135_596_800,
    nanos: 0,
};

pub fn topology(told: ClientTopology) -> Topology {
    let mhz = |core: &ClientTopologyCore| {
        [core.base_speed, core.max_speed, core.guess_speed]
            .into_iter()
            .find(|mhz| *mhz > 0)
            .unwrap_or(0)
    };
    let total_mhz = match told.override_total_compute {
        0 => told.cores.iter().map(mhz).fold(0, u64::saturating_add),
        told => told,
    };
    Topology {
        compute: Compute {
            total_mhz,
            cores: told.cores.len() as u64,
        },
        usable_cpus: told
            .cores
            .iter()
            .filter(|core| !core.disable)
            .filter_map(|core| u16::try_from(core.core_id).ok())
            .collect(),
    }
}

pub fn request(task: wire::TaskConfig, options: TaskOptions) -> TaskRequest {
    let resources = task.resources.unwrap_or_default();
    let linux = resources.linux_resources.unwrap_or_default();
    TaskRequest {
        id: TaskId::new(task.id),
        options,
        names: Names {
            task: task.name,
            group: task.task_group_name,
            job: task.job_name,
            job_id: task.job_id,
            alloc_id: task.alloc_id,
            namespace: task.namespace,
            node: task.node_name,
            node_id: task.node_id,
        },
        env: task.env.into_iter().collect(),
        device_env: task.device_env.into_iter().collect(),
        user: task.user,
        alloc_dir: task.alloc_dir.into(),
        stdout_path: task.stdout_path.into(),
        stderr_path: task.stderr_path.into(),
        nomad_cgroup: linux.cpuset_cgroup.into(),
        resources: limits(
            resources.allocated_resources.unwrap_or_default(),
            linux.cpuset_cpus,
        ),
        hosts: task
            .network_isolation_spec
            .as_ref()
            .and_then(|spec| spec.hosts_config.as_ref())
            .map(|hosts| Hosts {
                hostname: hosts.hostname.clone(),
                address: hosts.address.clone(),
            }),
        network_namespace: task
            .network_isolation_spec
            .filter(|spec| spec.mode() != NetworkIsolationMode::Host)
            .map(|spec| spec.path.into()),
        dns: task.dns.map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        mounts: task.mounts.into_iter().map(mount).collect(),
        devices: task.devices.into_iter().map(device).collect(),
    }
}

fn limits(allocated: wire::AllocatedTaskResources, cpuset: String) -> Resources {
    let memory = allocated.memory.unwrap_or_default();
    let amount = |value: i64| u64::try_from(value).unwrap_or(0);
    Resources {
        cpu_mhz: amount(allocated.cpu.unwrap_or_default().cpu_shares),
        memory_mib: amount(memory.memory_mb),
        memory_max_mib: match memory.memory_max_mb {
            0 => MemoryMax::Unset,
            max => u64::try_from(max).map_or(MemoryMax::Unlimited, MemoryMax::Mib),
        },
        cpuset,
    }
}

fn mount(mount: wire::Mount) -> Mount {
    Mount {
        task_path: mount.task_path.into(),
        host_path: mount.host_path.into(),
        mode: if mount.readonly {
            MountMode::ReadOnly
        } else {
            MountMode::ReadWrite
        },
        propagation: mount.propagation_mode,
        selinux_label: mount.selinux_label,
    }
}

fn device(device: wire::Device) -> Device {
    Device {
        task_path: device.task_path.into(),
        host_path: device.host_path.into(),
        cgroup_permissions: device.cgroup_permissions,
    }
}

pub fn duration(told: Option<prost_types::Duration>) -> Duration {
    told.and_then(|told| told.try_into().ok())
        .unwrap_or_default()
}

fn timestamp(at: Option<SystemTime>) -> Option<Timestamp> {
    Some(at.map_or(NEVER, Timestamp::from))
}

pub fn exit_result(exit: &ExitResult) -> wire::ExitResult {
    wire::ExitResult {
        exit_code: exit.code,
        signal: exit.signal,
        oom_killed: exit.oom_killed,
    }
}

pub fn inspection(status: TaskStatus) -> wire::InspectTaskResponse {
    let state = match status.state {
        TaskState::Unknown => wire::TaskState::Unknown,
        TaskState::Running => wire::TaskState::Running,
        TaskState::Exited => wire::TaskState::Exited,
    };
    wire::InspectTaskResponse {
        task: Some(wire::TaskStatus {
            id: status.id.to_string(),
            name: status.name,
            state: state.into(),
            started_at: timestamp(status.started_at),
            completed_at: timestamp(status.completed_at),
            result: Some(exit_result(&status.exit.unwrap_or_default())),
        }),
        driver: Some(wire::TaskDriverStatus {
            attributes: status.attributes.into_iter().collect(),
        }),
        network_override: None,
    }
}

pub fn fingerprint(fingerprint: &Fingerprint) -> wire::FingerprintResponse {
    use wire::fingerprint_response::HealthState;
    let health = match fingerprint.health {
        Health::Undetected => HealthState::Undetected,
        Health::Unhealthy => HealthState::Unhealthy,
        Health::Healthy => HealthState::Healthy,
    };
    wire::FingerprintResponse {
        attributes: fingerprint
            .attributes
            .iter()
            .map(|(name, value)| (name.clone(), attribute(value)))
            .collect(),
        health: health.into(),
        health_description: fingerprint.description.clone(),
        err: String::new(),
    }
}

fn attribute(value: &Attribute) -> structs::Attribute {
    use structs::attribute::Value;
    structs::Attribute {
        value: Some(match value {
            Attribute::Bool(value) => Value::BoolVal(*value),
            Attribute::Integer(value) => Value::IntVal(*value),
            Attribute::Text(value) => Value::StringVal(value.clone()),
        }),
        unit: String::new(),
    }
}

pub fn event(event: TaskEvent) -> wire::DriverTaskEvent {
    wire::DriverTaskEvent {
        task_id: event.task_id.to_string(),
        alloc_id: event.alloc_id,
        task_name: event.task_name,
        timestamp: timestamp(Some(event.at)),
        message: event.message,
        annotations: event.annotations.into_iter().collect(),
    }
}

pub fn stats(id: &TaskId, usage: &Usage) -> wire::TaskStatsResponse {
    wire::TaskStatsResponse {
        stats: Some(wire::TaskStats {
            id: id.to_string(),
            timestamp: timestamp(Some(usage.at)),
            agg_resource_usage: Some(wire::TaskResourceUsage {
                cpu: Some(cpu(&usage.cpu)),
                memory: Some(memory(&usage.memory)),
            }),
            resource_usage_by_pid: HashMap::new(),
        }),
    }
}

fn cpu(used: &CpuUsage) -> wire::CpuUsage {
    use wire::cpu_usage::Fields;
    let measured = [
        (Fields::SystemMode, used.system_percent.is_some()),
        (Fields::UserMode, used.user_percent.is_some()),
        (Fields::TotalTicks, used.total_mhz.is_some()),
        (Fields::ThrottledPeriods, used.throttled_periods.is_some()),
        (Fields::ThrottledTime, used.throttled_nanos.is_some()),
        (Fields::Percent, used.percent.is_some()),
    ];
    wire::CpuUsage {
        system_mode: used.system_percent.unwrap_or(0.0),
        user_mode: used.user_percent.unwrap_or(0.0),
        total_ticks: used.total_mhz.unwrap_or(0.0),
        throttled_periods: used.throttled_periods.unwrap_or(0),
        throttled_time: used.throttled_nanos.unwrap_or(0),
        percent: used.percent.unwrap_or(0.0),
        measured_fields: known(measured),
    }
}

fn memory(used: &MemoryUsage) -> wire::MemoryUsage {
    use wire::memory_usage::Fields;
    let measured = [
        (Fields::Rss, used.rss_bytes.is_some()),
        (Fields::Cache, used.cache_bytes.is_some()),
        (Fields::MaxUsage, used.max_usage_bytes.is_some()),
        (Fields::KernelUsage, used.kernel_usage_bytes.is_some()),
        (
            Fields::KernelMaxUsage,
            used.kernel_max_usage_bytes.is_some(),
        ),
        (Fields::Swap, used.swap_bytes.is_some()),
        (Fields::Usage, used.usage_bytes.is_some()),
    ];
    wire::MemoryUsage {
        rss: used.rss_bytes.unwrap_or(0),
        cache: used.cache_bytes.unwrap_or(0),
        max_usage: used.max_usage_bytes.unwrap_or(0),
        kernel_usage: used.kernel_usage_bytes.unwrap_or(0),
        kernel_max_usage: used.kernel_max_usage_bytes.unwrap_or(0),
        measured_fields: known(measured),
        usage: used.usage_bytes.unwrap_or(0),
        swap: used.swap_bytes.unwrap_or(0),
    }
}

fn known<F: Into<i32>, const N: usize>(fields: [(F, bool); N]) -> Vec<i32> {
    fields
        .into_iter()
        .filter(|(_, measured)| *measured)
        .map(|(field, _)| field.into())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn core(core_id: u32, speeds: (u64, u64, u64), disable: bool) -> ClientTopologyCore {
        ClientTopologyCore {
            core_id,
            base_speed: speeds.0,
            max_speed: speeds.1,
            guess_speed: speeds.2,
            disable,
            ..Default::default()
        }
    }

    #[test]
    fn compute_counts_disabled_cores_and_the_first_known_speed() {
        let told = ClientTopology {
            cores: vec![
                core(0, (1_000, 2_000, 3_000), false),
                core(1, (0, 2_000, 3_000), true),
                core(2, (0, 0, 3_000), false),
            ],
            ..Default::default()
        };
        let topology = topology(told);
        assert_eq!(topology.compute.total_mhz, 6_000);
        assert_eq!(topology.compute.cores, 3);
        assert_eq!(topology.usable_cpus, [0, 2].into());
    }

    #[test]
    fn the_operators_total_replaces_the_sum() {
        let told = ClientTopology {
            cores: vec![core(0, (u64::MAX, 0, 0), false); 2],
            override_total_compute: 4_000,
            ..Default::default()
        };
        assert_eq!(topology(told.clone()).compute.total_mhz, 4_000);
        let summed = ClientTopology {
            override_total_compute: 0,
            ..told
        };
        assert_eq!(topology(summed).compute.total_mhz, u64::MAX);
    }

    #[test]
    fn memory_max_is_unset_a_size_or_unlimited() {
        let max = |memory_max_mb| {
            let memory = Some(wire::AllocatedMemoryResources {
                memory_mb: 64,
                memory_max_mb,
            });
            let allocated = wire::AllocatedTaskResources {
                memory,
                ..Default::default()
            };
            limits(allocated, String::new()).memory_max_mib
        };
        assert_eq!(max(0), MemoryMax::Unset);
        assert_eq!(max(128), MemoryMax::Mib(128));
        assert_eq!(max(-1), MemoryMax::Unlimited);
    }

    #[test]
    fn a_duration_that_is_absent_or_negative_is_zero() {
        assert_eq!(duration(None), Duration::ZERO);
        let negative = prost_types::Duration {
            seconds: -5,
            nanos: 0,
        };
        assert_eq!(duration(Some(negative)), Duration::ZERO);
    }
}
