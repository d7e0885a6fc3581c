//! The life of one task, from its start to the last word about it. Knows nothing of gRPC: `plugin` translates.

mod ahead;
mod copies;
mod cpus;
mod denials;
mod dir;
mod driver;
mod events;
mod exec;
mod facts;
mod fingerprint;
mod helper;
pub(crate) mod log;
mod oom;
mod recover;
mod start;
pub mod state;
mod stats;
mod stop;
mod table;
mod takeover;
mod thread;
pub mod types;
mod wait;
mod watches;

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio_stream::Stream;

pub use self::ahead::Ahead;
pub use self::exec::Session;
use crate::config::plugin::PluginConfig;
pub use start::{Output, Tracing};
pub use stop::StopStep;
pub use table::{RUN_DIR, TaskTable};
use types::{
    Destroy, DriverError, ExitResult, Fingerprint, Saved, Streams, TaskEvent, TaskId, TaskRequest,
    TaskStatus, Topology, Usage,
};

/// A stream that lives as long as whoever reads it.
pub type Flow<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// The verbs of a driver. `start`, `recover`, `stop` and `destroy` are carried to their end even if the caller goes
/// away; `wait` is dropped with its caller.
pub trait Tasks: Send + Sync + 'static {
    /// Comes before any task is started or recovered, and never in a process that only validates a configuration.
    fn configure(
        &self,
        config: PluginConfig,
        topology: Option<Topology>,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    /// The state of the host as it changes. The receiver holds the first one when this returns.
    fn fingerprint(&self) -> watch::Receiver<Fingerprint>;

    /// The plugin ends, its tasks stay: what was kept for later starts goes, within a second.
    fn leave(&self) -> impl Future<Output = ()> + Send;

    fn start(
        &self,
        request: TaskRequest,
    ) -> impl Future<Output = Result<Saved, DriverError>> + Send;

    /// Takes over a task of an earlier plugin process, or one this process knows already.
    fn recover(
        &self,
        request: TaskRequest,
        saved: Saved,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    /// Every caller gets the same result, until the task is destroyed.
    fn wait(&self, id: &TaskId) -> impl Future<Output = Result<ExitResult, DriverError>> + Send;

    /// Sends the signal, and kills what is left of the task after the timeout.
    fn stop(
        &self,
        id: &TaskId,
        timeout: Duration,
        signal: &str,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    /// The last call for an id, also for one whose recovery failed and of which only the id is known.
    fn destroy(
        &self,
        id: &TaskId,
        how: Destroy,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    fn inspect(&self, id: &TaskId) -> impl Future<Output = Result<TaskStatus, DriverError>> + Send;

    fn signal(
        &self,
        id: &TaskId,
        signal: &str,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    /// Starts a command in a running task, as one of its processes. It ends with whoever holds the session.
    fn exec(
        &self,
        id: &TaskId,
        command: Vec<String>,
        streams: Streams,
    ) -> impl Future<Output = Result<Session, DriverError>> + Send;

    /// Ends with the task; empty for an unknown id.
    fn stats(&self, id: &TaskId, interval: Duration) -> Flow<Usage>;

    fn events(&self) -> Flow<TaskEvent>;
}
