//! The recorded bytes are of ipvsadm 1.31 and Linux 6.1 on a little-endian machine.

use netlink_packet_core::DefaultNla;
use proptest::prelude::*;

use super::super::wire::{bytes, command, find, hex, put, put_nested, put_u16, put_u32};
use super::*;

fn tcp(port: u16) -> ServiceKey {
    ServiceKey::Address { protocol: Protocol::Tcp, address: [10, 7, 0, 1].into(), port }
}

fn all(service: &Service) -> Vec<DefaultNla> {
    service.encode(Flags::all()).unwrap()
}

/// `ipvsadm -A -t 10.7.0.1:80 -s mh -b mh-fallback,mh-port -p 300 -M 255.255.255.0 --pe sip`
fn by_address() -> Service {
    let mut service = Service::new(tcp(80), Scheduler::MaglevHashing).persistent(300);
    service.flags |= Flags::MH_FALLBACK | Flags::MH_PORT;
    service.netmask = Netmask::prefix(Family::V4, 24);
    service.engine = Some("sip".to_owned());
    service
}

/// `ipvsadm -A -f 7 -6 -s rr -o`
fn by_mark() -> Service {
    let key = ServiceKey::Mark { family: Family::V6, mark: NonZeroU32::new(7).unwrap() };
    Service { flags: Flags::ONE_PACKET, ..Service::new(key, Scheduler::RoundRobin) }
}

#[test]
fn services_are_asked_for_as_ipvsadm_does() {
    let expected = "5c000180 0600010002000000 0600020006000000 \
        14000300 0a070001000000000000000000000000 0600040000500000 070006006d680000 \
        08000b0073697000 0c00070019000000ffffffff 080008002c010000 08000900ffffff00";
    assert_eq!(bytes(&[put_nested(command::SERVICE, &all(&by_address()))]), hex(expected));
    let expected = "38000180 060001000a000000 0800050007000000 0700060072720000 \
        0c00070004000000ffffffff 0800080000000000 0800090080000000";
    assert_eq!(bytes(&[put_nested(command::SERVICE, &all(&by_mark()))]), hex(expected));
}

#[test]
fn services_are_read_as_the_kernel_tells_them() {
    let recorded = "34010100 0600010002000000 0600020006000000 \
        14000300 0a070001000000000000000000000000 0600040000500000 070006006d680000 \
        08000b0073697000 0c0007001b000000ffffffff 080008002c010000 08000900ffffff00 \
        5c000a00 0800010000000000 0800020000000000 0800030000000000 0c00040000000000 00000000 \
        0c00050000000000 00000000 0800060000000000 0800070000000000 0800080000000000 \
        0800090000000000 08000a0000000000 \
        7c000c00 0c000100 0500000000000000 0c000200 0600000000000000 0c000300 0700000000000000 \
        0c000400 0000000000000000 0c000500 0000000000000000 0c000600 0000000000000000 \
        0c000700 0000000000000000 0c000800 0000000000000000 0c000900 0000000000000000 \
        0c000a00 0000000000000000";
    let recorded = hex(recorded);
    let state = ServiceState::decode(find(&recorded, command::SERVICE, "service").unwrap()).unwrap();
    assert_eq!(state.service, by_address());
    // The wider counters count.
    let stats = Stats { connections: 5, incoming_packets: 6, outgoing_packets: 7, ..Stats::default() };
    assert_eq!(state.stats, stats);
}

#[test]
fn what_another_kernel_tells_is_passed_over_and_what_is_missing_told() {
    let mut attributes = all(&by_mark());
    attributes.push(put(200, b"something new"));
    assert_eq!(ServiceState::decode(&bytes(&attributes)).unwrap().service, by_mark());
    for lacking in 0..all(&by_mark()).len() {
        let mut attributes = all(&by_mark());
        attributes.remove(lacking);
        let error = ServiceState::decode(&bytes(&attributes)).unwrap_err();
        assert!(error.to_string().starts_with("it has no "), "{error}");
    }
}

#[test]
fn an_attribute_of_a_wrong_length_is_an_error() {
    for (kind, length) in [(1, 4), (2, 1), (3, 3), (4, 3), (5, 2), (7, 3), (8, 8), (9, 3), (12, 3)] {
        let mut attributes = all(&Service { netmask: Netmask::host(Family::V4), ..by_address() });
        attributes.push(put(kind, &vec![0; length]));
        let error = ServiceState::decode(&bytes(&attributes));
        assert!(error.is_err(), "attribute {kind} of {length} bytes: {error:?}");
    }
    let unknown_family = ServiceState::decode(&bytes(&[put_u16(attribute::FAMILY, 1)]));
    assert!(unknown_family.unwrap_err().to_string().contains("neither AF_INET nor AF_INET6"));
}

