//! Between the two exec calls of the Driver service and a session. Nomad's agent does not tell when its client is gone, but
//! notices it when it has something to pass on: so an empty message is sent now and then.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tracing::info;

use super::errors;
use crate::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use crate::task::types::{
    DriverError, ExitResult, SessionInput, SessionOutput, Streams, TaskId, WindowSize,
};
use crate::task::{Session, Tasks};
use crate::text::UnitText;

/// Nomad sends the setup at once, and with a terminal its size right after.
const SETUP_PATIENCE: Duration = Duration::from_secs(10);
const SIZE_PATIENCE: Duration = Duration::from_millis(100);
/// As often as Nomad's own clients.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Of one message: what waits for a command that does not read is in memory. Nomad's clients send some KiB.
const MAX_STDIN_BYTES: usize = 1 << 20;
/// Of what ExecTask returns, the end: as much as Nomad keeps of a check's output.
const TAIL_BYTES: usize = 4096;

type Request = wire::ExecTaskStreamingRequest;
type Response = wire::ExecTaskStreamingResponse;
type Answers = mpsc::Sender<Result<Response, Status>>;

/// Opens the session that the first message asks for, and carries messages from then on.
pub async fn stream<T: Tasks>(
    tasks: &Arc<T>,
    mut requests: Streaming<Request>,
) -> Result<mpsc::Receiver<Result<Response, Status>>, Status> {
    let first = timeout(SETUP_PATIENCE, requests.message()).await;
    let first = first.map_err(|_| no_setup())??.ok_or_else(no_setup)?;
    let setup = first.setup.clone().ok_or_else(no_setup)?;
    let mut early = vec![Request {
        setup: None,
        ..first
    }];
    let streams = if setup.tty {
        let mut size = early[0].tty_size;
        if size.is_none()
            && let Ok(next) = timeout(SIZE_PATIENCE, requests.message()).await
        {
            let next = next?.unwrap_or_default();
            size = next.tty_size;
            early.push(next);
        }
        Streams::Terminal(size.map(window).unwrap_or_default())
    } else {
        Streams::Pipes
    };
    let id = TaskId::new(setup.task_id);
    let session = tasks.exec(&id, setup.command, streams).await;
    let Session { input, output } = session.map_err(|error| {
        let refused = status(&id, error);
        let id = UnitText::new(id.as_str());
        info!(%id, "no session in the task: {}", refused.message());
        short(&refused)
    })?;
    let (answers, receiver) = mpsc::channel(1);
    tokio::spawn(carry(early, requests, input, output, answers));
    Ok(receiver)
}

fn no_setup() -> Status {
    errors::permanent("the first message of a session must be its setup, with task and command")
}

fn status(id: &TaskId, error: DriverError) -> Status {
    match error {
        DriverError::UnknownTask => errors::permanent(format!("task not found for given id: {id}")),
        error => errors::status(error),
    }
}

/// A WebSocket ends with at most 123 bytes of words. Nomad's agent puts an error there, after 33 of its own, and of a longer one
/// its client sees "unexpected EOF" alone.
fn short(refused: &Status) -> Status {
    const BYTES: usize = 90;
    let message = refused.message();
    if message.len() <= BYTES {
        return errors::permanent(message);
    }
    let end = message.floor_char_boundary(BYTES - '…'.len_utf8());
    errors::permanent(format!("{}…", &message[..end]))
}

/// Both ways, until either is over. The session ends when its output is dropped here.
async fn carry(
    early: Vec<Request>,
    requests: Streaming<Request>,
    input: mpsc::Sender<SessionInput>,
    mut output: mpsc::Receiver<Result<SessionOutput, DriverError>>,
    answers: Answers,
) {
    let heard = hear(early, requests, input);
    let told = tell(&mut output, &answers);
    tokio::pin!(heard, told);
    tokio::select! {
        () = &mut told => {}
        broken = &mut heard => match broken {
            // A client that has no more to say may still listen.
            Ok(()) => told.await,
            Err(status) => {
                let _ = answers.send(Err(status)).await;
            }
        },
    }
}

