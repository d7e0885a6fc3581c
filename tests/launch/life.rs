//! From start to exit record.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;

use nomad_driver_exec2::plan::steps::Order;
use nomad_driver_exec2::record::Record;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::stage::{Changed, DYNAMIC, Stage, await_readable, field, until};

#[test]
fn a_command_runs_and_its_exit_code_is_recorded() {
    for code in [0, 7, 255] {
        let stage = Stage::new();
        let outcome = stage.run(&stage.script(&format!("echo hello; echo oops >&2; exit {code}")));
        assert_eq!((outcome.exit.code, outcome.exit.signal), (code, 0));
        assert_eq!((&*outcome.stdout, &*outcome.stderr), ("hello\n", "oops\n"));
        assert!(outcome.exit.ended_unix_nanos > 0);
    }
}

#[test]
fn a_signal_from_outside_is_recorded() {
    for signal in [Signal::TERM, Signal::KILL] {
        let stage = Stage::new();
        let task = stage.start(&stage.idle()).unwrap();
        assert_eq!(stage.read_record(), Record::Open);
        task.signal(signal);
        let exit = task.end().exit;
        assert_eq!((exit.code, exit.signal), (0, signal.as_raw()));
    }
}

#[test]
fn a_signal_from_the_task_itself_is_recorded() {
    for signal in [1, 9, 15, 34] {
        let stage = Stage::new();
        let exit = stage.run(&stage.script(&format!("kill -{signal} $$"))).exit;
        assert_eq!((exit.code, exit.signal), (0, signal));
    }
}

#[test]
fn orphans_are_reaped() {
    let stage = Stage::new();
    let task = stage
        .start(&stage.script("(sleep 600 & sleep 601 &); echo up; exec sleep 602"))
        .unwrap();
    task.says("up");
    let supervisor = task.supervisor.pid;
    assert_eq!(children(supervisor).len(), 3);
    let orphans = children(supervisor)
        .into_iter()
        .filter(|pid| *pid != task.pid());
    for orphan in orphans {
        let orphan = pidfd_open(Pid::from_raw(orphan).unwrap(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&orphan, Signal::KILL).unwrap();
    }
    until("both are reaped", || children(supervisor) == [task.pid()]);
    assert_eq!(stage.read_record(), Record::Open);
}

#[test]
fn orphans_end_with_the_task() {
    let stage = Stage::new();
    let mut gate = stage.gate();
    let script = "(trap '' TERM HUP; sleep 600 &); echo up; read _ <local/gate; exit 3";
    let task = stage.start(&stage.script(script)).unwrap();
    task.says("up");
    let is_orphan = |pid: &i32| *pid != task.pid();
    let orphan = children(task.supervisor.pid).into_iter().find(is_orphan);
    let orphan = Pid::from_raw(orphan.unwrap()).unwrap();
    let orphan = pidfd_open(orphan, PidfdFlags::empty()).unwrap();
    gate.write_all(b"go\n").unwrap();
    assert_eq!(task.end().exit.code, 3);
    await_readable(orphan);
}

#[test]
fn a_task_outlives_the_plugins_end_of_the_control_socket() {
    let stage = Stage::new();
    let mut gate = stage.gate();
    let script = "echo up; read word <local/gate; echo \"heard $word\"; exit 5";
    let mut task = stage.start(&stage.script(script)).unwrap();
    task.says("up");
    task.hang_up();
    gate.write_all(b"go\n").unwrap();
    let outcome = task.end();
    assert_eq!((outcome.exit.code, &*outcome.stdout), (5, "heard go\n"));
}

#[test]
fn a_task_that_nobody_commits_ends_and_gives_the_log_pipes_back() {
    let stage = Stage::new();
    let script = "(setsid sleep 600 &); echo up; exec sleep 600";
    let helper = stage.spawn(&stage.script(script), None).unwrap();
    let mut task = helper.go_uncommitted().unwrap();
    task.says("up");
    assert_eq!(owner(&stage), DYNAMIC);
    task.hang_up();
    await_readable(&task.main);
    assert_eq!(task.supervisor.reap(), 1);
    assert_eq!(stage.read_record(), Record::Open);
    assert_eq!(owner(&stage), 0);
}

#[test]
fn the_log_pipes_of_a_start_that_fails_are_given_back() {
    // Before the scope, after the fork, and at the very end.
    let stage = Stage::new();
    let orders = [
        Order {
            network_namespace: Some("/no/such/namespace".into()),
            ..stage.idle()
        },
        stage.idle().unveiling("r", "/no/such/path"),
        stage.order("/no/such/program", &[]),
    ];
    for order in orders {
        stage.fails(&order);
        assert_eq!(owner(&stage), 0, "{order:?}");
    }
    let helper = stage.spawn(&stage.idle(), None).unwrap();
    until("the helper is parked", || owner(&stage) == DYNAMIC);
    drop(helper.control);
    assert_eq!(helper.supervisor.reap(), 0);
    assert_eq!(owner(&stage), 0);
}

/// What `systemctl stop` does to a scope is told from what a task does to itself.
#[test]
fn a_sigterm_of_the_outside_to_all_is_recorded() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    pidfd_send_signal(&task.supervisor.pidfd, Signal::TERM).unwrap();
    task.signal(Signal::TERM);
    let exit = task.end().exit;
    assert_eq!((exit.signal, exit.was_terminated), (15, true));

    let stage = Stage::new();
    let order = stage.script("kill -TERM 1; kill -TERM $$").as_root();
    let exit = stage.run(&order).exit;
    assert_eq!((exit.signal, exit.was_terminated), (15, false));
}

fn owner(stage: &Stage) -> u32 {
    fs::metadata(stage.fifo("stdout")).unwrap().uid()
}

#[test]
fn a_parked_helper_ends_by_itself_when_its_control_socket_closes() {
    let stage = Stage::new();
    let helper = stage.spawn(&stage.script("echo ran"), None).unwrap();
    drop(helper.control);
    assert_eq!(helper.supervisor.reap(), 0);
    assert_eq!(stage.read_record(), Record::Open);
}

#[test]
fn a_killed_supervisor_takes_the_task_with_it_and_leaves_the_record_open() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    pidfd_send_signal(&task.supervisor.pidfd, Signal::KILL).unwrap();
    await_readable(&task.main);
    assert_eq!(task.supervisor.reap(), -Signal::KILL.as_raw());
    assert_eq!(stage.read_record(), Record::Open);
}

/// Sorted. A zombie is one of them until it is reaped.
fn children(parent: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap();
    let pids = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let mut pids: Vec<i32> = pids
        .filter(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|status| field(&status, "PPid") == parent.to_string())
        })
        .collect();
    pids.sort_unstable();
    pids
}
