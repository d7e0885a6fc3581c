//! An allocation's directories as Nomad makes them, and a helper started on them through the library.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nomad_driver_exec2::launch::report::{Failure, Message, commit, receive, release};
use nomad_driver_exec2::launch::{Idle, Parked};
use nomad_driver_exec2::plan::capabilities::{Capabilities, Subject};
use nomad_driver_exec2::plan::steps::{
    Denials, Order, Place, Rule, Source, Stdio, TaskDir, UserNamespaces,
};
use nomad_driver_exec2::plan::unveil::{self, Alias, ByTask, Defaults, Gate};
use nomad_driver_exec2::record::{self, Exit, Record};
use rustix::process::{Resource, Signal, getrlimit, pidfd_send_signal};
use tempfile::TempDir;

/// A dynamic workload user: in no passwd file.
pub const DYNAMIC: u32 = 80001;
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Stage {
    dir: TempDir,
    /// M: what the task sees as its own.
    pub task_dir: PathBuf,
    /// Where the logs really are.
    pub logs: PathBuf,
    record: File,
    outputs: [File; 2],
}

impl Stage {
    pub fn new() -> Stage {
        Stage::below("/var/tmp")
    }

    pub fn below(base: &str) -> Stage {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the helper's tests make mounts, namespaces and users: run them as root"
        );
        share_mounts();
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

    /// A FIFO `local/gate` for the task to read a line from. It opens without waiting, at both ends.
    pub fn gate(&self) -> File {
        let path = self.task_dir.join("local/gate");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        chown(&path, Some(DYNAMIC), Some(DYNAMIC)).unwrap();
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    /// A shell script as a dynamic user, with the default unveil paths.
    pub fn script(&self, script: &str) -> Order {
        self.order("/bin/sh", &["-c", script])
    }

    /// A task that waits to be ended.
    pub fn idle(&self) -> Order {
        self.order("/bin/sleep", &["600"])
    }

    pub fn order(&self, command: &str, args: &[&str]) -> Order {
        let found = fs::metadata(&self.task_dir).unwrap();
        let limit = getrlimit(Resource::Nofile);
        let number = |value: Option<u64>| value.unwrap_or(libc::RLIM_INFINITY);
        let (rules, _) = unveil::rules(gate(Defaults::Unveiled), &[], &[]).unwrap();
        Order {
            command: command.into(),
            args: args.iter().map(ToString::to_string).collect(),
            env: vec![
                ("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into()),
                ("LC_ALL".into(), "C".into()),
            ],
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
                alloc_dir: self.dir.path().join("alloc-dir"),
                device: found.dev(),
                inode: found.ino(),
            },
            view: unveil::view(&rules, DYNAMIC),
            binds: Vec::new(),
            replaced: Vec::new(),
            rules,
            open_files: (number(limit.current), number(limit.maximum)),
            user_namespaces: UserNamespaces::Refused,
            denials: Denials::Unlogged,
            traced_calls: Vec::new(),
        }
    }

    /// A helper that prepares itself. `output` is for `Stdio::Given`.
    pub fn spawn(
        &self,
        order: &Order,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Helper<'_>, Failure> {
        let program = rustix::fs::open(
            env!("CARGO_BIN_EXE_nomad-driver-exec2"),
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let Parked {
            pidfd,
            pid,
            control,
        } = Idle::spawn(program.as_fd())?
            .take(order, &self.record, output.as_ref())
            .map_err(|(_, failure)| failure)?;
        let mut helper = Helper {
            supervisor: Supervisor { pidfd, pid },
            control,
            stage: self,
        };
        match helper.next() {
            Some((Message::Parked, None)) => Ok(helper),
            other => Err(helper.failed(other)),
        }
    }

    pub fn start(&self, order: &Order) -> Result<Task<'_>, Failure> {
        self.spawn(order, None)?.go()
    }

    /// Runs the order to its end.
    pub fn run(&self, order: &Order) -> Outcome {
        match self.start(order) {
            Ok(task) => task.end(),
            Err(failure) => panic!("did not start: {failure}"),
        }
    }

    /// The sentence of a start that fails. Nothing of it is left.
    pub fn fails(&self, order: &Order) -> String {
        let Err(failure) = self.start(order) else {
            panic!("it started")
        };
        assert_eq!(self.read_record(), Record::Open);
        failure.to_string()
    }

    pub fn read_record(&self) -> Record {
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

const ROOT: Subject = Subject {
    is_root: true,
    owns_network: false,
};

/// An order as it is, for the dynamic user, and for root.
pub const USERS: [fn(&Order) -> Order; 2] = [Order::clone, Changed::as_root];

/// Changes of an order.
pub trait Changed {
    fn unveiling(self, mode: &str, path: impl AsRef<Path>) -> Self;
    fn unveiled_by(self, source: Source, mode: &str, path: impl AsRef<Path>) -> Self;
    fn as_root(&self) -> Self;
    fn without_logs(self) -> Self;
}

impl Changed for Order {
    fn without_logs(self) -> Order {
        Order {
            stdio: Stdio::Null,
            ..self
        }
    }

    /// As the job asks for it.
    fn unveiling(self, mode: &str, path: impl AsRef<Path>) -> Order {
        self.unveiled_by(Source::Task, mode, path)
    }

    fn unveiled_by(mut self, source: Source, mode: &str, path: impl AsRef<Path>) -> Order {
        let entry = format!("{mode}:{}", path.as_ref().display());
        let aliases = [Alias::new(&self.task_dir.path, "")];
        let (rules, _) = unveil::rules(gate(Defaults::Veiled), &[entry], &aliases).unwrap();
        let asked = rules.into_iter().filter(|rule| rule.source == Source::Task);
        self.rules.extend(asked.map(|rule| Rule { source, ..rule }));
        self.view = unveil::view(&self.rules, self.uid);
        self
    }

    /// Root, with the capabilities that a root task has.
    fn as_root(&self) -> Order {
        Order {
            uid: 0,
            gid: 0,
            bounding: Capabilities::new(ROOT, &[], &[], &[]).unwrap().bounding,
            view: unveil::view(&self.rules, 0),
            ..self.clone()
        }
    }
}

/// A helper that waits to be released.
#[derive(Debug)]
pub struct Helper<'a> {
    pub supervisor: Supervisor,
    pub control: OwnedFd,
    stage: &'a Stage,
}

impl<'a> Helper<'a> {
    fn next(&mut self) -> Option<(Message, Option<OwnedFd>)> {
        await_readable(&self.control);
        receive(&self.control).unwrap()
    }

    fn failed(self, message: Option<(Message, Option<OwnedFd>)>) -> Failure {
        match message {
            Some((Message::Failed(failure), None)) => {
                self.supervisor.reap();
                failure
            }
            other => panic!("instead of a failure: {other:?}"),
        }
    }

    pub fn go(self) -> Result<Task<'a>, Failure> {
        let task = self.go_uncommitted()?;
        commit(task.control.as_ref().unwrap()).unwrap();
        Ok(task)
    }

    /// Up to where the plugin has yet to say that the task stays.
    pub fn go_uncommitted(mut self) -> Result<Task<'a>, Failure> {
        release(&self.control).unwrap();
        match self.next() {
            Some((Message::Started(None), Some(main))) => Ok(Task {
                supervisor: self.supervisor,
                main,
                control: Some(self.control),
                stage: self.stage,
            }),
            other => Err(self.failed(other)),
        }
    }
}

