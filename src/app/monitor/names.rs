//! What addresses are called, and packets taken apart.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::freed::Of;
use super::sources::{Found, What};
use crate::api::{Carrier, Party, Point, Seen, Sighting, SightingKind};
use crate::kernel::Dropped;
use crate::kernel::ebpf::{self, Address, EVENTS, Port, Report};
use crate::model::{Name, NetworkId, NodeName, Snapshot};

/// What the addresses of a snapshot's networks are called.
pub(super) struct Names {
    node: NodeName,
    snapshot: Snapshot,
    /// Of the networks that something was seen of since the snapshot, by their numbers.
    networks: HashMap<u32, Option<Arc<Known>>>,
}

/// A network.
struct Known {
    id: NetworkId,
    name: Name,
    /// The endpoint and the service at an address.
    addresses: HashMap<IpAddr, (Option<Name>, Option<Name>)>,
}

/// The ends of a packet, and its protocol.
pub(super) type Ends = (End, End, u8);
type End = (IpAddr, Option<u16>);

/// What a packet says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Headers {
    source: End,
    destination: End,
    protocol: u8,
    flags: u8,
    length: u32,
}

impl Names {
    pub(super) fn new(node: NodeName, snapshot: Snapshot) -> Self {
        Self { node, snapshot, networks: HashMap::new() }
    }

    /// What is to be told of something, and on which network it was.
    pub(super) fn sighting(&mut self, found: Found) -> (Option<NetworkId>, Sighting) {
        let mut told = Sighting {
            time: found.time,
            node: self.node.clone(),
            kind: SightingKind::Drop,
            reason: String::new(),
            lost: 0,
            packet: None,
        };
        let network = match found.what {
            What::Lost(lost) => {
                (told.kind, told.lost) = (SightingKind::Lost, lost);
                None
            }
            What::Reported(report) => {
                let network = self.known(report.network);
                match reason(&report) {
                    Some(reason) => reason.clone_into(&mut told.reason),
                    None => told.kind = SightingKind::Flow,
                }
                told.packet = Some(reported(&report, network.as_deref()));
                network
            }
            What::Blind(reason) => {
                (told.kind, told.reason) = (SightingKind::Lost, reason);
                None
            }
            What::Dropped(point, network, dropped) => {
                let number = network.and_then(|network| self.number(network));
                self.dropped(&mut told, point, number, dropped)
            }
            What::Freed(point, of, dropped) => {
                let number = match of {
                    Of::Network(network) => self.number(network),
                    Of::Number(number) => Some(number),
                };
                self.dropped(&mut told, point, number, dropped)
            }
        };
        (network.map(|network| network.id), told)
    }

    fn number(&self, network: NetworkId) -> Option<u32> {
        self.snapshot.networks.get(&network).map(|network| network.vni.number())
    }

    /// Tells of a dropped packet of a network, and which that is.
    fn dropped(
        &mut self,
        told: &mut Sighting,
        point: Point,
        number: Option<u32>,
        Dropped { reason, packet, .. }: Dropped,
    ) -> Option<Arc<Known>> {
        let network = number.and_then(|number| self.known(number));
        told.reason = reason;
        told.packet = headers(&packet).map(|headers| headers.seen(point, network.as_deref()));
        network
    }

    fn known(&mut self, number: u32) -> Option<Arc<Known>> {
        let Self { networks, snapshot, .. } = self;
        networks.entry(number).or_insert_with(|| Known::learn(snapshot, number).map(Arc::new)).clone()
    }
}

impl Known {
    fn learn(snapshot: &Snapshot, number: u32) -> Option<Self> {
        let network = snapshot.networks.values().find(|network| network.vni.number() == number)?;
        let mut addresses = HashMap::new();
        for service in snapshot.services.values() {
            let own = service.addresses.get(&network.id).into_iter().flatten();
            addresses.extend(own.map(|address| (*address, (None, Some(service.name.clone())))));
        }
        let members = snapshot.members.get(&network.id);
        for endpoint in members.into_iter().flat_map(|members| members.endpoints.values()) {
            let called = || (Some(endpoint.name.clone()), endpoint.service.clone());
            addresses.extend(endpoint.addresses.iter().map(|address| (*address, called())));
        }
        Some(Self { id: network.id, name: network.name.clone(), addresses })
    }
}

