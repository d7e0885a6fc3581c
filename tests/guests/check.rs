//! `check` for people: a host is told fit or not, fact by fact, and what it tells of a job is what the kernel shows of its tasks.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::leaks::Ground;
use harness::nomad::{Agent, Allocation, Config};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use crate::case;
use crate::examples::{BRIDGE, CORES, OVERSUBSCRIPTION, SECRET, SIDECAR, VOLUMES};
use crate::nomad::{Scope, proc_file, status, until};
use crate::programs::{GO, JAVA, NGINX, NODE, POSTGRESQL, PYTHON, REDIS};
use crate::run_job::{ENV, EXIT7, SERVICE};
use crate::tasks::drawn;
use crate::told::{self, ALLOC_ID};

pub const CASES: &[Case] = &[
    case!(
        Speed,
        Ours,
        the_agent_that_runs_tells_where_its_configuration_is
    ),
    case!(Everywhere, Ours, a_host_is_told_fit_or_what_it_lacks),
    case!(Speed, Ours, each_lack_of_a_host_is_told_with_its_remedy),
    case!(Speed, Ours, colours_are_for_terminals_that_want_them),
    case!(Speed, Ours, the_plugin_directory_is_judged_file_by_file),
    case!(
        Speed,
        Ours,
        the_agents_configuration_is_judged_as_the_plugin_would
    ),
    case!(Speed, Ours, what_it_tells_of_a_job_is_what_the_kernel_shows),
    case!(Speed, Ours, every_path_that_it_tells_of_opens_in_the_task),
    case!(
        Limits,
        Ours,
        the_limits_that_it_tells_of_are_the_kernels,
        Long
    ),
    case!(Programs, Ours, it_tells_of_programs_what_the_kernel_shows),
    case!(
        ProgramLimits,
        Ours,
        it_tells_of_a_programs_limits_what_the_kernel_shows
    ),
    case!(
        Speed,
        Ours,
        what_would_not_start_or_has_no_effect_is_told_with_its_line
    ),
    case!(Speed, Ours, a_missing_work_dir_is_told_by_its_own_name),
    case!(
        Speed,
        Ours,
        an_entry_that_leads_to_a_manager_of_the_host_is_told_as_what_it_is
    ),
    case!(
        Speed,
        Ours,
        the_exit_status_tells_a_faulty_job_from_a_question_that_cannot_be_read
    ),
    case!(Speed, Ours, a_strange_job_file_is_told_in_one_safe_line),
];

/// An agent's files: a plugin directory with the driver in it, and a configuration that names it.
struct Files {
    dir: TempDir,
}

impl Files {
    fn new(context: &Context, block: &str) -> Result<Files> {
        let dir = tempfile::tempdir_in("/opt")?;
        fs::create_dir(dir.path().join("plugins"))?;
        let files = Files { dir };
        symlink(context.driver(), files.plugin("nomad-driver-exec2"))?;
        files.write(&format!(
            "client {{\n enabled = true\n}}\nplugin \"nomad-driver-exec2\" {{\n config {{\n{block}\n}}\n}}\n"
        ))?;
        Ok(files)
    }

    fn plugin(&self, name: &str) -> PathBuf {
        self.dir.path().join("plugins").join(name)
    }

    fn write(&self, text: &str) -> Result<()> {
        let plugins = self.dir.path().join("plugins");
        let first = format!("plugin_dir = \"{}\"\n", plugins.display());
        fs::write(self.config(), first + text)?;
        Ok(())
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("agent.hcl")
    }
}

fn check(context: &Context, files: &Files) -> Command {
    let mut command = Command::new(context.driver());
    command
        .args(["check", "--config"])
        .arg(files.config())
        .env_remove("NO_COLOR")
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

/// What it says as data, and with which exit status.
fn told(command: &mut Command) -> Result<(Vec<Value>, i32)> {
    let output = command.arg("--json").output()?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    let objects = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((objects, output.status.code().context("no exit status")?))
}

/// `name: found; remedy` of what has a status.
fn of_status(lines: &[Value], wanted: &str) -> Vec<String> {
    let lines = lines.iter().filter(|line| line["status"] == wanted);
    lines
        .map(|line| {
            let text = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
            format!("{}: {}; {}", text("name"), text("found"), text("remedy"))
        })
        .collect()
}

fn a_host_is_told_fit_or_what_it_lacks(context: &Context) -> Result<()> {
    let files = Files::new(context, "")?;
    let (lines, code) = told(&mut check(context, &files))?;
    let errors = of_status(&lines, "error");
    match context.guest().kind {
        Kind::Qemu => ensure!(errors.is_empty() && code == 0, "{errors:#?}"),
        // The machine under a container of ours has these controllers on cgroup v1.
        Kind::Nspawn => {
            let offered = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
            let missing = ["cpu", "memory", "pids"]
                .into_iter()
                .filter(|name| !offered.split_whitespace().any(|word| word == *name));
            let missing: Vec<String> = missing
                .map(|name| {
                    format!(
                        "{name}: cgroup v2 has no {name} controller, so limits are not in force; check cgroup_disable= and v1 mounts"
                    )
                })
                .collect();
            ensure!(errors == missing && code == 1, "{errors:#?}");
        }
    }
    let named = |name: &str| lines.iter().find(|line| line["name"] == name);
    for name in [
        "root",
        "kernel",
        "cgroup",
        "systemd",
        "bus",
        "config",
        "client",
        "plugin_dir",
        "plugin",
    ] {
        let line = named(name).with_context(|| format!("no {name} in {lines:#?}"))?;
        ensure!(line["status"] == "ok" && line["remedy"].is_null(), "{line}");
    }
    let landlock = named("landlock").context("no landlock")?;
    ensure!(
        landlock["found"]
            .as_str()
            .is_some_and(|found| found.starts_with("ABI ")),
        "{landlock}"
    );
    // As many lines for people, each beginning with its status.
    let output = check(context, &files).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.lines().count() == lines.len(), "{text}");
    for (line, object) in text.lines().zip(&lines) {
        let status = object["status"].as_str().unwrap_or_default();
        ensure!(line.starts_with(status) && !line.contains('\x1b'), "{line}");
    }
    Ok(())
}

