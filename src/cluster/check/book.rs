//! All that the store has, sorted by what it is about.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::de::DeserializeOwned;

use crate::cluster::drain::Ack;
use crate::cluster::{endpoints, keys};
use crate::model::{
    Endpoint, EndpointId, Name, Network, NetworkId, Node, NodeId, NodeName, Reservation, Service,
    ServiceId, snapshot,
};
use crate::store::{Entry, Revision};

type Entries = BTreeMap<String, Entry>;

/// The content of the store at one revision.
#[derive(Default)]
pub(super) struct Book {
    /// Networks that have a record; `None`: it cannot be read.
    pub(super) networks: BTreeMap<NetworkId, Option<Network>>,
    /// Nodes that have a record, readable or not.
    pub(super) nodes: BTreeSet<NodeName>,
    pub(super) members: BTreeMap<NetworkId, Members>,
    pub(super) services: BTreeMap<ServiceId, (Service, Revision)>,
    pub(super) locals: BTreeMap<(NodeName, NetworkId, EndpointId), Revision>,
    pub(super) unreadable: Vec<Unreadable>,
}

/// A key that cannot be understood, or its value.
pub(super) struct Unreadable {
    pub(super) network: Option<NetworkId>,
    pub(super) key: String,
    pub(super) problem: String,
}

/// What the store has below a network's members.
#[derive(Default)]
pub(super) struct Members {
    /// All keys.
    pub(super) keys: Vec<(String, Revision)>,
    pub(super) endpoints: BTreeMap<EndpointId, Record>,
    /// Ids of records of other sorts: they may have addresses and names too.
    pub(super) others: BTreeSet<EndpointId>,
    /// Who has each address; `None`: it rests.
    pub(super) addresses: BTreeMap<IpAddr, Held>,
    pub(super) names: BTreeMap<Name, Held>,
    pub(super) blocks: BTreeMap<IpNetwork, (Revision, NodeName)>,
    pub(super) reservations: BTreeMap<Name, Kept>,
    pub(super) acks: BTreeMap<(EndpointId, NodeName), Revision>,
}

/// An endpoint's record; `None`: it cannot be read.
pub(super) struct Record {
    pub(super) revision: Revision,
    pub(super) endpoint: Option<Endpoint>,
}

/// What is kept, and whether that ends with a lease.
pub(super) struct Kept {
    pub(super) revision: Revision,
    pub(super) reservation: Reservation,
    pub(super) leased: bool,
}

/// Who has an address or a name, as its key says.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) revision: Revision,
    pub(super) by: Holder,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    Endpoint(EndpointId),
    Service(ServiceId),
    Resting,
    /// It rests without a lease that would end that.
    RestingForEver,
    Unreadable,
}

impl Book {
    pub(super) fn read(entries: &Entries) -> Self {
        let mut book = Self::default();
        for (key, entry) in entries {
            let read = if let Some(id) = key.strip_prefix(keys::NETWORKS) {
                book.network(id, entry)
            } else if let Some(name) = key.strip_prefix(keys::NODES) {
                book.node(name, entry)
            } else if let Some(name) = key.strip_prefix(keys::SERVICES) {
                book.service(name, entry)
            } else if key.starts_with(keys::ALIVE) {
                value::<NodeId>(entry).map(drop)
            } else if let Some(rest) = key.strip_prefix("members/") {
                book.member(key, rest, entry)
            } else if let Some(rest) = key.strip_prefix("local/") {
                book.local(rest, entry)
            } else {
                Ok(())
            };
            if let Err(problem) = read {
                let id = |rest: &str| rest.split('/').next()?.parse().ok();
                let network = ["members/", keys::NETWORKS].iter().find_map(|p| key.strip_prefix(p));
                let network = network.and_then(id);
                book.unreadable.push(Unreadable { network, key: key.clone(), problem });
            }
        }
        book
    }

    fn network(&mut self, id: &str, entry: &Entry) -> Result<(), String> {
        let id: NetworkId = parse(id)?;
        let network = value::<Network>(entry);
        let problem = network.as_ref().err().cloned();
        self.networks.insert(id, network.ok());
        problem.map_or(Ok(()), Err)
    }

    fn node(&mut self, name: &str, entry: &Entry) -> Result<(), String> {
        self.nodes.insert(parse(name)?);
        value::<Node>(entry).map(drop)
    }

    fn service(&mut self, name: &str, entry: &Entry) -> Result<(), String> {
        let (name, service): (Name, Service) = (parse(name)?, value(entry)?);
        if service.name != name {
            return Err(format!("it holds service {}", service.name));
        }
        self.services.insert(service.id, (service, entry.modified));
        Ok(())
    }

