//! `run` for a job file: the task that Nomad would start, and every word of the file that one host cannot keep.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use crate::case;
use crate::examples::{BRIDGE, SECRET, VOLUMES};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, jobs_of_a_cluster_run_as_they_stand),
    case!(Speed, Ours, examples_run_as_they_stand),
    case!(Speed, Ours, ctrl_c_stops_a_job_as_it_says),
    case!(Speed, Ours, a_job_finds_everything_it_asks_for),
    case!(Speed, Ours, options_win_over_the_file),
    case!(Speed, Ours, a_job_has_the_capabilities_it_asks_for),
    case!(Speed, Ours, a_job_without_logs_prints_nothing),
    case!(Speed, Ours, what_has_no_effect_is_a_warning_with_its_line),
    case!(Speed, Ours, a_mistake_in_a_job_is_told_with_its_line),
    case!(Speed, Ours, no_file_is_too_strange),
    case!(Limits, Ours, the_kernel_has_the_limits_of_the_job),
];

pub const ENV: &str = include_str!("../nomad/env.nomad.hcl");
pub const EXIT7: &str = include_str!("../nomad/exit7.nomad.hcl");
pub const SERVICE: &str = include_str!("../nomad/service.nomad.hcl");

fn file(content: impl AsRef<[u8]>) -> Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().suffix(".nomad.hcl").tempfile()?;
    file.write_all(content.as_ref())?;
    Ok(file)
}

fn command(context: &Context, options: &[&str], job: &NamedTempFile) -> Command {
    let mut command = Command::new(context.driver());
    command.arg("run").args(options).arg(job.path());
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

fn run(context: &Context, options: &[&str], job: impl AsRef<[u8]>) -> Result<Output> {
    Ok(command(context, options, &file(job)?).output()?)
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What we say ourselves, without the name of the file, and without limits that a guest has no controller for.
fn told(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stderr);
    let ours = text
        .lines()
        .filter_map(|line| line.strip_prefix("nomad-driver-exec2: "));
    let ours = ours.filter(|line| !line.contains("is not there"));
    ours.map(|line| {
        line.split_once(".nomad.hcl:")
            .map_or(line, |(_, rest)| rest)
            .to_owned()
    })
    .collect()
}

/// A job of one task that runs a script; `group` and `task` are further lines of these blocks. The task's stand from line
/// 6 on, the group's from line 3 on if there are none of the task.
fn job(group: &str, task: &str, script: &str) -> String {
    format!(
        r#"job "j" {{
group "g" {{
{group}
task "t" {{
driver = "exec2"
{task}
config {{
command = "sh"
args = ["-c", <<-SCRIPT
{script}
SCRIPT
]
}}
}}
}}
}}
"#
    )
}

