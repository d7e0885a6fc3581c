//! What helper and plugin say to each other, both ends: one message per packet over the control socket, and why a start
//! failed as the sentence that `nomad alloc status` shows. It decides nothing.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::plan::steps::Step;

/// First byte of a packet. `EXEC_FAILED` is sent by a clone that may not allocate: the errno follows, little-endian.
const PARKED: u8 = b'P';
const STARTED: u8 = b'S';
const FAILED: u8 = b'F';
pub(super) const EXEC_FAILED: u8 = b'E';
/// Sent where the heap cannot be relied upon, too: the signal follows.
const KILLED: u8 = b'K';
const HELD: u8 = b'H';
const ORDER: u8 = b'O';
const GO: u8 = b'G';
const COMMIT: u8 = b'C';
const ENDED: u8 = b'X';

const PACKET_BYTES: usize = 8 * 1024;
/// A subject or note is cut here, so that a failure always fits into a packet.
const TEXT_BYTES: usize = 2048;
const MAX_DEPTH: usize = 16;
/// Descriptors in one packet; the kernel takes 253.
const DESCRIPTORS: usize = 250;

/// From the helper to the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Everything that charges nothing to the task is done: the helper waits for `release`.
    Parked,
    /// The command was executed. A pidfd of the main process comes with it; with a session's, its pid on the host, and its
    /// terminal, if it has one.
    Started(Option<i32>),
    /// The command was not executed, and nothing of the task is left.
    Failed(Failure),
    /// A session's command ended, and whatever it started was killed. A wait(2) status.
    Ended(i32),
}

/// Why a start failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub step: Step,
    /// 0 if the note says it all.
    pub errno: i32,
    /// The path, rule (`r:/srv/x`) or command at fault.
    pub subject: Option<String>,
    /// Cause or remedy.
    pub note: Option<String>,
}

impl Failure {
    pub fn new(step: Step, errno: i32) -> Failure {
        Failure {
            step,
            errno,
            subject: None,
            note: None,
        }
    }

    pub fn on(self, subject: impl Into<String>) -> Failure {
        Failure {
            subject: Some(cut(subject.into())),
            ..self
        }
    }

    pub fn note(self, note: impl Into<String>) -> Failure {
        Failure {
            note: Some(cut(note.into())),
            ..self
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.step.subject())?;
        match &self.subject {
            Some(subject) if self.step == Step::Exec => write!(f, " {subject:?}")?,
            Some(subject) => write!(f, " {subject}")?,
            None => {}
        }
        match (self.errno, &self.note) {
            (0, Some(note)) => write!(f, ": {note}"),
            (0, None) => f.write_str(": failed"),
            (errno, Some(note)) => write!(f, ": {} ({note})", description(errno)),
            (errno, None) => write!(f, ": {}", description(errno)),
        }
    }
}

impl std::error::Error for Failure {}

/// The kernel's words for an errno, as the middle of a sentence.
fn description(errno: i32) -> Cow<'static, str> {
    let text = Errno::from_raw(errno).desc();
    let mut characters = text.chars();
    match (characters.next(), characters.next()) {
        (Some(first), Some(second)) if second.is_lowercase() => {
            Cow::Owned(first.to_lowercase().chain(text.chars().skip(1)).collect())
        }
        _ => Cow::Borrowed(text),
    }
}

fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES {
        let end = text.floor_char_boundary(TEXT_BYTES);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Names the step at which a call failed.
pub(super) trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
    fn at_path(self, step: Step, path: impl AsRef<Path>) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|error| failure(step, error.into()))
    }

    fn at_path(self, step: Step, path: impl AsRef<Path>) -> Result<T, Failure> {
        self.map_err(|error| failure(step, error.into()).on(path.as_ref().display().to_string()))
    }
}

fn failure(step: Step, error: io::Error) -> Failure {
    match error.raw_os_error() {
        Some(errno) => Failure::new(step, errno),
        None => Failure::new(step, 0).note(error.to_string()),
    }
}

