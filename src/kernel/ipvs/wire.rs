//! The bytes: generic netlink messages and their attributes, in and out.
//!
//! Numbers are the machine's byte order, ports and IPv4 masks the network's. What an attribute
//! means is told by the modules that use them (include/uapi/linux/ip_vs.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, NLA_F_NESTED, NlasIterator, ParseableParametrized,
    parse_string, parse_u16, parse_u16_be, parse_u32, parse_u64,
};
use netlink_packet_generic::constants::GENL_ID_CTRL;
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

use super::service::Family;

/// The name and the version of the family (`IPVS_GENL_NAME`, `IPVS_GENL_VERSION`).
pub(super) const FAMILY: &str = "IPVS";
const VERSION: u8 = 1;
const CONTROL_VERSION: u8 = 2;
/// The length of an attribute's header, and what attributes are aligned to.
const ATTRIBUTE_HEADER: usize = 4;

/// The commands (`IPVS_CMD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    NewService = 1,
    SetService = 2,
    DelService = 3,
    GetService = 4,
    NewDestination = 5,
    SetDestination = 6,
    DelDestination = 7,
    GetDestination = 8,
    SetConfig = 12,
    GetConfig = 13,
    GetInfo = 15,
    Zero = 16,
    Flush = 17,
}

/// The attributes of a message itself (`IPVS_CMD_ATTR_*`).
pub(super) mod command {
    pub(in super::super) const SERVICE: u16 = 1;
    pub(in super::super) const DESTINATION: u16 = 2;
    pub(in super::super) const TIMEOUT_TCP: u16 = 4;
    pub(in super::super) const TIMEOUT_TCP_FIN: u16 = 5;
    pub(in super::super) const TIMEOUT_UDP: u16 = 6;
}

/// What follows the header of a generic netlink message. It stays bytes until somebody asks, so that
/// a malformed answer is an error of who asked and not lost on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Payload {
    header: GenlHeader,
    pub(super) attributes: Vec<u8>,
}

/// A message as the transport takes it.
pub(super) type Message = GenlMessage<Payload>;

impl GenlFamily for Payload {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        self.header.cmd
    }

    fn version(&self) -> u8 {
        self.header.version
    }
}

impl Emitable for Payload {
    fn buffer_len(&self) -> usize {
        self.attributes.len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        buffer[..self.attributes.len()].copy_from_slice(&self.attributes);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Payload {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        Ok(Self { header, attributes: bytes.to_vec() })
    }
}

/// A message to IPVS, whose number in this kernel is `family`.
pub(super) fn message(family: u16, command: Command, attributes: &[DefaultNla]) -> Message {
    let header = GenlHeader { cmd: command as u8, version: VERSION };
    GenlMessage::new(header, Payload { header, attributes: bytes(attributes) }, family)
}

/// A message to the controller of generic netlink (`nlctrl`).
pub(super) fn control(command: u8, attributes: &[DefaultNla]) -> Message {
    let header = GenlHeader { cmd: command, version: CONTROL_VERSION };
    GenlMessage::new(header, Payload { header, attributes: bytes(attributes) }, GENL_ID_CTRL)
}

/// Attributes one after the other, padded.
pub(super) fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

pub(super) fn put(kind: u16, value: &[u8]) -> DefaultNla {
    DefaultNla::new(kind, value.to_vec())
}

pub(super) fn put_u16(kind: u16, value: u16) -> DefaultNla {
    put(kind, &value.to_ne_bytes())
}

pub(super) fn put_u32(kind: u16, value: u32) -> DefaultNla {
    put(kind, &value.to_ne_bytes())
}

pub(super) fn put_port(kind: u16, port: u16) -> DefaultNla {
    put(kind, &port.to_be_bytes())
}

/// A string with the NUL that the kernel insists on (`NLA_NUL_STRING`).
pub(super) fn put_name(kind: u16, name: &str) -> DefaultNla {
    put(kind, &[name.as_bytes(), b"\0"].concat())
}

/// An address in the 16 bytes of the kernel's `union nf_inet_addr`; of IPv4 the first four count.
pub(super) fn put_address(kind: u16, address: IpAddr) -> DefaultNla {
    let mut value = [0; 16];
    match address {
        IpAddr::V4(address) => value[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => value = address.octets(),
    }
    put(kind, &value)
}

pub(super) fn put_nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, bytes(attributes))
}

