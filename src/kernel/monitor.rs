//! Tells when somebody else changes what we have in the kernel.
//!
//! One thread sleeps until the kernel has news from any of the namespaces that it was given. What
//! our own sockets did is passed over where the kernel says who did it. It does not for forwarding
//! entries, IPv6 addresses and devices that are changed, nor before Linux 6.2 for new devices: these
//! are reported in any case.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NlasIterator};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netlink::{self, Netlink};
use super::netns::Netns;
use super::{Error, message, nft, observe};
use crate::model::object::{ACCESS_PREFIX, CROSSING_PREFIX, Device, PROTOCOL, TABLE, UPLINK_PREFIX};

/// News that may wait for the thread, for each socket.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// Datagrams that are read from one socket before the callback hears of them.
const AT_A_TIME: usize = 256;
/// nfnetlink(7): the subsystem is the upper byte of a message's type, and a header of 4 bytes
/// precedes the attributes, the first of which is the table's name in every message that concerns
/// one (include/uapi/linux/netfilter/nf_tables.h).
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_HEADER: usize = 4;
const NFTA_TABLE_NAME: u16 = 1;
/// A message about settings: a header of one byte, padded to four, and attributes that are numbers of 32
/// bits (include/uapi/linux/netconf.h).
const NETCONF_HEADER: usize = 4;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
/// All devices.
const NETCONFA_IFINDEX_ALL: i32 = -1;

/// What somebody else changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A device of ours was changed or removed.
    Link,
    /// An address was removed; in the host's namespace also: added.
    Address,
    /// A neighbour entry of ours was changed or removed.
    Neighbour,
    /// A forwarding entry was changed or removed.
    Fdb,
    /// A route of ours was replaced or removed.
    Route,
    /// Our nftables table was changed or removed.
    Firewall,
    /// The host does not forward packets any more.
    Forwarding,
    /// News were lost: everything may have changed.
    Lost,
}

/// A change that somebody else made, perhaps.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Notice {
    /// The name under which the namespace was added.
    pub namespace: String,
    /// What changed.
    pub kind: Kind,
}

/// Which objects in a namespace are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The host's namespace: uplinks, its own access to networks, and our table.
    Host,
    /// A sandbox: everything that bears our mark.
    Sandbox,
}

enum Command {
    Add { namespace: String, watched: Watched },
    Remove { namespace: String },
}

/// A thread that watches namespaces; it ends with this value.
pub struct Monitor {
    commands: Option<Sender<Command>>,
    wake: PipeWriter,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts the thread, which calls `notify` once for each kind of change that it finds when it
    /// wakes up. `notify` must not block.
    pub fn start(notify: impl FnMut(Notice) + Send + 'static) -> Result<Self, Error> {
        let (commands, receiver) = channel();
        let (reader, wake) = io::pipe().map_err(Error::system("make a pipe"))?;
        let watch = Watch { commands: receiver, wake: reader, namespaces: BTreeMap::new(), notify };
        let thread = std::thread::Builder::new().name("monitor".to_owned()).spawn(move || watch.run());
        let thread = thread.map_err(Error::system("start the monitor's thread"))?;
        Ok(Self { commands: Some(commands), wake, thread: Some(thread) })
    }

    /// Watches a namespace from now on: what changes after this call returns is reported.
    pub fn add(&self, namespace: &str, netns: &Netns, scope: Scope) -> Result<(), Error> {
        let sockets = netns
            .enter(|| io::Result::Ok(([route_socket(scope)?, nftables_socket()?], Netlink::open()?)))?;
        let (sockets, mut netlink) =
            sockets.map_err(Error::system("subscribe to the kernel's notifications"))?;
        // After subscribing: what changes meanwhile is in both.
        let present = netlink.dump(&message::link_dump());
        let present = present.map_err(Error::netlink("read devices", netns.label()))?;
        let links = present.iter().filter_map(observe::device_in);
        let ours = links.filter(|found| is_ours(scope, &found.name));
        let links = ours.map(|found| (found.index, (found.name, found.up, found.mtu))).collect();
        let watched = Watched { sockets, scope, links };
        self.send(Command::Add { namespace: namespace.to_owned(), watched });
        Ok(())
    }

    /// Stops watching a namespace, which it does not keep alive any longer then.
    pub fn remove(&self, namespace: &str) {
        self.send(Command::Remove { namespace: namespace.to_owned() });
    }

