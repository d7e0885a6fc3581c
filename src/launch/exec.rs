//! The command: found in the task's PATH where it is a bare name, executed, and explained where that fails.

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use rustix::fs::{FileType, stat};

use super::report::Failure;
use crate::plan::command;
use crate::plan::steps::Step;
use crate::sys::clone::{self, Words};

/// Everything that exec needs, made before the scope pays for it.
#[derive(Debug)]
pub(super) struct Command {
    name: String,
    uid: u32,
    argv: Words,
    environment: Words,
    candidates: Vec<CString>,
    /// Set for a bare name: where it was looked for.
    search_path: Option<String>,
    executing: AtomicBool,
}

impl Command {
    pub fn new(
        command: &str,
        args: &[String],
        env: &[(String, String)],
        uid: u32,
    ) -> Result<Command, Failure> {
        let text = |bytes: String| {
            CString::new(bytes).map_err(|_| {
                Failure::new(Step::Exec, 0)
                    .on(command)
                    .note("the command, an argument or a variable contains a NUL byte")
            })
        };
        let words = std::iter::once(command).chain(args.iter().map(String::as_str));
        let argv = words
            .map(|word| text(word.to_owned()))
            .collect::<Result<Vec<_>, _>>()?;
        let variables = env.iter().map(|(key, value)| format!("{key}={value}"));
        let environment = variables.map(text).collect::<Result<Vec<_>, _>>()?;
        let search_path = command::search_path(command, env).map(str::to_owned);
        let candidates = command::candidates(command, env).into_iter().map(text);
        let candidates = candidates.collect::<Result<_, _>>()?;
        Ok(Command {
            name: command.into(),
            uid,
            argv: argv.into(),
            environment: environment.into(),
            candidates,
            search_path,
            executing: AtomicBool::new(false),
        })
    }

    /// Whether a process that shares this memory is becoming the command, or has become it.
    pub fn is_executing(&self) -> bool {
        self.executing.load(Ordering::Relaxed)
    }

    /// Becomes the command. Returns only why it could not.
    pub fn execute(&self) -> Failure {
        let mut denied = None;
        for candidate in &self.candidates {
            self.executing.store(true, Ordering::Relaxed);
            let error = clone::execute(candidate, &self.argv, &self.environment);
            self.executing.store(false, Ordering::Relaxed);
            match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::ENOENT | Errno::ENOTDIR
                    if self.search_path.is_some() && !exists(candidate) => {}
                Errno::EACCES if self.search_path.is_some() => {
                    denied.get_or_insert(candidate);
                }
                errno => return self.failure(errno, candidate),
            }
        }
        match (denied, &self.search_path) {
            (Some(candidate), _) => self.failure(Errno::EACCES, candidate),
            (None, path) => Failure::new(Step::Exec, 0).on(&self.name).note(format!(
                "not found in PATH {:?}",
                path.as_deref().unwrap_or("")
            )),
        }
    }

    fn failure(&self, errno: Errno, candidate: &CStr) -> Failure {
        let failure = Failure::new(Step::Exec, errno as i32).on(&self.name);
        let found = match self.search_path {
            Some(_) => format!("found as {}; ", candidate.to_string_lossy()),
            None => String::new(),
        };
        match errno {
            Errno::EACCES if is_directory(candidate) => {
                failure.note(format!("{found}it is a directory"))
            }
            Errno::EACCES => failure.note(format!(
                "{found}is it unveiled with \"rx\", its interpreter and libraries too, and executable by uid {}?",
                self.uid
            )),
            Errno::ENOENT if exists(candidate) => {
                failure.note(format!("{found}the file is there, but its interpreter is not"))
            }
            Errno::ENOEXEC => failure.note(format!(
                "{found}neither a program for this machine nor a script that begins with #!"
            )),
            Errno::E2BIG => failure.note("arguments and environment are larger than the kernel takes"),
            _ if !found.is_empty() => failure.note(found.trim_end_matches("; ")),
            _ => failure,
        }
    }
}

fn is_directory(path: &CStr) -> bool {
    stat(path).is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::Directory)
}

/// Landlock does not govern stat(2).
fn exists(path: &CStr) -> bool {
    stat(path).is_ok()
}
