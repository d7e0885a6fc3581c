//! The parts of a job file: entries with their lines, and the values of attributes in the types that Nomad converts them to.
//! What a key means is `super`'s business.

use std::time::Duration;

use ::hcl::edit::Span;
use ::hcl::edit::expr::Expression;
use ::hcl::edit::structure::{Block, Body, Structure};
use ::hcl::eval::ErrorKind;
use ::hcl::{Map, Value};

use crate::job::evaluate::Names;
use crate::job::{Access, JobError, Kind, Setting, Unsupported};

pub(super) struct Reader {
    /// Where each line begins.
    lines: Vec<usize>,
    pub(super) names: Names,
    pub unsupported: Vec<Unsupported>,
    /// The group and the task that are being read.
    pub group: Option<String>,
    pub task: Option<String>,
}

/// One attribute or block.
pub(super) struct Entry<'a> {
    pub key: &'a str,
    pub line: usize,
    pub content: Content<'a>,
}

pub(super) enum Content<'a> {
    Attribute(&'a Expression),
    Block(&'a Block),
}

impl Entry<'_> {
    pub fn unknown(&self, place: &str) -> JobError {
        JobError::new(
            self.line,
            format!("`{}` is nothing that {place} can have", self.key),
        )
    }

    pub fn wrong(&self, message: impl std::fmt::Display) -> JobError {
        JobError::new(self.line, format!("`{}`: {message}", self.key))
    }
}

impl Reader {
    pub fn new(text: &str) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Reader {
            lines: std::iter::once(0)
                .chain(breaks.map(|(at, _)| at + 1))
                .collect(),
            names: Names::default(),
            unsupported: Vec::new(),
            group: None,
            task: None,
        }
    }

    /// Counted from 1.
    pub(super) fn line(&self, at: Option<std::ops::Range<usize>>) -> usize {
        let start = at.map_or(0, |range| range.start);
        self.lines.partition_point(|begin| *begin <= start)
    }

    pub fn entries<'b>(&self, body: &'b Body) -> Vec<Entry<'b>> {
        let entry = |structure: &'b Structure| match structure {
            Structure::Attribute(attribute) => Entry {
                key: attribute.key.as_str(),
                line: self.line(attribute.key.span()),
                content: Content::Attribute(&attribute.value),
            },
            Structure::Block(block) => Entry {
                key: block.ident.as_str(),
                line: self.line(block.ident.span()),
                content: Content::Block(block),
            },
        };
        body.iter().map(entry).collect()
    }
}

pub(super) fn label(block: &Block) -> Option<String> {
    block.labels.first().map(|label| label.as_str().to_owned())
}

pub(super) fn missing(line: usize, place: &str, key: &str) -> JobError {
    JobError::new(line, format!("{place} has no `{key}`"))
}

pub(super) fn block_of<'a>(entry: &Entry<'a>) -> Result<&'a Block, JobError> {
    match entry.content {
        Content::Block(block) => Ok(block),
        Content::Attribute(_) => Err(entry.wrong("must be a block, without `=`")),
    }
}

pub(super) fn named<'a>(entry: &Entry<'a>) -> Result<(&'a Block, String), JobError> {
    let block = block_of(entry)?;
    let name = label(block).ok_or_else(|| entry.wrong("needs a name"))?;
    Ok((block, name))
}

/// Values.
impl Reader {
    pub fn value(&self, entry: &Entry<'_>, expression: &Expression) -> Result<Value, JobError> {
        let value = self.names.evaluate(expression.clone().into());
        value.map_err(|error| match error.kind() {
            ErrorKind::UndefinedFunc(name) => entry.wrong(format!(
                "{name}() is not known here, as no function is; write its value out, or give it with --var"
            )),
            _ => entry.wrong(error),
        })
    }

    pub fn attribute(&self, entry: &Entry<'_>) -> Result<Value, JobError> {
        match entry.content {
            Content::Attribute(expression) => self.value(entry, expression),
            Content::Block(_) => Err(entry.wrong("must be a value, not a block")),
        }
    }

    pub fn string(&self, entry: &Entry<'_>) -> Result<String, JobError> {
        as_string(self.attribute(entry)?).ok_or_else(|| entry.wrong("must be a string"))
    }

