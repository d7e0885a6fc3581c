//! Jobs with mistakes, and jobs that mean harm: each gets its sentence, never counts as started, and leaves nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::proto::driver::TaskConfig;
use harness::nomad::{Agent, Config, RpcError};

use crate::calls::Calls;
use crate::case;
use crate::faults::nothing_left;
use crate::nomad::{Job, Scope, agent, refusal, said, until};
use crate::recovery::recover;

/// A last word on a request before it is sent.
type Change<'a> = &'a dyn Fn(&mut TaskConfig);

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_mistake_is_a_sentence_with_key_and_value),
    case!(Speed, Ours, a_command_that_cannot_run_says_why),
    case!(Speed, Ours, a_task_unveils_only_if_the_operator_lets_it),
    case!(Speed, Ours, a_hostile_request_is_refused_and_leaves_nothing),
    case!(Both, Ours, a_hostile_name_changes_no_unit),
    case!(Speed, Ours, a_dynamic_user_is_one_allocations_alone),
];

/// Each job with what the operator reads; all that went wrong at once.
async fn expect_all(agent: &Agent, cases: &[(Job, &str)]) -> Result<()> {
    let mut wrong = Vec::new();
    for (job, sentence) in cases {
        if let Err(error) = expect(agent, job, sentence).await {
            wrong.push(format!("{error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What the operator reads, with everything that must hold beside it.
async fn expect(agent: &Agent, job: &Job, sentence: &str) -> Result<()> {
    let started = agent.connection()?.events().len();
    let error = refusal(agent, job)
        .await
        .with_context(|| sentence.to_owned())?;
    ensure!(
        error.message.contains(sentence),
        "{sentence:?} is not in {:?}",
        error.message
    );
    check(&error)?;
    ensure!(
        agent.connection()?.events().len() == started,
        "it counts as started: {:?}",
        agent.connection()?.events()
    );
    Ok(())
}

/// Any refusal: of the job, so that Nomad does not try again; one line that a terminal survives.
fn check(error: &RpcError) -> Result<()> {
    ensure!(!error.recoverable, "Nomad would try again: {error}");
    ensure!(
        error.message.len() < 3_000 && !error.message.contains(char::is_control),
        "no sentence: {:?}",
        error.message
    );
    Ok(())
}

fn a_mistake_is_a_sentence_with_key_and_value(context: &Context) -> Result<()> {
    let sleep = || Job::command("sleep", &["600"]);
    let cases = [
        (
            sleep().unveil(&["rz:/etc"]),
            "unveil: \"rz:/etc\" has an unknown letter 'z' in its mode; a mode is any of r, w, x, c",
        ),
        (
            sleep().unveil(&["/etc"]),
            "path \"/etc\" does not contain mode prefix",
        ),
        (
            sleep().unveil(&["r:/no/such/path"]),
            "unveil r:/no/such/path: no such file or directory",
        ),
        (
            sleep().unveil(&["r:local/missing"]),
            "local/missing: no such file or directory",
        ),
        (
            Job::command("/no/such/command", &[]),
            "command \"/no/such/command\": no such file or directory",
        ),
        (
            Job::command("no-such-command", &[]),
            "command \"no-such-command\": not found in PATH \"",
        ),
        (Job::command("", &[]), "command is not set"),
        (
            sleep().user("nomad-0"),
            "user \"nomad-0\" is no dynamic workload user: those have ids from 65536 on",
        ),
        (
            sleep().user("nomad-1000"),
            "user \"nomad-1000\" is no dynamic workload user",
        ),
        (
            sleep().config("oom_score_adj = -5"),
            "oom_score_adj = -5 is out of bounds; give one from 0 to 1000",
        ),
        (
            sleep().config("oom_score_adj = 2000"),
            "oom_score_adj = 2000 is out of bounds; give one from 0 to 1000",
        ),
        (
            sleep().task("env {\n NOMAD_TASK_DIR = \"/\"\n }"),
            "NOMAD_TASK_DIR = \"/\" is not the task's directory",
        ),
        (
            sleep().task("env {\n NOMAD_ALLOC_DIR = \"/etc\"\n }"),
            "NOMAD_ALLOC_DIR = \"/etc\" is not the task's directory",
        ),
        (
            sleep().task("env {\n NOMAD_SECRETS_DIR = \"/root\"\n }"),
            "NOMAD_SECRETS_DIR = \"/root\" is not the task's directory",
        ),
    ];
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        expect_all(&agent, &cases).await?;
        // A user that the host lost, and limits that only a broken server sends: Nomad itself would stop these earlier.
        let cases: [(Change<'_>, &str); 3] = [
            (
                &|task| task.user = "no-such-user".into(),
                "user \"no-such-user\" does not exist on this host",
            ),
            (&|task| memory(task, 0), "memory = 0: a task needs memory"),
            (&|task| memory(task, -1), "memory = 0: a task needs memory"),
        ];
        for (change, sentence) in cases {
            let error = changed(&agent, change).await?;
            ensure!(error.message.contains(sentence), "{error}");
            check(&error)?;
        }
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        agent.finish().await
    })
}

fn memory(task: &mut TaskConfig, mib: i64) {
    let allocated = task
        .resources
        .as_mut()
        .and_then(|resources| resources.allocated_resources.as_mut());
    if let Some(memory) = allocated.and_then(|allocated| allocated.memory.as_mut()) {
        memory.memory_mb = mib;
    }
}

/// The refusal of a good job whose request was changed on the way.
async fn changed(agent: &Agent, change: &dyn Fn(&mut TaskConfig)) -> Result<RpcError> {
    let job = Job::command("sleep", &["600"]).text();
    let error = match agent.run_with(&job, change).await {
        Ok(alloc) => {
            alloc.stop().await?;
            anyhow::bail!("it counts as started")
        }
        Err(error) => error,
    };
    match error.downcast_ref::<RpcError>() {
        Some(error) => Ok(error.clone()),
        None => Err(error),
    }
}

fn a_command_that_cannot_run_says_why(context: &Context) -> Result<()> {
    let dir = tempfile::tempdir_in("/opt")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let file = |name: &str, text: &str, mode: u32| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path.display().to_string())
    };
    let plain = file("plain", "#!/bin/sh\n", 0o644)?;
    let orphan = file("orphan", "#!/no/such/interpreter\n", 0o755)?;
    let empty = file("empty", "\0\0\0\0", 0o755)?;
    let script = file("script", "#!/bin/sh\necho ran\n", 0o755)?;
    let unveil = format!("rx:{}", dir.path().display());
    let unveiled = |command: &str| Job::command(command, &[]).unveil(&[&unveil]);
    let kibibyte = "x".repeat(1 << 10);
    let long = vec![kibibyte.as_str(); 4_000];
    let cases = [
        (
            Job::command(&script, &[]),
            "permission denied (is it unveiled with \"rx\"",
        ),
        (
            unveiled(&plain),
            "permission denied (is it unveiled with \"rx\"",
        ),
        (Job::command("/usr/bin", &[]), "it is a directory"),
        (
            unveiled(&orphan),
            "the file is there, but its interpreter is not",
        ),
        (
            unveiled(&empty),
            "neither a program for this machine nor a script",
        ),
        (
            unveiled("plain").task(&format!(
                "env {{\n PATH = \"{}:/bin\"\n }}",
                dir.path().display()
            )),
            "/plain; is it unveiled",
        ),
        (Job::command("echo", &long), "larger than the kernel takes"),
    ];
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        expect_all(&agent, &cases).await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        let ran = crate::nomad::printed(&agent, &unveiled(&script)).await?;
        ensure!(ran == "ran\n", "{ran}");
        agent.finish().await
    })
}

