//! What a task sees and may do: its namespaces, its mounts, its neighbours. Looked at from inside a task and from the guest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};

use crate::case;
use crate::nomad::{Job, Scope, agent, printed, proc_file, said, status, until};

pub const CASES: &[Case] = &[
    case!(
        Everywhere,
        Ours,
        a_task_has_namespaces_and_privileges_of_its_own
    ),
    case!(Everywhere, Ours, root_changes_nothing_of_the_host),
    case!(Everywhere, Ours, the_managers_of_the_host_are_out_of_reach),
    case!(
        Everywhere,
        Ours,
        a_task_sees_its_own_processes_and_cgroup_only
    ),
    case!(Speed, Ours, tasks_do_not_meet_in_tmp),
    case!(Speed, Ours, what_the_host_mounts_later_does_not_arrive),
    case!(Speed, Ours, the_logs_are_closed_at_each_of_their_paths),
    case!(Speed, Ours, the_agents_secrets_stay_with_the_agent),
];

/// chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, audit_write,
/// setfcap: numbers of capabilities(7).
const ROOTS_CAPABILITIES: [u32; 13] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31];

fn a_task_has_namespaces_and_privileges_of_its_own(context: &Context) -> Result<()> {
    // An agent shielded from the OOM killer; plugin and helper inherit it. A container may not lower it, only raise it.
    let (agents, supervisors) = match context.guest().kind {
        Kind::Qemu => ("-1000", "-999"),
        Kind::Nspawn => ("500", "500"),
    };
    fs::write("/proc/self/oom_score_adj", agents)?;
    context.block_on(async {
        let agent = agent(context).await?;
        for (user, bounding) in [("root", ROOTS_CAPABILITIES.as_slice()), ("nobody", &[])] {
            let job = Job::shell("echo up; exec sleep 600").user(user);
            let alloc = agent.run(&job.text()).await?;
            let scope = Scope::of(alloc.only_task()?)?;
            let (main, supervisor) = (scope.main()?, scope.supervisor()?);
            for pid in [main, supervisor] {
                for kind in ["pid", "ipc", "mnt", "cgroup"] {
                    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
                    ensure!(
                        of(&pid.to_string())? != of("1")?,
                        "{pid} is in the host's {kind} namespace"
                    );
                }
                for kind in ["net", "user", "uts"] {
                    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
                    ensure!(of(&pid.to_string())? == of("1")?, "{pid}: {kind}");
                }
            }
            let inside = |pid| -> Result<String> {
                let pids = status(pid, "NSpid")?;
                Ok(pids.split_whitespace().last().context("NSpid")?.to_owned())
            };
            ensure!(inside(supervisor)? == "1");
            ensure!(inside(main)? != "1", "the task is PID 1");

            ensure!(proc_file(main, "oom_score_adj")? == "0");
            ensure!(proc_file(supervisor, "oom_score_adj")? == supervisors);
            ensure!(proc_file(supervisor, "environ")?.is_empty());
            ensure!(status(main, "NoNewPrivs")? == "1");

            let set = |pid, name: &str| -> Result<u64> {
                Ok(u64::from_str_radix(&status(pid, name)?, 16)?)
            };
            let wanted = bounding
                .iter()
                .fold(0, |mask, number| mask | 1u64 << number);
            if user == "root" {
                ensure!(set(main, "CapBnd")? == wanted, "{:x}", set(main, "CapBnd")?);
                ensure!(set(main, "CapEff")? == wanted, "{:x}", set(main, "CapEff")?);
            } else {
                for name in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                    ensure!(set(main, name)? == 0, "{name} of {user}");
                }
            }
            until("the supervisor gives up what a start may need", || {
                (set(supervisor, "CapPrm").ok()? == 0).then_some(())
            })
            .await?;
            for name in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                ensure!(set(supervisor, name)? == 0, "{name} of the supervisor");
            }
            ensure!(
                status(main, "Groups")?.is_empty(),
                "{}",
                status(main, "Groups")?
            );
            ensure!(
                status(supervisor, "Gid")? != status(main, "Gid")? || user != "root",
                "root could change the supervisor's limits"
            );
            // Nothing that the plugin holds open reaches the task; its own loader opens libraries for a moment.
            until("only stdin, stdout and stderr are open", || {
                (open_files(main).ok()?.len() == 3).then_some(())
            })
            .await
            .with_context(|| format!("{:?}", open_files(main)))?;
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn open_files(pid: u32) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    entries
        .map(|entry| Ok(fs::read_link(entry?.path())?))
        .collect()
}

fn root_changes_nothing_of_the_host(context: &Context) -> Result<()> {
    let dir = tempfile::tempdir_in("/opt")?;
    let file = dir.path().join("file");
    fs::write(&file, "as it was\n")?;
    let shown = file.display();
    let script = format!(
        "export LC_ALL=C
        tried() {{ \"$@\" 2>&1 && echo \"done: $*\"; }}
        tried chmod 4777 {shown}
        tried chown 12:34 {shown}
        tried touch -d 2001-01-01 {shown}
        tried chmod 777 /usr/bin /etc /opt
        tried mknod local/disk b 8 0
        tried mknod local/null c 1 3
        tried mount -t tmpfs x local
        tried ln -s /etc/cron.d/x \"$NOMAD_ALLOC_DIR/logs/t.stdout.1\"
        tried touch \"$NOMAD_ALLOC_DIR/logs/x\"
        tried rm \"$NOMAD_ALLOC_DIR/logs/t.stdout.0\"
        tried touch /usr/bin/x /opt/x /x
        tried rmdir {dir}
        tried truncate -s 0 {shown}
        tried unshare --mount true
        echo end",
        dir = dir.path().display()
    );
    let meta = |path: &std::path::Path| -> Result<_> {
        let meta = fs::metadata(path)?;
        Ok((
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.size(),
        ))
    };
    let before = (meta(&file)?, meta("/usr/bin".as_ref())?);
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["root", "nobody"] {
            let seen = printed(&agent, &Job::shell(&script).user(user)).await?;
            let lines: Vec<&str> = seen.lines().collect();
            ensure!(
                !seen.contains("done:") && lines.last() == Some(&"end"),
                "{seen}"
            );
            ensure!(
                before == (meta(&file)?, meta("/usr/bin".as_ref())?),
                "{seen}"
            );
            if user != "root" {
                continue;
            }
            let says = |what: &str, why: &str| -> Result<()> {
                let said = |line: &&str| line.contains(what) && line.ends_with(why);
                ensure!(lines.iter().any(said), "{what}: no {why:?} in:\n{seen}");
                Ok(())
            };
            let of = |name: &str| format!("{shown}{name}");
            says(
                &format!("chmod: changing permissions of '{}'", of("")),
                "Read-only file system",
            )?;
            says(
                &format!("chown: changing ownership of '{}'", of("")),
                "Read-only file system",
            )?;
            // By Landlock, before the missing capability has its say.
            says("mknod: local/disk", "Permission denied")?;
            says("mknod: local/null", "Permission denied")?;
            says("logs/t.stdout.1", "Read-only file system")?;
            says("logs/x", "Read-only file system")?;
        }
        agent.finish().await
    })
}

/// connect(2) says what is there: Perl speaks it without a library.
fn the_managers_of_the_host_are_out_of_reach(context: &Context) -> Result<()> {
    let script = r#"use Socket;
        for my $path ("/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/notify",
                      glob("/run/nomad-driver-exec2/plugin/*"), "/run/systemd/journal/dev-log") {
            my $kind = $path =~ /notify|dev-log/ ? SOCK_DGRAM : SOCK_STREAM;
            socket(my $s, PF_UNIX, $kind, 0) or die;
            print "$path: ", (connect($s, pack_sockaddr_un($path)) ? "open" : $!), "\n";
        }
        print -e "/run/nomad-driver-exec2" ? "seen\n" : "hidden\n";"#;
    ensure!(fs::metadata("/run/dbus/system_bus_socket").is_ok());
    ensure!(fs::metadata("/run/systemd/private").is_ok());
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["root", "nobody"] {
            let job = Job::command("perl", &["-e", script])
                .user(user)
                .unveil(&["r:/run"])
                .task("env {\n LC_ALL = \"C\"\n }");
            let seen = printed(&agent, &job).await?;
            for path in [
                "/run/dbus/system_bus_socket",
                "/run/systemd/private",
                "/run/systemd/notify",
            ] {
                ensure!(
                    seen.contains(&format!("{path}: No such file or directory\n")),
                    "{user}: {seen}"
                );
            }
            ensure!(!seen.contains("plugin/"), "{user}: {seen}");
            ensure!(
                seen.contains("/run/systemd/journal/dev-log: open\n"),
                "logging is no hole: {user}: {seen}"
            );
            if user == "root" {
                ensure!(seen.ends_with("hidden\n"), "{seen}");
            }
        }
        agent.finish().await
    })
}

