//! Every key of both `config` blocks with values that mean harm or make no sense, past the schema's check. Each starts a task
//! that is right or is refused with one sentence that names the key; neither leaves anything.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::{Agent, Allocation, Config, Profile, RpcError, encode};
use nomad_driver_exec2::config::schema::{self, Key, Kind};
use nomad_driver_exec2::job::Value;

use crate::case;
use crate::nomad::{Job, Scope, proc_file, status};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, a_task_s_key_takes_no_harm_from_any_value),
    case!(Speed, Ours, a_plugin_s_key_takes_no_harm_from_any_value),
];

/// A sentence is for a line of `nomad alloc status`.
const SENTENCE_BYTES: usize = 700;

type Values = Vec<(String, Value)>;

/// The same for every key, so that a new one is tried as well.
fn hostile() -> Vec<Value> {
    let long = format!("/{}", "x/".repeat(2_500));
    let texts = [
        "",
        "a\nb",
        "a\0b",
        "..",
        "../../etc",
        "\u{1b}[2J\u{202e}",
        &long,
    ];
    let listed = |text: &str| Value::from(vec![text]);
    let mut values: Vec<Value> = texts.iter().map(|text| Value::from(*text)).collect();
    values.extend(texts.iter().map(|text| listed(text)));
    values.extend(texts.iter().map(|text| listed(&format!("r:{text}"))));
    values.extend([
        Value::Null,
        Value::from(true),
        Value::from(5),
        Value::from(-5),
        Value::from(i64::MAX),
        Value::from(0.5),
        Value::from(Vec::<Value>::new()),
        Value::from(vec![Value::from(5)]),
        Value::from(vec![Value::Null]),
        Value::from(vec![Value::from(vec!["x"])]),
        Value::from(vec!["r:/usr"; 10_000]),
        Value::Object([("a".to_owned(), Value::from("b"))].into_iter().collect()),
    ]);
    values
}

/// Whether a value is of a key's type at all; one that is not must be refused. Null is an absent key.
fn is_of_type(kind: Kind, value: &Value) -> bool {
    match (kind, value) {
        (_, Value::Null) => true,
        (Kind::Bool, value) => value.is_boolean(),
        (Kind::Integer { .. }, value) => value.as_i64().is_some(),
        (Kind::Text { .. }, value) => value.is_string(),
        (Kind::List { .. }, Value::Array(entries)) => entries.iter().all(Value::is_string),
        (Kind::List { .. }, _) => false,
    }
}

/// The block that Nomad would send, with one value of our own.
fn block(table: &[Key], good: &[(&str, Value)], key: &str, value: &Value) -> Values {
    let mut values: Values = table
        .iter()
        .map(|row| {
            let good = good.iter().find(|(name, _)| *name == row.name);
            let value = match good {
                _ if row.name == key => value.clone(),
                Some((_, value)) => value.clone(),
                None => Value::Null,
            };
            (row.name.to_owned(), value)
        })
        .collect();
    values.sort_by(|(a, _), (b, _)| a.cmp(b));
    values
}

fn shown(value: &Value) -> String {
    format!("{value:?}").chars().take(80).collect()
}

/// What an operator reads: one line that names the key, of a job that Nomad does not try again.
fn check(error: &anyhow::Error, key: &str) -> Result<()> {
    let error: &RpcError = error
        .downcast_ref()
        .with_context(|| format!("no answer of the driver's: {error:#}"))?;
    let sentence = &error.message;
    ensure!(sentence.contains(key), "{key} is not named: {sentence:?}");
    ensure!(
        sentence.len() <= SENTENCE_BYTES && !sentence.contains(char::is_control),
        "no sentence: {sentence:?}"
    );
    ensure!(
        !sentence.contains('\u{202e}'),
        "text runs backwards: {sentence:?}"
    );
    ensure!(!error.recoverable, "Nomad would try again: {sentence}");
    Ok(())
}

