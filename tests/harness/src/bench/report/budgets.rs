//! What this driver allows itself, beside what was measured.

use std::fmt::Write as _;

use anyhow::Result;

use super::number;
use crate::bench::figures::Id;
use crate::bench::raw::{Raw, Who};

pub const INTRODUCTION: &str = "\
What the driver allows itself of a host. Times hold at native speed; an emulated machine shows what memory is charged.
";

struct Budget {
    what: &'static str,
    unit: &'static str,
    at_most: f64,
    /// Whether a number from an emulated machine says anything.
    holds: Holds,
    measured: fn(&Raw) -> Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Everywhere,
    AtNativeSpeed,
}

const BUDGETS: &[Budget] = &[
    Budget {
        what: "StartTask to the first instruction, beyond a scope's own round trip",
        unit: "ms",
        at_most: 2.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| beyond(raw, Id::FirstInstruction, Who::Systemd),
    },
    Budget {
        what: "CPU time charged to the scope, beyond a bare exec of the command",
        unit: "ms",
        at_most: 1.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| beyond(raw, Id::CpuInScope, Who::ForkExec),
    },
    Budget {
        what: "private memory beside the command, for each task",
        unit: "KiB",
        at_most: 0.3 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| median(raw, Id::PrivateMemory, None),
    },
    Budget {
        what: "resident memory of the plugin with no task",
        unit: "KiB",
        at_most: 8.0 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| median(raw, Id::PluginResident, Some(0)),
    },
    Budget {
        what: "the same for each further task",
        unit: "KiB",
        at_most: 12.0,
        holds: Holds::Everywhere,
        measured: growth,
    },
    Budget {
        what: "resident memory of the plugin 10 s after its last task",
        unit: "KiB",
        at_most: 8.0 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| median(raw, Id::ResidentGivenBack, Some(raw.size.largest_crowd())),
    },
    Budget {
        what: "StopTask's answer after the command's last instruction",
        unit: "ms",
        at_most: 10.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| median(raw, Id::EndToStop, None),
    },
    Budget {
        what: "CPU of the plugin while the most tasks idle",
        unit: "% of a CPU",
        at_most: 1.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| median(raw, Id::IdleOfPlugin, Some(raw.size.largest_crowd())),
    },
];

fn median(raw: &Raw, figure: Id, at: Option<u64>) -> Option<f64> {
    Some(raw.summary(figure, Who::Ours, at)?.median)
}

fn beyond(raw: &Raw, figure: Id, base: Who) -> Option<f64> {
    let base = raw.summary(figure, base, None)?;
    Some(median(raw, figure, None)? - base.median)
}

/// From one task to the most: the first brings what the others share.
fn growth(raw: &Raw) -> Option<f64> {
    let (few, many) = (1, raw.size.largest_crowd());
    let of = |count| median(raw, Id::PluginResident, Some(count));
    (many > few).then_some((of(many)? - of(few)?) / (many - few) as f64)
}

pub fn table(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(text, "\n| {} | at most | measured | |", raw.guest)?;
    writeln!(text, "| --- | ---: | ---: | --- |")?;
    for budget in BUDGETS {
        if budget.holds == Holds::AtNativeSpeed && !raw.is_native() {
            continue;
        }
        let Some(measured) = (budget.measured)(raw) else {
            continue;
        };
        let verdict = match measured <= budget.at_most {
            true => "met",
            false => "**missed**",
        };
        writeln!(
            text,
            "| {} | {} {} | {} | {verdict} |",
            budget.what,
            number(budget.at_most),
            budget.unit,
            number(measured)
        )?;
    }
    Ok(())
}
