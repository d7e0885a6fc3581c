//! A Nomad agent's configuration, as far as it is about this driver: its files as Nomad loads and merges them, and the
//! arguments of an agent that runs. Looks, and changes nothing.

pub mod hcl1;
mod process;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use self::hcl1::{Entry, Node};
use crate::job::{MAX_FILE_BYTES, Setting, Value};
pub use process::{Arguments, Running, running};

/// Should another file have taken its place after it was looked at.
const O_NONBLOCK: i32 = nix::fcntl::OFlag::O_NONBLOCK.bits();
/// Where Nomad's packages keep it.
pub const DEFAULT: &str = "/etc/nomad.d";

/// What the files and arguments say, the later ones over the earlier.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AgentConfig {
    /// What was read, in order.
    pub files: Vec<PathBuf>,
    /// What could not be, as sentences.
    pub problems: Vec<String>,
    pub data_dir: Option<PathBuf>,
    pub plugin_dir: Option<PathBuf>,
    pub is_client: bool,
    /// Where allocations and tasks' directories are, if not below `data_dir`.
    pub alloc_dir: Option<PathBuf>,
    pub alloc_mounts_dir: Option<PathBuf>,
    /// MHz, if the operator says so.
    pub cpu_total_compute: Option<u64>,
    /// `client.options`.
    pub options: BTreeMap<String, String>,
    /// The directories behind `client.host_volume`.
    pub host_volumes: BTreeMap<String, PathBuf>,
    /// The plugin blocks by label.
    pub plugins: BTreeMap<String, PluginBlock>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PluginBlock {
    pub file: PathBuf,
    pub line: usize,
    pub config: Vec<(String, Setting)>,
}

impl AgentConfig {
    /// Reads files, and directories of files, in the order given.
    pub fn load(paths: &[PathBuf]) -> Self {
        let mut config = Self::default();
        for path in paths {
            match files(path) {
                Ok(files) => {
                    for file in files {
                        match read(&file) {
                            Ok(entries) => config.take(&file, entries),
                            Err(problem) => config.problems.push(problem),
                        }
                    }
                }
                Err(error) => config.problems.push(format!("{}: {error}", path.display())),
            }
        }
        config
    }

    /// What the agent's own arguments say wins over its files.
    pub fn overrule(&mut self, arguments: &Arguments) {
        let Arguments {
            data_dir,
            plugin_dir,
            is_client,
            ..
        } = arguments;
        self.data_dir = data_dir.clone().or(self.data_dir.take());
        self.plugin_dir = plugin_dir.clone().or(self.plugin_dir.take());
        self.is_client |= is_client;
    }

    /// Where the agent looks for plugins; `None` if nothing tells.
    pub fn plugin_dir(&self) -> Option<PathBuf> {
        let below_data = || Some(self.data_dir.as_ref()?.join("plugins"));
        self.plugin_dir.clone().or_else(below_data)
    }

    /// Nomad's `alloc` and `alloc_mounts`.
    pub fn alloc_dirs(&self) -> (PathBuf, PathBuf) {
        let data = self.data_dir.clone();
        let data = data.unwrap_or_else(|| "/opt/nomad/data".into());
        // The mounts are beside the data, which tasks' users may not pass.
        let mounts = data.parent().unwrap_or(&data).join("alloc_mounts");
        (
            self.alloc_dir.clone().unwrap_or_else(|| data.join("alloc")),
            self.alloc_mounts_dir.clone().unwrap_or(mounts),
        )
    }

    /// Whether `driver.allowlist` and `driver.denylist` let the driver be, or which of them does not.
    pub fn allows(&self, driver: &str) -> Result<(), &'static str> {
        let names = |key: &str| {
            let list = self.options.get(key).filter(|list| !list.trim().is_empty());
            list.map(|list| list.split(',').any(|name| name.trim() == driver))
        };
        if names("driver.allowlist") == Some(false) {
            return Err("driver.allowlist");
        }
        match names("driver.denylist") {
            Some(true) => Err("driver.denylist"),
            _ => Ok(()),
        }
    }

    fn take(&mut self, file: &Path, entries: Vec<Entry>) {
        self.files.push(file.to_owned());
        for Entry { key, node, .. } in entries {
            match (key.as_str(), node) {
                ("data_dir", node) => set(&mut self.data_dir, node),
                ("plugin_dir", node) => set(&mut self.plugin_dir, node),
                ("client", Node::Tree(entries)) => self.client(entries),
                ("plugin", Node::Tree(blocks)) => {
                    for Entry { key, line, node } in blocks {
                        let Node::Tree(entries) = node else { continue };
                        let block = PluginBlock {
                            file: file.to_owned(),
                            line,
                            config: settings(entries),
                        };
                        self.plugin(key, block);
                    }
                }
                _ => {}
            }
        }
    }

    /// Of two blocks with one label the later one's `config` counts, if it has any.
    fn plugin(&mut self, label: String, mut block: PluginBlock) {
        if let Some(earlier) = self.plugins.remove(&label)
            && block.config.is_empty()
        {
            block = earlier;
        }
        self.plugins.insert(label, block);
    }

    fn client(&mut self, entries: Vec<Entry>) {
        for Entry { key, node, .. } in entries {
            match (key.as_str(), node) {
                ("enabled", Node::Value(value)) => {
                    // Nomad's merge only ever sets it.
                    self.is_client |= value.as_bool().unwrap_or(value == Value::from("true"));
                }
                ("alloc_dir", node) => set(&mut self.alloc_dir, node),
                ("alloc_mounts_dir", node) => set(&mut self.alloc_mounts_dir, node),
                ("cpu_total_compute", Node::Value(value)) => {
                    self.cpu_total_compute = value.as_u64().filter(|mhz| *mhz > 0);
                }
                ("options", Node::Tree(entries)) => {
                    let texts = entries.into_iter().filter_map(|entry| {
                        Some((entry.key, hcl1::value(entry.node).as_str()?.to_owned()))
                    });
                    self.options.extend(texts);
                }
                ("host_volume", Node::Tree(volumes)) => {
                    for Entry { key, node, .. } in volumes {
                        let Node::Tree(entries) = node else { continue };
                        let mut path = None;
                        for entry in entries.into_iter().filter(|entry| entry.key == "path") {
                            set(&mut path, entry.node);
                        }
                        self.host_volumes.extend(path.map(|path| (key, path)));
                    }
                }
                _ => {}
            }
        }
    }
}

