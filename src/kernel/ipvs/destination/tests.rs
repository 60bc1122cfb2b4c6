//! The recorded bytes are of ipvsadm 1.31 and Linux 6.1 on a little-endian machine.

use proptest::prelude::*;

use super::super::wire::{bytes, command, hex, put, put_nested};
use super::*;

/// `ipvsadm -a … -r 10.7.0.2:80 -w 5 -x 100 -y 60 -i --tun-type gue --tun-port 6080 --tun-remcsum`
fn tunnelled() -> Destination {
    let flags = TunnelFlags::REMOTE_CHECKSUM;
    let forwarding = Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 6080, flags });
    let key = DestinationKey { address: [10, 7, 0, 2].into(), port: 80 };
    Destination { upper_threshold: 100, lower_threshold: 60, ..Destination::new(key, forwarding, 5) }
}

#[test]
fn destinations_are_asked_for_as_ipvsadm_does() {
    let expected = "60000280 06000b0002000000 14000100 0a070002000000000000000000000000 \
        0600020000500000 0800030002000000 0800040005000000 05000d0001000000 06000e0017c00000 \
        06000f0002000000 0800050064000000 080006003c000000";
    assert_eq!(
        bytes(&[put_nested(command::DESTINATION, &tunnelled().encode().unwrap())]),
        hex(expected)
    );
}

#[test]
fn destinations_are_read_as_the_kernel_tells_them() {
    let recorded = "14000100 0a070002000000000000000000000000 0600020000500000 \
        0800030002000000 0800040005000000 05000d0001000000 06000e0017c00000 06000f0002000000 \
        0800050064000000 080006003c000000 0800070003000000 0800080002000000 0800090001000000 \
        06000b0002000000 \
        5c000a00 0800010009000000 0800020000000000 0800030000000000 0c000400 0000000000000000 \
        0c000500 0000000000000000 0800060000000000 0800070000000000 0800080000000000 \
        0800090000000000 08000a0000000000";
    let state = DestinationState::decode(Family::V6, &hex(recorded)).unwrap();
    let stats = Stats { connections: 9, ..Stats::default() };
    let expected =
        DestinationState { destination: tunnelled(), active: 3, inactive: 2, persistent: 1, stats };
    assert_eq!(state, expected);
}

#[test]
fn without_a_family_an_address_is_of_the_service_s() {
    let key = DestinationKey { address: [1; 16].into(), port: 53 };
    let destination = Destination::new(key, Forwarding::Masquerade, 1);
    let all = destination.encode().unwrap();
    for unset in [all[1..].to_vec(), [vec![put(attribute::FAMILY, &[0, 0])], all[1..].to_vec()].concat()]
    {
        let state = DestinationState::decode(Family::V6, &bytes(&unset)).unwrap();
        assert_eq!(state.destination, destination);
    }
}

#[test]
fn what_is_missing_is_told() {
    for (kind, what) in
        [(attribute::ADDRESS, "address"), (attribute::PORT, "port"), (attribute::METHOD, "method")]
    {
        let mut attributes = tunnelled().encode().unwrap();
        attributes.retain(|attribute| netlink_packet_core::Nla::kind(attribute) != kind);
        let error = DestinationState::decode(Family::V4, &bytes(&attributes)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn an_attribute_of_a_wrong_length_is_an_error() {
    for (kind, length) in [(1, 3), (2, 4), (3, 2), (4, 8), (7, 0), (11, 1), (12, 5), (13, 2), (15, 4)] {
        let mut attributes = tunnelled().encode().unwrap();
        attributes.push(put(kind, &vec![0; length]));
        let error = DestinationState::decode(Family::V4, &bytes(&attributes));
        assert!(error.is_err(), "attribute {kind} of {length} bytes: {error:?}");
    }
}

prop_compose! {
    fn any_destination()(
        address in any::<IpAddr>(), port in any::<u16>(), method in 0..8u32, kind in any::<u8>(),
        tunnel_port in any::<u16>(), flags in any::<u16>(), weight in any::<u32>(),
        upper_threshold in 0..=MOST_CONNECTIONS, lower_threshold in any::<u32>(),
    ) -> Destination {
        let flags = TunnelFlags::from_bits_retain(flags);
        let forwarding = Forwarding::decode(method, Tunnel { kind: kind.into(), port: tunnel_port, flags });
        let key = DestinationKey { address, port };
        Destination { key, forwarding, weight, upper_threshold, lower_threshold }
    }
}

proptest! {
    #[test]
    fn a_destination_comes_back(destination in any_destination()) {
        let bytes = bytes(&destination.encode().unwrap());
        prop_assert_eq!(DestinationState::decode(Family::V4, &bytes).unwrap().destination, destination);
    }

    #[test]
    fn a_damaged_destination_is_an_error_or_another_one(
        destination in any_destination(), at in any::<prop::sample::Index>(), with in any::<u8>(),
        cut in 0..9usize,
    ) {
        let mut bytes = bytes(&destination.encode().unwrap());
        let at = at.index(bytes.len());
        bytes[at] = with;
        bytes.truncate(bytes.len() - cut);
        let _ = DestinationState::decode(Family::V6, &bytes);
    }

    #[test]
    fn attributes_of_any_content_are_read_or_an_error(
        content in proptest::collection::vec((0..18u16, proptest::collection::vec(any::<u8>(), 0..20)), 0..18),
    ) {
        let attributes: Vec<_> = content.iter().map(|(kind, value)| put(*kind, value)).collect();
        let _ = DestinationState::decode(Family::V6, &bytes(&attributes));
    }
}
