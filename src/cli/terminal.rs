//! The person's side of a command: what is said, colours, where a task's output goes, and the signals by which people stop it.

use std::io::{self, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::signal::unix::{SignalKind, signal};

use crate::text::one_line;

/// Of a sentence: a screenful, whatever a job's words are.
pub const MAX_SENTENCE_BYTES: usize = 1_500;

/// A line for the person at the terminal. Rust ignores SIGPIPE, and eprintln! panics when nobody reads.
pub fn say(sentence: impl std::fmt::Display) {
    let line = one_line(&sentence.to_string(), MAX_SENTENCE_BYTES);
    let _ = writeln!(io::stderr(), "nomad-driver-exec2: {line}");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colours {
    Some,
    None,
}

/// https://no-color.org
pub fn colours() -> Colours {
    let is_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if io::stdout().is_terminal() && !is_refused {
        Colours::Some
    } else {
        Colours::None
    }
}

/// Of states: all is well, stands still, worth a look, wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Green = 32,
    Cyan = 36,
    Yellow = 33,
    Red = 31,
}

impl Colour {
    pub fn paint(self, text: &str) -> String {
        format!("\x1b[{}m{text}\x1b[0m", self as u8)
    }
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
