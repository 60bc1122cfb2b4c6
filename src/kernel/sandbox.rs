//! A network's namespace on this node: its settings, what is in it, and changes to it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};

use ipnetwork::IpNetwork;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::ipvs::{self, Ipvs};
use super::message::{self, Dev, Hop};
use super::netlink::{Netlink, NetlinkError, Request};
use super::netns::Netns;
use super::unplug::Reaper;
use super::{Error, Host, observe, ready, sysctl};
use crate::model::object::{Device, Link, LinkKind, Object, Route, Step, Target};

/// What must hold in every sandbox. A sandbox routes between its devices, answers for addresses
/// that it routes to, and believes nothing that a container tells it about routing. Sources are
/// checked by nftables, where the right device of an address is known, so `rp_filter` is off; but at
/// containers' devices it is on, for ARP ([`message::end_up`]), and drops no packet that nftables lets pass.
const SETTINGS: [(&str, &str); 12] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/default/proxy_arp", "1"),
    // Another node's sandbox reports errors from the gateway address, which is ours too; nftables
    // lets nothing else from there pass.
    ("ipv4/conf/all/accept_local", "1"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/default/accept_source_route", "0"),
    ("ipv4/conf/default/forwarding", "1"),
];
const SETTINGS6: [(&str, &str); 13] = [
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/forwarding", "1"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/all/accept_redirects", "0"),
    ("ipv6/conf/default/accept_redirects", "0"),
    ("ipv6/conf/all/accept_source_route", "0"),
    ("ipv6/conf/default/accept_source_route", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    // No link-local addresses: neighbours are permanent, and the kernel would only talk to itself.
    ("ipv6/conf/default/addr_gen_mode", "1"),
];

/// What must hold where IPVS balances (Documentation/networking/ipvs-sysctl.rst): connections and
/// affinity to a backend that has gone, or takes nothing, end; a client's port that comes again is a
/// new connection; only a SYN begins one of TCP.
const SETTINGS_IPVS: [(&str, &str); 4] = [
    ("ipv4/vs/expire_nodest_conn", "1"),
    ("ipv4/vs/expire_quiescent_template", "1"),
    ("ipv4/vs/conn_reuse_mode", "1"),
    ("ipv4/vs/sloppy_tcp", "0"),
];
/// Whether IPVS leaves its packets to connection tracking.
const IPVS_TRACKS: &str = "ipv4/vs/conntrack";

/// An open sandbox: its namespace and a socket in it.
pub struct Sandbox {
    pub(super) name: String,
    pub(super) netns: Netns,
    pub(super) netlink: Netlink,
    pub(super) reaper: Reaper,
    /// Where the kernel has our devices, as last seen.
    indexes: BTreeMap<Device, u32>,
}

impl Sandbox {
    /// Opens the sandbox /run/netns/`name`, which it makes where it is missing, and puts its
    /// settings right.
    pub fn create(name: &str) -> Result<Self, Error> {
        let mut sandbox = Self::with(name, Netns::create_named(name)?)?;
        sandbox.check_settings()?;
        sandbox.check_ends()?;
        let up = sandbox.netlink.request(Request::new(message::link_up(Dev::Name("lo"), None)));
        up.map_err(Error::netlink("set up lo", name))?;
        Ok(sandbox)
    }

    /// Opens the sandbox /run/netns/`name`, which must be there.
    pub fn open(name: &str) -> Result<Self, Error> {
        Self::with(name, Netns::open_named(name)?)
    }

    fn with(name: &str, netns: Netns) -> Result<Self, Error> {
        let netlink = netns.enter(Netlink::open)?.map_err(Error::system("open a netlink socket"))?;
        let name = name.to_owned();
        Ok(Self { name, netns, netlink, reaper: Reaper::default(), indexes: BTreeMap::new() })
    }

    /// Its name below /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Puts the settings of containers' devices right that an earlier agent has made.
    fn check_ends(&self) -> Result<(), Error> {
        self.netns.enter(|| {
            let names = sysctl::ipv4_interfaces()?.into_iter();
            let mut ends =
                names.filter(|name| matches!(Device::from_name(name), Some(Device::Endpoint(_))));
            ends.try_for_each(|name| sysctl::write(&format!("ipv4/conf/{name}/rp_filter"), "1"))
        })?
    }

