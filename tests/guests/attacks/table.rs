//! What hostile tasks and hostile authors of jobs try. SECURITY.md has the same as a table.

/// Whose attack it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// A task with a dynamic workload user.
    Dynamic,
    /// The same, where the operator allows user namespaces.
    DynamicWithNamespaces,
    /// A task with a user of the host's.
    Named,
    Root,
    /// Root with capabilities and user namespaces that the operator allows.
    RootWithCaps,
}

/// Everybody that a task can be.
pub const TASKS: &[Who] = &[
    Who::Dynamic,
    Who::DynamicWithNamespaces,
    Who::Named,
    Who::Root,
    Who::RootWithCaps,
];
pub const USERS: &[Who] = &[Who::Dynamic, Who::DynamicWithNamespaces, Who::Named];
/// Those who may make user namespaces, and those who may not.
const ALLOWED_NAMESPACES: &[Who] = &[Who::DynamicWithNamespaces, Who::RootWithCaps];
const REFUSED_NAMESPACES: &[Who] = &[Who::Dynamic, Who::Named, Who::Root];
pub const ROOTS: &[Who] = &[Who::Root, Who::RootWithCaps];
/// Whom the file that is attacked belongs to, or who needs not own it.
const OWNERS: &[Who] = &[Who::Named, Who::Root, Who::RootWithCaps];
const PLAIN_ROOT: &[Who] = &[Who::Root];
const CAPPED_ROOT: &[Who] = &[Who::RootWithCaps];

/// What an attempt of `attacker.pl` must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Stopped,
    /// It may succeed: the words of SECURITY.md that say so.
    ByDesign(&'static str),
}

/// What `attacker.pl` says that an attempt came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<'a> {
    Succeeded,
    Stopped(&'a str),
    /// The program that tries is at fault: it died, or does not know how.
    Untried(&'a str),
}

impl Outcome<'_> {
    /// The attempt's name, and the outcome, of a line of what the program says.
    pub fn parse(line: &str) -> Option<(&str, Outcome<'_>)> {
        let told = |word| line.split_once(word);
        if let Some((name, why)) = told(" untried: ") {
            return Some((name, Outcome::Untried(why.trim())));
        }
        if let Some((name, why)) = told(" stopped: ") {
            return Some((name, Outcome::Stopped(why.trim())));
        }
        Some((line.strip_suffix(" succeeded")?, Outcome::Succeeded))
    }
}

/// How the kernel refuses, and what is found where a thing is hidden. Any other words are those of an attempt that was not
/// understood, by which nothing is known.
const REFUSALS: &[&str] = &[
    "Permission denied",
    "Operation not permitted",
    "Read-only file system",
    "No such file or directory",
    "No such process",
    "Connection refused",
    "Device or resource busy",
    "Required key not available",
];

/// What tries meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The ABI of its Landlock.
    pub abi: u32,
    pub whose: Whose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// A machine's own.
    Own,
    /// A container's, which may lack what an attempt that depends on it asks for.
    Host,
}

/// Whether an attempt came to what it must: in words for the report, or what is wrong.
pub fn judge(
    attempt: &Attempt,
    outcome: Option<Outcome>,
    kernel: Kernel,
) -> Result<String, String> {
    let may_lack = kernel.whose == Whose::Host && attempt.control != Control::Succeeds;
    let is_refusal = |why: &str| {
        let mut known = REFUSALS.iter().chain(attempt.refusals);
        may_lack || known.any(|refusal| why.contains(refusal))
    };
    match (outcome, attempt.verdict) {
        (None, _) => Err("it is missing".into()),
        (Some(Outcome::Untried(why)), _) => Err(format!("it was not tried: {why}")),
        (Some(Outcome::Stopped(why)), _) if is_refusal(why) => Ok(format!("stopped ({why})")),
        (Some(Outcome::Stopped(why)), _) => Err(format!("that is no refusal: {why}")),
        (Some(Outcome::Succeeded), Verdict::ByDesign(words)) => Ok(format!("by design ({words})")),
        (Some(Outcome::Succeeded), Verdict::Stopped) if attempt.from_abi > kernel.abi => {
            Ok(format!("open before ABI {}", attempt.from_abi))
        }
        (Some(Outcome::Succeeded), Verdict::Stopped) => Err("it succeeded".into()),
    }
}

