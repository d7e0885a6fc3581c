//! What is in the packages, and what they say of themselves.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{DRIVER, LINK, NAME, Packages, VERSION, root, run, said};

/// The floor of the systems in README.md: EL 9 has this glibc, Debian 12 and Ubuntu 24.04 newer ones.
const GLIBC: (u32, u32) = (2, 34);

fn field(deb: &PathBuf, name: &str) -> String {
    let printed = said(Command::new("dpkg-deb").arg("-f").arg(deb).arg(name));
    printed.trim_end().to_owned()
}

fn rpm(question: &[&str]) -> String {
    said(
        Command::new("rpm")
            .arg("-qp")
            .args(question)
            .arg(Packages::built().rpm()),
    )
}

/// Mode, owner and path of what is no directory.
fn deb_files() -> BTreeSet<String> {
    let listed = said(
        Command::new("dpkg-deb")
            .arg("-c")
            .arg(Packages::built().deb()),
    );
    let files = listed.lines().filter(|line| !line.starts_with('d'));
    files
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            format!(
                "{} {} {}",
                words[0],
                words[1],
                words[5].trim_start_matches('.')
            )
        })
        .collect()
}

fn rpm_files() -> BTreeSet<String> {
    let listed = rpm(&[
        "--qf",
        "[%{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME} %{FILENAMES}\n]",
    ]);
    let files = listed.lines().filter(|line| !line.starts_with('d'));
    files.map(str::to_owned).collect()
}

/// Mode and path of the directories that are the package's own. Those of the plugin link are not: they may be links to where Nomad's
/// data is, and a package manager removes a link to a directory of the package.
const DIRECTORIES: &[(&str, &str)] = &[
    ("drwx--x--x", "/var/lib/nomad-driver-exec2"),
    ("drwx--x--x", "/var/lib/nomad-driver-exec2/run"),
    ("drwx--x--x", "/var/lib/nomad-driver-exec2/run/alloc"),
    ("drwx--x--x", "/var/lib/nomad-driver-exec2/run/alloc_mounts"),
];

#[test]
fn each_knows_the_directories_that_go_with_it() {
    let deb = said(
        Command::new("dpkg-deb")
            .arg("-c")
            .arg(Packages::built().deb()),
    );
    let rpm = rpm(&["--qf", "[%{FILEMODES:perms} %{FILENAMES}\n]"]);
    for list in [deb, rpm] {
        let lines = list.lines().filter(|line| line.starts_with('d'));
        let found: Vec<_> = lines
            .map(|line| {
                let path = line.rsplit(' ').next().unwrap();
                let path = path.trim_start_matches('.').trim_end_matches('/');
                (line.split(' ').next().unwrap(), path)
            })
            .filter(|(_, path)| path.starts_with("/opt/") || path.starts_with("/var/lib/"))
            .collect();
        assert_eq!(found, DIRECTORIES);
    }
}

/// The executable as it is shipped.
fn executable(dir: &tempfile::TempDir) -> PathBuf {
    said(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(Packages::built().deb())
            .arg(dir.path()),
    );
    dir.path().join(DRIVER.trim_start_matches('/'))
}

#[test]
fn lintian_has_nothing_to_say() {
    let packages = Packages::built();
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on", "error,warning"]);
    let output = run(lintian.arg(packages.deb()).arg(packages.symbols()));
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
}

#[test]
fn rpmlint_has_nothing_to_say() {
    let mut rpmlint = Command::new("rpmlint");
    rpmlint
        .arg("-c")
        .arg(root().join("packaging/rpm/rpmlint.toml"));
    let output = run(rpmlint.arg(Packages::built().rpm()));
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && told.contains(" 0 errors, 0 warnings"),
        "{told}"
    );
}

#[test]
fn both_have_the_same_files_and_the_rest_is_what_each_system_wants() {
    let (deb, rpm) = (deb_files(), rpm_files());
    let only = |these: &BTreeSet<String>, those: &BTreeSet<String>| -> Vec<String> {
        let names = these
            .difference(those)
            .map(|line| line.rsplit(' ').next().unwrap());
        names.map(|name| name.replace(NAME, "NAME")).collect()
    };
    assert_eq!(
        only(&deb, &rpm),
        [
            "/usr/share/doc/NAME/changelog.Debian.gz",
            "/usr/share/doc/NAME/copyright",
            "/usr/share/lintian/overrides/NAME",
            "/usr/share/zsh/vendor-completions/_nomad-driver-exec2",
        ]
    );
    assert_eq!(
        only(&rpm, &deb),
        [
            "/usr/share/licenses/NAME/LICENSE",
            "/usr/share/zsh/site-functions/_nomad-driver-exec2",
            LINK,
        ]
    );
    // No setuid, nothing of another owner, no configuration, nothing that starts.
    for line in deb.iter().chain(&rpm) {
        let [mode, owner, path] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let expected = match path {
            DRIVER => "-rwxr-xr-x",
            LINK => "lrwxrwxrwx",
            _ => "-rw-r--r--",
        };
        assert!(mode == expected && owner == "root/root", "{line}");
        assert!(path == LINK || path.starts_with("/usr/"), "{line}");
        assert!(
            !path.contains("/systemd/") || path.ends_with(".slice"),
            "{line}"
        );
    }
    for path in [
        DRIVER,
        "/usr/lib/systemd/system/exec2.slice",
        "/usr/share/man/man8/nomad-driver-exec2.8.gz",
    ] {
        assert!(
            deb.iter().any(|line| line.ends_with(&format!(" {path}"))),
            "no {path}"
        );
    }
}

