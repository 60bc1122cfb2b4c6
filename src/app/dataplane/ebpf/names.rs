//! The names that the programs answer: from the zones of the networks to entries of the maps. What is not there
//! the agent answers, so an entry that is missing costs no more than that.

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::warn;

use super::super::names::{Told, ToldNetwork};
use super::entries::map_error;
use super::table::difference;
use crate::dns::{DomainName, Rest, Simple, Zone, nothing};
use crate::kernel;
use crate::kernel::ebpf::{Map, Maps, Name, NameKey, PART_FIRST, PART_REST, Place, Telling};

/// What names have in the maps.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entries {
    names: BTreeMap<NameKey, Name>,
    servers: BTreeMap<Place, u32>,
}

/// The names of a node.
#[derive(Default)]
pub(super) struct Names {
    /// What they are to be; `None`: nothing is known of that yet.
    told: Option<Told>,
    /// Whether the maps have just that.
    is_certain: bool,
}

impl Names {
    /// Has the programs answer so from now on.
    pub(super) fn tell(&mut self, maps: &Maps, told: Told) -> Result<(), kernel::Error> {
        let before = self.told.replace(told);
        let Some(told) = &self.told else { return Ok(()) };
        let before = before.filter(|before| self.is_certain && before.domain == told.domain);
        let Some(before) = before else { return self.mend(maps).map(drop) };
        self.is_certain = false;
        apply(maps, &changed(&before, told), &changed(told, &before))?;
        tell_how(maps, told)?;
        self.is_certain = true;
        Ok(())
    }

    /// Puts right what somebody has changed; tells how many entries that were.
    pub(super) fn mend(&mut self, maps: &Maps) -> Result<u64, kernel::Error> {
        let Some(told) = &self.told else { return Ok(0) };
        let was_certain = std::mem::take(&mut self.is_certain);
        let found = Entries {
            names: maps.names.entries().map_err(map_error("read", "names"))?.into_iter().collect(),
            servers: maps.servers.entries().map_err(map_error("read", "servers"))?.into_iter().collect(),
        };
        let mut wanted = Entries::default();
        for (number, network) in &told.networks {
            wanted.add(&told.domain, *number, network);
        }
        let mended = apply(maps, &found, &wanted)? + u64::from(tell_how(maps, told)?);
        self.is_certain = true;
        Ok(if was_certain { mended } else { 0 })
    }
}

impl Entries {
    fn add(&mut self, domain: &DomainName, number: u32, network: &ToldNetwork) {
        self.servers.extend(servers(number, network));
        self.names.extend(network.zone.simple(domain).filter_map(|simple| entry(number, simple)));
        self.names.extend(rests(domain, number, &network.zone));
    }
}

/// The entries of what is told here and not in the same way there.
fn changed(here: &Told, there: &Told) -> Entries {
    let mut entries = Entries::default();
    let domain = &here.domain;
    for (number, network) in &here.networks {
        let Some(other) = there.networks.get(number) else {
            entries.add(domain, *number, network);
            continue;
        };
        if network.servers != other.servers {
            entries.servers.extend(servers(*number, network));
        }
        let (zone, other) = (&network.zone, &other.zone);
        if Arc::ptr_eq(zone, other) {
            continue;
        }
        let differs = |simple: &Simple<'_>| other.find_simple(domain, simple.label) != Some(*simple);
        let simple = zone.simple(domain).filter(differs);
        entries.names.extend(simple.filter_map(|simple| entry(*number, simple)));
        if zone.name != other.name {
            entries.names.extend(rests(domain, *number, zone));
        }
    }
    entries
}

fn entry(number: u32, Simple { label, v4, v6 }: Simple<'_>) -> Option<(NameKey, Name)> {
    Some((NameKey::new(number, PART_FIRST, label)?, Name::with(v4, v6)))
}

fn rests(domain: &DomainName, number: u32, zone: &Zone) -> Vec<(NameKey, Name)> {
    let rest = |Rest { wire, domain }: Rest| {
        let domain = domain.map(|at| at as u32);
        Some((NameKey::new(number, PART_REST, &wire)?, Name::rest(domain)))
    };
    zone.rests(domain).into_iter().filter_map(rest).collect()
}

fn servers(number: u32, network: &ToldNetwork) -> impl Iterator<Item = (Place, u32)> {
    network.servers.iter().map(move |server| (Place::new(number, *server), 1))
}

/// Makes entries of others; tells how many are changed. What goes is gone before there is anything new: meanwhile
/// the agent answers.
fn apply(maps: &Maps, now: &Entries, wanted: &Entries) -> Result<u64, kernel::Error> {
    let (set, gone) = difference(&now.servers, &wanted.servers);
    maps.servers.remove_all(&gone).map_err(map_error("change", "servers"))?;
    insert(&maps.servers, &set).map_err(map_error("change", "servers"))?;
    let (names, lost) = difference(&now.names, &wanted.names);
    maps.names.remove_all(&lost).map_err(map_error("change", "names"))?;
    insert(&maps.names, &names).map_err(map_error("change", "names"))?;
    Ok((set.len() + gone.len() + names.len() + lost.len()) as u64)
}

/// Gives keys their values, as many as there is room for.
fn insert<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: &Map<K, V>,
    entries: &[(K, V)],
) -> std::io::Result<()> {
    let is_full = |error: &std::io::Error| error.raw_os_error() == Some(libc::E2BIG);
    match map.insert_all(entries) {
        Err(error) if is_full(&error) => {}
        done => return done,
    }
    warn!("there is no room for all names in the kernel: the agent answers the rest");
    for (key, value) in entries {
        match map.insert(key, value) {
            Err(error) if !is_full(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Says how answers are told; tells whether that was otherwise.
fn tell_how(maps: &Maps, told: &Told) -> Result<bool, kernel::Error> {
    let record = nothing(&told.domain, told.ttl, told.serial);
    let telling = record.and_then(|record| Telling::new(told.ttl, &record));
    // Of a domain that is too long the agent tells.
    let telling = telling.unwrap_or_else(bytemuck::Zeroable::zeroed);
    if maps.telling.get(&0).map_err(map_error("read", "telling"))? == Some(telling) {
        return Ok(false);
    }
    maps.telling.insert(&0, &telling).map_err(map_error("change", "telling"))?;
    Ok(true)
}
