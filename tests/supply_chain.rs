//! What we are built from: deny.toml's lists held against Cargo.lock and cargo's own account of it, without a tool or a network.
//! `make audit` asks the advisories, too.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use semver::{Version, VersionReq};
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The words in quotes of a list in deny.toml, line by line.
fn list(key: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("deny.toml")).unwrap();
    let mut lines = text
        .lines()
        .skip_while(|line| *line != format!("{key} = ["));
    lines
        .next()
        .unwrap_or_else(|| panic!("deny.toml has no {key}"));
    let entries = lines.take_while(|line| *line != "]");
    let entries = entries.filter(|line| !line.trim_start().starts_with('#'));
    let words: Vec<String> = entries
        .map(|line| line.split('"').nth(1).unwrap().to_owned())
        .collect();
    assert!(!words.is_empty());
    words
}

/// Every package of the graph on Linux. `--locked` fails if Cargo.lock is not what Cargo.toml asks for.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--locked",
            "--format-version=1",
            "--filter-platform=x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().clone();
    assert!(
        packages.len() > 50,
        "this is no graph of ours: {packages:?}"
    );
    packages
}

fn text<'a>(package: &'a Value, key: &str) -> &'a str {
    package[key].as_str().unwrap_or_default()
}

/// An SPDX expression as crates write them: `AND` of `OR`s, with the slash of old.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace(['(', ')'], "").replace('/', " OR ");
    expression.split(" AND ").all(|part| {
        part.split(" OR ")
            .any(|licence| allowed.iter().any(|it| it == licence.trim()))
    })
}

#[test]
fn every_package_is_ours_or_from_crates_io_with_its_checksum() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let mut ours = BTreeSet::new();
    for package in lock.split("[[package]]").skip(1) {
        let value = |key: &str| {
            let line = package
                .lines()
                .find(|line| line.starts_with(&format!("{key} = ")));
            line.map(|line| line.split('"').nth(1).unwrap().to_owned())
        };
        let name = value("name").unwrap();
        match value("source").as_deref() {
            Some("registry+https://github.com/rust-lang/crates.io-index") => {
                assert!(
                    value("checksum").is_some_and(|sum| sum.len() == 64),
                    "{name}"
                );
            }
            Some(source) => panic!("{name} is from {source}"),
            None => {
                ours.insert(name);
            }
        }
    }
    assert_eq!(
        ours,
        ["harness", "nomad-driver-exec2"].map(str::to_owned).into()
    );
}

#[test]
fn every_licence_is_one_that_deny_toml_allows() {
    let allowed = list("allow");
    assert!(is_allowed("(MIT OR GPL-3.0) AND Zlib", &allowed));
    assert!(!is_allowed("(MIT OR Apache-2.0) AND GPL-3.0", &allowed));
    for package in packages() {
        let licence = text(&package, "license");
        assert!(
            is_allowed(licence, &allowed),
            "{} is under {licence:?}",
            text(&package, "name")
        );
    }
}

/// deny.toml names a crate by the older version, as in `syn@2`.
#[test]
fn no_crate_comes_in_two_versions_but_for_those_of_deny_toml() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in packages() {
        let name = text(&package, "name").to_owned();
        versions
            .entry(name)
            .or_default()
            .insert(text(&package, "version").to_owned());
    }
    let skipped = list("skip");
    for skip in &skipped {
        let (name, old) = skip.split_once('@').unwrap();
        let known = versions
            .get_mut(name)
            .unwrap_or_else(|| panic!("{skip} is not used"));
        let before = known.len();
        known.retain(|version| !version.starts_with(&format!("{old}.")));
        assert!(
            known.len() == before - 1 && before > 1,
            "{skip} is no duplicate: {known:?}"
        );
    }
    versions.retain(|_, known| known.len() > 1);
    assert!(versions.is_empty(), "{versions:?}");
}

/// A line of tests/advisories.txt.
struct Advisory<'a> {
    id: &'a str,
    package: &'a str,
    /// A hole where it is none of these.
    kind: &'a str,
    fine: Vec<VersionReq>,
}

impl Advisory<'_> {
    fn affects(&self, version: &str) -> bool {
        let version = Version::parse(version).unwrap();
        !self.fine.iter().any(|range| range.matches(&version))
    }
}

fn advisories(text: &str) -> Vec<Advisory<'_>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let [id, package, kind, fine] = line.split('\t').collect::<Vec<_>>()[..] else {
                panic!("{line}");
            };
            let ranges = fine.split(" | ").filter(|range| !range.is_empty());
            Advisory {
                id,
                package,
                kind,
                fine: ranges
                    .map(|range| VersionReq::parse(range).unwrap())
                    .collect(),
            }
        })
        .collect()
}

/// As of the snapshot's day; `make audit` knows of later ones.
#[test]
fn no_package_has_an_advisory_of_the_snapshot() {
    let snapshot = fs::read_to_string(root().join("tests/advisories.txt")).unwrap();
    let advisories = advisories(&snapshot);
    assert!(advisories.len() > 900, "{} advisories", advisories.len());
    let h2 = |version: &str| {
        let of_h2 = advisories
            .iter()
            .filter(|advisory| advisory.package == "h2");
        of_h2.filter(|advisory| advisory.affects(version)).count()
    };
    assert_eq!((h2("0.4.15"), h2("0.4.16")), (1, 0));
    assert!(
        advisories
            .iter()
            .any(|it| it.kind == "unmaintained" && it.fine.is_empty())
    );

    let found: Vec<String> = packages()
        .iter()
        .flat_map(|package| {
            let (name, version) = (text(package, "name"), text(package, "version"));
            let its = advisories.iter().filter(move |it| it.package == name);
            its.filter(move |it| it.affects(version))
                .map(move |it| format!("{name} {version}: {} {}", it.id, it.kind))
        })
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}
