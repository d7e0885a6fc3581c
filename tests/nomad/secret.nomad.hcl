# A secret lies on a file system in memory, which no other task sees.
job "secret" {
  type = "batch"

  group "g" {
    task "reader" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "stat -f -c %T secrets; wc -c <secrets/token"]
      }

      template {
        destination = "secrets/token"
        perms       = "0644"
        data        = "correct-horse-battery-staple"
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
