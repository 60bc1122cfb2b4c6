//! Packets that skip the stack: on a node, into the tunnel and out of it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Command;

use netctl::kernel::ebpf::{ADDRESS_CONTAINER, FastPath, Meaning, Place, Range, TunnelEnd, Way, index};

use crate::ground::{
    DEVICE, DROP, FAMILIES, Family, Ground, NETWORK, OTHER, PASS, REDIRECT, address, soon,
};
use crate::packet::{ACK, CONTAINER, Packet, SANDBOX, SCTP, SYN, TCP, UDP, checksum};

const PORT: u16 = 4789;
/// The Ethernet addresses of the tunnel's ends, and of a container.
const NEAR: [u8; 6] = [2, 0, 0, 0, 1, 1];
const FAR: [u8; 6] = [2, 0, 0, 0, 1, 2];
const BOX: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// What a packet has at most on its way.
const MTU: u32 = 1450;
/// Nobody asks which device it is: a test run redirects nothing.
const CROSSING: u32 = 77;

/// This node and the other, by their underlay addresses.
pub const UNDERLAYS: [[&str; 2]; 2] = [["192.168.50.1", "192.168.50.2"], ["fd00:50::1", "fd00:50::2"]];

/// Another container of this node, of each family.
pub fn neighbour(family: Family) -> &'static str {
    if family.client.contains(':') { "fd00:9::6" } else { "10.9.0.6" }
}

/// A node whose client reaches another container by a device, and a block of addresses by the tunnel.
pub fn ground(underlay: [&str; 2]) -> (Ground, FastPath) {
    let ground = Ground::new(64);
    let end = TunnelEnd { address: underlay[0].parse().unwrap(), port: PORT };
    let path = ground.ebpf.load_path(end).unwrap();
    let maps = ground.ebpf.maps();
    for family in FAMILIES {
        for (container, device, mac) in
            [(family.client, DEVICE, CONTAINER), (neighbour(family), OTHER, BOX)]
        {
            let (place, interface) = (place(container), index(device).unwrap());
            let meaning = Meaning {
                kind: ADDRESS_CONTAINER,
                interface,
                mtu: MTU,
                crossing: CROSSING,
                mac,
                balances: 1,
            };
            maps.addresses.insert(&place, &meaning).unwrap();
        }
        let range = if family.client.contains(':') { "fd00:9:1::/120" } else { "10.9.1.0/24" };
        maps.ways.insert(&Range::new(NETWORK, range.parse().unwrap()), &way(underlay)).unwrap();
    }
    (ground, path)
}

fn way([local, remote]: [&str; 2]) -> Way {
    let (local, remote) = (address(local), address(remote));
    let (local_mac, remote_mac) = (NEAR, FAR);
    Way {
        local,
        remote,
        local_mac,
        remote_mac,
        mtu: MTU,
        crossing: CROSSING,
        port: PORT.into(),
        zero: 0,
    }
}

fn place(text: &str) -> Place {
    Place::new(NETWORK, address(text))
}

