//! PID 1's side of a task: starts and stops its scope over D-Bus. One connection, made anew when it is lost; nothing here
//! knows of tasks, Nomad or the helper.

mod error;
mod proxy;
mod scope;
mod units;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, broadcast};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use zbus::OwnedObjectPath;

use crate::plan::limits::Cpus;
use crate::plan::unit::UnitName;
pub use error::SystemdError;
use error::{Answer, is_passing};
use proxy::ManagerProxy;
pub use scope::{Scope, Setting, settings};

/// How long one call, or one job, may take. PID 1 stalls for seconds in a daemon-reload with thousands of units.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a bus that could not be reached counts as such.
const AGAIN: Duration = Duration::from_millis(200);
/// Calls under way at once: dbus-daemon gives a connection about 128 pending replies, and PID 1 works one by one anyway.
const CALLS_AT_ONCE: usize = 16;

/// Outcome of a job of systemd's.
#[derive(Debug, Clone)]
struct JobRemoved {
    job: OwnedObjectPath,
    result: String,
}

/// The connection to systemd.
#[derive(Debug)]
pub struct Systemd {
    bus: tokio::sync::Mutex<Slot>,
    calls: Semaphore,
    /// Properties that this systemd does not know.
    unknown: Mutex<BTreeSet<&'static str>>,
    lost: Arc<Notify>,
}

/// The connection, or when and why there was none to be had.
#[derive(Debug, Default)]
struct Slot {
    bus: Option<Arc<Bus>>,
    failed: Option<(Instant, zbus::Error)>,
}

#[derive(Debug)]
struct Bus {
    manager: ManagerProxy<'static>,
    /// Every job that ends. Subscribed to before a call, so that no job can end unseen. The reader alone holds the sender, so
    /// that whoever waits learns of its end.
    jobs: broadcast::WeakSender<JobRemoved>,
    reader: tokio::task::AbortHandle,
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Default for Systemd {
    fn default() -> Self {
        Self::new()
    }
}

impl Systemd {
    /// Connects at the first call.
    pub fn new() -> Self {
        Self {
            bus: tokio::sync::Mutex::default(),
            calls: Semaphore::new(CALLS_AT_ONCE),
            unknown: Mutex::default(),
            lost: Arc::default(),
        }
    }

    /// systemd's version, `257.13-1~deb13u1`. Asks each time: it is also how a lost bus is noticed.
    pub async fn version(&self) -> Result<String, SystemdError> {
        let bus = self.bus().await?;
        let manager = bus.manager.inner();
        // Not the cached property: a cache answers without asking.
        let property = (manager.interface(), "Version");
        let asked = manager.connection().call_method(
            Some(manager.destination()),
            manager.path(),
            Some("org.freedesktop.DBus.Properties"),
            "Get",
            &property,
        );
        let reply = self.call(&bus, "Get(Version)", "systemd", asked).await?;
        let version: Result<zbus::OwnedVariant, _> = reply.body().deserialize();
        version
            .ok()
            .and_then(|version| String::try_from(version).ok())
            .ok_or_else(|| SystemdError::NoBus(zbus::Error::InvalidReply))
    }

    /// Starts a scope around a process; on return the process is inside, with every limit in force.
    pub async fn start(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let unit = scope.name;
        let mut jobs = bus.jobs()?;
        let job = loop {
            let unknown = self.unknown().clone();
            let properties = scope.properties(&unknown);
            let started = bus
                .manager
                .start_transient_unit(unit.as_str(), "fail", &properties, &[]);
            match self
                .call(&bus, "StartTransientUnit", unit.as_str(), started)
                .await
            {
                Ok(job) => break job,
                Err(SystemdError::Refused { reason, .. })
                    if reason.contains("already exists") || reason.contains("already loaded") =>
                {
                    return Err(SystemdError::Exists(unit.clone()));
                }
                // It looks for what it could not write.
                Err(SystemdError::Refused { reason, .. }) if reason.contains("not found") => {
                    return Err(SystemdError::NoFile(unit.clone()));
                }
                Err(SystemdError::Refused { call, unit, reason }) => {
                    match scope::optional_in(&reason, &unknown) {
                        Some(property) => {
                            self.unknown().insert(property);
                        }
                        None => return Err(SystemdError::Refused { call, unit, reason }),
                    }
                }
                Err(error) => return Err(error),
            }
        };
        match ended(&mut jobs, &job, "StartTransientUnit", unit).await? {
            result if result == "done" => Ok(()),
            result => Err(SystemdError::JobFailed {
                unit: unit.clone(),
                result,
            }),
        }
    }

