//! Keys and values of the maps, as the programs have them in `ebpf/types.h`. Addresses and ports are in
//! network byte order, all else in the host's.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytemuck::{Pod, Zeroable};
use ipnetwork::IpNetwork;

/// The layout of all that is pinned. Whoever changes a structure here, or a map, counts on: an agent
/// uses no maps of another layout.
pub const LAYOUT: u32 = 7;

/// An address; one of IPv4 is mapped into IPv6. The programs copy it by halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Address(pub [[u8; 4]; 4]);

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let bytes = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        Self(bytemuck::cast(bytes))
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let bytes: [u8; 16] = bytemuck::cast(address.0);
        Self::V6(Ipv6Addr::from(bytes)).to_canonical()
    }
}

/// A port in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Port([u8; 2]);

impl From<u16> for Port {
    fn from(port: u16) -> Self {
        Self(port.to_be_bytes())
    }
}

impl From<Port> for u16 {
    fn from(port: Port) -> Self {
        Self::from_be_bytes(port.0)
    }
}

/// An address in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct Place {
    /// The network's number.
    pub network: u32,
    /// Always 0.
    pub zero: u32,
    /// The address.
    pub address: Address,
}

/// It is a service's: connections to it are balanced.
pub const ADDRESS_SERVICE: u32 = 1;
/// It is a gateway, from which backends that meet themselves are spoken to.
pub const ADDRESS_GATEWAY: u32 = 2;
/// It is a container's of this node.
pub const ADDRESS_CONTAINER: u32 = 3;
/// It is a service's of which something is outside of the overlay: only its packets can be balanced.
pub const ADDRESS_OUTSIDE: u32 = 4;

/// What an address means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Meaning {
    /// `ADDRESS_…`.
    pub kind: u32,
    /// Of a container's: the device that leads to it, in its sandbox.
    pub interface: u32,
    /// The largest packet that it takes.
    pub mtu: u32,
    /// The device in the host's namespace by which packets cross into its sandbox; 0: the kernel has them.
    pub crossing: u32,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// 1: something is balanced in its network.
    pub balances: u16,
}

impl Place {
    /// This address in the network with this number.
    pub fn new(network: u32, address: impl Into<Address>) -> Self {
        Self { network, zero: 0, address: address.into() }
    }
}

impl Meaning {
    /// What is of this kind, and nothing else is known of it.
    pub fn of(kind: u32) -> Self {
        Self { kind, ..Self::zeroed() }
    }
}

/// A range of addresses in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct Range {
    /// How many bits of what follows count.
    pub bits: u32,
    /// The network's number.
    pub network: u32,
    /// The address.
    pub address: Address,
}

impl Range {
    /// The addresses of a network with this prefix.
    pub fn new(network: u32, range: IpNetwork) -> Self {
        let width = if range.is_ipv4() { 32 } else { 128 };
        let bits = 32 + 128 - width + u32::from(range.prefix());
        Self { bits, network, address: range.network().into() }
    }
}

/// How another node's addresses are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Way {
    /// From where the tunnel leads.
    pub local: Address,
    /// To where.
    pub remote: Address,
    /// The Ethernet address of its beginning.
    pub local_mac: [u8; 6],
    /// That of its end.
    pub remote_mac: [u8; 6],
    /// The largest packet that it takes.
    pub mtu: u32,
    /// The device in the sandbox by which packets cross into the host's namespace; 0: the kernel has them.
    pub crossing: u32,
    /// The UDP port of its end.
    pub port: Port,
    /// Always 0.
    pub zero: u16,
}

impl Way {
    /// None: the kernel has the packets.
    pub fn none() -> Self {
        Self::zeroed()
    }
}

/// What a packet must be for, to be balanced. Protocol and port 0 mean all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct FrontKey {
    /// The network's number.
    pub network: u32,
    /// The service's port.
    pub port: Port,
    /// The protocol's number (IANA).
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
    /// The service's address.
    pub address: Address,
}