/// A frame as it is one router later.
fn aged(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[12..14] == [8, 0] {
        frame[22] -= 1;
        frame[24..26].copy_from_slice(&[0, 0]);
        let sum = checksum(&[&frame[14..34]]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[21] -= 1;
    }
    frame
}

/// A frame from one Ethernet address to another.
fn between(to: [u8; 6], from: [u8; 6], frame: &[u8]) -> Vec<u8> {
    [&to, &from, &frame[12..]].concat()
}

/// What the node writes before a frame: all but the port that a flow draws, the number of the packet and
/// the checksum of the outer header, which must be right.
#[track_caller]
fn is_in_the_tunnel(outer: &[u8], underlay: [&str; 2], inner: &[u8]) {
    let [local, remote]: [IpAddr; 2] = underlay.map(|text| text.parse().unwrap());
    let header = if local.is_ipv4() { 20 } else { 40 };
    let (ip, udp) = (&outer[14..14 + header], &outer[14 + header..]);
    let length = (inner.len() + 16) as u16;
    match (local, remote) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            assert_eq!(outer[12..14], [8, 0]);
            assert_eq!(checksum(&[ip]), 0, "{ip:x?}");
            assert_eq!((ip[0], ip[1], ip[8], ip[9]), (0x45, 0, 64, 17), "{ip:x?}");
            assert_eq!(ip[2..4], (length + 20).to_be_bytes());
            assert_eq!(ip[6..8], [0, 0], "no fragment, and it may be cut");
            assert_eq!([&ip[12..16], &ip[16..20]], [local.octets(), remote.octets()]);
        }
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            assert_eq!(outer[12..14], [0x86, 0xdd]);
            assert_eq!(ip[..4], [0x60, 0, 0, 0]);
            assert_eq!(ip[4..6], length.to_be_bytes());
            assert_eq!(ip[6..8], [17, 64]);
            assert_eq!([&ip[8..24], &ip[24..40]], [local.octets(), remote.octets()]);
        }
        _ => panic!("ends of two families"),
    }
    assert!(u16::from_be_bytes([udp[0], udp[1]]) >= 0xc000);
    assert_eq!(udp[2..4], PORT.to_be_bytes());
    assert_eq!(udp[4..6], length.to_be_bytes());
    assert_eq!(udp[6..8], [0, 0], "no checksum");
    assert_eq!(udp[8..12], [8, 0, 0, 0]);
    assert_eq!(udp[12..16], (NETWORK << 8).to_be_bytes());
    assert_eq!(udp[16..], *inner);
}

/// A frame that has come from the other node.
pub fn arrived(underlay: [&str; 2], inner: &[u8]) -> Vec<u8> {
    let [here, there] = underlay;
    let inner = between(NEAR, FAR, inner);
    let mut datagram = Packet::new(UDP, (there, 0xc123), (here, PORT));
    datagram.no_checksum = true;
    datagram.data = [&[8, 0, 0, 0], &(NETWORK << 8).to_be_bytes()[..], &inner].concat();
    datagram.bytes()
}

pub fn send(ground: &Ground, frame: &[u8]) -> (i32, Vec<u8>) {
    ground.programs.run("netctl_from", DEVICE, frame).unwrap()
}

pub fn arrive(path: &FastPath, frame: &[u8]) -> (i32, Vec<u8>) {
    path.from_wire.run("netctl_wire_in", DEVICE, frame).unwrap()
}

pub fn what_is_for_another_node_enters_the_tunnel() {
    for underlay in UNDERLAYS {
        let (ground, _) = ground(underlay);
        for family in FAMILIES {
            for packet in [
                Packet::tcp(SYN, (family.client, 4000), (family.backends[0], 80)),
                Packet::new(UDP, (family.client, 4000), (family.backends[1], 53)),
            ] {
                let frame = packet.bytes();
                let (verdict, outer) = send(&ground, &frame);
                assert_eq!(verdict, REDIRECT, "{packet:?}");
                is_in_the_tunnel(&outer, underlay, &between(FAR, NEAR, &aged(&frame)));
            }
        }
    }
}

pub fn connections_have_source_ports_of_their_own_in_the_tunnel() {
    for (at, underlay) in UNDERLAYS.into_iter().enumerate() {
        let (ground, _) = ground(underlay);
        let begin = 14 + if at == 0 { 20 } else { 40 };
        for family in FAMILIES {
            let port = |client: u16, server: u16| {
                let packet = Packet::new(UDP, (family.client, client), (family.backends[1], server));
                let (verdict, outer) = send(&ground, &packet.bytes());
                assert_eq!(verdict, REDIRECT, "{packet:?}");
                [outer[begin], outer[begin + 1]]
            };
            assert_eq!(port(4000, 53), port(4000, 53), "a connection keeps its own");
            let of_clients: BTreeSet<_> = (4000..4064).map(|client| port(client, 53)).collect();
            let of_servers: BTreeSet<_> = (4000..4064).map(|server| port(4000, server)).collect();
            // Of 16,384: few meet.
            assert!(of_clients.len() > 56 && of_servers.len() > 56, "{of_clients:?} {of_servers:?}");
            let ways = |ports: &BTreeSet<[u8; 2]>| {
                ports.iter().map(|port| port[1] % 8).collect::<BTreeSet<_>>().len()
            };
            assert_eq!(
                (ways(&of_clients), ways(&of_servers)),
                (8, 8),
                "several ways of the host's are all used"
            );
        }
    }
}

