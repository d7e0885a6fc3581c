//! A session: one more process of a task that runs, by what the supervisor keeps of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nomad_driver_exec2::launch::report::{Failure, Message, receive};
use nomad_driver_exec2::launch::session::{self, Entrance};
use nomad_driver_exec2::plan::session::{SessionOrder, WindowSize};
use nomad_driver_exec2::plan::steps::{Order, Place, UserNamespaces};
use rustix::process::{Signal, pidfd_send_signal};

use crate::stage::{Changed, DYNAMIC, Stage, Supervisor, Task, await_readable, field, until};

/// The plugin's side of a session.
struct Session {
    helper: Supervisor,
    control: Option<OwnedFd>,
    input: Option<File>,
    output: Option<File>,
    errors: Option<File>,
    terminal: Option<File>,
}

fn program() -> OwnedFd {
    rustix::fs::open(
        env!("CARGO_BIN_EXE_nomad-driver-exec2"),
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .unwrap()
}

impl Session {
    fn open(
        task: &Task<'_>,
        command: &[&str],
        terminal: Option<WindowSize>,
    ) -> Result<Session, Failure> {
        Session::open_with(task, command, terminal, |_| {})
    }

    /// Without a cgroup of its own: what it is told to write to is nothing.
    fn open_with(
        task: &Task<'_>,
        command: &[&str],
        terminal: Option<WindowSize>,
        change: impl FnOnce(&mut [OwnedFd; 3]),
    ) -> Result<Session, Failure> {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (their_input, input) = pipe();
        let (output, theirs) = pipe();
        let (errors, their_errors) = pipe();
        let entrance = Entrance {
            supervisor: task.supervisor.pidfd.as_fd(),
            processes: null.as_fd(),
            kill: null.as_fd(),
        };
        let order = SessionOrder {
            command: command[0].into(),
            args: command[1..].iter().map(ToString::to_string).collect(),
            terminal,
        };
        let mut stdio = [their_input, theirs, their_errors];
        change(&mut stdio);
        let stdio = terminal.is_none().then_some(stdio);
        let helper = session::spawn(program().as_fd(), &entrance, &order, stdio)?;
        let mut session = Session {
            helper: Supervisor {
                pidfd: helper.pidfd,
                pid: helper.pid,
            },
            control: Some(helper.control),
            input: Some(input.into()),
            output: Some(output.into()),
            errors: Some(errors.into()),
            terminal: None,
        };
        match session.next() {
            Some((Message::Started(Some(_)), terminal)) => {
                session.terminal = terminal.map(File::from);
                Ok(session)
            }
            Some((Message::Failed(failure), None)) => {
                session.helper.reap();
                Err(failure)
            }
            other => panic!("{other:?}"),
        }
    }

    fn shell(task: &Task<'_>, script: &str) -> Session {
        Session::open(task, &["/bin/sh", "-c", script], None).unwrap()
    }

    fn next(&self) -> Option<(Message, Option<OwnedFd>)> {
        let control = self.control.as_ref().unwrap();
        await_readable(control);
        receive(control).unwrap()
    }

    /// Its process, from outside.
    fn pid(&self) -> i32 {
        let pids = fs::read_dir("/proc").unwrap();
        let pids = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let parent = self.helper.pid.to_string();
        let is_child = |pid: &i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|status| field(&status, "PPid") == parent)
        };
        pids.filter(is_child).last().unwrap()
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        let from = self.terminal.as_mut().or(self.output.as_mut()).unwrap();
        while from.read(&mut byte).unwrap() == 1 && byte != [b'\n'] {
            line.push(byte[0]);
        }
        String::from_utf8(line)
            .unwrap()
            .trim_end_matches('\r')
            .to_owned()
    }

    /// Its wait(2) status, and what it said.
    fn end(mut self) -> (i32, String, String) {
        drop(self.input.take());
        let (mut output, mut errors) = (String::new(), String::new());
        match &mut self.terminal {
            Some(terminal) => {
                // EIO is the end of a terminal.
                let _ = terminal.read_to_string(&mut output);
            }
            None => {
                self.output
                    .take()
                    .unwrap()
                    .read_to_string(&mut output)
                    .unwrap();
                self.errors
                    .take()
                    .unwrap()
                    .read_to_string(&mut errors)
                    .unwrap();
            }
        }
        let Some((Message::Ended(status), None)) = self.next() else {
            panic!("no end")
        };
        assert_eq!(self.helper.reap(), 0);
        (status, output, errors)
    }
}

const SIZE: WindowSize = WindowSize {
    rows: 33,
    columns: 111,
};

fn proc(pid: i32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap()
}

