//! systemd over the bus, without the driver: the round trip that every start has to take, and a scope to watch a plugin in.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use zbus::{Connection, OwnedObjectPath, Variant, proxy};

const PATIENCE: Duration = Duration::from_secs(60);

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

    /// Puts a process into a scope of its own with limits as a task's, and says how long systemd took until it was done.
    pub async fn scope(&self, unit: &str, pid: u32) -> Result<Duration> {
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
        // A stream that nobody reads, while others start tasks, fills up, and then stops the whole connection.
        let mut jobs = self.manager.receive_job_removed().await?;
        let begun = Instant::now();
        let asked = self
            .manager
            .start_transient_unit(unit, "fail", &properties, &[]);
        let job = asked.await.with_context(|| unit.to_owned())?;
        timeout(PATIENCE, async {
            while let Some(removed) = jobs.next().await {
                let removed = removed.args()?;
                if removed.job == job {
                    ensure!(removed.result == "done", "{unit}: {}", removed.result);
                    return Ok(begun.elapsed());
                }
            }
            anyhow::bail!("the bus hung up")
        })
        .await
        .with_context(|| format!("{unit}: no end of its job within {PATIENCE:?}"))?
    }
}
