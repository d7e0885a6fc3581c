//! Hostile tasks: all that a program can try, by every kind of user, judged from what the program and the host say. Each
//! attempt is made without the driver as well, to see that it is one.

pub mod around;
mod stage;
pub mod table;
mod terminal;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context, Kind};
use harness::nomad::{Agent, Allocation, Config, Task};

use crate::case;
use crate::exec::{Talk, run_as_check};
use crate::nomad::{Job, agent, to_end, until};
use stage::{GROUND, Stage, Victim, prelude};
use table::{Attempt, Control, Kernel, Outcome, THREATS, Who, Whose, judge};
use terminal::Terminal;

pub const CASES: &[Case] = &[
    case!(Everywhere, Ours, a_hostile_task_succeeds_in_nothing, Long),
    case!(Both, Ours, a_hostile_session_succeeds_in_nothing, Long),
    case!(
        Speed,
        Ours,
        each_attempt_succeeds_where_nothing_stops_it,
        Long
    ),
    case!(
        Kernel,
        Ours,
        each_attempt_succeeds_on_a_kernel_of_its_own,
        Long
    ),
    case!(Speed, Ours, the_environment_of_a_job_is_not_the_helpers),
];

const ATTACKER: &str = include_str!("attacker.pl");

/// Those that may be given to root without giving it the host: files and devices stay closed.
const ALLOWED: &str = r#"["ipc_lock", "linux_immutable", "mknod", "net_admin", "sys_nice"]"#;

/// What `attacker.pl` ends with when it has tried all that it was to try.
const LAST_WORD: i32 = 7;

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

/// How somebody comes to run a program in a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As its command.
    Command,
    /// By `nomad alloc exec`.
    Session,
    /// The same with a terminal.
    Terminal,
    /// As the script of a check or a template.
    Script,
}

impl Way {
    fn of(self, who: Who) -> String {
        match self {
            Way::Command => name(who).into(),
            Way::Session => format!("{}, in a session", name(who)),
            Way::Terminal => format!("{}, in a session with a terminal", name(who)),
            Way::Script => format!("{}, in a script", name(who)),
        }
    }
}

fn whose_kernel(context: &Context) -> Whose {
    match context.guest().kind {
        Kind::Nspawn => Whose::Host,
        Kind::Qemu => Whose::Own,
    }
}

fn outcomes(said: &str) -> BTreeMap<&str, Outcome<'_>> {
    said.lines().filter_map(Outcome::parse).collect()
}

fn a_hostile_task_succeeds_in_nothing(context: &Context) -> Result<()> {
    let everybody = table::TASKS.iter().map(|who| (*who, Way::Command));
    succeed_in_nothing(context, &everybody.collect::<Vec<_>>())
}

/// What a session has is put together anew, by another helper than a task's.
fn a_hostile_session_succeeds_in_nothing(context: &Context) -> Result<()> {
    let ways = [Way::Session, Way::Terminal, Way::Script];
    let everybody = [Who::Dynamic, Who::Root].map(|who| ways.map(|way| (who, way)));
    succeed_in_nothing(context, everybody.as_flattened())
}

