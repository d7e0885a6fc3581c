//! One scope as systemd is asked for it: everything in the one call, so that there is no moment without limits.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::BorrowedFd;

use zbus::Variant;
use zbus::wire::Fd;

use crate::plan::limits::{Cpus, Limits, List, QUOTA_PERIOD_USEC};
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

/// What a property is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting<'a> {
    Text(&'a str),
    Flag(bool),
    Number(u64),
    Names(Vec<&'a str>),
    Cpus(&'a Cpus),
}

impl fmt::Display for Setting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Text(text) => f.write_str(text),
            Setting::Flag(true) => f.write_str("yes"),
            Setting::Flag(false) => f.write_str("no"),
            Setting::Number(INFINITY) => f.write_str("infinity"),
            Setting::Number(number) => write!(f, "{number}"),
            Setting::Names(names) => f.write_str(&names.join(" ")),
            Setting::Cpus(cpus) => List(cpus).fmt(f),
        }
    }
}

impl<'a> From<Setting<'a>> for Variant<'a> {
    fn from(setting: Setting<'a>) -> Self {
        match setting {
            Setting::Text(text) => Variant::from(text),
            Setting::Flag(flag) => Variant::from(flag),
            Setting::Number(number) => Variant::from(number),
            Setting::Names(names) => Variant::from(names),
            Setting::Cpus(cpus) => Variant::from(bitmask(cpus)),
        }
    }
}

/// What systemd is asked for of a plan's scope, but for the process in it.
pub fn settings<'a>(
    description: &'a UnitText,
    slice: &'a str,
    before: Option<&'a str>,
    limits: &'a Limits,
) -> Vec<(&'static str, Setting<'a>)> {
    let memory_max = limits.memory_max_bytes.unwrap_or(INFINITY);
    let mut settings = vec![
        ("Description", Setting::Text(description.as_str())),
        ("Documentation", Setting::Names(vec![MANUAL])),
        ("Slice", Setting::Text(slice)),
        // Sub-cgroups are the task's to make; an OOM kill of one process does not stop the whole scope.
        ("Delegate", Setting::Flag(true)),
        ("OOMPolicy", Setting::Text("continue")),
        // A failed scope would keep its name taken.
        ("CollectMode", Setting::Text("inactive-or-failed")),
        ("CPUAccounting", Setting::Flag(true)),
        (
            "CPUQuotaPerSecUSec",
            Setting::Number(limits.cpu_quota_usec_per_sec),
        ),
        ("CPUQuotaPeriodUSec", Setting::Number(QUOTA_PERIOD_USEC)),
        ("MemoryAccounting", Setting::Flag(true)),
        ("MemoryLow", Setting::Number(limits.memory_low_bytes)),
        ("MemoryMax", Setting::Number(memory_max)),
        ("MemorySwapMax", Setting::Number(INFINITY)),
        ("TasksAccounting", Setting::Flag(true)),
        ("TasksMax", Setting::Number(limits.tasks_max)),
    ];
    if let Some(before) = before {
        settings.push(("Before", Setting::Names(vec![before])));
    }
    if let Some(cpus) = &limits.allowed_cpus {
        settings.push(("AllowedCPUs", Setting::Cpus(cpus)));
    }
    settings
}

impl Scope<'_> {
    pub(super) fn properties(
        &self,
        unknown: &BTreeSet<&'static str>,
    ) -> Vec<(&'static str, Variant<'_>)> {
        let settings = settings(self.description, self.slice, self.before, self.limits);
        let mut properties: Vec<(&'static str, Variant<'_>)> = settings
            .into_iter()
            .map(|(name, setting)| (name, setting.into()))
            .collect();
        if unknown.contains("PIDFDs") {
            properties.push(("PIDs", Variant::from(vec![self.pid])));
        } else {
            properties.push(("PIDFDs", Variant::from(vec![Fd::from(self.pidfd)])));
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
