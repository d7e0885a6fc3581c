//! The compatibility table, and the attacks of SECURITY.md, held against the tests that they name: no row without one, no name
//! that is gone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

// What the guests do with it is not looked at here.
#[allow(dead_code)]
#[path = "guests/attacks/table.rs"]
mod attacks;

use attacks::{THREATS, Threat, Verdict};

/// What a row may say of our behaviour; a difference has its reason after the word.
const VERDICTS: [&str; 3] = ["same", "better", "different"];

/// `| number | behaviour | ours | tests |`.
#[derive(Debug)]
struct Row {
    number: usize,
    behaviour: String,
    ours: String,
    tests: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rows() -> Vec<Row> {
    let text = fs::read_to_string(root().join("tests/compatibility.md")).unwrap();
    text.lines().filter_map(row).collect()
}

/// Rows begin with their number; heads and rules of a table do not.
fn row(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line
        .strip_prefix("| ")?
        .strip_suffix(" |")?
        .split(" | ")
        .collect();
    let number = cells[0].trim().parse().ok()?;
    assert_eq!(cells.len(), 4, "not four cells: {line}");
    // Names are the words in backticks.
    let tests = cells[3].split('`').skip(1).step_by(2);
    Some(Row {
        number,
        behaviour: cells[1].trim().to_owned(),
        ours: cells[2].trim().to_owned(),
        tests: tests.map(str::to_owned).collect(),
    })
}

/// `module::function` lives in a file of tests/ or of src/, or in a module of unit tests beside it.
fn files(module: &str) -> Vec<PathBuf> {
    let path = module.replace("::", "/");
    [
        format!("tests/{path}.rs"),
        format!("tests/{path}/mod.rs"),
        format!("tests/harness/src/{path}.rs"),
        format!("src/{path}.rs"),
        format!("src/{path}/mod.rs"),
        format!("src/{path}/tests.rs"),
    ]
    .map(|file| root().join(file))
    .into_iter()
    .filter(|file| file.is_file())
    .collect()
}

/// Whether the name is that of a test which runs: one with the attribute, or a guest case in its table.
fn exists(name: &str) -> bool {
    let Some((module, function)) = name.rsplit_once("::") else {
        return false;
    };
    files(module).iter().any(|file| {
        let text = fs::read_to_string(file).unwrap();
        if module.starts_with("guests::") {
            let packed: String = text.split_whitespace().collect();
            // Its name ends the row, or comes before how it is run.
            let is_listed = [",", ")"].map(|end| format!(",{function}{end}"));
            return is_listed.iter().any(|row| packed.contains(row))
                && packed.contains(&format!("fn{function}("));
        }
        ["#[test]", "#[tokio::test"].iter().any(|mark| {
            let names = text
                .split(mark)
                .skip(1)
                .filter_map(|after| after.split_once("fn "));
            names
                .into_iter()
                .any(|(_, rest)| rest.starts_with(&format!("{function}(")))
        })
    })
}

#[test]
fn the_rows_are_numbered_one_by_one() {
    let rows = rows();
    assert!(rows.len() > 100, "{} rows", rows.len());
    for (index, row) in rows.iter().enumerate() {
        assert_eq!(row.number, index + 1, "{}", row.behaviour);
    }
}

#[test]
fn every_row_says_how_we_compare_and_why_we_differ() {
    for row in rows() {
        let (verdict, reason) = row.ours.split_once([':', ';']).unwrap_or((&row.ours, ""));
        assert!(
            VERDICTS.contains(&verdict.trim()) && !row.behaviour.is_empty(),
            "row {}: {:?} is none of {VERDICTS:?}",
            row.number,
            row.ours
        );
        assert!(
            verdict == "same" || !reason.trim().is_empty(),
            "row {} does not say what is {verdict}",
            row.number
        );
    }
}

#[test]
fn every_row_names_tests_that_exist() {
    let mut wrong = Vec::new();
    for row in rows() {
        if row.tests.is_empty() {
            wrong.push(format!(
                "row {} names no test: {}",
                row.number, row.behaviour
            ));
        }
        for test in row.tests.iter().filter(|test| !exists(test)) {
            wrong.push(format!("row {}: there is no test {test}", row.number));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_name_is_found_only_where_a_test_of_that_name_runs() {
    assert!(exists("guests::life::a_stop_leaves_nothing"));
    assert!(exists("plan::limits::mhz_are_a_share_of_one_core"));
    assert!(exists("plugin::about::it_can_what_it_says"));
    assert!(!exists("guests::life::join_all"));
    assert!(!exists("guests::life::no_such_case"));
    assert!(!exists("plugin::about::attr"));
    assert!(!exists("nowhere"));
}

/// An attempt that may succeed is in italics.
fn row_of(threat: &Threat) -> String {
    let attempts = threat.attempts.iter().map(|attempt| match attempt.verdict {
        Verdict::Stopped => attempt.name.to_owned(),
        Verdict::ByDesign(_) => format!("*{}*", attempt.name),
    });
    let tests = threat.tests.iter().map(|test| format!("`{test}`"));
    let cell = |words: Vec<String>, between| match words.as_slice() {
        [] => "-".to_owned(),
        words => words.join(between),
    };
    format!(
        "| {} | {} | {} | {} | {} |",
        threat.name,
        threat.who,
        threat.stopped_by,
        cell(attempts.collect(), ", "),
        cell(tests.collect(), " ")
    )
}

#[test]
fn security_md_has_the_attacks_that_are_tried() {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let table: Vec<String> = THREATS.iter().map(row_of).collect();
    let table = table.join("\n");
    assert!(
        text.contains(&format!("|---|---|---|---|---|\n{table}\n\n")),
        "SECURITY.md lacks this table:\n{table}"
    );
}

#[test]
fn each_attack_is_tried_and_what_is_open_is_said() {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let attacker = fs::read_to_string(root().join("tests/guests/attacks/attacker.pl")).unwrap();
    for threat in THREATS {
        let tried = threat.attempts.len() + threat.tests.len();
        assert!(tried > 0, "nobody tries it: {}", threat.name);
        for test in threat.tests {
            assert!(exists(test), "there is no test {test}");
        }
        for attempt in threat.attempts {
            let name = format!("    \"{}\" ", attempt.name);
            assert!(attacker.contains(&name), "{} is not tried", attempt.name);
            if let Verdict::ByDesign(words) = attempt.verdict {
                assert!(text.contains(words), "SECURITY.md does not say {words:?}");
            }
        }
    }
}

/// Words that no test has, so that each of them is judged as it is.
#[test]
fn only_a_refusal_counts_as_one() {
    use attacks::{Control, Kernel, Outcome, Whose, judge};
    let attempt = &THREATS[0].attempts[0];
    assert_eq!(
        (attempt.verdict, attempt.control),
        (Verdict::Stopped, Control::Succeeds)
    );
    let kernel = |whose| Kernel { abi: 1, whose };
    let said = |line| Outcome::parse(line).map(|(_, outcome)| outcome);
    let stopped = said("x stopped: Permission denied");
    assert_eq!(
        judge(attempt, stopped, kernel(Whose::Own)).unwrap(),
        "stopped (Permission denied)"
    );
    for line in [
        "x succeeded",
        "x untried: it died of signal 14 with code 0",
        "x untried: there is no such attempt at -e line 2.",
        "x stopped: Invalid argument",
        "x",
    ] {
        for whose in [Whose::Own, Whose::Host] {
            judge(attempt, said(line), kernel(whose)).unwrap_err();
        }
    }
}
