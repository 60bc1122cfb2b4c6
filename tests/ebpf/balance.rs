//! Which backend a connection gets, and what becomes of its packets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netctl::kernel::ebpf::{
    Backend, Connection, Front, SCHEDULER_HASH, SCHEDULER_LEAST, STATE_ANSWERED, STATE_CLIENT_ENDED,
    STATE_SERVER_ENDED, Tuple,
};

use crate::ground::{DROP, FAMILIES, Family, Ground, OTHER, PASS, REDIRECT, backend, front, turns};
use crate::packet::{ACK, FIN, Packet, RST, SCTP, SYN, TCP, UDP};

/// Where a connection of a client's port goes.
#[track_caller]
fn connect(ground: &Ground, family: Family, port: u16) -> String {
    let (verdict, sent) = ground.send(&Packet::tcp(SYN, (family.client, port), (family.service, 80)));
    assert_eq!(verdict, PASS);
    sent.destination.to_string()
}

/// How often each destination is chosen for connections from these ports.
fn spread(ground: &Ground, family: Family, ports: std::ops::Range<u16>) -> BTreeMap<String, usize> {
    let mut spread = BTreeMap::new();
    for port in ports {
        *spread.entry(connect(ground, family, port)).or_default() += 1;
    }
    spread
}

pub fn what_is_for_nobody_we_know_passes_as_it_is() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let from = (family.client, 4000);
        for packet in [
            Packet::tcp(SYN, from, (family.backends[0], 80)),
            Packet::tcp(SYN, from, (family.service, 81)),
            Packet::new(UDP, from, (family.service, 80)),
            // It belongs to no connection, so nobody knows it.
            Packet::tcp(ACK, from, (family.service, 80)),
            Packet::tcp(RST, from, (family.service, 80)),
            Packet::tcp(SYN | ACK, from, (family.service, 80)),
            // A protocol without ports.
            Packet::new(50, from, (family.service, 80)),
        ] {
            let (verdict, sent) = ground.send(&packet);
            let as_it_is = Packet::read(&packet.bytes());
            assert_eq!((verdict, sent), (PASS, as_it_is.clone()));
            assert_eq!(ground.answer(&packet), (PASS, as_it_is));
        }
        // Cut off in the middle of its header.
        let header = if family.client.contains(':') { 40 } else { 20 };
        let short = &Packet::tcp(SYN, from, (family.service, 80)).bytes()[..14 + header + 2];
        let (verdict, bytes) = ground.programs.run("netctl_from", crate::ground::DEVICE, short).unwrap();
        assert_eq!((verdict, bytes.as_slice()), (PASS, short));
    }
    assert_eq!(ground.connections().len(), 0);
    // What is no IP at all.
    let arp = [&[255; 6][..], &[2; 6], &[8, 6], &[0; 28]].concat();
    let (verdict, bytes) = ground.programs.run("netctl_from", crate::ground::DEVICE, &arp).unwrap();
    assert_eq!((verdict, bytes), (PASS, arp));
}

pub fn a_connection_goes_to_one_backend_and_its_answers_come_from_the_service() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        for protocol in [TCP, UDP, SCTP] {
            let target = 8080;
            let backends = [(1, backend(family.backends[0], target))];
            ground.balance(&front(family.service, 80, protocol), turns(), &backends, &[1]);
            let before = ground.counts(1);
            let mut packet = Packet::new(protocol, (family.client, 4000), (family.service, 80));
            // Of IPv4 and UDP it may be missing, and of SCTP it is made later.
            packet.no_checksum = protocol != TCP && family.client.contains('.');
            packet.data.truncate(if protocol == SCTP { 20 } else { 25 });
            for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK), (ACK | FIN, ACK | FIN)] {
                let packet = match protocol {
                    TCP => Packet { flags, ..packet.clone() },
                    _ => packet.clone(),
                };
                let sent = Packet {
                    destination: family.backends[0].parse().unwrap(),
                    destination_port: target,
                    ..packet.clone()
                };
                assert_eq!(ground.send(&packet), (PASS, sent.clone()));
                let back = if protocol == TCP { back } else { 0 };
                assert_eq!(ground.answer(&sent.back(back)), (PASS, packet.back(back)));
            }
            let after = ground.counts(1);
            assert_eq!(after.connections, 1, "of this backend, which is new for each protocol");
            assert_eq!((after.incoming_packets, after.outgoing_packets), (3, 3));
            let length = packet.bytes().len() as u64 - 14;
            assert_eq!(
                (after.incoming_bytes, after.outgoing_bytes),
                (3 * length, 3 * length),
                "{before:?}"
            );
        }
    }
    let open = ground.ebpf.maps().backends.get(&1).unwrap().unwrap().open;
    assert_eq!(open, 1, "SCTP over IPv6 is the last that was made");
}

