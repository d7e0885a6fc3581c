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
    PluginAfter,
    LimitedFirstInstruction,
    LimitedAnswer,
    LimitedCpuInScope,
    SleepMemory,
    CrowdFirstInstruction,
    CrowdAnswer,
    CrowdEndToStop,
    CrowdCpuInScope,
    CrowdCpuOfPlugin,
    CrowdCpuOfSystemd,
    CrowdPrivateMemory,
    PluginCharged,
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
    StatsResident,
    ResidentGivenBack,
    BurstAnswer,
    BurstWhole,
    BurstOfScopes,
    RecoverAnswer,
    RecoverWhole,
    CycledResident,
    CycledDescriptors,
    CycledThreads,
    CycledSystemdResident,
    CycledSystemdDescriptors,
    CycledBusResident,
    CycledBusDescriptors,
    Move,
    OpenedGauge,
    KeptGauge,
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
    /// What none of the candidates does better.
    Kernel,
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
    /// systemd without any driver.
    Systemd,
    Kernel,
}

#[derive(Debug, Clone, Copy)]
pub struct Figure {
    pub id: Id,
    pub title: &'static str,
    pub unit: &'static str,
    pub part: Part,
    pub of: Of,
    pub samples: Samples,
    pub needs: Needs,
    pub zeros: Zeros,
}

/// Which samples may be 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    None,
    /// Not all of this driver's, or nothing was counted.
    Some,
    Any,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// For cpu and memory.
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

const CPU_IN_SCOPE: &str = "CPU time in the task's cgroup until its command waits";
const CPU_OF_PLUGIN: &str =
    "CPU time of the plugin, and of what it has not moved yet, for a task's start and end";
const CPU_OF_SYSTEMD: &str = "CPU time of PID 1 for a task's start and end";
const END_TO_STOP: &str = "a stopped command's last instruction to StopTask's answer";
const PRIVATE_MEMORY: &str = "private memory of what stays beside the command";

const fn figure(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        id,
        title,
        unit,
        part: Part::Turns,
        of: Of::Drivers,
        samples: Samples::Rounds,
        needs: Needs::Nothing,
        zeros: Zeros::None,
    }
}

/// With a quota in force.
const fn limited(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        part: Part::Limited,
        samples: Samples::LimitedRounds,
        needs: Needs::Controllers,
        ..figure(id, title, unit)
    }
}