/// From where a dropped packet came and for where it was, with its protocol: by that it is known again. `None`: it
/// was not dropped, or that cannot be read.
pub(super) fn ends(what: &What) -> Option<Ends> {
    let headers = match what {
        What::Dropped(_, _, dropped) | What::Freed(_, _, dropped) => headers(&dropped.packet)?,
        What::Reported(report) if report.reason != 0 => headers_of(report),
        What::Reported(_) | What::Lost(_) | What::Blind(_) => return None,
    };
    Some((headers.source, headers.destination, headers.protocol))
}

/// Whether something that the kernel has let go of was dropped on its way through a network.
pub(super) fn is_drop(dropped: &Dropped) -> bool {
    let Some(headers) = headers(&dropped.packet) else { return false };
    let to = headers.destination.0;
    // What is for all on a link no network carries further.
    let is_for_link = match to {
        IpAddr::V4(to) => to.is_broadcast() || to.octets().starts_with(&[224, 0, 0]),
        IpAddr::V6(to) => to.segments()[0] & 0xff0f == 0xff02,
    };
    // Before Linux 6.3 messages of ICMPv6 go so that have been taken.
    let is_taken = dropped.reason == "not-specified" && headers.protocol == ICMPV6;
    !is_for_link && !is_taken
}

fn party(network: Option<&Known>, (address, port): (IpAddr, Option<u16>)) -> Party {
    let called = network.and_then(|network| network.addresses.get(&address)).cloned();
    let (endpoint, service) = called.unwrap_or_default();
    Party { address, port, endpoint, service }
}

/// An end that a report has; a socket that asks has no port yet.
fn end(report: &Report, address: Address, port: Port) -> End {
    (address.into(), Some(port.into()).filter(|port| has_ports(report.protocol) && *port != 0))
}

fn headers_of(report: &Report) -> Headers {
    Headers {
        source: end(report, report.source, report.source_port),
        destination: end(report, report.destination, report.destination_port),
        protocol: report.protocol,
        flags: report.tcp_flags,
        length: report.length,
    }
}

fn reported(report: &Report, network: Option<&Known>) -> Seen {
    let point = match report.point {
        ebpf::POINT_FROM_CONTAINER => Point::FromContainer,
        ebpf::POINT_TO_CONTAINER => Point::ToContainer,
        ebpf::POINT_FROM_WIRE => Point::FromWire,
        ebpf::POINT_SOCKET => Point::Socket,
        _ => Point::ToWire,
    };
    let carrier = match report.verdict {
        // Its packets are still to come.
        _ if point == Point::Socket => None,
        ebpf::VERDICT_CARRIED => Some(Carrier::Direct),
        ebpf::VERDICT_KERNEL => Some(Carrier::Kernel),
        _ => None,
    };
    let translated = (report.is_translated != 0)
        .then(|| party(network, end(report, report.translated, report.translated_port)));
    Seen { carrier, translated, ..headers_of(report).seen(point, network) }
}

/// Why a packet was not carried.
fn reason(report: &Report) -> Option<&'static str> {
    if report.reason != ebpf::REASON_ERROR {
        return EVENTS.get(usize::from(report.reason).wrapping_sub(1)).copied();
    }
    let (kind, code) = (report.error_type, report.error_code);
    // RFC 792 and RFC 1812, 5.2.7.1; RFC 4443, 3.
    Some(match (IpAddr::from(report.source), kind, code) {
        (IpAddr::V4(_), 3, 1 | 7) | (IpAddr::V6(_), 1, 3) => "host-unreachable",
        (IpAddr::V4(_), 3, 2) => "protocol-unreachable",
        (IpAddr::V4(_), 3, 3) | (IpAddr::V6(_), 1, 4) => "port-unreachable",
        (IpAddr::V4(_), 3, 4) | (IpAddr::V6(_), 2, _) => "too-large",
        (IpAddr::V4(_), 3, 9 | 10 | 13) | (IpAddr::V6(_), 1, 1 | 5) => "prohibited",
        (IpAddr::V4(_), 3, _) | (IpAddr::V6(_), 1, _) => "network-unreachable",
        (IpAddr::V4(_), 11, _) | (IpAddr::V6(_), 3, _) => "time-exceeded",
        _ => "parameter-problem",
    })
}

