//! What may go wrong between an agent and its store: in a store that does it, and in a proxy
//! before a real etcd.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use netctl::store::{
    Entry, Event, Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch,
};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

/// How an agent's way to its store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Now and then something goes wrong.
    Fair,
    /// Nothing gets through.
    Away,
    /// Leases are not kept.
    Forgetful,
}

/// How often which fault happened.
#[derive(Debug, Default)]
pub struct Tally {
    pub before: AtomicU64,
    pub after: AtomicU64,
    pub watches: AtomicU64,
    pub cut: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A store that fails: before a change is done, after it was done, in its watches and its leases.
pub struct Faulty {
    pub inner: Arc<dyn Store>,
    pub dice: Mutex<StdRng>,
    pub weather: watch::Receiver<Weather>,
    pub tally: Arc<Tally>,
}

impl Faulty {
    fn roll(&self, chance: f64) -> bool {
        self.dice.lock().unwrap().random_bool(chance)
    }

    fn lost(&self, reason: &str) -> StoreError {
        StoreError::Unreachable { store: self.inner.name(), reason: reason.to_owned() }
    }

    async fn delay(&self) {
        if self.roll(0.02) {
            let millis = self.dice.lock().unwrap().random_range(1..10);
            tokio::time::sleep(Duration::from_millis(millis)).await;
        } else if self.roll(0.2) {
            tokio::task::yield_now().await;
        }
    }

    async fn before(&self) -> Result<(), StoreError> {
        self.delay().await;
        if *self.weather.borrow() == Weather::Away || self.roll(0.003) {
            count(&self.tally.before);
            // Who asks again at once is not answered at once.
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Err(self.lost("as the test wants, before"));
        }
        Ok(())
    }

    async fn after<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        self.delay().await;
        if answer.is_ok() && (*self.weather.borrow() == Weather::Away || self.roll(0.005)) {
            count(&self.tally.after);
            return Err(self.lost("as the test wants, after"));
        }
        answer
    }
}

#[async_trait]
impl Store for Faulty {
    fn name(&self) -> String {
        self.inner.name()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.before().await?;
        let found = self.inner.get(key).await;
        self.delay().await;
        found
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.before().await?;
        let found = self.inner.list(prefix).await;
        self.delay().await;
        found
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        self.before().await?;
        self.after(self.inner.commit(transaction).await).await
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        let (reports, watch) = mpsc::channel(4);
        let watching = Watching {
            inner: self.inner.clone(),
            prefix: prefix.to_owned(),
            position: from,
            dice: StdRng::from_rng(&mut *self.dice.lock().unwrap()),
            weather: self.weather.clone(),
            tally: self.tally.clone(),
        };
        tokio::spawn(async move {
            let receiver = reports.clone();
            tokio::select! {
                () = watching.run(reports) => {}
                () = receiver.closed() => {}
            }
        });
        watch
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.before().await?;
        self.after(self.inner.grant(ttl).await).await
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.before().await?;
        if *self.weather.borrow() == Weather::Forgetful {
            return Err(self.lost("as the test wants, no lease is kept"));
        }
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.before().await?;
        self.after(self.inner.revoke(lease).await).await
    }
}

/// A watch that lags, and that is lost now and then and starts over.
struct Watching {
    inner: Arc<dyn Store>,
    prefix: String,
    position: Option<Revision>,
    dice: StdRng,
    weather: watch::Receiver<Weather>,
    tally: Arc<Tally>,
}

impl Watching {
    async fn run(mut self, reports: mpsc::Sender<Event>) {
        loop {
            let mut events = self.inner.watch(&self.prefix, self.position);
            while let Some(event) = self.next(&mut events).await {
                if let Event::Snapshot(Listing { revision, .. }) | Event::Changes(revision, _) = &event {
                    self.position = Some(*revision);
                }
                if reports.send(event).await.is_err() {
                    return;
                }
            }
            count(&self.tally.watches);
            let lost = Event::Lost("as the test wants".to_owned());
            let fair = self.weather.wait_for(|weather| *weather != Weather::Away);
            if reports.send(lost).await.is_err() || fair.await.is_err() {
                return;
            }
            match self.position.filter(|_| self.dice.random_bool(0.5)) {
                // Nothing is missed, and that is said.
                Some(position) => {
                    drop(reports.send(Event::Changes(position, Vec::new())).await);
                }
                None => self.position = None,
            }
        }
    }

    /// The next report, late; `None`: the watch is lost.
    async fn next(&mut self, events: &mut Watch) -> Option<Event> {
        let event = tokio::select! {
            event = events.recv() => event,
            away = self.weather.wait_for(|weather| *weather == Weather::Away) => {
                drop(away);
                return None;
            }
        };
        if self.dice.random_bool(0.05) {
            let late = self.dice.random_range(1..40);
            tokio::time::sleep(Duration::from_millis(late)).await;
        }
        if self.dice.random_bool(0.001) { None } else { event }
    }
}

/// A way to an etcd, which delays what passes, cuts connections and refuses them.
pub struct Proxy {
    pub port: u16,
    task: AbortHandle,
}

impl Proxy {
    pub async fn start(
        server: u16,
        dice: StdRng,
        weather: watch::Receiver<Weather>,
        tally: Arc<Tally>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let task = tokio::spawn(relay(listener, port, server, dice, weather, tally)).abort_handle();
        Ok(Self { port, task })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(
    listener: TcpListener,
    port: u16,
    server: u16,
    mut dice: StdRng,
    mut weather: watch::Receiver<Weather>,
    tally: Arc<Tally>,
) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        if *weather.borrow_and_update() == Weather::Away {
            // Who is connected is cut off, who comes is refused.
            listener = None;
            connections.shutdown().await;
        } else if listener.is_none() {
            listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.ok();
        }
        let Some(open) = &listener else {
            if weather.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            accepted = open.accept() => if let Ok((stream, _)) = accepted {
                let dice = StdRng::from_rng(&mut dice);
                connections.spawn(pass(stream, server, dice, tally.clone()));
            },
            changed = weather.changed() => if changed.is_err() { return },
        }
    }
}

/// One connection, until an end closes it or it is cut.
async fn pass(stream: TcpStream, server: u16, mut dice: StdRng, tally: Arc<Tally>) {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, server));
    let Ok(upstream) = TcpStream::connect(to).await else { return };
    let (from_client, to_client) = stream.into_split();
    let (from_server, to_server) = upstream.into_split();
    let other = StdRng::from_rng(&mut dice);
    let cut = tokio::select! {
        cut = pump(from_client, to_server, dice) => cut,
        cut = pump(from_server, to_client, other) => cut,
    };
    if cut {
        count(&tally.cut);
    }
}

/// Passes bytes on, in one direction. `true`: it is cut, and what was just read is lost.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut dice: StdRng) -> bool {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return false };
        if dice.random_bool(0.01) {
            tokio::time::sleep(Duration::from_millis(dice.random_range(1..15))).await;
        }
        if dice.random_bool(0.0005) {
            return true;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return false;
        }
    }
}
