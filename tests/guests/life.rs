//! From start to end: exit codes, signals, stops, and that nothing is left.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::proto::driver::{TaskState, WaitTaskRequest};

use crate::case;
use crate::nomad::{Job, Scope, agent, said, to_end, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, an_exit_is_reported_as_it_was),
    case!(Both, Ours, a_task_without_logs_writes_to_the_journal),
    case!(Both, Ours, a_task_survives_a_dead_log_collector),
    case!(Both, Ours, a_stop_leaves_nothing),
    case!(Both, Ours, a_stop_ends_what_the_task_has_scattered),
    case!(Both, Ours, a_natural_end_leaves_nothing),
    case!(Speed, Ours, a_stop_returns_when_the_last_process_has_ended),
    case!(Speed, Ours, a_stop_by_systemd_is_an_end_like_any_other),
    case!(Speed, Ours, signals_reach_the_main_process),
    case!(Speed, Ours, an_inspection_tells_pid_unit_and_times),
    case!(Speed, Ours, many_tasks_start_and_stop_at_once),
];

const EXIT7: &str = include_str!("../nomad/exit7.nomad.hcl");

fn an_exit_is_reported_as_it_was(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(EXIT7).await?;
        let exit = alloc.only_task()?.wait().await?;
        ensure!(
            (
                exit.code,
                exit.signal,
                exit.oom_killed,
                exit.message.as_str()
            ) == (7, 0, false, ""),
            "{exit:?}"
        );
        ensure!(alloc.stdout("exit7")? == "to stdout\n");
        ensure!(alloc.stderr("exit7")? == "to stderr\n");

        for (script, code, signal) in [
            ("exit 255", 255, 0),
            ("kill -TERM $$", 143, 15),
            ("kill -KILL $$", 137, 9),
            ("kill -SEGV $$", 139, 11),
        ] {
            let exit = to_end(&agent, &Job::shell(script)).await?.exit;
            ensure!(
                (exit.code, exit.signal, exit.oom_killed) == (code, signal, false),
                "{script}: {exit:?}"
            );
            ensure!(!exit.success(), "{script}: {exit:?}");
        }
        agent.finish().await
    })
}

fn a_task_without_logs_writes_to_the_journal(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("echo one; echo two >&2; echo '<3>three'; exit 4")
            .task("logs {\n disabled = true\n }");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let unit = Scope::of_id(&task.id())?.unit;
        let exit = task.wait().await?;
        ensure!((exit.code, &*exit.message) == (4, ""), "{exit:?}");
        alloc.stop().await?;
        said("journalctl", &["--sync"])?;
        let lines = said("journalctl", &["-u", &unit, "-t", "t", "-o", "json"])?;
        let mut seen = Vec::new();
        for line in lines.lines() {
            let entry: serde_json::Value = serde_json::from_str(line)?;
            let field = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
            ensure!(field("_SYSTEMD_UNIT") == unit, "{line}");
            seen.push((field("MESSAGE"), field("PRIORITY")));
        }
        seen.sort();
        let pair = |text: &str, priority: &str| (text.to_owned(), priority.to_owned());
        let expected = [pair("one", "6"), pair("three", "3"), pair("two", "4")];
        ensure!(seen == expected, "{seen:?}");
        agent.finish().await
    })
}

/// Nomad's log collector is a process of its own, and may die. The agent makes a new one when it is started again.
fn a_task_survives_a_dead_log_collector(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "trap 'exit 5' TERM; for i in $(seq 2000); do echo line $i; [ $i != 3 ] || touch local/up; sleep 0.02; done",
        );
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let main = Scope::of(task)?.main()?;
        let up = task.paths().local.join("up");
        until("the task writes", || up.exists().then_some(())).await?;
        task.kill_collectors();
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(task.exit().is_none(), "it went with its log: {:?}", task.exit());
        said("kill", &["-TERM", &main.to_string()])?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (5, 0), "{exit:?}");
        alloc.stop().await?;
        agent.finish().await
    })
}

