//! Packets as bytes: what an attacker writes into a socket.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
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
    const UDP: u8 = 17;
    let sum = ipv6_checksum(from.0, to.0, UDP, &udp(from.1, to.1, payload, 0));
    ipv6(from.0, to.0, (UDP, 64), &udp(from.1, to.1, payload, sum))
}

/// An IPv6 packet with this protocol and hop limit (RFC 8200, section 3).
fn ipv6(from: Ipv6Addr, to: Ipv6Addr, (protocol, hops): (u8, u8), payload: &[u8]) -> Vec<u8> {
    let [.., high, low] = payload.len().to_be_bytes();
    let header = [0x60, 0, 0, 0, high, low, protocol, hops];
    [&header[..], &from.octets(), &to.octets(), payload].concat()
}

/// The checksum of what a packet carries, with the pseudo-header (section 8.1).
fn ipv6_checksum(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> u16 {
    let [.., high, low] = payload.len().to_be_bytes();
    let end = [0, 0, high, low, 0, 0, 0, protocol];
    checksum(&[&from.octets()[..], &to.octets(), &end, payload].concat())
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

/// An IPv6 packet with a message of ICMPv6 (RFC 4443) from its type on, which has no checksum yet; of
/// those between neighbours (RFC 4861): they may not have been forwarded.
pub fn icmpv6(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let sum = ipv6_checksum(from, to, ICMPV6, message).to_be_bytes();
    ipv6(from, to, (ICMPV6, 255), &[&message[..2], &sum, &message[4..]].concat())
}

/// The Ethernet address of an interface.
pub fn mac_of(space: &Space, interface: &str) -> [u8; 6] {
    let text = space.sh(&format!("ip -o link show {interface} | sed 's/.*ether \\([^ ]*\\).*/\\1/'"));
    mac(&text)
}

/// An Ethernet address, from its text.
fn mac(text: &str) -> [u8; 6] {
    let bytes = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).expect("it is a byte"));
    bytes.collect::<Vec<u8>>().try_into().expect("it has six bytes")
}

/// A frame of a container's for its gateway with an IPv4 packet, and with a tag (IEEE 802.1Q) or none.
pub fn gateway_frame(container: &Space, gateway: Ipv4Addr, tag: Option<u16>, packet: &[u8]) -> Vec<u8> {
    let to =
        container.sh(&format!("ip neigh show {gateway} dev eth0 | sed 's/.*lladdr \\([^ ]*\\).*/\\1/'"));
    let (to, from) = (mac(&to), mac_of(container, "eth0"));
    let tag = tag.map_or(Vec::new(), |tag| [[0x81, 0x00], tag.to_be_bytes()].concat());
    [&to[..], &from, &tag, &[0x08, 0x00], packet].concat()
}

/// Sends an Ethernet frame out of an interface, whatever is in it.
pub fn send_frame(space: &Space, interface: &str, frame: &[u8]) {
    send_frames(space, interface, [frame]);
}

/// The same with many.
pub fn send_frames(
    space: &Space,
    interface: &str,
    frames: impl IntoIterator<Item = impl AsRef<[u8]>, IntoIter: Send> + Send,
) {
    space.enter(|| {
        let socket = frame_socket();
        let address = every_frame(interface);
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        for frame in frames {
            let frame = frame.as_ref();
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
        }
    });
}

fn frame_socket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Packet, SockType::Raw, flags, None).expect("a packet socket can be made")
}

/// All frames of an interface, as an address.
fn every_frame(interface: &str) -> libc::sockaddr_ll {
    let index = nix::net::if_::if_nametoindex(interface).expect("the interface is there");
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    }
}

/// The frames of an interface, from now on.
pub struct Frames(OwnedFd);

impl Frames {
    /// Begins to keep what comes and goes there.
    pub fn of(space: &Space, interface: &str) -> Self {
        space.enter(|| {
            let socket = frame_socket();
            let address = every_frame(interface);
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: the address is valid for the length given, and lives during the call.
            let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
            assert_eq!(bound, 0, "{interface}: {}", std::io::Error::last_os_error());
            fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("it waits for nothing");
            Self(socket)
        })
    }

    /// Those that have come since this was asked last.
    pub fn take(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut room = vec![0; 65536];
        while let Ok(length) = nix::unistd::read(&self.0, &mut room) {
            frames.push(room[..length].to_vec());
        }
        frames
    }
}
