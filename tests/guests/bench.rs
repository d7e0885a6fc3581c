//! The benchmark, as small as it can be: that every figure is really taken. How high they are is for people to read.

use anyhow::{Result, ensure};
use harness::bench::raw::{Raw, Series, Who};
use harness::bench::size::{Asked, Size};
use harness::bench::{Candidates, Controllers, Listener, measure, run};
use harness::guest::{Case, Context};

use crate::case;

pub const CASES: &[Case] = &[
    case!(Programs, Ours, every_figure_is_taken, Long),
    case!(ProgramLimits, Ours, every_figure_is_taken_of_limits, Long),
];

#[derive(Debug, Default)]
struct Kept(Vec<Series>);

impl Listener for Kept {
    fn progress(&mut self, what: &str) {
        println!("{what}");
    }

    fn version(&mut self, _: Who, version: String) {
        println!("{version}");
    }

    fn series(&mut self, series: Series) {
        self.0.push(series);
    }
}

fn every_figure_is_taken(context: &Context) -> Result<()> {
    let candidates = Candidates {
        ours: context.driver(),
        exec2: None,
    };
    let size = Size::of(Asked::Smoke, Controllers::here()?);
    let mut kept = Kept::default();
    context.block_on(measure(&candidates, &size, &mut kept))?;
    let raw = Raw {
        guest: context.guest().to_string(),
        size,
        host: run::host()?,
        series: kept.0,
    };
    let faults = raw.faults();
    ensure!(faults.is_empty(), "{faults:#?}");
    context.note(format!("{} series", raw.series.len()));
    Ok(())
}

/// The same with the controllers there.
fn every_figure_is_taken_of_limits(context: &Context) -> Result<()> {
    ensure!(
        Controllers::here()? == Controllers::All,
        "this guest has no limits"
    );
    every_figure_is_taken(context)
}
