//! How Nomad and we find each other: it proves to be Nomad by a cookie in the environment, we tell it on stdout where our
//! socket is. Nothing is printed before the socket listens, and nothing after that line.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

const COOKIE_NAME: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
const COOKIE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
const RUN_DIR: &str = "/run/nomad-driver-exec2/plugin";
const SOCKET_PREFIX: &str = "plugin-";
const SOCKET_SUFFIX: &str = ".sock";

#[derive(Debug, Error)]
pub enum HandshakeError {
    #[error(
        "nomad-driver-exec2 is a plugin of the Nomad agent, which starts it: put it into the agent's plugin_dir\n\
         and name it in the agent's configuration: plugin \"nomad-driver-exec2\" {{ config {{ }} }}\n\
         See nomad-driver-exec2 --help."
    )]
    NotByNomad,
    #[error("no socket for Nomad to connect to: {0}")]
    Socket(String),
    #[error("Nomad does not read the plugin's stdout: {0}")]
    Announce(#[source] io::Error),
}

/// Whether it is Nomad that started us.
pub fn check_cookie(get: impl Fn(&str) -> Option<OsString>) -> Result<(), HandshakeError> {
    match get(COOKIE_NAME) {
        Some(cookie) if cookie == COOKIE => Ok(()),
        _ => Err(HandshakeError::NotByNomad),
    }
}

/// A place where a socket may be made, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Told by Nomad, and then there is no other.
    Given(PathBuf),
    /// Ours alone below /run: there root keeps everybody out, and what a dead plugin left is cleared away.
    Run(PathBuf),
    /// A fresh directory of our own in here.
    Temporary(PathBuf),
}

