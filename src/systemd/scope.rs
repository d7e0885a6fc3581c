//! One scope as systemd is asked for it: everything in the one call, so that there is no moment without limits.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use zbus::Variant;
use zbus::wire::Fd;

use crate::plan::limits::{Cpus, Limits, QUOTA_PERIOD_USEC};
use crate::plan::unit::UnitName;
use crate::text::UnitText;

/// A scope to start.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    pub name: &'a UnitName,
    pub description: &'a UnitText,
    pub slice: &'a str,
    /// The agent's unit: systemd stops it first when the host shuts down, so that Nomad stops tasks its own way.
    pub before: Option<&'a str>,
    pub limits: &'a Limits,
    /// The process to start it around, twice: older systemd takes only the number.
    pub pid: u32,
    pub pidfd: BorrowedFd<'a>,
}

/// Properties that some supported systemd does not have for scopes, and whose loss costs no limit: OOMPolicy came with
/// 253 (`Delegate=` alone has the same effect), PIDFDs with 254. Documentation is for people alone.
const OPTIONAL: [&str; 3] = ["Documentation", "OOMPolicy", "PIDFDs"];

/// What `systemctl status` points to, and `systemctl help` opens.
const MANUAL: &str = "man:nomad-driver-exec2(8)";

const INFINITY: u64 = u64::MAX;

impl Scope<'_> {
    pub(super) fn properties(
        &self,
        unknown: &BTreeSet<&'static str>,
    ) -> Vec<(&'static str, Variant<'_>)> {
        let limits = self.limits;
        let mut properties: Vec<(&'static str, Variant<'_>)> = vec![
            ("Description", Variant::from(self.description.as_str())),
            ("Documentation", Variant::from(vec![MANUAL])),
            ("Slice", Variant::from(self.slice)),
            // Sub-cgroups are the task's to make; an OOM kill of one process does not stop the whole scope.
            ("Delegate", Variant::from(true)),
            ("OOMPolicy", Variant::from("continue")),
            // A failed scope would keep its name taken.
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("CPUAccounting", Variant::from(true)),
            (
                "CPUQuotaPerSecUSec",
                Variant::from(limits.cpu_quota_usec_per_sec),
            ),
            ("CPUQuotaPeriodUSec", Variant::from(QUOTA_PERIOD_USEC)),
            ("MemoryAccounting", Variant::from(true)),
            ("MemoryLow", Variant::from(limits.memory_low_bytes)),
            (
                "MemoryMax",
                Variant::from(limits.memory_max_bytes.unwrap_or(INFINITY)),
            ),
            ("MemorySwapMax", Variant::from(INFINITY)),
            ("TasksAccounting", Variant::from(true)),
            ("TasksMax", Variant::from(limits.tasks_max)),
        ];
        if unknown.contains("PIDFDs") {
            properties.push(("PIDs", Variant::from(vec![self.pid])));
        } else {
            properties.push(("PIDFDs", Variant::from(vec![Fd::from(self.pidfd)])));
        }
        if let Some(before) = self.before {
            properties.push(("Before", Variant::from(vec![before])));
        }
        if let Some(cpus) = &limits.allowed_cpus {
            properties.push(allowed_cpus(cpus));
        }
        properties.retain(|(name, _)| !unknown.contains(name));
        properties
    }
}

/// The optional property that systemd's error is about, unless it is already left out.
pub(super) fn optional_in(reason: &str, unknown: &BTreeSet<&'static str>) -> Option<&'static str> {
    // "Cannot set property PIDFDs, or unknown property."
    let says = |name: &str| reason.split([' ', ',', '.']).any(|word| word == name);
    OPTIONAL
        .into_iter()
        .find(|name| says(name) && !unknown.contains(name))
}

pub(super) fn allowed_cpus(cpus: &Cpus) -> (&'static str, Variant<'static>) {
    ("AllowedCPUs", Variant::from(bitmask(cpus)))
}

/// AllowedCPUs as systemd takes it: CPU 0 is bit 0 of byte 0.
fn bitmask(cpus: &Cpus) -> Vec<u8> {
    let bytes = cpus.last().map_or(0, |last| usize::from(last / 8) + 1);
    cpus.iter().fold(vec![0; bytes], |mut mask, cpu| {
        mask[usize::from(cpu / 8)] |= 1 << (cpu % 8);
        mask
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_become_bits_from_the_lowest_byte_on() {
        assert_eq!(
            bitmask(&BTreeSet::from([0, 3, 9])),
            [0b0000_1001, 0b0000_0010]
        );
    }

    #[test]
    fn only_a_property_that_costs_no_limit_is_given_up() {
        let none = BTreeSet::new();
        let says = |name: &str| format!("Cannot set property {name}, or unknown property.");
        assert_eq!(optional_in(&says("PIDFDs"), &none), Some("PIDFDs"));
        assert_eq!(optional_in(&says("MemoryMax"), &none), None);
        assert_eq!(
            optional_in(&says("PIDFDs"), &BTreeSet::from(["PIDFDs"])),
            None
        );
    }
}
