//! Identifiers: of clusters, networks, nodes and endpoints (48 random bits), VNIs and MAC addresses.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Text that is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}: expected {expected}")]
pub struct ParseIdError {
    text: String,
    what: &'static str,
    expected: &'static str,
}

/// Makes a newtype that is written as text, in JSON too.
macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(D::Error::custom)
            }
        }
    };
}
pub(super) use text_serde;

/// Describes a newtype that is written as text: the API's document has its pattern and words.
macro_rules! text_schema {
    ($name:ident, $pattern:literal, $description:literal) => {
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .pattern(Some($pattern))
                    .description(Some($description))
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}
pub(super) use text_schema;

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        ///
        /// 48 random bits, written as 12 lower-case hexadecimal digits: short enough to be part of
        /// an interface name (15 bytes), long enough that two do not meet.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Draws a new identifier.
            pub fn random(rng: &mut impl Rng) -> Self {
                Self(rng.next_u64() >> 16)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:012x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let valid = text.len() == 12
                    && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                let id = valid.then(|| u64::from_str_radix(text, 16).ok()).flatten();
                id.map(Self).ok_or_else(|| ParseIdError {
                    text: text.to_owned(),
                    what: $what,
                    expected: "12 lower-case hexadecimal digits",
                })
            }
        }

        text_serde!($name);
        text_schema!($name, "^[0-9a-f]{12}$", "12 lower-case hexadecimal digits.");
    };
}

random_id!(
    /// Identifies a network for as long as it exists, whatever its name.
    NetworkId,
    "a network id"
);
random_id!(
    /// Identifies an endpoint: one interface of one container on one network.
    EndpointId,
    "an endpoint id"
);
random_id!(
    /// Identifies a service for as long as it exists, whatever its name.
    ServiceId,
    "a service id"
);
random_id!(
    /// Identifies a machine; it is drawn once and kept in the agent's state directory, so that two
    /// machines with one name are noticed.
    NodeId,
    "a node id"
);
random_id!(
    /// Identifies a check for as long as nodes are asked for it.
    CheckId,
    "a check id"
);
random_id!(
    /// Identifies the shared state of a cluster: it is drawn when a store is used first, so that
    /// a store that was replaced by another is noticed.
    ClusterId,
    "a cluster id"
);

/// A VXLAN network identifier: 24 bits, not zero (RFC 7348, section 5).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The highest VNI.
    pub const MAX: u32 = 0x00ff_ffff;

    /// Takes a number from 1 to [`Vni::MAX`].
    pub fn new(number: u32) -> Option<Self> {
        (1..=Self::MAX).contains(&number).then_some(Self(number))
    }

    /// The number itself.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Vni {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for Vni {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u32::deserialize(deserializer)?;
        Self::new(number)
            .ok_or_else(|| D::Error::custom(format!("VNI {number} is not within 1 and {}", Self::MAX)))
    }
}

impl utoipa::PartialSchema for Vni {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::Integer)
            .minimum(Some(1))
            .maximum(Some(Self::MAX))
            .description(Some("A VXLAN network identifier (RFC 7348, section 5)."))
            .into()
    }
}

impl utoipa::ToSchema for Vni {}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Draws a locally administered unicast address (IEEE 802: bit 1 of the first byte set, bit 0
    /// clear). It says nothing about an IP address, so a reused IP address never meets a
    /// neighbour entry that looks right and is not.
    pub fn random(rng: &mut impl Rng) -> Self {
        let mut bytes = [0; 6];
        rng.fill_bytes(&mut bytes);
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }

    /// The link-local IPv6 address with the modified EUI-64 of this address (RFC 4291, appendix A).
    pub fn link_local(self) -> std::net::Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        let (first, middle) = (pair(a ^ 0x02, b), (pair(c, 0xff), pair(0xfe, d)));
        std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, first, middle.0, middle.1, pair(e, f))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseIdError {
            text: text.to_owned(),
            what: "a MAC address",
            expected: "six hexadecimal bytes with colons between",
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(hex).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or_else(error)
    }
}

text_serde!(MacAddr);
text_schema!(
    MacAddr,
    "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$",
    "An Ethernet address: six hexadecimal bytes with colons between."
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints() {
        let id = NetworkId::random(&mut rand::rng());
        assert_eq!(id.to_string().len(), 12);
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn an_id_of_another_form_is_refused() {
        for text in ["", "0123456789a", "0123456789abc", "0123456789AB", "+23456789abc", "../../../etc"]
        {
            assert!(text.parse::<EndpointId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_random_mac_is_local_and_unicast() {
        for _ in 0..100 {
            assert_eq!(MacAddr::random(&mut rand::rng()).0[0] & 0x03, 0x02);
        }
    }

    #[test]
    fn a_mac_reads_back_and_gives_its_link_local_address() {
        let mac: MacAddr = "02:11:22:33:44:55".parse().unwrap();
        assert_eq!(mac.to_string(), "02:11:22:33:44:55");
        assert_eq!(mac.link_local().to_string(), "fe80::11:22ff:fe33:4455");
        assert!("02:11:22:33:44".parse::<MacAddr>().is_err());
        assert!("02:11:22:33:44:55:66".parse::<MacAddr>().is_err());
        assert!("02:11:22:33:44:+5".parse::<MacAddr>().is_err());
    }

    #[test]
    fn vni_zero_and_25_bits_are_refused() {
        assert_eq!(Vni::new(0), None);
        assert_eq!(Vni::new(1 << 24), None);
        assert!(serde_json::from_str::<Vni>("16777216").is_err());
        assert_eq!(serde_json::from_str::<Vni>("16777215").unwrap().number(), Vni::MAX);
    }
}
