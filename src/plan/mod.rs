//! Pure: configuration in, one `Plan` out that says everything that will happen. No I/O, no clock, no environment.

pub mod capabilities;
pub mod command;
pub mod denials;
pub mod environment;
pub mod files;
pub mod limits;
pub mod managers;
pub mod session;
pub mod signal;
pub mod steps;
pub mod unit;
pub mod unveil;
pub mod volumes;

use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use crate::config::plugin::PluginConfig;
use crate::config::task::TaskOptions;
use crate::task::types::TaskRequest;
use crate::text::UnitText;
use crate::users::Account;
use capabilities::{Capabilities, CapabilityError, Subject};
use files::{FileError, Resolver};
use limits::{Compute, Cpus, LimitError, Limits, QuotaGrain};
use steps::{Order, Place, Rule, Stdio, TaskDir, UserNamespaces};
use unit::UnitName;
use unveil::{Alias, ByTask, Defaults, Gate, Overruled, UnveilError};
use volumes::VolumeError;

/// What was found out about the host and the task before anything is decided.
#[derive(Debug, Clone)]
pub struct Facts {
    pub account: Account,
    pub task_dir: TaskDir,
    /// The names that directories of the task's own have on the host.
    pub aliases: Vec<Alias>,
    pub compute: Option<Compute>,
    pub grain: QuotaGrain,
    /// Read where the job or its network makes a difference.
    pub resolver: Resolver,
    /// CPUs of a task without `cores`; `None` if nothing keeps it off any.
    pub share_cpus: Option<Cpus>,
    /// The service that the agent runs in.
    pub agent_unit: Option<String>,
    /// RLIMIT_NOFILE, soft and hard, that the plugin was started with.
    pub open_files: (u64, u64),
    /// `None` is a kernel without.
    pub landlock_abi: Option<u32>,
}

/// Everything that will happen when a task starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub unit: UnitName,
    pub description: UnitText,
    pub slice: &'static str,
    /// The unit that systemd stops first when the host shuts down.
    pub before: Option<String>,
    pub limits: Limits,
    pub order: Order,
    /// Rules of the request and the configuration that count for nothing.
    pub overruled: Vec<Overruled>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("command must be set to a path, or to a name in the task's PATH")]
    NoCommand,
    #[error("{key} contains a NUL byte, which no process can be given")]
    Nul { key: &'static str },
    #[error("{key} has {count} entries; at most {max} are taken")]
    TooMany {
        key: &'static str,
        count: usize,
        max: usize,
    },
    #[error(
        "oom_score_adj = {0}: must be 0 to 1000; a task may volunteer to be killed first, not hide from the kernel"
    )]
    OomScore(i16),
    #[error(
        "network: Nomad names no namespace for a task that must not share the host's; stop the allocation, so that Nomad makes its network anew"
    )]
    NoNetwork,
    #[error(
        "work_dir = {0:?}: task set work_dir outside sandbox but driver config does not allow this; the operator sets unveil_by_task = true to allow it"
    )]
    WorkDirOutside(String),
    #[error("work_dir = {0:?} has a \"..\" in it; write the path without")]
    WorkDirLeaves(String),
    #[error("work_dir = \"/\": it would unveil the whole host; choose a directory")]
    WorkDirRoot,
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Unveil(#[from] UnveilError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    File(#[from] FileError),
}

/// Arguments of a command; the kernel's own bound is on their bytes.
const MAX_ARGS: usize = 10_000;

