//! A host that runs out of something: space in /run, pids, memory, a disk that answers. A start fails for now, an end is
//! told as it was, and it all works again afterwards.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::{Agent, Config, RpcError};

use crate::case;
use crate::faults::{COUNTER, ended, exited, is_running, nothing_left, own_cgroup, running, up};
use crate::nomad::{Job, agent, said, status, until};

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_full_run_refuses_starts_and_loses_no_end),
    case!(Limits, Ours, no_free_pid_refuses_starts_for_now),
    case!(Limits, Ours, a_fork_bomb_is_stopped),
    case!(
        Limits,
        Ours,
        a_command_has_room_where_two_processes_are_allowed
    ),
    case!(
        Limits,
        Ours,
        a_memory_limit_that_no_start_fits_in_is_told,
        Long
    ),
    case!(Limits, Ours, a_host_without_memory_keeps_its_tasks),
    case!(Limits, Ours, a_task_in_uninterruptible_sleep_is_told),
];

/// A start that may fail for now: with one sentence, and leaving nothing. What it says, if it fails.
async fn start_or_passing_refusal(agent: &Agent, ground: &Ground) -> Result<Option<String>> {
    let told = match agent.run(&Job::command("sleep", &["600"]).text()).await {
        Ok(alloc) => {
            let exit = alloc.only_task()?.stop().await?;
            ensure!((exit.code, exit.signal) == (130, 2), "{exit:?}");
            alloc.stop().await?;
            None
        }
        Err(error) => {
            let error = error.downcast::<RpcError>()?;
            ensure!(error.recoverable, "{error:?}");
            ensure!(!error.message.contains('\n'), "{error:?}");
            Some(error.message)
        }
    };
    nothing_left(ground)
        .await
        .with_context(|| format!("{told:?}"))?;
    Ok(told)
}

fn a_full_run_refuses_starts_and_loses_no_end(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let by_itself = up(
            &agent,
            &Job::shell("mkfifo local/go; echo up; read word <local/go; exit 7"),
        )
        .await?;
        let stopped = running(&agent, &Job::command("sleep", &["600"])).await?;
        let with_both = Ground::survey()?;

        let full = FullRun::new()?;
        let told = start_or_passing_refusal(&agent, &with_both).await?;
        let told = told.context("it started on a full /run")?;
        ensure!(told.contains("No space left on device"), "{told}");
        fs::write(by_itself.1.paths().local.join("go"), "on\n")?;
        exited(&by_itself, (7, 0)).await?;
        stopped.1.stop().await?;
        ended(&stopped, (130, 2), &ground).await?;

        // Enough for the record, but not for what systemd writes.
        full.leave_a_page()?;
        let told = start_or_passing_refusal(&agent, &ground).await?;
        context.note(format!("a page of /run is free: {told:?}"));

        drop(full);
        let told = start_or_passing_refusal(&agent, &ground).await?;
        ensure!(told.is_none(), "{told:?}");
        agent.finish().await
    })
}

/// /run without a free page, until this is dropped. The file has no name: if the case is killed, the space is free all the
/// same.
struct FullRun {
    size_bytes: u64,
    file: Option<File>,
}

impl FullRun {
    /// What is free for a moment, and for whoever comes after a case that was killed: all of it would take the host's memory.
    const ROOM_BYTES: u64 = 32 << 20;

    fn new() -> Result<FullRun> {
        let seen = rustix::fs::statvfs("/run")?;
        let size_bytes = seen.f_blocks * seen.f_frsize;
        let used_bytes = (seen.f_blocks - seen.f_bfree) * seen.f_frsize;
        let mut full = FullRun {
            size_bytes,
            file: None,
        };
        resize_run(used_bytes + Self::ROOM_BYTES)?;
        let file = full.file.insert(tempfile::tempfile_in("/run")?);
        fill(file);
        Ok(full)
    }
}

impl FullRun {
    fn leave_a_page(&self) -> Result<()> {
        let mut file = self.file.as_ref().context("it is free")?;
        file.seek(SeekFrom::End(0))?;
        fill(&mut file);
        Ok(file.set_len(file.metadata()?.len() - 4096)?)
    }
}

fn fill(file: &mut impl Write) {
    let page = [0; 4096];
    while file.write_all(&page).is_ok() {}
}

impl Drop for FullRun {
    fn drop(&mut self) {
        self.file.take();
        let _ = resize_run(self.size_bytes);
    }
}

fn resize_run(bytes: u64) -> Result<()> {
    let options = format!("remount,size={bytes}");
    said("mount", &["-o", &options, "/run"]).map(drop)
}

