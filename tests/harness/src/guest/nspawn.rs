//! A guest as a container: the cached tree under a throw-away overlay, its own systemd, the host's kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::build::Built;
use super::child::{self, Exit};
use super::{Boot, Guest, GuestName, PAYLOAD_DIR};

const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// The overlay lives on a tmpfs of the container's own mount namespace: nothing to clean up, and it works where the
/// cache itself is on an overlay, which cannot be an upper layer.
const START: &str = r#"set -eu
echo 0 >"$CGROUP/cgroup.procs"
mount -t tmpfs -o size=2g tmpfs "$SCRATCH/mnt"
mkdir "$SCRATCH/mnt/upper" "$SCRATCH/mnt/work" "$SCRATCH/mnt/root"
mount -t overlay -o "lowerdir=$ROOT,upperdir=$SCRATCH/mnt/upper,workdir=$SCRATCH/mnt/work" overlay "$SCRATCH/mnt/root"
exec systemd-nspawn --quiet --register=no --keep-unit --capability=all --private-network --console=pipe \
	--machine=guest --bind-ro="$PAYLOAD:$PAYLOAD_DIR" -D "$SCRATCH/mnt/root" --boot
"#;

#[derive(Debug)]
pub struct Nspawn {
    name: GuestName,
    unshare: Child,
    /// The guest's PID 1 as the host sees it.
    leader: String,
    cgroup: Cgroup,
    console: PathBuf,
}

impl Nspawn {
    pub fn boot(name: GuestName, built: &Built, how: &Boot<'_>) -> Result<Nspawn> {
        if !how.forwards.is_empty() {
            bail!("{name} has no network to forward a port from: use a qemu guest");
        }
        let scratch = how.payload.scratch(&name.to_string())?;
        fs::create_dir(scratch.join("mnt"))?;
        let console = scratch.join("console.log");
        let output = fs::File::create(&console)?;
        let cgroup = Cgroup::new(&name.to_string())?;
        let unshare = child::contained("sh")
            .args(["-c", START])
            .env("CGROUP", &cgroup.dir)
            .env("SCRATCH", &scratch)
            .env("ROOT", built.root())
            .env("PAYLOAD", how.payload.dir())
            .env("PAYLOAD_DIR", PAYLOAD_DIR)
            // The host's cgroup mounts may be of the old kind; the guest's are not.
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
            .env("SYSTEMD_SECCOMP", "0")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let mut guest = Nspawn {
            name,
            unshare,
            leader: String::new(),
            cgroup,
            console,
        };
        guest.await_running()?;
        Ok(guest)
    }

    fn await_running(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.unshare.try_wait()? {
                bail!("{} did not boot: {status}\n{}", self.name, self.console());
            }
            // unshare -> systemd-nspawn -> the guest's PID 1
            if let Some(leader) =
                only_child(&self.unshare.id().to_string()).and_then(|nspawn| only_child(&nspawn))
            {
                self.leader = leader;
                let mut said = String::new();
                // Fails while the bus is not up.
                child::stream(
                    &mut self.enter(&["systemctl", "is-system-running"]),
                    BOOT_PATIENCE,
                    &mut |line| said = line.to_owned(),
                )?;
                match said.as_str() {
                    "running" => return Ok(()),
                    "degraded" => {
                        let failed = child::succeed(
                            &mut self.enter(&["systemctl", "--failed", "--no-legend"]),
                            BOOT_PATIENCE,
                        )?;
                        bail!("{} booted with failed units:\n{failed}", self.name);
                    }
                    _ => {}
                }
            }
            thread::sleep(Duration::from_millis(30));
        }
        bail!(
            "{} did not finish booting in {BOOT_PATIENCE:?}\n{}",
            self.name,
            self.console()
        )
    }

    fn enter(&self, argv: &[&str]) -> Command {
        let mut command = child::leashed("nsenter");
        command.args(["-t", &self.leader, "--all", "--"]).args(argv);
        command
    }
}

impl Guest for Nspawn {
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
        child::stream(&mut self.enter(&argv), timeout, on_line)
    }

    fn put(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        // The guest's root as the kernel shows it: its tmpfs mounts included.
        let inside = Path::new("/proc")
            .join(&self.leader)
            .join("root")
            .join(path.strip_prefix("/").unwrap_or(path));
        fs::write(&inside, content)
            .with_context(|| format!("cannot write {} in {}", path.display(), self.name))
    }

    fn reboot(&mut self) -> Result<()> {
        bail!("{} is a container: use a qemu guest", self.name)
    }

    fn console(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }
}

impl Drop for Nspawn {
    fn drop(&mut self) {
        // Its PID namespace goes with it, and the mounts with that.
        child::end(&mut self.unshare);
        self.cgroup.remove();
    }
}

fn only_child(pid: &str) -> Option<String> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let mut pids = children.split_whitespace();
    let first = pids.next()?.to_owned();
    pids.next().is_none().then_some(first)
}

/// A cgroup for the container: with --keep-unit it makes its own below the one it starts in, under fixed names, so two
/// containers must not start in the same.
#[derive(Debug)]
struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    const PREFIX: &str = "exec2-guest-";

    fn new(name: &str) -> Result<Cgroup> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (dir, kind) = (words.next()?, words.next()?);
            (kind == "cgroup2").then_some(dir)
        });
        let mount = mount.context("no cgroup2 file system is mounted here: the nspawn guests need one, a hybrid one will do")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .context("this process is in no cgroup of version 2")?;
        let parent = Path::new(mount).join(own);
        Self::sweep(&parent);
        let dir = parent.join(format!("{}{name}-{}", Self::PREFIX, std::process::id()));
        fs::create_dir(&dir)
            .with_context(|| format!("cannot create the cgroup {}", dir.display()))?;
        Ok(Cgroup { dir })
    }

    /// What killed runs left. One that is in use refuses to go.
    fn sweep(parent: &Path) {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let owner = entry.file_name().to_str().and_then(|name| {
                name.strip_prefix(Self::PREFIX)?
                    .rsplit('-')
                    .next()?
                    .parse::<u32>()
                    .ok()
            });
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                remove_tree(&entry.path());
            }
        }
    }

    fn remove(&self) {
        // The kernel takes a moment to let go of the killed processes.
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.dir.exists() && Instant::now() < deadline {
            remove_tree(&self.dir);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Directories only: a cgroup's files cannot be removed and need not be.
fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}
