//! A network: its subnets, its VNI and its options.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::subnet::{self, Subnet, SubnetError};
use super::{Name, NetworkId, Vni};

/// The smallest MTU a network may have: IPv6 needs it (RFC 8200, section 5).
pub const MIN_MTU: u32 = 1280;
/// The largest: an IPv4 packet's limit.
pub const MAX_MTU: u32 = 65_535;

/// A network request that cannot be fulfilled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// One of the subnets is wrong.
    #[error(transparent)]
    Subnet(#[from] SubnetError),
    /// Two subnets share addresses.
    #[error("subnets {0} and {1} overlap: an address must belong to one of them only")]
    Overlap(IpNetwork, IpNetwork),
    /// A gateway, range or reserved address that belongs to none of the subnets.
    #[error("{what} {value} is not within any of the network's subnets ({subnets}): give one that is")]
    NoSubnet {
        /// Which option.
        what: &'static str,
        /// Its value.
        value: String,
        /// The subnets that were given.
        subnets: String,
    },
    /// Two gateways or two ranges for one subnet.
    #[error("subnet {subnet} has two of {what}: give one at most")]
    Twice {
        /// Which option.
        what: &'static str,
        /// The subnet.
        subnet: IpNetwork,
    },
    /// A change of subnets that names none.
    #[error("no subnet is given: give at least one")]
    Empty,
    /// An MTU out of bounds.
    #[error("MTU {0} cannot be used: give {MIN_MTU} to {MAX_MTU}")]
    Mtu(u32),
    /// A label that cannot be kept.
    #[error("label key {0:?} cannot be used: give 1 to 253 printable characters without '='")]
    Label(String),
}

/// What a person asks for when creating a network.
///
/// Gateways, ranges and reserved addresses are matched to the subnets that contain them. Without a
/// subnet one is taken from the default pool (of IPv6 too, with `ipv6`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The network's name, unique in the cluster.
    pub name: Name,
    /// Subnets, IPv4 and IPv6.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub subnets: Vec<IpNetwork>,
    /// Gateways, at most one per subnet; by default a subnet's first host address.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub gateways: Vec<IpAddr>,
    /// Parts of the subnets from which addresses are given, at most one per subnet.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub ranges: Vec<IpNetwork>,
    /// Addresses that no endpoint gets.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub reserved: BTreeSet<IpAddr>,
    /// The prefix length of the IPv4 subnet that the default pool gives; by default the agent's.
    #[serde(default)]
    pub prefix: Option<u8>,
    /// Whether the default pool gives an IPv6 subnet too.
    #[serde(default)]
    pub ipv6: bool,
    /// The VNI; by default the lowest free one of the agent's range.
    #[serde(default)]
    pub vni: Option<Vni>,
    /// The MTU of the containers' interfaces; by default what the underlay leaves.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Whether the network has no way out of the overlay.
    #[serde(default)]
    pub internal: bool,
    /// Whether the hosts of all nodes reach its addresses.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_access: bool,
    /// Free text by key.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl NetworkSpec {
    /// Checks everything but the name's and the VNI's uniqueness, and gives the subnets with each
    /// its gateway, range and reserved addresses. No subnets: an empty list.
    ///
    /// # Errors
    /// Says which value cannot be used, and what could.
    pub fn subnets(&self) -> Result<Vec<Subnet>, NetworkError> {
        if let Some(mtu) = self.mtu
            && !(MIN_MTU..=MAX_MTU).contains(&mtu)
        {
            return Err(NetworkError::Mtu(mtu));
        }
        let valid_key = |key: &str| {
            (1..=253).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic() && b != b'=')
        };
        if let Some(key) = self.labels.keys().find(|key| !valid_key(key)) {
            return Err(NetworkError::Label(key.chars().take(40).collect()));
        }
        Placing {
            subnets: &self.subnets,
            gateways: &self.gateways,
            ranges: &self.ranges,
            reserved: &self.reserved,
        }
        .place()
    }

    /// Whether an IPv4 subnet has to be chosen for it, and whether an IPv6 one.
    pub fn left_open(&self) -> [bool; 2] {
        [self.subnets.is_empty(), self.ipv6 && !self.subnets.iter().any(IpNetwork::is_ipv6)]
    }
}

/// What a person asks for when adding subnets to a network: as when creating one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpandSpec {
    /// The subnets to add, of the families that the network has.
    #[schema(value_type = Vec<String>)]
    pub subnets: Vec<IpNetwork>,
    /// Gateways, at most one per subnet; by default a subnet's first host address.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub gateways: Vec<IpAddr>,
    /// Parts of the subnets from which addresses are given, at most one per subnet.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub ranges: Vec<IpNetwork>,
    /// Addresses that no endpoint gets.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub reserved: BTreeSet<IpAddr>,
}

