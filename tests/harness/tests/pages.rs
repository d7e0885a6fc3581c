//! What is generated from the code is as it is committed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap_complete::aot::Shell;
use harness::pages::{MAIN_PAGE, completion, pages, readme_row};
use harness::transcript::transcripts;
use nomad_driver_exec2::cli;
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

/// Lines as far as a person types them before the tab key, and the words that it makes of them.
fn typed() -> Vec<(String, Vec<String>)> {
    let mut typed = Vec::new();
    let mut add = |subcommand: &str, start: &str, whole: &str| {
        let words = [subcommand, whole].map(str::to_owned);
        let words = words.into_iter().filter(|word| !word.is_empty()).collect();
        let line = ["nomad-driver-exec2", subcommand, start].join(" ");
        typed.push((line.replace("  ", " "), words));
    };
    let mut command = cli::command();
    command.build();
    for subcommand in command.get_subcommands() {
        let name = subcommand.get_name();
        add("", &name[..name.len() - 1], name);
        let options = subcommand.get_arguments().filter_map(|it| it.get_long());
        for option in options.filter(|option| *option != "help") {
            let whole = format!("--{option}");
            add(name, &whole[..whole.len() - 1], &whole);
        }
    }
    add("check", "we", "web.nomad.hcl");
    add("run", "we", "web.nomad.hcl");
    assert!(typed.len() > 30, "{typed:?}");
    typed
}

/// A directory with a job file, in which a shell types.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Desk {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("web.nomad.hcl"), "").unwrap();
        Desk { dir }
    }

    /// The script's stdout, if it has nothing to complain of.
    fn run(&self, program: &str, arguments: &[&str], script: &str) -> String {
        // Without a terminal, or an interactive one would take that of who runs the tests; and not for ever.
        let mut shell = Command::new("setsid")
            .args(["--wait", "timeout", "60", program])
            .args(arguments)
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path())
            .env("INPUTRC", "/dev/null")
            .env("TERM", "dumb")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{program}: {error}; tests/harness/host-setup installs it")
            });
        let mut stdin = shell.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        let output = shell.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command of the name was called with, once for each line that was typed.
    fn called(&self) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.dir.path().join("called")).unwrap();
        let lines = text.lines();
        lines
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect()
    }
}

fn completion_file(extension: &str) -> PathBuf {
    root()
        .join("packaging/completion")
        .join(format!("nomad-driver-exec2.{extension}"))
}

fn assert_completed(called: &[Vec<String>], typed: &[(String, Vec<String>)]) {
    for (index, (line, words)) in typed.iter().enumerate() {
        assert_eq!(called.get(index), Some(words), "{line}: {called:#?}");
    }
    assert_eq!(called.len(), typed.len());
}

const FAKE: &str = "nomad-driver-exec2() { echo \"$*\" >> called; }";

#[test]
fn bash_completes_commands_options_and_files() {
    let desk = Desk::new();
    let typed = typed();
    let lines: String = typed
        .iter()
        .map(|(line, _)| format!("{line}\t\n"))
        .collect();
    let file = completion_file("bash");
    // Interactive, it edits lines of a pipe, too.
    let script = format!("{FAKE}\n. {}\n{lines}exit 0\n", file.display());
    desk.run("bash", &["--norc", "--noprofile", "-i"], &script);
    assert_completed(&desk.called(), &typed);

    let offered = |words: &str, word: usize| {
        let script = format!(
            ". {}\nCOMP_WORDS=({words} '') COMP_CWORD={word}\n_nomad_driver_exec2 nomad-driver-exec2 '' ''\necho \"${{COMPREPLY[@]}}\"\n",
            file.display()
        );
        let text = desk.run("bash", &["--norc", "--noprofile"], &script);
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
    };
    let set = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let first = [
        "-h",
        "-V",
        "--help",
        "--version",
        "check",
        "run",
        "tasks",
        "help",
    ];
    assert_eq!(offered("nomad-driver-exec2", 1), set(&first));
    assert_eq!(
        offered("nomad-driver-exec2 tasks", 2),
        set(&["-h", "--json", "--watch", "--help"])
    );
}

/// Types the lines of its stdin into a zsh on a terminal, each when the one before has been executed.
const ZSH: &str = r#"
zmodload zsh/zpty
zpty -b shell zsh -f -i
lines=0
enter() {
    zpty -w -n shell "$1"$'\n'
    for wait in {1..600}; do
        zpty -r -t shell said
        [[ -e called && $(wc -l < called) -gt $lines ]] && { (( ++lines )); return }
        sleep 0.05
    done
    print -u2 -r "$1: $said"
    exit 1
}
enter "PS1=; unsetopt beep; autoload -Uz compinit; compinit -D -u; $FAKE; . $FILE; echo ready > called"
while IFS= read -r line; do enter "$line"$'\t'; done
zpty -d shell
"#;

#[test]
fn zsh_completes_commands_options_and_files() {
    let desk = Desk::new();
    let typed = typed();
    let lines: String = typed.iter().map(|(line, _)| format!("{line}\n")).collect();
    let script = format!(
        "FAKE='{FAKE}' FILE='{}'{ZSH}",
        completion_file("zsh").display()
    );
    desk.run("zsh", &["-f", "-c", &script], &lines);
    assert_completed(&desk.called()[1..], &typed);
}

#[test]
fn fish_completes_commands_options_and_files() {
    let desk = Desk::new();
    let file = completion_file("fish");
    for (line, words) in typed() {
        let script = format!("source {}\ncomplete -C '{line}'\n", file.display());
        let offered = desk.run("fish", &["--no-config"], &script);
        let offered = offered.lines().filter_map(|line| line.split('\t').next());
        let wanted = words.last().unwrap().as_str();
        assert!(
            offered.clone().any(|word| word == wanted),
            "{line}: {offered:?}"
        );
    }
}

#[test]
fn the_detour_around_the_name_is_needed() {
    let text = completion(Shell::Bash, "nomad-driver-exec2").unwrap();
    let assigned = "cmd=\"nomad__driver__exec2__subcmd__check\"";
    let looked_for = "        nomad__driver__exec2__subcmd__check)";
    assert!(
        text.contains(assigned) && !text.contains(looked_for),
        "clap_complete takes a hyphen in a command's name now: generate bash's completion as those of the other shells"
    );
}
