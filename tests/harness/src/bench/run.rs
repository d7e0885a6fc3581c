//! The host's half: boots the guests one after the other, hands them the binaries, keeps what they tell.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::measure::{Candidates, Listener, measure, quiet};
use super::raw::{Host, Raw, Series, Who};
use super::report;
use super::size::{Asked, Size};
use super::{Controllers, kernel};
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
    Version(Who, String),
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
    // Before the first result of it is a change to the tree.
    let commit = commit()?;
    for guest in &request.guests {
        let mut raw = in_guest(*guest, &payload, request)?;
        raw.host.commit.clone_from(&commit);
        let path = request.into.join(report::raw_name(&raw.guest));
        fs::create_dir_all(&request.into)?;
        fs::write(&path, raw.text()?).with_context(|| path.display().to_string())?;
        println!("{guest}: every sample is in {}", path.display());
        let faults = raw.faults();
        ensure!(faults.is_empty(), "{guest}: {}", faults.join("; "));
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
    let emulated_on = format!(
        "{} with a load of {}",
        line("/proc/cpuinfo", "model name")?,
        kernel::load()?
    );
    let mut versions = BTreeMap::new();
    let mut said = String::new();
    let exit = guest.run(
        &argv,
        PATIENCE,
        &mut |line| match serde_json::from_str(line) {
            Ok(Line::Host(host)) => raw.host = host,
            Ok(Line::Size(size)) => raw.size = size,
            Ok(Line::Series(series)) => raw.series.push(series),
            Ok(Line::Version(who, version)) => {
                versions.insert(who.title().to_owned(), version);
            }
            Ok(Line::Progress(what)) => println!("{name}: {what}"),
            Err(_) => said.push_str(&format!("{line}\n")),
        },
    )?;
    if exit != Exit::Code(0) {
        bail!("{name}: the benchmark ended with {exit:?}\n{said}");
    }
    raw.host.versions.extend(versions);
    if name.kind == Kind::Qemu {
        raw.host.emulated_on = emulated_on;
    }
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
    quiet(&mut teller).await?;
    teller.tell(&Line::Host(host()?));
    let size = Size::of(asked, Controllers::here()?);
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

    fn version(&mut self, who: Who, version: String) {
        self.tell(&Line::Version(who, version));
    }

    fn series(&mut self, series: Series) {
        self.tell(&Line::Series(series));
    }
}

/// All that can be known from inside.
pub fn host() -> Result<Host> {
    let said = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .with_context(|| program.to_owned())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    };
    let versions = BTreeMap::from([
        ("bubblewrap".to_owned(), said("bwrap", &["--version"])?),
        ("client".to_owned(), client().to_owned()),
    ]);
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
        load_at_begin: kernel::load()?.to_string(),
        emulated_on: String::new(),
    })
}

/// What follows a field's name in a file of such lines.
fn line(path: &str, field: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    let found = text.lines().find_map(|line| line.strip_prefix(field));
    let value = found.with_context(|| format!("{path} has no {field}"))?;
    Ok(value.trim_start_matches([' ', '\t', ':']).trim().to_owned())
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
