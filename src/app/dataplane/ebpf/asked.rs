//! The sockets that are asked, where they are: containers' namespaces, and what their sockets got.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use bytemuck::Zeroable as _;
use tracing::{info, warn};

use super::Node;
use super::entries::map_error;
use crate::kernel::ebpf::difference;
use crate::kernel::ebpf::{
    Address, DatagramKey, Ebpf, MEMBERSHIPS, Maps, Membership, Namespace, SOCKET_OPEN, Socket, Sockets,
    Timeouts,
};
use crate::kernel::{self, Netns};
use crate::model::{Endpoint, EndpointId};

/// After which time a socket that had no answer is not waited for any more: longer than the kernel itself waits
/// (`tcp_syn_retries`), in seconds.
const OPENING: u32 = 180;

/// Whose sockets are asked, and what is known of them.
pub(super) struct Asked {
    sockets: Sockets,
    /// The containers that are plugged in, by their networks' numbers; only of networks that were followed.
    containers: BTreeMap<u32, BTreeMap<EndpointId, Container>>,
    /// What the map has.
    written: BTreeMap<u64, Namespace>,
    /// Whether all networks of this node were followed: before that, what an earlier agent has written of the
    /// others stays.
    settled: bool,
}

/// A container in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Container {
    place: Place,
    /// The number of its namespace.
    namespace: u64,
    addresses: Vec<IpAddr>,
}

/// A namespace: its path, and the inode that it has there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    inode: u64,
}

impl Place {
    /// Opens it; `None`: it is gone, or another one is there.
    fn open(&self) -> Option<Netns> {
        Netns::open(&self.path).ok().filter(|netns| netns.inode() == self.inode)
    }
}

impl Node {
    /// Has the sockets of these containers asked for the services of a network, and of no others.
    pub(in super::super) fn ask<'a>(
        &mut self,
        network: u32,
        containers: impl Iterator<Item = &'a Endpoint>,
    ) -> Result<(), kernel::Error> {
        let Some(asked) = &mut self.asked else { return Ok(()) };
        let is_new = !asked.follows(network);
        asked.follow(network, containers)?;
        // What was lost while no agent was here can be told now.
        if is_new { asked.end_lost(self.ebpf.maps()) } else { Ok(()) }
    }

    /// Whether sockets are asked.
    pub(in super::super) fn asks(&self) -> bool {
        self.asked.is_some()
    }

    /// Puts right what somebody else has changed of what sockets are asked by; tells how much that was. These
    /// are all networks of this node, where that is certain.
    pub(in super::super) fn mend_asked(&mut self, all: Option<&[u32]>) -> Result<u64, kernel::Error> {
        let Some(asked) = &mut self.asked else { return Ok(0) };
        if all.is_some_and(|all| all.iter().all(|network| asked.follows(*network))) {
            asked.settle()?;
        }
        asked.mend(self.ebpf.maps())
    }
}

impl Asked {
    /// Has the sockets of a control group asked.
    pub(super) fn open(ebpf: &Ebpf, cgroup: &Path) -> Result<Self, kernel::Error> {
        kernel::can_end_connections()?;
        let sockets = ebpf.ask_sockets(cgroup)?;
        let written = sockets.maps().namespaces.entries().map_err(map_error("read", "namespaces"))?;
        let written = written.into_iter().collect();
        Ok(Self { sockets, containers: BTreeMap::new(), written, settled: false })
    }

    /// The highest number of a backend that a socket has got.
    pub(super) fn last_backend(&self) -> Result<u32, kernel::Error> {
        let sockets = self.sockets.maps().sockets.entries().map_err(map_error("read", "sockets"))?;
        let datagrams =
            self.sockets.maps().datagrams.entries().map_err(map_error("read", "datagrams"))?;
        let numbers = sockets.iter().map(|(_, socket)| socket.number);
        Ok(numbers.chain(datagrams.iter().map(|(_, datagram)| datagram.backend)).max().unwrap_or(0))
    }

