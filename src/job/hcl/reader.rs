//! The parts of a job file: entries with their lines, and the values of attributes in the types that Nomad converts them to.
//! What a key means is `super`'s business.

use std::time::Duration;

use ::hcl::edit::Span;
use ::hcl::edit::expr::Expression;
use ::hcl::edit::structure::{Block, Body, Structure};
use ::hcl::{Map, Value};

use super::JobError;
use crate::job::evaluate::Names;
use crate::job::{Kind, Setting, Unsupported};

pub(super) struct Reader<'a> {
    text: &'a str,
    names: Names,
    pub unsupported: Vec<Unsupported>,
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
        JobError::Unknown {
            line: self.line,
            key: self.key.to_owned(),
            place: place.to_owned(),
        }
    }

    pub fn wrong(&self, message: impl Into<String>) -> JobError {
        JobError::Value {
            line: self.line,
            key: self.key.to_owned(),
            message: message.into(),
        }
    }
}

impl<'a> Reader<'a> {
    pub fn new(text: &'a str) -> Self {
        Reader {
            text,
            names: Names::default(),
            unsupported: Vec::new(),
        }
    }

    fn line(&self, at: Option<std::ops::Range<usize>>) -> usize {
        let end = at.map_or(0, |range| range.start).min(self.text.len());
        1 + self.text.as_bytes()[..end]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
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

    /// Fills in variables, then locals, which may name each other in any order.
    pub fn names(&mut self, body: &Body, given: &[(String, String)]) -> Result<(), JobError> {
        let mut pending = Vec::new();
        for entry in self.entries(body) {
            let Content::Block(block) = entry.content else {
                continue;
            };
            match (entry.key, block.labels.first()) {
                ("variable", Some(name)) => {
                    let default = block.body.get_attribute("default");
                    let value = match (given.iter().find(|(key, _)| key == name.as_str()), default)
                    {
                        (Some((_, value)), _) => Value::from(value.as_str()),
                        (None, Some(default)) => self.value(&entry, &default.value)?,
                        (None, None) => {
                            return Err(entry.wrong(format!(
                                "`{}` has no default and no value was given",
                                name.as_str()
                            )));
                        }
                    };
                    self.names.variables.insert(name.as_str().to_owned(), value);
                }
                ("variables", _) => {
                    for (key, setting) in self.settings(&entry)? {
                        let value = given.iter().find(|(name, _)| *name == key);
                        let value =
                            value.map_or(setting.value, |(_, value)| Value::from(value.as_str()));
                        self.names.variables.insert(key, value);
                    }
                }
                ("locals", _) => pending.extend(block.body.attributes()),
                _ => {}
            }
        }
        while !pending.is_empty() {
            let before = pending.len();
            let mut failure = None;
            pending.retain(
                |local| match self.names.evaluate(local.value.clone().into()) {
                    Ok(value) => {
                        self.names.locals.insert(local.key.to_string(), value);
                        false
                    }
                    Err(error) => {
                        failure = Some(JobError::Value {
                            line: self.line(local.key.span()),
                            key: local.key.to_string(),
                            message: error.to_string(),
                        });
                        true
                    }
                },
            );
            if let (true, Some(failure)) = (pending.len() == before, failure) {
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Notes an entry that a cluster would act on; anything else is a mistake.
    pub fn cluster(&mut self, entry: &Entry<'_>, known: &str, place: &str) -> Result<(), JobError> {
        if !known.split_whitespace().any(|key| key == entry.key) {
            return Err(entry.unknown(place));
        }
        self.unsupported.push(Unsupported {
            what: format!("{place}: {}", entry.key),
            line: entry.line,
        });
        Ok(())
    }
}

pub(super) fn label(block: &Block) -> Option<String> {
    block.labels.first().map(|label| label.as_str().to_owned())
}

pub(super) fn missing(line: usize, place: &str, key: &str) -> JobError {
    JobError::Missing {
        line,
        place: place.to_owned(),
        key: key.to_owned(),
    }
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
impl Reader<'_> {
    pub fn value(&self, entry: &Entry<'_>, expression: &Expression) -> Result<Value, JobError> {
        let value = self.names.evaluate(expression.clone().into());
        value.map_err(|error| entry.wrong(error.to_string()))
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

    pub fn number<N: TryFrom<i64>>(&self, entry: &Entry<'_>) -> Result<N, JobError> {
        let number = match self.attribute(entry)? {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let number = number.and_then(|number| N::try_from(number).ok());
        number.ok_or_else(|| entry.wrong("must be a whole number in range"))
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
        let one = |(key, setting): (String, Setting)| match as_string(setting.value) {
            Some(value) => Ok((key, value)),
            None => Err(entry.wrong(format!("`{key}` must be a string"))),
        };
        self.settings(entry)?.into_iter().map(one).collect()
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
