//! The task's mount view, seen by the task and in /proc.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_exec2::plan::steps::{Order, Stdio};

use crate::stage::{Changed, Stage, Task, USERS, file, make};

const READ_ONLY: &str = "Read-only file system";

#[test]
fn root_changes_no_file_of_the_host() {
    let stage = Stage::new();
    let path = file(&stage.host("file"), "as it was", 0o640);
    let facts = || {
        let found = fs::metadata(&path).unwrap();
        // Any change of the inode moves its ctime.
        (found.mode(), found.uid(), found.ctime_nsec())
    };
    let before = facts();
    let shown = path.display();
    let script = format!(
        "chmod 4777 {shown}; chown 12:34 {shown}; touch -d 2001-01-01 {shown}
        perl -e 'truncate(\"{shown}\", 0) || die $!'; rm -f {shown}; mv {shown} {shown}.new"
    );
    let outcome = stage.run(&stage.script(&script).as_root().unveiling("rx", "/"));
    assert_eq!(
        outcome.stderr.matches(READ_ONLY).count(),
        6,
        "{}",
        outcome.stderr
    );
    assert_eq!(facts(), before);
    assert_eq!(fs::read_to_string(&path).unwrap(), "as it was");
}

#[test]
fn what_is_unveiled_for_writing_or_creating_is_writable() {
    let stage = Stage::new();
    let [written, created] = ["written", "created"].map(|name| stage.host(name));
    file(&written, "", 0o644);
    make(&created, 0o777);
    let script = format!(
        "echo more >{0}; chmod 600 {0}; mkdir {1}/dir",
        written.display(),
        created.display()
    );
    let order = stage.script(&script).unveiling("w", &written);
    let outcome = stage.run(&order.unveiling("c", &created));
    assert_eq!((outcome.exit.code, &*outcome.stderr), (0, ""));
    assert_eq!(fs::read_to_string(&written).unwrap(), "more\n");
    assert_eq!(fs::metadata(&written).unwrap().mode() & 0o777, 0o600);
    assert!(created.join("dir").is_dir());
}

#[test]
fn the_tasks_own_directories_are_writable() {
    let stage = Stage::new();
    let script = "for dir in local alloc alloc/data secrets tmp; do echo $dir >$dir/file; done";
    let outcome = stage.run(&stage.script(script));
    assert_eq!((outcome.exit.code, &*outcome.stderr), (0, ""));
    for dir in ["local", "alloc", "alloc/data", "secrets", "tmp"] {
        let written = fs::read_to_string(stage.task_dir.join(dir).join("file"));
        assert_eq!(written.unwrap(), format!("{dir}\n"));
    }
}

#[test]
fn the_logs_are_read_only_in_the_tasks_directory() {
    for user in USERS {
        let stage = Stage::new();
        let order = attack(&stage, &stage.task_dir.join("alloc/logs"));
        assert_closed(&stage, &user(&order));
    }
}

#[test]
fn the_logs_are_read_only_where_nomad_opens_them_even_if_that_is_unveiled() {
    for user in USERS {
        let stage = Stage::new();
        let order = attack(&stage, &stage.logs);
        assert_closed(&stage, &user(&order));

        let stage = Stage::new();
        let order = attack(&stage, &stage.logs);
        let order = order.unveiling("rwc", stage.host("alloc-dir"));
        assert_closed(&stage, &user(&order));
    }
}

/// Whatever is unveiled, and whether or not this task has logs: those of its neighbours lie there, too.
#[test]
fn the_allocation_is_read_only_but_by_way_of_the_tasks_directory() {
    for user in USERS {
        let stage = Stage::new();
        let script = format!(
            "cd {}; mv alloc away; mkdir -p alloc/logs; touch alloc/data/x; ln -s /etc alloc/logs/other.stdout.1
            touch {}/alloc/data/y && echo by its own",
            stage.host("alloc-dir").display(),
            stage.task_dir.display()
        );
        for mut order in [stage.script(&script), stage.script(&script).without_logs()] {
            order = user(&order).unveiling("rwc", stage.host(""));
            let outcome = stage.run(&order);
            if order.stdio != Stdio::Null {
                assert_eq!(outcome.stdout, "by its own\n", "{}", outcome.stderr);
            }
            assert!(stage.logs.exists());
            assert!(stage.host("alloc-dir/alloc/data/y").exists());
            assert!(!stage.host("alloc-dir/alloc/data/x").exists());
            assert!(!stage.logs.join("other.stdout.1").is_symlink());
        }
    }
}

