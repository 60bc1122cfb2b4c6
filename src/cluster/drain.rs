//! Draining: endpoints that get no new connections, and who has seen that.
//!
//! Every node that uses a network writes for each drained endpoint that it balances to it no more,
//! and how many connections are still open there. What a node has written counts only while it is
//! alive, so it needs no lease: connections of a dead node lead nowhere.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{BATCH, Cluster, ClusterError, TRIES, encode, keys};
use crate::model::{
    Endpoint, EndpointId, EndpointMode, EndpointState, Name, NetworkId, NodeName, Service, Versioned,
};
use crate::store::{Outcome, Revision, Transaction};

/// What a node has written of a drained endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The revision of the endpoint's record that the node has applied.
    pub revision: u64,
    /// How many connections through this node are still open to it.
    pub connections: u64,
}

/// What says that an endpoint is to get no new connections. One that is activated and drained again
/// is drained by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its own state.
    Own,
    /// The mark of its node, of this revision of the store.
    Node(u64),
}

/// By endpoint and node, each with the revision that wrote it.
pub type Acks = BTreeMap<EndpointId, BTreeMap<NodeName, Versioned<Ack>>>;

/// Which endpoints are drained.
#[derive(Debug, Clone)]
pub enum Scope {
    /// One.
    Endpoint(NetworkId, EndpointId),
    /// All of a service.
    Service(Box<Service>),
    /// All on a node.
    Node(NodeName),
}

/// How far a drain is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drain {
    /// How many endpoints of the scope there are.
    pub present: u64,
    /// How many of them are drained.
    pub endpoints: u64,
    /// Whether the node itself is marked, where the scope is one.
    pub marked: bool,
    /// The nodes that may still give one of them a new connection.
    pub waiting: BTreeSet<NodeName>,
    /// The nodes that have endpoints on their networks and are not waited for, because they are dead.
    pub dead: BTreeSet<NodeName>,
    /// How many connections are still open to them.
    pub connections: u64,
}

impl Scope {
    fn has(&self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Endpoint(_, id) => endpoint.id == *id,
            Self::Service(service) => endpoint.service.as_ref() == Some(&service.name),
            Self::Node(node) => endpoint.node == *node,
        }
    }
}