impl Plan {
    pub fn new(
        config: &PluginConfig,
        request: &TaskRequest,
        facts: &Facts,
    ) -> Result<Self, PlanError> {
        let options = &request.options;
        let work_dir = work_dir(config, options, &facts.aliases)?;
        let mut unveil = options.unveil.clone();
        if let Place::Host(path) = &work_dir {
            unveil.push(format!("rwxc:{}", path.display()));
        }
        let uid = facts.account.uid;
        let volumes =
            volumes::volumes(&request.mounts, &request.devices, uid == 0, &facts.aliases)?;
        let (rules, overruled) =
            unveil::rules(gate(config, &volumes.rules), &unveil, &facts.aliases)?;
        let replaced = files::replaced(&files::Wanted {
            account: &facts.account,
            rules: &rules,
            dns: request.dns.as_ref(),
            hosts: request.hosts.as_ref(),
            owns_network: request.network_namespace.is_some(),
            resolver: &facts.resolver,
        })?;
        let limits = Limits::new(
            &request.resources,
            facts.compute,
            facts.grain,
            facts.share_cpus.as_ref(),
            config.pids_max,
        )?;
        let capabilities = capabilities(config, request, uid)?;
        let slice = if request.resources.cpuset.trim().is_empty() {
            unit::SHARE_SLICE
        } else {
            unit::RESERVE_SLICE
        };
        let unit = UnitName::of_task(request.id.as_str());
        let order = Order {
            command: command(options)?,
            args: args(options)?,
            env: environment(request, facts, &work_dir)?,
            work_dir,
            uid,
            gid: facts.account.gid,
            oom_score_adj: oom_score_adj(options)?,
            bounding: capabilities.bounding,
            ambient: capabilities.ambient,
            network_namespace: network_namespace(request)?,
            stdio: stdio(request, &unit),
            task_dir: facts.task_dir.clone(),
            view: unveil::view(&rules, uid),
            binds: volumes.binds,
            replaced,
            user_namespaces: user_namespaces(config, &rules),
            rules,
            open_files: facts.open_files,
            denials: denials::logged(config, facts.landlock_abi),
            traced_calls: Vec::new(),
        };
        Ok(Self {
            unit,
            description: unit::description(&request.names),
            slice,
            before: facts.agent_unit.clone(),
            limits,
            order,
            overruled,
        })
    }
}

fn gate<'a>(config: &'a PluginConfig, volumes: &'a [Rule]) -> Gate<'a> {
    Gate {
        paths: &config.unveil_paths,
        volumes,
        defaults: if config.unveil_defaults {
            Defaults::Unveiled
        } else {
            Defaults::Veiled
        },
        by_task: if config.unveil_by_task {
            ByTask::Allowed
        } else {
            ByTask::Refused
        },
    }
}

fn capabilities(
    config: &PluginConfig,
    request: &TaskRequest,
    uid: u32,
) -> Result<Capabilities, CapabilityError> {
    let subject = Subject {
        is_root: uid == 0,
        owns_network: request.network_namespace.is_some(),
    };
    let options = &request.options;
    Capabilities::new(
        subject,
        &config.allow_caps,
        &options.cap_add,
        &options.cap_drop,
    )
}

/// An honest program makes one only to write to its uid_map, for which it needs a writable /proc.
fn user_namespaces(config: &PluginConfig, rules: &[Rule]) -> UserNamespaces {
    let opens_maps = |rule: &Rule| {
        rule.access.write
            && matches!(&rule.place, Place::Host(path) if Path::new("/proc").starts_with(path))
    };
    if config.allow_user_namespaces || rules.iter().any(opens_maps) {
        UserNamespaces::Allowed
    } else {
        UserNamespaces::Refused
    }
}

/// The task's own directory, or one below it, or, where the operator lets jobs unveil, any of the host.
fn work_dir(
    config: &PluginConfig,
    options: &TaskOptions,
    aliases: &[Alias],
) -> Result<Place, PlanError> {
    let path = Path::new(&options.work_dir);
    no_nul("work_dir", &options.work_dir)?;
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(PlanError::WorkDirLeaves(options.work_dir.clone()));
    }
    if path.is_absolute() && path.components().count() == 1 {
        return Err(PlanError::WorkDirRoot);
    }
    if path.is_absolute() {
        return match unveil::own_place(path, aliases) {
            Some(own) => Ok(Place::Task(own)),
            None if config.unveil_by_task => Ok(Place::Host(path.to_owned())),
            None => Err(PlanError::WorkDirOutside(options.work_dir.clone())),
        };
    }
    Ok(Place::Task(path.to_owned()))
}

