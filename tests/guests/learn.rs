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
use crate::nomad::{Job, said};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, what_succeeded_is_listed_and_nothing_else),
    case!(Speed, Ours, a_traced_command_ends_and_prints_as_any),
    case!(Speed, Ours, children_threads_and_vforks_are_seen),
    case!(Speed, Ours, a_pipe_for_a_program_does_not_hold_the_tracer),
    case!(Speed, Ours, pruning_leaves_what_is_needed),
    case!(Speed, Ours, a_list_is_not_pruned_by_what_differs_anyway),
    case!(Speed, Ours, a_command_that_fails_is_nothing_to_prune_by),
    case!(Speed, Ours, an_attempt_that_spoils_the_next_ones_is_noticed),
    case!(Speed, Ours, a_job_files_task_is_learned_from),
    case!(Speed, Ours, a_job_reads_the_list_as_it_is_printed),
    case!(Limits, Agent, a_real_agent_reads_the_list_as_it_is_printed),
    case!(Speed, Ours, of_the_commands_own_files_in_proc_one_is_enough),
    case!(Speed, Ours, what_no_call_shows_is_remarked),
    case!(Speed, Ours, a_list_opens_the_terminals_that_a_command_makes),
    case!(Speed, Ours, a_probe_tells_something_and_leaves_nothing),
    case!(Speed, Ours, a_probe_in_a_group_of_its_own_is_not_waited_for),
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
    case!(Programs, Ours, a_list_for_java_opens_no_user_namespaces),
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

fn a_command_that_fails_is_nothing_to_prune_by(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display();
    fs::write(dir.path().join("read"), "")?;
    for (end, code, told) in [
        ("exit 7", 7, "exit code 7"),
        ("cat /no/such/file", 1, "exit code 1"),
        ("kill -TERM $$; :", 143, "signal 15"),
    ] {
        let script = format!("read line <{at}/read; {end}");
        let output = run(context, &["--learn", "--prune"], &["sh", "-c", &script])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(code), "{output:?}");
        ensure!(
            said.contains(&format!("the command comes to {told}: "))
                && said.contains("nothing is pruned")
                && said.contains("--probe"),
            "{said}"
        );
        ensure!(
            list(&output)?.contains(&format!("r:{at}/read")) && said.contains("(see --prune)"),
            "{said}"
        );
    }
    Ok(())
}

fn an_attempt_that_spoils_the_next_ones_is_noticed(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let at = dir.path().display();
    fs::create_dir(dir.path().join("d"))?;
    fs::set_permissions(dir.path().join("d"), Permissions::from_mode(0o777))?;
    fs::write(dir.path().join("optional"), "")?;
    // With "c" and no "w" the file is made, and cannot be opened.
    let begins = format!("if [ -e {at}/d/lock ] && [ ! -s {at}/d/lock ]; then exit 5; fi");
    let works = format!("echo 1 >{at}/d/lock || exit 6; cat {at}/optional; rm {at}/d/lock");
    let learn = |begins: &str| -> Result<(Vec<String>, String)> {
        let script = format!("{begins}; {works}");
        let output = run(context, &["--learn", "--prune"], &["sh", "-c", &script])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((list(&output)?, said))
    };
    let (found, told) = learn(&begins)?;
    ensure!(
        found.contains(&format!("r:{at}/optional"))
            && told.contains("has left something behind")
            && told.contains("(see --prune)"),
        "{told}"
    );
    // As the sentence says.
    let (found, told) = learn(&format!("rm -f {at}/d/lock; {begins}"))?;
    ensure!(found == [format!("wc:{at}/d")], "{told}");
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

/// A directory whose name would be templates of HCL, and a script that does not name it so, but reads a file in it.
fn template_dir() -> Result<(TempDir, String)> {
    let dir = open_dir()?;
    let inner = dir.path().join("$${x}%{if}$%");
    fs::create_dir(&inner)?;
    fs::write(inner.join("in"), "read\n")?;
    let at = dir.path().display();
    let script = format!("cat {at}/$(printf '\\044\\044{{x}}\\045{{if}}\\044\\045')/in");
    Ok((dir, script))
}

/// The list as it stands there, for a job.
fn printed_list(context: &Context, script: &str) -> Result<String> {
    let output = run(context, &["--learn"], &["sh", "-c", script])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let (start, end) = (said.find("unveil = ["), said.rfind(']'));
    let (start, end) = start.zip(end).with_context(|| said.clone())?;
    Ok(said[start..=end].to_owned())
}

fn a_job_reads_the_list_as_it_is_printed(context: &Context) -> Result<()> {
    let (dir, script) = template_dir()?;
    let list = printed_list(context, &script)?;
    let job = dir.path().join("t.nomad.hcl");
    for (lines, works) in [(&*list, true), ("unveil = []", false)] {
        fs::write(&job, Job::shell(&script).config(lines).text())?;
        let output = Command::new(context.driver())
            .arg("run")
            .arg(&job)
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success() == works && (output.stdout == b"read\n") == works,
            "{lines}: {output:?}"
        );
    }
    Ok(())
}

