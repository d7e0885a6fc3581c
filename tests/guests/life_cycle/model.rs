//! What a task does, what can happen to it, and what must come of that. Values only.

use std::fmt;

use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::select;

pub const INT: i32 = 2;
pub const KILL: i32 = 9;
const USR1: i32 = 10;
pub const TERM: i32 = 15;
pub const CONT: i32 = 18;
pub const STOP: i32 = 19;
const WINCH: i32 = 28;

/// By name, so that the driver has to know them.
const SIGNALS: [(&str, i32); 11] = [
    ("SIGTERM", TERM),
    ("SIGINT", INT),
    ("SIGHUP", 1),
    ("SIGQUIT", 3),
    ("SIGUSR1", USR1),
    ("SIGUSR2", 12),
    ("SIGKILL", KILL),
    ("SIGSTOP", STOP),
    ("SIGCONT", CONT),
    ("SIGWINCH", WINCH),
    ("SIGNONSENSE", 0),
];

/// The number of a signal that has one.
pub fn number(name: &str) -> Option<i32> {
    let mut known = SIGNALS.iter();
    known
        .find(|(other, number)| *other == name && *number != 0)
        .map(|(_, number)| *number)
}

/// What a task's command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sleeps,
    /// Ends with a code when it is told to.
    Waits(u8),
    EndsAtOnce(u8),
    IgnoresInt,
    /// Ends with a code at SIGUSR1.
    TrapsUsr1(u8),
    /// Has children that outlive it, and ends when it is told to.
    Forks(u8),
    /// Its start fails: nobody has the name of its user.
    Stranger,
}

impl Kind {
    /// `key` names its FIFO, and with `.up` the file that it makes once it is what it is.
    pub fn script(self, key: &str) -> String {
        let up = format!(": >local/{key}.up");
        let told = format!("read _ <>local/{key}");
        match self {
            Kind::Sleeps | Kind::Stranger => "exec sleep 600".into(),
            Kind::Waits(code) => format!("{up}; {told}; exit {code}"),
            Kind::EndsAtOnce(code) => format!("exit {code}"),
            Kind::IgnoresInt => format!("trap '' INT; {up}; exec sleep 600"),
            Kind::TrapsUsr1(code) => format!("trap 'exit {code}' USR1; {up}; {told}; exit 0"),
            Kind::Forks(code) => {
                format!("sleep 600 & (setsid sleep 600 &) ; {up}; {told}; exit {code}")
            }
        }
    }

    pub fn says_when_it_is_up(self) -> bool {
        !matches!(self, Kind::Sleeps | Kind::EndsAtOnce(_) | Kind::Stranger)
    }

    /// In its scope while it runs, the supervisor too.
    pub fn processes(self) -> usize {
        if matches!(self, Kind::Forks(_)) { 4 } else { 2 }
    }

    /// How it ends when it is told to.
    fn told(self) -> Option<End> {
        match self {
            Kind::Waits(code) | Kind::Forks(code) => Some(End::code(code)),
            Kind::TrapsUsr1(_) => Some(End::code(0)),
            _ => None,
        }
    }

