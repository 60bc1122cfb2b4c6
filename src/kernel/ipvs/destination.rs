//! Destinations: the real servers of a service, and how packets get there.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DecodeError, DefaultNla, ErrorContext};

use super::error::Problem;
use super::service::Family;
use super::stats::Stats;
use super::wire::{self, attributes, missing};

/// The attributes of a destination (`IPVS_DEST_ATTR_*`).
mod attribute {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const PORT: u16 = 2;
    pub(super) const METHOD: u16 = 3;
    pub(super) const WEIGHT: u16 = 4;
    pub(super) const UPPER: u16 = 5;
    pub(super) const LOWER: u16 = 6;
    pub(super) const ACTIVE: u16 = 7;
    pub(super) const INACTIVE: u16 = 8;
    pub(super) const PERSISTENT: u16 = 9;
    pub(super) const STATS: u16 = 10;
    pub(super) const FAMILY: u16 = 11;
    pub(super) const STATS64: u16 = 12;
    pub(super) const TUNNEL_TYPE: u16 = 13;
    pub(super) const TUNNEL_PORT: u16 = 14;
    pub(super) const TUNNEL_FLAGS: u16 = 15;
}

/// The highest threshold that every kernel takes: newer ones count in 31 bits.
const MOST_CONNECTIONS: u32 = i32::MAX as u32;

/// Which destination of a service. No two of a service have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DestinationKey {
    /// Its address.
    pub address: IpAddr,
    /// Its port. 0, in a service by mark or for every port: the port that the client asked for.
    pub port: u16,
}

impl DestinationKey {
    pub(super) fn encode(&self) -> Vec<DefaultNla> {
        vec![
            wire::put_u16(attribute::FAMILY, Family::of(self.address).number()),
            wire::put_address(attribute::ADDRESS, self.address),
            wire::put_port(attribute::PORT, self.port),
        ]
    }
}

impl From<SocketAddr> for DestinationKey {
    fn from(address: SocketAddr) -> Self {
        Self { address: address.ip(), port: address.port() }
    }
}

impl fmt::Display for DestinationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// How a packet gets to its destination (`IP_VS_CONN_F_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Forwarding {
    /// With the destination's address and port in place of the service's; answers come back through
    /// this machine (`ipvsadm -m`).
    Masquerade,
    /// Unchanged, up this machine's own stack.
    Local,
    /// Unchanged, in a packet to the destination (`ipvsadm -i`). The only way to a destination of
    /// another family than the service's.
    Tunnel(Tunnel),
    /// Unchanged, by the destination's link-layer address: it has the service's address as well
    /// (`ipvsadm -g`).
    Route,
    /// Unchanged, by the ordinary route: what the kernel does by itself where nobody else takes it.
    Bypass,
    /// Another number: 5 to 7.
    Other(u8),
}

/// How packets are wrapped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tunnel {
    /// In what.
    pub kind: TunnelKind,
    /// To which UDP port, of GUE; 0 for the others.
    pub port: u16,
    /// With which checksums, of GUE and GRE.
    pub flags: TunnelFlags,
}

/// What packets are wrapped in (`IP_VS_CONN_F_TUNNEL_TYPE_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelKind {
    /// IP in IP.
    #[default]
    Ipip,
    /// Generic UDP encapsulation.
    Gue,
    /// Generic routing encapsulation (RFC 2784).
    Gre,
    /// Another number: 3 or more.
    Other(u8),
}

impl TunnelKind {
    fn number(self) -> u8 {
        match self {
            Self::Ipip => 0,
            Self::Gue => 1,
            Self::Gre => 2,
            Self::Other(number) => number,
        }
    }
}

impl From<u8> for TunnelKind {
    fn from(number: u8) -> Self {
        [Self::Ipip, Self::Gue, Self::Gre]
            .into_iter()
            .find(|kind| kind.number() == number)
            .unwrap_or(Self::Other(number))
    }
}

bitflags::bitflags! {
    /// The checksums of a tunnel (`IP_VS_TUNNEL_ENCAP_FLAG_*`); none of them: no checksum. Bits
    /// without a name here are carried through.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct TunnelFlags: u16 {
        /// A checksum of the whole.
        const CHECKSUM = 0x1;
        /// Remote checksum offload (draft-herbert-remotecsumoffload).
        const REMOTE_CHECKSUM = 0x2;
        const _ = !0;
    }
}

impl Forwarding {
    /// The bits for the method (`IP_VS_CONN_F_FWD_MASK`), of which there are three.
    fn number(self) -> u8 {
        match self {
            Self::Masquerade => 0,
            Self::Local => 1,
            Self::Tunnel(_) => 2,
            Self::Route => 3,
            Self::Bypass => 4,
            Self::Other(number) => number & 7,
        }
    }

    fn decode(number: u32, tunnel: Tunnel) -> Self {
        let number = (number & 7) as u8;
        [Self::Masquerade, Self::Local, Self::Tunnel(tunnel), Self::Route, Self::Bypass]
            .into_iter()
            .find(|method| method.number() == number)
            .unwrap_or(Self::Other(number))
    }
}

