//! An allocation's directories as Nomad makes them, and a helper started on them through the library.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nomad_driver_exec2::launch::report::{Failure, Message, receive, release};
use nomad_driver_exec2::launch::{Parked, spawn};
use nomad_driver_exec2::plan::steps::{
    Access, Order, Place, Rule, RunMask, Source, Stdio, TaskDir, Tree, View,
};
use nomad_driver_exec2::record::{self, Exit, Record};
use rustix::process::{Resource, getrlimit};
use tempfile::TempDir;

/// A dynamic workload user: in no passwd file.
pub const DYNAMIC: u32 = 80001;
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The default unveil paths.
const DEFAULTS: &[&str] = &[
    "rx:/bin",
    "rx:/usr/bin",
    "rx:/usr/local/bin",
    "rw:/dev/null",
    "rx:/lib",
    "rx:/lib64",
    "rx:/usr/lib",
    "rx:/usr/lib64",
    "rx:/usr/libexec",
    "rx:/usr/local/lib",
    "rx:/usr/local/lib64",
    "r:/etc/ld.so.conf",
    "r:/etc/ld.so.cache",
    "r:/etc/ld.so.conf.d",
    "rw:/dev/full",
    "r:/dev/zero",
    "r:/dev/fd",
    "rw:/dev/stdin",
    "rw:/dev/stdout",
    "r:/dev/urandom",
    "w:/dev/log",
    "r:/usr/share/locale",
    "r:/proc/self/cmdline",
    "r:/usr/share/zoneinfo",
    "r:/usr/share/common-licenses",
    "r:/proc/sys/kernel/ngroups_max",
    "r:/proc/sys/kernel/cap_last_cap",
    "r:/proc/sys/vm/overcommit_memory",
    "r:/etc/hosts",
    "r:/hostname",
    "r:/etc/services",
    "r:/etc/protocols",
    "r:/etc/resolv.conf",
    "r:/etc/ssl/certs",
];

#[derive(Debug)]
pub struct Stage {
    pub dir: TempDir,
    /// M: what the task sees as its own.
    pub task_dir: PathBuf,
    /// Where the logs really are.
    pub logs: PathBuf,
    pub record: File,
    outputs: [File; 2],
}

impl Stage {
    pub fn new() -> Stage {
        Stage::below("/var/tmp")
    }

    pub fn below(base: impl AsRef<Path>) -> Stage {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the helper's tests make mounts, namespaces and users: run them as root"
        );
        let dir = tempfile::Builder::new()
            .prefix("exec2-stage-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(base)
            .unwrap();
        let alloc_dir = dir.path().join("alloc-dir");
        let task_dir = dir.path().join("mounts/web");
        for name in ["alloc", "alloc/logs", "alloc/data", "web/local"] {
            make(&alloc_dir.join(name), 0o777);
        }
        for name in ["alloc", "local", "secrets", "tmp"] {
            make(&task_dir.join(name), 0o777);
        }
        bind(&alloc_dir.join("alloc"), &task_dir.join("alloc"));
        bind(&alloc_dir.join("web/local"), &task_dir.join("local"));
        let logs = alloc_dir.join("alloc/logs");
        let outputs = ["stdout", "stderr"].map(|name| {
            let path = logs.join(format!(".web.{name}.fifo"));
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
            reader(&path)
        });
        Stage {
            record: new_record(),
            dir,
            task_dir,
            logs,
            outputs,
        }
    }

    pub fn fifo(&self, name: &str) -> PathBuf {
        self.logs.join(format!(".web.{name}.fifo"))
    }

    /// Something beside the task's directories, on the host.
    pub fn host(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A shell script as a dynamic user, with the default unveil paths.
    pub fn script(&self, script: &str) -> Order {
        self.order("/bin/sh", &["-c", script])
    }

    pub fn order(&self, command: &str, args: &[&str]) -> Order {
        let found = fs::metadata(&self.task_dir).unwrap();
        let own = ["local", "alloc", "secrets", "tmp"].map(|name| own(name, "rwxc"));
        let limit = getrlimit(Resource::Nofile);
        let number = |value: Option<u64>| value.unwrap_or(libc::RLIM_INFINITY);
        Order {
            command: command.into(),
            args: args.iter().map(ToString::to_string).collect(),
            env: vec![("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into())],
            work_dir: Place::Task("".into()),
            uid: DYNAMIC,
            gid: DYNAMIC,
            oom_score_adj: 0,
            bounding: 0,
            ambient: 0,
            network_namespace: None,
            stdio: Stdio::Fifos {
                stdout: self.fifo("stdout"),
                stderr: self.fifo("stderr"),
            },
            task_dir: TaskDir {
                path: self.task_dir.clone(),
                device: found.dev(),
                inode: found.ino(),
            },
            view: View {
                tree: Tree::ReadOnly,
                writable: Vec::new(),
                run: RunMask::Managers,
                kept: Vec::new(),
            },
            rules: own
                .into_iter()
                .chain(DEFAULTS.iter().map(|rule| host(rule, Source::Default)))
                .collect(),
            open_files: (number(limit.current), number(limit.maximum)),
        }
    }

    pub fn park(&self, order: &Order) -> Result<Helper<'_>, Failure> {
        let mut helper = self.spawn(order)?;
        match helper.next() {
            Some((Message::Parked, None)) => Ok(helper),
            Some((Message::Failed(failure), None)) => {
                helper.reap();
                Err(failure)
            }
            other => panic!("instead of parking: {other:?}"),
        }
    }

    pub fn spawn(&self, order: &Order) -> Result<Helper<'_>, Failure> {
        let program = rustix::fs::open(
            env!("CARGO_BIN_EXE_nomad-driver-exec2"),
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let parked = spawn(program.as_fd(), order, &self.record, None)?;
        Ok(Helper {
            parked,
            stage: self,
        })
    }

    pub fn start(&self, order: &Order) -> Result<Task<'_>, Failure> {
        self.park(order)?.go()
    }

    /// Runs the order to its end.
    pub fn run(&self, order: &Order) -> Outcome {
        match self.start(order) {
            Ok(task) => task.end(),
            Err(failure) => panic!("did not start: {failure}"),
        }
    }

    /// The sentence of a start that fails. Nothing of it is left.
    pub fn fails(&self, order: &Order) -> Failure {
        let Err(failure) = self.start(order) else {
            panic!("it started")
        };
        assert_eq!(self.read_record(), Record::Open);
        failure
    }

    pub fn read_record(&self) -> Record {
        use std::os::unix::fs::FileExt;
        let mut page = [0; record::SIZE_BYTES];
        self.record.read_exact_at(&mut page, 0).unwrap();
        record::read(&page)
    }

    fn said(&self, output: usize) -> String {
        let mut text = Vec::new();
        // The reader does not block: without a writer this is the end, with a silent one an error.
        let _ = (&self.outputs[output]).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for name in ["alloc", "local"] {
            let _ = umount2(&self.task_dir.join(name), MntFlags::MNT_DETACH);
        }
    }
}

/// A helper that waits to be released.
#[derive(Debug)]
pub struct Helper<'a> {
    pub parked: Parked,
    stage: &'a Stage,
}