/// The attributes in `bytes`, by number; what is malformed ends them with an error.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), DecodeError>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        let value = attribute.into_inner().get(ATTRIBUTE_HEADER..length);
        Ok((kind, value.ok_or("an attribute is longer than what is there")?))
    })
}

/// The value of the first attribute with this number.
///
/// # Errors
///
/// The attributes before it are malformed, or there is none: `what` is missing.
pub(super) fn find<'a>(bytes: &'a [u8], kind: u16, what: &str) -> Result<&'a [u8], DecodeError> {
    for attribute in attributes(bytes) {
        match attribute? {
            (found, value) if found == kind => return Ok(value),
            _ => {}
        }
    }
    Err(missing(what))
}

pub(super) fn missing(what: &str) -> DecodeError {
    DecodeError::from(format!("it has no {what}"))
}

pub(super) fn get_u8(value: &[u8]) -> Result<u8, DecodeError> {
    netlink_packet_core::parse_u8(value)
}

pub(super) fn get_u16(value: &[u8]) -> Result<u16, DecodeError> {
    parse_u16(value)
}

pub(super) fn get_u32(value: &[u8]) -> Result<u32, DecodeError> {
    parse_u32(value)
}

/// A counter of 32 or 64 bits.
pub(super) fn get_counter(value: &[u8]) -> Result<u64, DecodeError> {
    if value.len() == size_of::<u32>() { parse_u32(value).map(u64::from) } else { parse_u64(value) }
}

pub(super) fn get_port(value: &[u8]) -> Result<u16, DecodeError> {
    parse_u16_be(value)
}

pub(super) fn get_name(value: &[u8]) -> Result<String, DecodeError> {
    parse_string(value).context("a name")
}

/// An address of a family, from the 16 bytes of `union nf_inet_addr` or from as many as it has.
pub(super) fn get_address(family: Family, value: &[u8]) -> Result<IpAddr, DecodeError> {
    let wrong = || DecodeError::invalid_ip_address(value.len());
    match family {
        Family::V4 => value.first_chunk().map(|bytes: &[u8; 4]| Ipv4Addr::from(*bytes).into()),
        Family::V6 => value.first_chunk().map(|bytes: &[u8; 16]| Ipv6Addr::from(*bytes).into()),
    }
    .ok_or_else(wrong)
}

/// Bytes that were recorded, as pairs of hexadecimal digits.
#[cfg(test)]
pub(super) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
    use proptest::prelude::*;

    #[test]
    fn a_message_has_the_headers_and_the_padding_of_netlink() {
        let attributes = [put_nested(command::SERVICE, &[put_u16(1, 2), put_name(6, "rr")])];
        let message = message(0x1c, Command::DelService, &attributes);
        let mut message =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let [af, length] = [2u16.to_ne_bytes(), 40u32.to_ne_bytes()[..2].try_into().unwrap()];
        let short = |value: u16| value.to_ne_bytes();
        let expected = [
            [length, [0, 0], short(0x1c), [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]].concat(), // nlmsghdr
            vec![3, 1, 0, 0],                                                               // genlmsghdr
            [short(20), short(0x8001)].concat(), // the nested service
            [short(6), short(1), af, [0, 0]].concat(), // its family
            [short(7), short(6), *b"rr", [0, 0]].concat(), // its scheduler
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn an_attribute_that_is_cut_off_is_an_error() {
        let whole = bytes(&[put_u32(1, 7), put_u32(2, 8)]);
        assert_eq!(attributes(&whole).filter(Result::is_ok).count(), 2);
        let found: Vec<_> = attributes(&whole[..whole.len() - 1]).collect();
        assert!(matches!(&found[..], [Ok((1, _)), Err(_)]), "{found:?}");
        assert!(find(&whole, 3, "timeout").unwrap_err().to_string().contains("no timeout"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_attributes_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for attribute in attributes(&bytes) {
                let Ok((_, value)) = attribute else { break };
                let _ = (get_u8(value), get_u16(value), get_u32(value), get_counter(value));
                let _ = (get_port(value), get_name(value));
                let _ = (get_address(Family::V4, value), get_address(Family::V6, value));
            }
        }

        #[test]
        fn addresses_come_back(address in any::<IpAddr>()) {
            let bytes = bytes(&[put_address(3, address)]);
            let value = find(&bytes, 3, "address").unwrap();
            prop_assert_eq!(get_address(Family::of(address), value).unwrap(), address);
        }
    }
}
