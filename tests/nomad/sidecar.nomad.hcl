# A task beside the main one, in the same allocation: both see `alloc`, and nothing else of each other.
job "sidecar" {
  type = "service"

  group "g" {
    task "web" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo hello >alloc/data/greeting; exec sleep 600"]
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }

    task "reader" {
      driver = "exec2"

      lifecycle {
        hook    = "poststart"
        sidecar = true
      }

      config {
        command = "/bin/sh"
        args    = ["-c", "until cat alloc/data/greeting; do sleep 0.1; done 2>/dev/null; exec sleep 600"]
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
