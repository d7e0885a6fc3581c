//! The plugin comes and goes, the tasks stay: restarts, crashes, ends that nobody saw, handles that make no sense.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::Agent;
use harness::nomad::proto::driver::{
    DestroyTaskRequest, RecoverTaskRequest, StartTaskRequest, StopTaskRequest, TaskHandle,
    WaitTaskRequest,
};

use crate::case;
use crate::nomad::{Job, Scope, agent, said, until};

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_task_outlives_restarts_and_crashes_of_the_plugin
    ),
    case!(Speed, Ours, an_upgrade_leaves_tasks_running),
    case!(Both, Ours, an_end_that_no_plugin_saw_is_told_by_its_record),
    case!(Speed, Ours, an_agent_that_crashed_finds_its_tasks_again),
    case!(Speed, Ours, a_senseless_handle_is_refused_with_a_sentence),
    case!(Speed, Ours, a_stranger_with_the_pid_of_a_task_is_left_alone),
    case!(
        Speed,
        Ours,
        a_destroy_of_an_unknown_task_cleans_up_by_its_name
    ),
    case!(Speed, Ours, a_second_start_of_an_id_makes_no_second_copy),
    case!(Speed, Ours, a_start_after_a_lost_one_takes_its_place),
    case!(
        Speed,
        Ours,
        a_start_that_nomad_forgot_is_ended_by_the_next_one
    ),
    case!(Speed, Ours, a_failed_unit_does_not_block_a_start),
    case!(
        Speed,
        Ours,
        a_bus_that_restarts_during_starts_and_stops_loses_nothing
    ),
    case!(Speed, Ours, a_task_that_ends_without_a_bus_leaves_nothing),
];

fn a_task_outlives_restarts_and_crashes_of_the_plugin(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "trap 'echo hup' HUP; trap 'exit 23' USR2; echo up; while :; do sleep 0.05; done",
        );
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let main = scope.main()?;
        let says = async |text: &str| {
            until(text, || (alloc.stdout("t").ok()? == text).then_some(())).await
        };
        says("up\n").await?;

        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ensure!(scope.main()? == main && task.exit().is_none());
        task.signal("SIGHUP").await?;
        says("up\nhup\n").await?;

        let lost = agent.kill_plugin().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ensure!(scope.main()? == main && task.exit().is_none());
        ensure!(task.inspect().await?.driver.context("driver")?.attributes["unit"] == scope.unit);
        task.signal("SIGHUP").await?;
        says("up\nhup\nhup\n").await?;

        task.signal("SIGUSR2").await?;
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (23, 0), "{exit:?}");
        scope.expect_gone()?;
        agent.finish().await
    })
}

/// A package manager puts another file in the place of the one that runs.
fn an_upgrade_leaves_tasks_running(context: &Context) -> Result<()> {
    context.block_on(async {
        let dir = tempfile::tempdir_in("/opt")?;
        let (program, next) = (
            dir.path().join("nomad-driver-exec2"),
            dir.path().join("next"),
        );
        fs::copy(context.driver(), &program)?;
        let agent = Agent::start(&program, harness::nomad::Config::default()).await?;
        let exe = async || {
            let plugin = agent.plugin_pid().await.context("a plugin")?;
            anyhow::Ok(fs::read_link(format!("/proc/{plugin}/exe"))?)
        };
        let job = Job::shell("trap 'exit 6' INT; echo up; while :; do sleep 0.05; done");
        let before = agent.run(&job.text()).await?;
        fs::copy(context.driver(), &next)?;
        fs::rename(&next, &program)?;
        ensure!(exe().await?.to_string_lossy().ends_with(" (deleted)"));
        // The old plugin starts the old helper still.
        let between = agent.run(&job.text()).await?;
        let mut mains = Vec::new();
        for alloc in [&before, &between] {
            until("the task is up", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            mains.push(Scope::of(alloc.only_task()?)?.main()?);
        }
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ensure!(exe().await? == program, "{:?}", exe().await?);
        for (alloc, main) in [&before, &between].into_iter().zip(mains) {
            let task = alloc.only_task()?;
            ensure!(Scope::of(task)?.main()? == main && task.exit().is_none());
            let exit = task.stop().await?;
            ensure!((exit.code, exit.signal) == (6, 0), "{exit:?}");
        }
        agent.finish().await
    })
}

fn an_end_that_no_plugin_saw_is_told_by_its_record(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let mut allocs = Vec::new();
        for script in [
            "while ! [ -e local/go ]; do sleep 0.05; done; exit 9",
            "while ! [ -e local/go ]; do sleep 0.05; done; kill -QUIT $$",
            "exec sleep 600",
        ] {
            allocs.push(agent.run(&Job::shell(script).text()).await?);
        }
        let scopes = allocs
            .iter()
            .map(|alloc| Scope::of(alloc.only_task()?))
            .collect::<Result<Vec<_>>>()?;
        let locals: Vec<_> = allocs
            .iter()
            .map(|alloc| anyhow::Ok(alloc.only_task()?.paths().local.clone()))
            .collect::<Result<_>>()?;

        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        for local in &locals[..2] {
            fs::write(local.join("go"), "")?;
        }
        // The last one loses its supervisor, and with it its whole namespace: there is no record.
        let supervisor = scopes[2].supervisor()?.to_string();
        said("kill", &["-KILL", &supervisor])?;
        for scope in &scopes {
            until("the scope is empty", || (!scope.dir.exists()).then_some(())).await?;
        }

        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.len() == 1, "{lost:?}");
        let reason = &lost[0].1.message;
        ensure!(
            reason.contains(&scopes[2].unit) && reason.contains("left no exit record"),
            "{reason}"
        );
        for (alloc, code, signal) in [(&allocs[0], 9, 0), (&allocs[1], 131, 3)] {
            let exit = alloc.only_task()?.wait().await?;
            ensure!((exit.code, exit.signal) == (code, signal), "{exit:?}");
        }
        for (alloc, scope) in allocs.iter().zip(&scopes) {
            scope.expect_gone()?;
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn an_agent_that_crashed_finds_its_tasks_again(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent
            .run(&Job::shell("trap 'exit 6' INT; echo up; while :; do sleep 0.05; done").text())
            .await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let plugin = agent.plugin_pid().await;
        let (agent, lost) = agent.crash().await.reattach().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ensure!(
            agent.plugin_pid().await == plugin,
            "the plugin was not kept"
        );
        let exit = task.stop().await?;
        ensure!((exit.code, exit.signal) == (6, 0), "{exit:?}");
        scope.expect_gone()?;
        agent.finish().await
    })
}