/// The slots in turn.
pub const SCHEDULER_TURN: u32 = 0;
/// The slot that the client's address leads to.
pub const SCHEDULER_HASH: u32 = 1;
/// The backend with the fewest connections for its weight.
pub const SCHEDULER_LEAST: u32 = 2;

/// How connections are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Front {
    /// Its number.
    pub id: u32,
    /// One of the three above.
    pub scheduler: u32,
    /// For how many seconds a client keeps its backend; 0: it does not.
    pub affinity: u32,
    /// How many slots there are.
    pub slots: u32,
    /// Whose turn it is; the programs count on.
    pub turn: u32,
    /// The backends' numbers, where all slots have room here.
    pub first: [u32; FRONT_SLOTS],
}

/// How many slots lie in a front itself.
pub const FRONT_SLOTS: usize = 8;
/// How many lie together where a front has more.
pub const BLOCK_SLOTS: usize = 64;

/// Where slots of a front lie that has many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct BlockKey {
    /// The front's number.
    pub front: u32,
    /// Which of its blocks.
    pub block: u32,
}

/// The numbers of the backends in some slots; 0 after the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block(pub [u32; BLOCK_SLOTS]);

impl Front {
    /// The same with the backends of these numbers in its slots: some lie in the front, more in blocks.
    pub fn with_slots(self, backends: &[u32]) -> (Self, Vec<(BlockKey, Block)>) {
        let mut front = Self { slots: backends.len() as u32, first: [0; FRONT_SLOTS], ..self };
        if let Some(first) = front.first.get_mut(..backends.len()) {
            first.copy_from_slice(backends);
            return (front, Vec::new());
        }
        let block = |(block, numbers): (u32, &[u32])| {
            let mut backends = [0; BLOCK_SLOTS];
            backends.iter_mut().zip(numbers).for_each(|(slot, number)| *slot = *number);
            (BlockKey { front: front.id, block }, Block(backends))
        };
        (front, (0..).zip(backends.chunks(BLOCK_SLOTS)).map(block).collect())
    }
}

/// A backend of a front.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Backend {
    /// Its address.
    pub address: Address,
    /// Its port; 0: the one that the client asked for.
    pub port: Port,
    /// Always 0.
    pub zero: u16,
    /// The front's number.
    pub front: u32,
    /// Its weight; 0: it gets no new connections.
    pub weight: u32,
    /// How many connections it has, about; the programs count.
    pub open: u32,
}

impl Backend {
    /// Where it is reached.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address.into(), self.port.into())
    }
}

/// What is counted for a backend, on one processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counts {
    /// Connections that it got.
    pub connections: u64,
    /// Packets from clients.
    pub incoming_packets: u64,
    /// Their bytes.
    pub incoming_bytes: u64,
    /// Packets to clients.
    pub outgoing_packets: u64,
    /// Their bytes.
    pub outgoing_bytes: u64,
}

impl std::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, each| Self {
            connections: sum.connections + each.connections,
            incoming_packets: sum.incoming_packets + each.incoming_packets,
            incoming_bytes: sum.incoming_bytes + each.incoming_bytes,
            outgoing_packets: sum.outgoing_packets + each.outgoing_packets,
            outgoing_bytes: sum.outgoing_bytes + each.outgoing_bytes,
        })
    }
}

/// A packet of a connection as it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Tuple {
    /// Where it comes from.
    pub source: Address,
    /// Where it goes to.
    pub destination: Address,
    /// From which port.
    pub source_port: Port,
    /// To which port.
    pub destination_port: Port,
    /// The network's number.
    pub network: u32,
    /// The protocol's number (IANA).
    pub protocol: u8,
    /// 1: it is an answer of the backend's.
    pub reply: u8,
    /// Always 0.
    pub zero: [u16; 3],
}

