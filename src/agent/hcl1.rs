//! The language of a Nomad agent's configuration: HCL's first version or JSON, as a tree of keys. It is not the one of job files:
//! keys may be quoted and share a line, a block may follow a `=`, and nothing is evaluated. Pure.

use crate::job::{JobError, Value};

/// A key, where it stands, and what it holds. A block with labels is a tree in a tree.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub key: String,
    /// Counted from 1; of JSON always 1.
    pub line: usize,
    pub node: Node,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Value(Value),
    Tree(Vec<Entry>),
}

/// Deeper than any configuration, and no danger to the stack.
const MAX_DEPTH: usize = 64;

pub fn parse(text: &str) -> Result<Vec<Entry>, JobError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('{') {
        return match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(tree(object, 1)),
            Ok(_) => Err(JobError::new(1, "it is no JSON object")),
            Err(error) => Err(JobError::new(error.line(), error.to_string())),
        };
    }
    let mut parser = Parser {
        rest: text,
        line: 1,
    };
    parser.body(None, 0)
}

/// JSON has objects, and lists of objects, for blocks.
fn tree(object: hcl::Map<String, Value>, line: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (key, value) in object {
        let nodes = match value {
            Value::Object(inner) => vec![Node::Tree(tree(inner, line))],
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_object) => items
                .into_iter()
                .filter_map(|item| match item {
                    Value::Object(inner) => Some(Node::Tree(tree(inner, line))),
                    _ => None,
                })
                .collect(),
            value => vec![Node::Value(value)],
        };
        entries.extend(nodes.into_iter().map(|node| Entry {
            key: key.clone(),
            line,
            node,
        }));
    }
    entries
}

/// A tree where a value is wanted.
pub fn value(node: Node) -> Value {
    match node {
        Node::Value(value) => value,
        Node::Tree(entries) => Value::Object(
            entries
                .into_iter()
                .map(|entry| (entry.key, value(entry.node)))
                .collect(),
        ),
    }
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
}

