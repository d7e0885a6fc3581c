# A batch job: one command, run once. Its log is the environment that Nomad and the driver gave to it.
job "env" {
  type = "batch"

  group "env" {
    # Fail at the first attempt instead of trying again, so that a mistake is seen at once.
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "env" {
      driver = "exec2"

      # No `user` here: the task runs as a dynamic workload user, a number of its own that no other task has and that needs
      # no entry in /etc/passwd.

      config {
        # A name is looked up in the task's PATH, after the sandbox is closed and as the task's user.
        command = "env"
      }

      resources {
        cpu    = 100 # MHz, and no more: a task that wants more waits for its next share
        memory = 64  # MiB, and no more
      }
    }
  }
}
