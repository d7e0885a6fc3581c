//! A whole run inside a guest: one task at a time with the candidates in turns, the same under CPU limits, then many tasks.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::time::sleep;

use super::bus::Bus;
use super::figures::Id;
use super::kernel::{self, Cgroup};
use super::place::{Job, Place};
use super::raw::{Series, Who};
use super::size::Size;
use super::subject::{End, PATIENCE, Subject};
use super::{Controllers, crowds, install_stamp, programs};

/// Between two starts that are compared: systemd is busy with the end of one for some time.
const BETWEEN: Duration = Duration::from_millis(100);

/// A task that waits, of an ordinary program.
const SLEEP: Job = Job {
    command: "sleep",
    args: &["3600"],
    memory_mib: 64,
    ..Job::STAMP
};

/// The drivers to measure.
#[derive(Debug, Clone)]
pub struct Candidates {
    pub ours: PathBuf,
    /// HashiCorp's, which needs the controllers.
    pub exec2: Option<PathBuf>,
}

/// Where samples go, and word of what is going on.
pub trait Listener {
    fn progress(&mut self, what: &str);
    fn version(&mut self, who: Who, version: String);
    fn series(&mut self, series: Series);
}

/// Series that grow by a sample at a time.
#[derive(Debug, Default)]
pub(super) struct Samples(Vec<Series>);

impl Samples {
    pub fn push(&mut self, figure: Id, who: Who, at: Option<u64>, value: f64) {
        // A thousandth of a millisecond is all that there is to know.
        let value = (value * 1e3).round() / 1e3;
        let key =
            |series: &&mut Series| (series.figure, series.who, series.at) == (figure, who, at);
        match self.0.iter_mut().find(key) {
            Some(series) => series.values.push(value),
            None => self.0.push(Series {
                figure,
                who,
                at,
                values: vec![value],
            }),
        }
    }

    pub fn tell(self, listener: &mut impl Listener) {
        self.0
            .into_iter()
            .for_each(|series| listener.series(series));
    }
}

/// Measures everything.
pub async fn measure(
    candidates: &Candidates,
    size: &Size,
    listener: &mut impl Listener,
) -> Result<()> {
    install_stamp()?;
    let controllers = Controllers::here()?;
    let bus = Bus::connect().await?;
    let mut subjects = vec![Subject::start(Who::Ours, &candidates.ours, &bus).await?];
    if let Some(exec2) = &candidates.exec2 {
        subjects.push(Subject::start(Who::Exec2, exec2, &bus).await?);
    }
    for subject in &subjects {
        listener.version(subject.who, subject.calls.version().await?);
    }
    turns(&subjects, &bus, size, listener).await?;
    if controllers == Controllers::All {
        limited(&subjects, size, listener).await?;
    }
    // What follows is about how a plugin grows, so it begins with one that has seen nothing.
    for subject in subjects {
        let finished = subject.agent.finish().await;
        // How well another driver keeps Nomad's contract is not measured here.
        if subject.who == Who::Ours {
            finished?;
        }
    }
    alone(size, listener).await?;
    let mut ours = Subject::start(Who::Ours, &candidates.ours, &bus).await?;
    crowds::grow(&mut ours, size, listener).await?;
    crowds::burst(&mut ours, &bus, size, listener).await?;
    ours.agent.finish().await?;
    let ours = Subject::start(Who::Ours, &candidates.ours, &bus).await?;
    crowds::cycle(&ours, size, listener).await?;
    ours.agent.finish().await
}

/// A machine that has just booted, or that builds something, is waited for, but not for ever.
pub async fn quiet(listener: &mut impl Listener) -> Result<()> {
    const ENOUGH: f64 = 0.5;
    const MOST: Duration = Duration::from_secs(180);
    let begun = Instant::now();
    let mut progress = Progress::new(
        "seconds of waiting for a quiet machine",
        MOST.as_secs() as usize,
    );
    while kernel::load()? > ENOUGH && begun.elapsed() < MOST {
        progress.tell(begun.elapsed().as_secs() as usize, listener);
        sleep(Duration::from_secs(2)).await;
    }
    Ok(())
}

