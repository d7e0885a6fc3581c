//! Why a call on systemd failed, and whether the same call may go through a little later.

use thiserror::Error;
use zbus::DBusError as _;

use super::PATIENCE;
use crate::plan::unit::UnitName;

#[derive(Debug, Error)]
pub enum SystemdError {
    #[error(
        "systemd cannot be reached on the system bus: {0}; is dbus running (systemctl status dbus)?"
    )]
    NoBus(#[source] zbus::Error),
    #[error("systemd did not answer {call} for {unit} within {} s", PATIENCE.as_secs())]
    TimedOut { call: &'static str, unit: String },
    #[error("unit {0} already exists")]
    Exists(UnitName),
    #[error(
        "unit {unit} already exists and belongs to {owner}: end that task first (systemctl stop {unit})"
    )]
    Taken { unit: UnitName, owner: String },
    #[error("systemd could not write its file for {0} below /run; is it full (df /run)?")]
    NoFile(UnitName),
    #[error("systemd refused {call} for {unit}: {reason}")]
    Refused {
        call: &'static str,
        unit: String,
        reason: String,
    },
    #[error("systemd has no room for {call} of {unit} right now: {reason}")]
    Busy {
        call: &'static str,
        unit: String,
        reason: String,
    },
    #[error(
        "systemd could not start {unit}: its job ended as {result:?} (see journalctl -u {unit})"
    )]
    JobFailed { unit: UnitName, result: String },
}

impl SystemdError {
    /// Whether the same call may go through a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoBus(_)
            | Self::TimedOut { .. }
            | Self::Busy { .. }
            | Self::JobFailed { .. }
            | Self::NoFile(_)
            | Self::Exists(_) => true,
            Self::Refused { .. } | Self::Taken { .. } => false,
        }
    }

    /// Whether systemd may have done what it was asked to all the same.
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::NoBus(_) | Self::TimedOut { .. })
    }
}

/// An error that is an answer of systemd's own.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The D-Bus name of the error.
    pub name: String,
    pub reason: String,
}

impl Answer {
    /// zbus has a variant of its own for the names that D-Bus defines, and systemd uses those too: PropertyReadOnly is its
    /// word for a property that it does not know.
    pub fn of(error: &zbus::Error) -> Option<Answer> {
        let (name, reason) = match error {
            zbus::Error::MethodError(name, reason, _) => (name.to_string(), reason.clone()),
            zbus::Error::FDO(error) => match error.as_ref() {
                zbus::fdo::Error::ZBus(_) => return None,
                error => (
                    error.name().to_string(),
                    error.description().map(str::to_owned),
                ),
            },
            _ => return None,
        };
        (!is_of_the_bus(&name)).then(|| Answer {
            reason: reason.unwrap_or_else(|| name.clone()),
            name,
        })
    }
}

/// Errors that say no more than "not now".
pub(super) fn is_passing(name: &str) -> bool {
    [
        "org.freedesktop.DBus.Error.LimitsExceeded",
        "org.freedesktop.DBus.Error.NoMemory",
        // Another job of the unit or its slice is under way, as while an operator stops the slice.
        "org.freedesktop.systemd1.TransactionIsDestructive",
        "org.freedesktop.systemd1.ShuttingDown",
        "System.Error.EAGAIN",
        "System.Error.EBUSY",
        "System.Error.EMFILE",
        "System.Error.ENFILE",
        "System.Error.ENOBUFS",
        "System.Error.ENOMEM",
        "System.Error.ENOSPC",
    ]
    .contains(&name)
}

/// Errors of the bus itself, not of systemd: whether the call was carried out is not known.
fn is_of_the_bus(name: &str) -> bool {
    [
        "NoReply",
        "ServiceUnknown",
        "NameHasNoOwner",
        "Disconnected",
        "TimedOut",
        "Timeout",
    ]
    .iter()
    .any(|end| name.strip_prefix("org.freedesktop.DBus.Error.") == Some(end))
}
