//! systemd over the bus, without the driver: the round trip that every start has to take, and a scope to watch a plugin in.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use zbus::{Connection, OwnedObjectPath, Variant, proxy};

const PATIENCE: Duration = Duration::from_secs(60);
/// The bus takes no more than 128 calls that are not answered yet of one connection.
const CALLS_AT_ONCE: usize = 64;

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    #[allow(clippy::type_complexity)]
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        aux: &[(&str, &[(&str, Variant<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;

    #[zbus(signal)]
    fn job_removed(
        &self,
        id: u32,
        job: OwnedObjectPath,
        unit: String,
        result: String,
    ) -> zbus::Result<()>;
}

/// One connection.
#[derive(Debug)]
pub struct Bus {
    manager: ManagerProxy<'static>,
}

impl Bus {
    pub async fn connect() -> Result<Bus> {
        let connection = Connection::system().await?;
        let manager = ManagerProxy::new(&connection).await?;
        Ok(Bus { manager })
    }

    /// Puts each process into a scope of its own with limits as a task's, all at once, and says how long systemd took until the
    /// last was done.
    pub async fn scopes(&self, processes: &[(String, u32)]) -> Result<Duration> {
        // A stream that nobody reads, while others start tasks, fills up, and then stops the whole connection.
        let mut removals = self.manager.receive_job_removed().await?;
        let begun = Instant::now();
        let mut calls = JoinSet::new();
        let turns = Arc::new(Semaphore::new(CALLS_AT_ONCE));
        for (unit, pid) in processes.iter().cloned() {
            let (manager, turns) = (self.manager.clone(), turns.clone());
            calls.spawn(async move {
                let _turn = turns.acquire().await?;
                start(manager, unit, pid).await
            });
        }
        // An end may be told before the call that it is of is answered.
        let (mut begun_jobs, mut ended_jobs) = (HashSet::new(), HashSet::new());
        let ended = timeout(PATIENCE, async {
            while !calls.is_empty() || !begun_jobs.is_empty() {
                tokio::select! {
                    Some(job) = calls.join_next() => {
                        let job = job??;
                        if !ended_jobs.remove(&job) {
                            begun_jobs.insert(job);
                        }
                    }
                    removed = removals.next() => {
                        let removed = removed.context("the bus hung up")?;
                        let removed = removed.args()?;
                        ensure!(removed.result == "done", "{}: {}", removed.unit, removed.result);
                        if !begun_jobs.remove(&removed.job) {
                            ended_jobs.insert(removed.job.clone());
                        }
                    }
                }
            }
            Ok(begun.elapsed())
        });
        let ended = ended.await;
        ended.with_context(|| format!("no end of the scopes' jobs within {PATIENCE:?}"))?
    }
}

async fn start(manager: ManagerProxy<'static>, unit: String, pid: u32) -> Result<OwnedObjectPath> {
    let properties = [
        ("Description", Variant::from("benchmark")),
        ("Delegate", Variant::from(true)),
        ("CollectMode", Variant::from("inactive-or-failed")),
        ("CPUAccounting", Variant::from(true)),
        ("CPUQuotaPerSecUSec", Variant::from(10_000_000_u64)),
        ("MemoryAccounting", Variant::from(true)),
        ("MemoryMax", Variant::from(u64::MAX)),
        ("TasksMax", Variant::from(u64::MAX)),
        ("PIDs", Variant::from(vec![pid])),
    ];
    let asked = manager.start_transient_unit(&unit, "fail", &properties, &[]);
    asked.await.with_context(|| unit.clone())
}
