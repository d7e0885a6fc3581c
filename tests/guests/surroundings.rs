//! What a job puts around its task: volumes, devices, names and resolvers, a working directory, capabilities.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::{Device, DnsConfig, Mount, NetworkIsolationSpec, TaskConfig};
use harness::nomad::{Agent, Config};

use crate::case;
use crate::nomad::{Job, Scope, agent, agent_with, printed, refusal, said};

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_volume_is_where_the_job_wants_it_and_the_host_is_not_changed
    ),
    case!(Speed, Ours, a_volume_that_cannot_be_laid_fails_the_start),
    case!(Both, Ours, a_device_of_a_plugin_works_in_the_task),
    case!(Speed, Ours, the_resolver_of_a_job_is_the_tasks_alone),
    case!(
        Speed,
        Ours,
        a_resolver_behind_a_stub_is_reached_from_another_network
    ),
    case!(Speed, Ours, a_name_that_nomad_gives_is_in_hosts),
    case!(Both, Ours, a_dynamic_user_finds_its_name_where_it_may_look),
    case!(Speed, Ours, a_task_starts_where_work_dir_says),
    case!(
        Both,
        Ours,
        a_capability_that_the_operator_allows_is_the_tasks
    ),
    case!(
        Speed,
        Ours,
        root_has_what_the_operator_allows_and_less_what_the_job_drops
    ),
    case!(
        Limits,
        Ours,
        a_task_reads_its_own_limits_where_runtimes_look
    ),
    case!(Kernel, Ours, limits_stand_after_a_daemon_reload),
    case!(
        Limits,
        Ours,
        a_task_has_no_more_processes_than_the_operator_allows
    ),
];

/// Runs a job whose request is changed as Nomad would fill it in, and gives what it printed.
async fn told(agent: &Agent, job: Job, change: impl Fn(&mut TaskConfig)) -> Result<String> {
    let alloc = agent.run_with(&job.text(), change).await?;
    let exit = alloc.only_task()?.wait().await?;
    alloc.stop().await?;
    ensure!(exit.success(), "{exit:?}: {}", alloc.stderr("t")?);
    alloc.stdout("t")
}

/// Why a job that would run does not, when its request is changed so.
async fn error_of(agent: &Agent, change: impl Fn(&mut TaskConfig)) -> Result<String> {
    let alloc = agent.run_with(&Job::shell("true").text(), change).await;
    Ok(alloc.err().map_or(String::new(), |error| error.to_string()))
}

fn volume(destination: &str, readonly: bool) -> Mount {
    Mount {
        task_path: destination.into(),
        host_path: "/srv/exec2-volume".into(),
        readonly,
        ..Mount::default()
    }
}

/// A directory of the host, gone with the value.
struct HostDir;

impl HostDir {
    fn new() -> Result<HostDir> {
        fs::create_dir_all("/srv/exec2-volume")?;
        fs::write("/srv/exec2-volume/file", "from the host\n")?;
        fs::set_permissions("/srv/exec2-volume", fs::Permissions::from_mode(0o777))?;
        Ok(HostDir)
    }
}

impl Drop for HostDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all("/srv/exec2-volume");
    }
}

fn a_volume_is_where_the_job_wants_it_and_the_host_is_not_changed(context: &Context) -> Result<()> {
    let _dir = HostDir::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        for user in [None, Some("root")] {
            for (destination, readonly) in [("/data/in", false), ("/mnt", true), ("local/data", false)] {
                let script = format!("cat {destination}/file; touch {destination}/new 2>/dev/null && echo written || true");
                let job = Job::shell(&script);
                let job = user.map_or(job.clone(), |user| job.user(user));
                let printed = told(&agent, job, |task| {
                    task.mounts = vec![volume(destination, readonly)];
                });
                let printed = printed.await?;
                let expected = if readonly { "from the host\n" } else { "from the host\nwritten\n" };
                ensure!(printed == expected, "{destination}: {printed}");
                ensure!(Path::new("/srv/exec2-volume/new").exists() != readonly);
                let _ = fs::remove_file("/srv/exec2-volume/new");
                ensure!(!Path::new("/data").exists(), "the host has a /data now");
            }
        }
        agent.finish().await
    })
}

