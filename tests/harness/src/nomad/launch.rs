//! The launches of the plugin at an agent's start: two instances that are only looked at, and one that stays.

use std::sync::PoisonError;

use anyhow::{Context, Result, bail};

use super::agent::{Release, Shared};
use super::process::Process;
use super::proto::base::{
    ClientTopology, ClientTopologyCore, ClientTopologySlit, ConfigSchemaRequest, NomadConfig,
    NomadDriverConfig, PluginInfoRequest, PluginInfoResponse, PluginType, SetConfigRequest,
};
use super::proto::driver::InitRequest;
use super::{Connection, Violations, encode, schema};

const API_VERSION: &str = "v0.1.0";

impl Shared {
    async fn process(&self) -> Result<Process> {
        let (args, env) = (&self.config.args, &self.config.env);
        Process::start(
            &self.binary,
            args,
            env,
            self.log.clone(),
            self.violations.clone(),
        )
        .await
    }

    /// The two instances that only look: one tells name and schema, one validates the configuration.
    pub async fn load(&self) -> Result<()> {
        let process = self.process().await?;
        let connection = Connection::open(&process.socket, self.violations.clone()).await?;
        info(&connection, &self.violations).await?;
        let config = self.plugin_config(&connection).await;
        process.shut_down(&connection).await?;
        *self
            .plugin_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = config?;

        let process = self.process().await?;
        let connection = Connection::open(&process.socket, self.violations.clone()).await?;
        let mut validated = Ok(());
        for _ in 0..2 {
            validated = validated.and(self.set_config(&connection, self.set_bytes(), None).await);
        }
        process.shut_down(&connection).await?;
        validated
    }

    /// The instance that stays.
    pub async fn launch(&self) -> Result<()> {
        let process = self.process().await?;
        let connection = Connection::open(&process.socket, self.violations.clone()).await?;
        let driver = NomadDriverConfig {
            client_max_port: 14512,
            client_min_port: 14000,
            topology: Some(self.topology()),
        };
        self.set_config(
            &connection,
            self.set_bytes(),
            Some(NomadConfig {
                driver: Some(driver),
            }),
        )
        .await?;
        *self.plugin.lock().await = Some(process);
        self.adopt(connection).await
    }

    pub async fn adopt(&self, connection: Connection) -> Result<()> {
        if self.config.release == Release::Nomad2_0 {
            let init = connection.driver().init(InitRequest {}).await;
            init.map_err(|status| self.violations.status("Init", status))?;
        }
        connection.hold_driver_streams().await?;
        *self
            .connection
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(())
    }

    fn set_bytes(&self) -> Vec<u8> {
        self.plugin_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Asks for the schema and encodes the operator's configuration by it.
    async fn plugin_config(&self, connection: &Connection) -> Result<Vec<u8>> {
        let answer = connection
            .base()
            .config_schema(ConfigSchemaRequest {})
            .await;
        let answer = answer.map_err(|status| self.violations.status("ConfigSchema", status))?;
        let spec = answer
            .into_inner()
            .spec
            .context("ConfigSchema without a spec")?;
        let given: hcl::Map<String, hcl::Value> = hcl::from_str(&self.config.plugin)?;
        let given: Vec<_> = given.into_iter().collect();
        let values = schema::decode(&spec, &given).context("parsing plugin configuration")?;
        Ok(encode(&values, self.config.profile))
    }

    async fn set_config(
        &self,
        connection: &Connection,
        config: Vec<u8>,
        nomad: Option<NomadConfig>,
    ) -> Result<()> {
        let request = SetConfigRequest {
            msgpack_config: config,
            nomad_config: nomad,
            plugin_api_version: API_VERSION.into(),
        };
        let answer = connection.base().set_config(request).await;
        answer.map_err(|status| self.violations.status("SetConfig", status))?;
        Ok(())
    }

    fn topology(&self) -> ClientTopology {
        let core = |core_id: &u32| ClientTopologyCore {
            core_id: *core_id,
            base_speed: self.config.core_mhz,
            disable: !self.cgroups.usable().contains(core_id),
            ..ClientTopologyCore::default()
        };
        ClientTopology {
            node_ids: vec![0],
            // A machine without NUMA has none; the message is there all the same.
            distances: Some(ClientTopologySlit::default()),
            cores: self.cgroups.online().iter().map(core).collect(),
            override_total_compute: 0,
            override_withold_compute: 0,
        }
    }
}

/// PluginInfo, and what Nomad's loader asks of the answer.
pub(super) async fn info(
    connection: &Connection,
    violations: &Violations,
) -> Result<PluginInfoResponse> {
    let answer = connection.base().plugin_info(PluginInfoRequest {}).await;
    let answer = answer
        .map_err(|status| violations.status("PluginInfo", status))?
        .into_inner();
    let version = answer.plugin_version.trim_start_matches('v');
    let is_version = version
        .split('.')
        .take(3)
        .all(|part| part.parse::<u32>().is_ok());
    if answer.r#type != i32::from(PluginType::Driver)
        || !answer
            .plugin_api_versions
            .iter()
            .any(|version| version == API_VERSION)
        || answer.name.is_empty()
        || !is_version
    {
        bail!("Nomad does not take this plugin: {answer:?}");
    }
    Ok(answer)
}
