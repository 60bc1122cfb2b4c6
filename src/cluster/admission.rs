//! Who may take an address: what is kept for services is theirs, whoever comes first.
//!
//! An endpoint of a service draws on what is kept for it. Any other may have an address as long as
//! more are free than are kept. Every transaction that takes addresses writes the network's `usage`
//! key, blindly, so takers do not hinder each other. Who depends on the exact count compares it: a
//! new reservation always; a taker only while something is kept, which it learns from the guard that
//! every reservation writes.

use super::endpoints::lock;
use super::{Cluster, ClusterError, EndpointRequest, encode, keys};
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
        let known = self.with_ledger(network, |ledger| {
            (ledger.revision() > 0).then(|| (ledger.guard(), ledger.reserved()))
        });
        let (guard, reserved) = match known {
            Some(known) => known,
            None => {
                self.read_ledger(network.id).await?;
                self.with_ledger(network, |ledger| (ledger.guard(), ledger.reserved()))
            }
        };
        if reserved == 0 {
            return Ok(Ticket::Open(guard));
        }
        let (usage, guard) = self.count_exactly(network).await?;
        if self.full(network).is_some() {
            self.read_anew(network.id).await?;
        }
        match self.full(network) {
            Some((family, count)) => Err(exhausted(network, family, count)),
            None => Ok(Ticket::Counted { guard, usage }),
        }
    }

    /// The family of which all that is free is kept, as far as this node knows.
    fn full(&self, network: &Network) -> Option<(&'static str, Count)> {
        let count = |(ipv4, family)| (family, self.known_count(network, ipv4));
        network.families().map(count).find(|(_, count)| count.free() == 0)
    }

    /// Makes sure that the ledger knows of every address that is taken: gives the revision of the
    /// last taking, which must still be the last when the count is relied on, and the guard's.
    pub(super) async fn count_exactly(
        &self,
        network: &Network,
    ) -> Result<(Option<u64>, Option<u64>), ClusterError> {
        let usage = self.store.get(&keys::usage(network.id)).await?.map(|entry| entry.modified.0);
        let known = self.with_ledger(network, |ledger| ledger.revision());
        if usage.is_some_and(|usage| usage > known) || known == 0 {
            self.read_ledger(network.id).await?;
        }
        Ok((usage, self.with_ledger(network, |ledger| ledger.guard())))
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

pub(super) fn exhausted(network: &Network, family: &'static str, count: Count) -> ClusterError {
    ClusterError::Exhausted { network: network.name.clone(), family, count: Box::new(count) }
}
