//! A guest as a software-emulated machine. KVM is never asked for: where it exists it may still not boot a stock kernel.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};

use super::build::Built;
use super::child::{self, Exit};
use super::qmp::Monitor;
use super::release::{Audit, Release};
use super::snapshot::{self, Snapshot};
use super::{Boot, Forward, Guest, GuestName, PAYLOAD_DIR};

/// Part of the snapshot's key: a machine resumes only in one that is built the same.
pub const MACHINE: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-machine",
    "q35",
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "2048",
    "-device",
    "virtio-rng-pci",
    "-device",
    "virtio-net-pci,netdev=net,romfile=",
];

pub fn kernel_arguments(release: &Release) -> String {
    let audit = match release.audit {
        Audit::Never => "audit=0 ",
        Audit::Off => "",
    };
    format!(
        "root=/dev/vda rw fsck.mode=skip console=ttyS0 quiet systemd.show_status=0 {audit}mitigations=off net.ifnames=0 random.trust_cpu=on"
    )
}

/// The last that a kernel says.
pub(super) const PANIC: &str = "Kernel panic - not syncing";

/// After a restore the guest's clock stands where the snapshot was taken, and its random numbers would repeat those of
/// every other run: both are mended before anything else happens. 0x5207 is RNDRESEEDCRNG.
const WAKE: &str = r#"set -eu
date --set "@$1" >/dev/null
perl -e 'open R, ">", "/dev/urandom" or die; syswrite R, pack "H*", shift; ioctl R, 0x5207, 0 or die' "$2"
mount -o ro /dev/vdb "$3"
"#;

/// Generous: a busy host makes the emulation slower still.
const RESUME_PATIENCE: Duration = Duration::from_secs(180);
const REBOOT_PATIENCE: Duration = Duration::from_secs(600);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A running emulator and the way into it.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    pub monitor: Monitor,
    pub ssh: Ssh,
    console: PathBuf,
}

/// The files of one machine.
#[derive(Debug)]
pub struct Disks<'a> {
    pub system: &'a Path,
    pub payload: &'a Path,
    /// The saved state to go on from; without it the machine boots.
    pub state: Option<&'a Path>,
    pub kernel_arguments: &'a str,
}

impl Machine {
    /// Everything the machine writes goes to `scratch`.
    pub fn start(
        built: &Built,
        disks: &Disks<'_>,
        forwards: &[Forward],
        scratch: &Path,
    ) -> Result<Machine> {
        let ssh_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut network = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22");
        for Forward {
            host_port,
            guest_port,
        } in forwards
        {
            network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host_port}-:{guest_port}"));
        }
        let errors_path = scratch.join("qemu.log");
        let mut command = child::leashed("qemu-system-x86_64");
        command.args(MACHINE).args([
            "-netdev",
            &network,
            "-qmp",
            "stdio",
            "-serial",
            "file:console.log",
        ]);
        command
            .arg("-kernel")
            .arg(built.kernel())
            .arg("-initrd")
            .arg(built.initrd())
            .args(["-append", disks.kernel_arguments]);
        command
            .arg("-drive")
            .arg(drive(disks.system, "format=qcow2,cache=unsafe"));
        command
            .arg("-drive")
            .arg(drive(disks.payload, "format=raw,readonly=on"));
        if let Some(state) = disks.state {
            command.args([
                "-incoming",
                &format!("exec:cat {}", child::quote(&state.to_string_lossy())),
            ]);
        }
        command
            .current_dir(scratch)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors_path)?);
        let mut qemu = command.spawn().context("cannot start qemu-system-x86_64")?;
        let monitor = Monitor::of(&mut qemu).with_context(|| {
            format!(
                "QEMU did not start: {}",
                fs::read_to_string(&errors_path).unwrap_or_default()
            )
        })?;
        let ssh = Ssh {
            dir: scratch.to_owned(),
            key: built.key(),
            port: ssh_port,
        };
        Ok(Machine {
            qemu,
            monitor,
            ssh,
            console: scratch.join("console.log"),
        })
    }

    pub fn console(&self) -> String {
        fs::read(&self.console)
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        child::end(&mut self.qemu);
    }
}

fn drive(path: &Path, options: &str) -> String {
    // QEMU reads a doubled comma as a comma.
    format!(
        "file={},if=virtio,{options}",
        path.to_string_lossy().replace(',', ",,")
    )
}

/// Commands go over one multiplexed connection; the handshake is emulated and slow.
#[derive(Debug)]
pub struct Ssh {
    dir: PathBuf,
    key: PathBuf,
    port: u16,
}

