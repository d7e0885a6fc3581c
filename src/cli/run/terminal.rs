//! The caller's side of a run: where the task's output goes, and the signals by which people stop it.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::signal::unix::{SignalKind, signal};

use crate::text::one_line;

/// Of a sentence: a screenful, whatever a job's words are.
const MAX_SENTENCE_BYTES: usize = 1_500;

/// A line for the person at the terminal. Rust ignores SIGPIPE, and eprintln! panics when nobody reads.
pub fn say(sentence: impl std::fmt::Display) {
    let line = one_line(&sentence.to_string(), MAX_SENTENCE_BYTES);
    let _ = writeln!(io::stderr(), "nomad-driver-exec2: {line}");
}

/// A pipe whose other end is copied to `target`. The terminal itself is never handed to a task: it could push keystrokes
/// into it (TIOCSTI).
pub fn copied_to(mut target: impl Write + Send + 'static) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let copy = std::thread::spawn(move || {
        let mut source = std::fs::File::from(read);
        // When the reader goes away, so does the pipe: the task is told by SIGPIPE, as it would be without us.
        let _ = io::copy(&mut source, &mut target);
        let _ = target.flush();
    });
    Ok((write, copy))
}

/// The signals by which people and init systems stop a program.
#[derive(Debug)]
pub struct Stops {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
}

impl Stops {
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// The name of the one to pass on.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }
}
