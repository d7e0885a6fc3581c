//! A bus that is slow, and one that loses an answer: between the driver and the real one stands a relay, which does as told.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::guest::{Case, Context};
use harness::leaks::Ground;
use harness::nomad::{Agent, Config};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;

use crate::case;
use crate::nomad::{Job, Scope};

pub const CASES: &[Case] = &[
    case!(Both, Ours, a_start_whose_answer_is_lost_is_no_failure),
    case!(
        Speed,
        Ours,
        a_start_that_never_reached_systemd_is_tried_again
    ),
    case!(Speed, Ours, a_stop_whose_answer_is_lost_is_done),
    case!(Speed, Ours, a_slow_bus_only_delays),
];

const BUS: &str = "/run/dbus/system_bus_socket";

/// What the relay does with what the driver says.
#[derive(Debug, Clone, Copy)]
enum Order {
    Pass,
    /// Passes it on late.
    Late(Duration),
    /// Passes on the call of this name, and hangs up before its answer; then passes everything.
    LoseAnswerOf(&'static str),
    /// Hangs up instead of passing on the call of this name; then passes everything.
    LoseCallOf(&'static str),
}

struct Relay {
    _dir: TempDir,
    config: Config,
    order: Arc<Mutex<Order>>,
}

impl Relay {
    fn new() -> Result<Relay> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("bus");
        let listener = UnixListener::bind(&socket)?;
        let order = Arc::new(Mutex::new(Order::Pass));
        let orders = order.clone();
        thread::spawn(move || {
            for driver in listener.incoming().flatten() {
                let Ok(bus) = UnixStream::connect(BUS) else {
                    continue;
                };
                let (Ok(from), Ok(to)) = (bus.try_clone(), driver.try_clone()) else {
                    continue;
                };
                let orders = orders.clone();
                thread::spawn(move || pump(&driver, &bus, &orders));
                thread::spawn(move || pump(&from, &to, &Mutex::new(Order::Pass)));
            }
        });
        let address = format!("unix:path={}", socket.display());
        Ok(Relay {
            config: Config {
                env: vec![("DBUS_SYSTEM_BUS_ADDRESS".into(), address)],
                ..Config::default()
            },
            _dir: dir,
            order,
        })
    }

    fn order(&self, order: Order) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = order;
    }

    /// Whether the order was carried out.
    fn is_passing(&self) -> bool {
        let order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(*order, Order::Pass)
    }
}

/// Until one side hangs up, or the order says so.
fn pump(from: &UnixStream, to: &UnixStream, order: &Mutex<Order>) {
    while let Some((bytes, descriptors)) = receive(from) {
        let now = {
            let mut order = order.lock().unwrap_or_else(PoisonError::into_inner);
            let now = *order;
            if let Order::LoseAnswerOf(call) | Order::LoseCallOf(call) = now {
                if names(&bytes, call) {
                    *order = Order::Pass;
                } else {
                    continue_with(to, &bytes, &descriptors);
                    continue;
                }
            }
            now
        };
        match now {
            Order::Late(delay) => thread::sleep(delay),
            Order::LoseCallOf(_) => break,
            _ => {}
        }
        // No answer can overtake the end of this direction.
        if matches!(now, Order::LoseAnswerOf(_)) {
            let _ = from.shutdown(std::net::Shutdown::Write);
        }
        continue_with(to, &bytes, &descriptors);
        if matches!(now, Order::LoseAnswerOf(_)) {
            // systemd has it by the time the bus sees us go.
            thread::sleep(Duration::from_millis(300));
            break;
        }
    }
    for side in [from, to] {
        let _ = side.shutdown(std::net::Shutdown::Both);
    }
}

fn names(bytes: &[u8], call: &str) -> bool {
    bytes
        .windows(call.len())
        .any(|window| window == call.as_bytes())
}

fn receive(from: &UnixStream) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 64 * 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(from, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    bytes.truncate(received.bytes);
    (received.bytes > 0).then_some((bytes, descriptors))
}

/// Whoever has gone does not get it.
fn continue_with(to: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let slices = [IoSlice::new(&bytes[sent..])];
        match sendmsg(to, &slices, &mut control, SendFlags::NOSIGNAL) {
            Ok(length) => sent += length,
            Err(_) => return,
        }
    }
}

fn a_start_whose_answer_is_lost_is_no_failure(context: &Context) -> Result<()> {
    context.block_on(async {
        let relay = Relay::new()?;
        let agent = Agent::start(context.driver(), relay.config.clone()).await?;
        relay.order(Order::LoseAnswerOf("StartTransientUnit"));
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        ensure!(relay.is_passing(), "no answer was lost");
        let scope = Scope::of(alloc.only_task()?)?;
        ensure!(scope.processes()?.len() == 2);
        alloc.stop().await?;
        scope.expect_gone()?;
        agent.finish().await
    })
}

fn a_start_that_never_reached_systemd_is_tried_again(context: &Context) -> Result<()> {
    context.block_on(async {
        let relay = Relay::new()?;
        let agent = Agent::start(context.driver(), relay.config.clone()).await?;
        let ground = Ground::survey()?;
        let job = Job::command("sleep", &["600"]).text();
        relay.order(Order::LoseCallOf("StartTransientUnit"));
        let alloc = agent.run(&job).await?;
        ensure!(relay.is_passing(), "no call was lost");
        let scope = Scope::of(alloc.only_task()?)?;
        ensure!(scope.processes()?.len() == 2);
        alloc.stop().await?;
        let left = ground.left()?;
        ensure!(left.is_empty(), "{left:?}");
        agent.finish().await
    })
}

/// StopUnit is for an empty scope, which systemd collects by itself as well.
fn a_stop_whose_answer_is_lost_is_done(context: &Context) -> Result<()> {
    context.block_on(async {
        let relay = Relay::new()?;
        let agent = Agent::start(context.driver(), relay.config.clone()).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let scope = Scope::of(alloc.only_task()?)?;
        let exit = alloc.only_task()?.stop().await?;
        ensure!((exit.code, exit.signal) == (130, 2), "{exit:?}");
        relay.order(Order::LoseAnswerOf("StopUnit"));
        alloc.stop().await?;
        crate::nomad::until("the scope is gone", || scope.expect_gone().ok()).await?;
        relay.order(Order::Pass);
        agent.finish().await
    })
}

fn a_slow_bus_only_delays(context: &Context) -> Result<()> {
    context.block_on(async {
        let relay = Relay::new()?;
        let agent = Agent::start(context.driver(), relay.config.clone()).await?;
        relay.order(Order::Late(Duration::from_secs(2)));
        let begun = Instant::now();
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        ensure!(begun.elapsed() > Duration::from_secs(2), "it was not slow");
        let scope = Scope::of(alloc.only_task()?)?;
        ensure!(scope.processes()?.len() == 2);
        alloc.stop().await?;
        scope.expect_gone()?;
        agent.finish().await
    })
}
