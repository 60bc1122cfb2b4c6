//! What each client is told: the zones of its networks, as the view shows them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Asker, Side};
use crate::dns::{DomainName, Names, Zone};
use crate::model::{Network, NetworkId, Node, Snapshot, Versioned};

/// What one client finds.
#[derive(Debug, Clone)]
pub(super) struct Client {
    /// The zones of its networks, the one on which it asks first.
    pub(super) zones: Arc<[Arc<Zone>]>,
    /// Whether it is the host: then nothing is its but what is told whole.
    pub(super) is_host: bool,
}

impl Client {
    /// Whether names that are not ours are asked for elsewhere.
    pub(super) fn forwards(&self) -> bool {
        !self.is_host && self.zones.iter().any(|zone| zone.forwards)
    }

    /// What it can ask for.
    pub(super) fn names<'a>(&'a self, domain: &'a DomainName) -> Names<'a> {
        Names { domain, zones: &self.zones, short: !self.is_host }
    }
}

/// What all clients of this node find.
#[derive(Debug, Clone, Default)]
pub(super) struct Knowledge {
    /// The newest of the store's revisions that this is from, folded into a serial number.
    pub(super) serial: u32,
    /// This node's containers, by network and address.
    containers: HashMap<(NetworkId, IpAddr), Client>,
    /// What the host finds: it is on no network, and finds the names of all.
    host: Option<Client>,
    /// By network: what anybody finds who is only known to be there.
    networks: HashMap<NetworkId, Client>,
}

impl Knowledge {
    /// What a container of this node finds, or the host.
    pub(super) fn client(&self, (side, address): Asker) -> Option<&Client> {
        match side {
            Side::Network(network) => self.containers.get(&(network, address)),
            Side::Host => self.host.as_ref(),
        }
    }

    /// What somebody finds who is on all networks of this node.
    pub(super) fn everything(&self) -> Client {
        let mut zones: Vec<Arc<Zone>> =
            self.networks.values().flat_map(|client| client.zones.iter().cloned()).collect();
        zones.sort_by(|a, b| a.name.cmp(&b.name));
        Client { zones: zones.into(), is_host: false }
    }

    /// What somebody finds who asks there, and is no container of this node as far as is known.
    pub(super) fn stranger(&self, side: Side) -> Option<&Client> {
        match side {
            Side::Network(network) => self.networks.get(&network),
            Side::Host => self.host.as_ref(),
        }
    }
}

/// An endpoint of a container: its network and addresses.
type Plugged<'a> = (NetworkId, &'a [IpAddr]);

/// The zones as they were made last, and from what.
pub(super) struct Zones {
    me: Node,
    snapshot: Snapshot,
    zones: BTreeMap<NetworkId, Arc<Zone>>,
}

impl Zones {
    pub(super) fn new(me: Node) -> Self {
        Self { me, snapshot: Snapshot::default(), zones: BTreeMap::new() }
    }

    /// Makes the zones that have changed, and gives what follows from all.
    pub(super) fn follow(&mut self, snapshot: Snapshot) -> Knowledge {
        let old = std::mem::replace(&mut self.snapshot, snapshot);
        let new = &self.snapshot;
        let same_services = Arc::ptr_eq(&old.services, &new.services) || old.services == new.services;
        let same_nodes = old.alive == new.alive && old.drained == new.drained;
        let mut before = std::mem::take(&mut self.zones);
        for (id, members) in &new.members {
            let Some(network) = new.networks.get(id) else { continue };
            let same = |network: &Arc<Versioned<Network>>| {
                old.networks.get(id).is_some_and(|old| Arc::ptr_eq(old, network))
                    && old.members.get(id).is_some_and(|old| Arc::ptr_eq(old, members))
            };
            let zone = match before.remove(id) {
                Some(zone) if same_services && same_nodes && same(network) => zone,
                _ => Arc::new(Zone::new(&self.me, new, network, members)),
            };
            self.zones.insert(*id, zone);
        }
        self.knowledge()
    }

    /// The zones as they were made last, with their networks.
    pub(super) fn networks(&self) -> impl Iterator<Item = (&Network, &Arc<Zone>)> {
        self.zones.iter().filter_map(|(id, zone)| Some((&self.snapshot.networks.get(id)?.value, zone)))
    }

    /// What the host finds; of networks with the same addresses first who has them on one that it reaches.
    fn host(&self, knowledge: &Knowledge) -> Client {
        let mut zones = knowledge.everything().zones.to_vec();
        let networks = &self.snapshot.networks;
        zones.sort_by_key(|zone| !networks.get(&zone.network).is_some_and(|n| n.host_access));
        Client { zones: zones.into(), is_host: true }
    }

    fn knowledge(&self) -> Knowledge {
        let revisions = self.snapshot.members.values().map(|members| members.revision);
        // Serial numbers are compared in a circle (RFC 1982).
        let serial = revisions.max().unwrap_or_default() as u32;
        let client = |networks: &[NetworkId]| Client {
            zones: networks.iter().filter_map(|id| self.zones.get(id).cloned()).collect(),
            is_host: false,
        };
        let networks: HashMap<NetworkId, Client> =
            self.zones.keys().map(|id| (*id, client(&[*id]))).collect();
        let mut places: BTreeMap<(u64, &str), Vec<Plugged<'_>>> = BTreeMap::new();
        for (id, members) in &self.snapshot.members {
            for endpoint in members.endpoints.values().filter(|e| e.node == self.me.name) {
                let container = (endpoint.attachment.inode, endpoint.attachment.boot.as_str());
                places.entry(container).or_default().push((*id, &endpoint.addresses));
            }
        }
        let mut containers = HashMap::new();
        for places in places.into_values() {
            for (here, addresses) in &places {
                let others = places.iter().map(|(id, _)| *id).filter(|id| id != here);
                let mut ids = vec![*here];
                ids.extend(others);
                ids.dedup();
                let client = match ids.as_slice() {
                    [one] => networks.get(one).cloned(),
                    several => Some(client(several)),
                };
                let Some(client) = client else { continue };
                containers.extend(addresses.iter().map(|address| ((*here, *address), client.clone())));
            }
        }
        let mut knowledge = Knowledge { serial, containers, host: None, networks };
        knowledge.host = Some(self.host(&knowledge));
        knowledge
    }
}
