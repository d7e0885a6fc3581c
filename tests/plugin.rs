//! What Nomad sees of the plugin, without root and without systemd: `process` drives the built binary, the others an API
//! served within the test, with tasks that exist in memory only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_debug_implementations
)]

#[path = "plugin/about.rs"]
mod about;
#[path = "plugin/client.rs"]
mod client;
#[path = "plugin/exec.rs"]
mod exec;
#[path = "plugin/memory.rs"]
mod memory;
#[path = "plugin/process.rs"]
mod process;
#[path = "plugin/served.rs"]
mod served;
#[path = "plugin/streams.rs"]
mod streams;
#[path = "plugin/tasks.rs"]
mod tasks;
