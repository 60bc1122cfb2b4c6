//! Balancing by eBPF: the maps of the node, and the programs of one sandbox.

mod table;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use tracing::{info, warn};

use super::balancing::{Balancing, Load};
use crate::kernel::ebpf::{
    Connection, Counts, Ebpf, Error, Maps, Programs, STATE_ANSWERED, STATE_CLIENT_ENDED, STATE_RESET,
    STATE_SERVER_ENDED, Tuple,
};
use crate::kernel::{self, Sandbox};
use crate::lb::{Balancer, Timeouts};
use crate::model::EndpointId;
use crate::model::object::Device;
use table::{Numbers, Table, difference, key_of};

/// The eBPF of the node, which all its sandboxes use.
pub(super) struct Node {
    ebpf: Ebpf,
    numbers: Numbers,
    /// What an earlier agent left, by network, until somebody asks for it.
    left: BTreeMap<u32, Table>,
}

impl Node {
    /// Opens the maps, and reads what is in them.
    pub(super) fn open(connections: u32) -> Result<Self, kernel::Error> {
        let ebpf = Ebpf::open(connections)?;
        if let Err(error) = kernel::ebpf::remove_other_layouts() {
            warn!(%error, "maps of another version's eBPF programs are not removed");
        }
        let mut node = Self { left: read(ebpf.maps())?, ebpf, numbers: Numbers::default() };
        for table in node.left.values() {
            node.numbers.take(table);
        }
        Ok(node)
    }

    /// Removes what is left of all networks but these.
    pub(super) fn keep(&mut self, networks: &[u32]) -> Result<(), kernel::Error> {
        let unwanted: Vec<u32> =
            self.left.keys().filter(|network| !networks.contains(network)).copied().collect();
        for network in unwanted {
            if let Some(table) = self.left.remove(&network) {
                apply(self.ebpf.maps(), &table, &Table::default())?;
            }
        }
        Ok(())
    }

    /// Whether an earlier agent has left something of a network.
    pub(super) fn has(&self, network: u32) -> bool {
        self.left.contains_key(&network)
    }
}

/// The balancing of one sandbox by eBPF.
pub(super) struct ByEbpf {
    node: Rc<RefCell<Node>>,
    /// The network's number.
    network: u32,
    programs: Programs,
    table: Table,
    balancer: Balancer,
    /// The containers whose devices have the programs.
    followed: Vec<EndpointId>,
    /// How many entries somebody else changed that are not put right yet.
    drifted: u64,
    mended: u64,
}

impl ByEbpf {
    /// Loads the programs of a network, and takes what an earlier agent has left of it.
    pub(super) fn open(node: &Rc<RefCell<Node>>, network: u32) -> Result<Self, kernel::Error> {
        let mut open = node.borrow_mut();
        let programs = open.ebpf.load(network)?;
        let table = match open.left.remove(&network) {
            Some(table) => table,
            None => read(open.ebpf.maps())?.remove(&network).unwrap_or_default(),
        };
        drop(open);
        let (balancer, followed) = (Balancer::default(), Vec::new());
        let node = node.clone();
        Ok(Self { node, network, programs, table, balancer, followed, drifted: 0, mended: 0 })
    }

    /// Has the devices of containers run the programs; tells how many did not.
    fn attach(&self, sandbox: &Sandbox, containers: &[EndpointId]) -> Result<u64, kernel::Error> {
        sandbox.netns().enter(|| {
            let mut missing = 0;
            for container in containers {
                let device = Device::Endpoint(*container).to_string();
                missing += u64::from(self.programs.attach(&device)?);
            }
            Ok(missing)
        })?
    }

    /// Counts for backends for which somebody has taken that away: without it their connections end.
    fn count_again(&self) -> Result<u64, kernel::Error> {
        let node = self.node.borrow();
        let counts = &node.ebpf.maps().counts;
        let mut missing = Vec::new();
        for number in self.table.backends.keys() {
            if counts.get(number).map_err(map_error("read", "counts"))?.is_none() {
                missing.push(*number);
            }
        }
        counts.insert_all(&missing).map_err(map_error("change", "counts"))?;
        Ok(missing.len() as u64)
    }