/// Plugin: reads the helper's next message, and the descriptor that came with it. `None` is the end: the helper is gone.
/// On a non-blocking socket `WouldBlock` passes through.
pub fn receive(control: impl AsFd) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let Some(packet) = Packet::receive(control)? else {
        return Ok(None);
    };
    let message = match packet.tag {
        PARKED => Message::Parked,
        STARTED if packet.body.is_empty() => Message::Started(None),
        STARTED => Message::Started(Some(packet.number()?)),
        FAILED => Message::Failed(packet.failure()?),
        ENDED => Message::Ended(packet.number()?),
        KILLED => Message::Failed(killed(packet.number()?)),
        EXEC_FAILED => Message::Failed(Failure::new(Step::Spawn, packet.number()?)),
        _ => return Err(unreadable()),
    };
    Ok(Some((message, packet.descriptors.into_iter().next())))
}

/// What a helper is given to do.
#[derive(Debug)]
pub(super) struct Given {
    pub record: OwnedFd,
    pub order: OwnedFd,
    /// The task's stdout and stderr, or nothing.
    pub output: Vec<OwnedFd>,
}

/// Plugin: what a helper is to do.
pub(super) fn order(control: impl AsFd, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send(control, ORDER, &[], descriptors)
}

/// Helper: waits for what it is to do. `None` is the end: the plugin is gone, or needs no helper any more.
pub(super) fn wait_for_order(control: impl AsFd) -> io::Result<Option<Given>> {
    let Some(packet) = Packet::receive(control)? else {
        return Ok(None);
    };
    let mut descriptors = packet.descriptors.into_iter();
    match (packet.tag, descriptors.next(), descriptors.next()) {
        (ORDER, Some(record), Some(order)) => Ok(Some(Given {
            record,
            order,
            output: descriptors.collect(),
        })),
        _ => Err(unreadable()),
    }
}

/// Plugin: lets the parked helper go on, now that it is inside the scope.
pub fn release(control: impl AsFd) -> io::Result<()> {
    send(control, GO, &[], &[])
}

/// Plugin: the start is done, and the task is to outlive whoever started it.
pub fn commit(control: impl AsFd) -> io::Result<()> {
    send(control, COMMIT, &[], &[])
}

/// Helper: everything is prepared.
pub(super) fn parked(control: impl AsFd) -> io::Result<()> {
    send(control, PARKED, &[], &[])
}

/// How a wait for the plugin's word ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Given,
    /// The plugin is gone.
    Abandoned,
}

/// Helper: waits until the plugin has its scope.
pub(super) fn wait_for_release(control: impl AsFd) -> io::Result<Word> {
    wait_for(control, GO)
}

/// Supervisor: waits until the plugin has all it needs to find the task again.
pub(super) fn wait_for_commit(control: impl AsFd) -> io::Result<Word> {
    wait_for(control, COMMIT)
}

fn wait_for(control: impl AsFd, tag: u8) -> io::Result<Word> {
    match Packet::receive(control)? {
        Some(packet) if packet.tag == tag => Ok(Word::Given),
        Some(_) => Err(unreadable()),
        None => Ok(Word::Abandoned),
    }
}

/// Helper: the command runs.
pub(super) fn started(control: impl AsFd, main: BorrowedFd<'_>) -> io::Result<()> {
    send(control, STARTED, &[], &[main])
}

/// Session's helper: the command runs as this process, and this is its terminal.
pub(super) fn session_started(
    control: impl AsFd,
    pid: i32,
    terminal: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send(control, STARTED, &pid.to_le_bytes(), terminal.as_slice())
}

/// Session's helper: nothing of it runs any more.
pub(super) fn session_ended(control: impl AsFd, status: i32) -> io::Result<()> {
    send(control, ENDED, &status.to_le_bytes(), &[])
}

/// Session's process: it executes its command next, and this is its terminal.
pub(super) fn session_ready(
    channel: impl AsFd,
    terminal: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send(channel, HELD, &[], terminal.as_slice())
}

/// Helper or child: the command was not executed.
pub(super) fn failed(to: impl AsFd, failure: &Failure) -> io::Result<()> {
    let body = rmp_serde::to_vec_named(failure).map_err(io::Error::other)?;
    send(to, FAILED, &body, &[])
}

