//! ptrace(2) of another process' system calls, and the seccomp filter that stops at those calls alone. Signals are numbers, as the
//! enums of libraries know no real-time ones.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::io;
use std::ptr;

use super::zero;

/// Higher than any system call of this architecture's own; on x86 those with this bit are another ABI's.
const FOREIGN_BIT: u32 = 0x4000_0000;

/// As the kernel names architectures in system calls.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7;

/// What comes with the stop at a call of another architecture, or another ABI: its number means something else.
pub const FOREIGN: u32 = 1;
const OURS: u32 = 0;

/// The most that one filter can name: a jump in it goes 255 steps.
const MAX_CALLS: usize = 200;

/// Makes the kernel stop this thread, and whatever it becomes, for its tracer at each of these system calls. Without a tracer
/// they fail with ENOSYS. Needs no_new_privs.
pub fn stop_at(calls: &[u32]) -> io::Result<()> {
    const SECCOMP_SET_MODE_FILTER: c_uint = 1;
    const NO_FLAGS: c_uint = 0;
    if calls.len() > MAX_CALLS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut filter = filter(calls);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program points to as many instructions as it says, which outlive the call; the kernel copies them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            NO_FLAGS,
            &raw const program,
        )
    };
    zero(result)
}

fn filter(calls: &[u32]) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const NOT_BELOW: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // Of struct seccomp_data.
    const NUMBER_AT: u32 = 0;
    const ARCHITECTURE_AT: u32 = 4;
    let step = |code: u32, k: u32, jt: usize, jf: usize| libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    let count = calls.len();
    // Behind the calls: allow, trace, trace as foreign.
    let mut filter = vec![
        step(LOAD, ARCHITECTURE_AT, 0, 0),
        step(EQUAL, ARCHITECTURE, 0, count + 4),
        step(LOAD, NUMBER_AT, 0, 0),
        step(NOT_BELOW, FOREIGN_BIT, count + 2, 0),
    ];
    let tests = calls
        .iter()
        .enumerate()
        .map(|(at, call)| step(EQUAL, *call, count - at, 0));
    filter.extend(tests);
    filter.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
    filter.push(step(RETURN, libc::SECCOMP_RET_TRACE | OURS, 0, 0));
    filter.push(step(RETURN, libc::SECCOMP_RET_TRACE | FOREIGN, 0, 0));
    filter
}

/// A stop of a traced thread, or its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Before a call that the filter names; the filter's word, 0 or `FOREIGN`.
    Call(u32),
    /// After a call, or an exec.
    Return,
    /// It has forked, or made a thread: that one, traced as well.
    Child(i32),
    /// It executes another program. Of several threads, the one that called exec was this one.
    Exec(i32),
    /// A signal is about to be delivered.
    Signal(i32),
    /// Its process is stopped, as by SIGSTOP.
    Group,
    /// Anything else: a new thread that waits to be let go.
    Other,
    Ended,
}

/// How a stopped thread goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Until the next stop.
    Freely,
    /// Until the call has returned.
    ToReturn,
    /// Remains stopped, until its process is continued.
    Listening,
}

/// Begins to trace a thread, which does not notice. All that it makes is traced too, and killed when the calling thread ends.
pub fn seize(pid: i32) -> io::Result<()> {
    let options = libc::PTRACE_O_EXITKILL
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACESECCOMP
        | libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACEVFORK;
    request(libc::PTRACE_SEIZE as c_int, pid, 0, options as usize)
}

/// Lets go of a stopped thread.
pub fn detach(pid: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH as c_int, pid, 0, 0)
}

/// Lets a stopped thread go on, with a signal or without (0).
pub fn resume(pid: i32, how: Resume, signal: i32) -> io::Result<()> {
    let how = match how {
        Resume::Freely => libc::PTRACE_CONT as c_int,
        Resume::ToReturn => libc::PTRACE_SYSCALL as c_int,
        Resume::Listening => libc::PTRACE_LISTEN as c_int,
    };
    request(how, pid, 0, signal as usize)
}

fn request(request: c_int, pid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: these requests take integers, and touch no memory of this process.
    zero(unsafe {
        libc::ptrace(
            request as _,
            pid,
            ptr::without_provenance_mut::<c_void>(address),
            ptr::without_provenance_mut::<c_void>(data),
        )
    })
}

