//! The tables of one guest. All numbers in one come from one run.

use std::fmt::Write as _;

use anyhow::Result;

use super::number;
use crate::bench::figures::{Figure, Id, Of, Part};
use crate::bench::raw::{Raw, Who};
use crate::bench::statistics::Summary;

/// Every candidate's way to the first instruction.
pub fn starts(raw: &Raw, text: &mut String) -> Result<()> {
    let Some(ours) = raw.summary(Id::FirstInstruction, Who::Ours, None) else {
        return Ok(());
    };
    writeln!(
        text,
        "### From the call to the command's first instruction\n"
    )?;
    writeln!(
        text,
        "| | median, ms | 10th to 90th percentile | starts | to this driver |"
    )?;
    writeln!(text, "| --- | ---: | ---: | ---: | ---: |")?;
    let mut rows: Vec<(Who, Summary)> = raw
        .series
        .iter()
        .filter(|series| series.figure == Id::FirstInstruction)
        .filter_map(|series| Some((series.who, Summary::of(&series.values)?)))
        .collect();
    rows.sort_by(|(_, a), (_, b)| a.median.total_cmp(&b.median));
    for (who, row) in rows {
        writeln!(
            text,
            "| {} | {} | {} to {} | {} | {} |",
            who.title(),
            number(row.median),
            number(row.p10),
            number(row.p90),
            row.count,
            ratio(row.median, ours.median)
        )?;
    }
    writeln!(text)?;
    Ok(())
}

/// What else was taken of one task at a time.
pub fn drivers(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(text, "### One task at a time\n")?;
    let peer = raw.peer();
    heading(text, peer)?;
    for figure in Figure::ALL
        .iter()
        .filter(|figure| figure.part == Part::Turns)
    {
        if figure.id == Id::FirstInstruction {
            continue;
        }
        row(raw, figure, None, peer, text)?;
        if figure.of == Of::DriversAndExec
            && let Some(exec) = raw.summary(figure.id, Who::ForkExec, None)
        {
            let title = "of which a bare fork and exec of the command takes";
            let peer = if peer.is_some() { " | |" } else { "" };
            writeln!(
                text,
                "| {title}, {} | {} |{peer}",
                figure.unit,
                spread(&exec)
            )?;
        }
    }
    writeln!(text)?;
    Ok(())
}

pub fn limited(raw: &Raw, text: &mut String) -> Result<()> {
    let points = raw.points(Id::LimitedFirstInstruction, Who::Ours);
    if points.is_empty() {
        return Ok(());
    }
    writeln!(text, "### With limits in force\n")?;
    let peer = raw.peer();
    heading(text, peer)?;
    for figure in Figure::ALL
        .iter()
        .filter(|figure| figure.part == Part::Limited)
    {
        match figure.id {
            Id::LimitedFirstInstruction => {
                for mhz in &points {
                    row(raw, figure, Some((*mhz, "cpu = ")), peer, text)?;
                }
                least_over_most(raw, &points, peer, text)?;
            }
            Id::SleepMemory => row(raw, figure, None, peer, text)?,
            _ => {
                for mhz in &points {
                    row(raw, figure, Some((*mhz, "cpu = ")), peer, text)?;
                }
            }
        }
    }
    writeln!(text)?;
    Ok(())
}

/// What the least quota takes more than the most.
fn least_over_most(raw: &Raw, points: &[u64], peer: Option<Who>, text: &mut String) -> Result<()> {
    let (Some(least), Some(most)) = (points.first(), points.last()) else {
        return Ok(());
    };
    let of = |who, at: u64| raw.summary(Id::LimitedFirstInstruction, who, Some(at));
    let more = |who| Some(of(who, *least)?.median - of(who, *most)?.median);
    let (Some(ours), true) = (more(Who::Ours), least < most) else {
        return Ok(());
    };
    write!(
        text,
        "| what `cpu = {least}` takes more of it than `cpu = {most}`, ms | {} |",
        number(ours)
    )?;
    match peer.map(more) {
        Some(Some(theirs)) => writeln!(text, " {} | {} |", number(theirs), ratio(theirs, ours))?,
        Some(None) => writeln!(text, " | |")?,
        None => writeln!(text)?,
    }
    Ok(())
}

pub fn crowds(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(text, "### As tasks become many\n")?;
    by_points(raw, Part::Crowds, "tasks running", text)
}

pub fn largest_crowd(raw: &Raw, text: &mut String) -> Result<()> {
    let count = raw.size.largest_crowd();
    writeln!(text, "### While {count} tasks run\n")?;
    writeln!(text, "| | | |")?;
    writeln!(text, "| --- | ---: | --- |")?;
    for figure in Figure::ALL
        .iter()
        .filter(|figure| figure.part == Part::LargestCrowd)
    {
        if let Some(value) = raw.summary(figure.id, Who::Ours, Some(count)) {
            let after = match figure.id {
                Id::ResidentGivenBack => format!(", {} s later", raw.size.give_back_sec),
                _ => String::new(),
            };
            let (title, unit) = (figure.title, figure.unit);
            writeln!(
                text,
                "| {title}{after} | {} | {unit} |",
                number(value.median)
            )?;
        }
    }
    writeln!(text)?;
    Ok(())
}

