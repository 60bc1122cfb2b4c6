//! Keys and values of the maps by which names are answered, as `ebpf/types.h` has them.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use super::layout::Address;

/// The longest part of a name: one label with its length.
const PART: usize = 64;

/// It is the first label of a name: what somebody is called.
pub const PART_FIRST: u32 = 0;
/// It is all that follows the first label.
pub const PART_REST: u32 = 1;

/// A part of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct NameKey {
    /// The network's number.
    pub network: u32,
    /// `PART_…`.
    pub part: u32,
    /// In lower case as the wire has it, without the root's label, and 0 after it.
    pub bytes: [u8; PART],
}

impl NameKey {
    /// A part of a name, as the wire has it in lower case; `None`: it is too long.
    pub fn new(network: u32, part: u32, wire: &[u8]) -> Option<Self> {
        let mut bytes = [0; PART];
        bytes.get_mut(..wire.len())?.copy_from_slice(wire);
        Some(Self { network, part, bytes })
    }
}

/// It has an IPv4 address.
pub const NAME_IPV4: u32 = 1;
/// It has an IPv6 address.
pub const NAME_IPV6: u32 = 2;
/// It is a short form, without the domain.
pub const NO_DOMAIN: u32 = u32::MAX;

/// What a name has; of what follows a first label, where that ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// Of a first label: `NAME_IPV4`, `NAME_IPV6`, both, or none.
    pub has: u32,
    /// Of what follows one: where in it the domain begins, or [`NO_DOMAIN`].
    pub domain: u32,
    /// Its address.
    pub ipv6: Address,
    /// Its address.
    pub ipv4: [u8; 4],
    /// Always 0.
    pub zero: u32,
}

impl Name {
    /// What a first label has.
    pub fn with(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Self {
        let has = |has: bool, bit| if has { bit } else { 0 };
        Self {
            has: has(ipv4.is_some(), NAME_IPV4) | has(ipv6.is_some(), NAME_IPV6),
            ipv4: ipv4.map_or([0; 4], |address| address.octets()),
            ipv6: ipv6.map_or(Address::zeroed(), |address| Address(bytemuck::cast(address.octets()))),
            ..Self::zeroed()
        }
    }

    /// What follows a first label, in which the domain begins there.
    pub fn rest(domain: Option<u32>) -> Self {
        Self { domain: domain.unwrap_or(NO_DOMAIN), ..Self::zeroed() }
    }
}

/// The longest record that says that a name has nothing of a type.
pub const NOTHING: usize = 176;

/// With what names are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Telling {
    /// For how many seconds an answer may be kept, in network byte order.
    pub ttl: [u8; 4],
    /// How long the record is; 0: nothing is answered yet.
    pub length: u32,
    /// The record that says that a name has nothing, and 0 after it. Its first two bytes are for its name.
    pub nothing: [u8; NOTHING],
}

impl Telling {
    /// Tells for how long an answer may be kept, and by which record that there is nothing; `None`: that is too
    /// long.
    pub fn new(ttl: u32, nothing: &[u8]) -> Option<Self> {
        let mut bytes = [0; NOTHING];
        bytes.get_mut(..nothing.len())?.copy_from_slice(nothing);
        Some(Self { ttl: ttl.to_be_bytes(), length: nothing.len() as u32, nothing: bytes })
    }
}
