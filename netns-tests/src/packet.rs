//! Packets as bytes: what an attacker writes into a socket.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::space::Space;

/// A VXLAN packet's UDP payload (RFC 7348, section 5).
pub fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    let header = [0x0800_0000_u32.to_be_bytes(), (vni << 8).to_be_bytes()].concat();
    [&header, frame].concat()
}

/// An Ethernet frame with an IPv4 or IPv6 packet in it, as its first byte says.
pub fn ethernet(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&destination, &source, &kind[..], packet].concat()
}

/// An IPv4 packet with a UDP datagram.
pub fn ipv4_udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let datagram = udp(from.1, to.1, payload, 0);
    let length = (20 + datagram.len()).to_be_bytes();
    let [.., high, low] = length;
    let mut header = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, 17, 0, 0];
    header.extend(from.0.octets());
    header.extend(to.0.octets());
    let checksum = checksum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [header, datagram].concat()
}

/// An IPv6 packet with a UDP datagram.
pub fn ipv6_udp(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), payload: &[u8]) -> Vec<u8> {
    let [.., high, low] = (8 + payload.len()).to_be_bytes();
    let addresses = [from.0.octets(), to.0.octets()].concat();
    let pseudo = [&addresses[..], &[0, 0, high, low, 0, 0, 0, 17]].concat();
    let sum = checksum(&[&pseudo[..], &udp(from.1, to.1, payload, 0)].concat());
    let header = [0x60, 0, 0, 0, high, low, 17, 64];
    [&header[..], &addresses, &udp(from.1, to.1, payload, sum)].concat()
}

fn udp(from: u16, to: u16, payload: &[u8], checksum: u16) -> Vec<u8> {
    let [.., high, low] = (8 + payload.len()).to_be_bytes();
    let (from, to, sum) = (from.to_be_bytes(), to.to_be_bytes(), checksum.to_be_bytes());
    [&from[..], &to, &[high, low], &sum, payload].concat()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// Sends an Ethernet frame out of an interface, whatever is in it.
pub fn send_frame(space: &Space, interface: &str, frame: &[u8]) {
    space.enter(|| {
        let kind = SockType::Raw;
        let socket = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, None)
            .expect("a packet socket can be made");
        let index = nix::net::if_::if_nametoindex(interface).expect("the interface is there");
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0,
            sll_ifindex: index.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: frame and address are valid for the lengths given, and live during the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                length,
            )
        };
        let problem = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(sent), Ok(frame.len()), "{interface}: {problem}");
    });
}
