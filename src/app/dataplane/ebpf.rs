//! Balancing by eBPF: the maps of the node, and the programs of one sandbox.

mod table;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::balancing::{Balancing, Load};
use crate::kernel::ebpf::{
    Backend, ClientKey, Connection, Counts, Ebpf, Error, Front, Maps, Programs, SCHEDULER_LEAST,
    STATE_ANSWERED, STATE_CLIENT_ENDED, STATE_RESET, STATE_SERVER_ENDED, Timeouts, Tuple,
};
use crate::kernel::{self, Sandbox};
use crate::lb::Balancer;
use crate::model::EndpointId;
use crate::model::object::Device;
use table::{Numbers, Table, difference, key_of};

/// The eBPF of the node, which all its sandboxes use.
pub(super) struct Node {
    ebpf: Ebpf,
    numbers: Numbers,
    /// What an earlier agent left, by network, until somebody asks for it.
    left: BTreeMap<u32, Table>,
    scan: Option<Scan>,
}

/// What the maps held at a moment, of all networks: what each of them looks at is read once.
struct Scan {
    at: Instant,
    /// Of networks that have not looked yet.
    tables: BTreeMap<u32, Table>,
    looked: BTreeSet<u32>,
    /// How many connections each backend has: established ones, and others.
    open: BTreeMap<u32, (u32, u32)>,
}

/// For how long a scan will do.
const FRESH: Duration = Duration::from_millis(300);

impl Node {
    /// Opens the maps, and reads what is in them.
    pub(super) fn open(connections: u32) -> Result<Self, kernel::Error> {
        let ebpf = Ebpf::open(connections)?;
        if let Err(error) = kernel::ebpf::remove_other_layouts() {
            warn!(%error, "maps of another version's eBPF programs are not removed");
        }
        let left = read(ebpf.maps())?;
        let mut node = Self { left, ebpf, numbers: Numbers::default(), scan: None };
        for table in node.left.values() {
            node.numbers.take(table);
        }
        node.forget_connections()?;
        Ok(node)
    }

    /// Removes connections, and clients that keep a backend, whose backend is gone: another one may get its
    /// number.
    fn forget_connections(&self) -> Result<(), kernel::Error> {
        let maps = self.ebpf.maps();
        let known: BTreeSet<u32> =
            self.left.values().flat_map(|table| table.backends.keys().copied()).collect();
        let is_gone = |number| !known.contains(&number);
        let connections = maps.connections.entries().map_err(map_error("read", "connections"))?;
        let gone = connections.into_iter().filter(|(_, connection)| is_gone(connection.backend));
        let gone: Vec<Tuple> = gone.map(|(tuple, _)| tuple).collect();
        maps.connections.remove_all(&gone).map_err(map_error("change", "connections"))?;
        let clients = maps.clients.entries().map_err(map_error("read", "clients"))?;
        let gone = clients.into_iter().filter(|(_, client)| is_gone(client.backend));
        let gone: Vec<ClientKey> = gone.map(|(key, _)| key).collect();
        maps.clients.remove_all(&gone).map_err(map_error("change", "clients"))
    }

    /// Removes what is left of all networks but these.
    pub(super) fn keep(&mut self, networks: &[u32]) -> Result<(), kernel::Error> {
        let unwanted: Vec<u32> =
            self.left.keys().filter(|network| !networks.contains(network)).copied().collect();
        for network in unwanted {
            if let Some(table) = self.left.get(&network) {
                apply(self.ebpf.maps(), table, &Table::default())?;
                self.left.remove(&network);
            }
        }
        Ok(())
    }

    /// The table that the kernel has of a network now.
    fn look(&mut self, network: u32) -> Result<Table, kernel::Error> {
        let has_looked = self.scan.as_ref().is_none_or(|scan| scan.looked.contains(&network));
        if has_looked {
            self.scan = None;
        }
        let scan = self.scan()?;
        scan.looked.insert(network);
        Ok(scan.tables.remove(&network).unwrap_or_default())
    }

