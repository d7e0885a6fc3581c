//! The system call filter of a task: what Landlock cannot refuse, as it is about no file. A BPF program lets everything pass but the
//! calls that are named here, by programs of each architecture that the kernel runs. Its answers are those of kernels that lack
//! what is asked for, or withhold it: programs know them. By hand, as the crate for such filters (seccompiler) makes them for one
//! architecture, and a host runs programs of two.

use libc::sock_filter;

use super::report::Failure;
use crate::plan::steps::{Step, UserNamespaces};
use crate::sys;

/// The numbers of calls in programs of one kind.
#[derive(Debug)]
struct Architecture {
    /// AUDIT_ARCH_*: what the kernel says that a call is made by.
    id: u32,
    clone: u32,
    clone3: u32,
    keyctl: u32,
    setns: u32,
    unshare: u32,
}

// linux/audit.h.
const WIDE: u32 = 0x8000_0000;
const LITTLE_ENDIAN: u32 = 0x4000_0000;

/// A kernel of 64 bits, and the programs of 32 that it runs.
const X86: [Architecture; 2] = [
    Architecture {
        id: libc::EM_X86_64 as u32 | WIDE | LITTLE_ENDIAN,
        clone: 56,
        clone3: 435,
        keyctl: 250,
        setns: 308,
        unshare: 272,
    },
    Architecture {
        id: libc::EM_386 as u32 | LITTLE_ENDIAN,
        clone: 120,
        clone3: 435,
        keyctl: 288,
        setns: 346,
        unshare: 310,
    },
];
const ARM: [Architecture; 2] = [
    Architecture {
        id: libc::EM_AARCH64 as u32 | WIDE | LITTLE_ENDIAN,
        clone: 220,
        clone3: 435,
        keyctl: 219,
        setns: 268,
        unshare: 97,
    },
    Architecture {
        id: libc::EM_ARM as u32 | LITTLE_ENDIAN,
        clone: 120,
        clone3: 435,
        keyctl: 311,
        setns: 375,
        unshare: 337,
    },
];
const HOST: [Architecture; 2] = if cfg!(all(target_arch = "x86_64", target_endian = "little")) {
    X86
} else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
    ARM
} else {
    panic!("the numbers of this architecture's system calls are not known")
};

/// x32 programs are x86_64 to the kernel, with this bit in each number.
const X32: u32 = 0x4000_0000;

/// linux/keyctl.h.
const KEYCTL_GET_PERSISTENT: u32 = 22;

/// Which calls of one number are refused.
#[derive(Debug)]
enum Refused {
    All,
    /// Those with any of these bits in an argument. The kernel, too, looks at no more than its lower half.
    WithBits(u32, u32),
    WithValue(u32, u32),
}

/// Restricts the calling thread, and whatever it will begin or execute, for good.
pub(super) fn install(user_namespaces: UserNamespaces) -> Result<(), Failure> {
    // Made when the driver is built: a task's start pays for the kernel's part alone.
    static REFUSED: Program = Program::new(&HOST, UserNamespaces::Refused);
    static ALLOWED: Program = Program::new(&HOST, UserNamespaces::Allowed);
    let program = match user_namespaces {
        UserNamespaces::Refused => &REFUSED,
        UserNamespaces::Allowed => &ALLOWED,
    };
    sys::install_filter(program.instructions()).map_err(|error| {
        Failure::new(Step::Filter, error.raw_os_error().unwrap_or(0))
            .note("is CONFIG_SECCOMP_FILTER in the kernel?")
    })
}

/// What is refused, and with which error. Where user namespaces are allowed, the first of them alone.
const fn rules(of: &Architecture) -> [(u32, Refused, i32); 5] {
    const NEWUSER: u32 = libc::CLONE_NEWUSER as u32;
    [
        // Kerberos takes this error, and no other, for leave to use the user's keyring instead.
        (
            of.keyctl,
            Refused::WithValue(0, KEYCTL_GET_PERSISTENT),
            libc::EOPNOTSUPP,
        ),
        (of.clone, Refused::WithBits(0, NEWUSER), libc::EPERM),
        (of.unshare, Refused::WithBits(0, NEWUSER), libc::EPERM),
        (of.setns, Refused::WithBits(1, NEWUSER), libc::EPERM),
        // Its flags are in memory, where a filter cannot look. C libraries go on with clone.
        (of.clone3, Refused::All, libc::ENOSYS),
    ]
}