fn colours_are_for_terminals_that_want_them(context: &Context) -> Result<()> {
    let files = Files::new(context, "")?;
    let job = job_file(EXIT7)?;
    let of_host = || check(context, &files);
    let of_job = || {
        let mut command = check(context, &files);
        command.arg(job.path()).args(["--unveil", "r:/no/such"]);
        command
    };
    let green = "\x1b[32mok     \x1b[0m";
    let red = "\x1b[31merror  \x1b[0m";
    for (command, coloured) in [(&of_host as &dyn Fn() -> Command, green), (&of_job, red)] {
        let (text, _) = drawn(command(), None)?;
        ensure!(text.contains(coloured), "{text:?}");
        let mut empty = command();
        empty.env("NO_COLOR", "");
        let (text, _) = drawn(empty, None)?;
        ensure!(text.contains(coloured), "{text:?}");

        let plain = &coloured[5..12];
        let mut refused = command();
        refused.env("NO_COLOR", "1");
        let (text, _) = drawn(refused, None)?;
        ensure!(text.contains(plain) && !text.contains('\x1b'), "{text:?}");
        let piped = String::from_utf8(command().output()?.stdout)?;
        ensure!(
            piped.contains(plain) && !piped.contains('\x1b'),
            "{piped:?}"
        );
        let mut data = command();
        data.arg("--json");
        let (text, _) = drawn(data, None)?;
        ensure!(text.starts_with('[') && !text.contains('\x1b'), "{text:?}");
    }
    Ok(())
}

fn each_lack_of_a_host_is_told_with_its_remedy(context: &Context) -> Result<()> {
    let files = Files::new(context, "")?;
    fs::set_permissions(files.dir.path(), fs::Permissions::from_mode(0o755))?;
    let driver = context.driver().display().to_string();
    let config = files.config().display().to_string();
    let wrapped = |words: &[&str]| {
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args([&driver, "check", "--config", &config]);
        command
    };
    let mut no_bus = check(context, &files);
    no_bus.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/socket");
    let cases: [(Command, &str); 4] = [
        (
            wrapped(&[
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--",
            ]),
            "root: Driver must run as root, and this command does not; try sudo, as not all can be seen without",
        ),
        (
            // As a kernel answers that was booted without Landlock in its lsm= list.
            wrapped(&[
                "systemd-run",
                "--quiet",
                "--collect",
                "--pipe",
                "--wait",
                "--property=SystemCallFilter=~landlock_create_ruleset landlock_add_rule landlock_restrict_self",
                "--property=SystemCallErrorNumber=EOPNOTSUPP",
            ]),
            "landlock: Landlock is not available; it needs Linux 5.14 or newer with landlock in the kernel's lsm= list",
        ),
        (
            wrapped(&[
                "unshare",
                "--mount",
                "sh",
                "-c",
                "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"",
                "sh",
            ]),
            "cgroup: cgroup v2 is not mounted at /sys/fs/cgroup; boot with systemd.unified_cgroup_hierarchy=1",
        ),
        (no_bus, "bus: systemd cannot be reached on the system bus: "),
    ];
    for (mut command, sentence) in cases {
        let (lines, code) = told(&mut command)?;
        let errors = of_status(&lines, "error");
        ensure!(
            errors.iter().all(|line| !line.starts_with("bus: ")
                || line.ends_with("; is dbus running (systemctl status dbus)?")),
            "{errors:#?}"
        );
        ensure!(
            code == 1 && errors.iter().any(|line| line.starts_with(sentence)),
            "{sentence}: {errors:#?}"
        );
        // The rest is looked at all the same.
        ensure!(
            lines.iter().any(|line| line["name"] == "plugin"),
            "{lines:#?}"
        );
    }
    Ok(())
}

fn the_plugin_directory_is_judged_file_by_file(context: &Context) -> Result<()> {
    let of_plugins = |files: &Files| -> Result<(Vec<String>, Vec<String>)> {
        let (mut lines, _) = told(&mut check(context, files))?;
        lines.retain(|line| line["name"] == "plugin_dir");
        Ok((of_status(&lines, "error"), of_status(&lines, "warning")))
    };
    let none = |all: &[String]| all.is_empty();
    let one = |all: &[String], words: &str| all.len() == 1 && all[0].contains(words);

    let files = Files::new(context, "")?;
    let (errors, warnings) = of_plugins(&files)?;
    ensure!(none(&errors) && none(&warnings), "{errors:?} {warnings:?}");

    symlink("/no/such/binary", files.plugin("gone"))?;
    let (errors, _) = of_plugins(&files)?;
    ensure!(
        one(
            &errors,
            "gone is a link to /no/such/binary, which is not there, so that the agent does not start; remove"
        ),
        "{errors:?}"
    );
    fs::remove_file(files.plugin("gone"))?;

    fs::write(files.plugin("other"), "#!/bin/sh\n")?;
    let (errors, warnings) = of_plugins(&files)?;
    ensure!(
        none(&errors) && one(&warnings, "other is not executable"),
        "{errors:?} {warnings:?}"
    );
    fs::set_permissions(files.plugin("other"), fs::Permissions::from_mode(0o755))?;
    let (errors, warnings) = of_plugins(&files)?;
    ensure!(
        none(&errors) && one(&warnings, "other is in no plugin block"),
        "{errors:?} {warnings:?}"
    );
    fs::write(
        files.plugin("other"),
        "#!/bin/sh\nexec nomad-driver-exec2\n",
    )?;
    let (errors, warnings) = of_plugins(&files)?;
    ensure!(
        none(&errors) && one(&warnings, "other offers exec2, too"),
        "{errors:?} {warnings:?}"
    );
    fs::copy(context.driver(), files.plugin("other"))?;
    let (errors, warnings) = of_plugins(&files)?;
    ensure!(
        none(&errors) && one(&warnings, "are all this driver"),
        "{errors:?} {warnings:?}"
    );
    fs::remove_file(files.plugin("other"))?;

    fs::remove_file(files.plugin("nomad-driver-exec2"))?;
    let (errors, _) = of_plugins(&files)?;
    ensure!(
        one(&errors, "holds no nomad-driver-exec2; install -m 755"),
        "{errors:?}"
    );
    fs::remove_dir(files.dir.path().join("plugins"))?;
    let (errors, _) = of_plugins(&files)?;
    ensure!(
        one(&errors, "plugins does not exist; make it"),
        "{errors:?}"
    );
    Ok(())
}

