//! A throw-away copy of this machine to install packages on: its root file system under an overlay, entered with chroot, so that the
//! maintainer scripts run as they would on a host. It goes with the thread that made it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::{DRIVER, LINK, Packages, run, said};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Deb,
    Rpm,
}

/// HashiCorp's package: one executable, and these two scripts.
const THEIR_POSTINST: &str = "mkdir -p /opt/nomad/data/plugins\nln -s /usr/bin/nomad-driver-exec2 /opt/nomad/data/plugins/nomad-driver-exec2\n";
const THEIR_POSTRM: &str = "rm /opt/nomad/data/plugins/nomad-driver-exec2\n";

/// rpm's own database: that of the machine is none of the test's.
const RPM: &str = "rpm --dbpath /rpmdb";

#[derive(Debug)]
pub struct Machine {
    kind: Kind,
    dir: TempDir,
}

impl Machine {
    pub fn new(kind: Kind) -> Machine {
        assert!(nix::unistd::geteuid().is_root(), "installing needs root");
        let none = None::<&str>;
        // Of this thread alone, which is one test's: nothing is left of the mounts when it ends.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        for name in ["upper", "work", "root"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let options = format!(
            "lowerdir=/,upperdir={0}/upper,workdir={0}/work",
            dir.path().display()
        );
        let machine = Machine { kind, dir };
        let at = machine.path("/");
        mount(
            Some("overlay"),
            &at,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        for shared in ["/dev", "/proc"] {
            mount(
                Some(shared),
                &machine.path(shared),
                none,
                MsFlags::MS_BIND,
                none,
            )
            .unwrap();
        }
        let _ = fs::remove_dir_all(machine.path("/opt/nomad"));
        // By these some machines, such as images of containers, install no manual.
        for file in fs::read_dir(machine.path("/etc/dpkg/dpkg.cfg.d"))
            .into_iter()
            .flatten()
        {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
        if kind == Kind::Rpm {
            machine.be_a_host_of_rpms();
        }
        machine
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir
            .path()
            .join("root")
            .join(path.trim_start_matches('/'))
    }

    pub fn sh(&self, script: &str) -> Output {
        let mut command = Command::new("chroot");
        command.arg(self.path("/")).args(["sh", "-ec", script]);
        run(command.env("DEBIAN_FRONTEND", "noninteractive"))
    }

    fn must(&self, script: &str) -> String {
        let output = self.sh(script);
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Installs, upgrades or downgrades.
    pub fn try_install(&self, packages: &Packages) -> Output {
        let (package, command) = match self.kind {
            // What this machine lacks of the dependencies does not matter here; triggers of its other packages neither.
            Kind::Deb => (
                packages.deb(),
                "dpkg --no-triggers --force-depends -i".to_owned(),
            ),
            Kind::Rpm => (
                packages.rpm(),
                format!("{RPM} -U --oldpackage --replacepkgs"),
            ),
        };
        self.install_file(&package, &command)
    }

    fn install_file(&self, package: &Path, command: &str) -> Output {
        let name = package.file_name().unwrap().to_str().unwrap();
        fs::copy(package, self.path(name)).unwrap();
        self.sh(&format!("{command} /{name}"))
    }

    pub fn install(&self, packages: &Packages) {
        let output = self.try_install(packages);
        assert!(output.status.success(), "{output:?}");
    }

    pub fn remove(&self, package: &str) {
        self.must(&match self.kind {
            Kind::Deb => format!("dpkg --no-triggers -r {package}"),
            Kind::Rpm => format!("{RPM} -e {package}"),
        });
    }

    /// Of an rpm nothing is left to purge.
    pub fn purge(&self, package: &str) {
        if self.kind == Kind::Deb {
            self.must(&format!("dpkg --no-triggers -P {package}"));
        }
    }

    /// The version that is installed.
    pub fn installed(&self, package: &str) -> Option<String> {
        let query = match self.kind {
            Kind::Deb => format!("dpkg-query -W -f '${{Version}} ${{db:Status-Status}}' {package}"),
            Kind::Rpm => format!("{RPM} -q --qf '%{{VERSION}}-%{{RELEASE}} installed' {package}"),
        };
        let output = self.sh(&query);
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = answer.strip_suffix(" installed")?;
        output.status.success().then(|| version.to_owned())
    }

    /// What the package manager finds changed of a package's files.
    pub fn changed(&self, package: &str) -> String {
        let output = self.sh(&match self.kind {
            Kind::Deb => format!("dpkg --verify {package}"),
            Kind::Rpm => format!("{RPM} -V {package}"),
        });
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// Where the plugin link leads to.
    pub fn link(&self) -> Option<PathBuf> {
        fs::read_link(self.path(LINK)).ok()
    }

    #[track_caller]
    pub fn expect_link(&self) {
        assert_eq!(
            self.link().as_deref(),
            Some(Path::new(DRIVER)),
            "{:?}",
            self.kind
        );
        assert!(self.path(DRIVER).is_file(), "{:?}", self.kind);
    }

    /// Nomad's data directory of an operator who has given it away and closed it.
    pub fn make_data_dir(&self) {
        let data = self.path("/opt/nomad/data");
        fs::create_dir_all(&data).unwrap();
        fs::write(data.join("state"), "Nomad's").unwrap();
        chown(&data, Some(4242), Some(4343)).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[track_caller]
    pub fn expect_data_dir(&self) {
        let data = fs::metadata(self.path("/opt/nomad/data")).unwrap();
        let found = (data.uid(), data.gid(), data.mode() & 0o7777);
        assert_eq!(found, (4242, 4343, 0o700), "{:?}", self.kind);
        assert!(
            self.path("/opt/nomad/data/state").exists(),
            "{:?}",
            self.kind
        );
    }

    pub fn link_to(&self, target: &str) {
        fs::create_dir_all(self.path(LINK).parent().unwrap()).unwrap();
        symlink(target, self.path(LINK)).unwrap();
    }

    /// A stand-in for HashiCorp's package.
    pub fn install_theirs(&self) {
        let tree = self.path("/theirs");
        let driver = tree.join(DRIVER.trim_start_matches('/'));
        fs::create_dir_all(driver.parent().unwrap()).unwrap();
        fs::write(&driver, "theirs\n").unwrap();
        match self.kind {
            Kind::Deb => {
                let control = tree.join("DEBIAN");
                fs::create_dir(&control).unwrap();
                let fields = "Package: nomad-driver-exec2\nVersion: 0.1.2-1\nArchitecture: all\nMaintainer: HashiCorp <x@example.org>\nDescription: a stand-in\n";
                fs::write(control.join("control"), fields).unwrap();
                for (name, script) in [("postinst", THEIR_POSTINST), ("postrm", THEIR_POSTRM)] {
                    fs::write(control.join(name), format!("#!/bin/bash\n{script}")).unwrap();
                    fs::set_permissions(control.join(name), fs::Permissions::from_mode(0o755)).unwrap();
                }
                self.must("dpkg-deb -Znone -b /theirs /theirs.deb && dpkg --no-triggers -i /theirs.deb");
            }
            Kind::Rpm => self.install_made(&format!(
                "Name: nomad-driver-exec2\nVersion: 0.1.2\nRelease: 1\nSummary: a stand-in\nLicense: MPL-2.0\nBuildArch: noarch\nAutoReq: no\n\
                 %description\n%install\nmkdir -p %{{buildroot}}\ncp -R /theirs/. %{{buildroot}}\n\
                 %post\n{THEIR_POSTINST}%postun\n{THEIR_POSTRM}%files\n{DRIVER}\n"
            )),
        }
    }

    /// A package with everything that ours requires, so that dependencies, conflicts and what is obsolete count.
    fn be_a_host_of_rpms(&self) {
        let requires = said(
            Command::new("rpm")
                .args(["-qpR"])
                .arg(Packages::built().rpm()),
        );
        let provides = requires.lines().filter(|line| !line.starts_with("rpmlib("));
        let provides: String = provides
            .map(|line| format!("Provides: {}\n", line.replace(">=", "=")))
            .collect();
        self.install_made(&format!(
            "Name: host\nVersion: 1\nRelease: 1\nSummary: a stand-in\nLicense: MPL-2.0\nBuildArch: noarch\n{provides}%description\n%files\n"
        ));
    }

    fn install_made(&self, spec: &str) {
        fs::write(self.path("/made.spec"), spec).unwrap();
        self.must(&format!(
            "rm -rf /made && rpmbuild -bb --quiet --define '_topdir /made' /made.spec && {RPM} -i /made/RPMS/noarch/*.rpm"
        ));
    }
}
