//! Jobs that run as they should: what they print, where they live, what limits them, what is measured.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::nomad::{Agent, Config, Level};

use crate::case;
use crate::nomad::{Job, Scope, agent, printed, proc_file, to_end, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, the_first_job_prints_its_environment),
    case!(Everywhere, Ours, what_is_not_unveiled_is_closed_to_everyone),
    case!(
        Both,
        Ours,
        user_namespaces_are_for_whom_the_operator_allows_them_or_opens_proc
    ),
    case!(Both, Ours, a_service_lives_in_a_scope_of_its_own),
    case!(Kernel, Ours, the_kernel_and_systemd_have_the_jobs_limits),
    case!(Kernel, Ours, a_task_beyond_its_memory_is_killed_and_says_so),
    case!(
        Limits,
        Ours,
        a_kill_after_an_oom_kill_of_a_child_is_no_oom_kill
    ),
    case!(Limits, Ours, statistics_are_those_of_the_scope),
];

const ENV: &str = include_str!("../nomad/env.nomad.hcl");
const SERVICE: &str = include_str!("../nomad/service.nomad.hcl");
const MIB: u64 = 1 << 20;

fn the_first_job_prints_its_environment(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(ENV).await?;
        let exit = alloc.task("env")?.wait().await?;
        ensure!(exit.success(), "{exit:?}");
        alloc.stop().await?;
        let log = alloc.stdout("env")?;
        let value = |name: &str| {
            let mut lines = log.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .with_context(|| format!("no {name} in {log}"))
        };
        let uid = value("USER")?.strip_prefix("nomad-").context("USER")?;
        ensure!((80_000..90_000).contains(&uid.parse::<u32>()?), "{uid}");
        ensure!(value("NOMAD_ALLOC_ID")? == alloc.id());
        ensure!(value("NOMAD_TASK_NAME")? == "env" && value("NOMAD_JOB_ID")? == "env");
        ensure!(value("NOMAD_CPU_LIMIT")? == "100" && value("NOMAD_MEMORY_LIMIT")? == "64");
        for (variable, dir) in [
            ("NOMAD_TASK_DIR", "/local"),
            ("NOMAD_ALLOC_DIR", "/alloc"),
            ("NOMAD_SECRETS_DIR", "/secrets"),
            ("TMPDIR", "/tmp"),
        ] {
            ensure!(value(variable)?.ends_with(dir), "{log}");
        }
        ensure!(value("HOME")? == "/nonexistent", "{log}");
        ensure!(alloc.stderr("env")?.is_empty(), "{}", alloc.stderr("env")?);
        let loud = |line: &harness::nomad::Line| {
            // A container has no limits to put a task under, and is told so.
            matches!(line.level, Level::Warn | Level::Error)
                && !(context.guest().kind == Kind::Nspawn && line.message.contains("no controller"))
        };
        let loud: Vec<_> = agent.log().into_iter().filter(loud).collect();
        ensure!(loud.is_empty(), "a job that went well is no news: {loud:?}");
        agent.finish().await
    })
}

/// The kernel's word, not a missing tool's or a missing file's.
fn what_is_not_unveiled_is_closed_to_everyone(context: &Context) -> Result<()> {
    ensure!(
        fs::metadata("/etc/passwd")?.len() > 0,
        "there is nothing to see"
    );
    context.block_on(async {
        let agent = agent(context).await?;
        for user in [None, Some("root"), Some("nobody")] {
            let job = Job::shell("id -u; cat /etc/passwd; ls /etc; ls /; echo done");
            let job = user.map_or(job.clone(), |user| job.user(user));
            let ended = to_end(&agent, &job).await?;
            ensure!(ended.exit.success(), "{ended:?}");
            let printed: Vec<&str> = ended.stdout.lines().collect();
            ensure!(
                printed.len() == 2 && printed[1] == "done",
                "{user:?}: {ended:?}"
            );
            ensure!((printed[0] == "0") == (user == Some("root")), "{ended:?}");
            for path in ["cat: /etc/passwd", "'/etc'", "'/'"] {
                let mut lines = ended.stderr.lines();
                ensure!(
                    lines.any(|line| line.contains(path) && line.ends_with("Permission denied")),
                    "{user:?}, {path}: {ended:?}"
                );
            }
        }
        let job = Job::shell("cat /etc/passwd")
            .unveil(&["r:/etc/passwd"])
            .user("nobody");
        ensure!(
            printed(&agent, &job).await? == fs::read_to_string("/etc/passwd")?,
            "what is unveiled is not the file"
        );
        agent.finish().await
    })
}