fn the_agents_configuration_is_judged_as_the_plugin_would(context: &Context) -> Result<()> {
    let client = "client {\n enabled = true\n}\n";
    let plugin = |block: &str| {
        format!("{client}plugin \"nomad-driver-exec2\" {{\n config {{\n {block}\n}}\n}}\n")
    };
    let cases = [
        (
            client.to_owned(),
            "plugin: the agent's configuration does not name the plugin",
        ),
        (
            format!("{client}plugin \"exec2\" {{\n}}\n"),
            "plugin: plugin \"exec2\" names no file of the driver; the label is the file's name",
        ),
        (
            plugin("unveill_paths = []"),
            "agent.hcl:7: config: `unveill_paths` is no key of exec2, which knows unveil_defaults",
        ),
        (
            plugin("pids_max = 0"),
            "agent.hcl:7: config: pids_max = 0 is out of bounds; give one from 1 to 4194304",
        ),
        (
            plugin("unveil_paths = [\"rz:/etc\"]"),
            "agent.hcl:7: unveil_paths: \"rz:/etc\" has an unknown letter 'z'",
        ),
        (
            plugin("allow_caps = [\"net_admn\"]"),
            "agent.hcl:7: allow_caps: \"net_admn\" is no capability",
        ),
        (
            plugin("unveil_paths = [\"r:/no/such\"]"),
            "unveil_paths: r:/no/such: no such file or directory; correct",
        ),
        (
            plugin("").replace("true", "false"),
            "client: the agent is no client",
        ),
        (
            plugin("").replace(
                "true",
                "true\n options {\n \"driver.denylist\" = \"exec2\"\n}",
            ),
            "client: client.options driver.denylist keeps",
        ),
        ("client {\n".to_owned(), "agent.hcl:3: a block has no end"),
    ];
    let files = Files::new(context, "")?;
    for (text, sentence) in cases {
        files.write(&text)?;
        let (lines, code) = told(&mut check(context, &files))?;
        let errors = of_status(&lines, "error");
        ensure!(
            code == 1 && errors.iter().any(|line| line.contains(sentence)),
            "{sentence}: {errors:#?}"
        );
    }
    // Fit, and not all of it of use.
    files.write(&plugin("unveil_paths = [\"r:/etc\", \"rc:/etc/hostname\"]"))?;
    let (lines, _) = told(&mut check(context, &files))?;
    let warnings = of_status(&lines, "warning").join("\n");
    for sentence in [
        "\"c\" has no effect on a file",
        "all of it is open already by r:/etc of unveil_paths",
    ] {
        ensure!(warnings.contains(sentence), "{warnings}");
    }
    files.write(&plugin(
        "unveil_paths = [\"r:/etc/hosts\", \"rw:/etc/hosts\", \"rx:/usr/bin/env\", \"rw:/run/dbus\"]",
    ))?;
    let (lines, _) = told(&mut check(context, &files))?;
    let warnings = of_status(&lines, "warning").join("\n");
    for sentence in [
        "rw:/etc/hosts: has no effect, as r:/etc/hosts of unveil_paths",
        "rx:/usr/bin/env: all of it is open already by rx:/",
        "rw:/run/dbus: a task of root reaches the system bus by it and so controls the host, and any job may say user = \"root\"; leave",
    ] {
        ensure!(warnings.contains(sentence), "{sentence}: {warnings}");
    }
    // Where jobs unveil, it keeps them from widening the path.
    files.write(&plugin(
        "unveil_by_task = true\nunveil_paths = [\"r:/etc\", \"r:/etc/hostname\"]",
    ))?;
    let (lines, _) = told(&mut check(context, &files))?;
    let warnings = of_status(&lines, "warning").join("\n");
    ensure!(!warnings.contains("open already"), "{warnings}");
    let output = Command::new(context.driver())
        .args(["check", "--config", "/no/such", "--json"])
        .output()?;
    let lines: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let errors = of_status(&lines, "error").join("\n");
    ensure!(
        errors.contains("config: /no/such: No such file"),
        "{errors}"
    );
    Ok(())
}

/// A process that looks like an agent: where its files are is told by its arguments.
struct Agents {
    child: Child,
}

impl Agents {
    fn start(files: &Files, uid: u32) -> Result<Agents> {
        // `nomad agent -config …` is a shell with a script of that name, which waits for its stdin's end.
        fs::write(files.dir.path().join("agent"), "read line\n")?;
        fs::set_permissions(files.dir.path(), fs::Permissions::from_mode(0o755))?;
        let child = Command::new("/bin/sh")
            .arg0("nomad")
            .args(["agent", "-config", "agent.hcl"])
            .current_dir(files.dir.path())
            .uid(uid)
            .stdin(Stdio::piped())
            .spawn()?;
        Ok(Agents { child })
    }

    fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        Ok(())
    }
}

fn the_agent_that_runs_tells_where_its_configuration_is(context: &Context) -> Result<()> {
    let files = Files::new(context, "pids_max = 77")?;
    let lines = || told(Command::new(context.driver()).arg("check"));
    for (uid, status, sentence) in [
        (0, "ok", "runs as root; -"),
        (
            65_534,
            "error",
            "runs with uid 65534; run the agent as root",
        ),
    ] {
        let agent = Agents::start(&files, uid)?;
        let (lines, _) = lines()?;
        let job = job_file(EXIT7)?;
        let (tasks, _) = told(Command::new(context.driver()).arg("check").arg(job.path()))?;
        agent.end()?;
        let of_agent = of_status(&lines, status);
        ensure!(
            of_agent
                .iter()
                .any(|line| line.starts_with("agent: process ") && line.ends_with(sentence)),
            "{lines:#?}"
        );
        let config = files.config().display().to_string();
        // Of what is not root's, root opens nothing.
        let is_read = lines
            .iter()
            .any(|line| line["name"] == "config" && line["found"] == config.as_str());
        ensure!(is_read == (uid == 0), "{lines:#?}");
        let pids_max = if uid == 0 { "77" } else { "16384" };
        ensure!(
            tasks[0]["plan"]["cgroup"]["pids.max"] == pids_max,
            "{tasks:#?}"
        );
    }
    let (lines, _) = lines()?;
    let warnings = of_status(&lines, "warning").join("\n");
    for sentence in [
        "agent: no Nomad agent runs on this host",
        "config: /etc/nomad.d has no configuration of an agent",
    ] {
        ensure!(warnings.contains(sentence), "{warnings}");
    }
    Ok(())
}

