//! A `config` block, of a task or of the plugin, through the very table and decoder that Nomad's request goes through.

use super::hcl::as_string;
use super::{JobError, Setting, Value};
use crate::config::decode::ConfigError;
use crate::config::plugin::PluginConfig;
use crate::config::schema::{self, Key, Kind};
use crate::config::task::TaskOptions;

/// Converts the values as Nomad does by the driver's schema, and decodes them. `line` is the task's.
pub fn options(settings: &[(String, Setting)], line: usize) -> Result<TaskOptions, JobError> {
    block(settings, line, schema::TASK, TaskOptions::decode)
}

/// The operator's own block. `line` is the plugin block's.
pub fn plugin(settings: &[(String, Setting)], line: usize) -> Result<PluginConfig, JobError> {
    block(settings, line, schema::PLUGIN, PluginConfig::decode)
}

fn block<T>(
    settings: &[(String, Setting)],
    line: usize,
    table: &[Key],
    decode: fn(&[u8]) -> Result<T, ConfigError>,
) -> Result<T, JobError> {
    let mut block = ::hcl::Map::new();
    for (name, setting) in settings {
        let key = table.iter().find(|key| key.name == name.as_str());
        let key = key.ok_or_else(|| {
            let known: Vec<_> = table.iter().map(|key| key.name).collect();
            let message = format!(
                "config: `{name}` is no key of exec2, which knows {}",
                known.join(", ")
            );
            JobError::new(setting.line, message)
        })?;
        block.insert(name.clone(), convert(key.kind, setting.value.clone()));
    }
    let bytes = rmp_serde::to_vec_named(&Value::Object(block))
        .map_err(|error| JobError::new(line, format!("config: {error}")))?;
    decode(&bytes).map_err(|error| {
        let sentence = error.to_string();
        let line = line_of(settings, &sentence).unwrap_or(line);
        JobError::new(line, format!("config: {sentence}"))
    })
}

/// The line of the setting whose name a sentence begins with.
pub fn line_of(settings: &[(String, Setting)], sentence: &str) -> Option<usize> {
    let about = |(name, _): &&(String, Setting)| {
        let rest = sentence.strip_prefix(name.as_str());
        rest.is_some_and(|rest| rest.starts_with([' ', ':']))
    };
    settings.iter().find(about).map(|(_, it)| it.line)
}

/// HCL takes `8080` for a text and `"8080"` for a number. What cannot be converted is the decoder's to refuse.
fn convert(kind: Kind, value: Value) -> Value {
    match (kind, value) {
        (Kind::Text { .. }, value) => text(value),
        (Kind::List { .. }, Value::Array(items)) => items.into_iter().map(text).collect(),
        (Kind::Integer { .. }, Value::String(digits)) => digits
            .parse::<i64>()
            .map_or_else(|_| Value::from(digits), Value::from),
        (Kind::Bool, Value::String(word)) => match word.as_str() {
            "true" => Value::from(true),
            "false" => Value::from(false),
            _ => Value::from(word),
        },
        (_, value) => value,
    }
}

fn text(value: Value) -> Value {
    as_string(value.clone()).map_or(value, Value::from)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(entries: &[(&str, Value)]) -> Result<TaskOptions, String> {
        let settings: Vec<_> = entries
            .iter()
            .zip(10..)
            .map(|((name, value), line)| {
                let value = value.clone();
                ((*name).to_owned(), Setting { value, line })
            })
            .collect();
        options(&settings, 3).map_err(|error| error.to_string())
    }

    #[test]
    fn values_are_converted_as_nomad_does() {
        let args = Value::from(vec![
            Value::from("-p"),
            Value::from(8080),
            Value::from(true),
        ]);
        let given = [
            ("command", Value::from("serve")),
            ("args", args),
            ("oom_score_adj", Value::from("10")),
        ];
        let read = read(&given).unwrap();
        assert_eq!(read.command, "serve");
        assert_eq!(read.args, ["-p", "8080", "true"]);
        assert_eq!(read.oom_score_adj, 10);
    }

    #[test]
    fn a_mistake_is_told_with_its_line() {
        let command = ("command", Value::from("x"));
        assert_eq!(
            read(&[]).unwrap_err(),
            "line 3: config: command is not set; give it a value"
        );
        let error = read(&[command.clone(), ("args", Value::from("y"))]).unwrap_err();
        assert!(
            error.starts_with("line 11: config: args = \"y\" is not a list"),
            "{error}"
        );
        let error = read(&[command, ("unveill", Value::from("y"))]).unwrap_err();
        assert!(
            error.starts_with("line 11: config: `unveill` is no key of exec2"),
            "{error}"
        );
    }
}