async fn alone(size: &Size, listener: &mut impl Listener) -> Result<()> {
    let mut samples = Samples::default();
    listener.progress("the kernel alone");
    let cgroup = Cgroup::new("exec2-bench")?;
    for _ in 0..size.rounds {
        sleep(BETWEEN).await;
        let mut moved = programs::waiting()?;
        let taken = cgroup.take_in(&moved);
        moved.kill()?;
        moved.wait()?;
        samples.push(Id::Move, Who::Kernel, None, taken?);
        let (opened, kept) = cgroup.gauge_micros()?;
        samples.push(Id::OpenedGauge, Who::Kernel, None, opened);
        samples.push(Id::KeptGauge, Who::Kernel, None, kept);
    }
    cgroup.remove()?;
    samples.tell(listener);
    Ok(())
}

async fn turns(
    subjects: &[Subject],
    bus: &Bus,
    size: &Size,
    listener: &mut impl Listener,
) -> Result<()> {
    let mut samples = Samples::default();
    let mut places = Vec::new();
    for subject in subjects {
        places.push(Place::new(subject.who, &subject.agent, Job::STAMP).await?);
    }
    // What all supervisors have in common is no task's own, as on a host with more tasks than one.
    let mut companions = Vec::new();
    for subject in subjects {
        let place = Place::new(subject.who, &subject.agent, SLEEP).await?;
        let asked = place.task()?;
        subject.calls.start(asked.config.clone()).await?;
        companions.push((subject, place, asked));
    }
    // The first of each finds cold caches.
    for (subject, place) in subjects.iter().zip(&mut places) {
        subject.live(place, End::Exit).await?;
    }
    let mut progress = Progress::new("one task at a time", size.rounds);
    for round in 0..size.rounds {
        progress.tell(round, listener);
        let (end, end_figure) = match round % 2 {
            0 => (End::Exit, Id::ExitToWait),
            _ => (End::Stop, Id::EndToStop),
        };
        let mut order: Vec<_> = subjects.iter().zip(&mut places).collect();
        // Whoever comes second starts beside what is left of the first.
        if round / 2 % 2 == 1 {
            order.reverse();
        }
        for (subject, place) in order {
            sleep(BETWEEN).await;
            let life = subject
                .live(place, end)
                .await
                .with_context(|| format!("{:?}", subject.who))?;
            let taken = [
                (Id::FirstInstruction, life.first_instruction_ms),
                (Id::StartAnswer, life.answer_ms),
                (Id::CpuInScope, life.cpu_in_scope_ms),
                (Id::CpuOfPlugin, life.cpu_ms.plugin),
                (Id::CpuOfSystemd, life.cpu_ms.systemd),
                (Id::CpuOfBus, life.cpu_ms.bus),
                (Id::PrivateMemory, life.memory.private_kib),
                (Id::ProportionalMemory, life.memory.proportional_kib),
                (end_figure, life.end_ms),
            ];
            for (figure, value) in taken {
                samples.push(figure, subject.who, None, value);
            }
        }
        let others = [
            Who::SystemdRunScope,
            Who::SystemdRunService,
            Who::Bwrap,
            Who::ForkExec,
        ];
        for who in others {
            sleep(BETWEEN).await;
            let taken = programs::first_instruction(who)?;
            samples.push(Id::FirstInstruction, who, None, taken);
        }
        sleep(BETWEEN).await;
        samples.push(
            Id::FirstInstruction,
            Who::Systemd,
            None,
            programs::round_trip(bus).await?,
        );
        samples.push(
            Id::CpuInScope,
            Who::ForkExec,
            None,
            programs::cpu_of_exec()?,
        );
    }
    for (subject, place, asked) in companions {
        subject.calls.destroy(&asked.config.id, true).await?;
        asked.clear();
        place.close().await?;
    }
    for subject in subjects {
        let resident = kernel::resident_kib(subject.plugin)?;
        samples.push(Id::PluginAfter, subject.who, None, resident);
    }
    for subject in subjects.iter().filter(|subject| subject.who == Who::Ours) {
        phases(subject, size, &mut samples)?;
    }
    samples.tell(listener);
    for place in places {
        place.close().await?;
    }
    Ok(())
}

