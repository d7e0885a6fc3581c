# A web server in host mode: Python's own, which serves local/ and nothing else.
job "python-http" {
  group "web" {
    task "web" {
      driver = "exec2"

      config {
        command = "python3"
        args    = ["-m", "http.server", "--bind", "127.0.0.1", "--directory", "local", "8001"]
        unveil = [
          "r:/etc/mime.types", # it is there, and a request fails if it cannot be read
        ]
      }

      template {
        data        = "hello from python\n"
        destination = "local/hello"
      }

      resources {
        cpu    = 500
        memory = 64
      }
    }
  }
}