fn succeed_in_nothing(context: &Context, everybody: &[(Who, Way)]) -> Result<()> {
    let mut wrong = Vec::new();
    let mut heard = Vec::new();
    for (who, way) in everybody {
        let (said, changed) = context.block_on(attack(context, *who, *way))?;
        if let Some(changed) = changed {
            wrong.push(format!("{}: the host is another:\n{changed}", way.of(*who)));
        }
        heard.push((who, way.of(*who), said));
    }
    let heard: Vec<_> = heard
        .iter()
        .map(|(who, whose, said)| (who, whose, outcomes(said)))
        .collect();
    let kernel = Kernel {
        abi: nomad_driver_exec2::sys::landlock_abi().context("no Landlock")?,
        whose: whose_kernel(context),
    };
    for threat in THREATS {
        context.note(format!(
            "{} ({}): {}",
            threat.name, threat.who, threat.stopped_by
        ));
        for attempt in threat.attempts {
            let mut told: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            let heard = heard.iter().filter(|(who, ..)| attempt.who.contains(who));
            for (_, whose, outcomes) in heard {
                match judge(attempt, outcomes.get(attempt.name).copied(), kernel) {
                    Ok(outcome) => told.entry(outcome).or_default().push(whose),
                    Err(error) => wrong.push(format!("{whose}: {}: {error}", attempt.name)),
                }
            }
            for (outcome, whose) in told {
                context.note(format!(
                    "  {}: {outcome}: {}",
                    attempt.name,
                    whose.join("; ")
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

/// Tries in a task all that is for its user to try. Gives what was printed, and what the files are if they changed.
async fn attack(context: &Context, who: Who, way: Way) -> Result<(String, Option<String>)> {
    let stage = Stage::new(NOBODY)?;
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
    let names: Vec<&str> = attempts(who).map(|attempt| attempt.name).collect();
    let job = match way {
        Way::Command => Job::command("perl", &[&["-e", &script], names.as_slice()].concat()),
        Way::Session | Way::Terminal | Way::Script => Job::command("sleep", &["600"]),
    };
    let job = job
        .unveil(&[
            &format!("rw:{GROUND}/devices"),
            &format!("rx:{GROUND}/setuid"),
            "rw:/sys/fs/cgroup",
            "r:/proc",
            "rw:/dev/pts",
            "rw:/dev/tty",
            &format!("rwc:{allocs}/NOMAD_ALLOC_ID"),
        ])
        .task(&format!(
            "env {{\n LC_ALL = \"C\"\n ATTACK_ALLOCS = \"{allocs}\"\n ATTACK_SUPERVISOR = \"1\"\n ATTACK_NEIGHBOUR = \"{}\"\n ATTACK_TERMINAL = \"{}\"\n }}",
            neighbour.id(),
            stage.terminal().path().display()
        ));
    let job = match who {
        Who::Dynamic | Who::DynamicWithNamespaces => job,
        Who::Named => job.user("nobody"),
        Who::Root | Who::RootWithCaps => job.user("root"),
    };
    let text = job.text().replace("/NOMAD_ALLOC_ID", "/${NOMAD_ALLOC_ID}");
    let before = stage.files()?;
    let on_terminals = match way {
        Way::Terminal => Some(terminals(&agent, stage.terminal().number()?).await?),
        Way::Command | Way::Session | Way::Script => None,
    };
    let alloc = agent.run(&text).await?;
    let task = alloc.only_task()?;
    let said = match way {
        Way::Command => {
            let exit = task.wait().await?;
            ensure!(
                exit.code == LAST_WORD && exit.signal == 0,
                "its end is not the one it had: {exit:?}\n{}\n{}",
                alloc.stdout("t")?,
                alloc.stderr("t")?
            );
            alloc.stdout("t")?
        }
        Way::Session | Way::Terminal | Way::Script => {
            let said = attack_in_sessions(&agent, task, way, &script, &names).await?;
            ensure!(task.exit().is_none(), "the task is gone: {:?}", task.exit());
            said
        }
    };
    alloc.stop().await?;
    if let Some(neighbour) = on_terminals {
        let task = neighbour.only_task()?;
        ensure!(task.exit().is_none(), "{:?}", task.exit());
        neighbour.stop().await?;
    }
    neighbour.expect_unharmed()?;
    let after = stage.files()?;
    agent.finish().await?;
    Ok((said, (after != before).then_some(after)))
}

/// A task that has terminals of its own up to this number, the last of them open to everybody who sees it.
async fn terminals(agent: &Agent, last: u32) -> Result<Allocation> {
    let script = format!(
        r#"use strict; use Fcntl; $| = 1; my @masters;
        for (0 .. {last}) {{
            sysopen(my $master, "/dev/pts/ptmx", O_RDWR | O_NOCTTY) or die "ptmx: $!";
            # TIOCSPTLCK: it is unlocked.
            ioctl($master, 0x40045431, my $none = pack("i", 0)) or die "unlock: $!";
            push @masters, $master;
        }}
        chmod 0666, "/dev/pts/{last}" or die "chmod: $!";
        print "up\n"; sleep 600"#
    );
    let job = Job::command("perl", &["-e", &script])
        .user("root")
        .unveil(&["rw:/dev/pts"]);
    let alloc = agent.run(&job.text()).await?;
    let up = until("it has terminals", || {
        (alloc.stdout("t").ok()? == "up\n").then_some(())
    });
    up.await
        .with_context(|| alloc.stderr("t").unwrap_or_default())?;
    Ok(alloc)
}

/// A script's output is cut to its last 4096 bytes.
const ATTEMPTS_A_SESSION: usize = 25;
/// What is said of an attempt that needs a terminal of its own where there is none.
const NO_TERMINAL: &str = "stopped: no terminal";

async fn attack_in_sessions(
    agent: &Agent,
    task: &Task,
    way: Way,
    script: &str,
    names: &[&str],
) -> Result<String> {
    let mut all = String::new();
    for names in names.chunks(ATTEMPTS_A_SESSION) {
        let command = [&["perl", "-e", script], names].concat();
        let command: Vec<String> = command.into_iter().map(str::to_owned).collect();
        let talk = match way {
            Way::Script => {
                let (said, code) = run_as_check(agent, &task.id(), command, 120).await?;
                ensure!(code == LAST_WORD, "{code}: {said}");
                all.push_str(&said);
                continue;
            }
            Way::Terminal => Talk::on_terminal(agent, task, command).await?,
            Way::Command | Way::Session => Talk::command(agent, task, command).await?,
        };
        all.push_str(&talk.ends_with(LAST_WORD).await?);
    }
    let has_terminal = !all.contains(NO_TERMINAL);
    ensure!(has_terminal == (way == Way::Terminal), "{all}");
    Ok(all)
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
    let whose = whose_kernel(context);
    context.block_on(async {
        let agent = agent(context).await?;
        let (mut wrong, mut succeeded) = (Vec::new(), Vec::new());
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
                let words = format!("{}, {}", name(who), attempt.name);
                match (unhindered(attempt, uid)?.as_deref(), attempt.control) {
                    (None, _) => succeeded.push(words),
                    (Some(why), Control::Depends(reason))
                        if whose == Whose::Host && !why.starts_with(UNTRIED) =>
                    {
                        context.note(format!("{words}: {why}; {reason}"));
                    }
                    (Some(why), _) => wrong.push(format!("{words}: {why}")),
                }
            }
        }
        ensure!(
            wrong.is_empty(),
            "these are no attacks here:\n{}",
            wrong.join("\n")
        );
        context.note(format!("succeeded: {}", succeeded.join("; ")));
        ensure!(succeeded.len() > 10, "{succeeded:?}");
        agent.finish().await
    })
}

/// What is said first of an attempt that was none.
const UNTRIED: &str = "not tried: ";

/// Why an attempt failed, if it did.
fn unhindered(attempt: &Attempt, uid: u32) -> Result<Option<String>> {
    let stage = Stage::new(uid)?;
    let terminal = Terminal::new()?;
    let (neighbour, supervisor) = (Victim::new(uid, 0)?, Victim::new(uid, 0)?);
    let output = Command::new("setsid")
        .args(["--ctty", "--wait", "/bin/sh", "-c"])
        .args(["exec \"$0\" \"$@\" < /dev/null", "perl", "-e"])
        .args([&format!("{}{ATTACKER}", prelude()), attempt.name])
        .env("ATTACK_TERMINAL", stage.terminal().path())
        .env("LC_ALL", "C")
        .env("ATTACK_NEIGHBOUR", neighbour.id().to_string())
        .env("ATTACK_SUPERVISOR", supervisor.id().to_string())
        .env("ATTACK_ALLOCS", format!("{GROUND}/allocs"))
        .env("NOMAD_ALLOC_ID", "control")
        .env("NOMAD_ALLOC_DIR", format!("{GROUND}/alloc"))
        .env("NOMAD_TASK_DIR", format!("{GROUND}/own/task"))
        .uid(uid)
        .gid(uid)
        .stdin(terminal.stdio()?)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(LAST_WORD), "{output:?}");
    let outcomes = outcomes(&said);
    match outcomes.get(attempt.name).context("it said nothing")? {
        Outcome::Succeeded => Ok(None),
        Outcome::Stopped(why) => Ok(Some((*why).to_owned())),
        Outcome::Untried(why) => Ok(Some(format!("{UNTRIED}{why}"))),
    }
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
