//! What a check finds, as lines for people and objects for programs.

use serde::Serialize;

use crate::cli::terminal::{Colour, Colours, MAX_SENTENCE_BYTES};
use crate::text::one_line;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    Warning,
    Error,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Error => "error",
        }
    }

    /// As wide as the widest, coloured if wanted.
    pub fn cell(self, colours: Colours) -> String {
        let cell = format!("{:7}", self.name());
        let colour = match self {
            Status::Ok => Colour::Green,
            Status::Warning => Colour::Yellow,
            Status::Error => Colour::Red,
        };
        match colours {
            Colours::Some => colour.paint(&cell),
            Colours::None => cell,
        }
    }
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    pub name: &'static str,
    pub status: Status,
    pub found: String,
    pub remedy: Option<String>,
}

impl Line {
    pub fn ok(name: &'static str, found: impl AsRef<str>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: one_line(found.as_ref(), MAX_SENTENCE_BYTES),
            remedy: None,
        }
    }

    pub fn warning(name: &'static str, sentence: impl AsRef<str>) -> Self {
        Self::of(name, Status::Warning, sentence.as_ref())
    }

    pub fn error(name: &'static str, sentence: impl AsRef<str>) -> Self {
        Self::of(name, Status::Error, sentence.as_ref())
    }

    /// Sentences of ours end with the remedy, after their last semicolon that is not part of an aside or of what they quote.
    fn of(name: &'static str, status: Status, sentence: &str) -> Self {
        let (mut depth, mut is_quoted) = (0_i32, false);
        let mut at = None;
        for (index, character) in sentence.char_indices() {
            match character {
                '"' => is_quoted = !is_quoted,
                '(' if !is_quoted => depth += 1,
                ')' if !is_quoted => depth -= 1,
                ';' if !is_quoted && depth == 0 && sentence[index..].starts_with("; ") => {
                    at = Some(index);
                }
                _ => {}
            }
        }
        let (found, remedy) = match at {
            Some(at) => (&sentence[..at], Some(&sentence[at + 2..])),
            None => (sentence, None),
        };
        let safe = |text: &str| one_line(text, MAX_SENTENCE_BYTES);
        Self {
            name,
            status,
            found: safe(found),
            remedy: remedy.map(safe),
        }
    }
}

pub fn text(lines: &[Line], colours: Colours) -> String {
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let shown = lines.iter().map(|line| {
        let remedy = line.remedy.iter().map(|remedy| format!("; {remedy}"));
        let status = line.status.cell(colours);
        let remedy: String = remedy.collect();
        format!("{status}  {:width$}  {}{remedy}\n", line.name, line.found)
    });
    shown.collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// `status name: found; remedy` of each.
    pub fn told(lines: &[Line]) -> Vec<String> {
        let line = |line: &Line| {
            let remedy = line.remedy.iter().map(|remedy| format!("; {remedy}"));
            let remedy: String = remedy.collect();
            format!(
                "{} {}: {}{remedy}",
                line.status.name(),
                line.name,
                line.found
            )
        };
        lines.iter().map(line).collect()
    }

    #[test]
    fn a_line_has_what_was_found_and_the_remedy() {
        let lines = [
            Line::ok("root", "yes"),
            Line::error("landlock", "off\u{1b}[2J; it is; add it"),
        ];
        assert_eq!(
            text(&lines, Colours::None),
            "ok       root      yes\nerror    landlock  off<U+001B>[2J; it is; add it\n"
        );
        assert_eq!(lines[1].found, "off<U+001B>[2J; it is");
        assert_eq!(lines[1].remedy.as_deref(), Some("add it"));
        let line = Line::error(
            "command",
            "command \"a; b\": permission denied (found as /a; is it executable?)",
        );
        assert_eq!(line.remedy, None);
        assert!(text(&lines, Colours::Some).contains("\x1b[31merror  \x1b[0m"));
    }
}
