//! `run --learn`: the list it prints is enough, and no entry of it is idle. The command does not notice.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::{Ground, Leak};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::case;

pub const CASES: &[Case] = &[
    case!(Speed, Ours, what_succeeded_is_listed_and_nothing_else),
    case!(Speed, Ours, a_traced_command_ends_and_prints_as_any),
    case!(Speed, Ours, children_threads_and_vforks_are_seen),
    case!(Speed, Ours, a_pipe_for_a_program_does_not_hold_the_tracer),
    case!(Speed, Ours, pruning_leaves_what_is_needed),
    case!(Speed, Ours, a_list_is_not_pruned_by_what_differs_anyway),
    case!(Speed, Ours, a_job_files_task_is_learned_from),
    case!(Speed, Ours, what_no_call_shows_is_remarked),
    case!(Speed, Ours, a_list_opens_the_terminals_that_a_command_makes),
    case!(Speed, Ours, a_probe_tells_something_and_leaves_nothing),
    case!(Speed, Ours, a_mistake_is_one_sentence),
    case!(Speed, Ours, ctrl_c_brings_the_list),
    case!(Speed, Ours, a_killed_run_takes_the_traced_command_along),
    case!(Programs, Ours, nginx_works_with_the_list_and_with_no_less),
    case!(
        Programs,
        Ours,
        postgresql_works_with_the_list_and_with_no_less
    ),
    case!(Programs, Ours, java_works_with_the_list_and_with_no_less),
];

/// A directory that any user may write in.
fn open_dir() -> Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("learn-")
        .tempdir_in("/srv")?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777))?;
    Ok(dir)
}

fn run(context: &Context, options: &[&str], command: &[&str]) -> Result<Output> {
    let mut run = Command::new(context.driver());
    run.arg("run").args(options).arg("--").args(command);
    Ok(run
        .env("LC_ALL", "C")
        .env("LANG", "C")
        .stdin(Stdio::null())
        .output()?)
}

fn learn_sh(context: &Context, script: &str) -> Result<Vec<String>> {
    let output = run(context, &["--learn"], &["sh", "-c", script])?;
    ensure!(output.status.success(), "{script}: {output:?}");
    list(&output)
}

/// The entries that were printed.
fn list(output: &Output) -> Result<Vec<String>> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (_, text) = said
        .split_once("unveil = [")
        .with_context(|| said.clone())?;
    let (text, _) = text.split_once(']').context("an end")?;
    let entries = text.split(',').map(|part| part.trim().trim_matches('"'));
    Ok(entries
        .filter(|entry| !entry.is_empty())
        .map(str::to_owned)
        .collect())
}

fn what_succeeded_is_listed_and_nothing_else(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display().to_string();
    for name in ["in", "both", "gone", "sub/x"] {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().context("a parent")?)?;
        fs::write(&path, "x\n")?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
    }
    let script = dir.path().join("script");
    fs::write(&script, "#!/bin/sh\nexit 0\n")?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    for (done, listed) in [
        ("read line <AT/in", "r:AT/in"),
        ("echo >>AT/both; read line <AT/both", "rw:AT/both"),
        ("exec AT/script", "rx:AT/script"),
        ("ls AT/sub", "r:AT/sub"),
        ("mkdir AT/new && echo >AT/new/file", "wc:AT"),
        ("rm AT/gone", "c:AT"),
        ("mv AT/in AT/in2", "c:AT"),
        ("ln -s nowhere AT/link", "c:AT"),
        (
            "chmod 600 AT/none; cat AT/none; ls AT/none; test -e AT/both",
            "",
        ),
        (
            "echo >/tmp/x; cat /tmp/x; echo >local/y; mv local/y local/z",
            "",
        ),
    ] {
        let script = format!("{} 2>/dev/null; :", done.replace("AT", &at));
        let found = learn_sh(context, &script)?;
        // Coreutils look for their translations.
        let found: Vec<&String> = found
            .iter()
            .filter(|entry| !entry.ends_with("/locale.alias"))
            .collect();
        let wanted = listed.replace("AT", &at);
        let wanted: Vec<&String> = Some(&wanted)
            .filter(|it| !it.is_empty())
            .into_iter()
            .collect();
        ensure!(found == wanted, "{done}: {found:?}, not {wanted:?}");
    }
    Ok(())
}

