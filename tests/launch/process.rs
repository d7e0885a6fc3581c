//! What task and supervisor inherit and may do, as /proc says.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nomad_driver_exec2::plan::steps::{Order, Tree};
use rustix::fs::Mode;
use rustix::process::{Pid, getsid, umask};

use crate::stage::{Changed, DYNAMIC, Stage, Task, field, until};

/// Says "up" and stops, with nothing but its standard descriptors open.
const STOPS: &str = "echo up; kill -STOP $$";

#[test]
fn the_supervisor_is_pid_1_of_the_tasks_namespace_and_the_task_is_not() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let inside = |status: &str| {
        field(status, "NSpid")
            .split('\t')
            .next_back()
            .map(str::to_owned)
    };
    assert_eq!(inside(&supervisor(&task, "status")).unwrap(), "1");
    assert_eq!(inside(&task.proc("status")).unwrap(), "2");
    assert_eq!(
        field(&task.proc("status"), "PPid"),
        task.supervisor.pid.to_string()
    );
}

#[test]
fn task_and_supervisor_share_namespaces_that_are_not_the_hosts() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    for kind in ["pid", "mnt", "ipc"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        let tasks = of(&task.pid().to_string());
        assert_eq!(tasks, of(&task.supervisor.pid.to_string()), "{kind}");
        assert_ne!(tasks, of("self"), "{kind}");
        assert_ne!(tasks, of("thread-self"), "{kind}");
    }
}

#[test]
fn the_supervisor_is_nothing_to_a_task() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle().as_root()).unwrap();
    // What it takes to undo the start goes when the start is committed, and it is not told when that is read.
    until("it drops the last capability", || {
        field(&supervisor(&task, "status"), "CapPrm") == "0000000000000000"
    });
    let status = supervisor(&task, "status");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    // prlimit(2) wants the caller's one group to be all three.
    assert_eq!(field(&status, "Gid"), "65534\t65533\t65532\t65533");
    assert_eq!(field(&status, "Groups"), "");
    assert_eq!(supervisor(&task, "environ"), "");
    assert_eq!(supervisor(&task, "comm"), "exec2-supervise\n");
    // The group of a dumpable process owns these files.
    let environ = format!("/proc/{}/environ", task.supervisor.pid);
    let environ = fs::metadata(environ).unwrap();
    assert_eq!((environ.uid(), environ.gid()), (0, 0));
}

#[test]
fn a_root_task_neither_ends_nor_reads_its_supervisor() {
    let stage = Stage::new();
    let script =
        "kill -KILL 1; kill -STOP 1; kill -TERM 1; cat /proc/1/environ /proc/1/maps; exit 4";
    let order = stage.script(script).as_root().unveiling("r", "/proc");
    let outcome = stage.run(&order);
    assert_eq!((outcome.exit.code, outcome.exit.signal), (4, 0));
    assert_eq!(outcome.stdout, "");
    for file in ["/proc/1/environ", "/proc/1/maps"] {
        let complaint = format!("{file}: Permission denied");
        assert!(outcome.stderr.contains(&complaint), "{}", outcome.stderr);
    }
}

#[test]
fn a_root_task_does_not_limit_its_supervisor_whatever_group_it_takes() {
    let stage = Stage::new();
    let script = "for group in 0 65532 65533 65534; do
        setpriv --regid $group --clear-groups prlimit --pid 1 --nofile=1:1
        done";
    let complaints = stage.run(&stage.script(script).as_root()).stderr;
    let complaint = "failed to set the NOFILE resource limit: Operation not permitted";
    assert_eq!(complaints.matches(complaint).count(), 4, "{complaints}");
}

#[test]
fn a_task_has_its_user_and_group_alone_and_no_capabilities() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let status = task.proc("status");
    let all = format!("{DYNAMIC}\t{DYNAMIC}\t{DYNAMIC}\t{DYNAMIC}");
    assert_eq!(
        (field(&status, "Uid"), field(&status, "Gid")),
        (&*all, &*all)
    );
    assert_eq!(field(&status, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
}

#[test]
fn root_has_the_ordered_bounding_set_and_no_more() {
    let stage = Stage::new();
    let order = stage.idle().as_root();
    let task = stage.start(&order).unwrap();
    let status = task.proc("status");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(
            field(&status, set),
            format!("{:016x}", order.bounding),
            "{set}"
        );
    }
    assert_eq!(field(&status, "CapAmb"), "0000000000000000");
}

#[test]
fn another_user_keeps_the_ambient_capabilities_across_exec() {
    const NET_BIND_SERVICE: u64 = 1 << 10;
    let stage = Stage::new();
    let order = Order {
        bounding: NET_BIND_SERVICE,
        ambient: NET_BIND_SERVICE,
        ..stage.idle()
    };
    let task = stage.start(&order).unwrap();
    for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(
            field(&task.proc("status"), set),
            "0000000000000400",
            "{set}"
        );
    }
}