pub fn a_balanced_packet_enters_the_tunnel_with_its_backends_address() {
    let (ground, path) = ground(UNDERLAYS[0]);
    for family in FAMILIES {
        ground.web(family);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (verdict, outer) = send(&ground, &syn.bytes());
        assert_eq!(verdict, REDIRECT);
        let inner = Packet::read(&outer[50..]);
        assert!(family.backends.contains(&inner.destination.to_string().as_str()), "{inner:?}");
        assert_eq!(inner.destination_port, 8080);
        // Its answer is the service's when it leaves the tunnel.
        let answer = inner.back(SYN | ACK);
        let outer = arrived(UNDERLAYS[0], &answer.bytes());
        let (verdict, frame) = arrive(&path, &outer);
        // Before Linux 6.3 a packet of the other family is the kernel's.
        if family.client.contains(':') && verdict == PASS {
            assert_eq!(frame, outer);
            continue;
        }
        assert_eq!(verdict, REDIRECT);
        let expected = Packet { is_back: false, ..syn.back(SYN | ACK) };
        let read = Packet { is_back: false, ..Packet::read(&frame) };
        assert_eq!(read, expected);
    }
}

pub fn what_comes_by_the_tunnel_leaves_it() {
    for (at, underlay) in UNDERLAYS.into_iter().enumerate() {
        let (_ground, path) = ground(underlay);
        for (number, family) in FAMILIES.into_iter().enumerate() {
            let packet = Packet::tcp(ACK, (family.backends[0], 80), (family.client, 4000));
            let frame = arrived(underlay, &packet.bytes());
            let (verdict, inner) = arrive(&path, &frame);
            // Before Linux 6.3 a packet of the other family is the kernel's.
            if at != number && verdict == PASS {
                assert_eq!(inner, frame);
                continue;
            }
            assert_eq!(verdict, REDIRECT, "{packet:?} by {underlay:?}");
            assert_eq!(inner, between(CONTAINER, NEAR, &aged(&packet.bytes())));
        }
    }
}

