//! What the programs tell those who watch.

use std::time::{Duration, Instant};

use netctl::kernel::ebpf::{
    Address, EVENTS, POINT_FROM_CONTAINER, POINT_FROM_WIRE, POINT_TO_CONTAINER, POINT_TO_WIRE,
    REASON_ERROR, Report, Reports, VERDICT_CARRIED, VERDICT_DROPPED, VERDICT_KERNEL, nanoseconds,
};

use crate::ground::{DEVICE, DROP, FAMILIES, Ground, NETWORK, PASS, REDIRECT, address, front, turns};
use crate::packet::{ACK, FIN, Packet, SYN, TCP, UDP};
use crate::path;

/// Long enough for a test.
const LONG: Duration = Duration::from_secs(60);

fn reports(ground: &Ground) -> Reports {
    Reports::open_in(&ground.directory).unwrap()
}

fn all(reports: &mut Reports) -> Vec<Report> {
    std::iter::from_fn(|| reports.take()).collect()
}

/// The only report that there is.
#[track_caller]
fn only(reports: &mut Reports) -> Report {
    let all = all(reports);
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

fn reason(report: &Report) -> Option<&'static str> {
    EVENTS.get(usize::from(report.reason).checked_sub(1)?).copied()
}

/// From where to where, by which protocol.
fn ends(report: &Report) -> ((Address, u16), (Address, u16), u8) {
    let source = (report.source, report.source_port.into());
    (source, (report.destination, report.destination_port.into()), report.protocol)
}