impl ExpandSpec {
    /// Checks all that can be checked without the cluster, and gives the subnets with each its
    /// gateway, range and reserved addresses. At least one.
    ///
    /// # Errors
    /// Says which value cannot be used, and what could.
    pub fn subnets(&self) -> Result<Vec<Subnet>, NetworkError> {
        if self.subnets.is_empty() {
            return Err(NetworkError::Empty);
        }
        Placing {
            subnets: &self.subnets,
            gateways: &self.gateways,
            ranges: &self.ranges,
            reserved: &self.reserved,
        }
        .place()
    }
}

/// Subnets, and options that belong to the subnets that contain them.
struct Placing<'a> {
    subnets: &'a [IpNetwork],
    gateways: &'a [IpAddr],
    ranges: &'a [IpNetwork],
    reserved: &'a BTreeSet<IpAddr>,
}

impl Placing<'_> {
    fn place(&self) -> Result<Vec<Subnet>, NetworkError> {
        let subnets =
            self.subnets.iter().map(|&cidr| self.subnet(cidr)).collect::<Result<Vec<_>, _>>()?;
        for (index, a) in subnets.iter().enumerate() {
            for b in &subnets[index + 1..] {
                if subnet::overlap(a.cidr(), b.cidr()) {
                    return Err(NetworkError::Overlap(a.cidr(), b.cidr()));
                }
            }
        }
        self.check_all_placed()?;
        Ok(subnets)
    }

    fn subnet(&self, cidr: IpNetwork) -> Result<Subnet, NetworkError> {
        let gateway = Self::only("gateway", cidr, self.gateways, |gateway| *gateway)?;
        let range = Self::only("range", cidr, self.ranges, IpNetwork::network)?;
        let reserved = self.reserved.iter().copied().filter(|a| cidr.contains(*a)).collect();
        Ok(Subnet::new(cidr, gateway, range, reserved)?)
    }

    /// The one of `values` that lies within `cidr`.
    fn only<T: Copy>(
        what: &'static str,
        cidr: IpNetwork,
        values: &[T],
        address: impl Fn(&T) -> IpAddr,
    ) -> Result<Option<T>, NetworkError> {
        let mut within = values.iter().filter(|value| cidr.contains(address(value)));
        let first = within.next().copied();
        match within.next() {
            Some(_) => Err(NetworkError::Twice { what, subnet: cidr }),
            None => Ok(first),
        }
    }

    fn check_all_placed(&self) -> Result<(), NetworkError> {
        let given = self
            .gateways
            .iter()
            .map(|a| ("gateway", *a, a.to_string()))
            .chain(self.ranges.iter().map(|r| ("range", r.network(), r.to_string())))
            .chain(self.reserved.iter().map(|a| ("reserved address", *a, a.to_string())));
        for (what, address, value) in given {
            if !self.subnets.iter().any(|subnet| subnet.contains(address)) {
                let subnets = self.subnets.iter().map(IpNetwork::to_string).collect::<Vec<_>>();
                let subnets = if subnets.is_empty() { "none given".into() } else { subnets.join(", ") };
                return Err(NetworkError::NoSubnet { what, value, subnets });
            }
        }
        Ok(())
    }
}

/// A network as the cluster keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its identity; a network made anew under an old name is another one.
    pub id: NetworkId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// Its subnets; at least one. They do not overlap.
    pub subnets: Vec<Subnet>,
    /// The VXLAN network identifier, unique in the cluster.
    pub vni: Vni,
    /// A small number, unique in the cluster, from which each node derives the addresses of the
    /// network's uplink.
    pub uplink: u16,
    /// The MTU that was asked for; `None`: what the underlay leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Whether the network has no way out of the overlay.
    #[serde(default)]
    pub internal: bool,
    /// Whether the hosts of all nodes reach its addresses: each is an endpoint of it then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_access: bool,
    /// Free text by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Subnets that are being removed: nothing gets an address of theirs any more, and they stand
    /// until it is certain that nothing has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub leaving: Vec<Subnet>,
    /// Set while the network is being removed: nothing can be attached to it any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removing: bool,
}

impl Network {
    /// All subnets that stand: those that are given from, and those that are being removed.
    pub fn standing(&self) -> impl Iterator<Item = &Subnet> {
        self.subnets.iter().chain(&self.leaving)
    }

    /// The network as nodes have it: what is being removed stands like the rest.
    pub fn as_it_stands(&self) -> Self {
        Self { subnets: self.standing().cloned().collect(), leaving: Vec::new(), ..self.clone() }
    }

    /// The subnet that contains an address.
    pub fn subnet_of(&self, address: IpAddr) -> Option<&Subnet> {
        self.subnets.iter().find(|subnet| subnet.cidr().contains(address))
    }