/// A task that goes when asked, one that says goodbye, and one that does not hear.
fn a_stop_leaves_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        for (job, code, signal) in [
            (Job::shell("echo up; exec sleep 600"), 130, 2),
            (
                Job::shell("trap 'echo bye; exit 3' INT; echo up; while :; do sleep 0.05; done"),
                3,
                0,
            ),
            (
                Job::shell("trap '' INT; echo up; while :; do sleep 0.05; done")
                    .task("kill_timeout = \"500ms\""),
                137,
                9,
            ),
            (
                Job::shell("trap 'exit 4' USR1; echo up; while :; do sleep 0.05; done")
                    .task("kill_signal = \"SIGUSR1\""),
                4,
                0,
            ),
        ] {
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let scope = Scope::of(task)?;
            until("the task is up", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            let exit = task.stop().await?;
            ensure!(
                (exit.code, exit.signal) == (code, signal),
                "{job:?}: {exit:?}"
            );
            ensure!(!exit.oom_killed, "{exit:?}");
            scope.expect_gone()?;
            alloc.stop().await?;
            let left = ground.left()?;
            ensure!(left.is_empty(), "{left:?}");
        }
        agent.finish().await
    })
}

/// Children, grandchildren in sessions of their own, orphans, a stopped one, and a sub-cgroup of the task's own.
fn a_stop_ends_what_the_task_has_scattered(context: &Context) -> Result<()> {
    let script = "trap '' INT TERM HUP
        for n in 1 2 3 4 5; do
          sleep 600 &
          (setsid sleep 600 &)
          (trap '' INT; setsid sh -c 'sleep 600 & sleep 600' &)
        done
        sleep 600 & kill -STOP $!
        echo up
        while :; do sleep 0.1; done";
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        for user in ["root", "nobody"] {
            let job = Job::shell(script)
                .user(user)
                .task("kill_timeout = \"200ms\"");
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let scope = Scope::of(task)?;
            until("the task is up", || {
                (alloc.stdout("t").ok()? == "up\n" && scope.processes().ok()?.len() >= 27)
                    .then_some(())
            })
            .await
            .with_context(|| format!("{:?}", scope.processes()))?;
            let exit = task.stop().await?;
            ensure!((exit.code, exit.signal) == (137, 9), "{exit:?}");
            scope.expect_gone()?;
            alloc.stop().await?;
            let left = ground.left()?;
            ensure!(left.is_empty(), "{left:?}");
        }
        agent.finish().await
    })
}

fn a_natural_end_leaves_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job =
            Job::shell("sleep 600 & (setsid sleep 600 &) ; touch local/x /tmp/y; echo up; exit 0");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let exit = task.wait().await?;
        ensure!(exit.success(), "{exit:?}");
        scope.expect_gone()?;
        ensure!(alloc.stdout("t")? == "up\n");
        // The second start of a task goes by another id, and so by another scope.
        task.restart().await?;
        ensure!(Scope::of(task)?.unit != scope.unit);
        task.wait().await?;
        alloc.stop().await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        agent.finish().await
    })
}

/// Only noted, as time is no fact on a busy machine; the bound catches a wait for a timeout.
fn a_stop_returns_when_the_last_process_has_ended(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let mut times = Vec::new();
        for _ in 0..10 {
            let job = Job::command("sleep", &["600"]).task("kill_timeout = \"30s\"");
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let begun = Instant::now();
            task.stop().await?;
            times.push(begun.elapsed());
            alloc.stop().await?;
        }
        times.sort();
        context.note(format!(
            "stop and destroy of a willing task: median {:.1} ms, longest {:.1} ms",
            times[5].as_secs_f64() * 1e3,
            times[9].as_secs_f64() * 1e3
        ));
        ensure!(times[5] < Duration::from_secs(3), "{times:?}");
        agent.finish().await
    })
}