pub fn what_the_other_end_may_not_send_passes_as_it_is() {
    for (at, underlay) in UNDERLAYS.into_iter().enumerate() {
        let family = FAMILIES[at];
        let (ground, path) = ground(underlay);
        let header = if at == 0 { 20 } else { 40 };
        let packet = Packet::tcp(ACK, (family.backends[0], 80), (family.client, 4000));
        let right = arrived(underlay, &packet.bytes());
        assert_eq!(arrive(&path, &right).0, REDIRECT);
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = right.clone();
            change(&mut frame);
            frame
        };
        let ip = 14;
        let udp = ip + header;
        let inner = udp + 16 + 14;
        let source = if at == 0 { ip + 15 } else { ip + 23 };
        let destination = if at == 0 { ip + 19 } else { ip + 39 };
        let inner_source = if at == 0 { inner + 14 } else { inner + 21 };
        let inner_destination = if at == 0 { inner + 19 } else { inner + 39 };
        let wrong: [(&str, Vec<u8>); 12] = [
            ("from a node that does not have the address", changed(&|f| f[source] += 1)),
            ("to another address of the host", changed(&|f| f[destination] += 1)),
            ("to another port", changed(&|f| f[udp + 3] += 1)),
            ("no network's number", changed(&|f| f[udp + 8] = 0)),
            ("other flags", changed(&|f| f[udp + 8] = 0x88)),
            ("another network", changed(&|f| f[udp + 14] += 1)),
            ("from an address that nobody has", changed(&|f| f[inner_source] += 1)),
            ("to an address that nobody has here", changed(&|f| f[inner_destination] = 99)),
            ("at the end of its time", changed(&|f| f[inner + if at == 0 { 8 } else { 7 }] = 1)),
            ("to another machine", changed(&|f| f[5] += 1)),
            ("marked by a router", changed(&|f| f[ip + 1] |= if at == 0 { 3 } else { 0x30 })),
            ("cut off", right[..inner + 10].to_vec()),
        ];
        for (what, frame) in wrong {
            assert_eq!(arrive(&path, &frame), (PASS, frame.clone()), "{what}: {underlay:?}");
        }
        let mut long = packet.clone();
        long.data = vec![0; MTU as usize];
        let long = arrived(underlay, &long.bytes());
        assert_eq!(arrive(&path, &long), (PASS, long.clone()), "longer than the container takes");
        let error = Packet::error(family.backends[0], family.client, (3, 3), &packet.back(ACK).bytes());
        let error = arrived(underlay, &error.bytes());
        assert_eq!(arrive(&path, &error), (PASS, error.clone()), "an error");
        let (maps, container) = (ground.ebpf.maps(), place(family.client));
        let meaning = maps.addresses.get(&container).unwrap().unwrap();
        maps.addresses.insert(&container, &Meaning { crossing: 0, ..meaning }).unwrap();
        // It goes on as it did until somebody says so, or what was found out holds no longer.
        let passed = soon(|| Some(arrive(&path, &right)).filter(|(verdict, _)| *verdict == PASS));
        assert_eq!(passed.1, right, "no way into the sandbox");
        maps.addresses.insert(&container, &meaning).unwrap();
        assert_eq!(arrive(&path, &right).0, REDIRECT);
        maps.addresses.remove(&container).unwrap();
        maps.changed().unwrap();
        assert_eq!(arrive(&path, &right), (PASS, right.clone()), "to nobody");
    }
}

pub fn containers_of_one_node_reach_each_other() {
    let (ground, _) = ground(UNDERLAYS[0]);
    for family in FAMILIES {
        let packet = Packet::tcp(SYN, (family.client, 4000), (neighbour(family), 80));
        let frame = packet.bytes();
        let (verdict, sent) = send(&ground, &frame);
        assert_eq!((verdict, sent), (REDIRECT, between(BOX, SANDBOX, &aged(&frame))));
        // Also as the backend of a service, whose answers are the service's.
        let mut backend = crate::ground::backend(neighbour(family), 8080);
        backend.front = 1;
        let front = crate::ground::front(family.service, 80, TCP);
        ground.balance(&front, crate::ground::turns(), &[(1, backend)], &[1]);
        let syn = Packet::tcp(SYN, (family.client, 4001), (family.service, 80));
        let (verdict, sent) = send(&ground, &syn.bytes());
        assert_eq!((verdict, &sent[..6]), (REDIRECT, &BOX[..]));
        let answer = Packet::read(&sent).back(SYN | ACK);
        let (verdict, back) =
            ground.programs.run("netctl_from", OTHER, &between(SANDBOX, BOX, &answer.bytes())).unwrap();
        assert_eq!(verdict, REDIRECT);
        assert_eq!(Packet::read(&back), Packet { is_back: true, ..syn.back(SYN | ACK) });
        // Where nothing is balanced nobody looks for its connection.
        let (maps, client) = (ground.ebpf.maps(), place(family.client));
        let meaning = maps.addresses.get(&client).unwrap().unwrap();
        maps.addresses.insert(&client, &Meaning { balances: 0, ..meaning }).unwrap();
        maps.changed().unwrap();
        let answer_frame = between(SANDBOX, BOX, &answer.bytes());
        let back = || {
            let (verdict, back) = ground.programs.run("netctl_from", OTHER, &answer_frame).unwrap();
            assert_eq!(verdict, REDIRECT);
            Packet::read(&back).source
        };
        assert_eq!(back(), answer.source);
        // With the first service of a network somebody does, at once.
        maps.addresses.insert(&client, &Meaning { balances: 1, ..meaning }).unwrap();
        maps.changed().unwrap();
        assert_eq!(back().to_string(), family.service);
    }
}

