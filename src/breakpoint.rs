//! Where tests hold a start, a stop or a session: each step of them passes here, and in debug builds a test may be told and make it
//! wait. In a release build there is nothing behind these functions.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

#[cfg(debug_assertions)]
use self::debug as hook;
#[cfg(not(debug_assertions))]
use self::release as hook;

/// A step is about to be taken.
pub fn at(step: impl fmt::Debug) {
    hook::at(step);
}

/// A connection to the test for a helper, which has no environment to find one with.
pub fn for_helper() -> Option<OwnedFd> {
    hook::for_helper()
}

/// Makes the connection that a helper was started with the one of this process.
pub fn adopt(connection: io::Result<OwnedFd>) {
    if let Ok(connection) = connection {
        hook::adopt(connection);
    }
}

#[cfg(not(debug_assertions))]
mod release {
    use super::{OwnedFd, fmt};

    pub(super) fn at(_: impl fmt::Debug) {}

    pub(super) fn for_helper() -> Option<OwnedFd> {
        None
    }

    pub(super) fn adopt(_: OwnedFd) {}
}

#[cfg(debug_assertions)]
mod debug {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::OnceLock;

    use super::{OwnedFd, fmt};

    /// Path of a listening socket. Each plugin and each helper has a connection of its own, writes a line for each step, and
    /// goes on when it has read a byte.
    const VARIABLE: &str = "NOMAD_DRIVER_EXEC2_BREAKPOINTS";

    static TEST: OnceLock<Option<UnixStream>> = OnceLock::new();

    fn connect() -> Option<UnixStream> {
        UnixStream::connect(std::env::var_os(VARIABLE)?).ok()
    }

    pub(super) fn at(step: impl fmt::Debug) {
        if let Some(mut test) = TEST.get_or_init(connect).as_ref() {
            // Whoever is not there to answer lets everything pass.
            let told = test.write_all(format!("{step:?}\n").as_bytes());
            let _ = told.and_then(|()| test.read_exact(&mut [0]));
        }
    }

    pub(super) fn for_helper() -> Option<OwnedFd> {
        connect().map(Into::into)
    }

    pub(super) fn adopt(connection: OwnedFd) {
        let _ = TEST.set(Some(connection.into()));
    }
}
