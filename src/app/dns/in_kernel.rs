//! The names that the kernel answers: from the zones of the networks to entries of the maps. What is not there
//! the agent answers, so an entry that is missing costs no more than that.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Pod;
use tokio::time::Instant;
use tracing::warn;

use crate::app::dataplane::Tally;
use crate::config::Config;
use crate::dns::{DomainName, Rest, Simple, Zone, nothing};
use crate::kernel::ebpf::{
    Error, Map, Name, NameKey, NameMaps, Place, Telling, difference, nanoseconds,
};

/// How many times it is looked, at least, before the kernel would tell nothing more.
const LOOKS: u32 = 4;

/// What is told on one network.
#[derive(Clone)]
pub(super) struct Network {
    pub(super) zone: Arc<Zone>,
    /// Where names are asked for.
    pub(super) servers: BTreeSet<IpAddr>,
}

/// What is told, by the networks' numbers.
type Networks = BTreeMap<u32, Network>;

/// What names have in the maps.
#[derive(Default)]
struct Entries {
    names: BTreeMap<NameKey, Name>,
    suffixes: BTreeMap<NameKey, u32>,
    servers: BTreeMap<Place, u32>,
}

/// What the kernel of this node answers.
pub(in crate::app) struct InKernel {
    maps: NameMaps,
    domain: DomainName,
    ttl: u32,
    /// For how long an agent that is gone is told for. An address that somebody gives up meanwhile rests for as
    /// long: it is nobody else's yet.
    lasts: Duration,
    /// How often it is looked whether all is as it should be.
    every: Duration,
    due: Instant,
    tally: Tally,
    serial: u32,
    /// What it should be; `None`: that is not known yet.
    wanted: Option<Networks>,
    /// Whether the maps have just that, as far as there is room.
    is_certain: bool,
    is_full: bool,
}

impl InKernel {
    /// Opens the maps that the dataplane has made.
    pub(in crate::app) fn open(config: &Config, tally: Tally) -> Result<Self, Error> {
        let lasts = config.rest.max(config.lease);
        Ok(Self {
            maps: NameMaps::of_agent()?,
            domain: config.dns.domain.clone(),
            ttl: super::seconds(config.dns.ttl),
            lasts,
            every: config.resync.min(lasts / LOOKS),
            due: Instant::now(),
            tally,
            serial: 0,
            wanted: None,
            is_certain: false,
            is_full: false,
        })
    }

    /// When [`Self::look`] is to be called.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Has the kernel answer so from now on.
    pub(super) fn tell(&mut self, serial: u32, networks: Networks) {
        self.serial = serial;
        let difference = match &self.wanted {
            Some(before) if self.is_certain => Some((
                changed(&self.domain, before, &networks),
                changed(&self.domain, &networks, before),
            )),
            _ => None,
        };
        self.wanted = Some(networks);
        let Some((old, new)) = difference else { return self.look() };
        let done = self.apply(&old, &new).and_then(|_| self.write_telling());
        self.note(done);
    }

    /// Puts right what somebody has changed, and has the kernel tell for another while.
    pub(super) fn look(&mut self) {
        self.due = Instant::now() + self.every;
        // Of what had no room something may have it now.
        let was_whole = self.is_certain && !self.is_full;
        let done = self.mend();
        if let Ok(mended @ 1..) = done
            && was_whole
        {
            warn!(mended, "names that the kernel answers were changed: they are put back");
            self.tally.repaired(mended);
        }
        self.note(done.map(drop));
    }

    /// Notes how it went. Where anything failed nothing is answered until it is put right: an address that was
    /// not removed may be another's soon.
    fn note(&mut self, done: Result<(), Error>) {
        self.is_certain = done.is_ok();
        let Err(error) = done else { return };
        warn!(%error, "names are not answered in the kernel: the agent does");
        // Its only value is there already, so that takes no memory.
        if let Err(error) = self.maps.telling.insert(&0, &Telling::new(0, 0, &[])) {
            warn!(%error, "names that the kernel answers may be old ones");
        }
    }

    fn mend(&mut self) -> Result<u64, Error> {
        let Some(wanted) = &self.wanted else { return Ok(0) };
        let mut entries = Entries::default();
        for (number, network) in wanted {
            entries.add(&self.domain, *number, network);
        }
        let found = Entries {
            names: read(&self.maps.names, "names")?,
            suffixes: read(&self.maps.suffixes, "suffixes")?,
            servers: read(&self.maps.servers, "servers")?,
        };
        let changed = self.apply(&found, &entries)?;
        self.write_telling()?;
        Ok(changed)
    }

