//! A driver's configuration in MessagePack, byte for byte as Nomad's encoders write it. Pure.

use hcl::{Number, Value};
use rmp::encode::{
    write_array_len, write_bool, write_f64, write_map_len, write_nil, write_sint, write_str,
};

/// Whose encoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Profile {
    /// Nomad itself: every key of the schema, sorted, null for what is unset.
    #[default]
    Nomad,
    /// The test harness for drivers written in Go: the keys that were given, in the order of the struct, and strings in
    /// MessagePack's old form, which knows no str8.
    GoHarness,
}

/// A map of values.
pub fn encode(values: &[(String, Value)], profile: Profile) -> Vec<u8> {
    let mut out = Vec::new();
    let written = match profile {
        Profile::Nomad => values.to_vec(),
        Profile::GoHarness => values
            .iter()
            .filter(|(_, value)| *value != Value::Null)
            .cloned()
            .collect(),
    };
    map(
        &mut out,
        written.iter().map(|(key, value)| (key, value)),
        profile,
    );
    out
}

// Writing into a Vec cannot fail, so the results below say nothing.

fn map<'a>(
    out: &mut Vec<u8>,
    entries: impl ExactSizeIterator<Item = (&'a String, &'a Value)>,
    profile: Profile,
) {
    let _ = write_map_len(out, entries.len() as u32);
    for (key, value) in entries {
        string(out, key, profile);
        any(out, value, profile);
    }
}

fn any(out: &mut Vec<u8>, value: &Value, profile: Profile) {
    match value {
        Value::Null => {
            let _ = write_nil(out);
        }
        Value::Bool(flag) => {
            let _ = write_bool(out, *flag);
        }
        Value::Number(value) => number(out, value, profile),
        Value::String(text) => string(out, text, profile),
        Value::Array(items) => {
            let _ = write_array_len(out, items.len() as u32);
            items.iter().for_each(|item| any(out, item, profile));
        }
        Value::Object(entries) => map(out, entries.iter(), profile),
    }
}

/// A number that is exactly an i64 or exactly an f64 is written as one; any other, such as 0.1, as its decimal digits.
fn number(out: &mut Vec<u8>, value: &Number, profile: Profile) {
    if let Some(whole) = value.as_i64() {
        let _ = write_sint(out, whole);
        return;
    }
    let float = value.as_f64().unwrap_or_default();
    let digits = value.to_string();
    if float.fract() == 0.0 && float.abs() < 9.2e18 {
        let _ = write_sint(out, float as i64);
    } else if profile == Profile::GoHarness || is_exact(float, &digits) {
        let _ = write_f64(out, float);
    } else {
        string(out, &digits, profile);
    }
}

/// Whether these digits are the float's value and not only the nearest short text.
fn is_exact(float: f64, digits: &str) -> bool {
    // 1074 digits after the point hold any f64.
    let full = format!("{float:.1074}");
    full.trim_end_matches('0') == digits.trim_end_matches('0')
}

fn string(out: &mut Vec<u8>, text: &str, profile: Profile) {
    let len = text.len();
    match profile {
        Profile::Nomad => {
            let _ = write_str(out, text);
            return;
        }
        Profile::GoHarness if len < 32 => out.push(0xa0 | len as u8),
        Profile::GoHarness if len <= usize::from(u16::MAX) => {
            out.push(0xda);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        Profile::GoHarness => {
            out.push(0xdb);
            out.extend_from_slice(&(len as u32).to_be_bytes());
        }
    }
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(value: Value, profile: Profile) -> Vec<u8> {
        encode(&[("k".into(), value)], profile)[3..].to_vec()
    }

    #[test]
    fn the_default_plugin_configuration_is_nomad_s_byte_for_byte() {
        let values = [
            ("unveil_by_task".to_owned(), Value::from(false)),
            ("unveil_defaults".to_owned(), Value::from(true)),
            ("unveil_paths".to_owned(), Value::Null),
        ];
        let hex: String = encode(&values, Profile::Nomad)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "83ae756e7665696c5f62795f7461736bc2af756e7665696c5f64656661756c7473c3ac756e7665696c5f7061746873c0"
        );
    }

    #[test]
    fn numbers_take_the_form_that_holds_them_exactly() {
        assert_eq!(bytes(Value::from(5), Profile::Nomad), [5]);
        assert_eq!(bytes(Value::from(-1), Profile::Nomad), [0xff]);
        assert_eq!(bytes(Value::from(500), Profile::Nomad), [0xcd, 0x01, 0xf4]);
        assert_eq!(bytes(Value::from(0.5), Profile::Nomad)[0], 0xcb);
        assert_eq!(bytes(Value::from(2.0), Profile::Nomad), [2]);
        assert_eq!(
            bytes(Value::from(0.1), Profile::Nomad),
            [&[0xa3], b"0.1".as_slice()].concat()
        );
    }

    #[test]
    fn long_strings_differ_between_the_two_encoders() {
        let long = "x".repeat(40);
        assert_eq!(
            bytes(Value::from(long.as_str()), Profile::Nomad)[..2],
            [0xd9, 40]
        );
        assert_eq!(
            bytes(Value::from(long.as_str()), Profile::GoHarness)[..3],
            [0xda, 0, 40]
        );
    }

    #[test]
    fn only_nomad_writes_what_is_unset() {
        let values = [("args".to_owned(), Value::Null)];
        assert_eq!(encode(&values, Profile::GoHarness), [0x80]);
        assert_eq!(encode(&values, Profile::Nomad)[0], 0x81);
    }
}
