//! What people read: a line per case, and at the end what failed, what was slow and how many.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::GuestName;
use super::inside::Ended;

const SLOWEST: usize = 10;
/// Of what a failed case said, in its line and in the list at the end.
const LINES: usize = 4;
const CHARS: usize = 400;

#[derive(Debug, Default)]
pub struct Tally {
    ended: Mutex<Vec<(GuestName, Ended)>>,
}

impl Tally {
    pub fn ended(&self, guest: GuestName, ended: Ended) {
        let verdict = if ended.failure.is_some() {
            "FAILED"
        } else {
            "ok"
        };
        let mut lines = format!(
            "{guest:<16} {} ... {verdict} ({:.2} s)",
            ended.case, ended.seconds
        );
        for note in &ended.notes {
            lines.push_str(&format!("\n{:<16}     {note}", ""));
        }
        if ended.failure.is_some() {
            lines.push_str(&format!("\n    {}", reason(&ended)));
        }
        // One call: the lines of two guests do not mix.
        println!("{lines}");
        self.lock().push((guest, ended));
    }

    /// A planned case that did not run is a failed one. The reason is told once.
    pub fn did_not_run(&self, guest: GuestName, cases: &[&str], why: &str) {
        if cases.is_empty() {
            return;
        }
        println!("{guest:<16} {} cases do not run: {why}", cases.len());
        for (number, case) in cases.iter().enumerate() {
            self.ended(
                guest,
                Ended {
                    case: (*case).to_owned(),
                    seconds: 0.0,
                    notes: Vec::new(),
                    failure: Some("did not run".to_owned()),
                    output: if number == 0 { why } else { "(the same)" }.to_owned(),
                },
            );
        }
    }

    /// Prints the end of the report; the counts are alone on the last line.
    pub fn conclude(&self) -> ExitCode {
        let mut ended = self.lock();
        let (failed, passed): (Vec<_>, Vec<_>) =
            ended.iter().partition(|(_, ended)| ended.failure.is_some());
        for (guest, case) in &failed {
            println!(
                "\n---- {guest} {}: {}",
                case.case,
                case.failure.as_deref().unwrap_or_default()
            );
            println!("{}", case.output);
        }
        // Once more in short: of a long run, often only the end is kept.
        let short: Vec<_> = failed
            .iter()
            .map(|(guest, case)| format!("{guest:<16} {}: {}", case.case, reason(case)))
            .collect();
        let (failed, passed) = (failed.len(), passed.len());
        ended.sort_by(|(_, a), (_, b)| b.seconds.total_cmp(&a.seconds));
        println!("\nslowest:");
        for (guest, case) in ended.iter().take(SLOWEST) {
            println!("{:>8.2} s  {guest:<16} {}", case.seconds, case.case);
        }
        if !short.is_empty() {
            println!("\nfailed:\n{}", short.join("\n"));
        }
        if ended.is_empty() {
            println!("\nno case ran: that is a failure too");
        }
        println!("\n{passed} passed, {failed} failed");
        if failed == 0 && passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(GuestName, Ended)>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is wrong, and the beginning of the panic that said so, or the last that was said.
fn reason(ended: &Ended) -> String {
    let lines: Vec<&str> = ended.output.lines().collect();
    let panic = lines.iter().position(|line| line.contains(" panicked at "));
    let from = panic.unwrap_or(lines.len().saturating_sub(LINES));
    let failure = ended.failure.clone().unwrap_or_default();
    let said = lines.iter().skip(from).take(LINES);
    let said = said.map(|line| line.chars().take(CHARS).collect());
    let lines: Vec<String> = std::iter::once(failure).chain(said).collect();
    lines.join("\n    ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn failed(exit: ExitCode) -> bool {
        format!("{exit:?}") != format!("{:?}", ExitCode::SUCCESS)
    }

    fn passed_case() -> Ended {
        Ended {
            case: "a::case".to_owned(),
            seconds: 1.0,
            notes: Vec::new(),
            failure: None,
            output: String::new(),
        }
    }

    #[test]
    fn a_run_of_nothing_fails() {
        assert!(failed(Tally::default().conclude()));
    }

    #[test]
    fn a_case_that_did_not_run_fails_the_whole_run() {
        let guest: GuestName = "trixie-nspawn".parse().unwrap();
        let tally = Tally::default();
        tally.ended(guest, passed_case());
        assert!(!failed(tally.conclude()));
        tally.did_not_run(guest, &["b::case"], "no guest");
        assert!(failed(tally.conclude()));
    }

    #[test]
    fn the_list_of_failures_says_where_and_why() {
        let ended = Ended {
            failure: Some("exit status: 101".to_owned()),
            output: "much\nthread 'main' panicked at a.rs:1:2:\nit is 2, not 1\nmore".to_owned(),
            ..passed_case()
        };
        assert_eq!(
            reason(&ended),
            "exit status: 101\n    thread 'main' panicked at a.rs:1:2:\n    it is 2, not 1\n    more"
        );
        let ended = Ended {
            output: "1\n2\n3\n4\nError: no".to_owned(),
            ..ended
        };
        assert_eq!(
            reason(&ended),
            "exit status: 101\n    2\n    3\n    4\n    Error: no"
        );
    }
}
