//! What the kernel logs: its own words, with names and paths of a task's in them.

use std::path::Path;

use nomad_driver_exec2::audit::{What, parse};
use nomad_driver_exec2::config::plugin::PluginConfig;
use nomad_driver_exec2::plan::denials::{Denied, Remedy, Unveiled};
use nomad_driver_exec2::plan::unveil;

use crate::mutate::Target;

/// Its type, two bytes, and its text.
#[test]
fn audit_record() {
    Target {
        name: "audit_record",
        samples: &[],
        tokens: b"audit(1.2:3):\tdomain=1 blockers=fs.read_file,fs.execute blockers=ptrace path=\"/x\" path=2F22 path=(null) \
            \"/x\t(deleted)\" status=allocated status=deallocated pid=1 comm=\"sh\" \x8f\x05 \x90\x05 \x14\x05 \x28\x05",
        run: |bytes| {
            let (kind, text) = bytes.split_at(bytes.len().min(2));
            let kind = kind.try_into().map(u16::from_le_bytes).unwrap_or(0);
            let Some(record) = parse(kind, text) else {
                return;
            };
            if let What::Denial(denial) = record.what {
                let config = PluginConfig {
                    unveil_by_task: true,
                    ..PluginConfig::default()
                };
                let denied = Denied {
                    process: "sh".as_ref(),
                    rights: &denial.blockers,
                    path: denial.path.as_deref(),
                };
                let remedy = denied.remedy(Unveiled {
                    config: &config,
                    entries: &[],
                    task_dir: Path::new("/m"),
                });
                assert!(!denied.sentence(&remedy).contains(char::is_control));
                assert!(!denied.access().contains(char::is_control));
                // What is proposed is what an operator can write, but for a path that no entry can name.
                if let Remedy::Entry { entry, .. } = remedy {
                    let has_parent = entry.split('/').any(|part| part == "..");
                    let is_strange = entry.contains('\0') || entry.len() > 4_000 || has_parent;
                    assert!(is_strange || unveil::check(std::slice::from_ref(&entry)).is_ok(), "{entry:?}");
                }
            }
        },
    }
    .fuzz();
}
