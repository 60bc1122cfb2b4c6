//! From services and endpoints to what balances a network's connections on one node: pure.
//!
//! Every node's sandbox holds the addresses of the network's services and balances what its own
//! containers send there; nothing is balanced twice. What is balanced, [`Balancer`] says; the engine
//! that does it is the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::model::{
    Endpoint, EndpointState, External, Network, NetworkId, Node, NodeName, Prefer, Protocol, Scheduler,
    Service, Snapshot,
};

/// What a packet must be for, to be balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Front {
    /// One port at a service's address.
    Port {
        /// The protocol.
        protocol: Protocol,
        /// The service's address.
        address: IpAddr,
        /// The port.
        port: u16,
    },
    /// Everything for a service's address. Packets for it bear a mark, under which the kernel
    /// knows it.
    All {
        /// The service's address.
        address: IpAddr,
        /// The mark; unique among the addresses of a family.
        mark: u32,
    },
}

/// How the connections for one front are spread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spread {
    /// Which backend gets a new one.
    pub scheduler: Scheduler,
    /// For how many seconds a client keeps its backend.
    pub affinity: Option<u32>,
    /// The backends and their weights. One with weight 0 gets no new connections, and keeps those
    /// that it has. A port of 0 is the one that the client asked for.
    pub backends: BTreeMap<SocketAddr, u32>,
}

/// After which silence entries for connections go, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Of an established TCP connection.
    pub tcp: u32,
    /// Of a TCP connection that one side has ended.
    pub tcp_fin: u32,
    /// Of UDP.
    pub udp: u32,
}

/// Everything that balances one network's connections on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Balancer {
    /// The services' addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of them that no ready backend stands behind: they answer no ping.
    pub silent: BTreeSet<IpAddr>,
    /// What is balanced.
    pub fronts: BTreeMap<Front, Spread>,
    /// This node's backends, each with every address of its service: what a backend sends to its
    /// own service may come back to itself, and must then look as if the gateway had sent it.
    pub own: BTreeSet<(IpAddr, IpAddr)>,
    /// The gateway that speaks to each of them then.
    pub gateways: BTreeMap<IpAddr, IpAddr>,
    /// Targets outside of the overlay, each with every address of its service. What goes there leaves
    /// under the address of the uplink, so that its answers come back.
    pub outside: BTreeSet<(IpAddr, IpAddr)>,
    /// The longest that any of the services asks for, and the kernel's own where none does: there is
    /// one for each namespace. All 0 without services.
    pub timeouts: Timeouts,
    /// Addresses of services that this node does not balance, because nothing here does. Connections
    /// to them are refused: another node would balance them, and its answers would be in vain.
    pub refused: BTreeSet<IpAddr>,
}

/// Why an endpoint of a service gets no new connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// It is not ready; why is said.
    NotReady(EndpointState, String),
    /// Its node is dead.
    NodeDead,
    /// Its node is drained.
    NodeDrained,
    /// Nearer ones are preferred.
    Far,
}

impl fmt::Display for Out {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady(state, reason) if reason.is_empty() => state.fmt(f),
            Self::NotReady(state, reason) => write!(f, "{state}: {reason}"),
            Self::NodeDead => f.write_str("its node is dead"),
            Self::NodeDrained => f.write_str("its node is drained"),
            Self::Far => f.write_str("nearer ones are preferred"),
        }
    }
}

/// A service's endpoint as a backend of its.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Why it gets no new connections; `None`: it does.
    pub out: Option<Out>,
}

impl Backend<'_> {
    /// Its weight; 0 takes no new connections.
    pub fn weight(&self) -> u32 {
        if self.out.is_none() { u32::from(self.endpoint.weight) } else { 0 }
    }

    /// Whether it is on a node that is gone.
    fn is_gone(&self, gone: &BTreeSet<NodeName>) -> bool {
        self.out == Some(Out::NodeDead) && gone.contains(&self.endpoint.node)
    }

    /// Whether clients whose datagrams it gets by now go on with it. A client that sends on and on
    /// would never leave one that does not answer: of UDP nothing ever ends.
    fn keeps_datagrams(&self) -> bool {
        !matches!(&self.out, Some(Out::NodeDead | Out::NotReady(EndpointState::Unhealthy, _)))
    }
}

/// A service's target outside of the overlay as a backend of its.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// The target.
    pub external: External,
    /// Why it gets no new connections; `None`: it does. Nobody finds out whether it is well.
    pub out: Option<Out>,
}

impl Outside {
    /// Its weight: that of an endpoint which asks for none; 0 takes no new connections.
    pub fn weight(&self) -> u32 {
        u32::from(self.out.is_none())
    }
}

