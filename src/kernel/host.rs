//! The host's own namespace: its ends of the sandboxes' pairs, forwarding, and what else is there.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::nsid::NsidAttribute;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::message::{self, Dev, Hop, VethEnd};
use super::netlink::{Netlink, NetlinkError, Request};
use super::netns::Netns;
use super::sandbox::Sandbox;
use super::{Error, ebpf, ipsec, observe, ready, sysctl};
use crate::model::NetworkId;
use crate::model::object::{
    ACCESS_PREFIX, CROSSING_PREFIX, Device, HostPair, LinkKind, Plug, UPLINK_PREFIX,
};

const HOST: &str = "the host's namespace";

/// The host's namespace and a socket in it.
pub struct Host {
    pub(super) netns: Netns,
    pub(super) netlink: Netlink,
}

/// What the host has beside ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its interfaces, without `lo`.
    pub interfaces: Vec<Interface>,
    /// The subnets of its interfaces and the destinations of its main table's routes, without
    /// default routes, what is as broad as these, and link-local IPv6 ones.
    pub subnets: BTreeSet<IpNetwork>,
    /// Through whom its routes lead.
    pub gateways: BTreeSet<IpAddr>,
}

/// A route to more than that, of IPv4 or of IPv6, is a way out, as default routes are: tunnels halve
/// those, and 2000::/3 is all that is routed.
const BROADEST: (u8, u8) = (8, 4);

/// An interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, without link-local IPv6 ones.
    pub addresses: Vec<IpNetwork>,
}