fn user_namespaces_are_for_whom_the_operator_allows_them_or_opens_proc(
    context: &Context,
) -> Result<()> {
    let new = "unshare --user --net true && echo made";
    // Root in it, which a program is by writing to its uid_map.
    let mapped = "unshare --user --map-root-user id --user";
    context.block_on(async {
        for plugin in [
            "unveil_by_task = true",
            "unveil_by_task = true\nallow_user_namespaces = true",
        ] {
            let is_allowed = plugin.contains("namespaces");
            let config = Config {
                plugin: plugin.into(),
                ..Config::default()
            };
            let agent = Agent::start(context.driver(), config).await?;
            for user in ["", "nobody", "root"] {
                let job = |script: &str| match user {
                    "" => Job::shell(script),
                    user => Job::shell(script).user(user),
                };
                let made = to_end(&agent, &job(new)).await?;
                let is_told = made.stderr.contains("Operation not permitted");
                ensure!(
                    made.exit.success() == is_allowed && is_told != is_allowed,
                    "{user:?}, {plugin}: {made:?}"
                );
                let of_rules = to_end(&agent, &job(mapped)).await?;
                ensure!(!of_rules.exit.success(), "{user:?}: {of_rules:?}");
                let with_proc = job(mapped).unveil(&["rw:/proc"]);
                let said = printed(&agent, &with_proc).await?;
                ensure!(said == "0\n", "{user:?}: {said:?}");
            }
            agent.finish().await?;
        }
        Ok(())
    })
}

fn a_service_lives_in_a_scope_of_its_own(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(SERVICE).await?;
        let task = alloc.task("web")?;
        let scope = Scope::of(task)?;
        let cgroup = format!("0::/exec2.slice/exec2-share.slice/{}", scope.unit);
        let main = scope.main()?;
        for pid in [main, scope.supervisor()?] {
            ensure!(
                proc_file(pid, "cgroup")?.lines().any(|line| line == cgroup),
                "{pid}: {}",
                proc_file(pid, "cgroup")?
            );
        }
        ensure!(proc_file(main, "comm")? == "sh");

        let shown = scope.show(&[
            "ActiveState",
            "Slice",
            "Description",
            "Documentation",
            "MemoryMax",
            "MemoryLow",
            "CPUQuotaPerSecUSec",
            "TasksMax",
            "Delegate",
            "Before",
        ])?;
        let alloc_id = &alloc.id()[..8];
        let description = format!("Nomad task web of default/service/web (alloc {alloc_id})");
        for (property, value) in [
            ("ActiveState", "active"),
            ("Slice", "exec2-share.slice"),
            ("Description", description.as_str()),
            ("Documentation", "man:nomad-driver-exec2(8)"),
            ("MemoryMax", &(128 * MIB).to_string()),
            ("MemoryLow", &(64 * MIB).to_string()),
            ("CPUQuotaPerSecUSec", "500ms"),
            ("TasksMax", "16384"),
            ("Delegate", "yes"),
        ] {
            // Each word of a list is in quotes.
            let shown = shown[property].trim_matches('"');
            ensure!(shown == value, "{property}: {shown}");
        }
        // At the host's shutdown the agent stops first, and stops its tasks as it does.
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .trim_end()
            .rsplit('/')
            .next()
            .context("a unit")?
            .to_owned();
        ensure!(
            own.ends_with(".service") && shown["Before"].split(' ').any(|unit| unit == own),
            "not before {own}: {shown:?}"
        );
        if context.guest().kind == Kind::Qemu {
            ensure!(scope.file("memory.max")? == (128 * MIB).to_string());
            ensure!(scope.file("memory.low")? == (64 * MIB).to_string());
            ensure!(scope.file("cpu.max")? == "50000 100000");
            ensure!(scope.file("pids.max")? == "16384");
        }

        until("the service serves", || {
            let log = alloc.stdout("web").ok()?;
            log.starts_with("serving from /").then_some(())
        })
        .await?;
        let exit = task.stop().await?;
        ensure!(exit.code == 0 && exit.signal == 0, "{exit:?}");
        scope.expect_gone()?;
        ensure!(alloc.stdout("web")?.ends_with("asked to stop\n"));
        let events = agent.connection()?.events();
        ensure!(
            events.iter().any(|event| event.task_id == task.id()
                && event.task_name == "web"
                && event.message == format!("Started in {}", scope.unit)),
            "{events:?}"
        );
        agent.finish().await
    })
}

