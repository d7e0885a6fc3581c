#compdef nomad-driver-exec2
