//! The shared state of the cluster: its changes, as transactions on the store, and one node's view
//! of it.
//!
//! Owns the layout of the store ([`keys`]). Every transaction also compares the cluster's identity,
//! so a store that was wiped or exchanged refuses all of them: nobody writes into a foreign store.

mod admission;
pub mod check;
pub mod drain;
pub mod endpoints;
mod external;
mod keys;
pub mod networks;
pub mod nodes;
mod reading;
mod request;
mod rest;
pub mod services;
pub mod subnets;
pub mod survey;
pub mod view;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use ipnetwork::IpNetwork;
use serde::de::DeserializeOwned;

use crate::ipam::{Count, Ledger};
use crate::model::network::NetworkError;
use crate::model::{Endpoint, EndpointId, Name, NetworkId, NodeName, Snapshot, Versioned, Vni};
use crate::store::{Entry, Outcome, Revision, Store, StoreError, Transaction, schema};

pub use endpoints::Claimed;
pub use networks::Defaults;
pub use request::EndpointRequest;
pub use subnets::Expanded;
pub use survey::Survey;
pub use view::{Health, View};

/// How often a change is tried again when others were faster, before it is given up.
const TRIES: usize = 64;
/// How many keys one transaction deletes: etcd takes 128 operations by default.
const BATCH: usize = 100;