fn a_volume_that_cannot_be_laid_fails_the_start(context: &Context) -> Result<()> {
    /// Destination, change of the mount, sentence.
    type Row = (&'static str, fn(&mut Mount), &'static str);
    let cases: [Row; 5] = [
        (
            "/data",
            |mount| mount.host_path = "/nope".into(),
            "mount view /nope: no such file or directory (the host's side of the volume at /data)",
        ),
        ("/opt", |_| {}, "the task's own directory lies in it"),
        (
            "/proc",
            |_| {},
            "volume_mount: destination = \"/proc\" is a directory of the driver's own",
        ),
        (
            "/data",
            |mount| mount.propagation_mode = "bidirectional".into(),
            "propagation_mode = \"bidirectional\" is not possible",
        ),
        (
            "/data",
            |mount| mount.selinux_label = "z".into(),
            "selinux_label = \"z\" is not possible",
        ),
    ];
    let _dir = HostDir::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        for (destination, change, sentence) in cases {
            let error = error_of(&agent, |task| {
                let mut mount = volume(destination, false);
                change(&mut mount);
                task.mounts = vec![mount];
            });
            let error = error.await?;
            ensure!(error.contains(sentence), "{error:?} is not {sentence:?}");
        }
        agent.finish().await
    })
}

fn a_device_of_a_plugin_works_in_the_task(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        for path in ["/dev/full", "/dev/accelerator0"] {
            let script = format!("head -c 2 {path} | wc -c; cat /etc/hostname 2>&1 >{path} | grep -o 'No space.*'; echo $EXEC2_DEVICE");
            let printed = told(&agent, Job::shell(&script), |task| {
                task.devices = vec![Device {
                    task_path: path.into(),
                    host_path: "/dev/full".into(),
                    cgroup_permissions: "rwm".into(),
                }];
                task.device_env = [("EXEC2_DEVICE".to_owned(), "0".to_owned())].into();
            });
            let printed = printed.await?;
            ensure!(printed == "2\nNo space left on device\n0\n", "{path}: {printed}");
        }
        ensure!(!Path::new("/dev/accelerator0").exists());
        agent.finish().await
    })
}

fn the_resolver_of_a_job_is_the_tasks_alone(context: &Context) -> Result<()> {
    let before = fs::read("/etc/resolv.conf")?;
    context.block_on(async {
        let agent = agent(context).await?;
        let printed = told(&agent, Job::shell("cat /etc/resolv.conf"), |task| {
            task.dns = Some(DnsConfig {
                servers: vec!["192.0.2.53".into()],
                searches: vec!["shop.example".into()],
                options: vec!["ndots:2".into()],
            });
        });
        let printed = printed.await?;
        let expected = "search shop.example\nnameserver 192.0.2.53\noptions ndots:2\n";
        ensure!(printed == expected, "{printed}");
        let error = error_of(&agent, |task| {
            task.dns = Some(DnsConfig {
                servers: vec!["dns.example".into()],
                ..DnsConfig::default()
            });
        });
        let error = error.await?;
        ensure!(
            error.contains("network.dns: server \"dns.example\" is not an IP address"),
            "{error}"
        );
        agent.finish().await
    })?;
    ensure!(fs::read("/etc/resolv.conf")? == before);
    Ok(())
}

/// The namespace, and the host's resolver as systemd-resolved leaves it.
struct Elsewhere {
    resolv_conf: Vec<u8>,
}

impl Elsewhere {
    fn new() -> Result<Elsewhere> {
        said("ip", &["netns", "add", "exec2-elsewhere"])?;
        let elsewhere = Elsewhere {
            resolv_conf: fs::read("/etc/resolv.conf")?,
        };
        fs::write("/etc/resolv.conf", "nameserver 127.0.0.53\noptions edns0\n")?;
        fs::create_dir_all("/run/systemd/resolve")?;
        fs::write("/run/systemd/resolve/resolv.conf", "nameserver 192.0.2.1\n")?;
        Ok(elsewhere)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = fs::write("/etc/resolv.conf", &self.resolv_conf);
        let _ = fs::remove_dir_all("/run/systemd/resolve");
        let script = "ip netns del exec2-elsewhere; umount /run/netns; rmdir /run/netns";
        let _ = Command::new("sh").args(["-c", script]).status();
    }
}

fn in_elsewhere(task: &mut TaskConfig) {
    task.network_isolation_spec = Some(NetworkIsolationSpec {
        mode: 1,
        path: "/run/netns/exec2-elsewhere".into(),
        ..NetworkIsolationSpec::default()
    });
}

