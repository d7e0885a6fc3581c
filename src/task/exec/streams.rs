//! The streams of a session: made, connected, and carried until they end.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::super::types::{DriverError, SessionInput, SessionOutput, Streams, WindowSize};

/// Of one message of output.
const CHUNK_BYTES: usize = 16 * 1024;
/// How long an output that is still open after the session's end may be silent: it was handed to a process of the task. And
/// how long that may be waited for in all.
const LINGER: Duration = Duration::from_millis(200);
const LINGER_IN_ALL: Duration = Duration::from_secs(5);

/// Our ends of a session's streams.
#[derive(Debug, Default)]
pub(super) struct OurEnds {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

impl OurEnds {
    pub(super) fn with(self, terminal: Option<OwnedFd>) -> OurEnds {
        OurEnds { terminal, ..self }
    }
}

/// The command's ends, and ours.
pub(super) fn pipes(streams: Streams) -> io::Result<(Option<[OwnedFd; 3]>, OurEnds)> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let (output, theirs) = pipe()?;
    let ours = OurEnds {
        output: Some(output),
        ..OurEnds::default()
    };
    match streams {
        Streams::Terminal(_) => Ok((None, OurEnds::default())),
        Streams::Merged => {
            // At its end from the begin. Not /dev/null: root in the task could change the host's through a descriptor of it.
            let (nothing, _) = pipe()?;
            let both = theirs.try_clone()?;
            Ok((Some([nothing, theirs, both]), ours))
        }
        Streams::Pipes => {
            let (their_input, input) = pipe()?;
            let (errors, their_errors) = pipe()?;
            let ours = OurEnds {
                input: Some(input),
                errors: Some(errors),
                ..ours
            };
            Ok((Some([their_input, theirs, their_errors]), ours))
        }
    }
}

#[derive(Debug)]
pub(super) struct Connected {
    pub input: Option<Sender>,
    pub output: Option<Receiver>,
    pub errors: Option<Receiver>,
    pub terminal: Option<OwnedFd>,
}

pub(super) fn connect(ours: OurEnds) -> io::Result<Connected> {
    let Some(terminal) = ours.terminal else {
        return Ok(Connected {
            input: ours.input.map(Sender::from_owned_fd).transpose()?,
            output: ours.output.map(Receiver::from_owned_fd).transpose()?,
            errors: ours.errors.map(Receiver::from_owned_fd).transpose()?,
            terminal: None,
        });
    };
    rustix::io::ioctl_fionbio(&terminal, true)?;
    Ok(Connected {
        input: Some(Sender::from_owned_fd_unchecked(terminal.try_clone()?)?),
        output: Some(Receiver::from_owned_fd_unchecked(terminal.try_clone()?)?),
        errors: None,
        terminal: Some(terminal),
    })
}

/// Tells an output to its end. A client that does not read stops the command, as a full pipe does.
pub(super) async fn tell(
    source: Option<Receiver>,
    data: fn(Vec<u8>) -> SessionOutput,
    end: SessionOutput,
    output: &mpsc::Sender<Result<SessionOutput, DriverError>>,
    mut is_over: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut patience = LINGER_IN_ALL;
    while let Some(source) = &source {
        match source.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                let data = data(buffer[..length].to_vec());
                if output.send(Ok(data)).await.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let was_over = *is_over.borrow_and_update();
                if was_over {
                    // All of the session is dead, so that what it has written is there or on its way.
                    let begun = Instant::now();
                    let waited = timeout(LINGER.min(patience), source.readable()).await;
                    patience = patience.saturating_sub(begun.elapsed());
                    if waited.is_err() || patience.is_zero() {
                        break;
                    }
                } else {
                    tokio::select! {
                        _ = source.readable() => {}
                        _ = is_over.changed() => {}
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // EIO of a terminal that nobody has open any more.
            Err(_) => break,
        }
    }
    let _ = output.send(Ok(end)).await;
}

/// Feeds the command what the client sends. What it does not take any more is thrown away.
pub(super) async fn feed(
    mut inputs: mpsc::Receiver<SessionInput>,
    mut sink: Option<Sender>,
    terminal: Option<OwnedFd>,
) {
    while let Some(input) = inputs.recv().await {
        match input {
            SessionInput::Data(data) => {
                if let Some(to) = &sink
                    && write(to, &data).await.is_err()
                {
                    sink = None;
                }
            }
            SessionInput::End => match (&terminal, &sink) {
                (Some(terminal), Some(to)) => {
                    if let Some(end) = end_of_file(terminal) {
                        let _ = write(to, &[end]).await;
                    }
                }
                _ => sink = None,
            },
            SessionInput::Resize(size) => {
                if let Some(terminal) = &terminal {
                    let _ = resize(terminal, size);
                }
            }
        }
    }
}

async fn write(to: &Sender, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match to.try_write(data) {
            Ok(written) => data = &data[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The character that means it to who reads lines from the terminal; a program that reads keys is told nothing.
fn end_of_file(terminal: &OwnedFd) -> Option<u8> {
    let settings = tcgetattr(terminal).ok()?;
    let reads_lines = settings.local_modes.contains(LocalModes::ICANON);
    reads_lines.then(|| settings.special_codes[SpecialCodeIndex::VEOF])
}

/// The kernel sends SIGWINCH to whoever is in the foreground.
fn resize(terminal: &OwnedFd, size: WindowSize) -> io::Result<()> {
    let window = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, window)?)
}