impl Host {
    /// Opens the calling thread's namespace.
    pub fn open() -> Result<Self, Error> {
        let netlink = Netlink::open().map_err(Error::system("open a netlink socket"))?;
        Ok(Self { netns: Netns::current()?, netlink })
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Makes the pair between host and sandbox where it is missing, or is not what it should be,
    /// and puts addresses, MTU and state of its host end right.
    pub fn ensure_pair(&mut self, sandbox: &mut Sandbox, wanted: &HostPair) -> Result<(), Error> {
        let (name, mtu) = (wanted.name.as_str(), wanted.mtu);
        let index = match self.device(name)? {
            Some(found) if self.leads_to(&found, sandbox, wanted.device)? => {
                self.set_forwarding(wanted)?;
                if !found.up || found.mtu != mtu {
                    let request = Request::new(message::link_up(Dev::Index(found.index), Some(mtu)));
                    self.netlink
                        .request(request)
                        .map_err(Error::netlink(format!("set up {name}"), HOST))?;
                }
                found.index
            }
            found => {
                if found.is_some() {
                    self.remove(name)?;
                }
                self.make_pair(sandbox, wanted)?
            }
        };
        self.set_addresses(index, wanted)
    }

    fn make_pair(&mut self, sandbox: &mut Sandbox, wanted: &HostPair) -> Result<u32, Error> {
        let far_name = wanted.device.to_string();
        let near = VethEnd { name: &wanted.name, mac: None };
        let far = VethEnd { name: &far_name, mac: None };
        let request = Request::create_device(message::veth(&near, &far, sandbox.netns(), wanted.mtu));
        let mut made = self.netlink.request(request.clone());
        if made.as_ref().is_err_and(|error| error.errno == Errno::EEXIST) {
            // The name is free here, so it is taken in the sandbox, where all such names are ours.
            sandbox.remove_links(std::slice::from_ref(&far_name))?;
            made = self.netlink.request(request);
        }
        let fail = || Error::netlink(format!("make {}", wanted.name), HOST);
        made.map_err(fail())?;
        self.set_forwarding(wanted)?;
        let up = Request::new(message::link_up(Dev::Name(&wanted.name), None));
        self.netlink.request(up).map_err(Error::netlink(format!("set up {}", wanted.name), HOST))?;
        let up = Request::new(message::link_up(Dev::Name(&far_name), None));
        sandbox
            .netlink
            .request(up)
            .map_err(Error::netlink(format!("set up {far_name}"), sandbox.name()))?;
        let gone = NetlinkError { errno: Errno::ENODEV, text: String::new() };
        let made = self.device(&wanted.name)?.map(|found| found.index).ok_or_else(|| fail()(gone))?;
        ready::tell(
            ready::sends(&mut self.netlink, made, ready::deadline()),
            "a pair's end",
            &wanted.name,
        );
        Ok(made)
    }

    /// The programs ask for the host's routes as if packets by a crossing were forwarded.
    fn set_forwarding(&self, pair: &HostPair) -> Result<(), Error> {
        match pair.device {
            Device::Crossing => self.netns.enter(|| sysctl::forward_from(&pair.name))?,
            _ => Ok(()),
        }
    }

    fn set_addresses(&mut self, index: u32, pair: &HostPair) -> Result<(), Error> {
        use RouteNetlinkMessage as M;
        let present: BTreeSet<IpNetwork> = self
            .addresses()?
            .into_iter()
            .filter(|found| found.index == index)
            .map(|a| a.network)
            .collect();
        let wanted: BTreeSet<IpNetwork> = pair.addresses.iter().copied().collect();
        let message = |address: &IpNetwork| message::address(index, *address, false);
        let remove = present.difference(&wanted).map(|old| Request::new(M::DelAddress(message(old))));
        let add = wanted.difference(&present).map(|new| Request::replace(M::NewAddress(message(new))));
        let requests: Vec<Request> = remove.chain(add).collect();
        let result: Result<Vec<()>, _> = self.netlink.batch(&requests).into_iter().collect();
        result.map(drop).map_err(Error::netlink(format!("set the addresses of {}", pair.name), HOST))?;
        let taken = ready::takes(&mut self.netlink, wanted.difference(&present), ready::deadline());
        ready::tell(taken, "a new address", &pair.name);
        Ok(())
    }

    /// Removes the host's ends of pairs that are not among `wanted`; goes on after one that fails.
    pub fn remove_pairs_but(&mut self, wanted: &BTreeSet<String>) -> Vec<Error> {
        let devices = match self.devices() {
            Ok(devices) => devices,
            Err(error) => return vec![error],
        };
        let is_pair = |found: &observe::Device| {
            [UPLINK_PREFIX, CROSSING_PREFIX].iter().any(|p| has_name(found, p))
        };
        let ours = devices.into_iter().filter(is_pair).map(|found| found.name);
        ours.filter(|name| !wanted.contains(name)).filter_map(|name| self.remove(&name).err()).collect()
    }

    fn remove(&mut self, name: &str) -> Result<(), Error> {
        match self.netlink.request(Request::new(message::link_delete(name))) {
            Err(error) if error.errno == Errno::ENODEV => Ok(()),
            result => result.map(drop).map_err(Error::netlink(format!("remove {name}"), HOST)),
        }
    }

    /// Makes the host forward packets of these families. It never switches forwarding off: others
    /// may need it.
    ///
    /// A host that forwards IPv6 ignores router advertisements unless `accept_ra` is 2, and so
    /// would lose its default route: where they are accepted now, they stay accepted.
    pub fn forward(&self, ipv4: bool, ipv6: bool) -> Result<(), Error> {
        self.netns.enter(|| {
            if ipv4 {
                sysctl::write("ipv4/ip_forward", "1")?;
            }
            if ipv6 && sysctl::has_ipv6() && sysctl::read("ipv6/conf/all/forwarding")? != "1" {
                for interface in sysctl::ipv6_interfaces()? {
                    let setting = format!("ipv6/conf/{interface}/accept_ra");
                    // An interface that has gone meanwhile needs nothing.
                    if sysctl::read(&setting).is_ok_and(|value| value == "1") {
                        sysctl::write(&setting, "2")?;
                    }
                }
                sysctl::write("ipv6/conf/all/forwarding", "1")?;
            }
            Ok(())
        })?
    }

    /// The device that has an address; `None`: none, or the loopback one.
    pub fn device_of(&mut self, address: IpAddr) -> Result<Option<String>, Error> {
        let addresses = self.addresses()?;
        let Some(found) = addresses.iter().find(|found| found.network.ip() == address) else {
            return Ok(None);
        };
        let devices = self.devices()?;
        let device = devices.into_iter().find(|device| device.index == found.index);
        Ok(device.filter(|device| device.kind != LinkKind::Loopback).map(|device| device.name))
    }

    /// Whether the host has policies of IPsec, which what it sends must not pass by.
    pub fn has_ipsec(&self) -> Result<bool, Error> {
        self.netns.enter(ipsec::has_policies)?.map_err(Error::system("ask for policies of IPsec"))
    }

    /// Detaches programs of ours from all devices; goes on after one that fails.
    pub fn detach_programs(&mut self) -> Vec<Error> {
        self.detach_where(|_| true)
    }

    /// Detaches programs of ours from the devices that are not ours, but this one; goes on after one that
    /// fails.
    pub fn detach_programs_but(&mut self, kept: Option<&str>) -> Vec<Error> {
        self.detach_where(|found| !is_ours(found) && Some(found.name.as_str()) != kept)
    }

    fn detach_where(&mut self, is_meant: impl Fn(&observe::Device) -> bool) -> Vec<Error> {
        let devices = match self.devices() {
            Ok(devices) => devices,
            Err(error) => return vec![error],
        };
        let failed = |device: observe::Device| match ebpf::detach(&device.name) {
            Err(error) if !error.device_is_gone() => Some(error.into()),
            _ => None,
        };
        devices.into_iter().filter(is_meant).filter_map(failed).collect()
    }

    /// Reads what the host has beside ours.
    pub fn inventory(&mut self) -> Result<Inventory, Error> {
        let mut inventory = Inventory::default();
        let devices = self.devices()?;
        let foreign = |found: &&observe::Device| found.kind != LinkKind::Loopback && !is_ours(found);
        let mut indexes = BTreeSet::new();
        let addresses = self.addresses()?;
        for found in devices.iter().filter(foreign) {
            indexes.insert(found.index);
            let own = addresses.iter().filter(|address| address.index == found.index);
            let addresses: Vec<IpNetwork> = own.map(|address| address.network).collect();
            inventory.subnets.extend(addresses.iter().filter_map(subnet));
            let (name, mtu, up) = (found.name.clone(), found.mtu, found.up);
            inventory.interfaces.push(Interface { name, mtu, up, addresses });
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.netlink.dump(&message::route_dump(family, false));
            for message in routes.map_err(Error::netlink("read routes", HOST))? {
                let RouteNetlinkMessage::NewRoute(message) = message else { continue };
                let Some(route) = observe::route(&message).filter(|route| !route.ours) else { continue };
                let elsewhere = match route.hop {
                    Hop::Unreachable => true,
                    Hop::Device(index) | Hop::Via(index, _) => indexes.contains(&index),
                };
                if let (true, Hop::Via(_, gateway)) = (elsewhere, route.hop) {
                    inventory.gateways.insert(gateway);
                }
                let broadest = if route.destination.is_ipv4() { BROADEST.0 } else { BROADEST.1 };
                let counts = elsewhere && route.destination.prefix() >= broadest;
                inventory.subnets.extend(counts.then(|| subnet(&route.destination)).flatten());
            }
        }
        Ok(inventory)
    }

    /// Whether the host's own end of a pair has all that it was given: somebody may have taken it away.
    pub fn has_end(&mut self, plug: &Plug) -> Result<bool, Error> {
        let Some(found) = self.device(plug.interface.as_str())? else { return Ok(false) };
        let present: BTreeSet<IpNetwork> = self
            .addresses()?
            .into_iter()
            .filter(|address| address.index == found.index)
            .map(|address| address.network)
            .collect();
        let mut ends = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.netlink.dump(&message::route_dump(family, true));
            let routes = routes.map_err(Error::netlink("read routes", HOST))?;
            ends.extend(routes.iter().filter_map(|message| {
                match message {
                    RouteNetlinkMessage::NewRoute(message) => observe::route(message)
                        .filter(|route| route.ours && route.hop.device() == Some(found.index))
                        .map(|route| route.destination),
                    _ => None,
                }
            }));
        }
        let routed = |range: &&IpNetwork| plug.gateways.iter().any(|g| g.is_ipv4() == range.is_ipv4());
        let gateways = plug.gateways.iter().map(|gateway| IpNetwork::from(*gateway));
        let wanted: BTreeSet<IpNetwork> =
            plug.routes.iter().filter(routed).copied().chain(gateways).collect();
        let addressed = plug.addresses.iter().all(|address| present.contains(address));
        Ok(found.up && found.mtu == plug.mtu && addressed && ends == wanted)
    }

