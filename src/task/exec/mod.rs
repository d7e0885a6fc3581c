//! The life of a session: `nomad alloc exec`, an action, a script check. Its command is one of the task's processes, in a
//! cgroup of its own below the task's scope, so that nothing of it outlives it, whatever it has made of itself.

mod streams;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use super::helper;
use super::log::of_task;
use super::table::{Task, TaskTable};
use super::thread::in_thread;
use super::types::{DriverError, ExitResult, SessionInput, SessionOutput, Streams, TaskId};
use super::wait;
use crate::breakpoint;
use crate::cgroup::Cgroup;
use crate::launch::report::{self, Message};
use crate::launch::session::{self, Entrance, Helper};
use crate::plan::session::{SessionOrder, SessionStep};
use crate::sys;
use crate::text::UnitText;
use streams::{OurEnds, connect, feed, pipes, tell};

/// Sessions of one task at a time. Each costs a helper of a quarter of a MiB, outside of the task's limits.
pub(super) const MOST_SESSIONS: usize = 32;
/// PATH_MAX without its NUL.
const MAX_COMMAND_BYTES: usize = 4_095;
/// A session's cgroup is this and a number.
const ROOM: &str = "exec-";
/// How long it may take to start the command: its path may hang.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long killed processes may take to end, and how often that is looked at.
const AFTER_KILL: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

/// A command that runs in a task. Dropped, it is killed with all that it started.
#[derive(Debug)]
pub struct Session {
    pub input: mpsc::Sender<SessionInput>,
    /// Both outputs and their ends, and then how it ended; or why that is not known.
    pub output: mpsc::Receiver<Result<SessionOutput, DriverError>>,
}

/// Our side of one.
#[derive(Debug)]
struct Ends {
    input: mpsc::Receiver<SessionInput>,
    output: mpsc::Sender<Result<SessionOutput, DriverError>>,
}

impl TaskTable {
    /// Starts the command; on return it has been executed.
    pub(super) async fn open_session(
        &self,
        id: &TaskId,
        command: Vec<String>,
        streams: Streams,
    ) -> Result<Session, DriverError> {
        let task = self.find(id).ok_or(DriverError::UnknownTask)?;
        let order = order(command, streams)?;
        if task.ended().is_some() || task.supervisor_pidfd.is_none() {
            return Err(DriverError::Permanent("task is not running".into()));
        }
        if task.cgroup.stands_still() {
            return Err(DriverError::Permanent(format!(
                "task is frozen, and so would be what is started in it; `systemctl thaw {}` lets it run again",
                task.unit
            )));
        }
        let permit = Arc::clone(&task.sessions).try_acquire_owned();
        let permit = permit.map_err(|_| {
            DriverError::Permanent(format!(
                "task has {MOST_SESSIONS} sessions already; end one of them first"
            ))
        })?;
        // Bounded in messages: each may be a MiB.
        let (input, inputs) = mpsc::channel(1);
        let (outputs, output) = mpsc::channel(4);
        let (started, answer) = oneshot::channel();
        let ends = Ends {
            input: inputs,
            output: outputs,
        };
        // Of its own: whoever asked may go away at any moment, and somebody has to clear up.
        tokio::spawn(
            self.clone()
                .live(task, permit, (order, streams), started, ends),
        );
        let answer = answer.await;
        answer.unwrap_or_else(|_| Err(DriverError::Permanent("the driver failed".into())))?;
        Ok(Session { input, output })
    }