/// Also where several lie at one place, as Nomad's secrets do, on one another, or on files.
#[test]
fn mounts_of_other_allocations_are_let_go_of() {
    let stage = Stage::new();
    let id = "0a1b2c3d-1111-2222-3333-444455556666";
    let place = |name: &str| {
        let point = stage.host(name);
        make(&point, 0o755);
        point
    };
    let tmpfs = |point: &Path| {
        let kind = Some("tmpfs");
        mount(kind, point, kind, MsFlags::empty(), None::<&str>).unwrap();
    };
    let view = place(&format!("mounts/{id}-web"));
    let stacked = place(&format!("{id}/web/secrets"));
    let kept = place("mounts/not-an-allocation");
    for point in [&view, &stacked, &stacked, &stacked, &kept] {
        tmpfs(point);
    }
    tmpfs(&place(&format!("mounts/{id}-web/secrets")));
    let network = stage.host("network");
    fs::write(&network, "").unwrap();
    let bind = MsFlags::MS_BIND;
    mount(
        Some("/proc/self/ns/net"),
        &network,
        None::<&str>,
        bind,
        None::<&str>,
    )
    .unwrap();

    let task = stage.start(&stage.idle()).unwrap();
    let seen: Vec<_> = mounts(&task).into_iter().map(|(point, _)| point).collect();
    let strange = seen
        .iter()
        .filter(|point| point.to_string_lossy().contains(id) || **point == network);
    assert_eq!(strange.count(), 0, "{seen:?}");
    assert!(seen.contains(&kept), "{seen:?}");
    // Nor hidden below another mount, and held by that.
    let roots = seen.iter().filter(|point| **point == Path::new("/"));
    assert_eq!(roots.count(), 1, "{seen:?}");
    for point in [&view, &stacked, &stacked, &stacked, &kept, &network] {
        umount2(point, MntFlags::MNT_DETACH).unwrap();
    }
}

/// A terminal that is opened by its path, as `tty` and `tmux` do it, is never one of the host's.
#[test]
fn terminals_are_the_tasks_own_and_work() {
    let hosts = nix::pty::openpty(None, None).unwrap();
    let path = nix::unistd::ttyname(&hosts.slave).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode();
    let before = mode();
    for user in USERS {
        let stage = Stage::new();
        let script = format!(
            "chmod 666 {} 2>/dev/null; exec perl -e '$| = 1;
            open my $m, \"+<\", \"/dev/ptmx\" or die \"ptmx: $!\";
            my $n = pack \"i\", 0; ioctl $m, 0x40045431, $n or die; ioctl $m, 0x80045430, $n or die;
            open my $s, \"+<\", \"/dev/pts/\" . unpack \"i\", $n or die \"slave: $!\"; print -t $s ? \"tty\\n\" : \"none\\n\"'",
            path.display()
        );
        let order = stage
            .script(&script)
            .unveiling("rw", "/dev/ptmx")
            .unveiling("rw", "/dev/pts");
        let outcome = stage.run(&user(&order));
        assert_eq!(outcome.stdout, "tty\n", "{}", outcome.stderr);
        assert_eq!(mode(), before);
    }
}

#[test]
fn tmp_is_the_tasks_own() {
    let stage = Stage::new();
    let hosts = named().tempfile_in("/tmp").unwrap();
    let script = format!(
        "echo mine >/tmp/file; test -e {} || echo hidden",
        hosts.path().display()
    );
    assert_eq!(stage.run(&stage.script(&script)).stdout, "hidden\n");
    let written = fs::read_to_string(stage.task_dir.join("tmp/file"));
    assert_eq!(written.unwrap(), "mine\n");
}

#[test]
fn unveiling_a_directory_below_tmp_brings_it_back() {
    let stage = Stage::new();
    let shared = named().tempdir_in("/tmp").unwrap();
    make(shared.path(), 0o777);
    let script = format!(
        "echo shared >{}/file; echo mine >/tmp/file",
        shared.path().display()
    );
    let outcome = stage.run(&stage.script(&script).unveiling("rwc", shared.path()));
    assert_eq!(outcome.stderr, "");
    let read = |path: PathBuf| fs::read_to_string(path).unwrap();
    assert_eq!(read(shared.path().join("file")), "shared\n");
    assert_eq!(read(stage.task_dir.join("tmp/file")), "mine\n");
}

