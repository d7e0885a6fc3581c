#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use super::*;
use crate::bench::Controllers;
use crate::bench::figures::{Figure, Id, Part};
use crate::bench::raw::{Host, Series};
use crate::bench::size::{Asked, Size};

/// A whole run with made-up samples.
fn raw(guest: &str, has_exec2: bool) -> Raw {
    let controllers = match guest.ends_with("-qemu") {
        true => Controllers::All,
        false => Controllers::None,
    };
    let size = Size::of(Asked::Smoke, controllers);
    let mut series = Vec::new();
    for figure in Figure::ALL {
        for (who, at, count) in figure.expected(&size, controllers, has_exec2) {
            let values = (1..=count).map(|value| value as f64 * 1.5).collect();
            series.push(Series {
                figure: figure.id,
                who,
                at,
                values,
            });
        }
    }
    Raw {
        guest: guest.into(),
        size,
        host: Host {
            commit: "0123456789ab".into(),
            processor: "a processor".into(),
            ..Host::default()
        },
        series,
    }
}

#[test]
fn every_figure_stands_once_in_the_table() {
    let ids: BTreeSet<Id> = Figure::ALL.iter().map(|figure| figure.id).collect();
    assert_eq!(ids.len(), Figure::ALL.len());
    assert!(Figure::of(Id::CycledSystemdResident).is_some());
}

#[test]
fn a_whole_run_has_no_fault_and_survives_its_file() {
    for (guest, has_exec2) in [("trixie-nspawn", false), ("trixie-qemu", true)] {
        let raw = raw(guest, has_exec2);
        assert_eq!(raw.faults(), Vec::<String>::new());
        assert_eq!(Raw::parse(&raw.text().unwrap()).unwrap(), raw);
    }
}

#[test]
fn what_was_not_taken_or_cannot_be_is_a_fault() {
    let mut raw = raw("trixie-nspawn", false);
    raw.series.retain(|series| series.figure != Id::BurstWhole);
    for series in &mut raw.series {
        match series.figure {
            Id::StartAnswer => series.values[0] = 0.0,
            Id::ExitToWait => series.values[0] = f64::NAN,
            Id::EndToStop => drop(series.values.pop()),
            Id::IdleOfBus => series.values[0] = 0.0,
            Id::CpuOfBus => series.values.fill(0.0),
            _ => {}
        }
    }
    raw.series.push(Series {
        figure: Id::SleepMemory,
        who: Who::Ours,
        at: None,
        values: vec![1.0],
    });
    let faults = raw.faults().join("\n");
    assert_eq!(faults.lines().count(), 6, "{faults}");
    for word in [
        "BurstWhole",
        "StartAnswer",
        "ExitToWait",
        "EndToStop",
        "CpuOfBus of Ours at None is always 0",
        "SleepMemory of Ours at None is one too many",
    ] {
        assert!(faults.contains(word), "{faults}");
    }
}

#[test]
fn the_page_has_each_guest_its_chart_and_the_peer_where_it_ran() {
    let files = files(&[raw("trixie-nspawn", false), raw("trixie-qemu", true)]).unwrap();
    let names: Vec<_> = files
        .iter()
        .map(|(path, _)| path.to_str().unwrap())
        .collect();
    let expected = [
        "BENCHMARKS.md",
        "benchmarks/start-trixie-nspawn.svg",
        "benchmarks/start-trixie-qemu.svg",
    ];
    assert_eq!(names, expected);
    let page = &files[0].1;
    let (native, emulated) = page.split_once("\n## trixie-qemu").unwrap();
    let (_, native) = native.split_once("\n## trixie-nspawn").unwrap();
    assert!(!native.contains("| HashiCorp's exec2 |"), "{native}");
    assert!(emulated.contains("| this driver | HashiCorp's exec2 | to this driver |"));
    for figure in Figure::ALL {
        // These two have tables of their own making.
        let is_whole = matches!(figure.part, Part::Bursts) || figure.id == Id::FirstInstruction;
        assert!(is_whole || page.contains(figure.title), "{}", figure.title);
    }
    assert!(!page.contains("NaN"), "{page}");
    for chart in &files[1..] {
        assert!(chart.1.starts_with("<svg") && chart.1.contains("this driver"));
    }
}

#[test]
fn a_budget_is_met_or_missed() {
    let mut raw = raw("trixie-nspawn", false);
    let mut page = String::new();
    budgets::table(&raw, &mut page).unwrap();
    let line = |page: &str| -> String {
        let of = |line: &&str| line.contains("private memory");
        page.lines().find(of).unwrap().to_owned()
    };
    assert!(line(&page).ends_with("| met |"), "{page}");
    for series in &mut raw.series {
        if series.figure == Id::CrowdPrivateMemory {
            series.values.fill(400.0);
        }
    }
    page.clear();
    budgets::table(&raw, &mut page).unwrap();
    assert!(
        line(&page).ends_with("| 400 (400 to 400) | **missed** |"),
        "{page}"
    );
}

#[test]
fn numbers_have_three_digits() {
    let shown = [0.0, 0.0123, 1.234, 12.34, 1234.6, 14.0].map(number);
    assert_eq!(shown, ["0", "0.012", "1.23", "12.3", "1235", "14"]);
}

/// The committed page and charts are what the committed samples give.
#[test]
fn the_committed_report_is_what_the_committed_samples_give() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let raws = read(&root).unwrap();
    for raw in &raws {
        assert_eq!(raw.faults(), Vec::<String>::new(), "{}", raw.guest);
    }
    for (path, text) in files(&raws).unwrap() {
        let found = fs::read_to_string(root.join(&path)).unwrap_or_default();
        assert!(
            found == text,
            "{} is not what the samples give; make it anew with `harness bench report`",
            path.display()
        );
    }
}
