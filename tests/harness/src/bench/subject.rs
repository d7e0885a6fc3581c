//! A driver under measurement, its plugin in a scope of its own, and one start of a task from the call to its end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::sleep;

use super::STAMP;
use super::bus::Bus;
use super::kernel::{self, Cgroup, Memory, millis, now_nanos};
use super::place::Place;
use super::raw::Who;
use crate::nomad::{Agent, Calls, Config};

/// A start that takes longer hangs: an emulated machine under load needs half a minute for fifty at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// What a driver may still do after an answer, before CPU time is read.
const SETTLE: Duration = Duration::from_millis(100);
/// Of a node whose `cpu = 20` is 1.25 ms in 100. HashiCorp's driver starts nothing with less than the kernel's 1 ms.
const CORE_MHZ: u64 = 1_600;

#[derive(Debug)]
pub struct Subject {
    pub who: Who,
    pub agent: Agent,
    pub calls: Calls,
    pub plugin: u32,
    watched: Cgroup,
    launches: u32,
}

/// How a task is brought to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By a signal; WaitTask tells.
    Exit,
    /// By StopTask.
    Stop,
}

/// What one life of a task has told.
#[derive(Debug)]
pub struct Life {
    pub first_instruction_ms: f64,
    pub answer_ms: f64,
    pub cpu_in_scope_ms: f64,
    /// From the start to some time after the end.
    pub cpu_ms: Cpu,
    pub memory: Memory,
    /// From the last instruction to the answer of WaitTask or StopTask.
    pub end_ms: f64,
}

/// CPU time spent outside of the task's cgroup.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    pub plugin: f64,
    pub systemd: f64,
    pub bus: f64,
}

impl Cpu {
    pub fn since(self, before: Cpu) -> Cpu {
        Cpu {
            plugin: self.plugin - before.plugin,
            systemd: self.systemd - before.systemd,
            bus: self.bus - before.bus,
        }
    }
}

impl Subject {
    pub async fn start(who: Who, driver: &Path, bus: &Bus) -> Result<Subject> {
        let config = Config {
            core_mhz: CORE_MHZ,
            ..Config::default()
        };
        let agent = Agent::start(driver, config)
            .await
            .with_context(|| driver.display().to_string())?;
        let mut subject = Subject {
            who,
            calls: Calls::of(&agent)?.with_patience(PATIENCE),
            agent,
            plugin: 0,
            watched: Cgroup::at(Path::new("")),
            launches: 0,
        };
        subject.watch(bus).await?;
        Ok(subject)
    }

    /// What the plugin forks is counted with it until it is moved elsewhere.
    async fn watch(&mut self, bus: &Bus) -> Result<()> {
        self.launches += 1;
        self.plugin = self.agent.plugin_pid().await.context("no plugin")?;
        let unit = format!(
            "bench-{}-{}-{}.scope",
            format!("{:?}", self.who).to_lowercase(),
            std::process::id(),
            self.launches
        );
        bus.scopes(&[(unit, self.plugin)]).await?;
        self.watched = Cgroup::of_process(self.plugin)?;
        Ok(())
    }

    /// A new instance that knows nothing of the tasks.
    pub async fn kill_plugin(&mut self, bus: &Bus) -> Result<()> {
        self.agent.kill_plugin().await?;
        self.calls = Calls::of(&self.agent)?.with_patience(PATIENCE);
        self.watch(bus).await
    }

    /// With what the plugin keeps beside itself, but no task.
    pub fn memory_kib(&self) -> Result<f64> {
        self.watched.memory_kib()
    }

    pub fn cpu(&self) -> Result<Cpu> {
        Ok(Cpu {
            plugin: self.watched.cpu_millis()?,
            systemd: Cgroup::at(Path::new("init.scope")).cpu_millis()?,
            bus: Cgroup::at(Path::new("system.slice/dbus.service")).cpu_millis()?,
        })
    }

    pub async fn live(&self, place: &mut Place, end: End) -> Result<Life> {
        let asked = place.task()?;
        let id = asked.config.id.clone();
        let before = self.cpu()?;
        let called = now_nanos()?;
        let start = async {
            self.calls.start(asked.config.clone()).await?;
            let answered = now_nanos()?;
            Ok::<_, anyhow::Error>(answered)
        };
        // A start that fails tells no moment.
        let (answered, first) = tokio::try_join!(start, place.moment_nanos())?;
        sleep(SETTLE).await;
        let cpu_in_scope_ms = asked.cgroup.cpu_millis()?;
        let command = Path::new(STAMP).file_name().unwrap_or_default();
        let memory = kernel::memory_beside(&asked.cgroup, &command.to_string_lossy())?;

        let waiting = async {
            let exit = self.calls.wait(&id).await?;
            Ok::<_, anyhow::Error>((exit, now_nanos()?))
        };
        let ending = async {
            match end {
                End::Exit => self.calls.signal(&id, "SIGTERM").await?,
                End::Stop => self.calls.stop(&id, "SIGTERM", KILL_TIMEOUT).await?,
            }
            now_nanos()
        };
        let ((exit, waited), ended, last) =
            tokio::try_join!(waiting, ending, place.moment_nanos())?;
        ensure!(exit.success(), "{exit:?}");
        let answer = match end {
            End::Exit => waited,
            End::Stop => ended,
        };
        self.calls.destroy(&id, true).await?;
        asked.clear();
        sleep(SETTLE).await;
        let cpu_ms = self.cpu()?.since(before);
        Ok(Life {
            first_instruction_ms: millis(called, first),
            answer_ms: millis(called, answered),
            cpu_in_scope_ms,
            cpu_ms,
            memory,
            end_ms: millis(last, answer),
        })
    }
}

/// Stops and destroys a task that nobody measures.
pub async fn end(calls: &Calls, id: &str) -> Result<()> {
    calls.stop(id, "SIGTERM", KILL_TIMEOUT).await?;
    calls.destroy(id, true).await?;
    Ok(())
}
