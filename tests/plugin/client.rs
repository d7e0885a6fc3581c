//! The part of Nomad that starts a plugin and calls it, as plainly as it can be had.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

pub const COOKIE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
pub const BASE: &str = "/hashicorp.nomad.plugins.base.proto.BasePlugin";
pub const DRIVER: &str = "/hashicorp.nomad.plugins.drivers.proto.Driver";

/// The built binary, without any of this process' own plugin variables.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-driver-exec2"));
    for name in ["NOMAD_PLUGIN_MAGIC_COOKIE", "PLUGIN_UNIX_SOCKET_DIR"] {
        command.env_remove(name);
    }
    command
}

/// A plugin process, launched as Nomad does it.
pub struct Plugin {
    pub child: Child,
    pub line: String,
    pub socket: PathBuf,
    pub stdout: BufReader<ChildStdout>,
    pub stderr: Option<ChildStderr>,
}

impl Plugin {
    /// With its socket in `dir`.
    pub fn launch(dir: &Path) -> Self {
        Self::spawn(binary(), "PLUGIN_UNIX_SOCKET_DIR", dir)
    }

    pub fn spawn(mut command: Command, variable: &str, dir: &Path) -> Self {
        let mut child = command
            .env("NOMAD_PLUGIN_MAGIC_COOKIE", COOKIE)
            .env("PLUGIN_PROTOCOL_VERSIONS", "2")
            .env(variable, dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let socket = line.split('|').nth(3).unwrap_or_default().into();
        let stderr = child.stderr.take();
        Self {
            child,
            line,
            socket,
            stdout,
            stderr,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid().cast_signed());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// How it ended, if it did within the two seconds that Nomad grants.
    pub async fn exit(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }

    /// All that came on stdout after the handshake, once the process is gone.
    pub fn rest_of_stdout(&mut self) -> String {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        rest
    }

    pub fn log(&mut self) -> String {
        let mut log = String::new();
        self.stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        log
    }

    /// One line of `/proc/<pid>/status`.
    pub fn status(&self, name: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit('\t').next().unwrap().into()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn ended_well(status: Option<ExitStatus>) -> bool {
    status.is_some_and(|status| status.code() == Some(0) && status.signal().is_none())
}

/// One connection.
#[derive(Clone)]
pub struct Client(Grpc<Channel>);

impl Client {
    pub async fn connect(socket: &Path) -> Self {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self(Grpc::new(channel).max_decoding_message_size(usize::MAX))
    }

    pub async fn call<Q, R>(&self, service: &str, method: &str, message: Q) -> Result<R, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let codec: ProstCodec<Q, R> = ProstCodec::default();
        let answer = grpc
            .unary(Request::new(message), path(service, method), codec)
            .await?;
        Ok(answer.into_inner())
    }

    pub async fn stream<Q, R>(
        &self,
        service: &str,
        method: &str,
        message: Q,
    ) -> Result<Streaming<R>, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let codec: ProstCodec<Q, R> = ProstCodec::default();
        let answer = grpc
            .server_streaming(Request::new(message), path(service, method), codec)
            .await?;
        Ok(answer.into_inner())
    }

    /// A call with these messages to the plugin.
    pub async fn pour<Q, R>(
        &self,
        service: &str,
        method: &str,
        messages: impl tokio_stream::Stream<Item = Q> + Send + 'static,
    ) -> Result<Streaming<R>, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let codec: ProstCodec<Q, R> = ProstCodec::default();
        let answer = grpc
            .streaming(Request::new(messages), path(service, method), codec)
            .await?;
        Ok(answer.into_inner())
    }

    /// A call whose messages to the plugin never come to an end.
    pub async fn talk<Q, R>(
        &self,
        service: &str,
        method: &str,
        first: Option<Q>,
    ) -> Result<Streaming<R>, Status>
    where
        Q: Message + 'static,
        R: Message + Default + 'static,
    {
        use tokio_stream::StreamExt;
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let codec: ProstCodec<Q, R> = ProstCodec::default();
        let messages = tokio_stream::iter(first).chain(tokio_stream::pending());
        let answer = grpc
            .streaming(Request::new(messages), path(service, method), codec)
            .await?;
        Ok(answer.into_inner())
    }
}

fn path(service: &str, method: &str) -> PathAndQuery {
    format!("{service}/{method}").parse().unwrap()
}

/// Whether a stream is still open and silent after a moment.
pub async fn stays_open<R>(stream: &mut Streaming<R>) -> bool {
    let moment = Duration::from_millis(200);
    tokio::time::timeout(moment, stream.message())
        .await
        .is_err()
}