/// The driver's answer to a handle.
pub async fn recover(agent: &Agent, handle: TaskHandle) -> Result<Result<(), String>> {
    let request = RecoverTaskRequest {
        task_id: String::new(),
        handle: Some(handle),
    };
    let answer = agent.connection()?.driver().recover_task(request).await;
    Ok(answer
        .map(drop)
        .map_err(|status| status.message().to_owned()))
}

fn a_senseless_handle_is_refused_with_a_sentence(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let good = task.handle().context("a handle")?;
        let other_id = |handle: &TaskHandle, id: &str| {
            let mut handle = handle.clone();
            if let Some(config) = handle.config.as_mut() {
                config.id = id.into();
            }
            handle
        };
        // A task that the driver does not know yet, so that it has to look at the handle.
        let strange = other_id(&good, "11111111-2222-3333-4444-555555555555/t/0badcafe");
        let with = |from: &str, to: &str| -> Result<TaskHandle> {
            let state = String::from_utf8(good.driver_state.clone())?;
            ensure!(state.contains(from), "{state}");
            Ok(TaskHandle {
                driver_state: state.replace(from, to).into_bytes(),
                ..strange.clone()
            })
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let cases = [
            (
                TaskHandle {
                    driver_state: Vec::new(),
                    ..strange.clone()
                },
                "the task's handle cannot be read",
            ),
            (
                TaskHandle {
                    driver_state: vec![0x81, 0xa3, b'P', b'I', b'X', 7],
                    ..strange.clone()
                },
                "the task's handle cannot be read",
            ),
            (
                TaskHandle {
                    version: 99,
                    ..strange.clone()
                },
                "the task's handle has version 99, this driver reads 1",
            ),
            (with(boot.trim(), "another boot")?, "the host was rebooted"),
            (
                with(&scope.unit, "ssh.service")?,
                "its handle names no unit of this driver",
            ),
        ];
        for (handle, sentence) in cases {
            let error = recover(&agent, handle).await?;
            let error = error
                .err()
                .with_context(|| format!("recovered: {sentence}"))?;
            ensure!(error.contains(sentence), "{sentence:?} is not in {error:?}");
        }
        let known = recover(&agent, good).await?;
        ensure!(known == Ok(()), "a task that it has already: {known:?}");
        ensure!(scope.processes()?.len() == 2, "the task was touched");
        alloc.stop().await?;
        agent.finish().await
    })
}

