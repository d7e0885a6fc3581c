//! An agent with its plugin and up to four tasks, each compared with the model after every step.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::guest::Context;
use harness::leaks::{Ground, Leak};
use harness::nomad::Agent;
use tokio::time::sleep;

use super::model::{Blow, Call, End, Kind, Op, Patience, Sequence, State, TASKS_MAX};
use super::slot::{Handles, Slot, call_once, expect_lost, refused};
use crate::calls::{Calls, Descriptors};
use crate::life::join_all;
use crate::nomad::{agent, until};

/// What goes without being waited for is gone after this.
const SETTLING: Duration = Duration::from_secs(5);
/// Where a plugin's socket is: one, of the plugin that runs.
const SOCKETS: &str = "/run/nomad-driver-exec2/plugin";

#[derive(Debug)]
pub struct World {
    /// As it was before there was an agent.
    before: Ground,
    ground: Ground,
    descriptors: Descriptors,
    agent: Option<Agent>,
    slots: Vec<Slot>,
}

/// Whether it is the plugin process that there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plugin {
    Same,
    New,
}

impl World {
    pub async fn new(context: &Context) -> Result<World> {
        let before = Ground::survey()?;
        let agent = agent(context).await?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        // Before the first task, with which come the watch for reserved CPUs, the ear for denials and the helper for the next, which
        // is held by one pidfd and watched by another.
        let descriptors = Descriptors::of(plugin)?
            .and_one("anon_inode:inotify")
            .and_one("socket")
            .and_one("anon_inode:[pidfd]")
            .and_one("anon_inode:[pidfd]")
            .and_one("socket");
        let mut slots = Vec::new();
        for _ in 0..TASKS_MAX {
            slots.push(Slot::new(&agent).await?);
        }
        Ok(World {
            before,
            ground: Ground::survey()?,
            descriptors,
            agent: Some(agent),
            slots,
        })
    }

    /// Does one after the other, looks after each, and leaves no task.
    pub async fn live(&mut self, sequence: &Sequence) -> Result<()> {
        for (index, op) in sequence.ops.iter().enumerate() {
            self.step(sequence.tasks, *op)
                .await
                .with_context(|| format!("step {index}, {op:?}"))?;
        }
        self.clear().await.context("after the last step")
    }

    pub async fn finish(mut self) -> Result<()> {
        for slot in &self.slots {
            slot.place.close().await?;
        }
        self.agent
            .take()
            .context("there is no agent")?
            .finish()
            .await
    }

    /// Ends whatever there is, without a word to the driver.
    pub fn abandon(self) {
        let leaks = self.before.left().unwrap_or_default();
        leaks.iter().for_each(Leak::clear);
    }

    async fn step(&mut self, tasks: usize, op: Op) -> Result<()> {
        let calls = self.calls()?;
        match op {
            Op::Task(index, deed) => self.slots[index % tasks].undergo(&calls, deed).await?,
            Op::Each(deeds) => {
                let slots = self.slots[..tasks].iter_mut().zip(deeds);
                let all = slots.map(|(slot, deed)| slot.undergo(&calls, deed));
                for done in join_all(all.collect()).await {
                    done?;
                }
            }
            Op::Unseen(index, blow) => self.strike_unseen(index % tasks, blow).await?,
            Op::StartThroughCrash(index, kind, after) => {
                self.start_through_crash(index % tasks, kind, Duration::from_millis(after))
                    .await?;
            }
            Op::CallThroughCrash(index, call, after) => {
                self.call_through_crash(index % tasks, call, Duration::from_millis(after))
                    .await?;
            }
            Op::RestartPlugin => self.restart_plugin().await?,
            Op::KillPlugin => self.kill_plugin(None).await?,
            Op::CrashAgent => self.crash_agent().await?,
        }
        drop(calls);
        let calls = self.calls()?;
        for slot in &mut self.slots {
            slot.settle(&calls).await?;
            slot.look(&calls).await?;
        }
        Ok(())
    }

    fn calls(&self) -> Result<Calls> {
        Calls::of(self.agent()?)
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("there is no agent")
    }

    fn forget_waiters(&mut self) {
        self.slots.iter_mut().for_each(Slot::forget_waiters);
    }

    async fn restart_plugin(&mut self) -> Result<()> {
        self.forget_waiters();
        self.agent()?.restart().await?;
        self.recover(Handles::Stored, Plugin::New, None).await
    }

    async fn kill_plugin(&mut self, but: Option<usize>) -> Result<()> {
        self.forget_waiters();
        self.agent()?.kill_plugin().await?;
        self.recover(Handles::InMemory, Plugin::New, but).await
    }

    async fn crash_agent(&mut self) -> Result<()> {
        self.forget_waiters();
        let agent = self.agent.take().context("there is no agent")?;
        let (agent, _) = agent.crash().await.reattach().await?;
        self.agent = Some(agent);
        self.recover(Handles::Stored, Plugin::Same, None).await
    }

