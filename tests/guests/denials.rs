//! What Landlock denies to a task is told with what would allow it, where the kernel tells; and where it does not, that is told.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::structs::attribute::Value;
use harness::nomad::{Agent, Config, Task};
use nomad_driver_exec2::audit::{self, Audit, What};
use nomad_driver_exec2::sys;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use crate::agent::{agent as real_agent, messages};
use crate::case;
use crate::exec::Talk;
use crate::nomad::{Job, Scope, agent, printed, said, to_end, until};

pub const CASES: &[Case] = &[
    case!(
        Limits,
        Ours,
        what_is_denied_is_told_with_what_would_allow_it
    ),
    case!(Limits, Ours, of_many_denials_few_are_told, Long),
    case!(Limits, Ours, sessions_and_later_plugins_are_told_of, Long),
    case!(Both, Ours, nothing_is_told_while_nobody_listens),
    case!(Limits, Agent, a_real_agent_shows_what_was_denied, Long),
];

/// Whether this kernel's Landlock tells audit, and audit can be turned on here.
fn can_be_told() -> bool {
    sys::landlock_abi() >= Some(7) && matches!(audit::status(), Audit::On | Audit::Off)
}

/// Kernel audit, on for as long as this lives.
struct AuditOn;

impl AuditOn {
    fn new() -> Result<AuditOn> {
        set_audit(1)?;
        ensure!(audit::status() == Audit::On, "audit is not on");
        Ok(AuditOn)
    }
}

impl Drop for AuditOn {
    fn drop(&mut self) {
        set_audit(0).expect("audit was turned on");
    }
}

