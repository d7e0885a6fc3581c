//! What the driver builds on: a transient scope around a parked process, asked of systemd over the system bus.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use harness::guest::{Case, Context};
use tokio_stream::StreamExt;
use zbus::{OwnedObjectPath, Variant};

use crate::case;

pub const CASES: &[Case] = &[
    case!(
        Both,
        Ours,
        a_scope_takes_the_parked_process_and_goes_when_stopped
    ),
    case!(Both, Ours, a_scope_starts_in_reasonable_time),
    case!(
        Limits,
        Ours,
        the_kernel_has_the_limits_the_scope_was_asked_for
    ),
];

const ROUNDS: usize = 30;
const JOB_PATIENCE: Duration = Duration::from_secs(60);

type Properties<'a> = [(&'a str, Variant<'a>)];

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &Properties<'_>,
        aux: &[(&str, &Properties<'_>)],
    ) -> zbus::Result<OwnedObjectPath>;

    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    #[zbus(signal)]
    fn job_removed(
        &self,
        id: u32,
        job: OwnedObjectPath,
        unit: String,
        result: String,
    ) -> zbus::Result<()>;
}

/// A connection whose match on JobRemoved is in place before any job is made: one that ends at once would be missed.
struct Systemd {
    manager: ManagerProxy<'static>,
    jobs: JobRemovedStream,
}

/// When systemd answered, and when the job was done.
struct Started {
    answered: Duration,
    done: Duration,
}

impl Systemd {
    async fn connect() -> Result<Systemd> {
        let bus = zbus::Connection::system().await?;
        let manager = ManagerProxy::new(&bus).await?;
        let jobs = manager.receive_job_removed().await?;
        Ok(Systemd { manager, jobs })
    }

    async fn start(
        &mut self,
        unit: &str,
        parked: &Parked,
        limits: &Properties<'_>,
    ) -> Result<Started> {
        let mut properties = vec![
            ("PIDs", Variant::from(vec![parked.pid()])),
            ("Slice", Variant::from("exec2.slice")),
            ("Description", Variant::from("a scope of the test ground")),
            ("CollectMode", Variant::from("inactive-or-failed")),
        ];
        for (name, value) in limits {
            properties.push((name, value.try_clone()?));
        }
        let begun = Instant::now();
        let job = self
            .manager
            .start_transient_unit(unit, "fail", &properties, &[])
            .await?;
        let answered = begun.elapsed();
        self.await_done(&job)
            .await
            .with_context(|| format!("starting {unit}"))?;
        Ok(Started {
            answered,
            done: begun.elapsed(),
        })
    }

    async fn stop(&mut self, unit: &str) -> Result<()> {
        let job = self.manager.stop_unit(unit, "fail").await?;
        self.await_done(&job)
            .await
            .with_context(|| format!("stopping {unit}"))
    }

    async fn await_done(&mut self, job: &OwnedObjectPath) -> Result<()> {
        let search = async {
            while let Some(signal) = self.jobs.next().await {
                let removed = signal.args()?;
                if removed.job() == job {
                    ensure!(
                        removed.result() == "done",
                        "the job's result is {}",
                        removed.result()
                    );
                    return Ok(());
                }
            }
            bail!("the bus went away")
        };
        tokio::time::timeout(JOB_PATIENCE, search)
            .await
            .context("no JobRemoved came")?
    }
}

/// A process that waits to be put somewhere.
struct Parked(Child);

