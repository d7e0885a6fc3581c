//! The system calls by which a process names files, and what each argument is: all that Landlock or the read-only view could refuse.

/// An argument's place, from 0.
type Argument = usize;

/// Where a call has a path. Without a directory's argument it is relative to the working directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    pub dir: Option<Argument>,
    pub path: Argument,
}

/// Where an open has its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    Argument(Argument),
    /// In a struct open_how.
    How(Argument),
    /// Those of creat(2).
    Creat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Open(Named, Flags),
    /// Makes an entry in a directory.
    Make(Named),
    Remove(Named),
    /// The old name and the new one. The last is where flags are that could exchange the two.
    Rename(Named, Named, Option<Argument>),
    Link(Named, Named),
    Execute(Named),
    Truncate(Named),
    /// Of owner, mode, times or attributes: the kernel asks for no right, but for a mount that is not read-only.
    Change(Named),
    ChangeOpen(Argument),
    Bind(Argument, Argument),
    Connect(Argument, Argument),
    /// What files it then uses, no call tells.
    IoUring,
}

const fn named(path: Argument) -> Named {
    Named { dir: None, path }
}

const fn at(dir: Argument, path: Argument) -> Named {
    Named {
        dir: Some(dir),
        path,
    }
}

/// Since Linux 6.6, and of the same number everywhere.
const FCHMODAT2: i64 = 452;

/// Those that every architecture has.
const COMMON: &[(i64, Call)] = &[
    (libc::SYS_openat, Call::Open(at(0, 1), Flags::Argument(2))),
    (libc::SYS_openat2, Call::Open(at(0, 1), Flags::How(2))),
    (libc::SYS_mkdirat, Call::Make(at(0, 1))),
    (libc::SYS_mknodat, Call::Make(at(0, 1))),
    (libc::SYS_symlinkat, Call::Make(at(1, 2))),
    (libc::SYS_unlinkat, Call::Remove(at(0, 1))),
    (
        libc::SYS_renameat2,
        Call::Rename(at(0, 1), at(2, 3), Some(4)),
    ),
    (libc::SYS_linkat, Call::Link(at(0, 1), at(2, 3))),
    (libc::SYS_execve, Call::Execute(named(0))),
    (libc::SYS_execveat, Call::Execute(at(0, 1))),
    (libc::SYS_truncate, Call::Truncate(named(0))),
    (libc::SYS_fchmodat, Call::Change(at(0, 1))),
    (FCHMODAT2, Call::Change(at(0, 1))),
    (libc::SYS_fchownat, Call::Change(at(0, 1))),
    (libc::SYS_utimensat, Call::Change(at(0, 1))),
    (libc::SYS_setxattr, Call::Change(named(0))),
    (libc::SYS_lsetxattr, Call::Change(named(0))),
    (libc::SYS_removexattr, Call::Change(named(0))),
    (libc::SYS_lremovexattr, Call::Change(named(0))),
    (libc::SYS_fchmod, Call::ChangeOpen(0)),
    (libc::SYS_fchown, Call::ChangeOpen(0)),
    (libc::SYS_fsetxattr, Call::ChangeOpen(0)),
    (libc::SYS_fremovexattr, Call::ChangeOpen(0)),
    (libc::SYS_bind, Call::Bind(1, 2)),
    (libc::SYS_connect, Call::Connect(1, 2)),
    (libc::SYS_io_uring_setup, Call::IoUring),
];

/// The older ones, which newer architectures were spared.
#[cfg(target_arch = "x86_64")]
const OLD: &[(i64, Call)] = &[
    (libc::SYS_open, Call::Open(named(0), Flags::Argument(1))),
    (libc::SYS_creat, Call::Open(named(0), Flags::Creat)),
    (libc::SYS_mkdir, Call::Make(named(0))),
    (libc::SYS_mknod, Call::Make(named(0))),
    (libc::SYS_symlink, Call::Make(named(1))),
    (libc::SYS_unlink, Call::Remove(named(0))),
    (libc::SYS_rmdir, Call::Remove(named(0))),
    (libc::SYS_rename, Call::Rename(named(0), named(1), None)),
    (libc::SYS_renameat, Call::Rename(at(0, 1), at(2, 3), None)),
    (libc::SYS_link, Call::Link(named(0), named(1))),
    (libc::SYS_chmod, Call::Change(named(0))),
    (libc::SYS_chown, Call::Change(named(0))),
    (libc::SYS_lchown, Call::Change(named(0))),
    (libc::SYS_utime, Call::Change(named(0))),
    (libc::SYS_utimes, Call::Change(named(0))),
    (libc::SYS_futimesat, Call::Change(at(0, 1))),
];
#[cfg(target_arch = "aarch64")]
const OLD: &[(i64, Call)] = &[(libc::SYS_renameat, Call::Rename(at(0, 1), at(2, 3), None))];

/// The numbers of all, for the kernel's filter.
pub fn numbers() -> Vec<u32> {
    let all = COMMON.iter().chain(OLD);
    all.filter_map(|(number, _)| u32::try_from(*number).ok())
        .collect()
}

pub fn of_number(number: u64) -> Option<Call> {
    let mut all = COMMON.iter().chain(OLD);
    all.find(|(known, _)| u64::try_from(*known) == Ok(number))
        .map(|(_, call)| *call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_for_one_call() {
        let mut numbers = numbers();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), count);
        assert_eq!(
            of_number(libc::SYS_execve as u64),
            Some(Call::Execute(named(0)))
        );
        assert_eq!(of_number(libc::SYS_read as u64), None);
    }
}
