//! Many tasks: what the plugin, PID 1 and the bus take of them, how starts slow down, and what stays when they have ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_stream::StreamExt as _;

use super::bus::Bus;
use super::figures::Id;
use super::measure::{Listener, Progress, Samples, bus_pid};
use super::place::{Asked, Job, Place};
use super::raw::Who;
use super::size::Size;
use super::subject::{Cpu, End, Subject, end};
use super::{Controllers, kernel, programs};
use crate::leaks::Ground;
use crate::nomad::Calls;
use crate::nomad::proto::driver::TaskHandle;

/// Until what follows an answer is done.
pub(super) const SETTLE: Duration = Duration::from_millis(500);
const STATS_INTERVAL: Duration = Duration::from_secs(1);
/// Calls at once where nobody measures them.
const AT_ONCE: usize = 16;
const SYSTEMD: u32 = 1;

/// Tasks that run, with WaitTask held for each as Nomad holds it.
#[derive(Debug, Default)]
struct Crowd {
    tasks: Vec<(Asked, TaskHandle)>,
    waits: JoinSet<()>,
}

impl Crowd {
    /// At once; gives each start's milliseconds to its answer.
    async fn grow(&mut self, count: usize, calls: &Calls, place: &Place) -> Result<Vec<f64>> {
        let mut starts = JoinSet::new();
        for _ in 0..count {
            let (calls, asked) = (calls.clone(), place.task()?);
            starts.spawn(async move {
                let begun = Instant::now();
                let handle = calls.start(asked.config.clone()).await?;
                Ok::<_, tonic::Status>((asked, handle, millis(begun)))
            });
        }
        let mut taken = Vec::new();
        while let Some(started) = starts.join_next().await {
            let (asked, handle, millis) = started??;
            taken.push(millis);
            self.wait(calls, &asked);
            self.tasks.push((asked, handle));
        }
        Ok(taken)
    }

    fn wait(&mut self, calls: &Calls, asked: &Asked) {
        let (calls, id) = (calls.clone(), asked.config.id.clone());
        self.waits.spawn(async move {
            let _ = calls.wait(&id).await;
        });
    }

    async fn end(&mut self, calls: &Calls) -> Result<()> {
        while !self.tasks.is_empty() {
            let rest = self.tasks.len().saturating_sub(AT_ONCE);
            let mut ends = JoinSet::new();
            for (asked, _) in self.tasks.split_off(rest) {
                let calls = calls.clone();
                ends.spawn(async move {
                    let ended = end(&calls, &asked.config.id).await;
                    asked.clear();
                    ended
                });
            }
            while let Some(ended) = ends.join_next().await {
                ended??;
            }
        }
        self.waits.abort_all();
        Ok(())
    }
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// Ever more tasks, up to the most.
pub async fn grow(ours: &mut Subject, size: &Size, listener: &mut impl Listener) -> Result<()> {
    let mut samples = Samples::default();
    // Looked at before its first task has touched anything.
    let untouched = Look::at(ours)?;
    let mut place = Place::new(Who::Ours, &ours.agent, Job::STAMP).await?;
    // Nobody reads its pipe, which has room for the moments of four thousand tasks.
    let crowded = Place::new(Who::Ours, &ours.agent, Job::CROWD).await?;
    let mut crowd = Crowd::default();
    for count in &size.crowds {
        listener.progress(&format!("{count} tasks at once"));
        while crowd.tasks.len() < *count as usize {
            let more = AT_ONCE.min(*count as usize - crowd.tasks.len());
            crowd.grow(more, &ours.calls, &crowded).await?;
        }
        sleep(SETTLE).await;
        let look = match count {
            0 => untouched,
            _ => Look::at(ours)?,
        };
        look.push(&mut samples, *count);
        for _ in 0..size.crowd_rounds {
            let life = ours.live(&mut place, End::Stop).await?;
            let taken = [
                (Id::CrowdFirstInstruction, life.first_instruction_ms),
                (Id::CrowdAnswer, life.answer_ms),
                (Id::CrowdEndToStop, life.end_ms),
                (Id::CrowdCpuInScope, life.cpu_in_scope_ms),
                (Id::CrowdCpuOfPlugin, life.cpu_ms.plugin),
                (Id::CrowdCpuOfSystemd, life.cpu_ms.systemd),
                (Id::CrowdPrivateMemory, life.memory.private_kib),
            ];
            for (figure, value) in taken {
                samples.push(figure, Who::Ours, Some(*count), value);
            }
        }
    }
    idle(ours, &crowd, size, &mut samples, listener).await?;
    crowd.end(&ours.calls).await?;
    listener.progress("what the plugin gives back");
    sleep(Duration::from_secs(size.give_back_sec)).await;
    let at = Some(size.largest_crowd());
    let resident = kernel::resident_kib(ours.plugin)?;
    samples.push(Id::ResidentGivenBack, Who::Ours, at, resident);
    samples.tell(listener);
    crowded.close().await?;
    place.close().await
}

/// What the processes on the tasks' behalf have taken.
#[derive(Debug, Clone, Copy)]
struct Look {
    plugin_kib: f64,
    descriptors: f64,
    threads: f64,
    /// Without the controller, nothing is charged.
    charged_kib: Option<f64>,
    systemd_kib: f64,
    systemd_descriptors: f64,
    bus_kib: f64,
    bus_descriptors: f64,
}

impl Look {
    fn at(ours: &Subject) -> Result<Look> {
        let bus = bus_pid()?;
        Ok(Look {
            plugin_kib: kernel::resident_kib(ours.plugin)?,
            descriptors: kernel::descriptors(ours.plugin)?,
            threads: kernel::threads(ours.plugin)?,
            charged_kib: match Controllers::here()? {
                Controllers::All => Some(ours.memory_kib()?),
                Controllers::None => None,
            },
            systemd_kib: kernel::resident_kib(SYSTEMD)?,
            systemd_descriptors: kernel::descriptors(SYSTEMD)?,
            bus_kib: kernel::resident_kib(bus)?,
            bus_descriptors: kernel::descriptors(bus)?,
        })
    }