/// Why a change was not made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClusterError {
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store is not the one that this node joined.
    #[error(
        "the store {0} is not the one this node belongs to: it was emptied or exchanged. What runs \
         goes on, nothing can be changed. Restore the store's backup; or, to begin anew, stop \
         netctld, run `netctld --cleanup`, remove its state directory, and start it"
    )]
    Replaced(String),
    /// What was asked for cannot be.
    #[error(transparent)]
    Invalid(#[from] NetworkError),
    /// There is no such network.
    #[error("network {0:?} does not exist: `netctl network ls` lists those that do")]
    NoNetwork(String),
    /// There is such a network already.
    #[error(
        "network {0} exists already: remove it first (`netctl network rm {0}`) or choose another name"
    )]
    NetworkExists(Name),
    /// The network is just being removed.
    #[error("network {0} is being removed")]
    Removing(Name),
    /// The VNI belongs to another network.
    #[error("VNI {vni} is in use by network {network}: choose another or leave it out")]
    VniTaken {
        /// The VNI.
        vni: Vni,
        /// Who has it.
        network: Name,
    },
    /// A cluster-wide number or the default pool has run out.
    #[error("no {0} is left: remove networks that are not used{1}")]
    NoneLeft(&'static str, &'static str),
    /// The MTU does not fit an underlay.
    #[error(
        "MTU {mtu} does not fit: node {node} carries {most} bytes at most; give --mtu {most} or less"
    )]
    MtuTooLarge {
        /// The MTU asked for.
        mtu: u32,
        /// The node with the smallest underlay.
        node: NodeName,
        /// What it carries.
        most: u32,
    },
    /// The network has endpoints.
    #[error("network {network} is in use by {count} endpoint(s), such as {example}: detach them first")]
    InUse {
        /// The network.
        network: Name,
        /// How many.
        count: usize,
        /// One of them.
        example: String,
    },
    /// The network has services.
    #[error(
        "network {network} is in use by service {service}: remove it first (`netctl service rm {service}`)"
    )]
    HasService {
        /// The network.
        network: Name,
        /// One of them.
        service: Name,
    },
    /// The network has the subnet already, with other options.
    #[error(
        "network {network} has subnet {subnet} already, with {present}: its options cannot be changed; \
         ask for the same, or remove it first (`netctl network shrink {network} --subnet {subnet}`)"
    )]
    SubnetExists {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// The options that it has.
        present: String,
    },
    /// Somebody else has addresses of the subnet.
    #[error("subnet {subnet} cannot be added to network {network}: it overlaps {other}; choose another")]
    SubnetOverlaps {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// What it overlaps.
        other: String,
    },
    /// The hosts would not reach a network's addresses, but others, or the other way round.
    #[error(
        "subnet {subnet} cannot be one that hosts reach: it overlaps {other}; choose another, or leave \
         --host-access out"
    )]
    HostOverlaps {
        /// The subnet.
        subnet: IpNetwork,
        /// What it overlaps.
        other: String,
    },
    /// The network has no subnet of that family.
    #[error(
        "subnet {subnet} cannot be added to network {network}, which has no {family}: every endpoint \
         of a network has an address of each of its families, and those that exist would have none; \
         make another network with both"
    )]
    NewFamily {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The network has no such subnet.
    #[error("network {network} has no subnet {subnet}: its subnets are {subnets}")]
    NoSubnet {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// Those that it has.
        subnets: String,
    },
    /// A network needs a subnet.
    #[error(
        "subnet {subnet} is the only one of network {network}: add another first, or remove the \
         network (`netctl network rm {network}`)"
    )]
    LastSubnet {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
    },
    /// Addresses of the subnet are taken.
    #[error(
        "subnet {subnet} of network {network} is in use: {endpoints} address(es) of endpoints and services, {resting} \
         resting after use, such as {example}; detach the endpoints, or wait until resting ones are free"
    )]
    SubnetInUse {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// How many addresses endpoints have.
        endpoints: usize,
        /// How many rest.
        resting: usize,
        /// One of them.
        example: String,
    },
    /// What is kept for services needs the subnet.
    #[error(
        "subnet {subnet} of network {network} is needed: {reserved} addresses are reserved, and without \
         it {short} of them would not be there; scale services down, or add another subnet first"
    )]
    SubnetReserved {
        /// The subnet.
        subnet: IpNetwork,
        /// The network.
        network: Name,
        /// How many addresses are kept.
        reserved: u128,
        /// How many of them would be missing.
        short: u128,
    },
    /// An address that the network cannot give.
    #[error("address {address} cannot be had on network {network}: {problem}")]
    Address {
        /// The address.
        address: IpAddr,
        /// The network.
        network: Name,
        /// Why not.
        problem: String,
    },
    /// Somebody has the address.
    #[error("address {address} of network {network} is taken{by}: choose another or leave it out")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// The network.
        network: Name,
        /// By whom, as far as it is known.
        by: String,
    },
    /// All addresses of a family are taken.
    #[error(
        "network {network} has no free {family} address: {} usable, {} in use by endpoints, {} by \
         services, {} resting after use, {} reserved; add a subnet (`netctl network expand {network} \
         --subnet CIDR`), detach endpoints, or wait until resting ones are free",
        count.usable, count.endpoints, count.services, count.resting, count.reserved
    )]
    Exhausted {
        /// The network.
        network: Name,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// How its addresses are used.
        count: Box<Count>,
    },
    /// An endpoint of that name is there, and it is another one.
    #[error(
        "endpoint {name} exists already on network {network} and differs ({difference}): detach it first or choose another name"
    )]
    EndpointExists {
        /// The name.
        name: Name,
        /// The network.
        network: Name,
        /// In what it differs from the request.
        difference: String,
    },
    /// The service is not on the network.
    #[error(
        "service {service} does not exist on network {network}: `netctl service ls` lists those that do"
    )]
    NotOfService {
        /// The service.
        service: Name,
        /// The network.
        network: Name,
    },
    /// There is no such node.
    #[error("node {0} does not exist: `netctl node ls` lists those that do")]
    NoNode(String),
    /// A node that lives cannot be removed.
    #[error(
        "node {0} is alive: stop its agent first and have it remove what it has \
         (netctld --cleanup on that machine), or drain it (netctl node drain {0})"
    )]
    NodeAlive(NodeName),
    /// There is no such service.
    #[error("service {0:?} does not exist: `netctl service ls` lists those that do")]
    NoService(String),
    /// There is such a service already.
    #[error(
        "service {0} exists already: change it (`netctl service update {0}`), remove it, or choose \
         another name"
    )]
    ServiceExists(Name),
    /// Addresses are kept under the service's name already.
    #[error(
        "addresses of network {network} are kept under the name {name} already: take them over \
         (--reservation {name}), or choose another name"
    )]
    NameReserved {
        /// The name.
        name: Name,
        /// The network.
        network: Name,
    },
    /// A service that cannot be as it was asked for.
    #[error("{0}")]
    ServiceInvalid(String),
    /// A network has fewer free addresses than are asked for.
    #[error(
        "network {network} has too few {family} addresses: {asked} asked for, {} free ({} usable, {} \
         in use by endpoints, {} by services, {} resting, {} reserved), {} short; nothing was \
         changed. Give it another subnet first: netctl network expand {network} --subnet CIDR",
        count.free(), count.usable, count.endpoints, count.services, count.resting, count.reserved,
        asked - count.free()
    )]
    TooFew {
        /// The network.
        network: Name,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// How many were asked for.
        asked: u128,
        /// How its addresses are used.
        count: Box<Count>,
    },
    /// There is no such endpoint.
    #[error("endpoint {0:?} does not exist: `netctl endpoint ls` lists those that do")]
    NoEndpoint(String),
    /// Several endpoints have that name.
    #[error("endpoint {name:?} is on several networks ({networks}): name the network too")]
    Ambiguous {
        /// The name.
        name: String,
        /// Where.
        networks: String,
    },
    /// The endpoint is another node's.
    #[error("endpoint {endpoint} runs on node {node}: detach it there")]
    Elsewhere {
        /// The endpoint.
        endpoint: EndpointId,
        /// Its node.
        node: NodeName,
    },
    /// Another live machine has this node's name or underlay address.
    #[error("{what} is in use by node {node} ({id}), which is alive: give this node another")]
    NodeTaken {
        /// Which.
        what: String,
        /// The other node.
        node: NodeName,
        /// Its id.
        id: String,
    },
    /// Others were faster again and again.
    #[error("{0} was changed by others {TRIES} times while this change was tried: try again")]
    Contention(String),
    /// The store holds something that cannot be read.
    #[error("the store's key {key} cannot be read: {problem}")]
    Unreadable {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
}