/// Supervisor: a signal has ended the child before it executed the command. Allocates nothing.
pub(super) fn child_killed(control: impl AsFd, signal: i32) -> io::Result<()> {
    send(control, KILLED, &signal.to_le_bytes(), &[])
}

fn killed(signal: i32) -> Failure {
    Failure::new(Step::Fork, 0).note(format!(
        "the task's process was killed by signal {signal} before its command ran"
    ))
}

/// Child: descriptors that the supervisor keeps open for as long as the task runs.
pub(super) fn hold(channel: impl AsFd, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    descriptors
        .chunks(DESCRIPTORS)
        .try_for_each(|chunk| send(&channel, HELD, &[], chunk))
}

/// What the supervisor hears from the child.
#[derive(Debug)]
pub(super) enum News {
    Hold(Vec<OwnedFd>),
    Failed(Failure),
    /// The channel is closed: by exec, or by death.
    Closed,
}

/// Supervisor: the child's next message.
pub(super) fn news(channel: impl AsFd) -> io::Result<News> {
    match Packet::receive(channel)? {
        None => Ok(News::Closed),
        Some(packet) if packet.tag == HELD => Ok(News::Hold(packet.descriptors)),
        Some(packet) if packet.tag == FAILED => packet.failure().map(News::Failed),
        Some(_) => Err(unreadable()),
    }
}

#[derive(Debug)]
struct Packet {
    tag: u8,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Packet {
    fn receive(socket: impl AsFd) -> io::Result<Option<Packet>> {
        // Not on the stack, which keeps for good what it once was.
        let mut bytes = vec![0; PACKET_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        let descriptors = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        let Some((tag, body)) = bytes[..received.bytes].split_first() else {
            return Ok(None);
        };
        Ok(Some(Packet {
            tag: *tag,
            body: body.to_vec(),
            descriptors,
        }))
    }

    fn number(&self) -> io::Result<i32> {
        let bytes = self.body.as_slice().try_into();
        bytes.map(i32::from_le_bytes).map_err(|_| unreadable())
    }

    fn failure(&self) -> io::Result<Failure> {
        let mut reader = rmp_serde::Deserializer::from_read_ref(&self.body);
        // What a later release adds may be nested, but never so deep that skipping it takes the plugin's stack.
        reader.set_max_depth(MAX_DEPTH);
        Failure::deserialize(&mut reader).map_err(|_| unreadable())
    }
}

fn send(socket: impl AsFd, tag: u8, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let tag = [tag];
    let slices = [IoSlice::new(&tag), IoSlice::new(body)];
    // The other side may be gone, and its end must not end this process.
    sendmsg(socket, &slices, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn unreadable() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a message that is not of this protocol",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_failure_reads_as_a_sentence() {
        let sentence = |failure: Failure| failure.to_string();
        assert_eq!(
            sentence(Failure::new(Step::Rules, libc::ENOENT).on("r:/srv/x")),
            "unveil r:/srv/x: no such file or directory"
        );
        assert_eq!(
            sentence(Failure::new(Step::Exec, libc::ENOENT).on("/x/y")),
            "command \"/x/y\": no such file or directory"
        );
        assert_eq!(
            sentence(
                Failure::new(Step::Exec, 0)
                    .on("foo")
                    .note("not found in PATH \"/bin\"")
            ),
            "command \"foo\": not found in PATH \"/bin\""
        );
        assert_eq!(
            sentence(
                Failure::new(Step::View, libc::EIO)
                    .on("/srv")
                    .note("a disk?")
            ),
            "mount view /srv: I/O error (a disk?)"
        );
    }

    #[test]
    fn a_packet_of_nested_lists_is_not_of_this_protocol() {
        let body = [&b"\x81\xa5later"[..], &[0x91; PACKET_BYTES - 10]].concat();
        let packet = Packet {
            tag: FAILED,
            body,
            descriptors: Vec::new(),
        };
        let error = packet.failure().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let failure = Failure::new(Step::Exec, 0).on("ä".repeat(5000));
        let subject = failure.subject.unwrap();
        assert!(subject.len() <= TEXT_BYTES + '…'.len_utf8());
        assert!(subject.ends_with("ä…"));
    }
}
