//! Whether a task can start in the directory that its `work_dir` names. Told under that key: nobody wrote the entry that opens it.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::Path;

use super::findings::{
    Finding, PASSES, includes, is_laid_over, may_execute, problem, reaches, spelled, whose,
};
use crate::plan::Plan;
use crate::plan::steps::{Order, Place, Rule, Source};

pub const KEY: &str = "work_dir";

/// What every task has, before anything of its own is there.
const MADE: [&str; 7] = [
    "",
    "local",
    "alloc",
    "alloc/data",
    "alloc/tmp",
    "secrets",
    "tmp",
];

/// The rule that the plan makes of a directory of the host, whether it counts or not: the last one of the job's for that path.
pub fn rule(plan: &Plan) -> Option<&Rule> {
    let dir = &plan.order.work_dir;
    let is_its = |rule: &&Rule| {
        matches!(dir, Place::Host(_)) && rule.source == Source::Task && rule.place == *dir
    };
    let overruled = plan.overruled.iter().map(|it| &it.rule);
    plan.order.rules.iter().chain(overruled).rfind(is_its)
}

/// What of it only a start can tell.
pub fn at_start(order: &Order) -> Option<String> {
    let dir = order.work_dir.as_path();
    let is_open = match &order.work_dir {
        Place::Task(path) => MADE.iter().all(|made| path != Path::new(made)),
        Place::Host(path) => is_laid_over(order, path),
    };
    is_open.then(|| {
        format!(
            "whether work_dir {} is there, as it is in a directory of the task's own or on a volume",
            dir.display()
        )
    })
}

pub fn judge(plan: &Plan) -> Vec<Finding> {
    let order = &plan.order;
    let Place::Host(dir) = &order.work_dir else {
        return Vec::new();
    };
    if is_laid_over(order, dir) {
        return Vec::new();
    }
    let is_fit = fit(dir, order).map_err(|problem| finding(dir, true, &problem));
    is_fit
        .err()
        .into_iter()
        .chain(narrowed(dir, plan))
        .collect()
}

fn finding(dir: &Path, is_error: bool, sentence: &str) -> Finding {
    Finding {
        source: Source::Task,
        key: KEY,
        is_error,
        sentence: format!("work_dir {}: {sentence}", dir.display()),
    }
}

/// In the words of the launcher, which enters it as the task's user.
fn fit(dir: &Path, order: &Order) -> Result<(), String> {
    let missing = |error: Error| {
        format!(
            "{}; name a directory of this host, or make it",
            problem(&error)
        )
    };
    let (uid, gid) = (order.uid, order.gid);
    let passes = uid == 0 || order.ambient & PASSES != 0;
    let denied = |does: &str| {
        format!(
            "permission denied (uid {uid} cannot {does} it); let it be passed (chmod o+x), or run the task as its owner"
        )
    };
    let real = fs::canonicalize(dir).map_err(missing)?;
    if !passes && !reaches(&real, uid, gid) {
        return Err(denied("reach"));
    }
    if !fs::metadata(&real).map_err(missing)?.is_dir() {
        return Err(missing(ErrorKind::NotADirectory.into()));
    }
    if !passes && !may_execute(&real, uid, gid) {
        return Err(denied("enter"));
    }
    Ok(())
}

/// It is to be open with all letters; an earlier entry for the very path may leave it with fewer.
fn narrowed(dir: &Path, plan: &Plan) -> Option<Finding> {
    let own = rule(plan)?;
    let overruled = plan.overruled.iter();
    let by = &overruled.rev().find(|it| std::ptr::eq(&it.rule, own))?.by;
    let is_whole = plan.order.rules.iter().any(|rule| {
        matches!(&rule.place, Place::Host(path) if dir.starts_with(path))
            && includes(rule.access, own.access)
    });
    let (entry, of) = (spelled(by), whose(by.source));
    (!is_whole).then(|| {
        finding(
            dir,
            false,
            &format!(
                "is unveiled with {} alone, as {entry} of {of} is for the same path and comes first; choose another directory if the task needs more",
                by.access
            ),
        )
    })
}
