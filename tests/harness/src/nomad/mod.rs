//! Does to a driver what Nomad does: starts its binary as go-plugin would, keeps the streams open, sends schemas' MessagePack,
//! builds allocations, runs tasks, restarts, reattaches. Where Nomad would panic, hang or spin, this client notes a
//! violation instead, and [`Agent::finish`] reports them all. It knows nothing of the driver but its wire contract.
//!
//! ```no_run
//! # async fn example(job: &str) -> anyhow::Result<()> {
//! use harness::nomad::{Agent, Config};
//! let agent = Agent::start("target/debug/nomad-driver-exec2", Config::default()).await?;
//! let alloc = agent.run(job).await?;
//! let exit = alloc.task("web")?.wait().await?;
//! assert!(exit.success());
//! println!("{}", alloc.stdout("web")?);
//! alloc.stop().await?;
//! agent.finish().await
//! # }
//! ```

mod agent;
mod allocation;
mod calls;
mod cgroup;
mod check;
mod connection;
mod hclog;
mod launch;
mod logmon;
mod msgpack;
mod network;
mod process;
pub mod real;
pub mod record;
#[cfg(test)]
mod recorded;
pub mod schema;
mod task;
mod version;
mod violations;

pub use agent::{Agent, Config, Crashed, Metrics, PluginBlock};
pub use allocation::Allocation;
pub use calls::Calls;
pub use connection::Connection;
pub use hclog::{Level, Line};
pub use msgpack::{Profile, encode};
pub use process::Handshake;
pub use task::{Exit, Task};
pub use version::Version;
pub use violations::{RpcError, Violations};

/// The wire contract, generated from `proto/`.
#[allow(missing_debug_implementations, unused_qualifications, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));

    pub use self::hashicorp::nomad::plugins::base::proto as base;
    pub use self::hashicorp::nomad::plugins::drivers::proto as driver;
    pub use self::hashicorp::nomad::plugins::shared::{hclspec, structs};
}
