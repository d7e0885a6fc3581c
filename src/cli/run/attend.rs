//! From a task's start to its end: what it prints, who may end it, and what becomes of it then.

use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;

use super::RunError;
use crate::cli::terminal::{Stops, copied_to, say};
use crate::job::Logs;
use crate::plan::unit::UnitName;
use crate::task::types::{
    Destroy, DriverError, ExitResult, Severity, TaskEvent, TaskId, TaskRequest,
};
use crate::task::{Flow, Output, TaskTable, Tasks, Tracing};

/// Nomad's default kill_timeout.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a probe's command is looked at, and the pause after one that has failed.
const PROBE_LOOK: Duration = Duration::from_millis(10);
const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// How long one is waited for that is to fail, as nothing has been started.
const PROBE_BEFORE: Duration = Duration::from_secs(2);

/// How a task is stopped, and whether anybody reads what it writes.
#[derive(Debug)]
pub struct Ending {
    /// `None` passes on the signal that stops us.
    pub signal: Option<String>,
    pub timeout: Duration,
    pub logs: Logs,
}

impl Default for Ending {
    fn default() -> Self {
        Ending {
            signal: None,
            timeout: KILL_TIMEOUT,
            logs: Logs::Collected,
        }
    }
}

/// What becomes of what the task prints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Copies {
    #[default]
    Shown,
    Dropped,
}

/// How an attempt differs from a run.
#[derive(Debug, Default)]
pub struct Attendance<'a> {
    pub output: Copies,
    pub tracing: Option<Tracing>,
    /// Once this shell command succeeds, the task has done what it is for.
    pub probe: Option<&'a str>,
    /// How long it may take.
    pub limit: Option<Duration>,
}

/// Who ended a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Itself,
    /// The person at the terminal.
    Person,
    /// The probe, which succeeded.
    Probe,
    Limit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attended {
    pub exit: ExitResult,
    pub by: By,
    /// The same for the same standard output.
    pub printed: u64,
}

/// Starts the task and stays with it to its end.
pub async fn attend(
    tasks: &TaskTable,
    request: TaskRequest,
    ending: &Ending,
    attendance: Attendance<'_>,
    stops: &mut Stops,
) -> Result<Attended, RunError> {
    if let Some(probe) = attendance.probe
        && let Ok(true) = timeout(PROBE_BEFORE, succeeds(probe)).await
    {
        return Err(RunError::Probe(probe.into()));
    }
    let id = request.id.clone();
    let printed = Arc::new(Mutex::new(DefaultHasher::new()));
    let (output, copies) = match (attendance.output, ending.logs) {
        (Copies::Dropped, _) => given(Tee(io::sink(), printed.clone()), io::sink())?,
        (Copies::Shown, Logs::Collected) => {
            given(Tee(io::stdout(), printed.clone()), io::stderr())?
        }
        // The request names /dev/null.
        (Copies::Shown, Logs::Disabled) => {
            let unit = UnitName::of_task(id.as_str());
            say(format!(
                "logs are disabled: what the task prints is in journalctl -u {unit}"
            ));
            (Output::Logs, Vec::new())
        }
    };
    let mut events = tasks.events();
    let is_shown = attendance.output == Copies::Shown;
    tasks
        .start_traced(request, output, attendance.tracing)
        .await?;
    if is_shown {
        print_warnings(&mut events).await;
    }
    let until = Until {
        probe: attendance.probe,
        limit: attendance.limit,
    };
    let ended = follow(tasks, &id, ending, &until, stops).await;
    if is_shown {
        print_warnings(&mut events).await;
    }
    // Until the task is destroyed, something could still write.
    match tasks.destroy(&id, Destroy::EvenIfRunning).await {
        Ok(()) => {
            for copy in copies {
                let _ = copy.join();
            }
        }
        Err(error) => say(error),
    }
    let (exit, by) = ended?;
    let printed = printed.lock().map_or(0, |printed| printed.finish());
    Ok(Attended { exit, by, printed })
}

