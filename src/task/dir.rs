//! Finds M, the directory that a task sees as its own: parent of local, alloc, secrets and tmp. Its path comes from the
//! allocation directory, never from the job's environment alone: a job may set NOMAD_TASK_DIR to `/`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::plan::steps::TaskDir;
use crate::plan::unveil::Alias;

#[derive(Debug, Error)]
pub enum DirError {
    #[error(
        "{variable} = {value:?} is not the task's directory below {alloc_dir:?}; a job must not set NOMAD_TASK_DIR, NOMAD_ALLOC_DIR or NOMAD_SECRETS_DIR"
    )]
    Foreign {
        variable: &'static str,
        value: String,
        alloc_dir: PathBuf,
    },
    #[error(
        "the allocation's directories are not mounted: {variable} = {value:?} does not exist; after a reboot of the host Nomad does not mount them again, and `nomad alloc stop` makes it place a new allocation (a job must not set the variable itself)"
    )]
    Gone {
        variable: &'static str,
        value: String,
    },
    #[error(
        "the task's directories below {0:?} are missing: no directory holds its local, alloc and secrets"
    )]
    Missing(PathBuf),
}

/// The variables by which Nomad tells a task its directories, and their names below M.
const VARIABLES: [(&str, &str); 3] = [
    ("NOMAD_TASK_DIR", "local"),
    ("NOMAD_ALLOC_DIR", "alloc"),
    ("NOMAD_SECRETS_DIR", "secrets"),
];

/// M, and what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub task_dir: TaskDir,
    /// Nomad gives M to the task's user.
    pub owner: u32,
    /// The names by which a job, or Nomad, may call it and its `alloc`.
    pub aliases: Vec<Alias>,
}

/// Finds M.
pub fn find(
    alloc_dir: &Path,
    task: &str,
    env: &BTreeMap<String, String>,
) -> Result<Found, DirError> {
    for (variable, child) in VARIABLES {
        if let Some(value) = env.get(variable) {
            let is_real = same(Path::new(value), &backing(alloc_dir, task, child));
            if !is_real && value.starts_with('/') && !Path::new(value).exists() {
                return Err(DirError::Gone {
                    variable,
                    value: value.clone(),
                });
            }
            if !is_real {
                return Err(DirError::Foreign {
                    variable,
                    value: value.clone(),
                    alloc_dir: alloc_dir.to_owned(),
                });
            }
        }
    }
    let told = env
        .get("NOMAD_TASK_DIR")
        .and_then(|dir| Path::new(dir).parent())
        .map(Path::to_owned);
    let missing = || DirError::Missing(alloc_dir.join(task));
    let dir = told
        .into_iter()
        .chain([alloc_dir.join(task)])
        .find(|dir| {
            VARIABLES
                .iter()
                .all(|(_, child)| same(&dir.join(child), &backing(alloc_dir, task, child)))
        })
        .ok_or_else(missing)?;
    let real = |path: &Path| fs::canonicalize(path).map_err(|_| missing());
    let (path, real_alloc_dir) = (real(&dir)?, real(alloc_dir)?);
    let meta = fs::metadata(&path).map_err(|_| missing())?;
    let aliases = aliases([&dir, &path], [alloc_dir, &real_alloc_dir], task);
    Ok(Found {
        task_dir: TaskDir {
            path,
            alloc_dir: real_alloc_dir,
            device: meta.dev(),
            inode: meta.ino(),
        },
        owner: meta.uid(),
        aliases,
    })
}

/// M as it would be at `path`, of an allocation that is not there.
pub fn foreseen(
    alloc_dir: &Path,
    path: &Path,
    task: &str,
    env: &BTreeMap<String, String>,
) -> Result<Found, DirError> {
    for (variable, child) in VARIABLES {
        if let Some(value) = env.get(variable)
            && Path::new(value) != path.join(child)
        {
            return Err(DirError::Foreign {
                variable,
                value: value.clone(),
                alloc_dir: alloc_dir.to_owned(),
            });
        }
    }
    Ok(Found {
        task_dir: TaskDir {
            path: path.to_owned(),
            alloc_dir: alloc_dir.to_owned(),
            device: 0,
            inode: 0,
        },
        owner: 0,
        aliases: aliases([path, path], [alloc_dir, alloc_dir], task),
    })
}

fn aliases(own: [&Path; 2], alloc_dirs: [&Path; 2], task: &str) -> Vec<Alias> {
    let own = own.map(|dir| Alias::new(dir, ""));
    let backing = alloc_dirs.map(|dir| Alias::new(&dir.join(task), ""));
    let shared = alloc_dirs.map(|dir| Alias::new(&dir.join("alloc"), "alloc"));
    [own, backing, shared].concat()
}

/// Where a directory of M really lies: `alloc` is shared by the tasks of the allocation.
fn backing(alloc_dir: &Path, task: &str, child: &str) -> PathBuf {
    if child == "alloc" {
        alloc_dir.join(child)
    } else {
        alloc_dir.join(task).join(child)
    }
}

/// Whether both are one directory. The last component is not followed: a task could have planted a link.
fn same(one: &Path, other: &Path) -> bool {
    let stat = |path: &Path| {
        fs::symlink_metadata(path)
            .ok()
            .filter(fs::Metadata::is_dir)
            .map(|meta| (meta.dev(), meta.ino()))
    };
    stat(one).is_some_and(|id| Some(id) == stat(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Alloc(tempfile::TempDir);

    impl Alloc {
        /// An allocation directory in which `<alloc>/<task>/alloc` is a bind mount in Nomad; here the task's own directory
        /// cannot hold it, so M is a directory of its own whose children are the same inodes only where a test says so.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for child in ["alloc", "web/local", "web/secrets"] {
                fs::create_dir_all(dir.path().join(child)).unwrap();
            }
            Self(dir)
        }

        fn env(&self, change: Option<(&str, &str)>) -> BTreeMap<String, String> {
            let at = |child: &str| self.0.path().join(child).display().to_string();
            let mut env = BTreeMap::from([
                ("NOMAD_TASK_DIR".to_owned(), at("web/local")),
                ("NOMAD_ALLOC_DIR".to_owned(), at("alloc")),
                ("NOMAD_SECRETS_DIR".to_owned(), at("web/secrets")),
            ]);
            if let Some((name, value)) = change {
                env.insert(name.into(), value.into());
            }
            env
        }
    }

    #[test]
    fn a_job_that_moves_its_directories_is_named_the_variable() {
        let alloc = Alloc::new();
        for (variable, _) in VARIABLES {
            for value in ["/", "/etc", "", "relative"] {
                let error =
                    find(alloc.0.path(), "web", &alloc.env(Some((variable, value)))).unwrap_err();
                assert!(
                    matches!(error, DirError::Foreign { variable: named, .. } if named == variable),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn a_link_in_place_of_a_directory_is_not_followed() {
        let alloc = Alloc::new();
        fs::remove_dir(alloc.0.path().join("web/local")).unwrap();
        std::os::unix::fs::symlink("/", alloc.0.path().join("web/local")).unwrap();
        assert!(matches!(
            find(alloc.0.path(), "web", &alloc.env(None)),
            Err(DirError::Foreign { .. })
        ));
    }

    #[test]
    fn a_directory_without_all_three_is_missing() {
        let alloc = Alloc::new();
        assert!(matches!(
            find(alloc.0.path(), "web", &BTreeMap::new()),
            Err(DirError::Missing(_))
        ));
    }
}