/// Besides comments.
fn commands(script: &str) -> Vec<&str> {
    let lines = script.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

#[test]
fn the_scripts_see_to_the_plugin_link_alone() {
    let deb = Packages::built().deb();
    let list = "dpkg-deb --ctrl-tarfile \"$1\" | tar -t";
    let control = said(Command::new("sh").args(["-ec", list, "sh"]).arg(&deb));
    let control: BTreeSet<&str> = control.lines().collect();
    let expected = ["./", "./control", "./md5sums", "./postinst", "./postrm"];
    assert_eq!(control, BTreeSet::from(expected));
    let script = |name: &str| said(Command::new("dpkg-deb").arg("-I").arg(&deb).arg(name));
    assert_eq!(
        commands(&script("postinst")),
        [
            "set -e",
            "if [ \"$1\" = configure ]; then",
            "mkdir -p /opt/nomad/data/plugins",
            "ln -sfT /usr/bin/nomad-driver-exec2 \"$(dpkg-divert --truename /opt/nomad/data/plugins/nomad-driver-exec2)\"",
            "if [ \"$(dpkg-query -W -f '${db:Status-Status}' nomad-driver-exec2 2>/dev/null)\" = config-files ]; then",
            "rm -f \"$(dpkg-query --control-path nomad-driver-exec2 postrm)\"",
            "fi",
            "fi",
        ]
    );
    assert_eq!(
        commands(&script("postrm")),
        [
            "set -e",
            "if [ \"$1\" = remove ]; then",
            "link=$(dpkg-divert --truename /opt/nomad/data/plugins/nomad-driver-exec2)",
            "if [ \"$(readlink \"$link\")\" = /usr/bin/nomad-driver-exec2 ]; then",
            "rm \"$link\"",
            "fi",
            "rmdir /opt/nomad/data/plugins /opt/nomad/data /opt/nomad 2>/dev/null || :",
            "fi",
        ]
    );
    assert_eq!(
        commands(&rpm(&["--scripts", "--triggers", "--filetriggers"])),
        [
            "postuninstall scriptlet (using /bin/sh):",
            "if [ $1 -eq 0 ]; then",
            "rmdir /opt/nomad/data/plugins /opt/nomad/data /opt/nomad 2>/dev/null || :",
            "fi",
            "posttrans scriptlet (using /bin/sh):",
            "ln -sfT /usr/bin/nomad-driver-exec2 /opt/nomad/data/plugins/nomad-driver-exec2",
        ]
    );
}

/// A pre-release is `~rc1` there, to come before the release.
#[test]
fn each_has_the_version_of_cargo_toml() {
    let version = format!("{}-1", VERSION.replacen('-', "~", 1));
    assert_eq!(field(&Packages::built().deb(), "Version"), version);
    assert_eq!(rpm(&["--qf", "%{VERSION}-%{RELEASE}"]), version);
    let tarball = Packages::built().tarball();
    let listed = said(Command::new("tar").arg("-tf").arg(&tarball));
    let dir = tarball
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .strip_suffix(".tar.gz")
        .unwrap()
        .to_owned();
    assert!(
        dir.starts_with(&format!("nomad-driver-exec2-{VERSION}-linux-")),
        "{dir}"
    );
    let expected = ["", "LICENSE", "nomad-driver-exec2"].map(|file| format!("{dir}/{file}"));
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn each_takes_the_place_of_hashicorps_package() {
    for name in ["Provides", "Conflicts", "Replaces"] {
        assert_eq!(
            field(&Packages::built().deb(), name),
            "nomad-driver-exec2",
            "{name}"
        );
    }
    for question in ["--conflicts", "--obsoletes"] {
        assert_eq!(rpm(&[question]).trim(), "nomad-driver-exec2", "{question}");
    }
    assert!(
        rpm(&["--provides"])
            .lines()
            .any(|line| line.starts_with("nomad-driver-exec2 = "))
    );
}

#[test]
fn each_requires_what_the_readme_says_and_no_newer_glibc() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let systemd = readme
        .split("| systemd | ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let depends = field(&Packages::built().deb(), "Depends");
    let mut depends: Vec<&str> = depends.split(", ").collect();
    depends.sort_unstable();
    let libc = depends
        .iter()
        .position(|depend| depend.starts_with("libc6 (>= 2."))
        .unwrap();
    let libc = depends.remove(libc);
    assert!(
        version(libc.trim_start_matches("libc6 (>= ").trim_end_matches(')')) <= GLIBC,
        "{libc}"
    );
    assert_eq!(
        depends,
        [
            "default-dbus-system-bus | dbus-system-bus",
            "libgcc-s1 (>= 4.2)",
            &format!("systemd (>= {systemd})")
        ]
    );
    let requires = rpm(&["--requires"]);
    for wanted in ["dbus", "coreutils", &format!("systemd >= {systemd}")] {
        assert!(
            requires.lines().any(|line| line == wanted),
            "no {wanted} in {requires}"
        );
    }
    let recommends = (
        field(&Packages::built().deb(), "Recommends"),
        rpm(&["--recommends"]),
    );
    assert_eq!(
        (recommends.0.as_str(), recommends.1.trim()),
        ("nomad", "nomad")
    );

    let dir = tempfile::tempdir().unwrap();
    let symbols = said(Command::new("objdump").arg("-T").arg(executable(&dir)));
    let versions = symbols.split("GLIBC_").skip(1);
    let versions = versions.map(|rest| version(rest.split([')', ' ', '\n']).next().unwrap()));
    let newest = versions.max().expect("it uses glibc");
    assert!(newest <= GLIBC, "{newest:?}");
}

fn version(text: &str) -> (u32, u32) {
    let mut parts = text.split('.').map(|part| part.parse().unwrap());
    (parts.next().unwrap(), parts.next().unwrap())
}

#[test]
fn the_executable_is_hardened_and_one_for_all_and_its_symbols_are_apart() {
    let dir = tempfile::tempdir().unwrap();
    let file = executable(&dir);
    let told = said(
        Command::new("readelf")
            .args(["-W", "-h", "-l", "-d", "-n", "-S"])
            .arg(&file),
    );
    for wanted in [
        "DYN (Position-Independent Executable file)",
        "GNU_RELRO",
        "BIND_NOW",
    ] {
        assert!(told.contains(wanted), "no {wanted} in {told}");
    }
    let stack = told
        .lines()
        .find(|line| line.contains("GNU_STACK"))
        .unwrap();
    assert!(
        stack.contains(" RW ") && !told.contains(".debug_info"),
        "{told}"
    );

    let id = told
        .split("Build ID: ")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap();
    let symbols = said(
        Command::new("dpkg-deb")
            .arg("-c")
            .arg(Packages::built().symbols()),
    );
    let path = format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]);
    assert!(symbols.contains(&path), "no {path} in {symbols}");

    let other = tempfile::tempdir().unwrap();
    let unpack = format!(
        "rpm2cpio {} | cpio --quiet -id; tar -xf {} --strip-components=1",
        Packages::built().rpm().display(),
        Packages::built().tarball().display()
    );
    said(
        Command::new("sh")
            .args(["-ec", &unpack])
            .current_dir(other.path()),
    );
    for copy in [DRIVER.trim_start_matches('/'), "nomad-driver-exec2"] {
        assert!(
            fs::read(other.path().join(copy)).unwrap() == fs::read(&file).unwrap(),
            "{copy} is another executable"
        );
    }
}

