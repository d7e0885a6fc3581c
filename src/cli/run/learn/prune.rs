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
pub enum End {
    Status {
        code: i32,
        signal: i32,
    },
    /// The probe succeeded.
    Works,
    TooSlow,
}

impl End {
    const SUCCESS: End = End::Status { code: 0, signal: 0 };

    /// Of any other nobody knows whether the command did what it is for.
    pub fn is_success(self) -> bool {
        matches!(self, End::SUCCESS | End::Works)
    }

    pub fn of(attended: &Attended) -> End {
        match attended.by {
            By::Probe => End::Works,
            By::Limit => End::TooSlow,
            By::Itself | By::Person => End::Status {
                code: attended.exit.code,
                signal: attended.exit.signal,
            },
        }
    }

    pub fn described(self) -> String {
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
}

/// Why a list is left as it was learned, in a sentence.
#[derive(Debug)]
pub struct Unpruned(pub String);

impl From<RunError> for Unpruned {
    fn from(error: RunError) -> Self {
        Self(format!("--prune: {error}; the list is as it was learned"))
    }
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

    /// The list without what is not needed.
    pub async fn prune(
        &self,
        mut entries: Vec<Entry>,
        stops: &mut Stops,
    ) -> Result<Vec<Entry>, Unpruned> {
        let compares_output = self.compares_output(&entries, stops).await?;
        let mut left_out = Vec::new();
        let mut at = 0;
        // Whether the last attempt was one that worked.
        let mut works = true;
        while at < entries.len() {
            let mut fewer = entries.clone();
            let entry = fewer.remove(at);
            works = self.suffices(&fewer, compares_output, stops).await?;
            if works {
                left_out.push(entry);
                entries = fewer;
                continue;
            }
            let mode = entry.access.to_string();
            for letter in mode.chars() {
                let mut fewer = entries.clone();
                fewer[at].access = fewer[at].access.without(letters(&letter.to_string()));
                // All of it has been tried.
                if fewer[at].access.is_none() {
                    continue;
                }
                works = self.suffices(&fewer, compares_output, stops).await?;
                if works {
                    entries = fewer;
                }
            }
            at += 1;
        }
        // A server that may create its lock file but not write to it leaves an empty one, and never starts again.
        if !works && !self.suffices(&entries, compares_output, stops).await? {
            return Err(Unpruned(
                "an attempt without an entry has left something behind with which the command now fails with the whole list, too: the list is as it was learned. Have the command remove what it leaves, as a lock file, before it begins".into(),
            ));
        }
        self.name(&left_out);
        Ok(entries)
    }

    /// Whether two runs with the same rules print the same. Fails where an end that differs would tell nothing of an entry.
    async fn compares_output(
        &self,
        entries: &[Entry],
        stops: &mut Stops,
    ) -> Result<bool, Unpruned> {
        let unpruned = |why: String| Err(Unpruned(why));
        match self.with(entries, stops).await? {
            Shown::NotStarted(why) => {
                return unpruned(format!(
                    "with this list the command does not start: {why}; it is not pruned"
                ));
            }
            Shown::End(end, _) if end != self.wanted => {
                return unpruned(format!(
                    "with this list the command comes to {}, and to {} with everything unveiled: it is not pruned. Can the command be run twice?",
                    end.described(),
                    self.wanted.described()
                ));
            }
            // A server that was stopped is judged by its probe.
            Shown::End(End::Works, _) => return Ok(false),
            Shown::End(_, printed) if printed == self.printed => return Ok(true),
            Shown::End(..) => {}
        }
        match self.attempt(Unveil::Everything, stops).await? {
            Shown::NotStarted(why) => unpruned(format!(
                "the command does not start a second time with everything unveiled: {why}; the list is not pruned"
            )),
            Shown::End(end, _) if end != self.wanted => unpruned(format!(
                "with everything unveiled the command comes to {} the first time, and to {} the second: the list is not pruned",
                self.wanted.described(),
                end.described()
            )),
            Shown::End(_, printed) if printed == self.printed => unpruned(
                "with this list the command prints something else than with everything unveiled: the list lacks something, and is not pruned".into(),
            ),
            Shown::End(..) => {
                say("the command prints something else each time: only its exit status is compared");
                Ok(false)
            }
        }
    }

    fn name(&self, left_out: &[Entry]) {
        if left_out.is_empty() {
            return;
        }
        let named: Vec<String> = left_out
            .iter()
            .take(MOST_NAMED)
            .map(Entry::to_string)
            .collect();
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

    async fn suffices(
        &self,
        entries: &[Entry],
        compares_output: bool,
        stops: &mut Stops,
    ) -> Result<bool, Unpruned> {
        Ok(match self.with(entries, stops).await? {
            Shown::End(end, printed) => {
                end == self.wanted && (!compares_output || printed == self.printed)
            }
            Shown::NotStarted(_) => false,
        })
    }

    async fn with(&self, entries: &[Entry], stops: &mut Stops) -> Result<Shown, Unpruned> {
        let list: Vec<String> = entries.iter().map(Entry::to_string).collect();
        self.attempt(Unveil::Only(&list), stops).await
    }

    async fn attempt(&self, unveil: Unveil<'_>, stops: &mut Stops) -> Result<Shown, Unpruned> {
        let attendance = Attendance {
            output: Copies::Dropped,
            tracing: None,
            probe: self.probe,
            limit: Some(self.limit),
        };
        match self.subject.once(unveil, attendance, stops).await {
            // The person at the terminal wants an end.
            Ok(attended) if attended.by == By::Person => Err(Unpruned(
                "stopped before all was tried: the list is not pruned".into(),
            )),
            Ok(attended) => Ok(Shown::End(End::of(&attended), attended.printed)),
            Err(RunError::Task(why)) => Ok(Shown::NotStarted(why.to_string())),
            Err(error) => Err(error.into()),
        }
    }
}
