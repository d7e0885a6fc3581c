//! Throw-away Debian guests with a real systemd as PID 1: built here from Debian's packages, cached, started in seconds.
//! This room knows nothing of the driver; it boots, runs commands and reports what became of them.

mod build;
mod cache;
mod case;
mod child;
mod inside;
mod nspawn;
mod payload;
mod progress;
mod qemu;
mod qmp;
mod release;
mod report;
mod run;
mod snapshot;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

pub use case::{Case, Context, Effort, Length, Needs, Subject};
pub use child::Exit;
pub use payload::{Payload, SMALL_DISK};
pub use qemu::Qemu;
pub use release::{GuestName, Kind, Release, Tier};
pub use run::{RealAgent, Suite, agents, main};

/// Where the payload is seen inside every guest.
pub const PAYLOAD_DIR: &str = "/payload";

/// A booted guest. Dropping it ends it and everything that ran inside.
pub trait Guest {
    fn name(&self) -> GuestName;

    /// Runs a command inside, in a unit of its own, and hands over its output line by line.
    fn run(
        &mut self,
        argv: &[&str],
        timeout: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Exit>;

    /// Writes a file inside. Meant for small things: the big ones travel in the payload.
    fn put(&mut self, path: &Path, content: &[u8]) -> Result<()>;

    /// Shuts the guest down as an administrator does, and waits until it is up again. Its disk stays as it was.
    fn reboot(&mut self) -> Result<()>;

    /// What the machine's console has shown so far.
    fn console(&self) -> String;
}

/// What a guest is started with.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    pub payload: &'a Payload,
    /// Ports inside the guest that become reachable at the same loopback port of the host. QEMU only.
    pub forwards: &'a [Forward],
}

#[derive(Debug, Clone, Copy)]
pub struct Forward {
    pub host_port: u16,
    pub guest_port: u16,
}

/// Builds what is missing, then boots.
pub fn boot(name: GuestName, how: &Boot<'_>) -> Result<Box<dyn Guest>> {
    Ok(match name.kind {
        Kind::Nspawn => {
            let built = build::root(name.release)?;
            Box::new(nspawn::Nspawn::boot(name, &built, how)?)
        }
        Kind::Qemu => Box::new(boot_machine(name, how)?),
    })
}

/// The same for a guest that is to have ports and a shell.
pub fn boot_machine(name: GuestName, how: &Boot<'_>) -> Result<Qemu> {
    anyhow::ensure!(
        name.kind == Kind::Qemu,
        "{name} is a container: use a qemu guest"
    );
    let built = build::root(name.release)?;
    let snapshot = snapshot::take(name.release, &built)?;
    Qemu::resume(name, &built, &snapshot, how)
}

/// Builds all that `boot` needs, so that a later boot takes seconds.
pub fn prepare(name: GuestName) -> Result<()> {
    let built = build::root(name.release)?;
    match name.kind {
        Kind::Nspawn => Ok(()),
        Kind::Qemu => snapshot::take(name.release, &built).map(drop),
    }
}
