//! The host's half: boots the guests one after the other, hands them the binaries, keeps what they tell.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Controllers;
use super::measure::{Candidates, Listener, measure};
use super::raw::{Host, Raw, Series, Who};
use super::report;
use super::size::{Asked, Size};
use crate::guest::{self, Boot, Exit, GuestName, Kind, PAYLOAD_DIR, Payload};

/// A full run takes about an hour in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(3 * 3600);

/// What is measured, and where.
#[derive(Debug)]
pub struct Request {
    pub guests: Vec<GuestName>,
    pub asked: Asked,
    pub driver: PathBuf,
    pub exec2: Option<PathBuf>,
    /// Where the samples go.
    pub into: PathBuf,
}

/// One line from the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Host(Host),
    Size(Size),
    Series(Series),
    Progress(String),
}

/// Runs in every guest, and writes `raw-<guest>.json` for each.
pub fn run(request: &Request) -> Result<()> {
    let harness = std::env::current_exe()?;
    let mut files = vec![
        ("nomad-driver-exec2", request.driver.as_path()),
        ("harness", harness.as_path()),
    ];
    files.extend(request.exec2.as_deref().map(|path| ("exec2", path)));
    let payload = Payload::new(&files)?;
    for guest in &request.guests {
        let raw = in_guest(*guest, &payload, request)?;
        let faults = raw.faults();
        ensure!(faults.is_empty(), "{guest}: {}", faults.join("; "));
        let path = request.into.join(report::raw_name(&raw.guest));
        fs::create_dir_all(&request.into)?;
        fs::write(&path, raw.text()?).with_context(|| path.display().to_string())?;
        println!("{guest}: every sample is in {}", path.display());
    }
    Ok(())
}

fn in_guest(name: GuestName, payload: &Payload, request: &Request) -> Result<Raw> {
    println!("starting {name} ...");
    let mut guest = guest::boot(
        name,
        &Boot {
            payload,
            forwards: &[],
        },
    )?;
    let harness = format!("{PAYLOAD_DIR}/harness");
    let mut argv = vec![harness.as_str(), "bench", "inside", word(request.asked)];
    // Without the memory and cpu controllers it starts nothing.
    if request.exec2.is_some() && name.kind == Kind::Qemu {
        argv.push("exec2");
    }
    let mut raw = Raw {
        guest: name.to_string(),
        size: Size::of(request.asked, Controllers::None),
        host: Host::default(),
        series: Vec::new(),
    };
    let mut said = String::new();
    let exit = guest.run(
        &argv,
        PATIENCE,
        &mut |line| match serde_json::from_str(line) {
            Ok(Line::Host(host)) => raw.host = host,
            Ok(Line::Size(size)) => raw.size = size,
            Ok(Line::Series(series)) => raw.series.push(series),
            Ok(Line::Progress(what)) => println!("{name}: {what}"),
            Err(_) => said.push_str(&format!("{line}\n")),
        },
    )?;
    if exit != Exit::Code(0) {
        bail!("{name}: the benchmark ended with {exit:?}\n{said}");
    }
    raw.host.commit = commit()?;
    raw.series
        .sort_by_key(|series| (series.figure, series.who, series.at));
    Ok(raw)
}

fn word(asked: Asked) -> &'static str {
    match asked {
        Asked::Smoke => "smoke",
        Asked::Quick => "quick",
        Asked::Full => "full",
    }
}

/// What `run` has each guest do.
pub async fn inside(asked: Asked, has_exec2: bool) -> Result<()> {
    let payload = Path::new(PAYLOAD_DIR);
    let candidates = Candidates {
        ours: payload.join("nomad-driver-exec2"),
        exec2: has_exec2.then(|| payload.join("exec2")),
    };
    let mut teller = Teller;
    let size = Size::of(asked, Controllers::here()?);
    teller.tell(&Line::Host(host(&candidates)?));
    teller.tell(&Line::Size(size.clone()));
    measure(&candidates, &size, &mut teller).await
}

#[derive(Debug)]
struct Teller;

impl Teller {
    fn tell(&self, line: &Line) {
        if let Ok(line) = serde_json::to_string(line) {
            println!("{line}");
        }
    }
}

impl Listener for Teller {
    fn progress(&mut self, what: &str) {
        self.tell(&Line::Progress(what.to_owned()));
    }

    fn series(&mut self, series: Series) {
        self.tell(&Line::Series(series));
    }
}

/// All that can be known from inside.
pub fn host(candidates: &Candidates) -> Result<Host> {
    let said = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .with_context(|| program.to_owned())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    };
    let line = |path: &str, field: &str| -> Result<String> {
        let text = fs::read_to_string(path)?;
        let found = text.lines().find_map(|line| line.strip_prefix(field));
        let value = found.with_context(|| format!("{path} has no {field}"))?;
        Ok(value.trim_start_matches([' ', '\t', ':']).trim().to_owned())
    };
    let ours = candidates.ours.to_string_lossy();
    let mut versions = BTreeMap::from([
        (Who::Ours.title().to_owned(), said(&ours, &["--version"])?),
        ("bubblewrap".to_owned(), said("bwrap", &["--version"])?),
        ("client".to_owned(), client().to_owned()),
    ]);
    if let Some(exec2) = &candidates.exec2 {
        let bytes = fs::metadata(exec2)?.len();
        versions.insert(
            Who::Exec2.title().to_owned(),
            format!("a binary of {bytes} bytes"),
        );
    }
    let memory = line("/proc/meminfo", "MemTotal")?;
    Ok(Host {
        date: said("date", &["--utc", "+%Y-%m-%d"])?,
        processor: line("/proc/cpuinfo", "model name")?,
        processors: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        memory_mib: memory.trim_end_matches(" kB").parse::<u64>()? / 1024,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        systemd: said("systemctl", &["--version"])?,
        commit: String::new(),
        versions,
        load_at_begin: fs::read_to_string("/proc/loadavg")?
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned(),
    })
}

/// An unoptimised client is slow enough to be seen in every call.
fn client() -> &'static str {
    match cfg!(debug_assertions) {
        true => "unoptimised",
        false => "optimised",
    }
}

fn commit() -> Result<String> {
    let output = Command::new("git")
        .args([
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
            "--abbrev=12",
        ])
        .output()
        .context("git")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
