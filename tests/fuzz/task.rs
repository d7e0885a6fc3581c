//! What Nomad sends of operators and jobs: both `config` blocks as MessagePack, unveil entries, and a whole request on its way to a plan.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};

use nomad_driver_exec2::config::plugin::PluginConfig;
use nomad_driver_exec2::config::schema::{self, Key, Kind};
use nomad_driver_exec2::config::task::TaskOptions;
use nomad_driver_exec2::plan::files::Resolver;
use nomad_driver_exec2::plan::limits::QuotaGrain;
use nomad_driver_exec2::plan::steps::{Access, Place, Rule, Source, TaskDir};
use nomad_driver_exec2::plan::unveil::{self, Alias, ByTask, Defaults, Gate};
use nomad_driver_exec2::plan::{Facts, Plan};
use nomad_driver_exec2::plugin::{convert, errors};
use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto::StartTaskRequest;
use nomad_driver_exec2::systemd::settings;
use nomad_driver_exec2::task::types::Compute;
use nomad_driver_exec2::users::Account;
use prost::Message;
use serde_json::Value;

use crate::mutate::Target;
use crate::names::{assert_inert, assert_unit};

const MSGPACK: &[u8] = b"\xc0 \xc2 \xc3 \x80 \x90 \x91 \xdd\xff\xff\xff\xff \xdf\xff\xff\xff\xff \xdb\xff\xff\xff\xff \
            \xc6\xff\xff\xff\xff \xc9\xff\xff\xff\xff\x01 \xd4\x01\x01 \xcf\xff\xff\xff\xff\xff\xff\xff\xff \
            \xd3\x80\0\0\0\0\0\0\0 \xcb\x7f\xf8\0\0\0\0\0\0 \xca\x7f\x80\0\0 \xa1\0 \xa0 \xa7command \xa4args\x91\xa1a \
            \xa6unveil\x91\xa3r:/ \xadoom_score_adj\x01 \xa8work_dir\xa1. \xa7cap_add\x90 \xacunveil_paths\x91\xa3r:/ \
            \xa8pids_max\x01 \xa1\xff";

/// For `nomad alloc status`: one line that an operator reads to its end.
pub fn assert_sentence(error: impl Display) {
    let sentence = errors::permanent(error.to_string()).message().to_owned();
    assert!(
        !sentence.is_empty() && sentence.len() <= 2_100,
        "{sentence:?}"
    );
    assert!(
        !sentence.contains(char::is_control) && !sentence.contains('\u{202e}'),
        "{sentence:?}"
    );
}

fn within(table: &[Key], name: &str, value: &Value) {
    let key = table.iter().find(|key| key.name == name).unwrap();
    let fits =
        |text: &str, max: usize| assert!(text.len() <= max && !text.contains('\0'), "{name}");
    match (key.kind, value) {
        (Kind::Integer { min, max }, value) => {
            assert!((min..=max).contains(&value.as_i64().unwrap()))
        }
        (Kind::Text { max_bytes }, Value::String(text)) => fits(text, max_bytes),
        (
            Kind::List {
                max_entries,
                max_bytes,
            },
            Value::Array(entries),
        ) => {
            assert!(entries.len() <= max_entries);
            entries
                .iter()
                .for_each(|entry| fits(entry.as_str().unwrap(), max_bytes));
        }
        (Kind::Bool, Value::Bool(_)) => {}
        (kind, value) => panic!("{name} is {value}, not {kind:?}"),
    }
}

/// The block that decodes to these values.
fn encode(table: &[Key], values: &[(&str, Value)]) -> Vec<u8> {
    assert_eq!(values.len(), table.len());
    values
        .iter()
        .for_each(|(name, value)| within(table, name, value));
    rmp_serde::to_vec_named(&values.iter().cloned().collect::<BTreeMap<_, _>>()).unwrap()
}

fn encode_task(options: &TaskOptions) -> Vec<u8> {
    let options = options.clone();
    let values = [
        ("command", options.command.into()),
        ("args", options.args.into()),
        ("unveil", options.unveil.into()),
        ("oom_score_adj", options.oom_score_adj.into()),
        ("work_dir", options.work_dir.into()),
        ("cap_add", options.cap_add.into()),
        ("cap_drop", options.cap_drop.into()),
    ];
    encode(schema::TASK, &values)
}

#[test]
fn task_config() {
    Target {
        name: "task_config",
        samples: &[],
        tokens: MSGPACK,
        run: |bytes| match TaskOptions::decode(bytes) {
            Ok(options) => {
                assert!(!options.command.is_empty());
                assert_eq!(
                    TaskOptions::decode(&encode_task(&options)).unwrap(),
                    options
                );
            }
            Err(error) => assert_sentence(error),
        },
    }
    .fuzz();
}

