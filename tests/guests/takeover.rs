//! This driver in the place of HashiCorp's exec2: what that one left running is ended, once, and never runs beside a new
//! copy. Here a tree of the same shape plays its task.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::{DestroyTaskRequest, StartTaskRequest, TaskHandle};
use harness::nomad::{Agent, Allocation, Task};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::case;
use crate::nomad::{Job, Scope, agent, until};
use crate::recovery::recover;

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_task_of_the_other_driver_is_interrupted_and_started_anew
    ),
    case!(Both, Ours, one_that_ignores_the_interrupt_is_killed),
    case!(Speed, Ours, one_that_has_ended_is_only_started_anew),
    case!(
        Speed,
        Ours,
        a_stranger_with_the_pid_of_its_handle_is_left_alone
    ),
    case!(
        Speed,
        Ours,
        a_handle_that_names_the_cgroup_of_another_task_ends_nothing
    ),
    case!(Speed, Ours, a_recovery_of_our_own_task_ends_nothing),
    case!(Both, Ours, no_start_makes_a_second_copy),
    case!(
        Limits,
        Ours,
        one_that_cannot_be_killed_keeps_the_next_start_back
    ),
];

/// Says in a file that it was asked to end.
const POLITE: &str =
    "trap 'echo interrupted > $0; exit 0' INT; while :; do sleep 0.05 & wait $!; done";
const STUBBORN: &str = "trap '' INT; while :; do sleep 0.05 & wait $!; done";

/// A process group in a cgroup, as exec2 starts one: a leader that does not mind SIGINT, and a PID namespace below it.
#[derive(Debug)]
struct Theirs {
    leader: Child,
    cgroup: Place,
}

/// A cgroup, made unless Nomad's client has. Goes with all that is in it.
#[derive(Debug)]
struct Place {
    dir: PathBuf,
    made: Vec<PathBuf>,
}

impl Place {
    fn new(dir: &Path) -> Result<Place> {
        let missing = dir.ancestors().take_while(|dir| !dir.exists());
        let made = missing.map(Path::to_owned).collect();
        fs::create_dir_all(dir)?;
        Ok(Place {
            dir: dir.into(),
            made,
        })
    }

