//! Nomad's side: go-plugin's handshake and the gRPC services. Converts and hands on; what happens to a task is decided
//! elsewhere.

pub mod base;
pub mod codec;
pub mod controller;
pub mod convert;
pub mod driver;
pub mod errors;
mod exec;
pub mod handshake;
pub mod hclspec;
mod journal;
pub mod log;
pub mod peer;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::net::UnixListener;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tonic::transport::Server;
use tracing::{error, info};

use crate::proto::grpc::health::v1::health_server::HealthServer;
use crate::proto::hashicorp::nomad::plugins::base::proto::base_plugin_server::BasePluginServer;
use crate::proto::hashicorp::nomad::plugins::drivers::proto::driver_server::DriverServer;
use crate::proto::plugin::grpc_broker_server::GrpcBrokerServer;
use crate::proto::plugin::grpc_controller_server::GrpcControllerServer;
use crate::proto::plugin::grpc_stdio_server::GrpcStdioServer;
use crate::task::Tasks;
use handshake::Socket;

/// The agent's own limit is 2 GiB; a job's whole environment and templates fit in this one.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// For the answer to Shutdown to leave; Nomad kills after two seconds.
const FAREWELL: Duration = Duration::from_millis(100);

/// Whether this process was started by Nomad's agent, whatever its arguments are.
pub fn is_started_by_nomad() -> bool {
    handshake::check_cookie(|name| env::var_os(name)).is_ok()
}

/// The life of the plugin process. `tasks` is called inside the runtime, once Nomad is known to have started us.
pub fn run<T: Tasks>(tasks: impl FnOnce() -> io::Result<T>) -> ExitCode {
    if let Err(error) = handshake::check_cookie(|name| env::var_os(name)) {
        let _ = writeln!(io::stderr(), "{error}");
        return ExitCode::FAILURE;
    }
    // It knows the environments of all tasks, tokens included, and its end would be no reason to write them down.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    log::init();
    match live(tasks) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(%error, "the driver plugin cannot run");
            ExitCode::FAILURE
        }
    }
}

fn live<T: Tasks>(tasks: impl FnOnce() -> io::Result<T>) -> Result<(), Box<dyn Error>> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        // Ctrl-C reaches the agent's whole process group, and it is the agent that decides when we go. A handler, other
        // than SIG_IGN, is not inherited through exec, so tasks do not learn to ignore it.
        let _interrupts = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let places = handshake::places(|name| env::var_os(name));
        let (socket, listener) = Socket::bind(&places)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let tasks = Arc::new(tasks()?);
        handshake::announce(&socket.line())?;
        let terminated = async {
            terminate.recv().await;
            info!("SIGTERM: the driver plugin leaves; its tasks stay");
        };
        serve(listener, tasks, terminated).await
    });
    // Without waiting for what is still blocked somewhere: the deadline is Nomad's.
    runtime.shutdown_background();
    outcome
}

/// What a client may send on one stream before it is read: HTTP/2's own default.
const STREAM_WINDOW_BYTES: u32 = 65_535;
/// RFC 9113, 6.9.1.
const MAX_CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Serves until Nomad asks us to leave or `stop` is over. Open streams are not waited for: those of go-plugin never end.
pub async fn serve<T: Tasks>(
    listener: UnixListener,
    tasks: Arc<T>,
    stop: impl Future<Output = ()>,
) -> Result<(), Box<dyn Error>> {
    let leave = Arc::new(Notify::new());
    let driver = DriverServer::new(driver::Driver {
        tasks: Arc::clone(&tasks),
    });
    let base = BasePluginServer::new(base::Base {
        tasks: Arc::clone(&tasks),
    });
    let controller = GrpcControllerServer::new(controller::Controller {
        leave: Arc::clone(&leave),
    });
    // Nomad has one connection for all calls. With hyper's 1 MiB for it, one session whose command does not read would take the
    // whole of it, and no other call would be heard. So it is as wide as HTTP/2 lets it be, and each stream is bounded.
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(MAX_CONNECTION_WINDOW_BYTES)
        .add_service(controller)
        .add_service(GrpcBrokerServer::new(controller::Silent))
        .add_service(GrpcStdioServer::new(controller::Silent))
        .add_service(HealthServer::new(controller::Alive))
        .add_service(base.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(driver.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming(peer::connections(listener));
    tokio::select! {
        served = server => served?,
        () = stop => {}
        () = leave.notified() => tokio::time::sleep(FAREWELL).await,
    }
    tasks.leave().await;
    Ok(())
}
