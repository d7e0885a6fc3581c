#![allow(clippy::unwrap_used)]
use super::*;

const JOB: &str = r#"
variable "image" {
  type    = string
  default = "one"
}

variable "needed" {}

locals {
  dir  = "${local.base}/bin"
  base = "/opt/${var.image}"
}

job "shop" {
  datacenters = ["*"]
  type        = "batch"

  constraint {
    attribute = "${attr.kernel.name}"
  }

  group "front" {
    count = 2

    network {
      mode = "bridge"
    }

    task "web" {
      driver       = "exec2"
      user         = "www-data"
      kill_signal  = "SIGTERM"
      kill_timeout = "1m30s"

      config {
        command = "${local.dir}/serve"
        args    = ["-d", "${NOMAD_TASK_DIR}", "${var.needed}"]
      }

      env {
        PORT = 80
      }

      resources {
        cpu        = 500
        memory     = "64"
        memory_max = -1
      }

      logs {
        disabled = true
      }

      template {
        data        = <<EOT
listen on 80
EOT
        destination = "local/app.conf"
        perms       = "600"
      }

      template {
        data        = "{{ key \"x\" }}"
        destination = "local/from-consul"
      }
    }
  }
}
"#;

fn job() -> Job {
    parse(JOB, &[("needed".into(), "given".into())]).unwrap()
}

#[test]
fn a_real_job_file_is_read_whole() {
    let job = job();
    let group = &job.groups[0];
    let task = &group.tasks[0];
    assert_eq!(
        (job.id.as_str(), job.kind, group.count),
        ("shop", Kind::Batch, 2)
    );
    assert_eq!(job.datacenter, "dc1");
    assert_eq!(
        (task.driver.as_str(), task.user.as_deref()),
        ("exec2", Some("www-data"))
    );
    assert_eq!(task.kill_timeout.as_secs(), 90);
    assert_eq!(task.resources.cpu_mhz, 500);
    assert_eq!(task.resources.memory_mib, 64);
    assert_eq!(task.resources.memory_max_mib, -1);
    assert_eq!(task.logs, Logs::Disabled);
    assert_eq!(task.templates.len(), 1);
    assert_eq!(task.templates[0].data, "listen on 80\n");
    assert_eq!(task.templates[0].mode, 0o600);
}

#[test]
fn locals_and_variables_are_filled_in_and_run_time_names_kept() {
    let job = job();
    let config = &job.groups[0].tasks[0].config;
    assert_eq!(config[0].1.value, Value::from("/opt/one/bin/serve"));
    assert_eq!(
        config[1].1.value,
        Value::from(vec!["-d", "${NOMAD_TASK_DIR}", "given"])
    );
    assert_eq!(
        JOB.lines()
            .nth(config[1].1.line - 1)
            .unwrap()
            .trim_start()
            .split(' ')
            .next(),
        Some("args")
    );
}

#[test]
fn what_needs_a_cluster_is_listed_with_its_line() {
    let unsupported = job().unsupported;
    let listed: Vec<_> = unsupported
        .iter()
        .map(|entry| entry.what.as_str())
        .collect();
    assert_eq!(listed.len(), 3, "{listed:?}");
    assert_eq!(listed[0], "job shop: constraint");
    assert_eq!(listed[1], "group front: network");
    assert!(
        listed[2].starts_with("task web: template local/from-consul"),
        "{listed:?}"
    );
    assert!(
        JOB.lines()
            .nth(unsupported[1].line - 1)
            .unwrap()
            .contains("network")
    );
}

fn error(text: &str) -> String {
    parse(text, &[]).unwrap_err().to_string()
}

#[test]
fn mistakes_are_named_with_their_line() {
    assert_eq!(
        error("job \"a\" {\n  grup \"b\" {}\n}"),
        "line 2: `grup` is nothing that job a can have"
    );
    assert!(error("job \"a\" {\n  group \"b\" {\n}").starts_with("line "));
    assert_eq!(error("job \"a\" {}"), "line 1: job a has no `group`");
    assert!(error("variable \"x\" {}\njob \"a\" {}").contains("`x` has no default"));
    assert_eq!(error(""), "the file has no `job` block");
}

#[test]
fn mistakes_inside_a_task_are_named_with_their_line() {
    let task = |inner: &str| {
        error(&format!(
            "job \"a\" {{\ngroup \"b\" {{\ntask \"c\" {{\n{inner}\n}}\n}}\n}}"
        ))
    };
    assert_eq!(
        task("kill_timeout = \"5\""),
        "line 4: `kill_timeout`: `5` is no duration such as 30s or 1m30s"
    );
    assert_eq!(task("user = \"x\""), "line 3: task c has no `driver`");
    assert!(task("user = local.none").contains("none"));
    assert_eq!(
        task("resources {\n  cpu = -1\n}"),
        "line 5: `cpu`: must be a whole number in range"
    );
}
