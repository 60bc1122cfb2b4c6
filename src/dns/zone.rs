//! The names of one network.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use super::DomainName;
use crate::lb;
use crate::model::snapshot::Members;
use crate::model::{
    Endpoint, EndpointMode, EndpointState, Name, Network, NetworkId, Node, Service, Snapshot,
};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An endpoint.
    Endpoint,
    /// A service with an address of its own.
    Service,
    /// The endpoints of a service that take connections, and its targets outside.
    Tasks,
    /// The gateway.
    Gateway,
    /// A port of a service.
    Port,
    /// Nothing but the names below it (an empty non-terminal, RFC 8499).
    Branch,
}

/// What a name has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it stands for.
    pub kind: Kind,
    /// Its IPv4 addresses; most names have one.
    pub v4: SmallVec<[Ipv4Addr; 1]>,
    /// Its IPv6 addresses.
    pub v6: SmallVec<[Ipv6Addr; 1]>,
    /// Where what it stands for is reached: names within the network, and ports.
    pub ports: Vec<(DomainName, u16)>,
}

/// All names of one network, relative to it.
#[derive(Debug, Clone)]
pub struct Zone {
    /// The network.
    pub network: NetworkId,
    /// What it is called.
    pub name: Name,
    /// Whether names of others are asked for elsewhere.
    pub forwards: bool,
    /// Its subnets: an address of theirs is ours to tell of.
    subnets: Vec<ipnetwork::IpNetwork>,
    /// By the wire's form. Those of most names lie in the table itself, and so does what they have: of ten thousand
    /// none is in the processor's cache.
    names: HashMap<SmallVec<[u8; 24]>, Entry, RandomState>,
    addresses: HashMap<IpAddr, DomainName>,
}

impl Zone {
    /// The names of a network, as the snapshot has it for this node.
    pub fn new(me: &Node, snapshot: &Snapshot, network: &Network, members: &Members) -> Self {
        let mut zone = Self {
            network: network.id,
            name: network.name.clone(),
            forwards: !network.internal,
            subnets: network.standing().map(|subnet| subnet.cidr()).collect(),
            names: HashMap::with_capacity_and_hasher(members.endpoints.len(), RandomState::default()),
            addresses: HashMap::with_capacity(members.endpoints.len()),
        };
        let mut backends: BTreeMap<&Name, Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in members.endpoints.values() {
            let out = lb::out(me, snapshot, endpoint);
            if let (Some(service), None) = (&endpoint.service, &out) {
                backends.entry(service).or_default().push(endpoint);
            }
            // One that is drained is about to go: nobody is to begin anything with it.
            let is_drained = endpoint.state == EndpointState::Draining
                || endpoint.service.is_some() && snapshot.drained.contains_key(&endpoint.node);
            zone.add_endpoint(endpoint, !is_drained);
        }
        let here = snapshot.services.values().filter(|service| service.networks.contains(&network.id));
        for service in here {
            let ready = backends.get(&service.name).map_or(&[][..], Vec::as_slice);
            zone.add_service(service, ready);
        }
        for gateway in network.standing().map(|subnet| subnet.gateway()) {
            if let Some(name) = label("gateway") {
                zone.addresses.entry(gateway).or_insert_with(|| name.clone());
                // Who is called so is meant by that.
                let has_other = |entry: &Entry| !matches!(entry.kind, Kind::Gateway | Kind::Branch);
                if !zone.get(name.wire()).is_some_and(has_other) {
                    zone.insert(&name, Kind::Gateway, &[gateway]);
                }
            }
        }
        zone
    }

    /// What a name has that is relative to the network.
    pub fn get(&self, wire: &[u8]) -> Option<&Entry> {
        self.names.get(wire)
    }

