# A server in the allocation's own network, which Nomad makes and whose service it registers.
job "bridge" {
  type = "service"

  group "g" {
    network {
      mode = "bridge"

      port "http" {
        static = 8006
      }
    }

    service {
      name     = "hello"
      port     = "http"
      provider = "nomad"
    }

    task "server" {
      driver = "exec2"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo hello from the bridge >local/index.html; exec perl local/server"]
      }

      template {
        destination = "local/server"
        data        = <<-EOT
          use IO::Socket::INET;
          my $server = IO::Socket::INET->new(LocalPort => 8006, Listen => 5, ReuseAddr => 1) or die $!;
          while (my $client = $server->accept) {
            while (defined(my $line = <$client>)) { last if $line =~ /^\r?$/ }
            open my $page, '<', 'local/index.html' or die $!;
            print $client "HTTP/1.0 200 OK\r\n\r\n", <$page>;
          }
        EOT
      }

      resources {
        cpu    = 200
        memory = 32
      }
    }
  }
}