/// Fails closed: without a namespace to join, a task would have the host's network.
fn network_namespace(request: &TaskRequest) -> Result<Option<PathBuf>, PlanError> {
    match &request.network_namespace {
        Some(path) if path.as_os_str().is_empty() => Err(PlanError::NoNetwork),
        namespace => Ok(namespace.clone()),
    }
}

fn command(options: &TaskOptions) -> Result<String, PlanError> {
    if options.command.is_empty() {
        return Err(PlanError::NoCommand);
    }
    no_nul("command", &options.command)?;
    Ok(options.command.clone())
}

fn args(options: &TaskOptions) -> Result<Vec<String>, PlanError> {
    if options.args.len() > MAX_ARGS {
        return Err(PlanError::TooMany {
            key: "args",
            count: options.args.len(),
            max: MAX_ARGS,
        });
    }
    options
        .args
        .iter()
        .try_for_each(|arg| no_nul("args", arg))?;
    Ok(options.args.clone())
}

fn environment(
    request: &TaskRequest,
    facts: &Facts,
    work_dir: &Place,
) -> Result<Vec<(String, String)>, PlanError> {
    let own = environment::Own {
        user: &facts.account.name,
        home: &facts.account.home,
        tmp: &facts.task_dir.path.join("tmp"),
        // Joined with nothing, the path would end in a slash.
        work_dir: &facts
            .task_dir
            .path
            .join(work_dir.as_path())
            .components()
            .collect::<PathBuf>(),
    };
    let env = environment::environment(&request.env, &request.device_env, &own);
    env.iter()
        .flat_map(|(name, value)| [name, value])
        .try_for_each(|text| no_nul("env", text))?;
    Ok(env)
}

fn oom_score_adj(options: &TaskOptions) -> Result<i16, PlanError> {
    let score = options.oom_score_adj;
    if (0..=1000).contains(&score) {
        Ok(score)
    } else {
        Err(PlanError::OomScore(score))
    }
}

/// Nomad names /dev/null for a task whose logs are disabled.
fn stdio(request: &TaskRequest, unit: &UnitName) -> Stdio {
    let null = |path: &Path| path == Path::new("") || path == Path::new("/dev/null");
    let (stdout, stderr) = (&request.stdout_path, &request.stderr_path);
    if null(stdout) && null(stderr) {
        return Stdio::Journal {
            unit: unit.to_string(),
            identifier: UnitText::new(&request.names.task).to_string(),
        };
    }
    Stdio::Fifos {
        stdout: stdout.into(),
        stderr: stderr.into(),
    }
}

