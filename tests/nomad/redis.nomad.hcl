# Redis as a dynamic user, its data in alloc/data.
job "redis" {
  group "redis" {
    task "redis" {
      driver = "exec2"

      config {
        command = "redis-server"
        args    = ["--bind", "127.0.0.1", "--port", "8003", "--dir", "${NOMAD_ALLOC_DIR}/data"]
      }

      resources {
        cpu    = 500
        memory = 64
      }
    }
  }
}
