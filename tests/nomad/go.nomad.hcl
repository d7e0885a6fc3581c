# A Go program starts as many threads as it has CPUs: here the one that is its alone.
job "go" {
  type = "batch"

  group "go" {
    task "go" {
      driver = "exec2"

      config {
        command = "go-limits"
      }

      resources {
        cores  = 1
        memory = 64
      }
    }
  }
}