pub fn places(get: impl Fn(&str) -> Option<OsString>) -> Vec<Place> {
    let set = |name| {
        get(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(given) = set("PLUGIN_UNIX_SOCKET_DIR") {
        return vec![Place::Given(given)];
    }
    let mut places = vec![Place::Run(RUN_DIR.into())];
    places.extend(set("TMPDIR").map(Place::Temporary));
    // TMPDIR may be too long for a socket's path.
    places.push(Place::Temporary("/tmp".into()));
    places
}

/// The socket's file, and its directory where that is ours too; both go with this value.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

impl Socket {
    /// Binds and listens in the first place that allows it.
    pub fn bind(places: &[Place]) -> Result<(Self, UnixListener), HandshakeError> {
        let mut refusals = Vec::new();
        for place in places {
            match Self::bind_in(place) {
                Ok(bound) => return Ok(bound),
                Err(error) => refusals.push(format!("{place:?}: {error}")),
            }
        }
        Err(HandshakeError::Socket(refusals.join("; ")))
    }

    fn bind_in(place: &Place) -> io::Result<(Self, UnixListener)> {
        let (dir, temporary) = match place {
            Place::Given(dir) => (dir.clone(), None),
            Place::Run(dir) => {
                own_directory(dir)?;
                clear_dead(dir)?;
                (dir.clone(), None)
            }
            Place::Temporary(parent) => {
                let dir = tempfile::Builder::new()
                    .prefix("nomad-driver-exec2-")
                    .permissions(Permissions::from_mode(0o700))
                    .tempdir_in(parent)?;
                (dir.path().to_path_buf(), Some(dir))
            }
        };
        let path = std::path::absolute(dir)?.join(format!(
            "{SOCKET_PREFIX}{}{SOCKET_SUFFIX}",
            std::process::id()
        ));
        // Of a process that is dead, since its id is ours now.
        remove(&path)?;
        let listener = UnixListener::bind(&path)?;
        let socket = Self {
            path,
            _dir: temporary,
        };
        Ok((socket, listener))
    }

    /// The line that go-plugin waits for: its protocol, Nomad's protocol, where we listen, and no certificate.
    pub fn line(&self) -> String {
        format!("1|2|unix|{}|grpc|\n", self.path.display())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Tells Nomad the line, and gives up stdout: whatever is printed from here on goes nowhere.
pub fn announce(line: &str) -> Result<(), HandshakeError> {
    let say = || {
        let mut stdout = io::stdout().lock();
        stdout.write_all(line.as_bytes())?;
        stdout.flush()?;
        let null = File::options().write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(null)?;
        Ok(())
    };
    say().map_err(HandshakeError::Announce)
}

/// Makes the directory, or takes one that is there if nobody else can get in.
fn own_directory(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let found = fs::symlink_metadata(dir)?;
    let us = fs::metadata("/proc/self")?.uid();
    if found.is_dir() && found.uid() == us && found.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::other("the directory is open to others"))
}

/// Removes the sockets of plugin processes that are dead. Two proofs, since either alone can be wrong: an id may look dead
/// from another PID namespace, and a socket refuses between its bind and its listen.
fn clear_dead(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(pid) = pid_in(&path) else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        if let Err(error) = UnixStream::connect(&path)
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            remove(&path)?;
        }
    }
    Ok(())
}

fn pid_in(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_prefix(SOCKET_PREFIX)?;
    name.strip_suffix(SOCKET_SUFFIX)?.parse().ok()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn only_the_right_cookie_is_nomads() {
        assert!(check_cookie(|_| Some(COOKIE.into())).is_ok());
        assert!(check_cookie(|_| Some("other".into())).is_err());
        assert!(check_cookie(|_| None).is_err());
    }

    #[test]
    fn a_directory_that_nomad_gives_is_the_only_place() {
        let places = places(|name| Some(format!("/{name}").into()));
        assert_eq!(places, [Place::Given("/PLUGIN_UNIX_SOCKET_DIR".into())]);
    }

    #[test]
    fn nobody_else_gets_into_a_socket_directory_of_ours() {
        let top = tempfile::tempdir().unwrap();
        for place in [
            Place::Run(top.path().join("a/b")),
            Place::Temporary(top.path().into()),
        ] {
            let (socket, _listener) = Socket::bind(&[place]).unwrap();
            assert_eq!(mode(socket.path.parent().unwrap()), 0o700);
        }
    }

    #[test]
    fn a_directory_open_to_others_is_passed_over() {
        let top = tempfile::tempdir().unwrap();
        let open = top.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        let places = [
            Place::Run(open.clone()),
            Place::Temporary(top.path().into()),
        ];
        let (socket, _listener) = Socket::bind(&places).unwrap();
        assert!(!socket.path.starts_with(open));
    }

    #[test]
    fn a_directory_too_long_for_a_socket_is_passed_over_and_left_clean() {
        let top = tempfile::tempdir().unwrap();
        let long = top.path().join("x".repeat(100));
        fs::create_dir(&long).unwrap();
        let places = [
            Place::Temporary(long.clone()),
            Place::Temporary(top.path().into()),
        ];
        assert!(Socket::bind(&places[..1]).is_err());
        assert!(Socket::bind(&places).is_ok());
        assert_eq!(fs::read_dir(long).unwrap().count(), 0);
    }

    #[test]
    fn sockets_of_the_dead_are_cleared_and_those_of_the_living_stay() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("run");
        own_directory(&dir).unwrap();
        let listening = dir.join("plugin-4194305.sock");
        let refusing = dir.join("plugin-4194306.sock");
        let alive = dir.join("plugin-1.sock");
        let _kept = UnixListener::bind(&listening).unwrap();
        drop(UnixListener::bind(&refusing).unwrap());
        drop(UnixListener::bind(&alive).unwrap());
        clear_dead(&dir).unwrap();
        assert!(listening.exists() && alive.exists() && !refusing.exists());
    }

    #[test]
    fn a_socket_leaves_no_file_behind() {
        let top = tempfile::tempdir().unwrap();
        drop(Socket::bind(&[Place::Temporary(top.path().into())]).unwrap());
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }
}
