//! Child processes on a leash: they die with the thread that started them, and their output arrives line by line.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How often it is looked whether what a silent command runs on is well.
const CHECK: Duration = Duration::from_secs(5);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    TimedOut,
}

/// A command that the kernel kills when the calling *thread* ends: start it on a thread that outlives it.
pub fn leashed(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// A command in mount and PID namespaces of its own: whatever it mounts or starts goes when it goes.
pub fn contained(program: &str) -> Command {
    let mut command = leashed("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
        "--propagation",
        "private",
        "--",
        program,
    ]);
    command
}

/// Runs to the end; stdout and stderr come mixed, as lines.
pub fn stream(
    command: &mut Command,
    timeout: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<Exit> {
    stream_while(command, timeout, &|| Ok(()), on_line)
}

/// The same, for as long as whatever it runs on is well.
pub fn stream_while(
    command: &mut Command,
    timeout: Duration,
    check: &dyn Fn() -> Result<()>,
    on_line: &mut dyn FnMut(&str),
) -> Result<Exit> {
    let deadline = Instant::now() + timeout;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(describe(command))?;
    let (sender, lines) = channel();
    for pipe in [
        child.stdout.take().map(boxed),
        child.stderr.take().map(boxed),
    ]
    .into_iter()
    .flatten()
    {
        let sender = sender.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    break;
                }
            }
        });
    }
    drop(sender);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(CHECK)) {
            Ok(line) => on_line(&line),
            Err(RecvTimeoutError::Disconnected) => return wait(&mut child, deadline),
            Err(RecvTimeoutError::Timeout) if left > CHECK => {
                if let Err(error) = check() {
                    end(&mut child);
                    return Err(error);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                end(&mut child);
                return Ok(Exit::TimedOut);
            }
        }
    }
}

fn boxed(pipe: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(pipe)
}

fn wait(child: &mut Child, deadline: Instant) -> Result<Exit> {
    use std::os::unix::process::ExitStatusExt;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status
                .code()
                .map_or_else(|| Exit::Signal(status.signal().unwrap_or(0)), Exit::Code));
        }
        if Instant::now() > deadline {
            end(child);
            return Ok(Exit::TimedOut);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Runs to the end and insists on success; the error holds the last of what it said.
pub fn succeed(command: &mut Command, timeout: Duration) -> Result<String> {
    let mut output = String::new();
    let exit = stream(command, timeout, &mut |line| {
        output.push_str(line);
        output.push('\n');
    })?;
    if exit != Exit::Code(0) {
        bail!("{}: {exit:?}\n{}", describe(command), tail(&output, 30));
    }
    Ok(output)
}

/// The same with everything it says kept in a file for the curious.
pub fn succeed_logged(command: &mut Command, timeout: Duration, log: &Path) -> Result<()> {
    let result = succeed(command, timeout);
    if let Ok(output) = &result {
        std::fs::write(log, output)?;
    }
    result.map(drop)
}

pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let text: Vec<String> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let text = text.join(" ");
    let cut: String = text.chars().take(300).collect();
    format!("cannot run `{cut}`")
}

/// A shell word that means `text` and nothing else.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A command line that runs `argv` in a transient service of the guest: not in the cgroup of whoever brought it in.
pub fn in_a_unit(argv: &[&str]) -> Vec<String> {
    let prefix = [
        "systemd-run",
        "--quiet",
        "--pipe",
        "--wait",
        "--collect",
        "--service-type=exec",
        "--",
    ];
    prefix
        .iter()
        .chain(argv)
        .map(|word| (*word).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn output_and_exit_code_arrive() {
        let mut lines = Vec::new();
        let exit = stream(
            Command::new("sh").args(["-c", "echo one; echo two >&2; exit 7"]),
            Duration::from_secs(10),
            &mut |line| {
                lines.push(line.to_owned());
            },
        )
        .unwrap();
        lines.sort();
        assert_eq!(
            (exit, lines),
            (Exit::Code(7), vec!["one".to_owned(), "two".to_owned()])
        );
    }

    #[test]
    fn a_command_that_outstays_its_time_is_ended() {
        let exit = stream(
            Command::new("sleep").arg("60"),
            Duration::from_millis(50),
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(exit, Exit::TimedOut);
    }

    #[test]
    fn a_quoted_word_survives_the_shell() {
        let word = r#"it's "$HOME" \ `x`"#;
        let said = succeed(
            Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]),
            Duration::from_secs(10),
        )
        .unwrap();
        assert_eq!(said.trim_end(), word);
    }
}
