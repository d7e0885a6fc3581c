//! Whether a Nomad agent of this host would start the driver, and with a configuration that it takes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::findings::{self, Mode, Useless};
use super::plugin_dir::{self, Entry, Kind};
use super::report::Line;
use crate::agent::{AgentConfig, DEFAULT, Running};
use crate::config::plugin::PluginConfig;
use crate::job::JobError;
use crate::job::options;
use crate::plan::unveil::{self, ByTask, Defaults, Gate};
use crate::plan::{capabilities, steps::Source};

/// The name of the installed file, and so the block's label.
const LABEL: &str = "nomad-driver-exec2";
const DRIVER: &str = "exec2";

/// What is known of the agent.
#[derive(Debug)]
pub struct Agent {
    pub running: Vec<Running>,
    pub config: AgentConfig,
    /// Where the configuration was looked for.
    pub paths: Vec<PathBuf>,
}

impl Agent {
    /// `given` are the files that the caller names.
    pub fn read(given: &[PathBuf]) -> Self {
        let running = crate::agent::running();
        let arguments = running
            .first()
            .filter(|agent| agent.uid == 0)
            .map(|agent| agent.arguments.clone());
        let paths = match (given, &arguments) {
            ([], None) => vec![DEFAULT.into()],
            // Nomad reads no file that it is not told of.
            ([], Some(arguments)) => arguments.configs.clone(),
            (given, _) => given.to_vec(),
        };
        let mut config = AgentConfig::load(&paths);
        if given.is_empty()
            && let Some(arguments) = &arguments
        {
            config.overrule(arguments);
        }
        Self {
            running,
            config,
            paths,
        }
    }

    /// The label by which the agent's configuration has to name the driver: the name of its file.
    pub fn label(&self) -> String {
        let dir = self.config.plugin_dir();
        let entries = dir.and_then(|dir| plugin_dir::read(&dir).ok());
        label(&entries.unwrap_or_default())
    }

    /// What the plugin would be told, or why it would refuse it; the defaults without a block.
    pub fn plugin(&self, label: &str) -> Result<PluginConfig, String> {
        let Some(block) = self.config.plugins.get(label) else {
            return Ok(PluginConfig::default());
        };
        let failed = |error: JobError| {
            let (file, line) = (block.file.display(), error.line);
            format!("{file}:{line}: {}", error.message)
        };
        let config = options::plugin(&block.config, block.line).map_err(failed)?;
        let checked = unveil::check(&config.unveil_paths).map_err(|error| error.to_string());
        let checked = checked.and_then(|()| {
            capabilities::check(&config.allow_caps).map_err(|error| error.to_string())
        });
        checked.map_err(|sentence| {
            let line = options::line_of(&block.config, &sentence).unwrap_or(block.line);
            failed(JobError::new(line, sentence))
        })?;
        Ok(config)
    }

    pub fn lines(&self) -> Vec<Line> {
        let mut lines = vec![self.process()];
        lines.extend(self.files());
        if self.config.files.is_empty() && self.running.is_empty() {
            return lines;
        }
        lines.push(self.client());
        let entries = self.plugin_dir(&mut lines);
        self.block(&entries, &mut lines);
        lines
    }

    fn process(&self) -> Line {
        match self.running.as_slice() {
            [] => Line::warning(
                "agent",
                "no Nomad agent runs on this host; start it (systemctl start nomad)",
            ),
            [agent, ..] if agent.uid != 0 => Line::error(
                "agent",
                format!(
                    "process {} runs with uid {}; run the agent as root",
                    agent.pid, agent.uid
                ),
            ),
            [agent] => Line::ok("agent", format!("process {} runs as root", agent.pid)),
            [first, others @ ..] => Line::warning(
                "agent",
                format!(
                    "{} agents run on this host, and this is about process {}; name another one's configuration with --config",
                    others.len() + 1,
                    first.pid
                ),
            ),
        }
    }

    fn files(&self) -> Vec<Line> {
        let shown = |paths: &[PathBuf]| {
            let all: Vec<_> = paths
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            all.join(", ")
        };
        if self.paths.is_empty() {
            return vec![Line::ok("config", "the agent runs without -config")];
        }
        let mut lines = self.problems();
        match self.config.files.as_slice() {
            [] if lines.is_empty() => lines.push(Line::warning(
                "config",
                format!(
                    "{} has no configuration of an agent; name it with --config",
                    shown(&self.paths)
                ),
            )),
            [] => {}
            files => lines.push(Line::ok("config", shown(files))),
        }
        lines
    }

