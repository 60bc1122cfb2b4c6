//! A node: a machine that runs the agent.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Engine, MacAddr, NodeId, NodeName};

/// Bytes that VXLAN adds to an inner IP packet over an IPv4 underlay: inner Ethernet 14, VXLAN 8,
/// UDP 8, IPv4 20 (RFC 7348, section 5).
pub const OVERHEAD_IPV4: u32 = 50;
/// The same over an IPv6 underlay, whose header is 40.
pub const OVERHEAD_IPV6: u32 = 70;

/// A machine of the cluster as the others need to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Which machine it is.
    pub id: NodeId,
    /// Its name, unique in the cluster.
    pub name: NodeName,
    /// Its address on the underlay: the tunnel's outer address.
    #[schema(value_type = String)]
    pub underlay: IpAddr,
    /// The inner Ethernet address of its tunnel devices (VTEPs), the same in every network.
    pub vtep_mac: MacAddr,
    /// The UDP port on which it accepts VXLAN.
    pub tunnel_port: u16,
    /// The largest inner IP packet that its underlay carries in one piece.
    pub mtu: u32,
    /// Subnets of its interfaces and routes, which the default pool does not give out.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub subnets_in_use: Vec<IpNetwork>,
    /// Free text by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What balances the connections of services there.
    #[serde(default)]
    pub lb: Engine,
    /// Why that.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub lb_reason: String,
    /// The control group whose sockets are asked for services there; none: no sockets are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket_lb: Option<PathBuf>,
    /// The version of its agent.
    #[serde(default)]
    pub version: String,
}

impl Node {
    /// The next hop through which another node's sandbox reaches this node: the underlay address
    /// where the families agree, else the link-local address of the VTEP. Both are only keys of a
    /// permanent neighbour entry; nothing is ever sent to them.
    pub fn next_hop(&self, ipv4: bool) -> IpAddr {
        match self.underlay {
            IpAddr::V4(_) if ipv4 => self.underlay,
            IpAddr::V4(_) | IpAddr::V6(_) => self.vtep_mac.link_local().into(),
        }
    }
}

/// The largest inner IP packet that an underlay of this family and MTU carries in one piece.
pub fn inner_mtu(underlay: IpAddr, underlay_mtu: u32) -> u32 {
    let overhead = if underlay.is_ipv4() { OVERHEAD_IPV4 } else { OVERHEAD_IPV6 };
    underlay_mtu.saturating_sub(overhead)
}

/// The addresses of the two ends of a network's uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UplinkAddresses {
    /// On the host, IPv4 (/31).
    pub host4: Ipv4Addr,
    /// In the sandbox, IPv4 (/31).
    pub sandbox4: Ipv4Addr,
    /// On the host, IPv6 (/127).
    pub host6: Ipv6Addr,
    /// In the sandbox, IPv6 (/127).
    pub sandbox6: Ipv6Addr,
}

/// The IPv4 range of all uplinks: link-local, so it meets nobody's routes, and away from the
/// addresses at which clouds serve metadata (169.254.169.254, 169.254.170.2).
pub const UPLINKS4: &str = "169.254.64.0/18";
/// The IPv6 range of all uplinks: a unique local prefix of our own.
pub const UPLINKS6: &str = "fd6e:6574:6374:6c00::/64";
/// How many uplinks the ranges hold.
pub const UPLINK_COUNT: u16 = 8192;

impl UplinkAddresses {
    /// The addresses of uplink `number`, which is below [`UPLINK_COUNT`].
    pub fn new(number: u16) -> Self {
        let number = number % UPLINK_COUNT;
        let base4 = u32::from(Ipv4Addr::new(169, 254, 64, 0)) + 2 * u32::from(number);
        let host6 = Ipv6Addr::new(0xfd6e, 0x6574, 0x6374, 0x6c00, 0, 0, 0, 2 * number);
        let sandbox6 = Ipv6Addr::new(0xfd6e, 0x6574, 0x6374, 0x6c00, 0, 0, 0, 2 * number + 1);
        Self { host4: base4.into(), sandbox4: (base4 + 1).into(), host6, sandbox6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_stay_within_their_ranges_and_apart() {
        let range: IpNetwork = UPLINKS4.parse().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..UPLINK_COUNT {
            let uplink = UplinkAddresses::new(number);
            assert!(range.contains(uplink.host4.into()) && range.contains(uplink.sandbox4.into()));
            assert!(seen.insert(uplink.host4) && seen.insert(uplink.sandbox4));
            assert!(UPLINKS6.parse::<IpNetwork>().unwrap().contains(uplink.sandbox6.into()));
        }
    }

    #[test]
    fn vxlan_takes_50_bytes_of_ipv4_and_70_of_ipv6() {
        assert_eq!(inner_mtu("192.0.2.1".parse().unwrap(), 1500), 1450);
        assert_eq!(inner_mtu("2001:db8::1".parse().unwrap(), 1500), 1430);
    }
}