    fn scan(&mut self) -> Result<&mut Scan, kernel::Error> {
        let scan = match self.scan.take().filter(|scan| scan.at.elapsed() < FRESH) {
            Some(scan) => scan,
            None => {
                let maps = self.ebpf.maps();
                let (tables, open) = (read(maps)?, open_connections(maps)?);
                Scan { at: Instant::now(), tables, looked: BTreeSet::new(), open }
            }
        };
        Ok(self.scan.insert(scan))
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
    followed: BTreeSet<EndpointId>,
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
            None => open.look(network)?,
        };
        drop(open);
        let (balancer, followed) = (Balancer::default(), BTreeSet::new());
        let node = node.clone();
        Ok(Self { node, network, programs, table, balancer, followed, drifted: 0, mended: 0 })
    }

    /// Has the devices of containers run the programs; tells how many did not. One that is gone by now is
    /// passed over.
    fn attach<'a>(
        &self,
        sandbox: &Sandbox,
        containers: impl Iterator<Item = &'a EndpointId>,
    ) -> Result<u64, kernel::Error> {
        sandbox.netns().enter(|| {
            let mut missing = 0;
            for container in containers {
                let device = Device::Endpoint(*container).to_string();
                match self.programs.attach(&device) {
                    Ok(changed) => missing += u64::from(changed),
                    Err(error) if error.device_is_gone() => {}
                    Err(error) => return Err(error.into()),
                }
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

    /// Puts right how many connections backends have, where that decides who is next. The programs count
    /// only what they see: not what silence ended, or what left a full table.
    fn correct(&self) -> Result<(), kernel::Error> {
        let least = |front: &&Front| front.scheduler == SCHEDULER_LEAST;
        let fronts: BTreeSet<u32> = self.table.fronts.values().filter(least).map(|f| f.id).collect();
        let mut node = self.node.borrow_mut();
        let counted = node.scan()?.open.clone();
        let maps = node.ebpf.maps();
        for (number, _) in self.table.backends.iter().filter(|(_, b)| fronts.contains(&b.front)) {
            let open = counted.get(number).map_or(0, |(active, inactive)| active + inactive);
            let there = maps.backends.get(number).map_err(map_error("read", "backends"))?;
            if let Some(there) = there.filter(|there| there.open != open) {
                let right = Backend { open, ..there };
                maps.backends.insert(number, &right).map_err(map_error("change", "backends"))?;
            }
        }
        Ok(())
    }

    fn loads_of(&self) -> Result<Vec<Load>, kernel::Error> {
        let mut node = self.node.borrow_mut();
        let open = node.scan()?.open.clone();
        let maps = node.ebpf.maps();
        let numbers = self.table.numbers();
        let mut loads = Vec::new();
        for (front, spread) in &self.balancer.fronts {
            let Some(id) = self.table.fronts.get(&key_of(self.network, front)) else { continue };
            for (backend, weight) in &spread.backends {
                let Some(number) = numbers.get(&(id.id, *backend)) else { continue };
                let counted = maps.counts.get(number).map_err(map_error("read", "counts"))?;
                let sum: Counts = counted.into_iter().flatten().sum();
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

    fn reread(
        &mut self,
        sandbox: &Sandbox,
        containers: &BTreeSet<EndpointId>,
    ) -> Result<Vec<Load>, kernel::Error> {
        let found = self.node.borrow_mut().look(self.network)?;
        let changed = changes(&found, &self.table);
        if changed > 0 {
            warn!(sandbox = sandbox.name(), changed, "eBPF maps were changed: they are put back");
        }
        (self.drifted, self.table) = (changed, found);
        let uncounted = self.count_again()?;
        let unpinned = self.node.borrow().ebpf.pin_again()?;
        if unpinned > 0 {
            warn!(maps = unpinned, "eBPF maps were no longer pinned: they are again");
        }
        let detached = self.attach(sandbox, self.followed.intersection(containers))?;
        if detached > 0 {
            warn!(sandbox = sandbox.name(), detached, "eBPF programs were detached: they are back");
        }
        self.mended += uncounted + unpinned + detached;
        self.correct()?;
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
            node.scan = None;
            self.table = node.look(self.network)?;
            return Err(error);
        }
        self.table = wanted;
        // What was read before is another by now.
        if let Some(scan) = &mut node.scan {
            scan.looked.insert(self.network);
        }
        self.mended += std::mem::take(&mut self.drifted);
        Ok(())
    }

    fn follow(
        &mut self,
        sandbox: &Sandbox,
        containers: BTreeSet<EndpointId>,
    ) -> Result<(), kernel::Error> {
        self.attach(sandbox, containers.difference(&self.followed))?;
        self.followed = containers;
        Ok(())
    }

    fn unfollow(&mut self, containers: &[EndpointId]) {
        for container in containers {
            self.followed.remove(container);
        }
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
/// every moment a connection finds a whole. Goes on after a failure, and returns the last one.
fn apply(maps: &Maps, now: &Table, wanted: &Table) -> Result<(), kernel::Error> {
    let (mut backends, lost_backends) = difference(&now.backends, &wanted.backends);
    let (mut fronts, lost_fronts) = difference(&now.fronts, &wanted.fronts);
    let (slots, lost_slots) = difference(&now.slots, &wanted.slots);
    let (gateways, lost_gateways) = difference(&now.gateways, &wanted.gateways);
    let (addresses, lost_addresses) = difference(&now.addresses, &wanted.addresses);
    let (timeouts, lost_timeouts) = difference(&now.timeouts, &wanted.timeouts);
    let numbers = backends.iter().map(|(number, _)| *number);
    let new: Vec<u32> = numbers.filter(|number| !now.backends.contains_key(number)).collect();
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
    let mut outcome = Ok(());
    let mut done = |map, result: std::io::Result<()>| {
        if let Err(error) = result {
            outcome = Err(map_error("change", map)(error));
        }
    };
    done("timeouts", maps.timeouts.insert_all(&timeouts));
    done("counts", maps.counts.insert_all(&new));
    done("backends", maps.backends.insert_all(&backends));
    done("slots", maps.slots.insert_all(&slots));
    done("gateways", maps.gateways.insert_all(&gateways));
    done("fronts", maps.fronts.insert_all(&fronts));
    done("addresses", maps.addresses.insert_all(&addresses));
    done("addresses", maps.addresses.remove_all(&lost_addresses));
    done("fronts", maps.fronts.remove_all(&lost_fronts));
    done("gateways", maps.gateways.remove_all(&lost_gateways));
    done("slots", maps.slots.remove_all(&lost_slots));
    // With what is counted for it a backend's connections end.
    done("counts", maps.counts.remove_all(&lost_backends));
    done("backends", maps.backends.remove_all(&lost_backends));
    done("timeouts", maps.timeouts.remove_all(&lost_timeouts));
    outcome
}

/// How many connections each backend has: established ones, and others.
fn open_connections(maps: &Maps) -> Result<BTreeMap<u32, (u32, u32)>, kernel::Error> {
    let now = kernel::ebpf::now().map_err(map_error("read the time for", "connections"))?;
    let timeouts = maps.timeouts.entries().map_err(map_error("read", "timeouts"))?;
    let timeouts: BTreeMap<u32, Timeouts> = timeouts.into_iter().collect();
    let mut open: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    let seen = maps.connections.entries().map_err(map_error("read", "connections"))?;
    let seen: HashMap<Tuple, Connection> = seen.into_iter().collect();
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
        let timeouts = timeouts.get(&tuple.network).copied().unwrap_or_default();
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
