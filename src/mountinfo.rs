//! The kernel's table of mounts, /proc/PID/mountinfo (proc_pid_mountinfo(5)), read and no more.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// `ext4`, `tmpfs`, `nsfs`, …
    pub filesystem: String,
}

/// All mounts of a table, in its order: what was mounted later comes later. Lines that are none are skipped.
pub fn parse(table: &str) -> impl DoubleEndedIterator<Item = Mount> {
    table.lines().filter_map(|line| {
        // id parent major:minor root point options … - filesystem source options
        let (before, after) = line.split_once(" - ")?;
        Some(Mount {
            point: unescape(before.split(' ').nth(4)?),
            filesystem: after.split(' ').next()?.to_owned(),
        })
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [byte, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', digits @ ..] if digits.len() >= 3 => std::str::from_utf8(&digits[..3]).ok(),
            _ => None,
        };
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_where_and_what() {
        let table = "36 35 98:0 /mnt1 /mnt2\\040x rw,noatime shared:1 master:2 - ext3 /dev/root rw\n\
                     no line\n37 36 0:4 net:[1] /run/netns/a rw - nsfs nsfs rw\n";
        let mounts: Vec<Mount> = parse(table).collect();
        let expected = [("/mnt2 x", "ext3"), ("/run/netns/a", "nsfs")];
        assert_eq!(
            mounts,
            expected.map(|(point, filesystem)| Mount {
                point: point.into(),
                filesystem: filesystem.into(),
            })
        );
    }

    #[test]
    fn what_is_no_escape_stays_as_it_is() {
        for (field, path) in [
            ("/a\\134b", "/a\\b"),
            ("/a\\", "/a\\"),
            ("/a\\9x", "/a\\9x"),
            ("/a\\011\\012", "/a\t\n"),
        ] {
            assert_eq!(unescape(field), PathBuf::from(path), "{field}");
        }
    }
}