pub fn kernel(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(text, "### The kernel alone\n")?;
    writeln!(text, "| | median | 10th to 90th percentile | |")?;
    writeln!(text, "| --- | ---: | ---: | --- |")?;
    for figure in Figure::ALL
        .iter()
        .filter(|figure| figure.part == Part::Kernel)
    {
        if let Some(row) = raw.summary(figure.id, Who::Kernel, None) {
            writeln!(
                text,
                "| {} | {} | {} to {} | {} |",
                figure.title,
                number(row.median),
                number(row.p10),
                number(row.p90),
                figure.unit
            )?;
        }
    }
    writeln!(text)?;
    Ok(())
}

pub fn bursts(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(text, "### Many at once\n")?;
    writeln!(
        text,
        "| | median, ms | the slowest, ms | all of them, ms | a second |"
    )?;
    writeln!(text, "| --- | ---: | ---: | ---: | ---: |")?;
    for count in raw.points(Id::BurstOfScopes, Who::Systemd) {
        if let Some(whole) = raw.summary(Id::BurstOfScopes, Who::Systemd, Some(count)) {
            writeln!(
                text,
                "| {count} scopes at once, without a driver | | | {} | {} |",
                number(whole.median),
                number(count as f64 / whole.median * 1e3)
            )?;
        }
    }
    for (what, each, whole) in [
        ("starts at once", Id::BurstAnswer, Id::BurstWhole),
        (
            "recoveries, one after the other",
            Id::RecoverAnswer,
            Id::RecoverWhole,
        ),
    ] {
        for count in raw.points(each, Who::Ours) {
            let at = Some(count);
            let (Some(each), Some(whole)) = (
                raw.summary(each, Who::Ours, at),
                raw.summary(whole, Who::Ours, at),
            ) else {
                continue;
            };
            writeln!(
                text,
                "| {count} {what} | {} | {} | {} | {} |",
                number(each.median),
                number(each.max),
                number(whole.median),
                number(count as f64 / whole.median * 1e3)
            )?;
        }
    }
    writeln!(text)?;
    Ok(())
}

pub fn cycles(raw: &Raw, text: &mut String) -> Result<()> {
    writeln!(
        text,
        "### After {} starts and ends, one after the other\n",
        raw.size.cycles
    )?;
    by_points(raw, Part::Cycles, "starts", text)
}

/// Figures as rows, counts as columns.
fn by_points(raw: &Raw, part: Part, of: &str, text: &mut String) -> Result<()> {
    let figures = || Figure::ALL.iter().filter(|figure| figure.part == part);
    let points = figures()
        .map(|figure| raw.points(figure.id, Who::Ours))
        .next()
        .unwrap_or_default();
    let columns: Vec<String> = points.iter().map(|point| format!("{point} {of}")).collect();
    writeln!(text, "| | {} |", columns.join(" | "))?;
    writeln!(text, "| --- |{}", " ---: |".repeat(points.len()))?;
    for figure in figures() {
        let cells: Vec<String> = points
            .iter()
            .map(|point| {
                let summary = raw.summary(figure.id, Who::Ours, Some(*point));
                summary.map_or(String::new(), |summary| spread(&summary))
            })
            .collect();
        writeln!(text, "| {} | {} |", titled(figure), cells.join(" | "))?;
    }
    writeln!(text)?;
    Ok(())
}

fn heading(text: &mut String, peer: Option<Who>) -> Result<()> {
    let ours = Who::Ours.title();
    match peer {
        Some(peer) => {
            writeln!(text, "| | {ours} | {} | to this driver |", peer.title())?;
            writeln!(text, "| --- | ---: | ---: | ---: |")?;
        }
        None => {
            writeln!(text, "| | {ours} |")?;
            writeln!(text, "| --- | ---: |")?;
        }
    }
    Ok(())
}

fn row(
    raw: &Raw,
    figure: &Figure,
    at: Option<(u64, &str)>,
    peer: Option<Who>,
    text: &mut String,
) -> Result<()> {
    let point = at.map(|(point, _)| point);
    let Some(ours) = raw.summary(figure.id, Who::Ours, point) else {
        return Ok(());
    };
    let title = match at {
        Some((point, name)) => format!("{}: `{name}{point}`", titled(figure)),
        None => titled(figure),
    };
    write!(text, "| {title} | {} |", spread(&ours))?;
    match peer.map(|peer| raw.summary(figure.id, peer, point)) {
        Some(Some(theirs)) => writeln!(
            text,
            " {} | {} |",
            spread(&theirs),
            ratio(theirs.median, ours.median)
        )?,
        Some(None) => writeln!(text, " | |")?,
        None => writeln!(text)?,
    }
    Ok(())
}

fn titled(figure: &Figure) -> String {
    match figure.unit {
        "" => figure.title.to_owned(),
        unit => format!("{}, {unit}", figure.title),
    }
}

/// `2.51 (2.3 to 3.1)`, or the value alone where there is one.
pub(super) fn spread(summary: &Summary) -> String {
    let median = number(summary.median);
    match summary.count {
        1 => median,
        _ => format!(
            "{median} ({} to {})",
            number(summary.p10),
            number(summary.p90)
        ),
    }
}

/// How many times this driver's it is.
fn ratio(theirs: f64, ours: f64) -> String {
    match ours > 0.0 {
        true => format!("{:.2} ×", theirs / ours),
        false => String::new(),
    }
}
