//! The helper: PID 1 of a task's PID namespace, which prepares, confines and executes the task, and then stays as its
//! supervisor. One thread, no async, no logger, no decisions: its `Order` says what to do, `Step::ALL` in which order.
//! `spawn` and `report` are what the plugin sees of it.

mod cgroup;
mod confine;
mod exec;
mod files;
mod layers;
mod mounts;
mod namespaces;
mod place;
mod privileges;
pub mod report;
mod seccomp;
pub mod session;
mod spawn;
mod stdio;
mod supervise;
mod task;
mod volumes;

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use serde::de::DeserializeOwned;

use crate::breakpoint;
use crate::plan::steps::{Order, Step};
use crate::record;
use crate::sys::{self, SharedPage, clone};
use confine::Rules;
use place::TaskRoot;
use report::{At, Failure, Given, Word};
pub use spawn::{Idle, NO_PROCESS, Parked, SUBCOMMAND};
use supervise::{Child, Watch};
use task::Prepared;

/// What `spawn` puts where, after /dev/null as 0, 1 and 2.
const CONTROL: RawFd = 3;
/// A debug build's alone, for tests.
const BREAKPOINTS: RawFd = 4;

/// The helper's whole life. `main` calls it before there is any thread, parser or logger.
pub fn run() -> ! {
    // First of all, while it is charged to the plugin: the task inherits what this sets.
    sys::reset_signals();
    let control = sys::inherited(CONTROL)
        .ok()
        .filter(|fd| sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET));
    let Some(control) = control else {
        eprintln!(
            "\"{SUBCOMMAND}\" is how the plugin starts a task's helper; it does nothing by hand."
        );
        sys::exit_now(2);
    };
    // Its order has the task's environment. Executing the command makes the task dumpable again.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    breakpoint::adopt(sys::inherited(BREAKPOINTS));
    let given = match await_order(&control) {
        Ok(Some(given)) => given,
        // It was cloned ahead, and is not needed.
        Ok(None) => sys::exit_now(0),
        Err(failure) => give_up(&control, &failure),
    };
    let ready = prepare(given).and_then(|ready| {
        breakpoint::at(Step::Release);
        report::parked(&control).at(Step::Release)?;
        Ok((ready, report::wait_for_release(&control).at(Step::Release)?))
    });
    match ready {
        Ok((ready, Word::Given)) => enter(control, ready),
        Ok((ready, Word::Abandoned)) => {
            drop(ready);
            sys::exit_now(0)
        }
        Err(failure) => give_up(&control, &failure),
    }
}

/// What is the same for every task, and the wait for one: as long as there is none, it may take a while.
fn await_order(control: &OwnedFd) -> Result<Option<Given>, Failure> {
    // After execveat of a descriptor, older kernels name the process by the descriptor's number.
    rustix::thread::set_name(c"exec2-idle").at(Step::Open)?;
    // A signal to the plugin's process group, of a terminal or of timeout(1), is not for the task.
    rustix::process::setsid().at(Step::Open)?;
    // The task inherits it: Nomad's usual one, whatever the plugin's own is.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    report::wait_for_order(control).at(Step::Open)
}

/// What charges nothing to the task: it happens before the helper is in the scope.
fn prepare(given: Given) -> Result<(Prepared, SharedPage), Failure> {
    rustix::thread::set_name(c"exec2-launch").at(Step::Open)?;
    let page = SharedPage::map(&File::from(given.record), record::SIZE_BYTES).at(Step::Open)?;
    let kept = given.order;
    let order: Order = parse(&kept)?;
    breakpoint::at(Step::Open);
    TaskRoot::open(&order.task_dir, Step::Open)?;
    // The task's own /proc will be read-only: oom_score_adj is written through this one.
    let host_proc =
        place::open_host("/proc".as_ref(), OFlags::DIRECTORY).at_path(Step::Open, "/proc")?;
    supervise::spare_from_oom_killer(&host_proc);
    let outputs = stdio::open(&order, given.output)?;
    breakpoint::at(Step::Network);
    namespaces::join_network(&order)?;
    breakpoint::at(Step::Unshare);
    namespaces::unshare()?;
    let volumes = volumes::open(&order)?;
    breakpoint::at(Step::Propagation);
    namespaces::cut_propagation()?;
    breakpoint::at(Step::View);
    let root = mounts::build(&order, volumes)?;
    breakpoint::at(Step::Filter);
    // Of the supervisor as well, which needs none of what it refuses: the kernel's work for it would be the task's later on.
    seccomp::install(order.user_namespaces)?;
    let stdio = stdio::in_view(outputs)?;
    breakpoint::at(Step::Rules);
    let rules = privileges::as_task(&order, || Rules::open(&order, &root, stdio.fifos()))?;
    let prepared = Prepared {
        root,
        host_proc,
        stdio,
        rules,
        command: exec::Command::new(&order.command, &order.args, &order.env, order.uid)?,
        order,
        kept,
    };
    Ok((prepared, page))
}

/// What happens inside the scope.
fn enter(control: OwnedFd, (mut prepared, page): (Prepared, SharedPage)) -> ! {
    breakpoint::at(Step::Cgroup);
    let forked = cgroup::confine().and_then(|memory| {
        breakpoint::at(Step::Journal);
        stdio::join_journal(&prepared.order, &mut prepared.stdio)?;
        let (supervisor, task) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .at(Step::Fork)?;
        breakpoint::at(Step::Fork);
        supervise::make_ready()?;
        let (child, pidfd) = clone::clone_until_exec(0, &|| {
            let Err(failure) = task::become_task(&prepared, &task);
            give_up(&task, &failure)
        })
        .at(Step::Fork)?;
        let child = Child {
            pid: child,
            pidfd,
            has_executed: prepared.command.is_executing(),
            channel: supervisor,
        };
        Ok((memory, child))
    });
    match forked {
        Err(failure) => {
            drop(prepared);
            give_up(&control, &failure)
        }
        Ok((memory, child)) => {
            if !child.has_executed {
                supervise::bury(&control, &child, prepared.stdio);
            }
            let Prepared {
                host_proc,
                order,
                root,
                stdio,
                rules,
                command,
                kept,
            } = prepared;
            // What is not dropped here stays open, and in memory, for as long as the task runs.
            drop((host_proc, order, root, rules, command));
            let watch = Watch {
                child,
                memory,
                page,
                order: kept,
                log_readers: stdio.into_readers(),
            };
            supervise::run(control, watch)
        }
    }
}

/// Tells whoever waits, and ends.
fn give_up(to: &OwnedFd, failure: &Failure) -> ! {
    // Whoever is gone cannot be told.
    let _ = report::failed(to, failure);
    sys::exit_now(127)
}

/// Whoever has the descriptor, too, may have read from it before.
fn parse<T: DeserializeOwned>(order: &OwnedFd) -> Result<T, Failure> {
    let file = File::from(order.try_clone().at(Step::Open)?);
    let length = file.metadata().at(Step::Open)?.len();
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).at(Step::Open)?;
    rmp_serde::from_slice(&bytes).map_err(|error| {
        Failure::new(Step::Open, 0).note(format!("the order is unreadable: {error}"))
    })
}
