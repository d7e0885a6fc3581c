//! What the driver says about a task is in the journal of the task's unit, and nothing waits for the journal.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation};

use crate::case;
use crate::nomad::{Job, Scope, agent, said, until};

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        the_journal_of_a_unit_tells_of_its_start_and_end_once
    ),
    case!(Speed, Ours, a_hostile_name_forges_no_field),
    case!(Speed, Ours, a_task_lives_as_ever_without_a_journal),
];

type Entry = BTreeMap<String, serde_json::Value>;

/// Our lines in the journal of a unit, by the first words of each.
fn told(unit: &str) -> Result<Vec<(String, Entry)>> {
    said("journalctl", &["--sync"])?;
    let lines = said("journalctl", &["-u", unit, "-o", "json", "--all"])?;
    let entries = lines
        .lines()
        .map(|line| Ok(serde_json::from_str::<Entry>(line)?))
        .collect::<Result<Vec<_>>>()?;
    let ours = entries
        .into_iter()
        .filter(|entry| entry.get("SYSLOG_IDENTIFIER") == Some(&"nomad-driver-exec2".into()));
    ours.map(|entry| {
        let message = entry["MESSAGE"].as_str().context("a message is text")?;
        let end = message.find('=').context("a message names its task")?;
        let words = message[..end].rsplit_once(' ').context("words")?.0;
        Ok((words.to_owned(), entry))
    })
    .collect()
}

fn only<'a>(told: &'a [(String, Entry)], words: &str) -> Result<&'a Entry> {
    let mut found = told.iter().filter(|(said, _)| said == words);
    let (_, entry) = found.next().with_context(|| format!("{words}: {told:?}"))?;
    ensure!(found.next().is_none(), "twice: {told:?}");
    Ok(entry)
}

async fn unit(alloc: &Allocation) -> Result<String> {
    let inspected = alloc.only_task()?.inspect().await?;
    let driver = inspected.driver.context("driver")?;
    Ok(driver.attributes["unit"].clone())
}

async fn to_end(agent: &Agent, job: &str) -> Result<(String, Allocation)> {
    let alloc = agent.run(job).await?;
    let unit = unit(&alloc).await?;
    let exit = alloc.only_task()?.wait().await?;
    ensure!(exit.code == 4, "{exit:?}");
    alloc.stop().await?;
    Ok((unit, alloc))
}

fn the_journal_of_a_unit_tells_of_its_start_and_end_once(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let (unit, alloc) = to_end(&agent, &Job::shell("exit 4").text()).await?;
        let told = told(&unit)?;
        let started = only(&told, "task started")?;
        let ended = only(&told, "task ended")?;
        for entry in [started, ended] {
            for (field, value) in [
                ("OBJECT_SYSTEMD_UNIT", unit.as_str()),
                ("EXEC2_ALLOC_ID", alloc.id()),
                ("EXEC2_TASK", "t"),
                ("PRIORITY", "6"),
            ] {
                ensure!(
                    entry.get(field) == Some(&value.into()),
                    "{field}: {entry:?}"
                );
            }
        }
        ensure!(ended["EXEC2_EXIT_CODE"] == "4", "{ended:?}");
        let message = ended["MESSAGE"].as_str().context("text")?;
        ensure!(
            message.contains(&format!("alloc_id={} task=t", alloc.id()))
                && message.contains("exit_code=4"),
            "{message}"
        );
        agent.finish().await
    })
}

fn a_hostile_name_forges_no_field(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("exit 4").text().replace(
            "task \"t\"",
            r#"task "t\nPRIORITY=0\nEXEC2_FORGED=1\nEXEC2_FORGED""#,
        );
        let (unit, _) = to_end(&agent, &job).await?;
        let told = told(&unit)?;
        for words in ["task started", "task ended"] {
            let entry = only(&told, words)?;
            ensure!(!entry.contains_key("EXEC2_FORGED"), "{entry:?}");
            ensure!(entry["PRIORITY"] == "6", "{entry:?}");
            ensure!(
                entry["EXEC2_TASK"]
                    == "t<U+000A>PRIORITY=0<U+000A>EXEC2_FORGED=1<U+000A>EXEC2_FORGED",
                "{entry:?}"
            );
        }
        agent.finish().await
    })
}

const JOURNALD: &str = "systemd-journald.service";

fn a_task_lives_as_ever_without_a_journal(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        // Its sockets, too, which would start it again.
        said("systemctl", &["stop", "systemd-journald*.socket", JOURNALD])?;
        let lived = live(&agent).await;
        said(
            "systemctl",
            &[
                "start",
                "systemd-journald.socket",
                "systemd-journald-dev-log.socket",
                JOURNALD,
            ],
        )?;
        lived?;
        // The same plugin finds the journal again.
        let (unit, _) = to_end(&agent, &Job::shell("exit 4").text()).await?;
        only(&told(&unit)?, "task started")?;
        agent.finish().await
    })
}

async fn live(agent: &Agent) -> Result<()> {
    let journal = UnixDatagram::unbound()?.connect("/run/systemd/journal/socket");
    ensure!(journal.is_err(), "the journal is still there");
    let job = Job::shell("trap 'echo bye; exit 3' INT; echo up; while :; do sleep 0.05; done");
    let alloc = agent.run(&job.text()).await?;
    let task = alloc.only_task()?;
    let scope = Scope::of(task)?;
    until("the task is up", || {
        (alloc.stdout("t").ok()? == "up\n").then_some(())
    })
    .await?;
    let exit = task.stop().await?;
    ensure!((exit.code, exit.signal) == (3, 0), "{exit:?}");
    scope.expect_gone()?;
    to_end(agent, &Job::shell("exit 4").text()).await?;
    let log = agent.log();
    let started = log
        .iter()
        .filter(|line| line.message.starts_with("task started"));
    ensure!(started.count() == 2, "the agent's log has it: {log:?}");
    Ok(())
}