    /// Puts the namespace's settings right where they differ.
    pub fn check_settings(&self) -> Result<(), Error> {
        self.netns.enter(|| {
            let settings6 = if sysctl::has_ipv6() { SETTINGS6.as_slice() } else { &[] };
            SETTINGS
                .iter()
                .chain(settings6)
                .try_for_each(|(setting, value)| sysctl::write(setting, value))
        })?
    }

    /// Whether there are virtual services in the sandbox. Asks without having the kernel load IPVS.
    pub fn has_ipvs_services(&self) -> Result<bool, Error> {
        // Of this thread, so of the namespace that it is in.
        let read = || std::fs::read_to_string("/proc/thread-self/net/ip_vs");
        // Where IPVS is not loaded there is no such file. Three lines are its head.
        Ok(self.netns.enter(read)?.is_ok_and(|text| text.lines().count() > 3))
    }

    /// The connections that the sandbox's IPVS has.
    pub fn ipvs_connections(&self) -> Result<Vec<ipvs::Connection>, Error> {
        self.netns.enter(ipvs::connections)?.map_err(Error::system("read the connections of IPVS"))
    }

    /// Opens the sandbox's IPVS.
    pub fn open_ipvs(&self) -> Result<Ipvs, Error> {
        self.netns.enter(Ipvs::open)?.map_err(Error::ipvs(&self.name))
    }

    /// Puts the settings of the sandbox's IPVS right where they differ. `tracked`: connection tracking
    /// follows the packets that nftables lets it see.
    pub fn set_ipvs(&self, tracked: bool) -> Result<(), Error> {
        self.netns.enter(|| {
            let tracks = (IPVS_TRACKS, if tracked { "1" } else { "0" });
            let mut settings = SETTINGS_IPVS.iter().chain([&tracks]);
            settings.try_for_each(|(setting, value)| sysctl::write(setting, value))
        })?
    }

    /// Reads all objects of ours that are in the sandbox.
    pub fn observe(&mut self) -> Result<BTreeSet<Object>, Error> {
        let devices = self.read_devices()?;
        let known: BTreeMap<u32, &(Device, observe::Device)> =
            devices.iter().map(|known| (known.1.index, known)).collect();
        let device = |index: u32| known.get(&index).map(|(device, _)| *device);
        let mut objects = BTreeSet::new();
        for (device, found) in &devices {
            // A mark for removal that is left over, by an agent that was killed, is taken back when
            // the device is brought up again.
            let up = found.up && !found.leaving;
            let link = Link { device: *device, kind: found.kind, mtu: found.mtu, up };
            objects.insert(Object::Link(link));
        }
        for message in self.dump(&message::address_dump(), "addresses")? {
            let RouteNetlinkMessage::NewAddress(message) = message else { continue };
            let Some(found) = observe::address(&message).filter(|found| found.ours) else { continue };
            match device(found.index) {
                None | Some(Device::Endpoint(_)) => {}
                Some(device) => {
                    objects.insert(Object::Address { device, address: found.network });
                }
            }
        }
        for message in self.dump(&message::neighbour_dump(), "neighbours")? {
            let RouteNetlinkMessage::NewNeighbour(message) = message else { continue };
            let Some((index, address, mac)) = observe::neighbour(&message) else { continue };
            objects.extend(device(index).map(|device| Object::Neighbour { device, address, mac }));
        }
        if let Some((_, tunnel)) = devices.iter().find(|(device, _)| *device == Device::Tunnel) {
            objects.extend(self.observe_fdb(tunnel)?);
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in self.dump(&message::route_dump(family, true), "routes")? {
                let RouteNetlinkMessage::NewRoute(message) = message else { continue };
                let Some(found) = observe::route(&message).filter(|found| found.ours) else { continue };
                let target = match found.hop {
                    Hop::Unreachable => Some(Target::Unreachable),
                    Hop::Device(index) => device(index).map(Target::Device),
                    Hop::Via(index, gateway) => device(index).map(|device| Target::Via(device, gateway)),
                };
                let (destination, mtu) = (found.destination, found.mtu);
                objects.extend(target.map(|target| Object::Route(Route { destination, target, mtu })));
            }
        }
        Ok(objects)
    }