fn job_file(text: impl AsRef<[u8]>) -> Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().suffix(".nomad.hcl").tempfile()?;
    file.write_all(text.as_ref())?;
    Ok(file)
}

/// A job whose tasks stay, for the kernel's files to be read.
fn held(job: &str) -> String {
    job.replace("\"-c\", \"", "\"-c\", \"sleep 600; ")
        .replace("command = \"env\"", "command = \"sleep\"\nargs = [\"600\"]")
}

/// Starts a job and compares what `check` tells of it with what there is.
async fn compare(context: &Context, agent: &Agent, text: &str) -> Result<Vec<Value>> {
    let alloc = agent.run(text).await?;
    let names: BTreeSet<String> = hcl_tasks(text);
    let compared = compare_with(context, agent, text, &alloc, &names).await;
    alloc.stop().await?;
    compared
}

fn hcl_tasks(text: &str) -> BTreeSet<String> {
    let lines = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("task \""));
    lines
        .filter_map(|line| Some(line.split_once('"')?.0.to_owned()))
        .collect()
}

async fn compare_with(
    context: &Context,
    agent: &Agent,
    text: &str,
    alloc: &Allocation,
    names: &BTreeSet<String>,
) -> Result<Vec<Value>> {
    let first = names.first().context("a job without a task")?;
    let root = &alloc.task(first)?.paths().root;
    let mounts = root.parent().context("no parent")?.to_owned();
    let cores = std::thread::available_parallelism()?.get() as u64;
    let files = Files::new(context, "unveil_by_task = true")?;
    files.write(&format!(
        "client {{\n enabled = true\n alloc_mounts_dir = \"{}\"\n cpu_total_compute = {}\n host_volume \"data\" {{\n path = \"/srv/data\"\n}}\n}}\n\
         plugin \"nomad-driver-exec2\" {{\n config {{\n unveil_by_task = true\n}}\n}}\n",
        mounts.display(),
        Config::default().core_mhz * cores
    ))?;
    let job = job_file(text)?;
    let (tasks, code) = told(check(context, &files).arg(job.path()))?;
    ensure!(code == 0 && tasks.len() == names.len(), "{tasks:#?}");
    for object in &tasks {
        let task = object["task"].as_str().context("no name")?;
        let (_, name) = task.split_once('/').context("no group")?;
        let plan = &object["plan"];
        compare_task(context, agent, plan, alloc, name)
            .await
            .with_context(|| task.to_owned())?;
    }
    Ok(tasks)
}

async fn compare_task(
    context: &Context,
    agent: &Agent,
    plan: &Value,
    alloc: &Allocation,
    name: &str,
) -> Result<()> {
    let task = alloc.task(name)?;
    let mut scope = Scope::of(task)?;
    let slice = plan["slice"].as_str().context("slice")?;
    scope.dir = Path::new("/sys/fs/cgroup/exec2.slice")
        .join(slice)
        .join(&scope.unit);
    let main = until("the task is its command", || scope.main().ok()).await?;

    // They go to their data, and write their titles over the environment.
    let is_nginx = proc_file(main, "comm")? == "nginx";
    let goes_its_own_way = is_nginx || ["redis", "postgresql"].contains(&name);

    told::ids(plan, task, main)?;
    let capabilities = &plan["capabilities"];
    ensure!(capabilities["bounding"] == status(main, "CapBnd")?);
    ensure!(capabilities["ambient"] == status(main, "CapAmb")?);
    let cwd = fs::read_link(format!("/proc/{main}/cwd"))?;
    let foretold = plan["work_dir"].as_str().context("work_dir")?;
    let foretold = foretold.replace(ALLOC_ID, alloc.id());
    ensure!(
        cwd == Path::new(&foretold) || (goes_its_own_way && cwd.starts_with(&foretold)),
        "{cwd:?} is not {foretold}"
    );
    ensure!(plan["oom_score_adj"].to_string() == proc_file(main, "oom_score_adj")?);
    let network = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| meta.ino());
    let is_hosts = network(&main.to_string())? == network("1")?;
    ensure!(plan["network"].is_null() == is_hosts, "network");

    let unit = plan["unit"].as_str().context("unit")?;
    let start = scope.unit.rsplit_once('-').context("a start")?.1;
    let unit = unit
        .replace("-00000000-", &format!("-{}-", &alloc.id()[..8]))
        .replace("00000000.scope", start);
    ensure!(unit == scope.unit, "{unit} is not {}", scope.unit);
    let files = plan["cgroup"].as_object().context("cgroup")?;
    ensure!(files.len() >= 5, "{files:?}");
    for (file, foretold) in files {
        let is_there = scope.dir.join(file).exists();
        ensure!(
            is_there || context.guest().kind == Kind::Nspawn,
            "no {file}"
        );
        if is_there {
            let seen = scope.file(file)?;
            // Which CPU is reserved is the client's choice.
            let is_as_many =
                file == "cpuset.cpus" && seen.len() == foretold.as_str().map_or(0, str::len);
            ensure!(*foretold == seen.as_str() || is_as_many, "{file} is {seen}");
        }
    }
    told::properties(plan, &scope, alloc.id())?;
    told::mounts(plan, main, alloc.id())?;
    let tried = told::unveil(agent, task, plan, main, alloc.id()).await?;
    for kind in ["list", "read", "write", "mkdir"] {
        for is_open in [true, false] {
            ensure!(tried.contains(&(kind, is_open)), "{kind}: {tried:?}");
        }
    }
    for kind in ["exec", "create", "create and exec"] {
        ensure!(tried.contains(&(kind, true)), "{kind}: {tried:?}");
    }

    let environ = fs::read(format!("/proc/{main}/environ"))?;
    let environ = String::from_utf8_lossy(&environ).into_owned();
    let seen: BTreeSet<&str> = environ
        .split('\0')
        .filter_map(|text| Some(text.split_once('=')?.0))
        .collect();
    let names = |key: &str| -> Result<Vec<String>> {
        Ok(serde_json::from_value(plan["environment"][key].clone())?)
    };
    let (foretold, added) = (names("names")?, names("added")?);
    // A client of the tests has no terminal.
    let lost: Vec<_> = foretold
        .iter()
        .filter(|name| !seen.contains(name.as_str()) && !["TERM", "LANG"].contains(&name.as_str()))
        .collect();
    ensure!(
        lost.is_empty() || goes_its_own_way,
        "not in the environment: {lost:?}"
    );
    ensure!(
        added == ["HOME", "NOMAD_WORK_DIR", "TMPDIR", "USER"],
        "{added:?}"
    );
    Ok(())
}

