//! Commands and what they print, as the manual shows them, and whether a running system still prints that.

use anyhow::{Context as _, Result, ensure};

/// A fenced block of README.md below a line `<!-- transcript: NAME -->`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    pub name: String,
    pub text: String,
}

/// One command of a transcript, without its prompt, and what it printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub command: String,
    pub output: String,
}

const MARK: &str = "<!-- transcript: ";
const PROMPT: &str = "# ";

pub fn transcripts(markdown: &str) -> Result<Vec<Transcript>> {
    let marked = markdown.split(MARK).skip(1);
    marked
        .map(|rest| {
            let (name, rest) = rest.split_once(" -->\n").context("a mark has no end")?;
            let fenced = rest.strip_prefix("```console\n");
            let fenced =
                fenced.with_context(|| format!("no console block below the mark of {name}"))?;
            let (text, _) = fenced.split_once("```").context("a fence has no end")?;
            Ok(Transcript {
                name: name.to_owned(),
                text: text.to_owned(),
            })
        })
        .collect()
}

impl Transcript {
    pub fn shown(&self) -> Result<Vec<Shown>> {
        let mut all: Vec<Shown> = Vec::new();
        for line in self.text.lines() {
            match (line.strip_prefix(PROMPT), all.last_mut()) {
                (Some(command), _) => all.push(Shown {
                    command: command.to_owned(),
                    output: String::new(),
                }),
                (None, Some(shown)) => {
                    shown.output.push_str(line);
                    shown.output.push('\n');
                }
                (None, None) => ensure!(line.is_empty(), "{}: {line} before a command", self.name),
            }
        }
        Ok(all)
    }
}

/// What stays of a text from one run to the next: numbers, ids and times become `#`, their units, columns' widths and empty
/// lines go. `1min 4s` is as good as `59s`.
pub fn mask(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let words = line.split_whitespace().map(mask_word);
        let mut words: Vec<String> = words.collect();
        words.dedup_by(|next, word| word == "#" && next == "#");
        words.join(" ")
    });
    lines
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

/// `exec2-web-0ad1ddf2-0ae49061.scope` is `exec2-web-#-#.scope`, `├─636` is `├─#`, `127.4M,` is `#,`.
fn mask_word(word: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '.';
    let mut masked = String::new();
    let mut rest = word;
    while let Some(start) = rest.find(is_part) {
        let (before, from) = rest.split_at(start);
        let end = from.find(|c| !is_part(c)).unwrap_or(from.len());
        let (part, after) = from.split_at(end);
        masked.push_str(before);
        masked.push_str(&mask_part(part));
        rest = after;
    }
    masked + rest
}

fn mask_part(part: &str) -> String {
    let bare = part.trim_end_matches('.');
    let dots = &part[bare.len()..];
    let (stem, suffix) = match bare.split_once(".scope") {
        Some((stem, "")) => (stem, ".scope"),
        _ => (bare, ""),
    };
    // Of a UUID, too.
    let is_id = [4, 8, 12, 32].contains(&stem.len()) && stem.chars().all(|c| c.is_ascii_hexdigit());
    let is_amount = stem.starts_with(|c: char| c.is_ascii_digit());
    if is_id || is_amount || is_weekday_or_month(stem) {
        format!("#{suffix}{dots}")
    } else {
        part.to_owned()
    }
}

fn is_weekday_or_month(word: &str) -> bool {
    const NAMES: [&str; 19] = [
        "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun", "Jan", "Feb", "Mar", "Apr", "May", "Jun",
        "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    NAMES.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_is_its_commands_and_what_they_print() {
        let text = "x\n<!-- transcript: two -->\n```console\n# ls\na\nb\n\n# true\n```\ny\n```console\n# no\n```\n";
        let found = transcripts(text).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "two");
        let shown = found[0].shown().unwrap();
        assert_eq!(shown.len(), 2);
        assert_eq!((&*shown[0].command, &*shown[0].output), ("ls", "a\nb\n\n"));
        assert_eq!((&*shown[1].command, &*shown[1].output), ("true", ""));
    }

    #[test]
    fn a_mark_without_a_block_is_an_error() {
        for text in [
            "<!-- transcript: a -->\n",
            "<!-- transcript: a -->\n```sh\n```\n",
            "<!-- transcript: a -->\n```console\n# ls\n",
        ] {
            assert!(transcripts(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_changes_from_run_to_run_is_masked_and_nothing_else() {
        for (text, masked) in [
            (
                "├─636 nomad-driver-exec2 launch",
                "├─# nomad-driver-exec2 launch",
            ),
            (
                "● exec2-web-0ad1ddf2-0ae49061.scope - Nomad task web",
                "● exec2-web-#-#.scope - Nomad task web",
            ),
            (
                "Memory: 600K (low: 64M, available: 127.4M)",
                "Memory: # (low: #, available: #)",
            ),
            (
                "since Wed 2026-11-25 02:36:15 UTC; 1s ago",
                "since # #-#-# #:#:# UTC; # ago",
            ),
            ("running  a  b\n\n", "running a b"),
            ("id=81c89733-e4dd-4e45-871d-c3c853fd550e", "id=#-#-#-#-#"),
            ("for 1min 4s now", "for # now"),
            (
                "deadline in default/service/web",
                "deadline in default/service/web",
            ),
        ] {
            assert_eq!(mask(text), masked);
        }
    }
}