fn a_traced_command_ends_and_prints_as_any(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    for (script, code) in [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -34 $$", 162),
        ("(sleep 0.1; kill -CONT $$) & kill -STOP $$; exit 3", 3),
        ("trap 'exit 5' USR1; kill -USR1 $$; exit 6", 5),
    ] {
        let output = run(context, &["--learn"], &["sh", "-c", script])?;
        ensure!(output.status.code() == Some(code), "{script}: {output:?}");
    }
    let printed = "echo out; echo err >&2; echo $PPID; cat /dev/null";
    let learnt = run(context, &["--learn"], &["sh", "-c", printed])?;
    ensure!(learnt.stdout == b"out\n1\n", "{learnt:?}");
    let said = String::from_utf8_lossy(&learnt.stderr).into_owned();
    ensure!(said.lines().any(|line| line == "err"), "{said}");
    let dir = open_dir()?;
    let file = dir.path().join("list");
    let option = format!("--learn={}", file.display());
    let output = run(context, &[&option], &["cat", "/etc/passwd"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let written = fs::read_to_string(&file)?;
    ensure!(written.contains("\"r:/etc/passwd\",\n"), "{written}");
    ensure!(!said.contains("r:/etc/passwd"), "{said}");
    let refused = run(context, &[&option, "--user", "nobody-there"], &["true"])?;
    ensure!(refused.status.code() == Some(125), "{refused:?}");
    ensure!(fs::read_to_string(&file)? == written);
    run(context, &[&option], &["true"])?;
    let shorter = fs::read_to_string(&file)?;
    ensure!(
        shorter.ends_with("]\n") && !shorter.contains("/etc/passwd"),
        "{shorter}"
    );
    drop(dir);
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn children_threads_and_vforks_are_seen(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display();
    fs::write(dir.path().join("in"), "x")?;
    let script = format!(
        "i=0; while [ $i -lt 1000 ]; do /bin/true; i=$((i+1)); done; (sh -c 'cat {at}/in & wait')"
    );
    let found = learn_sh(context, &script)?;
    ensure!(found.contains(&format!("r:{at}/in")), "{found:?}");
    // perl's system() is a fork or a vfork, and the shell in it another.
    let script =
        format!("perl -e 'system(q(cat {at}/in)); exec {{q(/bin/cat)}} q(cat), q({at}/in)'");
    let found = learn_sh(context, &script)?;
    ensure!(found.contains(&format!("r:{at}/in")), "{found:?}");
    Ok(())
}

fn a_pipe_for_a_program_does_not_hold_the_tracer(context: &Context) -> Result<()> {
    let script = "mkfifo -m 755 /tmp/f; /tmp/f; [ $? = 126 ]";
    learn_sh(context, script).map(drop)
}

fn pruning_leaves_what_is_needed(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display();
    for name in ["needed", "optional"] {
        fs::write(dir.path().join(name), name)?;
    }
    let script = format!("cat {at}/optional >/dev/null; cat {at}/needed");
    let output = run(context, &["--learn", "--prune"], &["sh", "-c", &script])?;
    ensure!(output.stdout == b"needed", "{output:?}");
    let found = list(&output)?;
    ensure!(found == [format!("r:{at}/needed")], "{found:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        said.contains(&format!(
            "left out, as the command comes to exit code 0 without: r:{at}/optional"
        )),
        "{said}"
    );
    Ok(())
}

fn a_list_is_not_pruned_by_what_differs_anyway(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display();
    fs::write(dir.path().join("optional"), "")?;
    let said = |script: &str| -> Result<(Vec<String>, String)> {
        let output = run(context, &["--learn", "--prune"], &["sh", "-c", script])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((list(&output)?, said))
    };
    let (found, told) = said(&format!("cat {at}/optional; date +%N"))?;
    ensure!(
        told.contains("the command prints something else each time"),
        "{told}"
    );
    ensure!(!found.contains(&format!("r:{at}/optional")), "{told}");
    // With everything unveiled, no mount is read-only.
    let (found, told) = said(&format!(
        "cat {at}/optional; grep -c ' ro,' /proc/self/mountinfo"
    ))?;
    ensure!(
        told.contains("prints something else than with everything unveiled"),
        "{told}"
    );
    ensure!(found.contains(&format!("r:{at}/optional")), "{told}");
    // What it leaves behind makes the second run with everything unveiled another, and the one with the list prints what differs anyway.
    let (found, told) = said(&format!(
        "cat {at}/optional; cd {at}; date +%N; test ! -e 2 || exit 5; test ! -e 1 || touch 2; touch 1"
    ))?;
    ensure!(
        told.contains(
            "with everything unveiled the command comes to exit code 0 the first time, and to exit code 5 the second"
        ),
        "{told}"
    );
    ensure!(found.contains(&format!("r:{at}/optional")), "{told}");
    Ok(())
}

fn a_job_files_task_is_learned_from(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let input = dir.path().join("in");
    fs::write(&input, "x")?;
    let job = dir.path().join("cat.nomad.hcl");
    let text = format!(
        r#"job "cat" {{
        group "g" {{
        task "t" {{
          driver = "exec2"
          env {{
            FILE   = "{}"
            LC_ALL = "C"
          }}
          config {{
            command = "sh"
            args    = ["-c", "cat $FILE $NOMAD_TASK_DIR/own; echo >$NOMAD_ALLOC_DIR/out"]
          }}
          template {{
            data        = "y"
            destination = "local/own"
          }}
        }}
        }}
        }}"#,
        input.display()
    );
    fs::write(&job, text)?;
    for options in [&["--learn"][..], &["--learn", "--prune"]] {
        let output = Command::new(context.driver())
            .arg("run")
            .args(options)
            .arg(&job)
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(output.stdout == b"xy", "{output:?}");
        ensure!(
            list(&output)? == [format!("r:{}", input.display())],
            "{output:?}"
        );
    }
    Ok(())
}