impl Parked {
    fn new() -> Result<Parked> {
        Ok(Parked(
            Command::new("sleep")
                .arg("600")
                .stdin(Stdio::null())
                .spawn()?,
        ))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn cgroup(&self) -> Result<String> {
        let lines = fs::read_to_string(format!("/proc/{}/cgroup", self.pid()))?;
        Ok(lines
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .context("no cgroup version 2")?
            .to_owned())
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_scope_takes_the_parked_process_and_goes_when_stopped(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut systemd = Systemd::connect().await?;
        let mut parked = Parked::new()?;
        let unit = "exec2-ground-parked.scope";
        systemd.start(unit, &parked, &[]).await?;

        let cgroup = parked.cgroup()?;
        ensure!(
            cgroup == format!("/exec2.slice/{unit}"),
            "the process is in {cgroup}"
        );
        let shown = show(unit, &["ActiveState", "ControlGroup", "Slice"])?;
        ensure!(
            shown["ActiveState"] == "active" && shown["Slice"] == "exec2.slice",
            "{shown:?}"
        );
        ensure!(shown["ControlGroup"] == cgroup, "{shown:?}");

        systemd.stop(unit).await?;
        ensure!(
            parked.0.try_wait()?.is_some(),
            "the process outlives its scope"
        );
        ensure!(
            !Path::new("/sys/fs/cgroup").join(&cgroup[1..]).exists(),
            "{cgroup} is still there"
        );
        let shown = show(unit, &["LoadState"])?;
        ensure!(
            shown["LoadState"] == "not-found",
            "the unit is still loaded: {shown:?}"
        );
        Ok(())
    })
}

fn a_scope_starts_in_reasonable_time(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut systemd = Systemd::connect().await?;
        let (mut answered, mut done) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let parked = Parked::new()?;
            let unit = format!("exec2-ground-timed-{round}.scope");
            let started = systemd.start(&unit, &parked, &[]).await?;
            answered.push(started.answered);
            done.push(started.done);
            systemd.stop(&unit).await?;
        }
        context.note(format!(
            "StartTransientUnit answers: {}",
            summary(&mut answered)
        ));
        context.note(format!(
            "JobRemoved comes:           {}",
            summary(&mut done)
        ));
        // An order of magnitude above what a busy host was seen to take: it catches a wait for a timeout, not a slow day.
        ensure!(
            done[ROUNDS / 2] < Duration::from_secs(2),
            "a scope takes {:?} to start",
            done[ROUNDS / 2]
        );
        Ok(())
    })
}

fn the_kernel_has_the_limits_the_scope_was_asked_for(context: &Context) -> Result<()> {
    context.block_on(async {
        let mut systemd = Systemd::connect().await?;
        let parked = Parked::new()?;
        let unit = "exec2-ground-limited.scope";
        let memory_bytes: u64 = 64 << 20;
        let limits = [
            ("MemoryMax", Variant::from(memory_bytes)),
            // A quarter of one CPU.
            ("CPUQuotaPerSecUSec", Variant::from(250_000u64)),
        ];
        systemd.start(unit, &parked, &limits).await?;

        let cgroup = Path::new("/sys/fs/cgroup").join(&parked.cgroup()?[1..]);
        let memory_max = fs::read_to_string(cgroup.join("memory.max"))?;
        ensure!(
            memory_max.trim() == memory_bytes.to_string(),
            "memory.max is {memory_max}"
        );
        let cpu_max = fs::read_to_string(cgroup.join("cpu.max"))?;
        ensure!(cpu_max.trim() == "25000 100000", "cpu.max is {cpu_max}");
        let shown = show(unit, &["MemoryMax", "CPUQuotaPerSecUSec"])?;
        ensure!(
            shown["MemoryMax"] == memory_bytes.to_string()
                && shown["CPUQuotaPerSecUSec"] == "250ms",
            "{shown:?}"
        );
        systemd.stop(unit).await
    })
}

pub fn show(unit: &str, properties: &[&str]) -> Result<HashMap<String, String>> {
    let output = Command::new("systemctl")
        .args(["show", unit, "--property", &properties.join(",")])
        .output()?;
    ensure!(output.status.success(), "systemctl show {unit}: {output:?}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// Sorts.
fn summary(times: &mut [Duration]) -> String {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let p95 = times[times.len() * 95 / 100];
    format!(
        "min {:.2} ms, median {:.2} ms, p95 {:.2} ms",
        ms(times[0]),
        ms(times[times.len() / 2]),
        ms(p95)
    )
}