    /// Changes the CPUs of a scope that runs; one that is not there needs none. What systemd writes for it goes with the scope.
    pub async fn allow_cpus(&self, unit: &UnitName, cpus: &Cpus) -> Result<(), SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let properties = [scope::allowed_cpus(cpus)];
        let set = bus
            .manager
            .set_unit_properties(unit.as_str(), true, &properties);
        match self
            .call(&bus, "SetUnitProperties", unit.as_str(), set)
            .await
        {
            Err(SystemdError::Refused { reason, .. }) if reason.contains("not found") => Ok(()),
            answer => answer,
        }
    }

    /// Stops a scope and waits until systemd is done with it; one that is not there is stopped.
    pub async fn stop(&self, unit: &UnitName) -> Result<(), SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let mut jobs = bus.jobs()?;
        let stopped = bus.manager.stop_unit(unit.as_str(), "replace");
        match self.call(&bus, "StopUnit", unit.as_str(), stopped).await {
            Ok(job) => ended(&mut jobs, &job, "StopUnit", unit).await.map(drop),
            Err(SystemdError::Refused { reason, .. }) if reason.contains("not loaded") => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets a frozen scope run again.
    pub async fn thaw(&self, unit: &UnitName) -> Result<(), SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let thawed = bus.manager.thaw_unit(unit.as_str());
        self.call(&bus, "ThawUnit", unit.as_str(), thawed).await
    }

