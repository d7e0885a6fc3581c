//! `make bench`: how long a start takes, what a task costs, how both grow. Inside a guest it drives this driver and others,
//! candidates in turns (`measure`), and tells every sample; on the host it keeps them (`raw`) and makes tables and a chart of
//! them (`report`, `chart`). Nothing passes or fails by how long it takes.

mod bus;
mod chart;
mod crowds;
pub mod figures;
mod kernel;
mod measure;
mod place;
mod programs;
pub mod raw;
pub mod report;
pub mod run;
pub mod size;
mod statistics;
mod subject;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

pub use measure::{Candidates, Listener, measure};

/// Where the measured command lies inside: every driver lets its tasks execute what is there.
const STAMP: &str = "/usr/local/bin/exec2-stamp";
const STAMP_FILE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stamp"));

/// What a guest limits tasks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controllers {
    /// A container on a host whose controllers are elsewhere.
    None,
    All,
}

impl Controllers {
    pub fn here() -> Result<Controllers> {
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
        let has = |name| controllers.split_whitespace().any(|there| there == name);
        Ok(match has("cpu") && has("memory") {
            true => Controllers::All,
            false => Controllers::None,
        })
    }
}

fn install_stamp() -> Result<()> {
    fs::write(STAMP, STAMP_FILE).context(STAMP)?;
    fs::set_permissions(STAMP, fs::Permissions::from_mode(0o755))?;
    // An exec of what is dirty in the page cache is no different, but its write-back disturbs.
    nix::unistd::sync();
    debug_assert!(Path::new(STAMP).is_file());
    Ok(())
}
