//! Frames, written and read: IPv4 and IPv6, TCP, UDP, SCTP and ICMP, with their checksums.

use std::net::IpAddr;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// The container's MAC address, and that of its sandbox's device.
pub const CONTAINER: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const SANDBOX: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A packet. Its checksums are made when it is written and checked when it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
    /// Of TCP.
    pub flags: u8,
    /// Which fragment it is: its identification, offset in units of 8 bytes, and whether more follow.
    pub fragment: Option<(u16, u16, bool)>,
    /// A UDP datagram over IPv4 may have none.
    pub no_checksum: bool,
    /// Whether its frame is from the sandbox to the container.
    pub is_back: bool,
    /// What follows the header; of ICMP and of a later fragment all of it.
    pub data: Vec<u8>,
}

impl Packet {
    pub fn new(protocol: u8, from: (&str, u16), to: (&str, u16)) -> Self {
        Self {
            source: from.0.parse().unwrap(),
            destination: to.0.parse().unwrap(),
            protocol,
            source_port: from.1,
            destination_port: to.1,
            flags: 0,
            fragment: None,
            no_checksum: false,
            is_back: false,
            data: b"some bytes, an odd number".to_vec(),
        }
    }

    pub fn tcp(flags: u8, from: (&str, u16), to: (&str, u16)) -> Self {
        Self { flags, ..Self::new(TCP, from, to) }
    }

    /// An error of somebody's about a packet.
    pub fn error(source: &str, destination: &str, kind: (u8, u8), about: &[u8]) -> Self {
        let (kind, code) = kind;
        let protocol = if source.contains(':') { ICMPV6 } else { ICMP };
        let mut packet = Self::new(protocol, (source, 0), (destination, 0));
        packet.data = vec![kind, code, 0, 0, 0, 0, 0, 0];
        packet.data.extend_from_slice(&about[14..]);
        packet.data.truncate(8 + 60);
        packet
    }

