# A web server in JavaScript, under Debian's Node.
job "node" {
  group "web" {
    task "web" {
      driver = "exec2"

      config {
        command = "node"
        args    = ["local/server.js"]
        unveil = [
          "r:/etc/ssl/openssl.cnf", # OpenSSL ends the program without it
          "r:/usr/share/nodejs",    # the parts of Node that Debian keeps outside the binary
        ]
      }

      template {
        destination = "local/server.js"
        data        = <<-EOT
          require("http").createServer((request, answer) => answer.end("hello from node\n")).listen(8004, "127.0.0.1");
        EOT
      }

      resources {
        cpu    = 500
        memory = 128
      }
    }
  }
}
