//! What is said about a task is what happened to it: who ended it, by which signal, at which limit. And who may touch it.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::{DestroyTaskRequest, StartTaskRequest};
use harness::nomad::{Agent, Allocation, Config};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::case;
use crate::nomad::{Job, Scope, agent, said, status, until};

pub const CASES: &[Case] = &[
    case!(
        Limits,
        Ours,
        an_oom_kill_is_told_with_process_limit_and_peak
    ),
    case!(Limits, Ours, a_task_that_has_ended_is_watched_no_more),
    case!(Kernel, Ours, an_oom_kill_of_a_child_is_told_at_once),
    case!(
        Limits,
        Ours,
        an_end_because_of_a_killed_child_is_an_oom_kill
    ),
    case!(Speed, Ours, an_end_from_outside_is_told),
    case!(Both, Ours, an_end_without_a_record_is_what_the_kernel_says),
    case!(Speed, Ours, a_stop_that_had_to_kill_is_told),
    case!(Both, Ours, every_signal_arrives_however_it_is_spelled),
    case!(
        Both,
        Ours,
        all_processes_are_signalled_where_the_operator_wants_it
    ),
    case!(Speed, Ours, a_scope_of_another_owner_is_left_alone),
];

/// What was told of a task.
fn told(agent: &Agent, alloc: &Allocation) -> Result<Vec<String>> {
    let id = alloc.only_task()?.id();
    let events = agent.connection()?.events().into_iter();
    let events = events.filter(|event| event.task_id == id);
    Ok(events.map(|event| event.message).collect())
}

async fn until_told(agent: &Agent, alloc: &Allocation, sentence: &str) -> Result<()> {
    let is_told = || {
        told(agent, alloc)
            .ok()?
            .iter()
            .any(|line| line.contains(sentence))
            .then_some(())
    };
    until(sentence, is_told)
        .await
        .with_context(|| format!("{:?}", told(agent, alloc)))
}

fn an_oom_kill_is_told_with_process_limit_and_peak(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("echo up; exec tail /dev/zero").resources("cpu = 2000\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let pid = task.inspect().await?.driver.context("driver")?.attributes["pid"].clone();
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal, exit.oom_killed) == (137, 9, true), "{exit:?}");
        let unit = Scope::of(task)?.unit;
        let sentence = format!(
            "The kernel's OOM killer ended process {pid} (tail) of {unit}: it had reached its memory limit of 32 MiB (its peak is 32 MiB)"
        );
        until_told(&agent, &alloc, &sentence).await?;
        let kills = told(&agent, &alloc)?;
        let kills = kills.iter().filter(|line| line.contains("OOM killer")).count();
        ensure!(kills == 1, "told {kills} times");
        agent.finish().await
    })
}

/// A file of a cgroup that is removed would keep its watch, and the kernel's memory for it.
fn a_task_that_has_ended_is_watched_no_more(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        let watches = || -> Result<usize> {
            let mut count = 0;
            for entry in fs::read_dir(format!("/proc/{plugin}/fdinfo"))?.flatten() {
                let info = fs::read_to_string(entry.path()).unwrap_or_default();
                count += info
                    .lines()
                    .filter(|line| line.starts_with("inotify wd:"))
                    .count();
            }
            Ok(count)
        };
        let running = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let with_one = watches()?;
        for _ in 0..3 {
            let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
            ensure!(
                watches()? == with_one + 1,
                "{} beside {with_one}",
                watches()?
            );
            alloc.stop().await?;
        }
        ensure!(
            watches()? == with_one,
            "{} instead of {with_one}",
            watches()?
        );
        running.stop().await?;
        ensure!(watches()? == with_one - 1);
        agent.finish().await
    })
}

fn an_oom_kill_of_a_child_is_told_at_once(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job =
            Job::shell("trap 'exit 0' TERM; (exec tail /dev/zero); while :; do sleep 0.2; done");
        let alloc = agent
            .run(&job.resources("cpu = 2000\n memory = 32").text())
            .await?;
        let task = alloc.only_task()?;
        until_told(&agent, &alloc, "(tail) of").await?;
        ensure!(task.exit().is_none(), "the task went with its child");
        task.signal("SIGTERM").await?;
        let exit = task.wait().await?;
        ensure!(
            (exit.code, exit.signal, exit.oom_killed) == (0, 0, false),
            "{exit:?}"
        );
        let kills = told(&agent, &alloc)?;
        let kills = kills
            .iter()
            .filter(|line| line.contains("OOM killer"))
            .count();
        ensure!(kills == 1, "told {kills} times");
        agent.finish().await
    })
}

