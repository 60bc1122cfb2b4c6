//! What containers' sockets get when they ask for services. The kernel runs these programs for real calls only,
//! so the tests make them, in a control group of their own.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytemuck::Zeroable as _;
use netctl::kernel::ebpf::{
    ADDRESS_OUTSIDE, Front, Meaning, Membership, Namespace, POINT_SOCKET, Place, Reports,
    SCHEDULER_HASH, SCHEDULER_LEAST, SOCKET_OPEN, Sockets, VERDICT_CARRIED, VERDICT_DROPPED,
};
use netctl::kernel::{Netns, end_connections};

use crate::ground::{FAMILIES, Family, Ground, NETWORK, address, backend, front, soon, turns};
use crate::group::Group;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// The backends' ports.
const PORTS: [u16; 3] = [8080, 8081, 8082];
/// How long a call may take.
const LONG: Duration = Duration::from_secs(10);

/// A container with addresses of its own and those of the backends, whose sockets are asked.
struct Container {
    ground: Ground,
    sockets: Sockets,
    group: Group,
}

impl Container {
    fn new() -> Self {
        let (ground, group) = (Ground::new(64), Group::enter());
        for family in FAMILIES {
            for address in family.backends.iter().chain([&family.client]) {
                let output =
                    Command::new("ip").args(["addr", "add", address, "dev", "lo"]).output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
        }
        let sockets = ground.ebpf.ask_sockets(&group.path).unwrap();
        let container = Self { ground, sockets, group };
        container.is_in(&[NETWORK]);
        container
    }

    /// It is in these networks, with the same addresses.
    fn is_in(&self, networks: &[u32]) {
        let [v4, v6] = FAMILIES.map(|family| address(family.client));
        let mut all = Namespace::zeroed();
        for (place, network) in all.0.iter_mut().zip(networks) {
            *place = Membership { network: *network, zero: 0, ipv4: v4, ipv6: v6 };
        }
        self.sockets.maps().namespaces.insert(&here(), &all).unwrap();
    }

    /// Balances port 80 of a family's service to its backends' ports, with the numbers 1 to 3.
    fn balances(&self, family: Family, protocol: u8, front_of: Front) {
        let backends = [1, 2, 3].map(|number| {
            let at = number as usize - 1;
            (number, backend(family.backends[at], PORTS[at]))
        });
        self.ground.balance(&front(family.service, 80, protocol), front_of, &backends, &[1, 2, 3]);
    }

    /// What sockets have of TCP, by their states.
    fn states(&self) -> Vec<u32> {
        self.sockets.maps().sockets.entries().unwrap().iter().map(|(_, socket)| socket.state).collect()
    }

    fn open(&self, number: u32) -> u32 {
        self.ground.ebpf.maps().backends.get(&number).unwrap().unwrap().open
    }
}

/// The number of the test's namespace.
fn here() -> u64 {
    Netns::current().unwrap().cookie().unwrap()
}

fn socket_of(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Who listens at each of a family's backends.
fn listeners(family: Family) -> [TcpListener; 3] {
    [0, 1, 2].map(|at| TcpListener::bind(socket_of(family.backends[at], PORTS[at])).unwrap())
}

/// Connects to a service; gives the connection, and which of the backends has it.
#[track_caller]
fn connect(service: SocketAddr, listeners: &[TcpListener]) -> (TcpStream, usize) {
    let stream = TcpStream::connect_timeout(&service, LONG).unwrap();
    let local = stream.local_addr().unwrap();
    for (at, listener) in listeners.iter().enumerate() {
        listener.set_nonblocking(true).unwrap();
        match listener.accept() {
            Ok((_, peer)) => {
                assert_eq!(
                    (peer.ip().to_canonical(), peer.port()),
                    (local.ip().to_canonical(), local.port())
                );
                return (stream, at);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no backend has the connection to {service}");
}

#[track_caller]
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn who_connects_to_a_service_has_a_backend_and_sees_the_service() {
    let container = Container::new();
    for family in FAMILIES {
        container.balances(family, TCP, turns());
        let listeners = listeners(family);
        let service = socket_of(family.service, 80);
        let (mut streams, mut got) = (Vec::new(), Vec::new());
        for _ in 0..6 {
            let (stream, at) = connect(service, &listeners);
            assert_eq!(stream.peer_addr().unwrap(), service);
            streams.push(stream);
            got.push(at);
        }
        got.sort_unstable();
        assert_eq!(got, [0, 0, 1, 1, 2, 2], "{}", family.service);
        assert_eq!(container.ground.counts(1).connections, 2);
        // No packet is balanced, so there is no entry for any.
        assert_eq!(container.ground.connections(), []);
        drop(streams);
        wait_for("all are known to have ended", || container.states().is_empty());
    }
}

pub fn who_connects_to_a_mapped_address_has_a_backend_too() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, TCP, turns());
    let listeners = listeners(family);
    let IpAddr::V4(service) = family.service.parse().unwrap() else { unreachable!() };
    let mapped = SocketAddr::new(service.to_ipv6_mapped().into(), 80);
    let (stream, _) = connect(mapped, &listeners);
    assert_eq!(stream.peer_addr().unwrap(), mapped);
}

pub fn who_is_not_a_container_of_the_network_is_not_asked() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, TCP, turns());
    let _listeners = listeners(family);
    let service = socket_of(family.service, 80);
    let is_refused = || TcpStream::connect_timeout(&service, LONG).is_err();
    let place = Place::new(NETWORK, address(family.service));
    // The service is no address of anybody's, and there is no route to it.
    for networks in [&[][..], &[NETWORK + 1], &[NETWORK + 1, NETWORK + 2]] {
        container.is_in(networks);
        assert!(is_refused(), "{networks:?}");
    }
    let eight: Vec<u32> = (1..8).chain([NETWORK]).collect();
    container.is_in(&eight);
    assert!(!is_refused(), "it is the last of as many as there can be");
    container.sockets.maps().namespaces.remove(&here()).unwrap();
    assert!(is_refused());
    container.is_in(&[NETWORK]);
    assert!(!is_refused());
    let addresses = &container.ground.ebpf.maps().addresses;
    addresses.insert(&place, &Meaning::of(ADDRESS_OUTSIDE)).unwrap();
    assert!(is_refused(), "a service that is outside of the overlay has its packets balanced");
}

pub fn what_is_no_service_is_connected_as_it_is() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, TCP, turns());
    let listeners = listeners(family);
    let direct = socket_of(family.backends[1], PORTS[1]);
    let (stream, at) = connect(direct, &listeners);
    assert_eq!((stream.peer_addr().unwrap(), at), (direct, 1));
    assert!(container.states().is_empty());
    // Another port, and UDP that is connected.
    assert!(TcpStream::connect_timeout(&socket_of(family.service, 81), LONG).is_err());
    container.balances(family, UDP, turns());
    let socket = UdpSocket::bind((family.client, 0)).unwrap();
    assert!(socket.connect((family.service, 80)).is_err(), "there is no route");
}