#[derive(Debug)]
struct Program {
    instructions: [sock_filter; Program::MAX_LENGTH],
    length: usize,
}

impl Program {
    /// More than are needed; a program that outgrows them does not build.
    const MAX_LENGTH: usize = 64;

    // Of struct seccomp_data.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const ARGUMENTS: u32 = 16;

    const fn new(architectures: &[Architecture; 2], user_namespaces: UserNamespaces) -> Program {
        let nothing = sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let mut program = Program {
            instructions: [nothing; Program::MAX_LENGTH],
            length: 0,
        };
        program.load(Program::ARCHITECTURE);
        let mut at = 0;
        while at < architectures.len() {
            let others = program.unless(libc::BPF_JEQ, architectures[at].id);
            program.judge(&architectures[at], user_namespaces);
            program.lead_here(others);
            at += 1;
        }
        // No kernel of today's has a third kind of programs.
        program.refuse(libc::ENOSYS);
        program
    }

    const fn judge(&mut self, of: &Architecture, user_namespaces: UserNamespaces) {
        self.load(Program::NUMBER);
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, !X32);
        let rules = rules(of);
        let count = match user_namespaces {
            UserNamespaces::Refused => rules.len(),
            UserNamespaces::Allowed => 1,
        };
        let mut at = 0;
        while at < count {
            let (number, refused, errno) = &rules[at];
            let others = self.unless(libc::BPF_JEQ, *number);
            match refused {
                Refused::All => self.refuse(*errno),
                Refused::WithBits(argument, bits) => {
                    self.load(Program::ARGUMENTS + 8 * *argument);
                    let passed = self.unless(libc::BPF_JSET, *bits);
                    self.refuse(*errno);
                    self.lead_here(passed);
                    self.allow();
                }
                Refused::WithValue(argument, value) => {
                    self.load(Program::ARGUMENTS + 8 * *argument);
                    let passed = self.unless(libc::BPF_JEQ, *value);
                    self.refuse(*errno);
                    self.lead_here(passed);
                    self.allow();
                }
            }
            self.lead_here(others);
            at += 1;
        }
        self.allow();
    }

    fn instructions(&self) -> &[sock_filter] {
        &self.instructions[..self.length]
    }

    /// Loads a word of struct seccomp_data.
    const fn load(&mut self, offset: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    }

    /// Goes on if the word that was loaded is as `test` says, or else to where the result is led.
    const fn unless(&mut self, test: u32, value: u32) -> usize {
        self.push(libc::BPF_JMP | test | libc::BPF_K, value);
        self.length - 1
    }

    const fn lead_here(&mut self, jump: usize) {
        // The length of a program fits.
        self.instructions[jump].jf = (self.length - jump - 1) as u8;
    }

    const fn allow(&mut self) {
        self.push(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);
    }

    const fn refuse(&mut self, errno: i32) {
        let answer = libc::SECCOMP_RET_ERRNO | errno as u32;
        self.push(libc::BPF_RET | libc::BPF_K, answer);
    }

    const fn push(&mut self, code: u32, k: u32) {
        self.instructions[self.length] = sock_filter {
            code: code as u16,
            jt: 0,
            jf: 0,
            k,
        };
        self.length += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const NEWUSER: u64 = 0x1000_0000;
    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x5_0001;
    const ENOSYS: u32 = 0x5_0026;
    const EOPNOTSUPP: u32 = 0x5_005f;

    /// What a kernel makes of a call: the instructions that filters have, and none else.
    fn run(program: &[sock_filter], number: u32, architecture: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(architecture.to_le_bytes());
        data.extend(0x1234_5678_9abc_def0_u64.to_le_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let word = |at: usize| {
            assert!(at.is_multiple_of(4) && at < 64, "a load at {at}");
            u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
        };
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |is_so: bool| usize::from(if is_so { jt } else { jf });
            match code {
                0x20 => loaded = word(k as usize),
                0x54 => loaded &= k,
                0x15 => at += jump(loaded == k),
                0x45 => at += jump(loaded & k != 0),
                0x06 => return k,
                other => panic!("{other:#x} is no instruction of ours"),
            }
        }
    }

    fn each_program(of: impl Fn(&Architecture, UserNamespaces, &dyn Fn(u32, [u64; 6]) -> u32)) {
        for kernel in [&X86, &ARM] {
            for user_namespaces in [UserNamespaces::Refused, UserNamespaces::Allowed] {
                let program = Program::new(kernel, user_namespaces);
                for architecture in kernel {
                    let id = architecture.id;
                    of(architecture, user_namespaces, &|number, arguments| {
                        run(program.instructions(), number, id, arguments)
                    });
                }
            }
        }
    }

    #[test]
    fn every_call_is_allowed_but_those_that_are_named() {
        let arguments = [
            [0; 6],
            [u64::MAX; 6],
            [NEWUSER; 6],
            [u64::from(KEYCTL_GET_PERSISTENT); 6],
        ];
        each_program(|of, user_namespaces, call| {
            let named = [of.clone, of.clone3, of.keyctl, of.setns, of.unshare];
            let mut refused = BTreeSet::new();
            // x32's numbers, and the one that a tracer leaves of a call that it takes away.
            let numbers = (0..600).flat_map(|number| [number, X32 | number]);
            for number in numbers.chain([u32::MAX, 983_042]) {
                for arguments in arguments {
                    if call(number, arguments) != ALLOW {
                        refused.insert(number);
                    }
                }
            }
            let expected = match user_namespaces {
                UserNamespaces::Refused => named.to_vec(),
                UserNamespaces::Allowed => vec![of.keyctl],
            };
            let expected = expected.iter().flat_map(|number| [*number, X32 | number]);
            assert_eq!(refused, expected.collect(), "{of:?}");
        });
    }

    #[test]
    fn a_named_call_is_refused_by_its_arguments_with_the_error_that_programs_expect() {
        each_program(|of, user_namespaces, call| {
            let refused = |errno| match user_namespaces {
                UserNamespaces::Refused => errno,
                UserNamespaces::Allowed => ALLOW,
            };
            let first = |value| [value, 0, 0, 0, 0, 0];
            let second = |value| [0, value, 0, 0, 0, 0];
            // fork is one of these: with a signal, and registers that say nothing in their upper half.
            for flags in [17, 0x3d0f00, 0x6c02_0000, 0xffff_ffff_0000_0011] {
                assert_eq!(call(of.clone, first(flags)), ALLOW);
                assert_eq!(call(of.clone, first(flags | NEWUSER)), refused(EPERM));
            }
            for flags in [0, 0x2_0000, 0x6c02_0000] {
                assert_eq!(call(of.unshare, first(flags)), ALLOW);
                assert_eq!(call(of.unshare, first(flags | NEWUSER)), refused(EPERM));
                assert_eq!(call(of.setns, second(flags)), ALLOW);
                assert_eq!(call(of.setns, second(flags | NEWUSER)), refused(EPERM));
            }
            assert_eq!(call(of.setns, first(NEWUSER)), ALLOW);
            assert_eq!(call(of.clone3, [0; 6]), refused(ENOSYS));
            // Whatever else keyrings are asked for, and with any upper half, which the kernel does not look at.
            for option in (0..40).filter(|option| *option != 22) {
                assert_eq!(call(of.keyctl, first(option)), ALLOW);
            }
            for option in [22, 22 | 1 << 32] {
                assert_eq!(call(of.keyctl, first(option)), EOPNOTSUPP);
            }
        });
    }

    #[test]
    fn programs_of_another_machine_are_told_that_there_is_no_such_call() {
        let program = Program::new(&X86, UserNamespaces::Allowed);
        for id in [0, ARM[0].id, ARM[1].id, u32::MAX] {
            assert_eq!(run(program.instructions(), 1, id, [0; 6]), ENOSYS);
        }
    }

    #[test]
    fn the_numbers_are_those_of_this_machine() {
        let [of, _] = HOST;
        let ours = [of.clone, of.clone3, of.keyctl, of.setns, of.unshare];
        let known = [
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_keyctl,
            libc::SYS_setns,
            libc::SYS_unshare,
        ];
        assert_eq!(ours.map(i64::from), known);
        assert_eq!(X86.map(|of| of.id), [0xc000_003e, 0x4000_0003]);
        assert_eq!(ARM.map(|of| of.id), [0xc000_00b7, 0x4000_0028]);
    }
}
