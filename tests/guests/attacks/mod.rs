//! Hostile tasks: all that a program can try, by every kind of user, judged from what the program and the host say. Each
//! attempt is made without the driver as well, to see that it is one.

mod stage;
pub mod table;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Config};

use crate::case;
use crate::nomad::{Job, agent, to_end};
use stage::{GROUND, Stage, Victim, prelude};
use table::{Attempt, Control, THREATS, Verdict, Who};

pub const CASES: &[Case] = &[
    case!(Everywhere, Ours, a_hostile_task_succeeds_in_nothing, Long),
    case!(
        Speed,
        Ours,
        each_attempt_succeeds_where_nothing_stops_it,
        Long
    ),
    case!(
        ProgramLimits,
        Ours,
        each_attempt_succeeds_on_a_kernel_of_its_own,
        Long
    ),
    case!(Speed, Ours, the_environment_of_a_job_is_not_the_helpers),
];

const ATTACKER: &str = include_str!("attacker.pl");

/// Those that may be given to root without giving it the host: files and devices stay closed.
const ALLOWED: &str = r#"["ipc_lock", "linux_immutable", "mknod", "net_admin", "sys_nice"]"#;

const NOBODY: u32 = 65_534;
/// No user of the guest's has it, nor does a task.
const DYNAMIC: u32 = 95_000;

fn attempts(who: Who) -> impl Iterator<Item = &'static Attempt> {
    let all = THREATS.iter().flat_map(|threat| threat.attempts);
    all.filter(move |attempt| attempt.who.contains(&who))
}

fn name(who: Who) -> &'static str {
    match who {
        Who::Dynamic => "dynamic user",
        Who::DynamicWithNamespaces => "dynamic user with allow_user_namespaces",
        Who::Named => "named user",
        Who::Root => "root",
        Who::RootWithCaps => "root with allow_caps and allow_user_namespaces",
    }
}

/// What each attempt came to: nothing, or why it was stopped.
fn outcomes(said: &str) -> BTreeMap<&str, Option<&str>> {
    let outcome = |line| {
        if let Some((name, why)) = str::split_once(line, " stopped: ") {
            return Some((name, Some(why.trim())));
        }
        Some((line.strip_suffix(" succeeded")?, None))
    };
    said.lines().filter_map(outcome).collect()
}

