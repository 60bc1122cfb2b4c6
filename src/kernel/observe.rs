//! What the kernel reports, as values of ours; `None` is for what is not ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::message::{self, Dev, Hop, REMOVAL_GROUP};
use super::netlink::{Netlink, NetlinkError, Request};
use crate::model::object::{LinkKind, PROTOCOL};
use crate::model::{MacAddr, Vni};

/// A device as the kernel reports it.
#[derive(Debug, Clone)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) up: bool,
    /// Whether it sends what it is given (RFC 2863, `ifOperStatus` up).
    pub(super) sends: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<MacAddr>,
    pub(super) kind: LinkKind,
    /// The index of the other end of a pair, and the number of the namespace in which that is;
    /// `None`: in the same.
    pub(super) peer: Option<u32>,
    pub(super) peer_netns: Option<i32>,
    /// Whether we have marked it for removal.
    pub(super) leaving: bool,
}

/// A device of the namespace of a socket, by its name; `None`: there is none.
pub(super) fn device_by_name(netlink: &mut Netlink, name: &str) -> Result<Option<Device>, NetlinkError> {
    match netlink.request(Request::new(message::link_get(Dev::Name(name)))) {
        Err(error) if error.errno == Errno::ENODEV => Ok(None),
        result => Ok(result?.iter().find_map(device_in)),
    }
}

/// The device that a message is about.
pub(super) fn device_in(message: &RouteNetlinkMessage) -> Option<Device> {
    match message {
        RouteNetlinkMessage::NewLink(message) => device(message),
        _ => None,
    }
}

/// Reads a device; its kind is [`LinkKind::Foreign`] where we make no such devices.
pub(super) fn device(message: &LinkMessage) -> Option<Device> {
    let mut device = Device {
        index: message.header.index,
        name: String::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        sends: false,
        mtu: 0,
        mac: None,
        kind: LinkKind::Foreign,
        peer: None,
        peer_netns: None,
        leaving: false,
    };
    let mut info: &[LinkInfo] = &[];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::OperState(state) => device.sends = *state == State::Up,
            LinkAttribute::Address(bytes) => device.mac = mac(bytes),
            LinkAttribute::Link(index) => device.peer = Some(*index),
            LinkAttribute::LinkNetNsId(id) => device.peer_netns = Some(*id),
            LinkAttribute::Group(group) => device.leaving = *group == REMOVAL_GROUP,
            LinkAttribute::LinkInfo(nested) => info = nested,
            _ => {}
        }
    }
    let loopback = message.header.flags.contains(LinkFlags::Loopback);
    device.kind = if loopback { LinkKind::Loopback } else { link_kind(info, &device) };
    (!device.name.is_empty()).then_some(device)
}

fn link_kind(info: &[LinkInfo], device: &Device) -> LinkKind {
    let has = |kind: &InfoKind| info.iter().any(|info| matches!(info, LinkInfo::Kind(k) if k == kind));
    if has(&InfoKind::Veth) {
        return LinkKind::Veth;
    }
    let data = info.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data.as_slice()),
        _ => None,
    });
    // Without the number of another namespace, its UDP socket is in this one.
    match (data, device.mac, device.peer_netns) {
        (Some(data), Some(mac), Some(_)) => vxlan(data, mac).unwrap_or(LinkKind::Foreign),
        _ => LinkKind::Foreign,
    }
}

/// `None`: a device that learns, floods or takes its destination from elsewhere is not ours.
fn vxlan(data: &[InfoVxlan], mac: MacAddr) -> Option<LinkKind> {
    let (mut vni, mut local, mut port) = (None, None, None);
    for attribute in data {
        match attribute {
            InfoVxlan::Id(number) => vni = Vni::new(*number),
            InfoVxlan::Local(address) => local = Some(IpAddr::V4(*address)),
            InfoVxlan::Local6(address) => local = Some(IpAddr::V6(*address)),
            InfoVxlan::Port(number) => port = Some(*number),
            InfoVxlan::Learning(true) | InfoVxlan::CollectMetadata(true) => return None,
            InfoVxlan::Group(_) | InfoVxlan::Group6(_) => return None,
            _ => {}
        }
    }
    Some(LinkKind::Vxlan { vni: vni?, local: local?, port: port?, mac })
}

fn mac(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}

/// An address of a device, with whether it is ours. Kernels before 5.18 keep no mark of it: there
/// every address of our devices counts but those of the loopback range.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) network: IpNetwork,
    pub(super) ours: bool,
}

/// Reads an address.
pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut remote, mut protocol) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => remote = Some(*address),
            AddressAttribute::Protocol(value) => protocol = Some(*value),
            _ => {}
        }
    }
    let network = IpNetwork::new(local.or(remote)?, message.header.prefix_len).ok()?;
    let ours = match protocol {
        Some(AddressProtocol::Other(number)) => number == PROTOCOL,
        Some(_) => false,
        None => !network.ip().is_loopback() && !super::reports_address_protocol(),
    };
    Some(Address { index: message.header.index, network, ours })
}

/// Reads a permanent neighbour entry of ours: device, address, Ethernet address.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr, MacAddr)> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut lladdr, mut ours) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(bytes),
            NeighbourAttribute::Protocol(RouteProtocol::Other(number)) => ours = *number == PROTOCOL,
            _ => {}
        }
    }
    ours.then_some((message.header.ifindex, address?, lladdr?))
}

/// Reads a forwarding entry: inner and outer destination, and the port where that is not the
/// device's own. The default entry (no inner destination) is left out.
pub(super) fn fdb(message: &NeighbourMessage) -> Option<(u32, MacAddr, IpAddr, Option<u16>)> {
    let (mut lladdr, mut remote, mut port) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(bytes),
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => remote = ip(bytes),
            NeighbourAttribute::Port(number) => port = Some(*number),
            _ => {}
        }
    }
    let lladdr = lladdr.filter(|mac| mac.0 != [0; 6])?;
    (message.header.family == AddressFamily::Bridge).then_some((
        message.header.ifindex,
        lladdr,
        remote?,
        port,
    ))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into());
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into());
    v4().or_else(v6)
}

/// A route of the main table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) destination: IpNetwork,
    pub(super) hop: Hop,
    pub(super) mtu: Option<u32>,
    pub(super) ours: bool,
}

/// Reads a route of the main table that leads to one device or says that nobody is there.
pub(super) fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let (mut destination, mut output, mut gateway, mut mtu) = (unspecified, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = route_ip(address)?,
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Gateway(address) => gateway = Some(route_ip(address)?),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let hop = match (header.kind, gateway) {
        (RouteType::Unreachable, _) => Hop::Unreachable,
        (RouteType::Unicast, None) => Hop::Device(output?),
        (RouteType::Unicast, Some(gateway)) => Hop::Via(output?, gateway),
        _ => return None,
    };
    let destination = IpNetwork::new(destination, header.destination_prefix_length).ok()?;
    let ours = header.protocol == RouteProtocol::Other(PROTOCOL);
    Some(Route { destination, hop, mtu, ours })
}

fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
