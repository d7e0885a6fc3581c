# PostgreSQL makes its database at the first start and serves it on the loopback.
job "postgresql" {
  type = "service"

  group "db" {
    task "postgresql" {
      driver = "exec2"

      # A fast shutdown, as pg_ctl asks for it.
      kill_signal = "SIGINT"

      config {
        command = "/bin/sh"
        args    = ["local/start"]
        unveil = [
          "r:/etc/passwd",            # initdb looks its own user up, whose entry is added to it
          "r:/usr/share/postgresql",  # the templates of a database
        ]
      }

      template {
        destination = "local/start"
        data        = <<-EOT
          set -e
          cd local
          bin=/usr/lib/postgresql/17/bin
          [ -d data ] || $bin/initdb --pgdata=data --username=postgres --auth=trust --no-sync --no-instructions
          exec $bin/postgres -D data -p 8005 -k /tmp -c listen_addresses=127.0.0.1 -c shared_buffers=16MB
        EOT
      }

      resources {
        cpu    = 1000
        memory = 256
      }
    }
  }
}