impl Ssh {
    pub fn command(&self, options: &[&str], argv: &[&str]) -> Command {
        let mut command = child::leashed("ssh");
        command.args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]);
        command.args([
            "-o",
            "LogLevel=ERROR",
            "-o",
            "ConnectTimeout=20",
            "-o",
            "IdentitiesOnly=yes",
        ]);
        // A relative path: that of a socket has 107 bytes at most.
        command.args([
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPath=ssh",
            "-o",
            "ControlPersist=yes",
        ]);
        command
            .arg("-i")
            .arg(&self.key)
            .args(["-p", &self.port.to_string()]);
        command
            .args(options)
            .args(["root@127.0.0.1", "--"])
            .args(argv.iter().map(|word| child::quote(word)));
        command.current_dir(&self.dir);
        command
    }

    /// Ends the shared connection.
    pub fn hang_up(&self) -> Result<()> {
        child::succeed(
            &mut self.command(&["-O", "exit"], &[]),
            Duration::from_secs(20),
        )
        .map(drop)
    }
}

#[derive(Debug)]
pub struct Qemu {
    name: GuestName,
    machine: Machine,
}

impl Qemu {
    pub fn resume(
        name: GuestName,
        built: &Built,
        snapshot: &Snapshot,
        how: &Boot<'_>,
    ) -> Result<Qemu> {
        let scratch = how.payload.scratch(&name.to_string())?;
        let disk = scratch.join("disk.qcow2");
        overlay(&snapshot.disk(), "qcow2", &disk)?;
        let payload = how.payload.image()?;
        let state = snapshot.state();
        let disks = Disks {
            system: &disk,
            payload: &payload,
            state: Some(&state),
            kernel_arguments: &kernel_arguments(name.release),
        };
        let mut machine = Machine::start(built, &disks, how.forwards, &scratch)?;
        machine.monitor.go_on(RESUME_PATIENCE)?;
        let now = SystemTime::UNIX_EPOCH.elapsed()?;
        let clock = format!("{}.{:09}", now.as_secs(), now.subsec_nanos());
        let mut seed = [0u8; 64];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut seed)?;
        let seed: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        child::succeed(
            &mut machine
                .ssh
                .command(&[], &["sh", "-c", WAKE, "wake", &clock, &seed, PAYLOAD_DIR]),
            RESUME_PATIENCE,
        )
        .with_context(|| {
            format!(
                "{name} does not wake up\n{}",
                child::tail(&machine.console(), 30)
            )
        })?;
        Ok(Qemu { name, machine })
    }

    /// A shell on the caller's terminal.
    pub fn shell(&self) -> Result<()> {
        self.machine
            .ssh
            .command(&["-t"], &[])
            .status()
            .map(drop)
            .map_err(Into::into)
    }
}

/// A writable disk on top of one that stays as it is.
pub fn overlay(base: &Path, base_format: &str, disk: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command
        .args(["create", "-q", "-f", "qcow2", "-F", base_format, "-b"])
        .arg(base)
        .arg(disk);
    child::succeed(&mut command, RESUME_PATIENCE).map(drop)
}

impl Guest for Qemu {
    fn name(&self) -> GuestName {
        self.name
    }

    fn run(
        &mut self,
        argv: &[&str],
        timeout: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Exit> {
        let argv = child::in_a_unit(argv);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let check = || {
            let console = self.machine.console();
            let panic = console.lines().find(|line| line.contains(PANIC));
            panic.map_or(Ok(()), |line| bail!("{}: {line}", self.name))
        };
        let mut command = self.machine.ssh.command(&[], &argv);
        child::stream_while(&mut command, timeout, &check, on_line)
    }

    fn put(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        use std::io::Write;
        let path = path.to_string_lossy();
        let mut command = self
            .machine
            .ssh
            .command(&[], &["sh", "-c", "cat >\"$1\"", "put", &path]);
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(content)?;
        }
        anyhow::ensure!(
            child.wait()?.success(),
            "cannot write {path} in {}",
            self.name
        );
        Ok(())
    }

    fn reboot(&mut self) -> Result<()> {
        let boot_id = |machine: &Machine| -> Result<String> {
            let mut asked = machine.ssh.command(&[], &["cat", BOOT_ID]);
            child::succeed(&mut asked, RESUME_PATIENCE)
        };
        let before = boot_id(&self.machine)?;
        let mut asked = self.machine.ssh.command(&[], &["systemctl", "reboot"]);
        child::succeed(&mut asked, RESUME_PATIENCE)?;
        let deadline = Instant::now() + REBOOT_PATIENCE;
        loop {
            // The connection is to the machine as it was.
            let _ = self.machine.ssh.hang_up();
            match boot_id(&self.machine) {
                Ok(id) if id != before => break,
                _ if Instant::now() > deadline => bail!(
                    "{} does not come back\n{}",
                    self.name,
                    child::tail(&self.machine.console(), 30)
                ),
                _ => thread::sleep(Duration::from_millis(500)),
            }
        }
        snapshot::await_running(&self.machine)?;
        let mut mount = self
            .machine
            .ssh
            .command(&[], &["mount", "-o", "ro", "/dev/vdb", PAYLOAD_DIR]);
        child::succeed(&mut mount, RESUME_PATIENCE).map(drop)
    }

    fn console(&self) -> String {
        self.machine.console()
    }
}