    /// The packet that goes the other way, with these flags.
    pub fn back(&self, flags: u8) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            flags,
            ..self.clone()
        }
    }

    fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|(_, offset, _)| offset > 0)
    }

    fn header_length(&self) -> usize {
        match self.protocol {
            _ if self.is_later_fragment() => 0,
            TCP => 20,
            UDP => 8,
            SCTP => 12,
            _ => 0,
        }
    }

    /// Where the checksum of the transport is.
    fn checksum_at(&self) -> Option<usize> {
        match self.protocol {
            _ if self.is_later_fragment() => None,
            TCP => Some(16),
            UDP => Some(6),
            ICMP | ICMPV6 => Some(2),
            _ => None,
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut transport = vec![0; self.header_length()];
        if !transport.is_empty() {
            transport[..2].copy_from_slice(&self.source_port.to_be_bytes());
            transport[2..4].copy_from_slice(&self.destination_port.to_be_bytes());
        }
        if self.protocol == TCP && !transport.is_empty() {
            transport[12..14].copy_from_slice(&[5 << 4, self.flags]);
        }
        transport.extend_from_slice(&self.data);
        let length = transport.len() as u16;
        if self.protocol == UDP && !self.is_later_fragment() {
            transport[4..6].copy_from_slice(&length.to_be_bytes());
        }
        if let Some(at) = self.checksum_at() {
            let sum = match checksum(&[&self.pseudo(length), &transport]) {
                0 if self.protocol == UDP => 0xffff,
                sum => sum,
            };
            if !self.no_checksum {
                transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
        }
        if self.protocol == SCTP && !self.is_later_fragment() && !self.no_checksum {
            let sum = crc32c(&transport);
            transport[8..12].copy_from_slice(&sum.to_le_bytes());
        }
        let (to, from) = if self.is_back { (CONTAINER, SANDBOX) } else { (SANDBOX, CONTAINER) };
        let mut frame = [to, from].concat();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                let (id, offset, more) = self.fragment.unwrap_or_default();
                let mut ip = vec![0x45, 0];
                ip.extend((length + 20).to_be_bytes());
                ip.extend(id.to_be_bytes());
                ip.extend((offset | u16::from(more) << 13).to_be_bytes());
                ip.extend([64, self.protocol, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                let sum = checksum(&[&ip]);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                let extra = if self.fragment.is_some() { 8 } else { 0 };
                frame.extend((length + extra).to_be_bytes());
                frame.extend([if extra > 0 { 44 } else { self.protocol }, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                if let Some((id, offset, more)) = self.fragment {
                    frame.extend([self.protocol, 0]);
                    frame.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    frame.extend(u32::from(id).to_be_bytes());
                }
            }
            _ => panic!("addresses of two families"),
        }
        frame.extend(transport);
        frame
    }

    /// What is summed up beside the transport's bytes (RFC 9293, 3.1; RFC 8200, 8.1).
    fn pseudo(&self, length: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(_), IpAddr::V4(_)) if self.protocol == ICMP => return bytes,
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            _ => panic!("addresses of two families"),
        }
        bytes.extend([0, self.protocol]);
        bytes.extend(length.to_be_bytes());
        bytes
    }

    /// Reads a frame; all its checksums must be right.
    #[track_caller]
    pub fn read(frame: &[u8]) -> Self {
        let (ip, is_ipv4) = (&frame[14..], frame[12..14] == [8, 0]);
        let (source, destination, mut protocol, mut transport): (IpAddr, IpAddr, u8, &[u8]);
        let mut fragment = None;
        if is_ipv4 {
            assert_eq!(checksum(&[&ip[..20]]), 0, "the checksum of the header: {ip:x?}");
            let of = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).unwrap();
            (source, destination) = (of(12).into(), of(16).into());
            (protocol, transport) = (ip[9], &ip[20..]);
            let [id, place] = [4, 6].map(|at| u16::from_be_bytes([ip[at], ip[at + 1]]));
            if place & 0x3fff != 0 {
                fragment = Some((id, place & 0x1fff, place & 0x2000 != 0));
            }
        } else {
            let of = |at: usize| <[u8; 16]>::try_from(&ip[at..at + 16]).unwrap();
            (source, destination) = (of(8).into(), of(24).into());
            (protocol, transport) = (ip[6], &ip[40..]);
            if protocol == 44 {
                let place = u16::from_be_bytes([ip[42], ip[43]]);
                fragment = Some((u16::from_be_bytes([ip[46], ip[47]]), place >> 3, place & 1 != 0));
                (protocol, transport) = (ip[40], &ip[48..]);
            }
        }
        let ports = [0, 2].map(|at| u16::from_be_bytes([transport[at], transport[at + 1]]));
        let mut packet = Self {
            source,
            destination,
            protocol,
            source_port: ports[0],
            destination_port: ports[1],
            flags: 0,
            fragment,
            no_checksum: protocol == UDP && transport[6..8] == [0, 0]
                || protocol == SCTP && transport[8..12] == [0; 4],
            is_back: frame[..12] == [CONTAINER, SANDBOX].concat(),
            data: Vec::new(),
        };
        packet.data = transport[packet.header_length()..].to_vec();
        if packet.header_length() == 0 {
            (packet.source_port, packet.destination_port) = (0, 0);
        } else if protocol == TCP {
            packet.flags = transport[13];
        }
        if packet.checksum_at().is_some() && !packet.no_checksum && fragment.is_none() {
            let sum = checksum(&[&packet.pseudo(transport.len() as u16), transport]);
            assert_eq!(sum, 0, "the checksum of the transport: {transport:x?}");
        }
        if protocol == SCTP && !packet.no_checksum && fragment.is_none() {
            let mut without = transport.to_vec();
            without[8..12].copy_from_slice(&[0; 4]);
            assert_eq!(crc32c(&without).to_le_bytes(), transport[8..12], "the checksum of SCTP");
        }
        if matches!(protocol, ICMP | ICMPV6) {
            // It is made when it is written.
            packet.data[2..4].copy_from_slice(&[0, 0]);
        }
        packet
    }
}

/// CRC-32C (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8)
            .fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// The checksum of the Internet (RFC 1071).
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let words = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