fn set(path: &mut Option<PathBuf>, node: Node) {
    let text = hcl1::value(node);
    let text = text.as_str().filter(|text| !text.is_empty());
    if let Some(text) = text {
        *path = Some(text.into());
    }
}

/// The keys of a plugin block's `config`.
fn settings(entries: Vec<Entry>) -> Vec<(String, Setting)> {
    let blocks = entries.into_iter().filter(|entry| entry.key == "config");
    let trees = blocks.filter_map(|entry| match entry.node {
        Node::Tree(entries) => Some(entries),
        Node::Value(_) => None,
    });
    let setting = |Entry { key, line, node }| {
        let value = hcl1::value(node);
        (key, Setting { value, line })
    };
    trees.flatten().map(setting).collect()
}

/// The files that a path stands for: itself, or what Nomad takes of a directory, in its order.
fn files(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let is_config = name.is_some_and(|name| {
            let is_backup = name.ends_with('~') || name.starts_with(".#") || name.starts_with('#');
            (name.ends_with(".hcl") || name.ends_with(".json")) && !is_backup
        });
        if is_config && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Opens a file that is one: reading a FIFO waits for its writer, and opening a device may be an act.
pub fn open_regular(path: &Path) -> std::io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("is no regular file"));
    }
    let mut options = File::options();
    options.read(true).custom_flags(O_NONBLOCK).open(path)
}

fn read(file: &Path) -> Result<Vec<Entry>, String> {
    let failed = |problem: &dyn std::fmt::Display| format!("{}: {problem}", file.display());
    let mut text = String::new();
    let opened = open_regular(file).map_err(|error| failed(&error))?;
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| failed(&error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(failed(&"is longer than any configuration"));
    }
    hcl1::parse(&text)
        .map_err(|error| format!("{}:{}: {}", file.display(), error.line, error.message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        fs::write(dir.join(name), text).unwrap();
    }

    #[test]
    fn of_several_files_the_later_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            "a.hcl",
            "data_dir = \"/a\"\nplugin \"x\" {\n config {\n k = 1\n}\n}\nclient {\n enabled = true\n host_volume \"v\" {\n path = \"/v\"\n}\n}",
        );
        write(
            dir.path(),
            "b.json",
            r#"{"data_dir": "/b", "client": {"options": {"driver.denylist": "docker, exec2"}}}"#,
        );
        write(
            dir.path(),
            "c.hcl",
            "plugin \"x\" {\n config {\n k = 2\n}\n}",
        );
        write(dir.path(), "z.txt", "data_dir = \"/z\"");
        write(dir.path(), "z.hcl~", "data_dir = \"/z\"");
        write(dir.path(), "d.hcl", "client {\n enabled = \n}");
        let mut config = AgentConfig::load(&[dir.path().to_owned()]);
        assert_eq!(config.files.len(), 3);
        assert!(config.problems[0].contains("d.hcl:3: "), "{config:?}");
        assert_eq!(config.plugin_dir(), Some("/b/plugins".into()));
        assert!(config.is_client);
        assert_eq!(config.host_volumes["v"], Path::new("/v"));
        assert_eq!(config.plugins["x"].config[0].1.value, Value::from(2));
        assert_eq!(config.allows("exec2"), Err("driver.denylist"));
        config.overrule(&Arguments {
            plugin_dir: Some("/p".into()),
            ..Arguments::default()
        });
        assert_eq!(config.plugin_dir(), Some("/p".into()));
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("z.hcl");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [dir.path().to_owned(), fifo, "/dev/null".into()] {
            let config = AgentConfig::load(&[path]);
            assert!(config.files.is_empty());
            assert!(
                config.problems[0].ends_with("is no regular file"),
                "{config:?}"
            );
        }
    }

    #[test]
    fn a_client_stays_one() {
        let mut config = AgentConfig::default();
        for text in [
            "client {\n enabled = true\n}",
            "client {\n enabled = false\n}",
        ] {
            config.take(Path::new("x"), hcl1::parse(text).unwrap());
        }
        assert!(config.is_client);
    }

    #[test]
    fn the_configuration_of_the_tests_agent_is_read() {
        let text = include_str!("../../tests/harness/src/hack/nomad.hcl");
        let mut config = AgentConfig::default();
        config.take(Path::new("x"), hcl1::parse(text).unwrap());
        assert!(config.is_client && config.plugins.len() == 1, "{config:?}");
        assert_eq!(config.cpu_total_compute, Some(2000));
        assert_eq!(config.alloc_dirs().1, Path::new("/opt/nomad/alloc_mounts"));
        assert_eq!(config.plugins["nomad-driver-exec2"].config.len(), 1);
    }
}
