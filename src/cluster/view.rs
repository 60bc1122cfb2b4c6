//! One node's view of the cluster: watches on the store, folded into immutable snapshots.
//!
//! One watch covers what every node needs (`base/`), one more each network that this node uses. A
//! task owns them; the others read the latest [`Published`] or wait for the next.
//!
//! Nothing is believed that would take things away until the store has proved to be the one this
//! node joined: an emptied store changes nothing here but the health.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::{Cluster, ClusterError, keys};
use crate::cluster::endpoints::{block, holder, lock};
use crate::ipam::Ledger;
use crate::model::snapshot::Members;
use crate::model::{Name, Network, NetworkId, NodeName, Snapshot, Versioned};
use crate::store::{Backoff, Change, Entry, Event, Listing, Revision, schema};

/// How long a network that no endpoint uses any more is kept, so that a container that is replaced
/// finds everything in place.
const LINGER: Duration = Duration::from_secs(30);
/// How often it is looked for such networks.
const TICK: Duration = Duration::from_secs(5);
/// How the view stands to the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Health {
    /// Nothing was heard yet.
    #[default]
    Starting,
    /// The view follows the store.
    Current,
    /// The store cannot be reached: the view is as it was then. Why is said.
    Lost(String),
    /// The store is not the one this node belongs to: the view stays as it was before.
    Replaced,
}

/// The latest that is known.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// The state of the cluster.
    pub snapshot: Snapshot,
    /// Whether everything that this node uses has been heard of once: before that, what the
    /// snapshot lacks may well exist.
    pub complete: bool,
    /// How current it is.
    pub health: Health,
}

/// A handle on the view.
#[derive(Clone)]
pub struct View {
    published: watch::Receiver<Published>,
    uses: mpsc::Sender<Use>,
}

/// A use of a network: as long as it lives, the network's members are followed.
#[derive(Debug)]
pub struct Using {
    _alive: oneshot::Sender<()>,
}

struct Use {
    network: NetworkId,
    alive: oneshot::Receiver<()>,
    ready: oneshot::Sender<Result<(), String>>,
}

impl View {
    /// Starts to follow the store, for the networks on which this node has endpoints at once.
    pub fn start(cluster: Arc<Cluster>, node: NodeName, networks: Vec<NetworkId>) -> Self {
        let (publisher, published) = watch::channel(Published::default());
        let (uses, requests) = mpsc::channel(64);
        tokio::spawn(Follower::new(cluster, node, publisher).run(networks, requests));
        Self { published, uses }
    }

    /// The latest that is known.
    pub fn latest(&self) -> Published {
        self.published.borrow().clone()
    }

    /// A receiver of what is published from now on.
    pub fn subscribe(&self) -> watch::Receiver<Published> {
        self.published.clone()
    }

    /// Follows a network's members, and waits until the network and they are known.
    ///
    /// # Errors
    /// Why they cannot be known now: the store is lost, or the network has been removed.
    pub async fn use_network(&self, network: NetworkId) -> Result<Using, String> {
        let ended = |_| "the view of the cluster has ended".to_owned();
        let (alive_sender, alive) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        self.uses.send(Use { network, alive, ready }).await.map_err(|_| ended(()))?;
        is_ready.await.map_err(|_| ended(()))??;
        Ok(Using { _alive: alive_sender })
    }
}

type Networks = BTreeMap<NetworkId, Arc<Versioned<Network>>>;

/// Which watch an event came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Base,
    Members(NetworkId),
}

/// An event and the generation of the watches it belongs to: those of older ones are dropped.
type Tagged = (Source, u64, Event);

/// A network whose members are followed.
struct Followed {
    watch: AbortHandle,
    /// Whether its first snapshot has come.
    known: bool,
    waiting: Vec<oneshot::Sender<Result<(), String>>>,
    uses: Vec<oneshot::Receiver<()>>,
    unused_since: Option<Instant>,
}

struct Follower {
    cluster: Arc<Cluster>,
    node: NodeName,
    publisher: watch::Sender<Published>,
    now: Published,
    followed: BTreeMap<NetworkId, Followed>,
    base_known: bool,
    generation: u64,
    backoff: Backoff,
    events: (mpsc::Sender<Tagged>, mpsc::Receiver<Tagged>),
}

