//! From the cluster's state to the kernel objects that one node needs: pure computation.
//!
//! [`sandbox`] and [`host`] say what must be there, [`plug()`] what goes into a container.
//! How a packet goes: container, its veth, the sandbox's routes, then another veth, the tunnel
//! device or the uplink. The sandbox is a router; nothing is flooded and nothing is learned.

mod firewall;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::lb::Balancer;
use crate::model::node::UplinkAddresses;
use crate::model::object::{
    Device, Host, HostPair, Link, LinkKind, Object, Plug, Route, Sandbox, Target, crossing_name,
    uplink_name,
};
use crate::model::subnet::width;
use crate::model::{Endpoint, Network, Node, NodeName};

/// The MTU of `lo`, which the kernel sets.
const LOOPBACK_MTU: u32 = 65_536;

/// What a computation needs to know of the cluster beside the network: who we are, who else is
/// there.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// This node.
    pub me: &'a Node,
    /// All nodes.
    pub nodes: &'a BTreeMap<NodeName, Arc<Node>>,
    /// How names are answered.
    pub names: NameService,
    /// Whether packets skip the stack where they can.
    pub fast: bool,
}

/// The destinations of default routes; no prefix is shorter than 0, and the compiler checks it.
const ANY4: IpNetwork = IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0).unwrap());
const ANY6: IpNetwork = IpNetwork::V6(Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0).unwrap());

/// How sandboxes answer names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NameService {
    /// Where every sandbox answers, beside its gateways.
    pub address: Option<Ipv4Addr>,
    /// How many packets of one client are taken a second; 0: all.
    pub rate: u32,
}

impl NameService {
    /// The fixed address, on a network that has its family.
    pub fn fixed(self, network: &Network) -> Option<IpAddr> {
        self.address.filter(|_| network.has_ipv4()).map(IpAddr::from)
    }

    /// Where a network's names are answered.
    pub fn servers(self, network: &Network) -> impl Iterator<Item = IpAddr> {
        network.standing().map(|subnet| subnet.gateway()).chain(self.fixed(network))
    }
}

/// The MTU of a network's interfaces on a node: what was asked for, as far as the underlay
/// carries it in one piece.
pub fn effective_mtu(me: &Node, network: &Network) -> u32 {
    network.mtu.map_or(me.mtu, |mtu| mtu.min(me.mtu))
}

/// Whose each block of a network's addresses is.
pub type Blocks = BTreeMap<IpNetwork, NodeName>;

/// All that a network needs on this node; `balancer` says what is balanced, or refused.
pub fn sandbox<'a>(
    around: Surroundings<'_>,
    network: &Network,
    blocks: &Blocks,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
    balancer: &Balancer,
) -> Sandbox {
    let mtu = effective_mtu(around.me, network);
    let mut objects = skeleton(around, network, mtu);
    objects.extend(block_objects(around, network, blocks));
    let mut refused = balancer.refused.clone();
    for endpoint in endpoints {
        // An endpoint and the end of the service that had its address are heard of on ways of their own.
        for address in &endpoint.addresses {
            refused.remove(address);
        }
        objects.extend(endpoint_objects(around, network, blocks, endpoint));
    }
    let held =
        |address: &IpAddr| Object::Address { device: Device::Loopback, address: host_net(*address) };
    objects.extend(balancer.addresses.iter().map(held));
    objects.extend(refused.into_iter().map(|a| route(host_net(a), Target::Unreachable, None)));
    Sandbox {
        network: network.id,
        objects,
        firewall: firewall::sandbox(network, around.names, balancer),
        pairs: pairs(around, network),
    }
}

/// The nftables table of a network's sandbox.
pub fn sandbox_firewall(network: &Network, names: NameService, balancer: &Balancer) -> String {
    firewall::sandbox(network, names, balancer)
}

