//! Where the task's output goes, and which log pipes are refused.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown, symlink};
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use nomad_driver_exec2::plan::steps::{Order, Place, Stdio};

use crate::stage::{DYNAMIC, Stage, USERS};

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