pub fn a_socket_gets_its_backend_by_the_scheduler() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    let listeners = listeners(family);
    let service = socket_of(family.service, 80);
    let several = |count: usize| -> Vec<(TcpStream, usize)> {
        (0..count).map(|_| connect(service, &listeners)).collect()
    };
    let distinct =
        |got: &[(TcpStream, usize)]| got.iter().map(|(_, at)| *at).collect::<BTreeSet<_>>().len();
    // One client is one, by whichever ports.
    container.balances(family, TCP, Front { scheduler: SCHEDULER_HASH, ..turns() });
    assert_eq!(distinct(&several(6)), 1);
    container.balances(family, TCP, Front { affinity: 60, ..turns() });
    assert_eq!(distinct(&several(6)), 1);
    wait_for("all are known to have ended", || container.states().is_empty());
    container.balances(family, TCP, Front { scheduler: SCHEDULER_LEAST, ..turns() });
    let three = several(3);
    assert_eq!(distinct(&three), 3);
    let (first, left): (Vec<_>, Vec<_>) = three.into_iter().partition(|(_, at)| *at == 1);
    drop(first);
    wait_for("it has one connection less", || container.open(2) == 0);
    let (_next, at) = connect(service, &listeners);
    assert_eq!(at, 1, "it has the fewest");
    drop(left);
    // Datagrams count too.
    let (backends, to) = (udp_backends(family), socket_of(family.service, 80));
    container.balances(family, UDP, Front { scheduler: SCHEDULER_LEAST, ..turns() });
    let clients = [0, 1, 2].map(|_| UdpSocket::bind((family.client, 0)).unwrap());
    let got: BTreeSet<usize> = clients.iter().map(|client| ask(client, to, &backends).0).collect();
    assert_eq!(got.len(), 3);
}