    fn local(&mut self, rest: &str, entry: &Entry) -> Result<(), String> {
        let mut parts = rest.splitn(3, '/');
        let mut part = || parts.next().unwrap_or_default();
        let place = (parse(part())?, parse(part())?, parse(part())?);
        self.locals.insert(place, entry.modified);
        Ok(())
    }

    fn member(&mut self, key: &str, rest: &str, entry: &Entry) -> Result<(), String> {
        let mut parts = rest.splitn(3, '/');
        let mut part = || parts.next().unwrap_or_default();
        let (network, sort, what): (NetworkId, _, _) = (parse(part())?, part(), part());
        let members = self.members.entry(network).or_default();
        let revision = entry.modified;
        members.keys.push((key.to_owned(), revision));
        match sort {
            "endpoints" => {
                let id: EndpointId = parse(what)?;
                let endpoint = endpoint(network, id, entry);
                let problem = endpoint.as_ref().err().cloned();
                members.endpoints.insert(id, Record { revision, endpoint: endpoint.ok() });
                problem.map_or(Ok(()), Err)
            }
            "addresses" => {
                let (by, read) = match entry.value.is_empty() {
                    true if entry.leased => (Holder::Resting, Ok(())),
                    true => (Holder::RestingForEver, Ok(())),
                    false => address_holder(entry),
                };
                members.addresses.insert(parse(what)?, Held { revision, by });
                read
            }
            "names" => {
                let (by, read) = holder(entry);
                members.names.insert(parse(what)?, Held { revision, by });
                read
            }
            "blocks" => {
                let (range, node) = (parse(what)?, value(entry)?);
                members.blocks.insert(range, (revision, node));
                Ok(())
            }
            "acks" => {
                let acked = keys::acked(what).ok_or("its name cannot be read")?;
                value::<Ack>(entry)?;
                members.acks.insert(acked, revision);
                Ok(())
            }
            "reservations" => {
                let kept = Kept { revision, reservation: value(entry)?, leased: entry.leased };
                members.reservations.insert(parse(what)?, kept);
                Ok(())
            }
            _ => {
                let id = what.split('/').next().and_then(|id| id.parse::<EndpointId>().ok());
                members.others.extend(id);
                Ok(())
            }
        }
    }

    /// The network with this name or id; also one that has members alone.
    pub(super) fn find(&self, reference: &str) -> Option<NetworkId> {
        let named = self.networks.iter().find(|(_, network)| {
            network.as_ref().is_some_and(|network| network.name.as_str() == reference)
        });
        let known = |id: &NetworkId| self.networks.contains_key(id) || self.members.contains_key(id);
        named.map(|(id, _)| *id).or_else(|| reference.parse().ok().filter(known))
    }

    /// What a network is called.
    pub(super) fn name(&self, id: NetworkId) -> String {
        let network = self.networks.get(&id).and_then(Option::as_ref);
        network.map_or_else(|| id.to_string(), |network| network.name.to_string())
    }

    /// An endpoint's record.
    pub(super) fn record(&self, network: NetworkId, id: EndpointId) -> Option<&Record> {
        self.members.get(&network)?.endpoints.get(&id)
    }

    /// The endpoints of networks that exist.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let members = self.members.iter().filter(|(id, _)| self.networks.contains_key(id));
        members.flat_map(|(_, members)| members.readable().map(|(endpoint, _)| endpoint))
    }
}

impl Members {
    /// The endpoints that can be read, each with the revision that wrote it.
    pub(super) fn readable(&self) -> impl Iterator<Item = (&Endpoint, Revision)> {
        let endpoint = |record: &'_ Record| record.revision;
        self.endpoints.values().filter_map(move |r| Some((r.endpoint.as_ref()?, endpoint(r))))
    }
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| format!("its name cannot be read: {error}"))
}

fn value<T: DeserializeOwned>(entry: &Entry) -> Result<T, String> {
    serde_json::from_slice(&entry.value).map_err(|error| format!("its value cannot be read: {error}"))
}

fn endpoint(network: NetworkId, id: EndpointId, entry: &Entry) -> Result<Endpoint, String> {
    let endpoint: Endpoint = value(entry)?;
    match (endpoint.network, endpoint.id) == (network, id) {
        true => Ok(endpoint),
        false => Err(format!("it holds endpoint {} of {}", endpoint.id, endpoint.network)),
    }
}

fn address_holder(entry: &Entry) -> (Holder, Result<(), String>) {
    match endpoints::holder(&entry.value) {
        snapshot::Holder::Service(id) => (Holder::Service(id), Ok(())),
        _ => holder(entry),
    }
}

fn holder(entry: &Entry) -> (Holder, Result<(), String>) {
    match value(entry) {
        Ok(id) => (Holder::Endpoint(id), Ok(())),
        Err(problem) => (Holder::Unreadable, Err(problem)),
    }
}
