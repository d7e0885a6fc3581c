//! What the unveil rules open, tried from inside a task.

use std::fs;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nomad_driver_exec2::plan::steps::{Order, Source, Tree};

use crate::stage::{Changed, DYNAMIC, Stage, USERS, file, make};

/// Prints the names of the attempts that succeed.
const TRY: &str =
    "try() { name=$1; shift; \"$@\" >/dev/null 2>&1 && printf '%s ' $name; }; cd \"$1\" || exit 9
";
const LEADS_OUT: &str = "it leads out of the task's directory";
const ON_A_DIRECTORY: &str = r#"
try list ls
try read cat read
try write sh -c 'echo more >>write'
try truncate perl -e 'truncate("truncate", 0) || exit 1'
try execute ./execute
try create touch create
try link ln read link
try mkdir mkdir mkdir
try symlink ln -s read symlink
try mkfifo mkfifo mkfifo
try socket perl -e 'socket(S, 1, 1, 0) && bind(S, pack("Sa*", 1, "socket")) || exit 1'
try rename mv rename renamed
try move mv move sub/moved
try remove rm remove
try rmdir rmdir rmdir
try device mknod device c 0 0
"#;
const EVERYTHING: &str = "list read write truncate execute create link mkdir symlink mkfifo socket rename move remove rmdir ";

const ON_A_FILE: &str = r#"
try read cat execute
try write sh -c 'echo more >>execute'
try truncate perl -e 'truncate("execute", 10) || exit 1'
try execute ./execute
try rename mv execute renamed
try remove rm execute
try sibling cat read
"#;

#[test]
fn a_mode_allows_what_it_says_on_a_directory_and_nothing_else() {
    let cases = [
        ("r", "list read "),
        ("w", "write truncate "),
        // To execute is to read as well.
        ("x", ""),
        ("rx", "list read execute "),
        (
            "c",
            "create link mkdir symlink mkfifo socket rename move remove rmdir ",
        ),
        ("rwxc", EVERYTHING),
    ];
    for (mode, allowed) in cases {
        let (stage, ground) = ground();
        let order = tries(&stage, ON_A_DIRECTORY, &ground).unveiling(mode, &ground);
        assert_eq!(succeed(&stage, order), allowed, "{mode}");
    }
}

#[test]
fn a_mode_allows_what_it_says_on_a_file_and_nothing_else() {
    let cases = [
        ("r", "read "),
        ("w", "write truncate "),
        ("x", ""),
        ("rx", "read execute "),
        ("rwxc", "read write truncate execute "),
    ];
    for (mode, allowed) in cases {
        let (stage, ground) = ground();
        let order = tries(&stage, ON_A_FILE, &ground);
        let order = order.unveiling(mode, ground.join("execute"));
        assert_eq!(succeed(&stage, order), allowed, "{mode}");
    }
}

#[test]
fn what_is_not_unveiled_is_open_to_nobody() {
    for user in USERS {
        let (stage, ground) = ground();
        let before = contents(&ground);
        let order = tries(&stage, ON_A_DIRECTORY, &ground);
        assert_eq!(succeed(&stage, user(&order)), "");
        assert_eq!(contents(&ground), before);
    }
}

#[test]
fn a_user_creates_no_device_node() {
    let (stage, ground) = ground();
    // A device of the number 0, 0 needs no capability.
    let order = tries(
        &stage,
        "try device mknod a c 0 0; try fifo mknod b p",
        &ground,
    );
    assert_eq!(succeed(&stage, order.unveiling("rwxc", &ground)), "fifo ");
    assert!(!ground.join("a").exists());
}

#[test]
fn root_creates_no_device_node_even_with_the_capability() {
    const MKNOD: u64 = 1 << 27;
    let (stage, ground) = ground();
    let attempts = "try null mknod a c 1 3; try disk mknod b b 8 0; try fifo mknod c p";
    let order = tries(&stage, attempts, &ground).as_root();
    let order = Order {
        bounding: order.bounding | MKNOD,
        ..order.unveiling("rwxc", &ground)
    };
    assert_eq!(succeed(&stage, order), "fifo ");
    assert!(!ground.join("a").exists() && !ground.join("b").exists());
}