fn a_hostile_task_succeeds_in_nothing(context: &Context) -> Result<()> {
    let mut wrong = Vec::new();
    let mut heard = Vec::new();
    for who in table::TASKS {
        let (said, changed) = context.block_on(attack(context, *who))?;
        if let Some(changed) = changed {
            wrong.push(format!("{}: the host is another:\n{changed}", name(*who)));
        }
        heard.push((*who, said));
    }
    let heard: Vec<_> = heard
        .iter()
        .map(|(who, said)| (who, outcomes(said)))
        .collect();
    for threat in THREATS {
        context.note(format!(
            "{} ({}): {}",
            threat.name, threat.who, threat.stopped_by
        ));
        for attempt in threat.attempts {
            let mut told: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for (who, outcomes) in heard.iter().filter(|(who, _)| attempt.who.contains(who)) {
                match judge(attempt, outcomes.get(attempt.name)) {
                    Ok(outcome) => told.entry(outcome).or_default().push(name(**who)),
                    Err(error) => wrong.push(format!("{}: {}: {error}", name(**who), attempt.name)),
                }
            }
            for (outcome, whose) in told {
                context.note(format!(
                    "  {}: {outcome}: {}",
                    attempt.name,
                    whose.join(", ")
                ));
            }
        }
        for test in threat.tests {
            context.note(format!("  and {test}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What an attempt came to, if that is right.
fn judge(attempt: &Attempt, outcome: Option<&Option<&str>>) -> Result<String> {
    let abi = nomad_driver_exec2::sys::landlock_abi().context("no Landlock")?;
    match (outcome.context("it is missing")?, attempt.verdict) {
        (Some("there is no such attempt"), _) => bail!("nobody knows how"),
        (Some(why), _) => Ok(format!("stopped ({why})")),
        (None, Verdict::ByDesign(words)) => Ok(format!("by design ({words})")),
        (None, Verdict::Stopped) if attempt.from_abi > abi => {
            Ok(format!("open before ABI {}", attempt.from_abi))
        }
        (None, Verdict::Stopped) => bail!("it succeeded"),
    }
}

/// Runs a task that tries all that is for it to try. Gives what it printed, and what the files are if they changed.
async fn attack(context: &Context, who: Who) -> Result<(String, Option<String>)> {
    let stage = Stage::new(NOBODY)?;
    let names: Vec<&str> = attempts(who).map(|attempt| attempt.name).collect();
    let mut neighbour = Victim::new(if who == Who::Named { NOBODY } else { 0 }, 300)?;
    let allow = match who {
        Who::RootWithCaps => format!("allow_user_namespaces = true\nallow_caps = {ALLOWED}"),
        Who::DynamicWithNamespaces => "allow_user_namespaces = true".into(),
        Who::Dynamic | Who::Named | Who::Root => String::new(),
    };
    let config = Config {
        plugin: format!("unveil_by_task = true\n{allow}"),
        ..Config::default()
    };
    let agent = Agent::start(context.driver(), config).await?;
    // Nomad's own directories are closed to all but root; an operator may have opened them.
    let data = agent.data_dir().join("data");
    for dir in [&data, &data.join("alloc")] {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    let allocs = data.join("alloc").display().to_string();
    let script = format!("{}{ATTACKER}", prelude());
    let mut arguments = vec!["-e", &script];
    arguments.extend(&names);
    let job = Job::command("perl", &arguments)
        .unveil(&[
            &format!("rw:{GROUND}/devices"),
            &format!("rx:{GROUND}/setuid"),
            "rw:/sys/fs/cgroup",
            "r:/proc",
            &format!("rwc:{allocs}/NOMAD_ALLOC_ID"),
        ])
        .task(&format!(
            "env {{\n LC_ALL = \"C\"\n ATTACK_ALLOCS = \"{allocs}\"\n ATTACK_SUPERVISOR = \"1\"\n ATTACK_NEIGHBOUR = \"{}\"\n }}",
            neighbour.id()
        ));
    let job = match who {
        Who::Dynamic | Who::DynamicWithNamespaces => job,
        Who::Named => job.user("nobody"),
        Who::Root | Who::RootWithCaps => job.user("root"),
    };
    let text = job.text().replace("/NOMAD_ALLOC_ID", "/${NOMAD_ALLOC_ID}");
    let before = stage.files()?;
    let alloc = agent.run(&text).await?;
    let exit = alloc.only_task()?.wait().await?;
    alloc.stop().await?;
    let said = alloc.stdout("t")?;
    let complaints = alloc.stderr("t")?;
    ensure!(
        exit.code == 7 && exit.signal == 0,
        "its end is not the one it had: {exit:?}\n{said}\n{complaints}"
    );
    neighbour.expect_unharmed()?;
    let after = stage.files()?;
    agent.finish().await?;
    Ok((said, (after != before).then_some(after)))
}

fn each_attempt_succeeds_where_nothing_stops_it(context: &Context) -> Result<()> {
    succeed_unhindered(context, |_| true)
}

/// A container's kernel is its host's, which stops some: those are tried on a kernel of the guest's own.
fn each_attempt_succeeds_on_a_kernel_of_its_own(context: &Context) -> Result<()> {
    succeed_unhindered(context, |control| matches!(control, Control::Depends(_)))
}

/// As whoever a task would be, but with nothing around it.
fn succeed_unhindered(context: &Context, is_tried: fn(Control) -> bool) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let mut wrong = Vec::new();
        for (who, uid) in [
            (Who::Dynamic, DYNAMIC),
            (Who::Named, NOBODY),
            (Who::Root, 0),
        ] {
            // Without the driver, a user is like another.
            let is_told =
                |attempt: &&Attempt| who == Who::Dynamic && attempt.who.contains(&Who::Named);
            let attempts = attempts(who).filter(|attempt| !is_told(attempt));
            for attempt in attempts.filter(|attempt| is_tried(attempt.control)) {
                let why = unhindered(attempt, uid)?;
                match (why, attempt.control) {
                    (None, _) => {}
                    (Some(why), Control::Depends(reason)) => {
                        context.note(format!("{}, {}: {why}; {reason}", name(who), attempt.name));
                    }
                    (Some(why), Control::Succeeds) => {
                        wrong.push(format!("{}, {}: {why}", name(who), attempt.name));
                    }
                }
            }
        }
        ensure!(
            wrong.is_empty(),
            "these are no attacks here:\n{}",
            wrong.join("\n")
        );
        agent.finish().await
    })
}

/// Why an attempt failed, if it did.
fn unhindered(attempt: &Attempt, uid: u32) -> Result<Option<String>> {
    let _stage = Stage::new(uid)?;
    let (neighbour, supervisor) = (Victim::new(uid, 0)?, Victim::new(uid, 0)?);
    let output = Command::new("perl")
        .args(["-e", &format!("{}{ATTACKER}", prelude()), attempt.name])
        .env("LC_ALL", "C")
        .env("ATTACK_NEIGHBOUR", neighbour.id().to_string())
        .env("ATTACK_SUPERVISOR", supervisor.id().to_string())
        .env("ATTACK_ALLOCS", format!("{GROUND}/allocs"))
        .env("NOMAD_ALLOC_ID", "control")
        .env("NOMAD_ALLOC_DIR", format!("{GROUND}/alloc"))
        .env("NOMAD_TASK_DIR", format!("{GROUND}/task"))
        .uid(uid)
        .gid(uid)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(7), "{output:?}");
    let outcomes = outcomes(&said);
    let outcome = outcomes.get(attempt.name).context("it said nothing")?;
    Ok(outcome.map(str::to_owned))
}

/// The loader writes a file where its environment tells it to, as whoever runs the program.
fn the_environment_of_a_job_is_not_the_helpers(context: &Context) -> Result<()> {
    let _stage = Stage::new(0)?;
    let written = || -> Result<usize> {
        let entries = fs::read_dir(Path::new(GROUND).join("dir"))?;
        Ok(entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("ld."))
            .count())
    };
    let variables = [
        ("LD_DEBUG", "libs"),
        ("LD_DEBUG_OUTPUT", "/srv/exec2-attacks/dir/ld"),
    ];
    Command::new("/usr/bin/true").envs(variables).status()?;
    ensure!(written()? == 1, "the loader writes nothing here");
    context.block_on(async {
        let agent = agent(context).await?;
        let lines = variables.map(|(name, value)| format!("{name} = \"{value}\""));
        let block = format!("env {{\n {}\n }}", lines.join("\n "));
        for user in ["root", "nobody"] {
            let job = Job::shell("echo done").user(user).task(&block);
            let ended = to_end(&agent, &job).await?;
            ensure!(
                ended.exit.success() && ended.stdout == "done\n",
                "{ended:?}"
            );
        }
        agent.finish().await
    })?;
    ensure!(written()? == 1, "somebody outside of the sandbox wrote");
    Ok(())
}
