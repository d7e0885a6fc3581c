# A CPU of its own: no other task of this driver runs on it as long as this one does.
job "cores" {
  group "pinned" {
    task "pinned" {
      driver = "exec2"

      config {
        command = "sh"
        args    = ["-c", "echo CPU $NOMAD_CPU_CORES, $(nproc) of them; exec sleep infinity"]
      }

      resources {
        cores  = 1 # instead of cpu
        memory = 32
      }
    }
  }
}
