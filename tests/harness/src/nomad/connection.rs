//! The one connection of an agent to a plugin, with the streams that Nomad opens at once and never lets go of.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::proto::base::base_plugin_client::BasePluginClient;
use super::proto::driver::driver_client::DriverClient;
use super::proto::driver::{
    DriverTaskEvent, FingerprintRequest, FingerprintResponse, TaskEventsRequest,
};
use super::proto::plugin::grpc_broker_client::GrpcBrokerClient;
use super::proto::plugin::grpc_controller_client::GrpcControllerClient;
use super::proto::plugin::grpc_stdio_client::GrpcStdioClient;
use super::{Violations, check};

/// Nomad waits up to 50 s, and start-up waits with it; a driver that takes this long is too slow.
const FIRST_FINGERPRINT: Duration = Duration::from_secs(10);

/// A plugin's socket, connected. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    closing: Arc<AtomicBool>,
    fingerprints: watch::Receiver<Option<FingerprintResponse>>,
    fingerprint: Arc<watch::Sender<Option<FingerprintResponse>>>,
    events: Arc<Mutex<Vec<DriverTaskEvent>>>,
    streams: Arc<Mutex<JoinSet<()>>>,
    violations: Violations,
}

impl Connection {
    pub(super) async fn open(socket: &Path, violations: Violations) -> Result<Self> {
        let path = socket.to_owned();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // go-plugin dials a name that is never resolved; a driver must not look at it.
        let channel = Endpoint::from_static("http://unused")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        let (fingerprint, fingerprints) = watch::channel(None);
        let connection = Connection {
            channel,
            closing: Arc::default(),
            fingerprints,
            fingerprint: Arc::new(fingerprint),
            events: Arc::default(),
            streams: Arc::default(),
            violations,
        };
        connection.hold_plugin_streams();
        Ok(connection)
    }

    pub fn driver(&self) -> DriverClient<Channel> {
        DriverClient::new(self.channel.clone()).max_decoding_message_size(i32::MAX as usize)
    }

    pub fn base(&self) -> BasePluginClient<Channel> {
        BasePluginClient::new(self.channel.clone())
    }

    pub fn controller(&self) -> GrpcControllerClient<Channel> {
        GrpcControllerClient::new(self.channel.clone())
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// From here on streams may end.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Lets go of every stream, as an agent that died.
    pub(super) fn drop_streams(&self) {
        self.close();
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
    }

    /// The last fingerprint.
    pub fn fingerprint(&self) -> Option<FingerprintResponse> {
        self.fingerprints.borrow().clone()
    }

    /// Waits for a fingerprint that satisfies a condition.
    pub async fn fingerprint_where(
        &self,
        wait: Duration,
        condition: impl Fn(&FingerprintResponse) -> bool,
    ) -> Result<FingerprintResponse> {
        let mut fingerprints = self.fingerprints.clone();
        let found = fingerprints.wait_for(|seen| seen.as_ref().is_some_and(&condition));
        let found = timeout(wait, found).await;
        let found = found.with_context(|| {
            format!(
                "no such fingerprint within {wait:?}; the last: {:?}",
                self.fingerprint()
            )
        })?;
        found?.clone().context("a fingerprint")
    }

    /// Task events so far.
    pub fn events(&self) -> Vec<DriverTaskEvent> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn hold(&self, stream: impl Future<Output = String> + Send + 'static) {
        let (closing, violations) = (self.closing.clone(), self.violations.clone());
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.spawn(async move {
            let end = stream.await;
            if !closing.load(Ordering::SeqCst) {
                violations.note(end);
            }
        });
    }

    /// go-plugin's own two streams.
    fn hold_plugin_streams(&self) {
        let mut stdio = GrpcStdioClient::new(self.channel.clone());
        self.hold(async move {
            match stdio.stream_stdio(()).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    while let Ok(Some(_)) = stream.message().await {}
                    "GRPCStdio.StreamStdio ended".into()
                }
                Err(status) => format!("GRPCStdio.StreamStdio: {status}"),
            }
        });
        let mut broker = GrpcBrokerClient::new(self.channel.clone());
        self.hold(async move {
            // Says nothing, and ends with this stream: a request without end would keep the socket of a dead agent open.
            let (_silent, requests) = mpsc::channel(1);
            match broker.start_stream(ReceiverStream::new(requests)).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    while let Ok(Some(_)) = stream.message().await {}
                    "GRPCBroker.StartStream ended".into()
                }
                Err(status) => format!("GRPCBroker.StartStream: {status}"),
            }
        });
    }

    /// Nomad's two streams of a driver; returns with the first fingerprint.
    pub(super) async fn hold_driver_streams(&self) -> Result<FingerprintResponse> {
        let (mut driver, seen, violations) = (
            self.driver(),
            self.fingerprint.clone(),
            self.violations.clone(),
        );
        self.hold(async move {
            match driver.fingerprint(FingerprintRequest {}).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    while let Ok(Some(fingerprint)) = stream.message().await {
                        check::fingerprint(&fingerprint, &violations);
                        seen.send_replace(Some(fingerprint));
                    }
                    "Fingerprint ended, which Nomad answers with a busy loop".into()
                }
                Err(status) => format!("Fingerprint: {status}"),
            }
        });
        let (mut driver, events, violations) =
            (self.driver(), self.events.clone(), self.violations.clone());
        self.hold(async move {
            match driver.task_events(TaskEventsRequest {}).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    while let Ok(Some(event)) = stream.message().await {
                        check::event(&event, &violations);
                        events
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(event);
                    }
                    "TaskEvents ended, which Nomad answers with a busy loop".into()
                }
                Err(status) => format!("TaskEvents: {status}"),
            }
        });
        self.fingerprint_where(FIRST_FINGERPRINT, |_| true).await
    }
}
