//! Sessions in running tasks, seen from the guest: `nomad alloc exec`, actions, and the scripts of checks and templates.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context, Kind};
use harness::nomad::proto::driver::exec_task_streaming_request::{Setup, TerminalSize};
use harness::nomad::proto::driver::{
    ExecTaskRequest, ExecTaskStreamingIoOperation, ExecTaskStreamingRequest,
    ExecTaskStreamingResponse,
};
use harness::nomad::real::{Consul, RealAgent, RealConfig, Update};
use harness::nomad::{Agent, Task};
use nix::pty::openpty;
use nomad_driver_exec2::sys;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::case;
use crate::nomad::{Job, Scope, agent, proc_file, quoted, said, status, until};

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_session_is_in_the_tasks_scope_and_is_what_the_task_is
    ),
    case!(Speed, Ours, a_session_carries_bytes_without_loss),
    case!(Speed, Ours, a_terminal_is_one_of_the_tasks_own),
    case!(Speed, Ours, nothing_of_a_session_stays),
    case!(
        Speed,
        Ours,
        sessions_end_with_the_plugin_and_open_again_after_it
    ),
    case!(Speed, Ours, a_task_has_many_sessions_and_not_too_many),
    case!(Speed, Ours, a_script_is_run_as_a_check_runs_it),
    case!(Speed, Ours, what_takes_no_session_says_why),
    case!(Both, Ours, a_task_gets_nothing_out_of_sessions_in_it),
    case!(Kernel, Ours, a_session_is_within_the_tasks_memory_limit),
    case!(Speed, Ours, a_session_begins_soon),
    case!(
        Everywhere,
        Ours,
        a_session_and_its_task_meet_by_paths_and_for_root_not_by_abstract_names
    ),
    case!(Limits, Agent, a_real_agent_opens_sessions, Minutes),
    case!(
        Limits,
        Agent,
        a_real_agent_tells_consul_how_script_checks_went,
        Long
    ),
];

const PATIENCE: Duration = Duration::from_secs(40);

/// A client's side of a session.
pub struct Talk {
    sender: mpsc::Sender<ExecTaskStreamingRequest>,
    answers: Streaming<ExecTaskStreamingResponse>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<i32>,
}

#[derive(Debug, Clone, Copy)]
enum Terminal {
    No,
    Of(i32, i32),
}

fn shell(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
}

impl Talk {
    async fn open(
        agent: &Agent,
        id: &str,
        command: Vec<String>,
        terminal: Terminal,
    ) -> Result<Talk, Status> {
        let (sender, receiver) = mpsc::channel(64);
        let setup = Setup {
            task_id: id.into(),
            command,
            tty: matches!(terminal, Terminal::Of(..)),
        };
        let mut first = vec![ExecTaskStreamingRequest {
            setup: Some(setup),
            ..ExecTaskStreamingRequest::default()
        }];
        if let Terminal::Of(height, width) = terminal {
            first.push(size(height, width));
        }
        for request in first {
            sender.try_send(request).expect("a place for it");
        }
        let connection = agent.connection().expect("a connection");
        let answers = connection
            .driver()
            .exec_task_streaming(ReceiverStream::new(receiver))
            .await?;
        Ok(Talk {
            sender,
            answers: answers.into_inner(),
            stdout: Vec::new(),
            stderr: Vec::new(),
            exit: None,
        })
    }

    pub async fn shell(agent: &Agent, task: &Task, script: &str) -> Result<Talk> {
        Ok(Talk::open(agent, &task.id(), shell(script), Terminal::No).await?)
    }

    pub async fn command(agent: &Agent, task: &Task, command: Vec<String>) -> Result<Talk> {
        Ok(Talk::open(agent, &task.id(), command, Terminal::No).await?)
    }

    pub async fn on_terminal(agent: &Agent, task: &Task, command: Vec<String>) -> Result<Talk> {
        let terminal = Terminal::Of(24, 80);
        Ok(Talk::open(agent, &task.id(), command, terminal).await?)
    }

    pub async fn send(&self, data: &[u8]) -> Result<()> {
        Ok(self.sender.send(stdin(data, false)).await?)
    }

    async fn resize(&self, height: i32, width: i32) -> Result<()> {
        Ok(self.sender.send(size(height, width)).await?)
    }

    async fn close(&self) -> Result<()> {
        Ok(self.sender.send(stdin(b"", true)).await?)
    }

    /// The next message; whether there was one.
    async fn more(&mut self) -> Result<bool> {
        let answer = timeout(PATIENCE, self.answers.message())
            .await
            .with_context(|| format!("nothing more after {:?}", self.said()))??;
        let Some(answer) = answer else {
            return Ok(false);
        };
        self.stdout.extend(answer.stdout.unwrap_or_default().data);
        self.stderr.extend(answer.stderr.unwrap_or_default().data);
        if answer.exited {
            self.exit = Some(answer.result.context("Nomad dereferences it")?.exit_code);
        }
        Ok(true)
    }

    fn said(&self) -> String {
        let tail = self.stdout.len().saturating_sub(2_000);
        format!(
            "{}{}",
            String::from_utf8_lossy(&self.stdout[tail..]),
            String::from_utf8_lossy(&self.stderr)
        )
    }