impl<'a> Helper<'a> {
    pub fn next(&mut self) -> Option<(Message, Option<OwnedFd>)> {
        await_readable(&self.parked.control);
        receive(&self.parked.control).unwrap()
    }

    pub fn go(mut self) -> Result<Task<'a>, Failure> {
        release(&self.parked.control).unwrap();
        match self.next() {
            Some((Message::Started, Some(main))) => Ok(Task { helper: self, main }),
            Some((Message::Failed(failure), None)) => {
                self.reap();
                Err(failure)
            }
            other => panic!("instead of starting: {other:?}"),
        }
    }

    /// Waits for the supervisor's end and returns its exit code, or the signal that killed it as a negative number.
    pub fn reap(&self) -> i32 {
        use nix::sys::wait::WaitStatus;
        await_readable(&self.parked.pidfd);
        match waitid(Id::PIDFd(self.parked.pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap() {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => -(signal as i32),
            other => panic!("{other:?}"),
        }
    }
}

/// A task that runs.
#[derive(Debug)]
pub struct Task<'a> {
    pub helper: Helper<'a>,
    pub main: OwnedFd,
}

#[derive(Debug)]
pub struct Outcome {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

impl Task<'_> {
    /// The main process' pid on the host.
    pub fn pid(&self) -> i32 {
        let info = format!("/proc/self/fdinfo/{}", self.main.as_raw_fd());
        let info = fs::read_to_string(info).unwrap();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        pid.unwrap().trim().parse().unwrap()
    }

    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    pub fn supervisor(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.helper.parked.pid)).unwrap()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::pidfd_send_signal(&self.main, signal).unwrap();
    }

    /// Waits until the task has said `text` on stdout.
    pub fn says(&self, text: &str) -> String {
        let mut said = String::new();
        for _ in 0..2000 {
            said += &self.helper.stage.said(0);
            if said.contains(text) {
                return said;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it said {said:?}, and {:?}", self.helper.stage.said(1));
    }

    pub fn end(self) -> Outcome {
        assert_eq!(self.helper.reap(), 0, "the supervisor's own exit");
        let stage = self.helper.stage;
        match stage.read_record() {
            Record::Exited(exit) => Outcome {
                exit,
                stdout: stage.said(0),
                stderr: stage.said(1),
            },
            other => panic!("the record says {other:?}"),
        }
    }
}

pub fn new_record() -> File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&record::open()).unwrap();
    file
}

/// `mode:path` on the host.
pub fn host(rule: &str, source: Source) -> Rule {
    let (mode, path) = rule.split_once(':').unwrap();
    Rule {
        place: Place::Host(path.into()),
        access: access(mode),
        source,
    }
}

/// `mode:path` as a task asks for it.
pub fn asked(mode: &str, path: impl AsRef<Path>) -> Rule {
    host(&format!("{mode}:{}", path.as_ref().display()), Source::Task)
}

/// A rule beneath the task's directory.
pub fn own(path: &str, mode: &str) -> Rule {
    Rule {
        place: Place::Task(path.into()),
        access: access(mode),
        source: Source::Driver,
    }
}

fn access(mode: &str) -> Access {
    Access {
        read: mode.contains('r'),
        write: mode.contains('w'),
        execute: mode.contains('x'),
        create: mode.contains('c'),
    }
}

pub fn make(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A file that belongs to the dynamic user.
pub fn file(path: &Path, content: &str) -> PathBuf {
    fs::write(path, content).unwrap();
    chown(path, Some(DYNAMIC), Some(DYNAMIC)).unwrap();
    path.into()
}

fn bind(source: &Path, target: &Path) {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
}

fn reader(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

fn await_readable(fd: impl AsFd) {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(
        poll(&mut polled, timeout).unwrap(),
        1,
        "nothing within {PATIENCE:?}"
    );
}