pub fn what_needs_the_kernel_passes_as_it_is() {
    let (ground, _) = ground(UNDERLAYS[0]);
    for family in FAMILIES {
        let is_ipv4 = !family.client.contains(':');
        for to in [family.backends[0], neighbour(family)] {
            let packet = Packet::new(UDP, (family.client, 4000), (to, 80));
            assert_eq!(send(&ground, &packet.bytes()).0, REDIRECT);
            let changed = |at: usize, value: u8| {
                let mut frame = packet.bytes();
                frame[at] = value;
                frame
            };
            let other = |packet: Packet| packet.bytes();
            let from = |source| other(Packet::new(UDP, (source, 4000), (to, 80)));
            let fragment = Packet { fragment: Some((7, 0, true)), ..packet.clone() };
            let mut long = packet.clone();
            long.data = vec![0; MTU as usize];
            for (what, frame) in [
                ("at the end of its time", changed(if is_ipv4 { 22 } else { 21 }, 1)),
                ("to another machine", changed(5, 9)),
                ("from another's address", from(neighbour(family))),
                ("from nobody's", from(family.backends[2])),
                ("a fragment", other(fragment)),
                ("SCTP", other(Packet::new(SCTP, (family.client, 4000), (to, 80)))),
                ("a protocol without ports", other(Packet::new(50, (family.client, 0), (to, 0)))),
                ("longer than the way takes", other(long)),
            ] {
                assert_eq!(send(&ground, &frame), (PASS, frame.clone()), "{what}, to {to}");
            }
            let (verdict, _) = ground.programs.run("netctl_from", OTHER, &packet.bytes()).unwrap();
            assert_eq!(verdict, PASS, "by another's device");
        }
        for to in [family.client, family.gateway] {
            let frame = Packet::new(UDP, (family.client, 4000), (to, 80)).bytes();
            assert_eq!(send(&ground, &frame), (PASS, frame.clone()), "to {to}");
        }
        // The kernel says that nobody has an address, also within a range that another node has.
        let single = format!("{}/{}", family.backends[2], if is_ipv4 { 32 } else { 128 });
        let single = Range::new(NETWORK, single.parse().unwrap());
        ground.ebpf.maps().ways.insert(&single, &Way::none()).unwrap();
        let frame = Packet::new(UDP, (family.client, 4000), (family.backends[2], 80)).bytes();
        assert_eq!(send(&ground, &frame), (PASS, frame.clone()));
    }
}

pub fn the_tunnel_leaves_by_the_hosts_routes_or_not_at_all() {
    for (at, underlay) in UNDERLAYS.into_iter().enumerate() {
        let (ground, path) = ground(underlay);
        let frame = Packet::new(UDP, (underlay[0], 0xc001), (underlay[1], PORT)).bytes();
        let out = || path.to_wire.run("netctl_wire_out", DEVICE, &frame).unwrap().0;
        assert_eq!((out(), ground.event(4)), (DROP, 1), "no route");
        let width = if at == 0 { 32 } else { 128 };
        let route = format!("ip route add {}/{width} dev {OTHER}", underlay[1]);
        assert!(Command::new("sh").args(["-c", &route]).status().unwrap().success());
        // The kernel asks for the neighbour, which nobody knows yet.
        assert_eq!((out(), ground.event(4)), (REDIRECT, 1));
    }
}
