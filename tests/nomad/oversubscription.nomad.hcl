# 32 MiB are kept for the task, and it may use up to 64 while nobody else wants them. The cluster must allow it:
# `nomad operator scheduler set-config -memory-oversubscription true`.
job "oversubscription" {
  type = "batch"

  group "g" {
    task "limits" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "cd /sys/fs/cgroup && cat memory.low memory.max"]
      }

      resources {
        cpu        = 100
        memory     = 32
        memory_max = 64
      }
    }
  }
}
