//! Names that can be answered by who knows nothing but these: of one label, with one address of each family at
//! most. Most names are of that sort.
//!
//! A name is asked for by its first label and what may follow it: nothing, the network, or the network and the
//! domain. What is said of both here is what every client is told that asks on the network, whichever other
//! networks it is on ([`super::Names::find`] understands names in the same ways).

use std::net::{Ipv4Addr, Ipv6Addr};

use super::answer::{EXPIRE, REFRESH, RETRY, authorities};
use super::plain::IN;
use super::{DomainName, Entry, Zone};

/// What is below this stands for all endpoints of a service.
const TASKS: &[u8] = b"\x05tasks";
/// Addresses are looked up below this.
const ARPA: &[u8] = b"\x04arpa";
/// The type of the record that says for how long nothing is there (RFC 1035, 3.2.2).
const SOA: [u8; 2] = [0, 6];

/// A name of one label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Simple<'a> {
    /// As the wire has it.
    pub label: &'a [u8],
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// What may follow the first label of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rest {
    /// As the wire has it.
    pub wire: Vec<u8>,
    /// Where the domain begins in that; `None`: it is a short form.
    pub domain: Option<usize>,
}

impl Zone {
    /// The names that are simple below this domain.
    pub fn simple<'a>(&'a self, domain: &'a DomainName) -> impl Iterator<Item = Simple<'a>> {
        self.entries().filter_map(|(name, entry)| simple(domain, name, entry))
    }

    /// What a name is, if it is simple below this domain.
    pub fn find_simple<'a>(&'a self, domain: &DomainName, name: &'a [u8]) -> Option<Simple<'a>> {
        simple(domain, name, self.get(name)?)
    }

    /// What may follow the first label of a simple name, beside nothing.
    pub fn rests(&self, domain: &DomainName) -> Vec<Rest> {
        let Some(network) = DomainName::new([self.name.as_str().as_bytes()]) else { return Vec::new() };
        let mut rests = Vec::new();
        // The first is below the domain itself, or that; the last an address.
        let is_domain = network == *domain || domain.parent().is_some_and(|parent| parent == network);
        if !is_domain && network.wire() != ARPA {
            rests.push(Rest { wire: network.wire().to_vec(), domain: None });
        }
        if let Some(full) = network.under(domain) {
            rests.push(Rest { wire: full.wire().to_vec(), domain: Some(network.wire().len()) });
        }
        rests
    }
}

fn simple<'a>(domain: &DomainName, name: &'a [u8], entry: &Entry) -> Option<Simple<'a>> {
    let (length, label) = name.split_first()?;
    // What is meant by these is another thing, or depends on what follows.
    let is_other = name == TASKS || name == ARPA || name == domain.wire() || label.starts_with(b"_");
    let is_single = usize::from(*length) == label.len();
    match (entry.v4.as_slice(), entry.v6.as_slice()) {
        ([_, _, ..], _) | (_, [_, _, ..]) => None,
        (v4, v6) if is_single && !is_other => {
            Some(Simple { label: name, v4: v4.first().copied(), v6: v6.first().copied() })
        }
        _ => None,
    }
}

/// The record that says for how long a name has nothing of a type, behind two bytes for that name. `None`: the
/// domain is too long.
pub fn nothing(domain: &DomainName, ttl: u32, serial: u32) -> Option<Vec<u8>> {
    let mut data = Vec::new();
    for name in authorities(domain)? {
        data.extend_from_slice(name.wire());
        data.push(0);
    }
    for number in [serial, REFRESH, RETRY, EXPIRE, ttl] {
        data.extend(number.to_be_bytes());
    }
    let length = u16::try_from(data.len()).ok()?;
    let head = [&[0, 0], &SOA[..], &IN, &ttl.to_be_bytes(), &length.to_be_bytes()].concat();
    Some([head, data].concat())
}
