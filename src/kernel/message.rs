//! The rtnetlink messages that make, change and remove our objects.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::neighbour_table::{
    NeighbourTableAttribute, NeighbourTableMessage, NeighbourTableParameter,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netns::Netns;
use crate::model::object::PROTOCOL;
use crate::model::subnet::width;
use crate::model::{MacAddr, Vni};

/// The link group (`IFLA_GROUP`) of devices that are being removed together.
pub(super) const REMOVAL_GROUP: u32 = PROTOCOL as u32;

/// How a device is named in a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dev<'a> {
    Name(&'a str),
    Index(u32),
}

/// One end of a veth pair.
pub(super) struct VethEnd<'a> {
    pub(super) name: &'a str,
    /// `None`: the kernel draws one.
    pub(super) mac: Option<MacAddr>,
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn link(dev: Dev<'_>) -> LinkMessage {
    let mut message = LinkMessage::default();
    match dev {
        Dev::Name(name) => message.attributes.push(LinkAttribute::IfName(name.to_owned())),
        Dev::Index(index) => message.header.index = index,
    }
    message
}

fn up(message: &mut LinkMessage) {
    message.header.flags |= LinkFlags::Up;
    message.header.change_mask |= LinkFlags::Up;
}

/// A pair of which `near` is in the socket's namespace and `far` in another. Both are down: an end
/// that is up tells that all of the connection has been set up.
pub(super) fn veth(
    near: &VethEnd<'_>,
    far: &VethEnd<'_>,
    far_ns: &Netns,
    mtu: u32,
) -> RouteNetlinkMessage {
    let end = |end: &VethEnd<'_>| {
        let mut message = link(Dev::Name(end.name));
        message.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.extend(end.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        message
    };
    let mut peer = end(far);
    peer.attributes.push(LinkAttribute::NetNsFd(far_ns.as_fd().as_raw_fd()));
    let mut message = end(near);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    RouteNetlinkMessage::NewLink(message)
}

/// A VXLAN device in `target`, whose UDP socket is in the netlink socket's namespace. Checksums and
/// TTL are the kernel's defaults; it learns nothing and floods nothing.
pub(super) fn vxlan(
    name: &str,
    target: &Netns,
    mtu: u32,
    mac: MacAddr,
    (vni, local, port): (Vni, IpAddr, u16),
) -> RouteNetlinkMessage {
    let mut message = link(Dev::Name(name));
    up(&mut message);
    let local = match local {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    };
    let id = InfoVxlan::Id(vni.number());
    // Programs of ours write no checksum over IPv6 either (RFC 6935): what is not for them is read here.
    let unchecked = matches!(local, InfoVxlan::Local6(_)).then_some(InfoVxlan::UDPZeroCsumRX(true));
    let data = [id, local, InfoVxlan::Port(port), InfoVxlan::Learning(false)];
    let data = data.into_iter().chain(unchecked).collect();
    message.attributes.extend([
        LinkAttribute::NetNsFd(target.as_fd().as_raw_fd()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(data)),
        ]),
    ]);
    RouteNetlinkMessage::NewLink(message)
}

/// Brings a device up, with this MTU where one is given, and takes back a mark for removal.
pub(super) fn link_up(dev: Dev<'_>, mtu: Option<u32>) -> RouteNetlinkMessage {
    let mut message = link(dev);
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    message.attributes.push(LinkAttribute::Group(0));
    up(&mut message);
    RouteNetlinkMessage::SetLink(message)
}

/// Brings up a container's end in its sandbox, with this MTU. Of ARP it takes only what comes from an
/// address that is routed to it (`rp_filter`): of each other sender the kernel would make a neighbour, in
/// a table that all namespaces share.
pub(super) fn end_up(index: u32, mtu: u32) -> RouteNetlinkMessage {
    let mut message = link_up(Dev::Index(index), Some(mtu));
    if let RouteNetlinkMessage::SetLink(message) = &mut message {
        let mut settings = InetDevConf::default();
        settings.rp_filter = 1;
        let settings = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![settings]));
    }
    message
}

/// Marks a device for [`delete_group`].
pub(super) fn link_group(name: &str) -> RouteNetlinkMessage {
    let mut message = link(Dev::Name(name));
    message.attributes.push(LinkAttribute::Group(REMOVAL_GROUP));
    RouteNetlinkMessage::SetLink(message)
}

/// Deletes all devices that [`link_group`] marked.
pub(super) fn delete_group() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(REMOVAL_GROUP));
    RouteNetlinkMessage::DelLink(message)
}

/// Deletes a device.
pub(super) fn link_delete(name: &str) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(link(Dev::Name(name)))
}

