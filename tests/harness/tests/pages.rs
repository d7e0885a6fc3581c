//! What is generated from the code is as it is committed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use harness::pages::{MAIN_PAGE, pages, readme_row};
use harness::transcript::transcripts;
use nomad_driver_exec2::config::schema;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn manual_pages_and_completions_are_what_the_code_generates() {
    let pages = pages(root()).unwrap();
    for (path, text) in &pages {
        let committed = fs::read_to_string(root().join(path)).unwrap_or_default();
        assert!(
            *text == committed,
            "{} is not what is generated: run `make pages`",
            path.display()
        );
    }
    for dir in ["packaging/man", "packaging/completion"] {
        for entry in fs::read_dir(root().join(dir)).unwrap() {
            let path = Path::new(dir).join(entry.unwrap().file_name());
            assert!(
                pages.contains_key(&path) || path == Path::new(MAIN_PAGE),
                "{} is not generated",
                path.display()
            );
        }
    }
}

#[test]
fn the_readme_has_every_key_as_its_table_has_it() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for key in schema::PLUGIN.iter().chain(schema::TASK) {
        let row = readme_row(key);
        assert!(
            readme.lines().any(|line| line == row),
            "README.md lacks: {row}"
        );
    }
}

#[test]
fn every_terminal_that_the_readme_shows_is_typed_again_by_a_case() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let transcripts = transcripts(&readme).unwrap();
    assert_eq!(transcripts.len(), readme.matches("```console").count());
    let cases = fs::read_to_string(root().join("tests/guests/transcripts.rs")).unwrap();
    for transcript in transcripts {
        let compared = format!("compare(context, \"{}\"", transcript.name);
        assert!(cases.contains(&compared), "{}", transcript.name);
    }
}