/// The numbers of the handle belong to others by now; only the start times tell.
fn a_stranger_with_the_pid_of_a_task_is_left_alone(context: &Context) -> Result<()> {
    let mut stranger = std::process::Command::new("sleep").arg("600").spawn()?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let mut handle = task.handle().context("a handle")?;
        let mut state: serde_json::Value = serde_json::from_slice(&handle.driver_state)?;
        for process in ["supervisor", "main"] {
            state[process]["pid"] = stranger.id().into();
        }
        handle.driver_state = serde_json::to_vec(&state)?;
        if let Some(config) = handle.config.as_mut() {
            config.id = "11111111-2222-3333-4444-555555555555/t/0badcafe".into();
        }
        let error = recover(&agent, handle).await?.err().context("recovered")?;
        ensure!(error.contains("its supervisor is gone"), "{error}");
        ensure!(stranger.try_wait()?.is_none(), "the stranger was killed");
        ensure!(scope.processes()?.len() == 2, "the task was touched");
        alloc.stop().await?;
        agent.finish().await
    });
    stranger.kill()?;
    stranger.wait()?;
    done
}

fn a_destroy_of_an_unknown_task_cleans_up_by_its_name(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let id = "12345678-2222-3333-4444-555555555555/t/0badcafe";
        let unit = "exec2-t-12345678-0badcafe.scope";
        let mut orphan = tokio::process::Command::new("systemd-run")
            .args([
                "--scope",
                "--slice=exec2-share.slice",
                &format!("--unit={unit}"),
                "sh",
                "-c",
                "trap '' TERM INT; sleep 600 & wait",
            ])
            .stderr(std::process::Stdio::null())
            .spawn()?;
        let scope = Scope::of_id(id)?;
        until("the orphan runs", || {
            (scope.processes().ok()?.len() >= 2).then_some(())
        })
        .await?;
        let record = Path::new("/run/nomad-driver-exec2/records").join(unit);
        fs::create_dir_all("/run/nomad-driver-exec2/records")?;
        fs::write(&record, "")?;

        let destroy = || async {
            let request = DestroyTaskRequest {
                task_id: id.into(),
                force: true,
            };
            agent.connection()?.driver().destroy_task(request).await?;
            anyhow::Ok(())
        };
        destroy().await?;
        orphan.wait().await?;
        scope.expect_gone()?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");

        // Twice is fine, and so are the other calls about a task that is no more.
        destroy().await?;
        let mut driver = agent.connection()?.driver();
        let request = StopTaskRequest {
            task_id: id.into(),
            timeout: None,
            signal: String::new(),
        };
        driver.stop_task(request).await?;
        let request = WaitTaskRequest { task_id: id.into() };
        let waited =
            tokio::time::timeout(Duration::from_secs(10), driver.wait_task(request)).await?;
        let said = match waited {
            Err(status) => status.message().to_owned(),
            Ok(answer) => answer.into_inner().err,
        };
        ensure!(said.contains("task does not exist"), "{said:?}");
        agent.finish().await
    })
}

fn a_second_start_of_an_id_makes_no_second_copy(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let before = scope.processes()?;
        let request = StartTaskRequest {
            task: task.handle().context("a handle")?.config,
        };
        let again = agent.connection()?.driver().start_task(request).await;
        let error = again.err().context("started twice")?;
        ensure!(
            error.message() == format!("task with ID {} already started", task.id()),
            "{error}"
        );
        ensure!(scope.processes()? == before, "a second copy");
        alloc.stop().await?;
        agent.finish().await
    })
}

/// Nomad starts a task once more, under the same id, when the plugin died in the call. Whatever the first try left goes.
fn a_start_after_a_lost_one_takes_its_place(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let first = scope.processes()?;
        let request = StartTaskRequest {
            task: task.handle().context("a handle")?.config,
        };
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;

        let other = Agent::start(context.driver(), harness::nomad::Config::default()).await?;
        let mut driver = other.connection()?.driver();
        driver.start_task(request).await?;
        let second = scope.processes()?;
        ensure!(second.len() == 2, "{first:?}, {second:?}");
        ensure!(
            second.iter().all(|pid| !first.contains(pid)),
            "{first:?}, {second:?}"
        );
        for pid in first {
            // Killed before the call returned; its parent died with the first plugin, so that PID 1 reaps it.
            until(&format!("{pid} is reaped"), || {
                (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
            })
            .await?;
        }
        let request = DestroyTaskRequest {
            task_id: task.id(),
            force: true,
        };
        driver.destroy_task(request).await?;
        scope.expect_gone()?;
        other.finish().await?;

        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.len() == 1, "{lost:?}");
        alloc.stop().await?;
        agent.finish().await
    })
}

