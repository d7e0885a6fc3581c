//! What happens to tasks from outside: systemd reloads and starts anew, an administrator steers their scopes, processes of
//! the driver's are killed. The client is told the truth, and nothing is left.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::{Descriptors, Ground};
use harness::nomad::proto::driver::TaskState;
use harness::nomad::{Agent, Allocation, RpcError, Task};

use crate::ahead::ahead;
use crate::case;
use crate::nomad::{Job, Scope, agent, proc_file, said, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, tasks_and_limits_outlast_systemds_reloads),
    case!(Both, Ours, tasks_and_limits_outlast_new_systemds),
    case!(Both, Ours, a_scope_stopped_by_hand_tells_its_signal),
    case!(Speed, Ours, a_slice_stopped_by_hand_ends_all_tasks),
    case!(Both, Ours, a_frozen_task_still_runs_and_goes_on),
    case!(Both, Ours, a_frozen_task_is_stopped),
    case!(Speed, Ours, a_task_that_is_stopped_by_a_signal_is_stopped),
    case!(Limits, Ours, limits_set_by_hand_hold),
    case!(Both, Ours, a_killed_supervisor_takes_its_task_along),
    case!(
        Speed,
        Ours,
        a_helper_killed_while_parked_is_a_passing_failure
    ),
    case!(Both, Ours, a_shutdown_stops_the_agent_before_its_tasks),
];

/// How often systemd is disturbed.
const ROUNDS: u32 = 4;

/// Writes a line every moment, and says goodbye.
pub const COUNTER: &str =
    "trap 'exit 3' INT; echo up; while :; do date +%s%N >>local/ticks; sleep 0.05; done";

/// A task that runs, and its scope.
pub async fn running(agent: &Agent, job: &Job) -> Result<(Allocation, Task, Scope)> {
    let alloc = agent.run(&job.text()).await?;
    let task = alloc.only_task()?.clone();
    let scope = Scope::of(&task)?;
    Ok((alloc, task, scope))
}

/// The same, once it has said that it is up.
pub async fn up(agent: &Agent, job: &Job) -> Result<(Allocation, Task, Scope)> {
    let (alloc, task, scope) = running(agent, job).await?;
    until("the task is up", || {
        (alloc.stdout("t").ok()? == "up\n").then_some(())
    })
    .await?;
    Ok((alloc, task, scope))
}

/// As the driver tells it.
pub async fn is_running(task: &Task) -> Result<bool> {
    let told = task.inspect().await?.task.context("task")?;
    Ok(told.state() == TaskState::Running)
}

/// It has ended like this, the client is told so, and nothing is left.
pub async fn ended(
    of: &(Allocation, Task, Scope),
    expected: (i32, i32),
    ground: &Ground,
) -> Result<()> {
    exited(of, expected).await?;
    nothing_left(ground).await
}

/// The same while other tasks run.
pub async fn exited(
    (alloc, task, scope): &(Allocation, Task, Scope),
    expected: (i32, i32),
) -> Result<()> {
    let exit = task.wait().await?;
    ensure!(
        (exit.code, exit.signal) == expected,
        "{}: {exit:?}, not {expected:?}",
        scope.unit
    );
    ensure!(exit.message.is_empty(), "{exit:?}");
    scope.expect_gone()?;
    alloc.stop().await
}

