//! Says what is going on whenever it takes longer than people like to wait without a word.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const STILL_AT_IT: Duration = Duration::from_secs(15);

/// Announces a step, reminds of it while it lasts, and says how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    println!("{what} ...");
    let begun = Instant::now();
    let reminder = Reminder::start(what.to_owned(), begun);
    let result = work();
    drop(reminder);
    if result.is_ok() {
        println!("{what}: done ({:.1} s)", begun.elapsed().as_secs_f64());
    }
    result
}

struct Reminder {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Reminder {
    fn start(what: String, begun: Instant) -> Reminder {
        let (stop, stopped) = channel();
        let thread = thread::spawn(move || {
            while stopped.recv_timeout(STILL_AT_IT) == Err(RecvTimeoutError::Timeout) {
                println!(
                    "{what}: still at it ({:.0} s)",
                    begun.elapsed().as_secs_f64()
                );
            }
        });
        Reminder {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Reminder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