    pub(super) fn devices(&mut self) -> Result<Vec<observe::Device>, Error> {
        let messages = self.netlink.dump(&message::link_dump());
        let messages = messages.map_err(Error::netlink("read devices", HOST))?;
        Ok(messages.iter().filter_map(observe::device_in).collect())
    }

    fn device(&mut self, name: &str) -> Result<Option<observe::Device>, Error> {
        let found = observe::device_by_name(&mut self.netlink, name);
        found.map_err(Error::netlink(format!("read {name}"), HOST))
    }

    fn addresses(&mut self) -> Result<Vec<observe::Address>, Error> {
        let messages = self.netlink.dump(&message::address_dump());
        let messages = messages.map_err(Error::netlink("read addresses", HOST))?;
        let addresses = messages.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) => observe::address(message),
            _ => None,
        });
        Ok(addresses.filter(|found| !is_link_local6(&found.network)).collect())
    }

    /// Whether a device's other end is this one of the sandbox.
    fn leads_to(
        &mut self,
        found: &observe::Device,
        sandbox: &mut Sandbox,
        end: Device,
    ) -> Result<bool, Error> {
        let id = nsid(&mut self.netlink, sandbox.netns())
            .map_err(Error::netlink("identify a namespace", HOST))?;
        if found.kind != LinkKind::Veth || id.is_none() || found.peer_netns != id {
            return Ok(false);
        }
        Ok(sandbox.device(end)?.is_some_and(|far| Some(far.index) == found.peer))
    }
}