    /// How it ends by a signal, if it does.
    fn effect(self, signal: i32) -> Option<End> {
        match (self, signal) {
            (_, CONT | STOP | WINCH) | (Kind::IgnoresInt, INT) => None,
            (Kind::TrapsUsr1(code), USR1) => Some(End::code(code)),
            _ => Some(End::signal(signal)),
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub code: i32,
    pub signal: i32,
    /// With a sentence for the operator.
    pub is_explained: bool,
}

impl End {
    pub const KILLED: End = End::signal(KILL);
    /// Nobody knows how.
    pub const UNKNOWN: End = End {
        code: 1,
        signal: 0,
        is_explained: true,
    };

    const fn signal(signal: i32) -> End {
        End {
            code: 128 + signal,
            signal,
            is_explained: false,
        }
    }

    fn code(code: u8) -> End {
        End {
            code: code.into(),
            signal: 0,
            is_explained: false,
        }
    }
}

/// Where a task is that was started and not destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// `coming` is what it will end by, one of these, as soon as it is not stopped (as by SIGSTOP) any more.
    Running {
        is_stopped: bool,
        coming: Vec<End>,
    },
    Ended {
        end: End,
        is_recorded: bool,
    },
    /// The driver refused to recover it, and knows it no longer.
    Lost,
}

/// A task as the driver must see it.
#[derive(Debug, Clone)]
pub struct Life {
    pub kind: Kind,
    pub state: State,
    /// Its supervisor is a child of this plugin process.
    pub is_ours: bool,
}

impl Life {
    pub fn started(kind: Kind) -> Life {
        let coming = match kind {
            Kind::EndsAtOnce(code) => vec![End::code(code)],
            _ => Vec::new(),
        };
        Life {
            kind,
            state: State::Running {
                is_stopped: false,
                coming,
            },
            is_ours: true,
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub fn is_known(&self) -> bool {
        self.state != State::Lost
    }

    pub fn can_be_recovered(&self) -> bool {
        match self.state {
            State::Running { .. } => true,
            State::Ended { is_recorded, .. } => is_recorded,
            State::Lost => false,
        }
    }

    /// The ends of which one must come now; nothing if it runs on.
    pub fn due(&self) -> Option<Vec<End>> {
        match &self.state {
            State::Running {
                is_stopped: false,
                coming,
            } if !coming.is_empty() => Some(coming.clone()),
            _ => None,
        }
    }

    pub fn ended(&mut self, end: End, is_recorded: bool) {
        self.state = State::Ended { end, is_recorded };
    }

    pub fn is_told(&mut self) {
        if let (Some(end), State::Running { coming, .. }) = (self.kind.told(), &mut self.state) {
            coming.push(end);
        }
    }

    /// The main process gets a signal.
    pub fn signalled(&mut self, signal: i32) {
        let effect = self.kind.effect(signal);
        let State::Running { is_stopped, coming } = &mut self.state else {
            return;
        };
        match signal {
            STOP => *is_stopped = true,
            CONT => *is_stopped = false,
            KILL => {
                // What has come to a stopped process is overtaken.
                if std::mem::take(is_stopped) {
                    coming.clear();
                }
                coming.push(End::KILLED);
            }
            _ => coming.extend(effect),
        }
    }

    /// The same, maybe before its command has become what it is.
    pub fn signalled_early(&mut self, signal: i32) {
        if let State::Running { coming, .. } = &mut self.state {
            coming.push(End::signal(signal));
        }
    }

    /// Its whole scope is stopped by systemd: SIGTERM to all, then SIGCONT.
    pub fn stopped_by_systemd(&mut self) {
        self.signalled(TERM);
        self.signalled(CONT);
    }

    /// A StopTask that kills soon: one that hears the signal may or may not come to its own end before.
    pub fn stopped(&mut self, signal: i32, patience: Patience) {
        self.signalled(signal);
        if let State::Running { is_stopped, coming } = &mut self.state
            && (*is_stopped || coming.is_empty() || patience == Patience::None)
        {
            *is_stopped = false;
            coming.push(End::KILLED);
        }
    }

    /// Whether a StopTask with this signal has nobody to kill in the end.
    pub fn would_end_by(&self, signal: i32) -> bool {
        let mut life = self.clone();
        life.signalled(signal);
        life.due().is_some()
    }
}

/// How long a StopTask waits before it kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    None,
    /// Where the signal ends the task; else it is short.
    Ample,
}

/// A call that does not look at what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Stop,
    Kill,
    Destroy,
}

/// What happens to a task while there is neither plugin nor agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    Nothing,
    Tell,
    KillMain,
    KillSupervisor,
    StopScope,
}

