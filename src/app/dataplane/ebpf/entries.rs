//! The entries of the eBPF maps: reading them, and making what is there what should be.

use std::collections::{BTreeMap, HashMap};

use super::paths::Paths;
use super::table::Table;
use crate::kernel;
use crate::kernel::ebpf::{
    ADDRESS_CONTAINER, Connection, Error, Maps, STATE_ANSWERED, STATE_CLIENT_ENDED, STATE_RESET,
    STATE_SERVER_ENDED, Timeouts, Tuple, difference,
};

/// What a network has in the maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entries {
    pub(super) table: Table,
    pub(super) paths: Paths,
}

impl Entries {
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty() && self.paths.is_empty()
    }
}

pub(super) fn map_error(
    action: &'static str,
    map: &'static str,
) -> impl Fn(std::io::Error) -> kernel::Error {
    move |source| Error::Map { action, map, source }.into()
}

/// How many entries differ.
pub(super) fn changes(found: &Entries, known: &Entries) -> u64 {
    fn count<K: Ord + Copy, V: PartialEq + Copy>(found: &BTreeMap<K, V>, known: &BTreeMap<K, V>) -> u64 {
        let (set, gone) = difference(found, known);
        (set.len() + gone.len()) as u64
    }
    let (carried, carried_before) = (&found.paths, &known.paths);
    let (found, known) = (&found.table, &known.table);
    count(&carried.containers, &carried_before.containers)
        + count(&carried.ways, &carried_before.ways)
        + count(&found.addresses, &known.addresses)
        + count(&found.gateways, &known.gateways)
        + count(&found.timeouts, &known.timeouts)
        + count(&found.fronts, &known.fronts)
        + count(&found.slots, &known.slots)
        + count(&found.backends, &known.backends)
}

/// Reads the entries of all networks. What belongs to none is removed.
pub(super) fn read(maps: &Maps) -> Result<BTreeMap<u32, Entries>, kernel::Error> {
    let mut all: BTreeMap<u32, Entries> = read_paths(maps)?;
    let mut network_of: BTreeMap<u32, u32> = BTreeMap::new();
    for (place, meaning) in maps.addresses.entries().map_err(map_error("read", "addresses"))? {
        let entries = all.entry(place.network).or_default();
        match meaning.kind {
            ADDRESS_CONTAINER => drop(entries.paths.containers.insert(place, meaning)),
            _ => drop(entries.table.addresses.insert(place, meaning)),
        }
    }
    for (place, gateway) in maps.gateways.entries().map_err(map_error("read", "gateways"))? {
        all.entry(place.network).or_default().table.gateways.insert(place, gateway);
    }
    for (network, timeouts) in maps.timeouts.entries().map_err(map_error("read", "timeouts"))? {
        all.entry(network).or_default().table.timeouts.insert(network, timeouts);
    }
    for (key, mut front) in maps.fronts.entries().map_err(map_error("read", "fronts"))? {
        front.turn = 0;
        network_of.insert(front.id, key.network);
        all.entry(key.network).or_default().table.fronts.insert(key, front);
    }
    let (mut lost_slots, mut lost_backends) = (Vec::new(), Vec::new());
    for (key, backend) in maps.slots.entries().map_err(map_error("read", "slots"))? {
        match network_of.get(&key.front).and_then(|network| all.get_mut(network)) {
            Some(entries) => drop(entries.table.slots.insert(key, backend)),
            None => lost_slots.push(key),
        }
    }
    for (number, mut backend) in maps.backends.entries().map_err(map_error("read", "backends"))? {
        backend.open = 0;
        match network_of.get(&backend.front).and_then(|network| all.get_mut(network)) {
            Some(entries) => drop(entries.table.backends.insert(number, backend)),
            None => lost_backends.push(number),
        }
    }
    maps.slots.remove_all(&lost_slots).map_err(map_error("change", "slots"))?;
    maps.backends.remove_all(&lost_backends).map_err(map_error("change", "backends"))?;
    maps.counts.remove_all(&lost_backends).map_err(map_error("change", "counts"))?;
    Ok(all)
}