    fn observe_fdb(&mut self, tunnel: &observe::Device) -> Result<Vec<Object>, Error> {
        // Only a VXLAN device has a port and takes entries of this kind.
        let LinkKind::Vxlan { port: own_port, .. } = tunnel.kind else { return Ok(Vec::new()) };
        let entries = self.dump(&message::fdb_dump(tunnel.index), "forwarding entries")?;
        let entries = entries.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => observe::fdb(&message),
            _ => None,
        });
        let entries = entries.filter(|(index, ..)| *index == tunnel.index);
        Ok(entries
            .map(|(_, mac, remote, port)| Object::Fdb { mac, remote, port: port.unwrap_or(own_port) })
            .collect())
    }

    /// Takes the steps in their order, goes on after one that fails, and returns those with their
    /// errors. VXLAN devices have their sockets in the namespace of `host`.
    ///
    /// An uplink or an endpoint's device is not made here, because its other end is elsewhere:
    /// adding one that is there sets its MTU and brings it up.
    pub fn apply(&mut self, host: &mut Host, steps: &[Step]) -> Vec<(Step, Error)> {
        let mut failed = Vec::new();
        let mut rest = steps;
        while let Some(first) = rest.first() {
            let sort = Sort::of(first);
            let count = rest.iter().take_while(|step| Sort::of(step) == sort).count();
            let (run, next) = rest.split_at(count);
            rest = next;
            match sort {
                Sort::RemoveLink => self.remove_devices(run, &mut failed),
                Sort::AddLink => {
                    let results = run.iter().map(|step| (*step, self.add_link(host, step)));
                    let errors = results.filter_map(|(step, result)| Some((step, result.err()?)));
                    failed.extend(errors.collect::<Vec<_>>());
                }
                Sort::Rest => self.apply_run(run, &mut failed),
            }
        }
        failed
    }

    fn remove_devices(&mut self, run: &[Step], failed: &mut Vec<(Step, Error)>) {
        let devices = run.iter().filter_map(|step| match step {
            // The namespace's own device stays.
            Step::Remove(Object::Link(link)) if link.device != Device::Loopback => {
                Some((step, link.device.to_string()))
            }
            _ => None,
        });
        let (run, names): (Vec<&Step>, Vec<String>) = devices.unzip();
        let Err(error) = self.remove_links(&names) else { return };
        tracing::warn!(%error, sandbox = self.name, "devices not removed together");
        // One that cannot be removed is not to keep the others.
        for (step, name) in run.into_iter().zip(&names) {
            match self.netlink.request(Request::new(message::link_delete(name))) {
                Err(error) if error.errno != Errno::ENODEV => {
                    failed.push((*step, Error::netlink(format!("remove {name}"), &*self.name)(error)));
                }
                _ => {}
            }
        }
    }

    fn add_link(&mut self, host: &mut Host, step: &Step) -> Result<(), Error> {
        let (Step::Add(Object::Link(link)) | Step::Change(link)) = *step else { return Ok(()) };
        let name = link.device.to_string();
        if let (Step::Add(_), LinkKind::Vxlan { vni, local, port, mac }) = (step, link.kind) {
            let message = message::vxlan(&name, &self.netns, link.mtu, mac, (vni, local, port));
            match host.netlink.request(Request::create_device(message)) {
                Err(error) if error.errno == Errno::EEXIST => self.is_as_wanted(&link, error)?,
                Err(error) if error.errno == Errno::EOPNOTSUPP => {
                    let hint = "load the module vxlan (CONFIG_VXLAN), for example with modprobe vxlan";
                    return Err(Error::Unsupported { what: "VXLAN", hint });
                }
                result => drop(result.map_err(Error::netlink(format!("make {name}"), &*self.name))?),
            }
        }
        let request = Request::new(message::link_up(Dev::Name(&name), Some(link.mtu)));
        match self.netlink.request(request) {
            Err(error) if error.errno == Errno::ENODEV => {
                Err(Error::NoDevice { sandbox: self.name.clone(), device: link.device })
            }
            result => result.map_err(Error::netlink(format!("set up {name}"), &*self.name)).map(drop),
        }
    }

    /// Whether a device that exists is the one that was to be made. If not, the name or the VNI is
    /// taken by another.
    fn is_as_wanted(&mut self, link: &Link, error: NetlinkError) -> Result<(), Error> {
        let devices = self.read_devices()?;
        let same =
            devices.iter().any(|(device, found)| *device == link.device && found.kind == link.kind);
        let action = format!("make {}: its name, or its VNI with its port, is taken", link.device);
        if same { Ok(()) } else { Err(Error::netlink(action, &*self.name)(error)) }
    }

    /// Takes steps that concern no devices as such, all in one go.
    fn apply_run(&mut self, run: &[Step], failed: &mut Vec<(Step, Error)>) {
        let missing = |index: &BTreeMap<Device, u32>| {
            run.iter()
                .any(|step| object(step).and_then(device_of).is_some_and(|d| !index.contains_key(&d)))
        };
        if missing(&self.indexes)
            && let Err(error) = self.read_devices()
        {
            tracing::warn!(%error, sandbox = self.name, "devices not read");
        }
        let mut retry = self.send_run(run, failed);
        // A device was made anew by somebody: its index is another one now.
        if !retry.is_empty() && self.read_devices().is_ok() {
            let mut second = Vec::new();
            retry = self.send_run(&retry.iter().map(|(step, _)| *step).collect::<Vec<_>>(), &mut second);
            failed.extend(second);
        }
        failed.extend(retry);
        self.wait_for_addresses(run, failed);
    }

    /// Waits until what is sent to addresses that were added is not lost any more.
    fn wait_for_addresses(&mut self, run: &[Step], failed: &[(Step, Error)]) {
        let added: Vec<IpNetwork> = run
            .iter()
            .filter(|step| !failed.iter().any(|(other, _)| other == *step))
            .filter_map(|step| match step {
                Step::Add(Object::Address { address, .. }) => Some(*address),
                _ => None,
            })
            .collect();
        let taken = ready::takes(&mut self.netlink, &added, ready::deadline());
        ready::tell(taken, "a new address", &self.name);
    }

    /// Returns the steps that failed because of a device that has gone; other failures go to
    /// `failed`.
    fn send_run(&mut self, run: &[Step], failed: &mut Vec<(Step, Error)>) -> Vec<(Step, Error)> {
        let mut steps = Vec::with_capacity(run.len());
        let mut requests = Vec::with_capacity(run.len());
        for step in run {
            match request(step, &self.indexes) {
                Ok(None) => {}
                Ok(Some(request)) => {
                    steps.push(*step);
                    requests.push(request);
                }
                Err(device) => {
                    failed.push((*step, Error::NoDevice { sandbox: self.name.clone(), device }));
                }
            }
        }
        let mut gone = Vec::new();
        for (step, result) in steps.into_iter().zip(self.netlink.batch(&requests)) {
            let Err(error) = result else { continue };
            if is_done(&step, error.errno) {
                continue;
            }
            let stale = error.errno == Errno::ENODEV;
            let error = Error::netlink(describe(&step), &*self.name)(error);
            if stale { gone.push((step, error)) } else { failed.push((step, error)) }
        }
        gone
    }

    /// Reads all devices of ours and remembers where they are.
    pub(super) fn read_devices(&mut self) -> Result<Vec<(Device, observe::Device)>, Error> {
        let messages = self.dump(&message::link_dump(), "devices")?;
        let devices: Vec<_> = messages
            .iter()
            .filter_map(observe::device_in)
            .filter_map(|found| Some((Device::from_name(&found.name)?, found)))
            .collect();
        self.indexes = devices.iter().map(|(device, found)| (*device, found.index)).collect();
        Ok(devices)
    }

    /// One of its devices, if it is there.
    pub(super) fn device(&mut self, device: Device) -> Result<Option<observe::Device>, Error> {
        let name = device.to_string();
        let found = observe::device_by_name(&mut self.netlink, &name);
        found.map_err(Error::netlink(format!("read {name}"), &*self.name))
    }

    pub(super) fn learn_index(&mut self, device: Device, index: u32) {
        self.indexes.insert(device, index);
    }

    fn dump(
        &mut self,
        request: &RouteNetlinkMessage,
        what: &'static str,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.netlink.dump(request).map_err(Error::netlink(format!("read {what}"), &*self.name))
    }
}