    fn processes(&self) -> Result<usize> {
        Ok(fs::read_to_string(self.dir.join("cgroup.procs"))?
            .lines()
            .count())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        for dir in &self.made {
            // Busy for as long as a killed process takes to end.
            for _ in 0..500 {
                if fs::remove_dir(dir).is_ok() || !dir.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Theirs {
    /// Returns when the script loops.
    async fn start(dir: &Path, script: &str, word: &Path) -> Result<Theirs> {
        let cgroup = Place::new(dir)?;
        let leader = Command::new("sh")
            .arg("-c")
            .arg("echo $$ > $0/cgroup.procs; exec unshare --fork --pid --kill-child=SIGKILL sh -c \"$1\" \"$2\"")
            .arg(dir)
            .arg(script)
            .arg(word)
            .process_group(0)
            .spawn()?;
        let theirs = Theirs { leader, cgroup };
        until("the other driver's task runs", || {
            (theirs.cgroup.processes().ok()? >= 3).then_some(())
        })
        .await?;
        Ok(theirs)
    }

    /// Whether nothing of it is left.
    fn is_gone(&mut self) -> Result<bool> {
        // A process leaves its cgroup a moment before its parent is told.
        Ok(self.cgroup.processes()? == 0 && self.leader.wait().is_ok())
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.dir.join("cgroup.kill"), "1");
        let _ = self.leader.wait();
    }
}

/// A file system whose server never answers: whoever looks into it sleeps uninterruptibly until the server goes.
#[derive(Debug)]
struct Hung {
    server: File,
    dir: tempfile::TempDir,
}

impl Hung {
    fn mount() -> Result<Hung> {
        let server = File::options().read(true).write(true).open("/dev/fuse")?;
        let dir = tempfile::tempdir()?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let none = MsFlags::empty();
        mount(
            Some("hung"),
            dir.path(),
            Some("fuse"),
            none,
            Some(options.as_str()),
        )?;
        let mut hung = Hung { server, dir };
        // Only FUSE_INIT is answered: protocol 7.31, pages of 4 KiB, no flags.
        let mut answer = [0_u8; 80];
        answer[0] = 80;
        answer[8..16].copy_from_slice(&hung.request()?);
        (answer[16], answer[20], answer[37]) = (7, 31, 16);
        hung.server.write_all(&answer)?;
        Ok(hung)
    }

    /// The id of the next request. Once it was read, not even SIGKILL ends the wait for its answer.
    fn request(&mut self) -> Result<[u8; 8]> {
        let mut request = [0; 16384];
        ensure!(self.server.read(&mut request)? > 16);
        Ok(request[8..16].try_into()?)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = umount2(self.dir.path(), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}

/// A task whose own copy has ended, so that all that runs of it is the other driver's.
async fn between_two_starts(agent: &Agent) -> Result<Allocation> {
    let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
    alloc.only_task()?.stop().await?;
    Ok(alloc)
}

fn nomads_cgroup(task: &Task) -> Result<PathBuf> {
    let config = task.handle().and_then(|handle| handle.config);
    let resources = config.and_then(|config| config.resources);
    let linux = resources.and_then(|resources| resources.linux_resources);
    Ok(linux.context("no resources of Linux")?.cpuset_cgroup.into())
}

/// The one that the request names, and that of a start with `cores`.
fn their_cgroups(task: &Task) -> Result<[PathBuf; 2]> {
    let own = nomads_cgroup(task)?;
    let scope = own.file_name().context("a scope")?;
    let reserved = Path::new("/sys/fs/cgroup/nomad.slice/reserve.slice").join(scope);
    Ok([own, reserved])
}

/// As exec2 would have left it with Nomad.
fn their_handle(task: &Task, pid: u32) -> Result<TaskHandle> {
    let state = [
        b"\x83\xaaTaskConfig\x81\xa2ID\xa1x\xa9StartedAt\xd7\xff\0\0\0\0\x69\0\0\0\xa3PID\xce"
            .as_slice(),
        &pid.to_be_bytes(),
    ];
    Ok(TaskHandle {
        driver_state: state.concat(),
        ..task.handle().context("a handle")?
    })
}

/// What Nomad does with a task that ran when the agent stopped. Returns the driver's refusal.
async fn refusal(agent: &Agent, handle: TaskHandle) -> Result<String> {
    let task_id = handle.config.as_ref().context("a task")?.id.clone();
    let error = recover(agent, handle).await?.err().context("recovered")?;
    let force = true;
    let destroy = DestroyTaskRequest { task_id, force };
    agent.connection()?.driver().destroy_task(destroy).await?;
    ensure!(
        error.starts_with("the task was started by HashiCorp's exec2, "),
        "{error}"
    );
    Ok(error)
}

/// A new start works, and is the only copy.
async fn start_anew(task: &Task, cgroup: &Place) -> Result<()> {
    task.restart().await?;
    ensure!(Scope::of(task)?.processes()?.len() == 2);
    ensure!(cgroup.processes()? == 0, "a copy is left");
    Ok(())
}

/// A start is refused for as long as the other driver's copy runs.
async fn expect_no_start(agent: &Agent, task: &Task, theirs: &Theirs) -> Result<()> {
    let request = StartTaskRequest {
        task: task.handle().context("a handle")?.config,
    };
    let refused = agent.connection()?.driver().start_task(request).await;
    let refused = refused.err().context("a second copy was started")?;
    let said = refused.message();
    ensure!(
        said.contains("another driver started still runs in")
            && said.contains(&*theirs.cgroup.dir.to_string_lossy()),
        "{said}"
    );
    ensure!(!refused.details().is_empty(), "Nomad would not try again");
    ensure!(!Scope::of(task)?.dir.exists() && theirs.cgroup.processes()? > 0);
    Ok(())
}

fn a_task_of_the_other_driver_is_interrupted_and_started_anew(context: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let word = dir.path().join("word");
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        for dir in their_cgroups(task)? {
            let mut theirs = Theirs::start(&dir, POLITE, &word).await?;
            let error = refusal(&agent, their_handle(task, theirs.leader.id())?).await?;
            ensure!(
                error.contains("was sent SIGINT and has ended, so that Nomad can start it anew"),
                "{error}"
            );
            ensure!(theirs.is_gone()?, "it still runs");
            ensure!(fs::read_to_string(&word)? == "interrupted\n");
            fs::remove_file(&word)?;
            start_anew(task, &theirs.cgroup).await?;
            task.stop().await?;
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

fn one_that_ignores_the_interrupt_is_killed(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        let mut theirs =
            Theirs::start(&nomads_cgroup(task)?, STUBBORN, Path::new("/dev/null")).await?;
        let begun = Instant::now();
        let error = refusal(&agent, their_handle(task, theirs.leader.id())?).await?;
        let took = begun.elapsed();
        ensure!(
            error.contains("was killed, as no SIGINT ended it"),
            "{error}"
        );
        ensure!(
            (Duration::from_secs(5)..Duration::from_secs(8)).contains(&took),
            "{took:?}"
        );
        ensure!(theirs.is_gone()?, "it still runs");
        start_anew(task, &theirs.cgroup).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn one_that_has_ended_is_only_started_anew(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        let path = nomads_cgroup(task)?;
        let nothing = "and nothing of it runs any more; Nomad can start it anew";
        let error = refusal(&agent, their_handle(task, 4_000_000)?).await?;
        ensure!(error.contains(nothing), "without a cgroup: {error}");
        let cgroup = Place::new(&path)?;
        let error = refusal(&agent, their_handle(task, 4_000_000)?).await?;
        ensure!(error.contains(nothing), "in an empty one: {error}");
        start_anew(task, &cgroup).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

/// The number of the handle belongs to a process outside the cgroup by now; what the task has left inside goes at once.
fn a_stranger_with_the_pid_of_its_handle_is_left_alone(context: &Context) -> Result<()> {
    let mut stranger = Command::new("sleep").arg("600").process_group(0).spawn()?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        let mut theirs =
            Theirs::start(&nomads_cgroup(task)?, STUBBORN, Path::new("/dev/null")).await?;
        let begun = Instant::now();
        let error = refusal(&agent, their_handle(task, stranger.id())?).await?;
        ensure!(error.contains("was killed"), "{error}");
        ensure!(begun.elapsed() < Duration::from_secs(4));
        ensure!(theirs.is_gone()?, "it still runs");
        ensure!(stranger.try_wait()?.is_none(), "the stranger was ended");
        start_anew(task, &theirs.cgroup).await?;
        alloc.stop().await?;
        agent.finish().await
    });
    stranger.kill()?;
    stranger.wait()?;
    done
}

fn a_handle_that_names_the_cgroup_of_another_task_ends_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        let own = nomads_cgroup(task)?;
        let other = own.with_file_name("11111111-2222-3333-4444-555555555555.t.scope");
        let theirs = Theirs::start(&other, STUBBORN, Path::new("/dev/null")).await?;
        for path in [
            "",
            "/sys/fs/cgroup",
            "/sys/fs/cgroup/nomad.slice",
            &other.to_string_lossy(),
        ] {
            let mut handle = their_handle(task, theirs.leader.id())?;
            let config = handle.config.as_mut().context("a task")?;
            let resources = config.resources.as_mut().context("resources")?;
            let linux = resources.linux_resources.as_mut().context("Linux's")?;
            linux.cpuset_cgroup = path.into();
            let error = refusal(&agent, handle).await?;
            ensure!(error.contains("nothing was touched"), "{path}: {error}");
            ensure!(
                theirs.cgroup.processes()? >= 2,
                "{path}: another task was ended"
            );
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

/// A process where the other driver's would be has nothing to do with a handle of ours.
fn a_recovery_of_our_own_task_ends_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let theirs = Theirs::start(&nomads_cgroup(task)?, STUBBORN, Path::new("/dev/null")).await?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ensure!(theirs.cgroup.processes()? >= 2, "it was ended");
        ensure!(Scope::of(task)?.processes()?.len() == 2);
        drop(theirs);
        alloc.stop().await?;
        agent.finish().await
    })
}

/// Whatever the reason for which the other driver's copy still runs.
fn no_start_makes_a_second_copy(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        for dir in their_cgroups(task)? {
            let mut theirs = Theirs::start(&dir, STUBBORN, Path::new("/dev/null")).await?;
            expect_no_start(&agent, task, &theirs).await?;
            fs::write(dir.join("cgroup.kill"), "1")?;
            until("it has ended", || theirs.is_gone().ok()?.then_some(())).await?;
            start_anew(task, &theirs.cgroup).await?;
            task.stop().await?;
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

fn one_that_cannot_be_killed_keeps_the_next_start_back(context: &Context) -> Result<()> {
    let mut hung = Hung::mount()?;
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = between_two_starts(&agent).await?;
        let task = alloc.only_task()?;
        let path = nomads_cgroup(task)?;
        let mut theirs = Theirs::start(&path, "stat $0/x; exit 0", hung.dir.path()).await?;
        hung.request()?;
        let error = refusal(&agent, their_handle(task, theirs.leader.id())?).await?;
        ensure!(
            error.contains("it was killed and has not ended")
                && error.contains("uninterruptible sleep"),
            "{error}"
        );
        expect_no_start(&agent, task, &theirs).await?;
        drop(hung);
        until("it has ended", || theirs.is_gone().ok()?.then_some(())).await?;
        start_anew(task, &theirs.cgroup).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}