/// The plugin's cgroup has none left: no thread, no helper.
fn no_free_pid_refuses_starts_for_now(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("a plugin")?;
        let sleeper = running(&agent, &Job::command("sleep", &["600"])).await?;
        let narrow = Narrow::new(plugin)?;
        let ground = Ground::survey()?;
        for free in 0..=2 {
            narrow.allow(Some(free))?;
            let told = start_or_passing_refusal(&agent, &ground).await?;
            ensure!(free > 0 || told.is_some(), "it started without a pid");
            let told = told.unwrap_or_else(|| "started".into());
            ensure!(
                free > 0 || told.contains("TasksMax= of the agent's unit"),
                "{told}"
            );
            context.note(format!("{free} pids are free: {told}"));
        }
        ensure!(
            agent.plugin_pid().await == Some(plugin),
            "the plugin died of it"
        );
        ensure!(is_running(&sleeper.1).await?);
        // An end without a free pid.
        narrow.allow(Some(0))?;
        sleeper.1.stop().await?;
        exited(&sleeper, (130, 2)).await?;
        narrow.allow(None)?;
        let told = start_or_passing_refusal(&agent, &ground).await?;
        ensure!(told.is_none(), "{told:?}");
        drop(narrow);
        agent.finish().await
    })
}

/// A cgroup around one process, until this is dropped.
struct Narrow {
    pid: u32,
    dir: PathBuf,
    home: PathBuf,
}

impl Narrow {
    fn new(pid: u32) -> Result<Narrow> {
        let narrow = Narrow {
            pid,
            dir: "/sys/fs/cgroup/narrow".into(),
            home: own_cgroup()?,
        };
        fs::create_dir(&narrow.dir)?;
        fs::write(narrow.dir.join("cgroup.procs"), pid.to_string())?;
        Ok(narrow)
    }

    /// So many pids beyond those in use.
    fn allow(&self, free: Option<u64>) -> Result<()> {
        let current = fs::read_to_string(self.dir.join("pids.current"))?;
        let current: u64 = current.trim().parse()?;
        let max = free.map_or("max".into(), |free| (current + free).to_string());
        Ok(fs::write(self.dir.join("pids.max"), max)?)
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("pids.max"), "max");
        let _ = fs::write(self.home.join("cgroup.procs"), self.pid.to_string());
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The kernel counts the arguments of a command as the task's memory, before it runs.
fn a_memory_limit_that_no_start_fits_in_is_told(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let long = "x".repeat(100 << 10);
        let job = |memory: u32| {
            Job::command("/bin/true", &[long.as_str(); 12])
                .resources(&format!("cpu = 100\n memory = {memory}"))
                .text()
        };
        let begun = Instant::now();
        let refused = agent.run(&job(1)).await.err().context("it started")?;
        let refused = refused.downcast::<RpcError>()?;
        context.note(format!("{} ({:?})", refused.message, begun.elapsed()));
        ensure!(refused.recoverable, "{refused:?}");
        ensure!(
            refused
                .message
                .ends_with("or is the task's memory limit too low?"),
            "{refused:?}"
        );
        nothing_left(&ground).await?;
        // Control: it is the limit.
        let alloc = agent.run(&job(16)).await?;
        ensure!(alloc.only_task()?.wait().await?.success());
        alloc.stop().await?;
        agent.finish().await
    })
}

fn a_fork_bomb_is_stopped(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = Config {
            plugin: "pids_max = 50".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        let ground = Ground::survey()?;
        for (program, expected) in [
            ("fork while 1", (130, 2)),
            ("$SIG{INT} = 'IGNORE'; fork while 1", (137, 9)),
        ] {
            let job = Job::command("/usr/bin/perl", &["-e", program]).task("kill_timeout = \"1s\"");
            let bomb = running(&agent, &job).await?;
            until("it has all it gets", || {
                (bomb.2.file("pids.current").ok()? == "50").then_some(())
            })
            .await?;
            let begun = Instant::now();
            bomb.1.stop().await?;
            context.note(format!(
                "stopped after {:.1} s",
                begun.elapsed().as_secs_f64()
            ));
            ended(&bomb, expected, &ground).await?;
        }
        agent.finish().await
    })
}

/// The supervisor is one of them.
fn a_command_has_room_where_two_processes_are_allowed(context: &Context) -> Result<()> {
    context.block_on(async {
        let config = Config {
            plugin: "pids_max = 2".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        let ground = Ground::survey()?;
        for _ in 0..3 {
            let alloc = agent.run(&Job::command("sleep", &["1"]).text()).await?;
            let exit = alloc.only_task()?.wait().await?;
            ensure!(exit.success(), "{exit:?}");
            alloc.stop().await?;
        }
        nothing_left(&ground).await?;
        agent.finish().await
    })
}

fn a_host_without_memory_keeps_its_tasks(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let plugin = agent.plugin_pid().await;
        // A shell whose pages were dropped meanwhile has to read them again before it answers its signal.
        let patient = Job::shell(COUNTER).task("kill_timeout = \"60s\"");
        let counter = up(&agent, &patient).await?;
        let sleeper = running(&agent, &Job::command("sleep", &["600"])).await?;
        let supervisors = (counter.2.supervisor()?, sleeper.2.supervisor()?);
        let ballast = Ballast::new()?;
        // In a unit of its own: systemd ends one of whose processes the kernel kills.
        let hog = tokio::process::Command::new("systemd-run")
            .args(["--collect", "--wait", "--unit=hog", "perl", "-e"])
            .arg("push @all, 'x' x (64 << 20) while 1")
            .output()
            .await?;
        drop(ballast);
        let told = String::from_utf8_lossy(&hog.stderr).into_owned();
        ensure!(told.contains("oom-kill"), "{told}");

        ensure!(agent.plugin_pid().await == plugin, "the plugin went");
        ensure!((counter.2.supervisor()?, sleeper.2.supervisor()?) == supervisors);
        ensure!(is_running(&counter.1).await? && is_running(&sleeper.1).await?);
        let exit = sleeper.1.stop().await?;
        ensure!(!exit.oom_killed, "{exit:?}");
        exited(&sleeper, (130, 2)).await?;
        counter.1.stop().await?;
        ended(&counter, (3, 0), &ground).await?;
        let told = start_or_passing_refusal(&agent, &ground).await?;
        ensure!(told.is_none(), "{told:?}");
        agent.finish().await
    })
}

