//! Step 1 of a start: the facts of the host are found out, and everything that will happen is decided.

use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use super::dir::{self, Found};
use super::table::{Claim, TaskTable, lock};
use super::thread::in_thread;
use super::types::{DriverError, TaskRequest};
use crate::host;
use crate::plan::files::Resolver;
use crate::plan::{Facts, Plan};
use crate::sys;
use crate::users::{self, Account, UserError};

/// How long a user or a directory may take to be looked up.
const LOOK_UP_PATIENCE: Duration = Duration::from_secs(15);

impl TaskTable {
    /// Finds out the facts and plans.
    pub(super) async fn plan(&self, request: &TaskRequest) -> Result<Plan, DriverError> {
        let asked = request.clone();
        let (account, found) = timeout(LOOK_UP_PATIENCE, in_thread(move || look_up(&asked)))
            .await
            .map_err(|_| {
                DriverError::Transient(format!(
                    "user {:?} or the task's directory could not be looked up within {} s",
                    request.user,
                    LOOK_UP_PATIENCE.as_secs()
                ))
            })?
            .map_err(|error| DriverError::Transient(error.to_string()))??;
        self.expect_unshared(request, &account)?;
        self.decide(request, account, found, host::agent_unit("self"))
    }

    /// A dynamic user is nobody else's, so that its files and processes are not either. Nomad checks no `nomad-<uid>` that a job
    /// names, and an agent that was restarted may pick one that a task still has (`Pool.Restore` of helper/users/dynamic is called by
    /// nobody in 2.0). Not transient: this allocation would be given the same again.
    fn expect_unshared(&self, request: &TaskRequest, account: &Account) -> Result<(), DriverError> {
        if !account.is_dynamic {
            return Ok(());
        }
        let claim = Claim {
            uid: account.uid,
            alloc_id: request.names.alloc_id.clone(),
        };
        self.claim(&request.id, claim).map_err(|other| {
            DriverError::Permanent(format!(
                "user {:?} is allocation {other}'s, a task of which runs as it; leave the user out of the job, or if Nomad chose it, stop this allocation: the next one gets another",
                account.name
            ))
        })
    }

    /// The plan of a start on this host, of an allocation that is not there: its task's directory would be at `dir`, and the
    /// agent in `agent_unit`.
    pub fn foresee(
        &self,
        request: &TaskRequest,
        account: Account,
        dir: &Path,
        agent_unit: Option<String>,
    ) -> Result<Plan, DriverError> {
        let found = dir::foreseen(&request.alloc_dir, dir, &request.names.task, &request.env)
            .map_err(|error| DriverError::Permanent(error.to_string()))?;
        self.decide(request, account, found, agent_unit)
    }

    fn decide(
        &self,
        request: &TaskRequest,
        account: Account,
        found: Found,
        agent_unit: Option<String>,
    ) -> Result<Plan, DriverError> {
        let settings = self.settings();
        let resolver = if request.network_namespace.is_some() || request.dns.is_some() {
            host::resolver()
        } else {
            Resolver::default()
        };
        let facts = Facts {
            resolver,
            account,
            task_dir: found.task_dir,
            aliases: found.aliases,
            compute: settings.compute,
            grain: *lock(&self.shared.grain),
            share_cpus: self.share_cpus(),
            agent_unit,
            open_files: self.shared.open_files,
            landlock_abi: sys::landlock_abi(),
        };
        Plan::new(&settings.config, request, &facts)
            .map_err(|error| DriverError::Permanent(error.to_string()))
    }
}

/// Facts that need the host's files: the user and the task's directory.
fn look_up(request: &TaskRequest) -> Result<(Account, Found), DriverError> {
    let found = dir::find(&request.alloc_dir, &request.names.task, &request.env)
        .map_err(|error| DriverError::Permanent(error.to_string()))?;
    let account = match users::look_up(&request.user) {
        // After an agent restart Nomad forgets the dynamic user it picked, but the directory still belongs to it.
        Err(UserError::Unset) => {
            users::look_up(&users::dynamic(found.owner).name).map_err(|_| UserError::Unset)
        }
        account => account,
    };
    let account = account.map_err(|error| match error {
        // A directory service that restarts.
        UserError::Lookup(..) => DriverError::Transient(error.to_string()),
        _ => DriverError::Permanent(error.to_string()),
    })?;
    Ok((account, found))
}