impl AsFd for Sandbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }
}

/// Removes a sandbox with all that is in it. That it is gone already is success. When it returns,
/// its devices have gone from the containers and from the host, and its VNI is free.
pub fn delete_sandbox(name: &str) -> Result<(), Error> {
    match Sandbox::open(name) {
        Ok(mut sandbox) => {
            let devices = sandbox.read_devices()?;
            let names = devices.into_iter().filter(|(device, _)| *device != Device::Loopback);
            sandbox.remove_links(&names.map(|(_, found)| found.name).collect::<Vec<_>>())?;
        }
        // Nothing, or only a file, is left of it.
        Err(Error::Path { .. } | Error::NotNetns { .. }) => {}
        Err(error) => return Err(error),
    }
    Netns::remove_named(name)
}

/// Steps of one sort are taken together.
#[derive(PartialEq, Eq)]
enum Sort {
    RemoveLink,
    AddLink,
    Rest,
}

impl Sort {
    fn of(step: &Step) -> Self {
        match step {
            Step::Remove(Object::Link(_)) => Self::RemoveLink,
            Step::Add(Object::Link(_)) | Step::Change(_) => Self::AddLink,
            Step::Add(_) | Step::Remove(_) => Self::Rest,
        }
    }
}

fn object(step: &Step) -> Option<Object> {
    match step {
        Step::Add(object) | Step::Remove(object) => Some(*object),
        Step::Change(_) => None,
    }
}

