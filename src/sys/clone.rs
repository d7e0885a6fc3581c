//! New processes: a program of its own, a child that shares this one's memory until it executes one, a copy of this one.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::fcntl_dupfd_cloexec;

use super::exit_now;

/// Highest descriptor number that `spawn` fills; duplicates made before the clone stay above it.
const LOWEST_DUPLICATE: RawFd = 32;

/// A program to be executed as a child of this process.
#[derive(Debug)]
pub struct Program<'a> {
    /// New namespaces for it, as `libc::CLONE_NEW*`.
    pub namespaces: c_int,
    /// An O_PATH descriptor of the executable.
    pub file: BorrowedFd<'a>,
    pub argv: &'a [&'a CStr],
    /// What the program finds as descriptors 0, 1, 2 …; it gets no others.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// Which of these is told when the exec fails: one message of `failure_tag` and the errno, little-endian.
    pub failure_to: RawFd,
    pub failure_tag: u8,
}

/// Executes `program` as a child of this process, with an empty environment. The caller has blocked all signals, so that none
/// of its handlers runs in the child. Returns the pid and a pidfd.
pub fn spawn(program: &Program<'_>) -> io::Result<(i32, OwnedFd)> {
    let file = fcntl_dupfd_cloexec(program.file, LOWEST_DUPLICATE)?;
    let descriptors = program
        .descriptors
        .iter()
        .map(|descriptor| fcntl_dupfd_cloexec(descriptor, LOWEST_DUPLICATE))
        .collect::<Result<Vec<_>, _>>()?;
    let sources: Vec<RawFd> = descriptors.iter().map(OwnedFd::as_raw_fd).collect();
    let mut argv: Vec<*const c_char> = program.argv.iter().map(|word| word.as_ptr()).collect();
    argv.push(ptr::null());

    clone_until_exec(program.namespaces, &|| {
        exec_in_clone(program, file.as_raw_fd(), &sources, &argv)
    })
}

/// Most of it is never touched, and costs nothing.
const STACK_BYTES: usize = 512 << 10;
const GUARD_BYTES: usize = 64 << 10;

