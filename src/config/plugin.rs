//! The operator's settings, from the plugin's `config` block.

use serde::Deserialize;

use super::decode::{self, ConfigError};
use super::schema;

/// One field per row of `schema::PLUGIN`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PluginConfig {
    pub unveil_defaults: bool,
    pub unveil_paths: Vec<String>,
    pub unveil_by_task: bool,
    pub allow_caps: Vec<String>,
    pub allow_user_namespaces: bool,
    pub pids_max: u32,
    pub signal_all: bool,
    pub report_denials: bool,
}

impl Default for PluginConfig {
    /// What an empty block means.
    fn default() -> Self {
        Self {
            unveil_defaults: true,
            unveil_paths: Vec::new(),
            unveil_by_task: false,
            allow_caps: Vec::new(),
            allow_user_namespaces: false,
            pids_max: 16_384,
            signal_all: false,
            report_denials: true,
        }
    }
}

impl PluginConfig {
    /// No bytes at all is an empty block.
    pub fn decode(msgpack: &[u8]) -> Result<Self, ConfigError> {
        decode::block(msgpack, schema::PLUGIN)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// What Nomad sends for an empty block.
    const DEFAULT: &[u8] = b"\x83\xaeunveil_by_task\xc2\xafunveil_defaults\xc3\xacunveil_paths\xc0";

    #[test]
    fn an_empty_block_means_the_defaults() {
        for bytes in [DEFAULT, b"", b"\x80", b"\xc0"] {
            assert_eq!(
                PluginConfig::decode(bytes).unwrap(),
                PluginConfig::default(),
                "{bytes:x?}"
            );
        }
    }

    #[test]
    fn a_key_that_is_nil_means_its_default() {
        let bytes = b"\x82\xafunveil_defaults\xc0\xaeunveil_by_task\xc0";
        assert_eq!(
            PluginConfig::decode(bytes).unwrap(),
            PluginConfig::default()
        );
    }

    #[test]
    fn settings_are_taken() {
        let bytes =
            b"\x83\xaeunveil_by_task\xc3\xafunveil_defaults\xc2\xacunveil_paths\x91\xabr:/etc/mime";
        let config = PluginConfig::decode(bytes).unwrap();
        assert!(config.unveil_by_task && !config.unveil_defaults);
        assert_eq!(config.unveil_paths, ["r:/etc/mime"]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>()) {
            let _ = PluginConfig::decode(&bytes);
        }

        #[test]
        fn no_change_to_real_bytes_makes_it_panic(at in 0..DEFAULT.len(), byte in any::<u8>(), end in 0..DEFAULT.len()) {
            let mut bytes = DEFAULT.to_vec();
            bytes[at] = byte;
            let _ = PluginConfig::decode(&bytes);
            bytes.truncate(end);
            let _ = PluginConfig::decode(&bytes);
        }
    }
}