    fn loads_of(&self) -> Result<Vec<Load>, kernel::Error> {
        let node = self.node.borrow();
        let maps = node.ebpf.maps();
        let open = open_connections(maps, self.network, self.balancer.timeouts)?;
        let mut numbers: BTreeMap<(u32, SocketAddr), u32> = BTreeMap::new();
        for (number, backend) in &self.table.backends {
            numbers.insert((backend.front, backend.socket()), *number);
        }
        let mut loads = Vec::new();
        for (front, spread) in &self.balancer.fronts {
            let Some(id) = self.table.fronts.get(&key_of(self.network, front)) else { continue };
            for (backend, weight) in &spread.backends {
                let Some(number) = numbers.get(&(id.id, *backend)) else { continue };
                let counted = maps.counts.get(number).map_err(map_error("read", "counts"))?;
                let sum = counted.into_iter().flatten().fold(Counts::default(), add);
                let (active, inactive) = open.get(number).copied().unwrap_or_default();
                loads.push(Load {
                    front: *front,
                    backend: *backend,
                    weight: *weight,
                    active,
                    inactive,
                    connections: sum.connections,
                    incoming_bytes: sum.incoming_bytes,
                    outgoing_bytes: sum.outgoing_bytes,
                });
            }
        }
        Ok(loads)
    }
}

impl Balancing for ByEbpf {
    fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    fn reread(&mut self, sandbox: &Sandbox) -> Result<Vec<Load>, kernel::Error> {
        let mut all = read(self.node.borrow().ebpf.maps())?;
        let found = all.remove(&self.network).unwrap_or_default();
        let changed = changes(&found, &self.table);
        if changed > 0 {
            warn!(sandbox = sandbox.name(), changed, "eBPF maps were changed: they are put back");
        }
        (self.drifted, self.table) = (changed, found);
        self.mended += self.count_again()?;
        let unpinned = self.node.borrow().ebpf.pin_again()?;
        if unpinned > 0 {
            warn!(maps = unpinned, "eBPF maps were no longer pinned: they are again");
        }
        let detached = self.attach(sandbox, &self.followed)?;
        if detached > 0 {
            warn!(sandbox = sandbox.name(), detached, "eBPF programs were detached: they are back");
        }
        self.mended += unpinned + detached;
        self.loads_of()
    }

    fn repaired(&mut self) -> u64 {
        std::mem::take(&mut self.mended)
    }

    fn converge(&mut self, _: &Sandbox, balancer: &Balancer) -> Result<(), kernel::Error> {
        let mut node = self.node.borrow_mut();
        let wanted = Table::wanted(self.network, balancer, &self.table, &mut node.numbers);
        self.balancer = balancer.clone();
        if let Err(error) = apply(node.ebpf.maps(), &self.table, &wanted) {
            // What it has now is not certain.
            self.table = read(node.ebpf.maps())?.remove(&self.network).unwrap_or_default();
            return Err(error);
        }
        self.table = wanted;
        self.mended += std::mem::take(&mut self.drifted);
        Ok(())
    }

    fn follow(&mut self, sandbox: &Sandbox, containers: &[EndpointId]) -> Result<(), kernel::Error> {
        let new: Vec<EndpointId> =
            containers.iter().filter(|container| !self.followed.contains(container)).copied().collect();
        let attached = self.attach(sandbox, &new);
        self.followed = containers.to_vec();
        if attached.is_err() {
            self.followed.retain(|container| !new.contains(container));
        }
        attached.map(drop)
    }

    fn loads(&mut self, _: &Sandbox) -> Result<Vec<Load>, kernel::Error> {
        self.loads_of()
    }

    fn has_rules_for(&self, _: &Balancer) -> bool {
        // The programs need none: no mark, no translation.
        true
    }
}

impl Drop for ByEbpf {
    fn drop(&mut self) {
        // What the sandbox has stays as it is; another agent's start, or this one's, finds it.
        let table = std::mem::take(&mut self.table);
        if let Ok(mut node) = self.node.try_borrow_mut()
            && !table.is_empty()
        {
            node.left.insert(self.network, table);
        }
    }
}

