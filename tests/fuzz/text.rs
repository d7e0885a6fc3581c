//! What people write: job files and the agent's own configuration.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nomad_driver_exec2::agent::{AgentConfig, hcl1};
use nomad_driver_exec2::job::{self, Job, JobError, RunTime, open_name, options, select};

use crate::mutate::Target;

fn assert_error(error: &JobError, text: &str) {
    let lines = text.split('\n').count() + 1;
    assert!(
        (1..=lines).contains(&error.line),
        "{error} of {lines} lines"
    );
    assert!(!error.message.is_empty());
}

#[test]
fn job_file() {
    Target {
        name: "job_file",
        samples: &[
            "tests/nomad",
            "tests/nomad/recorded/nomad-2.0.6-dev/env.nomad.hcl",
        ],
        tokens: b"${ %{ } { \" <<-EOT\n EOT\n variable\t\"x\"\t{\n\tdefault\t=\t1\n}\n ${var.x} locals\t{\n \
            group\t\"g\"\t{\n task\t\"t\"\t{\n config\t{\n template\t{\n =\t[ -1 9223372036854775807 1e309 \"10m\" \
            null for\ta\tin\tb\t:\ta a. ?\t1\t: format(\"%s\",\t1) volume_mount\t{\n ${NOMAD_TASK_DIR} /* # ! ( \\u \
            parameterized\t{\n logs\t{\n",
        run: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            match job::parse(&text, &[]) {
                Ok(job) => assert_job(&job, &text),
                Err(error) => assert_error(&error, &text),
            }
            if let Err(error) = job::parse(&text, &[("x".into(), text.chars().take(200).collect())])
            {
                assert_error(&error, &text);
            }
        },
    }
    .fuzz();
}

fn assert_job(job: &Job, text: &str) {
    assert!(!job.groups.is_empty());
    for unsupported in &job.unsupported {
        assert!(!unsupported.message.is_empty());
    }
    let names = job
        .groups
        .iter()
        .flat_map(|group| &group.tasks)
        .map(|task| Some(task.name.as_str()));
    for name in names.chain([None]) {
        let selected = match select::select(job, name) {
            Ok(selected) => selected,
            Err(error) => {
                assert_error(&error, text);
                continue;
            }
        };
        let task = selected.task;
        // It names a directory and a fifo.
        assert!(
            !task.name.is_empty() && !task.name.contains(['/', '\0']) && task.name != "..",
            "{:?}",
            task.name
        );
        let known = ["NOMAD_TASK_DIR", "NOMAD_META_a", "HOME"];
        let known: BTreeMap<_, _> = known
            .map(|name| (name.to_owned(), "${/x}".to_owned()))
            .into();
        let run_time = RunTime::new(known);
        for (_, setting) in task.config.iter().chain(&task.env) {
            if let Err(error) = run_time.config(&setting.value, setting.line) {
                assert_error(&error, text);
            }
            if let Some(value) = setting.value.as_str() {
                open_name(&run_time.env(value));
            }
        }
        match options::options(&task.config, task.line) {
            Ok(options) => {
                assert!(!options.command.is_empty() && (0..=1000).contains(&options.oom_score_adj))
            }
            Err(error) => assert_error(&error, text),
        }
    }
}

#[test]
fn agent_file() {
    Target {
        name: "agent_file",
        samples: &["tests/nomad/agent.hcl", "tests/harness/src/hack/nomad.hcl"],
        tokens: b"{ } [ ] = \" ${ \\u00e9 \\U00110000 <<EOT\n EOT\n /* */ // # plugin\t\"x\"\t{\n config\t{\n client\t{\n \
            host_volume\t\"v\"\t{\n\tpath\t=\t\"/v\"\n}\n options\t{\n data_dir\t=\t\"/d\"\n \
            \"driver.allowlist\"\t=\t\"a,b\"\n {\"client\":\t[{},\t{}]} 1e309 -9223372036854775809 \r\n \xef\xbb\xbf \
            cpu_total_compute\t=\t1",
        run: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            match hcl1::parse(&text) {
                Ok(entries) => {
                    let lines = text.split('\n').count();
                    assert!(
                        entries
                            .iter()
                            .all(|entry| (1..=lines).contains(&entry.line))
                    );
                    for entry in entries {
                        // It is compared and shown as JSON.
                        let value = hcl1::value(entry.node);
                        assert!(serde_json::to_string(&value).is_ok());
                    }
                }
                Err(error) => assert_error(&error, &text),
            }
            // In memory: a disk would be what is measured.
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let file = dir.path().join("nomad.hcl");
            fs::write(&file, bytes).unwrap();
            assert_config(AgentConfig::load(&[file]), &text);
        },
    }
    .fuzz();
}

fn assert_config(config: AgentConfig, text: &str) {
    assert_eq!(config.files.len() + config.problems.len(), 1, "{config:?}");
    if let Some(dir) = config.plugin_dir() {
        assert_ne!(dir, Path::new(""));
    }
    let (alloc, mounts) = config.alloc_dirs();
    assert!(alloc != Path::new("") && mounts != Path::new(""));
    let _ = config.allows("exec2");
    assert_ne!(config.cpu_total_compute, Some(0));
    for block in config.plugins.values() {
        if let Err(error) = options::plugin(&block.config, block.line) {
            assert_error(&error, text);
        }
    }
}