#[test]
fn no_signal_is_blocked_or_ignored() {
    let stage = Stage::new();
    // Rust's runtime ignores SIGPIPE in this process, and `spawn` blocks every signal.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert_ne!(field(&own, "SigIgn"), "0000000000000000");
    let task = stage.start(&stage.idle()).unwrap();
    for set in ["SigBlk", "SigIgn", "SigCgt"] {
        assert_eq!(
            field(&task.proc("status"), set),
            "0000000000000000",
            "{set}"
        );
    }
}

#[test]
fn nothing_is_open_but_the_standard_descriptors() {
    let stage = Stage::new();
    // Handed to a helper whose order has no use for them.
    let stray = nix::unistd::pipe().unwrap().into();
    let helper = stage.spawn(&stage.script(STOPS), Some(stray)).unwrap();
    let task = helper.go().unwrap();
    task.says("up");
    let fd = format!("/proc/{}/fd", task.pid());
    let open = fs::read_dir(&fd)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut open: Vec<_> = open.map(|name| name.into_string().unwrap()).collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);
    let leads_to = |number: &str| fs::read_link(Path::new(&fd).join(number)).unwrap();
    assert_eq!(leads_to("0"), Path::new("/dev/null"));
    assert_eq!(leads_to("1"), stage.fifo("stdout"));
    assert_eq!(leads_to("2"), stage.fifo("stderr"));
}

#[test]
fn limits_are_those_of_the_order() {
    let stage = Stage::new();
    let order = Order {
        open_files: (123, 456),
        oom_score_adj: 567,
        ..stage.idle()
    };
    let task = stage.start(&order).unwrap();
    let limits = task.proc("limits");
    let of = |name: &str| -> Vec<String> {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let words = line.unwrap().split_whitespace();
        words.take(2).map(str::to_owned).collect()
    };
    assert_eq!(of("Max open files"), ["123", "456"]);
    assert_eq!(of("Max realtime priority"), ["0", "0"]);
    assert_eq!(task.proc("oom_score_adj"), "567\n");
}

#[test]
fn the_umask_is_022_whatever_the_plugins_is() {
    let stage = Stage::new();
    // Its own mount namespace gave this thread an umask of its own.
    umask(Mode::from_raw_mode(0o077));
    let task = stage.start(&stage.idle()).unwrap();
    assert_eq!(field(&task.proc("status"), "Umask"), "0022");
}

#[test]
fn the_task_leads_a_session_of_its_own() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let main = Pid::from_raw(task.pid());
    assert_eq!(getsid(main).ok(), main);
    assert_ne!(getsid(Pid::from_raw(task.supervisor.pid)).ok(), main);
}

#[test]
fn the_environment_is_the_ordered_one_and_no_more() {
    let stage = Stage::new();
    let order = Order {
        env: vec![("A".into(), "1=2".into()), ("B".into(), "ä \n".into())],
        ..stage.idle()
    };
    let task = stage.start(&order).unwrap();
    assert_eq!(task.proc("environ"), "A=1=2\0B=ä \n\0");
}

#[test]
fn a_setuid_program_gains_nothing() {
    let stage = Stage::new();
    let program = stage.host("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o4755)).unwrap();
    let mut order = stage
        .order(program.to_str().unwrap(), &["-u"])
        .unveiling("rx", &program);
    // Without the view's nosuid, no_new_privs stands alone.
    order.view.tree = Tree::AsIs;
    assert_eq!(stage.run(&order).stdout, format!("{DYNAMIC}\n"));
}

#[test]
fn no_new_privs_is_set() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    assert_eq!(field(&task.proc("status"), "NoNewPrivs"), "1");
}

fn supervisor(task: &Task<'_>, name: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{name}", task.supervisor.pid)).unwrap()
}

#[test]
fn the_session_keyring_is_roots_and_the_tasks_to_use() {
    const USER: u32 = 80_555;
    let stage = Stage::new();
    // KEY_SPEC_SESSION_KEYRING is -3.
    let script = format!(
        "my ($t, $d, $v) = ('user', 'mine', 'x'); syscall({}, $t, $d, $v, 1, -3) > 0 or die $!; $| = 1; print 'made'; sleep 600",
        libc::SYS_add_key
    );
    let order = Order {
        uid: USER,
        gid: USER,
        ..stage.order("perl", &["-e", &script])
    };
    let task = stage.start(&order).unwrap();
    until("it has made a key", || {
        // Uid, then of the quota: keys/most.
        let users = fs::read_to_string("/proc/key-users").unwrap();
        let its = format!("{USER}:");
        let line = users
            .lines()
            .find(|line| line.trim_start().starts_with(&its));
        let keys = line.and_then(|line| line.split_whitespace().nth(3));
        assert!(keys.is_none_or(|keys| keys.starts_with("1/")), "{users}");
        keys.is_some()
    });
    drop(task);
}
