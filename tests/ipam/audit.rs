//! Reads along in the store: what must hold at every revision, by the store's keys alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use netctl::store::{Change, Event, Revision, Store};
use serde_json::Value;

use crate::facts::usable;

#[derive(Default)]
struct Net {
    usable: [u128; 2],
    endpoints: BTreeMap<String, BTreeSet<IpAddr>>,
    /// The same by address.
    users: BTreeMap<IpAddr, Vec<String>>,
    /// Whose each address is: an endpoint's id, a service's with a `{` before it, or nobody's.
    addresses: BTreeMap<IpAddr, String>,
    kept: BTreeMap<String, u64>,
    /// How many addresses of each family somebody has.
    held: [u128; 2],
}

#[derive(Default)]
pub struct Audit {
    nets: BTreeMap<String, Net>,
    pub changes: u64,
    pub fullest: u64,
}

impl Audit {
    /// Follows the store from now on, until there is an `end` and it is reached.
    ///
    /// # Errors
    /// What did not hold.
    pub async fn follow(
        store: Arc<dyn Store>,
        mut end: tokio::sync::watch::Receiver<Option<Revision>>,
    ) -> Result<Self, String> {
        let mut audit = Self::default();
        let mut watch = store.watch("", None);
        let mut seen = Revision(0);
        loop {
            let until = *end.borrow();
            if until.is_some_and(|until| until <= seen) {
                return Ok(audit);
            }
            let event = tokio::select! {
                event = watch.recv() => event.ok_or("the watch has ended")?,
                _ = end.changed() => continue,
            };
            let (revision, changes) = match event {
                Event::Changes(revision, changes) => (revision, changes),
                Event::Snapshot(listing) => {
                    audit.nets.clear();
                    let puts = listing.entries.into_iter().map(|(k, entry)| Change::Put(k, entry));
                    (listing.revision, puts.collect())
                }
                Event::Lost(_) => continue,
            };
            seen = revision;
            audit.take(changes).map_err(|problem| format!("at revision {revision}: {problem}"))?;
        }
    }

    fn take(&mut self, changes: Vec<Change>) -> Result<(), String> {
        let mut touched: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        self.changes += changes.len() as u64;
        for change in changes {
            let (key, value) = match &change {
                Change::Put(key, entry) => (key, Some(entry.value.as_slice())),
                Change::Delete(key) => (key, None),
            };
            let parts: Vec<&str> = key.splitn(4, '/').collect();
            match (parts.as_slice(), value) {
                (["base", "networks", id], Some(value)) => {
                    self.nets.entry((*id).to_owned()).or_default().usable = sizes(value)?;
                }
                (["members", id, sort, what], value) => {
                    let net = self.nets.entry((*id).to_owned()).or_default();
                    let of_net = touched.entry((*id).to_owned()).or_default();
                    net.take(sort, what, value, of_net)?;
                }
                _ => {}
            }
        }
        for (id, addresses) in touched {
            let net = &self.nets[&id];
            self.fullest += u64::from(net.check(&addresses)?);
        }
        Ok(())
    }
}

impl Net {
    fn take(
        &mut self,
        sort: &str,
        what: &str,
        value: Option<&[u8]>,
        touched: &mut BTreeSet<IpAddr>,
    ) -> Result<(), String> {
        match sort {
            "endpoints" => {
                for address in self.endpoints.remove(what).into_iter().flatten() {
                    self.users.entry(address).or_default().retain(|user| user != what);
                    touched.insert(address);
                }
                if let Some(value) = value {
                    let addresses = addresses(&parse(value)?["addresses"])?;
                    for address in &addresses {
                        self.users.entry(*address).or_default().push(what.to_owned());
                    }
                    touched.extend(&addresses);
                    self.endpoints.insert(what.to_owned(), addresses);
                }
            }
            "addresses" => {
                let address: IpAddr = what.parse().map_err(|_| format!("address {what}"))?;
                let family = usize::from(address.is_ipv6());
                let text = |value| String::from_utf8_lossy(value).replace('"', "");
                let before = match value {
                    Some(value) => self.addresses.insert(address, text(value)),
                    None => self.addresses.remove(&address),
                };
                self.held[family] -= u128::from(before.is_some_and(|before| !before.is_empty()));
                self.held[family] += u128::from(value.is_some_and(|value| !value.is_empty()));
                touched.insert(address);
            }
            "reservations" => {
                self.kept.remove(what);
                if let Some(value) = value {
                    let read = parse(value)?;
                    let number = |field: &str| read[field].as_u64().unwrap_or_default();
                    let left = number("count").saturating_sub(number("drawn"));
                    self.kept.insert(what.to_owned(), left);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// An address is whose its key says, and what is kept is there. `true`: and nothing more.
    fn check(&self, touched: &BTreeSet<IpAddr>) -> Result<bool, String> {
        for address in touched {
            let holder = self.addresses.get(address).map_or("", String::as_str);
            let users = self.users.get(address).into_iter().flatten();
            let users: Vec<&str> = users.map(String::as_str).collect();
            let right: &[&str] =
                if holder.is_empty() || holder.starts_with('{') { &[] } else { &[holder] };
            if users != right {
                return Err(format!("{address} is {holder:?}'s by its key, and {users:?} have it"));
            }
        }
        let kept: u128 = self.kept.values().map(|left| u128::from(*left)).sum();
        let mut full = false;
        for (held, usable) in self.held.iter().zip(self.usable).filter(|(_, usable)| *usable > 0) {
            if held + kept > usable {
                let kept = &self.kept;
                return Err(format!("of {usable} addresses {held} are held, and kept are {kept:?}"));
            }
            full |= held + kept == usable;
        }
        Ok(full)
    }
}

fn parse(value: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(value).map_err(|error| error.to_string())
}

fn addresses(list: &Value) -> Result<BTreeSet<IpAddr>, String> {
    let texts = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    texts.map(|text| text.parse().map_err(|_| format!("address {text}"))).collect()
}

/// How many addresses of each family a network has, with those of subnets that are leaving.
fn sizes(network: &[u8]) -> Result<[u128; 2], String> {
    let read = parse(network)?;
    let lists = ["subnets", "leaving"].into_iter().filter_map(|list| read[list].as_array());
    let mut sizes = [0, 0];
    for text in lists.flatten().filter_map(|subnet| subnet["cidr"].as_str()) {
        let cidr: IpNetwork = text.parse().map_err(|_| format!("subnet {text}"))?;
        sizes[usize::from(cidr.is_ipv6())] += usable(cidr).len() as u128;
    }
    Ok(sizes)
}