impl Parser<'_> {
    fn wrong(&self, what: &str) -> JobError {
        JobError::new(self.line, what)
    }

    fn advance(&mut self, bytes: usize) {
        let (passed, rest) = self.rest.split_at(bytes);
        self.line += passed.matches('\n').count();
        self.rest = rest;
    }

    /// Whether this came next, and was passed.
    fn take(&mut self, mark: &str) -> bool {
        let is_next = self.rest.starts_with(mark);
        if is_next {
            self.advance(mark.len());
        }
        is_next
    }

    /// Blanks and comments.
    fn skip(&mut self) -> Result<(), JobError> {
        loop {
            let blanks = self.rest.len() - self.rest.trim_start().len();
            self.advance(blanks);
            let end = if self.rest.starts_with('#') || self.rest.starts_with("//") {
                self.rest.find('\n').unwrap_or(self.rest.len())
            } else if self.rest.starts_with("/*") {
                // Not the `*/` of `/*/`.
                let end = self.rest[2..].find("*/");
                end.ok_or_else(|| self.wrong("a comment has no end"))? + 4
            } else {
                return Ok(());
            };
            self.advance(end);
        }
    }

    fn body(&mut self, end: Option<&str>, depth: usize) -> Result<Vec<Entry>, JobError> {
        if depth > MAX_DEPTH {
            return Err(self.wrong("blocks are nested too deeply"));
        }
        let mut entries = Vec::new();
        loop {
            self.skip()?;
            if end.is_some_and(|end| self.take(end)) || (end.is_none() && self.rest.is_empty()) {
                return Ok(entries);
            }
            if self.take(",") {
                continue;
            }
            if self.rest.is_empty() {
                return Err(self.wrong("a block has no end"));
            }
            entries.push(self.entry(depth)?);
        }
    }

    fn entry(&mut self, depth: usize) -> Result<Entry, JobError> {
        let line = self.line;
        let mut keys = vec![self.key()?];
        let mut node = loop {
            self.skip()?;
            if self.take("=") {
                self.skip()?;
                break match self.take("{") {
                    true => Node::Tree(self.body(Some("}"), depth + 1)?),
                    false => Node::Value(self.value(depth)?),
                };
            }
            if self.take("{") {
                break Node::Tree(self.body(Some("}"), depth + 1)?);
            }
            keys.push(self.key()?);
            if keys.len() > MAX_DEPTH {
                return Err(self.wrong("a block has too many labels"));
            }
        };
        while let Some(key) = keys.pop() {
            let entry = Entry { key, line, node };
            if keys.is_empty() {
                return Ok(entry);
            }
            node = Node::Tree(vec![entry]);
        }
        Err(self.wrong("a key is missing"))
    }

    fn key(&mut self) -> Result<String, JobError> {
        if self.rest.starts_with('"') {
            return self.string();
        }
        let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
        let end = self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len());
        if end == 0 {
            return Err(match self.rest.chars().next() {
                Some(found) => self.wrong(&format!("a key is expected, not {found:?}")),
                None => self.wrong("a value is missing"),
            });
        }
        let key = self.rest[..end].to_owned();
        self.advance(end);
        Ok(key)
    }

    fn value(&mut self, depth: usize) -> Result<Value, JobError> {
        if depth > MAX_DEPTH {
            return Err(self.wrong("values are nested too deeply"));
        }
        if self.rest.starts_with('"') {
            return self.string().map(Value::from);
        }
        if self.take("[") {
            let mut items = Vec::new();
            loop {
                self.skip()?;
                if self.take("]") {
                    return Ok(Value::Array(items));
                }
                if !self.take(",") {
                    items.push(self.value(depth + 1)?);
                }
            }
        }
        if self.take("{") {
            return Ok(value(Node::Tree(self.body(Some("}"), depth + 1)?)));
        }
        if self.rest.starts_with("<<") {
            return self.heredoc().map(Value::from);
        }
        let word = self.key()?;
        Ok(match word.as_str() {
            "true" => Value::from(true),
            "false" => Value::from(false),
            word => match (whole(word), word.parse::<f64>()) {
                (Some(whole), _) => Value::from(whole),
                (_, Ok(number)) if number.is_finite() => Value::from(number),
                // Without the word: it may be a token.
                _ => return Err(self.wrong("a bare word is no value; put a text in quotes")),
            },
        })
    }

    /// What stands in `${}` stays as it is, quotes in it included.
    fn string(&mut self) -> Result<String, JobError> {
        let no_end = || JobError::new(self.line, "a text has no closing quote");
        let mut text = String::new();
        let mut characters = self.rest.char_indices().skip(1).peekable();
        let mut braces = 0_usize;
        let end = loop {
            let (at, character) = characters.next().ok_or_else(no_end)?;
            match character {
                '"' if braces == 0 => break at + 1,
                '\n' if braces == 0 => return Err(no_end()),
                '$' if characters.peek().is_some_and(|(_, next)| *next == '{') => {
                    braces += 1;
                    characters.next();
                    text.push_str("${");
                    continue;
                }
                '{' if braces > 0 => braces += 1,
                '}' if braces > 0 => braces -= 1,
                '\\' if braces == 0 => {
                    let (_, escaped) = characters.next().ok_or_else(no_end)?;
                    text.push(match escaped {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        'u' | 'U' => {
                            let digits = if escaped == 'u' { 4 } else { 8 };
                            let hex: String =
                                characters.by_ref().take(digits).map(|(_, c)| c).collect();
                            u32::from_str_radix(&hex, 16)
                                .ok()
                                .and_then(char::from_u32)
                                .ok_or_else(|| self.wrong("an escape is no character"))?
                        }
                        other => other,
                    });
                    continue;
                }
                _ => {}
            }
            text.push(character);
        };
        self.advance(end);
        Ok(text)
    }

    fn heredoc(&mut self) -> Result<String, JobError> {
        let no_end = || JobError::new(self.line, "a text has no end");
        let (first, _) = self.rest.split_once('\n').ok_or_else(no_end)?;
        let mark = first
            .trim_start_matches('<')
            .trim_start_matches('-')
            .trim()
            .to_owned();
        self.advance(first.len() + 1);
        let (mut text, mut length) = (String::new(), 0);
        for line in self.rest.split_inclusive('\n') {
            length += line.len();
            if line.trim() == mark {
                // The line's end stays, for the next entry's line to be counted.
                self.advance(length);
                return Ok(text);
            }
            text.push_str(line);
        }
        Err(self.wrong("a text has no end"))
    }
}