/// The shared state of the cluster, as one node changes it.
pub struct Cluster {
    store: Arc<dyn Store>,
    node: NodeName,
    /// The revision that wrote the cluster's identity: as long as it stands, it is our store.
    identity: Revision,
    rest: rest::Rest,
    /// What is known of the addresses of the networks in use.
    draws: tokio::sync::Mutex<()>,
    ledgers: Mutex<BTreeMap<NetworkId, Arc<Mutex<Ledger>>>>,
    news: reading::AllNews,
}

/// Waits before a change is tried again that met others: longer from time to time, and not all alike.
async fn pause(attempt: usize) {
    use rand::Rng as _;
    let longest = 1_u64 << attempt.min(6);
    let time = rand::rng().next_u64() % (longest + 1);
    tokio::time::sleep(std::time::Duration::from_millis(time)).await;
}

impl Cluster {
    /// Takes a store whose identity was checked ([`schema::identify`]).
    ///
    /// `rest` is how long a freed address rests.
    ///
    /// # Errors
    /// When the store cannot be reached, or its identity vanished since.
    pub async fn new(
        store: Arc<dyn Store>,
        node: NodeName,
        rest: std::time::Duration,
    ) -> Result<Self, ClusterError> {
        let entry = store.get(schema::KEY).await?;
        let identity = entry.ok_or_else(|| ClusterError::Replaced(store.name()))?.modified;
        Ok(Self {
            store,
            node,
            identity,
            rest: rest::Rest::new(rest),
            draws: tokio::sync::Mutex::default(),
            ledgers: Mutex::default(),
            news: Mutex::default(),
        })
    }

