//! The chart of a run: how long each candidate takes from the call to the command's first instruction.

use anyhow::Result;
use plotters::prelude::*;

use super::figures::Id;
use super::raw::{Raw, Who};
use super::statistics::Summary;

const WIDTH: u32 = 860;
const ROW: u32 = 46;
const AROUND: u32 = 100;
const LABELS: u32 = 250;
const OURS: RGBColor = RGBColor(0, 98, 155);
const OTHERS: RGBColor = RGBColor(130, 130, 130);

/// The chart as SVG. The same samples give the same text.
pub fn svg(raw: &Raw) -> Result<String> {
    let mut rows: Vec<(Who, Summary)> = raw
        .series
        .iter()
        .filter(|series| series.figure == Id::FirstInstruction)
        .filter_map(|series| Some((series.who, Summary::of(&series.values)?)))
        .collect();
    rows.sort_by(|(_, a), (_, b)| b.median.total_cmp(&a.median));
    let least = rows.iter().map(|(_, row)| row.p10).fold(f64::MAX, f64::min);
    let most = rows.iter().map(|(_, row)| row.p90).fold(0.0, f64::max);
    let names: Vec<String> = rows
        .iter()
        .map(|(who, _)| who.title().replace('`', ""))
        .collect();

    let mut text = String::new();
    {
        let height = AROUND + ROW * rows.len() as u32;
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(
                format!("Start to first instruction, {}", raw.guest),
                ("sans-serif", 18),
            )
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(LABELS)
            .build_cartesian_2d(
                (least / 1.5..most * 1.5).log_scale(),
                (0..rows.len()).into_segmented(),
            )?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(WHITE)
            .x_desc("milliseconds, logarithmic: median, and the 10th to the 90th percentile")
            .x_label_formatter(&|millis| format!("{millis}"))
            .y_label_formatter(&|at| match at {
                SegmentValue::CenterOf(row) => names.get(*row).cloned().unwrap_or_default(),
                _ => String::new(),
            })
            .label_style(("sans-serif", 14))
            .draw()?;
        for (row, (who, summary)) in rows.iter().enumerate() {
            let color = match who {
                Who::Ours => OURS,
                _ => OTHERS,
            };
            let at = SegmentValue::CenterOf(row);
            let spread = vec![(summary.p10, at.clone()), (summary.p90, at.clone())];
            chart.draw_series([PathElement::new(spread, color.stroke_width(5))])?;
            chart.draw_series([Circle::new((summary.median, at), 6, color.filled())])?;
        }
        root.present()?;
    }
    Ok(text)
}
