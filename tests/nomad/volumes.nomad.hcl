# A host volume at a path of the job's choice. The client's configuration has
# host_volume "data" { path = "/srv/data" }.
job "volumes" {
  type = "batch"

  group "g" {
    volume "data" {
      type   = "host"
      source = "data"
    }

    task "count" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo run >>/data/runs; wc -l </data/runs"]
      }

      volume_mount {
        volume      = "data"
        destination = "/data"
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
