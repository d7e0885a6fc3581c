//! The plugin's stderr, read as strictly as go-plugin needs it: one JSON object a line. A line that go-plugin would show raw,
//! or that would panic Nomad, is a violation.

use serde_json::{Map, Value};

use super::Violations;

/// go-plugin reads lines of up to 64 KiB; a longer one is cut into raw pieces.
const LINE_MAX_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// One line of the plugin's log.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub level: Level,
    pub message: String,
    pub module: Option<String>,
    /// What Nomad appends as key=value.
    pub fields: Map<String, Value>,
}

impl Line {
    /// Parses a line, or says what go-plugin would do with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        if line.len() > LINE_MAX_BYTES {
            return Err(format!(
                "a log line of {} bytes is longer than go-plugin reads",
                line.len()
            ));
        }
        let Ok(Value::Object(mut fields)) = serde_json::from_str(line) else {
            return Err(format!(
                "not a JSON object, so Nomad shows it raw at DEBUG: {line}"
            ));
        };
        let mut text = |key: &str| match fields.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!(
                "{key} is not a string but {other}, which panics Nomad: {line}"
            )),
        };
        let message = text("@message")?.ok_or_else(|| format!("no @message: {line}"))?;
        let level = text("@level")?.ok_or_else(|| format!("no @level: {line}"))?;
        let level = match level.to_ascii_lowercase().as_str() {
            "trace" => Level::Trace,
            "debug" => Level::Debug,
            "info" => Level::Info,
            "warn" => Level::Warn,
            "error" => Level::Error,
            other => return Err(format!("level {other:?} is not one of hclog's: {line}")),
        };
        if let Some(timestamp) = text("@timestamp")?
            && !is_timestamp(&timestamp)
        {
            return Err(format!(
                "timestamp {timestamp:?} is not in Go's form, so the line is shown raw: {line}"
            ));
        }
        let module = text("@module")?;
        text("@caller")?;
        Ok(Line {
            level,
            message,
            module,
            fields,
        })
    }
}

/// Parses a line and notes a violation if it cannot.
pub(super) fn read(line: &str, violations: &Violations) -> Option<Line> {
    Line::parse(line)
        .map_err(|why| violations.note(format!("stderr: {why}")))
        .ok()
}

/// `2006-01-02T15:04:05.000000` and `Z` or `+01:00`: exactly six digits of a second.
fn is_timestamp(text: &str) -> bool {
    let shape = |text: &str| -> String {
        text.chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect()
    };
    let Some((time, zone)) = text.split_at_checked(26) else {
        return false;
    };
    shape(time) == "0000-00-00T00:00:00.000000"
        && matches!(shape(zone).as_str(), "Z" | "+00:00" | "-00:00")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_of_hclog_is_read_with_its_fields() {
        let line = r#"{"@level":"info","@message":"up","@timestamp":"2026-11-24T03:46:00.000001Z","@module":"exec2","driver":"exec2"}"#;
        let line = Line::parse(line).unwrap();
        assert_eq!((line.level, line.message.as_str()), (Level::Info, "up"));
        assert_eq!(line.module.as_deref(), Some("exec2"));
        assert_eq!(line.fields["driver"], "exec2");
    }

    #[test]
    fn lines_that_go_plugin_would_mangle_are_refused() {
        for line in [
            "panic: oh no",
            r#"{"@level":"info"}"#,
            r#"{"@message":"x"}"#,
            r#"{"@level":"loud","@message":"x"}"#,
            r#"{"@level":"info","@message":7}"#,
            r#"{"@level":"info","@message":"x","@timestamp":"2026-11-24T03:46:00.1Z"}"#,
            r#"{"@level":"info","@message":"x","@timestamp":1}"#,
        ] {
            Line::parse(line).unwrap_err();
        }
        let long = format!(
            r#"{{"@level":"info","@message":"{}"}}"#,
            "x".repeat(LINE_MAX_BYTES)
        );
        Line::parse(&long).unwrap_err();
    }

    #[test]
    fn both_forms_of_a_zone_are_go_s() {
        assert!(is_timestamp("2026-11-24T03:46:00.000001+01:00"));
        assert!(is_timestamp("2026-11-24T03:46:00.000001Z"));
        assert!(!is_timestamp("2026-11-24T03:46:00.000001"));
        assert!(!is_timestamp("2026-11-24 03:46:00.000001Z"));
    }
}