#[test]
fn no_path_of_the_machine_it_was_built_on_is_in_it() {
    let cargo_home = std::env::var("CARGO_HOME")
        .unwrap_or_else(|_| format!("{}/.cargo", std::env::var("HOME").unwrap()));
    let built = fs::read(Packages::built().dir.join("work/executable")).unwrap();
    for path in [root().to_str().unwrap(), &cargo_home] {
        let at = built
            .windows(path.len())
            .position(|window| window == path.as_bytes());
        assert_eq!(at, None, "{path}");
    }
}

#[test]
fn the_same_sources_elsewhere_make_the_same_packages() {
    let (one, two) = (Packages::built(), Packages::rebuilt(VERSION));
    for which in [
        Packages::deb,
        Packages::symbols,
        Packages::rpm,
        Packages::tarball,
    ] {
        let (one, two) = (which(&one), which(&two));
        assert!(
            fs::read(&one).unwrap() == fs::read(&two).unwrap(),
            "{} and {} differ",
            one.display(),
            two.display()
        );
    }
}

/// The example is the plugin block that README.md describes, each key with its default.
#[test]
fn the_example_of_a_plugin_block_has_every_key_with_its_default() {
    let text =
        fs::read_to_string(root().join("packaging/examples/nomad-driver-exec2.hcl")).unwrap();
    let body: hcl::Body = hcl::from_str(&text).unwrap();
    let block = body.blocks().next().unwrap();
    assert_eq!(block.labels[0].as_str(), "nomad-driver-exec2");
    let config = block.body.blocks().next().unwrap();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let keys: Vec<_> = nomad_driver_exec2::config::schema::PLUGIN
        .iter()
        .map(|key| key.name)
        .collect();
    assert_eq!(
        config
            .body
            .attributes()
            .map(|attribute| attribute.key.as_str())
            .collect::<Vec<_>>(),
        keys
    );
    for attribute in config.body.attributes() {
        let row = format!("| `{}` |", attribute.key.as_str());
        let row = readme.lines().find(|line| line.starts_with(&row)).unwrap();
        let default = format!("`{}`", hcl::format::to_string(&attribute.expr).unwrap());
        assert_eq!(row.split(" | ").nth(2).unwrap(), default);
    }
}