/// The backend has answered.
pub const STATE_ANSWERED: u8 = 1;
/// The client has sent a FIN.
pub const STATE_CLIENT_ENDED: u8 = 2;
/// The backend has sent a FIN.
pub const STATE_SERVER_ENDED: u8 = 4;
/// One of them has sent a RST.
pub const STATE_RESET: u8 = 8;

/// What becomes of the packets of a connection in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Connection {
    /// Where they come from then.
    pub source: Address,
    /// Where they go to then.
    pub destination: Address,
    /// From which port.
    pub source_port: Port,
    /// To which port.
    pub destination_port: Port,
    /// The backend's number.
    pub backend: u32,
    /// When the last one was seen, in seconds of `CLOCK_MONOTONIC`.
    pub seen: u32,
    /// The client's device in its sandbox.
    pub interface: u32,
    /// What was seen of it: `STATE_…`.
    pub state: u8,
    /// 1: client and backend are one.
    pub loops: u8,
    /// Always 0.
    pub zero: [u16; 3],
}

/// After which silence connections of a network end, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Timeouts {
    /// Established TCP.
    pub tcp: u32,
    /// TCP that one side has ended.
    pub tcp_fin: u32,
    /// UDP.
    pub udp: u32,
}

/// A client that keeps its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct ClientKey {
    /// The front's number.
    pub front: u32,
    /// Always 0.
    pub zero: u32,
    /// The client.
    pub address: Address,
}

/// Which backend it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Client {
    /// The backend's number.
    pub backend: u32,
    /// When it connected last, in seconds of `CLOCK_MONOTONIC`.
    pub seen: u32,
}

/// A datagram in fragments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct FragmentKey {
    /// The network's number.
    pub network: u32,
    /// The container's device.
    pub interface: u32,
    /// Where it comes from.
    pub source: Address,
    /// Where it goes to.
    pub destination: Address,
    /// Its identification, in network byte order.
    pub id: u32,
    /// The protocol's number (IANA).
    pub protocol: u32,
}

/// The ports of its first fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ports {
    /// From which port.
    pub source: Port,
    /// To which port.
    pub destination: Port,
}

/// A network that a container is in, with the container's addresses there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Membership {
    /// The network's number.
    pub network: u32,
    /// Always 0.
    pub zero: u32,
    /// The address of IPv4; all 0: none.
    pub ipv4: Address,
    /// That of IPv6.
    pub ipv6: Address,
}

/// In how many networks services are looked for when a container's socket asks for one.
pub const MEMBERSHIPS: usize = 8;

/// A container's namespace: the networks come first, and all 0 after the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Namespace(pub [Membership; MEMBERSHIPS]);

/// It is established.
pub const SOCKET_OPEN: u32 = 1;

/// A TCP socket that has asked for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Socket {
    /// The number of its namespace.
    pub namespace: u64,
    /// What it has asked for.
    pub service: Address,
    /// What it got.
    pub backend: Address,
    /// The port that it has asked for.
    pub service_port: Port,
    /// The port that it got.
    pub backend_port: Port,
    /// The backend's number.
    pub number: u32,
    /// When it has asked, in seconds of `CLOCK_MONOTONIC`.
    pub since: u32,
    /// [`SOCKET_OPEN`], 0: it waits for an answer, or more: one side has ended it.
    pub state: u32,
}

/// With whom a socket exchanges datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct DatagramKey {
    /// The socket's number.
    pub socket: u64,
    /// For whom it sends one, or from whom it gets one.
    pub address: Address,
    /// The port.
    pub port: Port,
    /// 1: it gets one.
    pub reply: u16,
    /// Always 0.
    pub zero: u32,
}

/// Who that is instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Datagram {
    /// The backend, or the service.
    pub address: Address,
    /// The port.
    pub port: Port,
    /// Always 0.
    pub zero: u16,
    /// The network's number.
    pub network: u32,
    /// The backend's number.
    pub backend: u32,
    /// When the last one was sent, in seconds of `CLOCK_MONOTONIC`.
    pub seen: u32,
}

