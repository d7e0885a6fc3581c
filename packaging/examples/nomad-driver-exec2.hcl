# For /etc/nomad.d: the label is the file's name in plugin_dir, the driver is "exec2". Each key shows its default.
plugin "nomad-driver-exec2" {
  config {
    unveil_defaults       = true
    unveil_paths          = []
    unveil_by_task        = false # whoever may write it can read and write the host with the rights of the task's user
    allow_caps            = []
    allow_user_namespaces = false
    pids_max              = 16384
    signal_all            = false
    report_denials        = true # what Landlock denies to tasks is in the host's audit log, too, where audit is on
  }
}
