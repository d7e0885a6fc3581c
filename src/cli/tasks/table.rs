//! How tasks are shown to people: a table with sizes and times as people read them.

use super::survey::{State, Task};
use crate::cli::terminal::{Colour, Colours};

pub const COLUMNS: [&str; 10] = [
    "UNIT",
    "STATE",
    "TASK",
    "ALLOC",
    "PID",
    "AGE",
    "MEMORY",
    "CPU",
    "THROTTLED",
    "OWNER",
];
/// The column that is coloured.
const STATE: usize = 1;
const BETWEEN: &str = "  ";
/// Characters of a node's id that tell it from others, as Nomad shows it.
const SHORT_ID: usize = 8;

/// A line for each task below a header; nothing for none.
pub fn table(tasks: &[Task], colours: Colours) -> String {
    if tasks.is_empty() {
        return String::new();
    }
    let rows: Vec<_> = tasks.iter().map(cells).collect();
    let header = COLUMNS.map(str::to_owned);
    let width = |column: usize| {
        let cells = rows.iter().chain([&header]);
        cells.map(|row| row[column].chars().count()).max()
    };
    let widths: [usize; COLUMNS.len()] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = line(&header, &widths, None);
    for (row, task) in rows.iter().zip(tasks) {
        let colour = match colours {
            Colours::Some => colour(task.state),
            Colours::None => None,
        };
        text.push_str(&line(row, &widths, colour));
    }
    text
}

fn line(cells: &[String], widths: &[usize], colour: Option<Colour>) -> String {
    let mut line = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let cell_and_room = format!("{cell:width$}{BETWEEN}");
        match colour.filter(|_| column == STATE) {
            Some(colour) => line.push_str(&colour.paint(&cell_and_room)),
            None => line.push_str(&cell_and_room),
        }
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

fn colour(state: State) -> Option<Colour> {
    match state {
        State::Running => Some(Colour::Green),
        State::Starting => None,
        State::Frozen => Some(Colour::Cyan),
        State::Ended => Some(Colour::Yellow),
        State::Orphan | State::Leftover => Some(Colour::Red),
    }
}

fn cells(task: &Task) -> [String; COLUMNS.len()] {
    let known = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let limited = |used: Option<String>, limit: Option<String>| match limit {
        Some(limit) => format!("{}/{limit}", known(used)),
        None => known(used),
    };
    let state = task.state.name();
    let how = task
        .exit_signal
        .clone()
        .or_else(|| task.exit_code.map(|code| code.to_string()));
    [
        task.unit.clone(),
        how.map_or(state.into(), |how| format!("{state} ({how})")),
        task.task.clone(),
        known(task.alloc.clone()),
        known(task.pid.map(|pid| pid.to_string())),
        known(task.age_sec.map(seconds)),
        limited(task.memory_bytes.map(size), task.memory_max_bytes.map(size)),
        limited(
            task.cpu_usec.map(cpu_time),
            task.cpu_quota_usec_per_sec.map(percent),
        ),
        known(throttled(task)),
        known(task.owner.as_deref().map(owner)),
    ]
}

/// How many of the periods in which it ran ended with the quota used up; rounded up, so that 0% is never.
fn throttled(task: &Task) -> Option<String> {
    let percent = (task.cpu_throttled_periods? * 100).div_ceil(task.cpu_periods?.max(1));
    Some(format!("{percent}%"))
}

fn owner(owner: &str) -> String {
    match owner.strip_prefix("node ") {
        Some(id) => format!("node {}", id.chars().take(SHORT_ID).collect::<String>()),
        None => owner.to_owned(),
    }
}

/// `600K`, `12.5M`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // What would be rounded to 1024 is one of the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let tenths = (value * 10.0).round();
    if tenths % 10.0 == 0.0 {
        format!("{:.0}{}", tenths / 10.0, UNITS[unit])
    } else {
        format!("{:.1}{}", tenths / 10.0, UNITS[unit])
    }
}

/// `296ms`, `12.3s`, `5m12s`.
fn cpu_time(usec: u64) -> String {
    match usec {
        0..1_000_000 => format!("{}ms", usec / 1000),
        1_000_000..60_000_000 => {
            let tenths = usec / 100_000;
            format!("{}.{}s", tenths / 10, tenths % 10)
        }
        _ => seconds(usec / 1_000_000),
    }
}

/// The two largest units: `12s`, `5m12s`, `2h5m`, `4d3h`.
fn seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Of one core; a quota has hundredths of a percent at most.
fn percent(usec_per_sec: u64) -> String {
    let percent = format!("{:.2}", usec_per_sec as f64 / 10_000.0);
    format!("{}%", percent.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Task {
        Task {
            unit: "exec2-web-0a1b2c3d-deadbeef.scope".into(),
            state: State::Running,
            task: "shop/front/web".into(),
            alloc: Some("0a1b2c3d".into()),
            pid: Some(4711),
            age_sec: Some(312),
            memory_bytes: Some(600 << 10),
            memory_max_bytes: Some(128 << 20),
            cpu_usec: Some(296_400),
            cpu_quota_usec_per_sec: Some(500_000),
            cpu_periods: Some(1000),
            cpu_throttled_periods: Some(1),
            owner: Some("node 8f3c2a10-1111-2222-3333-444455556666".into()),
            ..Task::default()
        }
    }

    fn ended() -> Task {
        Task {
            unit: "exec2-t-1-2.scope".into(),
            state: State::Ended,
            exit_code: Some(137),
            exit_signal: Some("SIGKILL".into()),
            task: "t".into(),
            ..Task::default()
        }
    }

    #[test]
    fn a_table_has_aligned_columns_and_a_dash_for_what_is_not_known() {
        let text = table(&[running(), ended()], Colours::None);
        assert_eq!(
            text,
            "\
UNIT                               STATE            TASK            ALLOC     PID   AGE    MEMORY     CPU        THROTTLED  OWNER
exec2-web-0a1b2c3d-deadbeef.scope  running          shop/front/web  0a1b2c3d  4711  5m12s  600K/128M  296ms/50%  1%         node 8f3c2a10
exec2-t-1-2.scope                  ended (SIGKILL)  t               -         -     -      -          -          -          -
"
        );
        assert_eq!(table(&[], Colours::Some), "");
    }

    #[test]
    fn only_the_state_is_coloured() {
        let text = table(&[running()], Colours::Some);
        assert!(text.contains("\x1b[32mrunning  \x1b[0mshop"), "{text}");
        assert_eq!(text.matches('\x1b').count(), 2);
        let text = table(&[running(), ended()], Colours::None);
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn sizes_and_times_are_as_people_read_them() {
        for (bytes, shown) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1K"),
            (1_048_575, "1M"),
            (13_107_200, "12.5M"),
            (128 << 20, "128M"),
            (3 << 29, "1.5G"),
            (u64::MAX, "16777216T"),
        ] {
            assert_eq!(size(bytes), shown);
        }
        for (usec, shown) in [
            (0, "0ms"),
            (999_999, "999ms"),
            (12_345_678, "12.3s"),
            (60_000_000, "1m0s"),
        ] {
            assert_eq!(cpu_time(usec), shown);
        }
        for (age, shown) in [
            (59, "59s"),
            (61, "1m1s"),
            (7_500, "2h5m"),
            (356_400, "4d3h"),
        ] {
            assert_eq!(seconds(age), shown);
        }
        for (quota, shown) in [(500_000, "50%"), (1_000_000, "100%"), (62_500, "6.25%")] {
            assert_eq!(percent(quota), shown);
        }
    }
}