    fn send(&self, command: Command) {
        // Both fail only when the thread has ended, and it ends only with us.
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        if !sent || (&self.wake).write_all(&[0]).is_err() {
            tracing::error!("the monitor's thread has ended");
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn route_socket(scope: Scope) -> io::Result<Socket> {
    use libc::{
        RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR,
        RTNLGRP_IPV6_NETCONF, RTNLGRP_IPV6_ROUTE, RTNLGRP_LINK, RTNLGRP_NEIGH,
    };
    let both = [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR];
    let groups = match scope {
        Scope::Host => [&both[..], &[RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF]].concat(),
        Scope::Sandbox => [&both[..], &[RTNLGRP_NEIGH, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE]].concat(),
    };
    netlink::subscribe(NETLINK_ROUTE, &groups, QUEUE_BYTES)
}

fn nftables_socket() -> io::Result<Socket> {
    netlink::subscribe(NETLINK_NETFILTER, &[libc::NFNLGRP_NFTABLES as u32], QUEUE_BYTES)
}

/// Name, state and MTU of devices by index.
type Links = BTreeMap<u32, (String, bool, u32)>;

/// A namespace that is watched.
struct Watched {
    sockets: [Socket; 2],
    scope: Scope,
    /// What each device of ours was like when last heard of: the kernel tells of a device also when
    /// nothing changed that matters here, such as its carrier.
    links: Links,
}

struct Watch<F> {
    commands: Receiver<Command>,
    wake: PipeReader,
    namespaces: BTreeMap<String, Watched>,
    notify: F,
}

impl<F: FnMut(Notice)> Watch<F> {
    fn run(mut self) {
        let mut buffer = Vec::new();
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "the monitor cannot wait for the kernel");
                    return;
                }
            };
            let mut notices = BTreeSet::new();
            for (namespace, watched) in &mut self.namespaces {
                if ready.contains(namespace) {
                    let kinds = watched.read(&mut buffer);
                    notices.extend(kinds.into_iter().map(|kind| (namespace.clone(), kind)));
                }
            }
            for (namespace, kind) in notices {
                (self.notify)(Notice { namespace, kind });
            }
            if ready.contains("") && !self.obey() {
                return;
            }
        }
    }

    /// Sleeps until something can be read, and returns the names of what; the empty name: commands.
    fn wait(&self) -> nix::Result<BTreeSet<String>> {
        let mut names = vec![""];
        let mut waiting = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        for (name, watched) in &self.namespaces {
            for socket in &watched.sockets {
                names.push(name);
                waiting.push(PollFd::new(netlink::borrow(socket), PollFlags::POLLIN));
            }
        }
        poll(&mut waiting, PollTimeout::NONE)?;
        let ready = names.into_iter().zip(&waiting).filter(|(_, fd)| fd.any().unwrap_or(true));
        Ok(ready.map(|(name, _)| name.to_owned()).collect())
    }

    /// Carries out the commands that wait; `false`: the monitor is to end.
    fn obey(&mut self) -> bool {
        // One byte for one command, or for the end.
        let mut byte = [0];
        if self.wake.read_exact(&mut byte).is_err() {
            return false;
        }
        match self.commands.recv() {
            Ok(Command::Add { namespace, watched }) => {
                self.namespaces.insert(namespace, watched);
                true
            }
            Ok(Command::Remove { namespace }) => {
                self.namespaces.remove(&namespace);
                true
            }
            Err(_) => false,
        }
    }
}

impl Watched {
    /// Reads what waits. What remains of a flood is read at the next call.
    fn read(&mut self, buffer: &mut Vec<u8>) -> BTreeSet<Kind> {
        let Self { sockets: [route, nftables], scope, links } = self;
        let mut kinds = BTreeSet::new();
        drain(route, buffer, &mut kinds, |header, payload| route_change(*scope, links, header, payload));
        drain(nftables, buffer, &mut kinds, nftables_change);
        kinds
    }
}

fn drain(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    kinds: &mut BTreeSet<Kind>,
    mut judge: impl FnMut(&NetlinkHeader, &[u8]) -> Option<Kind>,
) {
    for _ in 0..AT_A_TIME {
        match netlink::receive(socket, buffer) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => {
                kinds.insert(Kind::Lost);
                continue;
            }
        }
        kinds.extend(netlink::messages(buffer).filter_map(|(header, payload)| judge(&header, payload)));
    }
}