    pub async fn says(&mut self, text: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.said().contains(text) {
            // Heartbeats come again and again.
            let more = self.more().await? && begun.elapsed() < PATIENCE;
            ensure!(more, "no {text:?} in {:?}", self.said());
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<i32> {
        let begun = Instant::now();
        while self.more().await? {
            ensure!(begun.elapsed() < PATIENCE, "no end after {:?}", self.said());
        }
        self.exit
            .with_context(|| format!("no exit after {:?}", self.said()))
    }

    pub async fn ends_with(mut self, code: i32) -> Result<String> {
        let seen = self.end().await?;
        ensure!(seen == code, "{seen}, not {code}: {}", self.said());
        Ok(self.said())
    }
}

fn stdin(data: &[u8], close: bool) -> ExecTaskStreamingRequest {
    let data = data.to_vec();
    ExecTaskStreamingRequest {
        stdin: Some(ExecTaskStreamingIoOperation { data, close }),
        ..ExecTaskStreamingRequest::default()
    }
}

fn size(height: i32, width: i32) -> ExecTaskStreamingRequest {
    ExecTaskStreamingRequest {
        tty_size: Some(TerminalSize { height, width }),
        ..ExecTaskStreamingRequest::default()
    }
}

fn rooms(scope: &Scope) -> Vec<PathBuf> {
    let entries = fs::read_dir(&scope.dir).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("exec-"));
    entries.map(|entry| entry.path()).collect()
}

/// Processes in a session's cgroup.
fn members(room: &Path) -> Vec<u32> {
    let pids = fs::read_to_string(room.join("cgroup.procs")).unwrap_or_default();
    pids.lines().filter_map(|pid| pid.parse().ok()).collect()
}

fn helpers() -> Result<usize> {
    let names = fs::read_dir("/proc")?
        .flatten()
        .map(|entry| entry.path().join("comm"));
    let names = names.filter_map(|comm| fs::read_to_string(comm).ok());
    Ok(names.filter(|name| name == "exec2-session\n").count())
}

async fn no_session_is_left(scope: &Scope) -> Result<()> {
    until("no session is left", || {
        (rooms(scope).is_empty() && helpers().ok()? == 0).then_some(())
    })
    .await
}

fn idle() -> Job {
    Job::command("sleep", &["600"]).resources("cpu = 1000\n memory = 64")
}

fn a_session_is_in_the_tasks_scope_and_is_what_the_task_is(context: &Context) -> Result<()> {
    ensure!(fs::read_to_string("/etc/passwd").is_ok());
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["", "nobody", "root"] {
            let job = idle()
                .task("env {\n MINE = \"a b\"\n LC_ALL = \"C\"\n }")
                .config("oom_score_adj = 123")
                .config("work_dir = \"local\"");
            let job = if user.is_empty() { job } else { job.user(user) };
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let scope = Scope::of(task)?;
            let main = scope.main()?;
            let script =
                "pwd; grep ^0: /proc/self/cgroup; cat /etc/passwd; readlink /proc/self/ns/cgroup; exec sleep 601";
            let mut talk = Talk::shell(&agent, task, script).await?;
            talk.says("/etc/passwd: Permission denied").await?;
            talk.says("cgroup:[").await?;
            let said = talk.said();
            ensure!(said.contains("/local\n"), "{said}");
            ensure!(said.contains("0::/exec-1\n"), "{said} {:?}", fs::read_link(format!("/proc/{main}/ns/cgroup")));
            let room = scope.dir.join("exec-1");
            // What the shell ran before may not be gone yet.
            let only = || match members(&room).as_slice() {
                [pid] => Some(*pid),
                _ => None,
            };
            let pid = until("one process is in the session's cgroup", only).await?;
            let cgroup = proc_file(pid, "cgroup")?;
            // A container has those of v1 beside it.
            ensure!(
                cgroup.lines().last().unwrap_or_default()
                    == format!("0::/exec2.slice/exec2-share.slice/{}/exec-1", scope.unit),
                "{cgroup}"
            );
            for kind in ["mnt", "pid", "ipc", "net", "cgroup", "uts", "user"] {
                let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
                ensure!(of(pid)? == of(main)?, "{kind} of {user:?}");
            }
            for name in [
                "Uid",
                "Gid",
                "Groups",
                "CapInh",
                "CapPrm",
                "CapEff",
                "CapBnd",
                "CapAmb",
                "NoNewPrivs",
                "Seccomp",
                "Seccomp_filters",
                "SigBlk",
                "SigIgn",
                "Umask",
                "Cpus_allowed_list",
            ] {
                let (ours, theirs) = (status(pid, name)?, status(main, name)?);
                ensure!(
                    ours == theirs,
                    "{name} of {user:?}: {ours}, the task's {theirs}"
                );
            }
            for name in ["oom_score_adj", "limits"] {
                ensure!(proc_file(pid, name)? == proc_file(main, name)?, "{name}");
            }
            let environ = |pid| -> Result<Vec<String>> {
                let mut words: Vec<_> = proc_file(pid, "environ")?
                    .split('\0')
                    .map(str::to_owned)
                    .collect();
                // The shell's own.
                words.retain(|word| {
                    !word.starts_with("PWD=")
                        && !word.starts_with("OLDPWD=")
                        && !word.starts_with("_=")
                });
                words.sort();
                Ok(words)
            };
            // It has none for a moment, while it is replaced.
            let same = until("the environment is the task's", || {
                (environ(pid).ok()? == environ(main).ok()?).then_some(())
            });
            same.await
                .with_context(|| format!("{:?} {:?}", environ(pid), environ(main)))?;
            ensure!(
                fs::read_link(format!("/proc/{pid}/cwd"))?
                    == fs::read_link(format!("/proc/{main}/cwd"))?
            );
            let shown = said_of(&scope)?;
            ensure!(shown.contains("sleep 601"), "{shown}");
            drop(talk);
            no_session_is_left(&scope).await?;
            ensure!(task.exit().is_none(), "the task ended");
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn said_of(scope: &Scope) -> Result<String> {
    said(
        "systemctl",
        &["status", "--no-pager", "--full", &scope.unit],
    )
}

fn a_session_carries_bytes_without_loss(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let script = "echo out; echo err >&2; exit 43";
        let mut talk = Talk::shell(&agent, task, script).await?;
        ensure!(
            talk.end().await? == 43 && talk.stdout == b"out\n" && talk.stderr == b"err\n",
            "{}",
            talk.said()
        );

        // What was read comes back, whatever bytes it is, and an end of input is one.
        let talk = Talk::open(&agent, &task.id(), vec!["cat".into()], Terminal::No).await?;
        let sent: Vec<u8> = (0..1_000_000u32)
            .map(|number| (number % 251) as u8)
            .collect();
        let sender = talk.sender.clone();
        let data = sent.clone();
        let feeding = tokio::spawn(async move {
            for chunk in data.chunks(30_000) {
                let _ = sender.send(stdin(chunk, false)).await;
                let _ = sender.send(ExecTaskStreamingRequest::default()).await;
            }
            let _ = sender.send(stdin(b"", true)).await;
        });
        let mut talk = talk;
        ensure!(talk.end().await? == 0);
        feeding.await?;
        ensure!(
            talk.stdout == sent,
            "{} bytes of {}",
            talk.stdout.len(),
            sent.len()
        );

        // The command does not wait for a slow client to end, nor loses what it has not read.
        let mut talk = Talk::shell(&agent, task, "head -c 5000000 /dev/zero; echo end").await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(talk.end().await? == 0);
        ensure!(
            talk.stdout.len() == 5_000_004 && talk.stdout.ends_with(b"end\n"),
            "{}",
            talk.stdout.len()
        );

        let lines = "i=0; while [ $i -lt 20000 ]; do echo \"line $i\"; i=$((i+1)); done; echo last";
        let mut talk = Talk::open(&agent, &task.id(), shell(lines), Terminal::Of(24, 80)).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(talk.end().await? == 0);
        let seen = String::from_utf8(talk.stdout)?;
        ensure!(
            seen.lines().count() == 20_001 && seen.ends_with("line 19999\r\nlast\r\n"),
            "{} lines",
            seen.lines().count()
        );

        // A signal, and what a background process still holds open.
        Talk::shell(&agent, task, "kill -TERM $$")
            .await?
            .ends_with(143)
            .await?;
        let begun = Instant::now();
        for terminal in [Terminal::No, Terminal::Of(1, 1)] {
            let talk = Talk::open(
                &agent,
                &task.id(),
                shell("sleep 600 & echo started"),
                terminal,
            )
            .await?;
            talk.ends_with(0).await?;
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(30),
            "{:?}",
            begun.elapsed()
        );
        no_session_is_left(&scope).await?;
        ensure!(task.exit().is_none());
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_terminal_is_one_of_the_tasks_own(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["", "root"] {
            let job = if user.is_empty() {
                idle()
            } else {
                idle().user(user)
            };
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let hosts = fs::read_dir("/dev/pts")?.count();
            let script = "tty; stty size; trap 'stty size' WINCH; echo ready
                while ! [ -e local/go ]; do sleep 0.1; done; read line; read line; exit 5";
            let mut talk =
                Talk::open(&agent, &task.id(), shell(script), Terminal::Of(30, 90)).await?;
            talk.says("ready").await?;
            ensure!(
                talk.said().contains("/dev/pts/0\r\n30 90\r\n"),
                "{}",
                talk.said()
            );
            ensure!(
                fs::read_dir("/dev/pts")?.count() == hosts,
                "it is the host's"
            );
            talk.resize(50, 120).await?;
            talk.resize(100, 100).await?;
            talk.says("100 100").await?;
            fs::write(task.paths().local.join("go"), "")?;
            talk.send(b"one\n").await?;
            talk.send(b"two\n").await?;
            let seen = talk.ends_with(5).await?;
            // What is typed is shown.
            ensure!(seen.contains("one\r\n"), "{seen}");

            let script = "trap 'echo caught' INT; echo ready; sleep 600; echo after; cat; exit 6";
            let mut talk =
                Talk::open(&agent, &task.id(), shell(script), Terminal::Of(24, 80)).await?;
            talk.says("ready").await?;
            let scope = Scope::of(task)?;
            until("it sleeps", || {
                // A shell's child has the shell's trap until it executes, and would swallow the signal.
                let mut running = rooms(&scope).into_iter().flat_map(|room| members(&room));
                let is_asleep = |pid| {
                    fs::read_to_string(format!("/proc/{pid}/comm"))
                        .is_ok_and(|comm| comm == "sleep\n")
                };
                running.any(is_asleep).then_some(())
            })
            .await?;
            talk.send(b"\x03").await?;
            talk.says("after").await?;
            ensure!(talk.said().contains("caught"), "{}", talk.said());
            talk.close().await?;
            talk.ends_with(6).await?;

            // Without a terminal there is none.
            let talk = Talk::shell(&agent, task, "stty size || tty; exit 7").await?;
            let seen = talk.ends_with(7).await?;
            ensure!(seen.contains("not a tty"), "{seen}");
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

/// Whatever it has made of itself: a daemon in a session of its own, one that ignores signals, one that is stopped.
const CLINGS: &str = "trap '' HUP TERM INT
    (setsid sh -c 'trap \"\" HUP TERM INT; sleep 701 & sleep 702' >/dev/null 2>&1 &)
    (sleep 703 & kill -STOP $!)
    echo up; sleep 704; sleep 705";

async fn clings(agent: &Agent, task: &Task, terminal: Terminal) -> Result<Talk> {
    let mut talk = Talk::open(agent, &task.id(), shell(CLINGS), terminal).await?;
    talk.says("up").await?;
    let room = Scope::of(task)?.dir.join("exec-1");
    until("all of it runs", || {
        (members(&room).len() >= 5).then_some(())
    })
    .await?;
    Ok(talk)
}

fn nothing_of_a_session_stays(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        for terminal in [Terminal::No, Terminal::Of(24, 80)] {
            // Its client goes away.
            drop(clings(&agent, task, terminal).await?);
            no_session_is_left(&scope).await?;
            // Its command is killed.
            let mut talk = clings(&agent, task, terminal).await?;
            let room = scope.dir.join("exec-1");
            let lead = *members(&room).iter().min().context("a process")?;
            said("kill", &["-KILL", &lead.to_string()])?;
            ensure!(talk.end().await? == 137, "{}", talk.said());
            no_session_is_left(&scope).await?;
            // Its helper is.
            let mut talk = clings(&agent, task, terminal).await?;
            let helper = status(*members(&room).iter().min().context("a process")?, "PPid")?;
            said("kill", &["-KILL", &helper])?;
            let error = talk.end().await.err().context("an error")?;
            ensure!(
                format!("{error:#}").contains("the session's helper was killed"),
                "{error:#}"
            );
            no_session_is_left(&scope).await?;
        }
        ensure!(scope.processes()?.len() == 2, "{:?}", scope.processes()?);
        ensure!(task.exit().is_none(), "the task was touched");
        // The task ends, by itself or not.
        let mut talk = clings(&agent, task, Terminal::Of(24, 80)).await?;
        let begun = Instant::now();
        let exit = task.stop().await?;
        ensure!(exit.signal == 2, "{exit:?}");
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            begun.elapsed()
        );
        ensure!(talk.end().await? == 137, "{}", talk.said());
        alloc.stop().await?;
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        agent.finish().await
    })
}

fn sessions_end_with_the_plugin_and_open_again_after_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let talk = clings(&agent, task, Terminal::No).await?;
        let other = clings_again(&agent, task).await?;
        let lost = agent.kill_plugin().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        no_session_is_left(&scope).await?;
        drop((talk, other));
        // Plugin and helper die at once, as of a kill of all that the agent's unit has.
        let talk = clings(&agent, task, Terminal::No).await?;
        let room = scope.dir.join("exec-1");
        let helper = status(*members(&room).iter().min().context("a process")?, "PPid")?;
        said("kill", &["-STOP", &helper])?;
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        said("kill", &["-KILL", &plugin.to_string(), &helper])?;
        let lost = agent.kill_plugin().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        no_session_is_left(&scope).await?;
        drop(talk);
        // A restarted agent has forgotten the job's block, and who the user is.
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        let talk = Talk::shell(&agent, task, "id -u; exit 9").await?;
        let seen = talk.ends_with(9).await?;
        ensure!(
            seen.trim()
                == status(scope.main()?, "Uid")?
                    .split_whitespace()
                    .next()
                    .unwrap_or_default(),
            "{seen}"
        );
        ensure!(task.exit().is_none(), "the task ended");
        alloc.stop().await?;
        agent.finish().await
    })
}

