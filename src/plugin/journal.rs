//! Our log once more, as far as it is about a task's unit: in the journal, where `journalctl -u UNIT` finds it. Never waited for:
//! what the journal does not take at once is in the agent's log.
//!
//! An own layer over the native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), since that of tracing-journald sends every event
//! and does not let a field become OBJECT_SYSTEMD_UNIT.

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use super::log::cut;

const SOCKET: &str = "/run/systemd/journal/socket";
const IDENTIFIER: &str = env!("CARGO_PKG_NAME");
/// The journal drops what has a longer name.
const MAX_NAME_BYTES: usize = 64;
/// Of all fields: well below what a datagram can hold.
const MAX_FIELDS_BYTES: usize = 48 << 10;

/// Sends each event that has a field `unit` and is at least an info: the agent's log level is not known to us.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    /// Named at each message, so that a journald that was restarted is found again.
    path: PathBuf,
}

impl Journal {
    pub fn new() -> io::Result<Self> {
        Self::at(SOCKET.into())
    }

    fn at(path: PathBuf) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path })
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.fields().field("unit").is_none() {
            return;
        }
        let mut entry = Entry::default();
        event.record(&mut entry);
        let _ = self
            .socket
            .send_to(&entry.datagram(metadata.level()), &self.path);
    }
}

/// One event, as its fields come.
#[derive(Debug, Default)]
struct Entry {
    message: String,
    /// For a person, behind the message.
    pairs: String,
    unit: String,
    fields: Vec<u8>,
}

impl Entry {
    fn take(&mut self, name: &str, value: &str) {
        match name {
            "message" => self.message.push_str(value),
            "unit" => self.unit.push_str(value),
            _ => {
                let value = cut(value);
                if self.fields.len() + self.pairs.len() + value.len() > MAX_FIELDS_BYTES {
                    return;
                }
                put(&mut self.fields, &field_name(name), value);
                // Writing into a String does not fail.
                let _ = if value.contains(|c: char| c.is_whitespace() || c.is_control()) {
                    write!(self.pairs, " {name}={value:?}")
                } else {
                    write!(self.pairs, " {name}={value}")
                };
            }
        }
    }

    fn datagram(self, level: &Level) -> Vec<u8> {
        let priority = match *level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            Level::DEBUG | Level::TRACE => "7",
        };
        let message = format!("{}{}", cut(&self.message), self.pairs);
        let mut datagram = Vec::new();
        put(&mut datagram, "MESSAGE", &message);
        put(&mut datagram, "PRIORITY", priority);
        put(&mut datagram, "SYSLOG_IDENTIFIER", IDENTIFIER);
        put(&mut datagram, "OBJECT_SYSTEMD_UNIT", cut(&self.unit));
        datagram.extend(self.fields);
        datagram
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field.name(), &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field.name(), value);
    }
}

/// `EXEC2_ALLOC_ID` for `alloc_id`.
fn field_name(name: &str) -> String {
    let letter = |c: char| match c.to_ascii_uppercase() {
        c if c.is_ascii_alphanumeric() => c,
        _ => '_',
    };
    let letters = name.chars().map(letter);
    "EXEC2_"
        .chars()
        .chain(letters)
        .take(MAX_NAME_BYTES)
        .collect()
}

/// The value with its length before it: nothing in it can end it or begin another field.
fn put(datagram: &mut Vec<u8>, name: &str, value: &str) {
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&(value.len() as u64).to_le_bytes());
    datagram.extend_from_slice(value.as_bytes());
    datagram.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use tempfile::TempDir;
    use tracing::{debug, error, info, warn};
    use tracing_subscriber::layer::SubscriberExt;

    /// A journal of our own and what is told to it.
    fn told(events: impl FnOnce()) -> Vec<Vec<(String, String)>> {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        journald.set_nonblocking(true).unwrap();
        through(path, events);
        let mut buffer = vec![0; 256 << 10];
        std::iter::from_fn(|| journald.recv(&mut buffer).ok().map(|n| read(&buffer[..n]))).collect()
    }

    fn through(path: PathBuf, events: impl FnOnce()) {
        let subscriber = tracing_subscriber::registry().with(Journal::at(path).unwrap());
        tracing::subscriber::with_default(subscriber, events);
    }

    /// As journald reads the protocol's binary form.
    fn read(mut datagram: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while !datagram.is_empty() {
            let end = datagram.iter().position(|byte| *byte == b'\n').unwrap();
            let (name, rest) = (&datagram[..end], &datagram[end + 1..]);
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let (value, rest) = rest[8..].split_at(length);
            assert_eq!(rest[0], b'\n');
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            fields.push((text(name), text(value)));
            datagram = &rest[1..];
        }
        fields
    }

    fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
        pairs
            .map(|(name, value)| (name.into(), value.into()))
            .into()
    }

    #[test]
    fn an_event_about_a_unit_becomes_an_entry_of_that_unit() {
        let told = told(|| {
            info!(
                unit = "exec2-t.scope",
                alloc_id = "a",
                pid = 7,
                why = "it is so",
                "task started"
            )
        });
        let expected = pairs([
            ("MESSAGE", r#"task started alloc_id=a pid=7 why="it is so""#),
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "nomad-driver-exec2"),
            ("OBJECT_SYSTEMD_UNIT", "exec2-t.scope"),
            ("EXEC2_ALLOC_ID", "a"),
            ("EXEC2_PID", "7"),
            ("EXEC2_WHY", "it is so"),
        ]);
        assert_eq!(told, [expected]);
    }

    #[test]
    fn only_what_is_about_a_unit_and_no_detail_is_sent() {
        let told = told(|| {
            info!(task = "t", "no unit");
            debug!(unit = "u", "detail");
            warn!(unit = "u", "a warning");
            error!(unit = "u", "an error");
        });
        let priorities: Vec<_> = told.iter().map(|fields| fields[1].1.as_str()).collect();
        assert_eq!(priorities, ["4", "3"]);
    }

    #[test]
    fn a_journal_that_is_away_or_full_holds_nobody_up() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let many = || (0..1000).for_each(|_| info!(unit = "u", "x"));
        through(path.clone(), many);
        let _journald = UnixDatagram::bind(&path).unwrap();
        through(path, many);
    }

    #[test]
    fn a_journal_that_is_started_anew_is_found_again() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        through(path.clone(), || {
            for _ in 0..2 {
                let journald = UnixDatagram::bind(&path).unwrap();
                journald.set_nonblocking(true).unwrap();
                info!(unit = "u", "x");
                assert!(journald.recv(&mut [0; 1024]).unwrap() > 0);
                std::fs::remove_file(&path).unwrap();
            }
        });
    }

    proptest! {
        #[test]
        fn no_value_forges_a_field_or_outgrows_a_datagram(message in any::<String>(), value in any::<String>(), times in 1usize..20_000) {
            let long = format!("x\nPRIORITY=0\n{}", value.repeat(times));
            let told = told(|| info!(unit = "u", a = long, b = long, c = long, d = long, e = long, f = long, "{}", message.repeat(times / 10 + 1)));
            let names: Vec<_> = told[0].iter().map(|(name, _)| name.as_str()).collect();
            prop_assert_eq!(&names[..4], ["MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "OBJECT_SYSTEMD_UNIT"]);
            prop_assert!(names[4..].iter().all(|name| name.starts_with("EXEC2_")));
            prop_assert_eq!(&told[0][1].1, "6");
        }
    }
}