/// Its rights say nothing about them: only a scope does, which kernels have since 6.12.
#[test]
fn root_reaches_no_abstract_socket_but_those_of_the_task() {
    let name = format!("exec2-confine-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    let script = format!(
        "use Socket;
        sub address {{ pack('Sa*', AF_UNIX, \"\\0$_[0]\") }}
        sub reach {{ socket(my $s, PF_UNIX, SOCK_STREAM, 0); print \"$_[0] \" if connect $s, address($_[1]) }}
        socket(my $own, PF_UNIX, SOCK_STREAM, 0);
        bind($own, address('{name}-own')) && listen($own, 8) or die $!;
        $| = 1;
        if (!fork) {{ reach('own-of-child', '{name}-own'); exit }}
        wait;
        reach('own', '{name}-own');
        reach('other', '{name}');"
    );
    let stage = Stage::new();
    let order = stage.order("perl", &["-e", &script]);
    let is_scoped = nomad_driver_exec2::sys::landlock_abi() >= Some(6);
    let of_root = stage.run(&order.clone().as_root()).stdout;
    let others = if is_scoped { "" } else { "other " };
    assert_eq!(of_root, format!("own-of-child own {others}"));
    assert_eq!(stage.run(&order).stdout, "own-of-child own other ");
}

#[test]
fn rules_unite() {
    let (stage, ground) = ground();
    let order = tries(&stage, ON_A_DIRECTORY, &ground)
        .unveiling("r", &ground)
        .unveiling("w", ground.join("write"))
        .unveiling("w", ground.join("truncate"))
        .unveiling("x", ground.join("execute"));
    assert_eq!(succeed(&stage, order), "list read write truncate execute ");
}

#[test]
fn a_rule_below_takes_nothing_away() {
    let (stage, ground) = ground();
    let order = tries(
        &stage,
        "try write touch sub/file; try read cat sub/file",
        &ground,
    )
    .unveiling("rwc", &ground)
    .unveiling("x", ground.join("sub"));
    assert_eq!(succeed(&stage, order), "write read ");
}

#[test]
fn a_link_in_a_path_of_the_host_is_followed() {
    let (stage, ground) = ground();
    let link = stage.host("link");
    symlink(&ground, &link).unwrap();
    let script = "try here cat read; try there cat ../link/read";
    let order = tries(&stage, script, &ground).unveiling("r", link.join("read"));
    assert_eq!(succeed(&stage, order), "here there ");
}

#[test]
fn a_link_planted_in_the_tasks_directory_does_not_lead_out_of_it() {
    let (stage, ground) = ground();
    symlink(&ground, stage.task_dir.join("local/planted")).unwrap();
    symlink("../../../ground", stage.task_dir.join("local/relative")).unwrap();
    for path in ["local/planted", "local/planted/read", "local/relative"] {
        let absolute = stage.task_dir.join(path);
        for written in [Path::new(path), &absolute] {
            let order = stage.script("").unveiling("r", written);
            let written = written.display();
            assert_eq!(
                stage.fails(&order),
                format!("unveil r:{written}: {LEADS_OUT}")
            );
        }
    }
}

#[test]
fn a_link_that_stays_in_the_tasks_directory_is_followed() {
    let (stage, ground) = ground();
    file(&stage.task_dir.join("read"), "mine", 0o644);
    symlink("../read", stage.task_dir.join("local/link")).unwrap();
    let here = "try own cat \"$OLDPWD/read\"; try ground cat read";
    let order = tries(&stage, here, &ground);
    assert_eq!(succeed(&stage, order.clone()), "");
    assert_eq!(succeed(&stage, order.unveiling("r", "local/link")), "own ");
}

#[test]
fn a_link_in_place_of_a_directory_of_the_tasks_does_not_lead_out_of_it() {
    let (stage, ground) = ground();
    let secrets = stage.task_dir.join("secrets");
    fs::remove_dir(&secrets).unwrap();
    symlink(ground, secrets).unwrap();
    assert_eq!(
        stage.fails(&stage.script("")),
        format!("unveil rwxc:secrets: {LEADS_OUT}")
    );
}

#[test]
fn a_missing_path_fails_the_start_unless_it_is_a_default() {
    let stage = Stage::new();
    let missing = stage.host("missing");
    for (source, whose) in [
        (Source::Plugin, " (an entry of the operator's unveil_paths)"),
        (Source::Task, ""),
    ] {
        for mode in ["r", "rwc"] {
            let order = stage.script("").unveiled_by(source, mode, &missing);
            assert_eq!(
                stage.fails(&order),
                format!(
                    "unveil {mode}:{}: no such file or directory{whose}",
                    missing.display()
                )
            );
        }
    }
    let order = stage.script("echo ran");
    let order = order.unveiled_by(Source::Default, "r", &missing);
    assert_eq!(stage.run(&order).stdout, "ran\n");
}

#[test]
fn what_an_operator_says_of_a_path_holds_by_whatever_name() {
    for name in ["", "/proc/self/root"] {
        let (stage, ground) = ground();
        let operators = PathBuf::from(format!("{name}{}", ground.display()));
        let order = tries(&stage, ON_A_DIRECTORY, &ground);
        let order = order.unveiled_by(Source::Plugin, "r", &operators);
        let order = order.unveiling("rwxc", &ground);
        assert_eq!(succeed(&stage, order), "list read ", "{name:?}");
    }
}

#[test]
fn root_opens_its_paths_with_the_capabilities_it_will_have() {
    const OVER_MODES: u64 = 1 << 1 | 1 << 2;
    let ground = |stage: &Stage| {
        let closed = stage.host("closed");
        make(&closed, 0o700);
        let inside = file(&closed.join("inside"), "secret", 0o644);
        chown(&closed, Some(DYNAMIC), Some(DYNAMIC)).unwrap();
        let order = stage.script(&format!("cat {}", inside.display()));
        (order.unveiling("r", &inside).as_root(), inside)
    };
    let stage = Stage::new();
    let (order, _) = ground(&stage);
    assert_eq!(stage.run(&order).stdout, "secret");

    let stage = Stage::new();
    let (mut order, inside) = ground(&stage);
    order.bounding &= !OVER_MODES;
    assert_eq!(
        stage.fails(&order),
        format!(
            "unveil r:{}: permission denied (uid 0 cannot reach it)",
            inside.display()
        )
    );
}

#[test]
fn a_path_that_the_user_cannot_reach_fails_the_start_unless_it_is_a_default() {
    let stage = Stage::new();
    let closed = stage.host("closed");
    make(&closed, 0o700);
    let inside = file(&closed.join("inside"), "secret", 0o644);
    let order = stage.script("").unveiling("r", &inside);
    assert_eq!(
        stage.fails(&order),
        format!(
            "unveil r:{}: permission denied (uid {DYNAMIC} cannot reach it)",
            inside.display()
        )
    );
    let order = stage.script("echo ran");
    let order = order.unveiled_by(Source::Default, "r", &inside);
    assert_eq!(stage.run(&order).stdout, "ran\n");
}

#[test]
fn create_alone_on_a_file_fails_the_start() {
    let (stage, ground) = ground();
    let path = ground.join("read");
    assert_eq!(
        stage.fails(&stage.script("").unveiling("c", &path)),
        format!(
            "unveil c:{}: \"c\" allows nothing on a file; it is for directories",
            path.display()
        )
    );
}

#[test]
fn a_task_reads_its_own_command_line() {
    let stage = Stage::new();
    let order = stage.order("/bin/cat", &["/proc/self/cmdline"]);
    assert_eq!(stage.run(&order).stdout, "/bin/cat\0/proc/self/cmdline\0");
}

#[test]
fn a_rule_in_proc_holds_when_the_kernel_has_forgotten_the_entry() {
    let stage = Stage::new();
    let mut gate = stage.gate();
    let mut order = stage.script(
        "readable() { true </proc/self/cmdline && true </proc/loadavg && echo \"$1\"; }
        readable before; read _ <local/gate; readable after; true </proc/uptime",
    );
    // Whose root is never forgotten.
    order
        .rules
        .retain(|rule| rule.written != Path::new("/proc"));
    let order = order.unveiling("r", "/proc/self/cmdline");
    let task = stage.start(&order.unveiling("r", "/proc/loadavg")).unwrap();
    task.says("before\n");
    if fs::write("/proc/sys/vm/drop_caches", "2").is_err() {
        eprintln!("skipped: this host does not let root drop its caches");
        return;
    }
    gate.write_all(b"go\n").unwrap();
    let outcome = task.end();
    assert_eq!(outcome.stdout, "after\n");
    assert!(
        outcome.stderr.contains("/proc/uptime: Permission denied"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_task_and_its_children_read_their_own_proc_by_default() {
    for user in USERS {
        let stage = Stage::new();
        let script =
            "cat /proc/self/comm; sh -c 'cat /proc/$$/comm'; cat /proc/meminfo | grep -c MemTotal";
        let outcome = stage.run(&user(&stage.script(script)));
        assert_eq!((&*outcome.stdout, &*outcome.stderr), ("cat\nsh\n1\n", ""));
    }
}

/// A directory of the host that the dynamic user owns, with one thing for each attempt.
fn ground() -> (Stage, PathBuf) {
    let stage = Stage::new();
    let ground = stage.host("ground");
    for name in ["", "rmdir", "sub"] {
        let path = ground.join(name);
        make(&path, 0o777);
        chown(path, Some(DYNAMIC), Some(DYNAMIC)).unwrap();
    }
    for name in ["read", "write", "truncate", "rename", "move", "remove"] {
        file(&ground.join(name), "as it was", 0o666);
    }
    file(&ground.join("execute"), "#!/bin/sh\n", 0o777);
    (stage, ground)
}

fn tries(stage: &Stage, attempts: &str, ground: &Path) -> Order {
    let script = format!("{TRY}{attempts}");
    stage.order("/bin/sh", &["-c", &script, "sh", ground.to_str().unwrap()])
}

/// In a view that leaves everything writable: the rules alone judge.
fn succeed(stage: &Stage, mut order: Order) -> String {
    order.view.tree = Tree::AsIs;
    stage.run(&order).stdout
}

/// Names and what is in them.
fn contents(directory: &Path) -> Vec<(PathBuf, Option<String>)> {
    let entries = fs::read_dir(directory).unwrap();
    let mut all: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read_to_string(path).ok()))
        .collect();
    all.sort();
    all
}