    /// What of the configuration could not be read.
    pub fn problems(&self) -> Vec<Line> {
        let is_default = self.paths == [Path::new(DEFAULT)];
        let is_absent =
            fs::metadata(DEFAULT).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if is_default && is_absent {
            return Vec::new();
        }
        let problems = self.config.problems.iter();
        problems
            .map(|problem| Line::error("config", format!("{problem}; see nomad config validate")))
            .collect()
    }

    fn client(&self) -> Line {
        if !self.config.is_client {
            return Line::error(
                "client",
                "the agent is no client, so that no task runs here; set client { enabled = true }",
            );
        }
        match self.config.allows(DRIVER) {
            Ok(()) => Line::ok("client", "the agent is a client"),
            Err(list) => Line::error(
                "client",
                format!("client.options {list} keeps the driver exec2 away; let it in there"),
            ),
        }
    }

    fn plugin_dir(&self, lines: &mut Vec<Line>) -> Vec<Entry> {
        let Some(dir) = self.config.plugin_dir() else {
            lines.push(Line::error(
                "plugin_dir",
                "neither plugin_dir nor data_dir is set, so that the agent has no plugins; set plugin_dir",
            ));
            return Vec::new();
        };
        match plugin_dir::read(&dir) {
            Ok(entries) => {
                let is_named = |label: &str| self.config.plugins.contains_key(label);
                lines.extend(plugin_dir::lines(&dir, &entries, is_named));
                entries
            }
            Err(error) => {
                lines.push(plugin_dir::unread(&dir, &error));
                Vec::new()
            }
        }
    }

    fn block(&self, entries: &[Entry], lines: &mut Vec<Line>) {
        let label = label(entries);
        let Some(block) = self.config.plugins.get(&label) else {
            let near = self
                .config
                .plugins
                .keys()
                .find(|name| name.contains(DRIVER));
            let sentence = match near {
                Some(near) => format!(
                    "plugin \"{near}\" names no file of the driver; the label is the file's name: plugin \"{label}\" {{ config {{}} }}"
                ),
                None => format!(
                    "the agent's configuration does not name the plugin, so that Nomad 1.10 and newer do not load it; add plugin \"{label}\" {{ config {{}} }}"
                ),
            };
            lines.push(Line::error("plugin", sentence));
            return;
        };
        let at = format!("{}:{}", block.file.display(), block.line);
        match self.plugin(&label) {
            Err(sentence) => lines.push(Line::error("plugin", sentence)),
            Ok(config) => {
                lines.push(Line::ok("plugin", format!("{at}: plugin \"{label}\"")));
                lines.extend(self.unveil_paths(&config));
            }
        }
    }

    /// What the operator opens to every task.
    fn unveil_paths(&self, config: &PluginConfig) -> Vec<Line> {
        let gate = Gate {
            paths: &config.unveil_paths,
            volumes: &[],
            defaults: if config.unveil_defaults {
                Defaults::Unveiled
            } else {
                Defaults::Veiled
            },
            by_task: ByTask::Allowed,
        };
        let Ok((rules, overruled)) = unveil::rules(gate, &[], &[]) else {
            return Vec::new();
        };
        let useless = match config.unveil_by_task {
            true => Useless::Untold,
            false => Useless::Told,
        };
        let mode = Mode::OfOperator(useless);
        let mut found = findings::of_rules(&rules, mode);
        found.extend(findings::of_overruled(&overruled, mode));
        let mut lines: Vec<Line> = found
            .into_iter()
            .filter(|finding| finding.source == Source::Plugin)
            .map(|finding| match finding.is_error {
                true => Line::error("unveil_paths", finding.sentence),
                false => Line::warning("unveil_paths", finding.sentence),
            })
            .collect();
        if lines.is_empty() && !config.unveil_paths.is_empty() {
            let all = config.unveil_paths.join(", ");
            lines.push(Line::ok("unveil_paths", all));
        }
        lines
    }
}