/// What a sandbox has before any endpoint.
fn skeleton(around: Surroundings<'_>, network: &Network, mtu: u32) -> BTreeSet<Object> {
    let link = |device, kind, mtu| Object::Link(Link { device, kind, mtu, up: true });
    let me = around.me;
    let tunnel =
        LinkKind::Vxlan { vni: network.vni, local: me.underlay, port: me.tunnel_port, mac: me.vtep_mac };
    let mut objects = BTreeSet::from([
        link(Device::Loopback, LinkKind::Loopback, LOOPBACK_MTU),
        link(Device::Tunnel, tunnel, mtu),
    ]);
    if around.fast {
        objects.insert(link(Device::Crossing, LinkKind::Veth, mtu));
    }
    for subnet in &network.subnets {
        objects
            .insert(Object::Address { device: Device::Loopback, address: host_net(subnet.gateway()) });
        objects.insert(route(subnet.cidr(), Target::Unreachable, None));
    }
    if let Some(address) = around.names.fixed(network) {
        let address = host_net(address);
        objects.insert(Object::Address { device: Device::Loopback, address });
    }
    if !network.internal {
        let uplink = UplinkAddresses::new(network.uplink);
        objects.insert(link(Device::Uplink, LinkKind::Veth, mtu));
        let ends = [
            (network.has_ipv4(), uplink.sandbox4.into(), uplink.host4.into()),
            (network.has_ipv6(), uplink.sandbox6.into(), uplink.host6.into()),
        ];
        for (_, sandbox_end, host_end) in ends.into_iter().filter(|(used, ..)| *used) {
            objects.insert(Object::Address { device: Device::Uplink, address: pair_net(sandbox_end) });
            objects.insert(route(default_net(host_end), Target::Via(Device::Uplink, host_end), None));
        }
    }
    objects
}

/// What the blocks of the other nodes add to a network's sandbox: a route for each.
///
/// Nothing for a node that is not known (yet), or whose underlay is of the other address family.
pub fn block_objects(around: Surroundings<'_>, network: &Network, blocks: &Blocks) -> Vec<Object> {
    let of_others = blocks.iter().filter(|(_, node)| **node != around.me.name);
    let of_network = of_others.filter(|(range, _)| network.subnet_of(range.network()).is_some());
    let to = |(range, name): (&IpNetwork, &NodeName)| {
        Some(ways(around, network, peer(around, name)?, [*range]))
    };
    of_network.filter_map(to).flatten().collect()
}

/// What one endpoint adds to its network's sandbox: for a local one its veth and the routes into
/// it, for a remote one the routes to those of its addresses that are not within a block of its
/// node's, and what they need.
pub fn endpoint_objects(
    around: Surroundings<'_>,
    network: &Network,
    blocks: &Blocks,
    endpoint: &Endpoint,
) -> Vec<Object> {
    if endpoint.node == around.me.name {
        return local_objects(around.me, network, endpoint);
    }
    let in_block = |address: &IpAddr| {
        let block = network.subnet_of(*address).and_then(|subnet| subnet.block_of(*address));
        block.and_then(|range| blocks.get(&range)) == Some(&endpoint.node)
    };
    let single = endpoint.addresses.iter().filter(|a| !in_block(a)).map(|a| host_net(*a));
    match peer(around, &endpoint.node) {
        Some(node) => ways(around, network, node, single),
        None => Vec::new(),
    }
}

/// A node that can be reached from here.
fn peer<'a>(around: Surroundings<'a>, name: &NodeName) -> Option<&'a Arc<Node>> {
    around.nodes.get(name).filter(|node| node.underlay.is_ipv4() == around.me.underlay.is_ipv4())
}

fn local_objects(me: &Node, network: &Network, endpoint: &Endpoint) -> Vec<Object> {
    let device = Device::Endpoint(endpoint.id);
    let mtu = effective_mtu(me, network);
    let mut objects = vec![Object::Link(Link { device, kind: LinkKind::Veth, mtu, up: true })];
    for &address in &endpoint.addresses {
        objects.push(Object::Neighbour { device, address, mac: endpoint.mac });
        objects.push(route(host_net(address), Target::Device(device), None));
    }
    objects
}

