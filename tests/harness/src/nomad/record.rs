//! Stands between a real agent and a plugin, passes every byte on, and keeps requests and answers as files: one protobuf
//! message each, named by number and method. The agent takes it for the plugin.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Request, Response};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};

use super::process::Handshake;

/// Larger than anything Nomad sends, so that nothing ever waits for a window.
const WINDOW_BYTES: u32 = 1 << 30;
/// A gRPC message begins with a flag and its length.
const PREFIX_BYTES: usize = 5;

/// Starts the plugin, greets the agent in its place, and serves until the plugin ends.
pub async fn serve(plugin: &Path, args: &[String], records: &Path) -> Result<()> {
    fs::create_dir_all(records)?;
    let mut child = Command::new(plugin)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| plugin.display().to_string())?;
    let target = greeting(&mut child).await?.socket;

    let dir = tempfile::tempdir()?;
    let own = dir.path().join("plugin");
    let listener = UnixListener::bind(&own)?;
    let mut out = std::io::stdout();
    writeln!(out, "1|2|unix|{}|grpc|", own.display())?;
    out.flush()?;

    let recorder = Arc::new(Recorder {
        dir: records.to_owned(),
        next: AtomicU32::new(first_free(records)?),
    });
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (agent, _) = accepted?;
                let (target, recorder) = (target.clone(), recorder.clone());
                // Either side may hang up at any time; the other then does as well.
                tokio::spawn(async move { connection(agent, &target, recorder).await });
            }
            status = child.wait() => {
                status?;
                return Ok(());
            }
        }
    }
}

async fn greeting(child: &mut Child) -> Result<Handshake> {
    let pipe = child.stdout.take().context("stdout is a pipe")?;
    let mut lines = BufReader::new(pipe).lines();
    let line = lines
        .next_line()
        .await?
        .context("the plugin ended before its handshake")?;
    // The rest goes nowhere, but must be read.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Handshake::parse(&line)
}

/// Several instances of a plugin write into one directory, one after the other.
fn first_free(records: &Path) -> Result<u32> {
    Ok(u32::try_from(fs::read_dir(records)?.count())? + 1)
}

#[derive(Debug)]
struct Recorder {
    dir: PathBuf,
    next: AtomicU32,
}

impl Recorder {
    /// Keeps every whole message of a body.
    fn keep(&self, name: &str, mut body: &[u8]) {
        while let Some((prefix, rest)) = body.split_at_checked(PREFIX_BYTES) {
            let len = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            let Some((message, rest)) = rest.split_at_checked(len) else {
                return;
            };
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            let _ = fs::write(self.dir.join(format!("{number:04}-{name}.bin")), message);
            body = rest;
        }
    }
}

async fn connection(agent: UnixStream, target: &Path, recorder: Arc<Recorder>) -> Result<()> {
    let plugin = UnixStream::connect(target).await?;
    let mut agent = h2::server::Builder::new()
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .handshake::<_, Bytes>(agent)
        .await?;
    let (plugin, driven) = h2::client::Builder::new()
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .handshake::<_, Bytes>(plugin)
        .await?;
    tokio::spawn(driven);
    while let Some(call) = agent.accept().await {
        let (request, respond) = call?;
        let (plugin, recorder) = (plugin.clone().ready().await?, recorder.clone());
        tokio::spawn(async move { pass(request, respond, plugin, recorder).await });
    }
    Ok(())
}

async fn pass(
    request: Request<RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    mut plugin: h2::client::SendRequest<Bytes>,
    recorder: Arc<Recorder>,
) -> Result<()> {
    let (head, body) = request.into_parts();
    let method = head
        .uri
        .path()
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .to_owned();
    let answered = format!("{method}-answer");
    let recorded = recorder.clone();
    let (answer, up) = plugin.send_request(Request::from_parts(head, ()), false)?;
    tokio::spawn(async move {
        let mut kept = Vec::new();
        let _ = copy(body, up, |chunk| kept.extend_from_slice(chunk)).await;
        recorder.keep(&method, &kept);
    });
    let (head, body) = answer.await?.into_parts();
    let ends = body.is_end_stream();
    let down = respond.send_response(Response::from_parts(head, ()), ends)?;
    if ends {
        return Ok(());
    }
    let mut kept = Vec::new();
    copy(body, down, |chunk| kept.extend_from_slice(chunk)).await?;
    recorded.keep(&answered, &kept);
    Ok(())
}

/// Passes a body and its trailers on.
async fn copy(
    mut from: RecvStream,
    mut to: SendStream<Bytes>,
    mut see: impl FnMut(&[u8]),
) -> Result<()> {
    while let Some(chunk) = from.data().await {
        let chunk = chunk?;
        from.flow_control().release_capacity(chunk.len())?;
        see(&chunk);
        to.send_data(chunk, false)?;
    }
    match from.trailers().await? {
        Some(trailers) => to.send_trailers(trailers)?,
        None => to.send_data(Bytes::new(), true)?,
    }
    Ok(())
}