impl Follower {
    fn new(cluster: Arc<Cluster>, node: NodeName, publisher: watch::Sender<Published>) -> Self {
        Self {
            cluster,
            node,
            publisher,
            now: Published::default(),
            followed: BTreeMap::new(),
            base_known: false,
            generation: 0,
            backoff: Backoff::default(),
            events: mpsc::channel(256),
        }
    }

    async fn run(mut self, networks: Vec<NetworkId>, mut requests: mpsc::Receiver<Use>) {
        let mut base = self.watch(Source::Base, Duration::ZERO);
        for network in networks {
            self.follow(network);
        }
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                Some(event) = self.events.1.recv() => {
                    let mut restart = self.take(event).await;
                    // A burst is one publication. What comes behind one that was not taken makes no
                    // sense without it: all of it comes again.
                    while restart.is_none() && let Ok(event) = self.events.1.try_recv() {
                        restart = self.take(event).await;
                    }
                    if let Some(pause) = restart {
                        base.abort();
                        base = self.watch_anew(pause);
                    }
                }
                request = requests.recv() => match request {
                    Some(request) => self.begin_use(request),
                    None => break,
                },
                _ = tick.tick() => self.drop_unused(),
            }
            self.publish();
        }
        base.abort();
        for followed in self.followed.values() {
            followed.watch.abort();
        }
    }

    fn publish(&mut self) {
        self.now.complete |= self.base_known && self.followed.values().all(|followed| followed.known);
        if self.now.health == Health::Starting && self.now.complete {
            self.now.health = Health::Current;
        }
        self.publisher.send_replace(self.now.clone());
        for (network, followed) in &mut self.followed {
            let outcome = match &self.now.health {
                _ if followed.known && self.now.snapshot.networks.contains_key(network) => Ok(()),
                Health::Lost(reason) => Err(reason.clone()),
                Health::Replaced => Err("the store is not the one this node belongs to".to_owned()),
                Health::Starting | Health::Current => continue,
            };
            for waiting in followed.waiting.drain(..) {
                // Who asked may have given up.
                let _ = waiting.send(outcome.clone());
            }
        }
    }

    fn watch(&self, source: Source, pause: Duration) -> AbortHandle {
        let prefix = match source {
            Source::Base => keys::BASE.to_owned(),
            Source::Members(network) => keys::members(network),
        };
        let store = Arc::clone(self.cluster.store());
        let (sender, generation) = (self.events.0.clone(), self.generation);
        let forward = async move {
            tokio::time::sleep(pause).await;
            let mut events = store.watch(&prefix, None);
            while let Some(event) = events.recv().await {
                if sender.send((source, generation, event)).await.is_err() {
                    return;
                }
            }
        };
        tokio::spawn(forward).abort_handle()
    }

    /// Watches everything from the beginning: what was missed comes as snapshots.
    fn watch_anew(&mut self, pause: Duration) -> AbortHandle {
        self.generation += 1;
        let networks: Vec<NetworkId> = self.followed.keys().copied().collect();
        for network in networks {
            let watch = self.watch(Source::Members(network), pause);
            if let Some(followed) = self.followed.get_mut(&network) {
                followed.watch.abort();
                followed.watch = watch;
            }
        }
        self.watch(Source::Base, pause)
    }

    fn follow(&mut self, network: NetworkId) {
        if !self.followed.contains_key(&network) {
            let watch = self.watch(Source::Members(network), Duration::ZERO);
            let (waiting, uses) = (Vec::new(), Vec::new());
            self.followed
                .insert(network, Followed { watch, known: false, waiting, uses, unused_since: None });
        }
    }

    fn begin_use(&mut self, request: Use) {
        self.follow(request.network);
        if let Some(followed) = self.followed.get_mut(&request.network) {
            followed.unused_since = None;
            followed.uses.push(request.alive);
            followed.waiting.push(request.ready);
        }
    }

    /// Stops following networks that have had no local endpoint and no use for a while.
    fn drop_unused(&mut self) {
        if self.now.health != Health::Current {
            return; // What was attached meanwhile may not be seen.
        }
        let now = Instant::now();
        let mut dropped = Vec::new();
        for (network, followed) in &mut self.followed {
            followed.uses.retain_mut(|alive| {
                matches!(alive.try_recv(), Err(oneshot::error::TryRecvError::Empty))
            });
            let members = self.now.snapshot.members.get(network);
            let local = members.is_some_and(|m| m.endpoints.values().any(|e| e.node == self.node));
            if local || !followed.uses.is_empty() || !followed.known {
                followed.unused_since = None;
            } else if now.duration_since(*followed.unused_since.get_or_insert(now)) >= LINGER {
                dropped.push(*network);
            }
        }
        for network in dropped {
            self.forget(network);
        }
    }

    fn forget(&mut self, network: NetworkId) {
        if let Some(followed) = self.followed.remove(&network) {
            followed.watch.abort();
            self.now.snapshot.members.remove(&network);
            // At once: what is followed anew from here on begins with nothing.
            let ledger = self.cluster.forget(network);
            let cluster = Arc::clone(&self.cluster);
            tokio::spawn(async move {
                // What stays is taken over by who needs it, once it is empty.
                if let Some(ledger) = ledger
                    && let Err(error) = cluster.leave_blocks(network, &ledger).await
                {
                    warn!(%network, %error, "blocks of addresses not given back");
                }
                if let Err(error) = cluster.withdraw_acks(network).await {
                    warn!(%network, %error, "acknowledgements of drains not withdrawn");
                }
            });
        }
    }

    /// Takes one event. A pause: everything must be watched anew behind it, because the store has come back
    /// as the one we know after it had been another, or because it was lost before it could be asked
    /// which it is.
    async fn take(&mut self, (source, generation, event): Tagged) -> Option<Duration> {
        if generation != self.generation {
            return None;
        }
        if let Event::Lost(reason) = event {
            self.lose(format!("{}: {reason}", self.cluster.store().name()));
            return None;
        }
        let was = self.now.health.clone();
        if takes_away(&event) || was == Health::Replaced {
            match self.cluster.verify().await {
                Ok(()) => self.backoff.reset(),
                Err(ClusterError::Replaced(_)) => {
                    if was != Health::Replaced {
                        warn!(
                            store = self.cluster.store().name(),
                            "store emptied or exchanged: what runs goes on"
                        );
                    }
                    self.now.health = Health::Replaced;
                    return None;
                }
                // The event comes again, with the first snapshots.
                Err(error) => {
                    self.lose(error.to_string());
                    return Some(self.backoff.pause());
                }
            }
        }
        match was {
            Health::Replaced => {
                info!("store is the known one again");
                self.now.health = if self.now.complete { Health::Current } else { Health::Starting };
                return Some(Duration::ZERO);
            }
            Health::Lost(_) => {
                info!("store is back");
                self.now.health = Health::Current;
            }
            Health::Starting | Health::Current => {}
        }
        match source {
            Source::Base => self.take_base(event),
            Source::Members(network) => self.take_members(network, event),
        }
        None
    }

    fn lose(&mut self, reason: String) {
        // Before the first complete view there is nothing that could be out of date.
        if self.now.health == Health::Current {
            warn!(reason, "store lost: what runs goes on");
            self.now.health = Health::Lost(reason);
        }
    }

    fn take_base(&mut self, event: Event) {
        let snapshot = &mut self.now.snapshot;
        match event {
            Event::Snapshot(Listing { entries, .. }) => {
                let before = std::mem::take(snapshot);
                snapshot.members = before.members;
                for (key, entry) in entries {
                    put_base(snapshot, &key, &entry, &before.networks);
                }
                self.base_known = true;
            }
            Event::Changes(_, changes) => {
                for change in changes {
                    match change {
                        Change::Put(key, entry) => {
                            let known = snapshot.networks.clone();
                            put_base(snapshot, &key, &entry, &known);
                        }
                        Change::Delete(key) => delete_base(snapshot, &key),
                    }
                }
            }
            Event::Lost(_) => {}
        }
        let networks = self.now.snapshot.networks.clone();
        // One that somebody waits for may only not have been seen yet.
        let gone = self.followed.iter().filter(|(network, followed)| {
            followed.waiting.is_empty() && !networks.contains_key(network)
        });
        for network in gone.map(|(network, _)| *network).collect::<Vec<_>>() {
            if !self.now.snapshot.unreadable.contains(&network) {
                self.forget(network);
            }
        }
    }

    fn take_members(&mut self, network: NetworkId, event: Event) {
        let Some(followed) = self.followed.get_mut(&network) else { return };
        let prefix = keys::members(network);
        let members = Arc::make_mut(self.now.snapshot.members.entry(network).or_default());
        let ledger = self.cluster.ledger(network);
        let mut ledger = lock(&ledger);
        self.cluster.note_news(network, &event);
        let mut fold = Fold { members, ledger: &mut ledger };
        match event {
            Event::Snapshot(Listing { revision, entries }) => {
                *fold.members = Members { revision: revision.0, ..Members::default() };
                fold.ledger.reset([], []);
                fold.ledger.forget_reservations();
                fold.ledger.set_revision(revision.0);
                for (key, entry) in entries {
                    fold.put(key.strip_prefix(&prefix).unwrap_or(&key), &entry);
                }
                followed.known = true;
            }
            Event::Changes(Revision(revision), changes) => {
                fold.members.revision = revision;
                fold.ledger.set_revision(revision);
                changes.iter().for_each(|change| fold.take(&prefix, change));
            }
            Event::Lost(_) => {}
        }
    }
}

