//! Records of audit put together: those of one event come one after another, and with those of other CPUs between them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::audit::{Denial, Process, Record, What};

/// Events whose end was not heard yet. Beyond that the oldest counts as whole.
const MOST_OPEN: usize = 64;
/// Denials of one event: a system call of io_uring's may be many attempts.
const MOST_DENIALS: usize = 16;
/// An event whose end does not come, as without a record of its system call, is whole after this.
const WHOLE_AFTER: Duration = Duration::from_millis(100);

/// What is known of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    pub number: u64,
    pub since: Instant,
    pub denials: Vec<Denial>,
    /// Domains that were told of for the first time, and who made them.
    pub creators: Vec<(u64, Process)>,
    /// Who was denied something, if audit records system calls.
    pub caller: Option<Process>,
}

#[derive(Debug, Default)]
pub(super) struct Heard {
    open: VecDeque<Event>,
}

impl Heard {
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes a record, and gives an event that is whole with it.
    pub fn take(&mut self, record: Record, now: Instant) -> Option<Event> {
        let number = record.event;
        let at = self.open.iter().rposition(|event| event.number == number);
        match record.what {
            What::Denial(denial) => {
                let denials = &mut self.event(number, now).denials;
                if denials.len() < MOST_DENIALS {
                    denials.push(denial);
                }
            }
            What::Domain { domain, creator } => {
                self.event(number, now).creators.push((domain, creator));
            }
            // Of a system call that nothing was heard of but this.
            What::Caller(caller) => self.open.get_mut(at?)?.caller = Some(caller),
            What::End => return self.open.remove(at?),
            What::Gone(_) => {}
        }
        (self.open.len() > MOST_OPEN)
            .then(|| self.open.pop_front())
            .flatten()
    }

    /// The oldest event, as far as it was heard.
    pub fn oldest(&mut self) -> Option<Event> {
        self.open.pop_front()
    }

    /// An event that nothing more is waited for.
    pub fn ripe(&mut self, now: Instant) -> Option<Event> {
        let first = self.open.front()?;
        (now.duration_since(first.since) >= WHOLE_AFTER)
            .then(|| self.open.pop_front())
            .flatten()
    }

    fn event(&mut self, number: u64, now: Instant) -> &mut Event {
        let at = self.open.iter().rposition(|event| event.number == number);
        let at = at.unwrap_or_else(|| {
            self.open.push_back(Event {
                number,
                since: now,
                denials: Vec::new(),
                creators: Vec::new(),
                caller: None,
            });
            self.open.len() - 1
        });
        &mut self.open[at]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(event: u64, what: What) -> Record {
        Record { event, what }
    }

    fn denial(path: &str) -> What {
        What::Denial(Denial {
            domain: 1,
            blockers: vec!["fs.read_file".into()],
            path: Some(path.into()),
        })
    }

    fn process(pid: u32) -> Process {
        Process {
            pid,
            name: "cat".into(),
        }
    }

    #[test]
    fn of_one_event_no_more_is_kept_than_can_be_told() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        for attempt in 0..1_000 {
            heard.take(record(1, denial(&format!("/{attempt}"))), now);
        }
        let event = heard.take(record(1, What::End), now).unwrap();
        assert_eq!(event.denials.len(), MOST_DENIALS);
    }

    #[test]
    fn records_of_two_cpus_are_told_apart() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        for (event, what) in [
            (2, denial("/a")),
            (3, denial("/b")),
            (3, What::Caller(process(7))),
            (
                2,
                What::Domain {
                    domain: 1,
                    creator: process(5),
                },
            ),
            (2, What::Caller(process(6))),
            (9, What::Caller(process(8))),
            (9, What::End),
        ] {
            assert_eq!(heard.take(record(event, what), now), None);
        }
        let second = heard.take(record(3, What::End), now).unwrap();
        assert_eq!(second.caller, Some(process(7)));
        assert_eq!(second.denials[0].path, Some("/b".into()));
        let first = heard.take(record(2, What::End), now).unwrap();
        assert_eq!(first.caller, Some(process(6)));
        assert_eq!(first.creators, [(1, process(5))]);
        assert!(heard.is_empty());
    }

    #[test]
    fn an_event_without_an_end_is_whole_after_a_while() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        heard.take(record(2, denial("/a")), now);
        assert_eq!(heard.ripe(now), None);
        assert!(heard.ripe(now + WHOLE_AFTER).is_some());
        assert!(heard.is_empty());
    }

    #[test]
    fn no_more_is_kept_than_a_bound() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        let whole = (0..1_000).filter_map(|event| heard.take(record(event, denial("/a")), now));
        assert_eq!(whole.count(), 1_000 - MOST_OPEN);
    }
}
