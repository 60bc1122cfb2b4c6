//! A subnet of a network: which of its addresses containers may have.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A subnet that cannot be used, and what to give instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// The address has bits behind the prefix.
    #[error("subnet {given} has host bits set: did you mean {meant}?")]
    HostBits {
        /// What was given.
        given: IpNetwork,
        /// The same with the host bits cleared.
        meant: IpNetwork,
    },
    /// The prefix is shorter or longer than a network can use.
    #[error("subnet {subnet} has a prefix length that cannot be used: give /{shortest} to /{longest}")]
    Prefix {
        /// The subnet.
        subnet: IpNetwork,
        /// The largest subnet allowed.
        shortest: u8,
        /// The smallest subnet allowed.
        longest: u8,
    },
    /// The range is not for unicast addresses of hosts.
    #[error("subnet {subnet} overlaps {special} ({purpose}): choose another, such as 10.9.0.0/24")]
    Special {
        /// The subnet.
        subnet: IpNetwork,
        /// What it overlaps.
        special: IpNetwork,
        /// What that is for.
        purpose: &'static str,
    },
    /// The gateway is not a host address of the subnet.
    #[error("gateway {gateway} is not a host address of subnet {subnet}: give one within it")]
    Gateway {
        /// The subnet.
        subnet: IpNetwork,
        /// The gateway.
        gateway: IpAddr,
    },
    /// The range is not within the subnet.
    #[error("range {range} is not within subnet {subnet}: give a part of the subnet")]
    Range {
        /// The subnet.
        subnet: IpNetwork,
        /// The range.
        range: IpNetwork,
    },
    /// A reserved address is not within the subnet.
    #[error("reserved address {address} is not within subnet {subnet}")]
    Reserved {
        /// The subnet.
        subnet: IpNetwork,
        /// The address.
        address: IpAddr,
    },
    /// Blocks that are larger than the subnet, or than a block can be.
    #[error("blocks of /{block_prefix} cannot be cut from subnet {subnet}")]
    Block {
        /// The subnet.
        subnet: IpNetwork,
        /// The blocks' prefix length.
        block_prefix: u8,
    },
}

/// A block has at most as many bits: 256 addresses.
const MOST_BLOCK_BITS: u8 = 8;
/// How many blocks of a subnet a node should find for itself when all nodes take as many.
const BLOCKS_PER_NODE: u128 = 4;
/// A cluster is expected to grow to as many nodes at least.
const NODES: u128 = 8;