async fn clings_again(agent: &Agent, task: &Task) -> Result<Talk> {
    let mut talk = Talk::open(agent, &task.id(), shell(CLINGS), Terminal::Of(9, 9)).await?;
    talk.says("up").await?;
    Ok(talk)
}

fn a_task_has_many_sessions_and_not_too_many(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let mut talks = Vec::new();
        for number in 0..32 {
            let script = format!("read line; echo \"$line\"; exit {number}");
            let terminal = if number % 2 == 0 {
                Terminal::No
            } else {
                Terminal::Of(24, 80)
            };
            talks.push(Talk::open(&agent, &task.id(), shell(&script), terminal).await?);
        }
        ensure!(rooms(&scope).len() == 32);
        let refused = Talk::open(&agent, &task.id(), shell("true"), Terminal::No).await;
        let refused = refused.err().context("a refusal")?;
        ensure!(
            refused.message() == "task has 32 sessions already; end one of them first",
            "{refused}"
        );
        for (number, talk) in talks.into_iter().enumerate().rev() {
            talk.send(format!("mine {number}\n").as_bytes()).await?;
            let seen = talk.ends_with(number as i32).await?;
            ensure!(seen.contains(&format!("mine {number}")), "{seen}");
        }
        no_session_is_left(&scope).await?;
        Talk::shell(&agent, task, "exit 4")
            .await?
            .ends_with(4)
            .await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

async fn script(
    agent: &Agent,
    id: &str,
    script: &str,
    seconds: i64,
) -> Result<(String, i32), Status> {
    run_as_check(agent, id, shell(script), seconds).await
}

/// What a script check, and a template's change_script, get: the end of what the command printed, and its exit code.
pub async fn run_as_check(
    agent: &Agent,
    id: &str,
    command: Vec<String>,
    seconds: i64,
) -> Result<(String, i32), Status> {
    let request = ExecTaskRequest {
        task_id: id.into(),
        command,
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    let connection = agent.connection().expect("a connection");
    let answer = connection.driver().exec_task(request).await?.into_inner();
    let result = answer.result.expect("Nomad dereferences it");
    Ok((
        String::from_utf8_lossy(&answer.stdout).into_owned(),
        result.exit_code,
    ))
}

fn a_script_is_run_as_a_check_runs_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let id = task.id();
        let both = "echo one; echo two >&2; echo three; cat; exit 2";
        ensure!(script(&agent, &id, both, 30).await? == ("one\ntwo\nthree\n".into(), 2));
        let (tail, code) = script(
            &agent,
            &id,
            "i=0; while [ $i -lt 5000 ]; do echo $i; i=$((i+1)); done",
            60,
        )
        .await?;
        ensure!(
            code == 0 && tail.len() == 4096 && tail.ends_with("\n4999\n"),
            "{code} {}",
            tail.len()
        );
        ensure!(script(&agent, &id, "kill -KILL $$", 30).await?.1 == 137);
        let begun = Instant::now();
        let late = script(&agent, &id, CLINGS, 2)
            .await
            .err()
            .context("too late")?;
        ensure!(
            late.message().starts_with("context deadline exceeded"),
            "{late}"
        );
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            begun.elapsed()
        );
        no_session_is_left(&scope).await?;
        ensure!(task.exit().is_none());
        alloc.stop().await?;
        agent.finish().await
    })
}

