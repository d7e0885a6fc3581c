//! Real programs, unmodified from Debian, run by job files as they stand; each with an `unveil` list of which it needs every
//! letter.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation};

use crate::case;
use crate::nomad::{agent, said};

pub const CASES: &[Case] = &[
    case!(Programs, Ours, python_serves_files_over_http),
    case!(Programs, Ours, java_compiles_and_runs),
    case!(Programs, Ours, nginx_serves_over_http),
    case!(Programs, Ours, node_serves_over_http),
    case!(Programs, Ours, redis_keeps_a_value),
    case!(Programs, Ours, postgresql_answers_a_query),
    case!(
        ProgramLimits,
        Ours,
        java_sizes_itself_by_the_tasks_limits,
        Minutes
    ),
    case!(ProgramLimits, Ours, go_sizes_itself_by_the_tasks_cpus),
];

pub const PYTHON: &str = include_str!("../nomad/python-http.nomad.hcl");
pub const NGINX: &str = include_str!("../nomad/nginx.nomad.hcl");
pub const NODE: &str = include_str!("../nomad/node.nomad.hcl");
pub const REDIS: &str = include_str!("../nomad/redis.nomad.hcl");
pub const POSTGRESQL: &str = include_str!("../nomad/postgresql.nomad.hcl");
pub const GO: &str = include_str!("../nomad/go.nomad.hcl");
pub const JAVA: &str = include_str!("../nomad/java.nomad.hcl");

/// A program that does not do its work in this time is taken for one that cannot.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client outside the sandbox, or the task's log, must come to see.
type Use = fn(&Allocation) -> Result<()>;

fn python_serves_files_over_http(context: &Context) -> Result<()> {
    works_with_no_less(context, PYTHON, |_| {
        expect(&get(8001, "/hello")?, "hello from python")
    })
}

fn java_compiles_and_runs(context: &Context) -> Result<()> {
    works_with_no_less(context, JAVA, |alloc| {
        expect(&alloc.stdout("java")?, "heap MiB ")
    })
}

fn nginx_serves_over_http(context: &Context) -> Result<()> {
    works_with_no_less(context, NGINX, |_| {
        expect(&get(8002, "/")?, "hello from nginx")
    })
}

fn node_serves_over_http(context: &Context) -> Result<()> {
    works_with_no_less(context, NODE, |_| {
        expect(&get(8004, "/")?, "hello from node")
    })
}

fn redis_keeps_a_value(context: &Context) -> Result<()> {
    works_with_no_less(context, REDIS, |_| {
        let redis = |words: &[&str]| said("redis-cli", &[&["-p", "8003"], words].concat());
        redis(&["set", "key", "kept"])?;
        expect(&redis(&["get", "key"])?, "kept")
    })
}

fn postgresql_answers_a_query(context: &Context) -> Result<()> {
    works_with_no_less(context, POSTGRESQL, |_| {
        let psql = "/usr/lib/postgresql/17/bin/psql";
        let to = ["-h", "127.0.0.1", "-p", "8005", "-U", "postgres"];
        let answer = said(psql, &[&to[..], &["-Atc", "select 6 * 7"]].concat())?;
        expect(&answer, "42")
    })
}

/// The task has half of the machine's CPU, and a part of its memory.
fn java_sizes_itself_by_the_tasks_limits(context: &Context) -> Result<()> {
    let printed = printed_by(context, JAVA, "java")?;
    let number = |name: &str| -> Result<u64> {
        let line = printed.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.context("a line")?.trim().parse()?)
    };
    ensure!(number("processors")? == 1, "{printed}");
    // By default a quarter of what there is: of 512 MiB.
    ensure!((100..=128).contains(&number("heap MiB")?), "{printed}");
    Ok(())
}

fn go_sizes_itself_by_the_tasks_cpus(context: &Context) -> Result<()> {
    let printed = printed_by(context, GO, "go")?;
    expect(&printed, "GOMAXPROCS 1 of 1")
}

fn printed_by(context: &Context, job: &str, task: &str) -> Result<String> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(job).await?;
        let exit = alloc.only_task()?.wait().await?;
        alloc.stop().await?;
        let printed = alloc.stdout(task)? + &alloc.stderr(task)?;
        ensure!(exit.success(), "{exit:?}: {printed}");
        agent.finish().await?;
        Ok(printed)
    })
}

/// The program works as its job file has it, and with no letter less in its list.
fn works_with_no_less(context: &Context, job: &str, used: Use) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        works(&agent, job, used).await?;
        for (less, missing) in with_a_letter_less(job) {
            ensure!(
                works(&agent, &less, used).await.is_err(),
                "it works without {missing}"
            );
        }
        agent.finish().await
    })
}

/// Runs the job until it proves useful, or has ended without.
async fn works(agent: &Agent, job: &str, used: Use) -> Result<()> {
    let alloc = agent.run(job).await?;
    let begun = Instant::now();
    let outcome = loop {
        // Looked at first: what a task that has ended is to show is there by then.
        let ended = alloc.only_task()?.exit();
        match used(&alloc) {
            Ok(()) => break Ok(()),
            Err(error) if ended.is_some() || begun.elapsed() > PATIENCE => {
                break Err(error.context(format!("{ended:?}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    alloc.stop().await?;
    outcome
}

/// The job once for each letter of each entry of its `unveil` list, which stand one on a line, and what is missing in it.
fn with_a_letter_less(job: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = job.lines().collect();
    let mut jobs = Vec::new();
    let mut inside = false;
    for (at, line) in lines.iter().enumerate() {
        inside = (inside && line.trim() != "]") || line.trim() == "unveil = [";
        let entry = line.trim().strip_prefix('"');
        let Some((mode, _)) = entry
            .and_then(|entry| entry.split_once(':'))
            .filter(|_| inside)
        else {
            continue;
        };
        for letter in mode.chars() {
            let less: String = mode.chars().filter(|other| *other != letter).collect();
            let mut changed = lines.clone();
            let replaced = line.replacen(mode, &less, 1);
            changed[at] = if less.is_empty() { "" } else { &replaced };
            jobs.push((changed.join("\n"), format!("{letter} in {}", line.trim())));
        }
    }
    jobs
}

fn expect(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "no {part:?} in {text:?}");
    Ok(())
}

/// A GET from outside the sandbox.
fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if !answer.starts_with("HTTP/1.") || !answer.contains(" 200 ") {
        bail!("{answer}");
    }
    Ok(answer)
}