fn a_task_unveils_only_if_the_operator_lets_it(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = Agent::start(context.driver(), Config::default()).await?;
        let job = Job::command("true", &[]);
        expect(
            &agent,
            &job.clone().unveil(&["r:/etc/passwd"]),
            "task set unveil paths but driver config does not allow this",
        )
        .await?;
        crate::nomad::printed(&agent, &job).await?;
        agent.finish().await
    })
}

fn a_hostile_request_is_refused_and_leaves_nothing(context: &Context) -> Result<()> {
    let sleep = || Job::command("sleep", &["600"]);
    let long = format!("r:/{}", "x/".repeat(2_500));
    let many = vec!["r:/usr"; 10_000];
    let arguments = vec!["x"; 10_001];
    let cases = [
        (
            sleep().unveil(&[&long]),
            "which is 5003 bytes long; at most 4103 are taken",
        ),
        (
            sleep().unveil(&many),
            "unveil has 10000 entries; at most 1000",
        ),
        (sleep().unveil(&["r:../../etc"]), "has a \"..\" in it"),
        (sleep().unveil(&["r:/etc\0/x"]), "in which there is a NUL"),
        (
            sleep().unveil(&["r:/etc\n[Unit]\u{1b}[2J"]),
            "no such file or directory",
        ),
        (Job::command("echo\0", &[]), "in which there is a NUL"),
        (Job::command("echo", &["a\0b"]), "in which there is a NUL"),
        (
            Job::command("/bin/\u{1b}[2J\nx", &[]),
            "no such file or directory",
        ),
        (Job::command("echo", &arguments), "args has 10001 entries"),
        (
            Job::command("../../bin/no-sh", &[]),
            "no such file or directory",
        ),
        (
            sleep().config(&format!("oom_score_adj = {}", i64::MAX)),
            "oom_score_adj",
        ),
    ];
    let passwd = fs::metadata("/etc/passwd")?;
    let before = (passwd.uid(), passwd.gid(), passwd.mode(), passwd.len());
    context.block_on(async {
        let agent = agent(context).await?;
        let ground = Ground::survey()?;
        expect_all(&agent, &cases).await?;
        type Change<'a> = &'a dyn Fn(&mut TaskConfig);
        let changes: [Change<'_>; 12] = [
            &|task| task.alloc_dir = "/".into(),
            &|task| task.alloc_dir = String::new(),
            &|task| task.alloc_dir += "/../..",
            &|task| task.name = "../t".into(),
            &|task| task.name = "x".repeat(200),
            &|task| task.stdout_path = "/etc/passwd".into(),
            &|task| task.stderr_path = "/dev/sda".into(),
            &|task| task.stdout_path = "x".repeat(5_000),
            &|task| task.user = "x".repeat(100_000),
            &|task| task.user = "nomad-99999999999999999999".into(),
            &|task| drop(task.env.insert("A\0B".into(), "C".into())),
            &|task| task.msgpack_driver_config = vec![0xdf, 0xff, 0xff, 0xff, 0xff],
        ];
        for (number, change) in changes.iter().enumerate() {
            let error = changed(&agent, change)
                .await
                .with_context(|| format!("change {number}"))?;
            context.note(format!("{number}: {:.160}", error.message));
            check(&error).with_context(|| format!("change {number}"))?;
        }
        let passwd = fs::metadata("/etc/passwd")?;
        ensure!(
            before == (passwd.uid(), passwd.gid(), passwd.mode(), passwd.len()),
            "/etc/passwd was touched: {passwd:?}"
        );
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        // The driver lives on.
        crate::nomad::printed(&agent, &Job::command("true", &[])).await?;
        agent.finish().await
    })
}

