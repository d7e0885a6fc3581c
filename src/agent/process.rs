//! An agent that runs: found in /proc, with the arguments that say where its configuration is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A `nomad agent` of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    pub pid: u32,
    pub uid: u32,
    /// None of an agent that is not root's: root opens what they name.
    pub arguments: Arguments,
    /// What its tasks inherit; empty if we may not read it, or it is not root's.
    pub environment: Vec<(String, String)>,
}

/// What an agent's command line says, paths from the root on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    pub configs: Vec<PathBuf>,
    pub data_dir: Option<PathBuf>,
    pub plugin_dir: Option<PathBuf>,
    pub is_client: bool,
}

/// The agents of this host: those of root, whose word counts, and among them the oldest process first. Anyone may call a process so.
pub fn running() -> Vec<Running> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut agents: Vec<Running> = pids.into_iter().filter_map(agent).collect();
    agents.sort_by_key(|agent| agent.uid != 0);
    agents
}

fn agent(pid: u32) -> Option<Running> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let words = words(&dir.join("cmdline"))?;
    let (program, words) = words.split_first()?;
    if Path::new(program).file_name()? != "nomad" || words.first()? != "agent" {
        return None;
    }
    let uid = fs::metadata(&dir).ok()?.uid();
    if uid != 0 {
        return Some(Running {
            pid,
            uid,
            arguments: Arguments::default(),
            environment: Vec::new(),
        });
    }
    let cwd = fs::read_link(dir.join("cwd")).unwrap_or_else(|_| "/".into());
    let environment = self::words(&dir.join("environ")).unwrap_or_default();
    let pairs = environment.iter().filter_map(|text| text.split_once('='));
    Some(Running {
        pid,
        uid,
        arguments: arguments(&words[1..], &cwd),
        environment: pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    })
}

fn words(path: &Path) -> Option<Vec<String>> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let words = text.split_terminator('\0').map(str::to_owned).collect();
    Some(words)
}

/// Go's flags: one dash or two, the value after a `=` or as the next word.
fn arguments(words: &[String], cwd: &Path) -> Arguments {
    let mut arguments = Arguments::default();
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            continue;
        };
        let (name, given) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let is_on = given.is_none_or(|value| value == "true");
        let mut path = || given.or_else(|| words.next()).map(|value| cwd.join(value));
        match name {
            "config" => arguments.configs.extend(path()),
            "data-dir" => arguments.data_dir = path(),
            "plugin-dir" => arguments.plugin_dir = path(),
            "client" | "dev" | "dev-connect" if is_on => arguments.is_client = true,
            _ => {}
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_as_go_reads_them() {
        let words = "-config /etc/a --config=b -log-level debug -plugin-dir=/p -data-dir d -client";
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let read = arguments(&words, Path::new("/srv"));
        assert_eq!(
            read,
            Arguments {
                configs: vec!["/etc/a".into(), "/srv/b".into()],
                data_dir: Some("/srv/d".into()),
                plugin_dir: Some("/p".into()),
                is_client: true,
            }
        );
    }
}