/// What happens to one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// StartTask; of an id that there is, or was, if `again`.
    Start {
        kind: Kind,
        again: bool,
    },
    /// Two StartTask of one id at once.
    StartTwice(Kind),
    /// Another call about it during StartTask, and once more after it.
    StartDuring(Kind, Call),
    Signal(&'static str),
    Tell,
    Stop(&'static str, Patience),
    Destroy {
        force: bool,
    },
    /// Two calls at once.
    Together(Call, Call),
    /// That many WaitTask, answered when it ends.
    Wait(u8),
    /// From outside.
    Strike(Blow),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Task(usize, Deed),
    /// To each task its own, all at once.
    Each([Deed; TASKS_MAX]),
    /// While neither plugin nor agent is there.
    Unseen(usize, Blow),
    /// The plugin is killed that many milliseconds after the call.
    StartThroughCrash(usize, Kind, u64),
    CallThroughCrash(usize, Call, u64),
    RestartPlugin,
    KillPlugin,
    CrashAgent,
}

/// What is done one after the other, to that many tasks.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub tasks: usize,
    pub ops: Vec<Op>,
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tasks:", self.tasks)?;
        self.ops.iter().try_for_each(|op| write!(f, "\n  {op:?}"))
    }
}

pub const TASKS_MAX: usize = 4;

pub fn sequences() -> impl Strategy<Value = Sequence> {
    let ops = proptest::collection::vec(op(), 6..24);
    (1..=TASKS_MAX, ops).prop_map(|(tasks, ops)| Sequence { tasks, ops })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => (task(), deed()).prop_map(|(task, deed)| Op::Task(task, deed)),
        4 => [deed(), deed(), deed(), deed()].prop_map(Op::Each),
        2 => (task(), blow()).prop_map(|(task, blow)| Op::Unseen(task, blow)),
        2 => (task(), kind(), 0..20_u64)
            .prop_map(|(task, kind, after)| Op::StartThroughCrash(task, kind, after)),
        2 => (task(), call(), 0..8_u64)
            .prop_map(|(task, call, after)| Op::CallThroughCrash(task, call, after)),
        1 => Just(Op::RestartPlugin),
        1 => Just(Op::KillPlugin),
        1 => Just(Op::CrashAgent),
    ]
}

fn task() -> impl Strategy<Value = usize> {
    0..TASKS_MAX
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        12 => (kind(), any::<bool>()).prop_map(|(kind, again)| Deed::Start { kind, again }),
        1 => kind().prop_map(Deed::StartTwice),
        1 => (kind(), call()).prop_map(|(kind, call)| Deed::StartDuring(kind, call)),
        5 => signal().prop_map(Deed::Signal),
        3 => Just(Deed::Tell),
        3 => (signal(), patience()).prop_map(|(signal, patience)| Deed::Stop(signal, patience)),
        4 => any::<bool>().prop_map(|force| Deed::Destroy { force }),
        1 => (call(), call()).prop_map(|(one, other)| Deed::Together(one, other)),
        2 => (1..=3_u8).prop_map(Deed::Wait),
        5 => blow().prop_map(Deed::Strike),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        2 => Just(Kind::Sleeps),
        3 => any::<u8>().prop_map(Kind::Waits),
        3 => any::<u8>().prop_map(Kind::EndsAtOnce),
        2 => Just(Kind::IgnoresInt),
        2 => any::<u8>().prop_map(Kind::TrapsUsr1),
        2 => any::<u8>().prop_map(Kind::Forks),
        1 => Just(Kind::Stranger),
    ]
}

fn signal() -> impl Strategy<Value = &'static str> {
    select(&SIGNALS[..]).prop_map(|(name, _)| name)
}

fn patience() -> impl Strategy<Value = Patience> {
    select(&[Patience::None, Patience::Ample][..])
}

fn call() -> impl Strategy<Value = Call> {
    select(&[Call::Stop, Call::Kill, Call::Destroy][..])
}

fn blow() -> impl Strategy<Value = Blow> {
    select(
        &[
            Blow::Nothing,
            Blow::Tell,
            Blow::KillMain,
            Blow::KillSupervisor,
            Blow::StopScope,
        ][..],
    )
}
