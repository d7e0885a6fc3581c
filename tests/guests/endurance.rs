//! Many tasks, one after the other and all at once: what is left of each must be nothing, in the plugin and in PID 1 too.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::proto::driver::TaskConfig;
use tokio::task::JoinSet;

use crate::ahead::ahead;
use crate::calls::{Calls, Descriptors, Place};
use crate::case;
use crate::nomad::{agent, proc_file, status, until};

pub const CASES: &[Case] = &[
    case!(
        Speed,
        Ours,
        thousands_of_tasks_leave_nothing_in_memory,
        Long
    ),
    case!(Speed, Ours, hundreds_of_tasks_at_once_keep_their_codes),
];

/// After these an allocator has what it needs, and so have the tables that grow and never shrink.
const WARM_UP: i32 = 500;
const TASKS: i32 = 2_000;
/// What memory may grow by meanwhile, as allocators are. Neither what the plugin knows of a task nor what systemd knows of a
/// unit fits into 350 bytes, so that 1,500 forgotten ones are above it.
const SLACK_KIB: u64 = 512;
const AT_ONCE: i32 = 200;

fn thousands_of_tasks_leave_nothing_in_memory(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let place = Place::new(&agent).await?;
        let calls = Calls::of(&agent)?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let ground = Ground::survey()?;
        let begun = Instant::now();
        for code in 0..WARM_UP {
            to_end(&calls, place.task(&exit(code)), code % 256).await?;
        }
        ahead(plugin).await?;
        let before = [Size::of(plugin)?, Size::of(1)?];
        for code in WARM_UP..TASKS {
            to_end(&calls, place.task(&exit(code)), code % 256).await?;
        }
        context.note(format!(
            "{TASKS} tasks, one after the other: {:.1} s",
            begun.elapsed().as_secs_f64()
        ));
        for (pid, before) in [plugin, 1].into_iter().zip(before) {
            let after = Size::of(pid)?;
            let grown = format!(
                "{}: {} KiB of its own after {WARM_UP} tasks, {} KiB after {TASKS}",
                status(pid, "Name")?,
                before.own_kib,
                after.own_kib
            );
            context.note(&grown);
            ensure!(after.own_kib <= before.own_kib + SLACK_KIB, "{grown}");
            until_as_before(pid, &before.descriptors).await?;
        }
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        place.close().await?;
        agent.finish().await
    })
}

/// Their scopes may be gone before the driver has looked at them.
fn hundreds_of_tasks_at_once_keep_their_codes(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let place = Place::new(&agent).await?;
        let calls = Calls::of(&agent)?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let ground = Ground::survey()?;
        to_end(&calls, place.task(&exit(0)), 0).await?;
        ahead(plugin).await?;
        let before = [Size::of(plugin)?, Size::of(1)?];
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for code in 0..AT_ONCE {
            let (calls, task) = (calls.clone(), place.task(&exit(code)));
            tasks.spawn(async move { to_end(&calls, task, code).await });
        }
        let mut most_stacks = 0;
        while let Some(ended) = tasks.join_next().await {
            ended??;
            most_stacks = most_stacks.max(stacks(plugin)?);
        }
        ensure!(
            most_stacks > 0,
            "no stack was seen while there were threads"
        );
        context.note(format!("{AT_ONCE} tasks at once: {:?}", begun.elapsed()));
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        for (pid, before) in [plugin, 1].into_iter().zip(before) {
            until_as_before(pid, &before.descriptors).await?;
        }
        until(
            "the plugin keeps no stack of a thread that has ended",
            || (stacks(plugin).ok()? == 0).then_some(()),
        )
        .await?;
        place.close().await?;
        agent.finish().await
    })
}

fn exit(code: i32) -> String {
    format!("exit {}", code % 256)
}

/// In Nomad's order: destroyed as soon as it has ended.
async fn to_end(calls: &Calls, task: TaskConfig, code: i32) -> Result<()> {
    let id = task.id.clone();
    calls.start(task).await.context("StartTask")?;
    let exit = calls.end(&id).await.context("WaitTask")?;
    ensure!((exit.code, exit.signal) == (code, 0), "{code}: {exit:?}");
    calls.destroy(&id, true).await.context("DestroyTask")
}

/// What a process has taken.
#[derive(Debug)]
struct Size {
    own_kib: u64,
    descriptors: Descriptors,
}

impl Size {
    fn of(pid: u32) -> Result<Size> {
        let own = status(pid, "RssAnon")?;
        Ok(Size {
            own_kib: own.trim_end_matches(" kB").parse()?,
            descriptors: Descriptors::of(pid)?,
        })
    }
}

/// Stacks of threads that a process has or keeps, without its first one's: each is memory without a name above a guard page.
/// The first one's signal stack is like them, but of a few pages.
fn stacks(pid: u32) -> Result<usize> {
    let maps = proc_file(pid, "maps")?;
    let maps: Vec<(u64, u64, &str)> = maps.lines().filter_map(mapping).collect();
    let is_stack = |pair: &&[(u64, u64, &str)]| {
        let [(begin, end, guard), (above, top, stack)] = pair else {
            return false;
        };
        end - begin == 4096
            && end == above
            && top - above >= 1 << 20
            && guard.starts_with("---p")
            && *stack == "rw-p 00000000 00:00 0"
    };
    Ok(maps.windows(2).filter(is_stack).count())
}

/// Begin, end, and the rest of a line of `/proc/PID/maps`.
fn mapping(line: &str) -> Option<(u64, u64, &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (begin, end) = range.split_once('-')?;
    let [begin, end] = [begin, end].map(|address| u64::from_str_radix(address, 16));
    Some((begin.ok()?, end.ok()?, rest.trim_end()))
}

/// Descriptors of what ended a moment ago may still be on their way.
async fn until_as_before(pid: u32, before: &Descriptors) -> Result<()> {
    until(
        &format!("{pid} has no more descriptors than before"),
        || before.grown(pid).ok()?.is_empty().then_some(()),
    )
    .await
    .with_context(|| format!("{:?}", before.grown(pid)))
}