/// Where what the store has of a network's members goes.
pub(super) struct Fold<'a> {
    pub(super) members: &'a mut Members,
    pub(super) ledger: &'a mut Ledger,
}

/// Takes over a change of a network's members into what is known of its addresses.
pub(super) fn fold(ledger: &mut Ledger, network: NetworkId, change: &Change) {
    Fold { members: &mut Members::default(), ledger }.take(&keys::members(network), change);
}

impl Fold<'_> {
    fn take(&mut self, prefix: &str, change: &Change) {
        match change {
            Change::Put(key, entry) => self.put(key.strip_prefix(prefix).unwrap_or(key), entry),
            Change::Delete(key) => self.delete(key.strip_prefix(prefix).unwrap_or(key)),
        }
    }

    /// Takes a value; its key is without the members' prefix.
    pub(super) fn put(&mut self, key: &str, entry: &Entry) {
        if let Some(id) = key.strip_prefix("endpoints/").and_then(|id| id.parse().ok()) {
            if let Some(endpoint) = read(key, entry) {
                self.members.endpoints.insert(id, Arc::new(endpoint.value));
            }
        } else if let Some(address) = key.strip_prefix("addresses/").and_then(|a| a.parse().ok()) {
            self.ledger.hold(address, holder(&entry.value));
        } else if let Some(range) = key.strip_prefix("blocks/").and_then(|range| range.parse().ok())
            && let Some(block) = block(entry)
        {
            Arc::make_mut(&mut self.members.blocks).insert(range, block.node.clone());
            self.ledger.own(range, block);
        } else if let Some(name) = key.strip_prefix("reservations/").and_then(|name| name.parse().ok()) {
            if let Some(reservation) = read(key, entry) {
                self.ledger.reserve(name, reservation.value);
            }
        } else if key == "reservations-guard" {
            self.ledger.set_guard(Some(entry.modified.0));
        }
    }

    fn delete(&mut self, key: &str) {
        if let Some(id) = key.strip_prefix("endpoints/").and_then(|id| id.parse().ok()) {
            self.members.endpoints.remove(&id);
        } else if let Some(address) = key.strip_prefix("addresses/").and_then(|a| a.parse().ok()) {
            self.ledger.release(address);
        } else if let Some(range) = key.strip_prefix("blocks/").and_then(|range| range.parse().ok()) {
            Arc::make_mut(&mut self.members.blocks).remove(&range);
            self.ledger.disown(range);
        } else if let Some(name) = key.strip_prefix("reservations/").and_then(|name| name.parse().ok()) {
            self.ledger.end_reservation(&name);
        }
    }
}

