//! The plugin's process: started, handshaken with and ended as go-plugin does it, its two pipes read to their end.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::hclog::{self, Line};
use super::{Connection, Violations};

const COOKIE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
const HANDSHAKE_WAIT: Duration = Duration::from_secs(60);
/// How long go-plugin waits after Shutdown before it kills.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(2);
/// go-plugin waits for the pipes' end without limit; this is when the client calls it a hang.
const PIPES_WAIT: Duration = Duration::from_secs(5);
const EXIT_WAIT: Duration = Duration::from_secs(3);
const LINE_MAX_BYTES: usize = 64 * 1024;

/// The line a plugin greets with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    pub socket: PathBuf,
}

impl Handshake {
    /// Reads `1|2|unix|<absolute path>|grpc|`.
    pub fn parse(line: &str) -> Result<Self> {
        let fields: Vec<&str> = line.split('|').collect();
        match fields.as_slice() {
            ["1", "2", "unix", path, "grpc", ""] if path.starts_with('/') => Ok(Handshake {
                socket: PathBuf::from(path),
            }),
            _ => bail!("handshake {line:?} is not `1|2|unix|<absolute path>|grpc|`"),
        }
    }
}

/// A running plugin.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pub pid: u32,
    pub socket: PathBuf,
    /// End when the pipes do.
    pipes: [JoinHandle<()>; 2],
    violations: Violations,
}

/// What the plugin has logged so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<Line>>>);

impl Log {
    pub fn lines(&self) -> Vec<Line> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn push(&self, line: Line) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}

impl Process {
    pub async fn start(
        binary: &Path,
        args: &[String],
        env: &[(String, String)],
        log: Log,
        violations: Violations,
    ) -> Result<Self> {
        let mut command = Command::new(binary);
        command
            .args(args)
            .env("NOMAD_PLUGIN_MAGIC_COOKIE", COOKIE)
            .env("PLUGIN_MIN_PORT", "10000")
            .env("PLUGIN_MAX_PORT", "25000")
            .env("PLUGIN_PROTOCOL_VERSIONS", "2")
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        let pid = child.id().context("the plugin has a pid")?;
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let stderr = child.stderr.take().context("stderr is a pipe")?;

        let raw = Arc::new(Mutex::new(String::new()));
        let (greet, greeting) = oneshot::channel();
        let out = tokio::spawn(read_stdout(stdout, greet, violations.clone()));
        let err = {
            let (log, violations, raw) = (log.clone(), violations.clone(), raw.clone());
            tokio::spawn(async move {
                each_line(stderr, &violations, "stderr", |line| {
                    let mut raw = raw.lock().unwrap_or_else(PoisonError::into_inner);
                    raw.push_str(line);
                    raw.push('\n');
                    hclog::read(line, &violations)
                        .into_iter()
                        .for_each(|line| log.push(line));
                })
                .await;
            })
        };
        let mut process = Process {
            child,
            pid,
            socket: PathBuf::new(),
            pipes: [out, err],
            violations,
        };
        match timeout(HANDSHAKE_WAIT, greeting).await {
            Ok(Ok(line)) => process.socket = Handshake::parse(&line)?.socket,
            Ok(Err(_)) => {
                let status = process.child.wait().await?;
                process.drain().await;
                let raw = raw.lock().unwrap_or_else(PoisonError::into_inner).clone();
                bail!(
                    "the plugin ended before its handshake ({status}): {}",
                    raw.trim_end()
                );
            }
            Err(_) => bail!("the plugin gave no handshake within {HANDSHAKE_WAIT:?}"),
        }
        Ok(process)
    }

    /// Ends the plugin the way go-plugin does: Shutdown, two seconds, SIGKILL, then both pipes to their end.
    pub async fn shut_down(mut self, connection: &Connection) -> Result<ExitStatus> {
        connection.close();
        let mut controller = connection.controller();
        let asked = controller.shutdown(super::proto::plugin::Empty {});
        // The plugin may be gone before its answer is; only its exit counts.
        let _ = timeout(SHUTDOWN_WAIT, asked).await;
        let status = match timeout(SHUTDOWN_WAIT, self.child.wait()).await {
            Ok(status) => status?,
            Err(_) => {
                self.violations
                    .note("the plugin did not exit within 2 s of Shutdown");
                self.child.kill().await?;
                self.child.wait().await?
            }
        };
        self.drain().await;
        Ok(status)
    }

    /// Kills it without a word.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await?;
        self.drain().await;
        Ok(())
    }

    /// The same, and leaves it to be found.
    pub async fn kill_in_place(&mut self) -> Result<()> {
        self.child.start_kill()?;
        self.child.wait().await?;
        Ok(())
    }

    /// Stops reading its pipes, as an agent that died.
    pub fn abandon_pipes(&mut self) {
        for pipe in &self.pipes {
            pipe.abort();
        }
    }

    /// Waits a moment for an exit that may be on its way, as Nomad does when a call was cut off.
    pub async fn has_exited(&mut self) -> bool {
        timeout(EXIT_WAIT, self.child.wait()).await.is_ok()
    }

    async fn drain(&mut self) {
        for (pipe, name) in self.pipes.iter_mut().zip(["stdout", "stderr"]) {
            if timeout(PIPES_WAIT, &mut *pipe).await.is_err() {
                pipe.abort();
                self.violations.note(format!(
                    "something still holds the plugin's {name} after its exit, so Nomad's agent would hang"
                ));
            }
        }
    }
}

/// Hands on the first line; the rest is read and thrown away, as go-plugin does.
async fn read_stdout(
    pipe: impl AsyncRead + Unpin,
    greet: oneshot::Sender<String>,
    violations: Violations,
) {
    let mut greet = Some(greet);
    each_line(pipe, &violations, "stdout", |line| {
        if let Some(greet) = greet.take() {
            let _ = greet.send(line.to_owned());
        }
    })
    .await;
}

async fn each_line(
    pipe: impl AsyncRead + Unpin,
    violations: &Violations,
    name: &str,
    mut act: impl FnMut(&str),
) {
    let mut reader = BufReader::new(pipe);
    let mut bytes = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut bytes).await {
        if bytes.len() > LINE_MAX_BYTES {
            violations.note(format!("{name}: a line of {} bytes", bytes.len()));
        }
        let line = String::from_utf8_lossy(&bytes);
        act(line.trim_end_matches('\n'));
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_nomad_s_handshake_is_taken() {
        let handshake = Handshake::parse("1|2|unix|/tmp/plugin1|grpc|").unwrap();
        assert_eq!(handshake.socket, Path::new("/tmp/plugin1"));
        for line in [
            "",
            "1|2|unix|/tmp/plugin1|grpc",
            "2|2|unix|/tmp/plugin1|grpc|",
            "1|1|unix|/tmp/plugin1|grpc|",
            "1|2|tcp|127.0.0.1:1|grpc|",
            "1|2|unix|plugin1|grpc|",
            "1|2|unix|/tmp/plugin1|netrpc|",
            "1|2|unix|/tmp/plugin1|grpc||true",
        ] {
            Handshake::parse(line).unwrap_err();
        }
    }
}