    /// Offers every task `but` one to the plugin.
    async fn recover(
        &mut self,
        handles: Handles,
        plugin: Plugin,
        but: Option<usize>,
    ) -> Result<()> {
        let calls = self.calls()?;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(task) = slot.task.as_mut().filter(|_| but != Some(index)) else {
                continue;
            };
            let answer = calls.recover(task.handle(handles)).await;
            if plugin == Plugin::New {
                task.life.is_ours = false;
            }
            if task.life.can_be_recovered() || plugin == Plugin::Same && task.life.is_known() {
                answer.with_context(|| format!("RecoverTask of {:?}", task.life))?;
            } else {
                refused(answer, "left no exit record")?;
                task.life.state = State::Lost;
            }
        }
        Ok(())
    }

    async fn strike_unseen(&mut self, index: usize, blow: Blow) -> Result<()> {
        self.forget_waiters();
        let agent = self.agent.take().context("there is no agent")?;
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        if let Some(task) = self.slots[index].running() {
            task.strike(blow)?;
            if blow == Blow::KillSupervisor {
                task.life.ended(End::UNKNOWN, false);
            }
            if blow == Blow::KillSupervisor || task.life.due().is_some() {
                until("the scope is empty", || task.is_empty().then_some(())).await?;
            }
        }
        let (agent, _) = crashed.reattach().await?;
        self.agent = Some(agent);
        self.recover(Handles::Stored, Plugin::New, None).await
    }

    /// Nomad starts it again under the same id if it has no answer.
    async fn start_through_crash(
        &mut self,
        index: usize,
        kind: Kind,
        after: Duration,
    ) -> Result<()> {
        if self.slots[index].task.is_some() || kind == Kind::Stranger {
            return self.kill_plugin(None).await;
        }
        let (config, ends) = self.slots[index].prepare(kind, false)?;
        let calls = self.calls()?;
        let start = tokio::spawn(async move { calls.start(config).await });
        sleep(after).await;
        self.kill_plugin(None).await?;
        let calls = self.calls()?;
        let slot = &mut self.slots[index];
        match start.await? {
            Ok(handle) => {
                calls.recover(handle.clone()).await.context("RecoverTask")?;
                slot.started(&calls, kind, handle, ends).await?;
                if let Some(task) = &mut slot.task {
                    task.life.is_ours = false;
                }
                Ok(())
            }
            Err(status) => {
                expect_lost(&status)?;
                ends.remove();
                let (config, ends) = slot.prepare(kind, true)?;
                let handle = calls.start(config).await.context("StartTask, once more")?;
                slot.started(&calls, kind, handle, ends).await
            }
        }
    }

    /// The next plugin is called once more.
    async fn call_through_crash(
        &mut self,
        index: usize,
        call: Call,
        after: Duration,
    ) -> Result<()> {
        let calls = self.calls()?;
        let id = self.slots[index].id.clone();
        let called = tokio::spawn(async move { call_once(&calls, &id, call).await });
        sleep(after).await;
        // A task that is half destroyed may be recovered, or not.
        let but = (call == Call::Destroy).then_some(index);
        self.kill_plugin(but).await?;
        if let Err(status) = called.await? {
            expect_lost(&status)?;
        }
        let calls = self.calls()?;
        let slot = &mut self.slots[index];
        if let (Some(task), Some(_)) = (&mut slot.task, but) {
            task.life.is_ours = false;
            let _ = calls.recover(task.handle(Handles::InMemory)).await;
        }
        slot.together(&calls, call, call).await
    }

    async fn clear(&mut self) -> Result<()> {
        let calls = self.calls()?;
        for slot in &mut self.slots {
            slot.stop(&calls, "SIGINT", Patience::None).await?;
            slot.settle(&calls).await?;
            slot.destroy(&calls, true).await?;
        }
        // A child between clone and exec still holds the socket of a plugin that was killed, so that the next one takes it for a
        // living one's. The one after that removes it.
        if sockets() > 1 {
            self.restart_plugin().await?;
        }
        let agent = self.agent()?;
        let plugin = agent.plugin_pid().await.context("there is no plugin")?;
        let left = || -> Result<String> {
            let is_left = |leak: &Leak| match leak {
                Leak::Process { pid, .. } => *pid != plugin.cast_signed(),
                Leak::File(path) => !path.starts_with(SOCKETS),
                _ => true,
            };
            let leaks = self.ground.left()?;
            let mut left: Vec<String> = leaks
                .iter()
                .filter(|it| is_left(it))
                .map(Leak::to_string)
                .collect();
            if sockets() > 1 {
                left.push(format!("{} sockets of plugins", sockets()));
            }
            left.extend(self.descriptors.grown(plugin)?);
            Ok(left.join(", "))
        };
        let begun = Instant::now();
        while let left = left()?
            && !left.is_empty()
        {
            ensure!(begun.elapsed() < SETTLING, "left behind: {left}");
            sleep(Duration::from_millis(20)).await;
        }
        agent.violations().check()
    }
}

fn sockets() -> usize {
    fs::read_dir(SOCKETS).map_or(0, Iterator::count)
}
