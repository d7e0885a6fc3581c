//! The configuration of a real agent, from the template that stands beside the jobs, and its unit. Reads the machine's routes.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::RealConfig;

/// The name of the file in plugin_dir, which is the label of the plugin block as well.
pub(super) const PLUGIN: &str = "nomad-driver-exec2";
const TEMPLATE: &str = include_str!("../../../../nomad/agent.hcl");

pub(super) fn agent_hcl(config: &RealConfig, data: &Path) -> Result<String> {
    let args: Vec<_> = config
        .plugin_args
        .iter()
        .map(|arg| json!(arg).to_string())
        .collect();
    let compute = config
        .total_compute_mhz
        .map_or(String::new(), |mhz| format!("cpu_total_compute = {mhz}"));
    let (data, plugins) = match &config.data_dir {
        Some(dir) => (dir.clone(), dir.join("plugins")),
        None => (data.join("data"), data.join("plugins")),
    };
    // Without one the agent would look for Consul at its usual address again and again.
    let (denied, consul) = match &config.consul {
        Some(address) => ("", consul_block(*address)),
        None => ("consul,", String::new()),
    };
    let template = match &config.plugin_block {
        Some(block) => with_block(block)?,
        None => TEMPLATE.to_owned(),
    };
    let filled = template
        .replace("@DATA@", &data.to_string_lossy())
        .replace("@PLUGINS@", &plugins.to_string_lossy())
        .replace("@HTTP@", &config.port.to_string())
        .replace("@RPC@", &(config.port + 1).to_string())
        .replace("@SERF@", &(config.port + 2).to_string())
        .replace("@INTERFACE@", &interface())
        .replace("@COMPUTE@", &compute)
        .replace("@CLIENT@", &config.client)
        .replace("@DENIED@", denied)
        .replace("@CONSUL@", &consul)
        .replace("@ARGS@", &args.join(", "))
        .replace("@PLUGIN@", &config.plugin_config);
    Ok(filled)
}

/// The template with another plugin block.
fn with_block(block: &str) -> Result<String> {
    let (before, rest) = TEMPLATE.split_once("\nplugin ").context("a block")?;
    let (_, after) = rest.split_once("\n}\n").context("its end")?;
    Ok(format!("{before}\n{block}\n{after}"))
}

/// For the services of jobs alone: the agent neither looks for servers there nor registers itself.
fn consul_block(address: SocketAddr) -> String {
    format!(
        "consul {{\n  address = \"{address}\"\n  auto_advertise = false\n  client_auto_join = false\n  server_auto_join = false\n}}"
    )
}

/// A unit as Nomad's packages have it. No transient one: the agent's logmons stay behind in its cgroup, and its name would not
/// be free for the next start.
pub(super) fn unit(nomad: &Path, hcl: &Path, log: &Path, env: &[(String, String)]) -> String {
    let env = env
        .iter()
        .map(|(name, value)| format!("Environment={name}={value}\n"));
    let env: String = env.collect();
    format!(
        "[Service]\nType=notify\nExecStart={nomad} agent -config {hcl}\nKillMode=process\nKillSignal=SIGINT\n\
         LimitNOFILE=65536\nLimitNPROC=infinity\nOOMScoreAdjust=-1000\nTasksMax=infinity\n\
         StandardOutput=append:{log}\nStandardError=append:{log}\n{env}",
        nomad = nomad.display(),
        hcl = hcl.display(),
        log = log.display(),
    )
}

/// The interface of the default route, or loopback.
fn interface() -> String {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let default = routes.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let name = fields.next()?;
        (fields.next()? == "00000000").then(|| name.to_owned())
    });
    default.unwrap_or_else(|| "lo".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_agent_s_configuration_is_filled_in() -> Result<()> {
        let config = RealConfig {
            plugin_args: vec!["--fault".into()],
            total_compute_mhz: Some(2000),
            consul: Some(([127, 0, 0, 1], 8500).into()),
            ..RealConfig::new("/usr/bin/nomad", "/usr/lib/plugin")
        };
        let text = agent_hcl(&config, Path::new("/opt/n"))?;
        assert!(
            text.lines()
                .all(|line| line.starts_with('#') || !line.contains('@')),
            "{text}"
        );
        assert!(
            text.contains("cpu_total_compute = 2000") && text.contains(r#"args = ["--fault"]"#)
        );
        assert!(text.contains("address = \"127.0.0.1:8500\""), "{text}");
        assert!(!text.contains("digitalocean,consul"), "{text}");
        let _: hcl::Body = hcl::from_str(&text)?;
        Ok(())
    }

    #[test]
    fn a_plugin_block_of_somebodys_own_is_the_only_one() -> Result<()> {
        let block = "plugin \"nomad-driver-exec2\" {\n  config {}\n}\n";
        let config = RealConfig {
            plugin_block: Some(block.into()),
            ..RealConfig::new("/usr/bin/nomad", "/usr/lib/plugin")
        };
        let text = agent_hcl(&config, Path::new("/opt/n"))?;
        assert!(text.contains(block), "{text}");
        let body: hcl::Body = hcl::from_str(&text)?;
        let names: Vec<_> = body.blocks().map(|block| block.identifier()).collect();
        assert_eq!(names.iter().filter(|name| **name == "plugin").count(), 1);
        assert_eq!(names.last(), Some(&"ui"));
        Ok(())
    }
}
