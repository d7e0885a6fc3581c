//! What the system call filter refuses on the running kernel, to programs of each kind that the kernel runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nomad_driver_exec2::plan::steps::{Order, UserNamespaces};

use crate::stage::{DYNAMIC, Stage, USERS};

/// Each call in a process of its own. Says what errno it came to, 0 for none.
const CALLS: &str = r#"
use POSIX ();
my %calls = (
    unshare => sub { syscall($sys{unshare}, NEWUSER) },
    "unshare-files" => sub { syscall($sys{unshare}, 0x400) },
    clone => sub { my $pid = syscall($sys{clone}, NEWUSER | 17, 0, 0, 0, 0); POSIX::_exit(0) if $pid == 0; $pid },
    "clone-process" => sub { my $pid = syscall($sys{clone}, 17, 0, 0, 0, 0); POSIX::_exit(0) if $pid == 0; $pid },
    clone3 => sub { my $arguments = pack("Q8", 0, 0, 0, 0, 17, 0, 0, 0); my $pid = syscall($sys{clone3}, $arguments, 64); POSIX::_exit(0) if $pid == 0; $pid },
    # Of nothing: what a kernel says of a namespace that the process is in already is another word than a filter's.
    setns => sub { syscall($sys{setns}, -1, NEWUSER) },
    "setns-mount" => sub { syscall($sys{setns}, -1, 0x20000) },
    "persistent-keyring" => sub { syscall($sys{keyctl}, 22, -1, -2) },
    "session-keyring" => sub { syscall($sys{keyctl}, 0, -3, 0) },
);
$| = 1;
for my $name (sort keys %calls) {
    my $pid = fork // die;
    if (!$pid) { $! = 0; my $result = $calls{$name}->(); printf "%s %d\n", $name, $result == -1 ? $! : 0; POSIX::_exit(0) }
    waitpid $pid, 0;
}
"#;

fn script() -> String {
    let numbers = [
        ("unshare", libc::SYS_unshare),
        ("clone", libc::SYS_clone),
        ("clone3", libc::SYS_clone3),
        ("setns", libc::SYS_setns),
        ("keyctl", libc::SYS_keyctl),
    ];
    let numbers = numbers.map(|(name, number)| format!("{name} => {number}"));
    format!(
        "my %sys = ({}); use constant NEWUSER => {};{CALLS}",
        numbers.join(", "),
        libc::CLONE_NEWUSER
    )
}

/// What the calls come to without the driver.
fn unhindered() -> String {
    let output = Command::new("perl")
        .args(["-e", &script()])
        .uid(DYNAMIC)
        .gid(DYNAMIC)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The lines of `said`, with other numbers where there are some.
fn but(said: &str, other: &[(&str, i32)]) -> String {
    let line = |line: &str| {
        let name = line.split(' ').next().unwrap();
        let found = other.iter().find(|(other, _)| *other == name);
        found.map_or(format!("{line}\n"), |(name, errno)| {
            format!("{name} {errno}\n")
        })
    };
    said.lines().map(line).collect()
}

#[test]
fn user_namespaces_and_the_persistent_keyring_are_refused_and_nothing_else_of_their_calls() {
    let host = unhindered();
    assert_eq!(host.lines().count(), 9, "{host}");
    for ours in [
        "clone-process 0",
        "clone3 0",
        "setns 9",
        "setns-mount 9",
        "session-keyring 0",
    ] {
        assert!(host.contains(ours), "{host}");
    }
    let no_keyring = ("persistent-keyring", libc::EOPNOTSUPP);
    let refused = [
        no_keyring,
        ("unshare", libc::EPERM),
        ("clone", libc::EPERM),
        ("clone3", libc::ENOSYS),
        ("setns", libc::EPERM),
    ];
    for user in USERS {
        let stage = Stage::new();
        let order = user(&stage.order("perl", &["-e", &script()]));
        assert_eq!(stage.run(&order).stdout, but(&host, &refused));
        let order = Order {
            user_namespaces: UserNamespaces::Allowed,
            ..order
        };
        assert_eq!(stage.run(&order).stdout, but(&host, &[no_keyring]));
    }
}

/// C libraries begin threads and processes with clone3, and go on with clone.
#[test]
fn threads_and_processes_begin_as_ever() {
    let script = "use threads; my $t = threads->create(sub { 3 }); exit 4 + $t->join + (system('true') == 0 ? 10 : 0)";
    let stage = Stage::new();
    let outcome = stage.run(&stage.order("perl", &["-e", script]));
    assert_eq!(outcome.exit.code, 17, "{}", outcome.stderr);
}

/// A static i386 program that makes one call, and exits with its errno.
fn program_of_32_bits(number: u32, arguments: [u32; 2]) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let mut code = Vec::new();
    // mov eax, ebx, ecx; int 0x80.
    for (register, value) in [(0xb8, number), (0xbb, arguments[0]), (0xb9, arguments[1])] {
        code.push(register);
        code.extend(value.to_le_bytes());
    }
    code.extend([0xcd, 0x80]);
    // mov ebx, eax; neg ebx; mov eax, 1 (exit); int 0x80.
    code.extend([0x89, 0xc3, 0xf7, 0xdb, 0xb8, 1, 0, 0, 0, 0xcd, 0x80]);
    let length = HEADERS + code.len() as u32;
    let mut program = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    program.extend([2_u16, 3].map(u16::to_le_bytes).concat());
    program.extend([1, BASE + HEADERS, 52, 0, 0].map(u32::to_le_bytes).concat());
    program.extend([52_u16, 32, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    let segment = [1, 0, BASE, BASE, length, length, 5, 0x1000];
    program.extend(segment.map(u32::to_le_bytes).concat());
    program.extend(code);
    program
}

fn write(path: &Path, program: &[u8]) {
    fs::write(path, program).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_refused_is_refused_to_programs_of_32_bits_too() {
    const NEWUSER: u32 = libc::CLONE_NEWUSER as u32;
    let (exit, clone, unshare, keyctl, setns, clone3) = (1, 120, 310, 288, 346, 435);
    let probe = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    write(&probe, &program_of_32_bits(exit, [7, 0]));
    match Command::new(&probe).status() {
        Ok(status) => assert_eq!(status.code(), Some(7)),
        // On the host itself: that kernel runs none, whoever starts it.
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            eprintln!("skipped: this kernel runs no programs of 32 bits ({error})");
            return;
        }
        Err(error) => panic!("{error}"),
    }
    let cases = [
        (exit, [7, 0], 7),
        (unshare, [NEWUSER, 0], libc::EPERM),
        (unshare, [0, 0], 0),
        (clone, [NEWUSER | 17, 0], libc::EPERM),
        (clone3, [0, 0], libc::ENOSYS),
        (setns, [u32::MAX, NEWUSER], libc::EPERM),
        (setns, [u32::MAX, 0], libc::EBADF),
        (keyctl, [22, u32::MAX], libc::EOPNOTSUPP),
    ];
    for user in USERS {
        let stage = Stage::new();
        let path = stage.task_dir.join("local/program");
        let order = user(&stage.order("local/program", &[]));
        for (number, arguments, code) in cases {
            write(&path, &program_of_32_bits(number, arguments));
            let outcome = stage.run(&order);
            assert_eq!(outcome.exit.code, code, "{number} {arguments:?}");
        }
        write(&path, &program_of_32_bits(unshare, [NEWUSER, 0]));
        let order = Order {
            user_namespaces: UserNamespaces::Allowed,
            ..order
        };
        assert_eq!(stage.run(&order).exit.code, 0);
    }
}
