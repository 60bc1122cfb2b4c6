//! A service: containers that do the same, and the addresses that are kept for them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Balancing, External, HealthCheck, Name, NetworkId, ServiceId};

/// The most containers of a service.
pub const MAX_REPLICAS: u32 = 1_000_000;

/// How a service is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EndpointMode {
    /// By one address of its own on each network.
    #[default]
    Vip,
    /// By its containers' addresses.
    Dnsrr,
}

/// What comes first when a container is replaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    /// The old one ends, then the new one starts.
    #[default]
    StopFirst,
    /// The new one starts, then the old one ends: meanwhile both need an address.
    StartFirst,
}

/// What a person asks for when creating a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// The service's name, unique in the cluster.
    pub name: Name,
    /// Its networks, by name or id; at least one.
    pub networks: Vec<String>,
    /// How many containers it has.
    pub replicas: u32,
    /// How it is reached.
    #[serde(default)]
    pub endpoint_mode: EndpointMode,
    /// What comes first when a container is replaced.
    #[serde(default)]
    pub update_order: UpdateOrder,
    /// How many containers are replaced at a time; 0: all.
    #[serde(default = "one")]
    pub update_parallelism: u32,
    /// Its own addresses; what is not given is chosen. Each must be of one of its networks.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Its targets outside of the overlay, beside its containers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external: Vec<External>,
    /// How connections are spread over its containers.
    #[serde(default)]
    pub balancing: Balancing,
    /// How it is found out whether its containers are well.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// A reservation whose addresses the service takes over.
    #[serde(default)]
    pub reservation: Option<Name>,
    /// Free text by key.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

/// A service as the cluster keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// Its identity; a service made anew under an old name is another one.
    pub id: ServiceId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// Its networks.
    pub networks: Vec<NetworkId>,
    /// How many containers it has.
    pub replicas: u32,
    /// How it is reached.
    pub endpoint_mode: EndpointMode,
    /// What comes first when a container is replaced.
    pub update_order: UpdateOrder,
    /// How many containers are replaced at a time; 0: all.
    pub update_parallelism: u32,
    /// Its own addresses on each network; none with `dnsrr`.
    #[schema(value_type = BTreeMap<String, Vec<String>>)]
    pub addresses: BTreeMap<NetworkId, Vec<IpAddr>>,
    /// Its targets outside of the overlay, beside its containers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external: Vec<External>,
    /// How connections are spread over its containers.
    #[serde(default)]
    pub balancing: Balancing,
    /// How it is found out whether its containers are well; `null`: they are, once plugged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Free text by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Service {
    /// How many containers may need an address at a time: while some are replaced, more than it
    /// has.
    pub fn most_containers(&self) -> u64 {
        let surge = match (self.update_order, self.update_parallelism) {
            (UpdateOrder::StopFirst, _) => 0,
            (UpdateOrder::StartFirst, 0) => self.replicas,
            (UpdateOrder::StartFirst, parallelism) => parallelism.min(self.replicas),
        };
        u64::from(self.replicas) + u64::from(surge)
    }
}

/// Addresses of a network that are kept for somebody: of each family that the network has, as many
/// as `count` less those that were `drawn` already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reservation {
    /// The service whose endpoints draw on it; `None`: it only holds them.
    pub service: Option<ServiceId>,
    /// How many addresses were asked for.
    pub count: u64,
    /// How many endpoints have drawn one.
    pub drawn: u64,
    /// The store's lease with which it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<i64>,
}

impl Reservation {
    /// How many are still kept.
    pub fn left(&self) -> u64 {
        self.count.saturating_sub(self.drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_first_needs_more_than_the_replicas() {
        let service = |order: &str, parallelism: u32| -> Service {
            serde_json::from_value(serde_json::json!({
                "id": "0123456789ab", "name": "web", "networks": [], "replicas": 5,
                "endpoint_mode": "vip", "update_order": order, "update_parallelism": parallelism,
                "addresses": {},
            }))
            .unwrap()
        };
        for (order, parallelism, most) in [
            ("stop-first", 1, 5),
            ("stop-first", 0, 5),
            ("start-first", 1, 6),
            ("start-first", 2, 7),
            ("start-first", 9, 10),
            ("start-first", 0, 10),
        ] {
            assert_eq!(service(order, parallelism).most_containers(), most, "{order} {parallelism}");
        }
    }
}
