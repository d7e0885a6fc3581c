//! The agent's API: one request a connection, over loopback. Enough HTTP for a server that we start ourselves.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Nomad's own calls wait for nothing; an emulated guest is slow.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
pub(super) struct Api {
    pub port: u16,
}

impl Api {
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.json("GET", path, None).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.json("POST", path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<Value> {
        self.json("DELETE", path, None).await
    }

    async fn json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.text(method, path, body).await?;
        if answer.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).with_context(|| format!("{method} {path}: {answer}"))
    }

    /// The body of an answer; anything but a success is an error with the server's words.
    pub async fn text(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0: the answer comes in one piece and ends with the connection.
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let exchange = async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
            stream.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = timeout(ANSWER_WAIT, exchange)
            .await
            .with_context(|| format!("{method} {path}: no answer"))??;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .with_context(|| format!("{method} {path}: {answer}"))?;
        match head.split(' ').nth(1) {
            Some(status) if status.starts_with('2') => Ok(body.to_owned()),
            _ => bail!(
                "{method} {path}: {}: {}",
                head.lines().next().unwrap_or_default(),
                body.trim()
            ),
        }
    }
}
