//! What a task uses, from its scope's cgroup files.

use std::time::{Duration, Instant, SystemTime};

use futures_util::stream;
use tokio::time::MissedTickBehavior;

use super::Flow;
use super::table::TaskTable;
use super::types::{CpuUsage, MemoryUsage, TaskId, Usage};
use crate::cgroup::{Cpu, Gauges};
use crate::plan::limits::Compute;

impl TaskTable {
    /// A sample each interval until the task ends; none for an id that nobody knows.
    pub(super) fn samples(&self, id: &TaskId, interval: Duration) -> Flow<Usage> {
        let Some(task) = self.find(id) else {
            return Box::pin(tokio_stream::empty());
        };
        let compute = self.settings().compute;
        let Some(gauges) = task.cgroup.gauges() else {
            return Box::pin(tokio_stream::empty());
        };
        let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(100)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Nomad has such a stream for every task: a channel to it would take more than all that is known of the task.
        let first = (task, gauges, ticks, None::<(Cpu, Instant)>);
        Box::pin(stream::unfold(
            first,
            move |(task, gauges, mut ticks, before)| async move {
                tokio::select! {
                    _ = task.wait() => return None,
                    _ = ticks.tick() => {}
                }
                let (usage, now) = sample(&gauges, before, compute)?;
                Some((usage, (task, gauges, ticks, Some(now))))
            },
        ))
    }
}

/// One sample, and the counters that the next one is the difference to. `None` once the scope is gone.
fn sample(
    gauges: &Gauges,
    before: Option<(Cpu, Instant)>,
    compute: Option<Compute>,
) -> Option<(Usage, (Cpu, Instant))> {
    let cpu = gauges.cpu()?;
    let now = Instant::now();
    let memory = gauges.memory();
    let usage = Usage {
        at: SystemTime::now(),
        cpu: cpu_usage(
            cpu,
            before.map(|(cpu, at)| (cpu, now.duration_since(at))),
            compute,
        ),
        memory: MemoryUsage {
            rss_bytes: memory.anon_bytes,
            cache_bytes: memory.file_bytes,
            max_usage_bytes: memory.peak_bytes,
            kernel_usage_bytes: memory.kernel_bytes,
            kernel_max_usage_bytes: None,
            usage_bytes: memory.usage_bytes,
            swap_bytes: memory.swap_bytes,
        },
    };
    Some((usage, (cpu, now)))
}

/// Shares of one core since the last sample. The first has nothing to be compared with and says so, instead of 0.
fn cpu_usage(cpu: Cpu, before: Option<(Cpu, Duration)>, compute: Option<Compute>) -> CpuUsage {
    let mut usage = CpuUsage {
        throttled_periods: cpu.throttled_periods,
        throttled_nanos: cpu.throttled_usec.map(|usec| usec.saturating_mul(1_000)),
        ..CpuUsage::default()
    };
    let Some((was, elapsed)) = before.filter(|(_, elapsed)| !elapsed.is_zero()) else {
        return usage;
    };
    let percent = |now: u64, was: u64| {
        now.saturating_sub(was) as f64 / elapsed.as_micros().max(1) as f64 * 100.0
    };
    let total = percent(cpu.usage_usec, was.usage_usec);
    usage.percent = Some(total);
    usage.user_percent = Some(percent(cpu.user_usec, was.user_usec));
    usage.system_percent = Some(percent(cpu.system_usec, was.system_usec));
    let per_core_mhz = compute.and_then(|compute| compute.total_mhz.checked_div(compute.cores));
    usage.total_mhz = per_core_mhz.map(|mhz| total / 100.0 * mhz as f64);
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPUTE: Option<Compute> = Some(Compute {
        total_mhz: 4000,
        cores: 2,
    });

    fn at(usage_usec: u64) -> Cpu {
        Cpu {
            usage_usec,
            user_usec: usage_usec / 2,
            system_usec: usage_usec / 2,
            ..Cpu::default()
        }
    }

    #[test]
    fn half_a_core_for_a_second_is_fifty_percent_and_half_its_mhz() {
        let usage = cpu_usage(
            at(1_500_000),
            Some((at(1_000_000), Duration::from_secs(1))),
            COMPUTE,
        );
        assert_eq!(
            (usage.percent, usage.user_percent, usage.total_mhz),
            (Some(50.0), Some(25.0), Some(1000.0))
        );
    }

    #[test]
    fn the_first_sample_claims_nothing_about_the_cpu() {
        let usage = cpu_usage(at(9_000_000), None, COMPUTE);
        assert_eq!((usage.percent, usage.total_mhz), (None, None));
    }

    #[test]
    fn a_node_without_mhz_still_has_percents() {
        let usage = cpu_usage(
            at(2_000_000),
            Some((at(1_000_000), Duration::from_secs(1))),
            None,
        );
        assert_eq!((usage.percent, usage.total_mhz), (Some(100.0), None));
    }
}