/// The parts of a start, as the driver logs them: `plan 0.3 ms, spawn 1.2 ms, scope 2.0 ms, exec 0.9 ms`.
fn phases(subject: &Subject, size: &Size, samples: &mut Samples) -> Result<()> {
    let lines = subject.agent.log();
    let told: Vec<&str> = lines
        .iter()
        .filter_map(|line| line.fields.get("phases")?.as_str())
        .collect();
    let told = &told[told.len().saturating_sub(size.rounds)..];
    for phases in told {
        for (phase, figure) in
            phases
                .split(", ")
                .zip([Id::PhasePlan, Id::PhaseSpawn, Id::PhaseScope, Id::PhaseExec])
        {
            let millis = phase.split(' ').nth(1).context("a phase has its time")?;
            samples.push(figure, Who::Ours, None, millis.parse()?);
        }
    }
    Ok(())
}

/// With a quota in force, and what a sleeping task takes of its memory.
async fn limited(subjects: &[Subject], size: &Size, listener: &mut impl Listener) -> Result<()> {
    let mut samples = Samples::default();
    let mut progress = Progress::new("tasks with limits", size.limited_rounds);
    let mut places = Vec::new();
    for cpu_mhz in size.limits_mhz.iter().copied() {
        for subject in subjects {
            let job = Job {
                cpu_mhz,
                ..Job::STAMP
            };
            let place = Place::new(subject.who, &subject.agent, job).await?;
            places.push((subject, cpu_mhz, place));
        }
    }
    for round in 0..size.limited_rounds {
        progress.tell(round, listener);
        for (subject, cpu_mhz, place) in &mut places {
            sleep(BETWEEN).await;
            let life = subject
                .live(place, End::Stop)
                .await
                .with_context(|| format!("{:?} with cpu = {cpu_mhz}", subject.who))?;
            let taken = [
                (Id::LimitedFirstInstruction, life.first_instruction_ms),
                (Id::LimitedAnswer, life.answer_ms),
                (Id::LimitedCpuInScope, life.cpu_in_scope_ms),
            ];
            for (figure, value) in taken {
                samples.push(figure, subject.who, Some(*cpu_mhz), value);
            }
        }
    }
    for (_, _, place) in places {
        place.close().await?;
    }
    for subject in subjects {
        let place = Place::new(subject.who, &subject.agent, SLEEP).await?;
        for _ in 0..size.limited_rounds {
            let asked = place.task()?;
            let id = asked.config.id.clone();
            subject.calls.start(asked.config.clone()).await?;
            // An answer may come before the command does.
            let begun = Instant::now();
            while !kernel::executes(&asked.cgroup, SLEEP.command)? {
                ensure!(begun.elapsed() < PATIENCE, "{:?}: no sleep", subject.who);
                sleep(Duration::from_millis(20)).await;
            }
            sleep(crowds::SETTLE).await;
            let memory = asked.cgroup.memory_kib()?;
            samples.push(Id::SleepMemory, subject.who, None, memory);
            // StopTask is measured elsewhere, and not every driver's likes a command that dies of the signal.
            subject.calls.destroy(&id, true).await?;
            asked.clear();
        }
        place.close().await?;
    }
    samples.tell(listener);
    Ok(())
}

/// Says how far it is, every few seconds.
#[derive(Debug)]
pub(super) struct Progress {
    what: String,
    of: usize,
    told: Option<Instant>,
}

impl Progress {
    pub fn new(what: impl Into<String>, of: usize) -> Progress {
        Progress {
            what: what.into(),
            of,
            told: None,
        }
    }

    pub fn tell(&mut self, done: usize, listener: &mut impl Listener) {
        if self.told.is_none_or(|told| told.elapsed().as_secs() >= 10) {
            listener.progress(&format!("{}: {done} of {}", self.what, self.of));
            self.told = Some(Instant::now());
        }
    }
}

/// The pid of the bus.
pub(super) fn bus_pid() -> Result<u32> {
    let bus = Cgroup::at(Path::new("system.slice/dbus.service"));
    let first = bus.processes()?.first().copied();
    first.context("no dbus-daemon")
}
