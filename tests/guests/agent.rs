//! The same promises through a real Nomad agent, where there is one: read from its API, from its log, and from the guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::Level;
use harness::nomad::real::{RealAgent, RealConfig};

use crate::case;
use crate::nomad::{Job, Scope, proc_file, said, status, until};

pub const CASES: &[Case] = &[
    case!(Limits, Agent, a_real_agent_runs_jobs_in_scopes),
    case!(Limits, Agent, a_real_agent_shows_why_a_task_did_not_start),
    case!(
        Limits,
        Agent,
        a_real_agents_node_shows_what_the_host_lacks,
        Minutes
    ),
    case!(
        Limits,
        Agent,
        a_real_agents_reserved_core_is_its_tasks_alone,
        Minutes
    ),
    case!(Limits, Agent, a_real_agent_runs_the_examples, Minutes),
    case!(
        Limits,
        Agent,
        a_real_agents_task_without_logs_writes_to_the_journal
    ),
    case!(
        Limits,
        Agent,
        a_real_agents_new_log_collector_takes_over_from_a_dead_one
    ),
];

const ENV: &str = include_str!("../nomad/env.nomad.hcl");
const EXIT7: &str = include_str!("../nomad/exit7.nomad.hcl");
const SERVICE: &str = include_str!("../nomad/service.nomad.hcl");

const VOLUMES: &str = include_str!("../nomad/volumes.nomad.hcl");
const SIDECAR: &str = include_str!("../nomad/sidecar.nomad.hcl");
const SECRET: &str = include_str!("../nomad/secret.nomad.hcl");
const OVERSUBSCRIPTION: &str = include_str!("../nomad/oversubscription.nomad.hcl");
const BRIDGE: &str = include_str!("../nomad/bridge.nomad.hcl");

pub async fn agent(context: &Context) -> Result<RealAgent> {
    agent_with(context, 2_000).await
}

async fn agent_with(context: &Context, total_compute_mhz: u64) -> Result<RealAgent> {
    RealAgent::start(RealConfig {
        plugin_config: "unveil_by_task = true".into(),
        total_compute_mhz: Some(total_compute_mhz),
        ..RealConfig::new(context.agent(), context.driver())
    })
    .await
}

/// Runs a batch job to its end; its allocation and its client status.
pub async fn to_end(agent: &RealAgent, job: &str) -> Result<(String, String)> {
    let ids = agent.run(job).await?;
    let id = ids.first().context("no allocation")?.clone();
    let status = agent.wait_for(&id, &["complete", "failed"]).await?;
    Ok((id, status))
}

pub async fn messages(agent: &RealAgent, id: &str, task: &str) -> Result<Vec<String>> {
    let events = agent.events(id, task).await?;
    Ok(events
        .into_iter()
        .map(|event| format!("{}: {}", event.kind, event.message))
        .collect())
}

/// The scope of a running task, found from outside.
pub fn scope_of(alloc: &str, task: &str) -> Result<Scope> {
    let pattern = format!("exec2-{task}-{}-*.scope", &alloc[..8]);
    let listed = said(
        "systemctl",
        &["list-units", "--plain", "--no-legend", &pattern],
    )?;
    let unit = listed
        .split_whitespace()
        .next()
        .with_context(|| format!("no {pattern}"))?
        .to_owned();
    let dir = Path::new("/sys/fs/cgroup/exec2.slice/exec2-share.slice").join(&unit);
    Ok(Scope { unit, dir })
}

