//! The snapshot of RustSec's advisories that `tests/supply_chain.rs` holds Cargo.lock against: what no network is needed for.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// What a version of a crate is not fit for.
#[derive(Debug, PartialEq, Eq)]
struct Advisory {
    id: String,
    package: String,
    /// `unmaintained`, `unsound` or `notice`; else it is a vulnerability.
    kind: String,
    /// Ranges of versions that are patched or were never affected.
    fine: Vec<String>,
}

/// One line for each advisory in a clone of <https://github.com/rustsec/advisory-db>, by its id.
pub fn snapshot(database: &Path) -> Result<String> {
    let mut lines = Vec::new();
    for package in fs::read_dir(database.join("crates"))? {
        for file in fs::read_dir(package?.path())? {
            let path = file?.path();
            let text = fs::read_to_string(&path)?;
            if let Some(advisory) = parse(&text).with_context(|| path.display().to_string())? {
                let Advisory {
                    id,
                    package,
                    kind,
                    fine,
                } = advisory;
                lines.push(format!("{id}\t{package}\t{kind}\t{}\n", fine.join(" | ")));
            }
        }
    }
    lines.sort();
    let date = Command::new("git")
        .arg("-C")
        .arg(database)
        .args(["log", "-1", "--format=%cs"])
        .output()?;
    ensure!(date.status.success(), "{} is no clone", database.display());
    let date = String::from_utf8(date.stdout)?;
    Ok(format!(
        "# The RustSec advisory database of {}: id, crate, kind, and the versions that are not affected.\n{}",
        date.trim(),
        lines.concat()
    ))
}

/// The TOML before an advisory's text; `None` if it was withdrawn.
fn parse(text: &str) -> Result<Option<Advisory>> {
    let text = text.strip_prefix("```toml\n").context("no TOML")?;
    let (toml, _) = text.split_once("\n```").context("no end of the TOML")?;
    let value = |key: &str| {
        let prefix = format!("{key} = \"");
        let line = toml.lines().find_map(|line| line.strip_prefix(&prefix));
        line.map(|rest| rest.trim_end_matches('"').to_owned())
    };
    if value("withdrawn").is_some() {
        return Ok(None);
    }
    let ranges = |key: &str| {
        let list = toml.split(&format!("\n{key} = [")).nth(1);
        let list = list.and_then(|rest| rest.split(']').next());
        let words = list.unwrap_or_default().split('"').skip(1).step_by(2);
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    Ok(Some(Advisory {
        id: value("id").context("no id")?,
        package: value("package").context("no package")?,
        kind: value("informational").unwrap_or_default(),
        fine: [ranges("patched"), ranges("unaffected")].concat(),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_advisory_is_its_ranges() {
        let text = "```toml\n[advisory]\nid = \"RUSTSEC-2026-0001\"\npackage = \"a\"\ninformational = \"unsound\"\n\n[affected.functions]\n\"a::b\" = [\"< 1.2.0\"]\n\n[versions]\npatched = [\n  \">= 1.2.0\",\n  \"< 1.1.0, >= 1.0.9\",\n]\nunaffected = [\"< 1.0.0\"]\n```\n\n# Title\n";
        let advisory = parse(text).unwrap().unwrap();
        let fine = [">= 1.2.0", "< 1.1.0, >= 1.0.9", "< 1.0.0"];
        assert_eq!(
            advisory,
            Advisory {
                id: "RUSTSEC-2026-0001".into(),
                package: "a".into(),
                kind: "unsound".into(),
                fine: fine.map(str::to_owned).to_vec(),
            }
        );
        let withdrawn = text.replace("package", "withdrawn = \"2026-01-02\"\npackage");
        assert_eq!(parse(&withdrawn).unwrap(), None);
    }
}