    /// All names relative to the network, as the wire has them, with what they have.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&[u8], &Entry)> {
        self.names.iter().map(|(name, entry)| (&**name, entry))
    }

    /// Whose an address is, by its name within the network.
    pub fn name_of(&self, address: IpAddr) -> Option<&DomainName> {
        self.addresses.get(&address)
    }

    /// Whether an address is one of the network's.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| subnet.contains(address))
    }

    fn add_endpoint(&mut self, endpoint: &Endpoint, by_name: bool) {
        let Some(name) = label(endpoint.name.as_str()) else { return };
        for address in &endpoint.addresses {
            self.addresses.insert(*address, name.clone());
        }
        if !by_name {
            return;
        }
        self.insert(&name, Kind::Endpoint, &endpoint.addresses);
        for alias in endpoint.aliases.iter().filter(|alias| **alias != endpoint.name) {
            let Some(alias) = label(alias.as_str()) else { continue };
            self.insert(&alias, Kind::Endpoint, &endpoint.addresses);
        }
    }

    /// Adds a service, before which an endpoint of the same name stands back.
    fn add_service(&mut self, service: &Service, ready: &[&Endpoint]) {
        let Some(name) = label(service.name.as_str()) else { return };
        let mut backends: Vec<IpAddr> =
            ready.iter().flat_map(|endpoint| &endpoint.addresses).copied().collect();
        backends.extend(self.outside(service));
        self.names.remove(name.wire());
        match service.endpoint_mode {
            EndpointMode::Vip => {
                let own = service.addresses.get(&self.network).map_or(&[][..], Vec::as_slice);
                for address in own {
                    self.addresses.insert(*address, name.clone());
                }
                self.insert(&name, Kind::Service, own);
            }
            EndpointMode::Dnsrr => {
                self.insert(&name, Kind::Tasks, &backends);
            }
        }
        self.add_ports(service, &name, ready);
        if let Some(tasks) = label("tasks").and_then(|tasks| tasks.under(&name)) {
            self.insert(&tasks, Kind::Tasks, &backends);
        }
    }

    /// The addresses of a service's targets outside, of the families that the network has: its clients
    /// have no way to others.
    fn outside<'a>(&self, service: &'a Service) -> impl Iterator<Item = IpAddr> + use<'a> {
        let has = |ipv4| self.subnets.iter().any(|subnet| subnet.is_ipv4() == ipv4);
        let (has4, has6) = (has(true), has(false));
        let addresses: BTreeSet<IpAddr> = service.external.iter().map(|e| e.address).collect();
        addresses.into_iter().filter(move |address| if address.is_ipv4() { has4 } else { has6 })
    }

    /// Adds the named ports of a service: at its own address, or of each of its endpoints. What is
    /// outside has no name that could be told.
    fn add_ports(&mut self, service: &Service, name: &DomainName, ready: &[&Endpoint]) {
        for port in &service.balancing.ports {
            let Some(port_name) = &port.name else { continue };
            let (below, protocol) = (format!("_{port_name}"), format!("_{}", port.protocol));
            let full = DomainName::new([below.as_bytes(), protocol.as_bytes()]);
            let Some(full) = full.and_then(|full| full.under(name)) else { continue };
            let targets: Vec<(DomainName, u16)> = match service.endpoint_mode {
                EndpointMode::Vip => vec![(name.clone(), port.port)],
                EndpointMode::Dnsrr => {
                    let target =
                        |endpoint: &&Endpoint| Some((label(endpoint.name.as_str())?, port.target));
                    ready.iter().filter_map(target).collect()
                }
            };
            self.insert(&full, Kind::Port, &[]).ports.extend(targets);
        }
    }

    /// Gives a name addresses; what is above it exists then too.
    fn insert(&mut self, name: &DomainName, kind: Kind, addresses: &[IpAddr]) -> &mut Entry {
        let empty = |kind| Entry { kind, v4: SmallVec::new(), v6: SmallVec::new(), ports: Vec::new() };
        let mut above = name.clone();
        while let Some(parent) = above.parent() {
            self.names.entry(parent.wire().into()).or_insert_with(|| empty(Kind::Branch));
            above = parent;
        }
        let entry = self.names.entry(name.wire().into()).or_insert_with(|| empty(kind));
        if entry.kind == Kind::Branch {
            entry.kind = kind;
        }
        for address in addresses {
            match address {
                IpAddr::V4(address) => entry.v4.push(*address),
                IpAddr::V6(address) => entry.v6.push(*address),
            }
        }
        entry
    }
}

/// A name of one label.
fn label(text: &str) -> Option<DomainName> {
    DomainName::new([text.as_bytes()])
}