pub fn backends_take_turns_by_their_weights() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let each = family.backends.map(|backend| (backend.to_owned(), 4));
        assert_eq!(spread(&ground, family, 4000..4012), each.into());
        // Heavier backends have more slots.
        let all = [(1, backend(family.backends[0], 80)), (2, backend(family.backends[1], 80))];
        ground.balance(&front(family.service, 80, TCP), turns(), &all, &[1, 2, 1, 1]);
        let expected = [(family.backends[0].to_owned(), 9), (family.backends[1].to_owned(), 3)];
        assert_eq!(spread(&ground, family, 5000..5012), expected.into());
        // Many slots lie in blocks: the first and the last of them are the second backend's.
        let slots: Vec<u32> = (0..130).map(|slot| if slot % 129 == 0 { 2 } else { 1 }).collect();
        ground.balance(&front(family.service, 80, TCP), turns(), &all, &slots);
        let expected = [(family.backends[0].to_owned(), 128), (family.backends[1].to_owned(), 2)];
        assert_eq!(spread(&ground, family, 7000..7130), expected.into());
        // Nobody takes connections: the kernel has the packet as it is.
        ground.balance(&front(family.service, 80, TCP), turns(), &[], &[]);
        let refused = ground.event(1);
        assert_eq!(connect(&ground, family, 6000), family.service);
        assert_eq!(ground.event(1), refused + 1);
    }
}

pub fn a_hash_keeps_a_client_at_its_backend() {
    let ground = Ground::new(64);
    let hash = Front { scheduler: SCHEDULER_HASH, ..turns() };
    for family in FAMILIES {
        let all = [1, 2, 3].map(|number| (number, backend(family.backends[number as usize - 1], 80)));
        ground.balance(&front(family.service, 80, TCP), hash, &all, &[1, 2, 3, 1, 2, 3, 1, 2]);
        assert_eq!(spread(&ground, family, 4000..4008).len(), 1);
        // Another client has another, sooner or later.
        assert!(family.client.ends_with('5'));
    }
}

pub fn the_backend_with_the_fewest_connections_is_next() {
    let ground = Ground::new(64);
    let least = Front { scheduler: SCHEDULER_LEAST, ..turns() };
    for family in FAMILIES {
        let of = |number: u32, weight, open| {
            let own = backend(family.backends[number as usize - 1], 80);
            (number, Backend { weight, open, ..own })
        };
        let all = [of(1, 1, 3), of(2, 1, 0), of(3, 4, 9)];
        ground.balance(&front(family.service, 80, TCP), least, &all, &[1, 2, 3]);
        let chosen: Vec<String> = (4000..4004).map(|port| connect(&ground, family, port)).collect();
        let [first, second, third] = family.backends;
        // 3, 0 and 9 / 4; then 3, 3 and 9 / 4.
        assert_eq!(chosen, [second, second, second, third], "{first}");
        let open = |number| ground.ebpf.maps().backends.get(&number).unwrap().unwrap().open;
        assert_eq!((open(1), open(2), open(3)), (3, 3, 10));
        // One that ends counts no more, and only once.
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        for _ in 0..2 {
            ground.send(&Packet { flags: RST, ..syn.clone() });
        }
        assert_eq!(open(2), 2);
    }
}