/// Why an endpoint takes no connections of its service, wherever they come from.
pub fn out(me: &Node, snapshot: &Snapshot, endpoint: &Endpoint) -> Option<Out> {
    match endpoint.state {
        // What this node knows of itself needs no lease.
        _ if endpoint.node != me.name && !snapshot.alive.contains(&endpoint.node) => Some(Out::NodeDead),
        EndpointState::Ready if snapshot.drained.contains_key(&endpoint.node) => Some(Out::NodeDrained),
        EndpointState::Ready => None,
        state => Some(Out::NotReady(state, endpoint.reason.clone())),
    }
}

/// The endpoints of a service on one network, as backends for the clients on this node.
pub fn backends<'a>(
    me: &Node,
    snapshot: &Snapshot,
    service: &Service,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> Vec<Backend<'a>> {
    let of_service = endpoints.into_iter().filter(|e| e.service.as_ref() == Some(&service.name));
    let backend = |endpoint| Backend { endpoint, out: out(me, snapshot, endpoint) };
    let mut backends: Vec<Backend<'a>> = of_service.map(backend).collect();
    if let Some(prefer) = &service.balancing.prefer {
        let is_near = |node: &NodeName| near(me, snapshot, prefer, node);
        if backends.iter().any(|b| b.out.is_none() && is_near(&b.endpoint.node)) {
            for backend in backends.iter_mut().filter(|b| !is_near(&b.endpoint.node)) {
                backend.out.get_or_insert(Out::Far);
            }
        }
    }
    backends
}

/// The targets of a service outside of the overlay, beside its backends on a network. They are near
/// to nobody.
pub fn outside(
    me: &Node,
    snapshot: &Snapshot,
    service: &Service,
    backends: &[Backend<'_>],
) -> Vec<Outside> {
    let is_near = |backend: &Backend<'_>| {
        let prefer = service.balancing.prefer.as_ref();
        backend.out.is_none()
            && prefer.is_some_and(|prefer| near(me, snapshot, prefer, &backend.endpoint.node))
    };
    let out = backends.iter().any(is_near).then_some(Out::Far);
    let outside = |external: &External| Outside { external: *external, out: out.clone() };
    service.external.iter().map(outside).collect()
}

/// Whether a node is one that is preferred from here.
fn near(me: &Node, snapshot: &Snapshot, prefer: &Prefer, node: &NodeName) -> bool {
    match prefer {
        Prefer::Node => *node == me.name,
        Prefer::Label(key) => {
            let label = me.labels.get(key);
            label.is_some() && snapshot.nodes.get(node).and_then(|node| node.labels.get(key)) == label
        }
    }
}

/// What balances a network's connections on this node. To the backends of nodes that are `gone` no
/// connection is kept.
pub fn balancer<'a>(
    me: &Node,
    snapshot: &Snapshot,
    gone: &BTreeSet<NodeName>,
    network: &Network,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> Balancer {
    let mut members: BTreeMap<&str, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        if let Some(service) = &endpoint.service {
            members.entry(service.as_str()).or_default().push(endpoint);
        }
    }
    let services = snapshot.services.values().map(AsRef::as_ref);
    let timeouts = Timeouts::in_effect(network.id, services);
    let mut balancer = Balancer { timeouts, ..Balancer::default() };
    let mut marks = Marks::default();
    for service in snapshot.services.values() {
        let Some(addresses) = service.addresses.get(&network.id) else { continue };
        let members = members.get(service.name.as_str()).map_or(&[][..], Vec::as_slice);
        let backends = backends(me, snapshot, service, members.iter().copied());
        let outside = outside(me, snapshot, service, &backends);
        let backends: Vec<Backend<'_>> =
            backends.into_iter().filter(|backend| !backend.is_gone(gone)).collect();
        for address in addresses {
            balancer.add(me, service, *address, (&backends, &outside), &mut marks);
        }
    }
    let own = balancer.own.iter().map(|(backend, _)| backend);
    let gateway = |own: &IpAddr| Some((*own, network.subnet_of(*own)?.gateway()));
    balancer.gateways = own.filter_map(gateway).collect();
    balancer
}

impl Balancer {
    /// That of a node on which nothing balances.
    pub fn refusing(snapshot: &Snapshot, network: &Network) -> Self {
        let addresses = snapshot.services.values().filter_map(|s| s.addresses.get(&network.id));
        Self { refused: addresses.flatten().copied().collect(), ..Self::default() }
    }

    /// What a firewall needs of it where the engine marks nothing and translates addresses itself.
    pub fn without_translation(&self) -> Self {
        let (addresses, silent, refused) =
            (self.addresses.clone(), self.silent.clone(), self.refused.clone());
        Self { addresses, silent, refused, ..Self::default() }
    }

