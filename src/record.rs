//! The exit record: how a task ended, kept in a root-only file under /run that any later plugin can read. The one frozen
//! contract between supervisor and plugin; a release that changes what another one wrote changes `MAGIC`.
//!
//! The file is one page, allocated by the plugin before the helper starts and mapped by the supervisor before it forks.
//! The record is written by plain stores, so neither a full disk, nor an rlimit, nor memory.max can suppress it.

use std::ops::Range;

use crate::text::fnv1a;

/// Size of the file, one page.
pub const SIZE_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"exec2rc1";
const BODY_BYTES: usize = 48;
/// Behind the magic number and the checksum.
const BODY: Range<usize> = 16..16 + BODY_BYTES;

/// How the main process ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 0 if killed by a signal.
    pub code: i32,
    /// Signal number, 0 if it exited.
    pub signal: i32,
    /// Processes of the scope that the kernel's OOM killer ended (memory.events: oom_kill).
    pub oom_kills: u64,
    /// Highest memory use of the scope (memory.peak, kernel 5.19), 0 if unknown.
    pub memory_peak_bytes: u64,
    /// Its limit at the end (memory.max), 0 if it had none.
    pub memory_max_bytes: u64,
    /// CLOCK_REALTIME when the main process was reaped.
    pub ended_unix_nanos: u64,
    /// The whole scope got SIGTERM from outside, as by `systemctl stop`.
    pub was_terminated: bool,
}

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// The main process has not been reaped: it runs, or its supervisor died.
    Open,
    Exited(Exit),
    /// Not a record, or one whose writer died in the middle.
    Torn,
}

/// Bytes of a record nobody has written to yet.
pub fn open() -> [u8; SIZE_BYTES] {
    let mut page = [0; SIZE_BYTES];
    page[..8].copy_from_slice(&MAGIC);
    page
}

/// Writes the exit into the page: the body first, its checksum last, so that a torn one is told from a whole one.
pub fn write(page: &mut [u8], exit: &Exit) {
    let mut body = [0; BODY_BYTES];
    body[..4].copy_from_slice(&exit.code.to_le_bytes());
    body[4..8].copy_from_slice(&exit.signal.to_le_bytes());
    body[8..16].copy_from_slice(&exit.oom_kills.to_le_bytes());
    body[16..24].copy_from_slice(&exit.memory_peak_bytes.to_le_bytes());
    body[24..32].copy_from_slice(&exit.memory_max_bytes.to_le_bytes());
    body[32..40].copy_from_slice(&exit.ended_unix_nanos.to_le_bytes());
    body[40] = exit.was_terminated.into();
    page[BODY].copy_from_slice(&body);
    // The compiler may not move the checksum before the body: a reader takes a matching checksum for a whole record.
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    page[8..16].copy_from_slice(&checksum(&body).to_le_bytes());
}

/// Reads the bytes of a record's file.
pub fn read(page: &[u8]) -> Record {
    let (Some(magic), Some(sum), Some(body)) = (page.get(..8), page.get(8..16), page.get(BODY))
    else {
        return Record::Torn;
    };
    let sum = u64::from_le_bytes(array(sum));
    if magic != MAGIC {
        return Record::Torn;
    }
    if sum == 0 {
        return if body.iter().all(|byte| *byte == 0) {
            Record::Open
        } else {
            Record::Torn
        };
    }
    if sum != checksum(body) {
        return Record::Torn;
    }
    Record::Exited(Exit {
        code: i32::from_le_bytes(array(&body[..4])),
        signal: i32::from_le_bytes(array(&body[4..8])),
        oom_kills: u64::from_le_bytes(array(&body[8..16])),
        memory_peak_bytes: u64::from_le_bytes(array(&body[16..24])),
        memory_max_bytes: u64::from_le_bytes(array(&body[24..32])),
        ended_unix_nanos: u64::from_le_bytes(array(&body[32..40])),
        was_terminated: body[40] != 0,
    })
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

/// Never 0, which is the checksum of an open record. It guards against a half-written page; only root can write the file.
fn checksum(body: &[u8]) -> u64 {
    fnv1a(body).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        code: 7,
        signal: 0,
        oom_kills: 1,
        memory_peak_bytes: 4096,
        memory_max_bytes: 8192,
        was_terminated: true,
        ended_unix_nanos: 1_700_000_000_000_000_000,
    };

    #[test]
    fn a_record_reads_back_as_written() {
        let mut page = open();
        assert_eq!(read(&page), Record::Open);
        write(&mut page, &EXIT);
        assert_eq!(read(&page), Record::Exited(EXIT));
    }

    #[test]
    fn a_record_with_any_byte_changed_is_torn() {
        let mut page = open();
        write(&mut page, &EXIT);
        for index in 0..BODY.end {
            let mut changed = page;
            changed[index] ^= 0x55;
            assert_eq!(read(&changed), Record::Torn, "byte {index}");
        }
    }

    #[test]
    fn a_body_without_its_checksum_is_torn() {
        let mut page = open();
        write(&mut page, &EXIT);
        page[8..16].fill(0);
        assert_eq!(read(&page), Record::Torn);
    }

    #[test]
    fn an_empty_or_short_file_is_torn() {
        assert_eq!(read(&[]), Record::Torn);
        assert_eq!(read(&[0; 40]), Record::Torn);
    }
}
