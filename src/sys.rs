//! The system calls that nix and rustix lack, each behind a safe signature: the only unsafe code of the crate. No policy,
//! and nothing of ours is known here.
#![allow(unsafe_code)]

pub mod clone;
pub mod trace;

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes ownership of a descriptor that this process was started with, and makes it close-on-exec. For the very first lines
/// of a program, once for each number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD on any number is harmless; it fails with EBADF where there is no descriptor.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, and by the contract above nothing of this process has claimed it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ends the process without running exit handlers, which belong to the image it was forked from.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Adds attributes (`libc::MOUNT_ATTR_*`) to a mount, and with `libc::AT_RECURSIVE` of all below it. With
/// `libc::AT_EMPTY_PATH` and an empty path, of the mount that `dir` is the root of. A propagation of 0 leaves it as it is.
pub fn mount_setattr(
    dir: impl AsFd,
    path: &CStr,
    flags: c_int,
    set: u64,
    propagation: u64,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is NUL-terminated and the structure has the size that is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    zero(result)
}

/// Makes every descriptor from `first` on close-on-exec.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: integers only; no descriptor is closed before an exec that ends all their owners.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    zero(result)
}

/// Replaces the session keyring by a new, anonymous one.
pub fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; nothing is read or written.
    let serial = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            ptr::null::<c_char>(),
        )
    };
    if serial < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives every signal its default action, and blocks none. Dispositions that ignore a signal, and the mask, survive an exec.
pub fn reset_signals() {
    // The kernel's sigset: one bit for each of 64 signals.
    const SIGSET_BYTES: usize = 8;
    // The kernel's struct sigaction begins with the handler, SIG_DFL is zero, and 64 bytes hold it on every architecture.
    let default = [0u64; 8];
    let none = 0u64;
    // SAFETY: raw calls on zeroed memory that is large enough; libc's wrappers would refuse the signals it keeps for itself,
    // which a parent may have left ignored. SIGKILL and SIGSTOP fail with EINVAL.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<c_void>(),
                SIGSET_BYTES,
            );
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null_mut::<c_void>(),
            SIGSET_BYTES,
        );
    }
}

/// Takes a blocked signal that waits, and tells whether a process outside of this PID namespace sent it with kill(2): such a
/// sender has no pid in it. Who sends with rt_sigqueueinfo(2) writes what they like.
pub fn take_signal_of_outside(signal: i32) -> bool {
    let set = signal_set(signal);
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: siginfo_t is plain data for which zero is a value; all three outlive the call, which fills in the second.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::sigtimedwait(&raw const set, &raw mut info, &raw const now) == signal
            && info.si_code == libc::SI_USER
            && info.si_pid() == 0
    }
}

fn signal_set(signal: i32) -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the set before anything reads it; sigaddset refuses what is no signal.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        set
    }
}

/// How a process ended, if the kernel still knows: a wait(2) status. Since Linux 6.15, once whoever has it as a child has
/// reaped it.
pub fn exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    /// The first 64 bytes of pidfs' struct pidfd_info.
    #[repr(C)]
    struct Info {
        mask: u64,
        cgroup_id: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct pidfd_info)
    const PIDFD_GET_INFO: libc::Ioctl = 0xC040_FF0B;
    let mut info = Info {
        mask: EXIT,
        cgroup_id: 0,
        ids: [0; 11],
        exit_code: 0,
    };
    // SAFETY: the kernel writes no more than the 64 bytes that the request's number says, which the structure has.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (done == 0 && info.mask & EXIT != 0).then_some(info.exit_code)
}

/// Gives memory that the allocator holds but does not use back to the kernel.
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What a thread's tcache has at most: so many chunks of each of so many sizes (glibc's malloc/malloc.c, 2.26 to 2.41).
const TCACHE_CHUNKS: usize = 7;
const TCACHE_SIZES: usize = 64;
const TCACHE_SMALLEST_BYTES: usize = 24;
const TCACHE_STEP_BYTES: usize = 16;

/// How much of ended threads' stacks glibc keeps for the next ones (nptl/nptl-stack.c).
const STACK_CACHE_BYTES: usize = 40 << 20;

/// The same, once this thread's tcache is empty: it keeps freed chunks, each of which holds a page of a heap that was once full, and
/// malloc_trim leaves it alone. And the stacks that glibc keeps of ended threads, with the pages that these have touched.
///
/// A thread's end empties its own tcache, so what this one has is taken out and freed by another. The stack of a third one is more
/// than all that glibc keeps, which lets go of every other for it, and then of it. For a process with one heap
/// (`keep_one_heap`), and where a thread more is nobody's limit; if there can be none, less is given back.
pub fn trim_memory() {
    let chunks: Vec<Vec<u8>> = (0..TCACHE_SIZES)
        .flat_map(|size| {
            let bytes = TCACHE_SMALLEST_BYTES + size * TCACHE_STEP_BYTES;
            std::iter::repeat_with(move || Vec::with_capacity(bytes)).take(TCACHE_CHUNKS)
        })
        .collect();
    // `thread::spawn` would panic.
    if let Ok(thread) = std::thread::Builder::new().spawn(move || drop(chunks)) {
        let _ = thread.join();
    }
    let larger = std::thread::Builder::new().stack_size(STACK_CACHE_BYTES + (1 << 20));
    if let Ok(thread) = larger.spawn(|| ()) {
        let _ = thread.join();
    }
    trim_heap();
}

/// Keeps all threads to one heap. Otherwise each that ever allocates has one of its own, which nobody gives back.
pub fn keep_one_heap() {
    // SAFETY: mallopt has no preconditions.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// A file's first bytes as shared memory: stores reach the file, whatever becomes of the descriptor, the limits or the disk.
#[derive(Debug)]
pub struct SharedPage {
    address: *mut u8,
    length: usize,
}

impl SharedPage {
    /// Maps `length` bytes, which must be allocated in the file already.
    pub fn map(file: &File, length: usize) -> io::Result<SharedPage> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. MAP_POPULATE takes the page
        // fault now: later there may be no memory left to serve it.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedPage {
            address: address.cast(),
            length,
        })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as self, is `length` long, and this process has no other reference into it.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping that `map` made.
        unsafe {
            libc::munmap(self.address.cast(), self.length);
        }
    }
}

fn zero(result: c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Watches a descriptor on tokio's reactor until it is readable: a pidfd is when its process has ended.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, so that it stays open and the same for as long as it is registered.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    watched.map_err(io::Error::from)
}

/// pidfd_send_signal(2). Takes any number, since the enums of libraries know no real-time signals.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call, and a null siginfo is what the man page allows.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    zero(sent)
}

/// The ABI of this kernel's Landlock (landlock_create_ruleset(2)); `None` if it has none, or was booted without.
pub fn landlock_abi() -> Option<u32> {
    const VERSION: u32 = 1;
    // SAFETY: with a null attribute of size 0 the call reads nothing and makes nothing.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<c_void>(),
            0_usize,
            VERSION,
        )
    };
    u32::try_from(abi).ok().filter(|abi| *abi > 0)
}

/// Makes a BPF program the system call filter of the calling thread, and of whatever it will execute. Needs CAP_SYS_ADMIN
/// or no_new_privs.
pub fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions, which outlive the call, and writes none of them. Before Linux 5.16 a filter
    // without the flag slows its programs down, as if each of them ran foreign code.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    zero(result)
}

/// Restricts the calling thread, and whatever it will execute, with a ruleset that somebody made. Needs no_new_privs.
pub fn landlock_restrict_self(ruleset: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: integers only; the descriptor is open for the whole call.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), flags) };
    zero(result)
}
