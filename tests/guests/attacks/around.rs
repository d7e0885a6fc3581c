//! Attacks on what root's code does around a task: on its look at directories that the task swaps meanwhile, on what it reads
//! where a volume lies, and on the end that it tells when the memory is gone.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::{Mount, TaskConfig};
use harness::nomad::{Agent, Allocation, Calls, Task};
use nomad_driver_exec2::job::request::new_task_id;

use super::NOBODY;
use super::stage::{GROUND, Stage};
use crate::case;
use crate::exec::{Talk, run_as_check};
use crate::nomad::{Job, Scope, agent, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_directory_that_is_swapped_leads_no_session_out),
    case!(Both, Ours, a_directory_that_is_swapped_leads_no_start_out),
    case!(Speed, Ours, root_s_code_reads_nothing_of_a_volume),
    case!(
        Kernel,
        Ours,
        the_end_is_told_when_a_crowd_takes_all_the_memory,
        Long
    ),
];

/// Exchanges a directory and a link out of the sandbox, again and again, in the directory that its argument names. Between
/// bursts it leaves the processor to those who look.
fn swap() -> String {
    format!(
        r#"use strict; my $at = $ARGV[0]; $| = 1;
        symlink("{GROUND}", "$at/link") or die "symlink: $!";
        print "up\n";
        until (-e "$at/stop") {{
            for (1 .. 1 + rand 100) {{
                # RENAME_EXCHANGE: there is always one of the two.
                syscall({}, -100, "$at/dir", -100, "$at/link", 2) == 0 or die "exchange: $!";
            }}
            select undef, undef, undef, 0.005;
        }}"#,
        libc::SYS_renameat2
    )
}

/// Where it is, and what it can read there, of what is its own and of what is not.
fn look() -> String {
    format!("/bin/pwd -P; cat file; cat secret; cat {GROUND}/secret; exit 0")
}

/// In both places that are swapped: what `look` reads of its own.
const TEMPLATE: &str = "template {\n data = \"its own\\n\"\n destination = \"AT/dir/file\"\n }";

/// What the looks came to. Both must be seen, or nothing was swapped in time.
#[derive(Debug, Default)]
struct Looks {
    inside: usize,
    refused: usize,
}

impl Looks {
    fn both(&self) -> bool {
        self.inside > 2 && self.refused > 2
    }

    fn take(&mut self, looked: Result<String, String>, within: &Path) -> Result<()> {
        match looked {
            Ok(said) => {
                let is_inside = said.starts_with(&format!("{}/", within.display()));
                ensure!(is_inside && said.contains("\nits own\n"), "{said}");
                ensure!(!said.lines().any(|line| line == "secret"), "{said}");
                ensure!(said.contains("Permission denied"), "{said}");
                self.inside += 1;
            }
            Err(sentence) => {
                // Of the working directory, and of what is unveiled.
                let words = ["cross-device", "it leads out of the task's directory"];
                let is_told = words.iter().any(|word| sentence.contains(word));
                ensure!(is_told && sentence.contains("/dir"), "{sentence}");
                self.refused += 1;
            }
        }
        Ok(())
    }
}

/// At most; each takes a side by chance.
const LOOKS: usize = 100;

fn a_directory_that_is_swapped_leads_no_session_out(context: &Context) -> Result<()> {
    let stage = Stage::new(NOBODY)?;
    let before = stage.files()?;
    context.block_on(async {
        let agent = agent(context).await?;
        for user in [None, Some("root")] {
            let job = Job::command("perl", &["-e", &swap(), "LOCAL"])
                .task(&TEMPLATE.replace("AT", "local"))
                .task("env {\n LC_ALL = \"C\"\n }")
                .config("work_dir = \"local/dir\"");
            let job = user.map_or(job.clone(), |user| job.user(user));
            let text = job.text().replace("\"LOCAL\"", "\"${NOMAD_TASK_DIR}\"");
            let alloc = agent.run(&text).await?;
            let task = alloc.only_task()?;
            until("it swaps", || {
                (alloc.stdout("t").ok()? == "up\n").then_some(())
            })
            .await?;
            let mut looks = Looks::default();
            for number in 0..LOOKS {
                let looked = if number % 2 == 0 {
                    in_session(&agent, task).await
                } else {
                    in_script(&agent, task).await
                };
                looks.take(looked, &task.paths().local)?;
                if looks.both() {
                    break;
                }
            }
            end_swapping(&alloc, &task.paths().local, &looks).await?;
        }
        agent.finish().await
    })?;
    ensure!(stage.files()? == before, "{}", stage.files()?);
    Ok(())
}