fn an_end_because_of_a_killed_child_is_an_oom_kill(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job =
            Job::shell("(exec tail /dev/zero); exit $?").resources("cpu = 2000\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let exit = alloc.only_task()?.wait().await?;
        ensure!(
            (exit.code, exit.signal, exit.oom_killed) == (137, 0, true),
            "{exit:?}"
        );
        agent.finish().await
    })
}

fn an_end_from_outside_is_told(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let stopped = "was stopped from outside of Nomad: all of it got SIGTERM";
        let killed = "was killed from outside of Nomad, with its supervisor";
        let plain = || Job::shell("trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done");
        let by: [(&str, Option<&str>); 4] = [
            ("systemctl stop", Some(stopped)),
            ("systemctl kill --signal=SIGKILL", Some(killed)),
            ("nomad", None),
            ("itself", None),
        ];
        for (who, sentence) in by {
            let job = match who {
                "itself" => Job::shell("echo up; kill -TERM $$"),
                _ => plain(),
            };
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            until("the task is up", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            let unit = Scope::of(task)?.unit;
            match who {
                "nomad" => drop(task.stop().await?),
                "itself" => {}
                command => {
                    let words: Vec<&str> =
                        command.split(' ').skip(1).chain([unit.as_str()]).collect();
                    said("systemctl", &words)?;
                }
            }
            let exit = task.wait().await?;
            let expected = match who {
                "systemctl stop" => (5, 0),
                "itself" => (143, 15),
                // Nomad's own SIGINT, which the task does not expect.
                "nomad" => (130, 2),
                _ => (137, 9),
            };
            ensure!((exit.code, exit.signal) == expected, "{who}: {exit:?}");
            if let Some(sentence) = sentence {
                until_told(&agent, &alloc, sentence).await?;
            }
            let outside = told(&agent, &alloc)?;
            let outside = outside
                .iter()
                .filter(|line| line.contains("from outside"))
                .count();
            ensure!(
                outside == usize::from(sentence.is_some()),
                "{who}: {outside}"
            );
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

/// A plugin that is not the supervisor's parent learns nothing of it but that it is gone. The kernel keeps the end of a process
/// for whoever has its pidfd since 6.15.
fn an_end_without_a_record_is_what_the_kernel_says(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        let supervisor = Scope::of(task)?.supervisor()?.to_string();
        said("kill", &["-KILL", &supervisor])?;
        let exit = task.wait().await?;
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let mut numbers = release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        let kernel = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if kernel >= (6, 15) {
            ensure!(
                (exit.code, exit.signal, &*exit.message) == (137, 9, ""),
                "{exit:?}"
            );
            until_told(&agent, &alloc, "was killed from outside of Nomad").await?;
        } else {
            ensure!(
                exit.message.contains("ended without an exit record"),
                "{exit:?}"
            );
        }
        ensure!(!exit.success() && !exit.oom_killed, "{exit:?}");
        agent.finish().await
    })
}

fn a_stop_that_had_to_kill_is_told(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("trap '' INT; echo up; while :; do sleep 0.05; done");
        let alloc = agent
            .run(&job.task("kill_timeout = \"300ms\"").text())
            .await?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        alloc.only_task()?.stop().await?;
        until_told(
            &agent,
            &alloc,
            "has not ended within 0.3 s of signal 2, and is killed",
        )
        .await?;
        agent.finish().await
    })
}

/// All that a process can catch, twice each, in turns by name and by number.
fn every_signal_arrives_however_it_is_spelled(context: &Context) -> Result<()> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    const KILL_STOP_CHLD: [i32; 3] = [9, 19, 17];
    context.block_on(async {
        let agent = agent(context).await?;
        // dash's `wait` returns for each signal that it traps; sleep is started anew only when it has ended.
        let script = "for n in $(seq 1 64); do case $n in 9|19|17|32|33) ;; *) trap \"echo got $n\" $n ;; esac; done
            sleep 600 & echo up; while :; do wait; done";
        let alloc = agent.run(&Job::shell(script).text()).await?;
        let task = alloc.only_task()?;
        let mut expected = "up\n".to_owned();
        until("the task is up", || (alloc.stdout("t").ok()? == expected).then_some(())).await?;
        for number in (1..=31).chain(34..=64) {
            if KILL_STOP_CHLD.contains(&number) {
                continue;
            }
            let name = match number {
                1..=31 => NAMES[usize::try_from(number)? - 1].to_owned(),
                34 => "RTMIN".into(),
                35..=49 => format!("RTMIN+{}", number - 34),
                64 => "RTMAX".into(),
                _ => format!("RTMAX-{}", 64 - number),
            };
            for spelled in [format!("SIG{name}"), name.to_lowercase(), number.to_string()] {
                task.signal(&spelled).await.with_context(|| spelled.clone())?;
                expected += &format!("got {number}\n");
                until(&spelled, || (alloc.stdout("t").ok()? == expected).then_some(()))
                    .await
                    .with_context(|| format!("{:?}", alloc.stdout("t")))?;
            }
        }
        ensure!(task.exit().is_none(), "a signal ended it");
        agent.finish().await
    })
}