fn no_nul(key: &'static str, text: &str) -> Result<(), PlanError> {
    if text.contains('\0') {
        Err(PlanError::Nul { key })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::task::types::{Names, TaskId};
    use steps::Source;

    fn request() -> TaskRequest {
        TaskRequest {
            id: TaskId::new("0a1b2c3d-1111-2222-3333-444455556666/web/deadbeef"),
            options: TaskOptions {
                command: "env".into(),
                ..TaskOptions::default()
            },
            names: Names {
                task: "web".into(),
                group: "g".into(),
                job: "j".into(),
                alloc_id: "0a1b2c3d-1111-2222-3333-444455556666".into(),
                namespace: "default".into(),
                ..Names::default()
            },
            env: BTreeMap::from([("A".into(), "b".into()), ("LD_PRELOAD".into(), "x".into())]),
            device_env: BTreeMap::new(),
            user: "nomad-80001".into(),
            alloc_dir: "/d/alloc/0a1b2c3d".into(),
            stdout_path: "/d/alloc/0a1b2c3d/alloc/logs/.web.stdout.fifo".into(),
            stderr_path: "/d/alloc/0a1b2c3d/alloc/logs/.web.stderr.fifo".into(),
            resources: limits::Resources {
                cpu_mhz: 500,
                memory_mib: 64,
                ..limits::Resources::default()
            },
            nomad_cgroup: "".into(),
            network_namespace: None,
            hosts: None,
            dns: None,
            mounts: Vec::new(),
            devices: Vec::new(),
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
            aliases: Vec::new(),
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

    fn plan(request: &TaskRequest) -> Result<Plan, PlanError> {
        Plan::new(&PluginConfig::default(), request, &facts())
    }

    #[test]
    fn a_plan_says_everything_that_will_happen() {
        let plan = plan(&request()).unwrap();
        assert_eq!(plan.unit.as_str(), "exec2-web-0a1b2c3d-deadbeef.scope");
        assert_eq!(plan.slice, unit::SHARE_SLICE);
        assert_eq!(plan.before.as_deref(), Some("nomad.service"));
        assert_eq!(plan.limits.cpu_quota_usec_per_sec, 500_000);
        assert_eq!(plan.limits.memory_max_bytes, Some(64 << 20));
        let order = plan.order;
        assert_eq!(
            (order.uid, order.gid, order.oom_score_adj),
            (80_001, 80_001, 0)
        );
        let of = |name: &str| order.env.iter().find(|(key, _)| key == name);
        assert_eq!(of("TMPDIR").unwrap().1, "/m/tmp");
        assert_eq!(of("USER").unwrap().1, "nomad-80001");
        assert_eq!(of("LD_PRELOAD"), None);
        assert_eq!(order.open_files, (1024, 4096));
        assert!(matches!(order.stdio, Stdio::Fifos { .. }));
    }

    #[test]
    fn a_task_without_logs_writes_to_the_journal() {
        let mut request = request();
        request.stdout_path = "/dev/null".into();
        request.stderr_path = "/dev/null".into();
        request.names.task = "we\nb".into();
        let expected = Stdio::Journal {
            unit: "exec2-web-0a1b2c3d-deadbeef.scope".into(),
            identifier: "we<U+000A>b".into(),
        };
        assert_eq!(plan(&request).unwrap().order.stdio, expected);
    }

    #[test]
    fn one_request_has_one_plan() {
        assert_eq!(plan(&request()).unwrap(), plan(&request()).unwrap());
    }

    #[test]
    fn a_task_with_cores_has_its_cpus_in_the_slice_of_those() {
        let mut request = request();
        request.resources.cpuset = "2-3".into();
        let plan = plan(&request).unwrap();
        assert_eq!(plan.slice, unit::RESERVE_SLICE);
        assert_eq!(plan.limits.allowed_cpus, Some([2, 3].into()));
    }

    #[test]
    fn a_network_of_its_own_may_be_administered_by_its_root_and_the_hosts_may_not() {
        const NET_ADMIN: u64 = 1 << 12;
        let mut facts = facts();
        facts.account.uid = 0;
        let bounding = |request: &TaskRequest| {
            let plan = Plan::new(&PluginConfig::default(), request, &facts).unwrap();
            plan.order.bounding & NET_ADMIN
        };
        let mut request = request();
        assert_eq!(bounding(&request), 0);
        request.network_namespace = Some("/run/netns/x".into());
        assert_eq!(bounding(&request), NET_ADMIN);
    }

    #[test]
    fn user_namespaces_are_for_tasks_that_may_write_to_proc_and_where_the_operator_allows_them() {
        let of = |allow: bool, unveil: &[&str], paths: &[&str]| {
            let config = PluginConfig {
                unveil_by_task: true,
                unveil_paths: paths.iter().map(ToString::to_string).collect(),
                allow_user_namespaces: allow,
                ..PluginConfig::default()
            };
            let mut request = request();
            request.options.unveil = unveil.iter().map(ToString::to_string).collect();
            let plan = Plan::new(&config, &request, &facts()).unwrap();
            plan.order.user_namespaces
        };
        use UserNamespaces::{Allowed, Refused};
        assert_eq!(of(true, &[], &[]), Allowed);
        for entry in ["w:/proc", "rw:/proc/", "rwxc:/"] {
            assert_eq!(of(false, &[entry], &[]), Allowed, "{entry}");
            assert_eq!(of(false, &[], &[entry]), Allowed, "{entry}");
        }
        for entry in ["r:/proc", "rxc:/", "w:/proc/sys", "w:/procs", "w:proc"] {
            assert_eq!(of(false, &[entry], &[]), Refused, "{entry}");
        }
        // What an operator says of a path holds.
        assert_eq!(of(false, &["w:/proc"], &["r:/proc"]), Refused);
    }

    #[test]
    fn a_working_directory_is_the_tasks_own_or_unveiled_with_it() {
        let config = PluginConfig {
            unveil_by_task: true,
            ..PluginConfig::default()
        };
        let of = |work_dir: &str| {
            let mut request = request();
            request.options.work_dir = work_dir.into();
            let facts = Facts {
                aliases: vec![Alias::new(Path::new("/m"), "")],
                ..facts()
            };
            let order = Plan::new(&config, &request, &facts).unwrap().order;
            let env = order
                .env
                .into_iter()
                .find(|(key, _)| key == "NOMAD_WORK_DIR");
            let rule = order
                .rules
                .into_iter()
                .find(|rule| rule.source == Source::Task);
            let rule = rule.map(|rule| format!("{}:{}", rule.access, rule.written.display()));
            (order.work_dir, env.unwrap().1, rule)
        };
        assert_eq!(of(""), (Place::Task("".into()), "/m".into(), None));
        assert_eq!(
            of("local/x"),
            (Place::Task("local/x".into()), "/m/local/x".into(), None)
        );
        assert_eq!(
            of("/m/local"),
            (Place::Task("local".into()), "/m/local".into(), None)
        );
        assert_eq!(
            of("/srv"),
            (
                Place::Host("/srv".into()),
                "/srv".into(),
                Some("rwxc:/srv".into())
            )
        );
    }

    #[test]
    fn a_mistake_is_a_sentence_and_no_plan() {
        let wrong = |change: &dyn Fn(&mut TaskRequest)| {
            let mut request = request();
            change(&mut request);
            plan(&request).unwrap_err().to_string()
        };
        let cases = [
            (wrong(&|r| r.options.command.clear()), "command must be set"),
            (
                wrong(&|r| r.options.args = vec!["a\0".into()]),
                "args contains a NUL byte",
            ),
            (
                wrong(&|r| r.options.args = vec![String::new(); MAX_ARGS + 1]),
                "args has 10001 entries",
            ),
            (
                wrong(&|r| r.options.oom_score_adj = -1),
                "oom_score_adj = -1: must be 0 to 1000",
            ),
            (
                wrong(&|r| drop(r.env.insert("X".into(), "\0".into()))),
                "env contains a NUL byte",
            ),
            (
                wrong(&|r| r.options.unveil = vec!["r:/srv".into()]),
                "task set unveil paths but driver config does not allow this",
            ),
            (
                wrong(&|r| r.network_namespace = Some("".into())),
                "network: Nomad names no namespace",
            ),
            (
                wrong(&|r| r.options.work_dir = "/srv".into()),
                "work_dir = \"/srv\": task set work_dir outside sandbox but driver config does not allow this",
            ),
            (
                wrong(&|r| r.options.work_dir = "local/../..".into()),
                "work_dir = \"local/../..\" has a \"..\" in it",
            ),
            (
                wrong(&|r| r.options.cap_add = vec!["sys_admin".into()]),
                "cap_add: task requested capability \"sys_admin\" not in driver allow_caps",
            ),
            (wrong(&|r| r.resources.cpu_mhz = 0), "cpu = 0"),
            (wrong(&|r| r.resources.memory_mib = 0), "memory = 0"),
        ];
        for (sentence, start) in cases {
            assert!(sentence.starts_with(start), "{sentence}");
        }
    }
}