fn a_real_agent_runs_jobs_in_scopes(context: &Context) -> Result<()> {
    context.block_on(async {
        let mounts_before = fs::read_to_string("/proc/1/mountinfo")?.lines().count();
        let mut agent = agent(context).await?;

        let (id, status) = to_end(&agent, ENV).await?;
        ensure!(
            status == "complete",
            "{:?}",
            messages(&agent, &id, "env").await?
        );
        let log = agent.logs(&id, "env", "stdout").await?;
        ensure!(
            log.lines().any(|line| line.starts_with("USER=nomad-8")),
            "{log}"
        );
        for name in [
            "NOMAD_ALLOC_ID=",
            "NOMAD_TASK_DIR=",
            "NOMAD_SECRETS_DIR=",
            "TMPDIR=",
        ] {
            ensure!(
                log.lines().any(|line| line.starts_with(name)),
                "no {name} in {log}"
            );
        }
        for name in ["NOTIFY_SOCKET=", "INVOCATION_ID=", "JOURNAL_STREAM="] {
            ensure!(
                !log.lines().any(|line| line.starts_with(name)),
                "{name} in {log}"
            );
        }

        let (id, status) = to_end(&agent, EXIT7).await?;
        let told = messages(&agent, &id, "exit7").await?;
        ensure!(
            status == "failed" && told.iter().any(|line| line == "Terminated: Exit Code: 7"),
            "{told:?}"
        );
        ensure!(
            agent
                .logs(&id, "exit7", "stderr")
                .await?
                .contains("to stderr")
        );

        for user in ["", "root"] {
            let job = Job::shell("cat /etc/passwd");
            let job = if user.is_empty() { job } else { job.user(user) };
            let (id, status) = to_end(&agent, &job.text()).await?;
            let stderr = agent.logs(&id, "t", "stderr").await?;
            ensure!(
                status == "failed" && stderr.contains("/etc/passwd: Permission denied"),
                "{user:?}: {stderr}"
            );
        }

        let ids = agent.run(SERVICE).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        let scope = scope_of(id, "web")?;
        let main = scope.main()?;
        let cgroup = fs::read_to_string(format!("/proc/{main}/cgroup"))?;
        ensure!(
            cgroup.trim() == format!("0::/exec2.slice/exec2-share.slice/{}", scope.unit),
            "{cgroup}"
        );
        // 500 of the 1000 MHz that each of the two cores has.
        for (file, value) in [
            ("memory.max", "134217728"),
            ("memory.low", "67108864"),
            ("cpu.max", "50000 100000"),
        ] {
            ensure!(scope.file(file)? == value, "{file}: {}", scope.file(file)?);
        }
        let shown = scope.show(&[
            "MemoryMax",
            "MemoryLow",
            "CPUQuotaPerSecUSec",
            "Description",
        ])?;
        ensure!(
            shown["MemoryMax"] == "134217728" && shown["MemoryLow"] == "67108864",
            "{shown:?}"
        );
        ensure!(shown["CPUQuotaPerSecUSec"] == "500ms", "{shown:?}");
        ensure!(
            shown["Description"].starts_with("Nomad task web of default/service/web (alloc "),
            "{shown:?}"
        );

        agent.restart().await?;
        ensure!(
            scope.main()? == main,
            "the task did not survive a restart of the agent"
        );
        agent.wait_for(id, &["running"]).await?;
        agent.crash().await?;
        ensure!(
            scope.main()? == main,
            "the task did not survive the agent's death"
        );

        agent.stop("service").await?;
        let told = messages(&agent, id, "web").await?;
        ensure!(
            told.iter().any(|line| line == "Terminated: Exit Code: 0"),
            "{told:?}"
        );
        ensure!(
            told.contains(&format!("Driver: Started in {}", scope.unit)),
            "{told:?}"
        );
        until("the scope is gone", || scope.expect_gone().ok()).await?;

        let loud = agent.plugin_lines(Level::Warn)?;
        ensure!(loud.is_empty(), "jobs that went well are no news: {loud:?}");
        agent.collect().await?;
        agent.finish().await?;
        let records = fs::read_dir("/run/nomad-driver-exec2/records")?.count();
        ensure!(records == 0, "{records} records are left");
        let mounts = fs::read_to_string("/proc/1/mountinfo")?.lines().count();
        ensure!(
            mounts == mounts_before,
            "{mounts} mounts, {mounts_before} before"
        );
        Ok(())
    })
}

fn a_real_agent_shows_why_a_task_did_not_start(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let holder = Job::command("sleep", &["600"]).text();
        let holder = holder.replace("job \"case\"", "job \"holder\"");
        let held = agent.run(&holder).await?.remove(0);
        agent.wait_for(&held, &["running"]).await?;
        let uids = status(scope_of(&held, "t")?.main()?, "Uid")?;
        let user = format!("nomad-{}", uids.split_whitespace().next().context("a uid")?);
        let is_held = format!("user {user:?} is allocation {held}'s, a task of which runs as it");
        let cases = [
            (Job::shell("true").user(&user), is_held.as_str()),
            (
                Job::shell("true").unveil(&["rz:/etc"]),
                "unveil: \"rz:/etc\" has an unknown letter 'z' in its mode",
            ),
            (
                Job::shell("true").unveil(&["r:/srv/nothing"]),
                "unveil r:/srv/nothing: no such file or directory",
            ),
            (
                Job::command("/srv/nothing", &[]),
                "command \"/srv/nothing\": no such file or directory",
            ),
            (
                Job::command("no-such-program", &[]),
                "command \"no-such-program\": not found in PATH",
            ),
            (
                Job::shell("true").user("nobody-of-that-name"),
                "nobody-of-that-name",
            ),
        ];
        for (job, sentence) in cases {
            let (id, status) = to_end(&agent, &job.text()).await?;
            let told = messages(&agent, &id, "t").await?;
            ensure!(status == "failed", "{status}: {told:?}");
            ensure!(
                told.iter().any(|line| line.contains(sentence)),
                "no {sentence:?} in {told:?}"
            );
            ensure!(
                !told.iter().any(|line| line.starts_with("Started")),
                "it counts as started: {told:?}"
            );
        }
        agent.stop("holder").await?;
        let units = said(
            "systemctl",
            &[
                "list-units",
                "--all",
                "--plain",
                "--no-legend",
                "exec2-*.scope",
            ],
        )?;
        ensure!(units.is_empty(), "{units}");
        agent.finish().await
    })
}