/// The task that these values describe, and no other, seen from outside.
fn check_task(alloc: &Allocation, values: &Values) -> Result<()> {
    let task = alloc.only_task()?;
    let main = Scope::of(task)?.main()?;
    let value = |key: &str| {
        let mut values = values.iter();
        values.find(|(name, _)| name == key).map(|(_, value)| value)
    };
    let arguments = match value("args") {
        Some(Value::Array(entries)) => entries.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let line = fs::read_to_string(format!("/proc/{main}/cmdline"))?;
    let line: Vec<&str> = line.split_terminator('\0').collect();
    ensure!(line.ends_with(&arguments), "{line:?}, not {arguments:?}");
    let score = value("oom_score_adj").and_then(Value::as_i64).unwrap_or(0);
    ensure!(proc_file(main, "oom_score_adj")? == score.to_string());
    ensure!(status(main, "NoNewPrivs")? == "1");
    ensure!(status(main, "CapEff")? == "0000000000000000");
    let user = status(main, "Uid")?;
    let user = user.split_whitespace().next().context("Uid")?;
    ensure!(task.user() == format!("nomad-{user}"), "{user}");
    let inode = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    ensure!(
        inode(&format!("/proc/{main}/cwd"))? == inode(&task.paths().root.to_string_lossy())?,
        "it started somewhere else"
    );
    Ok(())
}

/// Runs a job whose block is made of these values, and looks at it. The inner error is the driver's refusal.
async fn try_task(agent: &Agent, values: &Values) -> Result<Result<()>> {
    let job = Job::command("true", &[]).text();
    let run = agent.run_with(&job, |task| {
        task.msgpack_driver_config = encode(values, Profile::Nomad);
    });
    match run.await {
        Ok(alloc) => {
            check_task(&alloc, values)?;
            alloc.stop().await?;
            Ok(Ok(()))
        }
        Err(error) => Ok(Err(error)),
    }
}

/// A program that stays, whatever its arguments are.
fn stay() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir_in("/opt")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let file = dir.path().join("stay");
    fs::write(&file, "#!/bin/sh\nwhile :; do sleep 1; done\n")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// How many values of a key were taken and refused; all that went wrong at once.
#[derive(Debug, Default)]
struct Outcome {
    taken: usize,
    refused: usize,
    wrong: Vec<String>,
}

impl Outcome {
    fn judge(&mut self, key: &Key, value: &Value, done: Result<Result<()>>, ground: &Ground) {
        let judged = match done {
            Ok(Ok(())) if is_of_type(key.kind, value) => {
                self.taken += 1;
                Ok(())
            }
            Ok(Ok(())) => Err(anyhow::anyhow!("it is taken")),
            Ok(Err(refusal)) => {
                self.refused += 1;
                check(&refusal, key.name)
            }
            Err(error) => Err(error),
        };
        let left = ground.left().unwrap_or_default();
        let clean = if left.is_empty() {
            Ok(())
        } else {
            left.iter().for_each(harness::leaks::Leak::clear);
            Err(anyhow::anyhow!("it leaves {left:?}"))
        };
        if let Err(error) = judged.and(clean) {
            let line = format!("{} = {}: {error:#}", key.name, shown(value));
            self.wrong.push(line);
        }
    }

    fn conclude(self, context: &Context, key: &Key) -> Result<()> {
        context.note(format!(
            "{}: {} taken, {} refused",
            key.name, self.taken, self.refused
        ));
        if !self.wrong.is_empty() {
            bail!("{}", self.wrong.join("\n"));
        }
        ensure!(self.refused > 0, "no value was hostile to {}", key.name);
        Ok(())
    }
}

fn a_task_s_key_takes_no_harm_from_any_value(context: &Context) -> Result<()> {
    let dir = stay()?;
    let command = dir.path().join("stay").display().to_string();
    context.block_on(async {
        let config = Config {
            plugin: format!(
                "unveil_by_task = true\nunveil_paths = [\"rx:{}\"]",
                dir.path().display()
            ),
            ..Config::default()
        };
        let agent = Agent::start(context.driver(), config).await?;
        let ground = Ground::survey()?;
        let good = [("command", Value::from(command.as_str()))];
        let mut wrong = Vec::new();
        for key in schema::TASK {
            let mut outcome = Outcome::default();
            for value in hostile() {
                let values = block(schema::TASK, &good, key.name, &value);
                outcome.judge(key, &value, try_task(&agent, &values).await, &ground);
            }
            wrong.extend(outcome.conclude(context, key).err());
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        agent.finish().await
    })
}

/// A configuration that the agent refuses at its start, or that stands and then runs a task, or refuses that.
fn a_plugin_s_key_takes_no_harm_from_any_value(context: &Context) -> Result<()> {
    let task = block(
        schema::TASK,
        &[("command", "sleep".into()), ("args", vec!["600"].into())],
        "",
        &Value::Null,
    );
    let tried = async |values: Values| -> Result<Result<()>> {
        let config = Config {
            plugin_values: Some(values),
            ..Config::default()
        };
        match Agent::start(context.driver(), config).await {
            Ok(agent) => {
                let done = try_task(&agent, &task).await?;
                agent.finish().await?;
                Ok(done)
            }
            Err(error) => Ok(Err(error)),
        }
    };
    context.block_on(async {
        let ground = Ground::survey()?;
        let mut wrong = Vec::new();
        for key in schema::PLUGIN {
            let mut outcome = Outcome::default();
            for value in hostile() {
                let done = tried(block(schema::PLUGIN, &[], key.name, &value)).await;
                outcome.judge(key, &value, done, &ground);
            }
            wrong.extend(outcome.conclude(context, key).err());
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        Ok(())
    })
}