#[test]
fn a_task_directory_below_tmp_is_there() {
    let stage = Stage::below("/tmp");
    let script = "echo local >local/file; echo tmp >/tmp/file; pwd";
    let outcome = stage.run(&stage.script(script));
    assert_eq!(outcome.stderr, "");
    assert_eq!(outcome.stdout, format!("{}\n", stage.task_dir.display()));
    for name in ["local", "tmp"] {
        let written = fs::read_to_string(stage.task_dir.join(name).join("file"));
        assert_eq!(written.unwrap(), format!("{name}\n"));
    }
}

#[test]
fn shared_memory_is_the_tasks_own() {
    let stage = Stage::new();
    let hosts = named().tempfile_in("/dev/shm").unwrap();
    let own = format!("{}-own", hosts.path().display());
    let outcome = stage.run(&stage.script(&format!("touch {own}; echo /dev/shm/*")));
    assert_eq!(outcome.stdout, format!("{own}\n"));
    assert!(!Path::new(&own).exists());
}

#[test]
fn what_leads_to_managers_of_the_host_is_masked_in_run() {
    let seen = [
        "/run/app /run/dbus /run/systemd /run/user /run/app/socket /run/systemd/resolve\n",
        "/run/systemd /run/systemd/resolve\n",
    ];
    for (user, seen) in USERS.into_iter().zip(seen) {
        let stage = Stage::new();
        let run = Path::new("/run");
        let flags = MsFlags::empty();
        mount(Some("run"), run, Some("tmpfs"), flags, Some("mode=755")).unwrap();
        for name in ["app", "dbus", "systemd", "systemd/resolve", "user"] {
            make(&run.join(name), 0o755);
        }
        for name in ["app", "dbus", "systemd", "user"] {
            file(&run.join(name).join("socket"), "", 0o666);
        }
        let script = stage.script("echo /run/* /run/*/*").unveiling("r", run);
        let outcome = stage.run(&user(&script));
        umount2(run, MntFlags::empty()).unwrap();
        assert_eq!(outcome.stdout, seen);
    }
}

/// `r` brings back the rest of what is hidden, but only `w` what leads to managers: no link changes that.
#[test]
fn no_link_leads_to_a_manager_that_is_not_unveiled_for_writing() {
    for user in USERS {
        for link in ["/run/bus", "/run/all"] {
            let stage = Stage::new();
            let flags = MsFlags::empty();
            mount(Some("run"), "/run", Some("tmpfs"), flags, Some("mode=755")).unwrap();
            for path in ["/run/dbus", "/run/app"] {
                make(Path::new(path), 0o755);
            }
            file(Path::new("/run/dbus/socket"), "", 0o666);
            for (link, to) in [("/run/bus", "dbus"), ("/run/all", ".")] {
                std::os::unix::fs::symlink(to, link).unwrap();
            }
            let order = user(&stage.script("ls /run/dbus /run/bus")).unveiling("r", "/run/app");
            match stage.start(&order.unveiling("r", link)) {
                Ok(task) => {
                    let seen = task.end().stdout;
                    assert!(!seen.contains("socket"), "{link}: {seen}");
                }
                // To root the link itself is not there.
                Err(failure) => assert!(failure.to_string().contains("no such file"), "{failure}"),
            }
        }
    }
}

#[test]
fn proc_shows_the_tasks_processes_only() {
    let stage = Stage::new();
    let order = stage.script("echo /proc/[0-9]*").unveiling("r", "/proc");
    assert_eq!(stage.run(&order).stdout, "/proc/1 /proc/2\n");
}

/// Not even by root, unless it is unveiled by its very name.
#[test]
fn what_proc_tells_of_the_host_is_closed() {
    for user in USERS {
        let stage = Stage::new();
        let script = "for name in kcore keys key-users kpagecount kpageflags slabinfo timer_list vmallocinfo; do
            if [ -e /proc/$name ]; then head -c 1 /proc/$name && echo open $name; fi; done";
        let outcome = stage.run(&user(&stage.script(script)).unveiling("r", "/proc"));
        assert_eq!(outcome.stdout, "");
        let keys = stage.script("cat /proc/keys >/dev/null && echo open");
        let outcome = stage.run(&user(&keys).unveiling("r", "/proc/keys"));
        assert_eq!(outcome.stdout, "open\n", "{}", outcome.stderr);
    }
}

#[test]
fn the_tasks_cgroup_is_the_root_of_all_it_sees() {
    for user in USERS {
        let stage = Stage::new();
        let script = "grep ^0:: /proc/self/cgroup; ls -d /sys/fs/cgroup/cgroup.procs
            grep ' /sys/fs/cgroup ' /proc/self/mountinfo | cut -d' ' -f4-5 | tail -1
            echo 1 >/sys/fs/cgroup/cgroup.kill";
        let order = user(&stage.script(script)).unveiling("rw", "/sys/fs/cgroup");
        let outcome = stage.run(&order);
        let seen = "0::/\n/sys/fs/cgroup/cgroup.procs\n/ /sys/fs/cgroup\n";
        assert_eq!(outcome.stdout, seen, "{}", outcome.stderr);
        assert!(outcome.stderr.contains(READ_ONLY) || outcome.stderr.contains("denied"));
    }
}

