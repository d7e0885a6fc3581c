//! Calls that may block, each in a thread of its own. tokio's pool panics where there can be no thread, and that would be the
//! plugin's end just when its host is short of everything.

use std::io;
use std::thread::Builder;

use tokio::sync::oneshot;

use crate::launch::NO_PROCESS;

/// Does it elsewhere. The error is that there can be no thread.
pub(super) async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    let thread = Builder::new().name("blocking".into());
    thread
        .spawn(move || {
            // Whoever asked may have lost patience.
            let _ = tell.send(work());
        })
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN) => io::Error::new(error.kind(), format!("{error} ({NO_PROCESS})")),
            _ => error,
        })?;
    told.await
        .map_err(|_| io::Error::other("a thread ended before its work was done"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::thread::current;

    use super::*;

    #[tokio::test]
    async fn work_is_done_elsewhere() {
        let here = current().id();
        assert_ne!(in_thread(|| current().id()).await.unwrap(), here);
    }
}