fn a_task_sees_its_own_processes_and_cgroup_only(context: &Context) -> Result<()> {
    let script = "echo pids $(ls /proc | grep -x '[0-9]*')
        echo shell $$
        echo groups $(find /sys/fs/cgroup -type d)
        echo own $(grep ^0:: /proc/self/cgroup)
        echo members $(cat /sys/fs/cgroup/cgroup.procs)
        echo 1 2>/dev/null >/sys/fs/cgroup/cgroup.kill || echo closed
        mount | grep -c ' /proc '
        echo up; exec sleep 600";
    context.block_on(async {
        let agent = agent(context).await?;
        for user in ["root", "nobody"] {
            let job = Job::shell(script)
                .user(user)
                .unveil(&["r:/proc", "rw:/sys/fs/cgroup"]);
            let alloc = agent.run(&job.text()).await?;
            let task = alloc.only_task()?;
            until("the task is up", || {
                alloc.stdout("t").ok()?.contains("\nup\n").then_some(())
            })
            .await?;
            let seen = alloc.stdout("t")?;
            let words = |name: &str| -> Result<Vec<&str>> {
                let mut lines = seen.lines().filter_map(|line| line.split_once(' '));
                let (_, rest) = lines.find(|(key, _)| *key == name).context("a line")?;
                Ok(rest.split(' ').collect())
            };
            let pids = words("pids")?;
            ensure!(
                pids.contains(&"1") && pids.len() <= 5,
                "more than the supervisor and the task: {seen}"
            );
            ensure!(words("shell")? != ["1"], "{seen}");
            ensure!(words("own")? == ["0::/"], "{seen}");
            ensure!(words("groups")? == ["/sys/fs/cgroup"], "{seen}");
            // The supervisor, the shell and cat: those of its own cgroup, as it numbers them.
            let members = words("members")?;
            ensure!(members.len() <= 4 && members.contains(&"1"), "{seen}");
            ensure!(seen.contains("\nclosed\n"), "{seen}");
            ensure!(task.exit().is_none(), "it ended itself by its cgroup");
            alloc.stop().await?;
        }
        agent.finish().await
    })
}