pub fn what_becomes_of_a_connection_is_known_and_its_bytes_are_counted() {
    let container = Container::new();
    let [_, family] = FAMILIES;
    container.balances(family, TCP, turns());
    let listener = TcpListener::bind(socket_of(family.backends[0], PORTS[0])).unwrap();
    let mut stream = TcpStream::connect_timeout(&socket_of(family.service, 80), LONG).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    let (number, socket) = container.sockets.maps().sockets.entries().unwrap()[0];
    assert_eq!((socket.state, socket.number, socket.namespace), (SOCKET_OPEN, 1, here()));
    assert_eq!((socket.service, socket.backend), (address(family.service), address(family.backends[0])));
    assert_eq!(container.open(1), 1);
    stream.write_all(&[1; 3000]).unwrap();
    peer.read_exact(&mut [0; 3000]).unwrap();
    peer.write_all(&vec![2; 50_000]).unwrap();
    stream.read_exact(&mut vec![0; 50_000]).unwrap();
    peer.shutdown(std::net::Shutdown::Both).unwrap();
    wait_for("one side has ended it", || container.states() == [2]);
    assert_eq!(container.sockets.maps().sockets.get(&number).unwrap().unwrap().state, 2);
    drop((stream, peer));
    wait_for("it has ended", || container.states().is_empty());
    assert_eq!(container.open(1), 0);
    let counts = container.ground.counts(1);
    assert!((3000..3010).contains(&counts.incoming_bytes), "{counts:?}");
    assert!((50_000..50_010).contains(&counts.outgoing_bytes), "{counts:?}");
    assert!(counts.incoming_packets > 2 && counts.outgoing_packets > 2, "{counts:?}");
    // Nobody listens at the next backend.
    assert!(TcpStream::connect_timeout(&socket_of(family.service, 80), LONG).is_err());
    assert_eq!((container.states().len(), container.open(2)), (0, 0));
}

pub fn an_ended_connection_is_told_and_without_backends_nothing_is_changed() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, TCP, turns());
    let listeners = listeners(family);
    let service = socket_of(family.service, 80);
    let first = TcpStream::connect_timeout(&service, LONG).unwrap();
    let _peer = listeners[0].accept().unwrap();
    let ended = end_connections(&Netns::current().unwrap(), &numbers(&container)).unwrap();
    assert_eq!(ended, 1);
    let error = (&first).read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    assert!(container.states().is_empty());
    let none = end_connections(&Netns::current().unwrap(), &BTreeSet::from([1, 2])).unwrap();
    assert_eq!(none, 0);
    // Without backends the socket gets what it asks for.
    let empty = Front { slots: 0, ..turns() };
    container.ground.ebpf.maps().fronts.insert(&front(family.service, 80, TCP), &empty).unwrap();
    assert!(TcpStream::connect_timeout(&service, LONG).is_err());
    assert!(container.states().is_empty());
}

