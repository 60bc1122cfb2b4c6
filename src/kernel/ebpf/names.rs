//! The maps by which names are answered, with their keys and values as `ebpf/types.h` has them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::path::Path;

use bytemuck::{Pod, Zeroable};

use super::layout::{Address, Place};
use super::map::Map;
use super::{DIRECTORY, Error, LAYOUT, open_map};

/// The longest part of a name: one label with its length.
const PART: usize = 64;

/// The maps by which names are answered.
#[derive(Debug)]
pub struct NameMaps {
    /// Where names are answered.
    pub servers: Map<Place, u32>,
    /// What names have, by their first labels.
    pub names: Map<NameKey, Name>,
    /// What may follow a first label, and where in that the domain begins; 0: it is a short form.
    pub suffixes: Map<NameKey, u32>,
    /// How answers are told.
    pub telling: Map<u32, Telling>,
}

impl NameMaps {
    /// Opens the maps that are pinned on this node.
    ///
    /// # Errors
    /// When one is not there.
    pub fn of_agent() -> Result<Self, Error> {
        Self::open(&Path::new(DIRECTORY).join(LAYOUT.to_string()))
    }

    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        Ok(Self {
            servers: open_map(directory, "servers")?,
            names: open_map(directory, "names")?,
            suffixes: open_map(directory, "suffixes")?,
            telling: open_map(directory, "telling")?,
        })
    }

    pub(super) fn all(&self) -> [(&'static str, BorrowedFd<'_>); 4] {
        [
            ("servers", self.servers.fd()),
            ("names", self.names.fd()),
            ("suffixes", self.suffixes.fd()),
            ("telling", self.telling.fd()),
        ]
    }
}

/// A part of a name in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct NameKey {
    /// The network's number.
    pub network: u32,
    /// Always 0.
    pub zero: u32,
    /// In lower case as the wire has it, without the root's label, and 0 after it.
    pub bytes: [u8; PART],
}

impl NameKey {
    /// A part of a name, as the wire has it in lower case; `None`: it is too long.
    pub fn new(network: u32, wire: &[u8]) -> Option<Self> {
        let mut bytes = [0; PART];
        bytes.get_mut(..wire.len())?.copy_from_slice(wire);
        Some(Self { network, zero: 0, bytes })
    }
}

/// It has an IPv4 address.
const IPV4: u32 = 1;
/// It has an IPv6 address.
const IPV6: u32 = 2;

/// What a name has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// [`IPV4`], [`IPV6`], both, or none.
    has: u32,
    ipv4: [u8; 4],
    ipv6: Address,
}

impl Name {
    /// One that has these addresses.
    pub fn with(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Self {
        let has = |has: bool, bit| if has { bit } else { 0 };
        Self {
            has: has(ipv4.is_some(), IPV4) | has(ipv6.is_some(), IPV6),
            ipv4: ipv4.map_or([0; 4], |address| address.octets()),
            ipv6: ipv6.map_or(Address::zeroed(), |address| Address(bytemuck::cast(address.octets()))),
        }
    }
}

/// The longest record that says that a name has nothing of a type.
const NOTHING: usize = 176;

/// With what names are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Telling {
    /// Until when anything is told, in nanoseconds of `CLOCK_MONOTONIC`.
    until: u64,
    /// For how many seconds an answer may be kept, in network byte order.
    ttl: [u8; 4],
    /// How long the record is; 0: that a name has nothing, the agent tells.
    length: u32,
    /// The record that says that a name has nothing, and 0 after it. Its first two bytes are for its name.
    nothing: [u8; NOTHING],
}

impl Telling {
    /// Tells until then, for how long an answer may be kept, and by which record that there is nothing. One that
    /// is too long is not told.
    pub fn new(until: u64, ttl: u32, nothing: &[u8]) -> Self {
        let mut telling = Self { until, ttl: ttl.to_be_bytes(), ..Self::zeroed() };
        if let Some(bytes) = telling.nothing.get_mut(..nothing.len()) {
            bytes.copy_from_slice(nothing);
            telling.length = nothing.len() as u32;
        }
        telling
    }
}