fn what_no_call_shows_is_remarked(context: &Context) -> Result<()> {
    // io_uring_setup(8, zeroes): refused or not, the command knows how.
    let script = "my $p = pack('x120'); my $fd = syscall(425, 8, $p); exit 0";
    let output = run(context, &["--learn"], &["perl", "-e", script])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("the command uses io_uring"), "{said}");
    Ok(())
}

fn a_list_opens_the_terminals_that_a_command_makes(context: &Context) -> Result<()> {
    let command = ["script", "-qec", "tty", "/dev/null"];
    let output = run(context, &["--learn"], &command)?;
    ensure!(output.status.success(), "{output:?}");
    let list = list(&output)?;
    ensure!(list.contains(&"rw:/dev/pts".to_owned()), "{list:?}");
    let options: Vec<&str> = list.iter().flat_map(|entry| ["--unveil", entry]).collect();
    let output = run(context, &options, &command)?;
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(told.starts_with("/dev/pts/"), "{output:?}");
    Ok(())
}

fn a_probe_tells_something_and_leaves_nothing(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let said = |probe: &str, command: &str| -> Result<(Option<i32>, String)> {
        let options = ["--learn", "--probe", probe];
        let output = run(context, &options, &["sh", "-c", command])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code(), said))
    };
    let (code, told) = said("true", "exit 3")?;
    let sentence = "--probe: `true` succeeds before the command is started";
    ensure!(code == Some(125) && told.contains(sentence), "{told}");
    // Not what the probe has started either, and it may be at work when the command ends.
    let (code, told) = said("sleep 4711 & sleep 4712; true", "sleep 1; exit 3")?;
    let sentence = "--probe: the command ended before it succeeded; see why it ended";
    ensure!(code == Some(3) && told.contains(sentence), "{told}");
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_mistake_is_one_sentence(context: &Context) -> Result<()> {
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--prune"], 2, "--learn"),
        (&["--probe", "true"], 2, "--learn"),
        (
            &["--learn=/no/such/list"],
            125,
            "--learn: /no/such/list: No such file or directory",
        ),
        (&["--learn", "--unveil", "q:/"], 125, "unknown letter 'q'"),
    ];
    for (options, code, sentence) in cases {
        let output = run(context, options, &["true"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code) && said.contains(sentence),
            "{options:?}: {output:?}"
        );
    }
    Ok(())
}

