//! What the attempts are aimed at: throw-away files, sockets, processes and a cgroup, gone with the value.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::terminal::Terminal;
use crate::nomad::said;

pub const GROUND: &str = "/srv/exec2-attacks";
const CGROUP: &str = "/sys/fs/cgroup/exec2-attacks";
const RUN_SOCKET: &str = "/run/exec2-attacks.socket";
const USER_DIR: &str = "/run/user/exec2-attacks";
const QUEUE: &str = "/dev/mqueue/exec2-attacks";
const SHARED: [&str; 2] = ["/tmp/exec2-attacks", "/dev/shm/exec2-attacks"];

/// What has no file system: a segment, a queue and keys, which end by themselves. Whoever sets a key's end must
/// have it by its session keyring.
const MAKE_SHARED: &str = r#"umask 0; defined shmget(0x0e2e2e2e, 64, 01666) or die "shmget: $!";
    sub made { my ($name, @of) = @_; my $made = syscall($sys{$name}, @of); $made == -1 and die "$name: $!"; $made }
    made("mq_open", my $queue = "exec2-attacks", 0102, 0666, 0);
    made("keyctl", 8, -4, -3);
    for (["exec2-attacks", -3], ["exec2-attacks-of-user", -4]) {
        my ($what, $keyring) = @$_;
        my $key = made("add_key", my $kind = "user", $what, my $value = "x", 1, $keyring);
        made("keyctl", 15, $key, 900);
    }"#;

/// The numbers of system calls for Perl, which has them in no module of its own.
pub fn prelude() -> String {
    let numbers = [
        ("add_key", libc::SYS_add_key),
        ("bpf", libc::SYS_bpf),
        ("clone3", libc::SYS_clone3),
        ("fanotify_init", libc::SYS_fanotify_init),
        ("fsopen", libc::SYS_fsopen),
        ("init_module", libc::SYS_init_module),
        ("inotify_add_watch", libc::SYS_inotify_add_watch),
        ("clone", libc::SYS_clone),
        ("io_uring_enter", libc::SYS_io_uring_enter),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("mmap", libc::SYS_mmap),
        ("read", libc::SYS_read),
        ("inotify_init1", libc::SYS_inotify_init1),
        #[cfg(target_arch = "x86_64")]
        ("iopl", libc::SYS_iopl),
        ("kexec_load", libc::SYS_kexec_load),
        ("keyctl", libc::SYS_keyctl),
        ("mknodat", libc::SYS_mknodat),
        ("mount", libc::SYS_mount),
        ("mount_setattr", libc::SYS_mount_setattr),
        ("mq_open", libc::SYS_mq_open),
        ("open_by_handle_at", libc::SYS_open_by_handle_at),
        ("open_tree", libc::SYS_open_tree),
        ("perf_event_open", libc::SYS_perf_event_open),
        ("pidfd_getfd", libc::SYS_pidfd_getfd),
        ("pidfd_open", libc::SYS_pidfd_open),
        ("prlimit64", libc::SYS_prlimit64),
        ("ptrace", libc::SYS_ptrace),
        ("reboot", libc::SYS_reboot),
        ("sched_setscheduler", libc::SYS_sched_setscheduler),
        ("sethostname", libc::SYS_sethostname),
        ("setns", libc::SYS_setns),
        ("setxattr", libc::SYS_setxattr),
        ("shmget", libc::SYS_shmget),
        ("truncate", libc::SYS_truncate),
        ("unshare", libc::SYS_unshare),
        ("vhangup", libc::SYS_vhangup),
    ];
    let numbers = numbers.map(|(name, number)| format!("{name} => {number}"));
    format!("our %sys; BEGIN {{ %sys = ({}) }}\n", numbers.join(", "))
}

#[derive(Debug)]
pub struct Stage {
    _listeners: Vec<UnixListener>,
    terminal: Terminal,
}

