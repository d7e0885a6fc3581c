//! The `variable` and `locals` blocks: what `var.` and `local.` mean in the rest of the file.

use ::hcl::edit::structure::{Block, Body};
use ::hcl::edit::{Span, parser};
use ::hcl::{Number, Value};

use super::reader::{Content, Entry, Reader, as_string};
use crate::job::JobError;

/// What a variable holds, as far as the text of a `--var` is read by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Text,
    Number,
    Bool,
    List,
    Map,
    Any,
}

impl Reader {
    /// Fills in variables, then locals, which may name each other in any order.
    pub fn names(&mut self, body: &Body, given: &[(String, String)]) -> Result<(), JobError> {
        let mut declared = Vec::new();
        let mut pending = Vec::new();
        for entry in self.entries(body) {
            let Content::Block(block) = entry.content else {
                continue;
            };
            match (entry.key, block.labels.first()) {
                ("variable", Some(name)) => {
                    let name = name.as_str().to_owned();
                    let value = self.variable(&entry, block, &name, given)?;
                    self.names.set_variable(name.clone(), value);
                    declared.push(name);
                }
                ("variables", _) => {
                    for (name, setting) in self.settings(&entry)? {
                        let of_type = type_of(&setting.value);
                        let value = match text_for(&name, given) {
                            Some(text) => read(text, of_type)
                                .map_err(|problem| wrong(setting.line, &name, &problem))?,
                            None => setting.value,
                        };
                        self.names.set_variable(name.clone(), value);
                        declared.push(name);
                    }
                }
                ("locals", _) => pending.extend(block.body.attributes()),
                _ => {}
            }
        }
        if let Some((name, _)) = given.iter().find(|(name, _)| !declared.contains(name)) {
            let known = match declared.as_slice() {
                [] => "the file declares none".to_owned(),
                names => format!("the file declares {}", names.join(", ")),
            };
            return Err(JobError::new(
                1,
                format!("--var {name}: there is no variable `{name}`; {known}"),
            ));
        }
        while !pending.is_empty() {
            let before = pending.len();
            let mut failure = None;
            pending.retain(
                |local| match self.names.evaluate(local.value.clone().into()) {
                    Ok(value) => {
                        self.names.set_local(local.key.to_string(), value);
                        false
                    }
                    Err(error) => {
                        let line = self.line(local.key.span());
                        let message = format!("`{}`: {error}", local.key.as_str());
                        failure.get_or_insert_with(|| JobError::new(line, message));
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

    fn variable(
        &mut self,
        entry: &Entry<'_>,
        block: &Block,
        name: &str,
        given: &[(String, String)],
    ) -> Result<Value, JobError> {
        let (mut declared, mut default) = (None, None);
        for entry in self.entries(&block.body) {
            match (entry.key, &entry.content) {
                ("type", Content::Attribute(expression)) => {
                    let text = ::hcl::Expression::from((*expression).clone()).to_string();
                    declared = Some(named(&text).ok_or_else(|| {
                        entry.wrong(format!(
                            "`{text}` is no type such as string or list(number)"
                        ))
                    })?);
                }
                ("default", Content::Attribute(expression)) => {
                    default = Some((self.value(&entry, expression)?, entry.line));
                }
                ("description" | "sensitive" | "nullable", _) => {}
                ("validation", _) => self.without_effect(&entry, &format!("variable {name}")),
                _ => return Err(entry.unknown("a variable")),
            }
        }
        let inferred = default.as_ref().map(|(value, _)| type_of(value));
        let of_type = declared.or(inferred).unwrap_or(Type::Text);
        match (text_for(name, given), default) {
            (Some(text), _) => {
                read(text, of_type).map_err(|problem| wrong(entry.line, name, &problem))
            }
            (None, Some((value, line))) => {
                convert(value, of_type).map_err(|problem| wrong(line, name, &problem))
            }
            (None, None) => Err(JobError::new(
                entry.line,
                format!("variable `{name}` has no default; give it with --var {name}=VALUE"),
            )),
        }
    }
}

fn wrong(line: usize, name: &str, problem: &str) -> JobError {
    JobError::new(line, format!("variable `{name}`: {problem}"))
}

/// The last one wins, as in Nomad.
fn text_for<'a>(name: &str, given: &'a [(String, String)]) -> Option<&'a str> {
    let found = given.iter().rev().find(|(key, _)| key == name);
    found.map(|(_, text)| text.as_str())
}

fn named(text: &str) -> Option<Type> {
    match text.split('(').next()?.trim() {
        "string" => Some(Type::Text),
        "number" => Some(Type::Number),
        "bool" => Some(Type::Bool),
        "list" | "set" | "tuple" => Some(Type::List),
        "map" | "object" => Some(Type::Map),
        "any" => Some(Type::Any),
        _ => None,
    }
}

fn type_of(value: &Value) -> Type {
    match value {
        Value::String(_) => Type::Text,
        Value::Number(_) => Type::Number,
        Value::Bool(_) => Type::Bool,
        Value::Array(_) => Type::List,
        Value::Object(_) => Type::Map,
        Value::Null => Type::Any,
    }
}

/// The text of a `--var`: a string and a number as they stand, everything else as an expression of HCL.
fn read(text: &str, of_type: Type) -> Result<Value, String> {
    let value = match of_type {
        Type::Text | Type::Number | Type::Bool => Value::from(text),
        Type::List | Type::Map | Type::Any => {
            let expression = parser::parse_expr(text)
                .map_err(|_| format!("`{text}` is no value of HCL, such as [\"a\", \"b\"]"))?;
            crate::job::evaluate::Names::default()
                .evaluate(expression.into())
                .map_err(|error| error.to_string())?
        }
    };
    convert(value, of_type)
}

fn convert(value: Value, of_type: Type) -> Result<Value, String> {
    let is_no = |what: &str| Err(format!("`{value}` is no {what}"));
    match (of_type, &value) {
        (_, Value::Null) | (Type::Any, _) | (Type::List, Value::Array(_)) => Ok(value),
        (Type::Map, Value::Object(_)) => Ok(value),
        (Type::Text, _) => {
            as_string(value.clone()).map_or_else(|| is_no("string"), |text| Ok(Value::from(text)))
        }
        (Type::Number, Value::Number(_)) | (Type::Bool, Value::Bool(_)) => Ok(value),
        (Type::Number, Value::String(text)) => {
            number(text.trim()).map_or_else(|| is_no("number"), |number| Ok(Value::Number(number)))
        }
        (Type::Bool, Value::String(text)) => match text.as_str() {
            "true" | "1" => Ok(Value::from(true)),
            "false" | "0" => Ok(Value::from(false)),
            _ => is_no("bool; write true or false"),
        },
        (Type::Number, _) => is_no("number"),
        (Type::Bool, _) => is_no("bool; write true or false"),
        (Type::List, _) => is_no("list; write [\"a\", \"b\"]"),
        (Type::Map, _) => is_no("map; write {a = \"b\"}"),
    }
}

fn number(text: &str) -> Option<Number> {
    let whole = text.parse::<i64>().map(Number::from).ok();
    whole.or_else(|| Number::from_f64(text.parse().ok()?))
}