/// Removes all of eBPF from a node that balances otherwise.
pub(super) fn remove(sandbox: &Sandbox, containers: impl Iterator<Item = EndpointId>) {
    let detached = sandbox.netns().enter(|| {
        containers
            .filter(|container| {
                let device = Device::Endpoint(*container).to_string();
                kernel::ebpf::detach(&device).unwrap_or_else(|error| {
                    warn!(%error, "eBPF programs of an earlier agent are not detached");
                    false
                })
            })
            .count()
    });
    if let Ok(count @ 1..) = detached {
        info!(sandbox = sandbox.name(), count, "eBPF programs of an earlier agent are detached");
    }
}

fn map_error(action: &'static str, map: &'static str) -> impl Fn(std::io::Error) -> kernel::Error {
    move |source| Error::Map { action, map, source }.into()
}

fn add(sum: Counts, each: Counts) -> Counts {
    Counts {
        connections: sum.connections + each.connections,
        incoming_packets: sum.incoming_packets + each.incoming_packets,
        incoming_bytes: sum.incoming_bytes + each.incoming_bytes,
        outgoing_packets: sum.outgoing_packets + each.outgoing_packets,
        outgoing_bytes: sum.outgoing_bytes + each.outgoing_bytes,
    }
}

/// How many entries differ.
fn changes(found: &Table, known: &Table) -> u64 {
    fn count<K: Ord + Copy, V: PartialEq + Copy>(found: &BTreeMap<K, V>, known: &BTreeMap<K, V>) -> u64 {
        let (set, gone) = difference(found, known);
        (set.len() + gone.len()) as u64
    }
    count(&found.addresses, &known.addresses)
        + count(&found.gateways, &known.gateways)
        + count(&found.timeouts, &known.timeouts)
        + count(&found.fronts, &known.fronts)
        + count(&found.slots, &known.slots)
        + count(&found.backends, &known.backends)
}

/// Reads the entries of all networks. What belongs to none is removed.
fn read(maps: &Maps) -> Result<BTreeMap<u32, Table>, kernel::Error> {
    let mut tables: BTreeMap<u32, Table> = BTreeMap::new();
    let mut network_of: BTreeMap<u32, u32> = BTreeMap::new();
    for (place, kind) in maps.addresses.entries().map_err(map_error("read", "addresses"))? {
        tables.entry(place.network).or_default().addresses.insert(place, kind);
    }
    for (place, gateway) in maps.gateways.entries().map_err(map_error("read", "gateways"))? {
        tables.entry(place.network).or_default().gateways.insert(place, gateway);
    }
    for (network, timeouts) in maps.timeouts.entries().map_err(map_error("read", "timeouts"))? {
        tables.entry(network).or_default().timeouts.insert(network, timeouts);
    }
    for (key, mut front) in maps.fronts.entries().map_err(map_error("read", "fronts"))? {
        front.turn = 0;
        network_of.insert(front.id, key.network);
        tables.entry(key.network).or_default().fronts.insert(key, front);
    }
    let (mut lost_slots, mut lost_backends) = (Vec::new(), Vec::new());
    for (key, backend) in maps.slots.entries().map_err(map_error("read", "slots"))? {
        match network_of.get(&key.front).and_then(|network| tables.get_mut(network)) {
            Some(table) => drop(table.slots.insert(key, backend)),
            None => lost_slots.push(key),
        }
    }
    for (number, mut backend) in maps.backends.entries().map_err(map_error("read", "backends"))? {
        backend.open = 0;
        match network_of.get(&backend.front).and_then(|network| tables.get_mut(network)) {
            Some(table) => drop(table.backends.insert(number, backend)),
            None => lost_backends.push(number),
        }
    }
    maps.slots.remove_all(&lost_slots).map_err(map_error("change", "slots"))?;
    maps.counts.remove_all(&lost_backends).map_err(map_error("change", "counts"))?;
    maps.backends.remove_all(&lost_backends).map_err(map_error("change", "backends"))?;
    Ok(tables)
}

