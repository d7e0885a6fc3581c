//! The keys of the plugin's `config` block and of a task's: name, type, default, meaning. The hclspec that Nomad checks,
//! the decoder and the manual come from these two tables; a new key is one row here and one field beside it.

/// One key of a `config` block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub presence: Presence,
    /// For the manual: one sentence.
    pub doc: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bool,
    /// A whole number within these bounds.
    Integer {
        min: i64,
        max: i64,
    },
    Text {
        max_bytes: usize,
    },
    /// A list of texts.
    List {
        max_entries: usize,
        max_bytes: usize,
    },
}

impl Kind {
    /// The type as HCL spells it.
    pub fn hcl_type(self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::Integer { .. } => "number",
            Kind::Text { .. } => "string",
            Kind::List { .. } => "list(string)",
        }
    }

    /// The type for the manual.
    pub fn in_words(self) -> &'static str {
        match self {
            Kind::List { .. } => "list of strings",
            other => other.hcl_type(),
        }
    }
}

impl Key {
    /// What absent means, as an HCL literal; `None`: it may not be absent.
    pub fn default_literal(&self) -> Option<&'static str> {
        match (self.presence, self.kind) {
            (Presence::Required, _) => None,
            (Presence::Default(literal), _) => Some(literal),
            (Presence::Optional, Kind::Bool) => Some("false"),
            (Presence::Optional, Kind::Integer { .. }) => Some("0"),
            (Presence::Optional, Kind::Text { .. }) => Some("\"\""),
            (Presence::Optional, Kind::List { .. }) => Some("[]"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Required,
    /// Absent means false, 0, "" or an empty list.
    Optional,
    /// What absent means, as an HCL literal.
    Default(&'static str),
}

/// PATH_MAX of the kernel without its NUL, and room for an unveil mode.
const PATH_BYTES: usize = 4_095 + 8;
/// The kernel's MAX_ARG_STRLEN without its NUL.
const ARGUMENT_BYTES: usize = 131_071;
const PATHS: Kind = Kind::List {
    max_entries: 1_000,
    max_bytes: PATH_BYTES,
};
/// There are 41 capabilities.
const CAPABILITIES: Kind = Kind::List {
    max_entries: 64,
    max_bytes: 32,
};

/// `plugin "nomad-driver-exec2" { config { … } }`.
pub const PLUGIN: &[Key] = &[
    Key {
        name: "unveil_defaults",
        kind: Kind::Bool,
        presence: Presence::Default("true"),
        doc: "Open the usual system paths (binaries, libraries, certificates, name resolution) to every task.",
    },
    Key {
        name: "unveil_paths",
        kind: PATHS,
        presence: Presence::Optional,
        doc: "Paths to open to every task, each as `mode:path` with any of r, w, x, c as the mode.",
    },
    Key {
        name: "unveil_by_task",
        kind: Kind::Bool,
        presence: Presence::Default("false"),
        doc: "Let jobs open further paths with `unveil`.",
    },
    Key {
        name: "allow_caps",
        kind: CAPABILITIES,
        presence: Presence::Optional,
        doc: "Capabilities that jobs may ask for with `cap_add`, and that root in a task has besides the usual ones.",
    },
    Key {
        name: "allow_user_namespaces",
        kind: Kind::Bool,
        presence: Presence::Default("false"),
        doc: "Let every task create user namespaces, which `w:/proc` in `unveil` or `unveil_paths` lets a task as well.",
    },
    Key {
        name: "pids_max",
        kind: Kind::Integer {
            min: 1,
            max: 4_194_304,
        },
        presence: Presence::Default("16384"),
        doc: "How many processes and threads each task may have.",
    },
    Key {
        name: "signal_all",
        kind: Kind::Bool,
        presence: Presence::Default("false"),
        doc: "Send Nomad's signals (`kill_signal`, `change_signal`, `nomad alloc signal`) to every process of a task, not to its main process alone.",
    },
    Key {
        name: "report_denials",
        kind: Kind::Bool,
        presence: Presence::Default("true"),
        doc: "Tell what Landlock denies to a task, and what would allow it, in its events and its unit's journal; from Linux 6.15 on, while kernel audit is on.",
    },
];

/// `task { config { … } }`.
pub const TASK: &[Key] = &[
    Key {
        name: "command",
        kind: Kind::Text { max_bytes: 4_095 },
        presence: Presence::Required,
        doc: "The program to run: a path, or a name that is looked for in the task's PATH.",
    },
    Key {
        name: "args",
        kind: Kind::List {
            max_entries: 8_192,
            max_bytes: ARGUMENT_BYTES,
        },
        presence: Presence::Optional,
        doc: "Arguments of the command.",
    },
    Key {
        name: "unveil",
        kind: PATHS,
        presence: Presence::Optional,
        doc: "Paths to open to the task, each as `mode:path`; needs `unveil_by_task` in the plugin's configuration.",
    },
    Key {
        name: "oom_score_adj",
        kind: Kind::Integer { min: 0, max: 1_000 },
        presence: Presence::Optional,
        doc: "How readily the kernel ends the task when memory runs out, 0 to 1000.",
    },
    Key {
        name: "work_dir",
        kind: Kind::Text { max_bytes: 4_095 },
        presence: Presence::Optional,
        doc: "Where the command starts, instead of the task's directory; relative to that, or an absolute path, which needs `unveil_by_task` and is unveiled with rwxc.",
    },
    Key {
        name: "cap_add",
        kind: CAPABILITIES,
        presence: Presence::Optional,
        doc: "Capabilities to give to the task, whatever its user; each needs to be in `allow_caps` of the plugin's configuration.",
    },
    Key {
        name: "cap_drop",
        kind: CAPABILITIES,
        presence: Presence::Optional,
        doc: "Capabilities to take from the task, by name or `all`.",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_literal_of_its_type() {
        for key in PLUGIN.iter().chain(TASK) {
            let Presence::Default(literal) = key.presence else {
                continue;
            };
            let fits = match key.kind {
                Kind::Bool => literal.parse::<bool>().is_ok(),
                Kind::Integer { .. } => literal.parse::<i64>().is_ok(),
                Kind::Text { .. } => literal.starts_with('"'),
                Kind::List { .. } => literal.starts_with('['),
            };
            assert!(fits, "{} = {literal}", key.name);
        }
    }

    #[test]
    fn every_key_says_what_it_means_in_one_sentence() {
        for key in PLUGIN.iter().chain(TASK) {
            assert!(key.doc.ends_with('.') && key.doc.len() > 20, "{}", key.name);
        }
    }
}