/// Most of the guest's memory, until this is dropped: an emulated machine is slow to give it to a process page by page, and
/// slower still once it drops the pages of programs again and again before it kills. So it is not to drop those in use.
struct Ballast {
    settings: Vec<(&'static str, String)>,
}

impl Ballast {
    const DIR: &str = "/mnt";
    const SPARE_PROGRAMS: [(&str, &str); 2] = [
        ("/sys/kernel/mm/lru_gen/enabled", "y"),
        ("/sys/kernel/mm/lru_gen/min_ttl_ms", "1000"),
    ];
    const SPARED_KIB: u64 = 300 << 10;

    fn new() -> Result<Ballast> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let available = meminfo
            .lines()
            .find_map(|line| {
                line.strip_prefix("MemAvailable:")?
                    .trim()
                    .strip_suffix(" kB")
            })
            .context("no MemAvailable")?;
        let size_kib = available.parse::<u64>()?.saturating_sub(Self::SPARED_KIB);
        let options = format!("size={}k", size_kib + 1024);
        said(
            "mount",
            &["-t", "tmpfs", "-o", &options, "ballast", Self::DIR],
        )?;
        let mut ballast = Ballast {
            settings: Vec::new(),
        };
        for (file, value) in Self::SPARE_PROGRAMS {
            ballast.settings.push((file, fs::read_to_string(file)?));
            fs::write(file, value)?;
        }
        let file = Path::new(Self::DIR).join("file");
        let size = format!("{size_kib}KiB");
        said("fallocate", &["--length", &size, &file.to_string_lossy()])?;
        Ok(ballast)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        for (file, value) in &self.settings {
            let _ = fs::write(file, value.trim());
        }
        let _ = said("umount", &[Self::DIR]);
    }
}

/// As on a hung NFS mount: a write to a frozen file system, which no signal interrupts.
fn a_task_in_uninterruptible_sleep_is_told(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        let disk = Disk::mount(&context.payload(harness::guest::SMALL_DISK))?;
        let script =
            "echo up; while ! [ -e local/go ]; do sleep 0.05; done; echo x >/mnt/small/file";
        let job = Job::shell(script)
            .user("root")
            .unveil(&["rwc:/mnt/small"])
            .task("kill_timeout = \"1s\"");
        let writer = up(&agent, &job).await?;
        let (alloc, task, scope) = &writer;
        let main = scope.main()?;
        disk.freeze()?;
        fs::write(task.paths().local.join("go"), "")?;
        until("it hangs", || {
            status(main, "State").ok()?.starts_with('D').then_some(())
        })
        .await?;
        ensure!(is_running(task).await?);
        let begun = Instant::now();
        let stopped = task.stop().await;
        let took = begun.elapsed();
        let error = stopped.err().context("it was stopped")?;
        context.note(format!("{error:#} (after {:.1} s)", took.as_secs_f64()));
        ensure!(
            format!("{error:#}").contains("uninterruptible sleep"),
            "{error:#}"
        );
        ensure!(took < Duration::from_secs(30), "{took:?}");
        ensure!(
            task.exit().is_none(),
            "it counts as ended: {:?}",
            task.exit()
        );

        disk.thaw()?;
        exited(&writer, (137, 9)).await?;
        alloc.stop().await?;
        drop(disk);
        nothing_left(&ground).await?;
        agent.finish().await
    })
}

/// A file system of our own, until this is dropped.
struct Disk(PathBuf);

impl Disk {
    const DIR: &str = "/mnt/small";

    fn mount(image: &Path) -> Result<Disk> {
        let copy = PathBuf::from("/var/tmp/small.ext4");
        fs::copy(image, &copy)?;
        fs::create_dir_all(Self::DIR)?;
        said("modprobe", &["loop"])?;
        said("mount", &["-o", "loop", &copy.to_string_lossy(), Self::DIR])?;
        Ok(Disk(copy))
    }

    fn freeze(&self) -> Result<()> {
        said("fsfreeze", &["-f", Self::DIR]).map(drop)
    }

    fn thaw(&self) -> Result<()> {
        said("fsfreeze", &["-u", Self::DIR]).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.thaw();
        for _ in 0..100 {
            if said("umount", &[Self::DIR]).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = fs::remove_dir(Self::DIR);
        let _ = fs::remove_file(&self.0);
    }
}
