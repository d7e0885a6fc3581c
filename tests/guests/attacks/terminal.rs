//! A terminal of the host's, with somebody on it who does nothing there.

use std::fs::{self, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};

/// Whether programs without privileges may type on their terminal; no kernel before 6.2 has it.
const MAY_TYPE: &str = "/proc/sys/dev/tty/legacy_tiocsti";
/// Terminals that a task has by itself have smaller numbers.
const FROM: u32 = 8;

#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    path: PathBuf,
    user: Option<Child>,
    could_type: Option<String>,
}

impl Terminal {
    /// One that nobody controls.
    pub fn new() -> Result<Terminal> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let mut smaller = Vec::new();
        loop {
            let master = openpt(flags)?;
            unlockpt(&master)?;
            let path = PathBuf::from(ptsname(&master, Vec::new())?.into_string()?);
            let terminal = Terminal {
                slave: ioctl_tiocgptpeer(&master, flags)?,
                master,
                path,
                user: None,
                could_type: None,
            };
            if terminal.number()? >= FROM {
                return Ok(terminal);
            }
            smaller.push(terminal);
        }
    }

    /// One that is controlled by somebody, and that everybody may open where it can be seen. Programs may type on terminals for as
    /// long as it is there, whatever this kernel says otherwise.
    pub fn with_user(owner: u32) -> Result<Terminal> {
        let mut terminal = Terminal::new()?;
        chown(&terminal.path, Some(owner), Some(owner))?;
        fs::set_permissions(&terminal.path, Permissions::from_mode(0o666))?;
        let child = Command::new("setsid")
            .args(["--ctty", "sleep", "600"])
            .uid(owner)
            .gid(owner)
            .stdin(terminal.stdio()?)
            .stdout(Stdio::null())
            .spawn()
            .context("setsid")?;
        let stat = format!("/proc/{}/stat", child.id());
        terminal.user = Some(child);
        let begun = Instant::now();
        while !fs::read_to_string(&stat)?.contains("(sleep)") {
            ensure!(begun.elapsed() < Duration::from_secs(30), "nobody sleeps");
            std::thread::sleep(Duration::from_millis(10));
        }
        terminal.could_type = fs::read_to_string(MAY_TYPE).ok();
        // In a container it is the host's, as it is.
        let _ = fs::write(MAY_TYPE, "1");
        Ok(terminal)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn number(&self) -> Result<u32> {
        let name = self.path.file_name().and_then(|name| name.to_str());
        Ok(name.context("/dev/pts/N")?.parse()?)
    }

    pub fn stdio(&self) -> Result<Stdio> {
        Ok(self.slave.try_clone()?.into())
    }

    /// What was written to it or typed on it, as that is shown, and whose it is.
    pub fn state(&self) -> Result<String> {
        let shown = rustix::io::ioctl_fionread(self.master.as_fd())?;
        let user = self.user.as_ref().context("nobody uses it")?.id();
        let stat = fs::read_to_string(format!("/proc/{user}/stat"))?;
        let fields: Vec<&str> = stat.split(' ').collect();
        // Its state, and the terminal that controls it.
        let (state, terminal) = (fields[2], fields[6]);
        Ok(format!(
            "{}: {shown} bytes shown; {state} on {terminal}",
            self.path.display()
        ))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(user) = &mut self.user {
            let _ = user.kill();
            let _ = user.wait();
        }
        if let Some(before) = &self.could_type {
            let _ = fs::write(MAY_TYPE, before);
        }
    }
}
