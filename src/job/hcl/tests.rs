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
    assert_eq!((job.id.as_str(), job.kind), ("shop", Kind::Batch));
    assert_eq!(job.datacenter, "dc1");
    assert_eq!(
        (task.driver.value.as_str(), task.user.as_deref()),
        (Some("exec2"), Some("www-data"))
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
        .map(|entry| (entry.effect, entry.message.as_str()))
        .collect();
    assert_eq!(
        listed,
        [
            (
                Effect::None,
                "job shop: constraint has no effect in a single run"
            ),
            (
                Effect::None,
                "group front: count = 2, but a run is one instance"
            ),
            (
                Effect::Missing,
                "group front: network mode `bridge` needs a Nomad cluster: a run has the network of this host; \
                 --ignore network runs without it"
            ),
            (
                Effect::Missing,
                "task web: template `local/from-consul` with `{{` in its text needs a Nomad cluster: \
                 write the text out; --ignore template runs without it"
            ),
        ]
    );
    assert!(
        JOB.lines()
            .nth(unsupported[2].line - 1)
            .unwrap()
            .contains("mode = \"bridge\"")
    );
    assert_eq!(unsupported[2].group.as_deref(), Some("front"));
    assert_eq!(unsupported[3].task.as_deref(), Some("web"));
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
    assert!(
        error("variable \"x\" {}\njob \"a\" {}")
            .contains("variable `x` has no default; give it with --var x=VALUE")
    );
    assert_eq!(error(""), "line 1: the file has no `job` block");
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
    assert!(task("user = upper(\"x\")").starts_with("line 4: `user`: upper() is not known here"));
    assert_eq!(
        task("env {\n  A = [1]\n}"),
        "line 5: `A` of env must be a string"
    );
    assert!(task("dynamic \"template\" {}").starts_with("line 4: `dynamic`: "));
    assert_eq!(
        task("resources {\n  cpu = -1\n}"),
        "line 5: `cpu`: -1 is no whole number in range"
    );
}

/// What a block inside a group or a task is noted as.
fn noted(group: &str, task: &str) -> Vec<(Effect, String)> {
    let text = format!(
        "job \"a\" {{\ngroup \"b\" {{\n{group}\ntask \"c\" {{\ndriver = \"exec2\"\n{task}\n}}\n}}\n}}"
    );
    let job = parse(&text, &[]).unwrap();
    let noted = job.unsupported.into_iter();
    noted.map(|it| (it.effect, it.key)).collect()
}

#[test]
fn what_a_single_run_does_without_is_no_error() {
    for key in "affinity constraint ephemeral_disk migrate spread update service restart reschedule"
        .split(' ')
    {
        assert_eq!(
            noted(&format!("{key} {{}}"), ""),
            [(Effect::None, key.into())],
            "{key}"
        );
    }
    for key in ["restart", "service", "constraint", "action"] {
        assert_eq!(
            noted("", &format!("{key} {{}}")),
            [(Effect::None, key.into())],
            "{key}"
        );
    }
    for quiet in [
        "restart {\n attempts = 0\n mode = \"fail\"\n}",
        "reschedule {\n attempts = 0\n unlimited = false\n}",
        "network {\n mode = \"host\"\n}",
        "count = 1",
    ] {
        assert_eq!(noted(quiet, ""), [], "{quiet}");
    }
    assert_eq!(noted("", "identity {}"), []);
}

#[test]
fn what_a_task_cannot_do_without_is_an_error() {
    for key in ["artifact", "vault", "consul", "csi_plugin"] {
        assert_eq!(
            noted("", &format!("{key} {{}}")),
            [(Effect::Missing, key.into())],
            "{key}"
        );
    }
    let cases = [
        ("identity {\n env = true\n}", "identity"),
        ("resources {\n device \"gpu\" {}\n}", "device"),
        ("template {\n source = \"local/x\"\n}", "template"),
        (
            "template {\n data = \"[[ x ]]\"\n left_delimiter = \"[[\"\n}",
            "template",
        ),
    ];
    for (text, key) in cases {
        assert_eq!(noted("", text), [(Effect::Missing, key.into())], "{text}");
    }
    for mode in ["bridge", "none", "cni/x"] {
        let network = format!("network {{\n mode = \"{mode}\"\n}}");
        assert_eq!(
            noted(&network, ""),
            [(Effect::Missing, "network".into())],
            "{mode}"
        );
    }
    let connect = "service {\n connect {\n sidecar_service {}\n}\n}";
    assert_eq!(noted(connect, "")[0], (Effect::Missing, "connect".into()));
}

fn with_variable(of_type: &str, given: &str) -> Result<Value, String> {
    let text = format!(
        "variable \"x\" {{\n{of_type}\n}}\njob \"a\" {{\ngroup \"b\" {{\ntask \"c\" {{\ndriver = \"exec2\"\nconfig {{\nx = var.x\n}}\n}}\n}}\n}}"
    );
    let job = parse(&text, &[("x".into(), given.into())]).map_err(|error| error.to_string())?;
    Ok(job.groups[0].tasks[0].config[0].1.value.clone())
}