fn a_real_agents_node_shows_what_the_host_lacks(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut agent = agent(context).await?;
        said("systemctl", &["stop", "dbus.socket", "dbus.service"])?;
        let lost = agent
            .ready("systemd cannot be reached on the system bus")
            .await;
        said("systemctl", &["start", "dbus.socket", "dbus.service"])?;
        lost?;
        agent.ready("Healthy").await?;
        let node = agent.node().await?;
        let attributes = &node["Attributes"];
        ensure!(
            attributes["driver.exec2.unveil.tasks"] == "true",
            "{attributes}"
        );
        ensure!(
            attributes["driver.exec2.landlock.abi"]
                .as_str()
                .is_some_and(|abi| abi != "0"),
            "{attributes}"
        );
        agent.finish().await
    })
}

fn a_real_agents_reserved_core_is_its_tasks_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        // A reserved core counts with its own MHz, whatever the operator makes of the node's: here fewer than the average has.
        let mut agent = agent_with(context, 20_000).await?;
        let job = |name: &str, resources: &str| {
            let job = Job::command("sleep", &["600"]).resources(resources).text();
            job.replace("job \"case\"", &format!("job {name:?}"))
        };
        let run = async |agent: &RealAgent, name: &str, resources: &str| {
            let ids = agent.run(&job(name, resources)).await?;
            let id = ids.first().context("no allocation")?.clone();
            agent.wait_for(&id, &["running"]).await?;
            anyhow::Ok(id)
        };
        let cpus = |scope: &Scope| status(scope.main()?, "Cpus_allowed_list");
        let comes_to = async |scope: &Scope, wanted: &str| {
            until(&format!("{} has CPUs {wanted}", scope.unit), || {
                (cpus(scope).ok()? == wanted).then_some(())
            })
            .await
        };

        let before = run(&agent, "before", "cpu = 100\n memory = 32").await?;
        let before = scope_of(&before, "t")?;
        comes_to(&before, "0-1").await?;
        let owner = run(&agent, "owner", "cores = 1\n memory = 32").await?;
        let mut owner = scope_of(&owner, "t")?;
        owner.dir = Path::new("/sys/fs/cgroup/exec2.slice/exec2-reserve.slice").join(&owner.unit);
        let own = cpus(&owner)?;
        ensure!(["0", "1"].contains(&own.as_str()), "{own}");
        ensure!(
            owner.file("cpu.max")? == "100000 100000",
            "{}",
            owner.file("cpu.max")?
        );
        let other = if own == "0" { "1" } else { "0" };
        comes_to(&before, other).await?;
        let after = run(&agent, "after", "cpu = 100\n memory = 32").await?;
        let after = scope_of(&after, "t")?;
        ensure!(cpus(&after)? == other, "{}", cpus(&after)?);

        agent.restart().await?;
        ensure!(cpus(&before)? == other && cpus(&owner)? == own);
        agent.stop("owner").await?;
        comes_to(&before, "0-1").await?;
        comes_to(&after, "0-1").await?;
        for name in ["before", "after"] {
            agent.stop(name).await?;
        }
        for scope in [&before, &owner, &after] {
            until("the scope is gone", || scope.expect_gone().ok()).await?;
        }
        agent.collect().await?;
        agent.finish().await
    })
}