fn a_resolver_behind_a_stub_is_reached_from_another_network(context: &Context) -> Result<()> {
    let _elsewhere = Elsewhere::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("cat /etc/resolv.conf");
        let printed = told(&agent, job.clone(), in_elsewhere).await?;
        ensure!(printed == "nameserver 192.0.2.1\n", "{printed}");
        let printed = told(&agent, job, |_| {}).await?;
        ensure!(printed.starts_with("nameserver 127.0.0.53\n"), "{printed}");
        agent.finish().await
    })
}

fn a_name_that_nomad_gives_is_in_hosts(context: &Context) -> Result<()> {
    let _elsewhere = Elsewhere::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        let printed = told(&agent, Job::shell("grep -v localhost /etc/hosts"), |task| {
            in_elsewhere(task);
            if let Some(spec) = &mut task.network_isolation_spec {
                spec.hosts_config = Some(harness::nomad::proto::driver::HostsConfig {
                    hostname: "web-1".into(),
                    address: "172.26.64.2".into(),
                });
            }
        });
        let printed = printed.await?;
        ensure!(printed == "172.26.64.2 web-1\n", "{printed}");
        agent.finish().await
    })
}

fn a_dynamic_user_finds_its_name_where_it_may_look(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("[ \"$(id -un)\" = \"$USER\" ] && [ \"$(id -gn)\" = \"$USER\" ] && echo it; head -n 1 /etc/passwd");
        let lists = ["r:/etc/passwd", "r:/etc/group"];
        let seen = printed(&agent, &job.clone().unveil(&lists)).await?;
        let first = fs::read_to_string("/etc/passwd")?;
        let first = first.lines().next().unwrap_or_default();
        ensure!(seen == format!("it\n{first}\n"), "{seen}");
        ensure!(!fs::read_to_string("/etc/passwd")?.contains("nomad-"));
        let job = Job::shell("id -un && head -n 1 /etc/passwd").user("nobody").unveil(&lists);
        ensure!(printed(&agent, &job).await? == format!("nobody\n{first}\n"));
        agent.finish().await
    })
}

fn a_task_starts_where_work_dir_says(context: &Context) -> Result<()> {
    let _dir = HostDir::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        let pwd = Job::shell("pwd; echo $NOMAD_WORK_DIR; touch here");
        for (work_dir, end) in [
            ("local", "/local"),
            ("${NOMAD_ALLOC_DIR}/data", "/alloc/data"),
            ("/srv/exec2-volume", "/srv/exec2-volume"),
        ] {
            let job = pwd.clone().config(&format!("work_dir = \"{work_dir}\""));
            let seen = printed(&agent, &job).await?;
            let lines: Vec<&str> = seen.lines().collect();
            ensure!(
                lines.len() == 2 && lines[0] == lines[1] && lines[0].ends_with(end),
                "{work_dir}: {seen}"
            );
        }
        ensure!(Path::new("/srv/exec2-volume/here").exists());
        for (work_dir, sentence) in [
            (
                "local/nope",
                "work_dir local/nope: no such file or directory",
            ),
            ("../..", "work_dir = \"../..\" has a \"..\" in it"),
        ] {
            let error = refusal(
                &agent,
                &pwd.clone().config(&format!("work_dir = \"{work_dir}\"")),
            )
            .await?;
            ensure!(error.to_string().contains(sentence), "{error}");
        }
        agent.finish().await?;
        let closed = Agent::start(context.driver(), Config::default()).await?;
        let error = refusal(&closed, &pwd.config("work_dir = \"/srv\"")).await?;
        ensure!(
            error.to_string().contains(
                "task set work_dir outside sandbox but driver config does not allow this"
            ),
            "{error}"
        );
        closed.finish().await
    })
}

/// Perl binds a port that only the privileged may: what the capability is for.
const BINDS: &str = "perl -MIO::Socket::INET -e 'exit !IO::Socket::INET->new(LocalAddr => \"127.0.0.1\", LocalPort => 81, Listen => 1)' && echo bound || echo refused";