pub fn a_client_keeps_its_backend() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let sticky = Front { affinity: 300, ..turns() };
        let all = [1, 2, 3].map(|number| (number, backend(family.backends[number as usize - 1], 80)));
        let key = front(family.service, 80, TCP);
        ground.balance(&key, sticky, &all, &[1, 2, 3]);
        let kept = spread(&ground, family, 4000..4006);
        assert_eq!(kept.len(), 1, "{kept:?}");
        let kept = kept.into_keys().next().unwrap();
        // Its backend takes nothing new any more: it gets another, and keeps that.
        let number = family.backends.iter().position(|backend| *backend == kept).unwrap() as u32 + 1;
        let drained = Backend { weight: 0, ..all[number as usize - 1].1 };
        let slots: Vec<u32> = (1..=3).filter(|other| *other != number).collect();
        ground.balance(&key, sticky, &[(number, drained)], &slots);
        let other = spread(&ground, family, 5000..5006);
        assert!(other.len() == 1 && !other.contains_key(&kept), "{other:?}");
    }
}

pub fn a_backend_meets_itself_by_the_gateway() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let own = [(1, backend(family.client, 8080))];
        ground.own(family.client, family.gateway);
        ground.balance(&front(family.service, 80, TCP), turns(), &own, &[1]);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let met = Packet {
            source: family.gateway.parse().unwrap(),
            destination: family.client.parse().unwrap(),
            destination_port: 8080,
            is_back: true,
            ..syn.clone()
        };
        assert_eq!(ground.send(&syn), (REDIRECT, met.clone()));
        // It leaves by its own device, as it is.
        assert_eq!(ground.answer(&met), (PASS, met.clone()));
        let answer = Packet { is_back: false, ..met.back(SYN | ACK) };
        let back = Packet { is_back: true, ..syn.back(SYN | ACK) };
        assert_eq!(ground.send(&answer), (REDIRECT, back.clone()));
        assert_eq!(ground.answer(&back), (PASS, back.clone()));
        // Other packets to the gateway are the gateway's.
        let query = Packet::new(UDP, (family.client, 4000), (family.gateway, 53));
        assert_eq!(ground.send(&query), (PASS, query.clone()));
    }
}

pub fn all_ports_are_balanced_as_they_are() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let all = [(1, backend(family.backends[0], 0)), (2, backend(family.backends[1], 0))];
        ground.balance(&front(family.service, 0, 0), turns(), &all, &[1, 2]);
        for (protocol, port) in [(TCP, 22), (UDP, 53), (SCTP, 5001)] {
            let mut packet = Packet::new(protocol, (family.client, 4000), (family.service, port));
            packet.flags = if protocol == TCP { SYN } else { 0 };
            let (verdict, sent) = ground.send(&packet);
            assert!(family.backends[..2].contains(&sent.destination.to_string().as_str()));
            assert_eq!((verdict, sent.destination_port), (PASS, port));
            let back = if protocol == TCP { SYN | ACK } else { 0 };
            assert_eq!(ground.answer(&sent.back(back)), (PASS, packet.back(back)));
        }
        // A port of its own comes first.
        let one = [(3, Backend { front: 2, ..backend(family.backends[2], 8080) })];
        let web = Front { id: 2, ..turns() };
        ground.balance(&front(family.service, 80, TCP), web, &one, &[3]);
        assert_eq!(connect(&ground, family, 4001), family.backends[2]);
    }
}