/// The number by which a socket's namespace knows another one; `None`: it does not.
pub(super) fn nsid(netlink: &mut Netlink, other: &Netns) -> Result<Option<i32>, NetlinkError> {
    let replies = netlink.request(Request::new(message::nsid_get(other)))?;
    let id = replies.iter().find_map(|reply| match reply {
        RouteNetlinkMessage::NewNsId(reply) => {
            reply.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(id) => Some(*id),
                _ => None,
            })
        }
        _ => None,
    });
    Ok(id.filter(|id| *id >= 0))
}

/// Whether a device is the end of a sandbox's pair, or one by which the host is on a network.
fn is_ours(found: &observe::Device) -> bool {
    [UPLINK_PREFIX, CROSSING_PREFIX, ACCESS_PREFIX].iter().any(|prefix| has_name(found, prefix))
}

fn has_name(found: &observe::Device, prefix: &str) -> bool {
    found.kind == LinkKind::Veth && network_in(&found.name, prefix).is_some()
}

fn network_in(name: &str, prefix: &str) -> Option<NetworkId> {
    name.strip_prefix(prefix)?.parse().ok()
}

/// The network to which a device of the host leads, by its number in the thread's namespace.
pub fn network_of(device: u32) -> Option<NetworkId> {
    let name = nix::net::if_::if_indextoname(device).ok()?;
    network_by(name.to_str().ok()?)
}

/// The devices of the thread's namespace that lead to networks, by their numbers.
///
/// # Errors
/// When the devices cannot be read.
pub fn network_devices() -> std::io::Result<Vec<(u32, NetworkId)>> {
    let devices = nix::net::if_::if_nameindex()?;
    Ok(devices
        .iter()
        .filter_map(|found| Some((found.index(), network_by(found.name().to_str().ok()?)?)))
        .collect())
}

fn network_by(name: &str) -> Option<NetworkId> {
    [UPLINK_PREFIX, CROSSING_PREFIX, ACCESS_PREFIX].iter().find_map(|prefix| network_in(name, prefix))
}

fn is_link_local6(network: &IpNetwork) -> bool {
    matches!(network, IpNetwork::V6(network) if network.ip().is_unicast_link_local())
}

/// The subnet of an address, where it is one that could be in others' way.
fn subnet(address: &IpNetwork) -> Option<IpNetwork> {
    let multicast = address.ip().is_multicast();
    let subnet = IpNetwork::new(address.network(), address.prefix()).ok()?;
    (!multicast && !is_link_local6(&subnet)).then_some(subnet)
}