/// Judges a notification of rtnetlink; `None`: it is ours, or does not matter.
fn route_change(
    scope: Scope,
    links: &mut Links,
    header: &NetlinkHeader,
    payload: &[u8],
) -> Option<Kind> {
    use RouteNetlinkMessage as M;
    if header.message_type == libc::RTM_NEWNETCONF {
        return forwarding_change(payload);
    }
    let own = netlink::is_own_port(header.port_number);
    let matters = match RouteNetlinkMessage::deserialize(header, payload).ok()? {
        M::NewLink(message) => {
            let found = observe::device(&message)?;
            let state = (found.name, found.up, found.mtu);
            // A device that gets another name was of ours before, or is now.
            let before = links.get(&found.index).cloned();
            let ours = is_ours(scope, &state.0) || before.is_some();
            // Going up is how a device of ours is completed, and never what harms one.
            let rises = state.1 && before.as_ref().is_some_and(|b| (&b.0, b.2) == (&state.0, state.2));
            let changed = ours && !found.leaving && !rises && before.as_ref() != Some(&state);
            if ours {
                links.insert(found.index, state);
            }
            changed.then_some(Kind::Link)
        }
        M::DelLink(message) => {
            let found = observe::device(&message)?;
            let known = links.remove(&found.index).is_some();
            (!found.leaving && (known || is_ours(scope, &found.name))).then_some(Kind::Link)
        }
        M::NewAddress(_) => (scope == Scope::Host).then_some(Kind::Address),
        M::DelAddress(_) => Some(Kind::Address),
        // Others' devices have neighbours and forwarding entries too.
        M::NewNeighbour(message) | M::DelNeighbour(message)
            if !links.contains_key(&message.header.ifindex) =>
        {
            None
        }
        M::NewNeighbour(message) => neighbour_change(&message),
        // A neighbour entry is changed to a failed one before it goes.
        M::DelNeighbour(message) => {
            (message.header.family == AddressFamily::Bridge).then_some(Kind::Fdb)
        }
        M::NewRoute(message) => {
            let by_kernel = matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
            (in_main_table(&message) && !by_kernel).then_some(Kind::Route)
        }
        M::DelRoute(message) => {
            let ours = message.header.protocol == RouteProtocol::Other(PROTOCOL);
            (in_main_table(&message) && ours).then_some(Kind::Route)
        }
        _ => None,
    };
    matters.filter(|_| !own)
}

/// Judges a notification about settings: forwarding is only ever turned on by us.
fn forwarding_change(payload: &[u8]) -> Option<Kind> {
    let (mut of_all, mut off) = (false, false);
    for attribute in NlasIterator::new(payload.get(NETCONF_HEADER..)?) {
        let attribute = attribute.ok()?;
        let number = i32::from_ne_bytes(attribute.value().try_into().ok()?);
        match attribute.kind() {
            NETCONFA_IFINDEX => of_all = number == NETCONFA_IFINDEX_ALL,
            NETCONFA_FORWARDING => off = number == 0,
            _ => {}
        }
    }
    (of_all && off).then_some(Kind::Forwarding)
}

fn is_ours(scope: Scope, name: &str) -> bool {
    match scope {
        Scope::Host => {
            [UPLINK_PREFIX, ACCESS_PREFIX, CROSSING_PREFIX].iter().any(|p| name.starts_with(p))
        }
        Scope::Sandbox => Device::from_name(name).is_some(),
    }
}

fn in_main_table(message: &RouteMessage) -> bool {
    message.header.table == RouteHeader::RT_TABLE_MAIN
}

/// Entries that the kernel learns and forgets by itself do not matter.
fn neighbour_change(message: &NeighbourMessage) -> Option<Kind> {
    if message.header.family == AddressFamily::Bridge {
        return Some(Kind::Fdb);
    }
    let marked = message.attributes.iter().any(|attribute| {
        matches!(attribute, NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
    });
    (marked || message.header.state == NeighbourState::Permanent).then_some(Kind::Neighbour)
}

/// Judges a notification of nftables.
fn nftables_change(header: &NetlinkHeader, payload: &[u8]) -> Option<Kind> {
    if header.message_type >> 8 != NFNL_SUBSYS_NFTABLES || nft::is_own_port(header.port_number) {
        return None;
    }
    let mut attributes = NlasIterator::new(payload.get(NFNL_HEADER..)?).flatten();
    let ours = attributes.any(|nla| {
        nla.kind() == NFTA_TABLE_NAME && nla.value().strip_suffix(b"\0") == Some(TABLE.as_bytes())
    });
    ours.then_some(Kind::Firewall)
}
