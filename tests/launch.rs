//! The helper on the running kernel, as root: started through the library, judged by what /proc and the file system say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "launch/confine.rs"]
mod confine;
#[path = "launch/exec.rs"]
mod exec;
#[path = "launch/life.rs"]
mod life;
#[path = "launch/process.rs"]
mod process;
#[path = "launch/seccomp.rs"]
mod seccomp;
#[path = "launch/session.rs"]
mod session;
#[path = "launch/stage.rs"]
mod stage;
#[path = "launch/stdio.rs"]
mod stdio;
#[path = "launch/view.rs"]
mod view;
#[path = "launch/volumes.rs"]
mod volumes;