#[test]
fn a_session_is_what_the_task_is() {
    for as_root in [false, true] {
        let stage = Stage::new();
        let order = Order {
            env: vec![("A".into(), "1=2".into()), ("PATH".into(), "/bin".into())],
            oom_score_adj: 321,
            open_files: (123, 456),
            work_dir: Place::Task("local".into()),
            ..stage.idle()
        };
        let task = stage
            .start(&if as_root { order.as_root() } else { order })
            .unwrap();
        let session = Session::open(&task, &["sleep", "600"], None).unwrap();
        let (main, pid) = (task.pid(), session.pid());
        for kind in ["pid", "mnt", "ipc", "net", "cgroup", "uts", "user"] {
            let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_eq!(of(pid), of(main), "{kind}");
        }
        let (ours, theirs) = (proc(pid, "status"), proc(main, "status"));
        for name in [
            "Uid",
            "Gid",
            "Groups",
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapAmb",
            "NoNewPrivs",
            "Seccomp",
            "Seccomp_filters",
            "SigBlk",
            "SigIgn",
            "SigCgt",
            "Umask",
        ] {
            assert_eq!(field(&ours, name), field(&theirs, name), "{name}");
        }
        assert_eq!(field(&ours, "Seccomp"), "2");
        for name in ["environ", "oom_score_adj", "limits"] {
            assert_eq!(proc(pid, name), proc(main, name), "{name}");
        }
        for link in ["cwd", "root"] {
            let of = |pid: i32| fs::metadata(format!("/proc/{pid}/{link}")).unwrap();
            assert_eq!(
                (of(pid).dev(), of(pid).ino()),
                (of(main).dev(), of(main).ino()),
                "{link}"
            );
        }
        let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().collect();
        assert_eq!(open.len(), 3, "{open:?}");
        // The helper is outside of all of it.
        let helper = proc(session.helper.pid, "status");
        assert_eq!(field(&helper, "NSpid"), session.helper.pid.to_string());
    }
}

/// Root in the task could change the file of another descriptor.
#[test]
fn a_session_is_handed_nothing_but_pipes() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle().as_root()).unwrap();
    for number in 0..3 {
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = OwnedFd::from(null.unwrap());
        let change = |stdio: &mut [OwnedFd; 3]| stdio[number] = null;
        let failure = Session::open_with(&task, &["true"], None, change)
            .err()
            .unwrap();
        assert!(failure.to_string().contains("is no pipe"), "{failure}");
    }
}

#[test]
fn the_tasks_rules_are_the_sessions_rules() {
    for (is_unveiled, said) in [(false, ""), (true, "secret\n")] {
        for as_root in [false, true] {
            let stage = Stage::new();
            let secret = stage.host("secret");
            fs::write(&secret, "secret\n").unwrap();
            let shown = secret.display();
            let order = match is_unveiled {
                true => stage.idle().unveiling("r", &secret),
                false => stage.idle(),
            };
            let task = stage
                .start(&if as_root { order.as_root() } else { order })
                .unwrap();
            let script = format!(
                "cat {shown}; echo x >local/written; cat local/written; chmod 777 {shown}; echo x >{shown}"
            );
            let (_, output, errors) = Session::shell(&task, &script).end();
            assert_eq!(output, format!("{said}x\n"), "{errors}");
            let complaint = format!("cat: {shown}: Permission denied");
            assert_eq!(errors.contains(&complaint), !is_unveiled, "{errors}");
            // By the view, which is the task's as well.
            assert!(errors.contains("Read-only file system"), "{errors}");
            assert_eq!(fs::read_to_string(&secret).unwrap(), "secret\n");
        }
    }
}

#[test]
fn the_tasks_filter_is_the_sessions_filter() {
    for (user_namespaces, is_refused) in [
        (UserNamespaces::Refused, true),
        (UserNamespaces::Allowed, false),
    ] {
        let stage = Stage::new();
        let order = Order {
            user_namespaces,
            ..stage.idle()
        };
        let task = stage.start(&order).unwrap();
        let session = Session::open(&task, &["unshare", "--user", "true"], None).unwrap();
        let (status, _, errors) = session.end();
        assert_eq!(status != 0, is_refused, "{errors}");
        assert_eq!(errors.contains("Operation not permitted"), is_refused);
    }
}

#[test]
fn its_domain_is_beside_the_tasks_and_neither_looks_into_the_other() {
    let stage = Stage::new();
    let mut gate = stage.gate();
    let script = "read pid <local/gate; cat /proc/$pid/environ >&2; echo looked; exec sleep 600";
    let task = stage.start(&stage.script(script)).unwrap();
    let mut session = Session::shell(
        &task,
        "echo $$; cat /proc/2/environ; head -1 /proc/2/status; kill -0 2 && echo signalled; exec sleep 600",
    );
    let pid = session.line();
    // Control: from outside both are there to read.
    assert!(proc(session.pid(), "environ").contains("LC_ALL=C"));
    assert_eq!(session.line(), "Name:\tsh");
    assert_eq!(session.line(), "signalled");
    writeln!(gate, "{pid}").unwrap();
    task.says("looked");
    pidfd_send_signal(&task.main, Signal::KILL).unwrap();
    let (_, _, errors) = session.end();
    assert!(
        errors.contains("/proc/2/environ: Permission denied"),
        "{errors}"
    );
    let complaint = format!("/proc/{pid}/environ: Permission denied");
    assert!(task.end().stderr.contains(&complaint));
}