/// What the events so far warn of: a limit that is not in force, an end by the OOM killer.
async fn print_warnings(events: &mut Flow<TaskEvent>) {
    // A timeout of nothing polls once: it gives what is there, and does not wait for more.
    while let Ok(Some(event)) = timeout(Duration::ZERO, events.next()).await {
        if event.severity == Severity::Warning {
            say(event.message);
        }
    }
}

/// Pipes for the task, and what copies from them.
fn given(
    stdout: impl Write + Send + 'static,
    stderr: impl Write + Send + 'static,
) -> io::Result<(Output, Vec<JoinHandle<()>>)> {
    let (stdout, copy_stdout) = copied_to(stdout)?;
    let (stderr, copy_stderr) = copied_to(stderr)?;
    Ok((
        Output::Given([stdout, stderr]),
        vec![copy_stdout, copy_stderr],
    ))
}

/// Writes on, and remembers what, as a number.
struct Tee<W>(W, Arc<Mutex<DefaultHasher>>);

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        if let Ok(mut printed) = self.1.lock() {
            printed.write(&bytes[..count]);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

struct Until<'a> {
    probe: Option<&'a str>,
    limit: Option<Duration>,
}

async fn follow(
    tasks: &TaskTable,
    id: &TaskId,
    ending: &Ending,
    until: &Until<'_>,
    stops: &mut Stops,
) -> Result<(ExitResult, By), DriverError> {
    const INTERRUPT: &str = "SIGINT";
    let (by, name, patience) = tokio::select! {
        result = tasks.wait(id) => return Ok((result?, By::Itself)),
        name = stops.next() => (By::Person, name, ending.timeout),
        () = works(until.probe) => (By::Probe, INTERRUPT, ending.timeout),
        () = over(until.limit) => (By::Limit, "SIGKILL", Duration::ZERO),
    };
    let name = match by {
        By::Limit => name,
        _ => ending.signal.as_deref().unwrap_or(name),
    };
    tokio::select! {
        stopped = tasks.stop(id, patience, name) => stopped?,
        _ = stops.next() => tasks.stop(id, Duration::ZERO, "SIGKILL").await?,
    }
    Ok((tasks.wait(id).await?, by))
}

async fn over(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Returns when the probe has succeeded once.
async fn works(probe: Option<&str>) {
    let Some(probe) = probe else {
        return std::future::pending().await;
    };
    while !succeeds(probe).await {
        sleep(PROBE_PAUSE).await;
    }
}

async fn succeeds(probe: &str) -> bool {
    match Probe::start(probe) {
        Ok(running) => loop {
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match waitid(WaitId::Pid(Pid::from_child(&running.command.0)), look) {
                Ok(None) => sleep(PROBE_LOOK).await,
                Ok(Some(status)) => return status.exit_status() == Some(0),
                Err(_) => return false,
            }
        },
        Err(error) => {
            say(format_args!("--probe: /bin/sh: {error}"));
            false
        }
    }
}

/// Does not outlive the wait for it, nor does what it has started. Dropped in this order: the group is killed first.
struct Probe {
    _group: Group,
    command: Reaped,
}

impl Probe {
    fn start(probe: &str) -> io::Result<Probe> {
        // PR_SET_PDEATHSIG would end the shell alone. The pipe's other end is ours only, and closes however we end.
        let guard = shell("read -r line; kill -KILL 0")
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let leader = Pid::from_child(&guard);
        let group = Group(guard);
        let command = shell(probe).process_group(leader.as_raw_pid()).spawn()?;
        Ok(Probe {
            _group: group,
            command: Reaped(command),
        })
    }
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// The first process of a group. Not reaped before all of it is killed: the group's number is still its own.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

/// Killed by itself, too, and with the group it may have made for itself, as `timeout` does: it need not be in the probe's any more.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
