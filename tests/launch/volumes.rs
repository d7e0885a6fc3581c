//! Volumes, devices and files that read otherwise, as the task and the host see them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_exec2::plan::steps::{Order, Replaced, Text};
use nomad_driver_exec2::plan::unveil::Alias;
use nomad_driver_exec2::plan::volumes::volumes;
use nomad_driver_exec2::task::types::{Device, Mount, MountMode};

use crate::stage::{Changed, DYNAMIC, Stage, USERS, file, make};

/// Nobody has it.
const MISSING: &str = "/exec2-volume/deep";

#[test]
fn a_volume_is_at_the_path_of_the_jobs_choice_and_on_the_host() {
    for user in USERS {
        for target in ["/opt", "/tmp/x", "/run/exec2-x", MISSING] {
            let stage = Stage::new();
            let source = source(&stage);
            let script = format!("cat {target}/file; echo written >{target}/new; {target}/run");
            let order = with(&stage, stage.script(&script), volume(&source, target));
            let outcome = stage.run(&user(&order));
            assert_eq!(
                (&*outcome.stderr, &*outcome.stdout),
                ("", "as it was\nran\n"),
                "{target}"
            );
            assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "written\n");
            assert!(!Path::new(MISSING).exists() && !Path::new("/run/exec2-x").exists());
        }
    }
}

#[test]
fn where_a_destination_is_made_everything_else_stays_as_it_is() {
    let stage = Stage::new();
    let source = source(&stage);
    let script = format!("ls -A /; touch {MISSING}/../x /x; cat {MISSING}/file");
    let order = stage.script(&script).as_root().unveiling("r", "/");
    let outcome = stage.run(&with(&stage, order, volume(&source, MISSING)));
    let mut hosts: BTreeSet<String> = fs::read_dir("/")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    hosts.insert("exec2-volume".into());
    let seen: BTreeSet<String> = outcome.stdout.lines().map(str::to_owned).collect();
    let last = "as it was".to_owned();
    assert!(seen.contains(&last), "{outcome:?}");
    assert_eq!(&seen - &BTreeSet::from([last]), hosts);
    assert_eq!(
        outcome.stderr.matches("touch: ").count(),
        2,
        "{}",
        outcome.stderr
    );
    assert!(!Path::new("/exec2-volume").exists() && !Path::new("/x").exists());
}

#[test]
fn a_read_only_volume_is_that_for_root_too() {
    for user in USERS {
        let stage = Stage::new();
        let source = source(&stage);
        let mut mount = volume(&source, "/opt");
        mount.mode = MountMode::ReadOnly;
        let script =
            "cat /opt/file; for try in 'touch /opt/new' 'chmod 4755 /opt/run' 'rm /opt/file'
            do $try && echo \"$try\"; done";
        let order = with(&stage, stage.script(script), mount);
        let outcome = stage.run(&user(&order).unveiling("rwxc", "/opt"));
        assert_eq!(outcome.stdout, "as it was\n", "{}", outcome.stderr);
    }
}

#[test]
fn a_volume_in_the_tasks_directory_needs_no_place_made_for_it() {
    for user in USERS {
        let stage = Stage::new();
        let source = source(&stage);
        let target = stage.task_dir.join("local/made/here");
        let script = "cat local/made/here/file && touch local/made/here/new";
        let order = with(&stage, stage.script(script), volume(&source, &target));
        let outcome = stage.run(&user(&order));
        assert_eq!((&*outcome.stderr, &*outcome.stdout), ("", "as it was\n"));
        assert!(source.join("new").exists());
    }
}

#[test]
fn a_link_that_a_task_planted_does_not_lead_a_volume_out_of_its_directory() {
    let stage = Stage::new();
    let source = source(&stage);
    symlink("/opt", stage.task_dir.join("local/link")).unwrap();
    for target in ["local/link", "local/link/x"] {
        let mount = volume(&source, stage.task_dir.join(target));
        let order = with(&stage, stage.script("ls /opt"), mount);
        let sentence = stage.fails(&order);
        assert!(
            sentence.starts_with("mount view") && sentence.contains("symbolic link"),
            "{sentence}"
        );
    }
}

#[test]
fn a_file_can_be_a_volume() {
    let stage = Stage::new();
    let path = file(&stage.host("one"), "one\n", 0o644);
    for target in ["/etc/hostname", "/exec2-file"] {
        let order = with(
            &stage,
            stage.script(&format!("cat {target}")),
            volume(&path, target),
        );
        assert_eq!(stage.run(&order).stdout, "one\n");
    }
}

#[test]
fn a_volume_within_a_volume_lies_on_it() {
    let stage = Stage::new();
    let (outer, inner) = (source(&stage), stage.host("inner"));
    make(&inner, 0o755);
    make(&outer.join("in"), 0o755);
    file(&inner.join("file"), "inner\n", 0o644);
    let order = with(
        &stage,
        stage.script("cat /opt/file /opt/in/file"),
        volume(&inner, "/opt/in"),
    );
    let order = with(&stage, order, volume(&outer, "/opt"));
    assert_eq!(stage.run(&order).stdout, "as it was\ninner\n");
}

