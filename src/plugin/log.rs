//! Our log, as lines of JSON on stderr that the agent reads and files under its own. A line that breaks the agent's
//! format is lost or, worse, ends the agent, so this file alone decides what a line looks like.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::panic;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::journal::Journal;

/// The agent reads lines of at most 64 KiB.
const MAX_LINE_BYTES: usize = 60 << 10;
/// Of one value, unescaped: escaping makes at most six bytes of one.
const MAX_VALUE_BYTES: usize = 8 << 10;
const OUR_TARGET: &str = env!("CARGO_CRATE_NAME");

/// Sends everything traced in this crate, and panics, to stderr. Every level: the agent drops what it does not want. What is
/// about a task goes to the journal, too.
pub fn init() {
    let subscriber = tracing_subscriber::registry()
        .with(Journal::new().ok())
        .with(AgentLog);
    // A second call finds the first one's subscriber, which is just as good.
    let _ = tracing::subscriber::set_global_default(subscriber);
    panic::set_hook(Box::new(|panic| {
        let mut line = Line::new(&Level::ERROR, "exec2", SystemTime::now());
        line.message = format!("the driver plugin panicked: {panic}");
        write(line.finish());
    }));
}

struct AgentLog;

impl<S: Subscriber> Layer<S> for AgentLog {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_event() && room(metadata.target()).is_some()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let Some(room) = room(metadata.target()) else {
            return;
        };
        let mut line = Line::new(metadata.level(), &room, SystemTime::now());
        event.record(&mut line);
        write(line.finish());
    }
}

/// `exec2.<room>` for a target in this crate. Libraries below us log what nobody asked for.
fn room(target: &str) -> Option<String> {
    let path = target.strip_prefix(OUR_TARGET)?;
    match path.strip_prefix("::") {
        Some(path) => Some(format!("exec2.{}", path.split("::").next().unwrap_or(path))),
        None => path.is_empty().then(|| "exec2".into()),
    }
}

/// The agent may be gone while its tasks and we live on: nobody is left to tell that a line could not be written.
fn write(line: String) {
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// One line, as it grows.
struct Line {
    head: String,
    message: String,
    fields: String,
}

impl Line {
    fn new(level: &Level, module: &str, at: SystemTime) -> Self {
        let level = match *level {
            Level::TRACE => "trace",
            Level::DEBUG => "debug",
            Level::INFO => "info",
            Level::WARN => "warn",
            Level::ERROR => "error",
        };
        Self {
            head: format!(
                r#"{{"@level":"{level}","@module":{},"@timestamp":"{}","#,
                text(module),
                timestamp(at)
            ),
            message: String::new(),
            fields: String::new(),
        }
    }

    fn field(&mut self, name: &str, json: &str) {
        // A key with `@` is the agent's, and it asserts the type of its own.
        let entry = format!(r#","{}":{json}"#, name.replace(['@', '"', '\\'], "_"));
        if self.head.len() + self.fields.len() + entry.len() + 6 * MAX_VALUE_BYTES < MAX_LINE_BYTES
        {
            self.fields.push_str(&entry);
        }
    }

    fn finish(self) -> String {
        let message = text(&self.message);
        format!("{}\"@message\":{message}{}}}\n", self.head, self.fields)
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing into a String does not fail; a Debug that does leaves what it wrote.
            let _ = write!(self.message, "{value:?}");
        } else {
            self.field(field.name(), &text(&format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.field(field.name(), &text(value));
        }
    }
}

/// The text as a JSON string, cut.
fn text(value: &str) -> String {
    serde_json::Value::from(cut(value)).to_string()
}

/// As much of a value as a line has room for.
pub(super) fn cut(value: &str) -> &str {
    &value[..value.floor_char_boundary(MAX_VALUE_BYTES)]
}

/// `2026-08-01T12:34:56.123456Z`: with any other number of digits the agent takes the line for plain text.
fn timestamp(at: SystemTime) -> String {
    let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    let micros = since_epoch.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// Year, month and day of a day counted from 1970-01-01. Years run from March here, so that a leap day is the last of
/// its year; 146097 days make 400 years.
fn date(days_since_1970: u64) -> (u64, u64, u64) {
    let days = days_since_1970 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn line(message: &str, fields: &[(&str, &str)]) -> String {
        let mut line = Line::new(&Level::WARN, "exec2.task", UNIX_EPOCH);
        line.message = message.into();
        for (name, value) in fields {
            line.field(name, &text(value));
        }
        line.finish()
    }

    #[test]
    fn a_line_has_the_keys_the_agent_reads() {
        assert_eq!(
            line("hello \"you\"\n", &[("task", "web")]),
            concat!(
                r#"{"@level":"warn","@module":"exec2.task","@timestamp":"1970-01-01T00:00:00.000000Z","#,
                r#""@message":"hello \"you\"\n","task":"web"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn no_field_can_pass_for_one_of_the_agents_keys() {
        assert!(line("x", &[("@message", "y")]).contains(r#""_message":"y""#));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), shown);
        }
        let before_epoch = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(timestamp(before_epoch), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn libraries_are_not_heard() {
        assert_eq!(room("h2::codec"), None);
        assert_eq!(room("nomad_driver_exec2_other"), None);
        assert_eq!(room("nomad_driver_exec2").as_deref(), Some("exec2"));
        assert_eq!(
            room("nomad_driver_exec2::task::start").as_deref(),
            Some("exec2.task")
        );
    }

    proptest! {
        #[test]
        fn any_line_is_json_of_one_line_and_bounded(message in any::<String>(), value in any::<String>(), times in 1usize..20_000) {
            let long = value.repeat(times);
            let line = line(&message.repeat(times / 10 + 1), &[("a", &long), ("b", &long), ("c", "\0")]);
            prop_assert!(line.len() <= 64 << 10);
            prop_assert_eq!(line.find('\n'), Some(line.len() - 1));
            let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
            prop_assert!(parsed["@message"].is_string() && parsed["@level"].is_string() && parsed["@timestamp"].is_string());
        }
    }
}