fn a_stop_by_systemd_is_an_end_like_any_other(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent
            .run(&Job::shell("trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done").text())
            .await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        said("systemctl", &["stop", &scope.unit])?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (5, 0), "{exit:?}");
        scope.expect_gone()?;

        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        said("systemctl", &["kill", "--signal=SIGKILL", &scope.unit])?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (137, 9), "{exit:?}");
        scope.expect_gone()?;
        agent.finish().await
    })
}

fn signals_reach_the_main_process(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("trap 'echo hup' HUP; echo up; while :; do sleep 0.02; done");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let says = async |text: &str| {
            until(text, || (alloc.stdout("t").ok()? == text).then_some(())).await
        };
        says("up\n").await?;
        task.signal("SIGHUP").await?;
        says("up\nhup\n").await?;
        task.signal("hup").await?;
        says("up\nhup\nhup\n").await?;
        for (name, sentence) in [
            ("SIGNONSENSE", "signal \"SIGNONSENSE\" is unknown"),
            ("", "signal must be set"),
        ] {
            let error = task.signal(name).await.err().context("it was sent")?;
            ensure!(format!("{error:#}").contains(sentence), "{error:#}");
        }
        ensure!(task.exit().is_none(), "a signal that is none ended it");
        task.signal("SIGKILL").await?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (137, 9), "{exit:?}");
        agent.finish().await
    })
}

fn an_inspection_tells_pid_unit_and_times(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let seen = task.inspect().await?;
        let driver = seen.driver.context("driver")?.attributes;
        ensure!(driver["pid"] == scope.main()?.to_string(), "{driver:?}");
        ensure!(driver["unit"] == scope.unit, "{driver:?}");
        let told = seen.task.context("task")?;
        ensure!(told.id == task.id() && told.name == "t", "{told:?}");
        ensure!(told.state() == TaskState::Running, "{told:?}");
        let started = told.started_at.context("started_at")?.seconds;
        let now = std::time::UNIX_EPOCH.elapsed()?.as_secs().cast_signed();
        ensure!((0..120).contains(&(now - started)), "{started}, now {now}");

        // Whoever asks twice is told twice, at the same time.
        let wait = || async {
            let request = WaitTaskRequest { task_id: task.id() };
            let answer = agent.connection()?.driver().wait_task(request).await?;
            anyhow::Ok(answer.into_inner().result.context("result")?.signal)
        };
        let (one, two, _) = tokio::try_join!(wait(), wait(), async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            task.signal("SIGTERM").await
        })?;
        ensure!((one, two) == (15, 15), "{one}, {two}");
        agent.finish().await
    })
}

fn many_tasks_start_and_stop_at_once(context: &Context) -> Result<()> {
    const TASKS: usize = 30;
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job = Job::shell("echo up; exec sleep 600").text();
        let mut allocs = Vec::new();
        let begun = Instant::now();
        let runs: Vec<_> = (0..TASKS).map(|_| agent.run(&job)).collect();
        for run in join_all(runs).await {
            allocs.push(run?);
        }
        context.note(format!("{TASKS} starts: {:?}", begun.elapsed()));
        for alloc in &allocs {
            ensure!(Scope::of(alloc.only_task()?)?.processes()?.len() == 2);
        }
        let begun = Instant::now();
        for stop in join_all(allocs.iter().map(|alloc| alloc.stop()).collect()).await {
            stop?;
        }
        context.note(format!("{TASKS} stops: {:?}", begun.elapsed()));
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        agent.finish().await
    })
}

/// All of them at once, in this task.
pub async fn join_all<F: Future>(all: Vec<F>) -> Vec<F::Output> {
    let mut all: Vec<_> = all
        .into_iter()
        .map(|one| (Some(Box::pin(one)), None))
        .collect();
    std::future::poll_fn(|context| {
        let mut is_done = true;
        for (future, output) in &mut all {
            if let Some(pending) = future {
                match pending.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => {
                        *output = Some(value);
                        *future = None;
                    }
                    std::task::Poll::Pending => is_done = false,
                }
            }
        }
        if is_done {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    all.into_iter().filter_map(|(_, output)| output).collect()
}
