# A single node, server and client in one, for tests. Words in @…@ are filled in by the harness.

# Not -dev: that agent destroys its allocations when it stops, and restores none.
data_dir   = "@DATA@"
plugin_dir = "@PLUGINS@" # holds our binary and nothing else

bind_addr = "127.0.0.1"

# Without these: "Defaulting advertise to localhost is unsafe", and the agent exits.
advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}

ports {
  http = @HTTP@
  rpc  = @RPC@
  serf = @SERF@
}

disable_update_check = true
log_level            = "TRACE"
log_json             = true

server {
  enabled          = true
  bootstrap_expect = 1

  default_scheduler_config {
    memory_oversubscription_enabled = true # or memory_max counts for nothing
  }
}

client {
  enabled           = true
  network_interface = "@INTERFACE@" # a machine without a default route has none to find
  cni_path          = "/usr/lib/cni"
  @COMPUTE@
  @CLIENT@

  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,@DENIED@vault"
    "driver.allowlist"     = "exec2"
  }
}

@CONSUL@

telemetry {
  publish_allocation_metrics = true # or TaskStats is never called
  collection_interval        = "1s"
}

# The label is the file's name in plugin_dir, not the driver's.
plugin "nomad-driver-exec2" {
  args = [@ARGS@]
  config {
    @PLUGIN@
  }
}

ui {
  enabled = false
}
