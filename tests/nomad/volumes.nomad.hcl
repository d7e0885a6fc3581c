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

      # By name: a dynamic user has another number in the next allocation, and could not write what this one leaves.
      user = "nobody"

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
