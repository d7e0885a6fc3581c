# A service: it runs until it is stopped. Look at it with the host's own tools:
#
#   systemctl list-units 'exec2-*'      the scope of each task
#   systemctl status exec2-web-…        its description, its limits in use, its processes
#   systemd-cgls /exec2.slice           where it hangs in the tree
job "service" {
  type = "service"

  group "web" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "web" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "trap 'echo asked to stop; exit 0' TERM; echo serving from $PWD; while :; do sleep 1; done"]
      }

      # `nomad job stop` sends this signal, and kills what is left after the timeout.
      kill_signal  = "SIGTERM"
      kill_timeout = "10s"

      resources {
        cpu    = 500 # MHz: the scope's CPUQuota, as a share of one core of this node
        memory = 64  # MiB: what the kernel tries to leave to it (MemoryLow), since there is a memory_max

        # MiB: where it ends (MemoryMax). Without it, `memory` is the end. The cluster must allow memory oversubscription.
        memory_max = 128
      }
    }
  }
}
