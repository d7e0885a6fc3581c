//! Where the task's output goes, and which log pipes are refused.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use nomad_driver_exec2::plan::steps::{Bind, BindKind, Order, Place, Propagation, Stdio, Write};
use rustix::process::Signal;

use crate::stage::{Changed, DYNAMIC, Stage, USERS, reader, until};

#[test]
fn a_task_reopens_its_outputs() {
    for user in USERS {
        let stage = Stage::new();
        let script = stage.script("echo out >/dev/stdout; echo err >/dev/stderr");
        let outcome = stage.run(&user(&script));
        assert_eq!((&*outcome.stdout, &*outcome.stderr), ("out\n", "err\n"));
    }
}

#[test]
fn a_task_reopens_its_outputs_whatever_is_unveiled() {
    let stage = Stage::new();
    let mut order = stage.script("echo out >/dev/stdout; echo err >/dev/stderr");
    // The pipes lie below the one, and the other leads to them.
    let others = [
        Place::Task("alloc".into()),
        Place::Host("/dev/stdout".into()),
    ];
    order.rules.retain(|rule| !others.contains(&rule.place));
    let outcome = stage.run(&order);
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("out\n", "err\n"));
}

#[test]
fn the_log_pipes_become_the_tasks() {
    let stage = Stage::new();
    stage.run(&stage.script(""));
    for name in ["stdout", "stderr"] {
        let pipe = fs::metadata(stage.fifo(name)).unwrap();
        assert_eq!((pipe.uid(), pipe.gid()), (DYNAMIC, DYNAMIC), "{name}");
    }
}

#[test]
fn a_link_in_place_of_a_log_pipe_is_refused() {
    let stage = Stage::new();
    let target = stage.host("target");
    mkfifo(&target, Mode::S_IRUSR).unwrap();
    replace(&stage, |path| symlink(&target, path).unwrap());
    assert_eq!(
        stage.fails(&stage.script("")),
        refusal(
            &stage,
            "too many symbolic links encountered (the log pipe or its directory is a symbolic link)"
        )
    );
    assert_eq!(fs::metadata(target).unwrap().uid(), 0);
}

#[test]
fn a_link_in_place_of_the_log_directory_is_refused() {
    let stage = Stage::new();
    let elsewhere = stage.host("elsewhere");
    fs::rename(&stage.logs, &elsewhere).unwrap();
    symlink(&elsewhere, &stage.logs).unwrap();
    assert_eq!(
        stage.fails(&stage.script("")),
        refusal(
            &stage,
            "too many symbolic links encountered (the log pipe or its directory is a symbolic link)"
        )
    );
    assert_eq!(fs::metadata(stage.fifo("stdout")).unwrap().uid(), 0);
}

#[test]
fn a_file_in_place_of_a_log_pipe_is_refused() {
    let stage = Stage::new();
    replace(&stage, |path| fs::write(path, "as it was").unwrap());
    assert_eq!(
        stage.fails(&stage.script("echo hello")),
        refusal(&stage, "it is not a FIFO")
    );
    let path = stage.fifo("stdout");
    assert_eq!(fs::metadata(&path).unwrap().uid(), 0);
    assert_eq!(fs::read_to_string(path).unwrap(), "as it was");
}

#[test]
fn a_log_pipe_with_two_names_is_refused() {
    let stage = Stage::new();
    fs::hard_link(stage.fifo("stdout"), stage.host("other")).unwrap();
    assert_eq!(
        stage.fails(&stage.script("")),
        refusal(&stage, "the FIFO has more than one name")
    );
    assert_eq!(fs::metadata(stage.host("other")).unwrap().uid(), 0);
}

#[test]
fn a_log_pipe_of_a_stranger_is_refused() {
    let stage = Stage::new();
    let stranger = DYNAMIC + 1;
    chown(stage.fifo("stdout"), Some(stranger), None).unwrap();
    assert_eq!(
        stage.fails(&stage.script("")),
        refusal(
            &stage,
            "the FIFO belongs to uid 80002, neither root nor the task's user"
        )
    );
    let pipe = fs::metadata(stage.fifo("stdout")).unwrap();
    assert!(pipe.file_type().is_fifo());
    assert_eq!(pipe.uid(), stranger);
}