    /// The store itself.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Checks that the store is still the one this node joined.
    ///
    /// # Errors
    /// [`ClusterError::Replaced`] when it is not.
    pub async fn verify(&self) -> Result<(), ClusterError> {
        match self.store.get(schema::KEY).await? {
            Some(entry) if entry.modified == self.identity => Ok(()),
            _ => Err(ClusterError::Replaced(self.store.name())),
        }
    }

    /// Does a transaction, provided that the store is still ours.
    async fn commit(&self, transaction: Transaction) -> Result<Outcome, ClusterError> {
        let outcome = self.store.commit(transaction.modified(schema::KEY, self.identity)).await?;
        if outcome == Outcome::Conflict {
            self.verify().await?;
        }
        Ok(outcome)
    }

    async fn read<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Versioned<T>>, ClusterError> {
        let entry = self.store.get(key).await?;
        entry.map(|entry| decode(key, &entry)).transpose()
    }

    /// Reads all values under a prefix; one that cannot be read is an error.
    async fn read_every<T: DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> Result<Vec<(String, Versioned<T>)>, ClusterError> {
        let listing = self.store.list(prefix).await?;
        listing.entries.into_iter().map(|(key, entry)| decode(&key, &entry).map(|v| (key, v))).collect()
    }

    /// Reads all values under a prefix that can be read.
    async fn read_all<T: DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> Result<Vec<(String, Versioned<T>)>, ClusterError> {
        let listing = self.store.list(prefix).await?;
        let read = |(key, entry): (String, Entry)| match decode(&key, &entry) {
            Ok(value) => Some((key, value)),
            Err(error) => {
                tracing::warn!(%error, "unreadable value passed over");
                None
            }
        };
        Ok(listing.entries.into_iter().filter_map(read).collect())
    }
}

/// Reads a value of the store.
fn decode<T: DeserializeOwned>(key: &str, entry: &Entry) -> Result<Versioned<T>, ClusterError> {
    serde_json::from_slice(&entry.value)
        .map(|value| Versioned { value, revision: entry.modified.0 })
        .map_err(|error| ClusterError::Unreadable { key: key.to_owned(), problem: error.to_string() })
}

/// Writes a value for the store.
fn encode(value: &impl serde::Serialize) -> Vec<u8> {
    // The model's types have text keys and no fallible Serialize, so this cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Finds the one endpoint that a reference (id or name) means among a snapshot's members.
///
/// # Errors
/// When there is none, or several networks have one of that name.
pub fn find_endpoint<'a>(
    snapshot: &'a Snapshot,
    reference: &str,
    network: Option<&str>,
) -> Result<&'a Arc<Endpoint>, ClusterError> {
    let network = match network {
        Some(text) => {
            Some(snapshot.network(text).ok_or_else(|| ClusterError::NoNetwork(text.to_owned()))?.id)
        }
        None => None,
    };
    let id: Option<EndpointId> = reference.parse().ok();
    let within = snapshot.members.iter().filter(|(id, _)| network.is_none_or(|wanted| wanted == **id));
    let matches: Vec<_> = within
        .flat_map(|(_, members)| members.endpoints.values())
        .filter(|endpoint| endpoint.name.as_str() == reference || id == Some(endpoint.id))
        .collect();
    match matches.as_slice() {
        [] => Err(ClusterError::NoEndpoint(reference.to_owned())),
        [one] => Ok(one),
        several => {
            let name = |endpoint: &&Arc<Endpoint>| {
                snapshot.networks.get(&endpoint.network).map(|n| n.name.to_string())
            };
            let networks = several.iter().filter_map(name).collect::<Vec<_>>().join(", ");
            Err(ClusterError::Ambiguous { name: reference.to_owned(), networks })
        }
    }
}
