//! Counters, by connections that are really made.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use netctl::kernel::ipvs::{Change, DestinationState, Ipvs, Rates, Service, Stats};

use crate::world::{REAL, VIRTUAL, apply, eventually, masqueraded, open, round_robin, sh, tcp};

/// A service with one real server, which is here as well.
struct Balanced {
    ipvs: Ipvs,
    server: TcpListener,
}

impl Balanced {
    fn new(service: Service) -> Self {
        let mut ipvs = open();
        let server = TcpListener::bind((REAL, 8080)).unwrap();
        let destination = masqueraded(REAL, 8080);
        let key = service.key;
        apply(
            &mut ipvs,
            &[Change::AddService(service), Change::AddDestination { service: key, destination }],
        );
        Self { ipvs, server }
    }

    /// A connection through the service, with its other end; some bytes have passed both ways.
    fn connect(&self) -> (TcpStream, TcpStream) {
        let mut client = TcpStream::connect((VIRTUAL, 80)).unwrap();
        let (mut server, _) = self.server.accept().unwrap();
        client.write_all(b"question").unwrap();
        server.read_exact(&mut [0; 8]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        (client, server)
    }

    fn service(&mut self) -> Stats {
        self.ipvs.service(&tcp(VIRTUAL, 80)).unwrap().unwrap().stats
    }

    fn destination(&mut self) -> DestinationState {
        self.ipvs.destinations(&tcp(VIRTUAL, 80)).unwrap()[0]
    }
}

/// The last numbers of the line that begins so, of what `ipvsadm -Ln …` prints.
fn numbers(options: &str, begin: &str, count: usize) -> Vec<u64> {
    let text = sh(&format!("ipvsadm -Ln {options}"));
    let line = text.lines().find(|line| line.trim_start().starts_with(begin)).expect("it is printed");
    let words: Vec<_> = line.split_whitespace().collect();
    words[words.len() - count..].iter().map(|word| word.parse().unwrap()).collect()
}

fn counters(stats: Stats) -> [u64; 5] {
    let Stats {
        connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes, ..
    } = stats;
    [connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes]
}

pub fn connections_are_counted_and_forgotten() {
    let mut balanced = Balanced::new(round_robin(tcp(VIRTUAL, 80)));
    let open: Vec<_> = (0..3).map(|_| balanced.connect()).collect();
    // The last acknowledgements are still under way, and the kernel sums its counters up every two
    // seconds.
    let (of_service, of_destination) = eventually("the counters agree with ipvsadm's", || {
        let (service, destination) = (balanced.service(), balanced.destination());
        let printed = numbers("--stats --exact", "TCP", 5);
        let printed_too = numbers("--stats --exact", "-> 10.7.0.2", 5);
        let agree = counters(service)[..] == printed && counters(destination.stats)[..] == printed_too;
        let all = service.incoming_packets >= 9 && service.outgoing_packets >= 6;
        (agree && all).then_some((service, destination))
    });
    assert_eq!((of_service.connections, of_destination.stats.connections), (3, 3));
    assert!(of_service.incoming_bytes > of_service.incoming_packets * 40, "{of_service:?}");
    assert!(of_service.outgoing_bytes > of_service.outgoing_packets * 40, "{of_service:?}");
    assert_eq!((of_destination.active, of_destination.inactive, of_destination.persistent), (3, 0, 0));

    drop(open);
    eventually("the closed connections are inactive", || {
        let state = balanced.destination();
        (state.active == 0 && state.inactive == 3).then_some(())
    });
    apply(&mut balanced.ipvs, &[Change::Zero(tcp(VIRTUAL, 80))]);
    assert_eq!((counters(balanced.service()), counters(balanced.destination().stats)), ([0; 5], [0; 5]));
    drop(balanced.connect());
    eventually("it counts on", || (balanced.service().connections == 1).then_some(()));
    apply(&mut balanced.ipvs, &[Change::ZeroAll]);
    assert_eq!(balanced.service().connections, 0);
}

pub fn rates_are_told() {
    let mut balanced = Balanced::new(round_robin(tcp(VIRTUAL, 80)));
    let rates = |rates: Rates| {
        let Rates { connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes } =
            rates;
        [connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes]
    };
    let told = eventually("rates that ipvsadm prints as well", || {
        drop(balanced.connect());
        let told = rates(balanced.service().rates);
        let printed = numbers("--rate", "TCP", 5);
        (told[..] == printed && told.iter().all(|rate| *rate > 0)).then_some(told)
    });
    let [connections, incoming_packets, _, incoming_bytes, _] = told;
    assert!(incoming_packets > connections && incoming_bytes > incoming_packets, "{told:?}");
}

pub fn a_persistent_client_is_counted() {
    let mut balanced = Balanced::new(round_robin(tcp(VIRTUAL, 80)).persistent(300));
    let _open = (balanced.connect(), balanced.connect());
    let state = eventually("both are active", || {
        let state = balanced.destination();
        (state.active == 2).then_some(state)
    });
    assert_eq!(state.persistent, 1);
    assert_eq!(numbers("--persistent-conn", "-> 10.7.0.2", 4), [1, 1, 2, 0]);
}
