# An agent that is server and client in one, for trying things by hand.
data_dir   = "/opt/nomad/data"
plugin_dir = "/opt/nomad/plugins"
bind_addr  = "127.0.0.1"

# Only the API is open to the machine outside.
addresses {
  http = "0.0.0.0"
}

advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}

disable_update_check = true

server {
  enabled          = true
  bootstrap_expect = 1

  default_scheduler_config {
    memory_oversubscription_enabled = true # or memory_max counts for nothing
  }
}

client {
  enabled           = true
  network_interface = "eth0" # there is no default route to find it by
  cni_path          = "/usr/lib/cni"
  cpu_total_compute = 2000 # what two emulated cores are worth

  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,consul,vault"
  }
}

plugin "nomad-driver-exec2" {
  config {
    unveil_by_task = true
  }
}