pub fn who_speaks_for_another_opens_nothing() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let before = ground.event(3);
        assert_eq!(ground.send_by(OTHER, &syn), (PASS, syn.clone()));
        assert_eq!((ground.event(3), ground.connections().len()), (before + 1, 0));
        // A connection is its client's: another cannot even end it.
        let (_, sent) = ground.send(&syn);
        let reset = Packet { flags: RST, ..syn.clone() };
        assert_eq!(ground.send_by(OTHER, &reset), (PASS, reset));
        let ack = Packet { flags: ACK, ..syn };
        assert_eq!(ground.send(&ack), (PASS, Packet { flags: ACK, ..sent }));
        ground.ebpf.maps().connections.remove_all(&keys(&ground)).unwrap();
    }
}

/// Moves the client's addresses behind another device, as when its container is started again.
fn move_client(to: &str) {
    for family in FAMILIES {
        let status = std::process::Command::new("ip")
            .args(["route", "replace", family.client, "dev", to])
            .status()
            .unwrap();
        assert!(status.success());
    }
}

pub fn a_client_that_was_made_anew_begins_anew() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
    }
    let queries = FAMILIES.map(|family| {
        let id = if family.client.contains(':') { 6 } else { 4 };
        let all = [(id, Backend { front: id, ..backend(family.backends[0], 53) })];
        ground.balance(&front(family.service, 53, UDP), Front { id, ..turns() }, &all, &[id]);
        let query = Packet::new(UDP, (family.client, 4000), (family.service, 53));
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        (query, syn, family)
    });
    let before = queries.clone().map(|(query, syn, _)| (ground.send(&query), ground.send(&syn)));
    move_client(OTHER);
    for ((query, syn, family), before) in queries.iter().zip(before) {
        assert_eq!(ground.send_by(OTHER, query), before.0);
        let (verdict, new) = ground.send_by(OTHER, syn);
        assert_eq!(verdict, PASS);
        assert_ne!(new.destination.to_string(), family.service);
        let ack = Packet { flags: ACK, ..syn.clone() };
        assert_eq!(ground.send_by(OTHER, &ack).1.destination, new.destination);
    }
}

pub fn a_connection_that_lost_one_way_begins_anew() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let all = [1, 2].map(|number| (number, backend(family.backends[number as usize - 1], 53)));
        ground.balance(&front(family.service, 53, UDP), turns(), &all, &[1, 2]);
        let query = Packet::new(UDP, (family.client, 4000), (family.service, 53));
        ground.send(&query);
        let back: Vec<Tuple> = keys(&ground).into_iter().filter(|tuple| tuple.reply == 1).collect();
        assert_eq!(back.len(), 1);
        ground.ebpf.maps().connections.remove_all(&back).unwrap();
        ground.change_connections(|one| one.seen -= 2);
        ground.send(&query);
        assert_eq!(ground.connections().len(), 0, "it is noticed within a second");
        let (_, sent) = ground.send(&query);
        assert_eq!(ground.answer(&sent.back(0)), (PASS, query.back(0)));
        ground.ebpf.maps().connections.remove_all(&keys(&ground)).unwrap();
    }
}

pub fn a_port_that_is_taken_is_not_given_twice() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        // Two ports of the service lead to the same one of the same backend.
        let target = [(1, backend(family.backends[0], 8080))];
        ground.balance(&front(family.service, 80, TCP), turns(), &target, &[1]);
        let other = [(2, Backend { front: 2, ..target[0].1 })];
        ground.balance(&front(family.service, 81, TCP), Front { id: 2, ..turns() }, &other, &[2]);
        let to = |port, flags| Packet::tcp(flags, (family.client, 4000), (family.service, port));
        let (_, first) = ground.send(&to(80, SYN));
        let taken = ground.event(2);
        assert_eq!(
            ground.send(&to(81, SYN)),
            (PASS, to(81, SYN)),
            "its answers could not be told apart"
        );
        assert_eq!(ground.event(2), taken + 1);
        assert_eq!(ground.answer(&first.back(SYN | ACK)), (PASS, to(80, SYN).back(SYN | ACK)));
        // The first has ended: the second may have it, and late packets of the first hurt nobody.
        ground.send(&to(80, RST));
        let (_, second) = ground.send(&to(81, SYN));
        assert_eq!(second.destination, first.destination);
        assert_eq!(ground.send(&to(80, RST)), (PASS, to(80, RST)));
        assert_eq!(ground.answer(&second.back(SYN | ACK)), (PASS, to(81, SYN).back(SYN | ACK)));
        assert_eq!(ground.send(&to(81, ACK)).1.destination, second.destination);
        ground.ebpf.maps().connections.remove_all(&keys(&ground)).unwrap();
    }
}