fn numbers(container: &Container) -> BTreeSet<u64> {
    container.sockets.maps().sockets.entries().unwrap().into_iter().map(|(number, _)| number).collect()
}

/// Sends a datagram to a service; gives which backend got it, and from where its answer came.
#[track_caller]
fn ask(client: &UdpSocket, service: SocketAddr, backends: &[UdpSocket]) -> (usize, SocketAddr) {
    client.set_read_timeout(Some(LONG)).unwrap();
    client.send_to(b"question", service).unwrap();
    let mut buffer = [0; 16];
    for (at, backend) in backends.iter().enumerate() {
        backend.set_nonblocking(true).unwrap();
        match backend.recv_from(&mut buffer) {
            Ok((_, peer)) => {
                backend.send_to(b"answer", peer).unwrap();
                let (_, from) = client.recv_from(&mut buffer).unwrap();
                return (at, from);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no backend has what was sent to {service}");
}

fn udp_backends(family: Family) -> [UdpSocket; 3] {
    [0, 1, 2].map(|at| UdpSocket::bind(socket_of(family.backends[at], PORTS[at])).unwrap())
}

pub fn what_is_sent_to_a_service_is_answered_by_it() {
    let container = Container::new();
    for family in FAMILIES {
        container.balances(family, UDP, turns());
        let (backends, service) = (udp_backends(family), socket_of(family.service, 80));
        let mut got = BTreeSet::new();
        for _ in 0..3 {
            let client = UdpSocket::bind((family.client, 0)).unwrap();
            let first = ask(&client, service, &backends);
            assert_eq!(first.1, service);
            // A socket stays with its backend.
            for _ in 0..3 {
                assert_eq!(ask(&client, service, &backends), first);
            }
            got.insert(first.0);
        }
        assert_eq!(got.len(), 3, "each socket got another");
        assert_eq!(container.ground.counts(1).connections, 1);
    }
    // An address of IPv4 from a socket of IPv6.
    let [family, _] = FAMILIES;
    container.balances(family, UDP, turns());
    let client = UdpSocket::bind("[::]:0").unwrap();
    let IpAddr::V4(service) = family.service.parse().unwrap() else { unreachable!() };
    let mapped = SocketAddr::new(service.to_ipv6_mapped().into(), 80);
    assert_eq!(ask(&client, mapped, &udp_backends(family)).1, mapped);
}

pub fn a_socket_leaves_a_backend_that_is_gone() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, UDP, turns());
    let (backends, service) = (udp_backends(family), socket_of(family.service, 80));
    let client = UdpSocket::bind((family.client, 0)).unwrap();
    let (first, _) = ask(&client, service, &backends);
    let maps = container.ground.ebpf.maps();
    let gone = first as u32 + 1;
    let left: Vec<u32> = (1..=3).filter(|number| *number != gone).collect();
    let (value, _) = turns().with_slots(&left);
    maps.fronts.insert(&front(family.service, 80, UDP), &value).unwrap();
    // One that takes no new connections keeps those that it has.
    assert_eq!(ask(&client, service, &backends), (first, service));
    maps.backends.remove(&gone).unwrap();
    let (next, from) = ask(&client, service, &backends);
    assert!(next != first && from == service);
    // What the first one still sends comes from the service, too.
    backends[first].send_to(b"late", client.local_addr().unwrap()).unwrap();
    assert_eq!(client.recv_from(&mut [0; 8]).unwrap().1, service);
    // Silence ends it as any other flow.
    for (key, mut datagram) in container.sockets.maps().datagrams.entries().unwrap() {
        datagram.seen = datagram.seen.wrapping_sub(301);
        container.sockets.maps().datagrams.insert(&key, &datagram).unwrap();
    }
    let (third, from) = ask(&client, service, &backends);
    assert!(third != next && from == service, "{third}, {next}");
}

pub fn two_ports_with_the_same_backends_are_told_apart() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    let backends = udp_backends(family);
    container.balances(family, UDP, Front { affinity: 60, ..turns() });
    container.ground.balance(
        &front(family.service, 81, UDP),
        Front { affinity: 60, ..turns() },
        &[],
        &[1, 2, 3],
    );
    let client = UdpSocket::bind((family.client, 0)).unwrap();
    let [first, second] = [80, 81].map(|port| socket_of(family.service, port));
    let (at, _) = ask(&client, first, &backends);
    // The client keeps its backend; but who of the two has answered could not be told.
    let (other, from) = ask(&client, second, &backends);
    assert!(other != at && from == second, "{other}, {from}");
    assert_eq!(ask(&client, first, &backends), (at, first));
    // Where there is no other backend it is refused, as its packets would be.
    let only = [(4, backend(family.backends[at], PORTS[at]))];
    container.ground.balance(&front(family.service, 82, UDP), turns(), &only, &[4]);
    let third = socket_of(family.service, 82);
    let mut reports = Reports::open_in(&container.ground.directory).unwrap();
    reports.want(0, NETWORK, LONG).unwrap();
    let refused = client.send_to(b"question", third).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    assert_eq!(container.ground.event(2), 1);
    let report = reports.take().unwrap();
    assert_eq!((report.point, report.verdict, report.reason), (POINT_SOCKET, VERDICT_DROPPED, 3));
    assert_eq!(ask(&client, first, &backends), (at, first));
    let another = UdpSocket::bind((family.client, 0)).unwrap();
    assert_eq!(ask(&another, third, &backends), (at, third));
}