/// Whether believing an event could take away what runs.
fn takes_away(event: &Event) -> bool {
    let matters = |key: &str| {
        key == schema::KEY
            || key.starts_with(keys::NETWORKS)
            || key.starts_with(keys::NODES)
            || key.contains("/endpoints/")
    };
    match event {
        Event::Snapshot(_) => true,
        Event::Changes(_, changes) => changes.iter().any(|change| match change {
            Change::Delete(key) => matters(key),
            Change::Put(key, _) => key == schema::KEY,
        }),
        Event::Lost(_) => false,
    }
}

/// Takes a value; of a network that cannot be read, what was `known` of it stays.
fn put_base(snapshot: &mut Snapshot, key: &str, entry: &Entry, known: &Networks) {
    if let Some(id) = key.strip_prefix(keys::NETWORKS).and_then(|id| id.parse::<NetworkId>().ok()) {
        snapshot.unreadable.remove(&id);
        let network = read(key, entry).map(Arc::new).or_else(|| {
            snapshot.unreadable.insert(id);
            known.get(&id).cloned()
        });
        if let Some(network) = network {
            Arc::make_mut(&mut snapshot.networks).insert(id, network);
        }
    } else if let Some(name) =
        key.strip_prefix(keys::NODES).and_then(|name| name.parse::<NodeName>().ok())
    {
        if let Some(node) = read(key, entry) {
            Arc::make_mut(&mut snapshot.nodes).insert(name, Arc::new(node.value));
        }
    } else if let Some(name) = key.strip_prefix(keys::SERVICES).and_then(|name| name.parse().ok()) {
        if let Some(service) = read(key, entry) {
            Arc::make_mut(&mut snapshot.services).insert(name, Arc::new(service.value));
        }
    } else if let Some(name) = key.strip_prefix(keys::ALIVE).and_then(|name| name.parse().ok()) {
        Arc::make_mut(&mut snapshot.alive).insert(name);
    } else if let Some(name) = key.strip_prefix(keys::DRAINED).and_then(|name| name.parse().ok()) {
        Arc::make_mut(&mut snapshot.drained).insert(name, entry.modified.0);
    } else if let Some(id) = key.strip_prefix(keys::CHECKS).and_then(|id| id.parse().ok())
        && let Some(check) = read(key, entry)
    {
        Arc::make_mut(&mut snapshot.checks).insert(id, check.value);
    }
}

