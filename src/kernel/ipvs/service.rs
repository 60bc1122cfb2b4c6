//! Services: what packets are balanced, how, and for how long a client stays where it is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;

use netlink_packet_core::{DecodeError, DefaultNla, ErrorContext};

use super::error::Problem;
use super::scheduler::Scheduler;
use super::stats::Stats;
use super::wire::{self, attributes, missing};

/// The attributes of a service (`IPVS_SVC_ATTR_*`).
mod attribute {
    pub(super) const FAMILY: u16 = 1;
    pub(super) const PROTOCOL: u16 = 2;
    pub(super) const ADDRESS: u16 = 3;
    pub(super) const PORT: u16 = 4;
    pub(super) const MARK: u16 = 5;
    pub(super) const SCHEDULER: u16 = 6;
    pub(super) const FLAGS: u16 = 7;
    pub(super) const TIMEOUT: u16 = 8;
    pub(super) const NETMASK: u16 = 9;
    pub(super) const STATS: u16 = 10;
    pub(super) const ENGINE: u16 = 11;
    pub(super) const STATS64: u16 = 12;
}

/// The longest name of a scheduler or of a persistence engine, in bytes (`IP_VS_SCHEDNAME_MAXLEN`
/// and `IP_VS_PENAME_MAXLEN`, without the NUL).
const NAME_BYTES: usize = 15;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Its number (`AF_INET`, `AF_INET6`).
    pub(super) fn number(self) -> u16 {
        match self {
            Self::V4 => libc::AF_INET as u16,
            Self::V6 => libc::AF_INET6 as u16,
        }
    }

    pub(super) fn from_number(number: u16) -> Result<Self, DecodeError> {
        match i32::from(number) {
            libc::AF_INET => Ok(Self::V4),
            libc::AF_INET6 => Ok(Self::V6),
            _ => Err(DecodeError::from(format!("{number} is neither AF_INET nor AF_INET6"))),
        }
    }
}

/// The protocol of a service's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// Another one by its number (`IPPROTO_*`).
    Other(u16),
}

impl Protocol {
    /// Its number (`IPPROTO_*`).
    pub fn number(self) -> u16 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP as u16,
            Self::Udp => libc::IPPROTO_UDP as u16,
            Self::Sctp => libc::IPPROTO_SCTP as u16,
            Self::Other(number) => number,
        }
    }
}

impl From<u16> for Protocol {
    fn from(number: u16) -> Self {
        [Self::Tcp, Self::Udp, Self::Sctp]
            .into_iter()
            .find(|protocol| protocol.number() == number)
            .unwrap_or(Self::Other(number))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Udp => f.write_str("udp"),
            Self::Sctp => f.write_str("sctp"),
            Self::Other(number) => write!(f, "protocol {number}"),
        }
    }
}

/// Which packets are a service's. No two services of a namespace have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKey {
    /// Those to an address and a port.
    Address {
        /// The protocol.
        protocol: Protocol,
        /// The virtual address.
        address: IpAddr,
        /// The virtual port; 0 for every port, with [`Flags::PERSISTENT`] only.
        port: u16,
    },
    /// Those that bear a firewall mark.
    Mark {
        /// The family of the packets.
        family: Family,
        /// The mark.
        mark: NonZeroU32,
    },
}

impl ServiceKey {
    /// The family of the service's packets.
    pub fn family(&self) -> Family {
        match self {
            Self::Address { address, .. } => Family::of(*address),
            Self::Mark { family, .. } => *family,
        }
    }

    pub(super) fn encode(&self) -> Vec<DefaultNla> {
        let family = wire::put_u16(attribute::FAMILY, self.family().number());
        match self {
            Self::Address { protocol, address, port } => vec![
                family,
                wire::put_u16(attribute::PROTOCOL, protocol.number()),
                wire::put_address(attribute::ADDRESS, *address),
                wire::put_port(attribute::PORT, *port),
            ],
            Self::Mark { mark, .. } => vec![family, wire::put_u32(attribute::MARK, mark.get())],
        }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { protocol, address, port } => {
                write!(f, "{protocol} {}", SocketAddr::new(*address, *port))
            }
            Self::Mark { family: Family::V4, mark } => write!(f, "fwmark {mark}"),
            Self::Mark { family: Family::V6, mark } => write!(f, "fwmark {mark} (IPv6)"),
        }
    }
}

