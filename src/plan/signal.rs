//! Names of signals, as people write them: any case, with or without SIG, real-time ones relative to RTMIN or RTMAX, or a
//! number (signal(7)).

use thiserror::Error;

/// What Nomad means by no `kill_signal`.
pub const DEFAULT_KILL: i32 = 2;
pub const KILL: i32 = 9;
pub const CONT: i32 = 18;

/// glibc's bounds; the two below RTMIN are its own.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum SignalError {
    #[error("signal must be set")]
    Unset,
    #[error("signal {0:?} is unknown; name one of signal(7), as in SIGHUP, or give its number")]
    Unknown(String),
}

/// Names by number, from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

const ALIASES: [(&str, i32); 4] = [("IOT", 6), ("CLD", 17), ("POLL", 29), ("UNUSED", 31)];

pub fn parse(text: &str) -> Result<i32, SignalError> {
    if text.is_empty() {
        return Err(SignalError::Unset);
    }
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    by_number(name)
        .or_else(|| {
            NAMES
                .iter()
                .position(|known| *known == name)
                .and_then(|index| i32::try_from(index + 1).ok())
        })
        .or_else(|| {
            ALIASES
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, number)| *number)
        })
        .or_else(|| real_time(name))
        .ok_or_else(|| SignalError::Unknown(text.chars().take(40).collect()))
}

/// Its usual name, `SIGTERM` for 15.
pub fn name(number: i32) -> String {
    let index = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
    match index.and_then(|index| NAMES.get(index)) {
        Some(name) => format!("SIG{name}"),
        None if (RTMIN..=RTMAX).contains(&number) => format!("SIGRTMIN+{}", number - RTMIN),
        None => format!("signal {number}"),
    }
}

fn by_number(name: &str) -> Option<i32> {
    name.parse().ok().filter(|number| {
        (1..=RTMAX).contains(number) && name.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn real_time(name: &str) -> Option<i32> {
    let offset = |rest: &str, sign: char| -> Option<i32> {
        if rest.is_empty() {
            Some(0)
        } else {
            rest.strip_prefix(sign)?.parse().ok()
        }
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => RTMIN.checked_add(offset(rest, '+')?)?,
        (_, Some(rest)) => RTMAX.checked_sub(offset(rest, '-')?)?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_its_number() {
        for number in 1..=RTMAX {
            let known = number <= 31 || number >= RTMIN;
            assert_eq!(parse(&name(number)).ok(), known.then_some(number));
        }
        assert_eq!(name(9), "SIGKILL");
    }

    #[test]
    fn every_signal_has_its_number_in_any_spelling() {
        for (text, number) in [
            ("SIGHUP", 1),
            ("hup", 1),
            ("SigTerm", 15),
            ("9", 9),
            ("SYS", 31),
            ("iot", 6),
            ("SIGRTMIN", 34),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("WINCH", 28),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for (index, name) in NAMES.iter().enumerate() {
            assert_eq!(
                nix::sys::signal::Signal::try_from(i32::try_from(index).unwrap() + 1)
                    .unwrap()
                    .as_str(),
                format!("SIG{name}")
            );
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        assert_eq!(parse(""), Err(SignalError::Unset));
        for text in [
            "SIGFOO",
            "0",
            "65",
            "-9",
            "+9",
            "SIG",
            "RTMIN+31",
            "RTMIN-1",
            "RTMAX+1",
            "HUP\n\n x",
            "RTMIN+99999999999",
            "RTMIN+2147483647",
        ] {
            assert!(
                matches!(parse(text), Err(SignalError::Unknown(_))),
                "{text:?}"
            );
        }
    }
}
