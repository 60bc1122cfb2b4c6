//! What is true of a network's addresses, kept by the test alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netctl::ipam::Count;
use netctl::model::{EndpointId, ServiceId};

/// Who has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Endpoint(EndpointId),
    Service(ServiceId),
    /// It rests; who released it.
    Resting(usize),
}

#[derive(Debug, Clone)]
pub struct Held {
    pub id: EndpointId,
    pub name: Option<u8>,
    pub node: usize,
    pub service: Option<u8>,
    /// The service that it has drawn on.
    pub drawn: Option<ServiceId>,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, Default)]
pub struct Kept {
    /// The service it is for; none: it only holds them.
    pub service: Option<ServiceId>,
    pub count: u64,
    pub drawn: u64,
}

impl Kept {
    pub fn left(&self) -> u64 {
        self.count.saturating_sub(self.drawn)
    }
}

/// The facts of one network.
#[derive(Debug, Default)]
pub struct Facts {
    pub subnets: Vec<IpNetwork>,
    pub owners: BTreeMap<IpAddr, Owner>,
    pub endpoints: Vec<Held>,
    /// What is kept, by name: `s` and a number for services, `r` and a number for others.
    pub kept: BTreeMap<String, Kept>,
}

/// Of some subnets, the part from which addresses are given, and what nobody gets.
pub const LIMITS: [(&str, &str, &[&str]); 3] = [
    ("10.9.0.0/27", "10.9.0.16/29", &["10.9.0.18", "10.9.0.3"]),
    ("fd00:9::/123", "fd00:9::8/125", &["fd00:9::9"]),
    ("10.9.3.0/28", "10.9.3.4/30", &["10.9.3.5"]),
];

/// The part from which a subnet's addresses are given, and what nobody gets of it.
pub fn limits(subnet: IpNetwork) -> Option<(IpNetwork, BTreeSet<IpAddr>)> {
    let (_, range, reserved) = LIMITS.iter().find(|(cidr, ..)| *cidr == subnet.to_string())?;
    let reserved = reserved.iter().map(|address| address.parse().expect("it is one"));
    Some((range.parse().expect("it is one"), reserved.collect()))
}

/// What an endpoint may have of a subnet if it asks for it: not its first address, not the gateway,
/// which is the second, of IPv4 not the last, and not what nobody gets.
pub fn allowed(subnet: IpNetwork) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = subnet.iter().skip(2).collect();
    if subnet.is_ipv4() {
        all.pop();
    }
    if let Some((_, reserved)) = limits(subnet) {
        all.retain(|address| !reserved.contains(address));
    }
    all
}

/// What is given of a subnet to who does not ask for an address.
pub fn usable(subnet: IpNetwork) -> Vec<IpAddr> {
    let mut all = allowed(subnet);
    if let Some((range, _)) = limits(subnet) {
        all.retain(|address| range.contains(*address));
    }
    all
}

impl Facts {
    pub fn has(&self, ipv4: bool) -> bool {
        self.subnets.iter().any(|subnet| subnet.is_ipv4() == ipv4)
    }

    /// The families that the network has, in the order in which they are told.
    pub fn families(&self) -> Vec<bool> {
        [true, false].into_iter().filter(|ipv4| self.has(*ipv4)).collect()
    }

    /// Whether an endpoint can have an address by asking for it.
    pub fn is_allowed(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| allowed(*subnet).contains(&address))
    }

    pub fn is_usable(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| usable(*subnet).contains(&address))
    }

    pub fn left(&self) -> u128 {
        self.kept.values().map(|kept| u128::from(kept.left())).sum()
    }

    /// How the addresses of some subnets are used.
    pub fn count_of(&self, subnets: &[IpNetwork], ipv4: bool) -> Count {
        let of_family = subnets.iter().filter(|subnet| subnet.is_ipv4() == ipv4);
        let all: Vec<IpAddr> = of_family.flat_map(|subnet| usable(*subnet)).collect();
        let mut count = Count { usable: all.len() as u128, reserved: self.left(), ..Count::default() };
        for address in all {
            match self.owners.get(&address) {
                Some(Owner::Endpoint(_)) => count.endpoints += 1,
                Some(Owner::Service(_)) => count.services += 1,
                Some(Owner::Resting(_)) => count.resting += 1,
                None => {}
            }
        }
        count
    }

    pub fn count(&self, ipv4: bool) -> Count {
        self.count_of(&self.subnets, ipv4)
    }

    /// How many addresses of a family nobody has, kept or not.
    pub fn unowned(&self, ipv4: bool) -> u128 {
        let count = self.count(ipv4);
        count.usable - count.endpoints - count.services - count.resting
    }

    /// How many addresses of a family nobody has and nobody is to have.
    pub fn free(&self, ipv4: bool) -> u128 {
        self.unowned(ipv4).saturating_sub(self.left())
    }

    pub fn named(&self, name: Option<u8>) -> Option<&Held> {
        let name = name?;
        self.endpoints.iter().find(|held| held.name == Some(name))
    }

    /// A node has released an endpoint, of whose addresses some rest.
    pub fn release(&mut self, index: usize, node: usize, rests: &BTreeSet<IpAddr>) {
        let held = self.endpoints.swap_remove(index);
        for address in held.addresses {
            match rests.contains(&address) {
                true => self.owners.insert(address, Owner::Resting(node)),
                false => self.owners.remove(&address),
            };
        }
        let kept = held.service.and_then(|service| self.kept.get_mut(&format!("s{service}")));
        if let Some(kept) = kept.filter(|kept| held.drawn.is_some() && kept.service == held.drawn) {
            kept.drawn -= 1;
        }
    }

    /// What one node has released is free.
    pub fn end_rest(&mut self, node: usize) {
        self.owners.retain(|_, owner| *owner != Owner::Resting(node));
    }
}
