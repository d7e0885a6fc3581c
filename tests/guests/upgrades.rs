//! The packages change under running tasks, in both formats: an agent that found the plugin by the packaged link, tasks that it started,
//! and a package manager that puts another version in its place, or nothing. rpm is given to a Debian guest: what a host of Fedora or EL
//! has beside it, as SELinux and dnf, is not here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::{Agent, Allocation, Config};

use crate::case;
use crate::nomad::{Job, Scope, said, to_end, until};
use crate::packages::{DRIVER, Installed, LINK, NAME, NEXT, as_version, installed};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, tasks_outlive_other_versions_of_the_deb),
    case!(Speed, Ours, tasks_outlive_other_versions_of_the_rpm),
    case!(Speed, Ours, tasks_outlive_a_removal_of_the_deb),
    case!(Speed, Ours, tasks_outlive_a_purge_of_the_deb),
    case!(Speed, Ours, tasks_outlive_a_removal_of_the_rpm),
];

/// A package and how it comes and goes.
trait Package {
    /// The one under test.
    fn now(&self) -> Result<PathBuf>;
    /// A later version of it.
    fn next(&self) -> Result<PathBuf>;
    /// Installs, upgrades or downgrades.
    fn install(&self, package: &Path) -> Result<()>;
    fn installed(&self) -> Option<String>;
}

struct Deb<'a>(&'a Context);

impl Package for Deb<'_> {
    fn now(&self) -> Result<PathBuf> {
        self.0.package()
    }

    fn next(&self) -> Result<PathBuf> {
        as_version(&self.now()?, NEXT)
    }

    fn install(&self, package: &Path) -> Result<()> {
        let package = package.to_str().context("a path")?;
        said("dpkg", &["-i", package]).map(drop)
    }

    fn installed(&self) -> Option<String> {
        installed(NAME)
    }
}

struct Rpm<'a>(&'a Context);

impl Rpm<'_> {
    fn said(&self, words: &[&str]) -> Result<String> {
        said(self.0.rpm("rpm")?.to_str().context("a path")?, words)
    }
}

impl Package for Rpm<'_> {
    fn now(&self) -> Result<PathBuf> {
        self.0.rpm("now.rpm")
    }

    fn next(&self) -> Result<PathBuf> {
        self.0.rpm("next.rpm")
    }

    fn install(&self, package: &Path) -> Result<()> {
        let package = package.to_str().context("a path")?;
        // What it requires is dpkg's here, of which rpm knows nothing.
        let words = ["-U", "--oldpackage", "--replacepkgs", "--nodeps", package];
        self.said(&words).map(drop)
    }

    fn installed(&self) -> Option<String> {
        let format = "%{VERSION}-%{RELEASE}";
        self.said(&["-q", "--qf", format, NAME]).ok()
    }
}

/// A task that ends with 7 on SIGHUP.
struct Running {
    alloc: Allocation,
    scope: Scope,
    main: u32,
}

impl Running {
    async fn start(agent: &Agent) -> Result<Running> {
        let job = Job::shell("trap 'exit 7' HUP; echo up; while :; do sleep 0.05; done");
        let alloc = agent.run(&job.text()).await?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let main = scope.main()?;
        Ok(Running { alloc, scope, main })
    }

    fn expect_unchanged(&self) -> Result<()> {
        let main = self.scope.main()?;
        ensure!(main == self.main, "{main} is another than {}", self.main);
        ensure!(self.alloc.only_task()?.exit().is_none(), "told as ended");
        Ok(())
    }

    async fn expect_7(&self) -> Result<()> {
        let exit = self.alloc.only_task()?.wait().await?;
        ensure!((exit.code, exit.signal) == (7, 0), "{exit:?}");
        self.scope.expect_gone()
    }
}

/// The executable of the agent's plugin; one that was replaced or removed is ` (deleted)`.
async fn executable(agent: &Agent) -> Result<String> {
    let pid = agent.plugin_pid().await.context("a plugin")?;
    let executable = fs::read_link(format!("/proc/{pid}/exe"))?;
    Ok(executable.display().to_string())
}