/// AUDIT_SET of `enabled`, as auditctl -e does it.
fn set_audit(enabled: u32) -> Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(netlink::AUDIT),
    )?;
    let mut request = Vec::new();
    let status = [1, enabled, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    request.extend((16 + 4 * status.len() as u32).to_ne_bytes());
    request.extend(1001_u16.to_ne_bytes());
    // With an answer.
    request.extend(5_u16.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(status.iter().flat_map(|word| word.to_ne_bytes()));
    send(&socket, &request, SendFlags::empty())?;
    let mut answer = [0; 256];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    ensure!(
        length >= 20 && answer[16..20] == [0; 4],
        "{:?}",
        &answer[..length]
    );
    Ok(())
}

fn denials(agent: &Agent, task: &Task) -> Result<Vec<String>> {
    let events = agent.connection()?.events().into_iter();
    let events = events.filter(|event| event.task_id == task.id());
    Ok(events
        .map(|event| event.message)
        .filter(|message| message.starts_with("Landlock denied"))
        .collect())
}

async fn told(agent: &Agent, task: &Task, sentence: &str) -> Result<()> {
    let is_told = || {
        let told = denials(agent, task).ok()?;
        told.iter().any(|told| told == sentence).then_some(())
    };
    let seen = until("it is told", is_told).await;
    seen.with_context(|| format!("{sentence} is not in {:?}", denials(agent, task)))
}

type Entry = BTreeMap<String, serde_json::Value>;

/// What the journal of a unit has of us on denials.
fn lines(unit: &str) -> Result<Vec<Entry>> {
    said("journalctl", &["--sync"])?;
    let lines = said("journalctl", &["-u", unit, "-o", "json", "--all"])?;
    let entries = lines
        .lines()
        .map(|line| Ok(serde_json::from_str::<Entry>(line)?))
        .collect::<Result<Vec<_>>>()?;
    let is_ours = |entry: &Entry| {
        let message = entry["MESSAGE"].as_str().unwrap_or_default();
        message.starts_with("Landlock denied")
    };
    Ok(entries.into_iter().filter(is_ours).collect())
}

fn what_is_denied_is_told_with_what_would_allow_it(context: &Context) -> Result<()> {
    if !can_be_told() {
        return nothing_is_told(context);
    }
    let data = tempfile::tempdir_in("/srv")?;
    let path = data.path().to_str().context("UTF-8")?;
    std::os::unix::fs::chown(path, Some(65_534), None)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    context.block_on(async {
        let _audit = AuditOn::new()?;
        let agent = agent(context).await?;

        // It ends at once, and is told of all the same.
        let cat = Job::command("/bin/cat", &["/etc/passwd"]);
        let alloc = agent.run(&cat.text()).await?;
        let task = alloc.only_task()?;
        let unit = Scope::of(task)?.unit;
        ensure!(task.wait().await?.code == 1);
        let sentence =
            "Landlock denied cat to read /etc/passwd; \"r:/etc/passwd\" in unveil would allow it";
        told(&agent, task, sentence).await?;
        let of_passwd = |entry: &Entry| entry.get("EXEC2_PATH") == Some(&"/etc/passwd".into());
        let found = lines(&unit)?;
        let line = found.iter().find(|entry| of_passwd(entry));
        let line = line.with_context(|| format!("{found:?}"))?;
        for (field, value) in [
            ("EXEC2_ACCESS", "fs.read_file"),
            ("EXEC2_ENTRY", "r:/etc/passwd"),
            ("EXEC2_TASK", "t"),
            ("EXEC2_ALLOC_ID", alloc.id()),
            ("OBJECT_SYSTEMD_UNIT", &unit),
        ] {
            ensure!(line.get(field) == Some(&value.into()), "{field}: {line:?}");
        }
        let entry = line["EXEC2_ENTRY"].as_str().context("text")?;
        let passwd = printed(&agent, &cat.clone().unveil(&[entry])).await?;
        ensure!(passwd.starts_with("root:"), "{passwd}");
        alloc.stop().await?;

        // An entry on the same path is to be replaced, and the new one does what is said.
        let write = |entry: &str| {
            let script = format!("echo x > '{path}/a b'; cat '{path}/a b'");
            Job::shell(&script).user("nobody").unveil(&[entry])
        };
        let old = format!("rw:{path}");
        let alloc = agent.run(&write(&old).text()).await?;
        let task = alloc.only_task()?;
        ensure!(task.wait().await?.code == 1);
        let new = format!("rwc:{path}");
        let sentence = format!(
            "Landlock denied sh to make a file in {path}; \"{new}\" in place of \"{old}\" in unveil would allow it"
        );
        told(&agent, task, &sentence).await?;
        alloc.stop().await?;
        ensure!(printed(&agent, &write(&new)).await? == "x\n");
        // In digits in the kernel's words, and legible in ours.
        let job = Job::shell(&format!("cat '{path}/a b'")).user("nobody");
        let alloc = agent.run(&job.text()).await?;
        let sentence = format!(
            "Landlock denied cat to read {path}/a b; \"r:{path}/a b\" in unveil would allow it"
        );
        told(&agent, alloc.only_task()?, &sentence).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

fn of_many_denials_few_are_told(context: &Context) -> Result<()> {
    if !can_be_told() {
        return nothing_is_told(context);
    }
    let data = tempfile::tempdir_in("/srv")?;
    fs::set_permissions(
        data.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    for number in 0..500 {
        fs::write(data.path().join(number.to_string()), "x")?;
    }
    context.block_on(async {
        let _audit = AuditOn::new()?;
        let agent = agent(context).await?;
        // 10,000 in all, of 500 different ones.
        let script = format!(
            "cd /; for again in $(seq 20); do for file in $(seq 0 499); do read x < '{}/'$file; done; done 2> /dev/null; echo done",
            data.path().display()
        );
        let alloc = agent.run(&Job::shell(&script).text()).await?;
        let task = alloc.only_task()?;
        let unit = Scope::of(task)?.unit;
        let begun = Instant::now();
        // The plugin has time for others.
        let mut slowest = Duration::ZERO;
        while task.exit().is_none() {
            let asked = Instant::now();
            // Until it has ended.
            let _ = task.inspect().await;
            slowest = slowest.max(asked.elapsed());
            tokio::time::sleep(Duration::from_millis(200)).await;
            ensure!(begun.elapsed() < Duration::from_secs(600), "it does not end");
        }
        let is_counted = |entry: &Entry| {
            let message = entry["MESSAGE"].as_str().unwrap_or_default();
            message.contains("times more, which is left out here")
        };
        let counted = until("what was left out is counted", || {
            lines(&unit).ok()?.iter().any(is_counted).then_some(())
        });
        counted.await?;
        let events = denials(&agent, task)?;
        context.note(format!(
            "{:?} for 10,000 denials, slowest answer meanwhile {slowest:?}",
            begun.elapsed()
        ));
        let hint = format!("Landlock denied more; journalctl -u {unit} tells what");
        let windows = 1 + begun.elapsed().as_secs() as usize / 3_600;
        ensure!(events.len() <= 5 * windows && events.contains(&hint), "{events:?}");
        let lines = lines(&unit)?;
        let minutes = 1 + begun.elapsed().as_secs() as usize / 60;
        ensure!(lines.len() <= 21 * minutes && lines.len() > 20, "{:#?}", lines.iter().map(|line| line["MESSAGE"].to_string()).collect::<Vec<_>>());
        alloc.stop().await?;
        agent.finish().await
    })
}

fn sessions_and_later_plugins_are_told_of(context: &Context) -> Result<()> {
    if !can_be_told() {
        return nothing_is_told(context);
    }
    let flags = tempfile::tempdir_in("/srv")?;
    fs::set_permissions(
        flags.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    context.block_on(async {
        let _audit = AuditOn::new()?;
        let agent = agent(context).await?;
        let path = flags.path().to_str().context("UTF-8")?;
        let script = format!(
            "read x < /etc/passwd; while :; do [ -e '{path}/go' ] && read x < /etc/group
            [ -e '{path}/more' ] && echo > '{path}/new'; sleep 0.2; done"
        );
        let old = format!("rw:{path}");
        let job = Job::shell(&script).unveil(&[&old]);
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let sentence = |process: &str, file: &str| {
            format!("Landlock denied {process} to read {file}; \"r:{file}\" in unveil would allow it")
        };
        told(&agent, task, &sentence("sh", "/etc/passwd")).await?;
        // A session has a domain of its own, and is over at once.
        let session = Talk::shell(&agent, task, "cat /etc/shadow-; cat /etc/shells").await?;
        session.ends_with(1).await?;
        told(&agent, task, &sentence("cat", "/etc/shells")).await?;

        agent.kill_plugin().await?;
        let name = "trusted.nomad-driver-exec2.domain";
        let mut mark = [0; 64];
        let length = rustix::fs::getxattr(&scope.dir, name, &mut mark)?;
        ensure!(length > 0, "the domain is not kept");
        fs::write(flags.path().join("go"), "")?;
        told(&agent, task, &sentence("sh", "/etc/group")).await?;

        // What the job asked for is known although Nomad's handle has no configuration any more.
        ensure!(agent.restart().await?.is_empty(), "it was not recovered");
        fs::write(flags.path().join("more"), "")?;
        let sentence = format!(
            "Landlock denied sh to make a file in {path}; \"rwc:{path}\" in place of \"{old}\" in unveil would allow it"
        );
        told(&agent, task, &sentence).await?;
        alloc.stop().await?;
        agent.finish().await
    })
}

/// Nothing is denied loudly here, and `check` and the node say why.
fn nothing_is_told(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let ended = to_end(&agent, &Job::command("/bin/cat", &["/etc/passwd"])).await?;
        ensure!(ended.stderr.contains("Permission denied"), "{ended:?}");
        let events = agent.connection()?.events();
        ensure!(
            events
                .iter()
                .all(|event| !event.message.starts_with("Landlock")),
            "{events:?}"
        );
        let seen = agent.fingerprint().context("a fingerprint")?;
        let told = seen.attributes["driver.exec2.denials"].value.clone();
        ensure!(told == Some(Value::BoolVal(false)), "{told:?}");
        agent.finish().await
    })?;
    let found = checked(context)?;
    let why = match (sys::landlock_abi(), audit::status()) {
        (abi, _) if abi < Some(7) => "not told: Landlock tells of none before ABI 7 (Linux 6.15)",
        (_, Audit::Off) => {
            "not told: kernel audit is off; auditctl -e 1 turns it on, for tasks that run already, too"
        }
        (_, Audit::Absent) => "not told: there is no kernel audit; boot with audit=1",
        (_, Audit::Refused) => "not told: kernel audit is not told to this process",
        (_, Audit::On) => anyhow::bail!("audit is on"),
    };
    ensure!(found == why, "{found}");
    Ok(())
}

/// What `check` says of denials.
fn checked(context: &Context) -> Result<String> {
    let output = Command::new(context.driver())
        .args(["check", "--json"])
        .output()?;
    let lines: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let line = lines.iter().find(|line| line["name"] == "denials");
    let found = line.and_then(|line| line["found"].as_str());
    Ok(found.context("no line")?.to_owned())
}

fn nothing_is_told_while_nobody_listens(context: &Context) -> Result<()> {
    nothing_is_told(context)?;
    if !can_be_told() {
        return Ok(());
    }
    context.block_on(async {
        let agent = agent(context).await?;
        let script = "while :; do read x < /etc/passwd; sleep 0.2; done";
        let alloc = agent.run(&Job::shell(script).text()).await?;
        let task = alloc.only_task()?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        ensure!(denials(&agent, task)?.is_empty());
        // A task that runs is told of as soon as somebody wants to know.
        let _audit = AuditOn::new()?;
        let sentence =
            "Landlock denied sh to read /etc/passwd; \"r:/etc/passwd\" in unveil would allow it";
        told(&agent, task, sentence).await?;
        let found = checked(context)?;
        ensure!(
            found
                == "kernel audit is on, and what Landlock denies is told, unless report_denials is false",
            "{found}"
        );
        let node = || {
            let seen = agent.fingerprint()?;
            let told = seen.attributes["driver.exec2.denials"].value.clone();
            (told == Some(Value::BoolVal(true))).then_some(())
        };
        until("the node tells", node).await?;
        alloc.stop().await?;

        agent.finish().await?;

        // Not where the operator does not want it: nothing of it is in the host's log either.
        let log = audit::listen()?;
        let config = Config {
            plugin: "report_denials = false".into(),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        to_end(&agent, &Job::command("/bin/cat", &["/etc/passwd"])).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut buffer = vec![0; audit::RECORD_BYTES];
        let mut records = 0;
        loop {
            match audit::receive(&log, &mut buffer) {
                Ok(Some(record)) => {
                    ensure!(!matches!(record.what, What::Denial(_)), "{record:?}");
                    records += 1;
                }
                Ok(None) => records += 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        context.note(format!("{records} other records"));
        agent.finish().await
    })
}

fn a_real_agent_shows_what_was_denied(context: &Context) -> Result<()> {
    if !can_be_told() {
        context.note("nothing is to be seen: this kernel tells of no denials");
        return Ok(());
    }
    context.block_on(async {
        let _audit = AuditOn::new()?;
        let agent = real_agent(context).await?;
        let ids = agent.run(&Job::command("/bin/cat", &["/etc/passwd"]).text()).await?;
        let id = ids.first().context("no allocation")?;
        agent.wait_for(id, &["complete", "failed"]).await?;
        let sentence =
            "Driver: Landlock denied cat to read /etc/passwd; \"r:/etc/passwd\" in unveil would allow it";
        let begun = Instant::now();
        loop {
            let told = messages(&agent, id, "t").await?;
            if told.iter().any(|message| message == sentence) {
                context.note(told.join("\n"));
                break;
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{told:?}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        agent.finish().await
    })
}
