//! Validates what an operator or a job author wrote against the schema that the driver returned, as Nomad does before the
//! driver sees anything: unknown keys, missing keys, values that convert to the asked type, defaults. Pure.

use std::collections::BTreeSet;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use hcl::eval::Evaluate;
use hcl::expr::{Expression, FuncCall};
use hcl::{Number, Value};

use super::proto::hclspec::{Attr, Spec, spec::Block};

/// The type of an attribute.
#[derive(Debug, Clone, PartialEq)]
enum Type {
    Any,
    Bool,
    Number,
    String,
    List(Box<Type>),
    Map(Box<Type>),
}

/// Every key of the schema in the order of their names; unset ones are null.
pub fn decode(spec: &Spec, given: &[(String, Value)]) -> Result<Vec<(String, Value)>> {
    let Some(Block::Object(object)) = &spec.block else {
        bail!("the schema is not an object");
    };
    let known: BTreeSet<&str> = object
        .attributes
        .iter()
        .filter_map(|(key, spec)| name(key, spec))
        .collect();
    if let Some((key, _)) = given.iter().find(|(key, _)| !known.contains(key.as_str())) {
        bail!("Invalid label: No argument or block type is named {key:?}.");
    }
    let mut keys: Vec<_> = object.attributes.iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    let decoded = keys.into_iter().map(|(key, spec)| {
        let value = value(Some(key), spec, given).with_context(|| format!("key {key}"))?;
        Ok((key.clone(), value))
    });
    decoded.collect()
}

/// The name an attribute is written under. Only a direct member of an object may leave its own out.
fn name<'a>(key: &'a str, spec: &'a Spec) -> Option<&'a str> {
    match spec.block.as_ref()? {
        Block::Attr(attr) if attr.name.is_empty() => Some(key),
        Block::Attr(attr) => Some(&attr.name),
        Block::Default(default) => match default.primary.as_ref()?.block.as_ref()? {
            Block::Attr(attr) if !attr.name.is_empty() => Some(&attr.name),
            _ => None,
        },
        _ => None,
    }
}

fn value(key: Option<&str>, spec: &Spec, given: &[(String, Value)]) -> Result<Value> {
    match spec.block.as_ref().context("an empty schema")? {
        Block::Attr(attr) => attribute(key, attr, given),
        Block::Literal(literal) => {
            let expression = Expression::from_str(&literal.value).context("a literal's text")?;
            Ok(expression.evaluate(&hcl::eval::Context::new())?)
        }
        Block::Default(default) => {
            let primary = default
                .primary
                .as_ref()
                .context("a default without a primary")?;
            match value(None, primary, given)? {
                Value::Null => value(
                    None,
                    default
                        .default
                        .as_ref()
                        .context("a default without a value")?,
                    given,
                ),
                set => Ok(set),
            }
        }
        other => bail!("this client does not decode {other:?}"),
    }
}