/// Runs `child` in a new process that shares this one's memory, though not its descriptors, while this thread stands still: until the
/// child executes a program or ends. Nothing is copied, neither page tables nor pages. What it returns is its exit status.
/// Returns the pid and a pidfd.
///
/// `child` leaves the memory as it found it, but for what is atomic. If this process has other threads, it does system calls only:
/// they may hold any lock. If a signal ends it, the allocator may be halfway through something.
pub(crate) fn clone_until_exec(
    namespaces: c_int,
    child: &dyn Fn() -> c_int,
) -> io::Result<(i32, OwnedFd)> {
    extern "C" fn enter(child: *mut c_void) -> c_int {
        // SAFETY: the pointer is to the reference below, whose function's frame stands until this process has left the memory.
        let child = unsafe { *child.cast::<&dyn Fn() -> c_int>() };
        child()
    }
    let stack = Stack::map()?;
    let mut child = child;
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: CLONE_VFORK keeps this thread, and with it the frame, the stack and everything that `child` borrows, until the
    // child executes or ends; a panic in it aborts at `enter`. It runs on memory of its own, above which it needs none. Its
    // thread pointer, and so errno, is that of this thread, which does not run.
    let pid = unsafe {
        libc::clone(
            enter,
            stack.top(),
            flags | namespaces,
            (&raw mut child).cast(),
            &raw mut pidfd,
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: CLONE_PIDFD stored a new descriptor that nothing else owns.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Below it lies memory that nobody may touch.
struct Stack(*mut c_void);

impl Stack {
    fn map() -> io::Result<Stack> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours; its lower end is made a guard.
        unsafe {
            let lowest = libc::mmap(
                ptr::null_mut(),
                GUARD_BYTES + STACK_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
                -1,
                0,
            );
            if lowest == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let stack = Stack(lowest);
            match libc::mprotect(lowest, GUARD_BYTES, libc::PROT_NONE) {
                0 => Ok(stack),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Stacks grow downwards on every machine that Rust's Linux targets name. A multiple of a page, as the ABIs want.
    fn top(&self) -> *mut c_void {
        self.0.wrapping_byte_add(GUARD_BYTES + STACK_BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping that `map` made.
        unsafe {
            libc::munmap(self.0, GUARD_BYTES + STACK_BYTES);
        }
    }
}

/// Strings as exec(2) takes them, which allocates nothing any more.
#[derive(Debug)]
pub struct Words {
    /// What the pointers lead to.
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl From<Vec<CString>> for Words {
    fn from(strings: Vec<CString>) -> Words {
        let pointers = strings.iter().map(|word| word.as_ptr());
        Words {
            pointers: pointers.chain([ptr::null()]).collect(),
            _strings: strings,
        }
    }
}

/// Becomes the program, or returns why not.
pub fn execute(program: &CStr, argv: &Words, environment: &Words) -> io::Error {
    // SAFETY: the arrays end with null, and the strings in them live as long as they do: on the heap, which does not move.
    unsafe {
        libc::execve(
            program.as_ptr(),
            argv.pointers.as_ptr(),
            environment.pointers.as_ptr(),
        );
    }
    io::Error::last_os_error()
}

fn exec_in_clone(
    program: &Program<'_>,
    file: RawFd,
    sources: &[RawFd],
    argv: &[*const c_char],
) -> ! {
    let environment: [*const c_char; 1] = [ptr::null()];
    let count = sources.len() as c_uint;
    // SAFETY: system calls on numbers and on NUL-terminated arrays that outlive them. Every source is above every target,
    // so no dup3 overwrites a source that is still needed.
    unsafe {
        for (target, source) in sources.iter().enumerate() {
            if libc::syscall(libc::SYS_dup3, *source, target as c_long, 0) < 0 {
                fail_in_clone(program);
            }
        }
        if libc::syscall(
            libc::SYS_close_range,
            count,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) < 0
        {
            fail_in_clone(program);
        }
        libc::syscall(
            libc::SYS_execveat,
            file,
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    fail_in_clone(program)
}

fn fail_in_clone(program: &Program<'_>) -> ! {
    // SAFETY: errno is this thread's own; the message is a local array, alive during the call.
    unsafe {
        let mut message = [program.failure_tag; 5];
        message[1..].copy_from_slice(&(*libc::__errno_location()).to_le_bytes());
        libc::syscall(
            libc::SYS_sendto,
            program.failure_to,
            message.as_ptr(),
            message.len(),
            libc::MSG_NOSIGNAL,
            ptr::null::<c_void>(),
            0,
        );
    }
    exit_now(127)
}

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    Parent { child: i32 },
    Child,
}

/// Forks. This process must have a single thread: the child goes on with ordinary code.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: single-threaded by contract, so no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        child @ 1.. => Ok(Fork::Parent { child }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    fn status(pid: i32) -> Option<i32> {
        let pid = rustix::process::Pid::from_raw(pid)?;
        let ended = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        Some(ended.ok()??.1.as_raw())
    }

    #[test]
    fn a_child_has_our_memory_and_not_our_descriptors() -> io::Result<()> {
        let (ours, _theirs) = io::pipe()?;
        let told = AtomicI32::new(0);
        let (pid, pidfd) = clone_until_exec(0, &|| {
            let pid = rustix::process::getpid().as_raw_pid();
            told.store(pid, Ordering::Relaxed);
            // SAFETY: the number is open in this process, whose last act this is.
            drop(unsafe { OwnedFd::from_raw_fd(ours.as_raw_fd()) });
            7
        })?;
        assert_eq!(told.load(Ordering::Relaxed), pid);
        assert_eq!(status(pid), Some(7 << 8));
        rustix::io::fcntl_getfd(&ours)?;
        rustix::io::fcntl_getfd(&pidfd)?;
        Ok(())
    }

    #[test]
    fn it_is_waited_for_until_it_executes_and_no_longer() -> io::Result<()> {
        let words = |words: &[&str]| -> Words {
            let words = words.iter().filter_map(|word| CString::new(*word).ok());
            words.collect::<Vec<_>>().into()
        };
        let (argv, environment) = (
            words(&["sh", "-c", "kill -STOP $$; exit $CODE"]),
            words(&["CODE=9"]),
        );
        // It would never return, waited for to its end.
        let (pid, pidfd) = clone_until_exec(0, &|| {
            execute(c"/bin/sh", &argv, &environment);
            1
        })?;
        let process = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let stopped =
            rustix::process::waitpid(Some(process), rustix::process::WaitOptions::UNTRACED)?;
        assert!(stopped.is_some_and(|(_, status)| status.stopped()));
        rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::CONT)?;
        assert_eq!(status(pid), Some(9 << 8));
        Ok(())
    }

    #[test]
    fn what_cannot_be_executed_is_told_and_the_child_goes_on() -> io::Result<()> {
        let none: Words = Vec::new().into();
        let errno = AtomicI32::new(0);
        let (pid, _) = clone_until_exec(0, &|| {
            let error = execute(c"/nonexistent", &none, &none);
            errno.store(error.raw_os_error().unwrap_or(0), Ordering::Relaxed);
            // Deep enough to want many pages of its stack.
            let deep = [1_u8; 100 << 10];
            i32::from(std::hint::black_box(&deep)[99 << 10])
        })?;
        assert_eq!(status(pid), Some(1 << 8));
        assert_eq!(errno.load(Ordering::Relaxed), libc::ENOENT);
        Ok(())
    }
}
