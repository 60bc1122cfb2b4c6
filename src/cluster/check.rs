//! Whether the store contradicts itself, and the repair of what it is safe to repair.
//!
//! Every change of ours is one transaction, so what is read at one revision is consistent however
//! much goes on; what is not was made by somebody else's hand, or by a fault. A repair is a
//! transaction that compares what was read: where anything has changed since, it does nothing.

mod asking;
mod book;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::{Cluster, ClusterError, networks};
use crate::model::Finding;
use crate::model::{Endpoint, EndpointId, NetworkId};
use crate::store::{Outcome, Revision, Transaction, schema};
pub use asking::Asked;
use book::Book;

/// An inconsistency of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inconsistency {
    /// What it is, for people.
    pub finding: Finding,
    network: Option<NetworkId>,
    /// What repairs it; empty: nothing that is safe.
    repair: Vec<Transaction>,
}

/// What a check of the store has read and found.
#[derive(Debug, Clone, Default)]
pub struct Check {
    /// The store's revision at which all was read.
    pub revision: Revision,
    /// The network that was asked for; `None`: all.
    pub network: Option<NetworkId>,
    /// What is wrong.
    pub inconsistencies: Vec<Inconsistency>,
    /// The networks, and what they are called.
    pub networks: BTreeMap<NetworkId, String>,
    /// All endpoints that can be read.
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
}

impl Cluster {
    /// Reads the whole store at one revision and looks for what cannot be; of one network (name or
    /// id), or of all.
    ///
    /// # Errors
    /// When the store cannot be read or is another one, or there is no such network.
    pub async fn check(&self, network: Option<&str>) -> Result<Check, ClusterError> {
        let find = |book: &Book| match network {
            Some(text) => book.find(text).map(Some).ok_or_else(|| networks::no_network(text)),
            None => Ok(None),
        };
        self.check_found(find).await
    }

    /// The same of a network that may be gone meanwhile, or of all.
    ///
    /// # Errors
    /// When the store cannot be read or is another one.
    pub async fn check_again(&self, network: Option<NetworkId>) -> Result<Check, ClusterError> {
        self.check_found(|_| Ok(network)).await
    }

    async fn check_found(
        &self,
        find: impl FnOnce(&Book) -> Result<Option<NetworkId>, ClusterError>,
    ) -> Result<Check, ClusterError> {
        let listing = self.store.list("").await?;
        if listing.entries.get(schema::KEY).is_none_or(|entry| entry.modified != self.identity) {
            return Err(ClusterError::Replaced(self.store.name()));
        }
        let book = Book::read(&listing.entries);
        let network = find(&book)?;
        let mut inconsistencies = rules::inconsistencies(&book);
        inconsistencies.retain(|found| network.is_none() || found.network == network);
        let networks = book.networks.keys().map(|id| (*id, book.name(*id))).collect();
        let endpoints = book.endpoints().map(|endpoint| (endpoint.id, endpoint.clone())).collect();
        Ok(Check { revision: listing.revision, network, inconsistencies, networks, endpoints })
    }

    /// Repairs an inconsistency, provided that nothing of what it is about has changed since.
    /// `false`: something has, or there is no safe repair.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn repair(&self, found: &Inconsistency) -> Result<bool, ClusterError> {
        let mut done = !found.repair.is_empty();
        for transaction in &found.repair {
            done &= matches!(self.commit(transaction.clone()).await?, Outcome::Committed(_));
        }
        Ok(done)
    }
}