fn a_real_agent_reads_the_list_as_it_is_printed(context: &Context) -> Result<()> {
    let (_dir, script) = template_dir()?;
    let script = format!("{script}; echo 0x3f >/proc/self/coredump_filter");
    let list = printed_list(context, &script)?;
    context.block_on(async {
        let agent = crate::agent::agent(context).await?;
        for (lines, status) in [(&*list, "complete"), ("unveil = []", "failed")] {
            let job = Job::shell(&format!("set -e; {script}"))
                .config(lines)
                .text();
            let (id, ended) = crate::agent::to_end(&agent, &job).await?;
            let told = crate::agent::messages(&agent, &id, "t").await?;
            ensure!(ended == status, "{lines}: {told:?}");
            if status == "complete" {
                ensure!(
                    agent.logs(&id, "t", "stdout").await? == "read\n",
                    "{told:?}"
                );
            }
        }
        agent.collect().await?;
        agent.finish().await
    })
}

fn of_the_commands_own_files_in_proc_one_is_enough(context: &Context) -> Result<()> {
    let own = "echo 0x3f >/proc/self/coredump_filter || exit 9";
    let output = run(context, &["--learn"], &["sh", "-c", own])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(list(&output)? == ["w:/proc/self/coredump_filter"], "{said}");
    ensure!(!said.contains("user namespaces"), "{said}");
    let makes = format!("{own}; unshare --user true");
    let unveil = ["--unveil", "w:/proc/self/coredump_filter"];
    let output = run(context, &unveil, &["sh", "-c", &makes])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(1) && said.contains("unshare failed"),
        "{output:?}"
    );
    ensure!(run(context, &[], &["sh", "-c", own])?.status.code() == Some(9));

    let childs = format!("({own}); unshare --user true");
    let output = run(context, &["--learn"], &["sh", "-c", &childs])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(list(&output)?.contains(&"rw:/proc".into()), "{said}");
    ensure!(
        said.contains("// the w of rw:/proc is for /proc/PID/coredump_filter, and lets the task create user namespaces"),
        "{said}"
    );
    let output = run(context, &["--unveil", "rw:/proc"], &["sh", "-c", &childs])?;
    ensure!(output.status.success(), "it tells of nothing: {output:?}");
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

/// As `timeout` makes one.
fn a_probe_in_a_group_of_its_own_is_not_waited_for(context: &Context) -> Result<()> {
    let begun = Instant::now();
    let options = ["--learn", "--probe", "exec timeout 300 sleep 4715"];
    let output = run(context, &options, &["sh", "-c", "sleep 1; exit 3"])?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    ensure!(!is_executing("sleep\x004715\0")?, "the probe goes on");
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
    const PROBES: &str = "sleep\x004713\0";
    let ground = Ground::survey()?;
    let mut child = Command::new(context.driver())
        .args(["run", "--learn", "--probe", "sleep 4713; sleep 4714"])
        .args(["--", "sleep", "600"])
        .stdin(Stdio::null())
        .spawn()?;
    let is_running = |leak: &Leak| matches!(leak, Leak::Unit(_));
    let comes_to = |running: bool| -> Result<()> {
        let begun = Instant::now();
        loop {
            let left = ground.left()?;
            let is = [left.iter().any(is_running), is_executing(PROBES)?];
            if is == [running; 2] {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "the command and the probe's run: {is:?}; {left:?}"
            );
            sleep(Duration::from_millis(20));
        }
    };
    comes_to(true)?;
    child.kill()?;
    child.wait()?;
    comes_to(false)?;
    // As of any run that was killed.
    let left = ground.left()?;
    left.iter()
        .rev()
        .filter(|leak| matches!(leak, Leak::Mount { .. }))
        .for_each(Leak::clear);
    left.iter().for_each(Leak::clear);
    Ok(())
}