fn the_kernel_and_systemd_have_the_jobs_limits(context: &Context) -> Result<()> {
    struct Wanted {
        resources: &'static str,
        memory_max: &'static str,
        memory_low_mib: u64,
        cpu_max: &'static str,
        quota: &'static str,
    }
    // Before 257 a daemon-reload would round a finer quota.
    let fine = match context.guest().release.codename {
        "bookworm" => ("41000 100000", "410ms"),
        _ => ("40100 100000", "401ms"),
    };
    let all = [
        Wanted {
            resources: "cpu = 250\n memory = 40",
            memory_max: "41943040",
            memory_low_mib: 0,
            cpu_max: "25000 100000",
            quota: "250ms",
        },
        Wanted {
            resources: "cpu = 2000\n memory = 40\n memory_max = 80",
            memory_max: "83886080",
            memory_low_mib: 40,
            cpu_max: "200000 100000",
            quota: "2s",
        },
        Wanted {
            resources: "cpu = 401\n memory = 40\n memory_max = -1",
            memory_max: "max",
            memory_low_mib: 40,
            cpu_max: fine.0,
            quota: fine.1,
        },
    ];
    context.block_on(async {
        let agent = agent(context).await?;
        for wanted in all {
            let alloc = agent
                .run(
                    &Job::command("sleep", &["600"])
                        .resources(wanted.resources)
                        .text(),
                )
                .await?;
            let scope = Scope::of(alloc.only_task()?)?;
            let low = (wanted.memory_low_mib * MIB).to_string();
            let seen = [
                scope.file("memory.max")?,
                scope.file("memory.low")?,
                scope.file("cpu.max")?,
                scope.file("memory.swap.max")?,
            ];
            ensure!(
                seen == [wanted.memory_max, &low, wanted.cpu_max, "max"],
                "{}: {seen:?}",
                wanted.resources
            );
            let shown = scope.show(&["MemoryMax", "MemoryLow", "CPUQuotaPerSecUSec"])?;
            let max = match wanted.memory_max {
                "max" => "infinity",
                bytes => bytes,
            };
            ensure!(
                shown["MemoryMax"] == max
                    && shown["MemoryLow"] == low
                    && shown["CPUQuotaPerSecUSec"] == wanted.quota,
                "{}: {shown:?}",
                wanted.resources
            );
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn a_task_beyond_its_memory_is_killed_and_says_so(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        // tail keeps a line whole, however long it is.
        // With a file of the task's own in its view, which must not hide its cgroup from the supervisor.
        let job = Job::shell("exec tail /dev/zero")
            .unveil(&["r:/etc/passwd"])
            .resources("cpu = 2000\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let exit = task.wait().await?;
        ensure!(
            exit.signal == 9 && exit.code == 137 && exit.oom_killed,
            "{exit:?}"
        );
        let events = agent.connection()?.events();
        ensure!(
            events.iter().any(|event| event
                .message
                .contains("it had reached its memory limit of 32 MiB")),
            "{events:?}"
        );
        agent.finish().await
    })
}

fn a_kill_after_an_oom_kill_of_a_child_is_no_oom_kill(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "trap '' INT; (exec tail /dev/zero); echo child $?; while :; do sleep 1; done",
        )
        .task("kill_timeout = \"1s\"")
        .resources("cpu = 2000\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        until("the child is killed", || {
            (alloc.stdout("t").ok()? == "child 137\n").then_some(())
        })
        .await?;
        ensure!(task.exit().is_none(), "the task went with its child");
        let kills = Scope::of(task)?.file("memory.events")?;
        ensure!(kills.contains("\noom_kill 1"), "{kills}");
        let exit = task.stop().await?;
        ensure!(
            (exit.code, exit.signal, exit.oom_killed) == (137, 9, false),
            "{exit:?}"
        );
        agent.finish().await
    })
}

fn statistics_are_those_of_the_scope(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("dd if=/dev/zero of=local/file bs=1M count=8 2>/dev/null; echo ready; while :; do :; done");
        let job = job.resources("cpu = 200\n memory = 64");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        until("the task is busy", || {
            alloc.stdout("t").ok()?.contains("ready").then_some(())
        })
        .await?;
        let scope = Scope::of(task)?;
        let seen_before = task.stats().len();
        let sample = until("two samples later", || {
            task.stats().get(seen_before + 2).cloned()
        })
        .await?;
        let usage = sample.agg_resource_usage.context("usage")?;
        let (cpu, memory) = (usage.cpu.context("cpu")?, usage.memory.context("memory")?);

        let stat = scope.file("memory.stat")?;
        let stat = |name: &str| -> Result<u64> {
            let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
            let (_, value) = lines.find(|(key, _)| *key == name).context("memory.stat")?;
            Ok(value.parse()?)
        };
        let near = |what: &str, told: u64, kernel: u64| {
            let slack = kernel / 4 + MIB;
            ensure!(
                told > 0 && told.abs_diff(kernel) <= slack,
                "{what}: told {told}, the kernel has {kernel}"
            );
            Ok(())
        };
        near("rss", memory.rss, stat("anon")?)?;
        near("cache", memory.cache, stat("file")?)?;
        near("usage", memory.usage, scope.file("memory.current")?.parse()?)?;
        ensure!(memory.cache > 7 * MIB, "{memory:?}");
        // The quota is a fifth of a core, and the task takes all of it.
        ensure!(
            cpu.percent > 5.0 && cpu.percent < 40.0,
            "a fifth of a core is not {cpu:?}"
        );
        ensure!(
            (cpu.percent - cpu.user_mode - cpu.system_mode).abs() < 2.0,
            "{cpu:?}"
        );
        ensure!(
            (cpu.total_ticks - cpu.percent * 10.0).abs() < 20.0,
            "1000 MHz each: {cpu:?}"
        );
        ensure!(cpu.throttled_periods > 0 && cpu.throttled_time > 0, "{cpu:?}");
        alloc.stop().await?;
        agent.finish().await
    })
}