/// Ends it in the directory, where both must have been seen, and the allocation with it.
async fn end_swapping(alloc: &Allocation, at: &Path, looks: &Looks) -> Result<()> {
    ensure!(looks.both(), "nothing was swapped in time: {looks:?}");
    fs::write(at.join("stop"), "")?;
    let exit = alloc.task("t")?.wait().await?;
    ensure!(exit.success(), "{exit:?}: {}", alloc.stderr("t")?);
    alloc.stop().await
}

fn shell(script: &str) -> Vec<String> {
    let script = format!("exec 2>&1; {script}");
    ["/bin/sh", "-c", &script].map(str::to_owned).to_vec()
}

async fn in_session(agent: &Agent, task: &Task) -> Result<String, String> {
    let talk = Talk::command(agent, task, shell(&look())).await;
    let ended = match talk {
        Ok(talk) => talk.ends_with(0).await,
        Err(error) => Err(error),
    };
    ended.map_err(|error| format!("{error:#}"))
}

async fn in_script(agent: &Agent, task: &Task) -> Result<String, String> {
    match run_as_check(agent, &task.id(), shell(&look()), 60).await {
        Ok((said, 0)) => Ok(said),
        Ok((said, code)) => Err(format!("{code}: {said}")),
        Err(status) => Err(status.message().to_owned()),
    }
}

/// Root's start, which another task of the allocation attacks.
fn a_directory_that_is_swapped_leads_no_start_out(context: &Context) -> Result<()> {
    let stage = Stage::new(NOBODY)?;
    let before = stage.files()?;
    let victim = format!(
        "task \"u\" {{\n driver = \"exec2\"\n user = \"root\"\n {}\n env {{\n LC_ALL = \"C\"\n }}\n config {{\n \
         command = \"/bin/sh\"\n args = [\"-c\", \"exec >$NOMAD_TASK_DIR/out 2>&1; {}\"]\n \
         work_dir = \"alloc/dir\"\n unveil = [\"r:${{NOMAD_ALLOC_DIR}}/dir\"]\n }}\n }}\n task \"t\"",
        TEMPLATE.replace("AT", "alloc"),
        look()
    );
    let swapper = Job::command("perl", &["-e", &swap(), "ALLOC"]).text();
    let text = swapper
        .replace("\"ALLOC\"", "\"${NOMAD_ALLOC_DIR}\"")
        .replacen("task \"t\"", &victim, 1);
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&text).await?;
        let victim = alloc.task("u")?;
        until("it swaps", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        victim.wait().await?;
        let config = victim.handle().and_then(|handle| handle.config);
        let config = config.context("a handle has its configuration")?;
        let calls = Calls::of(&agent)?;
        let mut looks = Looks::default();
        for _ in 0..LOOKS {
            let looked = start_again(&calls, &config, &victim.paths().local).await?;
            looks.take(looked, &victim.paths().alloc)?;
            if looks.both() {
                break;
            }
        }
        end_swapping(&alloc, &victim.paths().alloc, &looks).await?;
        agent.finish().await
    })?;
    ensure!(stage.files()? == before, "{}", stage.files()?);
    Ok(())
}

/// What it looked at, or why it did not start.
async fn start_again(
    calls: &Calls,
    config: &TaskConfig,
    local: &Path,
) -> Result<Result<String, String>> {
    let config = TaskConfig {
        id: new_task_id(&config.alloc_id, &config.name),
        stdout_path: "/dev/null".into(),
        stderr_path: "/dev/null".into(),
        ..config.clone()
    };
    let id = config.id.clone();
    if let Err(status) = calls.start(config).await {
        return Ok(Err(status.message().to_owned()));
    }
    let exit = calls.end(&id).await?;
    calls.destroy(&id, false).await?;
    ensure!(exit.success(), "{exit:?}");
    Ok(Ok(fs::read_to_string(local.join("out"))?))
}

/// An author's files for /etc, gone with the value.
struct Etc;

const ETC: &str = "/srv/exec2-etc";
/// What those read who ask the C library who somebody is, or where.
const FILES: [(&str, &str); 5] = [
    (
        "nsswitch.conf",
        "passwd: exec2attack files\ngroup: exec2attack files\nhosts: exec2attack\n",
    ),
    ("passwd", "attacker:x:0:0::/:/bin/sh\n"),
    ("group", "attacker:x:0:\n"),
    ("localtime", "attacker"),
    ("login.defs", "UMASK 000\n"),
];

impl Etc {
    fn new() -> Result<Etc> {
        fs::create_dir_all(ETC)?;
        let etc = Etc;
        for (name, text) in FILES {
            fs::write(Path::new(ETC).join(name), text)?;
        }
        etc.forget()?;
        Ok(etc)
    }