fn tasks_outlive_other_versions(context: &Context, package: &dyn Package) -> Result<()> {
    let (now, next) = (package.now()?, package.next()?);
    let _installed = Installed::new()?;
    package.install(&now)?;
    let first = package.installed().context("a version")?;
    ensure!(first != NEXT);
    context.block_on(async {
        let agent = Agent::start(LINK, Config::default()).await?;
        for (file, version) in [(&next, NEXT), (&now, first.as_str())] {
            let before = Running::start(&agent).await?;
            package.install(file)?;
            ensure!(package.installed().as_deref() == Some(version));
            before.expect_unchanged()?;
            // The agent goes on with the plugin that it has, whose file is another by now.
            let old = executable(&agent).await?;
            ensure!(old == format!("{DRIVER} (deleted)"), "{old}");
            let between = Running::start(&agent).await?;
            let lost = agent.restart().await?;
            ensure!(lost.is_empty(), "{lost:?}");
            let new = executable(&agent).await?;
            ensure!(new == DRIVER, "{new}");
            for task in [&before, &between] {
                task.expect_unchanged()?;
                task.alloc.only_task()?.signal("SIGHUP").await?;
                task.expect_7().await?;
            }
        }
        agent.finish().await
    })
}

fn tasks_outlive_its_end(
    context: &Context,
    package: &dyn Package,
    remove: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let now = package.now()?;
    let _installed = Installed::new()?;
    package.install(&now)?;
    context.block_on(async {
        let agent = Agent::start(LINK, Config::default()).await?;
        let (stays, ends) = (Running::start(&agent).await?, Running::start(&agent).await?);
        remove()?;
        ensure!(package.installed().is_none());
        ensure!(!Path::new(DRIVER).exists() && fs::symlink_metadata(LINK).is_err());
        let old = executable(&agent).await?;
        ensure!(old == format!("{DRIVER} (deleted)"), "{old}");
        // Its helper is gone as a file as well.
        let another = to_end(&agent, &Job::shell("exit 3")).await?;
        ensure!(another.exit.code == 3, "{another:?}");

        let refused = agent.restart().await.err().context("it found a plugin")?;
        ensure!(format!("{refused:#}").contains(LINK), "{refused:#}");
        stays.expect_unchanged()?;
        ends.expect_unchanged()?;
        // Nobody waits for it now.
        said("kill", &["-HUP", &ends.main.to_string()])?;
        let empty = || (!ends.scope.dir.exists()).then_some(());
        until("the scope is empty", empty).await?;

        package.install(&now)?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        ends.expect_7().await?;
        stays.expect_unchanged()?;
        stays.alloc.only_task()?.signal("SIGHUP").await?;
        stays.expect_7().await?;
        agent.finish().await
    })
}

fn tasks_outlive_other_versions_of_the_deb(context: &Context) -> Result<()> {
    tasks_outlive_other_versions(context, &Deb(context))
}

fn tasks_outlive_other_versions_of_the_rpm(context: &Context) -> Result<()> {
    tasks_outlive_other_versions(context, &Rpm(context))
}

fn tasks_outlive_a_removal_of_the_deb(context: &Context) -> Result<()> {
    tasks_outlive_its_end(context, &Deb(context), || {
        said("dpkg", &["--remove", NAME]).map(drop)
    })
}

fn tasks_outlive_a_purge_of_the_deb(context: &Context) -> Result<()> {
    tasks_outlive_its_end(context, &Deb(context), || {
        said("dpkg", &["--purge", NAME]).map(drop)
    })
}

fn tasks_outlive_a_removal_of_the_rpm(context: &Context) -> Result<()> {
    let rpm = Rpm(context);
    tasks_outlive_its_end(context, &rpm, || rpm.said(&["-e", NAME]).map(drop))
}
