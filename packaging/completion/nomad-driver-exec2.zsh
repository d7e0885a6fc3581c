#compdef nomad-driver-exec2

autoload -U is-at-least

_nomad-driver-exec2() {
    typeset -A opt_args
    typeset -a _arguments_options
    local ret=1

    if is-at-least 5.2; then
        _arguments_options=(-s -S -C)
    else
        _arguments_options=(-s -C)
    fi

    local context curcontext="$curcontext" state line
    _arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
'-V[Print version]' \
'--version[Print version]' \
":: :_nomad-driver-exec2_commands" \
"*::: :->nomad-driver-exec2" \
&& ret=0
    case $state in
    (nomad-driver-exec2)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:nomad-driver-exec2-command-$line[1]:"
        case $line[1] in
            (check)
_arguments "${_arguments_options[@]}" : \
'*--config=[The agent'\''s configuration, a file or a directory \[repeatable; default\: that of the agent that runs, or /etc/nomad.d\]]:PATH:_files' \
'--memory=[Memory limit\: a number of MiB, or with K, M or G \[default\: the job'\''s, or 300M\]]:SIZE:_default' \
'--cpu=[CPU limit in MHz, as in a job'\''s \`resources\` \[default\: the job'\''s, or 1000\]]:MHZ:_default' \
'*--unveil=[Unveil a path, as in \`r\:/srv\`; the mode is any of r, w, x, c \[repeatable\]]:MODE:PATH:_default' \
'--user=[User to run as, by name \[default\: the job'\''s, or a dynamic one\]]:USER:_users' \
'*--env=[Set a variable of the task'\''s environment \[repeatable\]]:NAME=VALUE:_default' \
'--task=[Only this task, as TASK or GROUP/TASK]:TASK:_default' \
'*--var=[Give one of the file'\''s variables a value, as \`nomad job run -var\` does \[repeatable\]]:NAME=VALUE:_default' \
'*--volume=[The directory of this host that is a volume of the job \[repeatable\]]:NAME=/PATH:_default' \
'*--meta=[Metadata for a parameterized job, as \`nomad job dispatch -meta\` gives it \[repeatable\]]:NAME=VALUE:_default' \
'--payload=[Payload for a parameterized job]:FILE:_files' \
'*--ignore=[Do without a block that needs a cluster, as in \`artifact\` \[repeatable\]]:BLOCK:_default' \
'--json[Print an array of objects in one line]' \
'-h[Print help]' \
'--help[Print help]' \
'::file -- The job file:_files' \
&& ret=0
;;
(run)
_arguments "${_arguments_options[@]}" : \
'--memory=[Memory limit\: a number of MiB, or with K, M or G \[default\: the job'\''s, or 300M\]]:SIZE:_default' \
'--cpu=[CPU limit in MHz, as in a job'\''s \`resources\` \[default\: the job'\''s, or 1000\]]:MHZ:_default' \
'*--unveil=[Unveil a path, as in \`r\:/srv\`; the mode is any of r, w, x, c \[repeatable\]]:MODE:PATH:_default' \
'--user=[User to run as, by name \[default\: the job'\''s, or a dynamic one\]]:USER:_users' \
'*--env=[Set a variable of the task'\''s environment \[repeatable\]]:NAME=VALUE:_default' \
'--task=[Only this task, as TASK or GROUP/TASK]:TASK:_default' \
'*--var=[Give one of the file'\''s variables a value, as \`nomad job run -var\` does \[repeatable\]]:NAME=VALUE:_default' \
'*--volume=[The directory of this host that is a volume of the job \[repeatable\]]:NAME=/PATH:_default' \
'*--meta=[Metadata for a parameterized job, as \`nomad job dispatch -meta\` gives it \[repeatable\]]:NAME=VALUE:_default' \
'--payload=[Payload for a parameterized job]:FILE:_files' \
'*--ignore=[Do without a block that needs a cluster, as in \`artifact\` \[repeatable\]]:BLOCK:_default' \
'--learn=[Run with everything unveiled, and print an \`unveil\` list under which the command could do what it did; to standard error, or into FILE]::FILE:_files' \
'--probe=[Say by a shell command when a server works\: it is tried until it succeeds, and then the task is stopped]:COMMAND:_default' \
'--prune[Run a command that ends with status 0 again without each entry and each letter, and leave out those without which it still does, and prints the same if it does so twice]' \
'-h[Print help]' \
'--help[Print help]' \
'::file -- The job file:_files' \
'*::command -- The command and its arguments:_default' \
&& ret=0
;;
(tasks)
_arguments "${_arguments_options[@]}" : \
'--watch=[Print again every so many seconds, 2 if none are named, until Ctrl-C; a terminal is shown as much as fits]::SECONDS:_default' \
'--json[Print an array of objects in one line, with null for what is not known or not limited]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
":: :_nomad-driver-exec2__subcmd__help_commands" \
"*::: :->help" \
&& ret=0

    case $state in
    (help)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:nomad-driver-exec2-help-command-$line[1]:"
        case $line[1] in
            (check)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(run)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(tasks)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
}

(( $+functions[_nomad-driver-exec2_commands] )) ||
_nomad-driver-exec2_commands() {
    local commands; commands=(
'check:Check whether this host is fit for the driver, or what a job'\''s tasks would be given on it; nothing is run or changed' \
'run:Run a command, or a task of a job file, as a task\: in its own systemd scope, limited, and with nothing open to it but what is unveiled' \
'tasks:List the tasks on this host, those of Nomad'\''s and of \`run\`, and what is left over of some' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'nomad-driver-exec2 commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__check_commands] )) ||
_nomad-driver-exec2__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 check commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__help_commands] )) ||
_nomad-driver-exec2__subcmd__help_commands() {
    local commands; commands=(
'check:Check whether this host is fit for the driver, or what a job'\''s tasks would be given on it; nothing is run or changed' \
'run:Run a command, or a task of a job file, as a task\: in its own systemd scope, limited, and with nothing open to it but what is unveiled' \
'tasks:List the tasks on this host, those of Nomad'\''s and of \`run\`, and what is left over of some' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'nomad-driver-exec2 help commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__help__subcmd__check_commands] )) ||
_nomad-driver-exec2__subcmd__help__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 help check commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__help__subcmd__help_commands] )) ||
_nomad-driver-exec2__subcmd__help__subcmd__help_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 help help commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__help__subcmd__run_commands] )) ||
_nomad-driver-exec2__subcmd__help__subcmd__run_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 help run commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__help__subcmd__tasks_commands] )) ||
_nomad-driver-exec2__subcmd__help__subcmd__tasks_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 help tasks commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__run_commands] )) ||
_nomad-driver-exec2__subcmd__run_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 run commands' commands "$@"
}
(( $+functions[_nomad-driver-exec2__subcmd__tasks_commands] )) ||
_nomad-driver-exec2__subcmd__tasks_commands() {
    local commands; commands=()
    _describe -t commands 'nomad-driver-exec2 tasks commands' commands "$@"
}

if [ "$funcstack[1]" = "_nomad-driver-exec2" ]; then
    _nomad-driver-exec2 "$@"
else
    compdef _nomad-driver-exec2 nomad-driver-exec2
fi
