//! Who may know whom, and docs in step with code: what a reader may rely on without reading all of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nomad_driver_exec2::cli::tasks;
use nomad_driver_exec2::config::schema;
use nomad_driver_exec2::plan::limits::{Cpus, Limits};
use nomad_driver_exec2::plan::session::SessionStep;
use nomad_driver_exec2::plan::steps::Step;
use nomad_driver_exec2::plan::unveil;
use nomad_driver_exec2::systemd;
use nomad_driver_exec2::task::StopStep;
use nomad_driver_exec2::text::UnitText;

/// A room, the rooms of ours it may use, and the crates it may use beside std.
struct Room {
    name: &'static str,
    rooms: &'static [&'static str],
    crates: &'static [&'static str],
}

const ROOMS: [Room; 18] = [
    Room {
        name: "sys",
        rooms: &[],
        crates: &["libc", "nix", "rustix", "tokio"],
    },
    Room {
        name: "audit",
        rooms: &[],
        crates: &["rustix"],
    },
    Room {
        name: "breakpoint",
        rooms: &[],
        crates: &[],
    },
    Room {
        name: "text",
        rooms: &[],
        crates: &[],
    },
    Room {
        name: "mountinfo",
        rooms: &[],
        crates: &[],
    },
    Room {
        name: "record",
        rooms: &["text"],
        crates: &[],
    },
    Room {
        name: "config",
        rooms: &[],
        crates: &["rmp", "rmp_serde", "serde", "serde_json", "thiserror"],
    },
    // Requests are values of task/types, which imports nothing.
    Room {
        name: "plan",
        rooms: &["config", "task::types", "text", "users::Account"],
        crates: &["serde", "thiserror"],
    },
    Room {
        name: "cgroup",
        rooms: &[],
        crates: &["libc", "rustix"],
    },
    Room {
        name: "users",
        rooms: &[],
        crates: &["nix", "thiserror"],
    },
    Room {
        name: "host",
        rooms: &[
            "audit",
            "cgroup",
            "plan::denials",
            "plan::files",
            "plan::limits",
            "sys",
        ],
        crates: &["nix"],
    },
    Room {
        name: "systemd",
        rooms: &["plan::limits", "plan::unit", "text"],
        crates: &["thiserror", "tokio", "tokio_stream", "zbus"],
    },
    Room {
        name: "launch",
        rooms: &[
            "breakpoint",
            "cgroup::unified",
            "mountinfo",
            "plan::command",
            "plan::managers",
            "plan::session",
            "plan::steps",
            "record",
            "sys",
        ],
        crates: &[
            "landlock",
            "libc",
            "nix",
            "rmp_serde",
            "rustix",
            "serde",
            "thiserror",
        ],
    },
    Room {
        name: "task",
        rooms: &[
            "audit",
            "breakpoint",
            "cgroup",
            "config",
            "host",
            "launch",
            "plan",
            "record",
            "sys",
            "systemd",
            "text",
            "users",
        ],
        crates: &[
            "futures_util",
            "libc",
            "nix",
            "rmp_serde",
            "rustix",
            "serde",
            "serde_json",
            "thiserror",
            "tokio",
            "tokio_stream",
            "tracing",
        ],
    },
    Room {
        name: "plugin",
        rooms: &[
            "config",
            "plan::capabilities",
            "plan::limits",
            "plan::unit",
            "plan::unveil",
            "proto",
            "task",
            "text",
        ],
        crates: &[
            "libc",
            "nix",
            "prost",
            "prost_types",
            "rustix",
            "serde",
            "serde_json",
            "tempfile",
            "thiserror",
            "tokio",
            "tokio_stream",
            "tonic",
            "tonic_prost",
            "tracing",
            "tracing_subscriber",
        ],
    },
    Room {
        name: "job",
        rooms: &["config", "mountinfo", "task::types"],
        crates: &["hcl", "nix", "rmp_serde", "thiserror"],
    },
    Room {
        name: "agent",
        rooms: &["job"],
        crates: &["hcl", "nix", "serde_json"],
    },
    Room {
        name: "cli",
        rooms: &[
            "agent",
            "cgroup",
            "config",
            "host",
            "job",
            "plan",
            "record",
            "sys::trace",
            "systemd",
            "task",
            "text",
            "users",
        ],
        crates: &[
            "clap",
            "libc",
            "memchr",
            "nix",
            "rustix",
            "serde",
            "serde_json",
            "thiserror",
            "tokio",
            "tokio_stream",
        ],
    },
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    fs::read_dir(path)
        .unwrap()
        .flat_map(|entry| sources(&entry.unwrap().path()))
        .collect()
}

