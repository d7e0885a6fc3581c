//! What differs between the versions of Nomad towards a driver. Everything else is the same from 1.8 on.

use anyhow::{Result, ensure};

use super::Metrics;
use super::proto::driver::TaskConfig;

/// A version of Nomad whose agent the client plays: the latest of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V1_8,
    V1_10,
    V1_11,
    V2_0,
}

impl Version {
    pub const ALL: [Version; 4] = [Version::V1_8, Version::V1_10, Version::V1_11, Version::V2_0];

    /// Calls the driver's Init and Shutdown: since 2.0.4.
    pub fn announces_itself(self) -> bool {
        self >= Version::V2_0
    }

    /// Starts what lies in plugin_dir without a plugin block: up to 1.9.
    pub fn launches_unconfigured_plugins(self) -> bool {
        self < Version::V1_10
    }

    /// Before 1.10 every task is measured.
    pub fn asks_for_stats(self, metrics: Metrics) -> bool {
        self < Version::V1_10 || metrics == Metrics::Published
    }

    /// The community's 1.8 panics; fixed in 1.9.6.
    pub fn restores_dynamic_users(self) -> bool {
        self >= Version::V1_10
    }

    pub fn survives_a_wait_without_result(self) -> bool {
        self >= Version::V1_11
    }

    /// Words a request as this version does: its server refuses what it does not know, its wire leaves it out.
    pub(super) fn word(self, config: &mut TaskConfig) -> Result<()> {
        let memory = config
            .resources
            .as_ref()
            .and_then(|all| all.allocated_resources.as_ref()?.memory);
        ensure!(
            self >= Version::V1_11 || memory.is_none_or(|memory| memory.memory_max_mb >= 0),
            "MemoryMaxMB value (-1) should be larger than MemoryMB value"
        );
        if self < Version::V2_0 {
            for mount in &mut config.mounts {
                mount.request_name.clear();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::nomad::proto::driver::{
        AllocatedMemoryResources, AllocatedTaskResources, Mount, Resources,
    };

    fn unlimited() -> TaskConfig {
        let memory = AllocatedMemoryResources {
            memory_mb: 64,
            memory_max_mb: -1,
        };
        let allocated = AllocatedTaskResources {
            memory: Some(memory),
            ..AllocatedTaskResources::default()
        };
        TaskConfig {
            resources: Some(Resources {
                allocated_resources: Some(allocated),
                ..Resources::default()
            }),
            ..TaskConfig::default()
        }
    }

    #[test]
    fn memory_without_limit_is_a_mistake_before_1_11() {
        assert!(Version::V1_10.word(&mut unlimited()).is_err());
        assert!(Version::V1_11.word(&mut unlimited()).is_ok());
    }

    #[test]
    fn mounts_have_the_name_they_were_asked_by_since_2_0() {
        let named = || TaskConfig {
            mounts: vec![Mount {
                request_name: "data".into(),
                ..Mount::default()
            }],
            ..TaskConfig::default()
        };
        for (version, name) in [(Version::V1_11, ""), (Version::V2_0, "data")] {
            let mut config = named();
            version.word(&mut config).unwrap();
            assert_eq!(config.mounts[0].request_name, name, "{version:?}");
        }
    }
}