    /// Lets a failed unit go, so that its name is free; one that is not there is not failed.
    pub async fn reset_failed(&self, unit: &UnitName) -> Result<(), SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let reset = bus.manager.reset_failed_unit(unit.as_str());
        match self
            .call(&bus, "ResetFailedUnit", unit.as_str(), reset)
            .await
        {
            Err(SystemdError::Refused { reason, .. }) if reason.contains("not loaded") => Ok(()),
            answer => answer,
        }
    }

    /// Whether systemd knows the unit.
    pub async fn knows(&self, unit: &UnitName) -> Result<bool, SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        match self
            .call(
                &bus,
                "GetUnit",
                unit.as_str(),
                bus.manager.get_unit(unit.as_str()),
            )
            .await
        {
            Ok(_) => Ok(true),
            Err(SystemdError::Refused { reason, .. }) if reason.contains("not loaded") => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Until the connection is lost, if there is one.
    pub async fn lost(&self) {
        self.lost.notified().await;
    }

    async fn bus(&self) -> Result<Arc<Bus>, SystemdError> {
        let mut slot = self.bus.lock().await;
        if let Some(bus) = slot.bus.as_ref().filter(|bus| !bus.reader.is_finished()) {
            return Ok(bus.clone());
        }
        // Whoever waited for the turn while another one found the bus hanging does not wait as long once more.
        if let Some((when, error)) = &slot.failed
            && when.elapsed() < AGAIN
        {
            return Err(SystemdError::NoBus(error.clone()));
        }
        let connected = timeout(PATIENCE, Bus::connect(self.lost.clone())).await;
        match connected.unwrap_or(Err(zbus::Error::InvalidReply)) {
            Ok(bus) => Ok(slot.bus.insert(Arc::new(bus)).clone()),
            Err(error) => {
                slot.failed = Some((Instant::now(), error.clone()));
                Err(SystemdError::NoBus(error))
            }
        }
    }

    /// Makes a call with a time limit. A connection that failed under it is not used again.
    async fn call<T>(
        &self,
        bus: &Arc<Bus>,
        call: &'static str,
        unit: &str,
        asked: impl Future<Output = zbus::Result<T>>,
    ) -> Result<T, SystemdError> {
        let error = match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        if let Some(Answer { name, reason }) = error.as_ref().and_then(Answer::of) {
            let unit = unit.to_owned();
            return Err(if is_passing(&name) {
                SystemdError::Busy { call, unit, reason }
            } else {
                SystemdError::Refused { call, unit, reason }
            });
        }
        self.forget(bus).await;
        Err(match error {
            Some(error) => SystemdError::NoBus(error),
            None => SystemdError::TimedOut {
                call,
                unit: unit.to_owned(),
            },
        })
    }

    async fn forget(&self, bus: &Arc<Bus>) {
        let mut slot = self.bus.lock().await;
        let current = slot.bus.as_ref();
        if current.is_some_and(|current| Arc::ptr_eq(current, bus)) {
            slot.bus = None;
        }
    }

    fn unknown(&self) -> std::sync::MutexGuard<'_, BTreeSet<&'static str>> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus {
    async fn connect(lost: Arc<Notify>) -> zbus::Result<Self> {
        let connection = zbus::connection::Builder::system()
            .method_timeout(PATIENCE)
            .build()
            .await?;
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await?;
        let mut removed = manager.receive_job_removed().await?;
        let (sender, _) = broadcast::channel(1024);
        let jobs = sender.downgrade();
        let reader = tokio::spawn(async move {
            while let Some(signal) = removed.next().await {
                if let Ok(args) = signal.args() {
                    let _ = sender.send(JobRemoved {
                        job: args.job,
                        result: args.result,
                    });
                }
            }
            lost.notify_one();
        });
        Ok(Self {
            manager,
            jobs,
            reader: reader.abort_handle(),
        })
    }

    fn jobs(&self) -> Result<broadcast::Receiver<JobRemoved>, SystemdError> {
        let sender = self.jobs.upgrade();
        sender.map(|sender| sender.subscribe()).ok_or_else(gone)
    }
}

fn gone() -> SystemdError {
    SystemdError::NoBus(zbus::Error::InputOutput(Arc::new(
        std::io::ErrorKind::ConnectionReset.into(),
    )))
}

/// The result of a job. An error if its end was not seen: the caller looks whether it did what it was for.
async fn ended(
    jobs: &mut broadcast::Receiver<JobRemoved>,
    job: &OwnedObjectPath,
    call: &'static str,
    unit: &UnitName,
) -> Result<String, SystemdError> {
    let missed = || SystemdError::TimedOut {
        call,
        unit: unit.to_string(),
    };
    let wait = async {
        loop {
            match jobs.recv().await {
                Ok(removed) if removed.job == *job => return Ok(removed.result),
                Ok(_) => {}
                // This one may be among those that were dropped.
                Err(broadcast::error::RecvError::Lagged(_)) => return Err(missed()),
                Err(broadcast::error::RecvError::Closed) => return Err(gone()),
            }
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| Err(missed()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use zbus::fdo;

    #[test]
    fn an_answer_of_systemds_is_told_from_an_error_of_the_bus() {
        let of = |error: fdo::Error| {
            Answer::of(&zbus::Error::FDO(Box::new(error))).map(|answer| answer.reason)
        };
        let unknown = "Cannot set property PIDFDs, or unknown property.";
        assert_eq!(
            of(fdo::Error::PropertyReadOnly(unknown.into())).as_deref(),
            Some(unknown)
        );
        assert_eq!(of(fdo::Error::NoReply("late".into())), None);
        assert_eq!(of(fdo::Error::ServiceUnknown("none".into())), None);
        assert_eq!(of(fdo::Error::ZBus(zbus::Error::InvalidReply)), None);
        assert_eq!(Answer::of(&zbus::Error::InvalidReply), None);
    }

    #[test]
    fn a_full_bus_is_a_passing_trouble_and_a_refusal_is_not() {
        let full = zbus::Error::FDO(Box::new(fdo::Error::LimitsExceeded("full".into())));
        let denied = zbus::Error::FDO(Box::new(fdo::Error::AccessDenied("no".into())));
        let is_passing = |error| is_passing(&Answer::of(error).unwrap().name);
        assert!(is_passing(&full));
        assert!(!is_passing(&denied));
    }
}