#[test]
fn a_mask_keeps_the_flags_that_are_not_meant() {
    let encoded = bytes(&by_mark().encode(Flags::ONE_PACKET).unwrap());
    let pair = find(&encoded, attribute::FLAGS, "flags").unwrap();
    assert_eq!(pair, [4u32.to_ne_bytes(), 4u32.to_ne_bytes()].concat());
}

#[test]
fn a_request_that_makes_no_sense_is_refused() {
    let refused = |service: Service| service.encode(Flags::all()).unwrap_err();
    let netmask = Netmask::host(Family::V6);
    assert_eq!(refused(Service { netmask, ..by_address() }), Problem::Netmask(netmask));
    let netmask = Netmask::prefix(Family::V6, 0);
    assert_eq!(refused(Service { netmask, ..by_mark() }), Problem::Netmask(netmask));
    for name in ["", "sixteen-letters!", "r\0r"] {
        let problem = Problem::Name(name.to_owned());
        assert_eq!(refused(Service { scheduler: name.into(), ..by_mark() }), problem);
        assert_eq!(refused(Service { engine: Some(name.to_owned()), ..by_mark() }), problem);
    }
}

#[test]
fn a_prefix_length_is_a_mask() {
    let mask = |length| Netmask::prefix(Family::V4, length);
    assert_eq!(mask(0), Netmask::V4([0, 0, 0, 0].into()));
    assert_eq!(mask(20), Netmask::V4([255, 255, 240, 0].into()));
    assert_eq!((mask(32), mask(33)), (Netmask::host(Family::V4), Netmask::host(Family::V4)));
    assert_eq!(Netmask::prefix(Family::V6, 255), Netmask::host(Family::V6));
}

prop_compose! {
    fn any_service()(
        mark in any::<Option<NonZeroU32>>(), address in any::<IpAddr>(), protocol in any::<u16>(),
        port in any::<u16>(), scheduler in "[ -~]{1,15}", flags in any::<u32>(), timeout in any::<u32>(),
        mask in any::<[u8; 4]>(), length in 1..=128u8, engine in proptest::option::of("[a-z]{1,15}"),
    ) -> Service {
        let family = Family::of(address);
        let key = match mark {
            Some(mark) => ServiceKey::Mark { family, mark },
            None => ServiceKey::Address { protocol: protocol.into(), address, port },
        };
        let netmask = match family {
            Family::V4 => Netmask::V4(mask.into()),
            Family::V6 => Netmask::V6(length),
        };
        let flags = Flags::from_bits_retain(flags).difference(Flags::HASHED) | Flags::PERSISTENT;
        Service { key, scheduler: scheduler.as_str().into(), flags, timeout, netmask, engine }
    }
}

proptest! {
    #[test]
    fn a_service_comes_back(service in any_service()) {
        prop_assert_eq!(ServiceState::decode(&bytes(&all(&service))).unwrap().service, service);
    }

    #[test]
    fn a_damaged_service_is_an_error_or_another_one(
        service in any_service(), at in any::<prop::sample::Index>(), with in any::<u8>(), cut in 0..9usize,
    ) {
        let mut bytes = bytes(&all(&service));
        let at = at.index(bytes.len());
        bytes[at] = with;
        bytes.truncate(bytes.len() - cut);
        let _ = ServiceState::decode(&bytes);
    }

    #[test]
    fn attributes_of_any_content_are_read_or_an_error(
        content in proptest::collection::vec((0..16u16, proptest::collection::vec(any::<u8>(), 0..20)), 0..16),
    ) {
        let attributes: Vec<_> = content.iter().map(|(kind, value)| put(*kind, value)).collect();
        let _ = ServiceState::decode(&bytes(&attributes));
    }
}

#[test]
fn a_mark_of_zero_is_no_mark() {
    let mut attributes = all(&Service { engine: None, ..by_address() });
    attributes.push(put_u32(attribute::MARK, 0));
    assert_eq!(ServiceState::decode(&bytes(&attributes)).unwrap().service.key, tcp(80));
}