/// Ranges that are never a network's: (range, what it is for).
const SPECIAL: [(&str, &str); 10] = [
    ("0.0.0.0/8", "\"this network\", RFC 1122"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local, used by uplinks"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/96", "unspecified and loopback"),
    ("::ffff:0:0/96", "IPv4-mapped"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
    ("fd6e:6574:6374:6c00::/64", "used by uplinks"),
];

/// A range of addresses that a network gives to its endpoints.
///
/// Invariants: no host bits; the gateway is a host address of the subnet; range and reserved
/// addresses lie within it. [`Subnet::new`] is the only way to make one, also from JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "Parts")]
pub struct Subnet {
    /// The range of addresses, without host bits.
    #[schema(value_type = String)]
    cidr: IpNetwork,
    /// The address at which every node's sandbox answers.
    #[schema(value_type = String)]
    gateway: IpAddr,
    /// The part from which addresses are given when none is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    range: Option<IpNetwork>,
    /// Addresses that no endpoint gets.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    #[schema(value_type = Vec<String>, required = false)]
    reserved: BTreeSet<IpAddr>,
    /// The prefix length of the blocks that nodes take; all blocks are of one size.
    block_prefix: u8,
}

#[derive(Deserialize)]
struct Parts {
    cidr: IpNetwork,
    gateway: Option<IpAddr>,
    range: Option<IpNetwork>,
    #[serde(default)]
    reserved: BTreeSet<IpAddr>,
    block_prefix: Option<u8>,
}

impl TryFrom<Parts> for Subnet {
    type Error = SubnetError;

    fn try_from(parts: Parts) -> Result<Self, Self::Error> {
        let subnet = Self::new(parts.cidr, parts.gateway, parts.range, parts.reserved)?;
        let Some(block_prefix) = parts.block_prefix else { return Ok(subnet) };
        let bounds =
            (subnet.cidr.prefix().max(width(subnet.gateway) - MOST_BLOCK_BITS), width(subnet.gateway));
        match (bounds.0..=bounds.1).contains(&block_prefix) {
            true => Ok(Self { block_prefix, ..subnet }),
            false => Err(SubnetError::Block { subnet: subnet.cidr, block_prefix }),
        }
    }
}

impl Subnet {
    /// Checks and makes a subnet. Without a gateway, its first host address becomes the gateway.
    ///
    /// # Errors
    /// Says which of the parts cannot be used.
    pub fn new(
        cidr: IpNetwork,
        gateway: Option<IpAddr>,
        range: Option<IpNetwork>,
        reserved: BTreeSet<IpAddr>,
    ) -> Result<Self, SubnetError> {
        check_cidr(cidr)?;
        let first = address_at(cidr.network(), 1);
        let subnet = Self {
            cidr,
            gateway: gateway.unwrap_or(first),
            range,
            reserved,
            block_prefix: block_prefix(cidr, 0),
        };
        if !subnet.is_host(subnet.gateway) {
            return Err(SubnetError::Gateway { subnet: cidr, gateway: subnet.gateway });
        }
        if let Some(range) = range
            && !(cidr.contains(range.network()) && range.prefix() >= cidr.prefix())
        {
            return Err(SubnetError::Range { subnet: cidr, range });
        }
        match subnet.reserved.iter().find(|address| !cidr.contains(**address)) {
            Some(&address) => Err(SubnetError::Reserved { subnet: cidr, address }),
            None => Ok(subnet),
        }
    }

    /// The range of addresses, without host bits.
    pub fn cidr(&self) -> IpNetwork {
        self.cidr
    }

    /// The address at which every node's sandbox answers.
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// The part from which addresses are given when none is asked for.
    pub fn range(&self) -> Option<IpNetwork> {
        self.range
    }

    /// Addresses that no endpoint gets.
    pub fn reserved(&self) -> &BTreeSet<IpAddr> {
        &self.reserved
    }

    /// The prefix length of the blocks that nodes take.
    pub fn block_prefix(&self) -> u8 {
        self.block_prefix
    }

    /// The subnet with blocks of a size that suits so many nodes: several for each node, of at most
    /// 256 addresses.
    #[must_use]
    pub fn with_blocks_for(self, nodes: usize) -> Self {
        Self { block_prefix: block_prefix(self.cidr, nodes as u128), ..self }
    }

    /// The range of the block that an address belongs to.
    pub fn block_of(&self, address: IpAddr) -> Option<IpNetwork> {
        let cut = IpNetwork::new(address, self.block_prefix).ok()?;
        self.cidr.contains(address).then(|| IpNetwork::new(cut.network(), self.block_prefix).ok())?
    }

    /// Whether somebody who asks for the other would get this one: blocks are not asked for.
    pub fn is_what_was_asked(&self, other: &Self) -> bool {
        let asked = Self { block_prefix: self.block_prefix, ..other.clone() };
        *self == asked
    }

    /// Whether an endpoint may have this address: within the subnet; not its first, nor for IPv4
    /// its last address; not the gateway; not reserved. The range does not matter here: an address
    /// outside it can be asked for.
    pub fn is_usable(&self, address: IpAddr) -> bool {
        self.is_host(address) && address != self.gateway && !self.reserved.contains(&address)
    }

    fn is_host(&self, address: IpAddr) -> bool {
        self.cidr.contains(address)
            && address != self.cidr.network()
            && (address.is_ipv6() || address != self.cidr.broadcast())
    }
}

fn block_prefix(cidr: IpNetwork, nodes: u128) -> u8 {
    let host_bits = width(cidr.network()) - cidr.prefix();
    let blocks = nodes.max(NODES).saturating_mul(BLOCKS_PER_NODE).next_power_of_two();
    let bits = host_bits.saturating_sub(blocks.trailing_zeros() as u8).min(MOST_BLOCK_BITS);
    width(cidr.network()) - bits
}

/// The range of special use that an address is of, and what that is for.
pub fn special(address: IpAddr) -> Option<(IpNetwork, &'static str)> {
    let parsed = |(range, purpose): &(&str, &'static str)| -> Option<(IpNetwork, &'static str)> {
        Some((range.parse().ok()?, *purpose))
    };
    SPECIAL.iter().filter_map(parsed).find(|(range, _)| range.contains(address))
}

/// Whether two ranges share an address.
pub fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    a.contains(b.network()) || b.contains(a.network())
}