/// What systemd collects by itself comes a moment later.
pub async fn nothing_left(ground: &Ground) -> Result<()> {
    let begun = Instant::now();
    loop {
        let left = ground.left()?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "{left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub fn own_cgroup() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(Path::new("/sys/fs/cgroup").join(own.context("no cgroup version 2")?))
}

fn tasks_and_limits_outlast_systemds_reloads(context: &Context) -> Result<()> {
    outlast(context, "daemon-reload")
}

fn tasks_and_limits_outlast_new_systemds(context: &Context) -> Result<()> {
    outlast(context, "daemon-reexec")
}

/// systemd reads a unit's settings back from its own files, while other tasks start and stop.
fn outlast(context: &Context, verb: &str) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job = Job::shell(COUNTER).resources("cpu = 333\n memory = 64\n memory_max = 128");
        let steady = up(&agent, &job).await?;
        let (_, task, scope) = &steady;
        let (main, before) = (scope.main()?, limits(scope)?);
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        ahead(plugin).await?;
        // Its statistics keep files open as long as the client listens.
        until("the first statistics", || {
            (!task.stats().is_empty()).then_some(())
        })
        .await?;
        let open = Descriptors::of(plugin)?;

        let ending = (Job::shell("exit 4").text(), (4, 0));
        let stopped = (Job::command("sleep", &["600"]).text(), (130, 2));
        let (mut done, mut refusals) = (0, Vec::new());
        let rounds = Cell::new(0);
        let work = async {
            for (job, expected) in [&ending, &stopped].into_iter().cycle() {
                if rounds.get() >= ROUNDS && done > 0 {
                    break;
                }
                match agent.run(job).await {
                    Ok(alloc) => {
                        let task = alloc.only_task()?;
                        let exit = match *expected == ending.1 {
                            true => task.wait().await?,
                            false => task.stop().await?,
                        };
                        ensure!((exit.code, exit.signal) == *expected, "{exit:?}");
                        alloc.stop().await?;
                        done += 1;
                    }
                    Err(error) => {
                        let told = error.downcast_ref::<RpcError>();
                        ensure!(told.is_some_and(|told| told.recoverable), "{error:#}");
                        refusals.push(told.map(|told| told.message.clone()));
                    }
                }
            }
            anyhow::Ok(())
        };
        let disturbed = async {
            loop {
                let status = tokio::process::Command::new("systemctl")
                    .arg(verb)
                    .status()
                    .await?;
                ensure!(status.success(), "{verb}: {status}");
                rounds.set(rounds.get() + 1);
                // Time for something else, and more of it each time: an emulated machine is slow.
                tokio::time::sleep(Duration::from_millis(500) * rounds.get()).await;
            }
        };
        tokio::select! {
            worked = work => worked?,
            never = disturbed => return never,
        }
        said("systemctl", &[verb])?;
        context.note(format!(
            "{} times {verb}: {done} starts done, {} refused for now",
            rounds.get(),
            refusals.len()
        ));
        for sentence in refusals.into_iter().flatten() {
            context.note(sentence);
        }

        let more = || Descriptors::of(plugin).map(|now| now.beyond(&open));
        until("the plugin keeps nothing open", || {
            more().ok()?.is_empty().then_some(())
        })
        .await
        .with_context(|| format!("{:?}", more()))?;
        let after = limits(scope)?;
        ensure!(after == before, "{after:?}, before {before:?}");
        ensure!(scope.main()? == main && is_running(task).await?);
        task.stop().await?;
        ended(&steady, (3, 0), &ground).await?;
        agent.finish().await
    })
}

/// As the kernel and as systemd have them. A container has no controllers, but systemd knows its limits.
fn limits(scope: &Scope) -> Result<Vec<String>> {
    let files = ["memory.max", "memory.low", "cpu.max", "pids.max"];
    let mut limits: Vec<String> = files
        .iter()
        .map(|file| format!("{file} {}", scope.file(file).unwrap_or_default()))
        .collect();
    let mut shown: Vec<String> = scope
        .show(&[
            "MemoryMax",
            "MemoryLow",
            "CPUQuotaPerSecUSec",
            "TasksMax",
            "Delegate",
            "OOMPolicy",
            "KillMode",
            "InvocationID",
        ])?
        .into_iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    shown.sort();
    limits.append(&mut shown);
    Ok(limits)
}

fn a_scope_stopped_by_hand_tells_its_signal(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let words: [(&[&str], _); 4] = [
            (&["stop"], (143, 15)),
            (&["kill", "--signal=KILL"], (137, 9)),
            (&["kill", "--signal=USR1"], (138, 10)),
            (&["kill", "--signal=TERM"], (143, 15)),
        ];
        for (words, expected) in words {
            let sleeper = running(&agent, &Job::command("sleep", &["600"])).await?;
            ensure!(is_running(&sleeper.1).await?);
            said("systemctl", &[words, &[sleeper.2.unit.as_str()]].concat())?;
            ended(&sleeper, expected, &ground)
                .await
                .with_context(|| format!("{words:?}"))?;
        }
        agent.finish().await
    })
}

fn a_slice_stopped_by_hand_ends_all_tasks(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let sleeper = Job::command("sleep", &["600"]);
        let one = running(&agent, &sleeper).await?;
        let other = running(&agent, &sleeper).await?;
        said("systemctl", &["stop", "exec2.slice"])?;
        exited(&one, (143, 15)).await?;
        ended(&other, (143, 15), &ground).await?;

        let again = running(&agent, &sleeper).await?;
        again.1.signal("SIGTERM").await?;
        ended(&again, (143, 15), &ground).await?;
        agent.finish().await
    })
}

