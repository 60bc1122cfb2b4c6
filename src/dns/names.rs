//! What one client can ask for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{DomainName, Entry, Zone};

/// The zones of the networks that a client is on, the one first on which it asks.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// What all names of ours are below of.
    pub domain: &'a DomainName,
    /// The zones.
    pub zones: &'a [Arc<Zone>],
    /// Whether names of one and two labels may be ours.
    pub short: bool,
}

/// What was found of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found<'a> {
    /// A name of ours, in the zone of that number.
    Entry(usize, &'a Entry),
    /// An address of ours, and the name of who has it.
    Address(DomainName),
    /// A name above others of ours, which has nothing itself: the domain, or a network's.
    Branch,
    /// It is below what is ours, but there is none of that name.
    Missing,
    /// It is not ours to tell.
    Foreign,
}

impl<'a> Names<'a> {
    /// Looks a name up.
    ///
    /// A name is understood in three ways, in this order: below the domain, with the network before
    /// that; as an address; and as a short form, with or without the network. Short forms are ours
    /// only where there is such a name: the rest of the world has names of one and two labels too.
    pub fn find(&self, name: &DomainName) -> Found<'a> {
        if let Some(count) = name.before(self.domain) {
            return self.find_below(name, count);
        }
        if let Some(address) = address(name) {
            return self.find_address(address);
        }
        if !self.short {
            return Found::Foreign;
        }
        let whole = |(number, zone): (usize, &'a Arc<Zone>)| Some((number, zone.get(name.wire())?));
        let short = self.zones.iter().enumerate().find_map(whole).or_else(|| self.find_qualified(name));
        short.map_or(Found::Foreign, |(number, entry)| Found::Entry(number, entry))
    }

    /// A name whose first `count` labels are before the domain.
    fn find_below(&self, name: &DomainName, count: usize) -> Found<'a> {
        let Some(network) = count.checked_sub(1) else { return Found::Branch };
        let Some((number, zone)) = self.zone(name, network) else { return Found::Missing };
        match (network, zone.get(name.first(network))) {
            (0, _) => Found::Branch,
            (_, Some(entry)) => Found::Entry(number, entry),
            (_, None) => Found::Missing,
        }
    }

    /// A name that ends with the network's.
    fn find_qualified(&self, name: &DomainName) -> Option<(usize, &'a Entry)> {
        let network = name.count().checked_sub(1).filter(|count| *count > 0)?;
        let (number, zone) = self.zone(name, network)?;
        Some((number, zone.get(name.first(network))?))
    }

    /// The zone whose network a label of a name is.
    fn zone(&self, name: &DomainName, label: usize) -> Option<(usize, &'a Arc<Zone>)> {
        let label = name.labels().nth(label)?;
        self.zones.iter().enumerate().find(|(_, zone)| zone.name.as_str().as_bytes() == label)
    }

    fn find_address(&self, address: IpAddr) -> Found<'a> {
        let mut ours = false;
        for zone in self.zones.iter().filter(|zone| zone.contains(address)) {
            ours = true;
            if let Some(full) = zone.name_of(address).and_then(|name| self.full(zone, name)) {
                return Found::Address(full);
            }
        }
        if ours { Found::Missing } else { Found::Foreign }
    }

    /// The full name of one that is relative to a zone.
    pub fn full(&self, zone: &Zone, name: &DomainName) -> Option<DomainName> {
        name.under(&DomainName::new([zone.name.as_str().as_bytes()])?)?.under(self.domain)
    }
}

/// The address that a name of the reverse tree stands for (RFC 1035, 3.5; RFC 3596, 2.5).
fn address(name: &DomainName) -> Option<IpAddr> {
    let mut labels = name.labels().rev();
    if labels.next()? != b"arpa" {
        return None;
    }
    let tree = labels.next()?;
    let text = |label: &'_ [u8]| std::str::from_utf8(label).ok().map(str::to_owned);
    match (tree, name.count()) {
        (b"in-addr", 6) => {
            let mut octets = [0; 4];
            for octet in &mut octets {
                let label = text(labels.next()?)?;
                *octet = label.parse().ok().filter(|number: &u8| number.to_string() == label)?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        (b"ip6", 34) => {
            let mut number = 0_u128;
            for label in labels {
                let digit = text(label).filter(|label| label.len() == 1)?;
                number = number << 4 | u128::from_str_radix(&digit, 16).ok()?;
            }
            Some(Ipv6Addr::from(number).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
