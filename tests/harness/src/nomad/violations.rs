//! What a driver must not do, noted where it happens and reported at the end; and errors of calls, as Nomad sees them.

use std::sync::{Arc, Mutex, PoisonError};

use prost::Message;
use tonic::{Code, Status};

use super::proto::google::rpc;
use super::proto::structs::RecoverableError;

/// Everything that would have broken Nomad so far.
#[derive(Debug, Clone, Default)]
pub struct Violations(Arc<Mutex<Vec<String>>>);

impl Violations {
    pub fn note(&self, what: impl Into<String>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(what.into());
    }

    pub fn all(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Takes out those that a test provoked on purpose.
    pub fn forgive(&self, provoked: impl Fn(&str) -> bool) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|violation| !provoked(violation));
    }

    /// All of them as one error, or nothing.
    pub fn check(&self) -> anyhow::Result<()> {
        let all = self.all();
        if all.is_empty() {
            return Ok(());
        }
        anyhow::bail!(
            "the driver broke Nomad's contract {} times:\n- {}",
            all.len(),
            all.join("\n- ")
        )
    }

    /// Turns a call's failure into an error; codes that Nomad takes for a dead plugin are violations.
    pub(super) fn status(&self, rpc: &'static str, status: Status) -> RpcError {
        let error = RpcError::new(rpc, &status);
        if !is_lost(&status) && matches!(error.code, Code::Unavailable | Code::Cancelled) {
            self.note(format!("{error}: Nomad reads this code as a dead plugin"));
        }
        error
    }
}

/// Whether a call failed because its connection did, and not by an answer.
pub(super) fn is_lost(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// A call that failed. Its display is what `nomad alloc status` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcError {
    pub rpc: &'static str,
    pub code: Code,
    pub message: String,
    /// Whether Nomad would try again on this node.
    pub recoverable: bool,
}

impl RpcError {
    fn new(rpc: &'static str, status: &Status) -> Self {
        let details = rpc::Status::decode(status.details()).unwrap_or_default();
        let recoverable = details.details.first().and_then(|any| {
            let named = any
                .type_url
                .ends_with("hashicorp.nomad.plugins.shared.structs.RecoverableError");
            named.then(|| RecoverableError::decode(any.value.as_slice()).ok())?
        });
        RpcError {
            rpc,
            code: status.code(),
            message: status.message().to_owned(),
            recoverable: recoverable.is_some_and(|error| error.recoverable),
        }
    }
}

impl std::fmt::Display for RpcError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: rpc error: code = {:?} desc = {}",
            self.rpc, self.code, self.message
        )
    }
}

impl std::error::Error for RpcError {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_recoverable_error_is_read_from_the_details() {
        let detail = prost_types::Any {
            type_url: "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
                .into(),
            value: RecoverableError { recoverable: true }.encode_to_vec(),
        };
        let details = rpc::Status {
            code: 9,
            message: "bus is gone".into(),
            details: vec![detail],
        };
        let status = Status::with_details(
            Code::FailedPrecondition,
            "bus is gone",
            details.encode_to_vec().into(),
        );
        assert!(RpcError::new("StartTask", &status).recoverable);
        assert!(!RpcError::new("StartTask", &Status::unknown("no")).recoverable);
    }

    #[test]
    fn codes_that_nomad_misreads_are_violations() {
        let violations = Violations::default();
        violations.status("StartTask", Status::unknown("fine"));
        violations.check().unwrap();
        violations.status("StartTask", Status::unavailable("bus is gone"));
        violations.check().unwrap_err();
    }
}