#[test]
fn what_the_host_mounts_later_arrives_in_a_volume_that_asks_for_it_and_nothing_leaves() {
    for (propagation, arrives) in [("host-to-task", true), ("private", false), ("", false)] {
        let stage = Stage::new();
        let mut gate = stage.gate();
        let source = source(&stage);
        make(&source.join("later"), 0o755);
        let script =
            "grep ' /opt ' /proc/self/mountinfo; echo up; read _ <local/gate; ls /opt/later";
        let mount_at_opt = Mount {
            propagation: propagation.into(),
            ..volume(&source, "/opt")
        };
        let task = stage
            .start(&with(&stage, stage.script(script), mount_at_opt))
            .unwrap();
        let shown = task.says("up\n");
        assert_eq!(shown.contains("master:"), arrives, "{shown}");
        let later = source.join("later");
        let kind = Some("tmpfs");
        mount(kind, &later, kind, MsFlags::empty(), None::<&str>).unwrap();
        fs::write(later.join("arrived"), "").unwrap();
        std::io::Write::write_all(&mut gate, b"go\n").unwrap();
        let outcome = task.end();
        umount2(&later, MntFlags::MNT_DETACH).unwrap();
        let expected = if arrives { "arrived\n" } else { "" };
        assert_eq!(
            outcome.stdout, expected,
            "{propagation}: {}",
            outcome.stderr
        );
    }
}

#[test]
fn a_volume_whose_source_is_missing_fails_the_start() {
    let stage = Stage::new();
    let order = with(
        &stage,
        stage.script("true"),
        volume(Path::new("/nope"), "/data"),
    );
    assert_eq!(
        stage.fails(&order),
        "mount view /nope: no such file or directory (the host's side of the volume at /data)"
    );
}

#[test]
fn a_volume_that_holds_the_allocations_fails_the_start() {
    let stage = Stage::new();
    for source in [
        "",
        "alloc-dir",
        "mounts",
        "alloc-dir/alloc/data",
        "11111111-2222-3333-4444-555555555555",
    ] {
        let source = stage.host(source);
        fs::create_dir_all(&source).unwrap();
        let beside = stage.host("alloc-dir/../alloc-dir");
        assert!(beside.exists());
        let order = with(
            &stage,
            stage.script("true").as_root(),
            volume(&source, "/data"),
        );
        let sentence = stage.fails(&order);
        assert!(
            sentence.contains("no source for a volume"),
            "{}: {sentence}",
            source.display()
        );
    }
}

/// Neither below what is unveiled for writing nor below another volume.
#[test]
fn no_place_is_made_on_the_host() {
    let stage = Stage::new();
    let source = source(&stage);
    let srv = stage.host("srv");
    make(&srv, 0o777);
    let order = with(
        &stage,
        stage.script("true").as_root(),
        volume(&source, srv.join("new")),
    );
    let sentence = stage.fails(&order.unveiling("rwxc", &srv));
    assert!(sentence.contains("no such file or directory"), "{sentence}");
    assert!(!srv.join("new").exists());

    let order = with(
        &stage,
        stage.script("true").as_root(),
        volume(&source, srv.join("in")),
    );
    let order = with(&stage, order, volume(&srv, "/opt"));
    let order = with(&stage, order, volume(&source, "/opt/missing"));
    assert!(stage.fails(&order).contains("no such file or directory"));
    assert!(!srv.join("missing").exists());
}

#[test]
fn a_volume_is_made_room_for_where_everything_is_unveiled() {
    let stage = Stage::new();
    let (source, free) = (source(&stage), stage.host("free"));
    make(&free, 0o777);
    let script = format!(
        "cat {MISSING}/file; touch {}/written; true >/dev/null",
        free.display()
    );
    let order = with(
        &stage,
        stage.script(&script).as_root(),
        volume(&source, MISSING),
    );
    let outcome = stage.run(&order.unveiling("rwxc", "/"));
    assert_eq!((&*outcome.stderr, &*outcome.stdout), ("", "as it was\n"));
    assert!(free.join("written").exists() && !Path::new("/exec2-volume").exists());
}

#[test]
fn a_volume_over_a_file_that_would_read_otherwise_is_what_is_read() {
    let stage = Stage::new();
    let path = file(&stage.host("hosts"), "of the volume\n", 0o644);
    let order = with(
        &stage,
        stage.script("cat /etc/hosts"),
        volume(&path, "/etc/hosts"),
    );
    let order = Order {
        replaced: vec![Replaced {
            path: "/etc/hosts".into(),
            text: Text::Whole("of the driver\n".into()),
        }],
        ..order
    };
    assert_eq!(stage.run(&order).stdout, "of the volume\n");
}