async fn agent(context: &Context) -> Result<Agent> {
    let config = Config {
        plugin: "unveil_by_task = true".into(),
        host_volumes: vec![("data".into(), "/srv/data".into())],
        ..Config::default()
    };
    Agent::start(context.driver(), config).await
}

fn compare_all(context: &Context, jobs: &[&str]) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let mut wrong = Vec::new();
        for job in jobs {
            let compared = compare(context, &agent, job).await;
            wrong.extend(compared.err().map(|error| format!("{error:#}")));
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        agent.finish().await
    })
}

/// A host's directory that everybody may write to, for a case.
struct Shared(&'static str);

impl Shared {
    fn new(path: &'static str) -> Result<Shared> {
        fs::create_dir_all(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        Ok(Shared(path))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}

/// Every mode, each for a directory with an executable, that only the rules close.
const MODES: [&str; 8] = ["r", "w", "c", "rw", "rx", "rc", "rwc", "rwxc"];

fn of_each_mode(shared: &Shared, user: &str) -> Result<String> {
    let mut entries = Vec::new();
    for mode in MODES {
        let dir = Path::new(shared.0).join(format!("of-{mode}"));
        fs::create_dir_all(&dir)?;
        fs::copy("/usr/bin/true", dir.join("true"))?;
        for path in [dir.join("true"), dir.clone()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        }
        entries.push(format!("\"{mode}:{}\"", dir.display()));
    }
    let job = held(EXIT7).replace(
        "driver = \"exec2\"",
        &format!("driver = \"exec2\"\nuser = \"{user}\""),
    );
    let job = job.replace(
        "config {",
        &format!("config {{\nunveil = [{}]", entries.join(", ")),
    );
    ensure!(job.contains(user) && job.contains("of-rwxc"));
    Ok(job)
}

fn what_it_tells_of_a_job_is_what_the_kernel_shows(context: &Context) -> Result<()> {
    let _data = Shared::new("/srv/data")?;
    let modes = Shared::new("/srv/modes")?;
    let read_only = VOLUMES.replace("destination =", "read_only = true\ndestination =");
    ensure!(read_only != VOLUMES);
    let jobs = [ENV, EXIT7, SECRET, VOLUMES, &read_only].map(held);
    let of_each_mode = [
        of_each_mode(&modes, "root")?,
        of_each_mode(&modes, "nobody")?,
    ];
    let mut all: Vec<&str> = jobs
        .iter()
        .chain(&of_each_mode)
        .map(String::as_str)
        .collect();
    all.extend([SERVICE, SIDECAR, BRIDGE]);
    let root = held(EXIT7).replace("driver = \"exec2\"", "driver = \"exec2\"\nuser = \"root\"");
    let root = root.replace(
        "config {",
        "config {\nwork_dir = \"local\"\noom_score_adj = 100\ncap_drop = [\"net_raw\"]",
    );
    all.push(&root);
    compare_all(context, &all)
}

fn the_limits_that_it_tells_of_are_the_kernels(context: &Context) -> Result<()> {
    let _data = Shared::new("/srv/data")?;
    let jobs = [OVERSUBSCRIPTION, VOLUMES, ENV].map(held);
    let mut all = vec![SERVICE, CORES];
    all.extend(jobs.iter().map(String::as_str));
    compare_all(context, &all)
}

fn it_tells_of_programs_what_the_kernel_shows(context: &Context) -> Result<()> {
    let java = JAVA.replace(
        "System.out.println(\"processors",
        "Thread.sleep(600000); System.out.println(\"processors",
    );
    let java = java.replace(
        "main(String[] args)",
        "main(String[] args) throws Exception",
    );
    ensure!(java != JAVA);
    compare_all(context, &[NGINX, NODE, REDIS, PYTHON, POSTGRESQL, &java])
}

fn it_tells_of_a_programs_limits_what_the_kernel_shows(context: &Context) -> Result<()> {
    let go = GO.replace("\"go-limits\"", "\"sleep\"\nargs = [\"600\"]");
    compare_all(context, &[&go, NGINX])
}

/// The task itself opens each path, and none beside them.
fn every_path_that_it_tells_of_opens_in_the_task(context: &Context) -> Result<()> {
    let job = |script: &str| {
        format!(
            "job \"j\" {{\n group \"g\" {{\n task \"t\" {{\n driver = \"exec2\"\n config {{\n command = \"sh\"\n args = [\"-c\", <<-EOT\n{script}\nEOT\n]\n \
             unveil = [\"r:/etc/passwd\", \"rx:/usr/sbin\", \"r:/var/lib\"]\n }}\n resources {{\n cpu = 500\n memory = 64\n }}\n }}\n }}\n}}\n"
        )
    };
    context.block_on(async {
        let agent = agent(context).await?;
        let told = compare(context, &agent, &job("sleep 600")).await?;
        let rules = told[0]["plan"]["unveil"].as_array().context("unveil")?.clone();
        let sources: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["source"].as_str()).collect();
        ensure!(sources == BTreeSet::from(["the defaults", "the driver", "the job"]), "{sources:?}");
        let mut script = String::from(
            "look() { if [ -d \"$1\" ]; then ls \"$1\"; else head -c 0 \"$1\"; fi >/dev/null 2>&1 && echo \"open $1\" || echo \"shut $1\"; }\n",
        );
        let mut wanted = Vec::new();
        for rule in &rules {
            let (mode, path) = (rule["mode"].as_str().context("mode")?, rule["path"].as_str().context("path")?);
            let is_ours = path.contains(ALLOC_ID);
            let name = path.rsplit('/').next().unwrap_or_default();
            let path = if is_ours { name } else { path };
            if mode.contains('r') && rule["is_absent"] == false && !path.starts_with("/dev/std") {
                script.push_str(&format!("look {path}\n"));
                wanted.push(format!("open {path}"));
            }
        }
        for path in ["/root", "/etc/fstab", "/etc/shadow", "/usr/share", "/srv", "/"] {
            script.push_str(&format!("look {path}\n"));
            wanted.push(format!("shut {path}"));
        }
        ensure!(wanted.len() > 30, "{wanted:?}");
        let alloc = agent.run(&job(&script)).await?;
        alloc.only_task()?.wait().await?;
        alloc.stop().await?;
        let seen = alloc.stdout("t")?;
        let seen: Vec<&str> = seen.lines().collect();
        ensure!(seen == wanted, "{seen:#?}\n{wanted:#?}");
        agent.finish().await
    })
}

fn of_job(context: &Context, files: &Files, options: &[&str], text: &str) -> Result<(Value, i32)> {
    let file = job_file(text)?;
    let (mut tasks, code) = told(check(context, files).args(options).arg(file.path()))?;
    ensure!(tasks.len() == 1, "{tasks:?}");
    Ok((tasks.remove(0), code))
}

fn what_would_not_start_or_has_no_effect_is_told_with_its_line(context: &Context) -> Result<()> {
    let ground = Ground::survey()?;
    let job = |config: &str, task: &str| {
        format!(
            "job \"j\" {{\ngroup \"g\" {{\ntask \"t\" {{\ndriver = \"exec2\"\n{task}\nconfig {{\ncommand = \"true\"\n{config}\n}}\n}}\n}}\n}}\n"
        )
    };
    let open = Files::new(
        context,
        "unveil_by_task = true\nallow_caps = [\"net_raw\"]\nunveil_paths = [\"r:/etc/hosts\", \"rc:/etc/hosts\", \"rw:/etc/hostname\", \"rc:/etc/hostname\", \"rx:/usr/bin/env\"]",
    )?;
    let shut = Files::new(context, "")?;
    let errors = [
        (
            &shut,
            "unveil = [\"r:/etc\"]",
            "",
            ":8: task set unveil paths but driver config does not allow this; the operator sets unveil_by_task = true",
        ),
        (
            &open,
            "unveil = [\"r:/no/such\"]",
            "",
            ":8: unveil r:/no/such: no such file or directory; correct",
        ),
        (
            &open,
            "unveil = [\"r:/root/.bashrc\"]",
            "",
            ":8: unveil r:/root/.bashrc: permission denied (uid 80000 cannot reach it); let its",
        ),
        (
            &open,
            "unveil = [\"rz:/etc\"]",
            "",
            ":8: unveil: \"rz:/etc\" has an unknown letter",
        ),
        (
            &open,
            "unveil = [\"c:/etc/passwd\"]",
            "",
            ":8: unveil c:/etc/passwd: \"c\" allows nothing on a file",
        ),
        (
            &open,
            "cap_add = [\"sys_admin\"]",
            "",
            ":8: cap_add: task requested capability \"sys_admin\" not in driver allow_caps",
        ),
        (
            &open,
            "work_dir = \"../x\"",
            "",
            ":8: work_dir = \"../x\" has a \"..\" in it",
        ),
        (
            &open,
            "oom_score_adj = 5000",
            "",
            ":8: config: oom_score_adj = 5000 is out of bounds",
        ),
        (
            &open,
            "",
            "user = \"no-such-user\"",
            ":3: task t: user \"no-such-user\" does not exist",
        ),
        (
            &open,
            "",
            "kill_signal = \"SIGFOO\"",
            ":3: kill_signal: signal \"SIGFOO\" is unknown",
        ),
        (
            &open,
            "",
            "resources {\ncores = 4000\n}",
            ":3: cores = 4000: this host has ",
        ),
        (
            &open,
            "",
            "template {\ndata = \"x\"\ndestination = \"../x\"\n}",
            ":5: template destination `../x`: it is outside",
        ),
    ];
    for (files, config, task, sentence) in errors {
        let (object, code) = of_job(context, files, &[], &job(config, task))?;
        let findings = object["findings"].as_array().context("findings")?;
        let errors = of_status(findings, "error");
        ensure!(
            code == 1 && errors.len() == 1 && errors[0].contains(sentence),
            "{sentence}: {object:#}"
        );
    }
    let chroot = job("", "").replace("\"true\"", "\"chroot\"");
    let (object, code) = of_job(context, &open, &[], &chroot)?;
    let error = of_status(object["findings"].as_array().context("findings")?, "error").join("");
    ensure!(
        code == 1
            && error
                .contains(":7: command \"chroot\": permission denied (found as /usr/sbin/chroot"),
        "{error}"
    );

    let unveil = "unveil = [\"r:/etc/passwd\", \"r:/etc//passwd\", \"rw:/etc/hosts\", \"r:/usr/bin/false\", \"rc:/etc/group\", \"rwxc:alloc/logs\"]";
    // What the operator wrote in vain is not the author's to mend.
    let (object, code) = of_job(context, &open, &[], &job(unveil, ""))?;
    let warnings = of_status(
        object["findings"].as_array().context("findings")?,
        "warning",
    );
    ensure!(code == 0 && warnings.len() == 5, "{warnings:#?}");
    for sentence in [
        ":8: unveil r:/etc//passwd: has no effect, as r:/etc/passwd of the job is for the same path and comes first",
        ":8: unveil rw:/etc/hosts: has no effect, as r:/etc/hosts of unveil_paths",
        ":8: unveil r:/usr/bin/false: all of it is open already by rx:/",
        ":8: unveil rc:/etc/group: \"c\" has no effect on a file",
        ":8: unveil rwxc:alloc/logs: has no effect, as alloc/logs is read-only to tasks",
    ] {
        ensure!(
            warnings.iter().any(|line| line.contains(sentence)),
            "{sentence}: {warnings:#?}"
        );
    }

    // What only a start can tell is named, and is no error.
    let text = job(
        "args = [\"${attr.unique.storage.volume}\", \"${NOMAD_PORT_http}\"]",
        "artifact {\nsource = \"https://example.org\"\n}",
    )
    .replacen("task", "network {\nport \"http\" {\n}\n}\ntask", 1);
    let (object, code) = of_job(context, &open, &[], &text)?;
    let open_points = object["at_start"].to_string();
    ensure!(code == 0, "{object:#}");
    for what in [
        "port http is the scheduler's",
        "what artifact gives is a client's",
        "dynamic user is Nomad's choice",
        "attr.unique.storage.volume} is the node's",
    ] {
        ensure!(open_points.contains(what), "{what}: {open_points}");
    }
    let (object, _) = of_job(
        context,
        &open,
        &["--memory", "64M", "--user", "nobody", "--env", "A=b"],
        &job("", ""),
    )?;
    let plan = &object["plan"];
    ensure!(
        plan["cgroup"]["memory.max"] == "67108864" && plan["user"]["uid"] == 65534,
        "{plan:#}"
    );
    ensure!(
        plan["environment"]["names"].to_string().contains("\"A\""),
        "{plan:#}"
    );
    drop((open, shut));
    let left = ground.left()?;
    ensure!(left.is_empty(), "it left {left:?}");
    Ok(())
}

/// A job of one task, whose `config` is its 7th line and on.
fn job_with(config: &str) -> String {
    format!(
        "job \"j\" {{\ngroup \"g\" {{\ntask \"t\" {{\ndriver = \"exec2\"\nconfig {{\ncommand = \"true\"\n{config}\n}}\n}}\n}}\n}}\n"
    )
}

fn a_missing_work_dir_is_told_by_its_own_name(context: &Context) -> Result<()> {
    let files = Files::new(
        context,
        "unveil_by_task = true\nunveil_paths = [\"r:/usr/share\"]",
    )?;
    let seen = |config: &str| -> Result<(Vec<String>, Value)> {
        let (object, code) = of_job(context, &files, &[], &job_with(config))?;
        let findings = object["findings"].as_array().context("findings")?;
        let (mut all, warnings) = (of_status(findings, "error"), of_status(findings, "warning"));
        ensure!(code == i32::from(!all.is_empty()), "{object:#}");
        all.extend(warnings);
        Ok((all, object["at_start"].clone()))
    };
    for (work_dir, sentence) in [
        (
            "/no/such",
            ":7: work_dir /no/such: no such file or directory; name a directory of this host, or make it",
        ),
        (
            "/etc/fstab",
            ":7: work_dir /etc/fstab: not a directory; name",
        ),
        (
            "/root",
            ":7: work_dir /root: permission denied (uid 80000 cannot enter it); let it be passed (chmod o+x)",
        ),
        (
            "/root/.bashrc",
            ":7: work_dir /root/.bashrc: permission denied (uid 80000 cannot reach it); let",
        ),
        (
            "/usr/share",
            ":7: work_dir /usr/share: is unveiled with r alone, as r:/usr/share of unveil_paths is for the same path and comes first",
        ),
    ] {
        let (told, _) = seen(&format!("work_dir = \"{work_dir}\""))?;
        ensure!(
            told.len() == 1 && told[0].starts_with("work_dir: ") && told[0].contains(sentence),
            "{sentence}: {told:#?}"
        );
        if !told[0].contains("unveiled") {
            // As a start says it.
            let file = job_file(job_with(&format!("work_dir = \"{work_dir}\"")))?;
            let output = Command::new(context.driver())
                .arg("run")
                .arg(file.path())
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(125)
                    && said.contains(&format!("work_dir {work_dir}: ")),
                "{output:?}"
            );
        }
    }
    // What is open already is entered all the same, and nobody wrote an entry for it.
    for config in [
        "work_dir = \"/usr/lib\"",
        "unveil = [\"rwxc:/srv\"]\nwork_dir = \"/srv/\"",
        "work_dir = \"local\"",
    ] {
        let (told, at_start) = seen(config)?;
        ensure!(told.is_empty(), "{config}: {told:#?}");
        ensure!(!at_start.to_string().contains("work_dir"), "{at_start}");
    }
    let (told, at_start) = seen("work_dir = \"local/app\"")?;
    ensure!(
        told.is_empty()
            && at_start
                .to_string()
                .contains("whether work_dir local/app is there"),
        "{told:#?} {at_start}"
    );
    Ok(())
}

/// What `check` says of an entry, beside what a task with it reaches.
fn an_entry_that_leads_to_a_manager_of_the_host_is_told_as_what_it_is(
    context: &Context,
) -> Result<()> {
    const ENGINE: &str = "/run/docker.sock";
    const BUS: &str = "/run/dbus/system_bus_socket";
    const SYSTEMD: &str = "/run/systemd/private";
    let files = Files::new(context, "unveil_by_task = true")?;
    let _engine = Listener(std::os::unix::net::UnixListener::bind(ENGINE)?, ENGINE);
    let controls = "and so controls the host; leave the entry out, or run the task as another user";
    let hidden = "is hidden from tasks";
    // Who, with which entry, reaches what, and what is told: nothing, a warning, or an error for what does not start.
    let cases: [(&str, &str, &[&str], &str, &str); 18] = [
        ("root", "rw:/run/dbus", &[BUS], "warning", controls),
        ("root", "c:/run/dbus", &[BUS], "warning", controls),
        (
            "root",
            "w:/var/run/dbus/system_bus_socket",
            &[BUS],
            "warning",
            controls,
        ),
        (
            "root",
            "rw:/run/systemd/private",
            &[SYSTEMD],
            "warning",
            controls,
        ),
        (
            "root",
            "rw:/run",
            &[BUS, SYSTEMD, ENGINE],
            "warning",
            controls,
        ),
        ("root", "r:/run/docker.sock", &[ENGINE], "warning", controls),
        ("root", "r:/run", &[], "warning", hidden),
        ("root", "r:/run/systemd", &[], "warning", hidden),
        ("root", "r:/run/dbus", &[], "error", hidden),
        (
            "root",
            "r:/run/dbus/system_bus_socket",
            &[],
            "error",
            hidden,
        ),
        ("root", "r:/run/systemd/journal/socket", &[], "", ""),
        ("root", "r:/run/lock", &[], "", ""),
        // A link to the same.
        ("root", "r:/var/lock", &[], "error", "but not by a link"),
        ("nobody", "r:/var/lock", &[], "", ""),
        ("root", "rw:/", &[], "", ""),
        ("nobody", "rw:/run/dbus", &[BUS], "", ""),
        ("nobody", "r:/run/dbus", &[], "warning", hidden),
        ("nobody", "r:/run/systemd/private", &[], "error", hidden),
    ];
    let script = "use Socket; for my $path (@ARGV) { socket(my $s, AF_UNIX, SOCK_STREAM, 0); print \"$path\\n\" if connect($s, sockaddr_un($path)) }";
    for (user, entry, reached, status, sentence) in cases {
        let output = Command::new(context.driver())
            .args([
                "run", "--user", user, "--unveil", entry, "--", "perl", "-e", script,
            ])
            .args([BUS, SYSTEMD, ENGINE])
            .output()?;
        let starts = status != "error";
        let seen = String::from_utf8_lossy(&output.stdout);
        let seen: Vec<&str> = seen.lines().collect();
        ensure!(
            output.status.success() == starts && seen == reached,
            "{user} {entry}: {output:?}"
        );
        let options = ["--user", user, "--unveil", entry];
        let (object, code) = of_job(context, &files, &options, &job_with(""))?;
        let findings = object["findings"].as_array().context("findings")?;
        ensure!(code == i32::from(!starts), "{user} {entry}: {object:#}");
        match status {
            "" => ensure!(findings.is_empty(), "{user} {entry}: {object:#}"),
            status => {
                let told = of_status(findings, status);
                let is_told = |line: &String| line.contains(&format!("unveil {entry}: "));
                ensure!(
                    findings.len() == 1 && is_told(&told[0]) && told[0].contains(sentence),
                    "{user} {entry}: {object:#}"
                );
            }
        }
    }
    Ok(())
}

/// A socket at a path, for as long as it is wanted.
struct Listener(
    #[allow(dead_code)] std::os::unix::net::UnixListener,
    &'static str,
);

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.1);
    }
}