/// What somebody wants to see of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Watching {
    /// Until when, in nanoseconds of `CLOCK_MONOTONIC`; 0: nobody does.
    pub until: u64,
    /// One of how many packets is shown, beside those that open or end a TCP connection; 0: those only that
    /// were not carried.
    pub every: u32,
    /// Of which network; 0: of all.
    pub network: u32,
}

/// A packet, as those see it who watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Report {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// The network's number.
    pub network: u32,
    /// Of the packet, without its frame.
    pub length: u32,
    /// Where it came from.
    pub source: Address,
    /// Where it was for.
    pub destination: Address,
    /// What became of its destination, where it was for a service; of its source, where it is an answer.
    pub translated: Address,
    /// From which port.
    pub source_port: Port,
    /// For which port.
    pub destination_port: Port,
    /// The port of `translated`.
    pub translated_port: Port,
    /// The protocol's number (IANA).
    pub protocol: u8,
    /// Of TCP: byte 13 of its header.
    pub tcp_flags: u8,
    /// `POINT_…`.
    pub point: u8,
    /// `VERDICT_…`.
    pub verdict: u8,
    /// Why it was not carried: one more than the position in [`EVENTS`], or [`REASON_ERROR`]; 0: it was.
    pub reason: u8,
    /// 1: `translated` says something.
    pub is_translated: u8,
    /// Of the error (ICMP) by which its sender was told.
    pub error_type: u8,
    /// As above.
    pub error_code: u8,
    /// 0.
    pub zero: u16,
}

/// The kernel, or somebody on the way, has refused it, and told its sender so.
pub const REASON_ERROR: u8 = 255;

/// It was seen where it left a container.
pub const POINT_FROM_CONTAINER: u8 = 0;
/// It was seen where it goes into a container.
pub const POINT_TO_CONTAINER: u8 = 1;
/// It was seen where it came from another node.
pub const POINT_FROM_WIRE: u8 = 2;
/// It was seen on its way to another node.
pub const POINT_TO_WIRE: u8 = 3;

/// No packet yet: a socket has asked for a service.
pub const POINT_SOCKET: u8 = 4;

/// The kernel has it.
pub const VERDICT_KERNEL: u8 = 0;
/// The programs have carried it.
pub const VERDICT_CARRIED: u8 = 1;
/// It was dropped.
pub const VERDICT_DROPPED: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_slots_lie_in_the_front_and_many_in_blocks() {
        let front = Front { id: 7, ..Front::zeroed() };
        let numbers: Vec<u32> = (1..=130).collect();
        let (few, blocks) = front.with_slots(&numbers[..8]);
        assert_eq!((few.slots, few.first, blocks), (8, [1, 2, 3, 4, 5, 6, 7, 8], vec![]));
        let (none, blocks) = few.with_slots(&[]);
        assert_eq!((none, blocks), (front, vec![]));
        let (many, blocks) = few.with_slots(&numbers);
        assert_eq!((many.slots, many.first), (130, [0; 8]));
        let keys: Vec<_> = blocks.iter().map(|(key, _)| (key.front, key.block)).collect();
        assert_eq!(keys, [(7, 0), (7, 1), (7, 2)]);
        let all: Vec<u32> = blocks.iter().flat_map(|(_, block)| block.0).collect();
        assert_eq!((&all[..130], &all[130..]), (&numbers[..], &[0; 62][..]));
    }

    #[test]
    fn addresses_and_ports_are_in_network_byte_order() {
        for text in ["10.9.0.5", "fd00:9::5", "::", "0.0.0.0"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
        let mapped = Address::from(IpAddr::from([10, 9, 0, 5]));
        assert_eq!(mapped.0, [[0; 4], [0; 4], [0, 0, 255, 255], [10, 9, 0, 5]]);
        assert_eq!((Port::from(80).0, u16::from(Port::from(8080))), ([0, 80], 8080));
    }
}
