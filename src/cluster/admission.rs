//! Who may take an address: what is kept for services is theirs, whoever comes first.
//!
//! An endpoint of a service draws on what is kept for it. Any other may have an address as long as
//! more are free than are kept. Every transaction that takes addresses writes the network's `usage`
//! key, blindly, so takers do not hinder each other. Who depends on the exact count compares it: a
//! new reservation always; a taker only while something is kept, which it learns from the guard that
//! every reservation writes.

use super::endpoints::lock;
use super::{Cluster, ClusterError, EndpointRequest, TRIES, encode, keys};
use crate::ipam::{Count, Ledger};
use crate::model::{Name, Network, NetworkId, Reservation, Versioned};
use crate::store::{Revision, Transaction};

/// What an endpoint's transaction must find as it was, to be admitted.
#[derive(Debug, Clone)]
pub(super) enum Ticket {
    /// Nothing was kept when this guard was written.
    Open(Option<u64>),
    /// What was kept left something, as long as nobody else takes any.
    Counted { guard: Option<u64>, usage: Option<u64> },
    /// It is kept for this endpoint.
    Drawn { name: Name, reservation: Versioned<Reservation> },
}

impl Ticket {
    /// Adds what must hold, and what is written with it.
    pub(super) fn stamp(&self, network: NetworkId, transaction: Transaction) -> Transaction {
        let transaction = transaction.put(keys::usage(network), []);
        match self {
            Self::Open(guard) => {
                transaction.unchanged(keys::reservations_guard(network), guard.map(Revision))
            }
            Self::Counted { guard, usage } => transaction
                .unchanged(keys::reservations_guard(network), guard.map(Revision))
                .unchanged(keys::usage(network), usage.map(Revision)),
            Self::Drawn { name, reservation } => {
                let key = keys::reservation(network, name);
                let less = Reservation { drawn: reservation.drawn + 1, ..reservation.value };
                transaction.modified(&key, Revision(reservation.revision)).put(key, encode(&less))
            }
        }
    }
}

impl Cluster {
    /// Asks for admission of an endpoint.
    ///
    /// # Errors
    /// [`ClusterError::Exhausted`] when everything that is free is kept for others.
    pub(super) async fn ticket(
        &self,
        network: &Network,
        request: &EndpointRequest,
    ) -> Result<Ticket, ClusterError> {
        if let Some(service) = &request.service {
            let reservation: Option<Versioned<Reservation>> =
                self.read(&keys::reservation(network.id, service)).await?;
            let Some(reservation) = reservation.filter(|found| found.service.is_some()) else {
                return Err(ClusterError::NotOfService {
                    service: service.clone(),
                    network: network.name.clone(),
                });
            };
            if reservation.left() > 0 {
                return Ok(Ticket::Drawn { name: service.clone(), reservation });
            }
        }
        let kept = |ledger: &Ledger| (ledger.guard(), ledger.reserved());
        let (guard, reserved) = self.complete(network, None, kept).await?;
        if reserved == 0 {
            return Ok(Ticket::Open(guard));
        }
        let full = |ledger: &Ledger| (ledger.guard(), full(ledger, network));
        let mut usage = self.usage(network.id).await?;
        let (mut guard, mut refusal) = self.complete(network, usage, full).await?;
        if refusal.is_some() {
            self.read_anew(network.id).await?;
            usage = self.usage(network.id).await?;
            (guard, refusal) = self.complete(network, usage, full).await?;
        }
        match refusal {
            Some((family, count)) => Err(exhausted(network, family, count)),
            None => Ok(Ticket::Counted { guard, usage }),
        }
    }

    /// The revision of the last taking of an address.
    pub(super) async fn usage(&self, network: NetworkId) -> Result<Option<u64>, ClusterError> {
        Ok(self.store.get(&keys::usage(network)).await?.map(|entry| entry.modified.0))
    }

    /// What is known of a network's addresses, once that has everything up to a revision and up to the
    /// guard that is told with it. One look has to give all that is relied on together: the view may
    /// tell what was before the last reading, and a ledger is then for a while as it was.
    pub(super) async fn complete<T>(
        &self,
        network: &Network,
        since: Option<u64>,
        look: impl Fn(&Ledger) -> T,
    ) -> Result<T, ClusterError> {
        for _ in 0..TRIES {
            let seen = self.with_ledger(network, |ledger| {
                let since = since.max(ledger.guard()).unwrap_or(0).max(1);
                (ledger.revision() >= since).then(|| look(ledger))
            });
            if let Some(seen) = seen {
                return Ok(seen);
            }
            self.read_ledger(network.id).await?;
        }
        Err(ClusterError::Contention(format!("network {}", network.name)))
    }

    /// How a network's addresses are used, IPv4 and IPv6, as the store has it now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn counts(&self, network: &Network) -> Result<(Count, Count), ClusterError> {
        let ledger = self.ledger_of_store(network).await?;
        Ok((ledger.count(true), ledger.count(false)))
    }

    /// How the addresses of one family are used, as far as this node knows.
    pub fn known_count(&self, network: &Network, ipv4: bool) -> Count {
        self.with_ledger(network, |ledger| ledger.count(ipv4))
    }

    /// Does something with what is known of a network's addresses.
    pub(super) fn with_ledger<T>(&self, network: &Network, act: impl FnOnce(&mut Ledger) -> T) -> T {
        let ledger = self.ledger(network.id);
        let mut ledger = lock(&ledger);
        ledger.follow(network);
        act(&mut ledger)
    }

    /// After an endpoint was admitted by the exact count, and written at a revision: nobody else
    /// took any address up to there.
    pub(super) fn admitted(&self, network: &Network, ticket: &Ticket, revision: u64) {
        let Ticket::Counted { usage, .. } = ticket else { return };
        self.with_ledger(network, |ledger| {
            // The view may have fallen behind what was counted.
            if usage.is_none_or(|usage| usage <= ledger.revision()) {
                ledger.set_revision(revision.max(ledger.revision()));
            }
        });
    }
}

/// The family of which all that is free is kept. Where nothing is kept any more, whether anything is
/// free is asked later: an address that was asked for may be outside of those that are given out.
fn full(ledger: &Ledger, network: &Network) -> Option<(&'static str, Count)> {
    let count = |(ipv4, family)| (family, ledger.count(ipv4));
    network.families().map(count).find(|(_, count)| count.reserved > 0 && count.free() == 0)
}

pub(super) fn exhausted(network: &Network, family: &'static str, count: Count) -> ClusterError {
    ClusterError::Exhausted { network: network.name.clone(), family, count: Box::new(count) }
}