bitflags::bitflags! {
    /// What a service does beyond its scheduler (`IP_VS_SVC_F_*`). Bits without a name here are
    /// carried through.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Flags: u32 {
        /// A client goes where it went before, for [`Service::timeout`].
        const PERSISTENT = 0x01;
        /// The kernel's own mark of a service that it has. It is not shown in [`Service::flags`],
        /// and asking for it changes nothing.
        const HASHED = 0x02;
        /// Every UDP packet is scheduled for itself, without a connection.
        const ONE_PACKET = 0x04;
        /// The scheduler's first flag.
        const SCHEDULER_1 = 0x08;
        /// The scheduler's second flag.
        const SCHEDULER_2 = 0x10;
        /// The scheduler's third flag.
        const SCHEDULER_3 = 0x20;
        /// [`Scheduler::SourceHashing`]: another destination when the chosen one takes nothing.
        const SH_FALLBACK = 0x08;
        /// [`Scheduler::SourceHashing`]: the source port counts as well.
        const SH_PORT = 0x10;
        /// [`Scheduler::MaglevHashing`]: another destination when the chosen one takes nothing.
        const MH_FALLBACK = 0x08;
        /// [`Scheduler::MaglevHashing`]: the source port counts as well.
        const MH_PORT = 0x10;
        const _ = !0;
    }
}

/// Which clients count as one for persistence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Netmask {
    /// Those whose IPv4 addresses are equal under this mask.
    V4(Ipv4Addr),
    /// Those whose IPv6 addresses begin with as many equal bits: 1 to 128.
    V6(u8),
}

impl Netmask {
    /// Every client for itself: what a service has that is not persistent.
    pub fn host(family: Family) -> Self {
        match family {
            Family::V4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::V6 => Self::V6(128),
        }
    }

    /// Clients whose addresses begin with the same `length` bits; more than the family has count as
    /// all.
    pub fn prefix(family: Family, length: u8) -> Self {
        match family {
            Family::V4 => {
                let ones = u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0);
                Self::V4(Ipv4Addr::from_bits(ones))
            }
            Family::V6 => Self::V6(length.min(128)),
        }
    }

    fn family(self) -> Family {
        match self {
            Self::V4(_) => Family::V4,
            Self::V6(_) => Family::V6,
        }
    }

    /// Four bytes: an IPv4 mask as it is, of IPv6 the length as a number.
    fn encode(self) -> [u8; 4] {
        match self {
            Self::V4(mask) => mask.octets(),
            Self::V6(length) => u32::from(length).to_ne_bytes(),
        }
    }

    fn decode(family: Family, value: &[u8]) -> Result<Self, DecodeError> {
        let number = wire::get_u32(value).context("netmask")?;
        match family {
            Family::V4 => Ok(Self::V4(Ipv4Addr::from(number.to_ne_bytes()))),
            Family::V6 => match u8::try_from(number) {
                Ok(length @ ..=128) => Ok(Self::V6(length)),
                _ => Err(DecodeError::from(format!("{number} is no prefix length of IPv6"))),
            },
        }
    }
}

/// A virtual service, as it is asked for and as it is read back: both compare equal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service {
    /// Its packets.
    pub key: ServiceKey,
    /// How it chooses.
    pub scheduler: Scheduler,
    /// What it does beyond that, without [`Flags::HASHED`].
    pub flags: Flags,
    /// How long a client stays with its destination after its last connection, in seconds; 0 where
    /// the service is not persistent.
    pub timeout: u32,
    /// Which clients count as one; of the family of [`Service::key`].
    pub netmask: Netmask,
    /// What else than the address makes a client, by the name of the persistence engine: `sip`.
    pub engine: Option<String>,
}

impl Service {
    /// A service without persistence and flags.
    pub fn new(key: ServiceKey, scheduler: Scheduler) -> Self {
        let netmask = Netmask::host(key.family());
        Self { key, scheduler, flags: Flags::empty(), timeout: 0, netmask, engine: None }
    }

    /// Makes a client stay with its destination for `timeout` seconds after its last connection.
    pub fn persistent(mut self, timeout: u32) -> Self {
        self.flags |= Flags::PERSISTENT;
        self.timeout = timeout;
        self
    }

    /// All attributes, with the kernel's pair of flags and of those that are meant.
    pub(super) fn encode(&self, mask: Flags) -> Result<Vec<DefaultNla>, Problem> {
        self.check(mask)?;
        let flags = [self.flags.bits().to_ne_bytes(), mask.bits().to_ne_bytes()].concat();
        let mut encoded = self.key.encode();
        encoded.push(wire::put_name(attribute::SCHEDULER, self.scheduler.name()));
        encoded.extend(self.engine.as_deref().map(|name| wire::put_name(attribute::ENGINE, name)));
        encoded.extend([
            wire::put(attribute::FLAGS, &flags),
            wire::put_u32(attribute::TIMEOUT, self.timeout),
            wire::put(attribute::NETMASK, &self.netmask.encode()),
        ]);
        Ok(encoded)
    }

