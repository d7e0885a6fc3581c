//! The socket of audit, opened again for as long as it fails: denials are told whenever they can be heard, and the node says of no
//! other time that they are.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use crate::audit::{self, Record};
use crate::sys;

/// Records read at once at most: a task that is denied things as fast as it can must not have us busy with it, outside of its
/// limits. What the socket does not hold meanwhile is lost, and that is told.
const BATCH: usize = 512;
/// From a failure to the next attempt: twice as long after each, until something is heard.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Batch {
    pub records: Vec<Record>,
    pub has_lost: bool,
}

#[derive(Debug)]
pub(super) struct Ear<Open> {
    open: Open,
    socket: Option<AsyncFd<OwnedFd>>,
    /// For those who tell whether denials are told.
    hears: Arc<AtomicBool>,
    first_pause: Duration,
    pause: Duration,
    again_at: Instant,
}

impl<Open: Fn() -> io::Result<OwnedFd>> Ear<Open> {
    /// Listens from now on, if it can.
    pub fn new(open: Open, hears: Arc<AtomicBool>, first_pause: Duration) -> Self {
        let mut ear = Self {
            open,
            socket: None,
            hears,
            first_pause,
            pause: first_pause,
            again_at: Instant::now(),
        };
        ear.listen();
        ear
    }

    /// Waits for records, and reads those that are there. Nothing is lost if the wait is given up.
    pub async fn hear(&mut self, buffer: &mut [u8]) -> Batch {
        loop {
            if let Some(socket) = &self.socket {
                let read = |socket: &OwnedFd| read(socket, buffer);
                match socket.async_io(Interest::READABLE, read).await {
                    Ok(batch) => {
                        self.pause = self.first_pause;
                        return batch;
                    }
                    Err(error) => self.fail(&error),
                }
            }
            sleep_until(self.again_at).await;
            self.listen();
            if self.socket.is_some() {
                info!("audit can be listened to again");
            }
        }
    }

    fn listen(&mut self) {
        match (self.open)().and_then(sys::readable) {
            Ok(socket) => {
                self.socket = Some(socket);
                self.hears.store(true, Ordering::Relaxed);
            }
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        self.socket = None;
        self.again_at = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if self.hears.swap(false, Ordering::Relaxed) {
            warn!(
                "audit: {error}; what Landlock denies to tasks is not told until it can be listened to again"
            );
        } else {
            // As in containers, ever.
            debug!("audit: {error}; what Landlock denies to tasks is not told");
        }
    }
}

fn read(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Batch> {
    let mut batch = Batch::default();
    for read in 0..BATCH {
        match audit::receive(socket, buffer) {
            Ok(record) => batch.records.extend(record),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => batch.has_lost = true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // One that lasts comes again at the next read. There the reactor has to see it, to wait again.
            Err(_) if read > 0 => return Ok(batch),
            Err(error) => return Err(error),
        }
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
    use std::sync::Mutex;

    const SOON: Duration = Duration::from_millis(1);

    /// A pipe that can be read, and not as a socket: each receive is an error.
    fn faulty() -> io::Result<OwnedFd> {
        let (reader, writer) = rustix::pipe::pipe()?;
        rustix::io::write(&writer, b"x")?;
        Ok(reader)
    }

    /// A socket on which something came that is no record.
    fn sound() -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        send(&theirs, b"x", SendFlags::empty())?;
        Ok(ours)
    }

    type Source = fn() -> io::Result<OwnedFd>;

    /// Opens these one after another, and tells each time whether the ear says that it hears.
    fn opened(
        sources: &[Source],
        hears: &Arc<AtomicBool>,
    ) -> (
        impl Fn() -> io::Result<OwnedFd> + use<>,
        Arc<Mutex<Vec<bool>>>,
    ) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (sources, told, hears) = (sources.to_owned(), seen.clone(), hears.clone());
        let open = move || {
            let mut told = told.lock().unwrap();
            told.push(hears.load(Ordering::Relaxed));
            sources[told.len() - 1]()
        };
        (open, seen)
    }

    #[tokio::test]
    async fn a_socket_that_fails_is_opened_again_and_is_not_said_to_hear_meanwhile() {
        let hears = Arc::default();
        let sources: [Source; 4] = [faulty, || Err(ErrorKind::OutOfMemory.into()), faulty, sound];
        let (open, seen) = opened(&sources, &hears);
        let mut ear = Ear::new(open, hears.clone(), SOON);
        assert!(hears.load(Ordering::Relaxed));
        let mut buffer = [0; 64];
        let heard = tokio::time::timeout(Duration::from_secs(30), ear.hear(&mut buffer));
        assert!(heard.await.unwrap().records.is_empty());
        assert_eq!(*seen.lock().unwrap(), [false; 4]);
        assert!(hears.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_puts_no_attempt_off() {
        let hears = Arc::default();
        let sources: [Source; 2] = [|| Err(ErrorKind::OutOfMemory.into()), sound];
        let (open, _) = opened(&sources, &hears);
        let mut ear = Ear::new(open, hears, SOON * 200);
        let tries = async {
            let mut buffer = [0; 64];
            while tokio::time::timeout(SOON * 50, ear.hear(&mut buffer))
                .await
                .is_err()
            {}
        };
        assert!(
            tokio::time::timeout(Duration::from_secs(30), tries)
                .await
                .is_ok()
        );
    }

    #[tokio::test]
    async fn the_pause_grows_to_a_bound_and_is_short_again_once_something_was_heard() {
        let hears = Arc::default();
        let (open, _) = opened(&[sound], &hears);
        let mut ear = Ear::new(open, hears, SOON);
        for _ in 0..100 {
            ear.fail(&ErrorKind::OutOfMemory.into());
        }
        assert_eq!(ear.pause, LONGEST_PAUSE);
        assert!(ear.again_at <= Instant::now() + LONGEST_PAUSE);
        ear.socket = Some(sys::readable(sound().unwrap()).unwrap());
        ear.hear(&mut [0; 64]).await;
        assert_eq!(ear.pause, SOON);
    }
}