/// The helper's process. It does not outlive the test, and the kernel ends the task with it.
#[derive(Debug)]
pub struct Supervisor {
    pub pidfd: OwnedFd,
    pub pid: i32,
}

impl Supervisor {
    /// Waits for its end and returns its exit code, or the signal that killed it as a negative number.
    pub fn reap(&self) -> i32 {
        await_readable(&self.pidfd);
        match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap() {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => -(signal as i32),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // After `reap` there is nothing to signal and nothing to wait for.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED);
    }
}

/// A task that runs.
#[derive(Debug)]
pub struct Task<'a> {
    pub supervisor: Supervisor,
    pub main: OwnedFd,
    /// The plugin's end of the control socket, until it hangs up.
    control: Option<OwnedFd>,
    stage: &'a Stage,
}

#[derive(Debug)]
pub struct Outcome {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

impl Task<'_> {
    /// What the plugin's death does.
    pub fn hang_up(&mut self) {
        self.control = None;
    }

    /// The main process' pid on the host.
    pub fn pid(&self) -> i32 {
        let info = format!("/proc/self/fdinfo/{}", self.main.as_raw_fd());
        let info = fs::read_to_string(info).unwrap();
        field(&info, "Pid").parse().unwrap()
    }

    /// A file of the main process in the host's /proc.
    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.main, signal).unwrap();
    }

    /// Waits until the task has said `text` on stdout.
    pub fn says(&self, text: &str) -> String {
        let mut said = String::new();
        while !said.contains(text) {
            await_readable(&self.stage.outputs[0]);
            let more = self.stage.said(0);
            assert!(!more.is_empty(), "{said:?}, {:?}", self.stage.said(1));
            said += &more;
        }
        said
    }

    pub fn end(self) -> Outcome {
        assert_eq!(self.supervisor.reap(), 0, "the supervisor's own exit");
        match self.stage.read_record() {
            Record::Exited(exit) => Outcome {
                exit,
                stdout: self.stage.said(0),
                stderr: self.stage.said(1),
            },
            other => panic!("the record says {other:?}"),
        }
    }
}

/// The value of `name:` in a file like /proc/PID/status.
pub fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let values = text.lines().filter_map(|line| line.strip_prefix(name));
    let mut values = values.filter_map(|rest| rest.strip_prefix(':'));
    values.next().unwrap().trim()
}

pub fn make(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A file that belongs to the dynamic user.
pub fn file(path: &Path, content: &str, mode: u32) -> PathBuf {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    chown(path, Some(DYNAMIC), Some(DYNAMIC)).unwrap();
    path.into()
}

pub fn await_readable(fd: impl AsFd) {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(
        poll(&mut polled, timeout).unwrap(),
        1,
        "nothing within {PATIENCE:?}"
    );
}

/// For what /proc tells without an event.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn gate(defaults: Defaults) -> Gate<'static> {
    Gate {
        paths: &[],
        volumes: &[],
        defaults,
        by_task: ByTask::Allowed,
    }
}

/// From here on this thread, and nobody else, is on a host whose mounts are shared, as systemd makes them.
fn share_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        let flags = MsFlags::MS_REC | propagation;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
    }
}

fn new_record() -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&record::open(), 0).unwrap();
    file
}

fn bind(source: &Path, target: &Path) {
    let flags = MsFlags::MS_BIND;
    mount(Some(source), target, None::<&str>, flags, None::<&str>).unwrap();
}

/// Of a FIFO; it does not wait for a writer.
pub fn reader(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}