    async fn live(
        self,
        task: Arc<Task>,
        permit: OwnedSemaphorePermit,
        (order, streams): (SessionOrder, Streams),
        mut started: oneshot::Sender<Result<(), DriverError>>,
        ends: Ends,
    ) {
        breakpoint::at(SessionStep::Find);
        let room = match make_room(&task.cgroup) {
            Ok(room) => room,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let (program, command) = (self.clone(), order.command.clone());
        let (supervised, place) = (task.clone(), room.clone());
        let asked = streams;
        let spawned =
            in_thread(move || spawn(&program, &supervised, &place, &order, streams)).await;
        let spawned =
            spawned.unwrap_or_else(|error| Err(DriverError::Transient(error.to_string())));
        match spawned {
            Err(error) => {
                let _ = started.send(Err(error));
            }
            Ok((helper, streams)) => {
                let Helper { pidfd, control, .. } = helper;
                let begun = tokio::select! {
                    begun = begin(control) => Some(begun),
                    () = started.closed() => None,
                };
                match begun {
                    Some(Ok(Begun {
                        control,
                        pid,
                        terminal,
                    })) => {
                        if let (Some(denials), Some(pid)) = (self.denials(), pid) {
                            denials.add_session(pid, &task);
                        }
                        told_of(&task, &command, asked);
                        if started.send(Ok(())).is_ok() {
                            converse(control, streams.with(terminal), ends).await;
                        }
                    }
                    Some(Err(error)) => {
                        let _ = started.send(Err(error));
                    }
                    None => {}
                }
                // The helper has lost its control socket, and kills what is left; should it be stopped, we do.
                clear(&room).await;
                let helper = pidfd.try_clone();
                if timeout(AFTER_KILL, wait::reaped(pidfd)).await.is_err() {
                    // It does not look at its socket: stopped by the host's root, or at its preparations still. Its child, if it
                    // has one, is PID 1's then.
                    if let Ok(helper) = helper {
                        let _ = sys::pidfd_send_signal(helper.as_fd(), libc::SIGKILL);
                        clear(&room).await;
                        wait::reaped(helper).await;
                    }
                }
            }
        }
        if let Err(error) = remove(&room).await {
            of_task!(
                warn,
                task.names,
                task.unit,
                "a session's cgroup cannot be removed: {error}"
            );
        }
        drop(permit);
    }
}

/// Scripts of checks run again and again, and would drown the rest.
fn told_of(task: &Task, command: &str, streams: Streams) {
    let command = UnitText::new(command);
    match streams {
        Streams::Merged => of_task!(
            debug,
            task.names,
            task.unit,
            "script in the task: {command}"
        ),
        _ => of_task!(
            info,
            task.names,
            task.unit,
            "session in the task: {command}"
        ),
    }
}

fn order(command: Vec<String>, streams: Streams) -> Result<SessionOrder, DriverError> {
    let mut words = command.into_iter();
    let Some(command) = words.next().filter(|word| !word.is_empty()) else {
        return Err(DriverError::Permanent(
            "error cmd must have at least one value: there is no command to execute".into(),
        ));
    };
    if command.len() > MAX_COMMAND_BYTES {
        return Err(DriverError::Permanent(format!(
            "command: {} bytes are more than a path can have, {MAX_COMMAND_BYTES}",
            command.len()
        )));
    }
    Ok(SessionOrder {
        command,
        args: words.collect(),
        terminal: match streams {
            Streams::Terminal(size) => Some(size),
            Streams::Pipes | Streams::Merged => None,
        },
    })
}

/// The first that is free.
fn make_room(scope: &Cgroup) -> Result<Cgroup, DriverError> {
    // One that cannot be removed keeps its name.
    for number in 1..=100 * MOST_SESSIONS {
        match scope.make_below(&format!("{ROOM}{number}")) {
            Ok(room) => return Ok(room),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => {
                return Err(DriverError::Permanent(format!(
                    "no cgroup for the session: {error}"
                )));
            }
        }
    }
    Err(DriverError::Permanent("task is not running".into()))
}

fn spawn(
    tasks: &TaskTable,
    task: &Task,
    room: &Cgroup,
    order: &SessionOrder,
    streams: Streams,
) -> Result<(Helper, OurEnds), DriverError> {
    let failed =
        |error: io::Error| DriverError::Transient(format!("a session cannot be prepared: {error}"));
    let (stdio, ours) = pipes(streams).map_err(failed)?;
    let processes = room.open_for_writing("cgroup.procs").map_err(failed)?;
    let kill = room.open_for_writing("cgroup.kill").map_err(failed)?;
    let Some(supervisor) = &task.supervisor_pidfd else {
        return Err(DriverError::Permanent("task is not running".into()));
    };
    let entrance = Entrance {
        supervisor: supervisor.as_fd(),
        processes: processes.as_fd(),
        kill: kill.as_fd(),
    };
    breakpoint::at(SessionStep::SpawnSession);
    let helper = session::spawn(tasks.shared.program.as_fd(), &entrance, order, stdio);
    Ok((helper.map_err(|failure| helper::failed(&failure))?, ours))
}

type Control = AsyncFd<OwnedFd>;

/// A session whose command runs.
#[derive(Debug)]
struct Begun {
    control: Control,
    pid: Option<u32>,
    terminal: Option<OwnedFd>,
}

/// Until the command is executed: the control socket, and the terminal if it has one.
async fn begin(control: OwnedFd) -> Result<Begun, DriverError> {
    let control = sys::readable(control).map_err(lost)?;
    match timeout(PATIENCE, next(&control)).await {
        Ok(Ok(Some((Message::Started(pid), terminal)))) => Ok(Begun {
            control,
            pid: pid.and_then(|pid| u32::try_from(pid).ok()),
            terminal,
        }),
        Ok(Ok(Some((Message::Failed(failure), _)))) => Err(helper::failed(&failure)),
        Ok(Ok(_)) => Err(DriverError::Transient(
            "the session's helper ended before the command was executed; was it killed?".into(),
        )),
        Ok(Err(error)) => Err(lost(error)),
        Err(_) => Err(DriverError::Transient(format!(
            "the command was not executed within {} s; is the task frozen, or does a path hang?",
            PATIENCE.as_secs()
        ))),
    }
}

fn lost(error: io::Error) -> DriverError {
    DriverError::Transient(format!("the session's helper cannot be heard: {error}"))
}

async fn next(control: &Control) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    control
        .async_io(Interest::READABLE, |control| report::receive(control))
        .await
}