/// As Go reads it: 0x for hexadecimal, 0 for octal.
fn whole(word: &str) -> Option<i64> {
    let digits = word.strip_prefix('-').unwrap_or(word);
    let sign = if digits.len() < word.len() { -1 } else { 1 };
    let (digits, radix) = match (digits.strip_prefix("0x"), digits.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) if !digits.is_empty() => (digits, 8),
        _ => (digits, 10),
    };
    i64::from_str_radix(digits, radix).ok()?.checked_mul(sign)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn keys(entries: &[Entry]) -> Vec<(&str, usize)> {
        entries
            .iter()
            .map(|entry| (entry.key.as_str(), entry.line))
            .collect()
    }

    #[test]
    fn what_agents_read_and_job_files_must_not_have_is_read() {
        let text = "# c\nadvertise { http = \"127.0.0.1\" rpc = \"a\" } // two on a line\nclient = {\n  options {\n    \"driver.allowlist\" = \"exec2\"\n  }\n}\n/* c\n */ log = <<-EOT\n  a\n  EOT\nlast = [1, true, \"\\u00e9${x(\"y\")}\", {a = 1.5}]";
        let entries = parse(text).unwrap();
        assert_eq!(
            keys(&entries),
            [("advertise", 2), ("client", 3), ("log", 9), ("last", 12)]
        );
        let Node::Tree(inner) = &entries[0].node else {
            panic!("{entries:?}")
        };
        assert_eq!(keys(inner), [("http", 2), ("rpc", 2)]);
        let list = value(entries[3].node.clone());
        let object = [("a".to_owned(), Value::from(1.5))].into_iter().collect();
        let text = Value::from("é${x(\"y\")}");
        let wanted = vec![
            Value::from(1),
            Value::from(true),
            text,
            Value::Object(object),
        ];
        assert_eq!(list, Value::Array(wanted));
    }

    #[test]
    fn numbers_and_comments_are_as_go_reads_them() {
        let text = "a = 0x10\nb = 010 /*/ old */\nc = -3\nd = 1.5";
        let read: Vec<Value> = parse(text)
            .unwrap()
            .into_iter()
            .map(|entry| value(entry.node))
            .collect();
        let wanted = [16.into(), 8.into(), (-3).into(), 1.5.into()];
        assert_eq!(read, wanted);
    }

    #[test]
    fn labels_and_json_are_trees_alike() {
        let hcl = parse("plugin \"a\" {\n config {\n x = 1\n}\n}").unwrap();
        let json = parse(r#"{"plugin": [{"a": {"config": {"x": 1}}}]}"#).unwrap();
        fn plain(entries: Vec<Entry>) -> Value {
            value(Node::Tree(entries))
        }
        assert_eq!(plain(hcl), plain(json));
    }

    #[test]
    fn a_mistake_is_told_with_its_line() {
        for (text, line, start) in [
            ("a = 1\nb = {\n", 3, "a block has no end"),
            ("a = 1\nb = word\n", 2, "a bare word is no value"),
            ("a = \"x\n", 1, "a text has no closing quote"),
            ("\n= 1", 2, "a key is expected, not '='"),
            ("a\n", 2, "a value is missing"),
            ("a = <<E\nx\n", 2, "a text has no end"),
            ("{\n\"a\": }", 2, "expected value"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text}: {error}");
            assert!(error.message.starts_with(start), "{text}: {error}");
        }
        assert!(parse(&"a {".repeat(100_000)).is_err());
        assert!(parse(&format!("a = {}", "[".repeat(100_000))).is_err());
        assert!(parse(&"a ".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z \"\\\\{}\\[\\]=,<\\-\n$#/*é]{0,60}") {
            let _ = parse(&text);
        }
    }
}