/// Whether an attempt succeeds where nothing stops it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Succeeds,
    /// A container's kernel may stop it, for this reason. A machine's own does not.
    Depends(&'static str),
}

#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    pub name: &'static str,
    pub who: &'static [Who],
    pub verdict: Verdict,
    pub control: Control,
    /// Before this ABI of Landlock it may succeed.
    pub from_abi: u32,
    /// Words that are a refusal of this one.
    pub refusals: &'static [&'static str],
}

impl Attempt {
    const fn depends(self, reason: &'static str) -> Attempt {
        Attempt {
            control: Control::Depends(reason),
            ..self
        }
    }

    const fn refused_as(self, refusals: &'static [&'static str]) -> Attempt {
        Attempt { refusals, ..self }
    }

    const fn since_abi(self, from_abi: u32) -> Attempt {
        Attempt { from_abi, ..self }
    }
}

const fn stopped(name: &'static str, who: &'static [Who]) -> Attempt {
    Attempt {
        name,
        who,
        verdict: Verdict::Stopped,
        control: Control::Succeeds,
        from_abi: 1,
        refusals: &[],
    }
}

const fn by_design(name: &'static str, who: &'static [Who], words: &'static str) -> Attempt {
    Attempt {
        verdict: Verdict::ByDesign(words),
        ..stopped(name, who)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Threat {
    pub name: &'static str,
    pub who: &'static str,
    pub stopped_by: &'static str,
    pub attempts: &'static [Attempt],
    /// Tests that try it in other ways.
    pub tests: &'static [&'static str],
}

const NAMESPACES: &str = "A task that creates user namespaces, where they are allowed,";
const NO_TERMINAL: &[&str] = &["no terminal"];
const KEYRINGS: &str = "**Keyrings of users.**";
const ALLOWED_CAPABILITIES: &str = "**Capabilities that an operator allows**";
const SMALL: &str = "a kernel may be built without it";
const YAMA: &str = "Yama may close it to all but root";
const TERMINALS: &str = "**Terminals of sessions**";
/// Where it is off, programs type on no terminal. A machine's own is turned on for the attempt.
const LEGACY: &str = "dev.tty.legacy_tiocsti may be off";
const CONTAINER: &str = "a container's host may withhold it";

pub const THREATS: &[Threat] = &[
    Threat {
        name: "Nomad's log rotation writes through a planted link",
        who: "any task",
        stopped_by: "`alloc/logs` is read-only, by each of its paths",
        attempts: &[
            stopped("link-in-logs", TASKS),
            stopped("file-in-logs", TASKS),
            stopped("remove-log", TASKS),
            stopped("rename-logs", TASKS),
            stopped("link-in-logs-by-data-dir", TASKS),
        ],
        tests: &["guests::view::the_logs_are_closed_at_each_of_their_paths"],
    },
    Threat {
        name: "a variable or a name of the job leads somewhere else",
        who: "author",
        stopped_by: "no path is taken from a job's environment; a dynamic user's number is checked, and is one allocation's alone",
        attempts: &[],
        tests: &[
            "guests::bad_input::a_dynamic_user_is_one_allocations_alone",
            "guests::bad_input::a_mistake_is_a_sentence_with_key_and_value",
            "guests::bad_input::a_hostile_request_is_refused_and_leaves_nothing",
        ],
    },
    Threat {
        name: "newlines and escapes in names write units, logs and terminals",
        who: "author",
        stopped_by: "only text with visible escapes leaves the plugin",
        attempts: &[],
        tests: &[
            "guests::bad_input::a_hostile_name_changes_no_unit",
            "guests::hostile::a_task_s_key_takes_no_harm_from_any_value",
        ],
    },
    Threat {
        name: "a manager of the host is asked to start something",
        who: "any task",
        stopped_by: "masks over `/run`; for root over all of it",
        attempts: &[
            stopped("system-bus", TASKS),
            stopped("systemd-notify", TASKS),
            stopped("user-manager", TASKS),
            stopped("systemd-private", ROOTS),
            stopped("start-service", ROOTS).refused_as(&["Failed to connect"]),
            stopped("plugin-socket", ROOTS).refused_as(&["no socket"]),
            stopped("socket-below-run", ROOTS),
            by_design(
                "socket-outside-of-run",
                TASKS,
                "**Sockets that are not under `/run`.**",
            ),
        ],
        tests: &["guests::view::the_managers_of_the_host_are_out_of_reach"],
    },
    Threat {
        name: "abstract sockets of the host",
        who: "any task",
        stopped_by: "for root, a Landlock scope, from ABI 6 on",
        attempts: &[
            stopped("abstract-socket", ROOTS).since_abi(6),
            by_design(
                "abstract-socket",
                USERS,
                "Abstract sockets of the host's network namespace",
            ),
        ],
        tests: &[],
    },
    Threat {
        name: "files that are not unveiled are opened or moved",
        who: "any task",
        stopped_by: "Landlock",
        attempts: &[
            stopped("read-file", TASKS),
            stopped("list-directory", TASKS),
            stopped("reopen-descriptor", TASKS),
            stopped("write-file", TASKS),
            stopped("truncate-file", TASKS),
            stopped("create-file", TASKS),
            stopped("make-directory", TASKS),
            stopped("plant-link", TASKS),
            stopped("remove-file", TASKS),
            stopped("rename-file", TASKS),
            stopped("hard-link-file", TASKS),
            stopped("execute-file", TASKS),
            stopped("open-by-io-uring", TASKS).depends(SMALL),
            by_design("stat-file", TASKS, "**Names.**"),
            by_design("watch-directory", TASKS, "**Names.**"),
        ],
        tests: &["guests::jobs::what_is_not_unveiled_is_closed_to_everyone"],
    },
    Threat {
        name: "mode, owner, times or attributes of such files are changed",
        who: "root, and a file's owner",
        stopped_by: "the whole tree is read-only",
        attempts: &[
            stopped("change-mode", OWNERS),
            stopped("change-mode-by-descriptor", OWNERS),
            stopped("change-times", OWNERS),
            stopped("change-owner", ROOTS),
            stopped("give-capability", ROOTS),
            stopped("make-immutable", ROOTS),
        ],
        tests: &["guests::view::root_changes_nothing_of_the_host"],
    },
    Threat {
        name: "a setuid program gives other rights",
        who: "users",
        stopped_by: "no_new_privs; nosuid",
        attempts: &[stopped("setuid-program", USERS).refused_as(&["uid "])],
        tests: &[],
    },
    Threat {
        name: "devices",
        who: "any task",
        stopped_by: "Landlock grants no device node; nodev outside of `/dev`",
        attempts: &[
            stopped("block-device-node", ROOTS),
            stopped("character-device-node", ROOTS),
            stopped("device-outside-of-dev", TASKS),
            stopped("change-device-mode", ROOTS),
        ],
        tests: &[],
    },
    Threat {
        name: "a terminal is written to, typed on or taken",
        who: "any task",
        stopped_by: "a devpts of its own; Landlock; no CAP_SYS_ADMIN, no CAP_SYS_TTY_CONFIG",
        attempts: &[
            stopped("open-terminal-of-others", TASKS),
            stopped("type-on-terminal-of-others", ROOTS),
            stopped("take-terminal-of-others", ROOTS),
            stopped("open-console", ROOTS).depends(CONTAINER),
            stopped("paste-on-virtual-console", ROOTS).depends(CONTAINER),
            stopped("take-console-output", ROOTS)
                .depends(CONTAINER)
                .refused_as(NO_TERMINAL),
            stopped("hang-up-terminal", ROOTS),
            stopped("take-own-terminal", ROOTS).refused_as(NO_TERMINAL),
            by_design("type-on-own-terminal", TASKS, TERMINALS)
                .depends(LEGACY)
                .refused_as(NO_TERMINAL),
        ],
        tests: &[
            "guests::attacks::a_hostile_session_succeeds_in_nothing",
            "guests::exec::a_terminal_is_one_of_the_tasks_own",
        ],
    },
    Threat {
        name: "the kernel is asked as root",
        who: "root",
        stopped_by: "a bounding set of ordinary capabilities; masks in `/proc`",
        attempts: &[
            stopped("kernel-memory", ROOTS).depends(CONTAINER),
            stopped("load-module", ROOTS).depends(SMALL),
            stopped("load-kernel", ROOTS).depends(SMALL),
            stopped("reboot", ROOTS),
            stopped("port-access", ROOTS).depends(SMALL),
            stopped("bpf-program", ROOTS).depends(SMALL),
            stopped("watch-all-processors", ROOTS).depends(SMALL),
            stopped("watch-all-files", ROOTS).depends(SMALL),
            stopped("freeze-filesystem", ROOTS),
            stopped("name-host", ROOTS),
            stopped("open-by-handle", ROOTS),
            stopped("configure-network", PLAIN_ROOT),
            stopped("forge-device-event", PLAIN_ROOT),
            stopped("make-own-file-immutable", PLAIN_ROOT),
            by_design("make-own-file-immutable", CAPPED_ROOT, ALLOWED_CAPABILITIES),
            stopped("core-pattern", ROOTS).depends(CONTAINER),
            stopped("sysrq", ROOTS).depends(CONTAINER),
            by_design("read-packets", ROOTS, "root reads and sends packets"),
        ],
        tests: &["guests::view::a_task_has_namespaces_and_privileges_of_its_own"],
    },
    Threat {
        name: "mounts are changed, or read by new ones",
        who: "any task",
        stopped_by: "no CAP_SYS_ADMIN; Landlock; mounts locked in namespaces of users",
        attempts: &[
            stopped("lift-read-only", ROOTS),
            stopped("mount-filesystem", ROOTS),
            stopped("clone-tree", ROOTS),
            stopped("open-filesystem", ROOTS),
            stopped("new-mount-namespace", ROOTS),
            stopped("mount-in-user-namespace", TASKS).depends(SMALL),
            stopped("lift-read-only-in-user-namespace", TASKS).depends(SMALL),
        ],
        tests: &["guests::view::what_the_host_mounts_later_does_not_arrive"],
    },
    Threat {
        name: "a user namespace opens more of the kernel",
        who: "any task",
        stopped_by: "a system call filter, unless the operator or a writable `/proc` allows them",
        attempts: &[
            stopped("new-user-namespace", REFUSED_NAMESPACES).depends(SMALL),
            stopped("clone-user-namespace", REFUSED_NAMESPACES).depends(SMALL),
            stopped("clone3-user-namespace", REFUSED_NAMESPACES)
                .depends(SMALL)
                .refused_as(&["Function not implemented"]),
            by_design("new-user-namespace", ALLOWED_NAMESPACES, NAMESPACES).depends(SMALL),
        ],
        tests: &[
            "launch::seccomp::what_is_refused_is_refused_to_programs_of_32_bits_too",
            "guests::jobs::user_namespaces_are_for_whom_the_operator_allows_them_or_opens_proc",
        ],
    },
    Threat {
        name: "a process leaves the scope",
        who: "root",
        stopped_by: "a cgroup namespace, and no other cgroup in sight",
        attempts: &[
            stopped("clone-into-cgroup", ROOTS),
            stopped("join-cgroup", ROOTS),
        ],
        tests: &["guests::view::a_task_sees_its_own_processes_and_cgroup_only"],
    },
    Threat {
        name: "processes of others are seen, signalled or traced",
        who: "any task",
        stopped_by: "a PID namespace; Landlock domains",
        attempts: &[
            stopped("see-neighbour", TASKS),
            stopped("signal-neighbour", TASKS),
            stopped("trace-neighbour", TASKS).depends(YAMA),
        ],
        tests: &["guests::view::a_task_sees_its_own_processes_and_cgroup_only"],
    },
    Threat {
        name: "the supervisor is ended, limited or read, so that the end is not told",
        who: "any task",
        stopped_by: "it is PID 1, undumpable, in another group and outside of the domain",
        attempts: &[
            stopped("kill-supervisor", TASKS).refused_as(&["it goes on"]),
            stopped("stop-supervisor", TASKS).refused_as(&["it goes on"]),
            stopped("trace-supervisor", TASKS).depends(YAMA),
            stopped("limit-supervisor", TASKS),
            stopped("sacrifice-supervisor", TASKS),
            stopped("read-supervisor-environment", TASKS),
            stopped("read-supervisor-memory", TASKS).depends(YAMA),
            stopped("take-supervisor-descriptor", TASKS).depends(YAMA),
            stopped("enter-supervisor-namespace", ROOTS),
            by_design("slow-supervisor", ROOTS, "**When an end is told.**"),
        ],
        tests: &[
            "guests::view::the_agents_secrets_stay_with_the_agent",
            "guests::compat::no_file_of_a_task_s_own_forges_its_exit_code",
            "guests::attacks::around::the_end_is_told_when_a_crowd_takes_all_the_memory",
        ],
    },
    Threat {
        name: "a task takes precedence over the host",
        who: "root",
        stopped_by: "no CAP_SYS_NICE, no real-time limit, `oom_score_adj` from 0 up",
        attempts: &[
            stopped("real-time-priority", PLAIN_ROOT).depends(SMALL),
            stopped("shield-from-oom", ROOTS).depends(CONTAINER),
        ],
        tests: &["guests::surroundings::a_task_has_no_more_processes_than_the_operator_allows"],
    },
    Threat {
        name: "tasks meet in what the host has once",
        who: "any task",
        stopped_by: "own `/tmp`, `/dev/shm`, message queues, IPC namespace and session keyring; a system call filter",
        attempts: &[
            stopped("shared-tmp", TASKS),
            stopped("shared-memory", TASKS),
            stopped("shared-segment", TASKS),
            stopped("message-queue", TASKS),
            stopped("session-keyring", TASKS),
            by_design("user-keyring", ROOTS, KEYRINGS),
            stopped("persistent-keyring", TASKS)
                .depends(SMALL)
                .refused_as(&["Operation not supported"]),
        ],
        tests: &["guests::view::tasks_do_not_meet_in_tmp"],
    },
    Threat {
        name: "secrets of other allocations are read",
        who: "any task",
        stopped_by: "they are not mounted in the task's namespace",
        attempts: &[],
        tests: &["launch::view::mounts_of_other_allocations_are_let_go_of"],
    },
    Threat {
        name: "links planted in the task's directory are followed by root",
        who: "author, any task",
        stopped_by: "everything below it is opened without following links",
        attempts: &[stopped("rename-own-directory", TASKS)],
        tests: &[
            "launch::confine::a_link_planted_in_the_tasks_directory_does_not_lead_out_of_it",
            "launch::volumes::a_link_that_a_task_planted_does_not_lead_a_volume_out_of_its_directory",
            "launch::stdio::a_link_in_place_of_a_log_pipe_is_refused",
            "guests::attacks::around::a_directory_that_is_swapped_leads_no_session_out",
            "guests::attacks::around::a_directory_that_is_swapped_leads_no_start_out",
        ],
    },
    Threat {
        name: "a volume lies over what root's code reads",
        who: "author",
        stopped_by: "the driver's own directories are no destinations; nothing is looked up after it is laid",
        attempts: &[],
        tests: &[
            "guests::surroundings::a_volume_that_cannot_be_laid_fails_the_start",
            "launch::stdio::a_volume_is_not_taken_for_the_journal",
            "guests::attacks::around::root_s_code_reads_nothing_of_a_volume",
        ],
    },
    Threat {
        name: "the environment of a job reaches root's code",
        who: "author",
        stopped_by: "the helper starts with an empty one",
        attempts: &[],
        tests: &["guests::attacks::the_environment_of_a_job_is_not_the_helpers"],
    },
    Threat {
        name: "a session of `nomad alloc exec` is a way out",
        who: "any task",
        stopped_by: "its helper stays outside, undumpable, in another domain; it is given pipes, or what its own view has",
        attempts: &[stopped("change-input-mode", TASKS).refused_as(&["pipes of its own"])],
        tests: &[
            "guests::attacks::a_hostile_session_succeeds_in_nothing",
            "guests::exec::a_task_gets_nothing_out_of_sessions_in_it",
        ],
    },
];