fn files(room: &str) -> Vec<PathBuf> {
    let both = [
        root().join(format!("src/{room}.rs")),
        root().join("src").join(room),
    ];
    let there = both.into_iter().filter(|path| path.exists());
    there.flat_map(|path| sources(&path)).collect()
}

/// The paths that a file names after `use`, without its tests, each group spelled out by its first two parts.
fn uses(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let shipped = text.split("#[cfg(test)]").next().unwrap();
    let statements = shipped.split(';').filter_map(|statement| {
        let start = statement
            .rfind("\nuse ")
            .map(|at| at + 5)
            .or_else(|| statement.rfind("pub use ").map(|at| at + 8))?;
        Some(statement[start..].split_whitespace().collect::<String>())
    });
    statements.flat_map(|path| spell_out(&path)).collect()
}

/// `crate::{a::b,c}` is `crate::a::b` and `crate::c`; deeper groups do not matter here.
fn spell_out(path: &str) -> Vec<String> {
    let Some((head, group)) = path.split_once("::{") else {
        return vec![path.to_owned()];
    };
    if head != "crate" {
        return vec![head.to_owned()];
    }
    let mut depth = 0;
    let parts = group.trim_end_matches('}').split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.map(|part| format!("crate::{part}")).collect()
}

#[test]
fn every_room_uses_only_what_it_may() {
    let mut wrong = Vec::new();
    for room in &ROOMS {
        for file in files(room.name) {
            for path in uses(&file) {
                let path = path.trim_start_matches("::");
                let allowed = match path.strip_prefix("crate::") {
                    Some(ours) => {
                        let is =
                            |name: &&str| *ours == **name || ours.starts_with(&format!("{name}::"));
                        is(&room.name) || room.rooms.iter().any(is)
                    }
                    None => {
                        let first = path.split("::").next().unwrap();
                        let own = files(room.name)
                            .iter()
                            .any(|file| file.file_stem().is_some_and(|stem| stem == first));
                        // `wire` is an alias of a path below crate::proto.
                        own || ["std", "self", "super", "wire"].contains(&first)
                            || room.crates.contains(&first)
                    }
                };
                if !allowed {
                    wrong.push(format!(
                        "{}: use {path}",
                        file.strip_prefix(root()).unwrap().display()
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_belongs_to_a_room() {
    for entry in fs::read_dir(root().join("src")).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let known = ROOMS.iter().any(|room| room.name == stem);
        assert!(
            known || ["lib", "main", "proto"].contains(&stem),
            "{}",
            path.display()
        );
    }
}

#[test]
fn no_source_file_outgrows_its_reader() {
    for file in sources(&root().join("src")) {
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.split("#[cfg(test)]").next().unwrap().lines().count();
        assert!(lines <= 450, "{} has {lines} lines", file.display());
    }
}

#[test]
fn unsafe_code_is_in_one_room() {
    let room = files("sys");
    for file in sources(&root().join("src")) {
        let text = fs::read_to_string(&file).unwrap();
        let has = text
            .lines()
            .any(|line| line.contains("unsafe {") || line.contains("allow(unsafe_code)"));
        assert!(!has || room.contains(&file), "{}", file.display());
    }
}

#[test]
fn the_readme_quotes_the_steps_of_a_start() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let list: Vec<String> = Step::ALL
        .iter()
        .map(|(step, what)| format!("{}. {what}", step.number()))
        .collect();
    assert!(
        readme.contains(&list.join("\n")),
        "README.md lacks this list:\n{}",
        list.join("\n")
    );
}

#[test]
fn the_readme_quotes_the_steps_of_a_session() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let list: Vec<String> = SessionStep::ALL
        .iter()
        .map(|(step, what)| format!("{}. {what}", step.number()))
        .collect();
    let list = list.join("\n");
    assert!(readme.contains(&list), "README.md lacks this list:\n{list}");
}

#[test]
fn the_readme_quotes_the_steps_of_an_end() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let list: Vec<String> = (1..)
        .zip(StopStep::ALL)
        .map(|(number, (_, what))| format!("{number}. {what}"))
        .collect();
    let list = list.join("\n");
    assert!(readme.contains(&list), "README.md lacks this list:\n{list}");
}

#[test]
fn the_readme_explains_every_key_and_every_default_path() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for key in schema::PLUGIN.iter().chain(schema::TASK) {
        assert!(
            readme.contains(&format!("`{}`", key.name)),
            "README.md does not explain {}",
            key.name
        );
    }
    for path in unveil::DEFAULTS.iter().flat_map(|(_, paths)| paths.iter()) {
        assert!(
            readme.contains(&format!("`{path}`")),
            "README.md does not list {path}"
        );
    }
}

#[test]
fn the_readme_explains_every_column_and_key_of_tasks() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut lines = readme.lines();
    assert!(
        lines.any(|line| line.split_whitespace().eq(tasks::COLUMNS)),
        "README.md does not show these columns: {:?}",
        tasks::COLUMNS
    );
    let object = serde_json::to_value(tasks::Task::default()).unwrap();
    for key in object.as_object().unwrap().keys() {
        assert!(
            readme.contains(&format!("`{key}`")),
            "README.md does not explain {key}"
        );
    }
}

/// Neither more nor less, but for what systemd gives to every unit.
#[test]
fn readme_and_man_page_explain_the_properties_that_systemd_is_asked_for() {
    let limits = Limits {
        cpu_quota_usec_per_sec: 1,
        memory_max_bytes: None,
        memory_low_bytes: 0,
        tasks_max: 1,
        allowed_cpus: Some(Cpus::from([0])),
    };
    let description = UnitText::new("d");
    let settings = systemd::settings(&description, "s", Some("nomad.service"), &limits);
    let mut asked: BTreeSet<&str> = settings.into_iter().map(|(name, _)| name).collect();
    asked.insert("InvocationID");

    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, table) = readme
        .split_once("| property | |\n|---|---|\n")
        .expect("the table");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let names = rows.flat_map(|row| row.split('|').nth(1).unwrap().split_whitespace());
    let explained: BTreeSet<&str> = names.map(|name| name.trim_matches('`')).collect();
    assert_eq!(explained, asked, "README.md");

    let page = root().join("packaging/man/nomad-driver-exec2.8.in");
    let page = fs::read_to_string(page).unwrap();
    let (_, list) = page
        .split_once(".B systemctl show\n.I UNIT\nhas")
        .expect("the list");
    let (list, _) = list.split_once("\n.PP\n").expect("its end");
    let names = list.split(".TP\n.B ").skip(1);
    let names = names.flat_map(|item| item.lines().next().unwrap().split(", "));
    let explained: BTreeSet<&str> = names.collect();
    assert_eq!(explained, asked, "the man page");
}

