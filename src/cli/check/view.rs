//! A plan in words and in the kernel's terms, for people and for programs. Of the environment it has the names alone.

use std::collections::BTreeMap;

use serde::Serialize;

use super::findings::{Command, whose};
use super::job::ALLOC_ID;
use crate::job::{Task, Value};
use crate::plan::Plan;
use crate::plan::capabilities;
use crate::plan::steps::{Bind, BindKind, Place, Rule, Source, Stdio, UserNamespaces, Write};
use crate::systemd;
use crate::task::types::TaskRequest;
use crate::text::one_line;
use crate::users::Account;

/// Of a path or an argument.
const MAX_BYTES: usize = 4_200;

/// Of a list in a line, beside the name.
const MAX_LINE_BYTES: usize = 100;

/// What a task would be given; by these names the keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct View {
    pub user: User,
    pub command: String,
    /// The file that is executed; null where the task's own directory holds it, or none was found.
    pub command_file: Option<String>,
    pub args: Vec<String>,
    pub work_dir: String,
    pub unit: String,
    pub slice: String,
    /// As systemd is asked for them, by their names.
    pub properties: BTreeMap<&'static str, String>,
    /// The scope's files, and what they will say.
    pub cgroup: BTreeMap<&'static str, String>,
    pub oom_score_adj: i16,
    pub capabilities: Capabilities,
    /// `refused` or `allowed`.
    pub user_namespaces: &'static str,
    /// Null is the host's.
    pub network: Option<String>,
    pub stdout: String,
    pub volumes: Vec<Volume>,
    pub devices: Vec<Volume>,
    /// Files that read otherwise than the host's.
    pub replaced: Vec<String>,
    pub environment: Environment,
    pub unveil: Vec<Unveiled>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub is_dynamic: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// By name, without `cap_`.
    pub names: Vec<&'static str>,
    /// As /proc/PID/status has them.
    pub bounding: String,
    pub ambient: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    pub source: String,
    pub target: String,
    pub is_read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Environment {
    pub names: Vec<String>,
    /// By the driver.
    pub added: Vec<String>,
    pub dropped: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unveiled {
    pub mode: String,
    pub path: String,
    pub source: &'static str,
    /// Of a default whose path is not on this host, and which is passed over.
    pub is_absent: bool,
}

impl View {
    pub fn new(plan: &Plan, request: &TaskRequest, account: Account, command: &Command) -> Self {
        let order = &plan.order;
        let shown = |text: &str| one_line(text, MAX_BYTES);
        let place = |place: &Place| match place {
            Place::Host(path) => shown(&path.to_string_lossy()),
            Place::Task(path) => {
                let whole = order.task_dir.path.join(path);
                let whole: std::path::PathBuf = whole.components().collect();
                shown(&whole.to_string_lossy())
            }
        };
        let binds = |kind: BindKind| -> Vec<Volume> {
            let of_kind = order.binds.iter().filter(|bind| bind.kind == kind);
            of_kind
                .map(
                    |Bind {
                         source,
                         target,
                         write,
                         ..
                     }| Volume {
                        source: shown(&source.to_string_lossy()),
                        target: place(target),
                        is_read_only: *write == Write::Denied,
                    },
                )
                .collect()
        };
        let settings = systemd::settings(
            &plan.description,
            plan.slice,
            plan.before.as_deref(),
            &plan.limits,
        );
        let is_given = |name: &str| order.env.iter().any(|(given, _)| given == name);
        let asked = || request.env.keys().chain(request.device_env.keys());
        let names = order.env.iter().map(|(name, _)| name);
        Self {
            user: User {
                name: shown(&account.name),
                uid: order.uid,
                gid: order.gid,
                is_dynamic: account.is_dynamic,
            },
            command: shown(&order.command),
            command_file: match command {
                Command::Found(path) => Some(shown(path)),
                _ => None,
            },
            args: order.args.iter().map(|arg| shown(arg)).collect(),
            work_dir: place(&order.work_dir),
            unit: plan.unit.to_string(),
            slice: plan.slice.to_owned(),
            properties: settings
                .into_iter()
                .map(|(name, setting)| (name, setting.to_string()))
                .collect(),
            cgroup: plan.limits.files().into_iter().collect(),
            oom_score_adj: order.oom_score_adj,
            capabilities: Capabilities {
                names: capabilities::names(order.bounding),
                bounding: format!("{:016x}", order.bounding),
                ambient: format!("{:016x}", order.ambient),
            },
            user_namespaces: match order.user_namespaces {
                UserNamespaces::Refused => "refused",
                UserNamespaces::Allowed => "allowed",
            },
            network: order
                .network_namespace
                .as_ref()
                .map(|path| shown(&path.to_string_lossy())),
            stdout: match &order.stdio {
                Stdio::Journal { .. } => "the journal".into(),
                _ => "Nomad's logs".into(),
            },
            volumes: binds(BindKind::Volume),
            devices: binds(BindKind::Device),
            replaced: order
                .replaced
                .iter()
                .map(|file| shown(&file.path.to_string_lossy()))
                .collect(),
            environment: Environment {
                names: names.clone().map(|name| shown(name)).collect(),
                added: names
                    .filter(|name| asked().all(|asked| asked != *name))
                    .map(|name| shown(name))
                    .collect(),
                dropped: asked()
                    .filter(|name| !is_given(name))
                    .map(|name| shown(name))
                    .collect(),
            },
            unveil: order
                .rules
                .iter()
                .map(|rule: &Rule| Unveiled {
                    mode: rule.access.to_string(),
                    path: place(&rule.place),
                    source: whose(rule.source),
                    is_absent: match &rule.place {
                        Place::Host(path) => rule.source == Source::Default && !path.exists(),
                        Place::Task(_) => false,
                    },
                })
                .collect(),
        }
    }

    /// Lines with the name of what they tell.
    /// Shows what names a variable as it is written: its value may be a secret. Nomad's own are paths, names and numbers.
    pub fn keep_names(&mut self, written: &Task) {
        let keep = |shown_now: &mut String, value: &Value| {
            if let Some(text) = value.as_str().filter(|text| names_a_variable(text)) {
                *shown_now = one_line(text, MAX_BYTES);
            }
        };
        for (name, setting) in &written.config {
            match (name.as_str(), &setting.value) {
                ("command", value) => keep(&mut self.command, value),
                ("work_dir", value) => keep(&mut self.work_dir, value),
                ("args", Value::Array(values)) => {
                    for (arg, value) in self.args.iter_mut().zip(values) {
                        keep(arg, value);
                    }
                }
                _ => {}
            }
        }
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut add = |name: &str, value: &str| {
            text.push_str(&format!("  {name:13} {}\n", placeholders(value)));
        };
        let User {
            name,
            uid,
            gid,
            is_dynamic,
        } = &self.user;
        let kind = if *is_dynamic {
            "a dynamic workload user, "
        } else {
            ""
        };
        add(
            "user",
            &format!("{name} ({kind}uid {uid}, gid {gid}, no other groups)"),
        );
        let file = match &self.command_file {
            Some(file) if *file != self.command => format!(" (found as {file})"),
            _ => String::new(),
        };
        add("command", &format!("{}{file}", self.command));
        if !self.args.is_empty() {
            let args: Vec<String> = self.args.iter().map(|arg| format!("{arg:?}")).collect();
            add("arguments", &one_line(&args.join(" "), MAX_BYTES));
        }
        add("directory", &self.work_dir);
        add("scope", &format!("{} in {}", self.unit, self.slice));
        let is_on = |value: &str| value == "yes";
        for (name, value) in &self.properties {
            if !is_on(value) {
                add("", &format!("{name}={value}"));
            }
        }
        let on = self.properties.iter().filter(|(_, value)| is_on(value));
        let on: Vec<String> = on.map(|(name, _)| format!("{name}=yes")).collect();
        add("", &on.join(" "));
        let mut name = "kernel";
        for (file, value) in &self.cgroup {
            add(name, &format!("{file}: {value}{}", in_words(file, value)));
            name = "";
        }
        add("", &format!("oom_score_adj: {}", self.oom_score_adj));
        add("capabilities", &or_none(&self.capabilities.names, " "));
        add("", &format!("user namespaces: {}", self.user_namespaces));
        add("network", self.network.as_deref().unwrap_or("the host's"));
        add("output", &self.stdout);
        for (name, all) in [("volume", &self.volumes), ("device", &self.devices)] {
            for Volume {
                source,
                target,
                is_read_only,
            } in all
            {
                let access = if *is_read_only {
                    "read-only"
                } else {
                    "writable"
                };
                add(name, &format!("{source} at {target}, {access}"));
            }
        }
        if !self.replaced.is_empty() {
            add("own files", &self.replaced.join(" "));
        }
        let Environment {
            names,
            added,
            dropped,
        } = &self.environment;
        add(
            "environment",
            &format!(
                "{} variables; added: {}; left out: {}",
                names.len(),
                or_none(added, " "),
                or_none(dropped, " ")
            ),
        );
        let mut name = "unveil";
        let there: Vec<_> = self.unveil.iter().filter(|rule| !rule.is_absent).collect();
        for alike in there.chunk_by(|one, next| one.mode == next.mode && one.source == next.source)
        {
            let (mode, source) = (&alike[0].mode, alike[0].source);
            let mut paths: Vec<String> = alike.iter().map(|rule| rule.path.clone()).collect();
            if let Some(last) = paths.last_mut() {
                last.push_str(&format!(" ({source})"));
            }
            for line in wrapped(paths.iter().map(String::as_str)) {
                add(name, &format!("{mode:4} {line}"));
                name = "";
            }
        }
        let absent = self.unveil.iter().filter(|rule| rule.is_absent);
        let mut name = "not there";
        for line in wrapped(absent.map(|rule| rule.path.as_str())) {
            add(name, &line);
            name = "";
        }
        text
    }
}

/// Words in lines that a terminal shows whole.
fn wrapped<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < MAX_LINE_BYTES => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn or_none<T: AsRef<str>>(names: &[T], between: &str) -> String {
    match names {
        [] => "none".into(),
        names => {
            let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
            names.join(between)
        }
    }
}

/// What a value of the kernel's means, where it does not say.
fn in_words(file: &str, value: &str) -> String {
    let words = match (file, value.split_once(' ')) {
        ("cpu.max", Some((quota, period))) => {
            let number = |text: &str| text.parse::<u64>().ok();
            let percent = number(quota).zip(number(period));
            percent.map(|(quota, period)| {
                let hundredths = quota * 10_000 / period.max(1);
                format!("{}.{:02} % of a core", hundredths / 100, hundredths % 100)
            })
        }
        ("memory.low" | "memory.max", _) => value
            .parse::<u64>()
            .ok()
            .filter(|bytes| *bytes > 0)
            .map(|bytes| format!("{} MiB", bytes >> 20)),
        ("pids.max", _) => Some("processes and threads".into()),
        _ => None,
    };
    words.map_or(String::new(), |words| format!(" ({words})"))
}

/// Ids that a start makes, in words.
fn placeholders(text: &str) -> String {
    text.replace(ALLOC_ID, "<alloc>")
        .replace("-00000000-00000000.scope", "-<alloc>-<start>.scope")
        .replace("(alloc 00000000)", "(alloc <alloc>)")
}
/// Whether `${}` in it names what is not Nomad's.
fn names_a_variable(text: &str) -> bool {
    let mut names = text.split("${").skip(1);
    names.any(|rest| !rest.trim_start().starts_with("NOMAD_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_a_variable_of_nomads_own_is_shown_with_its_value() {
        for text in [
            "plain",
            "${NOMAD_TASK_DIR}/x",
            "$HOME",
            "${ NOMAD_PORT_http }",
        ] {
            assert!(!names_a_variable(text), "{text}");
        }
        for text in [
            "--t=${TOKEN}",
            "${NOMAD_TASK_DIR} ${env[\"TOKEN\"]}",
            "${DB_PASSWORD}",
        ] {
            assert!(names_a_variable(text), "{text}");
        }
    }
}
