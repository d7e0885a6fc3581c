//! The command under measurement: the smallest program that says when it ran. It writes CLOCK_MONOTONIC to standard output
//! as 8 bytes, waits for SIGTERM or SIGINT (not at all with an argument), writes it again and exits with 0. Without libc and
//! static, so that an exec of it costs next to nothing. `build.rs` compiles it.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

// The kernel leaves the number of arguments where the stack pointer points.
global_asm!(
    ".globl _start",
    "_start:",
    "mov rdi, [rsp]",
    "and rsp, -16",
    "call {main}",
    main = sym main,
);

const WRITE: usize = 1;
const RT_SIGPROCMASK: usize = 14;
const RT_SIGTIMEDWAIT: usize = 128;
const CLOCK_GETTIME: usize = 228;
const EXIT_GROUP: usize = 231;

const STDOUT: usize = 1;
const SIG_BLOCK: usize = 0;
const CLOCK_MONOTONIC: usize = 1;
/// SIGINT and SIGTERM. Blocked, so that they arrive at an init of a PID namespace too, which ignores them otherwise.
static STOP_SIGNALS: u64 = 1 << (2 - 1) | 1 << (15 - 1);

extern "C" fn main(arguments: usize) -> ! {
    let first = now();
    let set = &raw const STOP_SIGNALS as usize;
    call(RT_SIGPROCMASK, [SIG_BLOCK, set, 0, size_of::<u64>()]);
    tell(first);
    if arguments < 2 {
        call(RT_SIGTIMEDWAIT, [set, 0, 0, size_of::<u64>()]);
    }
    tell(now());
    call(EXIT_GROUP, [0; 4]);
    loop {}
}

fn tell(nanos: u64) {
    call(WRITE, [STDOUT, &raw const nanos as usize, size_of::<u64>(), 0]);
}

fn now() -> u64 {
    let mut time = [0u64; 2];
    call(CLOCK_GETTIME, [CLOCK_MONOTONIC, time.as_mut_ptr() as usize, 0, 0]);
    time[0] * 1_000_000_000 + time[1]
}

fn call(number: usize, arguments: [usize; 4]) {
    // SAFETY: every pointer above is to a value of the size that the call takes, alive during it.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => _,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