fn keys(ground: &Ground) -> Vec<Tuple> {
    ground.connections().into_iter().map(|(tuple, _)| tuple).collect()
}

pub fn a_backend_that_is_gone_takes_its_connections_along() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        let gone = family.backends.iter().position(|b| sent.destination == b.parse::<IpAddr>().unwrap());
        let gone = gone.unwrap() as u32 + 1;
        assert!(ground.ebpf.maps().backends.remove(&gone).unwrap());
        assert!(ground.ebpf.maps().counts.remove(&gone).unwrap());
        let ack = Packet { flags: ACK, ..syn.clone() };
        assert_eq!(ground.send(&ack), (PASS, ack), "the kernel has it, and resets it");
        assert_eq!(ground.connections().len(), 0);
        // Late answers are nobody's.
        let late = sent.back(ACK);
        assert_eq!(ground.answer(&late), (PASS, late.clone()));
    }
}

pub fn what_is_counted_begins_anew_where_it_was_removed() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let backends = [(1, backend(family.backends[0], 8080))];
        ground.balance(&front(family.service, 80, TCP), turns(), &backends, &[1]);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        assert_eq!(ground.counts(1).connections, 1);
        assert!(ground.ebpf.maps().counts.remove(&1).unwrap());
        assert_eq!(ground.answer(&sent.back(SYN | ACK)), (PASS, syn.back(SYN | ACK)));
        let counts = ground.counts(1);
        assert_eq!((counts.connections, counts.incoming_packets, counts.outgoing_packets), (0, 0, 1));
    }
}

pub fn a_reset_connection_begins_anew() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, first) = ground.send(&syn);
        let (_, again) = ground.send(&syn);
        assert_eq!(first, again, "a SYN that is sent again belongs to the same connection");
        ground.send(&Packet { flags: RST, ..syn.clone() });
        let (_, second) = ground.send(&syn);
        assert_ne!(first, second, "the next has its turn");
        // The other way ended it: each side has sent a FIN.
        ground.answer(&second.back(SYN | ACK));
        ground.send(&Packet { flags: FIN | ACK, ..syn.clone() });
        let (_, open) = ground.send(&Packet { flags: ACK, ..syn.clone() });
        assert_eq!(open.destination, second.destination, "half of it is open");
        ground.answer(&second.back(FIN | ACK));
        let ended = STATE_ANSWERED | STATE_CLIENT_ENDED | STATE_SERVER_ENDED;
        let to = second.destination.into();
        let of_second =
            |(tuple, one): &&(Tuple, Connection)| tuple.source == to || one.destination == to;
        let connections = ground.connections();
        let states: Vec<u8> = connections.iter().filter(of_second).map(|(_, one)| one.state).collect();
        assert_eq!(states, [ended, ended]);
        let (_, third) = ground.send(&syn);
        assert_ne!(second, third);
        ground.ebpf.maps().connections.remove_all(&keys(&ground)).unwrap();
    }
}

pub fn silence_ends_a_connection() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let all = [1, 2].map(|number| (number, backend(family.backends[number as usize - 1], 53)));
        ground.balance(&front(family.service, 53, UDP), turns(), &all, &[1, 2]);
        let query = Packet::new(UDP, (family.client, 4000), (family.service, 53));
        let (_, first) = ground.send(&query);
        assert_eq!(ground.send(&query).1, first);
        let silent =
            |seconds| ground.change_connections(|one| one.seen = one.seen.wrapping_sub(seconds));
        silent(200);
        assert_eq!(ground.send(&query).1, first, "200 s of 300 s");
        // Only what comes back counts: the client's own entry is 400 s old then.
        silent(200);
        ground.answer(&first.back(0));
        silent(200);
        assert_eq!(ground.send(&query).1, first);
        silent(300);
        assert_ne!(ground.send(&query).1, first);
        ground.ebpf.maps().connections.remove_all(&keys(&ground)).unwrap();
    }
}

