//! The packages that `make packages` has built: what is in them, and how they come and go. Needs root: they are installed for real,
//! each time on a throw-away copy of this machine (an overlay in a mount namespace of the test's own).

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "package/contents.rs"]
mod contents;
#[path = "package/life.rs"]
mod life;
#[path = "package/machine.rs"]
mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const NAME: &str = "nomad-driver-exec2-systemd";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const LINK: &str = "/opt/nomad/data/plugins/nomad-driver-exec2";
const DRIVER: &str = "/usr/bin/nomad-driver-exec2";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) -> Output {
    // The same words on every machine.
    let output = command.env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// What a command prints that must succeed.
fn said(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// One build of the packages.
#[derive(Debug, Clone)]
struct Packages {
    dir: PathBuf,
}

impl Packages {
    /// Those under test.
    fn built() -> Packages {
        let dir = root().join("target/package");
        assert!(
            dir.join("work/executable").exists(),
            "no packages in {}: `make packages` builds them",
            dir.display()
        );
        Packages { dir }
    }

    /// From a copy of the sources in another directory and the same executable, as version `version`.
    fn rebuilt(version: &str) -> Packages {
        let tree = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("package-{version}"));
        let _ = fs::remove_dir_all(&tree);
        fs::create_dir_all(&tree).unwrap();
        let epoch = said(
            Command::new("git")
                .args(["log", "-1", "--format=%ct"])
                .current_dir(root()),
        );
        let sources = "Cargo.toml CHANGELOG.md LICENSE README.md SECURITY.md packaging tests/nomad";
        let mut copy = Command::new("cp");
        copy.args(["-R", "--parents"])
            .args(sources.split(' '))
            .arg(&tree);
        said(copy.current_dir(root()));
        let versions = [
            ("Cargo.toml", "version = \"", "\""),
            ("packaging/debian/changelog", "(", "-1)"),
            (
                "packaging/rpm/nomad-driver-exec2-systemd.spec",
                "Version:     ",
                "\n",
            ),
        ];
        for (file, before, after) in versions {
            let text = fs::read_to_string(tree.join(file)).unwrap();
            let old = format!("{before}{VERSION}{after}");
            assert!(
                text.contains(&old),
                "{file} has another version than Cargo.toml"
            );
            let text = text.replacen(&old, &format!("{before}{version}{after}"), 1);
            fs::write(tree.join(file), text).unwrap();
        }
        let executable = fs::canonicalize(Packages::built().dir.join("work/executable"));
        said(
            Command::new(tree.join("packaging/build.sh"))
                .env("BINARY", executable.unwrap())
                .env("SOURCE_DATE_EPOCH", epoch.trim()),
        );
        Packages {
            dir: tree.join("target/package"),
        }
    }

    /// A newer version, of the same executable.
    fn next() -> &'static Packages {
        static NEXT: OnceLock<Packages> = OnceLock::new();
        NEXT.get_or_init(|| Packages::rebuilt("99.0.0"))
    }

    fn file(&self, is: impl Fn(&str) -> bool) -> PathBuf {
        let entries = fs::read_dir(&self.dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().path());
        let found: Vec<_> = names
            .filter(|path| path.file_name().unwrap().to_str().is_some_and(&is))
            .collect();
        assert_eq!(found.len(), 1, "{found:?} in {}", self.dir.display());
        found[0].clone()
    }

    fn deb(&self) -> PathBuf {
        self.file(|name| name.ends_with(".deb") && !name.contains("dbgsym"))
    }

    fn symbols(&self) -> PathBuf {
        self.file(|name| name.ends_with(".deb") && name.contains("dbgsym"))
    }

    fn rpm(&self) -> PathBuf {
        self.file(|name| name.ends_with(".rpm"))
    }

    fn tarball(&self) -> PathBuf {
        self.file(|name| name.ends_with(".tar.gz"))
    }
}