#[test]
fn it_ends_as_its_command_does() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 5", 5 << 8),
        ("kill -9 $$", 9),
        ("kill -TERM $$", 15),
    ] {
        assert_eq!(Session::shell(&task, script).end().0, status, "{script}");
    }
    let mut session = Session::open(&task, &["cat"], None).unwrap();
    session
        .input
        .as_mut()
        .unwrap()
        .write_all(b"\0\xc3\xa4")
        .unwrap();
    assert_eq!(session.end(), (0, "\0ä".into(), String::new()));
    // Its output is its own to open again.
    assert_eq!(
        Session::shell(&task, "echo a >/proc/self/fd/1; echo b >/proc/self/fd/2").end(),
        (0, "a\n".into(), "b\n".into())
    );
}

#[test]
fn what_cannot_be_executed_is_a_sentence() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    for (command, words) in [
        (
            "no-such-program",
            "command \"no-such-program\": not found in PATH \"/usr/local/bin:/usr/bin:/bin\"",
        ),
        (
            "/no/such/program",
            "command \"/no/such/program\": no such file or directory",
        ),
        ("/etc/passwd", "command \"/etc/passwd\": permission denied"),
    ] {
        let failure = Session::open(&task, &[command], None)
            .err()
            .unwrap()
            .to_string();
        assert!(failure.starts_with(words), "{failure}");
    }
}

/// As of CVE-2019-5736: what /proc/self/exe is before the exec would be the host's own program.
#[test]
fn the_hosts_program_is_not_to_be_had_through_a_session() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle().as_root()).unwrap();
    let script = stage.task_dir.join("local/script");
    fs::write(&script, "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for command in ["/proc/self/exe", "local/script"] {
        let failure = Session::open(&task, &[command], None)
            .err()
            .unwrap()
            .to_string();
        assert!(failure.contains("permission denied"), "{failure}");
    }
    // The helper itself is in no /proc of the task's.
    let session = Session::shell(&task, "exec sleep 600");
    let (_, seen, _) = Session::shell(&task, "cat /proc/[0-9]*/comm").end();
    assert_eq!(seen, "exec2-supervise\nsleep\nsleep\nsh\n");
    assert_eq!(proc(session.helper.pid, "comm"), "exec2-session\n");
}

#[test]
fn a_terminal_is_the_tasks_own_and_controls_the_session() {
    for as_root in [false, true] {
        let stage = Stage::new();
        let order = stage.idle();
        let task = stage
            .start(&if as_root { order.as_root() } else { order })
            .unwrap();
        let script = "tty; stty size; stat -c %u:%a $(tty); ps -o tpgid= -o pid= -p $$; read line; echo \"got $line\"; exit 3";
        let mut session = Session::open(&task, &["/bin/sh", "-c", script], Some(SIZE)).unwrap();
        assert_eq!(session.line(), "/dev/pts/0");
        assert_eq!(session.line(), "33 111");
        let uid = if as_root { 0 } else { DYNAMIC };
        assert_eq!(session.line(), format!("{uid}:620"));
        let ids = session.line();
        let mut ids = ids.split_whitespace();
        assert_eq!(ids.next(), ids.next());
        session
            .terminal
            .as_mut()
            .unwrap()
            .write_all(b"hello\n")
            .unwrap();
        let (status, said, _) = session.end();
        assert_eq!((status, &*said), (3 << 8, "hello\r\ngot hello\r\n"));
    }
}

#[test]
fn it_ends_when_nobody_holds_it_any_more() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let mut session = Session::shell(&task, "trap '' HUP TERM; echo up; exec sleep 600");
    assert_eq!(session.line(), "up");
    let path = format!("/proc/{}", session.pid());
    session.control = None;
    assert_eq!(session.helper.reap(), 0);
    assert!(!Path::new(&path).exists());
    assert!(Path::new(&format!("/proc/{}", task.pid())).exists());
}

#[test]
fn it_ends_with_the_task() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let mut session = Session::shell(&task, "trap '' HUP TERM; echo up; exec sleep 600");
    assert_eq!(session.line(), "up");
    task.signal(Signal::TERM);
    assert_eq!(task.end().exit.signal, 15);
    assert_eq!(session.end().0, 9);
}

#[test]
fn a_task_that_has_ended_takes_no_session() {
    let stage = Stage::new();
    let task = stage.start(&stage.script("exit 0")).unwrap();
    await_readable(&task.supervisor.pidfd);
    let failure = Session::open(&task, &["true"], None)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(failure, "helper: the task is ending");
}

#[test]
fn many_sessions_at_once_are_each_their_own() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let sessions: Vec<_> = (0..10)
        .map(|number| Session::shell(&task, &format!("echo {number}; exit {number}")))
        .collect();
    for (number, session) in (0..).zip(sessions) {
        assert_eq!(
            session.end(),
            (number << 8, format!("{number}\n"), String::new())
        );
    }
    until("none is left", || {
        fs::read_to_string(format!("/proc/{}/task/{0}/children", task.supervisor.pid))
            .is_ok_and(|pids| pids.split_whitespace().count() == 1)
    });
}