impl Cluster {
    /// Has the endpoints get no new connections; those that they have go on.
    ///
    /// # Errors
    /// [`ClusterError::NoNode`] and [`ClusterError::NoEndpoint`] when there is no such thing.
    pub async fn drain(&self, scope: &Scope) -> Result<(), ClusterError> {
        match scope {
            Scope::Node(node) => self.set_drained(node, true).await,
            Scope::Endpoint(network, id) => {
                let drained =
                    self.set_endpoint_state(*network, *id, EndpointState::Draining, "").await?;
                drained.map(drop).ok_or_else(|| ClusterError::NoEndpoint(id.to_string()))
            }
            Scope::Service(service) => {
                for network in &service.networks {
                    let endpoints = self.endpoints(*network).await?;
                    for endpoint in endpoints.iter().filter(|endpoint| scope.has(endpoint)) {
                        // One that was detached meanwhile needs no drain.
                        let state = EndpointState::Draining;
                        self.set_endpoint_state(*network, endpoint.id, state, "").await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Has the endpoints get new connections again. Of an endpoint or a service those that were
    /// drained themselves; on a node that is drained they get none before that is activated too.
    ///
    /// # Errors
    /// [`ClusterError::NoNode`] and [`ClusterError::NoEndpoint`] when there is no such thing.
    pub async fn activate(&self, scope: &Scope) -> Result<(), ClusterError> {
        match scope {
            Scope::Node(node) => self.set_drained(node, false).await,
            Scope::Endpoint(network, id) => match self.activate_endpoint(*network, *id).await? {
                true => Ok(()),
                false => Err(ClusterError::NoEndpoint(id.to_string())),
            },
            Scope::Service(service) => {
                for network in &service.networks {
                    let endpoints = self.endpoints(*network).await?;
                    for endpoint in endpoints.iter().filter(|endpoint| scope.has(endpoint)) {
                        // One that was detached meanwhile needs nothing.
                        self.activate_endpoint(*network, endpoint.id).await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Has a drained endpoint be what a new one would be; `false`: it is gone.
    async fn activate_endpoint(&self, network: NetworkId, id: EndpointId) -> Result<bool, ClusterError> {
        let key = keys::endpoint(network, id);
        let Some(found) = self.read::<Endpoint>(&key).await? else { return Ok(false) };
        let is_drained = |endpoint: &Endpoint| endpoint.state == EndpointState::Draining;
        if !is_drained(&found) {
            return Ok(true);
        }
        // Its service stays the same.
        let service = match &found.service {
            Some(name) => self.read::<Service>(&keys::service(name)).await?,
            None => None,
        };
        let is_checked = service.is_some_and(|service| service.health.is_some());
        let state = if is_checked { EndpointState::Pending } else { EndpointState::Ready };
        let to = |endpoint: &Endpoint| is_drained(endpoint).then(|| (state, String::new()));
        Ok(self.change_state(network, id, to).await?.is_some())
    }

    /// How far a drain is.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn drain_state(&self, scope: &Scope) -> Result<Drain, ClusterError> {
        let networks = match scope {
            Scope::Endpoint(network, _) => vec![*network],
            Scope::Service(service) => service.networks.clone(),
            Scope::Node(node) => self.networks_of(node).await?,
        };
        let drained = self.drained_since().await?;
        let marked = matches!(scope, Scope::Node(node) if drained.contains_key(node));
        let mut drain = Drain { marked, ..Drain::default() };
        let mut modes = BTreeMap::new();
        for network in networks {
            let endpoints: Vec<Versioned<Endpoint>> =
                self.read_values(&keys::endpoints(network)).await?;
            let services = endpoints.iter().filter(|e| scope.has(e)).filter_map(|e| e.service.as_ref());
            for name in services {
                if !modes.contains_key(name) {
                    let service = self.read::<Service>(&keys::service(name)).await?;
                    modes.insert(name.clone(), service.map(|service| service.endpoint_mode));
                }
            }
            let acks = self.acks(network).await?;
            // Read last: a node that was alive before may have ended.
            let alive = self.alive().await?;
            let seen = Seen { endpoints: &endpoints, acks: &acks, alive: &alive, drained: &drained };
            seen.add(scope, &modes, &mut drain);
        }
        Ok(drain)
    }

    /// Writes that this node has applied a drain of an endpoint, and how many connections through it
    /// are still open there. `false`: nothing was written, because the endpoint is gone, or is not
    /// drained by that any more.
    ///
    /// The acknowledgement's revision is that of the endpoint's record, or a later one of the members
    /// that were applied. What is written for a drained node counts for one drain, that of the mark
    /// which was applied: it is written again for the next.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn acknowledge(
        &self,
        network: NetworkId,
        endpoint: EndpointId,
        cause: Cause,
        ack: Ack,
    ) -> Result<bool, ClusterError> {
        let record = keys::endpoint(network, endpoint);
        let ack = encode(&ack);
        for _ in 0..TRIES {
            let Some(found) = self.read::<Endpoint>(&record).await? else { return Ok(false) };
            let mut transaction = Transaction::new().modified(&record, Revision(found.revision));
            match cause {
                Cause::Own if found.state == EndpointState::Draining => {}
                Cause::Own => return Ok(false),
                Cause::Node(applied) => {
                    let mark = keys::drained(&found.node);
                    let present = self.store.get(&mark).await?.map(|entry| entry.modified);
                    if present != Some(Revision(applied)) {
                        return Ok(false);
                    }
                    transaction = transaction.modified(mark, Revision(applied));
                }
            }
            let key = keys::ack(network, endpoint, &self.node);
            if let Outcome::Committed(_) = self.commit(transaction.put(key, ack.clone())).await? {
                return Ok(true);
            }
        }
        Err(ClusterError::Contention(format!("endpoint {endpoint}")))
    }

    /// What nodes have written of a network's drained endpoints.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn acks(&self, network: NetworkId) -> Result<Acks, ClusterError> {
        let prefix = keys::acks(network);
        let mut acks = Acks::new();
        for (key, ack) in self.read_all(&prefix).await? {
            let Some((endpoint, node)) = keys::acked(key.strip_prefix(&prefix).unwrap_or(&key)) else {
                continue;
            };
            acks.entry(endpoint).or_default().insert(node, ack);
        }
        Ok(acks)
    }

    /// Removes what nodes have written of an endpoint that is gone: nobody writes more of it.
    pub(super) async fn forget_acks(&self, endpoint: &Endpoint) -> Result<(), ClusterError> {
        let listing = self.store.list(&keys::acks_of(endpoint.network, endpoint.id)).await?;
        self.delete_all(listing.entries.into_keys().collect()).await
    }

    /// Removes what this node has written on a network that it does not use any more: nobody here
    /// has connections to it. What was written again meanwhile stays: the network is used anew.
    pub(super) async fn withdraw_acks(&self, network: NetworkId) -> Result<(), ClusterError> {
        for (endpoint, nodes) in self.acks(network).await? {
            let Some(own) = nodes.get(&self.node) else { continue };
            let key = keys::ack(network, endpoint, &self.node);
            let unchanged = Transaction::new().modified(&key, Revision(own.revision));
            self.commit(unchanged.delete(key)).await?;
        }
        Ok(())
    }

    async fn delete_all(&self, keys: Vec<String>) -> Result<(), ClusterError> {
        for batch in keys.chunks(BATCH) {
            self.commit(batch.iter().fold(Transaction::new(), Transaction::delete)).await?;
        }
        Ok(())
    }

    /// The drained nodes, each with the revision that marked it.
    async fn drained_since(&self) -> Result<BTreeMap<NodeName, Revision>, ClusterError> {
        let listing = self.store.list(keys::DRAINED).await?;
        let node = |key: &str| key.strip_prefix(keys::DRAINED)?.parse().ok();
        Ok(listing.entries.iter().filter_map(|(key, e)| Some((node(key)?, e.modified))).collect())
    }

    async fn alive(&self) -> Result<BTreeSet<NodeName>, ClusterError> {
        let listing = self.store.list(keys::ALIVE).await?;
        let node = |key: &String| key.strip_prefix(keys::ALIVE)?.parse().ok();
        Ok(listing.entries.keys().filter_map(node).collect())
    }

    async fn read_values<T: serde::de::DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> Result<Vec<Versioned<T>>, ClusterError> {
        Ok(self.read_all(prefix).await?.into_iter().map(|(_, value)| value).collect())
    }
}

/// What the store has of one network.
struct Seen<'a> {
    endpoints: &'a [Versioned<Endpoint>],
    acks: &'a Acks,
    alive: &'a BTreeSet<NodeName>,
    drained: &'a BTreeMap<NodeName, Revision>,
}

impl Seen<'_> {
    /// Adds how far the drain is on this network. Who must acknowledge is alive and has an endpoint
    /// here, or has acknowledged.
    fn add(&self, scope: &Scope, modes: &BTreeMap<Name, Option<EndpointMode>>, drain: &mut Drain) {
        let users: BTreeSet<&NodeName> =
            self.endpoints.iter().map(|e| &e.node).filter(|node| self.alive.contains(*node)).collect();
        for endpoint in self.endpoints.iter().filter(|endpoint| scope.has(endpoint)) {
            drain.present += 1;
            let mark = self.drained.get(&endpoint.node);
            let is_draining = endpoint.state == EndpointState::Draining;
            if !is_draining && mark.is_none() {
                continue;
            }
            drain.endpoints += 1;
            let mode = endpoint.service.as_ref().and_then(|name| modes.get(name).copied().flatten());
            // Nobody balances to it, or what it still has is on a node that nobody waits for.
            if mode != Some(EndpointMode::Vip) || !self.alive.contains(&endpoint.node) {
                continue;
            }
            let applied = |ack: &Versioned<Ack>| match mark {
                _ if is_draining => ack.value.revision >= endpoint.revision,
                Some(since) => ack.revision > since.0,
                None => false,
            };
            let dead = self.endpoints.iter().map(|e| &e.node).filter(|node| !self.alive.contains(*node));
            drain.dead.extend(dead.cloned());
            let acks = self.acks.get(&endpoint.id).into_iter().flatten();
            let valid: BTreeMap<&NodeName, u64> = acks
                .filter(|(node, ack)| self.alive.contains(*node) && applied(ack))
                .map(|(node, ack)| (node, ack.value.connections))
                .collect();
            drain.connections = valid.values().fold(drain.connections, |sum, n| sum.saturating_add(*n));
            let late = users.iter().filter(|node| !valid.contains_key(**node));
            drain.waiting.extend(late.map(|node| NodeName::clone(node)));
        }
    }
}

impl Drain {
    /// Whether what was drained can end without anybody noticing.
    pub fn is_done(&self, scope: &Scope) -> bool {
        let asked = match scope {
            Scope::Node(_) => self.marked,
            Scope::Endpoint(..) => self.endpoints > 0,
            Scope::Service(_) => self.endpoints > 0 || self.present == 0,
        };
        asked && self.waiting.is_empty() && self.connections == 0
    }
}

#[cfg(test)]
mod tests;
