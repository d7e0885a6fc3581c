//! The manual pages and shell completions in `packaging/`, from the command line's own definition, the key tables, the default
//! paths and the transcripts of README.md.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap_complete::aot::{Shell, generate};
use clap_mangen::Man;
use nomad_driver_exec2::cli;
use nomad_driver_exec2::config::schema::{self, Key};
use nomad_driver_exec2::plan::unveil;
use roff::{Inline, Roff, bold, roman};

use crate::transcript::transcripts;

const NAME: &str = "nomad-driver-exec2";
const MANUAL: &str = "System Administration";
/// The main page as it is written, with lines `@plugin-keys@`, `@task-keys@`, `@default-paths@` and `@transcript NAME@`.
pub const MAIN_PAGE: &str = "packaging/man/nomad-driver-exec2.8.in";

/// Every generated file, by its path below the project's root.
pub fn pages(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut command = cli::command();
    command.build();
    let mut files = BTreeMap::new();
    let man = Path::new("packaging/man");
    files.insert(man.join(format!("{NAME}.8")), main_page(root)?);
    for subcommand in command.get_subcommands() {
        if subcommand.get_name() != "help" {
            let page = subcommand_page(subcommand)?;
            files.insert(
                man.join(format!("{NAME}-{}.8", subcommand.get_name())),
                page,
            );
        }
    }
    for (shell, extension) in [
        (Shell::Bash, "bash"),
        (Shell::Zsh, "zsh"),
        (Shell::Fish, "fish"),
    ] {
        let text = match shell {
            Shell::Bash => bash()?,
            shell => completion(shell, NAME)?,
        };
        let path = Path::new("packaging/completion").join(format!("{NAME}.{extension}"));
        files.insert(path, text);
    }
    Ok(files)
}

/// What clap_complete makes of the command line, for a command of that name.
pub fn completion(shell: Shell, name: &str) -> Result<String> {
    let mut text = Vec::new();
    generate(shell, &mut cli::command(), name, &mut text);
    Ok(String::from_utf8(text)?)
}

/// With a hyphen in the command's name, clap_complete 4.6 writes one name of a subcommand where it is found and another where its
/// options are, so that none is ever offered.
fn bash() -> Result<String> {
    let plain = NAME.replace('-', "_");
    let (from, to) = (
        format!(" -o default {plain}\n"),
        format!(" -o default {NAME}\n"),
    );
    let text = completion(Shell::Bash, &plain)?;
    let count = text.matches(&from).count();
    ensure!(
        count == 2,
        "clap_complete registers a bash completion in {count} lines, and not in two"
    );
    Ok(text.replace(&from, &to))
}

fn main_page(root: &Path) -> Result<String> {
    let read = |path: &str| {
        std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))
    };
    let transcripts = transcripts(&read("README.md")?)?;
    let mut page = String::new();
    for line in read(MAIN_PAGE)?.lines() {
        let name = line
            .strip_prefix('@')
            .and_then(|line| line.strip_suffix('@'));
        match name {
            None => {
                page.push_str(line);
                page.push('\n');
            }
            Some("plugin-keys") => page.push_str(&keys(schema::PLUGIN)),
            Some("task-keys") => page.push_str(&keys(schema::TASK)),
            Some("default-paths") => page.push_str(&default_paths()),
            Some(name) => {
                let shown = name
                    .strip_prefix("transcript ")
                    .and_then(|name| transcripts.iter().find(|shown| shown.name == name));
                match shown {
                    Some(shown) => page.push_str(&verbatim(&shown.text)),
                    None => bail!("{MAIN_PAGE} asks for {name}, which README.md has not"),
                }
            }
        }
    }
    Ok(page)
}

fn keys(keys: &[Key]) -> String {
    let mut roff = Roff::new();
    for key in keys {
        let default = key.default_literal().map_or_else(
            || "required".to_owned(),
            |literal| format!("default {literal}"),
        );
        roff.control("TP", []);
        roff.text([
            bold(key.name),
            roman(format!(" ({}, {default})", key.kind.in_words())),
        ]);
        roff.text(inline_code(key.doc));
    }
    roff.to_roff()
}

/// Markdown's backticks as bold.
fn inline_code(text: &str) -> Vec<Inline> {
    let parts = text.split('`').enumerate();
    parts
        .map(|(index, part)| match index % 2 {
            0 => roman(part),
            _ => bold(part),
        })
        .collect()
}

fn default_paths() -> String {
    let mut roff = Roff::new();
    for (mode, paths) in unveil::DEFAULTS {
        roff.control("TP", []);
        roff.text([bold(mode.to_string())]);
        roff.text([roman(paths.join(", "))]);
    }
    roff.to_roff()
}

fn verbatim(text: &str) -> String {
    let mut roff = Roff::new();
    roff.control("PP", []);
    roff.control("EX", []);
    for line in text.trim_end().lines() {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
    roff.to_roff()
}

/// What stands after the options in `--help` is split: text goes to the description, paragraphs with a heading get sections of
/// their own, as they stand, since they have columns and examples.
fn subcommand_page(command: &clap::Command) -> Result<String> {
    let name = format!("{NAME}-{}", command.get_name());
    let about = command.get_about().map(ToString::to_string);
    let after = command.get_after_help().map(ToString::to_string);
    let after = after.unwrap_or_default();
    let (headed, text): (Vec<&str>, Vec<&str>) = after
        .split("\n\n")
        .partition(|paragraph| heading(paragraph).is_some());
    let man = Man::new(command.clone());

    // Roff leaves out the empty date.
    let mut page = format!(".TH {name} 8 \"\" {NAME} \"{MANUAL}\"\n").into_bytes();
    let mut roff = Roff::new();
    roff.control("nh", []);
    roff.control("ad", ["l"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - {}", about.unwrap_or_default()))]);
    page.extend(roff.to_roff().into_bytes());
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    let mut roff = Roff::new();
    for paragraph in text {
        roff.control("PP", []);
        roff.text(inline_code(&paragraph.replace('\n', " ")));
    }
    page.extend(roff.to_roff().into_bytes());
    man.render_options_section(&mut page)?;
    let mut roff = Roff::new();
    for paragraph in headed {
        let heading = heading(paragraph).unwrap_or_default();
        roff.control("SH", [heading.to_uppercase().as_str()]);
        roff.control("EX", []);
        for line in paragraph.lines().skip(1) {
            roff.text([roman(line)]);
        }
        roff.control("EE", []);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold(NAME), roman("(8)")]);
    page.extend(roff.to_roff().into_bytes());
    Ok(String::from_utf8(page)?)
}

fn heading(paragraph: &str) -> Option<&str> {
    paragraph.lines().next()?.strip_suffix(':')
}

/// A table's row of README.md for a key.
pub fn readme_row(key: &Key) -> String {
    let default = key.default_literal();
    format!(
        "| `{}` | {} | {} | {} |",
        key.name,
        key.kind.in_words(),
        default.map_or_else(|| "required".to_owned(), |literal| format!("`{literal}`")),
        key.doc
    )
}