    /// Has the sockets of these containers asked for the services of the network with this number, and of no
    /// others.
    pub(super) fn follow<'a>(
        &mut self,
        network: u32,
        containers: impl Iterator<Item = &'a Endpoint>,
    ) -> Result<(), kernel::Error> {
        let known = self.containers.remove(&network).unwrap_or_default();
        let mut now = BTreeMap::new();
        for endpoint in containers {
            let place =
                Place { path: endpoint.attachment.netns.clone(), inode: endpoint.attachment.inode };
            let before = known.get(&endpoint.id).filter(|before| before.place == place);
            let namespace = match before {
                Some(before) => before.namespace,
                // One that is gone has no sockets either.
                None => match place.open() {
                    Some(netns) => netns.cookie()?,
                    None => continue,
                },
            };
            let addresses = endpoint.addresses.clone();
            now.insert(endpoint.id, Container { place, namespace, addresses });
        }
        self.containers.insert(network, now);
        self.write()
    }

    /// Has no sockets asked any more for the services of other networks than these.
    pub(super) fn keep(&mut self, networks: &[u32]) -> Result<(), kernel::Error> {
        self.containers.retain(|network, _| networks.contains(network));
        self.write()
    }

    /// What the map should have.
    fn wanted(&self) -> BTreeMap<u64, Namespace> {
        let mut namespaces: BTreeMap<u64, Vec<Membership>> = BTreeMap::new();
        for (network, containers) in &self.containers {
            for container in containers.values() {
                let mut membership = Membership { network: *network, ..Membership::zeroed() };
                for address in &container.addresses {
                    match address {
                        IpAddr::V4(_) => membership.ipv4 = Address::from(*address),
                        IpAddr::V6(_) => membership.ipv6 = Address::from(*address),
                    }
                }
                namespaces.entry(container.namespace).or_default().push(membership);
            }
        }
        if !self.settled {
            for (number, namespace) in &self.written {
                let others = namespace.0.iter().filter(|of| of.network != 0);
                let others = others.filter(|of| !self.containers.contains_key(&of.network));
                namespaces.entry(*number).or_default().extend(others);
            }
        }
        let whole = |memberships: Vec<Membership>| {
            let mut all = [Membership::zeroed(); MEMBERSHIPS];
            all.iter_mut().zip(memberships).for_each(|(place, membership)| *place = membership);
            Namespace(all)
        };
        namespaces
            .into_iter()
            .filter(|(_, of)| !of.is_empty())
            .map(|(number, of)| (number, whole(of)))
            .collect()
    }

    fn write(&mut self) -> Result<(), kernel::Error> {
        let wanted = self.wanted();
        let (set, gone) = difference(&self.written, &wanted);
        self.change(&set, &gone)?;
        self.written = wanted;
        Ok(())
    }

    fn change(&self, set: &[(u64, Namespace)], gone: &[u64]) -> Result<(), kernel::Error> {
        let map = &self.sockets.maps().namespaces;
        let changed = map.insert_all(set).and_then(|()| map.remove_all(gone));
        changed.map_err(map_error("change", "namespaces"))
    }

    /// Whether the containers of a network were told.
    pub(super) fn follows(&self, network: u32) -> bool {
        self.containers.contains_key(&network)
    }

    /// All networks of this node were followed: what is known of others is left over.
    pub(super) fn settle(&mut self) -> Result<(), kernel::Error> {
        self.settled = true;
        self.write()
    }

    /// Puts right what somebody else has changed, and forgets what has ended unseen; tells how many things were
    /// put right. Goes on after a failure, and returns the first one.
    pub(super) fn mend(&mut self, maps: &Maps) -> Result<u64, kernel::Error> {
        let attached = self.sockets.mend();
        let written = self.rewrite();
        let lost = self.end_lost(maps);
        let closed = self.forget_closed();
        let (attached, changed) = (attached?, written?);
        if attached + changed > 0 {
            warn!(
                attached,
                changed, "programs that ask sockets were detached, or their map was changed"
            );
        }
        lost.and(closed).map(|()| attached + changed)
    }

    /// Reads the map of namespaces, and puts right what was changed there; tells how much that was.
    fn rewrite(&mut self) -> Result<u64, kernel::Error> {
        let found = self.sockets.maps().namespaces.entries().map_err(map_error("read", "namespaces"))?;
        let found: BTreeMap<u64, Namespace> = found.into_iter().collect();
        let (set, gone) = difference(&found, &self.written);
        self.change(&set, &gone)?;
        Ok((set.len() + gone.len()) as u64)
    }

    /// Forgets sockets that have closed while nobody saw it: a drain would wait for them.
    fn forget_closed(&mut self) -> Result<(), kernel::Error> {
        // Before, not all containers are known.
        if !self.settled || !self.sockets.has_gap() {
            return Ok(());
        }
        let mut known: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for (number, socket) in self.entries()? {
            known.entry(socket.namespace).or_default().insert(number);
        }
        let mut closed = Vec::new();
        for (namespace, mut numbers) in known {
            if let Some(netns) = self.place_of(namespace).and_then(Place::open) {
                let open = kernel::connections_among(&netns, &numbers)?;
                numbers.retain(|number| !open.contains(number));
            }
            closed.extend(numbers);
        }
        let removed = self.sockets.maps().sockets.remove_all(&closed);
        removed.map_err(map_error("change", "sockets"))?;
        self.sockets.close_gap();
        Ok(())
    }

    /// The TCP sockets that have asked for services.
    fn entries(&self) -> Result<Vec<(u64, Socket)>, kernel::Error> {
        self.sockets.maps().sockets.entries().map_err(map_error("read", "sockets"))
    }

    /// Ends the connections of sockets whose backend is gone: their peer is, or the connection is not its any
    /// more, and nobody would tell them. Goes on after a failure, and returns the last one.
    pub(super) fn end_lost(&self, maps: &Maps) -> Result<(), kernel::Error> {
        let now = kernel::ebpf::now().map_err(map_error("read the time for", "sockets"))?;
        let sockets = self.entries()?;
        let mut gone: BTreeSet<u32> = sockets.iter().map(|(_, socket)| socket.number).collect();
        for number in gone.clone() {
            if maps.backends.get(&number).map_err(map_error("read", "backends"))?.is_some() {
                gone.remove(&number);
            }
        }
        let mut lost: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        let mut done = Vec::new();
        for (number, socket) in sockets {
            if gone.contains(&socket.number) {
                lost.entry(socket.namespace).or_default().insert(number);
            } else if socket.state == 0 && now.saturating_sub(socket.since) > OPENING {
                done.push(number);
            }
        }
        let mut outcome = Ok(());
        for (namespace, numbers) in lost {
            let place = self.place_of(namespace);
            // What is not known yet will be.
            if place.is_none() && !self.settled {
                continue;
            }
            // One that is not plugged in any more reaches nobody by what it had.
            if let Some(netns) = place.and_then(Place::open) {
                match kernel::end_connections(&netns, &numbers) {
                    Ok(ended) => {
                        let netns = netns.path().display();
                        info!(%netns, ended, "connections of sockets end: their backend is gone");
                    }
                    Err(error) => {
                        outcome = Err(error);
                        continue;
                    }
                }
            }
            done.extend(numbers);
        }
        let removed = self.sockets.maps().sockets.remove_all(&done);
        removed.map_err(map_error("change", "sockets")).and(outcome)
    }

    fn place_of(&self, namespace: u64) -> Option<&Place> {
        let mut containers = self.containers.values().flat_map(BTreeMap::values);
        containers.find(|container| container.namespace == namespace).map(|container| &container.place)
    }

    /// Adds what sockets have to the connections that each backend has: established ones, and others.
    pub(super) fn add_open(
        &self,
        timeouts: &BTreeMap<u32, Timeouts>,
        open: &mut BTreeMap<u32, (u32, u32)>,
    ) -> Result<(), kernel::Error> {
        for (_, socket) in self.entries()? {
            let (active, inactive) = open.entry(socket.number).or_default();
            *(if socket.state == SOCKET_OPEN { active } else { inactive }) += 1;
        }
        let now = kernel::ebpf::now().map_err(map_error("read the time for", "datagrams"))?;
        let datagrams =
            self.sockets.maps().datagrams.entries().map_err(map_error("read", "datagrams"))?;
        let is_sent = |key: &DatagramKey| key.reply == 0;
        for (_, datagram) in datagrams.into_iter().filter(|(key, _)| is_sent(key)) {
            let timeout = timeouts.get(&datagram.network).map_or(0, |timeouts| timeouts.udp);
            if now.saturating_sub(datagram.seen) < timeout {
                open.entry(datagram.backend).or_default().1 += 1;
            }
        }
        Ok(())
    }
}