/// systemd keeps a transient unit's description in a file, and reads that file at the next daemon-reload.
fn a_hostile_name_changes_no_unit(context: &Context) -> Result<()> {
    const HOSTILE: &str = "x\n[Unit]\nOnSuccess=planted.service\nPartOf=ssh.service\\";
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::command("sleep", &["600"]).text();
        let alloc = agent
            .run_with(&job, |task| {
                task.job_name = HOSTILE.into();
                task.task_group_name = HOSTILE.into();
                task.namespace = "\u{202e}%n".into();
            })
            .await?;
        let scope = Scope::of(alloc.only_task()?)?;
        said("systemctl", &["daemon-reload"])?;
        let shown = scope.show(&["Description", "OnSuccess", "PartOf", "ActiveState"])?;
        ensure!(
            shown["OnSuccess"].is_empty() && shown["PartOf"].is_empty(),
            "{shown:?}"
        );
        ensure!(shown["ActiveState"] == "active", "{shown:?}");
        ensure!(
            shown["Description"].contains("<U+000A>[Unit]<U+000A>OnSuccess")
                && shown["Description"].contains("<U+202E>"),
            "{shown:?}"
        );
        let file = Path::new("/run/systemd/transient").join(&scope.unit);
        let text = fs::read_to_string(&file)?;
        ensure!(
            !text.lines().any(|line| line.starts_with("OnSuccess")),
            "{text}"
        );
        if context.guest().kind == harness::guest::Kind::Qemu {
            ensure!(
                scope.file("memory.max")? == (64 << 20).to_string(),
                "the reload lost the limit: {}",
                scope.file("memory.max")?
            );
            ensure!(scope.file("cpu.max")? == "100000 100000");
        }
        alloc.stop().await?;
        agent.finish().await
    })
}