    pub fn flag(&self, entry: &Entry<'_>) -> Result<bool, JobError> {
        match self.string(entry)?.as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(entry.wrong(format!("`{other}` is neither true nor false"))),
        }
    }

    pub fn access(&self, entry: &Entry<'_>) -> Result<Access, JobError> {
        Ok(match self.flag(entry)? {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        })
    }

    pub fn list(&self, entry: &Entry<'_>) -> Result<Vec<String>, JobError> {
        let wrong = || entry.wrong("must be a list of strings");
        match self.attribute(entry)? {
            Value::Array(items) => items
                .into_iter()
                .map(|item| as_string(item).ok_or_else(wrong))
                .collect(),
            _ => Err(wrong()),
        }
    }

    /// The text of an attribute, and its line.
    pub fn text(&self, entry: &Entry<'_>) -> Result<Setting, JobError> {
        Ok(Setting {
            value: Value::from(self.string(entry)?),
            line: entry.line,
        })
    }

    pub fn number<N: TryFrom<i64>>(&self, entry: &Entry<'_>) -> Result<N, JobError> {
        let value = self.attribute(entry)?;
        let number = match &value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let number = number.and_then(|number| N::try_from(number).ok());
        number.ok_or_else(|| entry.wrong(format!("{value} is no whole number in range")))
    }

    pub fn duration(&self, entry: &Entry<'_>) -> Result<Duration, JobError> {
        let text = self.string(entry)?;
        duration(&text)
            .ok_or_else(|| entry.wrong(format!("`{text}` is no duration such as 30s or 1m30s")))
    }

    pub fn kind(&self, entry: &Entry<'_>) -> Result<Kind, JobError> {
        match self.string(entry)?.as_str() {
            "service" => Ok(Kind::Service),
            "batch" => Ok(Kind::Batch),
            "system" => Ok(Kind::System),
            "sysbatch" => Ok(Kind::Sysbatch),
            other => Err(entry.wrong(format!(
                "`{other}` is not service, batch, system or sysbatch"
            ))),
        }
    }

    pub fn datacenter(&self, entry: &Entry<'_>) -> Result<String, JobError> {
        let first = self
            .attribute(entry)?
            .as_array()
            .and_then(|all| all.first().cloned());
        let name = first.and_then(as_string).filter(|name| !name.contains('*'));
        Ok(name.unwrap_or_else(|| "dc1".into()))
    }

    /// Free keys with values, written as a block or as a map; a block inside stays a nested map.
    pub fn settings(&self, entry: &Entry<'_>) -> Result<Vec<(String, Setting)>, JobError> {
        let line = entry.line;
        match entry.content {
            Content::Attribute(expression) => match self.value(entry, expression)? {
                Value::Object(map) => Ok(map
                    .into_iter()
                    .map(|(key, value)| (key, Setting { value, line }))
                    .collect()),
                _ => Err(entry.wrong("must be a map")),
            },
            Content::Block(block) => {
                let entries = self.entries(&block.body).into_iter().map(|entry| {
                    let value = match entry.content {
                        Content::Attribute(expression) => self.value(&entry, expression)?,
                        Content::Block(_) => {
                            let inner = self.settings(&entry)?.into_iter();
                            Value::Object(
                                inner
                                    .map(|(key, setting)| (key, setting.value))
                                    .collect::<Map<_, _>>(),
                            )
                        }
                    };
                    Ok((
                        entry.key.to_owned(),
                        Setting {
                            value,
                            line: entry.line,
                        },
                    ))
                });
                entries.collect()
            }
        }
    }

    pub fn strings(&self, entry: &Entry<'_>) -> Result<Vec<(String, String)>, JobError> {
        let one = |(key, setting): (String, Setting)| match as_string(setting.value.clone()) {
            Some(value) => Ok((key, value)),
            None => Err(JobError::new(
                setting.line,
                format!("`{key}` of {} must be a string", entry.key),
            )),
        };
        self.settings(entry)?.into_iter().map(one).collect()
    }

    /// Free keys with texts, each with its line.
    pub fn texts(&self, entry: &Entry<'_>) -> Result<Vec<(String, Setting)>, JobError> {
        let settings = self.settings(entry)?;
        let lines: Vec<_> = settings.iter().map(|(_, setting)| setting.line).collect();
        let strings = self.strings(entry)?.into_iter().zip(lines);
        Ok(strings
            .map(|((key, text), line)| {
                let value = Value::from(text);
                (key, Setting { value, line })
            })
            .collect())
    }
}

/// Strings, and what HCL converts to one.
pub(in crate::job) fn as_string(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// A duration as Go writes it: numbers with units, one after the other.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}