pub fn nobody_is_told_who_does_not_watch() {
    let ground = Ground::new(64);
    let mut reports = reports(&ground);
    let [family, _] = FAMILIES;
    let packet = Packet::tcp(SYN, (family.client, 4000), (family.backends[0], 80));
    let mut told = || {
        ground.send(&packet);
        all(&mut reports).len()
    };
    assert_eq!(told(), 0);
    let again = self::reports(&ground);
    again.want(1, 0, LONG).unwrap();
    assert_eq!((told(), told()), (1, 1));
    again.want(0, 0, Duration::ZERO).unwrap();
    assert_eq!(told(), 0);
    for (network, count) in [(NETWORK + 1, 0), (NETWORK, 1)] {
        again.want(1, network, LONG).unwrap();
        assert_eq!(told(), count, "{network}");
    }
    // Whoever watches says so again and again: one that was killed does not.
    again.want(1, 0, Duration::from_millis(20)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while told() > 0 {
        assert!(Instant::now() < deadline, "it goes on");
    }
}

pub fn what_a_balanced_connection_does_is_told() {
    let ground = Ground::new(64);
    let mut reports = reports(&ground);
    reports.want(1, 0, LONG).unwrap();
    for family in FAMILIES {
        ground.web(family);
        let before = nanoseconds().unwrap();
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        let report = only(&mut reports);
        let (client, service) = ((address(family.client), 4000), (address(family.service), 80));
        assert_eq!(ends(&report), (client, service, TCP));
        assert!((before..=nanoseconds().unwrap()).contains(&report.time));
        let length = syn.bytes().len() as u32 - 14;
        assert_eq!((report.network, report.length, report.tcp_flags), (NETWORK, length, SYN));
        let verdict = (report.point, report.verdict, report.reason);
        assert_eq!(verdict, (POINT_FROM_CONTAINER, VERDICT_KERNEL, 0));
        let backend: Address = sent.destination.into();
        let translated = (report.is_translated, report.translated, report.translated_port.into());
        assert_eq!(translated, (1, backend, 8080_u16));
        // What it is answered comes from the backend, and seems to come from the service.
        ground.answer(&sent.back(SYN | ACK));
        let report = only(&mut reports);
        assert_eq!(ends(&report), ((backend, 8080), client, TCP));
        assert_eq!((report.point, report.tcp_flags), (POINT_TO_CONTAINER, SYN | ACK));
        let translated = (report.is_translated, report.translated, report.translated_port.into());
        assert_eq!(translated, (1, service.0, 80_u16));
    }
}

pub fn what_is_refused_is_told_and_of_the_rest_a_part() {
    let ground = Ground::new(64);
    let mut reports = reports(&ground);
    let [family, _] = FAMILIES;
    ground.balance(&front(family.service, 81, TCP), turns(), &[], &[]);
    let refused = Packet::tcp(SYN, (family.client, 4000), (family.service, 81));
    let other = Packet::new(UDP, (family.client, 4000), (family.backends[0], 53));
    let (end, middle) = (FIN | ACK, ACK);
    let of_tcp = |flags| Packet::tcp(flags, (family.client, 4000), (family.backends[0], 80));
    // Nothing but what is refused.
    reports.want(0, 0, LONG).unwrap();
    for packet in [&refused, &other, &of_tcp(SYN), &of_tcp(end), &of_tcp(middle)] {
        ground.send(packet);
    }
    let report = only(&mut reports);
    assert_eq!((reason(&report), report.verdict), (Some("no-backend"), VERDICT_KERNEL));
    assert_eq!(report.is_translated, 0);
    // And what opens or ends a connection; of so many others hardly any.
    reports.want(u32::MAX, 0, LONG).unwrap();
    for packet in [&other, &of_tcp(SYN), &of_tcp(end), &of_tcp(middle)] {
        ground.send(packet);
    }
    let flags: Vec<u8> = all(&mut reports).iter().map(|report| report.tcp_flags).collect();
    assert_eq!(flags, [SYN, end]);
    // A tenth of 2,000 is 200; fewer than 100 or more than 300 never come by chance.
    reports.want(10, 0, LONG).unwrap();
    for _ in 0..2_000 {
        ground.send(&other);
    }
    let count = all(&mut reports).len();
    assert!((100..300).contains(&count), "{count}");
    // What has no ports, and what is cut off before them.
    reports.want(1, 0, LONG).unwrap();
    ground.send(&Packet::new(50, (family.client, 0), (family.backends[0], 0)));
    ground.programs.run("netctl_from", DEVICE, &other.bytes()[..14 + 20 + 2]).unwrap();
    let ports = |report: &Report| ends(report).0.1;
    assert_eq!(all(&mut reports).iter().map(ports).collect::<Vec<_>>(), [0, 0]);
}

pub fn what_skips_the_stack_is_told_at_both_ends() {
    for underlay in path::UNDERLAYS {
        let (ground, path) = path::ground(underlay);
        let mut reports = reports(&ground);
        reports.want(1, 0, LONG).unwrap();
        let [family, _] = FAMILIES;
        let packet = Packet::new(UDP, (family.client, 4000), (family.backends[1], 53));
        let length = packet.bytes().len() as u32 - 14;
        assert_eq!(path::send(&ground, &packet.bytes()).0, REDIRECT);
        let told = |report: &Report| (report.point, report.verdict, report.length, report.is_translated);
        let report = only(&mut reports);
        assert_eq!(told(&report), (POINT_FROM_CONTAINER, VERDICT_CARRIED, length, 0));
        let (from, to) = ((address(family.client), 4000), (address(family.backends[1]), 53));
        assert_eq!(ends(&report), (from, to, UDP));
        let sent = (from, to, UDP);
        let family = FAMILIES[usize::from(underlay[0].contains(':'))];
        let answer = Packet::new(UDP, (family.backends[0], 53), (family.client, 4000));
        let length = answer.bytes().len() as u32 - 14;
        assert_eq!(path::arrive(&path, &path::arrived(underlay, &answer.bytes())).0, REDIRECT);
        let report = only(&mut reports);
        assert_eq!(told(&report), (POINT_FROM_WIRE, VERDICT_CARRIED, length, 0));
        assert_eq!(report.network, NETWORK);
        let (from, to) = ((address(family.backends[0]), 53), (address(family.client), 4000));
        assert_eq!(ends(&report), (from, to, UDP));
        // What the kernel has from there is told where it comes to the container.
        let foreign = Packet::new(UDP, (family.client, 53), (family.client, 4000));
        assert_eq!(path::arrive(&path, &path::arrived(underlay, &foreign.bytes())).0, PASS);
        assert_eq!(all(&mut reports), []);
        // The host has no route to the node.
        let (_, outer) = path::send(&ground, &packet.bytes());
        only(&mut reports);
        assert_eq!(path.to_wire.run("netctl_wire_out", DEVICE, &outer).unwrap().0, DROP);
        let report = only(&mut reports);
        assert_eq!(reason(&report), Some("no-route"));
        assert_eq!((report.point, report.verdict), (POINT_TO_WIRE, VERDICT_DROPPED));
        assert_eq!((report.network, report.length), (NETWORK, packet.bytes().len() as u32 - 14));
        assert_eq!(ends(&report), sent);
    }
}

pub fn what_somebody_refuses_is_told_as_it_was_sent() {
    let ground = Ground::new(64);
    let mut reports = reports(&ground);
    reports.want(0, 0, LONG).unwrap();
    for family in FAMILIES {
        ground.web(family);
        let (unreachable, echo) =
            if family.client.contains(':') { ((1, 4), (129, 0)) } else { ((3, 3), (0, 0)) };
        // About a packet to a backend: the client knows the service only.
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        let backend = sent.destination.to_string();
        ground.answer(&Packet::error(&backend, family.client, unreachable, &sent.bytes()));
        let report = only(&mut reports);
        let (client, service) = ((address(family.client), 4000), (address(family.service), 80));
        assert_eq!(ends(&report), (client, service, TCP));
        let told = (report.point, report.verdict, report.reason);
        assert_eq!(told, (POINT_TO_CONTAINER, VERDICT_DROPPED, REASON_ERROR));
        assert_eq!((report.error_type, report.error_code), unreachable);
        assert_eq!((report.network, report.length), (NETWORK, syn.bytes().len() as u32 - 14));
        // About one that has no ports, from a router.
        let other = Packet::new(50, (family.client, 0), (family.backends[0], 0));
        ground.answer(&Packet::error(family.gateway, family.client, unreachable, &other.bytes()));
        assert_eq!(ends(&only(&mut reports)), ((client.0, 0), (address(family.backends[0]), 0), 50));
        // What is no error, or about nothing that could be read, is a packet like others.
        for packet in [
            Packet::error(family.gateway, family.client, echo, &other.bytes()),
            Packet::error(family.gateway, family.client, unreachable, &[0; 14]),
        ] {
            ground.answer(&packet);
            assert_eq!(all(&mut reports), []);
            reports.want(1, 0, LONG).unwrap();
            ground.answer(&packet);
            let report = only(&mut reports);
            assert_eq!((report.source, report.reason), (address(family.gateway), 0));
            reports.want(0, 0, LONG).unwrap();
        }
    }
}

pub fn what_nobody_reads_in_time_is_counted() {
    let ground = Ground::new(64);
    let mut reports = reports(&ground);
    reports.want(1, 0, LONG).unwrap();
    let [family, _] = FAMILIES;
    ground.balance(&front(family.service, 81, TCP), turns(), &[], &[]);
    let refused = Packet::tcp(SYN, (family.client, 4000), (family.service, 81));
    let packet = Packet::new(UDP, (family.client, 4000), (family.backends[0], 53));
    let sent = 9_000;
    for _ in 0..sent {
        assert_eq!(ground.send(&packet).0, PASS);
    }
    // A flood of what goes its way leaves room for what does not.
    ground.send(&refused);
    let (told, lost) = (all(&mut reports), reports.not_shown().unwrap());
    assert_eq!(told.len() as u64 + lost, sent + 1);
    assert!(told.len() > 4_000 && lost > 1_000, "{} {lost}", told.len());
    assert_eq!(told.last().and_then(reason), Some("no-backend"));
    // There is room again; and a flood of the others is bounded, too.
    ground.send(&packet);
    only(&mut reports);
    for _ in 0..14_000 {
        ground.send(&refused);
    }
    let (told, more) = (all(&mut reports).len() as u64, reports.not_shown().unwrap() - lost);
    assert_eq!(told + more, 14_000);
    assert!(told > 10_000 && more > 0, "{told} {more}");
}