fn what_takes_no_session_says_why(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let id = task.id();
        let ended = agent.run(&Job::shell("exit 3").text()).await?;
        ended.only_task()?.wait().await?;
        let gone = ended.only_task()?.id();
        for (id, command, words) in [
            (
                "no/such/task",
                vec!["true".into()],
                "task not found for given id: no/such/task",
            ),
            (
                gone.as_str(),
                vec!["true".into()],
                "task not found for given id",
            ),
            (&id, vec![], "error cmd must have at least one value"),
            (
                &id,
                vec![String::new()],
                "error cmd must have at least one value",
            ),
            (
                &id,
                vec!["no-such-program".into()],
                "command \"no-such-program\": not found in PATH",
            ),
            (
                &id,
                vec!["/usr/sbin/chroot".into()],
                "command \"/usr/sbin/chroot\": permission denied",
            ),
            (
                &id,
                vec!["a\0b".into()],
                "command \"a\\0b\": the command, an argument or a variable contains a NUL byte",
            ),
            (
                &id,
                vec!["true".into(), "x".repeat(3 << 20)],
                "command \"true\": argument list too long",
            ),
        ] {
            for terminal in [Terminal::No, Terminal::Of(24, 80)] {
                let refused = Talk::open(&agent, id, command.clone(), terminal).await;
                let refused = refused.err().with_context(|| format!("no {words:?}"))?;
                ensure!(
                    refused.message().starts_with(words),
                    "{refused}, not {words:?}"
                );
            }
        }
        no_session_is_left(&scope).await?;
        said("systemctl", &["freeze", &scope.unit])?;
        let refused = Talk::open(&agent, &id, shell("true"), Terminal::No)
            .await
            .err();
        said("systemctl", &["thaw", &scope.unit])?;
        let refused = refused.context("a refusal")?;
        ensure!(
            refused
                .message()
                .starts_with("task is frozen, and so would be"),
            "{refused}"
        );
        // Frozen while there is one: it stands still as well, and can be let go of.
        let talk = clings(&agent, task, Terminal::No).await?;
        said("systemctl", &["freeze", &scope.unit])?;
        drop(talk);
        let left = no_session_is_left(&scope).await;
        said("systemctl", &["thaw", &scope.unit])?;
        left?;
        ended.stop().await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

/// A root task that looks at every process it sees, without pause, while sessions open in it.
const LOOKS: &str = r#"$| = 1; print "up\n";
    while (! -e "local/stop") {
        for my $pid (grep { /^\d+$/ && $_ != $$ } map { s|/proc/||r } glob("/proc/[0-9]*")) {
            my $name = "";
            if (open(my $f, "<", "/proc/$pid/comm")) { $name = <$f> // ""; chomp $name; }
            for my $what ("exe", "cwd", "root") {
                my $link = readlink("/proc/$pid/$what");
                print "$name $what $link\n" if defined $link;
            }
            for my $what ("environ", "maps", "mem", "exe", "fd/3", "fd/0", "root/etc/passwd") {
                # Of one that has ended some can be opened, and are empty.
                print "$name read $what\n" if open(my $f, "<", "/proc/$pid/$what") && sysread($f, my $byte, 1);
            }
            print "$name wrote\n" if open(my $f, "+<", "/proc/$pid/exe");
            $seen{$name}++;
        }
    }
    print "seen ", join(" ", map { "$_" } sort keys %seen), "\n";"#;

fn a_task_gets_nothing_out_of_sessions_in_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["root", ""] {
            let job = Job::command("perl", &["-e", LOOKS]);
            let job = if user.is_empty() { job } else { job.user(user) };
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            until("it looks", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            let rounds = if context.guest().kind == Kind::Qemu {
                10
            } else {
                60
            };
            for round in 0..rounds {
                let terminal = if round % 2 == 0 {
                    Terminal::No
                } else {
                    Terminal::Of(24, 80)
                };
                Talk::open(&agent, &task.id(), shell("exit 0"), terminal)
                    .await?
                    .ends_with(0)
                    .await?;
            }
            // As of CVE-2019-5736: the helper's own program, executed in the task.
            let refused = Talk::open(
                &agent,
                &task.id(),
                vec!["/proc/self/exe".into()],
                Terminal::No,
            )
            .await;
            let refused = refused.err().context("a refusal")?;
            ensure!(refused.message().contains("permission denied"), "{refused}");
            // Control: from outside a session's process shows what the task looked for.
            let mut talk = Talk::shell(&agent, task, "echo up; exec sleep 600").await?;
            talk.says("up").await?;
            let scope = Scope::of(task)?;
            // The room of the one before may be there for a moment.
            let pid = rooms(&scope).iter().flat_map(|room| members(room)).next();
            let pid = pid.context("a session's process")?;
            ensure!(
                fs::read_link(format!("/proc/{pid}/exe")).is_ok()
                    && proc_file(pid, "environ").is_ok()
            );
            drop(talk);
            fs::write(task.paths().local.join("stop"), "")?;
            ensure!(task.wait().await?.success());
            let seen = alloc.stdout("t")?;
            let lines: Vec<&str> = seen.lines().collect();
            let [up, last] = lines.as_slice() else {
                bail!("{user:?} got: {seen}")
            };
            ensure!(
                *up == "up" && last.contains(" exec2-session") && last.contains(" sh"),
                "it saw no session: {seen}"
            );
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

/// Listens by an abstract name and by a path, tries the other's, and stays until the other has tried.
const MEETS: &str = r#"use Socket; $| = 1;
    my ($own, $other) = @ARGV;
    sub names { (["abstract", pack("Sa*", AF_UNIX, "\0exec2-meets-$_[0]")], ["path", pack_sockaddr_un("local/$_[0]")]) }
    sub stream { socket(my $socket, PF_UNIX, SOCK_STREAM, 0) or die $!; $socket }
    sub mark { open(my $file, ">", "local/$own-$_[0]") or die $! }
    sub hear { select(undef, undef, undef, 0.1) until -e "local/$other-$_[0]" }
    my @listeners;
    for (names($own)) {
        my $socket = stream();
        bind($socket, $$_[1]) && listen($socket, 8) or die "$$_[0]: $!";
        push @listeners, $socket;
    }
    mark("listens"); hear("listens");
    for (names($other)) { print "$$_[0]: ", connect(stream(), $$_[1]) ? "reached" : $!, "\n" }
    mark("tried"); hear("tried");
    hear("left") if $own eq "task";"#;

/// Each is in a Landlock domain of its own, and the scope of root's is the domain.
fn a_session_and_its_task_meet_by_paths_and_for_root_not_by_abstract_names(
    context: &Context,
) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["root", ""] {
            let job = Job::command("perl", &["-e", MEETS, "task", "session"]);
            let job = if user.is_empty() { job } else { job.user(user) };
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let command = ["perl", "-e", MEETS, "session", "task"];
            let command = command.map(str::to_owned).to_vec();
            let talk = Talk::open(&agent, &task.id(), command, Terminal::No).await?;
            let of_session = talk.ends_with(0).await?;
            fs::write(task.paths().local.join("session-left"), "")?;
            let exit = task.wait().await?;
            let of_task = alloc.stdout("t")?;
            ensure!(exit.success(), "{exit:?}: {}", alloc.stderr("t")?);
            let is_scoped = user == "root" && sys::landlock_abi() >= Some(6);
            let found = match is_scoped {
                true => "Operation not permitted",
                false => "reached",
            };
            let expected = format!("abstract: {found}\npath: reached\n");
            ensure!(of_session == expected, "session of {user:?}: {of_session}");
            ensure!(of_task == expected, "task of {user:?}: {of_task}");
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn a_session_is_within_the_tasks_memory_limit(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = idle().resources("cpu = 1000\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let hungry = "my $x = 'x' x (200 << 20); print 'had it'; sleep 600";
        let command = ["perl", "-e", hungry].map(str::to_owned).to_vec();
        let talk = Talk::open(&agent, &task.id(), command, Terminal::No).await?;
        talk.ends_with(137).await?;
        ensure!(task.exit().is_none(), "the task was taken in its place");
        let pids = Scope::of(task)?.file("pids.current")?;
        let mut talk = Talk::shell(&agent, task, "echo up; exec sleep 600").await?;
        talk.says("up").await?;
        let more = Scope::of(task)?.file("pids.current")?;
        ensure!(
            more.parse::<u32>()? == pids.parse::<u32>()? + 1,
            "{pids}, {more}"
        );
        drop(talk);
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_session_begins_soon(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&idle().text()).await?;
        let task = alloc.only_task()?;
        let mut times = Vec::new();
        for _ in 0..50 {
            let begun = Instant::now();
            ensure!(script(&agent, &task.id(), "exit 0", 30).await?.1 == 0);
            times.push(begun.elapsed());
        }
        times.sort();
        context.note(format!(
            "ExecTask of `sh -c 'exit 0'`: {:?} median, {:?} least, {:?} at most",
            times[25], times[0], times[49]
        ));
        ensure!(times[25] < Duration::from_secs(1), "{times:?}");
        alloc.stop().await?;
        agent.finish().await
    })
}

/// The CLI, as people use it.
fn nomad(context: &Context, arguments: &[&str], input: &str) -> Result<Output> {
    let mut child = Command::new(context.agent())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child
        .stdin
        .take()
        .context("stdin")?
        .write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// The CLI with a terminal of its own, and what that shows.
struct Typed {
    child: Child,
    terminal: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Typed {
    fn new(context: &Context, arguments: &[&str]) -> Result<Typed> {
        let pty = openpty(None, None)?;
        Typed::resize(&pty.master, 40, 100)?;
        let slave = || anyhow::Ok(Stdio::from(pty.slave.try_clone()?));
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(context.agent())
            .args(arguments)
            .stdin(slave()?)
            .stdout(slave()?)
            .stderr(slave()?)
            .spawn()?;
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut from, to) = (fs::File::from(pty.master.try_clone()?), shown.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                to.lock().unwrap().extend(&buffer[..length]);
            }
        });
        Ok(Typed {
            child,
            terminal: pty.master,
            shown,
        })
    }

    fn resize(terminal: &OwnedFd, rows: u16, columns: u16) -> Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(terminal, size)?)
    }

    fn types(&self, text: &str) -> Result<()> {
        fs::File::from(self.terminal.try_clone()?).write_all(text.as_bytes())?;
        Ok(())
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    async fn shows(&self, text: &str) -> Result<()> {
        let seen = until(text, || self.shown().contains(text).then_some(())).await;
        seen.with_context(|| self.shown())
    }
}

fn a_real_agent_opens_sessions(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = crate::agent::agent(context).await?;
        let put = |word: &str| {
            let word = format!("word={word}");
            let output = nomad(context, &["var", "put", "-force", "nomad/jobs/case", &word], "")?;
            ensure!(output.status.success(), "{output:?}");
            Ok(())
        };
        put("one")?;
        let job = idle()
            .task("action \"greet\" {\n command = \"/bin/sh\"\n args = [\"-c\", \"echo hello from $NOMAD_TASK_NAME; exit 4\"]\n }")
            .task("template {\n data = \"{{ with nomadVar \\\"nomad/jobs/case\\\" }}{{ .word }}{{ end }}\"\n destination = \"local/word\"\n change_mode = \"script\"\n change_script {\n command = \"/bin/sh\"\n args = [\"-c\", \"cat local/word >local/changed; cat /proc/self/cgroup >>local/changed\"]\n timeout = \"30s\"\n }\n }");
        let ids = agent.run(&job.text()).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        let scope = crate::agent::scope_of(id, "t")?;

        let exec = ["alloc", "exec", "-t=false", "-task", "t", id];
        let with = |command: &[&'static str]| [exec.as_slice(), command].concat();
        let output = nomad(context, &with(&["/bin/sh", "-c", "cat; echo err >&2; exit 5"]), "typed\n")?;
        ensure!(output.status.code() == Some(5), "{output:?}");
        ensure!(output.stdout == b"typed\n" && output.stderr == b"err\n", "{output:?}");
        let output = nomad(context, &with(&["no-such-program"]), "")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains("command \"no-such-program\": not found in PATH"), "{output:?}");

        let mut typed = Typed::new(context, &["alloc", "exec", "-i", "-t", "-task", "t", id, "/bin/sh"])?;
        typed.types("tty; stty size; echo re''ady\n")?;
        typed.shows("ready").await?;
        ensure!(typed.shown().contains("/dev/pts/0\r\n40 100\r\n"), "{}", typed.shown());
        Typed::resize(&typed.terminal, 50, 132)?;
        let mut asked = Instant::now();
        until("the window has its new size", || {
            if asked.elapsed() > Duration::from_millis(300) {
                asked = Instant::now();
                typed.types("stty size\n").ok()?;
            }
            typed.shown().contains("\n50 132\r\n").then_some(())
        })
        .await
        .with_context(|| typed.shown())?;
        typed.types("exit 5\n")?;
        let status = typed.child.wait()?;
        ensure!(status.code() == Some(5), "{status:?}: {}", typed.shown());
        no_session_is_left(&scope).await?;

        // Nobody tells that a client is gone while its command is silent.
        let mut silent = Command::new(context.agent())
            .args(with(&["sleep", "607"]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        until("it runs", || (rooms(&scope).len() == 1).then_some(())).await?;
        silent.kill()?;
        silent.wait()?;
        no_session_is_left(&scope).await?;

        let output = nomad(context, &["action", "-job", "case", "-group", "g", "-task", "t", "-t=false", "greet"], "")?;
        ensure!(output.status.code() == Some(4) && output.stdout == b"hello from t\n", "{output:?}");

        put("two")?;
        let changed = agent.data_dir().join("data/alloc").join(id).join("t/local/changed");
        let seen = until("the template's script has run", || {
            fs::read_to_string(&changed).ok().filter(|seen| seen.contains("0::"))
        })
        .await?;
        ensure!(seen.starts_with("two") && seen.contains("0::/exec-"), "{seen}");
        agent.stop("case").await?;
        agent.collect().await?;
        agent.finish().await
    })
}

fn script_check(name: &str, script: &str, interval: &str, timeout: &str) -> String {
    format!(
        "check {{\n name = {}\n type = \"script\"\n command = \"/bin/sh\"\n args = [\"-c\", {}]\n interval = \"{interval}\"\n timeout = \"{timeout}\"\n }}",
        quoted(name),
        quoted(script)
    )
}

/// Processes that come of [`CLINGS`], wherever they are: each has some of its words, as a shell or as a `sleep`.
fn clinging() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let clings = |pid: &u32| {
        proc_file(*pid, "cmdline").is_ok_and(|line| line.replace('\0', " ").contains("sleep 70"))
    };
    Ok(pids.filter(clings).collect())
}

fn a_real_agent_tells_consul_how_script_checks_went(context: &Context) -> Result<()> {
    context.block_on(async {
        let consul = Consul::start()?;
        let agent = RealAgent::start(RealConfig {
            consul: Some(consul.address()),
            total_compute_mhz: Some(2_000),
            ..RealConfig::new(context.agent(), context.driver())
        })
        .await?;
        let checks = [
            script_check("late", CLINGS, "60s", "15s"),
            script_check("ready", "cat local/ready || exit 2", "10s", "30s"),
            script_check("warns", "grep ^0: /proc/self/cgroup; exit 1", "20s", "30s"),
            script_check("fails", "cat /etc/passwd; exit 3", "20s", "30s"),
        ];
        let service = format!(
            "service {{\n name = \"scripted\"\n provider = \"consul\"\n {}\n }}",
            checks.join("\n ")
        );
        let ids = agent.run(&idle().task(&service).text()).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["running"]).await?;
        let scope = crate::agent::scope_of(id, "t")?;

        let is_up = until("the late script is up", || {
            (clinging().ok()?.len() >= 5).then_some(())
        });
        is_up.await.with_context(|| format!("{consul:?}"))?;
        let first = async |name: &str| -> Result<Update> {
            let told = until(name, || consul.updates(name).into_iter().next()).await;
            told.with_context(|| format!("{consul:?}"))
        };
        let late = first("late").await?;
        ensure!(late.status == "critical", "{late:?}");
        context.note(format!("a late script: {late:?}"));
        until("nothing of it is left", || {
            clinging().ok()?.is_empty().then_some(())
        })
        .await?;

        let expect = async |name: &str, status: &str, words: &str| -> Result<()> {
            let seen = first(name).await?;
            let is = seen.status == status && seen.output.contains(words);
            ensure!(is, "{name} is {seen:?}, not {status} with {words:?}");
            Ok(())
        };
        expect("ready", "critical", "No such file or directory").await?;
        expect("warns", "warning", "0::/exec-").await?;
        expect("fails", "critical", "Permission denied").await?;

        let command = "echo it is ready >local/ready";
        let exec = [
            "alloc", "exec", "-t=false", "-task", "t", id, "/bin/sh", "-c", command,
        ];
        let output = nomad(context, &exec, "")?;
        ensure!(output.status.success(), "{output:?}");
        until("the check passes", || {
            (consul.checks().get("ready")? == "passing").then_some(())
        })
        .await?;
        let told = consul.updates("ready");
        let last = told.last().context("an update")?;
        ensure!(last.output == "it is ready\n", "{told:?}");
        for (name, status) in [
            ("late", "critical"),
            ("warns", "warning"),
            ("fails", "critical"),
        ] {
            let told = consul.updates(name);
            ensure!(
                told.iter().all(|update| update.status == status),
                "{name}: {told:?}"
            );
            ensure!(consul.checks()[name] == status, "{:?}", consul.checks());
        }
        ensure!(consul.services() == ["scripted"], "{:?}", consul.services());
        context.note(format!("answered with 404: {:?}", consul.unknown()));

        agent.stop("case").await?;
        until("the service is gone from Consul", || {
            (consul.services().is_empty() && consul.checks().is_empty()).then_some(())
        })
        .await?;
        no_session_is_left(&scope).await?;
        ensure!(clinging()?.is_empty(), "{:?}", clinging()?);
        until("the scope is gone", || scope.expect_gone().ok()).await?;
        agent.collect().await?;
        agent.finish().await
    })
}