/// Neither Nomad checks the `nomad-<uid>` of a job, nor does a restarted agent know which ones its tasks have.
fn a_dynamic_user_is_one_allocations_alone(context: &Context) -> Result<()> {
    context.block_on(async {
        let ground = Ground::survey()?;
        let agent = agent(context).await?;
        let sleep = || Job::command("sleep", &["600"]);
        let alloc = agent.run(&sleep().text()).await?;
        let task = alloc.only_task()?;
        let user = task.user();
        ensure!(user.starts_with("nomad-8"), "{user}");
        let sentence = format!("user {user:?} is allocation {}'s", alloc.id());
        expect(&agent, &sleep().user(&user), &sentence).await?;
        let lost = agent.kill_plugin().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        expect(&agent, &sleep().user(&user), &sentence).await?;
        // Its own allocation may start anew as it.
        task.restart().await?;
        ensure!(task.user() == user, "{}", task.user());
        // A start may have got it while its task was unknown: before that is recovered after a plugin's crash.
        let mut handle = task.handle().context("a handle")?;
        let config = handle.config.as_mut().context("no task in a handle")?;
        config.id = "11111111-2222-3333-4444-555555555555/t/0badcafe".into();
        config.alloc_id = "11111111-2222-3333-4444-555555555555".into();
        let recovered = recover(&agent, handle).await?;
        ensure!(recovered == Ok(()), "{recovered:?}");
        let warning = format!(
            "user {user:?} is that of a task of allocation {}, too",
            alloc.id()
        );
        until(&warning, || {
            let events = agent.connection().ok()?.events();
            let mut messages = events.iter().map(|event| &event.message);
            messages
                .any(|message| message.starts_with(&warning))
                .then_some(())
        })
        .await?;
        alloc.stop().await?;
        let known = "11111111-2222-3333-4444-555555555555/t/0badcafe";
        Calls::of(&agent)?.destroy(known, true).await?;

        let heir = agent.run(&sleep().user(&user).text()).await?;
        heir.stop().await?;
        let text = sleep().user("nomad-80007").text();
        let (one, other) = tokio::join!(agent.run(&text), agent.run(&text));
        let mut refusals = 0;
        for started in [one, other] {
            match started {
                Ok(alloc) => alloc.stop().await?,
                Err(error) => {
                    let told = format!("{error:#}");
                    ensure!(
                        told.contains("user \"nomad-80007\" is allocation"),
                        "{told}"
                    );
                    refusals += 1;
                }
            }
        }
        ensure!(refusals == 1, "{refusals} of two at once refused");
        agent.finish().await?;
        nothing_left(&ground).await
    })
}