/// Whether a process of this guest has these words, each with a NUL behind it.
fn is_executing(words: &str) -> Result<bool> {
    let processes = fs::read_dir("/proc")?.flatten();
    Ok(processes
        .filter_map(|process| fs::read(process.path().join("cmdline")).ok())
        .any(|line| line == words.as_bytes()))
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
    ensure!(with(&entries)?, "an attempt spoiled those after it");
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
        serves(context, unveil, &command, || {
            std::net::TcpStream::connect("127.0.0.1:8012").is_ok()
        })
    })
}

/// Whether a server comes to answer before it ends, which it has to do in time.
fn serves(
    context: &Context,
    options: &[&str],
    command: &[&str],
    answers: impl Fn() -> bool,
) -> Result<bool> {
    let mut child = Command::new(context.driver())
        .arg("run")
        .args(options)
        .arg("--")
        .args(command)
        .stdin(Stdio::null())
        .spawn()?;
    let begun = Instant::now();
    let works = loop {
        if answers() {
            break true;
        }
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        if begun.elapsed() > Duration::from_secs(20) {
            break false;
        }
        sleep(Duration::from_millis(20));
    };
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    child.wait()?;
    Ok(works)
}

/// The server, whose children answer queries, by its socket and by TCP. It runs as its own user, as it refuses to as root, and clears
/// the lock file that an attempt left empty.
fn postgresql_works_with_the_list_and_with_no_less(context: &Context) -> Result<()> {
    let dir = open_dir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (data, sockets) = (path("data"), path("sockets"));
    let bin = "/usr/lib/postgresql/17/bin";
    let made = format!(
        "set -e; install -d -m 700 -o postgres -g postgres {data} {sockets}
        runuser -u postgres -- {bin}/initdb --pgdata={data} --username=postgres --auth=trust --no-sync --no-instructions"
    );
    said("sh", &["-c", &made])?;
    let query = format!(
        "for host in {sockets} 127.0.0.1; do
            answer=$({bin}/psql -X -q -At -h $host -p 8015 -U postgres \
                -c 'create table if not exists t (n int)' -c 'insert into t values (6)' -c 'select 7 * n from t limit 1' postgres)
            [ \"$answer\" = 42 ] || exit 1
        done"
    );
    let answers = || {
        let mut psql = Command::new("sh");
        let psql = psql.args(["-c", &query]).stderr(Stdio::null());
        psql.status().is_ok_and(|status| status.success())
    };
    let options = ["--user", "postgres", "--memory", "512M"];
    let learned = [&options[..], &["--probe", &query]].concat();
    let start = format!(
        "rm -f {data}/postmaster.pid {sockets}/.s.PGSQL.8015.lock
        exec {bin}/postgres -D {data} -p 8015 -k {sockets} -c listen_addresses=127.0.0.1 -c shared_buffers=16MB"
    );
    let command = ["sh", "-c", &start];
    works_with_the_list_and_with_no_less(context, &learned, &command, |unveil| {
        serves(context, &[&options, unveil].concat(), &command, answers)
    })
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

/// The JVM writes to its coredump_filter.
fn a_list_for_java_opens_no_user_namespaces(context: &Context) -> Result<()> {
    let command = ["java", "-XX:TieredStopAtLevel=1", "-version"];
    let output = run(context, &["--memory", "512M", "--learn"], &command)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let entries = list(&output)?;
    ensure!(
        entries.contains(&"w:/proc/self/coredump_filter".into())
            && !entries.iter().any(|entry| entry.ends_with(":/proc")),
        "{said}"
    );
    Ok(())
}

fn judged_by_status(context: &Context, options: &[&str], command: &[&str]) -> Result<()> {
    works_with_the_list_and_with_no_less(context, options, command, |unveil| {
        let output = run(context, &[options, unveil].concat(), command)?;
        Ok(output.status.success())
    })
}