fn delete_base(snapshot: &mut Snapshot, key: &str) {
    if let Some(id) = key.strip_prefix(keys::NETWORKS).and_then(|id| id.parse::<NetworkId>().ok()) {
        Arc::make_mut(&mut snapshot.networks).remove(&id);
        snapshot.unreadable.remove(&id);
    } else if let Some(name) =
        key.strip_prefix(keys::NODES).and_then(|name| name.parse::<NodeName>().ok())
    {
        Arc::make_mut(&mut snapshot.nodes).remove(&name);
    } else if let Some(name) =
        key.strip_prefix(keys::SERVICES).and_then(|name| name.parse::<Name>().ok())
    {
        Arc::make_mut(&mut snapshot.services).remove(&name);
    } else if let Some(name) =
        key.strip_prefix(keys::ALIVE).and_then(|name| name.parse::<NodeName>().ok())
    {
        let alive: &mut BTreeSet<NodeName> = Arc::make_mut(&mut snapshot.alive);
        alive.remove(&name);
    } else if let Some(name) =
        key.strip_prefix(keys::DRAINED).and_then(|name| name.parse::<NodeName>().ok())
    {
        let drained: &mut BTreeMap<NodeName, u64> = Arc::make_mut(&mut snapshot.drained);
        drained.remove(&name);
    } else if let Some(id) = key.strip_prefix(keys::CHECKS).and_then(|id| id.parse().ok()) {
        Arc::make_mut(&mut snapshot.checks).remove(&id);
    }
}

/// Reads a value; one that cannot be read is reported.
fn read<T: serde::de::DeserializeOwned>(key: &str, entry: &Entry) -> Option<Versioned<T>> {
    super::decode(key, entry).inspect_err(|error| warn!(%error, "unreadable value ignored")).ok()
}

#[cfg(test)]
mod tests;
