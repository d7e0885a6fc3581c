//! How much of what is denied to a task is told: each thing once, and of many things some.

use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Nomad keeps the last ten events of a task, and its start and its restarts are to stay among them.
const MOST_EVENTS: u32 = 4;
/// Lines in the journal of the task's unit.
const LINES: Rate = Rate {
    most: 20,
    within: Duration::from_secs(60),
};
/// What a task was denied last is heard within this after its end.
const QUIET: Duration = Duration::from_secs(5);
/// Different denials that are known again.
const MOST_KNOWN: usize = 512;

#[derive(Debug, Clone, Copy)]
struct Rate {
    most: u32,
    within: Duration,
}

/// Of one task.
#[derive(Debug, Default)]
pub(in super::super) struct Told {
    known: HashSet<u64>,
    events: u32,
    lines: Window,
    /// Denials without a line that no line has told of yet.
    left_out: u64,
    last_left_out: Option<Instant>,
    /// When it was last told how many.
    counted: Option<Instant>,
}

/// What becomes of a denial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was told before.
    Known,
    LeftOut,
    /// In the journal.
    Line,
    /// And as an event.
    LineAndEvent,
    /// In the journal, and an event says that there is more.
    LineAndHint,
}

impl Told {
    /// Decides on a denial, by a number that stands for rights and path.
    pub(super) fn decide(&mut self, denial: u64, now: Instant) -> Verdict {
        if self.known.contains(&denial) {
            return Verdict::Known;
        }
        if self.lines.next(LINES, now) > LINES.most {
            self.left_out += 1;
            self.last_left_out = Some(now);
            return Verdict::LeftOut;
        }
        if self.known.len() < MOST_KNOWN {
            self.known.insert(denial);
        }
        let told = self.events;
        self.events = told.saturating_add(1);
        match told {
            ..MOST_EVENTS => Verdict::LineAndEvent,
            MOST_EVENTS => Verdict::LineAndHint,
            _ => Verdict::Line,
        }
    }

    /// How many had no line, once that can be told: when new ones would have, or when no more are heard after the task's end.
    pub(super) fn left_out(&mut self, now: Instant, end: End) -> Option<u64> {
        let last = self.last_left_out;
        let is_quiet = last.is_none_or(|last| now.duration_since(last) >= QUIET);
        let is_time = (end == End::Reached && is_quiet) || self.lines.is_over(LINES, now);
        let is_counted = |counted: Instant| now.duration_since(counted) < LINES.within;
        if !is_time || self.left_out == 0 || self.counted.is_some_and(is_counted) {
            return None;
        }
        self.counted = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Reached,
    Ahead,
}

#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    used: u32,
}

impl Window {
    /// The how manieth in its window this one is.
    fn next(&mut self, rate: Rate, now: Instant) -> u32 {
        if self.is_over(rate, now) {
            *self = Self {
                since: Some(now),
                used: 0,
            };
        }
        self.used = self.used.saturating_add(1);
        self.used
    }

    fn is_over(&self, rate: Rate, now: Instant) -> bool {
        self.since
            .is_none_or(|since| now.duration_since(since) >= rate.within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_denial_is_told_once() {
        let (mut told, now) = (Told::default(), Instant::now());
        assert_eq!(told.decide(1, now), Verdict::LineAndEvent);
        for minutes in 0..200 {
            assert_eq!(told.decide(1, now + MINUTE * minutes), Verdict::Known);
        }
        assert_eq!(told.left_out(now + MINUTE * 200, End::Reached), None);
    }

    #[test]
    fn under_a_steady_stream_each_minute_is_counted() {
        let (mut told, begin) = (Told::default(), Instant::now());
        let mut counts = Vec::new();
        for second in 0..600_u64 {
            let now = begin + Duration::from_secs(second);
            counts.extend(told.left_out(now, End::Ahead));
            for one in 0..10 {
                told.decide(second * 10 + one, now);
            }
        }
        assert_eq!(counts, [580; 9]);
    }

    #[test]
    fn of_many_denials_some_are_lines_fewer_are_events_and_the_rest_is_counted() {
        let (mut told, now) = (Told::default(), Instant::now());
        let verdicts: Vec<_> = (0..10_000).map(|one| told.decide(one, now)).collect();
        let count = |wanted| verdicts.iter().filter(|one| **one == wanted).count();
        assert_eq!(count(Verdict::LineAndEvent), 4);
        assert_eq!(count(Verdict::LineAndHint), 1);
        assert_eq!(count(Verdict::Line), 15);
        assert_eq!(count(Verdict::LeftOut), 9_980);
        assert_eq!(told.left_out(now, End::Ahead), None);
        assert_eq!(told.left_out(now + MINUTE, End::Ahead), Some(9_980));
        assert_eq!(told.left_out(now + MINUTE, End::Ahead), None);
        // A minute later there are lines again, and never an event.
        for minutes in 1..1_000_u32 {
            let verdict = told.decide(20_000 + u64::from(minutes), now + MINUTE * minutes);
            assert_eq!(verdict, Verdict::Line);
        }
    }

    #[test]
    fn the_end_of_a_task_tells_what_was_left_out() {
        let (mut told, now) = (Told::default(), Instant::now());
        for one in 0..30 {
            told.decide(one, now);
        }
        assert_eq!(told.left_out(now, End::Reached), None);
        assert_eq!(told.left_out(now + QUIET, End::Ahead), None);
        assert_eq!(told.left_out(now + QUIET, End::Reached), Some(10));
    }
}
