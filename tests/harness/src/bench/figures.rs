//! The figures that are taken, in one table: what each is called, of whom it is taken, how many samples it has.

use serde::{Deserialize, Serialize};

use super::Controllers;
use super::raw::Who;
use super::size::Size;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Id {
    FirstInstruction,
    StartAnswer,
    PhasePlan,
    PhaseSpawn,
    PhaseScope,
    PhaseExec,
    CpuInScope,
    CpuOfPlugin,
    CpuOfSystemd,
    CpuOfBus,
    ExitToWait,
    EndToStop,
    PrivateMemory,
    ProportionalMemory,
    SleepMemory,
    LimitedFirstInstruction,
    CrowdFirstInstruction,
    CrowdAnswer,
    PluginResident,
    PluginDescriptors,
    PluginThreads,
    SystemdResident,
    BusResident,
    IdleOfPlugin,
    IdleOfSystemd,
    IdleOfBus,
    StatsOfPlugin,
    StatsOfSystemd,
    StatsOfBus,
    ResidentGivenBack,
    BurstAnswer,
    BurstWhole,
    RecoverAnswer,
    RecoverWhole,
    CycledResident,
    CycledDescriptors,
    CycledThreads,
    CycledSystemdResident,
}

/// Which parts of a run a figure belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// One task at a time, the candidates in turns.
    Turns,
    /// The same at some CPU limits.
    Limited,
    /// Some tasks at once.
    Crowds,
    /// As many as there are at most.
    LargestCrowd,
    /// Many starts at once.
    Bursts,
    /// Many lives, one after the other: before and after.
    Cycles,
}

/// Of whom it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Whatever starts a command.
    All,
    /// What speaks to Nomad.
    Drivers,
    Ours,
    /// Drivers, and a bare exec for scale.
    DriversAndExec,
}

#[derive(Debug, Clone, Copy)]
pub struct Figure {
    pub id: Id,
    pub title: &'static str,
    pub unit: &'static str,
    pub part: Part,
    pub of: Of,
    pub samples: Samples,
    /// Only where the memory controller is.
    pub needs: Needs,
    /// Clocks that tick every 10 ms, and counts.
    pub may_be_zero: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    Controllers,
}

/// How many samples it has at each of its points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Samples {
    One,
    Rounds,
    /// The two ways to an end take turns.
    EvenRounds,
    OddRounds,
    LimitedRounds,
    CrowdRounds,
    /// One for each task or start.
    Each,
}

const fn figure(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        id,
        title,
        unit,
        part: Part::Turns,
        of: Of::Drivers,
        samples: Samples::Rounds,
        needs: Needs::Nothing,
        may_be_zero: false,
    }
}

const fn crowd(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        part: Part::Crowds,
        samples: Samples::One,
        of: Of::Ours,
        ..figure(id, title, unit)
    }
}

impl Figure {
    pub const ALL: [Figure; 38] = [
        Figure {
            of: Of::All,
            ..figure(
                Id::FirstInstruction,
                "start to the command's first instruction",
                "ms",
            )
        },
        figure(Id::StartAnswer, "StartTask to its answer", "ms"),
        phase(Id::PhasePlan, "plan"),
        phase(Id::PhaseSpawn, "spawn the helper"),
        phase(Id::PhaseScope, "scope, and the helper's preparations"),
        phase(Id::PhaseExec, "release to exec"),
        Figure {
            of: Of::DriversAndExec,
            ..figure(
                Id::CpuInScope,
                "CPU time in the task's cgroup until its command waits",
                "ms",
            )
        },
        Figure {
            may_be_zero: true,
            ..figure(
                Id::CpuOfPlugin,
                "CPU time of the plugin, and of what it has not yet moved, for a start",
                "ms",
            )
        },
        Figure {
            may_be_zero: true,
            ..figure(Id::CpuOfSystemd, "CPU time of PID 1 for a start", "ms")
        },
        Figure {
            may_be_zero: true,
            ..figure(Id::CpuOfBus, "CPU time of the bus for a start", "ms")
        },
        Figure {
            samples: Samples::EvenRounds,
            ..figure(
                Id::ExitToWait,
                "the command's last instruction to WaitTask's answer",
                "ms",
            )
        },
        Figure {
            samples: Samples::OddRounds,
            ..figure(
                Id::EndToStop,
                "a stopped command's last instruction to StopTask's answer",
                "ms",
            )
        },
        figure(
            Id::PrivateMemory,
            "private memory of what stays beside the command",
            "KiB",
        ),
        figure(
            Id::ProportionalMemory,
            "proportional memory of the same",
            "KiB",
        ),
        Figure {
            needs: Needs::Controllers,
            samples: Samples::LimitedRounds,
            part: Part::Limited,
            ..figure(
                Id::SleepMemory,
                "`memory.current` of a task that runs `sleep`",
                "KiB",
            )
        },
        Figure {
            part: Part::Limited,
            samples: Samples::LimitedRounds,
            needs: Needs::Controllers,
            ..figure(
                Id::LimitedFirstInstruction,
                "StartTask to the first instruction, by `cpu`",
                "ms",
            )
        },
        Figure {
            samples: Samples::CrowdRounds,
            ..crowd(
                Id::CrowdFirstInstruction,
                "StartTask to the first instruction",
                "ms",
            )
        },
        Figure {
            samples: Samples::CrowdRounds,
            ..crowd(Id::CrowdAnswer, "StartTask to its answer", "ms")
        },
        crowd(Id::PluginResident, "resident memory of the plugin", "KiB"),
        crowd(Id::PluginDescriptors, "descriptors of the plugin", ""),
        crowd(Id::PluginThreads, "threads of the plugin", ""),
        crowd(Id::SystemdResident, "resident memory of PID 1", "KiB"),
        crowd(Id::BusResident, "resident memory of the bus", "KiB"),
        idle(Id::IdleOfPlugin, "the plugin, nothing asked"),
        idle(Id::IdleOfSystemd, "PID 1, nothing asked"),
        idle(Id::IdleOfBus, "the bus, nothing asked"),
        idle(Id::StatsOfPlugin, "the plugin, statistics every second"),
        idle(Id::StatsOfSystemd, "PID 1, statistics every second"),
        idle(Id::StatsOfBus, "the bus, statistics every second"),
        Figure {
            part: Part::LargestCrowd,
            ..crowd(
                Id::ResidentGivenBack,
                "resident memory of the plugin once they have ended",
                "KiB",
            )
        },
        burst(Id::BurstAnswer, "StartTask to its answer", Samples::Each),
        burst(Id::BurstWhole, "all of them", Samples::One),
        burst(
            Id::RecoverAnswer,
            "RecoverTask to its answer, one after the other",
            Samples::Each,
        ),
        burst(Id::RecoverWhole, "RecoverTask of all", Samples::One),
        cycled(Id::CycledResident, "resident memory of the plugin", "KiB"),
        cycled(Id::CycledDescriptors, "descriptors of the plugin", ""),
        cycled(Id::CycledThreads, "threads of the plugin", ""),
        cycled(Id::CycledSystemdResident, "resident memory of PID 1", "KiB"),
    ];