/// What a block says, without the attempts that an example leaves to Nomad's defaults for brevity.
fn without_attempts(body: &hcl::Body) -> hcl::Body {
    let blocks = body.blocks().filter(|block| {
        let key = block.identifier.as_str();
        key != "restart" && key != "reschedule"
    });
    let blocks = blocks.map(|block| hcl::Block {
        body: without_attempts(&block.body),
        ..block.clone()
    });
    let attributes = body.attributes().cloned().map(hcl::Structure::from);
    attributes.chain(blocks.map(hcl::Structure::from)).collect()
}

/// Comments do not count; the file is named after the job.
#[test]
fn the_readme_quotes_jobs_as_their_files_have_them() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let fences = readme.split("```hcl\n").skip(1);
    let jobs = fences.map(|rest| rest.split("```").next().unwrap());
    let jobs: Vec<_> = jobs.filter(|text| text.contains("job \"")).collect();
    assert!(jobs.len() > 2, "{jobs:#?}");
    for text in jobs {
        let quoted: hcl::Body = hcl::from_str(text).unwrap();
        let name = quoted.blocks().next().unwrap().labels[0].as_str();
        let path = root().join(format!("tests/nomad/{name}.nomad.hcl"));
        let file: hcl::Body = hcl::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(
            without_attempts(&quoted),
            without_attempts(&file),
            "README.md and {} differ",
            path.display()
        );
    }
}

#[test]
fn the_readme_lists_every_job() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for file in sources(&root().join("tests/nomad")) {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(
            !name.ends_with(".nomad.hcl") || readme.contains(&format!("`{name}`")),
            "README.md does not list {name}"
        );
    }
}
