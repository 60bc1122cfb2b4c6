//! The kernel objects that make a network work on a node, as values.
//!
//! What should be there ([`crate::overlay`] computes it) and what is there (the kernel layer reads
//! it) are both sets of [`Object`]; [`crate::reconcile`] takes their difference.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnetwork::IpNetwork;

use super::{EndpointId, IfName, MacAddr, NetworkId, Vni};

/// The route and neighbour protocol number of everything we add (rtnetlink(7), `rtm_protocol`):
/// objects without it are not ours and are never touched. `ip` shows it as `proto 110`.
pub const PROTOCOL: u8 = 110;
/// The nftables table of ours (`inet` family), in the host's namespace and in every sandbox.
pub const TABLE: &str = "netctl";
/// The prefix of the names of sandbox namespaces, below /run/netns.
pub const SANDBOX_PREFIX: &str = "netctl-";
/// The prefix of the names of uplink devices in the host's namespace.
pub const UPLINK_PREFIX: &str = "nc-";

/// The prefix of the names of the devices in the host's namespace by which packets skip the stack.
pub const CROSSING_PREFIX: &str = "nf-";
/// The prefix of the names of the devices by which the host itself is on a network.
pub const ACCESS_PREFIX: &str = "nh-";

/// Under which group the kernel logs the packets that rules of ours drop (NFLOG): who watches listens there.
pub const DROP_GROUP: u16 = 4789;
/// The name of a network's sandbox namespace: `ip netns exec netctl-<network id>` works.
pub fn sandbox_name(network: NetworkId) -> String {
    format!("{SANDBOX_PREFIX}{network}")
}

/// The name of the host's end of a network's uplink.
pub fn uplink_name(network: NetworkId) -> String {
    format!("{UPLINK_PREFIX}{network}")
}

/// The name of the host's end of the pair by which a network's packets skip the stack.
pub fn crossing_name(network: NetworkId) -> String {
    format!("{CROSSING_PREFIX}{network}")
}

/// The name of the device by which the host itself is on a network.
pub fn access_name(network: NetworkId) -> String {
    format!("{ACCESS_PREFIX}{network}")
}

/// A device of a sandbox, by what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// `lo`, which holds the gateway addresses.
    Loopback,
    /// `vx0`, the VXLAN device to the other nodes.
    Tunnel,
    /// `up0`, the veth to the host.
    Uplink,
    /// `fp0`, the veth by which packets skip the stack on their way between containers and the wire.
    Crossing,
    /// `ve<endpoint id>`, the veth to a container.
    Endpoint(EndpointId),
}

impl Device {
    /// Reads a device name of a sandbox; `None`: the device is not ours.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "lo" => Some(Self::Loopback),
            "vx0" => Some(Self::Tunnel),
            "up0" => Some(Self::Uplink),
            "fp0" => Some(Self::Crossing),
            other => other.strip_prefix("ve")?.parse().ok().map(Self::Endpoint),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("lo"),
            Self::Tunnel => f.write_str("vx0"),
            Self::Uplink => f.write_str("up0"),
            Self::Crossing => f.write_str("fp0"),
            Self::Endpoint(id) => write!(f, "ve{id}"),
        }
    }
}

/// One kernel object in a sandbox.
///
/// The order of the variants is the order in which objects are added; they are removed in reverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A network device.
    Link(Link),
    /// An address of a device.
    Address {
        /// The device.
        device: Device,
        /// Address and prefix length.
        address: IpNetwork,
    },
    /// A permanent neighbour entry (ARP, NDP).
    Neighbour {
        /// The device.
        device: Device,
        /// Whose Ethernet address it gives.
        address: IpAddr,
        /// That Ethernet address.
        mac: MacAddr,
    },
    /// A forwarding entry of the tunnel device: frames for `mac` go to the VTEP at `remote`.
    Fdb {
        /// The inner destination.
        mac: MacAddr,
        /// The outer destination.
        remote: IpAddr,
        /// Its UDP port.
        port: u16,
    },
    /// A route in the main table.
    Route(Route),
}

/// The devices among objects, of which they are the first.
pub fn links(objects: &BTreeSet<Object>) -> impl Iterator<Item = Link> {
    objects.iter().map_while(|object| match object {
        Object::Link(link) => Some(*link),
        _ => None,
    })
}

/// The endpoints whose devices are among objects.
pub fn endpoints(objects: &BTreeSet<Object>) -> impl Iterator<Item = EndpointId> {
    links(objects).filter_map(|link| match link.device {
        Device::Endpoint(id) => Some(id),
        Device::Loopback | Device::Tunnel | Device::Uplink | Device::Crossing => None,
    })
}

/// A network device of a sandbox. It is always up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link {
    /// Which device.
    pub device: Device,
    /// What must hold of it beside its kind.
    pub kind: LinkKind,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up: always wanted, not always found.
    pub up: bool,
}