/// Of one more task beside those that run.
const fn in_crowd(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        samples: Samples::CrowdRounds,
        ..crowd(id, title, unit)
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
    pub const ALL: [Figure; 55] = [
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
            ..figure(Id::CpuInScope, CPU_IN_SCOPE, "ms")
        },
        Figure {
            zeros: Zeros::Some,
            ..figure(Id::CpuOfPlugin, CPU_OF_PLUGIN, "ms")
        },
        Figure {
            zeros: Zeros::Some,
            ..figure(Id::CpuOfSystemd, CPU_OF_SYSTEMD, "ms")
        },
        Figure {
            zeros: Zeros::Some,
            ..figure(
                Id::CpuOfBus,
                "CPU time of the bus for a task's start and end",
                "ms",
            )
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
            ..figure(Id::EndToStop, END_TO_STOP, "ms")
        },
        figure(Id::PrivateMemory, PRIVATE_MEMORY, "KiB"),
        figure(
            Id::ProportionalMemory,
            "proportional memory of the same",
            "KiB",
        ),
        Figure {
            samples: Samples::One,
            ..figure(
                Id::PluginAfter,
                "resident memory of the plugin after all of these",
                "KiB",
            )
        },
        limited(
            Id::LimitedFirstInstruction,
            "StartTask to the first instruction",
            "ms",
        ),
        limited(Id::LimitedAnswer, "StartTask to its answer", "ms"),
        limited(Id::LimitedCpuInScope, CPU_IN_SCOPE, "ms"),
        limited(
            Id::SleepMemory,
            "`memory.current` of a task that runs `sleep`",
            "KiB",
        ),
        in_crowd(
            Id::CrowdFirstInstruction,
            "StartTask to the first instruction",
            "ms",
        ),
        in_crowd(Id::CrowdAnswer, "StartTask to its answer", "ms"),
        in_crowd(Id::CrowdEndToStop, END_TO_STOP, "ms"),
        in_crowd(Id::CrowdCpuInScope, CPU_IN_SCOPE, "ms"),
        Figure {
            zeros: Zeros::Some,
            ..in_crowd(Id::CrowdCpuOfPlugin, CPU_OF_PLUGIN, "ms")
        },
        Figure {
            zeros: Zeros::Some,
            ..in_crowd(Id::CrowdCpuOfSystemd, CPU_OF_SYSTEMD, "ms")
        },
        in_crowd(Id::CrowdPrivateMemory, PRIVATE_MEMORY, "KiB"),
        // Memory stays with the cgroup that a process was in when it took it.
        Figure {
            needs: Needs::Controllers,
            zeros: Zeros::Any,
            ..crowd(
                Id::PluginCharged,
                "memory charged to the plugin's cgroup",
                "KiB",
            )
        },
        crowd(Id::PluginResident, "resident memory of the plugin", "KiB"),
        crowd(Id::PluginDescriptors, "descriptors of the plugin", ""),
        crowd(Id::PluginThreads, "threads of the plugin", ""),
        crowd(Id::SystemdResident, "resident memory of PID 1", "KiB"),
        crowd(Id::BusResident, "resident memory of the bus", "KiB"),
        idle(Id::IdleOfPlugin, "the plugin, nothing asked"),
        idle(Id::IdleOfSystemd, "PID 1, nothing asked"),
        idle(Id::IdleOfBus, "the bus, nothing asked"),
        Figure {
            zeros: Zeros::Some,
            ..idle(Id::StatsOfPlugin, "the plugin, statistics every second")
        },
        idle(Id::StatsOfSystemd, "PID 1, statistics every second"),
        idle(Id::StatsOfBus, "the bus, statistics every second"),
        Figure {
            part: Part::LargestCrowd,
            ..crowd(
                Id::StatsResident,
                "resident memory of the plugin, statistics every second",
                "KiB",
            )
        },
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
        Figure {
            of: Of::Systemd,
            ..burst(Id::BurstOfScopes, "scopes at once", Samples::One)
        },
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
        cycled(Id::CycledSystemdDescriptors, "descriptors of PID 1", ""),
        cycled(Id::CycledBusResident, "resident memory of the bus", "KiB"),
        cycled(Id::CycledBusDescriptors, "descriptors of the bus", ""),
        kernel(Id::Move, "to move a process into another cgroup", "ms"),
        kernel(
            Id::OpenedGauge,
            "CPU time to open, read and close a cgroup's `cpu.stat`",
            "µs",
        ),
        kernel(
            Id::KeptGauge,
            "CPU time to read it again, if it is kept open",
            "µs",
        ),
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
            Of::Systemd => &[Who::Systemd],
            Of::Kernel => &[Who::Kernel],
        };
        let points: Vec<Option<u64>> = match self.part {
            Part::Turns | Part::Kernel => vec![None],
            Part::Limited if self.id == Id::SleepMemory => vec![None],
            Part::Limited => size.limits_mhz.iter().copied().map(Some).collect(),
            Part::Crowds => size.crowds.iter().copied().map(Some).collect(),
            Part::LargestCrowd => vec![Some(size.largest_crowd())],
            Part::Bursts => size.bursts.iter().copied().map(Some).collect(),
            Part::Cycles => size.looks_at_cycles().map(Some).to_vec(),
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
        zeros: Zeros::Some,
        ..figure(id, title, "ms")
    }
}

const fn idle(id: Id, title: &'static str) -> Figure {
    Figure {
        part: Part::LargestCrowd,
        zeros: Zeros::Any,
        ..crowd(id, title, "% of a CPU")
    }
}

const fn kernel(id: Id, title: &'static str, unit: &'static str) -> Figure {
    Figure {
        part: Part::Kernel,
        of: Of::Kernel,
        ..figure(id, title, unit)
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