fn read_paths(maps: &Maps) -> Result<BTreeMap<u32, Entries>, kernel::Error> {
    let mut all: BTreeMap<u32, Entries> = BTreeMap::new();
    for (range, way) in maps.ways.entries().map_err(map_error("read", "ways"))? {
        all.entry(range.network).or_default().paths.ways.insert(range, way);
    }
    Ok(all)
}

/// Makes one table of another. What is pointed at comes before what points at it, and goes after it: at
/// every moment a connection finds a whole. An address that is a container's in the paths stays. Goes on after
/// a failure, and returns the last one.
pub(super) fn apply(
    maps: &Maps,
    now: &Table,
    wanted: &Table,
    paths: &Paths,
) -> Result<(), kernel::Error> {
    let (mut backends, lost_backends) = difference(&now.backends, &wanted.backends);
    let (mut fronts, lost_fronts) = difference(&now.fronts, &wanted.fronts);
    let (slots, lost_slots) = difference(&now.slots, &wanted.slots);
    let (gateways, lost_gateways) = difference(&now.gateways, &wanted.gateways);
    let (addresses, mut lost_addresses) = difference(&now.addresses, &wanted.addresses);
    lost_addresses.retain(|place| !paths.containers.contains_key(place));
    let (timeouts, lost_timeouts) = difference(&now.timeouts, &wanted.timeouts);
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
    done("backends", maps.backends.insert_all(&backends));
    done("slots", maps.slots.insert_all(&slots));
    done("gateways", maps.gateways.insert_all(&gateways));
    done("fronts", maps.fronts.insert_all(&fronts));
    done("addresses", maps.addresses.insert_all(&addresses));
    done("addresses", maps.addresses.remove_all(&lost_addresses));
    if !(addresses.is_empty() && lost_addresses.is_empty()) {
        done("generation", maps.changed());
    }
    done("fronts", maps.fronts.remove_all(&lost_fronts));
    done("gateways", maps.gateways.remove_all(&lost_gateways));
    done("slots", maps.slots.remove_all(&lost_slots));
    // Without both a backend's connections end. The programs count for one that is there.
    done("backends", maps.backends.remove_all(&lost_backends));
    done("counts", maps.counts.remove_all(&lost_backends));
    done("timeouts", maps.timeouts.remove_all(&lost_timeouts));
    outcome
}

/// Makes paths of others. An address that is a service's in the table stays. Goes on after a failure, and
/// returns the last one.
pub(super) fn apply_paths(
    maps: &Maps,
    now: &Paths,
    wanted: &Paths,
    table: &Table,
) -> Result<(), kernel::Error> {
    let (containers, mut lost_containers) = difference(&now.containers, &wanted.containers);
    lost_containers.retain(|place| !table.addresses.contains_key(place));
    let (ways, lost_ways) = difference(&now.ways, &wanted.ways);
    if containers.is_empty() && lost_containers.is_empty() && ways.is_empty() && lost_ways.is_empty() {
        return Ok(());
    }
    let done = |map, result: std::io::Result<()>| result.map_err(map_error("change", map));
    let outcomes = [
        done("addresses", maps.addresses.insert_all(&containers)),
        done("ways", maps.ways.insert_all(&ways)),
        done("ways", maps.ways.remove_all(&lost_ways)),
        done("addresses", maps.addresses.remove_all(&lost_containers)),
        done("generation", maps.changed()),
    ];
    outcomes.into_iter().rfind(Result::is_err).unwrap_or(Ok(()))
}

/// The networks' timeouts.
pub(super) fn timeouts_of(maps: &Maps) -> Result<BTreeMap<u32, Timeouts>, kernel::Error> {
    let timeouts = maps.timeouts.entries().map_err(map_error("read", "timeouts"))?;
    Ok(timeouts.into_iter().collect())
}

/// How many connections each backend has whose packets are balanced: established ones, and others.
pub(super) fn open_connections(
    maps: &Maps,
    timeouts: &BTreeMap<u32, Timeouts>,
) -> Result<BTreeMap<u32, (u32, u32)>, kernel::Error> {
    let now = kernel::ebpf::now().map_err(map_error("read the time for", "connections"))?;
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