/// What the client says. An error is its end, or a mistake of its.
async fn hear(
    early: Vec<Request>,
    mut requests: Streaming<Request>,
    input: mpsc::Sender<SessionInput>,
) -> Result<(), Status> {
    let mut early = early.into_iter();
    loop {
        let request = match early.next() {
            Some(request) => request,
            None => match requests.message().await? {
                Some(request) => request,
                None => break,
            },
        };
        if request.setup.is_some() {
            return Err(errors::permanent(
                "a session has one setup, its first message",
            ));
        }
        let length = request.stdin.as_ref().map_or(0, |stdin| stdin.data.len());
        if length > MAX_STDIN_BYTES {
            return Err(errors::permanent(format!(
                "{length} bytes of input in one message are more than {MAX_STDIN_BYTES}: send it in parts"
            )));
        }
        for said in inputs(request) {
            if input.send(said).await.is_err() {
                // The session does not listen any more; how it ended is on its way.
                return Ok(());
            }
        }
    }
    let _ = input.send(SessionInput::End).await;
    Ok(())
}

/// An empty one is a heartbeat.
fn inputs(request: Request) -> impl Iterator<Item = SessionInput> {
    let size = request.tty_size.map(window).map(SessionInput::Resize);
    let stdin = request.stdin.unwrap_or_default();
    let data = (!stdin.data.is_empty()).then_some(SessionInput::Data(stdin.data));
    let end = stdin.close.then_some(SessionInput::End);
    [size, data, end].into_iter().flatten()
}

/// What is no size of a window is the next one that is.
fn window(size: wire::exec_task_streaming_request::TerminalSize) -> WindowSize {
    let cells = |number: i32| number.clamp(0, u16::MAX.into()) as u16;
    WindowSize {
        rows: cells(size.height),
        columns: cells(size.width),
    }
}

async fn tell(output: &mut mpsc::Receiver<Result<SessionOutput, DriverError>>, answers: &Answers) {
    loop {
        let answer = tokio::select! {
            said = timeout(HEARTBEAT, output.recv()) => match said {
                Err(_) => Ok(Response::default()),
                Ok(None) => return,
                Ok(Some(said)) => said.map(response).map_err(errors::status),
            },
            () = answers.closed() => return,
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

fn response(said: SessionOutput) -> Response {
    let data = |data| Some(wire::ExecTaskStreamingIoOperation { data, close: false });
    let end = Some(wire::ExecTaskStreamingIoOperation {
        data: Vec::new(),
        close: true,
    });
    match said {
        SessionOutput::Stdout(bytes) => Response {
            stdout: data(bytes),
            ..Response::default()
        },
        SessionOutput::Stderr(bytes) => Response {
            stderr: data(bytes),
            ..Response::default()
        },
        SessionOutput::StdoutEnd => Response {
            stdout: end,
            ..Response::default()
        },
        SessionOutput::StderrEnd => Response {
            stderr: end,
            ..Response::default()
        },
        SessionOutput::Exited(exit) => Response {
            exited: true,
            result: Some(super::convert::exit_result(&exit)),
            ..Response::default()
        },
    }
}

/// Runs a command to its end, and gives the end of what it said.
pub async fn to_end<T: Tasks>(
    tasks: &Arc<T>,
    id: &TaskId,
    command: Vec<String>,
    limit: Duration,
) -> Result<(Vec<u8>, ExitResult), Status> {
    let ended = async {
        let session = tasks.exec(id, command, Streams::Merged).await;
        let mut session = session.map_err(|error| status(id, error))?;
        let mut tail = Vec::new();
        while let Some(said) = session.output.recv().await {
            match said.map_err(errors::status)? {
                SessionOutput::Stdout(bytes) | SessionOutput::Stderr(bytes) => {
                    tail.extend(bytes);
                    tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
                }
                SessionOutput::StdoutEnd | SessionOutput::StderrEnd => {}
                SessionOutput::Exited(exit) => return Ok((tail, exit)),
            }
        }
        Err(errors::permanent("the session ended without a result"))
    };
    // None is no limit: Nomad has always one.
    if limit.is_zero() {
        return ended.await;
    }
    timeout(limit, ended).await.unwrap_or_else(|_| {
        let limit = limit.as_secs_f64();
        Err(errors::permanent(format!(
            "context deadline exceeded: the command did not end within {limit} s, and was killed"
        )))
    })
}