fn tasks_do_not_meet_in_tmp(context: &Context) -> Result<()> {
    let trace = std::path::Path::new("/tmp/planted-by-the-host");
    fs::write(trace, "")?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "ls -A /tmp /dev/shm; echo first >/tmp/file && echo first >/dev/shm/file
            cmp /tmp/file $TMPDIR/file && echo same; echo up; exec sleep 600",
        )
        .user("nobody");
        let first = agent.run(&job.text()).await?;
        until("the first is up", || {
            first.stdout("t").ok()?.contains("up\n").then_some(())
        })
        .await?;
        let seen = first.stdout("t")?;
        ensure!(
            seen.starts_with("/dev/shm:\n\n/tmp:\n") && seen.ends_with("\nsame\nup\n")
                || seen == "/dev/shm:\n\n/tmp:\nsame\nup\n",
            "{seen:?}"
        );
        ensure!(!seen.contains("planted"), "{seen}");
        ensure!(!std::path::Path::new("/tmp/file").exists());
        ensure!(!std::path::Path::new("/dev/shm/file").exists());
        let second = printed(
            &agent,
            &Job::shell("ls -A /tmp /dev/shm; cat /tmp/file /dev/shm/file; true").user("nobody"),
        )
        .await?;
        ensure!(second == "/dev/shm:\n\n/tmp:\n", "{second:?}");
        first.stop().await?;
        agent.finish().await
    });
    fs::remove_file(trace)?;
    done
}

/// Not in any process that a task could reach: neither the supervisor's environment nor its memory map.
fn the_agents_secrets_stay_with_the_agent(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "export LC_ALL=C; for f in environ maps mem exe root/etc/shadow cwd/x fd/0 auxv; do
               head -c 100 /proc/1/$f; done 2>&1; kill -KILL 1; kill -TERM 1; kill -STOP 1
             prlimit --pid 1 --nofile=0:0 2>&1
             for group in 65534 65533 65532; do
               setpriv --regid $group --clear-groups prlimit --pid 1 --cpu=1:1 2>&1 && echo limited by $group
             done
             cat /proc/1/comm; echo end; exit 7",
        );
        for user in ["root", "nobody"] {
            let job = job.clone().user(user).unveil(&["r:/proc"]);
            let ended = crate::nomad::to_end(&agent, &job).await?;
            ensure!(
                ended.exit.code == 7 && ended.exit.signal == 0,
                "the record was suppressed: {ended:?}"
            );
            let seen = ended.stdout;
            for file in ["environ", "maps", "mem", "root/etc/shadow", "fd/0", "auxv"] {
                let denied = seen.lines().any(|line| {
                    line.contains(&format!("/proc/1/{file}'"))
                        && line.ends_with("Permission denied")
                });
                ensure!(denied, "{user}: {file}: {seen}");
            }
            // A user cannot take other groups, so setpriv fails for it.
            let refused = seen.matches("prlimit: failed to").count();
            ensure!(
                refused == if user == "root" { 4 } else { 1 },
                "{user}: {seen}"
            );
            ensure!(!seen.contains("limited by"), "{user}: {seen}");
            ensure!(seen.ends_with("exec2-supervise\nend\n"), "{seen}");
        }
        agent.finish().await
    })
}