fn the_exit_status_tells_a_faulty_job_from_a_question_that_cannot_be_read(
    context: &Context,
) -> Result<()> {
    let files = Files::new(context, "")?;
    for (faulty, sentence) in [
        (job_with("args = ["), ":8: "),
        (job_with("}\nresources {\nmemory = -5"), ":9: `memory`: -5"),
        (job_with("}\nfrobnicate {"), ":8: `frobnicate` is nothing"),
        (job_with("args = [\"${var.x}\"]"), ":7: "),
        (
            job_with("}\nkill_timeout = \"x\"\nmeta {"),
            ":8: `kill_timeout`",
        ),
        (job_with("foo = 1"), ":7: config: `foo` is no key"),
        ("x = 1".into(), ":1: "),
        (String::new(), ":1: the file has no `job` block"),
    ] {
        let (object, code) = of_job(context, &files, &[], &faulty)?;
        let errors = of_status(object["findings"].as_array().context("findings")?, "error");
        ensure!(
            code == 1
                && errors.len() == 1
                && errors[0].contains(sentence)
                && object["plan"].is_null(),
            "{faulty}: {object:#}"
        );
        let file = job_file(&faulty)?;
        let output = check(context, &files).arg(file.path()).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.code() == Some(1)
                && output.stderr.is_empty()
                && text.contains("would not start")
                && text.contains("\nerror    "),
            "{output:?}"
        );
    }
    let job = job_file(job_with(""))?;
    let docker = job_file(job_with("").replace("exec2", "docker"))?;
    let (job, docker) = (job.path(), docker.path());
    let named: [(&[&Path], i32, &str); 5] = [
        (&[Path::new("/no/such.hcl")], 125, "no such job file"),
        (&[docker], 125, "has no task with driver = \"exec2\""),
        (
            &[job, Path::new("--task"), Path::new("x")],
            125,
            "has no task `x`",
        ),
        (
            &[Path::new("--task"), Path::new("t")],
            2,
            "--task is about a job: name the job file",
        ),
        (&[job, Path::new("--frobnicate")], 2, "--frobnicate"),
    ];
    for (arguments, code, sentence) in named {
        for json in [&[][..], &["--json"]] {
            let output = check(context, &files).args(json).args(arguments).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(code)
                    && output.stdout.is_empty()
                    && said.contains(sentence),
                "{arguments:?}: {output:?}"
            );
        }
    }
    Ok(())
}