    fn push(&self, samples: &mut Samples, count: u64) {
        let figures = [
            (Id::PluginResident, self.plugin_kib),
            (Id::PluginDescriptors, self.descriptors),
            (Id::PluginThreads, self.threads),
            (Id::SystemdResident, self.systemd_kib),
            (Id::BusResident, self.bus_kib),
        ];
        let charged = self.charged_kib.map(|kib| (Id::PluginCharged, kib));
        for (figure, value) in figures.into_iter().chain(charged) {
            samples.push(figure, Who::Ours, Some(count), value);
        }
    }
}

/// First with nothing but WaitTask held, then with the statistics of every task asked for each second.
async fn idle(
    ours: &Subject,
    crowd: &Crowd,
    size: &Size,
    samples: &mut Samples,
    listener: &mut impl Listener,
) -> Result<()> {
    let count = crowd.tasks.len();
    listener.progress(&format!("{count} idle tasks for {} s", size.idle_sec));
    let quiet = percent_of_a_cpu(ours, size.idle_sec).await?;
    listener.progress(&format!("the same with statistics for {} s", size.idle_sec));
    let (mut streams, seen) = (JoinSet::new(), Arc::new(AtomicU64::new(0)));
    for (asked, _) in &crowd.tasks {
        let mut stream = ours.calls.stats(&asked.config.id, STATS_INTERVAL).await?;
        let seen = seen.clone();
        streams.spawn(async move {
            while let Some(Ok(_)) = stream.next().await {
                seen.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let asked = percent_of_a_cpu(ours, size.idle_sec).await?;
    let resident = kernel::resident_kib(ours.plugin)?;
    let (seen, due) = (seen.load(Ordering::Relaxed), count as u64 * size.idle_sec);
    ensure!(
        seen + count as u64 >= due,
        "{seen} samples of statistics came, and not {due}"
    );
    ensure!(
        streams.try_join_next().is_none(),
        "a stream of statistics has ended"
    );
    let at = Some(count as u64);
    samples.push(Id::StatsResident, Who::Ours, at, resident);
    for (figures, cpu) in [
        ([Id::IdleOfPlugin, Id::IdleOfSystemd, Id::IdleOfBus], quiet),
        (
            [Id::StatsOfPlugin, Id::StatsOfSystemd, Id::StatsOfBus],
            asked,
        ),
    ] {
        for (figure, value) in figures.into_iter().zip([cpu.plugin, cpu.systemd, cpu.bus]) {
            samples.push(figure, Who::Ours, at, value);
        }
    }
    Ok(())
}

async fn percent_of_a_cpu(ours: &Subject, sec: u64) -> Result<Cpu> {
    let (before, begun) = (ours.cpu()?, Instant::now());
    sleep(Duration::from_secs(sec)).await;
    let spent = ours.cpu()?.since(before);
    let part = 100.0 / millis(begun);
    Ok(Cpu {
        plugin: spent.plugin * part,
        systemd: spent.systemd * part,
        bus: spent.bus * part,
    })
}

/// Many starts at once; then a new plugin that is told of all of them, one after the other as Nomad does.
pub async fn burst(
    ours: &mut Subject,
    bus: &Bus,
    size: &Size,
    listener: &mut impl Listener,
) -> Result<()> {
    for count in &size.bursts {
        let mut samples = Samples::default();
        let at = Some(*count);
        let place = Place::new(Who::Ours, &ours.agent, Job::CROWD).await?;
        let mut crowd = Crowd::default();
        listener.progress(&format!("{count} starts at once"));
        let begun = Instant::now();
        for taken in crowd.grow(*count as usize, &ours.calls, &place).await? {
            samples.push(Id::BurstAnswer, Who::Ours, at, taken);
        }
        samples.push(Id::BurstWhole, Who::Ours, at, millis(begun));
        let scopes = programs::round_trips(bus, *count).await?;
        samples.push(Id::BurstOfScopes, Who::Systemd, at, scopes);

        listener.progress(&format!("recovery of {count} tasks"));
        crowd.waits.abort_all();
        ours.kill_plugin(bus).await?;
        let begun = Instant::now();
        for (_, handle) in &crowd.tasks {
            let begun = Instant::now();
            ours.calls.recover(handle.clone()).await?;
            samples.push(Id::RecoverAnswer, Who::Ours, at, millis(begun));
        }
        samples.push(Id::RecoverWhole, Who::Ours, at, millis(begun));
        crowd.end(&ours.calls).await?;
        samples.tell(listener);
        place.close().await?;
    }
    Ok(())
}

/// Many short lives, one after the other.
pub async fn cycle(ours: &Subject, size: &Size, listener: &mut impl Listener) -> Result<()> {
    let mut samples = Samples::default();
    let mut place = Place::new(Who::Ours, &ours.agent, Job::SHORT).await?;
    let look = |samples: &mut Samples, count: u64| {
        let look = Look::at(ours)?;
        for (figure, value) in [
            (Id::CycledResident, look.plugin_kib),
            (Id::CycledDescriptors, look.descriptors),
            (Id::CycledThreads, look.threads),
            (Id::CycledSystemdResident, look.systemd_kib),
            (Id::CycledSystemdDescriptors, look.systemd_descriptors),
            (Id::CycledBusResident, look.bus_kib),
            (Id::CycledBusDescriptors, look.bus_descriptors),
        ] {
            samples.push(figure, Who::Ours, Some(count), value);
        }
        Ok::<_, anyhow::Error>(())
    };
    let settle = Duration::from_secs(size.give_back_sec);
    sleep(settle).await;
    look(&mut samples, 0)?;
    let ground = Ground::survey()?;
    let [_, half, _] = size.looks_at_cycles();
    let mut progress = Progress::new("starts and ends", size.cycles as usize);
    for cycle in 0..size.cycles {
        progress.tell(cycle as usize, listener);
        if cycle == half {
            sleep(settle).await;
            look(&mut samples, cycle)?;
        }
        let asked = place.task()?;
        let id = asked.config.id.clone();
        ours.calls.start(asked.config.clone()).await?;
        let exit = ours.calls.wait(&id).await?;
        ensure!(exit.success(), "{exit:?}");
        ours.calls.destroy(&id, true).await?;
        asked.clear();
        place.moment_nanos().await?;
        place.moment_nanos().await?;
    }
    sleep(settle).await;
    look(&mut samples, size.cycles)?;
    let left = ground.left()?;
    ensure!(left.is_empty(), "after {} lives: {left:?}", size.cycles);
    samples.tell(listener);
    place.close().await
}
