# What a hostile task tries. Runs the attempts that its arguments name, each in a process of its own, and tells for each of
# them "NAME succeeded", "NAME stopped: REASON", or "NAME untried: REASON" where this program is at fault. The numbers of
# system calls are put before it as %sys. Perl is in every Debian and needs no library to call the kernel.

use strict;
use warnings;
use Errno;
use Fcntl;
use POSIX ();
use Socket;

my $ground     = "/srv/exec2-attacks";
my $neighbour  = ($ENV{ATTACK_NEIGHBOUR}  // die "no neighbour") + 0;
my $supervisor = ($ENV{ATTACK_SUPERVISOR} // die "no supervisor") + 0;
my $logs       = "$ENV{NOMAD_ALLOC_DIR}/logs";
my $host_logs  = "$ENV{ATTACK_ALLOCS}/$ENV{NOMAD_ALLOC_ID}/alloc/logs";
my $own        = $ENV{NOMAD_TASK_DIR};
my $terminal   = $ENV{ATTACK_TERMINAL} // die "no terminal of others";
my $cgroup     = "/sys/fs/cgroup/exec2-attacks";

our %sys;
use constant {
    AT_FDCWD  => -100,
    O_PATH    => 010000000,
    NEWNS     => 0x00020000,
    NEWUSER   => 0x10000000,
    RDONLY    => 1,
    RECURSIVE => 0x8000,
};

sub done { $_[0] ? 1 : die "$!\n" }

# Arguments are copied: syscall writes to none of them, but takes no constants. The result is true, even if it is 0.
sub call {
    my ($name, @arguments) = @_;
    my $result = syscall($sys{$name}, @arguments);
    die "$!\n" if $result == -1;
    return $result || "0 but true";
}

# For calls that do harm, with arguments that make no sense: whoever hears of those was permitted.
sub permitted {
    my ($name, @arguments) = @_;
    return 1 if syscall($sys{$name}, @arguments) != -1;
    die "$!\n" if $!{EPERM} || $!{EACCES} || $!{ENOSYS};
    return 1;
}

sub path_descriptor {
    my ($path) = @_;
    sysopen(my $file, $path, O_PATH) or die "$!\n";
    return $file;
}

sub read_file {
    my ($path) = @_;
    done(open my $file, "<", $path);
    done(defined sysread $file, my $bytes, 16);
    done(length $bytes);
}

sub write_file {
    my ($path, $text) = @_;
    done(open my $file, "+<", $path);
    done(defined syswrite $file, $text);
}

sub reach {
    my ($kind, $address) = @_;
    socket(my $socket, PF_UNIX, $kind, 0) or die "$!\n";
    done(connect $socket, $address);
}

sub stream { reach(SOCK_STREAM, pack_sockaddr_un($_[0])) }

sub mount_attributes { call("mount_setattr", AT_FDCWD, $_[0], RECURSIVE, pack("Q4", 0, RDONLY, 0, 0), 32) }

sub mount_tmpfs { call("mount", "exec2-attack", $_[0], "tmpfs", 0, 0) }

# A process of its own, with flags for clone or clone3. Perl's registers follow the flags, none of which is looked at.
sub cloned {
    my ($name, @arguments) = @_;
    my $pid = call($name, @arguments);
    POSIX::_exit(0) if $pid == 0;
    waitpid $pid, 0;
    return 1;
}

# Memory at an address: read by unpack, written through a pipe.
sub peek { my ($address, $template, $length) = @_; unpack $template, unpack("P$length", pack("Q", $address)) }

sub poke {
    my ($address, $bytes) = @_;
    pipe my $from, my $to or die "$!\n";
    syswrite $to, $bytes;
    call("read", fileno $from, $address, length $bytes);
}

sub mapped {
    my ($length, $of, $offset) = @_;
    my $address = syscall($sys{mmap}, 0, $length, 3, 0x8001, $of, $offset);
    die "mmap: $!\n" if $address == -1;
    return $address;
}

# Opens a file through a ring of one entry.
sub open_by_ring {
    my ($path) = @_;
    my $parameters = "\0" x 120;
    # Not a copy of them: the kernel writes there where everything is.
    my $ring = syscall($sys{io_uring_setup}, 1, $parameters);
    die "$!\n" if $ring == -1;
    my ($tail, $array, $results) = (unpack "L30", $parameters)[11, 16, 25];
    my $shared  = mapped(4096, $ring, 0);
    my $entries = mapped(64, $ring, 0x10000000);
    # struct io_uring_sqe: IORING_OP_OPENAT, for reading.
    poke($entries, pack("CCSlQQLLQ", 18, 0, 0, AT_FDCWD, 0, unpack("Q", pack("p", $path)), 0, 0, 42));
    poke($shared + $array, pack("L", 0));
    poke($shared + $tail, pack("L", 1));
    call("io_uring_enter", $ring, 1, 1, 1, 0, 0);
    my ($whose, $result) = peek($shared + $results, "Ql", 16);
    $whose == 42 or die "no answer\n";
    if ($result < 0) { $! = -$result; die "$!\n" }
    done(open my $file, "<&=", $result);
    done(defined sysread $file, my $bytes, 16);
    done(length $bytes);
}

# FS_IOC_GETFLAGS and FS_IOC_SETFLAGS. Nobody removes a file as long as it has the flag, so it is taken away again.
sub make_immutable {
    my ($path) = @_;
    done(open my $file, "<", $path);
    my $flags = pack("l!", 0);
    done(ioctl $file, 0x80086601, $flags);
    my $immutable = pack("l!", unpack("l!", $flags) | 0x10);
    done(ioctl $file, 0x40086602, $immutable);
    done(ioctl $file, 0x40086602, $flags);
}

# Its own: a descriptor that it was given, or whichever controls it.
sub own_terminal {
    return *STDIN if -t STDIN;
    sysopen(my $file, "/dev/tty", O_RDWR | O_NOCTTY) or die "no terminal\n";
    return $file;
}

sub terminal {
    my ($path) = @_;
    sysopen(my $file, $path, O_RDWR | O_NOCTTY) or die "$!\n";
    return $file;
}

# TIOCSTI. An empty line does no harm, and leaves what is said as it is.
sub type_on { my ($file) = @_; done(ioctl $file, 0x5412, my $typed = "\n") }

# TIOCSCTTY with force: whoever it controlled is left without.
sub take { my ($file) = @_; POSIX::setsid() or die "setsid: $!"; done(ioctl $file, 0x540e, 1) }

# Whether it is gone, or stands still, a moment later.
sub harmed {
    select undef, undef, undef, 0.1;
    open my $stat, "<", "/proc/$supervisor/stat" or return 1;
    return <$stat> =~ /\) [ZTtX] / ? 1 : die "it goes on\n";
}

my %attempt = (
    # Files that are not unveiled.
    "read-file"         => sub { read_file("$ground/secret") },
    "list-directory"    => sub { done(opendir my $dir, "$ground/dir") },
    "reopen-descriptor" => sub { my $file = path_descriptor("$ground/secret"); read_file("/proc/self/fd/" . fileno $file) },
    "write-file"        => sub { write_file("$ground/open", "x") },
    "truncate-file"     => sub { call("truncate", "$ground/open", 0) },
    "create-file"       => sub { done(sysopen my $file, "$ground/dir/new", O_CREAT | O_WRONLY) },
    "make-directory"    => sub { done(mkdir "$ground/dir/new") },
    "plant-link"        => sub { done(symlink "/etc/shadow", "$ground/dir/link") },
    "remove-file"       => sub { done(unlink "$ground/dir/file") },
    "rename-file"       => sub { done(rename "$ground/dir/file", "$ground/dir/renamed") },
    "hard-link-file"    => sub { done(link "$ground/dir/file", "$ground/dir/linked") },
    "execute-file"      => sub { done(system("$ground/program") == 0) },
    "open-by-io-uring"  => sub { open_by_ring("$ground/secret") },
    "change-mode"       => sub { done(chmod 04777, "$ground/open") },
    "change-mode-by-descriptor" =>
        sub { my $file = path_descriptor("$ground/open"); done(chmod 04777, "/proc/self/fd/" . fileno $file) },
    "change-owner"  => sub { done(chown 1, 1, "$ground/open") },
    "change-times"  => sub { done(utime 1, 1, "$ground/open") },
    "make-immutable" => sub { make_immutable("$ground/setuid") },
    "make-own-file-immutable" => sub {
        done(open my $file, ">", "$own/immutable");
        make_immutable("$own/immutable");
    },
    "rename-own-directory" => sub { done(rename $own, "$own.away") },
    "give-capability" =>
        sub { call("setxattr", "$ground/program", "security.capability", pack("V5", 0x02000001, 1, 0, 0, 0), 20, 0) },
    "open-by-handle" => sub {
        done(open my $dir, "<", $own);
        # Of no file: permission is asked first.
        permitted("open_by_handle_at", fileno $dir, pack("LlQ", 8, 1, 0), O_RDONLY);
    },
    "setuid-program" => sub { my $uid = `$ground/setuid -u 2>&1`; done(defined $uid); $uid == 0 or die "uid $uid" },

    # Devices.
    "block-device-node"     => sub { call("mknodat", AT_FDCWD, "$own/disk", 0060600, 0x700) },
    "character-device-node" => sub { call("mknodat", AT_FDCWD, "$own/kmsg", 0020600, 0x10b) },
    "device-outside-of-dev" => sub { done(open my $file, "+<", "$ground/devices/null") },
    "change-device-mode"    => sub { done(chmod 0666, "/dev/null") },
    # A pipe, a socket and a terminal are of its own. Each change by itself: who may not make the first may make the last.
    "change-input-mode" => sub {
        my %stream  = ("/dev/stdin" => \*STDIN, "/dev/stdout" => \*STDOUT, "/dev/stderr" => \*STDERR);
        my @devices = grep { -c $stream{$_} && !-t $stream{$_} } keys %stream;
        @devices or die "pipes of its own\n";
        done(chmod(0, @devices) + chown(1, 1, @devices) + utime(1, 1, @devices) + utime(undef, undef, @devices));
    },
    "kernel-memory"         => sub { read_file("/proc/kcore") },

    # Terminals.
    "open-terminal-of-others"    => sub { my $file = terminal($terminal); done(syswrite $file, "x") },
    "type-on-terminal-of-others" => sub { type_on(terminal($terminal)) },
    "take-terminal-of-others"    => sub { take(terminal($terminal)) },
    "open-console"               => sub { done(sysopen my $file, "/dev/console", O_WRONLY | O_NOCTTY) },
    # TIOCLINUX, to paste what is selected.
    "paste-on-virtual-console"   => sub { my $file = terminal("/dev/tty1"); done(ioctl $file, 0x541c, my $paste = "\3") },
    # TIOCCONS; the kernel takes it back when the terminal hangs up.
    "take-console-output"        => sub { my $file = own_terminal(); done(ioctl $file, 0x541d, 0) },
    "hang-up-terminal"           => sub { POSIX::setsid(); call("vhangup") },
    "take-own-terminal"          => sub { take(own_terminal()) },
    "type-on-own-terminal"       => sub { type_on(own_terminal()) },

    # Other processes, and the task's supervisor.
    "see-neighbour"        => sub { done(-d "/proc/$neighbour") },
    "signal-neighbour"     => sub { done(kill 0, $neighbour) },
    "trace-neighbour"      => sub { call("ptrace", 0x4206, $neighbour, 0, 0) },
    "kill-supervisor"      => sub { done(kill "KILL", $supervisor); harmed() },
    "stop-supervisor"      => sub { done(kill "STOP", $supervisor); harmed() },
    "trace-supervisor"     => sub { call("ptrace", 0x4206, $supervisor, 0, 0) },
    "limit-supervisor"     => sub { call("prlimit64", $supervisor, 7, pack("Q2", 0, 0), 0) },
    "slow-supervisor"      => sub { call("sched_setscheduler", $supervisor, 5, pack("i", 0)) },
    "sacrifice-supervisor" => sub { write_file("/proc/$supervisor/oom_score_adj", "1000") },
    "read-supervisor-environment" => sub { read_file("/proc/$supervisor/environ") },
    "read-supervisor-memory"      => sub { done(open my $file, "<", "/proc/$supervisor/mem") },
    "take-supervisor-descriptor"  => sub { my $pidfd = call("pidfd_open", $supervisor, 0); call("pidfd_getfd", $pidfd, 0, 0) },
    "enter-supervisor-namespace"  => sub { done(open my $file, "<", "/proc/$supervisor/ns/mnt"); call("setns", fileno $file, NEWNS) },
    "shield-from-oom"             => sub { write_file("/proc/self/oom_score_adj", "-500") },

    # The kernel.
    "load-module"      => sub { permitted("init_module", "x", 1, "") },
    "load-kernel"      => sub { permitted("kexec_load", 0, 0, 0, 0x7fff) },
    "reboot"           => sub { permitted("reboot", 0xfee1dead, 672274793, 0x0badcafe, 0) },
    "port-access"      => sub { call("iopl", 3) },
    "bpf-program"      => sub {
        my ($code, $license, $log) = (pack("Q2", 0x00000000000000b7, 0x95), "GPL\0", "");
        # A kprobe program of two instructions: r0 = 0; exit.
        my $attributes = pack("LLppLLQL", 2, 2, $code, $license, 0, 0, 0, 0) . "\0" x 32;
        call("bpf", 5, $attributes, 48);
    },
    "watch-all-processors" => sub { call("perf_event_open", pack("LLQ", 1, 64, 0) . "\0" x 48, -1, 0, -1, 0) },
    "watch-all-files"      => sub { call("fanotify_init", 4, 0) },
    "freeze-filesystem"    => sub { done(open my $dir, "<", "/proc/self/status"); ioctl($dir, 0xc0045877, 0) and return 1; die "$!\n" if $!{EPERM}; 1 },
    "name-host"            => sub { my $name = (POSIX::uname())[1]; call("sethostname", $name, length $name) },
    "configure-network"    => sub {
        socket(my $socket, PF_INET, SOCK_DGRAM, 0) or die "$!\n";
        my $request = pack("a16s x22", "lo", 0x49);
        done(ioctl $socket, 0x8914, $request);
    },
    "read-packets"       => sub { done(socket my $socket, 17, SOCK_RAW, 0x0300) },
    "forge-device-event" => sub {
        socket(my $socket, 16, SOCK_RAW, 15) or die "$!\n";
        # To those who listen to what udev says; it is no message, and nobody takes it for one.
        return 1 if send $socket, "exec2-attack", 0, pack("SSLL", 16, 0, 0, 2);
        die "$!\n" if $!{EPERM};
        1;
    },
    "core-pattern"       => sub { done(open my $file, "+<", "/proc/sys/kernel/core_pattern") },
    "sysrq"              => sub { done(open my $file, ">", "/proc/sysrq-trigger") },
    "real-time-priority" => sub { call("sched_setscheduler", 0, 1, pack("i", 1)) },

    # Mounts.
    "lift-read-only"      => sub { mount_attributes($ground) },
    "mount-filesystem"    => sub { mount_tmpfs("$ground/dir") },
    "clone-tree"          => sub { call("open_tree", AT_FDCWD, $ground, 1) },
    "open-filesystem"     => sub { call("fsopen", "tmpfs", 0) },
    "new-mount-namespace" => sub { call("unshare", NEWNS) },
    "new-user-namespace"  => sub { call("unshare", NEWUSER) },
    "clone-user-namespace"  => sub { cloned("clone", NEWUSER | 17, 0, 0, 0, 0) },
    "clone3-user-namespace" => sub { cloned("clone3", pack("Q8", NEWUSER, 0, 0, 0, 17, 0, 0, 0), 64) },
    "mount-in-user-namespace" => sub { call("unshare", NEWUSER | NEWNS); mount_tmpfs("$ground/dir") },
    "lift-read-only-in-user-namespace" => sub { call("unshare", NEWUSER | NEWNS); mount_attributes($ground) },

    # Out of the scope.
    "clone-into-cgroup" => sub {
        my $dir = path_descriptor($cgroup);
        cloned("clone3", pack("Q11", 1 << 33, 0, 0, 0, 17, 0, 0, 0, 0, 0, fileno $dir), 88);
    },
    "join-cgroup" => sub { write_file("$cgroup/cgroup.procs", "0") },

    # Nomad's logs.
    "link-in-logs"         => sub { done(symlink "/srv/exec2-attacks/planted", "$logs/t.stdout.1") },
    "file-in-logs"         => sub { done(sysopen my $file, "$logs/new", O_CREAT | O_WRONLY) },
    "remove-log"           => sub { done(unlink "$logs/t.stdout.0") },
    "rename-logs"          => sub { done(rename $logs, "$logs.away") },
    "link-in-logs-by-data-dir" => sub { done(symlink "/srv/exec2-attacks/planted", "$host_logs/t.stdout.1") },

    # Sockets.
    "socket-below-run"     => sub { stream("/run/exec2-attacks.socket") },
    "system-bus"           => sub { stream("/run/dbus/system_bus_socket") },
    "systemd-private"      => sub { stream("/run/systemd/private") },
    "systemd-notify"       => sub { reach(SOCK_DGRAM, pack_sockaddr_un("/run/systemd/notify")) },
    "user-manager"         => sub { stream("/run/user/exec2-attacks/socket") },
    "start-service"        => sub { my $said = `systemd-run --wait --quiet true 2>&1`; $? == 0 or die $said || "$!\n" },
    "plugin-socket"        => sub { stream((glob "/run/nomad-driver-exec2/plugin/*")[0] // die "no socket\n") },
    "abstract-socket"      => sub { reach(SOCK_STREAM, pack("Sa*", AF_UNIX, "\0exec2-attacks")) },
    "socket-outside-of-run" => sub { stream("$ground/socket") },

    # Neighbours' things.
    "shared-tmp"     => sub { read_file("/tmp/exec2-attacks") },
    "shared-memory"  => sub { read_file("/dev/shm/exec2-attacks") },
    "shared-segment" => sub { call("shmget", 0x0e2e2e2e, 0, 0) },
    "message-queue"  => sub { call("mq_open", "exec2-attacks", O_RDONLY, 0, 0) },
    "session-keyring" => sub { call("keyctl", 10, -3, "user", "exec2-attacks", 0) },
    "user-keyring"       => sub { call("keyctl", 10, -4, "user", "exec2-attacks-of-user", 0) },
    "persistent-keyring" => sub { call("keyctl", 22, -1, -2) },

    # What is told.
    "stat-file"  => sub { done(-e "$ground/secret") },
    "watch-directory" => sub { my $watch = call("inotify_init1", 0); call("inotify_add_watch", $watch, "$ground/dir", 0x100) },
);

$| = 1;
for my $name (@ARGV) {
    my $pid = fork // die "fork: $!";
    if ($pid) {
        waitpid $pid, 0;
        print "$name untried: it died of signal ", $? & 127, " with code ", $? >> 8, "\n" if $? != 0;
        next;
    }
    alarm 60;
    my $what = $attempt{$name};
    my $succeeded = eval { $what ? $what->() : die "there is no such attempt" };
    my $why = $@ =~ s/\s+/ /gr || "it came to nothing";
    # Perl tells where in the program it is at fault; a refusal comes without.
    my $end = $why =~ / at -e line \d+/ || $@ eq "" ? "untried" : "stopped";
    print $succeeded ? "$name succeeded\n" : "$name $end: $why\n";
    POSIX::_exit(0);
}
exit 7;