    /// From here on the kernel writes down the next reading, as it is the first after the last change.
    fn forget(&self) -> Result<()> {
        for (name, _) in FILES {
            let times = fs::FileTimes::new()
                .set_accessed(SystemTime::UNIX_EPOCH)
                .set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
            let file = fs::File::options()
                .write(true)
                .open(Path::new(ETC).join(name))?;
            file.set_times(times)?;
        }
        Ok(())
    }

    fn read(&self) -> Result<Vec<&'static str>> {
        let mut read = Vec::new();
        for (name, _) in FILES {
            if fs::metadata(Path::new(ETC).join(name))?.atime() != 0 {
                read.push(name);
            }
        }
        Ok(read)
    }
}

impl Drop for Etc {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(ETC);
    }
}

fn over(destination: &str, host_path: String) -> Mount {
    Mount {
        task_path: destination.into(),
        host_path,
        ..Mount::default()
    }
}

/// A name service switch of the author's would have the C library load a library of theirs.
fn root_s_code_reads_nothing_of_a_volume(context: &Context) -> Result<()> {
    let etc = Etc::new()?;
    context.block_on(async {
        let agent = agent(context).await?;
        for user in [None, Some("nobody"), Some("root")] {
            let job = Job::command("sleep", &["600"]).unveil(&["r:/etc"]);
            let job = user.map_or(job.clone(), |user| job.user(user));
            etc.forget()?;
            let whole = |task: &mut TaskConfig| task.mounts = vec![over("/etc", ETC.into())];
            let refused = agent.run_with(&job.text(), whole).await.err();
            let refused = refused.context("a volume lies over /etc")?.to_string();
            ensure!(
                refused.contains("\"/etc\" is a directory of the driver's own"),
                "{refused}"
            );
            let each = |task: &mut TaskConfig| {
                let file = |(name, _)| over(&format!("/etc/{name}"), format!("{ETC}/{name}"));
                task.mounts = FILES.map(file).into();
            };
            let alloc = agent.run_with(&job.text(), each).await?;
            let task = alloc.only_task()?;
            // Neither reads anything of /etc by itself.
            for command in ["/bin/true", "/bin/sh -c :"] {
                let command: Vec<String> = command.split(' ').map(str::to_owned).collect();
                let talk = Talk::command(&agent, task, command.clone()).await?;
                talk.ends_with(0).await?;
                let (said, code) = run_as_check(&agent, &task.id(), command, 60).await?;
                ensure!((said.as_str(), code) == ("", 0), "{code}: {said}");
            }
            ensure!(etc.read()?.is_empty(), "{user:?}: {:?}", etc.read()?);
            // Control: who asks the C library reads them, and so does a task that wants to.
            let talk = Talk::shell(&agent, task, "getent passwd attacker").await?;
            let said = talk.ends_with(0).await?;
            ensure!(said == FILES[1].1, "{said}");
            let read = etc.read()?;
            ensure!(read == ["nsswitch.conf", "passwd"], "{read:?}");
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

/// Each process is as good to kill as another, and the main one is the smallest; at last it is the greatest.
const CROWD: &str = r#"until [ -e local/go ]; do perl -e '
        until (-e "local/go") {
            my $pid = fork;
            if (!defined $pid) { select undef, undef, undef, 0.01; next }
            if ($pid == 0) { my $little = "x" x (512 << 10); sleep 600; exit }
        }'
    done 2>/dev/null; exec tail /dev/zero"#;
/// A crowd's, before its main process is.
const KILLS: u32 = 20;

fn the_end_is_told_when_a_crowd_takes_all_the_memory(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        for user in [None, Some("root")] {
            let job = Job::shell(CROWD)
                .config("oom_score_adj = 1000")
                .resources("cpu = 2000\n memory = 32");
            let job = user.map_or(job.clone(), |user| job.user(user));
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            let scope = Scope::of(task)?;
            let supervisor = scope.supervisor()?;
            until("the crowd is killed", || {
                let events = scope.file("memory.events").ok()?;
                let mut kills = events
                    .lines()
                    .filter_map(|line| line.strip_prefix("oom_kill "));
                let is_enough = kills.next()?.parse::<u32>().ok()? > KILLS;
                (is_enough || task.exit().is_some()).then_some(())
            })
            .await?;
            ensure!(task.exit().is_none(), "{:?}", task.exit());
            ensure!(scope.supervisor()? == supervisor, "it is another");
            fs::write(task.paths().local.join("go"), "")?;
            let exit = task.wait().await?;
            ensure!(
                (exit.code, exit.signal, exit.oom_killed) == (137, 9, true)
                    && exit.message.is_empty(),
                "{exit:?}"
            );
            alloc.stop().await?;
            until("the scope is gone", || scope.expect_gone().ok()).await?;
        }
        agent.finish().await
    })
}