/// A real server of a service, as it is asked for and as it is read back: both compare equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// Where it is.
    pub key: DestinationKey,
    /// How packets get there.
    pub forwarding: Forwarding,
    /// Its share, 0 to 2^31 − 1. 0: no new connections, those that it has go on.
    pub weight: u32,
    /// From how many connections on it gets no new ones, at most 2^31 − 1; 0 for no limit.
    pub upper_threshold: u32,
    /// Below how many it gets new ones again; 0 for three quarters of the upper one, and never above
    /// that.
    pub lower_threshold: u32,
}

impl Destination {
    /// A destination without limits.
    pub fn new(key: DestinationKey, forwarding: Forwarding, weight: u32) -> Self {
        Self { key, forwarding, weight, upper_threshold: 0, lower_threshold: 0 }
    }

    /// All attributes. Those of the tunnel are left out where there is none: Linux before 5.3 does
    /// not know them.
    pub(super) fn encode(&self) -> Result<Vec<DefaultNla>, Problem> {
        if self.upper_threshold > MOST_CONNECTIONS {
            return Err(Problem::Threshold(self.upper_threshold));
        }
        let mut encoded = self.key.encode();
        encoded.extend([
            wire::put_u32(attribute::METHOD, u32::from(self.forwarding.number())),
            wire::put_u32(attribute::WEIGHT, self.weight),
        ]);
        if let Forwarding::Tunnel(tunnel) = self.forwarding {
            encoded.extend([
                wire::put(attribute::TUNNEL_TYPE, &[tunnel.kind.number()]),
                wire::put_port(attribute::TUNNEL_PORT, tunnel.port),
                wire::put_u16(attribute::TUNNEL_FLAGS, tunnel.flags.bits()),
            ]);
        }
        encoded.extend([
            wire::put_u32(attribute::UPPER, self.upper_threshold),
            wire::put_u32(attribute::LOWER, self.lower_threshold),
        ]);
        Ok(encoded)
    }
}

/// A destination that the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DestinationState {
    /// The destination.
    pub destination: Destination,
    /// Its connections that are established.
    pub active: u32,
    /// Its connections that are not: beginning, ending, and all of UDP.
    pub inactive: u32,
    /// The clients that stay with it for their persistence.
    pub persistent: u32,
    /// What passed it.
    pub stats: Stats,
}

impl DestinationState {
    /// `family`: the service's. Linux before 3.18 does not tell the destination's, which is the same.
    pub(super) fn decode(family: Family, bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut raw = Raw::default();
        for attribute in attributes(bytes) {
            let (kind, value) = attribute.context("a destination")?;
            raw.take(kind, value).context(format!("attribute {kind} of a destination"))?;
        }
        let address = raw.address.ok_or_else(|| missing("address"))?;
        let address = wire::get_address(raw.family.unwrap_or(family), address)?;
        let key = DestinationKey { address, port: raw.port.ok_or_else(|| missing("port"))? };
        let method = raw.method.ok_or_else(|| missing("forwarding method"))?;
        let destination = Destination {
            key,
            forwarding: Forwarding::decode(method, raw.tunnel),
            weight: raw.weight.ok_or_else(|| missing("weight"))?,
            upper_threshold: raw.upper,
            lower_threshold: raw.lower,
        };
        let stats = raw.stats64.or(raw.stats).unwrap_or_default();
        let Raw { active, inactive, persistent, .. } = raw;
        Ok(Self { destination, active, inactive, persistent, stats })
    }
}

/// The attributes of a destination as they come, in any order.
#[derive(Default)]
struct Raw<'a> {
    family: Option<Family>,
    address: Option<&'a [u8]>,
    port: Option<u16>,
    method: Option<u32>,
    tunnel: Tunnel,
    weight: Option<u32>,
    upper: u32,
    lower: u32,
    active: u32,
    inactive: u32,
    persistent: u32,
    stats: Option<Stats>,
    stats64: Option<Stats>,
}

impl<'a> Raw<'a> {
    fn take(&mut self, kind: u16, value: &'a [u8]) -> Result<(), DecodeError> {
        match kind {
            // 0 in what very old kernels and other programs make: the service's.
            attribute::FAMILY => {
                let number = wire::get_u16(value)?;
                self.family = (number != 0).then(|| Family::from_number(number)).transpose()?;
            }
            attribute::ADDRESS => self.address = Some(value),
            attribute::PORT => self.port = Some(wire::get_port(value)?),
            attribute::METHOD => self.method = Some(wire::get_u32(value)?),
            attribute::WEIGHT => self.weight = Some(wire::get_u32(value)?),
            attribute::UPPER => self.upper = wire::get_u32(value)?,
            attribute::LOWER => self.lower = wire::get_u32(value)?,
            attribute::ACTIVE => self.active = wire::get_u32(value)?,
            attribute::INACTIVE => self.inactive = wire::get_u32(value)?,
            attribute::PERSISTENT => self.persistent = wire::get_u32(value)?,
            attribute::STATS => self.stats = Some(Stats::decode(value)?),
            attribute::STATS64 => self.stats64 = Some(Stats::decode(value)?),
            attribute::TUNNEL_TYPE => self.tunnel.kind = wire::get_u8(value)?.into(),
            attribute::TUNNEL_PORT => self.tunnel.port = wire::get_port(value)?,
            attribute::TUNNEL_FLAGS => {
                self.tunnel.flags = TunnelFlags::from_bits_retain(wire::get_u16(value)?);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
