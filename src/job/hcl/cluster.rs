//! What of Nomad's blocks and attributes is a cluster's business, whether a task is the same without it, and if not, what
//! to do instead.

use super::reader::{Entry, Reader};
use crate::job::{Effect, JobError, Unsupported};

/// One key of a block: absent from all tables, it is a mistake.
pub(super) struct Table {
    /// Keys without which one run is the same.
    without_effect: &'static str,
    /// Keys without which the task is not what the file says, each with what to do instead.
    missing: &'static [(&'static str, &'static str)],
}

const SECRETS: &str = "hand the secrets over with --env";

pub(super) const JOB: Table = Table {
    without_effect: "affinity all_at_once constraint consul_token migrate multiregion node_pool periodic priority reschedule \
        spread ui update vault_token",
    missing: &[("vault", SECRETS), ("consul", SECRETS)],
};

pub(super) const GROUP: Table = Table {
    without_effect: "affinity constraint disconnect ephemeral_disk max_client_disconnect migrate \
        prevent_reschedule_on_lost reschedule restart scaling shutdown_delay spread stop_after_client_disconnect update",
    missing: &[("vault", SECRETS), ("consul", SECRETS)],
};

pub(super) const TASK: Table = Table {
    without_effect: "action affinity constraint leader restart scaling schedule shutdown_delay",
    missing: &[
        (
            "artifact",
            "unpack it on this host, --unveil rx:/DIRECTORY and name that path in `command`",
        ),
        ("vault", SECRETS),
        ("consul", SECRETS),
        ("secret", SECRETS),
        ("csi_plugin", "nothing here mounts volumes for others"),
        ("kind", "nothing here runs a service mesh"),
    ],
};

pub(super) const RESOURCES: Table = Table {
    without_effect: "disk iops numa secrets",
    missing: &[
        (
            "device",
            "--unveil the device's file, if that is all the task needs",
        ),
        ("network", "the task has the network of this host"),
    ],
};

impl Reader {
    /// Notes an entry that a cluster would act on; anything else is a mistake.
    pub fn cluster(
        &mut self,
        entry: &Entry<'_>,
        table: &Table,
        place: &str,
    ) -> Result<(), JobError> {
        if entry.key == "dynamic" {
            return Err(entry.wrong("no blocks are made here; write them out"));
        }
        let is_key = |key: &str| key == entry.key;
        if table.without_effect.split_whitespace().any(is_key) {
            self.without_effect(entry, place);
            return Ok(());
        }
        match table.missing.iter().find(|(key, _)| *key == entry.key) {
            Some((_, remedy)) => self.is_missing(entry, place, remedy),
            None => return Err(entry.unknown(place)),
        }
        Ok(())
    }

    pub fn without_effect(&mut self, entry: &Entry<'_>, place: &str) {
        let message = format!("{place}: {} has no effect in a single run", entry.key);
        self.note(entry, Effect::None, message);
    }

    pub fn is_missing(&mut self, entry: &Entry<'_>, place: &str, remedy: &str) {
        let key = entry.key;
        self.missing(entry, key, &format!("{place}: {key}"), remedy);
    }

    /// `key` is the one that stands for the whole, where a part of it is what a cluster has to give.
    pub fn missing(&mut self, entry: &Entry<'_>, key: &str, what: &str, remedy: &str) {
        let message =
            format!("{what} needs a Nomad cluster: {remedy}; --ignore {key} runs without it");
        self.note(entry, Effect::Missing, message);
        if let Some(last) = self.unsupported.last_mut() {
            last.key = key.to_owned();
        }
    }

    pub fn note(&mut self, entry: &Entry<'_>, effect: Effect, message: String) {
        self.unsupported.push(Unsupported {
            key: entry.key.to_owned(),
            message,
            line: entry.line,
            effect,
            group: self.group.clone(),
            task: self.task.clone(),
        });
    }
}
