//! The cluster's state as one agent sees it at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::{
    CheckId, CheckRequest, Endpoint, EndpointId, Name, Network, NetworkId, Node, NodeName, Service,
    ServiceId,
};

/// A value and the store's revision that wrote it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The value.
    pub value: T,
    /// The revision.
    pub revision: u64,
}

impl<T> Deref for Versioned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// What an agent knows of the cluster: immutable, cheap to clone.
///
/// It has all networks and nodes, and the endpoints of those networks only that this node uses.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// All networks.
    pub networks: Arc<BTreeMap<NetworkId, Arc<Versioned<Network>>>>,
    /// Networks whose record cannot be read now. Of one that was known before, that stands; of
    /// others nothing is known, and nothing of theirs may be removed.
    pub unreadable: BTreeSet<NetworkId>,
    /// All nodes that ever joined and were not removed.
    pub nodes: Arc<BTreeMap<NodeName, Arc<Node>>>,
    /// The nodes whose lease is alive.
    pub alive: Arc<BTreeSet<NodeName>>,
    /// The nodes that are drained, each with the store's revision that marked it: their endpoints get
    /// no new connections of services.
    pub drained: Arc<BTreeMap<NodeName, u64>>,
    /// All services.
    pub services: Arc<BTreeMap<Name, Arc<Service>>>,
    /// The checks that nodes are asked for.
    pub checks: Arc<BTreeMap<CheckId, CheckRequest>>,
    /// The members of the networks that this node uses.
    pub members: BTreeMap<NetworkId, Arc<Members>>,
}

/// The endpoints of one network, and which node has which blocks of its addresses.
#[derive(Debug, Clone, Default)]
pub struct Members {
    /// The store's revision up to which this is complete.
    pub revision: u64,
    /// The endpoints.
    pub endpoints: BTreeMap<EndpointId, Arc<Endpoint>>,
    /// Whose each block of addresses is. All of a node's blocks are reached through it, but for
    /// single addresses that endpoints of other nodes have.
    pub blocks: Arc<BTreeMap<IpNetwork, NodeName>>,
}

/// Who holds an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// An endpoint uses it.
    Endpoint(EndpointId),
    /// A service has it as its own.
    Service(ServiceId),
    /// Nobody; it was released a short while ago and rests, because neighbours' caches and
    /// connections may still mean its last holder.
    Resting,
}

impl Snapshot {
    /// The network of that name.
    pub fn network_named(&self, name: &Name) -> Option<&Arc<Versioned<Network>>> {
        self.networks.values().find(|network| network.name == *name)
    }

    /// The network with this name or id. A name comes first.
    pub fn network(&self, reference: &str) -> Option<&Arc<Versioned<Network>>> {
        let named = reference.parse().ok().and_then(|name| self.network_named(&name));
        named.or_else(|| self.networks.get(&reference.parse().ok()?))
    }
}
