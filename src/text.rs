//! `UnitText`, the only form in which a job's words leave us: for systemd, the journal, logs and terminals. A newline in a
//! job's name would otherwise write directives into the unit file that systemd keeps for a transient unit.

use std::fmt;

/// Text of one line, at most `MAX_BYTES` long, in which whatever could act on a reader is shown instead: control
/// characters, line separators, bidirectional marks and the backslash appear as `<U+000A>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitText(String);

impl UnitText {
    pub const MAX_BYTES: usize = 200;

    pub fn new(text: &str) -> Self {
        Self(one_line(text, Self::MAX_BYTES))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UnitText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text of one line of that length at most, shown as [`UnitText`] is: a sentence for a terminal may be longer than a name.
pub fn one_line(text: &str, max_bytes: usize) -> String {
    let mut safe = String::new();
    for character in text.chars() {
        let shown = if is_active(character) {
            format!("<U+{:04X}>", u32::from(character))
        } else {
            character.to_string()
        };
        if safe.len() + shown.len() > max_bytes - '…'.len_utf8() {
            safe.push('…');
            break;
        }
        safe.push_str(&shown);
    }
    safe
}

fn is_active(character: char) -> bool {
    // A backslash at the end of a line joins it with the next one in a unit file.
    character.is_control()
        || matches!(character, '\\' | '\u{2028}' | '\u{2029}' | '\u{feff}')
        || matches!(character, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}')
}

/// FNV-1a: stable across releases, for names and checksums; it guards against accidents, not against intent.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_newline_is_shown_not_obeyed() {
        assert_eq!(
            UnitText::new("web\n[Unit]\nOnSuccess=x\\").as_str(),
            "web<U+000A>[Unit]<U+000A>OnSuccess=x<U+005C>"
        );
    }

    #[test]
    fn ordinary_text_in_any_script_is_left_alone() {
        assert_eq!(
            UnitText::new("Büro 東京 %n $HOME").as_str(),
            "Büro 東京 %n $HOME"
        );
    }

    proptest! {
        #[test]
        fn no_text_is_longer_than_a_line_or_holds_an_active_character(text in any::<String>()) {
            let safe = UnitText::new(&text);
            prop_assert!(safe.as_str().len() <= UnitText::MAX_BYTES);
            prop_assert!(!safe.as_str().chars().any(is_active));
        }
    }
}
