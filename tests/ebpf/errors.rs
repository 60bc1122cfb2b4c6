//! ICMP errors about packets of connections.

use crate::ground::{FAMILIES, Family, Ground, PASS, front, turns};
use crate::packet::{ACK, Packet, SYN, UDP};

/// Kinds of errors with their codes: that a port is closed, a packet too big, its time over.
fn kinds(family: Family) -> [(u8, u8); 3] {
    if family.client.contains(':') { [(1, 4), (2, 0), (3, 0)] } else { [(3, 3), (3, 4), (11, 0)] }
}

/// The packet within an error, as a frame.
fn inner(family: Family, error: &Packet) -> Vec<u8> {
    let kind: &[u8] = if family.client.contains(':') { &[0x86, 0xdd] } else { &[8, 0] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], kind, &error.data[8..]].concat()
}

pub fn an_error_shows_the_client_what_it_sent() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let syn = Packet::tcp(SYN, (family.client, 4000), (family.service, 80));
        let (_, sent) = ground.send(&syn);
        let backend = sent.destination.to_string();
        for kind in kinds(family) {
            for (from, seen) in [(backend.as_str(), family.service), (family.gateway, family.gateway)] {
                let error = Packet::error(from, family.client, kind, &sent.bytes());
                let (verdict, told) = ground.answer(&error);
                assert_eq!((verdict, told.source.to_string()), (PASS, seen.to_owned()));
                let about = Packet::error(seen, family.client, kind, &syn.bytes());
                // The checksum of TCP within stays that of the other packet, or is cut off.
                let (told, about) = (inner(family, &told), inner(family, &about));
                let ports = if family.client.contains(':') { 54..58 } else { 34..38 };
                assert_eq!(told[ports.clone()], about[ports.clone()], "{kind:?}");
                assert_eq!(told[..ports.start], about[..ports.start], "{kind:?}");
            }
        }
    }
}

pub fn an_error_reaches_the_backend() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        let all = [(1, crate::ground::backend(family.backends[0], 5353))];
        ground.balance(&front(family.service, 53, UDP), turns(), &all, &[1]);
        let query = Packet::new(UDP, (family.client, 4000), (family.service, 53));
        let (_, sent) = ground.send(&query);
        let (_, answer) = ground.answer(&sent.back(0));
        for kind in kinds(family) {
            let error = Packet::error(family.client, family.service, kind, &answer.bytes());
            let (verdict, told) = ground.send(&error);
            assert_eq!((verdict, told.destination.to_string()), (PASS, family.backends[0].to_owned()));
            let about = Packet::error(family.client, family.backends[0], kind, &sent.back(0).bytes());
            let (told, about) = (inner(family, &told), inner(family, &about));
            let end = if family.client.contains(':') { 58 } else { 38 };
            assert_eq!(told[..end], about[..end], "{kind:?}");
        }
    }
}

pub fn errors_about_others_pass_as_they_are() {
    let ground = Ground::new(64);
    for family in FAMILIES {
        ground.web(family);
        let other = Packet::tcp(ACK, (family.client, 4000), (family.backends[0], 8080));
        for kind in kinds(family) {
            let error = Packet::error(family.backends[0], family.client, kind, &other.bytes());
            assert_eq!(ground.answer(&error), (PASS, Packet::read(&error.bytes())));
            let cut = Packet { data: error.data[..20].to_vec(), ..error };
            assert_eq!(ground.answer(&cut), (PASS, Packet::read(&cut.bytes())));
        }
        // A ping is the kernel's.
        let kind = if family.client.contains(':') { 128 } else { 8 };
        let ping = Packet::error(family.client, family.service, (kind, 0), &other.bytes());
        assert_eq!(ground.send(&ping), (PASS, Packet::read(&ping.bytes())));
    }
}