fn a_strange_job_file_is_told_in_one_safe_line(context: &Context) -> Result<()> {
    let files = Files::new(context, "unveil_by_task = true")?;
    let says = |output: &Output, code: i32, sentence: &str| -> Result<()> {
        let (of_job, of_question) = (&output.stdout, &output.stderr);
        let (said, other, lines) = match code {
            1 => (of_job, of_question, 2),
            _ => (of_question, of_job, 1),
        };
        let text = String::from_utf8_lossy(said);
        ensure!(
            output.status.code() == Some(code)
                && other.is_empty()
                && text.lines().count() == lines
                && text.len() < 2_000
                && !text.contains('\x1b')
                && text.contains(sentence),
            "{sentence}: {output:?}"
        );
        Ok(())
    };
    let deep = "a {\n".repeat(100_000);
    let cases: [(&[u8], i32, &str); 6] = [
        (&[0xff, 0, 0xfe], 125, "is not text"),
        (b"", 1, "1: the file has no `job` block"),
        (b"\0\x01{[(", 1, "1: "),
        (deep.as_bytes(), 1, ""),
        (
            b"job \"j\" {\ngroup \"g\" {\ntask \"t\" {\ndriver = \"docker\"\n}\n}\n}",
            125,
            "job j has no task with driver = \"exec2\"",
        ),
        (
            b"job \"j\x1b[2J\" {\ngroup \"g\" {\ntask \"t\" {\ndriver = \"docker\"\n}\n}\n}",
            125,
            "job j<U+001B>[2J has no task",
        ),
    ];
    for (content, code, sentence) in cases {
        let file = job_file(content)?;
        let output = check(context, &files).arg(file.path()).output()?;
        says(&output, code, sentence)?;
    }
    for (path, sentence) in [
        ("/no/such.hcl", "/no/such.hcl: no such job file"),
        ("/etc", "/etc: Is a directory"),
        ("/dev/zero", "/dev/zero: is longer than"),
    ] {
        let output = check(context, &files).arg(path).output()?;
        says(&output, 125, sentence)?;
    }
    let hostile = "job \"j\" {\ngroup \"g\" {\ntask \"t\\u001b[2J\\u202e\" {\ndriver = \"exec2\"\nconfig {\ncommand = \"tr\\nue\\u001b\"\nargs = [\"\\u001b[31m\"]\nunveil = [\"r:/no\\u001b\"]\n}\n}\n}\n}";
    let file = job_file(hostile)?;
    for options in [&[][..], &["--json"]] {
        let output = check(context, &files)
            .args(options)
            .arg(file.path())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(
            !text.contains(['\x1b', '\u{202e}']) && text.contains("r:/no<U+001B>"),
            "{text:?}"
        );
    }
    Ok(())
}