fn a_capability_that_the_operator_allows_is_the_tasks(context: &Context) -> Result<()> {
    // The guest's own bound on privileged ports.
    let bound = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    let before = fs::read_to_string(bound)?;
    fs::write(bound, "1024")?;
    let done = context.block_on(async {
        let allowed = Config {
            plugin: "unveil_by_task = true\n allow_caps = [\"CAP_NET_BIND_SERVICE\", \"sys_nice\"]"
                .into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), allowed).await?;
        let listed = agent
            .fingerprint()
            .and_then(|it| it.attributes.get("driver.exec2.caps.allowlist").cloned());
        ensure!(
            format!("{listed:?}").contains("net_bind_service,sys_nice"),
            "{listed:?}"
        );
        let job = Job::shell(BINDS);
        let with = job.clone().config("cap_add = [\"net_bind_service\"]");
        ensure!(printed(&agent, &with).await? == "bound\n");
        ensure!(printed(&agent, &with.clone().user("nobody")).await? == "bound\n");
        ensure!(printed(&agent, &job).await? == "refused\n");
        let dropped = with.config("cap_drop = [\"NET_BIND_SERVICE\"]");
        ensure!(printed(&agent, &dropped).await? == "refused\n");
        agent.finish().await?;

        let agent = agent_with(context, Config::default()).await?;
        let error = refusal(
            &agent,
            &Job::shell("true").config("cap_add = [\"sys_admin\"]"),
        )
        .await?;
        ensure!(
            error
                .to_string()
                .contains("task requested capability \"sys_admin\" not in driver allow_caps"),
            "{error}"
        );
        agent.finish().await?;
        let wrong = Config {
            plugin: "allow_caps = [\"root\"]".into(),
            ..Config::default()
        };
        let error = Agent::start(context.driver(), wrong)
            .await
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        ensure!(
            error.contains("SetConfig failed: allow_caps: \"root\" is no capability"),
            "{error}"
        );
        Ok(())
    });
    fs::write(bound, before)?;
    done
}

fn root_has_what_the_operator_allows_and_less_what_the_job_drops(context: &Context) -> Result<()> {
    const SYS_NICE: u64 = 1 << 23;
    const CHOWN: u64 = 1;
    context.block_on(async {
        let allowed = Config {
            plugin: "unveil_by_task = true\n allow_caps = [\"sys_nice\"]".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), allowed).await?;
        let job = Job::shell("grep CapEff /proc/self/status | cut -f2").user("root");
        let of = async |job: &Job| -> Result<u64> {
            Ok(u64::from_str_radix(printed(&agent, job).await?.trim(), 16)?)
        };
        ensure!(of(&job).await? & (SYS_NICE | CHOWN) == SYS_NICE | CHOWN);
        let less = job.clone().config("cap_drop = [\"chown\"]");
        ensure!(of(&less).await? & (SYS_NICE | CHOWN) == SYS_NICE);
        let only = job.config("cap_drop = [\"all\"]\n cap_add = [\"sys_nice\"]");
        ensure!(of(&only).await? == SYS_NICE);
        agent.finish().await
    })
}

fn a_task_reads_its_own_limits_where_runtimes_look(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = Agent::start(context.driver(), Config::default()).await?;
        let job = Job::shell(
            "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; cat /proc/self/cgroup",
        )
        .resources("cpu = 500\n memory = 64");
        let seen = printed(&agent, &job).await?;
        ensure!(
            seen == format!("{}\n50000 100000\n0::/\n", 64 << 20),
            "{seen}"
        );
        agent.finish().await
    })
}

/// systemd reads a transient unit's settings back from its files, and an older one keeps less of a quota in them.
fn limits_stand_after_a_daemon_reload(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job =
            Job::command("sleep", &["600"]).resources("cpu = 333\n memory = 64\n memory_max = 128");
        let alloc = agent.run(&job.text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let files = ["cpu.max", "memory.max", "memory.low", "pids.max"];
        let read =
            || -> Result<Vec<String>> { files.iter().map(|file| scope.file(file)).collect() };
        let before = read()?;
        let quota: u64 = before[0].split(' ').next().context("a quota")?.parse()?;
        match context.guest().release.codename {
            "bookworm" => ensure!(quota == 34_000, "{before:?}"),
            _ => ensure!(quota.abs_diff(33_300) <= 333, "{before:?}"),
        }
        ensure!(before[1].trim() == (128u64 << 20).to_string(), "{before:?}");
        for _ in 0..2 {
            said("systemctl", &["daemon-reload"])?;
            ensure!(
                read()? == before,
                "{:?} after the reload, {before:?} before",
                read()?
            );
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_task_has_no_more_processes_than_the_operator_allows(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = Config {
            plugin: "pids_max = 20".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        let script = "cat /sys/fs/cgroup/pids.max; for i in $(seq 40); do sleep 5 & done 2>/dev/null; echo end";
        let ended = crate::nomad::to_end(&agent, &Job::shell(script)).await?;
        ensure!(ended.stdout.starts_with("20\n"), "{ended:?}");
        // The shell gives up at the first fork that fails.
        ensure!(!ended.stdout.contains("end"), "{ended:?}");
        agent.finish().await
    })
}