/// Makes one table of another. What is pointed at comes before what points at it, and goes after it: at
/// every moment a connection finds a whole.
fn apply(maps: &Maps, now: &Table, wanted: &Table) -> Result<(), kernel::Error> {
    let write = |map| map_error("change", map);
    let (mut backends, lost_backends) = difference(&now.backends, &wanted.backends);
    let (mut fronts, lost_fronts) = difference(&now.fronts, &wanted.fronts);
    let (slots, lost_slots) = difference(&now.slots, &wanted.slots);
    let (gateways, lost_gateways) = difference(&now.gateways, &wanted.gateways);
    let (addresses, lost_addresses) = difference(&now.addresses, &wanted.addresses);
    let (timeouts, lost_timeouts) = difference(&now.timeouts, &wanted.timeouts);
    let new: Vec<u32> = backends.iter().map(|(number, _)| *number).collect();
    let new: Vec<u32> = new.into_iter().filter(|number| !now.backends.contains_key(number)).collect();
    // What the programs count in an entry that only changes goes on.
    for (number, backend) in backends.iter_mut().filter(|(number, _)| now.backends.contains_key(number))
    {
        let there = maps.backends.get(number).map_err(map_error("read", "backends"))?;
        backend.open = there.map_or(0, |there| there.open);
    }
    for (key, front) in fronts.iter_mut().filter(|(key, _)| now.fronts.contains_key(key)) {
        let there = maps.fronts.get(key).map_err(map_error("read", "fronts"))?;
        front.turn = there.map_or(0, |there| there.turn);
    }
    maps.timeouts.insert_all(&timeouts).map_err(write("timeouts"))?;
    maps.counts.insert_all(&new).map_err(write("counts"))?;
    maps.backends.insert_all(&backends).map_err(write("backends"))?;
    maps.slots.insert_all(&slots).map_err(write("slots"))?;
    maps.gateways.insert_all(&gateways).map_err(write("gateways"))?;
    maps.fronts.insert_all(&fronts).map_err(write("fronts"))?;
    maps.addresses.insert_all(&addresses).map_err(write("addresses"))?;
    maps.addresses.remove_all(&lost_addresses).map_err(write("addresses"))?;
    maps.fronts.remove_all(&lost_fronts).map_err(write("fronts"))?;
    maps.gateways.remove_all(&lost_gateways).map_err(write("gateways"))?;
    maps.slots.remove_all(&lost_slots).map_err(write("slots"))?;
    // With what is counted for it a backend's connections end.
    maps.counts.remove_all(&lost_backends).map_err(write("counts"))?;
    maps.backends.remove_all(&lost_backends).map_err(write("backends"))?;
    maps.timeouts.remove_all(&lost_timeouts).map_err(write("timeouts"))
}

/// How many connections of a network each backend has: established ones, and others.
fn open_connections(
    maps: &Maps,
    network: u32,
    timeouts: Timeouts,
) -> Result<BTreeMap<u32, (u32, u32)>, kernel::Error> {
    let now = kernel::ebpf::now().map_err(map_error("read the time for", "connections"))?;
    let mut open: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    let mut seen: BTreeMap<Tuple, Connection> = BTreeMap::new();
    for (tuple, connection) in maps.connections.entries().map_err(map_error("read", "connections"))? {
        if tuple.network == network {
            seen.insert(tuple, connection);
        }
    }
    for (tuple, connection) in seen.iter().filter(|(tuple, _)| tuple.reply == 0) {
        let back = Tuple {
            source: connection.destination,
            destination: connection.source,
            source_port: connection.destination_port,
            destination_port: connection.source_port,
            reply: 1,
            ..*tuple
        };
        let last = seen.get(&back).map_or(connection.seen, |back| back.seen.max(connection.seen));
        let (is_open, timeout) = standing(tuple.protocol, connection.state, timeouts);
        if now.saturating_sub(last) >= timeout {
            continue;
        }
        let (active, inactive) = open.entry(connection.backend).or_default();
        *(if is_open { active } else { inactive }) += 1;
    }
    Ok(open)
}

/// Whether a connection is established, and after which silence it ends (as in `ebpf/connection.h`).
fn standing(protocol: u8, state: u8, timeouts: Timeouts) -> (bool, u32) {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let ended = STATE_CLIENT_ENDED | STATE_SERVER_ENDED;
    let is_closed = state & STATE_RESET != 0 || state & ended == ended;
    match protocol {
        UDP => (false, timeouts.udp),
        TCP if is_closed => (false, 10),
        TCP if state & ended != 0 => (false, timeouts.tcp_fin),
        TCP if state & STATE_ANSWERED == 0 => (false, 60),
        TCP => (true, timeouts.tcp),
        _ => (state & STATE_ANSWERED != 0, 900),
    }
}