    /// The families that it has, each with whether it is IPv4 and what it is called.
    pub fn families(&self) -> impl Iterator<Item = (bool, &'static str)> {
        let all = [(self.has_ipv4(), true, "IPv4"), (self.has_ipv6(), false, "IPv6")];
        all.into_iter().filter(|(has, ..)| *has).map(|(_, ipv4, name)| (ipv4, name))
    }

    /// Whether it has a subnet of this family.
    pub fn has_ipv4(&self) -> bool {
        self.subnets.iter().any(|subnet| subnet.cidr().is_ipv4())
    }

    /// Whether it has a subnet of this family.
    pub fn has_ipv6(&self) -> bool {
        self.subnets.iter().any(|subnet| subnet.cidr().is_ipv6())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> Result<Vec<Subnet>, NetworkError> {
        let mut json = json;
        json["name"] = "web".into();
        serde_json::from_value::<NetworkSpec>(json).unwrap().subnets()
    }

    #[test]
    fn options_go_to_the_subnet_that_contains_them() {
        let subnets = spec(serde_json::json!({
            "subnets": ["10.9.0.0/24", "fd00:9::/64"],
            "gateways": ["fd00:9::fe", "10.9.0.254"],
            "ranges": ["10.9.0.128/25"],
            "reserved": ["10.9.0.200"],
        }))
        .unwrap();
        assert_eq!(subnets[0].gateway().to_string(), "10.9.0.254");
        assert_eq!(subnets[0].range().unwrap().to_string(), "10.9.0.128/25");
        assert_eq!(subnets[0].reserved().len(), 1);
        assert_eq!(subnets[1].gateway().to_string(), "fd00:9::fe");
        assert_eq!(subnets[1].range(), None);
    }

    #[test]
    fn overlapping_subnets_are_refused() {
        let error = spec(serde_json::json!({"subnets": ["10.0.0.0/8", "10.9.0.0/24"]}));
        assert!(matches!(error, Err(NetworkError::Overlap(..))));
    }

    #[test]
    fn an_option_that_belongs_nowhere_is_refused() {
        for option in [
            serde_json::json!({"subnets": ["10.9.0.0/24"], "gateways": ["10.8.0.1"]}),
            serde_json::json!({"subnets": ["10.9.0.0/24"], "ranges": ["10.8.0.0/25"]}),
            serde_json::json!({"reserved": ["10.8.0.1"]}),
        ] {
            assert!(matches!(spec(option), Err(NetworkError::NoSubnet { .. })));
        }
    }

    #[test]
    fn two_gateways_for_one_subnet_are_refused() {
        let error = spec(serde_json::json!({
            "subnets": ["10.9.0.0/24"], "gateways": ["10.9.0.1", "10.9.0.2"],
        }));
        assert!(matches!(error, Err(NetworkError::Twice { what: "gateway", .. })));
    }

    #[test]
    fn added_subnets_are_checked_as_those_of_a_new_network_are() {
        let expand = |json| serde_json::from_value::<ExpandSpec>(json).unwrap().subnets();
        let subnets = expand(serde_json::json!({
            "subnets": ["10.9.0.0/24", "fd00:9::/64"], "gateways": ["10.9.0.254"],
            "ranges": ["10.9.0.128/25"], "reserved": ["fd00:9::9"],
        }))
        .unwrap();
        assert_eq!(subnets[0].gateway().to_string(), "10.9.0.254");
        assert_eq!(subnets[0].range().unwrap().to_string(), "10.9.0.128/25");
        assert_eq!(subnets[1].reserved().len(), 1);
        assert_eq!(expand(serde_json::json!({"subnets": []})), Err(NetworkError::Empty));
        for wrong in [
            serde_json::json!({"subnets": ["10.9.0.7/24"]}),
            serde_json::json!({"subnets": ["10.9.0.0/31"]}),
            serde_json::json!({"subnets": ["169.254.64.0/24"]}),
            serde_json::json!({"subnets": ["10.9.0.0/16", "10.9.1.0/24"]}),
            serde_json::json!({"subnets": ["10.9.0.0/24"], "gateways": ["10.9.0.255"]}),
            serde_json::json!({"subnets": ["10.9.0.0/24"], "gateways": ["10.8.0.1"]}),
            serde_json::json!({"subnets": ["10.9.0.0/24"], "ranges": ["10.9.0.0/16"]}),
            serde_json::json!({"subnets": ["10.9.0.0/24"], "reserved": ["10.8.0.9"]}),
        ] {
            assert!(expand(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_mtu_that_ipv6_cannot_use_is_refused() {
        assert_eq!(spec(serde_json::json!({"mtu": 1279})), Err(NetworkError::Mtu(1279)));
        assert_eq!(spec(serde_json::json!({"mtu": 65536})), Err(NetworkError::Mtu(65536)));
    }

    #[test]
    fn a_label_key_with_an_equals_sign_is_refused() {
        assert!(matches!(spec(serde_json::json!({"labels": {"a=b": ""}})), Err(NetworkError::Label(_))));
    }
}
