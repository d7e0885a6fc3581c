//! What one run of the benchmark leaves: every sample, and what it was taken on. The file is committed; tables and chart are
//! made from it alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::figures::{Figure, Id, Zeros};
use super::size::Size;
use super::statistics::Summary;

/// One run in one guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Raw {
    pub guest: String,
    pub size: Size,
    pub host: Host,
    pub series: Vec<Series>,
}

/// What it was taken on, and of what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The day in UTC, `2026-11-27`.
    pub date: String,
    pub processor: String,
    pub processors: u32,
    pub memory_mib: u64,
    /// As the guest sees it; a container has its host's.
    pub kernel: String,
    pub systemd: String,
    /// Of this tree; with `-dirty` where it had changes.
    pub commit: String,
    /// Names and versions of what was driven or run.
    pub versions: BTreeMap<String, String>,
    /// Processes that were runnable when it began, of the whole machine: others disturb.
    pub load_at_begin: String,
    /// Of the machine that emulates this one: its processor, and its load.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub emulated_on: String,
}

/// Who was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// This driver.
    Ours,
    /// HashiCorp's.
    Exec2,
    SystemdRunScope,
    SystemdRunService,
    Bwrap,
    ForkExec,
    /// systemd alone: a scope asked for over the bus.
    Systemd,
    Kernel,
}

impl Who {
    pub fn title(self) -> &'static str {
        match self {
            Who::Ours => "this driver",
            Who::Exec2 => "HashiCorp's exec2",
            Who::SystemdRunScope => "`systemd-run --scope`",
            Who::SystemdRunService => "`systemd-run`, a sandboxed service",
            Who::Bwrap => "`bwrap`",
            Who::ForkExec => "fork and exec",
            Who::Systemd => "a scope's round trip over the bus",
            Who::Kernel => "the kernel alone",
        }
    }
}

/// The samples of one figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    pub figure: Id,
    pub who: Who,
    /// Tasks, MHz or starts, as the figure has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
    pub values: Vec<f64>,
}

impl Raw {
    pub fn parse(text: &str) -> Result<Raw> {
        serde_json::from_str(text).context("the samples cannot be read")
    }

    /// JSON with a series in each line.
    pub fn text(&self) -> Result<String> {
        let mut text = String::from("{\n");
        writeln!(text, "\"guest\": {},", serde_json::to_string(&self.guest)?)?;
        writeln!(text, "\"size\": {},", serde_json::to_string(&self.size)?)?;
        let host = serde_json::to_string_pretty(&self.host)?;
        writeln!(text, "\"host\": {host},\n\"series\": [")?;
        let series: Vec<String> = self
            .series
            .iter()
            .map(serde_json::to_string)
            .collect::<Result<_, _>>()?;
        writeln!(text, "{}\n]\n}}", series.join(",\n"))?;
        Ok(text)
    }

    pub fn series(&self, figure: Id, who: Who, at: Option<u64>) -> Option<&Series> {
        self.series
            .iter()
            .find(|series| (series.figure, series.who, series.at) == (figure, who, at))
    }

    pub fn summary(&self, figure: Id, who: Who, at: Option<u64>) -> Option<Summary> {
        Summary::of(&self.series(figure, who, at)?.values)
    }

    /// The counts that a figure was taken at.
    pub fn points(&self, figure: Id, who: Who) -> Vec<u64> {
        let of_figure = self
            .series
            .iter()
            .filter(|series| (series.figure, series.who) == (figure, who));
        of_figure.filter_map(|series| series.at).collect()
    }

    pub fn has(&self, who: Who) -> bool {
        self.series.iter().any(|series| series.who == who)
    }

    /// What is wrong with it: figures that were not taken, too few samples, numbers that cannot be. How high they are is
    /// nobody's business here.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut expected = BTreeSet::new();
        let limits = match self.guest.ends_with("-qemu") {
            true => super::Controllers::All,
            false => super::Controllers::None,
        };
        for figure in Figure::ALL {
            for (who, at, count) in figure.expected(&self.size, limits, self.has(Who::Exec2)) {
                let name = format!("{:?} of {who:?} at {at:?}", figure.id);
                expected.insert((figure.id, who, at));
                let Some(series) = self.series(figure.id, who, at) else {
                    faults.push(format!("{name} was not taken"));
                    continue;
                };
                if series.values.len() != count {
                    let found = series.values.len();
                    faults.push(format!("{name} has {found} samples instead of {count}"));
                }
                let is_wrong = |value: &f64| {
                    !value.is_finite()
                        || *value < 0.0
                        || (*value == 0.0 && figure.zeros == Zeros::None)
                };
                let is_counted = series.values.iter().any(|value| *value > 0.0);
                if figure.zeros == Zeros::Some && who == Who::Ours && !is_counted {
                    faults.push(format!("{name} is always 0"));
                }
                if let Some(value) = series.values.iter().find(|value| is_wrong(value)) {
                    faults.push(format!("{name} has a sample of {value}"));
                }
            }
        }
        for Series {
            figure, who, at, ..
        } in &self.series
        {
            // Twice, or in no table.
            if !expected.remove(&(*figure, *who, *at)) {
                faults.push(format!("{figure:?} of {who:?} at {at:?} is one too many"));
            }
        }
        faults
    }
}