/// Waits for a thread that the calling thread traces to stop or end; for any of them if `pid` is -1. `None`: there are no more.
pub fn wait(pid: i32) -> io::Result<Option<(i32, Stop)>> {
    let mut status: c_int = 0;
    loop {
        // Of this thread alone: what other threads of this process have started is theirs to reap.
        let flags = libc::__WALL | libc::__WNOTHREAD;
        // SAFETY: the status is a local integer.
        match unsafe { libc::waitpid(pid, &raw mut status, flags) } {
            found @ 1.. => match stop(found, status) {
                // Killed meanwhile, by the end of its process: that is still to come.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                stop => return Ok(Some((found, stop?))),
            },
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Waits as `wait` does, and leaves the stop or the end to be found again. Whether it is an end.
pub fn is_ending(pid: i32) -> io::Result<bool> {
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL | libc::__WNOTHREAD;
    loop {
        // SAFETY: siginfo_t is plain data for which zero is a value, and it outlives the call.
        let (result, code) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let id = pid.unsigned_abs();
            let result = libc::waitid(libc::P_PID, id, &raw mut info, flags);
            (result, info.si_code)
        };
        if result == 0 {
            return Ok(matches!(
                code,
                libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED
            ));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn stop(pid: i32, status: c_int) -> io::Result<Stop> {
    const SYSCALL_GOOD: c_int = libc::SIGTRAP | 0x80;
    const EVENT_STOP: c_int = 128;
    if !libc::WIFSTOPPED(status) {
        return Ok(Stop::Ended);
    }
    let signal = libc::WSTOPSIG(status);
    Ok(match status >> 16 {
        0 if signal == SYSCALL_GOOD => Stop::Return,
        0 => Stop::Signal(signal),
        libc::PTRACE_EVENT_SECCOMP => Stop::Call(message(pid)? as u32),
        libc::PTRACE_EVENT_EXEC => Stop::Exec(message(pid)? as i32),
        libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
            Stop::Child(message(pid)? as i32)
        }
        EVENT_STOP if signal != libc::SIGTRAP => Stop::Group,
        _ => Stop::Other,
    })
}

fn message(pid: i32) -> io::Result<u64> {
    let mut message: u64 = 0;
    // SAFETY: the kernel writes one unsigned long, which has 64 bits here.
    zero(unsafe {
        libc::ptrace(
            libc::PTRACE_GETEVENTMSG,
            pid,
            ptr::null_mut::<c_void>(),
            (&raw mut message).cast::<c_void>(),
        )
    })?;
    Ok(message)
}

/// The call that a stopped thread is about to make: its number and arguments.
pub fn call(pid: i32) -> io::Result<(u64, [u64; 6])> {
    let info = info(pid)?;
    let [number, a, b, c, d, e, f, ..] = info.words;
    Ok((number, [a, b, c, d, e, f]))
}

/// What the call returned: a value, or an errno.
pub fn returned(pid: i32) -> io::Result<Result<i64, i32>> {
    const LAST_ERRNO: i64 = 4_095;
    let value = info(pid)?.words[0].cast_signed();
    if (-LAST_ERRNO..0).contains(&value) {
        return Ok(Err(-value as i32));
    }
    Ok(Ok(value))
}

/// struct ptrace_syscall_info.
#[repr(C)]
struct Info {
    head: [u8; 24],
    words: [u64; 8],
}

fn info(pid: i32) -> io::Result<Info> {
    const GET_SYSCALL_INFO: c_long = 0x420e;
    let mut info = Info {
        head: [0; 24],
        words: [0; 8],
    };
    // SAFETY: the kernel writes no more than the size that it is given.
    let size = unsafe {
        libc::ptrace(
            GET_SYSCALL_INFO as _,
            pid,
            ptr::without_provenance_mut::<c_void>(size_of::<Info>()),
            (&raw mut info).cast::<c_void>(),
        )
    };
    if size < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What the filter answers to a call, by the kernel's rules for the few instructions that it has.
    fn answer(filter: &[libc::sock_filter], architecture: u32, number: u32) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = &filter[at];
            let jump = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
            at += 1;
            match u32::from(step.code) {
                0x20 => loaded = if step.k == 4 { architecture } else { number },
                0x15 => at += jump(loaded == step.k),
                0x35 => at += jump(loaded >= step.k),
                0x06 => return step.k,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn the_filter_stops_at_its_calls_and_at_those_of_others() {
        let filter = filter(&[2, 257, 59]);
        for number in [2, 257, 59] {
            let word = libc::SECCOMP_RET_TRACE | OURS;
            assert_eq!(answer(&filter, ARCHITECTURE, number), word, "{number}");
        }
        for number in [0, 1, 3, 58, 60, 256, 1_000] {
            let word = libc::SECCOMP_RET_ALLOW;
            assert_eq!(answer(&filter, ARCHITECTURE, number), word, "{number}");
        }
        let word = libc::SECCOMP_RET_TRACE | FOREIGN;
        assert_eq!(answer(&filter, 0x4000_0003, 5), word);
        assert_eq!(answer(&filter, ARCHITECTURE, FOREIGN_BIT + 2), word);
    }
}