pub fn fragments_follow_the_first() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let target = [(1, backend(family.backends[0], 5353))];
        ground.balance(&front(family.service, 53, UDP), turns(), &target, &[1]);
        let whole = Packet::new(UDP, (family.client, 4000), (family.service, 53));
        let later = Packet { fragment: Some((77, 4, false)), data: vec![7; 32], ..whole.clone() };
        let later = Packet { source_port: 0, destination_port: 0, ..later };
        assert_eq!(ground.send(&later), (PASS, later.clone()), "nobody knows its ports yet");
        let first = Packet { fragment: Some((77, 0, true)), data: vec![7; 24], ..whole.clone() };
        let (verdict, sent) = ground.send(&first);
        let to: IpAddr = family.backends[0].parse().unwrap();
        assert_eq!((verdict, sent.destination, sent.destination_port), (PASS, to, 5353));
        assert_eq!(ground.send(&later), (PASS, Packet { destination: to, ..later.clone() }));
        // And so the answer's.
        let (answer, rest) = (sent.back(0), Packet { destination: to, ..later.clone() }.back(0));
        let from: IpAddr = family.service.parse().unwrap();
        assert_eq!(ground.answer(&answer).1.source, from);
        assert_eq!(ground.answer(&rest), (PASS, Packet { source: from, ..rest.clone() }));
        // Another container that speaks for the client changes nothing.
        let forged = Packet { source_port: 9, ..first.clone() };
        ground.send_by(OTHER, &forged);
        assert_eq!(ground.send(&later).1.destination, to);
        // Another datagram's.
        let other = Packet { fragment: Some((78, 4, false)), ..later };
        assert_eq!(ground.send(&other), (PASS, other.clone()));
    }
}

pub fn fragments_of_sctp_keep_their_ports_or_go() {
    const FRAGMENTS: u32 = 8;
    let ground = Ground::new(64);
    for family in FAMILIES {
        let to: IpAddr = family.backends[0].parse().unwrap();
        for (port, verdict) in [(5001, PASS), (5002, DROP)] {
            let front = front(family.service, 5001, SCTP);
            ground.balance(&front, turns(), &[(1, backend(family.backends[0], port))], &[1]);
            let counted = ground.event(FRAGMENTS);
            let first = Packet::new(SCTP, (family.client, port), (family.service, 5001));
            let first = Packet { fragment: Some((77, 0, true)), data: vec![7; 24], ..first };
            let (done, sent) = ground.send(&first);
            assert_eq!(done, verdict, "to port {port}");
            if verdict == PASS {
                assert_eq!(sent, Packet { destination: to, ..first });
            }
            assert_eq!(ground.event(FRAGMENTS) - counted, u64::from(verdict == DROP));
        }
    }
}

pub fn the_oldest_connections_leave_a_full_table() {
    let ground = Ground::new(256);
    for family in FAMILIES {
        ground.web(family);
        for port in 1000..5000 {
            assert_ne!(connect(&ground, family, port), family.service, "port {port}");
        }
        assert!(ground.connections().len() <= 512);
        // The last is there in both directions.
        let syn = Packet::tcp(SYN, (family.client, 4999), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        assert_eq!(ground.answer(&sent.back(SYN | ACK)), (PASS, syn.back(SYN | ACK)));
        // One that left is reset by the kernel.
        let old = Packet::tcp(ACK, (family.client, 1000), (family.service, 80));
        assert_eq!(ground.send(&old), (PASS, old.clone()));
    }
}
