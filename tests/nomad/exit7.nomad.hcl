# A batch job that fails, with an exit code that `nomad alloc status` must show as it is: "Exit Code: 7".
job "exit7" {
  type = "batch"

  group "exit7" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "exit7" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo to stdout; echo to stderr >&2; exit 7"]
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