    pub fn of(id: Id) -> Option<&'static Figure> {
        const ALL: &[Figure] = &Figure::ALL;
        ALL.iter().find(|figure| figure.id == id)
    }

    /// What a whole run has of it: whose, at which point, how many samples.
    pub fn expected(
        &self,
        size: &Size,
        controllers: Controllers,
        has_exec2: bool,
    ) -> Vec<(Who, Option<u64>, usize)> {
        if self.needs == Needs::Controllers && controllers == Controllers::None {
            return Vec::new();
        }
        let of = match self.of {
            Of::All => &[
                Who::Ours,
                Who::Exec2,
                Who::SystemdRunScope,
                Who::SystemdRunService,
                Who::Bwrap,
                Who::ForkExec,
                Who::Systemd,
            ][..],
            Of::Drivers => &[Who::Ours, Who::Exec2],
            Of::Ours => &[Who::Ours],
            Of::DriversAndExec => &[Who::Ours, Who::Exec2, Who::ForkExec],
        };
        let points: Vec<Option<u64>> = match self.part {
            Part::Turns => vec![None],
            Part::Limited if self.id == Id::SleepMemory => vec![None],
            Part::Limited => size.limits_mhz.iter().copied().map(Some).collect(),
            Part::Crowds => size.crowds.iter().copied().map(Some).collect(),
            Part::LargestCrowd => vec![Some(size.largest_crowd())],
            Part::Bursts => size.bursts.iter().copied().map(Some).collect(),
            Part::Cycles => vec![Some(0), Some(size.cycles)],
        };
        let count = |at: Option<u64>| match self.samples {
            Samples::One => 1,
            Samples::Rounds => size.rounds,
            Samples::EvenRounds => size.rounds.div_ceil(2),
            Samples::OddRounds => size.rounds / 2,
            Samples::LimitedRounds => size.limited_rounds,
            Samples::CrowdRounds => size.crowd_rounds,
            Samples::Each => at.unwrap_or(0) as usize,
        };
        let there = of.iter().filter(|who| **who != Who::Exec2 || has_exec2);
        there
            .flat_map(|who| points.iter().map(|at| (*who, *at, count(*at))))
            .collect()
    }
}

/// The driver's log has tenths of a millisecond.
const fn phase(id: Id, title: &'static str) -> Figure {
    Figure {
        of: Of::Ours,
        may_be_zero: true,
        ..figure(id, title, "ms")
    }
}

const fn idle(id: Id, title: &'static str) -> Figure {
    Figure {
        part: Part::LargestCrowd,
        may_be_zero: true,
        ..crowd(id, title, "% of a CPU")
    }
}

const fn burst(id: Id, title: &'static str, samples: Samples) -> Figure {
    Figure {
        part: Part::Bursts,
        samples,
        ..crowd(id, title, "ms")
    }
}

const fn cycled(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        part: Part::Cycles,
        ..crowd(id, title, unit)
    }
}