    /// What the kernel would take, or refuse without saying why.
    fn check(&self, mask: Flags) -> Result<(), Problem> {
        let persistent = (self.flags | !mask).contains(Flags::PERSISTENT);
        if !persistent && matches!(self.key, ServiceKey::Address { port: 0, .. }) {
            return Err(Problem::PortZero);
        }
        if self.netmask.family() != self.key.family() || matches!(self.netmask, Netmask::V6(0 | 129..)) {
            return Err(Problem::Netmask(self.netmask));
        }
        for name in [Some(self.scheduler.name()), self.engine.as_deref()].into_iter().flatten() {
            if name.is_empty() || name.len() > NAME_BYTES || name.contains('\0') {
                return Err(Problem::Name(name.to_owned()));
            }
        }
        Ok(())
    }
}

/// A service that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceState {
    /// The service.
    pub service: Service,
    /// What passed it.
    pub stats: Stats,
}

impl ServiceState {
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut raw = Raw::default();
        for attribute in attributes(bytes) {
            let (kind, value) = attribute.context("a service")?;
            raw.take(kind, value).context(format!("attribute {kind} of a service"))?;
        }
        let family = raw.family.ok_or_else(|| missing("family"))?;
        let key = match (raw.mark.and_then(NonZeroU32::new), raw.address) {
            (Some(mark), _) => ServiceKey::Mark { family, mark },
            (None, Some(address)) => ServiceKey::Address {
                protocol: raw.protocol.ok_or_else(|| missing("protocol"))?,
                address: wire::get_address(family, address)?,
                port: raw.port.ok_or_else(|| missing("port"))?,
            },
            (None, None) => return Err(missing("address or mark")),
        };
        let service = Service {
            key,
            scheduler: raw.scheduler.ok_or_else(|| missing("scheduler"))?,
            flags: raw.flags.ok_or_else(|| missing("flags"))?.difference(Flags::HASHED),
            timeout: raw.timeout.ok_or_else(|| missing("timeout"))?,
            netmask: Netmask::decode(family, raw.netmask.ok_or_else(|| missing("netmask"))?)?,
            engine: raw.engine,
        };
        let stats = raw.stats64.or(raw.stats).unwrap_or_default();
        Ok(Self { service, stats })
    }
}

/// The attributes of a service as they come, in any order; the meaning of some depends on others.
#[derive(Default)]
struct Raw<'a> {
    family: Option<Family>,
    protocol: Option<Protocol>,
    address: Option<&'a [u8]>,
    port: Option<u16>,
    mark: Option<u32>,
    scheduler: Option<Scheduler>,
    flags: Option<Flags>,
    timeout: Option<u32>,
    netmask: Option<&'a [u8]>,
    engine: Option<String>,
    stats: Option<Stats>,
    stats64: Option<Stats>,
}

impl<'a> Raw<'a> {
    fn take(&mut self, kind: u16, value: &'a [u8]) -> Result<(), DecodeError> {
        match kind {
            attribute::FAMILY => self.family = Some(Family::from_number(wire::get_u16(value)?)?),
            attribute::PROTOCOL => self.protocol = Some(wire::get_u16(value)?.into()),
            attribute::ADDRESS => self.address = Some(value),
            attribute::PORT => self.port = Some(wire::get_port(value)?),
            attribute::MARK => self.mark = Some(wire::get_u32(value)?),
            attribute::SCHEDULER => self.scheduler = Some(wire::get_name(value)?.as_str().into()),
            // A pair: the flags, and which of them are meant, which is all in what is read.
            attribute::FLAGS => {
                let bytes = value.first_chunk().ok_or("the flags are cut off")?;
                self.flags = Some(Flags::from_bits_retain(u32::from_ne_bytes(*bytes)));
            }
            attribute::TIMEOUT => self.timeout = Some(wire::get_u32(value)?),
            attribute::NETMASK => self.netmask = Some(value),
            attribute::ENGINE => self.engine = Some(wire::get_name(value)?),
            attribute::STATS => self.stats = Some(Stats::decode(value)?),
            attribute::STATS64 => self.stats64 = Some(Stats::decode(value)?),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