/// It would be writable in a view that was made read-only before: another task's `alloc`, for one.
fn what_the_host_mounts_later_does_not_arrive(context: &Context) -> Result<()> {
    let dir = tempfile::tempdir_in("/opt")?;
    let point = dir.path().join("later");
    fs::create_dir(&point)?;
    let shown = point.display().to_string();
    context.block_on(async {
        let agent = agent(context).await?;
        let script = format!(
            "export LC_ALL=C; echo up; while [ ! -e local/go ]; do sleep 0.02; done
             chmod 777 {shown} 2>&1; echo end"
        );
        let alloc = agent.run(&Job::shell(&script).user("root").text()).await?;
        let task = alloc.only_task()?;
        let main = Scope::of(task)?.main()?;
        until("it is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        said("mount", &["-t", "tmpfs", "-o", "mode=755", "later", &shown])?;
        let arrived = proc_file(main, "mountinfo").map(|mounts| mounts.contains(&shown));
        let go = proc_file(main, "environ")?
            .split('\0')
            .find_map(|variable| variable.strip_prefix("NOMAD_TASK_DIR=").map(str::to_owned))
            .context("NOMAD_TASK_DIR")?;
        fs::write(format!("{go}/go"), "")?;
        let exit = task.wait().await;
        let mode = fs::metadata(&point).map(|meta| meta.mode() & 0o777);
        said("umount", &[&shown])?;
        exit?;
        ensure!(!arrived?, "it arrived");
        ensure!(mode? == 0o755, "{}", alloc.stdout("t")?);
        ensure!(
            alloc.stdout("t")?.contains("Read-only file system"),
            "{}",
            alloc.stdout("t")?
        );
        agent.finish().await
    })
}

/// Where Nomad's own root process opens and rotates them, too, and by the bind mount that Nomad's own makes appear below it.
fn the_logs_are_closed_at_each_of_their_paths(context: &Context) -> Result<()> {
    let target = std::path::Path::new("/opt/planted-by-a-log");
    context.block_on(async {
        let agent = agent(context).await?;
        let data = agent.data_dir().join("data");
        let allocs = data.join("alloc").display().to_string();
        // Nomad's own directories are closed to all but root; an operator may have opened them.
        for dir in [&data, &data.join("alloc")] {
            fs::create_dir_all(dir)?;
            fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
        for user in ["root", "nobody"] {
            let script = format!(
                "export LC_ALL=C
                 alloc={allocs}/$NOMAD_ALLOC_ID
                 for logs in $NOMAD_ALLOC_DIR/logs $alloc/alloc/logs $alloc/t/alloc/logs; do
                   ln -s {} $logs/t.stdout.1 && echo planted
                   mv $logs $logs.away && echo moved
                 done 2>&1
                 mv $alloc/alloc $alloc/away && echo moved
                 touch $NOMAD_ALLOC_DIR/data/x && echo elsewhere",
                target.display()
            );
            let job = Job::shell(&script)
                .user(user)
                .unveil(&[&format!("rwc:{allocs}/${{NOMAD_ALLOC_ID}}")]);
            let text = job
                .text()
                .replace("$${NOMAD_ALLOC_ID}", "${NOMAD_ALLOC_ID}");
            let alloc = agent.run(&text).await?;
            alloc.only_task()?.wait().await?;
            alloc.stop().await?;
            let seen = alloc.stdout("t")?;
            ensure!(
                !seen.contains("planted\n") && !seen.contains("moved"),
                "{user}: {seen}"
            );
            ensure!(
                seen.matches("Read-only file system").count() >= 2,
                "{user}: {seen}"
            );
            ensure!(seen.ends_with("elsewhere\n"), "{user}: {seen}");
        }
        ensure!(!target.exists());
        agent.finish().await
    })
}