fn device_of(object: Object) -> Option<Device> {
    match object {
        Object::Link(link) => Some(link.device),
        Object::Address { device, .. } | Object::Neighbour { device, .. } => Some(device),
        Object::Fdb { .. } => Some(Device::Tunnel),
        Object::Route(route) => match route.target {
            Target::Unreachable => None,
            Target::Device(device) | Target::Via(device, _) => Some(device),
        },
    }
}

/// Makes the request for a step; `None` where nothing is to be done because the device has gone
/// and everything of it; the device as the error where something is to be added to one that is
/// missing.
fn request(step: &Step, indexes: &BTreeMap<Device, u32>) -> Result<Option<Request>, Device> {
    let (object, add) = match step {
        Step::Add(object) => (*object, true),
        Step::Remove(object) => (*object, false),
        Step::Change(_) => return Ok(None),
    };
    let index = match device_of(object).map(|device| indexes.get(&device).copied().ok_or(device)) {
        None => 0,
        Some(Ok(index)) => index,
        Some(Err(device)) if add => return Err(device),
        Some(Err(_)) => return Ok(None),
    };
    use RouteNetlinkMessage as M;
    let message = match (object, add) {
        (Object::Link(_), _) => return Ok(None),
        (Object::Address { device, address }, _) => {
            // The uplink's prefix is a link of two; the others get their routes from us.
            let message = message::address(index, address, device != Device::Uplink);
            if add { M::NewAddress(message) } else { M::DelAddress(message) }
        }
        (Object::Neighbour { address, mac, .. }, add) => {
            let message = message::neighbour(index, address, mac);
            if add { M::NewNeighbour(message) } else { M::DelNeighbour(message) }
        }
        (Object::Fdb { mac, remote, port }, add) => {
            let message = message::fdb(index, mac, remote, port);
            if add { M::NewNeighbour(message) } else { M::DelNeighbour(message) }
        }
        (Object::Route(route), add) => {
            let hop = match route.target {
                Target::Unreachable => Hop::Unreachable,
                Target::Device(_) => Hop::Device(index),
                Target::Via(_, gateway) => Hop::Via(index, gateway),
            };
            let message = message::route(route.destination, hop, route.mtu);
            if add { M::NewRoute(message) } else { M::DelRoute(message) }
        }
    };
    Ok(Some(if add { Request::replace(message) } else { Request::new(message) }))
}

/// Whether a step that the kernel refused has its effect all the same.
fn is_done(step: &Step, errno: Errno) -> bool {
    match step {
        // A replacing request says this only where exactly the same is there.
        Step::Add(_) | Step::Change(_) => errno == Errno::EEXIST,
        Step::Remove(_) => {
            matches!(errno, Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EADDRNOTAVAIL)
        }
    }
}

fn describe(step: &Step) -> String {
    let (verb, object) = match step {
        Step::Add(object) => ("add", *object),
        Step::Remove(object) => ("remove", *object),
        Step::Change(link) => return format!("change {}", link.device),
    };
    let prefix = |network: IpNetwork| format!("{}/{}", network.ip(), network.prefix());
    match object {
        Object::Link(link) => format!("{verb} {}", link.device),
        Object::Address { device, address } => format!("{verb} address {} of {device}", prefix(address)),
        Object::Neighbour { device, address, .. } => format!("{verb} neighbour {address} of {device}"),
        Object::Fdb { mac, remote, .. } => format!("{verb} forwarding entry {mac} to {remote}"),
        Object::Route(route) => format!("{verb} route {}", prefix(route.destination)),
    }
}
