//! From samples to BENCHMARKS.md: tables, the budgets beside what was measured, and how it was done. A pure function.

mod budgets;
mod tables;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::chart;
use super::raw::{Raw, Who};

const ABOUT: &str = include_str!("report/about.md");
const METHOD: &str = include_str!("report/method.md");
const FINDINGS: &str = include_str!("report/findings.md");

pub fn raw_name(guest: &str) -> String {
    format!("raw-{guest}.json")
}

fn chart_name(guest: &str) -> String {
    format!("start-{guest}.svg")
}

/// Files as they are to be: each with its path below the root of the tree.
pub fn files(raws: &[Raw]) -> Result<Vec<(PathBuf, String)>> {
    let mut files = vec![(PathBuf::from("BENCHMARKS.md"), markdown(raws)?)];
    for raw in raws {
        let path = Path::new("benchmarks").join(chart_name(&raw.guest));
        files.push((path, chart::svg(raw)?));
    }
    Ok(files)
}

/// Every run that is kept below the root, containers first: they have the speed.
pub fn read(root: &Path) -> Result<Vec<Raw>> {
    let dir = root.join("benchmarks");
    let mut raws = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "json") {
            let text = fs::read_to_string(&path)?;
            raws.push(Raw::parse(&text).with_context(|| path.display().to_string())?);
        }
    }
    ensure!(!raws.is_empty(), "{} has no raw-*.json", dir.display());
    raws.sort_by_key(|raw| (!raw.is_native(), raw.guest.clone()));
    Ok(raws)
}

/// `harness bench report`: makes the files anew.
pub fn write(root: &Path) -> Result<()> {
    for (path, text) in files(&read(root)?)? {
        let path = root.join(path);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        println!("{} is written", path.display());
    }
    Ok(())
}

fn markdown(raws: &[Raw]) -> Result<String> {
    let mut text = String::from(ABOUT);
    text.push_str("\n## The budgets\n\n");
    text.push_str(budgets::INTRODUCTION);
    for raw in raws {
        budgets::table(raw, &mut text)?;
    }
    for raw in raws {
        guest(raw, &mut text)?;
    }
    text.push('\n');
    for part in [METHOD, "\n", FINDINGS] {
        text.push_str(part);
    }
    Ok(text)
}

fn guest(raw: &Raw, text: &mut String) -> Result<()> {
    let speed = match raw.is_native() {
        true => "a container at native speed, without the cpu and memory controllers",
        false => "a software-emulated machine, some ten times slower, with every controller",
    };
    writeln!(text, "\n## {}: {speed}\n", raw.guest)?;
    let host = &raw.host;
    writeln!(
        text,
        "{} of commit {}, {}. {} × {}, {} MiB, Linux {}, {}. Load average at the begin: {}.{}",
        host.date,
        host.commit,
        versions(raw),
        host.processors,
        host.processor,
        host.memory_mib,
        host.kernel,
        host.systemd,
        host.load_at_begin,
        match host.emulated_on.as_str() {
            "" => String::new(),
            outside => format!(" Emulated on {outside}."),
        }
    )?;
    let chart = chart_name(&raw.guest);
    writeln!(
        text,
        "\n![Start to first instruction of each candidate](benchmarks/{chart})\n"
    )?;
    tables::starts(raw, text)?;
    tables::drivers(raw, text)?;
    tables::limited(raw, text)?;
    tables::crowds(raw, text)?;
    tables::largest_crowd(raw, text)?;
    tables::bursts(raw, text)?;
    tables::cycles(raw, text)?;
    tables::kernel(raw, text)
}

fn versions(raw: &Raw) -> String {
    let versions = raw.host.versions.iter();
    let versions: Vec<String> = versions.map(|(name, it)| format!("{name}: {it}")).collect();
    versions.join(", ")
}

impl Raw {
    fn is_native(&self) -> bool {
        !self.guest.ends_with("-qemu")
    }

    /// Who is set against this driver.
    fn peer(&self) -> Option<Who> {
        self.has(Who::Exec2).then_some(Who::Exec2)
    }
}

/// Three digits that mean something; a count has all of them.
fn number(value: f64) -> String {
    match value.abs() {
        _ if value.fract() == 0.0 => format!("{value}"),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