/// Protocols by their numbers (IANA).
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
const PROTOCOLS: [(u8, &str); 5] =
    [(1, "icmp"), (TCP, "tcp"), (17, "udp"), (ICMPV6, "icmpv6"), (132, "sctp")];

fn protocol(number: u8) -> String {
    let known = PROTOCOLS.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | 17 | 132)
}

/// TCP's flags by their initials, in the order of their bits (RFC 9293, 3.1).
fn flags(flags: u8) -> String {
    let set = "FSRPAUEC".chars().enumerate().filter(|(bit, _)| flags & 1 << bit != 0);
    set.map(|(_, initial)| initial).collect()
}

/// Reads the headers of a packet, of which there may be the beginning only.
fn headers(packet: &[u8]) -> Option<Headers> {
    let sliced = LaxSlicedPacket::from_ip(packet).ok()?;
    let (source, destination, protocol, length): (IpAddr, IpAddr, _, u32) = match &sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let length = header.total_len().into();
            let ends = (header.source_addr().into(), header.destination_addr().into());
            (ends.0, ends.1, ip.payload_ip_number(), length)
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let length = u32::from(header.payload_length()) + 40;
            let ends = (header.source_addr().into(), header.destination_addr().into());
            (ends.0, ends.1, ip.payload().ip_number, length)
        }
        _ => return None,
    };
    // The first words of TCP, UDP and SCTP are their ports; only a first fragment has them.
    let payload = sliced.net.as_ref().and_then(LaxNetSlice::ip_payload_ref);
    let payload = payload.filter(|payload| has_ports(protocol.0) && !payload.fragmented);
    let ports = payload.and_then(|payload| match payload.payload {
        [a, b, c, d, ..] => Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))),
        _ => None,
    });
    let flags = match &sliced.transport {
        // Byte 13 of the header.
        Some(TransportSlice::Tcp(tcp)) => tcp.header_slice().get(13).copied().unwrap_or_default(),
        _ => 0,
    };
    Some(Headers {
        source: (source, ports.map(|ports| ports.0)),
        destination: (destination, ports.map(|ports| ports.1)),
        protocol: protocol.0,
        flags,
        length,
    })
}

