# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_nomad_driver_exec2_global_optspecs
    string join \n h/help V/version
end

function __fish_nomad_driver_exec2_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_nomad_driver_exec2_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_nomad_driver_exec2_using_subcommand
    set -l cmd (__fish_nomad_driver_exec2_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -s h -l help -d 'Print help'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -s V -l version -d 'Print version'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -f -a "check" -d 'Check whether this host is fit for the driver, or what a job\'s tasks would be given on it; nothing is run or changed'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -f -a "run" -d 'Run a command, or a task of a job file, as a task: in its own systemd scope, limited, and with nothing open to it but what is unveiled'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -f -a "tasks" -d 'List the tasks on this host, those of Nomad\'s and of `run`, and what is left over of some'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l config -d 'The agent\'s configuration, a file or a directory [repeatable; default: that of the agent that runs, or /etc/nomad.d]' -r -F
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l memory -d 'Memory limit: a number of MiB, or with K, M or G [default: the job\'s, or 300M]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l cpu -d 'CPU limit in MHz, as in a job\'s `resources` [default: the job\'s, or 1000]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l unveil -d 'Unveil a path, as in `r:/srv`; the mode is any of r, w, x, c [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l user -d 'User to run as, by name [default: the job\'s, or a dynamic one]' -r -f -a "(__fish_complete_users)"
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l env -d 'Set a variable of the task\'s environment [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l task -d 'Only this task, as TASK or GROUP/TASK' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l var -d 'Give one of the file\'s variables a value, as `nomad job run -var` does [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l volume -d 'The directory of this host that is a volume of the job [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l meta -d 'Metadata for a parameterized job, as `nomad job dispatch -meta` gives it [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l payload -d 'Payload for a parameterized job' -r -F
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l ignore -d 'Do without a block that needs a cluster, as in `artifact` [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -l json -d 'Print an array of objects in one line'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand check" -s h -l help -d 'Print help'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l memory -d 'Memory limit: a number of MiB, or with K, M or G [default: the job\'s, or 300M]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l cpu -d 'CPU limit in MHz, as in a job\'s `resources` [default: the job\'s, or 1000]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l unveil -d 'Unveil a path, as in `r:/srv`; the mode is any of r, w, x, c [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l user -d 'User to run as, by name [default: the job\'s, or a dynamic one]' -r -f -a "(__fish_complete_users)"
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l env -d 'Set a variable of the task\'s environment [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l task -d 'Only this task, as TASK or GROUP/TASK' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l var -d 'Give one of the file\'s variables a value, as `nomad job run -var` does [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l volume -d 'The directory of this host that is a volume of the job [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l meta -d 'Metadata for a parameterized job, as `nomad job dispatch -meta` gives it [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l payload -d 'Payload for a parameterized job' -r -F
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l ignore -d 'Do without a block that needs a cluster, as in `artifact` [repeatable]' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l learn -d 'Run with everything unveiled, and print an `unveil` list under which the command could do what it did; to standard error, or into FILE' -r -F
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l probe -d 'Say by a shell command when a server works: it is tried until it succeeds, and then the task is stopped' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -l prune -d 'Run a command that ends with status 0 again without each entry and each letter, and leave out those without which it still does, and prints the same if it does so twice'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand run" -s h -l help -d 'Print help'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand tasks" -l watch -d 'Print again every so many seconds, 2 if none are named, until Ctrl-C; a terminal is shown as much as fits' -r
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand tasks" -l json -d 'Print an array of objects in one line, with null for what is not known or not limited'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand tasks" -s h -l help -d 'Print help'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand help; and not __fish_seen_subcommand_from check run tasks help" -f -a "check" -d 'Check whether this host is fit for the driver, or what a job\'s tasks would be given on it; nothing is run or changed'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand help; and not __fish_seen_subcommand_from check run tasks help" -f -a "run" -d 'Run a command, or a task of a job file, as a task: in its own systemd scope, limited, and with nothing open to it but what is unveiled'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand help; and not __fish_seen_subcommand_from check run tasks help" -f -a "tasks" -d 'List the tasks on this host, those of Nomad\'s and of `run`, and what is left over of some'
complete -c nomad-driver-exec2 -n "__fish_nomad_driver_exec2_using_subcommand help; and not __fish_seen_subcommand_from check run tasks help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