fn label(entries: &[Entry]) -> String {
    let ours = entries.iter().find(|entry| entry.kind == Kind::Ours);
    ours.map_or(LABEL.to_owned(), Entry::label)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::report::tests::told;
    use super::*;
    use crate::agent::PluginBlock;

    fn running(pid: u32, uid: u32) -> Running {
        Running {
            pid,
            uid,
            arguments: Default::default(),
            environment: Vec::new(),
        }
    }

    /// With this process as the installed driver.
    fn fit(dir: &Path) -> Agent {
        let block = PluginBlock {
            file: "/etc/agent.hcl".into(),
            line: 9,
            config: Vec::new(),
        };
        let config = AgentConfig {
            files: vec!["/etc/agent.hcl".into()],
            plugin_dir: Some(dir.to_owned()),
            is_client: true,
            plugins: [(LABEL.to_owned(), block)].into(),
            ..AgentConfig::default()
        };
        Agent {
            running: vec![running(7, 0)],
            config,
            paths: vec!["/etc/agent.hcl".into()],
        }
    }

    fn keep_away(agent: &mut Agent, list: &str, names: &str) {
        let options = &mut agent.config.options;
        options.insert(list.to_owned(), names.to_owned());
    }

    /// One fact apart from a fit agent, and the whole of what differs.
    #[test]
    fn what_is_wrong_with_an_agent_is_told_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/proc/self/exe", dir.path().join(LABEL)).unwrap();
        let ok = [
            "ok agent: process 7 runs as root".to_owned(),
            "ok config: /etc/agent.hcl".to_owned(),
            "ok client: the agent is a client".to_owned(),
            format!(
                "ok plugin_dir: {}/{LABEL} is this driver",
                dir.path().display()
            ),
            format!("ok plugin: /etc/agent.hcl:9: plugin \"{LABEL}\""),
        ];
        assert_eq!(told(&fit(dir.path()).lines()), ok);

        type Case = (fn(&mut Agent), &'static [&'static str]);
        let cases: &[Case] = &[
            (
                |agent| agent.running.clear(),
                &[
                    "warning agent: no Nomad agent runs on this host; start it (systemctl start nomad)",
                ],
            ),
            (
                |agent| agent.running = vec![running(7, 1000)],
                &["error agent: process 7 runs with uid 1000; run the agent as root"],
            ),
            (
                |agent| agent.running.extend([running(8, 0), running(9, 1000)]),
                &[
                    "warning agent: 3 agents run on this host, and this is about process 7; name another one's configuration with --config",
                ],
            ),
            (
                |agent| agent.paths.clear(),
                &["ok config: the agent runs without -config"],
            ),
            (
                |agent| agent.config.files.clear(),
                &[
                    "warning config: /etc/agent.hcl has no configuration of an agent; name it with --config",
                ],
            ),
            (
                |agent| agent.config.problems = vec!["/etc/b.hcl:3: a block has no end".into()],
                &["error config: /etc/b.hcl:3: a block has no end; see nomad config validate"],
            ),
            (
                |agent| agent.config.is_client = false,
                &[
                    "error client: the agent is no client, so that no task runs here; set client { enabled = true }",
                ],
            ),
            (
                |agent| keep_away(agent, "driver.denylist", "raw_exec, exec2"),
                &[
                    "error client: client.options driver.denylist keeps the driver exec2 away; let it in there",
                ],
            ),
            (
                |agent| keep_away(agent, "driver.allowlist", "docker"),
                &[
                    "error client: client.options driver.allowlist keeps the driver exec2 away; let it in there",
                ],
            ),
            (
                |agent| agent.config.plugin_dir = None,
                &[
                    "error plugin_dir: neither plugin_dir nor data_dir is set, so that the agent has no plugins; set plugin_dir",
                ],
            ),
            (
                |agent| agent.config.plugin_dir = Some("/no/such".into()),
                &[
                    "error plugin_dir: /no/such does not exist; make it and install nomad-driver-exec2 in it, or set plugin_dir",
                ],
            ),
            (
                |agent| agent.config.plugins.clear(),
                &[
                    "error plugin: the agent's configuration does not name the plugin, so that Nomad 1.10 and newer do not load it; add plugin \"nomad-driver-exec2\" { config {} }",
                ],
            ),
            (
                |agent| {
                    let block = agent.config.plugins.remove(LABEL).unwrap();
                    agent.config.plugins.insert(DRIVER.into(), block);
                },
                &[
                    "error plugin: plugin \"exec2\" names no file of the driver; the label is the file's name: plugin \"nomad-driver-exec2\" { config {} }",
                ],
            ),
        ];
        for (change, differs) in cases {
            let mut agent = fit(dir.path());
            change(&mut agent);
            let mut told = told(&agent.lines());
            told.retain(|line| !ok.contains(line));
            assert_eq!(told, *differs);
        }
    }

    #[test]
    fn where_there_is_no_agent_nothing_is_said_of_its_plugins() {
        let agent = Agent {
            running: Vec::new(),
            config: AgentConfig::default(),
            paths: vec!["/etc/agent".into()],
        };
        let names: Vec<_> = agent.lines().iter().map(|line| line.name).collect();
        assert_eq!(names, ["agent", "config"]);
    }
}