impl Headers {
    fn seen(self, point: Point, network: Option<&Known>) -> Seen {
        Seen {
            network: network.map(|network| network.name.clone()),
            point,
            carrier: None,
            protocol: protocol(self.protocol),
            source: party(network, self.source),
            destination: party(network, self.destination),
            translated: None,
            length: self.length,
            flags: if self.protocol == TCP { flags(self.flags) } else { String::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn packets() -> [(Vec<u8>, Headers); 4] {
        let builder = || PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 3], 64);
        let builder6 = || {
            let address = |last| [0xfd, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            PacketBuilder::ipv6(address(2), address(3), 64)
        };
        let headers = |ends: [&str; 2], ports: Option<(u16, u16)>, protocol, flags, length| Headers {
            source: (ends[0].parse().unwrap(), ports.map(|ports| ports.0)),
            destination: (ends[1].parse().unwrap(), ports.map(|ports| ports.1)),
            protocol,
            flags,
            length,
        };
        let (four, six) = (["10.9.0.2", "10.9.0.3"], ["fd00:9::2", "fd00:9::3"]);
        let written = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = Vec::new();
            write(&mut packet);
            packet
        };
        let data = [7; 100];
        [
            (
                written(&|to| builder().tcp(4000, 80, 1, 9).syn().ack(2).write(to, &data).unwrap()),
                headers(four, Some((4000, 80)), TCP, 18, 140),
            ),
            (
                written(&|to| builder6().udp(4000, 53).write(to, &data).unwrap()),
                headers(six, Some((4000, 53)), 17, 0, 148),
            ),
            (
                written(&|to| builder().icmpv4_echo_request(1, 2).write(to, &data).unwrap()),
                headers(four, None, 1, 0, 128),
            ),
            (
                written(&|to| builder6().write(to, 132.into(), &data).unwrap()),
                headers(six, Some((0x707, 0x707)), 132, 0, 140),
            ),
        ]
    }

    #[test]
    fn an_error_says_why_in_either_family() {
        let why = |source: &str, error_type, error_code| {
            let source = source.parse::<IpAddr>().unwrap().into();
            let zeroed: Report = bytemuck::Zeroable::zeroed();
            reason(&Report { source, reason: ebpf::REASON_ERROR, error_type, error_code, ..zeroed })
        };
        for (ipv4, ipv6, expected) in [
            (Some((3, 1)), Some((1, 3)), "host-unreachable"),
            (Some((3, 0)), Some((1, 0)), "network-unreachable"),
            (Some((3, 3)), Some((1, 4)), "port-unreachable"),
            (Some((3, 2)), None, "protocol-unreachable"),
            (Some((3, 4)), Some((2, 0)), "too-large"),
            (Some((3, 13)), Some((1, 1)), "prohibited"),
            (Some((11, 0)), Some((3, 0)), "time-exceeded"),
            (Some((12, 0)), Some((4, 1)), "parameter-problem"),
        ] {
            for (source, error) in [("10.9.0.2", ipv4), ("fd00:9::2", ipv6)] {
                let Some((kind, code)) = error else { continue };
                assert_eq!(why(source, kind, code), Some(expected), "{source} {kind} {code}");
            }
        }
        let zeroed: Report = bytemuck::Zeroable::zeroed();
        assert_eq!(reason(&zeroed), None);
        assert_eq!(reason(&Report { reason: 2, ..zeroed }), Some("no-backend"));
        // Of a layout that nobody knows.
        assert_eq!(reason(&Report { reason: 200, ..zeroed }), None);
    }

    #[test]
    fn of_what_the_kernel_lets_go_of_only_drops_are_told() {
        let builder = |to| PacketBuilder::ipv4([10, 9, 0, 2], to, 64).udp(4000, 5000);
        let told = |reason: &str, to, protocol: Option<u8>| {
            let mut packet = Vec::new();
            builder(to).write(&mut packet, b"data").unwrap();
            packet[9] = protocol.unwrap_or(packet[9]);
            is_drop(&Dropped { reason: reason.to_owned(), packet, devices: [None; 2] })
        };
        let there = [10, 9, 0, 3];
        assert!(told("ip-csum", there, None) && told("not-specified", there, None));
        assert!(told("ip-csum", there, Some(ICMPV6)) && told("ip-csum", [239, 1, 1, 1], None));
        assert!(!told("not-specified", there, Some(ICMPV6)));
        assert!(!told("ip-csum", [224, 0, 0, 251], None) && !told("ip-csum", [255; 4], None));
        let for_link =
            PacketBuilder::ipv6([0xfd; 16], [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 64);
        let mut packet = Vec::new();
        for_link.udp(1, 2).write(&mut packet, b"data").unwrap();
        let dropped = |packet| Dropped { reason: "ip-csum".to_owned(), packet, devices: [None; 2] };
        assert!(!is_drop(&dropped(packet)) && !is_drop(&dropped(vec![0x45, 0])));
    }

    #[test]
    fn headers_are_read_also_of_the_beginning_of_a_packet() {
        for (packet, expected) in packets() {
            assert_eq!(headers(&packet).as_ref(), Some(&expected));
            assert_eq!(headers(&packet[..64]).as_ref(), Some(&expected));
            // The ports are not there any more.
            let without = headers(&packet[..42]).unwrap();
            assert_eq!((without.source.0, without.length), (expected.source.0, expected.length));
            assert_eq!(headers(&packet[..10]), None);
        }
        assert_eq!(flags(18), "SA");
        assert_eq!((protocol(132), protocol(50)), ("sctp".to_owned(), "50".to_owned()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_packet_or_none(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = headers(&bytes);
        }

        #[test]
        fn a_packet_with_any_byte_changed_is_one_or_none(
            which in 0..4_usize, at in 0..128_usize, byte: u8,
        ) {
            let mut packet = packets()[which].0.clone();
            packet[at] = byte;
            let _ = headers(&packet);
        }
    }
}
