//! Which entries the command can do without: those without which it ends, and prints, as it did with everything unveiled.

use std::time::Duration;

use super::list::Entry;
use crate::cli::run::attend::{Attendance, Attended, By, Copies};
use crate::cli::run::{RunError, Subject, Unveil};
use crate::cli::terminal::{Stops, say};
use crate::plan::unveil::letters;

/// What a command may take without an entry, beside that of the run with everything unveiled.
const TIMES_AS_LONG: u32 = 3;
const AT_LEAST: Duration = Duration::from_secs(5);
/// Of entries left out that are named.
const MOST_NAMED: usize = 12;

pub struct Pruning<'a> {
    subject: &'a Subject<'a>,
    wanted: End,
    /// Of the run with everything unveiled.
    printed: u64,
    probe: Option<&'a str>,
    limit: Duration,
}

/// As far as ends are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Status {
        code: i32,
        signal: i32,
    },
    /// The probe succeeded.
    Works,
    TooSlow,
}

impl End {
    fn of(attended: &Attended) -> End {
        match attended.by {
            By::Probe => End::Works,
            By::Limit => End::TooSlow,
            By::Itself | By::Person => End::Status {
                code: attended.exit.code,
                signal: attended.exit.signal,
            },
        }
    }

    fn described(self) -> String {
        match self {
            End::Status { code, signal: 0 } => format!("exit code {code}"),
            End::Status { signal, .. } => format!("signal {signal}"),
            End::Works => "a probe that succeeds".into(),
            End::TooSlow => "no end in time".into(),
        }
    }
}

/// What one attempt showed.
enum Shown {
    End(End, u64),
    /// As without "x" on the command itself.
    NotStarted(String),
    /// The person at the terminal wants an end.
    Stopped,
}

impl<'a> Pruning<'a> {
    pub fn new(
        subject: &'a Subject<'a>,
        with_everything: &Attended,
        took: Duration,
        probe: Option<&'a str>,
    ) -> Self {
        Self {
            subject,
            wanted: End::of(with_everything),
            printed: with_everything.printed,
            probe,
            limit: AT_LEAST.max(took * TIMES_AS_LONG),
        }
    }

    /// The list without what is not needed; `None` if that cannot be told.
    pub async fn prune(
        &self,
        mut entries: Vec<Entry>,
        stops: &mut Stops,
    ) -> Result<Option<Vec<Entry>>, RunError> {
        const STOPPED: &str = "stopped before all was tried: the list is not pruned";
        let is_same_output = match self.with(&entries, stops).await? {
            Shown::End(end, printed) if end == self.wanted => printed == self.printed,
            Shown::NotStarted(why) => {
                say(format_args!(
                    "with this list the command does not start: {why}; it is not pruned"
                ));
                return Ok(None);
            }
            Shown::End(end, _) => {
                say(format_args!(
                    "with this list the command comes to {}, and to {} with everything unveiled: it is not pruned. Can the command be run twice?",
                    end.described(),
                    self.wanted.described()
                ));
                return Ok(None);
            }
            Shown::Stopped => {
                say(STOPPED);
                return Ok(None);
            }
        };
        // A server that was stopped is judged by its probe.
        let compares_output = is_same_output && self.wanted != End::Works;
        if !is_same_output && self.wanted != End::Works {
            match self.attempt(Unveil::Everything, stops).await? {
                Shown::Stopped => {
                    say(STOPPED);
                    return Ok(None);
                }
                Shown::End(end, printed) if end == self.wanted && printed == self.printed => {
                    say(
                        "with this list the command prints something else than with everything unveiled: the list lacks something, and is not pruned",
                    );
                    return Ok(None);
                }
                Shown::End(..) | Shown::NotStarted(_) => say(
                    "the command prints something else each time: only its exit status is compared",
                ),
            }
        }
        let is_same = |end: End, printed: u64| {
            end == self.wanted && (!compares_output || printed == self.printed)
        };
        let mut left_out = Vec::new();
        let mut at = 0;
        while at < entries.len() {
            let entry = entries[at].clone();
            let mut fewer = entries.clone();
            fewer.remove(at);
            match self.with(&fewer, stops).await? {
                Shown::End(end, printed) if is_same(end, printed) => {
                    left_out.push(entry);
                    entries = fewer;
                    continue;
                }
                Shown::End(..) | Shown::NotStarted(_) => {}
                Shown::Stopped => {
                    say(STOPPED);
                    return Ok(None);
                }
            }
            let mode = entry.access.to_string();
            for letter in mode.chars().filter(|_| mode.len() > 1) {
                let less = entries[at].access.without(letters(&letter.to_string()));
                if less.is_none() {
                    continue;
                }
                let mut fewer = entries.clone();
                fewer[at].access = less;
                match self.with(&fewer, stops).await? {
                    Shown::End(end, printed) if is_same(end, printed) => entries = fewer,
                    Shown::End(..) | Shown::NotStarted(_) => {}
                    Shown::Stopped => {
                        say(STOPPED);
                        return Ok(None);
                    }
                }
            }
            at += 1;
        }
        if !left_out.is_empty() {
            let named = left_out.iter().take(MOST_NAMED).map(Entry::to_string);
            let named: Vec<String> = named.collect();
            let more = match left_out.len().saturating_sub(MOST_NAMED) {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            say(format_args!(
                "left out, as the command comes to {} without: {}{more}",
                self.wanted.described(),
                named.join(", ")
            ));
        }
        Ok(Some(entries))
    }

    async fn with(&self, entries: &[Entry], stops: &mut Stops) -> Result<Shown, RunError> {
        let list: Vec<String> = entries.iter().map(Entry::to_string).collect();
        self.attempt(Unveil::Only(&list), stops).await
    }

    async fn attempt(&self, unveil: Unveil<'_>, stops: &mut Stops) -> Result<Shown, RunError> {
        let attendance = Attendance {
            output: Copies::Dropped,
            tracing: None,
            probe: self.probe,
            limit: Some(self.limit),
        };
        let attempt = self.subject.once(unveil, attendance, stops);
        match attempt.await {
            Ok(attended) if attended.by == By::Person => Ok(Shown::Stopped),
            Ok(attended) => Ok(Shown::End(End::of(&attended), attended.printed)),
            Err(RunError::Task(why)) => Ok(Shown::NotStarted(why.to_string())),
            Err(error) => Err(error),
        }
    }
}