fn jobs_of_a_cluster_run_as_they_stand(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let output = run(context, &[], EXIT7)?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(out(&output) == "to stdout\n", "{output:?}");
    ensure!(told(&output).is_empty(), "{output:?}");
    let output = run(context, &[], ENV)?;
    ensure!(output.status.success(), "{output:?}");
    let seen = out(&output);
    for line in [
        "NOMAD_TASK_NAME=env",
        "NOMAD_JOB_ID=env",
        "NOMAD_ALLOC_NAME=env.env[0]",
        "NOMAD_CPU_LIMIT=100",
        "NOMAD_MEMORY_LIMIT=64",
    ] {
        ensure!(seen.lines().any(|it| it == line), "{line}: {output:?}");
    }
    ensure!(seen.contains("USER=nomad-8"), "{output:?}");
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn examples_run_as_they_stand(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let output = run(context, &[], SECRET)?;
    ensure!(
        output.status.success() && told(&output).is_empty() && out(&output) == "tmpfs\n28\n",
        "{output:?}"
    );

    let dir = tempfile::Builder::new()
        .prefix("exec2-")
        .tempdir_in("/srv")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
    let volume = format!("data={}", dir.path().display());
    for runs in ["1\n", "2\n"] {
        let output = run(context, &["--volume", &volume], VOLUMES)?;
        ensure!(
            output.status.success() && out(&output) == runs,
            "{output:?}"
        );
    }

    let output = run(context, &[], BRIDGE)?;
    let sentence = "network mode `bridge` needs a Nomad cluster";
    ensure!(
        output.status.code() == Some(125)
            && told(&output).iter().any(|line| line.contains(sentence)),
        "{output:?}"
    );
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn ctrl_c_stops_a_job_as_it_says(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    {
        let job = file(SERVICE)?;
        let mut child = command(context, &[], &job).stdout(Stdio::piped()).spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        ensure!(line.starts_with("serving from /"), "{line:?}");
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
        let mut rest = String::new();
        stdout.read_to_string(&mut rest)?;
        let status = child.wait()?;
        // The trap of its kill_signal, SIGTERM.
        ensure!(
            rest == "asked to stop\n" && status.success(),
            "{rest:?} {status}"
        );
    }
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_job_finds_everything_it_asks_for(context: &Context) -> Result<()> {
    let text = r#"
variable "greeting" {
  type = string
}
locals {
  who = "${var.greeting}, ${NOMAD_META_who}"
}
job "full" {
  type = "batch"
  parameterized {
    payload       = "required"
    meta_required = ["who"]
  }
  group "g" {
    network {
      port "http" {
        static = 8080
      }
      port "admin" {}
    }
    task "init" {
      driver = "exec2"
      lifecycle {
        hook = "prestart"
      }
      config {
        command = "false"
      }
    }
    task "main" {
      driver = "exec2"
      user   = "nobody"
      env {
        GREETING = local.who
        KERNEL   = "${attr.kernel.name}"
      }
      template {
        data        = "A=from template\n"
        destination = "local/env"
        env         = true
      }
      template {
        data        = "text\n"
        destination = "secrets/deep/file"
        perms       = "640"
        gid         = 65534
      }
      dispatch_payload {
        file = "in/put"
      }
      config {
        command = "sh"
        args    = ["-c", "id -u; echo $GREETING; echo $KERNEL; echo $A; cat $NOMAD_SECRETS_DIR/deep/file local/in/put; echo $NOMAD_ADDR_http ${NOMAD_PORT_admin} $1", "sh", 5]
      }
    }
  }
}
"#;
    let payload = file("the payload\n")?;
    let path = payload.path().to_string_lossy();
    let options = [
        "--var",
        "greeting=hi",
        "--meta",
        "who=you",
        "--payload",
        &path,
    ];
    let output = run(context, &options, text)?;
    ensure!(output.status.success(), "{output:?}");
    let seen = out(&output);
    let start = "65534\nhi, you\nlinux\nfrom template\ntext\nthe payload\n127.0.0.1:8080 2";
    ensure!(
        seen.starts_with(start) && seen.ends_with(" 5\n"),
        "{output:?}"
    );
    let told = told(&output);
    ensure!(
        told.len() == 2
            && told[0] == "21: task init (prestart) stays out of this run"
            && told[1].starts_with("19: ports of this run: http = 8080, admin = 2"),
        "{told:?}"
    );
    let output = run(context, &[&options[..], &["--task", "init"]].concat(), text)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(())
}

fn options_win_over_the_file(context: &Context) -> Result<()> {
    let text = job(
        "",
        "user = \"nobody\"\nenv {\nA = \"file\"\n}\nresources {\nmemory_max = 500\ncores = 1\n}",
        "id -u; echo $A $NOMAD_CPU_LIMIT $NOMAD_MEMORY_LIMIT $NOMAD_MEMORY_MAX_LIMIT; cat /etc/hostname",
    );
    let options = [
        "--user",
        "root",
        "--env",
        "A=option",
        "--memory",
        "64M",
        "--cpu",
        "300",
        "--unveil",
        "r:/etc/hostname",
    ];
    let output = run(context, &options, text)?;
    let hostname = fs::read_to_string("/etc/hostname")?;
    ensure!(
        out(&output) == format!("0\noption 300 64\n{hostname}"),
        "{output:?}"
    );
    Ok(())
}

fn a_job_without_logs_prints_nothing(context: &Context) -> Result<()> {
    let text = job(
        "",
        "logs {\ndisabled = true\n}",
        "echo out; echo err >&2; exit 3",
    );
    let output = run(context, &[], text)?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let silent = !stderr.contains("err\n");
    ensure!(out(&output).is_empty() && silent, "{output:?}");
    ensure!(
        stderr.contains("what the task prints is in journalctl -u exec2-t-"),
        "{output:?}"
    );
    Ok(())
}

/// Whoever runs it is the operator.
fn a_job_has_the_capabilities_it_asks_for(context: &Context) -> Result<()> {
    let script = "grep CapEff /proc/self/status | cut -f2";
    let with = |name: &str| {
        job("", "", script).replacen("config {", &format!("config {{\ncap_add = [\"{name}\"]"), 1)
    };
    let output = run(context, &[], with("CAP_SYS_NICE"))?;
    ensure!(out(&output) == "0000000000800000\n", "{output:?}");
    let output = run(context, &[], with("net_admn"))?;
    ensure!(
        output.status.code() == Some(125)
            && String::from_utf8_lossy(&output.stderr)
                .contains("cap_add: \"net_admn\" is no capability"),
        "{output:?}"
    );
    Ok(())
}

fn what_has_no_effect_is_a_warning_with_its_line(context: &Context) -> Result<()> {
    let group = "count = 3 \n update {}\nservice {\nname = \"x\"\n}\nrestart {\nattempts = 2\n}\nconstraint {\nattribute = \"${attr.os.name}\"\n}";
    let task = "env {\nA = \"${meta.rack}\"\n}\nartifact {\nsource = \"https://example.org/x\"\n}";
    let output = run(
        context,
        &["--ignore", "artifact"],
        job(group, task, "echo $A"),
    )?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(out(&output) == "${meta.rack}\n", "{output:?}");
    let told = told(&output);
    let wanted = [
        "3: group g: count = 3, but a run is one instance",
        "4: group g: update has no effect in a single run",
        "5: group g: service has no effect: a run registers and checks none",
        "8: group g: restart has no effect: a run runs the task once",
        "11: group g: constraint has no effect in a single run",
        "19: artifact is left out",
        "17: env A: this host does not know ${meta.rack}, which stays as it stands",
    ];
    ensure!(told == wanted, "{told:#?}");
    Ok(())
}

fn a_mistake_in_a_job_is_told_with_its_line(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let of_task = |task: &str| job("", task, "true");
    let of_group = |group: &str| job(group, "", "true");
    let volume = job(
        "volume \"data\" {\n}",
        "volume_mount {\nvolume = \"data\"\ndestination = \"/d\"\n}",
        "true",
    );
    let two = of_task("}\ntask \"other\" {\ndriver = \"exec2\"");
    let cases: Vec<(&[&str], String, &str)> = vec![
        (
            &[],
            of_task("artifact {}"),
            "6: task t: artifact needs a Nomad cluster: ",
        ),
        (
            &[],
            of_task("vault {}"),
            "6: task t: vault needs a Nomad cluster: ",
        ),
        (
            &[],
            of_group("vault {}"),
            "3: group g: vault needs a Nomad cluster: ",
        ),
        (
            &[],
            of_task("template {\ndata = \"{{ key }}\"\n}"),
            "6: task t: template",
        ),
        (
            &[],
            of_group("network {\nmode = \"bridge\"\n}"),
            "4: group g: network mode `bridge` needs a Nomad cluster: ",
        ),
        (
            &[],
            volume.clone(),
            "7: volume_mount: volume `data` is a Nomad client's; ",
        ),
        (
            &["--volume", "data=/no/such"],
            volume,
            "7: --volume data=/no/such: no such directory",
        ),
        (
            &["--volume", "x=/srv"],
            of_task(""),
            "4: --volume x: task t mounts no such volume",
        ),
        (
            &[],
            of_task("").replace("exec2", "docker"),
            "5: task t: driver = \"docker\", but only exec2 can be run here",
        ),
        (
            &[],
            two.clone(),
            "7: job j has more than one task; name one with --task: g/t, g/other",
        ),
        (
            &["--task", "x"],
            two,
            "1: job j has no task `x`; name one with --task: g/t, g/other",
        ),
        (
            &["--var", "x=1"],
            of_task(""),
            "1: --var x: there is no variable `x`; the file declares none",
        ),
        (
            &["--var", "x=a"],
            format!("variable \"x\" {{\ntype = number\n}}\n{}", of_task("")),
            "1: variable `x`: `\"a\"` is no number",
        ),
        (
            &[],
            of_task("kill_signal = \"SIGFOO\""),
            "4: kill_signal: signal \"SIGFOO\" is unknown",
        ),
        (
            &[],
            of_task("comand = 1"),
            "6: `comand` is nothing that task t can have",
        ),
        (
            &[],
            of_task("").replace("command =", "comand ="),
            "8: config: `comand` is no key of exec2",
        ),
        (
            &[],
            of_task("").replace("\"sh\"", "\"${attr.platform.aws}\""),
            "8: `${attr.platform.aws}`: this host does not know `attr",
        ),
        (
            &[],
            of_task("template {\ndata = \"x\"\ndestination = \"../x\"\n}"),
            "6: template destination `../x`: it is outside the task's directory",
        ),
        (
            &[],
            of_task("resources {\ncores = 4000\n}"),
            "4: cores = 4000: this host has ",
        ),
        (
            &["--meta", "a=b"],
            of_task(""),
            "1: the job is not parameterized",
        ),
    ];
    for (options, text, sentence) in cases {
        let output = run(context, options, &text)?;
        let told = told(&output);
        ensure!(
            output.status.code() == Some(125)
                && output.stdout.is_empty()
                && told.len() == 1
                && told[0].starts_with(sentence),
            "{sentence}: {output:?}"
        );
    }
    let left = ground.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn no_file_is_too_strange(context: &Context) -> Result<()> {
    let long = vec![b'#'; 10 << 20];
    let deep = "a {\n".repeat(100_000).into_bytes();
    let cases: [(&[u8], &str); 5] = [
        (&[0xff, 0, 0xfe], ": is not text"),
        (b"", "1: the file has no `job` block"),
        (b"\0\x01{[(", "1: "),
        (&long, ": is longer than the 2048 KiB that are read"),
        (&deep, ""),
    ];
    for (content, sentence) in cases {
        let output = run(context, &[], content)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(125) && text.contains(sentence) && text.len() < 2_000,
            "{sentence}: {output:?}"
        );
    }
    for (path, sentence) in [
        ("/no/such.hcl", "/no/such.hcl: no such job file"),
        ("/etc", "/etc: Is a directory"),
        ("/dev/zero", "/dev/zero: is longer than"),
    ] {
        let output = Command::new(context.driver())
            .args(["run", path])
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(125) && text.contains(sentence),
            "{output:?}"
        );
    }
    Ok(())
}

fn the_kernel_has_the_limits_of_the_job(context: &Context) -> Result<()> {
    let script = "cd /sys/fs/cgroup && cat memory.low memory.max cpu.max";
    let task = "resources {\ncpu = 500\nmemory = 64\nmemory_max = 128\n}";
    let output = run(context, &[], job("", task, script))?;
    let seen = out(&output);
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(
        lines == ["67108864", "134217728", "50000 100000"],
        "{output:?}"
    );
    ensure!(told(&output).is_empty(), "{output:?}");

    let script = script.replace("memory.low memory.max cpu.max", "cpuset.cpus");
    let output = run(context, &[], job("", "resources {\ncores = 1\n}", &script))?;
    ensure!(out(&output) == "0\n", "{output:?}");
    Ok(())
}