#[test]
fn a_variable_is_read_by_its_type() {
    let cases = [
        ("type = string", "1", Value::from("1")),
        ("", "1", Value::from("1")),
        ("type = number", "80", Value::from(80)),
        ("default = 1", "80", Value::from(80)),
        ("type = bool", "true", Value::from(true)),
        (
            "type = list(string)",
            "[\"a\", \"b\"]",
            Value::from(vec!["a", "b"]),
        ),
        ("default = []", "[1]", Value::from(vec![1])),
    ];
    for (of_type, given, value) in cases {
        assert_eq!(with_variable(of_type, given), Ok(value), "{of_type}");
    }
    let wrong = [
        (
            "type = number",
            "x",
            "line 1: variable `x`: `\"x\"` is no number",
        ),
        (
            "type = bool",
            "yes",
            "line 1: variable `x`: `\"yes\"` is no bool; write true or false",
        ),
        (
            "type = list(string)",
            "a b",
            "line 1: variable `x`: `a b` is no value of HCL, such as [\"a\", \"b\"]",
        ),
        (
            "type = strin",
            "a",
            "line 2: `type`: `strin` is no type such as string or list(number)",
        ),
    ];
    for (of_type, given, error) in wrong {
        assert_eq!(
            with_variable(of_type, given),
            Err(error.into()),
            "{of_type}"
        );
    }
    let error = parse(
        JOB,
        &["needed", "imgae"].map(|name| (name.into(), "x".into())),
    )
    .unwrap_err();
    assert_eq!(
        error.message,
        "--var imgae: there is no variable `imgae`; the file declares image, needed"
    );
}

#[test]
fn ports_volumes_and_the_rest_of_a_task_are_read() {
    let text = r#"
job "a" {
  parameterized {
    payload       = "required"
    meta_required = ["who"]
  }
  group "b" {
    network {
      port "http" {
        static = 8080
      }
      port "admin" {}
    }
    volume "data" {
      type      = "host"
      source    = "d"
      read_only = true
    }
    task "c" {
      driver = "exec2"
      lifecycle {
        hook    = "prestart"
        sidecar = true
      }
      volume_mount {
        volume      = "data"
        destination = "${NOMAD_TASK_DIR}/data"
      }
      dispatch_payload {
        file = "in.txt"
      }
    }
  }
}"#;
    let job = parse(text, &[]).unwrap();
    assert_eq!(job.unsupported, []);
    let parameterized = job.parameterized.unwrap();
    assert_eq!(parameterized.payload, super::super::Payload::Required);
    assert_eq!(parameterized.meta_required, ["who"]);
    let group = &job.groups[0];
    let ports: Vec<_> = group
        .ports
        .iter()
        .map(|port| (port.label.as_str(), port.fixed))
        .collect();
    assert_eq!(ports, [("http", Some(8080)), ("admin", None)]);
    let volume = &group.volumes[0];
    assert_eq!(volume.access, super::super::Access::ReadOnly);
    assert_eq!(
        (volume.kind.as_str(), volume.source.as_str()),
        ("host", "d")
    );
    let task = &group.tasks[0];
    assert_eq!(task.volume_mounts[0].propagation, "private");
    let lifecycle = task.lifecycle.as_ref().unwrap();
    assert!(lifecycle.hook == "prestart" && lifecycle.sidecar);
    assert_eq!(
        task.payload_file.as_ref().unwrap().value,
        Value::from("in.txt")
    );
}

#[test]
fn no_task_is_named_out_of_its_directory() {
    for name in ["../x", "a/b", "..", "alloc", ""] {
        let text = format!("job \"a\" {{\ngroup \"b\" {{\ntask \"{name}\" {{\n}}\n}}\n}}");
        assert!(error(&text).ends_with("is no name for a task"), "{name}");
    }
}

#[test]
fn garbage_ends_in_a_sentence() {
    let deep =
        |open: &str, close: &str| format!("x = {}1{}", open.repeat(100_000), close.repeat(100_000));
    let nested = "a {\n".repeat(100_000);
    let mebibytes = "\u{1}\u{7f}é{[(\"${".repeat(200_000);
    for text in [
        deep("[", "]"),
        deep("(", ")"),
        deep("{a=", "}"),
        deep("!", ""),
        deep("\"${", "}\""),
        deep("1+", ""),
        deep("a.", ""),
        deep("true ? 1 : ", ""),
        nested,
        mebibytes,
    ] {
        let sentence = error(&text);
        assert!(
            sentence.starts_with("line ") && sentence.len() < 2_000,
            "{sentence}"
        );
    }
}