fn attribute(key: Option<&str>, attr: &Attr, given: &[(String, Value)]) -> Result<Value> {
    let name = match (attr.name.as_str(), key) {
        ("", None) => bail!("an attribute inside a default has no name"),
        ("", Some(key)) => key,
        (name, _) => name,
    };
    let wanted = Type::parse(&attr.r#type)?;
    match given.iter().find(|(key, _)| key == name) {
        None | Some((_, Value::Null)) if attr.required => {
            bail!("Missing required argument: The argument {name:?} is required, but no definition was found.")
        }
        None => Ok(Value::Null),
        Some((_, value)) => wanted.convert(value).ok_or_else(|| {
            anyhow!("Incorrect attribute value type: Inappropriate value for attribute {name:?}: {} required.", attr.r#type)
        }),
    }
}

impl Type {
    /// Reads a type as HCL writes it: `string`, `list(string)`.
    fn parse(text: &str) -> Result<Self> {
        Type::of(&Expression::from_str(text).with_context(|| format!("type {text:?}"))?)
    }

    fn of(expression: &Expression) -> Result<Self> {
        let inner = |call: &FuncCall| -> Result<Box<Type>> {
            let argument = call
                .args
                .first()
                .context("a collection needs its element's type")?;
            Ok(Box::new(Type::of(argument)?))
        };
        match expression {
            Expression::Variable(name) => match name.as_str() {
                "any" => Ok(Type::Any),
                "bool" => Ok(Type::Bool),
                "number" => Ok(Type::Number),
                "string" => Ok(Type::String),
                other => bail!("type {other:?}"),
            },
            Expression::FuncCall(call) => match call.name.name.as_str() {
                "list" | "set" => Ok(Type::List(inner(call)?)),
                "map" => Ok(Type::Map(inner(call)?)),
                other => bail!("type {other:?}"),
            },
            other => bail!("type {other}"),
        }
    }

    fn convert(&self, value: &Value) -> Option<Value> {
        match (self, value) {
            (_, Value::Null) => Some(Value::Null),
            (Type::Any, any) => Some(any.clone()),
            (Type::Bool, Value::Bool(_))
            | (Type::Number, Value::Number(_))
            | (Type::String, Value::String(_)) => Some(value.clone()),
            (Type::Bool, Value::String(text)) => match text.as_str() {
                "true" | "1" => Some(Value::Bool(true)),
                "false" | "0" => Some(Value::Bool(false)),
                _ => None,
            },
            (Type::Number, Value::String(text)) => number(text).map(Value::Number),
            (Type::String, Value::Bool(flag)) => Some(Value::String(flag.to_string())),
            (Type::String, Value::Number(number)) => Some(Value::String(number.to_string())),
            (Type::List(element), Value::Array(items)) => {
                let items = items.iter().map(|item| element.convert(item));
                Some(Value::Array(items.collect::<Option<_>>()?))
            }
            (Type::Map(element), Value::Object(entries)) => {
                let entries = entries
                    .iter()
                    .map(|(key, value)| Some((key.clone(), element.convert(value)?)));
                Some(Value::Object(entries.collect::<Option<_>>()?))
            }
            _ => None,
        }
    }
}

fn number(text: &str) -> Option<Number> {
    let whole = text.parse::<i64>().ok().map(Number::from);
    whole.or_else(|| Number::from_f64(text.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::nomad::proto::hclspec::{Default, Literal, Object};

    fn attr(name: &str, kind: &str, required: bool) -> Spec {
        let attr = Attr {
            name: name.into(),
            r#type: kind.into(),
            required,
        };
        Spec {
            block: Some(Block::Attr(attr)),
        }
    }

    fn default(primary: Spec, literal: &str) -> Spec {
        let literal = Spec {
            block: Some(Block::Literal(Literal {
                value: literal.into(),
            })),
        };
        let default = Default {
            primary: Some(Box::new(primary)),
            default: Some(Box::new(literal)),
        };
        Spec {
            block: Some(Block::Default(Box::new(default))),
        }
    }

    fn schema() -> Spec {
        let attributes = [
            ("command", attr("", "string", true)),
            ("args", attr("args", "list(string)", false)),
            ("score", attr("score", "number", false)),
            ("unveil", default(attr("unveil", "bool", false), "true")),
        ];
        let attributes = attributes.map(|(key, spec)| (key.to_owned(), spec)).into();
        Spec {
            block: Some(Block::Object(Object { attributes })),
        }
    }

    fn decoded(given: &[(&str, Value)]) -> Result<Vec<(String, Value)>> {
        let given: Vec<_> = given
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()))
            .collect();
        decode(&schema(), &given)
    }

    #[test]
    fn every_key_comes_sorted_with_its_default() {
        let values = decoded(&[("command", "/bin/true".into())]).unwrap();
        let keys: Vec<_> = values.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["args", "command", "score", "unveil"]);
        assert_eq!(values[0].1, Value::Null);
        assert_eq!(values[3].1, Value::Bool(true));
    }

    #[test]
    fn values_are_converted_as_hcl_does() {
        let given = [
            ("command", Value::from(5)),
            ("args", Value::from(vec![Value::from(1), Value::from(true)])),
            ("score", Value::from("-7")),
            ("unveil", Value::from("false")),
        ];
        let values = decoded(&given).unwrap();
        assert_eq!(values[0].1, Value::from(vec!["1", "true"]));
        assert_eq!(values[1].1, Value::from("5"));
        assert_eq!(values[2].1, Value::from(-7));
        assert_eq!(values[3].1, Value::from(false));
    }

    #[test]
    fn mistakes_are_refused_before_the_driver_sees_them() {
        let refused = |given: &[(&str, Value)]| format!("{:#}", decoded(given).unwrap_err());
        assert!(refused(&[]).contains("\"command\" is required"));
        let command = ("command", Value::from("x"));
        assert!(
            refused(&[command.clone(), ("comand", "y".into())])
                .contains("No argument or block type is named \"comand\"")
        );
        assert!(
            refused(&[command.clone(), ("args", "-x".into())]).contains("list(string) required")
        );
        assert!(refused(&[command, ("score", "many".into())]).contains("number required"));
    }

    #[test]
    fn a_default_must_name_its_attribute() {
        let attributes = [("a".to_owned(), default(attr("", "bool", false), "true"))].into();
        let spec = Spec {
            block: Some(Block::Object(Object { attributes })),
        };
        assert!(format!("{:#}", decode(&spec, &[]).unwrap_err()).contains("no name"));
    }
}