impl Stage {
    /// `owner` is the user of what has an owner.
    pub fn new(owner: u32) -> Result<Stage> {
        clear();
        fs::create_dir_all(GROUND)?;
        let (kind, options) = (Some("tmpfs"), Some("mode=755"));
        mount(
            Some("exec2-attacks"),
            GROUND,
            kind,
            MsFlags::empty(),
            options,
        )?;
        let at = |name: &str| Path::new(GROUND).join(name);
        for dir in [
            "dir",
            "devices",
            "own",
            "own/task",
            "alloc",
            "alloc/logs",
            "allocs/control/alloc/logs",
        ] {
            fs::create_dir_all(at(dir))?;
            open_to_all(&at(dir))?;
        }
        let logs = [
            "alloc/logs/t.stdout.0",
            "allocs/control/alloc/logs/t.stdout.0",
        ];
        for file in ["open", "dir/file"].iter().chain(&logs) {
            fs::write(at(file), "as it was\n")?;
            open_to_all(&at(file))?;
            chown(at(file), Some(owner), Some(owner))?;
        }
        fs::write(at("secret"), "secret\n")?;
        fs::copy("/usr/bin/true", at("program"))?;
        fs::copy("/usr/bin/id", at("setuid"))?;
        fs::set_permissions(at("setuid"), fs::Permissions::from_mode(0o4755))?;
        let null = at("devices/null");
        mknod(&null, SFlag::S_IFCHR, Mode::empty(), makedev(1, 3))?;
        open_to_all(&null)?;
        for path in SHARED {
            fs::write(path, "shared\n")?;
        }
        fs::create_dir_all(USER_DIR)?;
        let mut listeners = vec![UnixListener::bind_addr(&SocketAddr::from_abstract_name(
            "exec2-attacks",
        )?)?];
        for path in [
            &at("socket"),
            Path::new(RUN_SOCKET),
            &Path::new(USER_DIR).join("socket"),
        ] {
            listeners.push(UnixListener::bind(path)?);
            open_to_all(path)?;
        }
        let script = format!("{}{MAKE_SHARED}", prelude());
        said("perl", &["-e", &script])?;
        fs::create_dir(CGROUP)?;
        Ok(Stage {
            _listeners: listeners,
            terminal: Terminal::with_user(owner)?,
        })
    }

    /// Of the host's.
    pub fn terminal(&self) -> &Terminal {
        &self.terminal
    }

    /// All that can be seen of the files and of the terminal from outside.
    pub fn files(&self) -> Result<String> {
        let listed = said(
            "find",
            &[GROUND, "-printf", "%p %y %m %U %G %s %T@ %n %l\\n"],
        )?;
        let mut lines: Vec<&str> = listed.lines().collect();
        lines.sort_unstable();
        let null = said(
            "find",
            &["/dev/null", "-printf", "%p %y %m %U %G %T@ %C@\\n"],
        )?;
        let terminal = self.terminal.state()?;
        lines.extend([null.as_str(), terminal.as_str()]);
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mounts = mounts
            .lines()
            .filter(|mount| mount.contains("exec2-attack"));
        lines.extend(mounts);
        Ok(lines.join("\n"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        clear();
    }
}

/// Whatever there is of it.
fn clear() {
    let _ = umount2(GROUND, MntFlags::MNT_DETACH);
    for dir in [GROUND, CGROUP] {
        let _ = fs::remove_dir(dir);
    }
    let _ = fs::remove_dir_all(USER_DIR);
    for file in [RUN_SOCKET, QUEUE].iter().chain(&SHARED) {
        let _ = fs::remove_file(file);
    }
    let null = Path::new("/dev/null");
    let _ = chown(null, Some(0), Some(0));
    let _ = open_to_all(null);
    let _ = Command::new("ipcrm")
        .args(["-M", "0x0e2e2e2e"])
        .stderr(Stdio::null())
        .status();
}

fn open_to_all(path: &Path) -> Result<()> {
    let mode = if path.is_dir() { 0o777 } else { 0o666 };
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// A process that does no harm, for others to do some to.
#[derive(Debug)]
pub struct Victim(Child);

impl Victim {
    /// Its pid is greater than `above`.
    pub fn new(uid: u32, above: u32) -> Result<Victim> {
        loop {
            let child = Command::new("sleep")
                .arg("600")
                .uid(uid)
                .gid(uid)
                .stdin(Stdio::null())
                .spawn()
                .context("sleep")?;
            let victim = Victim(child);
            if victim.id() > above {
                return Ok(victim);
            }
        }
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn expect_unharmed(&mut self) -> Result<()> {
        ensure!(self.0.try_wait()?.is_none(), "it was ended");
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