fn a_frozen_task_still_runs_and_goes_on(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let counter = up(&agent, &Job::shell(COUNTER)).await?;
        let (_, task, scope) = &counter;
        let ticks = task.paths().local.join("ticks");
        let count = || fs::metadata(&ticks).map_or(0, |ticks| ticks.len());
        said("systemctl", &["freeze", &scope.unit])?;
        ensure!(scope.file("cgroup.events")?.contains("frozen 1"));
        let stood = count();
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(count() == stood, "it goes on while it is frozen");
        ensure!(is_running(task).await? && task.exit().is_none());
        // It is dealt with later.
        task.signal("SIGURG").await?;

        said("systemctl", &["thaw", &scope.unit])?;
        until("it goes on", || (count() > stood).then_some(())).await?;
        ensure!(is_running(task).await?);
        task.stop().await?;
        ended(&counter, (3, 0), &ground).await?;
        agent.finish().await
    })
}

/// The kill has to reach it all the same.
fn a_frozen_task_is_stopped(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job = Job::shell(COUNTER).task("kill_timeout = \"1s\"");
        let counter = up(&agent, &job).await?;
        let (_, task, scope) = &counter;
        said("systemctl", &["freeze", &scope.unit])?;
        let begun = Instant::now();
        let stopped = task.stop().await;
        if stopped.is_err() {
            // Or the next case would meet it.
            said("systemctl", &["thaw", &scope.unit])?;
        }
        let (exit, took) = (stopped?, begun.elapsed());
        context.note(format!("{exit:?} after {:.1} s", took.as_secs_f64()));
        ensure!(took < Duration::from_secs(10), "{took:?}");
        // systemd takes a frozen cgroup away a moment later.
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        // Killed frozen, or thawed in time to hear the signal.
        let expected = match exit.signal {
            0 => (3, 0),
            _ => (137, 9),
        };
        ended(&counter, expected, &ground).await?;
        agent.finish().await
    })
}

fn a_task_that_is_stopped_by_a_signal_is_stopped(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job = Job::shell(COUNTER).task("kill_timeout = \"1s\"");
        let counter = up(&agent, &job).await?;
        let (_, task, scope) = &counter;
        task.signal("SIGSTOP").await?;
        let main = scope.main()?;
        until("it stands still", || {
            let state = crate::nomad::status(main, "State").ok()?;
            state.starts_with('T').then_some(())
        })
        .await?;
        ensure!(is_running(task).await?);
        let begun = Instant::now();
        task.stop().await?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(10), "{took:?}");
        // The SIGCONT that follows kill_signal lets it say goodbye.
        ended(&counter, (3, 0), &ground).await?;
        agent.finish().await
    })
}

fn limits_set_by_hand_hold(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let counter = up(&agent, &Job::shell(COUNTER)).await?;
        let (_, task, scope) = &counter;
        let set = ["set-property", "--runtime", &scope.unit];
        let limits = ["MemoryMax=48M", "CPUQuota=20%"];
        said("systemctl", &[&set[..], &limits].concat())?;
        let expect = || -> Result<()> {
            let seen = (scope.file("memory.max")?, scope.file("cpu.max")?);
            let expected = ((48u64 << 20).to_string(), "20000 100000".to_owned());
            ensure!(seen == expected, "{seen:?}");
            Ok(())
        };
        expect()?;
        said("systemctl", &["daemon-reload"])?;
        expect().context("after a daemon-reload")?;
        said("systemctl", &["daemon-reexec"])?;
        expect().context("after a daemon-reexec")?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        expect().context("after a restart of the plugin")?;
        ensure!(is_running(task).await?);
        task.stop().await?;
        exited(&counter, (3, 0)).await?;
        agent.finish().await
    })
}

fn a_killed_supervisor_takes_its_task_along(context: &Context) -> Result<()> {
    let script = "trap '' INT TERM HUP
        for n in 1 2 3; do (setsid sh -c 'sleep 600 & sleep 600' &); done
        echo up
        while :; do sleep 0.1; done";
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let scattered = up(&agent, &Job::shell(script)).await?;
        let (_, _, scope) = &scattered;
        let processes = until("all are there", || {
            scope.processes().ok().filter(|all| all.len() >= 11)
        })
        .await?;
        said("kill", &["-KILL", &scope.supervisor()?.to_string()])?;
        ended(&scattered, (137, 9), &ground).await?;
        let is_alive = |pid: &&u32| Path::new(&format!("/proc/{pid}")).exists();
        let alive: Vec<_> = processes.iter().filter(is_alive).collect();
        ensure!(alive.is_empty(), "{alive:?}");
        agent.finish().await
    })
}