fn ctrl_c_brings_the_list(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let child = Command::new(context.driver())
        .args([
            "run",
            "--learn",
            "--",
            "sh",
            "-c",
            "cat /etc/passwd; exec sleep 600",
        ])
        .env("LANG", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    sleep(Duration::from_millis(500));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(130), "{output:?}");
    ensure!(list(&output)? == ["r:/etc/passwd"], "{output:?}");
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_killed_run_takes_the_traced_command_along(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let mut child = Command::new(context.driver())
        .args(["run", "--learn", "--", "sleep", "600"])
        .stdin(Stdio::null())
        .spawn()?;
    sleep(Duration::from_millis(500));
    let is_running = |leak: &Leak| matches!(leak, Leak::Unit(_));
    ensure!(ground.left()?.iter().any(is_running), "it does not run");
    child.kill()?;
    child.wait()?;
    let begun = Instant::now();
    while ground.left()?.iter().any(is_running) {
        ensure!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            ground.left()?
        );
        sleep(Duration::from_millis(20));
    }
    // As of any run that was killed.
    let left = ground.left()?;
    left.iter()
        .rev()
        .filter(|leak| matches!(leak, Leak::Mount { .. }))
        .for_each(Leak::clear);
    left.iter().for_each(Leak::clear);
    Ok(())
}

/// Learns and prunes, and then sees for itself: it works with this list, and with no entry less.
fn works_with_the_list_and_with_no_less(
    context: &Context,
    options: &[&str],
    command: &[&str],
    works: impl Fn(&[&str]) -> Result<bool>,
) -> Result<()> {
    let begun = Instant::now();
    let learn = [options, &["--learn", "--prune"]].concat();
    let output = run(context, &learn, command)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("// without any letter of it"), "{output:?}");
    let entries = list(&output)?;
    ensure!(!entries.is_empty(), "{said}");
    context.note(format!("{:?}: {entries:?}", begun.elapsed()));
    let with = |entries: &[String]| {
        let options: Vec<&str> = entries
            .iter()
            .flat_map(|entry| ["--unveil", entry.as_str()])
            .collect();
        works(&options)
    };
    ensure!(with(&entries)?, "it does not work with {entries:?}");
    for at in 0..entries.len() {
        let mut fewer = entries.clone();
        let missing = fewer.remove(at);
        ensure!(!with(&fewer)?, "it works without {missing}");
    }
    Ok(())
}

const NGINX: &str = "daemon off;
pid /tmp/nginx.pid;
events {}
http {
  client_body_temp_path /tmp/body;
  proxy_temp_path /tmp/proxy;
  fastcgi_temp_path /tmp/fastcgi;
  uwsgi_temp_path /tmp/uwsgi;
  scgi_temp_path /tmp/scgi;
  access_log off;
  server { listen 127.0.0.1:8012; location / { return 200 hello; } }
}
";

fn nginx_works_with_the_list_and_with_no_less(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let path = dir.path().join("nginx.conf").display().to_string();
    fs::write(&path, NGINX)?;
    let command = ["/usr/sbin/nginx", "-e", "stderr", "-c", &path];
    let probe = "bash -c 'exec 3<>/dev/tcp/127.0.0.1/8012; echo GET / >&3; read line <&3; [ \"$line\" = hello ] || [ -n \"$line\" ]'";
    works_with_the_list_and_with_no_less(context, &["--probe", probe], &command, |unveil| {
        let mut child = Command::new(context.driver())
            .arg("run")
            .args(unveil)
            .arg("--")
            .args(command)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let works = loop {
            if std::net::TcpStream::connect("127.0.0.1:8012").is_ok() {
                break true;
            }
            if child.try_wait()?.is_some() {
                break false;
            }
            sleep(Duration::from_millis(20));
        };
        if works {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
        }
        child.wait()?;
        Ok(works)
    })
}

fn postgresql_works_with_the_list_and_with_no_less(context: &Context) -> Result<()> {
    let script = "set -e; cd local
        bin=/usr/lib/postgresql/17/bin
        $bin/initdb --pgdata=data --username=postgres --auth=trust --no-sync --no-instructions >/dev/null
        echo 'select 6 * 7' | $bin/postgres --single -D data -c shared_buffers=16MB postgres | grep -q '= \"42\"'";
    judged_by_status(context, &["--memory", "512M"], &["sh", "-c", script])
}

fn java_works_with_the_list_and_with_no_less(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let path = dir.path().join("Hello.java").display().to_string();
    fs::write(
        &path,
        "class Hello { public static void main(String[] a) { System.out.println(\"hello\"); } }",
    )?;
    judged_by_status(
        context,
        &["--memory", "512M"],
        &["java", "-XX:TieredStopAtLevel=1", &path],
    )
}

fn judged_by_status(context: &Context, options: &[&str], command: &[&str]) -> Result<()> {
    works_with_the_list_and_with_no_less(context, options, command, |unveil| {
        let output = run(context, &[options, unveil].concat(), command)?;
        Ok(output.status.success())
    })
}