/// Carries bytes until the command has ended and all that it said is told, or the client is gone.
async fn converse(control: Control, ours: OurEnds, ends: Ends) {
    let Ends { input, output } = ends;
    let (over, is_over) = watch::channel(false);
    let streams = match connect(ours) {
        Ok(streams) => streams,
        Err(error) => {
            let _ = output.send(Err(lost(error))).await;
            return;
        }
    };
    let told = async {
        let (stdout, stderr) = (SessionOutput::Stdout, SessionOutput::Stderr);
        let (stdout_end, stderr_end) = (SessionOutput::StdoutEnd, SessionOutput::StderrEnd);
        tokio::join!(
            tell(streams.output, stdout, stdout_end, &output, is_over.clone()),
            tell(streams.errors, stderr, stderr_end, &output, is_over.clone()),
        );
    };
    let fed = feed(input, streams.input, streams.terminal);
    tokio::pin!(told, fed);
    let (mut is_told, mut is_fed) = (false, false);
    let exit = loop {
        tokio::select! {
            () = &mut told, if !is_told => is_told = true,
            () = &mut fed, if !is_fed => is_fed = true,
            ended = next(&control) => break ended,
            () = output.closed() => return,
        }
    };
    let exit = match exit {
        Ok(Some((Message::Ended(status), _))) => Ok(SessionOutput::Exited(exit_of(status))),
        Err(error) => Err(lost(error)),
        Ok(_) => Err(DriverError::Transient(
            "the session's helper was killed, and the session with it".into(),
        )),
    };
    let _ = over.send(true);
    if !is_told {
        tokio::select! {
            () = &mut told => {}
            () = output.closed() => return,
        }
    }
    let _ = output.send(exit).await;
}

/// A wait(2) status as a shell tells it.
fn exit_of(status: i32) -> ExitResult {
    let signal = if libc::WIFSIGNALED(status) {
        libc::WTERMSIG(status)
    } else {
        0
    };
    ExitResult {
        code: match signal {
            0 => libc::WEXITSTATUS(status),
            signal => 128 + signal,
        },
        signal,
        ..ExitResult::default()
    }
}

/// Kills what is left of a session. What does not end, in uninterruptible sleep, ends with the task at the latest.
async fn clear(room: &Cgroup) {
    let cleared = async {
        while room.is_populated().unwrap_or(false) {
            let _ = room.kill();
            sleep(PAUSE).await;
        }
    };
    let _ = timeout(AFTER_KILL, cleared).await;
}

/// Once nobody is left in it. The child of a helper that was killed may enter it until then, and finds its end there.
async fn remove(room: &Cgroup) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        clear(room).await;
        match room.remove() {
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < AFTER_KILL =>
            {
                sleep(PAUSE).await;
            }
            removed => return removed,
        }
    }
}

/// Ends the sessions of a plugin that died. A process that does not end, as one that waits for a dead file server, must not
/// hold up the recovery of its task.
pub(super) fn end_sessions(task: &Task) {
    let below = task.cgroup.below().into_iter();
    let rooms: Vec<Cgroup> = below
        .filter(|room| room.unit().is_some_and(|name| name.starts_with(ROOM)))
        .collect();
    for room in &rooms {
        let _ = room.kill();
    }
    let (names, unit) = (task.names.clone(), task.unit.clone());
    tokio::spawn(async move {
        for room in rooms {
            if let Err(error) = remove(&room).await {
                of_task!(
                    warn,
                    names,
                    unit,
                    "a session's cgroup cannot be removed: {error}"
                );
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_no_longer_than_a_path() {
        let longest = "x".repeat(MAX_COMMAND_BYTES);
        assert!(order(vec![longest.clone()], Streams::Pipes).is_ok());
        let error = order(vec![longest + "x"], Streams::Pipes).err();
        let sentence = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(sentence.contains("4096 bytes"), "{sentence}");
    }
}
