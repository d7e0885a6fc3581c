//! Reads a task's log FIFOs into files, as Nomad's logmon does: one reader a FIFO, which ends when the last writer has closed
//! it. Rotation is left out.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// A driver whose task keeps the FIFO open for longer after its end has leaked it.
const END_WAIT: Duration = Duration::from_secs(5);

/// The reader of one FIFO.
#[derive(Debug)]
pub(super) struct Logmon {
    fifo: PathBuf,
    done: watch::Receiver<bool>,
    killed: Arc<AtomicBool>,
}

impl Logmon {
    /// Starts reading. The open blocks until there is a writer, as Nomad's does, so it has a thread of its own.
    pub fn start(fifo: &Path, log: &Path) -> io::Result<Self> {
        let mut log = OpenOptions::new().append(true).create(true).open(log)?;
        let (finished, done) = watch::channel(false);
        let path = fifo.to_owned();
        let killed = Arc::new(AtomicBool::new(false));
        let is_killed = killed.clone();
        thread::spawn(move || {
            if let Ok(mut fifo) = File::open(path) {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = fifo.read(&mut buffer) {
                    let _ = log.write_all(&buffer[..length]);
                    if is_killed.load(Ordering::Relaxed) {
                        break;
                    }
                }
            }
            finished.send_replace(true);
        });
        Ok(Logmon {
            fifo: fifo.to_owned(),
            done,
            killed,
        })
    }

    /// Ends it, whoever still writes: after the next thing it reads.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
    }

    /// Waits until the last writer has closed the FIFO; says whether it has.
    pub async fn ended(&self) -> bool {
        let mut done = self.done.clone();
        timeout(END_WAIT, done.wait_for(|done| *done)).await.is_ok()
    }

    /// Releases a reader that never had a writer.
    pub fn stop(&self) {
        let _ = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.fifo);
    }
}

impl Drop for Logmon {
    fn drop(&mut self) {
        self.stop();
    }
}