/// What a device is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkKind {
    /// The namespace's own `lo`.
    Loopback,
    /// A VXLAN device whose UDP socket is in the host's namespace.
    Vxlan {
        /// The network identifier.
        vni: Vni,
        /// The outer source address.
        local: IpAddr,
        /// The UDP port on which it receives.
        port: u16,
        /// Its own inner Ethernet address.
        mac: MacAddr,
    },
    /// One end of a pair.
    Veth,
    /// Anything else that bears the name of one of ours: it is in the way.
    Foreign,
}

/// A route in a sandbox's main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The destination.
    pub destination: IpNetwork,
    /// Where it leads.
    pub target: Target,
    /// The largest packet the route takes, where that is less than the device's MTU.
    pub mtu: Option<u32>,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Nowhere: senders are told that the host is unreachable.
    Unreachable,
    /// Straight into a device.
    Device(Device),
    /// Through a next hop, which is on the link whatever the addresses say (`onlink`).
    Via(Device, IpAddr),
}

/// What identifies an object among those of its kind: adding one replaces that with the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A device by name.
    Link(Device),
    /// An address as a whole.
    Address(Device, IpNetwork),
    /// A neighbour by device and address.
    Neighbour(Device, IpAddr),
    /// A forwarding entry by inner destination.
    Fdb(MacAddr),
    /// A route by destination.
    Route(IpNetwork),
}

impl Object {
    /// What the kernel tells objects of a kind apart by.
    pub fn key(&self) -> Key {
        match *self {
            Self::Link(link) => Key::Link(link.device),
            Self::Address { device, address } => Key::Address(device, address),
            Self::Neighbour { device, address, .. } => Key::Neighbour(device, address),
            Self::Fdb { mac, .. } => Key::Fdb(mac),
            Self::Route(route) => Key::Route(route.destination),
        }
    }
}

/// A step towards the desired state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take the object away. That it is gone already is success.
    Remove(Object),
    /// Put the object there, in the place of one with the same key. That it is there is success.
    Add(Object),
    /// Set MTU and state of a device that is otherwise right.
    Change(Link),
}

/// All that one network needs on this node, but for the insides of its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// The network.
    pub network: NetworkId,
    /// Devices, addresses, neighbours, forwarding entries and routes.
    pub objects: BTreeSet<Object>,
    /// The script (`nft -f`) that puts our table into the sandbox, replacing an older one.
    pub firewall: String,
    /// The pairs between host and sandbox.
    pub pairs: Vec<HostPair>,
}

/// A pair between host and sandbox, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPair {
    /// The network.
    pub network: NetworkId,
    /// The sandbox's end.
    pub device: Device,
    /// The device's name in the host's namespace ([`uplink_name`], [`crossing_name`]).
    pub name: String,
    /// The MTU of both ends.
    pub mtu: u32,
    /// The addresses of the host's end.
    pub addresses: Vec<IpNetwork>,
}

/// All that this node needs in the host's own namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// The script (`nft -f`) of our table.
    pub firewall: String,
    /// The host's ends of the sandboxes' pairs.
    pub pairs: Vec<HostPair>,
    /// Whether IPv4 packets must be forwarded.
    pub forward4: bool,
    /// Whether IPv6 packets must be forwarded.
    pub forward6: bool,
}

/// The inside of a container's interface, and the pair that leads to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plug {
    /// The endpoint, which names the sandbox's end.
    pub endpoint: EndpointId,
    /// The path of the container's namespace.
    pub netns: PathBuf,
    /// The inode that the namespace must have.
    pub inode: u64,
    /// The interface's name in the container.
    pub interface: IfName,
    /// The Ethernet address in the container.
    pub mac: MacAddr,
    /// The MTU of both ends.
    pub mtu: u32,
    /// The container's addresses with their subnets' prefix lengths. The kernel adds no route of
    /// its own for them (`noprefixroute`): everything goes through the gateway.
    pub addresses: Vec<IpNetwork>,
    /// The gateways, one for each address, in the same order. The container gets a permanent
    /// neighbour entry for each, a route to it, and `routes` and `shared_routes` through it.
    pub gateways: Vec<IpAddr>,
    /// Ranges that are reached through the gateway of their family.
    pub routes: Vec<IpNetwork>,
    /// Ranges that are reached in this way only where the container is on no other network through
    /// which it reaches them: the way out, or else the address at which every network answers names.
    pub shared_routes: Vec<IpNetwork>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_name() {
        let id: EndpointId = "0123456789ab".parse().unwrap();
        let all = [Device::Loopback, Device::Tunnel, Device::Uplink, Device::Crossing];
        for device in all.into_iter().chain([Device::Endpoint(id)]) {
            assert!(device.to_string().len() <= 15);
            assert_eq!(Device::from_name(&device.to_string()), Some(device));
        }
        for name in ["eth0", "ve", "veth0", "ve0123456789abc", "vx1"] {
            assert_eq!(Device::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn names_in_the_host_fit_the_kernel() {
        let network: NetworkId = "0123456789ab".parse().unwrap();
        for name in [uplink_name(network), crossing_name(network), access_name(network)] {
            assert!(name.parse::<IfName>().is_ok(), "{name}");
        }
    }
}
