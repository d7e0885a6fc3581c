//! What Nomad shows of this node's driver: whether it can run tasks, why not, and what jobs can constrain on.

use std::collections::BTreeMap;
use std::time::Duration;

use super::table::{Settings, TaskTable, lock};
use super::types::{Attribute, Fingerprint, Health};
use crate::audit::Audit;
use crate::host::{self, Fitness, Host};
use crate::plan::capabilities;

/// How often the host is looked at again. A lost bus is noticed at once; this is for what sends no word.
const INTERVAL: Duration = Duration::from_secs(15);
const INTERVAL_UNHEALTHY: Duration = Duration::from_secs(2);

impl TaskTable {
    /// Keeps the fingerprint true for as long as we live.
    pub(super) async fn watch_host(self) {
        loop {
            let is_healthy = self.shared.fingerprint.borrow().health == Health::Healthy;
            tokio::select! {
                () = tokio::time::sleep(if is_healthy { INTERVAL } else { INTERVAL_UNHEALTHY }) => {}
                () = self.shared.systemd.lost() => {}
            }
            self.refresh_fingerprint().await;
        }
    }

    pub(super) async fn refresh_fingerprint(&self) {
        let systemd = self
            .shared
            .systemd
            .version()
            .await
            .map_err(|error| error.to_string());
        if let Ok(version) = &systemd {
            *lock(&self.shared.grain) = host::quota_grain(version);
        }
        let mut host = Host::read();
        if self.is_deaf() {
            host.audit = host.audit.map(|_| Audit::Refused);
        }
        let fresh = fingerprint(&host, &systemd, &self.settings());
        self.shared.fingerprint.send_if_modified(|current| {
            let changed = *current != fresh;
            *current = fresh;
            changed
        });
    }
}

/// Until the agent has sent its configuration.
pub(super) fn unconfigured() -> Fingerprint {
    Fingerprint {
        health: Health::Undetected,
        description: "the agent has not configured the driver yet".into(),
        attributes: BTreeMap::new(),
    }
}

fn fingerprint(host: &Host, systemd: &Result<String, String>, settings: &Settings) -> Fingerprint {
    let (health, description) = match host.fitness(systemd) {
        Fitness::Fit => (Health::Healthy, "Healthy".to_owned()),
        Fitness::Unhealthy(reason) => (Health::Unhealthy, reason),
        Fitness::Undetected(reason) => (Health::Undetected, reason),
    };
    let abi = host.landlock_abi.map_or(0, i64::from);
    let attributes = BTreeMap::from([
        (
            "driver.exec2.unveil.defaults",
            Attribute::Bool(settings.config.unveil_defaults),
        ),
        (
            "driver.exec2.unveil.tasks",
            Attribute::Bool(settings.config.unveil_by_task),
        ),
        (
            "driver.exec2.caps.allowlist",
            Attribute::Text(capabilities::listed(&settings.config.allow_caps)),
        ),
        (
            "driver.exec2.version",
            Attribute::Text(env!("CARGO_PKG_VERSION").into()),
        ),
        ("driver.exec2.landlock.abi", Attribute::Integer(abi)),
        (
            "driver.exec2.denials",
            Attribute::Bool(settings.config.report_denials && host.denials_lack().is_none()),
        ),
        // An empty string takes back what an earlier fingerprint said.
        (
            "driver.exec2.systemd.version",
            Attribute::Text(systemd.clone().unwrap_or_default()),
        ),
        (
            "driver.exec2.degraded",
            Attribute::Text(host.degraded().join("; ")),
        ),
    ]);
    let attributes = attributes
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    Fingerprint {
        health,
        description,
        attributes,
    }
}
