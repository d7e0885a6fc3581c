//! Entries on paths that lead to the managers of the host: those that open one, and those that only seem to.

use std::fs;
use std::path::Path;

use super::findings::{Finding, Mode, Seen, finding, start};
use crate::plan::managers::{self, Sight};
use crate::plan::steps::Source;
use crate::plan::unveil::run_mask;

/// Judges entries whose paths the host has.
pub fn of_rules(seen: &[Seen<'_>], mode: Mode<'_>) -> Vec<Finding> {
    let order = mode.order();
    // An operator's entry is every user's: what root reaches is told, and as an error what fails for all.
    let uid = order.map_or(0, |order| order.uid);
    let run = order.map_or(run_mask(1), |order| run_mask(order.uid));
    let mut findings = Vec::new();
    let written = |one: &&Seen<'_>| matches!(one.rule.source, Source::Plugin | Source::Task);
    for one in seen.iter().filter(written) {
        let (rule, start) = (one.rule, start(one.rule, mode));
        let is_brought = seen.iter().filter(written).any(|other| {
            other.rule.access.changes()
                && other.real != Path::new("/")
                && one.real.starts_with(&other.real)
        });
        let sight = match is_brought {
            true => Sight::Shown,
            false => managers::sight(&one.real, path_of(one), rule.access, run),
        };
        let is_readers = mode.writes(rule.source);
        match sight {
            Sight::Nothing => {
                let why = match managers::leads_to_manager(&one.real) {
                    true => {
                        "it is hidden from tasks like all that leads to managers of the host; leave the entry out, or write it with \"w\" if the task is to reach them"
                    }
                    false => {
                        "/run is hidden from root's tasks, and what is named there comes back, but not by a link; name it below /run"
                    }
                };
                let sentence = format!("{start}: no such file or directory, as {why}");
                findings.push(finding(rule, mode, true, sentence));
            }
            Sight::Emptied if is_readers => findings.push(finding(
                rule,
                mode,
                false,
                format!(
                    "{start}: what leads to services of the host there is hidden from tasks all the same; leave the entry out, or name what the task needs of it"
                ),
            )),
            Sight::Emptied | Sight::Shown => {}
        }
        let back = managers::brought_back(&one.real, path_of(one), rule.access, uid);
        let back: Vec<&str> = back
            .into_iter()
            .filter(|(path, _)| is_there(path))
            .map(|(_, called)| called)
            .collect();
        if is_readers && !back.is_empty() {
            let (back, root) = (back.join(" and "), "and so controls the host");
            let sentence = match (mode, uid) {
                (Mode::OfOperator(_), _) => format!(
                    "{start}: a task of root reaches {back} by it {root}, and any job may say user = \"root\"; leave the entry out"
                ),
                (Mode::OfTask(_), 0) => format!(
                    "{start}: root reaches {back} by it {root}; leave the entry out, or run the task as another user"
                ),
                (Mode::OfTask(_), _) => format!(
                    "{start}: the task reaches {back} by it, which starts services outside of the sandbox; leave the entry out, or run the task as a dynamic user"
                ),
            };
            findings.push(finding(rule, mode, false, sentence));
        }
    }
    findings
}

fn path_of<'a>(one: &Seen<'a>) -> &'a Path {
    one.rule.place.as_path()
}

/// An empty directory leads nowhere.
fn is_there(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.exists(),
    }
}