#[test]
fn proc_is_read_only() {
    let stage = Stage::new();
    // Its own mode, and its own value.
    let script = "chmod 444 /proc/uptime; echo 0 >/proc/self/oom_score_adj";
    let order = stage.script(script).as_root().unveiling("r", "/proc");
    let complaints = stage.run(&order).stderr;
    assert_eq!(complaints.matches(READ_ONLY).count(), 2, "{complaints}");
}

#[test]
fn no_mount_shows_on_the_host() {
    let stage = Stage::new();
    let before = own_mounts();
    let task = stage.start(&stage.idle()).unwrap();
    assert_eq!(own_mounts(), before);
    assert_ne!(task.proc("mountinfo"), before);
    drop(task);
    assert_eq!(own_mounts(), before);
}

#[test]
fn no_later_mount_of_the_host_arrives() {
    let stage = Stage::new();
    let place = stage.host("place");
    make(&place, 0o755);
    let task = stage.start(&stage.idle()).unwrap();
    let before = task.proc("mountinfo");
    let flags = MsFlags::empty();
    mount(Some("late"), &place, Some("tmpfs"), flags, None::<&str>).unwrap();
    let (hosts, tasks) = (own_mounts(), task.proc("mountinfo"));
    umount2(&place, MntFlags::empty()).unwrap();
    assert!(hosts.contains(" late "));
    assert_eq!(tasks, before);
}

#[test]
fn no_mount_has_setuid_programs_and_none_outside_of_dev_has_devices() {
    let stage = Stage::new();
    let written = stage.host("written");
    make(&written, 0o777);
    let order = stage.idle().unveiling("rwxc", &written);
    let task = stage.start(&order).unwrap();
    let mounts = mounts(&task);
    assert!(mounts.iter().any(|(path, _)| *path == written));
    for (path, options) in mounts {
        let has = |option| options.split(',').any(|word| word == option);
        assert!(has("nosuid"), "{path:?} {options}");
        assert!(
            has("nodev") || path.starts_with("/dev"),
            "{path:?} {options}"
        );
    }
}

#[test]
fn nothing_is_writable_but_what_is_the_tasks_own() {
    let stage = Stage::new();
    let task = stage.start(&stage.idle()).unwrap();
    let own = ["/tmp", "/dev/shm", "/dev/mqueue", "/dev/pts"].map(Path::new);
    let logs = stage.task_dir.join("alloc/logs");
    let mut writable = 0;
    for (path, options) in mounts(&task) {
        if options.split(',').any(|option| option == "rw") {
            let is_own = own.contains(&&*path) || path.starts_with(&stage.task_dir);
            assert!(is_own && path != logs, "{path:?}");
            writable += 1;
        }
    }
    assert!(writable >= 5);
}

/// Six ways to put something else in the place of a log, or to open the way for others.
fn attack(stage: &Stage, logs: &Path) -> Order {
    stage.script(&format!(
        "cd {}; touch file; ln -s /etc/passwd link; chmod 700 .; rm -f .web.stdout.fifo
        mv .web.stderr.fifo other; cd /; mv {0} {0}.old",
        logs.display()
    ))
}

fn assert_closed(stage: &Stage, order: &Order) {
    let complaints = stage.run(order).stderr;
    let count = |text: &str| complaints.matches(text).count();
    // Where the parent is writable, a mount point is busy.
    let refused = count(READ_ONLY) + count("Device or resource busy");
    assert_eq!(refused, 6, "{complaints}");
    let entries = fs::read_dir(&stage.logs).unwrap();
    let mut left: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    left.sort();
    assert_eq!(left, ["stderr", "stdout"].map(|name| stage.fifo(name)));
    assert_eq!(fs::metadata(&stage.logs).unwrap().mode() & 0o777, 0o777);
}

fn named() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("exec2-view-");
    builder
}

/// Mount points and options of a task.
fn mounts(task: &Task<'_>) -> Vec<(PathBuf, String)> {
    let list = task.proc("mountinfo");
    let words = list.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    words
        .map(|words| (words[4].into(), words[5].to_owned()))
        .collect()
}

fn own_mounts() -> String {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}
