//! The helper's part after the fork: the session's process is its child, and ends with the plugin, or with whoever it is for.
//! It reaps at once: until then, PID 1 of the task's namespace cannot end.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid,
};

use super::super::give_up;
use super::super::report::{self, At, Failure, News};
use crate::breakpoint;
use crate::plan::session::SessionStep;
use crate::plan::steps::Step;
use crate::sys;

#[derive(Debug)]
pub(super) struct Watch {
    pub control: OwnedFd,
    /// The child's end of this closes when the command is executed.
    pub channel: OwnedFd,
    pub child: i32,
    /// cgroup.kill of the session's cgroup, which nobody of the task can write to.
    pub kill: File,
}

pub(super) fn run(watch: Watch) -> ! {
    let Watch {
        control,
        channel,
        child,
        mut kill,
    } = watch;
    let opened = Pid::from_raw(child)
        .ok_or(Errno::SRCH)
        .and_then(|child| Ok((child, pidfd_open(child, PidfdFlags::empty())?)));
    let (child, pidfd) = match opened.at(Step::Fork) {
        Ok(opened) => opened,
        Err(failure) => {
            let _ = kill.write_all(b"1");
            give_up(&control, &failure)
        }
    };
    let end = |kill: &mut File| {
        // The child may not have entered the cgroup yet.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        let _ = kill.write_all(b"1");
        reap(child)
    };
    match started(&control, &channel) {
        Ok(Some(terminal)) => {
            drop(channel);
            let told = report::session_started(
                &control,
                child.as_raw_pid(),
                terminal.as_ref().map(AsFd::as_fd),
            );
            drop(terminal);
            if told.is_ok() {
                breakpoint::at(SessionStep::Watch);
                // Whichever comes first: its end, or that of whoever holds the other end of the socket.
                let _ = first(&control, &pidfd);
            }
            let ended_by_itself = ended(child);
            let status = ended_by_itself.unwrap_or_else(|| end(&mut kill));
            // What it left running goes with it.
            let _ = kill.write_all(b"1");
            let _ = report::session_ended(&control, status);
            sys::exit_now(0)
        }
        Ok(None) => {
            end(&mut kill);
            sys::exit_now(0)
        }
        Err(failure) => {
            end(&mut kill);
            give_up(&control, &failure)
        }
    }
}

/// Follows the child until its command is executed; the terminal that it made. `None` if nobody waits for it any more.
fn started(control: &OwnedFd, channel: &OwnedFd) -> Result<Option<Option<OwnedFd>>, Failure> {
    let mut ready = None;
    loop {
        if first(control, channel).at(Step::Session)? == Side::Control {
            return Ok(None);
        }
        match report::news(channel).at(Step::Session)? {
            News::Hold(terminal) => ready = Some(terminal.into_iter().next()),
            News::Failed(failure) => return Err(failure),
            News::Closed => {
                let died = "its process was killed before its command ran (is the task out of memory, or ending?)";
                return match ready {
                    Some(terminal) => Ok(Some(terminal)),
                    None => Err(Failure::new(Step::Session, 0).note(died)),
                };
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Side {
    /// The plugin is gone, or has let go of the session.
    Control,
    Other,
}

/// Waits for something to read from either. What there is to read comes before the end of the control socket.
fn first(control: &OwnedFd, other: &OwnedFd) -> Result<Side, Errno> {
    let mut polled = [
        PollFd::new(other, PollFlags::IN),
        PollFd::new(control, PollFlags::IN),
    ];
    loop {
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        if !polled[0].revents().is_empty() {
            return Ok(Side::Other);
        }
        if !polled[1].revents().is_empty() {
            return Ok(Side::Control);
        }
    }
}

/// Its status, if it has ended, and reaped then.
fn ended(child: Pid) -> Option<i32> {
    let waited = waitpid(Some(child), WaitOptions::NOHANG).ok()??;
    Some(waited.1.as_raw())
}

fn reap(child: Pid) -> i32 {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => return status.as_raw(),
            Err(Errno::INTR) => {}
            // It is a child until it is reaped.
            Ok(None) | Err(_) => return libc::SIGKILL,
        }
    }
}