pub fn what_a_connected_socket_sends_is_left_to_its_packets() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, UDP, turns());
    let (_backends, service) = (udp_backends(family), socket_of(family.service, 80));
    // Here the service's address is somebody's.
    assert!(
        Command::new("ip")
            .args(["addr", "add", family.service, "dev", "lo"])
            .status()
            .unwrap()
            .success()
    );
    let server = UdpSocket::bind(service).unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let client = UdpSocket::bind((family.client, 0)).unwrap();
    client.connect(service).unwrap();
    assert_eq!(client.peer_addr().unwrap(), service);
    client.send_to(b"named again", service).unwrap();
    assert_eq!(server.recv_from(&mut [0; 16]).unwrap().1, client.local_addr().unwrap());
    assert_eq!(container.sockets.maps().datagrams.entries().unwrap().len(), 0);
}

pub fn a_socket_stays_with_its_backend_while_one_of_them_speaks() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, UDP, turns());
    let (backends, service) = (udp_backends(family), socket_of(family.service, 80));
    let client = UdpSocket::bind((family.client, 0)).unwrap();
    let (at, _) = ask(&client, service, &backends);
    let age = |reply: u16, by: u32| {
        let datagrams = &container.sockets.maps().datagrams;
        for (key, mut datagram) in datagrams.entries().unwrap() {
            if key.reply == reply {
                datagram.seen = datagram.seen.wrapping_sub(by);
                datagrams.insert(&key, &datagram).unwrap();
            }
        }
    };
    let tells = || {
        backends[at].send_to(b"news", client.local_addr().unwrap()).unwrap();
        client.recv_from(&mut [0; 8]).unwrap().1
    };
    // It only listens for as long as silence may last.
    age(0, 301);
    age(1, 299);
    assert_eq!(tells(), service);
    age(1, 299);
    assert_eq!((tells(), ask(&client, service, &backends)), (service, (at, service)));
    // After that the two have nothing to do with each other.
    age(0, 301);
    age(1, 301);
    assert_eq!(tells(), socket_of(family.backends[at], PORTS[at]));
    assert!(ask(&client, service, &backends).0 != at);
}

