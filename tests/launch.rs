//! The helper on the running kernel, as root: started through the library, judged by what /proc and the file system say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "launch/life.rs"]
mod life;
#[path = "launch/stage.rs"]
mod stage;
