//! Who may speak to us: anybody whom the socket's directory lets in, but no task. A root task that reached our socket
//! could start another one with any configuration.

use std::fs;
use std::io;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::warn;

const TASKS_SLICE: &str = "exec2.slice";
/// After a failed accept, which without a pause fails again at once as long as descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The connections of everybody but tasks, until the receiver is dropped.
pub fn connections(listener: UnixListener) -> ReceiverStream<io::Result<UnixStream>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((stream, _)) if is_welcome(&stream) => {
                    if sender.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    warn!(%error, "a connection to the plugin's socket could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Refuses when in doubt: whoever connected and is gone may have been a task's.
fn is_welcome(stream: &UnixStream) -> bool {
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let cgroups = pid.map(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")));
    match cgroups {
        Some(Ok(cgroups)) if is_task(&cgroups) => {
            warn!(pid, "a task tried to speak to the driver plugin; refused");
            false
        }
        Some(Ok(_)) => true,
        _ => false,
    }
}

/// Reads a `/proc/<pid>/cgroup`, a line `<hierarchy>:<controllers>:<path>` each.
fn is_task(cgroups: &str) -> bool {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|path| path.split('/').any(|name| name == TASKS_SLICE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_a_scope_of_ours_is_a_task() {
        for cgroups in [
            "0::/exec2.slice/exec2-share.slice/exec2-web-1234.scope\n",
            "0::/exec2.slice\n",
            "1:name=systemd:/exec2.slice/exec2-reserve.slice/a:b.scope\n0::/\n",
            "0::/../exec2.slice/sub\n",
        ] {
            assert!(is_task(cgroups), "{cgroups}");
        }
    }

    #[test]
    fn the_slice_is_the_one_that_scopes_are_put_in() {
        assert_eq!(TASKS_SLICE, crate::plan::unit::SLICE);
    }

    #[test]
    fn the_agent_is_no_task() {
        for cgroups in [
            "0::/system.slice/nomad.service\n",
            "0::/\n",
            "0::/system.slice/not-exec2.slice/x\n",
            "",
        ] {
            assert!(!is_task(cgroups), "{cgroups}");
        }
    }
}
