//! What a job author writes in a task's `config` block.

use serde::Deserialize;

use super::decode::{self, ConfigError};
use super::schema;

/// One field per row of `schema::TASK`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TaskOptions {
    pub command: String,
    pub args: Vec<String>,
    pub unveil: Vec<String>,
    pub oom_score_adj: i16,
    pub work_dir: String,
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
}

impl TaskOptions {
    pub fn decode(msgpack: &[u8]) -> Result<Self, ConfigError> {
        decode::block(msgpack, schema::TASK)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// `command = "/bin/sleep"`, `args = ["10"]`, as Nomad sends it: every key, sorted.
    const SLEEP: &[u8] =
        b"\x84\xa4args\x91\xa210\xa7command\xaa/bin/sleep\xadoom_score_adj\xc0\xa6unveil\xc0";

    /// A block with a command and one more key, whose value is `value`.
    fn with(key: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x82\xa7command\xa1x".to_vec();
        bytes.push(0xa0 | u8::try_from(key.len()).unwrap());
        bytes.extend(key.as_bytes());
        bytes.extend(value);
        bytes
    }

    fn error(bytes: &[u8]) -> String {
        TaskOptions::decode(bytes).unwrap_err().to_string()
    }

    fn array(count: u32, element: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0xdd];
        bytes.extend(count.to_be_bytes());
        bytes.extend(element.repeat(count as usize));
        bytes
    }

    #[test]
    fn a_task_as_nomad_sends_it_is_read() {
        let options = TaskOptions::decode(SLEEP).unwrap();
        assert_eq!(options.command, "/bin/sleep");
        assert_eq!(options.args, ["10"]);
        assert!(options.unveil.is_empty());
        assert_eq!(options.oom_score_adj, 0);
    }

    #[test]
    fn integers_of_any_width_and_sign_are_read() {
        let widths: [&[u8]; 6] = [
            b"\x64",
            b"\xcc\x64",
            b"\xcd\0\x64",
            b"\xce\0\0\0\x64",
            b"\xd0\x64",
            b"\xd3\0\0\0\0\0\0\0\x64",
        ];
        for value in widths {
            let options = TaskOptions::decode(&with("oom_score_adj", value)).unwrap();
            assert_eq!(options.oom_score_adj, 100, "{value:x?}");
        }
    }

    #[test]
    fn old_raw_strings_and_any_order_are_read() {
        let bytes = b"\x82\xda\0\x04args\xdc\0\x01\xdb\0\0\0\x01a\xda\0\x07command\xda\0\x01x";
        let options = TaskOptions::decode(bytes).unwrap();
        assert_eq!((options.command.as_str(), options.args.len()), ("x", 1));
    }

    #[test]
    fn an_unknown_key_is_ignored_whatever_it_holds() {
        let values: [&[u8]; 4] = [b"\xc4\x01z", b"\xd4\x05z", b"\x81\x01\x02", b"\x91\xc0"];
        for value in values {
            assert!(
                TaskOptions::decode(&with("later", value)).is_ok(),
                "{value:x?}"
            );
        }
    }

    #[test]
    fn a_missing_command_is_named() {
        for bytes in [
            &b""[..],
            b"\x80",
            b"\xc0",
            b"\x81\xa7command\xc0",
            b"\x81\xa7command\xa0",
        ] {
            assert_eq!(error(bytes), "command is not set; give it a value");
        }
    }

    #[test]
    fn a_number_that_is_not_whole_is_named_with_its_key_and_bounds() {
        assert_eq!(
            error(&with("oom_score_adj", b"\xa30.1")),
            "oom_score_adj = \"0.1\" is not a whole number; give one from 0 to 1000"
        );
        assert_eq!(
            error(&with("oom_score_adj", b"\xcb\x3f\xf8\0\0\0\0\0\0")),
            "oom_score_adj = 1.5 is not a whole number; give one from 0 to 1000"
        );
        for (value, shown) in [(&b"\xd1\xfc\x18"[..], "-1000"), (b"\xcd\x03\xe9", "1001")] {
            assert_eq!(
                error(&with("oom_score_adj", value)),
                format!("oom_score_adj = {shown} is out of bounds; give one from 0 to 1000")
            );
        }
        assert!(
            error(&with(
                "oom_score_adj",
                b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff"
            ))
            .contains("18446744073709551615")
        );
    }

    #[test]
    fn a_value_of_another_type_is_named_with_its_key() {
        assert_eq!(
            error(&with("args", b"\xa1y")),
            "args = \"y\" is not a list; write it as a list of texts"
        );
        assert_eq!(
            error(&with("args", b"\x92\xa1y\xc0")),
            "args has an entry null, which is not a text; put it in quotes"
        );
        assert!(error(&with("unveil", b"\x81\xa1a\xa1b")).starts_with("unveil = a map"));
        assert!(error(&with("unveil", b"\xc4\x01z")).starts_with("unveil = bytes"));
    }

    #[test]
    fn a_nul_is_refused_and_a_newline_is_an_ordinary_character_of_an_argument() {
        assert_eq!(
            error(&with("args", b"\x91\xa3a\0b")),
            "args has \"a\\0b\", in which there is a NUL; no argument or path can hold one"
        );
        assert!(TaskOptions::decode(&with("args", b"\x91\xa3a\nb")).is_ok());
    }

    #[test]
    fn a_list_of_ten_thousand_entries_is_refused_with_its_length() {
        assert_eq!(
            error(&with("unveil", &array(10_000, b"\xa4r:/a"))),
            "unveil has 10000 entries; at most 1000 are taken"
        );
    }

    #[test]
    fn a_path_of_five_thousand_bytes_is_refused_without_repeating_it() {
        let mut value = b"\x91\xda\x13\x88".to_vec();
        value.extend([b'x'; 5_000]);
        let sentence = error(&with("unveil", &value));
        assert!(sentence.starts_with("unveil has \"xxx"), "{sentence}");
        assert!(sentence.ends_with("which is 5000 bytes long; at most 4103 are taken"));
        assert!(sentence.len() < 300);
    }

    #[test]
    fn a_deep_nest_and_an_empty_promise_of_length_are_refused() {
        let deep = [0x91].repeat(100_000);
        assert!(error(&with("later", &deep)).starts_with("the block cannot be read"));
        assert!(error(&with("args", &deep)).starts_with("the block cannot be read"));
        assert!(error(&with("args", b"\x91\x91\xa1x")).starts_with("args has an entry a list"));
        assert!(
            error(&with("args", b"\xdd\xff\xff\xff\xff")).starts_with("the block cannot be read")
        );
        assert!(error(b"\xdf\xff\xff\xff\xff").starts_with("the block cannot be read"));
    }

    #[test]
    fn a_block_beyond_its_size_is_refused_unread() {
        let bytes = vec![0; 5 << 20];
        assert_eq!(
            error(&bytes),
            "the block is 5242880 bytes long; at most 4194304 are read"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>()) {
            let _ = TaskOptions::decode(&bytes);
        }

        #[test]
        fn no_value_of_a_key_makes_it_panic_or_an_endless_sentence(value in any::<Vec<u8>>(), key in "args|unveil|command|oom_score_adj") {
            if let Err(error) = TaskOptions::decode(&with(&key, &value)) {
                prop_assert!(error.to_string().len() < 400);
            }
        }
    }
}
