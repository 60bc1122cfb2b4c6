//! From a sandbox's objects to the entries by which packets skip the stack: what the kernel's routes,
//! neighbours and forwarding entries say of a network, as the programs look it up. Nothing here speaks with
//! the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::kernel::ebpf::{ADDRESS_CONTAINER, Meaning, Place, Range, Way};
use crate::model::object::{Device, Link, LinkKind, Object, Route, Target};
use crate::model::subnet::width;
use crate::model::{EndpointId, MacAddr};

/// A network's entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    pub(super) containers: BTreeMap<Place, Meaning>,
    pub(super) ways: BTreeMap<Range, Way>,
}

/// The pair by which packets cross between a sandbox and the host, by its devices' numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Crossing {
    pub(super) inside: u32,
    pub(super) outside: u32,
    /// Whether something is balanced in the network.
    pub(super) balances: bool,
}

impl Paths {
    /// The entries for what is in the sandbox of the network with this number. These are the numbers of the
    /// containers' devices, and the nodes that only the kernel reaches.
    pub(super) fn through<'a>(
        network: u32,
        crossing: Crossing,
        devices: &BTreeMap<EndpointId, u32>,
        unfit: &BTreeSet<IpAddr>,
        objects: impl IntoIterator<Item = &'a Object> + Clone,
    ) -> Self {
        let found = Found::among(objects.clone());
        let mut paths = Self::default();
        for object in objects {
            match *object {
                Object::Neighbour { device: Device::Endpoint(id), address, mac } => {
                    let (Some(&interface), Some(&mtu)) = (devices.get(&id), found.mtus.get(&id)) else {
                        continue;
                    };
                    let meaning = Meaning {
                        kind: ADDRESS_CONTAINER,
                        interface,
                        mtu,
                        crossing: crossing.outside,
                        mac: mac.0,
                        balances: u16::from(crossing.balances),
                    };
                    paths.containers.insert(Place::new(network, address), meaning);
                }
                Object::Route(Route { destination, target: Target::Via(Device::Tunnel, hop), mtu }) => {
                    let way = found.way(hop, mtu, crossing, unfit);
                    paths.ways.extend(way.map(|way| (Range::new(network, destination), way)));
                }
                // The sandbox's own, also within a range that another node has: gateways, for one.
                Object::Address { address, .. } => {
                    let own = IpNetwork::from(address.ip());
                    paths.ways.insert(Range::new(network, own), Way::none());
                }
                // The kernel tells that nobody is there, also within such a range.
                Object::Route(Route { destination, target: Target::Unreachable, .. })
                    if destination.prefix() == width(destination.ip()) =>
                {
                    paths.ways.insert(Range::new(network, destination), Way::none());
                }
                _ => {}
            }
        }
        paths
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What other objects lead to.
#[derive(Default)]
struct Found {
    /// Of containers' devices that are up.
    mtus: BTreeMap<EndpointId, u32>,
    /// The tunnel's beginning, and its MTU.
    tunnel: Option<(IpAddr, MacAddr, u32)>,
    hops: BTreeMap<IpAddr, MacAddr>,
    ends: BTreeMap<MacAddr, (IpAddr, u16)>,
}

impl Found {
    fn among<'a>(objects: impl IntoIterator<Item = &'a Object>) -> Self {
        let mut found = Self::default();
        for object in objects {
            match *object {
                Object::Link(Link { device: Device::Endpoint(id), mtu, up: true, .. }) => {
                    found.mtus.insert(id, mtu);
                }
                Object::Link(Link {
                    kind: LinkKind::Vxlan { local, mac, .. }, mtu, up: true, ..
                }) => {
                    found.tunnel = Some((local, mac, mtu));
                }
                Object::Neighbour { device: Device::Tunnel, address, mac } => {
                    found.hops.insert(address, mac);
                }
                Object::Fdb { mac, remote, port } => {
                    found.ends.insert(mac, (remote, port));
                }
                _ => {}
            }
        }
        found
    }

    /// The way through a next hop; `None`: something of it is missing, and the kernel has no way either.
    fn way(
        &self,
        hop: IpAddr,
        mtu: Option<u32>,
        crossing: Crossing,
        unfit: &BTreeSet<IpAddr>,
    ) -> Option<Way> {
        let (local, local_mac, widest) = self.tunnel?;
        let remote_mac = *self.hops.get(&hop)?;
        let (remote, port) = *self.ends.get(&remote_mac)?;
        let mtu = mtu.map_or(widest, |mtu| mtu.min(widest));
        Some(Way {
            local: local.into(),
            remote: remote.into(),
            local_mac: local_mac.0,
            remote_mac: remote_mac.0,
            mtu,
            crossing: if unfit.contains(&remote) { 0 } else { crossing.inside },
            port: port.into(),
            zero: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Vni;

    const NETWORK: u32 = 4711;
    const CROSSING: Crossing = Crossing { inside: 3, outside: 30, balances: true };

    fn objects() -> Vec<Object> {
        let id: EndpointId = "0123456789ab".parse().unwrap();
        let mac = |last| MacAddr([2, 0, 0, 0, 0, last]);
        let link = |device, kind| Object::Link(Link { device, kind, mtu: 1450, up: true });
        let vni = Vni::new(NETWORK).unwrap();
        let local = "10.1.0.1".parse().unwrap();
        let (hop, remote): (IpAddr, IpAddr) = ("10.1.0.2".parse().unwrap(), "10.1.0.2".parse().unwrap());
        let route = |destination: &str, target, mtu| {
            Object::Route(Route { destination: destination.parse().unwrap(), target, mtu })
        };
        let device = Device::Endpoint(id);
        vec![
            link(Device::Tunnel, LinkKind::Vxlan { vni, local, port: 4789, mac: mac(1) }),
            link(device, LinkKind::Veth),
            Object::Address { device: Device::Loopback, address: "10.9.0.33/32".parse().unwrap() },
            Object::Neighbour { device: Device::Tunnel, address: hop, mac: mac(2) },
            Object::Neighbour { device, address: "10.9.0.5".parse().unwrap(), mac: mac(5) },
            Object::Fdb { mac: mac(2), remote, port: 4790 },
            route("10.9.0.0/24", Target::Unreachable, None),
            route("10.9.0.5/32", Target::Device(device), None),
            route("10.9.0.32/27", Target::Via(Device::Tunnel, hop), Some(1400)),
            route("10.9.0.40/32", Target::Unreachable, None),
            route("10.9.0.64/27", Target::Via(Device::Tunnel, "10.1.0.3".parse().unwrap()), None),
        ]
    }

    #[test]
    fn what_the_kernel_routes_the_programs_carry() {
        let objects = objects();
        let id: EndpointId = "0123456789ab".parse().unwrap();
        let paths = Paths::through(NETWORK, CROSSING, &[(id, 7)].into(), &BTreeSet::new(), &objects);
        let place = |address: &str| Place::new(NETWORK, address.parse::<IpAddr>().unwrap());
        let meaning = paths.containers[&place("10.9.0.5")];
        assert_eq!((meaning.kind, meaning.interface, meaning.mtu), (ADDRESS_CONTAINER, 7, 1450));
        assert_eq!((meaning.mac, meaning.crossing, meaning.balances), ([2, 0, 0, 0, 0, 5], 30, 1));
        let way = paths.ways[&Range::new(NETWORK, "10.9.0.32/27".parse().unwrap())];
        assert_eq!((IpAddr::from(way.remote), u16::from(way.port)), ("10.1.0.2".parse().unwrap(), 4790));
        assert_eq!((way.mtu, way.crossing, way.remote_mac), (1400, 3, [2, 0, 0, 0, 0, 2]));
        // Where only the kernel reaches a node, it has what is for that one.
        let unfit = ["10.1.0.2".parse().unwrap()].into();
        let paths_of_kernel = Paths::through(NETWORK, CROSSING, &[(id, 7)].into(), &unfit, &objects);
        let way = paths_of_kernel.ways[&Range::new(NETWORK, "10.9.0.32/27".parse().unwrap())];
        assert_eq!((way.mtu, way.crossing), (1400, 0));
        // Single addresses that nobody has, or the sandbox itself, and no whole subnet.
        for address in ["10.9.0.40/32", "10.9.0.33/32"] {
            let none = paths.ways[&Range::new(NETWORK, address.parse().unwrap())];
            assert_eq!(none, Way::none(), "{address}");
        }
        assert_eq!(paths.ways.len(), 3);
    }

    #[test]
    fn what_is_not_complete_is_left_to_the_kernel() {
        let id: EndpointId = "0123456789ab".parse().unwrap();
        // Without the container's device, its number, or the forwarding entry.
        let mut objects = objects();
        let paths = Paths::through(NETWORK, CROSSING, &BTreeMap::new(), &BTreeSet::new(), &objects);
        assert_eq!(paths.containers.len(), 0);
        objects.retain(|object| !matches!(object, Object::Link(Link { kind: LinkKind::Veth, .. })));
        objects.retain(|object| !matches!(object, Object::Fdb { .. }));
        let paths = Paths::through(NETWORK, CROSSING, &[(id, 7)].into(), &BTreeSet::new(), &objects);
        assert_eq!((paths.containers.len(), paths.ways.len()), (0, 2));
    }
}