    /// Whether nothing of another balancer needs a rule of a firewall that this one does not: a mark,
    /// or the translation for a backend that meets itself, or for a target outside.
    pub fn has_rules_for(&self, other: &Self) -> bool {
        let marked = |front: &&Front| matches!(front, Front::All { .. });
        other.own.is_subset(&self.own)
            && other.outside.is_subset(&self.outside)
            && other.fronts.keys().filter(marked).all(|front| self.fronts.contains_key(front))
    }

    fn add(
        &mut self,
        me: &Node,
        service: &Service,
        address: IpAddr,
        (backends, outside): (&[Backend<'_>], &[Outside]),
        marks: &mut Marks,
    ) {
        self.addresses.insert(address);
        let mut targets = Vec::new();
        for backend in backends {
            let addresses = &backend.endpoint.addresses;
            let Some(own) = addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4()) else {
                continue;
            };
            if backend.endpoint.node == me.name {
                self.own.insert((*own, address));
            }
            let (weight, keeps_datagrams) = (backend.weight(), backend.keeps_datagrams());
            targets.push(Target { address: *own, port: None, weight, keeps_datagrams });
        }
        for target in outside.iter().filter(|o| o.external.address.is_ipv4() == address.is_ipv4()) {
            let (External { address: own, port }, weight) = (target.external, target.weight());
            self.outside.insert((own, address));
            targets.push(Target { address: own, port, weight, keeps_datagrams: true });
        }
        if targets.iter().all(|target| target.weight == 0) {
            self.silent.insert(address);
        }
        let spread = |protocol: Option<Protocol>, target: u16| Spread {
            scheduler: service.balancing.scheduler,
            affinity: service.balancing.affinity,
            backends: targets
                .iter()
                .filter(|to| protocol != Some(Protocol::Udp) || to.keeps_datagrams)
                .map(|to| (SocketAddr::new(to.address, to.port.unwrap_or(target)), to.weight))
                .collect(),
        };
        if service.balancing.ports.is_empty() {
            self.fronts.insert(Front::All { address, mark: marks.of(address) }, spread(None, 0));
        }
        for port in &service.balancing.ports {
            let front = Front::Port { protocol: port.protocol, address, port: port.port };
            self.fronts.insert(front, spread(Some(port.protocol), port.target));
        }
    }
}

/// What stands behind a service's address: an endpoint's address, or one outside.
struct Target {
    address: IpAddr,
    /// Its port; `None`: that to which the service's port leads.
    port: Option<u16>,
    weight: u32,
    keeps_datagrams: bool,
}

impl Timeouts {
    /// What IPVS begins with (`tcp_timeouts` and `udp_timeouts` in net/netfilter/ipvs).
    pub const DEFAULT: Self = Self { tcp: 900, tcp_fin: 120, udp: 300 };

    /// What is in effect on a network with these services: of those that have an address there the
    /// longest that any asks for, each time by itself; the default where none asks. All 0 where none
    /// has an address.
    pub fn in_effect<'a>(network: NetworkId, services: impl IntoIterator<Item = &'a Service>) -> Self {
        let balanced = services.into_iter().filter(|s| s.addresses.contains_key(&network));
        let asked: Vec<_> = balanced.map(|service| service.balancing.timeouts).collect();
        if asked.is_empty() {
            return Self::default();
        }
        Self {
            tcp: asked.iter().filter_map(|t| t.tcp).max().unwrap_or(Self::DEFAULT.tcp),
            tcp_fin: asked.iter().filter_map(|t| t.tcp_fin).max().unwrap_or(Self::DEFAULT.tcp_fin),
            udp: asked.iter().filter_map(|t| t.udp).max().unwrap_or(Self::DEFAULT.udp),
        }
    }
}

/// Marks that were given to addresses.
#[derive(Default)]
struct Marks {
    given: BTreeSet<(bool, u32)>,
}

impl Marks {
    /// A mark that no other address of the family has: the address itself for IPv4, for IPv6 all its
    /// bits folded, or the next that is free.
    fn of(&mut self, address: IpAddr) -> u32 {
        let mut mark = match address {
            IpAddr::V4(address) => u32::from(address),
            IpAddr::V6(address) => {
                let words = address.octets();
                let words = words
                    .chunks_exact(4)
                    .map(|word| word.iter().fold(0, |all, byte| all << 8 | u32::from(*byte)));
                words.fold(0, |all: u32, word| all.rotate_left(9) ^ word)
            }
        };
        // 0 is a packet without a mark.
        while mark == 0 || !self.given.insert((address.is_ipv4(), mark)) {
            mark = mark.wrapping_add(1);
        }
        mark
    }
}

mod slots;
#[cfg(test)]
mod tests;
