//! A guest's root file system: Debian packages, a few files, and the same tree once more as a disk image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::release::Release;
use super::{cache, child, progress};

const PACKAGES: &[&str] = &[
    "dbus",
    "iproute2",
    "kmod",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "openssh-server",
    "procps",
    "strace",
    "systemd",
    "systemd-sysv",
    "udev",
    // Bridge mode of a real agent.
    "containernetworking-plugins",
    "iptables",
];

/// Runs inside the tree after the packages; part of the cache key.
const SETUP: &str = include_str!("setup.sh");

/// Runs before that where there are programs; part of the key too.
const PROGRAMS: &str = include_str!("programs.sh");

/// Debian would make a database cluster while it installs PostgreSQL.
const NO_CLUSTER: &str = "create_main_cluster = false\n";

/// The initial ramdisk needs the way to the disk and nothing else; under emulation every module costs boot time.
const INITRD_CONF: &str = "MODULES=list\n";
const INITRD_MODULES: &str = "virtio_pci\nvirtio_blk\next4\n";

const DISK_SIZE: &str = "3G";
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// What `root` leaves in the cache.
#[derive(Debug)]
pub struct Built {
    dir: PathBuf,
}

impl Built {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The file name alone: the snapshot refers to it by a relative path, so that both survive a rename.
    pub const DISK: &'static str = "disk.ext4";

    pub fn key(&self) -> PathBuf {
        self.dir.join("key")
    }

    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd.img")
    }
}

pub fn root(release: &Release) -> Result<Built> {
    let packages = [PACKAGES, release.programs].concat().join(",");
    let mut parts = vec![
        release.codename,
        &packages,
        SETUP,
        INITRD_CONF,
        INITRD_MODULES,
        DISK_SIZE,
    ];
    if !release.programs.is_empty() {
        parts.extend([PROGRAMS, NO_CLUSTER]);
    }
    let key = cache::key(&parts);
    let dir = cache::entry(&cache::dir()?, release.codename, &key, |dir| {
        if !nix::unistd::geteuid().is_root() {
            bail!("building a guest needs root: run `make test` as root");
        }
        let mirror = mirror()?;
        progress::step(
            &format!("{}: installing Debian from {mirror}", release.codename),
            || install(release, &packages, &mirror, dir),
        )?;
        progress::step(
            &format!("{}: writing the disk image", release.codename),
            || image(dir),
        )
    })?;
    Ok(Built { dir })
}

fn install(release: &Release, packages: &str, mirror: &str, dir: &Path) -> Result<()> {
    let key = dir.join("key");
    child::succeed(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f"])
            .arg(&key),
        PATIENCE,
    )?;
    let public = fs::read_to_string(dir.join("key.pub"))?;
    let setup = dir.join("setup.sh");
    fs::write(&setup, SETUP)?;
    fs::write(dir.join("initrd.conf"), INITRD_CONF)?;
    fs::write(dir.join("initrd.modules"), INITRD_MODULES)?;
    let mut command = child::contained("mmdebstrap");
    command
        .current_dir(dir)
        .args(["--mode=root", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--include={packages}"));
    // A mirror may lag behind by more than sid's index is valid for.
    command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    for option in proxy_options() {
        command.arg(format!("--aptopt={option}"));
    }
    // Before the kernel's own scripts build the initial ramdisk.
    command.arg("--essential-hook=mkdir -p \"$1\"/etc/initramfs-tools/conf.d");
    command.arg("--essential-hook=copy-in initrd.conf /etc/initramfs-tools/conf.d");
    command.arg("--essential-hook=upload initrd.modules /etc/initramfs-tools/modules");
    if !release.programs.is_empty() {
        fs::write(dir.join("createcluster.conf"), NO_CLUSTER)?;
        fs::write(dir.join("programs.sh"), PROGRAMS)?;
        command.arg("--essential-hook=mkdir -p \"$1\"/etc/postgresql-common");
        command.arg("--essential-hook=copy-in createcluster.conf /etc/postgresql-common");
        command.arg("--customize-hook=upload programs.sh /programs.sh");
        command.arg(format!(
            "--customize-hook=chroot \"$1\" sh /programs.sh {} {}",
            child::quote(mirror),
            release.codename
        ));
        command.arg("--customize-hook=rm \"$1\"/programs.sh");
    }
    command.arg("--customize-hook=upload setup.sh /setup.sh");
    command.arg(format!(
        "--customize-hook=chroot \"$1\" sh /setup.sh {}",
        child::quote(public.trim())
    ));
    command.arg("--customize-hook=rm \"$1\"/setup.sh");
    command.args([release.codename, "root", mirror]);
    child::succeed_logged(&mut command, PATIENCE, &dir.join("install.log")).with_context(|| {
        let backports = match release.programs {
            [] => String::new(),
            _ => format!(" and {}-backports", release.codename),
        };
        format!(
            "cannot install Debian {0}: is {mirror} reachable, and does it carry {0}{backports}?",
            release.codename
        )
    })?;
    fs::copy(
        one(&dir.join("root/boot"), "vmlinuz-")?,
        dir.join("vmlinuz"),
    )?;
    fs::copy(
        one(&dir.join("root/boot"), "initrd.img-")?,
        dir.join("initrd.img"),
    )?;
    Ok(())
}

fn image(dir: &Path) -> Result<()> {
    // No journal and no lazy initialisation: both write in the background of an emulated machine.
    let mut command = Command::new("mke2fs");
    command.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-E",
        "lazy_itable_init=0",
        "-N",
        "131072",
        "-m",
        "0",
        "-d",
    ]);
    command
        .arg(dir.join("root"))
        .arg(dir.join(Built::DISK))
        .arg(DISK_SIZE);
    child::succeed(&mut command, PATIENCE).map(drop)
}