#[test]
fn plugin_config() {
    Target {
        name: "plugin_config",
        samples: &[],
        tokens: MSGPACK,
        run: |bytes| match PluginConfig::decode(bytes) {
            Ok(config) => {
                let given = config.clone();
                let values = [
                    ("unveil_defaults", given.unveil_defaults.into()),
                    ("unveil_paths", given.unveil_paths.into()),
                    ("unveil_by_task", given.unveil_by_task.into()),
                    ("allow_caps", given.allow_caps.into()),
                    ("allow_user_namespaces", given.allow_user_namespaces.into()),
                    ("pids_max", given.pids_max.into()),
                    ("signal_all", given.signal_all.into()),
                    ("report_denials", given.report_denials.into()),
                ];
                assert_eq!(
                    PluginConfig::decode(&encode(schema::PLUGIN, &values)).unwrap(),
                    config
                );
                if let Err(error) = unveil::check(&config.unveil_paths) {
                    assert_sentence(error);
                }
            }
            Err(error) => assert_sentence(error),
        },
    }
    .fuzz();
}

fn aliases() -> Vec<Alias> {
    vec![
        Alias::new(Path::new("/m"), ""),
        Alias::new(Path::new("/d/alloc"), "alloc"),
        Alias::new(Path::new("/d"), ""),
    ]
}

/// Whether it is the host's, and the path without what says nothing.
fn spelled(path: &Path) -> (bool, PathBuf) {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    (path.is_absolute(), parts.collect())
}

fn plain(place: &Place) -> (bool, PathBuf) {
    spelled(place.as_path())
}

fn assert_rule(rule: &Rule) {
    let path = rule.place.as_path();
    assert!(
        !path.components().any(|part| part == Component::ParentDir),
        "{rule:?}"
    );
    assert_eq!(
        path.is_absolute(),
        matches!(rule.place, Place::Host(_)),
        "{rule:?}"
    );
    assert!(!path.to_string_lossy().contains('\0'), "{rule:?}");
    // A directory of the task's own by its host's name would be reached through links that the task planted.
    if let Place::Host(path) = &rule.place {
        assert!(
            !path.starts_with("/m") && !path.starts_with("/d"),
            "{rule:?}"
        );
    }
}

/// What an entry asks for, read once more in the simplest way.
fn asked(entry: &str) -> (Access, &str) {
    let (mode, path) = entry.split_once(':').unwrap();
    let has = |letter| mode.contains(letter);
    (
        Access {
            read: has('r'),
            write: has('w'),
            execute: has('x'),
            create: has('c'),
        },
        path,
    )
}

/// The lines before an empty one are the operator's, those behind it the task's.
#[test]
fn unveil_rules() {
    Target {
        name: "unveil_rules",
        samples: &[],
        tokens: b"r: rwxc: : / // /./ /.. .. . \n \n\n /m/local /d/alloc/data /proc/kcore /run/dbus /var/run /usr/bin w:/ \
            local \0 r:/dev/null rx:/bin\n",
        run: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let (operator, task) = text.split_once("\n\n").unwrap_or((&text, ""));
            let entries = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
            let (operator, task) = (entries(operator), entries(task));
            for (defaults, by_task) in [
                (Defaults::Unveiled, ByTask::Allowed),
                (Defaults::Veiled, ByTask::Refused),
            ] {
                let gate = Gate {
                    paths: &operator,
                    volumes: &[],
                    defaults,
                    by_task,
                };
                match unveil::rules(gate, &task, &aliases()) {
                    Ok((rules, overruled)) => {
                        assert!(by_task == ByTask::Allowed || task.is_empty());
                        assert_merged(&rules, &operator, &task);
                        let defaults = match defaults {
                            Defaults::Unveiled => {
                                unveil::DEFAULTS.iter().map(|(_, paths)| paths.len()).sum()
                            }
                            Defaults::Veiled => 0,
                        };
                        let own = 5;
                        assert_eq!(
                            rules.len() + overruled.len(),
                            operator.len() + task.len() + own + defaults
                        );
                        for lost in &overruled {
                            assert_eq!(plain(&lost.rule.place), plain(&lost.by.place));
                            assert!(rules.contains(&lost.by), "{lost:?}");
                        }
                        assert_view(&rules);
                    }
                    Err(error) => assert_sentence(error),
                }
            }
        },
    }
    .fuzz();
}

