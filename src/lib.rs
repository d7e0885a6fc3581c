//! A Nomad task driver that runs each task in a systemd scope, confined by Landlock.
//!
//! The rooms, from the outside in:
//!
//! - [`plugin`] is Nomad's side: go-plugin and gRPC. [`cli`] is for people, and [`job`] turns what they write into requests.
//!   [`agent`] reads the configuration of Nomad's agent for them.
//! - [`config`] is what operators and job authors may write.
//! - [`plan`] decides, purely: configuration in, one `Plan` out.
//! - [`task`] is the life of a task: it acts on plans, through the next three.
//! - [`systemd`] is PID 1's side: scopes over D-Bus. [`cgroup`] reads a scope's files.
//! - [`launch`] is the helper: from a parked process inside the scope to the command's exec, then its supervisor.
//! - [`host`], [`mountinfo`] and [`users`] look facts up, [`audit`] hears what Landlock denies. [`record`] is how a task's end is kept, [`text`] the only way a job's words leave
//!   us, [`sys`] the calls that no library has, and the only unsafe code. [`breakpoint`] is for tests.

pub mod agent;
pub mod audit;
pub mod breakpoint;
pub mod cgroup;
pub mod cli;
pub mod config;
pub mod host;
pub mod job;
pub mod launch;
pub mod mountinfo;
pub mod plan;
pub mod plugin;
/// The wire contract, generated from `proto/`.
#[allow(missing_debug_implementations, unused_qualifications, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}
pub mod record;
pub mod sys;
pub mod systemd;
pub mod task;
pub mod text;
pub mod users;
