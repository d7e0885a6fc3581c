# nginx as a dynamic user: all that it writes is in its own tmp.
job "nginx" {
  group "web" {
    task "web" {
      driver = "exec2"

      config {
        command = "/usr/sbin/nginx"
        args    = ["-e", "stderr", "-c", "${NOMAD_TASK_DIR}/nginx.conf"]
        unveil = [
          "rx:/usr/sbin/nginx", # /usr/sbin is in no default
        ]
      }

      template {
        destination = "local/nginx.conf"
        data        = <<-EOT
          daemon off;
          pid /tmp/nginx.pid;
          events {}
          http {
            client_body_temp_path /tmp/body;
            proxy_temp_path       /tmp/proxy;
            fastcgi_temp_path     /tmp/fastcgi;
            uwsgi_temp_path       /tmp/uwsgi;
            scgi_temp_path        /tmp/scgi;
            access_log /dev/stdout;
            server {
              listen 127.0.0.1:8002;
              location / { return 200 "hello from nginx\n"; }
            }
          }
        EOT
      }

      resources {
        cpu    = 500
        memory = 64
      }
    }
  }
}
