//! Writes a task's templates, whose text is used as it stands.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use super::environment::{Placed, variables};
use super::{JobError, RunTime, Target, Template};

/// Writes every template of a task and returns what they add to its environment.
pub fn write(placed: &Placed<'_>) -> Result<BTreeMap<String, String>, JobError> {
    each(placed, write_one)
}

/// What the templates of a task add to its environment; nothing is written.
pub fn environment(placed: &Placed<'_>) -> Result<BTreeMap<String, String>, JobError> {
    each(placed, |root, destination, template| {
        let inside = below(root, destination).map(drop);
        inside.map_err(|error| failed(destination, template, &error))
    })
}

fn each(
    placed: &Placed<'_>,
    act: impl Fn(&Path, &Path, &Template) -> Result<(), JobError>,
) -> Result<BTreeMap<String, String>, JobError> {
    let known = RunTime::new(
        variables(placed)
            .into_iter()
            .chain(placed.node.facts.clone())
            .collect(),
    );
    let mut env = BTreeMap::new();
    for template in &placed.task.templates {
        let destination = PathBuf::from(known.string(&template.destination, template.line)?);
        act(&placed.paths.root, &destination, template)?;
        if template.target == Target::Environment {
            env.extend(assignments(&template.data));
        }
    }
    Ok(env)
}

/// Writes the payload of a dispatch below the task's `local`.
pub fn write_payload(placed: &Placed<'_>, payload: &[u8]) -> Result<(), JobError> {
    let Some(file) = &placed.task.payload_file else {
        return Ok(());
    };
    let name = super::hcl::as_string(file.value.clone()).unwrap_or_default();
    let written = below(&placed.paths.local, Path::new(&name)).and_then(|path| {
        create_parent(&path)?;
        fs::write(&path, payload)
    });
    written.map_err(|error| {
        JobError::new(
            file.line,
            format!("dispatch_payload file `{name}`: {error}"),
        )
    })
}

fn write_one(root: &Path, destination: &Path, template: &Template) -> Result<(), JobError> {
    let written = below(root, destination).and_then(|path| {
        create_parent(&path)?;
        fs::write(&path, &template.data)?;
        chown(&path, template.uid, template.gid)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(template.mode))
    });
    written.map_err(|error| failed(destination, template, &error))
}

fn failed(destination: &Path, template: &Template, error: &io::Error) -> JobError {
    let message = format!("template destination `{}`: {error}", destination.display());
    JobError::new(template.line, message)
}

/// The directory is fresh and no task has run in it yet, so it holds no symbolic link that could lead out.
fn below(root: &Path, name: &Path) -> io::Result<PathBuf> {
    let path = root.join(name);
    let inside = path.strip_prefix(root).is_ok_and(|below| {
        below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    });
    if !inside || path == root {
        let sentence = "it is outside the task's directory; name a file such as local/app.conf";
        return Err(io::Error::new(ErrorKind::InvalidInput, sentence));
    }
    Ok(path)
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// `KEY=value` lines, with an optional `export` and quotes.
fn assignments(text: &str) -> impl Iterator<Item = (String, String)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (name, value) = line.split_once('=').filter(|_| !line.starts_with('#'))?;
        let value = value.trim();
        let unquoted = value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'))
            .or_else(|| {
                value
                    .strip_prefix('\'')
                    .and_then(|value| value.strip_suffix('\''))
            });
        Some((name.trim().to_owned(), unquoted.unwrap_or(value).to_owned()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn template(destination: &str) -> Template {
        Template {
            data: "x".into(),
            destination: destination.into(),
            mode: 0o640,
            uid: None,
            gid: None,
            target: Target::File,
            line: 3,
        }
    }

    #[test]
    fn a_template_is_written_below_the_task_s_directory_only() {
        let root = tempfile::tempdir().unwrap();
        let write = |destination: &str| {
            write_one(root.path(), Path::new(destination), &template(destination))
        };
        write("local/deep/app.conf").unwrap();
        let written = root.path().join("local/deep/app.conf");
        assert_eq!(fs::read_to_string(&written).unwrap(), "x");
        assert_eq!(
            fs::metadata(&written).unwrap().permissions().mode() & 0o777,
            0o640
        );
        write(root.path().join("local/absolute").to_str().unwrap()).unwrap();
        for outside in [
            "../x",
            "local/../../x",
            "/etc/exec2-template",
            "",
            "local/../x",
        ] {
            assert!(
                write(outside).unwrap_err().to_string().contains("outside"),
                "{outside}"
            );
        }
    }

    #[test]
    fn an_environment_template_is_read_line_by_line() {
        let text = "# comment\nA=1\nexport B=\"two words\"\n\nnothing\nC='x=y'\n";
        let read: Vec<_> = assignments(text).collect();
        let want = [("A", "1"), ("B", "two words"), ("C", "x=y")];
        assert_eq!(
            read,
            want.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }
}
