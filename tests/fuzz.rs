//! Whatever reads bytes of others, with inputs near to real ones: jobs' and operators' configuration, what is kept on disk, what
//! systemd answers and the kernel logs. One test per target; each holds a parser to more than not to panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "fuzz/audit.rs"]
mod audit;
#[path = "fuzz/bus.rs"]
mod bus;
#[path = "fuzz/kept.rs"]
mod kept;
#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/names.rs"]
mod names;
#[path = "fuzz/task.rs"]
mod task;
#[path = "fuzz/text.rs"]
mod text;
