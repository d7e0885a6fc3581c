//! The little of QEMU's monitor protocol that a snapshot takes, over the emulator's own stdin and stdout.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

#[derive(Debug)]
pub struct Monitor {
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Monitor {
    pub fn of(child: &mut Child) -> Result<Monitor> {
        let commands = child
            .stdin
            .take()
            .context("QEMU was started without a monitor")?;
        let answers = BufReader::new(
            child
                .stdout
                .take()
                .context("QEMU was started without a monitor")?,
        );
        let mut monitor = Monitor { commands, answers };
        let greeting = monitor.message()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greets with {greeting}");
        }
        monitor.call("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.commands, "{line}").context("QEMU is gone")?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // Everything else is an event.
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// Stops the machine and writes its whole state to a file.
    pub fn save(&mut self, state: &str, patience: Duration) -> Result<()> {
        self.call("stop", json!({}))?;
        // By default QEMU throttles, to spare a network that is not there.
        self.call(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 1u64 << 40 }),
        )?;
        self.call("migrate", json!({ "uri": format!("exec:cat >{state}") }))?;
        self.await_migration(patience)
    }

    /// Lets a machine started with -incoming go on. Once loaded it is as it was when saved: stopped.
    pub fn go_on(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.call("query-status", json!({}))?;
            match status["status"].as_str() {
                Some("paused") => return self.call("cont", json!({})).map(drop),
                Some("inmigrate") if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                _ => bail!("the machine did not resume: {status}"),
            }
        }
    }

    fn await_migration(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let progress = self.call("query-migrate", json!({}))?;
            match progress["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    bail!("QEMU could not save the machine: {progress}")
                }
                _ if Instant::now() > deadline => {
                    bail!("saving the machine takes too long: {progress}")
                }
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("QEMU ended");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line}"))
    }
}
