//! How the command is found, and the sentences of a command that cannot be executed.

use std::path::Path;

use nomad_driver_exec2::plan::steps::{Order, Place};

use crate::stage::{Changed, Stage, file, make};

const SCRIPT: &str = "#!/bin/sh\necho \"$0 ran\"\n";
const FORBIDDEN: &str =
    "is it unveiled with \"rx\", its interpreter and libraries too, and executable by uid 80001?";

#[test]
fn a_bare_name_is_the_first_of_that_name_in_path() {
    let stage = Stage::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| stage.task_dir.join("local").join(name));
    for dir in [&a, &b, &c] {
        make(dir, 0o755);
    }
    file(&b.join("tool"), SCRIPT, 0o755);
    file(&c.join("tool"), "#!/bin/sh\necho wrong\n", 0o755);
    let path = format!("/nowhere:{}:{}:{}", a.display(), b.display(), c.display());
    let outcome = stage.run(&with_path(stage.order("tool", &[]), &path));
    assert_eq!(
        outcome.stdout,
        format!("{} ran\n", b.join("tool").display())
    );
}

#[test]
fn a_bare_name_is_passed_over_where_it_is_not_executable() {
    let stage = Stage::new();
    let [a, b] = ["a", "b"].map(|name| stage.task_dir.join("local").join(name));
    for dir in [&a, &b] {
        make(dir, 0o755);
    }
    file(&a.join("tool"), SCRIPT, 0o644);
    file(&b.join("tool"), SCRIPT, 0o755);
    let first = with_path(stage.order("tool", &[]), a.to_str().unwrap());
    assert_eq!(
        stage.fails(&first),
        format!(
            "command \"tool\": permission denied (found as {}/tool; {FORBIDDEN})",
            a.display()
        )
    );
    let both = format!("{}:{}", a.display(), b.display());
    let outcome = stage.run(&with_path(stage.order("tool", &[]), &both));
    assert_eq!(
        outcome.stdout,
        format!("{} ran\n", b.join("tool").display())
    );
}

#[test]
fn an_empty_entry_of_path_is_not_the_working_directory() {
    let stage = Stage::new();
    file(&stage.task_dir.join("local/tool"), SCRIPT, 0o755);
    let order = Order {
        work_dir: Place::Task("local".into()),
        ..with_path(stage.order("tool", &[]), ":/bin::")
    };
    assert_eq!(
        stage.fails(&order),
        "command \"tool\": not found in PATH \":/bin::\""
    );
}

#[test]
fn a_bare_name_in_no_directory_of_path() {
    let stage = Stage::new();
    assert_eq!(
        stage.fails(&stage.order("no-such-tool", &[])),
        "command \"no-such-tool\": not found in PATH \"/usr/local/bin:/usr/bin:/bin\""
    );
    let order = Order {
        env: Vec::new(),
        ..stage.order("no-such-tool", &[])
    };
    assert_eq!(
        stage.fails(&order),
        "command \"no-such-tool\": not found in PATH \"/usr/local/bin:/usr/bin:/bin\""
    );
}

#[test]
fn a_path_with_a_slash_begins_in_the_working_directory() {
    let stage = Stage::new();
    make(&stage.task_dir.join("local/sub"), 0o755);
    file(&stage.task_dir.join("local/sub/tool"), SCRIPT, 0o755);
    let inside = |command: &str| Order {
        work_dir: Place::Task("local".into()),
        ..stage.order(command, &[])
    };
    assert_eq!(
        stage.fails(&inside("local/sub/tool")),
        "command \"local/sub/tool\": no such file or directory"
    );
    assert_eq!(stage.run(&inside("sub/tool")).stdout, "sub/tool ran\n");
}

#[test]
fn a_directory() {
    let stage = Stage::new();
    assert_eq!(
        stage.fails(&stage.order("/usr/lib", &[])),
        "command \"/usr/lib\": permission denied (it is a directory)"
    );
    assert_eq!(
        stage.fails(&with_path(stage.order("lib", &[]), "/usr")),
        "command \"lib\": permission denied (found as /usr/lib; it is a directory)"
    );
}

#[test]
fn a_file_that_is_not_executable() {
    let stage = Stage::new();
    let tool = file(&stage.task_dir.join("local/tool"), SCRIPT, 0o644);
    assert_eq!(
        fails(&stage, &tool),
        format!("command {tool:?}: permission denied ({FORBIDDEN})")
    );
}

#[test]
fn a_program_that_is_not_unveiled() {
    let stage = Stage::new();
    let tool = file(&stage.host("tool"), SCRIPT, 0o755);
    let order = stage.order(tool.to_str().unwrap(), &[]);
    let sentence = format!("command {tool:?}: permission denied ({FORBIDDEN})");
    assert_eq!(stage.fails(&order), sentence);
    assert_eq!(stage.fails(&order.clone().unveiling("r", &tool)), sentence);
    let outcome = stage.run(&order.unveiling("rx", &tool));
    assert_eq!(outcome.stdout, format!("{} ran\n", tool.display()));
}

#[test]
fn a_script_whose_interpreter_is_missing() {
    let stage = Stage::new();
    let tool = stage.task_dir.join("local/tool");
    let tool = file(&tool, "#!/no/such/interpreter\n", 0o755);
    assert_eq!(
        fails(&stage, &tool),
        format!(
            "command {tool:?}: no such file or directory (the file is there, but its interpreter is not)"
        )
    );
    let by_name = with_path(
        stage.order("tool", &[]),
        tool.parent().unwrap().to_str().unwrap(),
    );
    assert_eq!(
        stage.fails(&by_name),
        format!(
            "command \"tool\": no such file or directory (found as {}; the file is there, but its interpreter is not)",
            tool.display()
        )
    );
}

#[test]
fn neither_a_program_nor_a_script() {
    let stage = Stage::new();
    let tool = file(&stage.task_dir.join("local/tool"), "echo hello\n", 0o755);
    assert_eq!(
        fails(&stage, &tool),
        format!(
            "command {tool:?}: exec format error (neither a program for this machine nor a script that begins with #!)"
        )
    );
}

#[test]
fn arguments_larger_than_the_kernel_takes() {
    // One argument may have 128 KiB.
    let stage = Stage::new();
    assert_eq!(
        stage.fails(&stage.order("/bin/echo", &[&"x".repeat(200_000)])),
        "command \"/bin/echo\": argument list too long (arguments and environment are larger than the kernel takes)"
    );
}

#[test]
fn a_nul_byte_in_an_argument() {
    let stage = Stage::new();
    assert_eq!(
        stage.fails(&stage.order("/bin/echo", &["a\0b"])),
        "command \"/bin/echo\": the command, an argument or a variable contains a NUL byte"
    );
}

fn fails(stage: &Stage, command: &Path) -> String {
    stage.fails(&stage.order(command.to_str().unwrap(), &[]))
}

fn with_path(order: Order, path: &str) -> Order {
    Order {
        env: vec![("PATH".into(), path.into())],
        ..order
    }
}