pub fn who_watches_sees_what_a_socket_gets() {
    let container = Container::new();
    let [family, _] = FAMILIES;
    container.balances(family, TCP, turns());
    let listeners = listeners(family);
    let service = socket_of(family.service, 80);
    let mut reports = Reports::open_in(&container.ground.directory).unwrap();
    let _unseen = connect(service, &listeners);
    reports.want(1, NETWORK + 1, LONG).unwrap();
    let _unseen = connect(service, &listeners);
    assert!(reports.take().is_none());
    reports.want(1, NETWORK, LONG).unwrap();
    let (_stream, at) = connect(service, &listeners);
    let report = reports.take().unwrap();
    assert_eq!((report.point, report.verdict, report.reason), (POINT_SOCKET, VERDICT_CARRIED, 0));
    assert_eq!((report.source, report.destination), (address(family.client), address(family.service)));
    assert_eq!((report.translated, report.is_translated), (address(family.backends[at]), 1));
    let ports = (u16::from(report.destination_port), u16::from(report.translated_port));
    assert_eq!((report.protocol, ports), (TCP, (80, PORTS[at])));
    assert!(reports.take().is_none());
}

pub fn they_outlive_who_has_them_asked_and_are_put_back() {
    let Container { ground, mut sockets, group } = Container::new();
    let [family, _] = FAMILIES;
    ground.balance(
        &front(family.service, 80, TCP),
        turns(),
        &[(1, backend(family.backends[0], 8080))],
        &[1],
    );
    let listeners = listeners(family);
    let service = socket_of(family.service, 80);
    let is_asked = || TcpStream::connect_timeout(&service, LONG).is_ok();
    assert_eq!(sockets.mend().unwrap(), 0);
    // Pins that are removed, and then everything.
    let pins = |path: &Path| -> Vec<_> {
        let all = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        all.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("link_")).collect()
    };
    let all = pins(&ground.directory);
    assert_eq!(all.len(), 9);
    std::fs::remove_file(&all[0]).unwrap();
    std::fs::remove_file(ground.directory.join("sockets")).unwrap();
    assert_eq!((sockets.mend().unwrap(), pins(&ground.directory).len()), (2, 9));
    // The next agent, while a socket is connected.
    let (stream, _) = connect(service, &listeners);
    drop(sockets);
    assert!(is_asked());
    let sockets = ground.ebpf.ask_sockets(&group.path).unwrap();
    assert!(is_asked());
    assert_eq!(stream.peer_addr().unwrap(), service, "it was not forgotten");
    assert_eq!(pins(&ground.directory).len(), 9);
    // The group is made anew.
    drop((sockets, stream));
    let mut sockets = ground.ebpf.ask_sockets(&group.path).unwrap();
    assert!(!sockets.has_gap());
    let group = group.again();
    assert!(!is_asked());
    assert_eq!((sockets.mend().unwrap(), sockets.has_gap()), (9, true));
    sockets.close_gap();
    assert_eq!((sockets.mend().unwrap(), sockets.has_gap()), (0, false));
    assert!(is_asked());
    // Another group: this one is not asked any more.
    let other = group.path.join("other");
    std::fs::create_dir(&other).unwrap();
    drop((sockets, ground.ebpf.ask_sockets(&other).unwrap()));
    soon(|| (!is_asked()).then_some(()));
    drop(ground.ebpf.ask_sockets(&group.path).unwrap());
    assert!(is_asked());
    std::fs::remove_dir(&other).unwrap();
    assert!(ground.ebpf.ask_no_sockets().unwrap());
    // The kernel detaches programs whose pins are gone a moment later.
    soon(|| (!is_asked()).then_some(()));
    assert!(!ground.ebpf.ask_no_sockets().unwrap());
    assert_eq!(pins(&ground.directory).len(), 0);
    let error = ground.ebpf.ask_sockets(Path::new("/run")).unwrap_err().to_string();
    assert!(error.contains("cannot use as a control group /run"), "{error}");
}