    /// Says how answers are told, and for how long.
    fn write_telling(&self) -> Result<(), Error> {
        let failed = map_error("change", "telling");
        let until = nanoseconds().map_err(&failed)? + self.lasts.as_nanos() as u64;
        let nothing = nothing(&self.domain, self.ttl, self.serial).unwrap_or_default();
        self.maps.telling.insert(&0, &Telling::new(until, self.ttl, &nothing)).map_err(failed)
    }

    /// Makes entries of others, as many as there is room for; tells how many are changed. What is not to be
    /// told goes first, which takes no memory.
    fn apply(&mut self, now: &Entries, wanted: &Entries) -> Result<u64, Error> {
        let (servers, no_servers) = difference(&now.servers, &wanted.servers);
        let (suffixes, no_suffixes) = difference(&now.suffixes, &wanted.suffixes);
        let (names, no_names) = difference(&now.names, &wanted.names);
        let failed = |map| map_error("change", map);
        self.maps.servers.remove_all(&no_servers).map_err(failed("servers"))?;
        self.maps.suffixes.remove_all(&no_suffixes).map_err(failed("suffixes"))?;
        self.maps.names.remove_all(&no_names).map_err(failed("names"))?;
        let entered = [
            insert(&self.maps.names, &names).map_err(failed("names"))?,
            insert(&self.maps.suffixes, &suffixes).map_err(failed("suffixes"))?,
            insert(&self.maps.servers, &servers).map_err(failed("servers"))?,
        ];
        let is_full = entered.iter().sum::<usize>() < names.len() + suffixes.len() + servers.len();
        if is_full && !self.is_full {
            warn!("the kernel has no room for all names: the agent answers the rest");
        }
        self.is_full = is_full;
        let changed =
            entered.iter().sum::<usize>() + no_servers.len() + no_suffixes.len() + no_names.len();
        Ok(changed as u64)
    }
}

impl Entries {
    fn add(&mut self, domain: &DomainName, number: u32, network: &Network) {
        self.servers.extend(servers(number, network));
        self.names.extend(network.zone.simple(domain).filter_map(|simple| entry(number, simple)));
        self.suffixes.extend(suffixes(domain, number, &network.zone));
    }
}

/// The entries of what is told here and not in the same way there.
fn changed(domain: &DomainName, here: &Networks, there: &Networks) -> Entries {
    let mut entries = Entries::default();
    for (number, network) in here {
        let Some(other) = there.get(number) else {
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
            entries.suffixes.extend(suffixes(domain, *number, zone));
        }
    }
    entries
}

fn entry(number: u32, Simple { label, v4, v6 }: Simple<'_>) -> Option<(NameKey, Name)> {
    Some((NameKey::new(number, label)?, Name::with(v4, v6)))
}

fn suffixes(domain: &DomainName, number: u32, zone: &Zone) -> Vec<(NameKey, u32)> {
    let suffix =
        |Rest { wire, domain }: Rest| Some((NameKey::new(number, &wire)?, domain.unwrap_or(0) as u32));
    zone.rests(domain).into_iter().filter_map(suffix).collect()
}

fn servers(number: u32, network: &Network) -> impl Iterator<Item = (Place, u32)> {
    network.servers.iter().map(move |server| (Place::new(number, *server), 1))
}

fn map_error(action: &'static str, map: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Map { action, map, source }
}

fn read<K: Pod + Ord, V: Pod>(map: &Map<K, V>, name: &'static str) -> Result<BTreeMap<K, V>, Error> {
    Ok(map.entries().map_err(map_error("read", name))?.into_iter().collect())
}

/// Gives keys their values, as many as there is room for; tells how many.
fn insert<K: Pod, V: Pod>(map: &Map<K, V>, entries: &[(K, V)]) -> io::Result<usize> {
    let is_full = |error: &io::Error| error.raw_os_error() == Some(libc::E2BIG);
    match map.insert_all(entries) {
        Err(error) if is_full(&error) => {}
        done => return done.map(|()| entries.len()),
    }
    // What is there already changes all the same.
    let mut count = 0;
    for (key, value) in entries {
        match map.insert(key, value) {
            Err(error) if is_full(&error) => {}
            done => done.map(|()| count += 1)?,
        }
    }
    Ok(count)
}