#[test]
fn a_device_works_where_its_plugin_puts_it() {
    for user in USERS {
        for target in ["/dev/full", "/dev/exec2-device", "/opt/device"] {
            let stage = Stage::new();
            fs::create_dir_all("/opt").unwrap();
            let device = Device {
                task_path: target.into(),
                host_path: "/dev/full".into(),
                cgroup_permissions: "rw".into(),
            };
            let script = format!(
                "cat /etc/hostname >{target}; [ -c {target} ] && head -c 3 {target} | wc -c; chmod 600 {target}; true >/dev/null"
            );
            let mut order = stage.script(&script);
            let given = volumes(&[], &[device], false, &[]).unwrap();
            order.binds = given.binds;
            order.rules.splice(0..0, given.rules);
            let outcome = stage.run(&user(&order));
            assert_eq!(outcome.stdout, "3\n", "{target}: {}", outcome.stderr);
            assert!(
                outcome.stderr.contains("No space left on device"),
                "{}",
                outcome.stderr
            );
            assert!(outcome.stderr.contains("chmod"), "{}", outcome.stderr);
        }
    }
    assert!(!Path::new("/dev/exec2-device").exists());
}

#[test]
fn a_device_that_is_none_fails_the_start() {
    let stage = Stage::new();
    let device = Device {
        task_path: "/dev/x".into(),
        host_path: "/etc/hostname".into(),
        cgroup_permissions: String::new(),
    };
    let order = Order {
        binds: volumes(&[], &[device], false, &[]).unwrap().binds,
        ..stage.script("true")
    };
    assert_eq!(
        stage.fails(&order),
        "mount view /etc/hostname: /etc/hostname is no device"
    );
}

#[test]
fn files_that_read_otherwise_do_so_for_the_task_alone() {
    let before = ["/etc/passwd", "/etc/hosts"].map(|path| fs::read_to_string(path).unwrap());
    let stage = Stage::new();
    let replaced = [
        (
            "/etc/passwd",
            Text::Appended(format!("me:x:{DYNAMIC}:{DYNAMIC}::/:/bin/sh\n")),
        ),
        ("/etc/hosts", Text::Whole("192.0.2.1 web\n".into())),
    ];
    let script = "cat /etc/hosts; id -un; head -n 1 /etc/passwd; ls /sys/fs/cgroup/0";
    let order = stage.script(script).unveiling("r", "/etc/passwd");
    let order = Order {
        replaced: replaced
            .map(|(path, text)| Replaced {
                path: path.into(),
                text,
            })
            .into(),
        ..order
    };
    let outcome = stage.run(&order);
    let first = before[0].lines().next().unwrap();
    assert_eq!(
        outcome.stdout,
        format!("192.0.2.1 web\nme\n{first}\n"),
        "{}",
        outcome.stderr
    );
    assert!(
        outcome.stderr.contains("/sys/fs/cgroup/0"),
        "{}",
        outcome.stderr
    );
    // And root cannot change them.
    let stage = Stage::new();
    let script = "echo x >>/etc/passwd; chmod 777 /etc/hosts; mv /etc/hosts /etc/x; true";
    let root = Order {
        replaced: order.replaced,
        ..stage
            .script(script)
            .as_root()
            .unveiling("rw", "/etc/passwd")
    };
    assert_eq!(stage.run(&root).stderr.lines().count(), 3);
    let after = ["/etc/passwd", "/etc/hosts"].map(|path| fs::read_to_string(path).unwrap());
    assert_eq!(after, before);
}

#[test]
fn a_file_that_the_host_has_not_cannot_read_otherwise() {
    let stage = Stage::new();
    let replaced = vec![Replaced {
        path: "/etc/exec2-nope".into(),
        text: Text::Whole("x".into()),
    }];
    let order = Order {
        replaced,
        ..stage.script("true")
    };
    let sentence = stage.fails(&order);
    assert!(
        sentence.starts_with("mount view /etc/exec2-nope: no such file or directory"),
        "{sentence}"
    );
}

/// A directory of the host that the dynamic user may write.
fn source(stage: &Stage) -> PathBuf {
    fs::create_dir_all("/opt").unwrap();
    let path = stage.host("volume");
    make(&path, 0o777);
    file(&path.join("file"), "as it was\n", 0o644);
    file(&path.join("run"), "#!/bin/sh\necho ran\n", 0o755);
    path
}

fn volume(source: &Path, target: impl AsRef<Path>) -> Mount {
    Mount {
        task_path: target.as_ref().to_owned(),
        host_path: source.to_owned(),
        mode: MountMode::ReadWrite,
        propagation: String::new(),
        selinux_label: String::new(),
    }
}

/// As a plan has it: the volume's rule comes first.
fn with(stage: &Stage, mut order: Order, mount: Mount) -> Order {
    let aliases = [Alias::new(&stage.task_dir, "")];
    let given = volumes(&[mount], &[], false, &aliases).unwrap();
    order.binds.extend(given.binds);
    order.rules.splice(0..0, given.rules);
    order
}
