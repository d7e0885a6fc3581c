//! What a traced process means by a path, seen from outside: its memory, its root and its descriptors, through /proc.

use std::ffi::OsString;
use std::fs;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};

use super::calls::Named;

/// PATH_MAX, and what the kernel reads of a script's first line.
const PATH_BYTES: usize = 4_096;
const FIRST_LINE_BYTES: usize = 256;
/// An interpreter may be a script again, to this depth.
const MOST_INTERPRETERS: usize = 5;
const PAGE_BYTES: u64 = 4_096;
const DELETED: &[u8] = b" (deleted)";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    Followed,
    /// A link as the last part is meant itself.
    Taken,
}

/// A stopped thread.
#[derive(Debug, Clone, Copy)]
pub struct Thread(pub i32);

impl Thread {
    /// Bytes of its memory, as many as are there.
    pub fn bytes(self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let remote = [RemoteIoVec {
            base: usize::try_from(address).unwrap_or(0),
            len: count,
        }];
        let read = process_vm_readv(
            Pid::from_raw(self.0),
            &mut [IoSliceMut::new(&mut bytes)],
            &remote,
        );
        bytes.truncate(read.unwrap_or(0));
        bytes
    }

    /// A string of its memory, up to its NUL. The page behind it may not be there.
    fn text(self, mut address: u64) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < PATH_BYTES {
            let count = PAGE_BYTES - address % PAGE_BYTES;
            let more = self.bytes(address, count as usize);
            if more.is_empty() {
                break;
            }
            match more.iter().position(|byte| *byte == 0) {
                Some(end) => {
                    text.extend(&more[..end]);
                    break;
                }
                None => text.extend(&more),
            }
            address += count;
        }
        text
    }

    /// Its number in the innermost PID namespace, which is that of the /proc it sees.
    pub fn own_number(self) -> Option<String> {
        let status = fs::read_to_string(self.entry("status")).ok()?;
        let numbers = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        numbers.split_whitespace().last().map(str::to_owned)
    }

    pub fn entry(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0))
    }

    /// What one of its descriptors is open to, if that is a file with a path.
    pub fn descriptor(self, number: i32) -> Option<PathBuf> {
        file(fs::read_link(self.entry(&format!("fd/{number}"))).ok()?)
    }

    fn base(self, dir: Option<u64>) -> Option<PathBuf> {
        // The kernel takes the low half.
        match dir.map(|dir| dir as i32) {
            None | Some(libc::AT_FDCWD) => fs::read_link(self.entry("cwd")).ok(),
            Some(number) => self.descriptor(number),
        }
    }

    /// The path that a call names, from the root on, as it is written. No path, or an empty one, is the directory's descriptor itself.
    pub fn named(self, named: Named, arguments: &[u64; 6]) -> Option<PathBuf> {
        let dir = named.dir.map(|at| arguments[at]);
        let address = arguments[named.path];
        let text = match address {
            0 => Vec::new(),
            address => self.text(address),
        };
        let text = PathBuf::from(OsString::from_vec(text));
        if text.as_os_str().is_empty() && dir.is_none() {
            return None;
        }
        self.absolute(dir, &text)
    }

    pub fn absolute(self, dir: Option<u64>, text: &Path) -> Option<PathBuf> {
        if text.is_absolute() {
            return Some(text.to_owned());
        }
        let base = self.base(dir)?;
        Some(if text.as_os_str().is_empty() {
            base
        } else {
            base.join(text)
        })
    }

    fn open(self, path: &Path, last: Last) -> Option<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(self.entry("root"), flags, Mode::empty()).ok()?;
        let flags = match last {
            Last::Followed => flags,
            Last::Taken => flags | OFlags::NOFOLLOW,
        };
        openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()
    }

    /// The path without links of what is there.
    pub fn resolve(self, path: &Path, last: Last) -> Option<PathBuf> {
        real(&self.open(path, last)?)
    }

    /// The directory without links, and the name in it, of what may not be there.
    pub fn resolve_entry(self, path: &Path) -> Option<PathBuf> {
        let dir = self.resolve(path.parent()?, Last::Followed)?;
        Some(dir.join(path.file_name()?))
    }

    /// A program file and, if that is a script, its interpreters.
    pub fn programs(self, path: &Path) -> Vec<PathBuf> {
        let mut programs = Vec::new();
        let mut next = Some(path.to_owned());
        while let Some(path) = next.take().filter(|_| programs.len() <= MOST_INTERPRETERS) {
            let Some(object) = self.open(&path, Last::Followed) else {
                break;
            };
            programs.extend(real(&object));
            next = interpreter(&object).and_then(|path| self.absolute(None, &path));
        }
        programs
    }

    /// The files of which a process that has just executed one is made: the program, and its loader.
    pub fn mapped(self) -> Vec<PathBuf> {
        let maps = fs::read(self.entry("maps")).unwrap_or_default();
        // address, permissions, offset, device, inode, path
        let paths = maps.split(|byte| *byte == b'\n').filter_map(|line| {
            let at = line.iter().position(|byte| *byte == b'/')?;
            file(PathBuf::from(OsString::from_vec(line[at..].to_vec())))
        });
        let mut paths: Vec<_> = paths.collect();
        paths.dedup();
        paths
    }
}

/// What `#!` in the first line names.
fn interpreter(object: &OwnedFd) -> Option<PathBuf> {
    // To open another kind may do something, or wait, in the tracer.
    let mode = rustix::fs::fstat(object).ok()?.st_mode;
    (FileType::from_raw_mode(mode) == FileType::RegularFile).then_some(())?;
    let mut line = Vec::new();
    fs::File::open(format!("/proc/self/fd/{}", object.as_raw_fd()))
        .ok()?
        .take(FIRST_LINE_BYTES as u64)
        .read_to_end(&mut line)
        .ok()?;
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words = line
        .strip_prefix(b"#!")?
        .split(|byte| matches!(byte, b' ' | b'\t'));
    let word = words.find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsString::from_vec(word.to_vec())))
}

fn real(object: &OwnedFd) -> Option<PathBuf> {
    file(fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd())).ok()?)
}

/// The path of a file, as the kernel shows it; pipes, sockets and memory have none.
fn file(shown: PathBuf) -> Option<PathBuf> {
    let bytes = shown.as_os_str().as_bytes();
    if !bytes.starts_with(b"/") || bytes.starts_with(b"/memfd:") {
        return None;
    }
    match bytes.strip_suffix(DELETED) {
        Some(path) => Some(PathBuf::from(OsString::from_vec(path.to_vec()))),
        None => Some(shown),
    }
}
