//! Which address of this machine the tunnels use: never a guess.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;

use crate::model::IfName;

/// What the configuration says about the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Underlay {
    /// This address.
    Address(IpAddr),
    /// The address of this interface.
    Interface(IfName),
    /// The address within this range.
    Range(IpNetwork),
}

/// Text that names no underlay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither an address, nor a range (CIDR), nor an interface name")]
pub struct ParseUnderlayError(String);

impl FromStr for Underlay {
    type Err = ParseUnderlayError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseUnderlayError(text.chars().take(60).collect());
        if text.contains('/') {
            return text.parse().map(Self::Range).map_err(|_| error());
        }
        match text.parse() {
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => text.parse().map(Self::Interface).map_err(|_| error()),
        }
    }
}

impl fmt::Display for Underlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Interface(interface) => interface.fmt(f),
            Self::Range(range) => range.fmt(f),
        }
    }
}

/// An address of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The interface that has it.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
    /// The interface's MTU.
    pub mtu: u32,
}

/// Why no address was chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// The machine has no address that could be used.
    #[error(
        "this machine has no address for the tunnels (loopback and link-local ones do not count): \
         give an interface an address"
    )]
    None,
    /// Nothing was asked for and there are several.
    #[error("this machine has several addresses: choose with --underlay one of {}", list(.0))]
    Several(Vec<Candidate>),
    /// What was asked for is true of several.
    #[error("underlay {wanted} has several addresses: choose with --underlay one of {}", list(.found))]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// What fits.
        found: Vec<Candidate>,
    },
    /// What was asked for is true of none.
    #[error("underlay {wanted} is no address of this machine: --underlay can be one of {}", list(.there))]
    NoMatch {
        /// What was asked for.
        wanted: String,
        /// What there is.
        there: Vec<Candidate>,
    },
}

fn list(candidates: &[Candidate]) -> String {
    let shown = candidates.iter().map(|c| format!("{} ({})", c.address, c.interface));
    shown.collect::<Vec<_>>().join(", ")
}

/// Chooses the address of the tunnels. Loopback, link-local, multicast and unspecified addresses
/// are never chosen. The first of several is never taken: it changes with the order of interfaces.
///
/// # Errors
/// When none or several fit; the message lists what there is.
pub fn choose(wanted: Option<&Underlay>, candidates: &[Candidate]) -> Result<Candidate, UnderlayError> {
    let there: Vec<Candidate> = candidates.iter().filter(|c| is_global(c.address)).cloned().collect();
    let fits = |c: &&Candidate| match wanted {
        None => true,
        Some(Underlay::Address(address)) => c.address == *address,
        Some(Underlay::Interface(interface)) => c.interface == interface.as_str(),
        Some(Underlay::Range(range)) => range.contains(c.address),
    };
    let found: Vec<Candidate> = there.iter().filter(fits).cloned().collect();
    match (found.as_slice(), wanted) {
        ([only], _) => Ok(only.clone()),
        _ if there.is_empty() => Err(UnderlayError::None),
        ([], Some(wanted)) => Err(UnderlayError::NoMatch { wanted: wanted.to_string(), there }),
        (_, Some(wanted)) => Err(UnderlayError::Ambiguous { wanted: wanted.to_string(), found }),
        (_, None) => Err(UnderlayError::Several(found)),
    }
}

fn is_global(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(list: &[(&str, &str)]) -> Vec<Candidate> {
        let candidate = |(interface, address): &(&str, &str)| Candidate {
            interface: (*interface).to_owned(),
            address: address.parse().unwrap(),
            mtu: 1500,
        };
        list.iter().map(candidate).collect()
    }

    fn chosen(wanted: &str, list: &[(&str, &str)]) -> Result<String, UnderlayError> {
        let wanted: Option<Underlay> = (!wanted.is_empty()).then(|| wanted.parse().unwrap());
        choose(wanted.as_ref(), &candidates(list)).map(|candidate| candidate.address.to_string())
    }

    const LOCAL: [(&str, &str); 4] =
        [("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "fe80::1"), ("eth0", "169.254.7.7")];
    const TWO: [(&str, &str); 3] =
        [("lo", "127.0.0.1"), ("eth0", "192.0.2.1"), ("eth1", "198.51.100.1")];
    const BOTH: [(&str, &str); 2] = [("eth0", "192.0.2.1"), ("eth0", "2001:db8::1")];

    #[test]
    fn the_only_global_address_is_taken() {
        let mut list = LOCAL.to_vec();
        list.push(("eth0", "192.0.2.1"));
        assert_eq!(chosen("", &list).unwrap(), "192.0.2.1");
        assert_eq!(chosen("eth0", &list).unwrap(), "192.0.2.1");
    }

    #[test]
    fn several_addresses_are_listed_with_their_interfaces() {
        let error = chosen("", &TWO).unwrap_err().to_string();
        for part in ["192.0.2.1 (eth0)", "198.51.100.1 (eth1)", "--underlay"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("127.0.0.1"), "{error}");
    }

    #[test]
    fn an_address_an_interface_or_a_range_chooses() {
        for wanted in ["198.51.100.1", "eth1", "198.51.100.0/24"] {
            assert_eq!(chosen(wanted, &TWO).unwrap(), "198.51.100.1", "{wanted}");
        }
    }

    #[test]
    fn an_interface_with_two_addresses_is_ambiguous() {
        let error = chosen("eth0", &BOTH).unwrap_err();
        assert!(matches!(&error, UnderlayError::Ambiguous { found, .. } if found.len() == 2));
        assert!(error.to_string().contains("2001:db8::1 (eth0)"), "{error}");
        assert_eq!(chosen("2001:db8::/32", &BOTH).unwrap(), "2001:db8::1");
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        for wanted in ["192.0.2.9", "eth7", "203.0.113.0/24", "127.0.0.1", "lo0"] {
            let error = chosen(wanted, &TWO).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains("192.0.2.1 (eth0)"), "{error}");
        }
    }

    #[test]
    fn local_addresses_are_never_candidates() {
        for wanted in ["", "169.254.7.7", "eth0", "127.0.0.0/8"] {
            assert_eq!(chosen(wanted, &LOCAL), Err(UnderlayError::None), "{wanted}");
        }
    }

    #[test]
    fn text_that_names_no_underlay_is_refused() {
        for text in ["", "10.0.0.0/33", "a/b", "interface-name-too-long", "10.0.0.1:80"] {
            assert!(text.parse::<Underlay>().is_err(), "{text}");
        }
    }
}