fn all_processes_are_signalled_where_the_operator_wants_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = Config {
            plugin: "signal_all = true".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        let loops = "trap \"echo $1\" USR1; echo up; while :; do sleep 0.02; done";
        let script = format!(
            "echo '{loops}' >local/loop; for n in 1 2 3; do setsid sh local/loop $n & done; sh local/loop 4 & . local/loop"
        );
        let alloc = agent.run(&Job::shell(&script.replace("$1", "$1 $$")).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let lines = || -> Option<usize> { Some(alloc.stdout("t").ok()?.lines().count()) };
        until("all are up", || (lines()? == 5).then_some(())).await?;
        task.signal("SIGUSR1").await?;
        until("all heard", || (lines()? == 10).then_some(()))
            .await
            .with_context(|| format!("{:?}", alloc.stdout("t")))?;

        let supervisor = scope.supervisor()?;
        let is_in = |pid: u32, of: char| status(pid, "State").is_ok_and(|state| state.starts_with(of));
        // A shell whose child was stopped between its vfork and its exec waits for it, and for nothing else.
        let waits_for_stopped = |pid: u32| {
            let parent = pid.to_string();
            let is_child = |other: &u32| status(*other, "PPid").is_ok_and(|it| it == parent);
            let others = scope.processes().unwrap_or_default();
            is_in(pid, 'D') && others.iter().filter(|it| is_child(it)).any(|it| is_in(*it, 'T'))
        };
        let is_stopped = |pid: u32| is_in(pid, 'T') || waits_for_stopped(pid);
        let stopped = || -> Option<(BTreeSet<u32>, BTreeSet<u32>)> {
            Some(scope.processes().ok()?.into_iter().partition(|pid| is_stopped(*pid)))
        };
        task.signal("SIGSTOP").await?;
        until("all but the supervisor are stopped", || {
            let (_, others) = stopped()?;
            (others == BTreeSet::from([supervisor])).then_some(())
        })
        .await
        .with_context(|| format!("{:?}", stopped()))?;
        task.signal("SIGCONT").await?;
        until("all go on", || stopped()?.0.is_empty().then_some(())).await?;

        task.signal("SIGKILL").await?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (137, 9), "{exit:?}");
        ensure!(!exit.oom_killed && exit.message.is_empty(), "{exit:?}");
        let told = told(&agent, &alloc)?;
        ensure!(!told.iter().any(|line| line.contains("outside")), "{told:?}");
        alloc.stop().await?;
        scope.expect_gone()?;
        agent.finish().await
    })
}

fn a_scope_of_another_owner_is_left_alone(context: &Context) -> Result<()> {
    const OWNER: &str = "trusted.nomad-driver-exec2.owner";
    context.block_on(async {
        let first = agent(context).await?;
        let alloc = first.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let config = task
            .handle()
            .and_then(|handle| handle.config)
            .context("a configuration")?;
        let mut owner = [0; 200];
        let length = getxattr(&scope.dir, OWNER, &mut owner)?;
        let owner = String::from_utf8_lossy(&owner[..length]).into_owned();
        ensure!(owner == format!("node {}", config.node_id), "{owner}");

        // Another agent's plugin knows whose tasks its own are by the first of them.
        let second = agent(context).await?;
        let own = second.run(&Job::command("sleep", &["600"]).text()).await?;
        let before = scope.processes()?;
        for other in ["node of-another-agent", "run"] {
            setxattr(&scope.dir, OWNER, other.as_bytes(), XattrFlags::empty())?;
            let mut driver = second.connection()?.driver();
            let destroy = DestroyTaskRequest {
                task_id: task.id(),
                force: true,
            };
            let refused = driver
                .destroy_task(destroy)
                .await
                .err()
                .context("destroyed")?;
            let sentence = format!("{} belongs to {other}, and is left alone", scope.unit);
            ensure!(refused.message().contains(&sentence), "{refused}");
            let start = StartTaskRequest {
                task: Some(config.clone()),
            };
            let refused = driver.start_task(start).await.err().context("started")?;
            let sentence = format!("unit {} already exists and belongs to {other}", scope.unit);
            ensure!(refused.message().contains(&sentence), "{refused}");
            ensure!(scope.processes()? == before, "{other}'s task was touched");
        }
        setxattr(&scope.dir, OWNER, owner.as_bytes(), XattrFlags::empty())?;
        own.stop().await?;
        second.finish().await?;
        ensure!(scope.processes()? == before && task.exit().is_none());
        alloc.stop().await?;
        first.finish().await
    })
}