/// Asks for a device, without its counters.
pub(super) fn link_get(dev: Dev<'_>) -> RouteNetlinkMessage {
    let mut message = link(dev);
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

/// Asks for all devices, without their counters.
pub(super) fn link_dump() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

/// Asks for the number by which the socket's namespace knows another one.
pub(super) fn nsid_get(other: &Netns) -> RouteNetlinkMessage {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(other.as_fd().as_raw_fd() as u32));
    RouteNetlinkMessage::GetNsId(message)
}

/// Makes a device answer for others' addresses without the delay that RFC 925 proxies use.
pub(super) fn no_proxy_delay(index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourTableMessage::default();
    message.header.family = AddressFamily::Inet;
    message.attributes.extend([
        NeighbourTableAttribute::Name("arp_cache".to_owned()),
        NeighbourTableAttribute::Parms(vec![
            NeighbourTableParameter::Ifindex(index),
            NeighbourTableParameter::ProxyDelay(0),
        ]),
    ]);
    RouteNetlinkMessage::SetNeighbourTable(message)
}

/// An address of a device. `own_routes`: the kernel adds no route for its prefix.
pub(super) fn address(index: u32, address: IpNetwork, own_routes: bool) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip());
    message.header.prefix_len = address.prefix();
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.header.flags = AddressHeaderFlags::Permanent;
    let mut flags = AddressFlags::Permanent;
    if own_routes {
        flags |= AddressFlags::Noprefixroute;
    }
    if address.is_ipv6() {
        flags |= AddressFlags::Nodad;
    }
    message.attributes.extend([
        AddressAttribute::Local(address.ip()),
        AddressAttribute::Address(address.ip()),
        AddressAttribute::Flags(flags),
        AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
    ]);
    message
}

/// Asks for all addresses of both families.
pub(super) fn address_dump() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// A permanent neighbour entry.
pub(super) fn neighbour(index: u32, address: IpAddr, mac: MacAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.extend([
        NeighbourAttribute::Destination(address.into()),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ]);
    message
}

/// Asks for the neighbour entries of both families.
pub(super) fn neighbour_dump() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())
}

/// A forwarding entry of a VXLAN device.
pub(super) fn fdb(index: u32, mac: MacAddr, remote: IpAddr, port: u16) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    // What `bridge fdb add … permanent` sets: NUD_PERMANENT | NUD_NOARP.
    message.header.state = NeighbourState::Other(0xc0);
    message.header.flags = NeighbourFlags::Own;
    let remote = match remote {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    message.attributes.extend([
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Other(remote)),
        NeighbourAttribute::Port(port),
    ]);
    message
}

/// Asks for the forwarding entries of one device.
pub(super) fn fdb_dump(index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    RouteNetlinkMessage::GetNeighbour(message)
}

/// Where a route leads, with the device's index in place of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hop {
    Unreachable,
    Device(u32),
    Via(u32, IpAddr),
}

impl Hop {
    /// The device, where there is one.
    pub(super) fn device(self) -> Option<u32> {
        match self {
            Self::Device(index) | Self::Via(index, _) => Some(index),
            Self::Unreachable => None,
        }
    }
}

/// A route of the main table.
pub(super) fn route(destination: IpNetwork, hop: Hop, mtu: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(destination.ip());
    header.destination_prefix_length = destination.prefix();
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Other(PROTOCOL);
    header.kind = RouteType::Unicast;
    header.scope = RouteScope::Universe;
    let attributes = &mut message.attributes;
    if destination.prefix() > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(destination.network())));
    }
    match hop {
        Hop::Unreachable => header.kind = RouteType::Unreachable,
        Hop::Device(index) => {
            if destination.is_ipv4() {
                header.scope = RouteScope::Link;
            }
            attributes.push(RouteAttribute::Oif(index));
        }
        Hop::Via(index, gateway) => {
            header.flags = RouteFlags::Onlink;
            attributes.push(RouteAttribute::Oif(index));
            attributes.push(if gateway.is_ipv4() == destination.is_ipv4() {
                RouteAttribute::Gateway(gateway.into())
            } else {
                RouteAttribute::Via(RouteVia::from(gateway))
            });
        }
    }
    attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    message
}

/// Asks by which route a packet leaves.
pub(super) fn route_get(from: Option<IpAddr>, to: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(to);
    message.header.destination_prefix_length = width(to);
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(to)));
    if let Some(from) = from.filter(|from| from.is_ipv4() == to.is_ipv4()) {
        message.header.source_prefix_length = width(from);
        message.attributes.push(RouteAttribute::Source(RouteAddress::from(from)));
    }
    RouteNetlinkMessage::GetRoute(message)
}

/// Asks for the routes of the main table, only for ours where `ours`.
pub(super) fn route_dump(family: AddressFamily, ours: bool) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    if ours {
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
    }
    RouteNetlinkMessage::GetRoute(message)
}
