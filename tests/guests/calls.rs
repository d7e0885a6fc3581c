//! Calls of the driver's service one by one, for cases that want another order than Nomad's, or many tasks at little cost.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
pub use harness::nomad::Calls;
use harness::nomad::proto::driver::TaskConfig;
use harness::nomad::{Agent, Allocation};
use nomad_driver_exec2::job::request::{new_alloc_id, new_task_id};

use crate::nomad::Job;

/// An allocation whose own task has come and gone: directories in which others can be started, without logs.
#[derive(Debug)]
pub struct Place {
    alloc: Allocation,
    config: TaskConfig,
}

impl Place {
    pub async fn new(agent: &Agent) -> Result<Place> {
        // A dynamic user would be one allocation's alone.
        let job = Job::shell("eval \"$SCRIPT\"")
            .user("nobody")
            .resources("cpu = 100\n memory = 32");
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        task.wait().await?;
        let config = task.handle().and_then(|handle| handle.config);
        let config = TaskConfig {
            stdout_path: "/dev/null".into(),
            stderr_path: "/dev/null".into(),
            ..config.context("a handle has its configuration")?
        };
        Ok(Place { alloc, config })
    }

    /// A task that passes for one of an allocation of its own.
    pub fn task(&self, script: &str) -> TaskConfig {
        let alloc_id = new_alloc_id();
        TaskConfig {
            id: new_task_id(&alloc_id, &self.config.name),
            alloc_id,
            ..with_script(self.config.clone(), script)
        }
    }

    /// What the task sees as `local`.
    pub fn local(&self) -> Result<&Path> {
        Ok(&self.alloc.only_task()?.paths().local)
    }

    pub async fn close(&self) -> Result<()> {
        self.alloc.stop().await
    }
}

pub fn with_script(mut config: TaskConfig, script: &str) -> TaskConfig {
    config.env.insert("SCRIPT".into(), script.into());
    config
}

/// How many descriptors of each kind a process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors(BTreeMap<String, usize>);

impl Descriptors {
    pub fn of(pid: u32) -> Result<Descriptors> {
        let mut kinds = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            // One may be closed between the list and the look.
            let Ok(target) = fs::read_link(entry?.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            // `socket:[1234]`, but `anon_inode:[pidfd]`.
            let kind = match target.split_once(":[") {
                Some((kind, number)) if number.starts_with(char::is_numeric) => kind,
                _ => &target,
            };
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(Descriptors(kinds))
    }

    /// One more of this kind is as good.
    pub fn and_one(mut self, kind: &str) -> Descriptors {
        *self.0.entry(kind.to_owned()).or_default() += 1;
        self
    }

    /// The kinds of which the process has more by now.
    pub fn grown(&self, pid: u32) -> Result<Vec<String>> {
        let more = |(kind, count): (String, usize)| {
            let before = self.0.get(&kind).copied().unwrap_or(0);
            (count > before).then(|| format!("{count} descriptors of {kind} instead of {before}"))
        };
        let now = Descriptors::of(pid)?;
        Ok(now.0.into_iter().filter_map(more).collect())
    }
}