fn assert_merged(rules: &[Rule], operator: &[String], task: &[String]) {
    let mut seen = BTreeMap::new();
    for rule in rules {
        assert_rule(rule);
        assert!(
            seen.insert(plain(&rule.place), rule).is_none(),
            "twice: {rule:?}"
        );
    }
    let place = |path: &str| {
        let path = Path::new(path);
        unveil::own_place(path, &aliases()).map_or_else(|| spelled(path), |own| spelled(&own))
    };
    for entry in operator {
        // What the operator grants on a path is all that anybody gets there.
        let (_, path) = asked(entry);
        let first = operator
            .iter()
            .map(|entry| asked(entry))
            .find(|(_, other)| place(other) == place(path));
        let rule = seen[&place(path)];
        assert_eq!(
            (rule.source, Some(rule.access)),
            (Source::Plugin, first.map(|(access, _)| access)),
            "{entry}"
        );
    }
    for rule in rules.iter().filter(|rule| rule.source == Source::Task) {
        let is_asked =
            |entry: &String| asked(entry) == (rule.access, &*rule.written.to_string_lossy());
        assert!(task.iter().any(is_asked), "{rule:?}");
    }
}

/// The mount view opens nothing for writing that no rule of operator or task opens.
fn assert_view(rules: &[Rule]) {
    for uid in [0, 80_001] {
        let view = unveil::view(rules, uid);
        for path in &view.writable {
            let opens = |rule: &Rule| {
                rule.place.as_path() == path
                    && (rule.access.write || rule.access.create)
                    && matches!(rule.source, Source::Plugin | Source::Task)
            };
            assert!(rules.iter().any(opens), "{path:?}");
        }
        let names = |path: &PathBuf| rules.iter().any(|rule| rule.place.as_path() == path);
        assert!(view.kept.iter().all(names), "{:?}", view.kept);
        assert!(view.masked.contains(&"/proc/kcore".into()) || names(&"/proc/kcore".into()));
    }
}

fn facts() -> Facts {
    Facts {
        account: Account {
            name: "nomad-80001".into(),
            uid: 80_001,
            gid: 80_001,
            home: "/nonexistent".into(),
            is_dynamic: true,
        },
        task_dir: TaskDir {
            path: "/m".into(),
            alloc_dir: "/d".into(),
            device: 1,
            inode: 2,
        },
        aliases: aliases(),
        compute: Some(Compute {
            total_mhz: 4_000,
            cores: 4,
        }),
        grain: QuotaGrain::Fine,
        resolver: Resolver::default(),
        share_cpus: None,
        agent_unit: Some("nomad.service".into()),
        open_files: (1024, 4096),
        landlock_abi: Some(7),
    }
}

/// The operator has opened all that there is to open.
fn open() -> PluginConfig {
    PluginConfig {
        unveil_by_task: true,
        allow_caps: vec!["net_bind_service".into(), "sys_nice".into()],
        ..PluginConfig::default()
    }
}

#[test]
fn start_task() {
    Target {
        name: "start_task",
        samples: &[
            "tests/nomad/recorded/nomad-2.0.6-dev/start-task-env.bin",
            "tests/nomad/recorded/nomad-2.0.6-dev/start-task-service.bin",
        ],
        tokens: b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01 \xff\xff\xff\xff\x0f \x0a\x00 \x12\x02 0-8191, 0-3,7 \n \0 /../ \
            ${ rwxc:/ /dev/shm host-to-task bidirectional LD_PRELOAD 127.0.0.1",
        run: |bytes| {
            let Ok(StartTaskRequest { task: Some(task) }) = StartTaskRequest::decode(bytes) else {
                return;
            };
            let options = match TaskOptions::decode(&task.msgpack_driver_config) {
                Ok(options) => options,
                Err(error) => return assert_sentence(error),
            };
            let request = convert::request(task, options);
            match Plan::new(&open(), &request, &facts()) {
                Ok(plan) => assert_plan(&plan),
                Err(error) => assert_sentence(error),
            }
        },
    }
    .fuzz();
}

fn assert_plan(plan: &Plan) {
    assert_unit(&plan.unit);
    assert_inert(plan.description.as_str());
    for (name, setting) in settings(
        &plan.description,
        plan.slice,
        plan.before.as_deref(),
        &plan.limits,
    ) {
        assert!(
            !setting.to_string().contains(char::is_control),
            "{name}={setting}"
        );
    }
    plan.order.rules.iter().for_each(assert_rule);
    let texts = plan
        .order
        .env
        .iter()
        .flat_map(|(name, value)| [name, value]);
    for text in texts.chain(&plan.order.args).chain([&plan.order.command]) {
        assert!(!text.contains('\0'), "{text:?}");
    }
    // The helper has it from the plugin in this form.
    let bytes = rmp_serde::to_vec_named(&plan.order).unwrap();
    assert_eq!(
        rmp_serde::from_slice::<nomad_driver_exec2::plan::steps::Order>(&bytes).unwrap(),
        plan.order
    );
}