/// Routes to ranges of addresses through a node, its neighbour entries and its forwarding entry.
fn ways(
    around: Surroundings<'_>,
    network: &Network,
    node: &Node,
    ranges: impl IntoIterator<Item = IpNetwork>,
) -> Vec<Object> {
    let (device, mac) = (Device::Tunnel, node.vtep_mac);
    let mtu = (node.mtu < effective_mtu(around.me, network)).then_some(node.mtu);
    let mut objects = Vec::new();
    for range in ranges {
        let next_hop = node.next_hop(range.is_ipv4());
        objects.push(Object::Fdb { mac, remote: node.underlay, port: node.tunnel_port });
        objects.push(Object::Neighbour { device, address: next_hop, mac });
        objects.push(route(range, Target::Via(device, next_hop), mtu));
    }
    objects
}

/// What goes into a local endpoint's container.
pub fn plug(around: Surroundings<'_>, network: &Network, endpoint: &Endpoint) -> Plug {
    let placed =
        endpoint.addresses.iter().filter_map(|&a| network.subnet_of(a).map(|subnet| (a, subnet)));
    let (addresses, gateways) = placed
        .filter_map(|(a, subnet)| {
            let prefix = if endpoint.host { width(a) } else { subnet.cidr().prefix() };
            Some((IpNetwork::new(a, prefix).ok()?, subnet.gateway()))
        })
        .unzip();
    Plug {
        endpoint: endpoint.id,
        netns: endpoint.attachment.netns.clone(),
        inode: endpoint.attachment.inode,
        interface: endpoint.attachment.interface.clone(),
        mac: endpoint.mac,
        mtu: effective_mtu(around.me, network),
        addresses,
        gateways,
        routes: network.subnets.iter().map(|subnet| subnet.cidr()).collect(),
        shared_routes: match (endpoint.host, network.internal) {
            // It has its own.
            (true, _) => Vec::new(),
            (false, false) => vec![ANY4, ANY6],
            (false, true) => around.names.fixed(network).map(IpNetwork::from).into_iter().collect(),
        },
    }
}

/// The pairs between the host and a network's sandbox.
fn pairs(around: Surroundings<'_>, network: &Network) -> Vec<HostPair> {
    let (mtu, id) = (effective_mtu(around.me, network), network.id);
    let pair = |device, name, addresses| HostPair { network: id, device, name, mtu, addresses };
    let uplink = (!network.internal).then(|| {
        let UplinkAddresses { host4, host6, .. } = UplinkAddresses::new(network.uplink);
        let ends = [(network.has_ipv4(), host4.into()), (network.has_ipv6(), host6.into())];
        let ends = ends.into_iter().filter(|(used, _)| *used).map(|(_, end)| pair_net(end));
        pair(Device::Uplink, uplink_name(id), ends.collect())
    });
    let crossing = around.fast.then(|| pair(Device::Crossing, crossing_name(id), Vec::new()));
    uplink.into_iter().chain(crossing).collect()
}

/// All that this node needs in its own namespace, for the networks that it uses.
pub fn host<'a>(around: Surroundings<'_>, networks: impl IntoIterator<Item = &'a Network>) -> Host {
    let all: Vec<&Network> = networks.into_iter().collect();
    let access = all.iter().any(|network| network.host_access);
    let pairs = all.iter().flat_map(|network| pairs(around, network)).collect();
    let with_uplink: Vec<&Network> = all.into_iter().filter(|network| !network.internal).collect();
    Host {
        firewall: firewall::host(around, !with_uplink.is_empty(), access),
        pairs,
        forward4: with_uplink.iter().any(|network| network.has_ipv4()),
        forward6: with_uplink.iter().any(|network| network.has_ipv6()),
    }
}

fn route(destination: IpNetwork, target: Target, mtu: Option<u32>) -> Object {
    Object::Route(Route { destination, target, mtu })
}

/// The range of one address.
fn host_net(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}

/// The range of a point-to-point link: /31 (RFC 3021) or /127 (RFC 6164).
fn pair_net(address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, width(address) - 1).unwrap_or_else(|_| host_net(address))
}

/// Every address of the same family: `0.0.0.0/0` or `::/0`.
fn default_net(like: IpAddr) -> IpNetwork {
    let any: IpAddr = match like {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    IpNetwork::new(any, 0).unwrap_or_else(|_| host_net(any))
}

#[cfg(test)]
mod tests;
