//! What this driver allows itself, beside what was measured.

use std::fmt::Write as _;

use anyhow::Result;

use super::number;
use super::tables::spread;
use crate::bench::figures::Id;
use crate::bench::raw::{Raw, Who};
use crate::bench::statistics::Summary;

pub const INTRODUCTION: &str = "\
What the driver allows itself of a host. Times hold at native speed; an emulated machine shows what memory is charged, and how that
and the start compare to HashiCorp's exec2. What is beyond something else is the difference within each round: the median, and
where it was taken in rounds its spread from the 10th to the 90th percentile.
";

struct Budget {
    what: &'static str,
    unit: &'static str,
    at_most: fn(&Raw) -> f64,
    /// Whether a number from an emulated machine says anything.
    holds: Holds,
    measured: fn(&Raw) -> Option<Summary>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Everywhere,
    AtNativeSpeed,
}

const BUDGETS: &[Budget] = &[
    Budget {
        // That is, to its exec.
        what: "StartTask to the first instruction, beyond a scope's own round trip and a bare fork and exec",
        unit: "ms",
        at_most: |_| 2.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| beyond(raw, Id::FirstInstruction, &[Who::Systemd, Who::ForkExec]),
    },
    Budget {
        what: "CPU time charged to the scope, beyond a bare exec of the command",
        unit: "ms",
        at_most: |_| 1.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| beyond(raw, Id::CpuInScope, &[Who::ForkExec]),
    },
    Budget {
        what: "private memory beside the command, for each of many tasks",
        unit: "KiB",
        at_most: |_| 0.3 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| ours(raw, Id::CrowdPrivateMemory, Some(raw.size.largest_crowd())),
    },
    Budget {
        what: "resident memory of the plugin with no task",
        unit: "KiB",
        at_most: |_| 8.0 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| ours(raw, Id::PluginResident, Some(0)),
    },
    Budget {
        what: "the same with the most tasks, and statistics of each every second",
        unit: "KiB",
        at_most: |raw| 8.0 * 1024.0 + 12.0 * raw.size.largest_crowd() as f64,
        holds: Holds::Everywhere,
        measured: |raw| ours(raw, Id::StatsResident, Some(raw.size.largest_crowd())),
    },
    Budget {
        what: "resident memory of the plugin 10 s after its last task",
        unit: "KiB",
        at_most: |_| 8.0 * 1024.0,
        holds: Holds::Everywhere,
        measured: |raw| ours(raw, Id::ResidentGivenBack, Some(raw.size.largest_crowd())),
    },
    Budget {
        what: "StopTask's answer after the command's last instruction",
        unit: "ms",
        at_most: |_| 10.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| ours(raw, Id::EndToStop, None),
    },
    Budget {
        what: "CPU of the plugin while the most tasks idle",
        unit: "% of a CPU",
        at_most: |_| 1.0,
        holds: Holds::AtNativeSpeed,
        measured: |raw| ours(raw, Id::IdleOfPlugin, Some(raw.size.largest_crowd())),
    },
    Budget {
        what: "start to the first instruction",
        unit: "of exec2's",
        at_most: |_| 1.0 / 6.0,
        holds: Holds::Everywhere,
        measured: |raw| of_the_peers(raw, Id::FirstInstruction),
    },
    Budget {
        what: "CPU time charged to the scope",
        unit: "of exec2's",
        at_most: |_| 0.1,
        holds: Holds::Everywhere,
        measured: |raw| of_the_peers(raw, Id::CpuInScope),
    },
    Budget {
        what: "private memory beside the command",
        unit: "of exec2's",
        at_most: |_| 0.1,
        holds: Holds::Everywhere,
        measured: |raw| of_the_peers(raw, Id::PrivateMemory),
    },
    Budget {
        what: "memory charged to a task that runs `sleep`",
        unit: "of exec2's",
        at_most: |_| 0.1,
        holds: Holds::Everywhere,
        measured: |raw| of_the_peers(raw, Id::SleepMemory),
    },
];

fn ours(raw: &Raw, figure: Id, at: Option<u64>) -> Option<Summary> {
    raw.summary(figure, Who::Ours, at)
}

/// Within each round, as what disturbs one candidate disturbs its neighbours.
fn beyond(raw: &Raw, figure: Id, bases: &[Who]) -> Option<Summary> {
    let mut rest = raw.series(figure, Who::Ours, None)?.values.clone();
    for base in bases {
        let base = raw.series(figure, *base, None)?;
        rest.iter_mut()
            .zip(&base.values)
            .for_each(|(rest, base)| *rest -= base);
    }
    Summary::of(&rest)
}

fn of_the_peers(raw: &Raw, figure: Id) -> Option<Summary> {
    let theirs = raw.summary(figure, raw.peer()?, None)?.median;
    Summary::of(&[ours(raw, figure, None)?.median / theirs])
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
        let at_most = (budget.at_most)(raw);
        let verdict = match measured.median <= at_most {
            true => "met",
            false => "**missed**",
        };
        writeln!(
            text,
            "| {} | {} {} | {} | {verdict} |",
            budget.what,
            number(at_most),
            budget.unit,
            spread(&measured)
        )?;
    }
    Ok(())
}
