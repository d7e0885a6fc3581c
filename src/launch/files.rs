//! Files that read otherwise than the host's: each is a read-only mount over it, of a text that only this task has.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::layers::{self, Layer, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};
use super::mounts::{layer, resolve};
use super::place::open_resolved;
use super::report::{At, Failure};
use crate::plan::steps::{Replaced, Step, Text};

/// Only what is mounted in a mount namespace can be copied, so the texts need a place in it. This one is covered by the task's
/// own /proc when the layers are laid.
const SHELF: &str = "/proc";

pub(super) fn layers(files: &[&Replaced]) -> Result<Vec<Layer>, Failure> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let shelf = layers::empty().at_path(Step::View, SHELF)?;
    open_resolved(Path::new(SHELF))
        .and_then(|place| layers::move_onto(&shelf, place))
        .at_path(Step::View, SHELF)?;
    let files = files.iter().enumerate();
    files
        .map(|(number, file)| {
            let path = resolve(&file.path)?.ok_or_else(|| {
                Failure::new(Step::View, libc::ENOENT)
                    .on(file.path.display().to_string())
                    .note("the task's own is laid over it; create it on the host, empty if need be")
            })?;
            let text = match &file.text {
                Text::Whole(text) => text.clone(),
                Text::Appended(line) => with_line(&path, line)?,
            };
            let copied = put(&shelf, &number.to_string(), &text).and_then(|place| {
                layers::clone_tree(place, NO_SUID | NO_DEV | NO_EXEC | READ_ONLY)
            });
            layer(path, copied)
        })
        .collect()
}

fn with_line(path: &Path, line: &str) -> Result<String, Failure> {
    let text = fs::read(path).at_path(Step::View, path)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(line);
    Ok(text)
}

fn put(shelf: &OwnedFd, name: &str, text: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(shelf, name, flags, Mode::from_raw_mode(0o444))?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = &rest[written..];
    }
    openat(shelf, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}
