//! Which of a job's tasks is run. Pure.

use super::{Group, Job, JobError, Task};

/// One task of a job, and the others, which stay away.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected<'a> {
    pub group: &'a Group,
    pub task: &'a Task,
    pub left_out: Vec<&'a Task>,
}

/// Finds `TASK` or `GROUP/TASK`; without a name, the only main task of the file.
pub fn select<'a>(job: &'a Job, wanted: Option<&str>) -> Result<Selected<'a>, JobError> {
    let all = || {
        let tasks = |group: &'a Group| group.tasks.iter().map(move |task| (group, task));
        job.groups.iter().flat_map(tasks)
    };
    let is_wanted = |(group, task): &(&Group, &Task)| match wanted {
        Some(name) => task.name == name || format!("{}/{}", group.name, task.name) == name,
        None => task.lifecycle.is_none(),
    };
    let mut found: Vec<_> = all().filter(is_wanted).collect();
    if wanted.is_none() && found.is_empty() {
        found = all().collect();
    }
    let (group, task) = match found.as_slice() {
        [one] => *one,
        several => {
            let named = |(group, task): (&Group, &Task)| format!("{}/{}", group.name, task.name);
            let problem = match (wanted, several) {
                (Some(name), []) => format!("job {} has no task `{name}`", job.id),
                (Some(name), _) => format!("job {} has more than one task `{name}`", job.id),
                (None, _) => format!("job {} has more than one task", job.id),
            };
            let names = all().map(named).collect::<Vec<_>>().join(", ");
            let line = several.get(1).map_or(1, |(_, task)| task.line);
            return Err(JobError::new(
                line,
                format!("{problem}; name one with --task: {names}"),
            ));
        }
    };
    let others = group.tasks.iter().filter(|other| other.name != task.name);
    Ok(Selected {
        group,
        task,
        left_out: match wanted {
            Some(_) => Vec::new(),
            None => others.collect(),
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::job::parse;

    const JOB: &str = r#"
job "shop" {
  group "front" {
    task "web" { driver = "exec2" }
    task "init" {
      driver = "exec2"
      lifecycle { hook = "prestart" }
    }
  }
  group "back" {
    task "web" { driver = "exec2" }
  }
}"#;

    #[test]
    fn a_task_is_named_by_itself_or_with_its_group() {
        let text = JOB.replace(" { driver = \"exec2\" }", " {\n driver = \"exec2\"\n }");
        let job = parse(
            &text.replace("{ hook = \"prestart\" }", "{\nhook = \"prestart\"\n}"),
            &[],
        );
        let job = job.unwrap();
        let named = |wanted: &str| select(&job, Some(wanted)).map(|found| found.group.name.clone());
        assert_eq!(named("init").unwrap(), "front");
        assert_eq!(named("back/web").unwrap(), "back");
        let error = named("web").unwrap_err().message;
        assert_eq!(
            error,
            "job shop has more than one task `web`; name one with --task: front/web, front/init, back/web"
        );
        let error = named("wbe").unwrap_err().message;
        assert!(error.starts_with("job shop has no task `wbe`"), "{error}");
        let error = select(&job, None).unwrap_err().message;
        assert!(
            error.starts_with("job shop has more than one task; name one"),
            "{error}"
        );
        let one = Job {
            groups: vec![job.groups[0].clone()],
            ..job
        };
        let found = select(&one, None).unwrap();
        assert_eq!((found.task.name.as_str(), found.left_out.len()), ("web", 1));
    }
}