/// And what a job may ask for in its config: a working directory, a capability, its own name.
fn a_real_agent_runs_the_examples(context: &Context) -> Result<()> {
    let data = Path::new("/srv/data");
    fs::create_dir_all(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o777))?;
    let done = context.block_on(async {
        let agent = RealAgent::start(RealConfig {
            plugin_config: "unveil_by_task = true\n allow_caps = [\"net_bind_service\"]".into(),
            client: "host_volume \"data\" {\n path = \"/srv/data\"\n }".into(),
            total_compute_mhz: Some(2_000),
            ..RealConfig::new(context.agent(), context.driver())
        })
        .await?;
        let printed = async |job: &str, task: &str| -> Result<String> {
            let (id, status) = to_end(&agent, job).await?;
            ensure!(
                status == "complete",
                "{:?}",
                messages(&agent, &id, task).await?
            );
            agent.logs(&id, task, "stdout").await
        };
        ensure!(printed(VOLUMES, "count").await? == "1\n");
        ensure!(fs::read_to_string(data.join("runs"))? == "run\n");
        ensure!(printed(SECRET, "reader").await? == "tmpfs\n28\n");
        let limits = printed(OVERSUBSCRIPTION, "limits").await?;
        ensure!(
            limits == format!("{}\n{}\n", 32 << 20, 64 << 20),
            "{limits}"
        );
        let job = Job::shell("pwd; id -un; grep CapEff /proc/self/status | cut -f2")
            .unveil(&["r:/etc/passwd"])
            .config("work_dir = \"${NOMAD_TASK_DIR}\"")
            .config("cap_add = [\"CAP_NET_BIND_SERVICE\"]");
        let seen = printed(&job.text(), "t").await?;
        let lines: Vec<&str> = seen.lines().collect();
        ensure!(
            lines[0].ends_with("/local")
                && lines[1].starts_with("nomad-8")
                && lines[2] == "0000000000000400",
            "{seen}"
        );
        let ids = agent.run(SIDECAR).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        let mut read = String::new();
        for _ in 0..100 {
            read = agent.logs(id, "reader", "stdout").await.unwrap_or_default();
            if !read.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ensure!(read == "hello\n", "{read}");
        agent.stop("sidecar").await?;

        let ids = agent.run(BRIDGE).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        until("the bridged server answers", || {
            crate::examples::get(id)?
                .contains("hello from the bridge")
                .then_some(())
        })
        .await?;
        let main = scope_of(id, "server")?.main()?;
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
        ensure!(of(&main.to_string())? != of("1")?);
        agent.stop("bridge").await?;
        agent.finish().await
    });
    fs::remove_dir_all(data)?;
    // The agent's own, for its network namespaces.
    let script = "umount /run/netns && rmdir /run/netns";
    said("sh", &["-c", script])?;
    done
}

fn a_real_agents_task_without_logs_writes_to_the_journal(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job =
            Job::shell("echo to stdout; echo to stderr >&2").task("logs {\n disabled = true\n }");
        let (id, status) = to_end(&agent, &job.text()).await?;
        ensure!(
            status == "complete",
            "{:?}",
            messages(&agent, &id, "t").await?
        );
        said("journalctl", &["--sync"])?;
        let unit = format!("exec2-t-{}-*.scope", &id[..8]);
        let lines = said("journalctl", &["-u", &unit, "-t", "t", "-o", "cat"])?;
        ensure!(
            lines.contains("to stdout\n") && lines.contains("to stderr\n"),
            "{lines}"
        );
        agent.collect().await?;
        agent.finish().await
    })
}

fn a_real_agents_new_log_collector_takes_over_from_a_dead_one(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut agent = agent(context).await?;
        // It writes when it is told to: the collector flushes each 100 ms, and what it has read until it is killed is gone.
        let script = "trap 'exit 5' TERM
            trap 'for n in 1 2 3; do i=$((i + 1)); echo line $i.; done' HUP
            i=0; echo up; while :; do sleep 0.1; done";
        let job = Job::shell(script).task("kill_signal = \"SIGTERM\"");
        let ids = agent.run(&job.text()).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        let main = scope_of(id, "t")?.main()?;
        let hang_up = || said("kill", &["-HUP", &main.to_string()]);
        logged(&agent, id, 1).await?;
        hang_up()?;
        logged(&agent, id, 4).await?;
        for pid in collectors()? {
            said("kill", &["-KILL", &pid.to_string()])?;
        }
        hang_up()?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        ensure!(
            scope_of(id, "t")?.main()? == main,
            "it went with its collector"
        );
        ensure!(agent.logs(id, "t", "stdout").await?.lines().count() == 4);
        agent.restart().await?;
        // What it wrote meanwhile, and what it writes now.
        logged(&agent, id, 7).await?;
        hang_up()?;
        logged(&agent, id, 10).await?;
        let lines = agent.logs(id, "t", "stdout").await?;
        let expected = (1..=9).fold("up\n".to_owned(), |all, n| all + &format!("line {n}.\n"));
        ensure!(lines == expected, "{lines}");
        agent.stop("case").await?;
        let told = messages(&agent, id, "t").await?;
        ensure!(
            told.iter().any(|line| line == "Terminated: Exit Code: 5"),
            "{told:?}"
        );
        agent.collect().await?;
        agent.finish().await
    })
}

/// Waits until the log of a task has that many lines.
pub async fn logged(agent: &RealAgent, id: &str, lines: usize) -> Result<()> {
    let begun = Instant::now();
    loop {
        let log = agent.logs(id, "t", "stdout").await?;
        if log.lines().count() >= lines {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "{lines} lines: {log}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The processes `nomad logmon`.
fn collectors() -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if proc_file(pid, "cmdline")
            .is_ok_and(|line| line.trim_end_matches('\0').ends_with("\0logmon"))
        {
            pids.push(pid);
        }
    }
    ensure!(!pids.is_empty(), "no log collector");
    Ok(pids)
}