/// An agent that died before it noted the handle starts the task anew under a new id, once with the plugin that has the first
/// copy, once with another one.
fn a_start_that_nomad_forgot_is_ended_by_the_next_one(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let beside = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let beside = Scope::of(beside.only_task()?)?;
        let task = alloc.only_task()?;
        let mut config = task
            .handle()
            .and_then(|handle| handle.config)
            .context("a configuration")?;
        for path in [&mut config.stdout_path, &mut config.stderr_path] {
            *path = "/dev/null".into();
        }
        let other = Agent::start(context.driver(), harness::nomad::Config::default()).await?;
        let mut last = Scope::of(task)?;
        for (driver, start) in [
            (&agent, "00000001"),
            (&agent, "00000002"),
            (&other, "00000003"),
        ] {
            let (before, _) = config.id.rsplit_once('/').context("an id")?;
            config.id = format!("{before}/{start}");
            let request = StartTaskRequest {
                task: Some(config.clone()),
            };
            driver.connection()?.driver().start_task(request).await?;
            let scope = Scope::of_id(&config.id)?;
            ensure!(scope.processes()?.len() == 2, "{start}");
            last.expect_gone()
                .with_context(|| format!("before {start}"))?;
            last = scope;
        }
        ensure!(
            beside.processes()?.len() == 2,
            "another allocation's task was touched"
        );
        let request = DestroyTaskRequest {
            task_id: config.id.clone(),
            force: true,
        };
        other.connection()?.driver().destroy_task(request).await?;
        last.expect_gone()?;
        other.finish().await?;
        agent.finish().await
    })
}

/// A scope of the task's name that failed, and that systemd was told to keep.
fn a_failed_unit_does_not_block_a_start(context: &Context) -> Result<()> {
    let fail = |unit: &str| {
        let made = std::process::Command::new("systemd-run")
            .args([
                "--scope",
                "--slice=exec2-share.slice",
                "--property=CollectMode=inactive",
                "--property=RuntimeMaxSec=1",
                "--property=TimeoutStopSec=1",
                &format!("--unit={unit}"),
                "sleep",
                "600",
            ])
            .output()?;
        ensure!(!made.status.success(), "it was not ended: {made:?}");
        for _ in 0..500 {
            if crate::scopes::show(unit, &["ActiveState"])?["ActiveState"] == "failed" {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("{unit} did not fail")
    };
    context.block_on(async {
        let agent = agent(context).await?;
        let failed = std::cell::RefCell::new(Ok(()));
        let alloc = agent
            .run_with(&Job::command("sleep", &["600"]).text(), |task| {
                *failed.borrow_mut() = Scope::of_id(&task.id).and_then(|scope| fail(&scope.unit));
            })
            .await?;
        failed.into_inner()?;
        let scope = Scope::of(alloc.only_task()?)?;
        ensure!(scope.processes()?.len() == 2);
        alloc.stop().await?;
        scope.expect_gone()?;
        agent.finish().await
    })
}

/// Each start is done or refused as passing, each stop is done, and nothing is left of either.
fn a_bus_that_restarts_during_starts_and_stops_loses_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let job = Job::command("sleep", &["600"]).text();
        let (mut done, mut refused) = (0, 0);
        let work = async {
            for _ in 0..40 {
                match agent.run(&job).await {
                    Ok(alloc) => {
                        let scope = Scope::of(alloc.only_task()?)?;
                        ensure!(scope.processes()?.len() == 2);
                        alloc.stop().await?;
                        done += 1;
                    }
                    Err(error) => {
                        let told = error.downcast_ref::<harness::nomad::RpcError>();
                        ensure!(told.is_some_and(|told| told.recoverable), "{error:#}");
                        refused += 1;
                    }
                }
            }
            anyhow::Ok(())
        };
        let disturbed = async {
            loop {
                // Or it would soon count as restarted too often. systemctl reaches systemd by a socket of its own.
                for verb in ["reset-failed", "restart"] {
                    tokio::process::Command::new("systemctl")
                        .args([verb, "dbus.service"])
                        .status()
                        .await?;
                }
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
        };
        tokio::select! {
            worked = work => worked?,
            never = disturbed => return never,
        }
        context.note(format!(
            "{done} starts and stops done, {refused} refused for now"
        ));
        ensure!(done > 0, "no start went through");
        until("what an absent bus left is collected", || {
            ground.left().ok()?.is_empty().then_some(())
        })
        .await
        .with_context(|| format!("{:?}", ground.left()))?;
        agent.finish().await
    })
}

fn a_task_that_ends_without_a_bus_leaves_nothing(context: &Context) -> Result<()> {
    let bus = |verb: &str| said("systemctl", &[verb, "dbus.socket", "dbus.service"]);
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        bus("stop")?;
        let ended = async {
            task.signal("SIGTERM").await?;
            let exit = task.wait().await?;
            // DestroyTask comes with it. Nomad calls once, whatever the answer.
            alloc.stop().await?;
            anyhow::Ok(exit)
        };
        let ended = ended.await;
        let record = Path::new("/run/nomad-driver-exec2/records").join(&scope.unit);
        let is_forgotten = !record.exists();
        bus("start")?;
        let exit = ended?;
        ensure!((exit.code, exit.signal) == (143, 15), "{exit:?}");
        ensure!(is_forgotten, "its record is still there");
        // systemd collects the empty scope by itself, in its own time.
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        agent.finish().await
    })
}
