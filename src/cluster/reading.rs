//! Reading all of a network's addresses, beside the view, which tells them change by change.
//!
//! What is read may be older than what the view has told meanwhile, and the view does not tell it
//! again. So that is kept as long as somebody reads, and comes on top of what was read.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::endpoints::{block, holder, lock};
use super::view::fold;
use super::{Cluster, ClusterError, decode, keys};
use crate::ipam::Ledger;
use crate::model::{Name, Network, NetworkId, Reservation};
use crate::store::{Change, Event, Listing};

/// How often all is read for one refusal, while others take addresses.
const READINGS: usize = 8;

/// What the view has told of a network since somebody began to read it.
#[derive(Debug, Default)]
pub(super) struct News {
    readers: usize,
    /// The revision of the last snapshot.
    whole: u64,
    /// The changes since, each up to a revision.
    told: Vec<(u64, Vec<Change>)>,
}

impl News {
    /// Takes over what was read, and what was told since.
    fn fill(&self, listed: &Listed, ledger: &mut Ledger) {
        let read = listed.reservations.revision.0;
        if self.whole > read {
            return;
        }
        listed.fill(ledger);
        for (revision, changes) in self.told.iter().filter(|(revision, _)| *revision > read) {
            changes.iter().for_each(|change| fold(ledger, listed.network, change));
            ledger.set_revision(*revision);
        }
    }
}

/// What the view tells while a network's addresses are read, network by network.
pub(super) type AllNews = Mutex<BTreeMap<NetworkId, News>>;

/// As long as it lives, what the view tells is kept.
struct Reading<'a> {
    all: &'a AllNews,
    network: NetworkId,
}

impl<'a> Reading<'a> {
    fn begin(cluster: &'a Cluster, network: NetworkId) -> Self {
        lock(&cluster.news).entry(network).or_default().readers += 1;
        Self { all: &cluster.news, network }
    }

    fn end(self, take: impl FnOnce(&News)) {
        if let Some(news) = lock(self.all).get(&self.network) {
            take(news);
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut all = lock(self.all);
        if let Some(news) = all.get_mut(&self.network) {
            news.readers -= 1;
            if news.readers == 0 {
                all.remove(&self.network);
            }
        }
    }
}

/// A network's addresses, its blocks and what is kept, as they were read.
struct Listed {
    network: NetworkId,
    reservations: Listing,
    guard: Option<u64>,
    addresses: Listing,
    blocks: Listing,
}

impl Listed {
    fn fill(&self, ledger: &mut Ledger) {
        let (addresses, blocks) = (keys::addresses(self.network), keys::blocks(self.network));
        let held = self.addresses.entries.iter().filter_map(|(key, entry)| {
            Some((key.strip_prefix(&addresses)?.parse().ok()?, holder(&entry.value)))
        });
        let owned =
            self.blocks.entries.iter().filter_map(|(key, entry)| {
                Some((key.strip_prefix(&blocks)?.parse().ok()?, block(entry)?))
            });
        ledger.reset(held, owned);
        ledger.forget_reservations();
        let prefix = keys::reservations(self.network);
        for (key, entry) in &self.reservations.entries {
            let name = key.strip_prefix(&prefix).and_then(|name| name.parse::<Name>().ok());
            if let (Some(name), Ok(reservation)) = (name, decode::<Reservation>(key, entry)) {
                ledger.reserve(name, reservation.value);
            }
        }
        ledger.set_guard(self.guard);
        ledger.set_revision(self.reservations.revision.0);
    }
}

impl Cluster {
    async fn listed(&self, network: NetworkId) -> Result<Listed, ClusterError> {
        // The guard first: who compares it notices what is kept since. What is taken from here on,
        // whoever relies on the count will notice.
        let guard = self.store.get(&keys::reservations_guard(network)).await?;
        let reservations = self.store.list(&keys::reservations(network)).await?;
        Ok(Listed {
            network,
            reservations,
            guard: guard.map(|entry| entry.modified.0),
            addresses: self.store.list(&keys::addresses(network)).await?,
            blocks: self.store.list(&keys::blocks(network)).await?,
        })
    }

    /// What the store has of a network's addresses, apart from what this node knows.
    pub(super) async fn ledger_of_store(&self, network: &Network) -> Result<Ledger, ClusterError> {
        let mut ledger = Ledger::new(self.node.clone());
        ledger.follow(network);
        self.listed(network.id).await?.fill(&mut ledger);
        Ok(ledger)
    }

    /// Reads all that is to know of a network's addresses, as the store has it now.
    pub(super) async fn read_ledger(&self, network: NetworkId) -> Result<(), ClusterError> {
        let reading = Reading::begin(self, network);
        let listed = self.listed(network).await?;
        let ledger = self.ledger(network);
        let mut ledger = lock(&ledger);
        reading.end(|news| news.fill(&listed, &mut ledger));
        Ok(())
    }

    /// Notes what the view tells of a network's members, for who is just reading them. Whoever calls
    /// this has the network's ledger locked.
    pub(super) fn note_news(&self, network: NetworkId, event: &Event) {
        let mut all = lock(&self.news);
        let Some(news) = all.get_mut(&network) else { return };
        match event {
            Event::Snapshot(listing) => {
                news.whole = listing.revision.0;
                news.told.clear();
            }
            Event::Changes(revision, changes) => news.told.push((revision.0, changes.clone())),
            Event::Lost(_) => {}
        }
    }

    /// Reads all, if it can be so that nobody takes an address meanwhile: before a refusal, because
    /// the view may not have told yet what is free again.
    pub(super) async fn read_anew(&self, network: NetworkId) -> Result<(), ClusterError> {
        let mut before = self.usage(network).await?;
        for _ in 0..READINGS {
            self.read_ledger(network).await?;
            let after = self.usage(network).await?;
            if after == before {
                break;
            }
            before = after;
        }
        Ok(())
    }
}