#[test]
fn a_missing_log_pipe_is_refused() {
    let stage = Stage::new();
    replace(&stage, |_| ());
    assert_eq!(
        stage.fails(&stage.script("")),
        refusal(&stage, "no such file or directory")
    );
}

#[test]
fn a_log_that_nomad_throws_away_is_dev_null() {
    let stage = Stage::new();
    let order = Order {
        stdio: Stdio::Fifos {
            stdout: "/dev/null".into(),
            stderr: stage.fifo("stderr"),
        },
        ..stage.script("echo out; echo err >&2")
    };
    let outcome = stage.run(&order);
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("", "err\n"));
}

#[test]
fn no_output_is_dev_null() {
    let stage = Stage::new();
    let order = Order {
        stdio: Stdio::Null,
        ..stage.idle()
    };
    let task = stage.start(&order).unwrap();
    for number in [0, 1, 2] {
        let leads_to = fs::read_link(format!("/proc/{}/fd/{number}", task.pid())).unwrap();
        assert_eq!(leads_to, Path::new("/dev/null"), "{number}");
    }
}

#[test]
fn output_goes_to_the_given_descriptors() {
    let stage = Stage::new();
    let order = Order {
        stdio: Stdio::Given,
        ..stage.script("echo out; echo err >&2")
    };
    let [out, err] = [(); 2].map(|()| nix::unistd::pipe().unwrap());
    let helper = stage.spawn(&order, Some([out.1, err.1])).unwrap();
    helper.go().unwrap().end();
    assert_eq!(all_of(out.0), "out\n");
    assert_eq!(all_of(err.0), "err\n");
}

/// Through its descriptor, root could change the file's mode and owner on the host.
#[test]
fn no_file_is_taken_as_a_given_output() {
    let stage = Stage::new();
    let order = Order {
        stdio: Stdio::Given,
        ..stage.script("chmod 4777 /proc/self/fd/1")
    };
    let path = stage.host("file");
    fs::write(&path, "").unwrap();
    let file = || OwnedFd::from(File::options().append(true).open(&path).unwrap());
    let failure = stage
        .spawn(&order, Some([file(), file()]))
        .unwrap_err()
        .to_string();
    assert!(failure.contains("as a pipe or a socket only"), "{failure}");
}

/// Puts something else in the place of the pipe for stdout.
fn replace(stage: &Stage, make: impl FnOnce(&Path)) {
    let path = stage.fifo("stdout");
    fs::remove_file(&path).unwrap();
    make(&path);
}

fn refusal(stage: &Stage, why: &str) -> String {
    format!(
        "task directory and logs {}: {why}",
        stage.fifo("stdout").display()
    )
}

