//! The only way from an error of ours to a gRPC status.

use prost::Message;
use tonic::{Code, Status};

use crate::proto::google::rpc;
use crate::proto::hashicorp::nomad::plugins::shared::structs::RecoverableError;
use crate::task::types::DriverError;

/// Of a message: it travels in an HTTP/2 header and ends in `nomad alloc status`.
const MAX_MESSAGE_BYTES: usize = 2_000;
const RECOVERABLE_TYPE: &str =
    "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError";

pub fn status(error: DriverError) -> Status {
    let message = printable(&error.to_string());
    match error {
        DriverError::Transient(_) => recoverable(message),
        DriverError::Permanent(_) | DriverError::UnknownTask => permanent(message),
    }
}

/// UNKNOWN is what Go plugins send. UNAVAILABLE and CANCELLED would make Nomad believe that the plugin died.
pub fn permanent(message: impl AsRef<str>) -> Status {
    Status::new(Code::Unknown, printable(message.as_ref()))
}

fn recoverable(message: String) -> Status {
    let details = rpc::Status {
        code: Code::Unknown as i32,
        message: message.clone(),
        details: vec![prost_types::Any {
            type_url: RECOVERABLE_TYPE.into(),
            value: RecoverableError { recoverable: true }.encode_to_vec(),
        }],
    };
    Status::with_details(Code::Unknown, message, details.encode_to_vec().into())
}

/// One line of bounded length without characters that act on a terminal; a job's words may be in it.
fn printable(message: &str) -> String {
    let mut line = String::new();
    for character in message.chars() {
        let escaped = character.escape_debug();
        if matches!(character, '"' | '\'' | '\\') || escaped.len() == 1 {
            line.push(character);
        } else {
            line.extend(escaped);
        }
        if line.len() > MAX_MESSAGE_BYTES {
            line.push('…');
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_transient_error_asks_for_a_restart_and_a_permanent_one_does_not() {
        let status_of = |error| status(error);
        let transient = status_of(DriverError::Transient("no bus".into()));
        let details = rpc::Status::decode(transient.details()).unwrap();
        let any = &details.details[0];
        assert_eq!(any.type_url, RECOVERABLE_TYPE);
        assert!(
            RecoverableError::decode(&any.value[..])
                .unwrap()
                .recoverable
        );
        assert_eq!((details.code, details.message.as_str()), (2, "no bus"));
        assert!(
            status_of(DriverError::Permanent("no".into()))
                .details()
                .is_empty()
        );
    }

    #[test]
    fn no_error_of_ours_looks_like_a_dead_plugin() {
        for error in [
            DriverError::UnknownTask,
            DriverError::Permanent("x".into()),
            DriverError::Transient("x".into()),
        ] {
            assert_eq!(status(error).code(), Code::Unknown);
        }
    }

    #[test]
    fn a_message_is_one_line_of_bounded_length() {
        assert_eq!(
            permanent("job \"a\nb\u{1b}[2J\u{202e}\\n\"").message(),
            "job \"a\\nb\\u{1b}[2J\\u{202e}\\n\""
        );
        assert!(permanent("ü\n".repeat(100_000)).message().len() < MAX_MESSAGE_BYTES + 20);
    }
}
