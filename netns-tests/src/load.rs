//! Load: requests that go on and on, and what became of each.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::space::Space;
use crate::wait::{rate, wait_for};

/// The most requests a second of each client, on a machine of usual speed: what is tested needs the
/// processor too.
const RATE: u32 = 200;

/// Clients, each with one request after the other.
#[derive(Debug)]
pub struct Load {
    seen: Arc<Seen>,
    clients: Vec<JoinHandle<()>>,
}

/// A request that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// When it was begun.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
    /// Why it failed.
    pub error: String,
}

#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    done: AtomicU64,
    answered: AtomicU64,
    served: Mutex<BTreeMap<String, u64>>,
    failures: Mutex<Vec<Failure>>,
}

impl Load {
    /// Starts a client in each of the spaces. A request gives the name of the server that answered.
    pub fn start<'a>(
        clients: impl IntoIterator<Item = &'a Space>,
        request: impl FnMut() -> io::Result<String> + Clone + Send + 'static,
    ) -> Self {
        let seen = Arc::<Seen>::default();
        let start = |space: &Space| {
            let (seen, request) = (Arc::clone(&seen), request.clone());
            space.spawn(move || seen.run(request))
        };
        let clients = clients.into_iter().map(start).collect();
        Self { seen, clients }
    }

    /// Waits until `count` more requests were answered.
    ///
    /// # Panics
    /// When that does not happen within [`DEADLINE`](crate::DEADLINE).
    #[track_caller]
    pub fn goes_on(&self, count: u64, what: &str) {
        let goal = self.seen.answered.load(Ordering::Relaxed) + count;
        wait_for(&format!("requests are answered: {what}"), || {
            self.seen.answered.load(Ordering::Relaxed) >= goal
        });
    }

    /// How many requests each server has answered.
    pub fn served(&self) -> BTreeMap<String, u64> {
        self.seen.served.lock().expect("no client panicked").clone()
    }

    /// The requests that have failed.
    pub fn failures(&self) -> Vec<Failure> {
        self.seen.failures.lock().expect("no client panicked").clone()
    }

    /// Ends the load; gives how many requests there were, and those that failed.
    pub fn finish(mut self) -> (u64, Vec<Failure>) {
        self.end();
        (self.seen.done.load(Ordering::Relaxed), self.failures())
    }

    fn end(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            // A client that panicked has told so.
            let _ = client.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Seen {
    fn run(&self, mut request: impl FnMut() -> io::Result<String>) {
        let pause = Duration::from_secs(1) / rate(RATE);
        while !self.stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            match request() {
                Ok(server) => {
                    let mut served = self.served.lock().expect("no client panicked");
                    *served.entry(server).or_default() += 1;
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    let (took, error) = (begun.elapsed(), error.to_string());
                    let mut failures = self.failures.lock().expect("no client panicked");
                    failures.push(Failure { begun, took, error });
                }
            }
            self.done.fetch_add(1, Ordering::Relaxed);
            thread::sleep(pause.saturating_sub(begun.elapsed()));
        }
    }
}