fn all_of(pipe: OwnedFd) -> String {
    let mut text = String::new();
    File::from(pipe).read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_journal_takes_what_a_task_without_logs_prints() {
    let stage = Stage::new();
    let journal = Journal::new();
    let script = "[ -S /proc/self/fd/1 ] && echo to stdout; echo to stderr >&2";
    let order = Order {
        stdio: Stdio::Journal {
            unit: "exec2-web.scope".into(),
            identifier: "web".into(),
        },
        ..stage.script(script)
    };
    stage.run(&order);
    let header = |priority| format!("web\nexec2-web.scope\n{priority}\n1\n0\n0\n0\n");
    assert_eq!(journal.next(), header(6) + "to stdout\n");
    assert_eq!(journal.next(), header(4) + "to stderr\n");
}

#[test]
fn without_a_journal_a_task_without_logs_runs() {
    let stage = Stage::new();
    let order = Order {
        stdio: Stdio::Journal {
            unit: "exec2-web.scope".into(),
            identifier: "web".into(),
        },
        ..stage.script("[ /proc/self/fd/1 -ef /dev/null ] && exit 3")
    };
    drop(Journal::new());
    assert_eq!(stage.run(&order).exit.code, 3);
}

/// A journal for this thread and its tasks: /run is another one.
struct Journal(UnixListener);

impl Journal {
    fn new() -> Journal {
        let kind = Some("tmpfs");
        nix::mount::mount(
            kind,
            "/run",
            kind,
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        fs::create_dir_all("/run/systemd/journal").unwrap();
        Journal(UnixListener::bind("/run/systemd/journal/stdout").unwrap())
    }

    /// All that came by the next stream.
    fn next(&self) -> String {
        let mut text = String::new();
        let (mut stream, _) = self.0.accept().unwrap();
        Read::read_to_string(&mut stream, &mut text).unwrap();
        text
    }
}

/// What is not read waits in the pipe for the next reader.
#[test]
fn a_log_collector_that_dies_takes_no_task_with_it() {
    let stage = Stage::new();
    let mut gate = stage.gate();
    // With readers of this test's alone.
    let collectors = ["stdout", "stderr"].map(|name| {
        let path = stage.fifo(name);
        fs::remove_file(&path).unwrap();
        mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        reader(&path)
    });
    let script = "read _ <local/gate; echo unread; trap 'exit 6' TERM; touch local/up; while :; do sleep 0.01; done";
    let task = stage.start(&stage.script(script)).unwrap();
    drop(collectors);
    gate.write_all(b"go\n").unwrap();
    while !stage.task_dir.join("local/up").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut buffer = [0; 64];
    let length = reader(&stage.fifo("stdout")).read(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"unread\n");
    task.signal(Signal::TERM);
    assert_eq!(task.end().exit.code, 6);
}

/// What a volume has at the journal's path is for the task alone: the helper, as root, would connect the task to any socket.
#[test]
fn a_volume_is_not_taken_for_the_journal() {
    let stage = Stage::new();
    let journal = Journal::new();
    let root_only = UnixListener::bind("/run/root-only").unwrap();
    root_only.set_nonblocking(true).unwrap();
    let planted = stage.host("planted");
    fs::create_dir(&planted).unwrap();
    symlink("/run/root-only", planted.join("stdout")).unwrap();
    let mut order = Order {
        stdio: Stdio::Journal {
            unit: "exec2-web.scope".into(),
            identifier: "web".into(),
        },
        ..stage.script("[ -h /run/systemd/journal/stdout ] && echo planted")
    };
    order.binds.push(Bind {
        kind: BindKind::Volume,
        source: planted,
        target: Place::Host("/run/systemd/journal".into()),
        write: Write::Allowed,
        propagation: Propagation::Private,
    });
    stage.run(&order.unveiling("rw", "/run/systemd"));
    assert_eq!(
        root_only.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    assert!(journal.next().ends_with("0\nplanted\n"));
}

#[test]
fn a_task_that_fills_the_pipe_of_a_dead_log_collector_waits_for_the_next() {
    let stage = Stage::new();
    let path = stage.fifo("stdout");
    fs::remove_file(&path).unwrap();
    mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
    let collector = reader(&path);
    let mut gate = stage.gate();
    let script = "read _ <local/gate; head -c 100000 /dev/zero; touch local/written";
    let task = stage.start(&stage.script(script)).unwrap();
    drop(collector);
    let mut collector = reader(&path);
    gate.write_all(b"go\n").unwrap();
    until("the pipe is full", || {
        rustix::io::ioctl_fionread(&collector).unwrap() == 65_536
    });
    let written = stage.task_dir.join("local/written");
    assert!(!written.exists());
    let mut total = 0;
    until("all of it arrives", || {
        total += collector.read(&mut [0; 4096]).unwrap_or(0);
        total == 100_000
    });
    assert_eq!(task.end().exit.code, 0);
    assert!(written.exists());
}