/// The address `offset` behind `base`; wraps at the end of the address space.
pub fn address_at(base: IpAddr, offset: u128) -> IpAddr {
    match base {
        IpAddr::V4(base) => IpAddr::V4(u32::from(base).wrapping_add(offset as u32).into()),
        IpAddr::V6(base) => IpAddr::V6(u128::from(base).wrapping_add(offset).into()),
    }
}

/// How many bits an address of the same family has.
pub fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn check_cidr(cidr: IpNetwork) -> Result<(), SubnetError> {
    if cidr.ip() != cidr.network() {
        let meant = IpNetwork::new(cidr.network(), cidr.prefix()).unwrap_or(cidr);
        return Err(SubnetError::HostBits { given: cidr, meant });
    }
    let (shortest, longest) = if cidr.is_ipv4() { (8, 30) } else { (16, 126) };
    if !(shortest..=longest).contains(&cidr.prefix()) {
        return Err(SubnetError::Prefix { subnet: cidr, shortest, longest });
    }
    for (text, purpose) in SPECIAL {
        if let Ok(special) = text.parse::<IpNetwork>()
            && special.is_ipv4() == cidr.is_ipv4()
            && overlap(special, cidr)
        {
            return Err(SubnetError::Special { subnet: cidr, special, purpose });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(cidr: &str) -> Result<Subnet, SubnetError> {
        Subnet::new(cidr.parse().unwrap(), None, None, BTreeSet::new())
    }

    #[test]
    fn the_first_host_address_is_the_gateway() {
        assert_eq!(subnet("10.9.0.0/24").unwrap().gateway().to_string(), "10.9.0.1");
        assert_eq!(subnet("fd00:9::/64").unwrap().gateway().to_string(), "fd00:9::1");
    }

    #[test]
    fn host_bits_are_refused_with_what_was_meant() {
        let error = subnet("10.9.0.7/24").unwrap_err().to_string();
        assert!(error.contains("10.9.0.0/24"), "{error}");
    }

    #[test]
    fn prefixes_that_cannot_work_are_refused() {
        for cidr in ["0.0.0.0/0", "10.0.0.0/7", "10.9.0.0/31", "10.9.0.1/32", "::/0", "fd00::/127"] {
            assert!(subnet(cidr).is_err(), "{cidr}");
        }
    }

    #[test]
    fn special_ranges_are_refused() {
        for cidr in ["127.1.0.0/16", "169.254.7.0/24", "224.0.0.0/8", "fe80::/64", "ff02::/16"] {
            let error = subnet(cidr).unwrap_err();
            assert!(matches!(error, SubnetError::Special { .. }), "{cidr}: {error}");
        }
    }

    #[test]
    fn network_broadcast_gateway_and_reserved_addresses_are_not_usable() {
        let reserved = BTreeSet::from(["10.9.0.9".parse().unwrap()]);
        let subnet = Subnet::new("10.9.0.0/24".parse().unwrap(), None, None, reserved).unwrap();
        for (address, usable) in [
            ("10.9.0.0", false),
            ("10.9.0.1", false),
            ("10.9.0.2", true),
            ("10.9.0.9", false),
            ("10.9.0.254", true),
            ("10.9.0.255", false),
            ("10.9.1.2", false),
        ] {
            assert_eq!(subnet.is_usable(address.parse().unwrap()), usable, "{address}");
        }
    }

    #[test]
    fn parts_outside_the_subnet_are_refused_also_from_json() {
        for json in [
            r#"{"cidr":"10.9.0.0/24","gateway":"10.9.1.1"}"#,
            r#"{"cidr":"10.9.0.0/24","gateway":"10.9.0.255"}"#,
            r#"{"cidr":"10.9.0.0/24","gateway":"fd00::1"}"#,
            r#"{"cidr":"10.9.0.0/24","range":"10.9.0.0/16"}"#,
            r#"{"cidr":"10.9.0.0/24","range":"10.8.0.0/25"}"#,
            r#"{"cidr":"10.9.0.0/24","reserved":["10.9.1.9"]}"#,
        ] {
            assert!(serde_json::from_str::<Subnet>(json).is_err(), "{json}");
        }
    }
}
