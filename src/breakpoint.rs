//! Where tests hold a start or a stop: each step of either passes here, and in debug builds a test may be told and make it
//! wait. A release build has none of it.

#[cfg(debug_assertions)]
pub use debug::*;

/// A step is about to be taken.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn at(_step: impl std::fmt::Debug) {}

#[cfg(debug_assertions)]
mod debug {
    use std::fmt;
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::sync::OnceLock;

    /// A listening socket's path. Each plugin and each helper has a connection of its own, writes a line for each step, and
    /// goes on when it has read a byte.
    const VARIABLE: &str = "NOMAD_DRIVER_EXEC2_BREAKPOINTS";

    static TEST: OnceLock<Option<UnixStream>> = OnceLock::new();

    fn connect() -> Option<UnixStream> {
        UnixStream::connect(std::env::var_os(VARIABLE)?).ok()
    }

    /// A step is about to be taken.
    pub fn at(step: impl fmt::Debug) {
        if let Some(mut test) = TEST.get_or_init(connect).as_ref() {
            // One write: both processes of a fork have the connection.
            let told = test.write_all(format!("{step:?}\n").as_bytes());
            // Whoever is not there to answer lets everything pass.
            let _ = told.and_then(|()| test.read_exact(&mut [0]));
        }
    }

    /// A connection for a helper, which has no environment to find one with.
    pub fn for_helper() -> Option<OwnedFd> {
        connect().map(Into::into)
    }

    /// Makes a connection the one of this process.
    pub fn adopt(connection: OwnedFd) {
        let _ = TEST.set(Some(connection.into()));
    }

    /// Fills a list of descriptors up, so that `connection` becomes number `number`.
    pub fn place<'a>(
        descriptors: &mut Vec<BorrowedFd<'a>>,
        filler: BorrowedFd<'a>,
        connection: Option<&'a OwnedFd>,
        number: i32,
    ) {
        if let Some(connection) = connection {
            while descriptors.len() < number.unsigned_abs() as usize {
                descriptors.push(filler);
            }
            descriptors.push(connection.as_fd());
        }
    }
}
