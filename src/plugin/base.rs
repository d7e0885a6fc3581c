//! What any Nomad plugin answers first: who it is, how it is configured, and its configuration.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use tracing::debug;

use super::{convert, errors, hclspec};
use crate::config::plugin::PluginConfig;
use crate::config::schema;
use crate::plan::capabilities;
use crate::plan::unveil;
use crate::proto::hashicorp::nomad::plugins::base::proto::base_plugin_server::BasePlugin;
use crate::proto::hashicorp::nomad::plugins::base::proto::{
    ConfigSchemaRequest, ConfigSchemaResponse, PluginInfoRequest, PluginInfoResponse, PluginType,
    SetConfigRequest, SetConfigResponse,
};
use crate::task::Tasks;

const NAME: &str = "exec2";
const API_VERSION: &str = "v0.1.0";
/// Not the release's number: of two plugins of one name Nomad takes the higher, and HashiCorp's says v2.0.0.
const VERSION: &str = "v2.1.0";

#[derive(Debug)]
pub struct Base<T> {
    pub tasks: Arc<T>,
}

#[tonic::async_trait]
impl<T: Tasks> BasePlugin for Base<T> {
    async fn plugin_info(
        &self,
        _: Request<PluginInfoRequest>,
    ) -> Result<Response<PluginInfoResponse>, Status> {
        Ok(Response::new(PluginInfoResponse {
            r#type: PluginType::Driver.into(),
            plugin_api_versions: vec![API_VERSION.into()],
            plugin_version: VERSION.into(),
            name: NAME.into(),
        }))
    }

    async fn config_schema(
        &self,
        _: Request<ConfigSchemaRequest>,
    ) -> Result<Response<ConfigSchemaResponse>, Status> {
        Ok(Response::new(ConfigSchemaResponse {
            spec: Some(hclspec::spec(schema::PLUGIN)),
        }))
    }

    async fn set_config(
        &self,
        request: Request<SetConfigRequest>,
    ) -> Result<Response<SetConfigResponse>, Status> {
        let request = request.into_inner();
        let config = PluginConfig::decode(&request.msgpack_config).map_err(failed)?;
        // A mistake of the operator's stops the agent's start, instead of every task later.
        unveil::check(&config.unveil_paths).map_err(failed)?;
        capabilities::check(&config.allow_caps).map_err(failed)?;
        // At its start the agent launches us three times while tasks of ours may run; only the instance that is told of
        // the driver's part is the real one, the others must touch nothing.
        if let Some(driver) = request.nomad_config.and_then(|nomad| nomad.driver) {
            let topology = driver.topology.map(convert::topology);
            debug!(?config, ?topology, "configured");
            let configured = self.tasks.configure(config, topology).await;
            configured.map_err(failed)?;
        }
        Ok(Response::new(SetConfigResponse {}))
    }
}

fn failed(error: impl std::fmt::Display) -> Status {
    errors::permanent(format!("SetConfig failed: {error}"))
}