/// It is parked for as long as the bus does not pass on the plugin's call.
fn a_helper_killed_while_parked_is_a_passing_failure(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        let shown = crate::scopes::show("dbus.service", &["MainPID"])?;
        let bus = Stopped::process(&shown["MainPID"])?;
        let job = Job::command("sleep", &["600"]).text();
        let kill = async {
            let helper = until("the helper is there", || helper_of(plugin).ok().flatten()).await?;
            // It has done what it does before it is parked.
            tokio::time::sleep(Duration::from_millis(200)).await;
            said("kill", &["-KILL", &helper.to_string()])?;
            drop(bus);
            anyhow::Ok(())
        };
        let (started, killed) = tokio::join!(agent.run(&job), kill);
        killed?;
        let error = started.err().context("it counts as started")?;
        let error = error.downcast::<RpcError>()?;
        ensure!(error.recoverable, "{error:?}");
        // Seen by its silence, or by its absence from the scope.
        ensure!(error.message.ends_with("; was it killed?"), "{error}");
        nothing_left(&ground).await?;

        let again = running(&agent, &Job::command("sleep", &["600"])).await?;
        again.1.signal("SIGTERM").await?;
        ended(&again, (143, 15), &ground).await?;
        agent.finish().await
    })
}

/// The child of the plugin that is to become a task's supervisor.
fn helper_of(plugin: u32) -> Result<Option<u32>> {
    let mut children = String::new();
    for thread in fs::read_dir(format!("/proc/{plugin}/task"))? {
        children.push_str(&fs::read_to_string(thread?.path().join("children"))?);
    }
    let mut pids = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    Ok(pids.find(|pid| proc_file(*pid, "comm").is_ok_and(|comm| comm == "exec2-launch")))
}

/// A process that stands still until this is dropped.
struct Stopped(String);

impl Stopped {
    fn process(pid: &str) -> Result<Stopped> {
        said("kill", &["-STOP", pid])?;
        Ok(Stopped(pid.to_owned()))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = said("kill", &["-CONT", &self.0]);
    }
}

const TELLS_ITS_SIGNAL: &str =
    "trap 'date +%s%N >local/signalled; exit 5' TERM; echo up; while :; do sleep 0.02; done";

/// The time that a file tells, once it is there.
fn nanos(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The agent's service is stood in for by one that takes a while to stop, as an agent does that drains its node. The plugin
/// is moved there. What systemd does at a shutdown is to stop both at once.
fn a_shutdown_stops_the_agent_before_its_tasks(context: &Context) -> Result<()> {
    const SERVICE: &str = "stand-in.service";
    let times = tempfile::Builder::new()
        .prefix("times-")
        .tempdir_in("/opt")?;
    let stopped = times.path().join("stopped");
    let say = format!("sleep 1; date +%s%N >{}", stopped.display());
    said(
        "systemd-run",
        &[
            "--quiet",
            "--collect",
            "--unit=stand-in",
            "--property=KillMode=process",
            &format!("--property=ExecStopPost=/bin/sh -c '{say}'"),
            "sleep",
            "600",
        ],
    )?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        let service = Path::new("/sys/fs/cgroup/system.slice").join(SERVICE);
        fs::write(service.join("cgroup.procs"), plugin.to_string())?;
        let task = up(&agent, &Job::shell(TELLS_ITS_SIGNAL)).await?;
        let (_, of, scope) = &task;
        let shown = scope.show(&["Before"])?;
        let mut before = shown["Before"].split(' ');
        ensure!(before.any(|unit| unit == SERVICE), "{shown:?}");
        // systemd would leave it behind in a cgroup that is nobody's.
        fs::write(own_cgroup()?.join("cgroup.procs"), plugin.to_string())?;

        said("systemctl", &["stop", "--no-block", SERVICE, &scope.unit])?;
        let signalled = of.paths().local.join("signalled");
        let signalled = until("the task is signalled", || nanos(&signalled)).await?;
        let stopped = nanos(&stopped).context("the task was signalled before the agent stopped")?;
        ensure!(
            stopped <= signalled,
            "the agent stopped at {stopped}, the task was signalled at {signalled}"
        );
        ended(&task, (5, 0), &ground).await?;
        agent.finish().await
    });
    let _ = said("systemctl", &["stop", SERVICE]);
    done
}