fn one(dir: &Path, prefix: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("the kernel package left no {prefix}* in {}", dir.display())
}

/// Shared with the host's set-up, which needs it before anything is compiled.
const FIND_MIRROR: &str = include_str!("../../debian-mirror");

/// Never written into a committed file: which mirror is near is the machine's business.
fn mirror() -> Result<String> {
    let found = child::succeed(Command::new("sh").args(["-c", FIND_MIRROR]), PATIENCE)?;
    Ok(found.trim().to_owned())
}

/// apt inside the new tree does not read this machine's configuration.
fn proxy_options() -> Vec<String> {
    let Ok(dump) = child::succeed(
        Command::new("apt-config").args(["dump", "Acquire"]),
        PATIENCE,
    ) else {
        return Vec::new();
    };
    dump.lines()
        .filter(|line| line.contains("::Proxy") && !line.ends_with("\"\";"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What other vendors' sources look like, to `indextargets` and to `update --print-uris`.
    const OTHERS: &str = "stable|main|https://example.org/browser|Vendor\n\
                          bookworm|main|https://example.org/vendor|Vendor\n\
                          bookworm-security|main|http://example.org/debian-security|Debian\n";
    const OTHER_URIS: &str = "'https://example.org/vendor/dists/bookworm/InRelease' vendor 0\n\
                              'http://example.org/debian-security/dists/bookworm-security/InRelease' security 0\n";

    /// What the script finds where apt knows these targets, and has these addresses to update from.
    fn found(targets: &str, uris: &str) -> Result<String> {
        let dir = tempfile::tempdir().unwrap();
        let apt = dir.path().join("apt-get");
        let script = format!(
            "#!/bin/sh\ncase $1 in\nindextargets) cat <<'EOF'\n{targets}EOF\n;;\nupdate) cat <<'EOF'\n{uris}EOF\n;;\nesac\n"
        );
        fs::write(&apt, script).unwrap();
        fs::set_permissions(&apt, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:/usr/bin:/bin", dir.path().display());
        let mut command = Command::new("sh");
        command
            .args(["-c", FIND_MIRROR])
            .env("PATH", path)
            .env_remove("DEBIAN_MIRROR");
        child::succeed(&mut command, PATIENCE).map(|said| said.trim().to_owned())
    }

    #[test]
    fn the_mirror_is_the_one_whose_origin_is_debian() {
        let targets = format!("{OTHERS}bookworm|main|http://example.org/mirror/|Debian\n");
        assert_eq!(found(&targets, "").unwrap(), "http://example.org/mirror");
    }

    #[test]
    fn before_the_first_update_the_address_tells_the_mirror() {
        let uris =
            format!("{OTHER_URIS}'http://example.org/debian/dists/bookworm/InRelease' main 0\n");
        assert_eq!(found("", &uris).unwrap(), "http://example.org/debian");
    }

    #[test]
    fn a_mirror_kept_in_a_file_is_read_from_there() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("debian.list");
        fs::write(&list, "# near\n\nhttp://example.org/near\tpriority:1\n").unwrap();
        let targets = format!("trixie|main|mirror+file:{}|Debian\n", list.display());
        assert_eq!(found(&targets, "").unwrap(), "http://example.org/near");
    }

    #[test]
    fn other_vendors_are_not_taken_for_debian() {
        let error = found(OTHERS, OTHER_URIS).unwrap_err().to_string();
        assert!(error.contains("DEBIAN_MIRROR"), "{error}");
    }
}
