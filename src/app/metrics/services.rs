//! What this node's containers have with services: connections and bytes, by backend.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::gauge;
use crate::app::agent::Agent;
use crate::app::dataplane::{Load, Loads};
use crate::lb::Front;
use crate::model::{External, Service, Snapshot};

/// What the balancing engine counted on the networks that this node uses, when it was read last.
pub(in crate::app) struct Services(pub(in crate::app) Arc<Agent>, pub(in crate::app) Loads);

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

/// A network, a service of it and a backend, by name.
type Labels = [(&'static str, String); 3];

/// What a backend has, of all ports and addresses of its service.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Sum {
    active: u64,
    connections: u64,
    incoming: u64,
    outgoing: u64,
}

/// A counter: its name, what it means, and its value.
type Counted = (&'static str, &'static str, fn(&Sum) -> u64);

impl Collector for Services {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sums = sums(&self.0.snapshot(), self.1.all());
        encode(&mut encoder, &sums)
    }
}

fn encode(encoder: &mut DescriptorEncoder<'_>, sums: &BTreeMap<Labels, Sum>) -> fmt::Result {
    let help = "Connections that are established from this node to a service's backend.";
    let active = sums.iter().map(|(labels, sum)| (labels.clone(), sum.active));
    gauge(encoder, ("service_active_connections", help, None), active)?;
    let counters: [Counted; 3] = [
        ("service_connections", "Connections from this node to a service's backend.", |s| s.connections),
        ("service_sent_bytes", "Bytes from this node to a service's backend.", |s| s.incoming),
        ("service_received_bytes", "Bytes to this node from a service's backend.", |s| s.outgoing),
    ];
    for (name, help, value) in counters {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, sum) in sums {
            family.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value(sum), None)?;
        }
    }
    Ok(())
}

/// The sums by names; what has no name any more is left out.
fn sums(
    snapshot: &Snapshot,
    loads: impl IntoIterator<Item = (crate::model::NetworkId, Vec<Load>)>,
) -> BTreeMap<Labels, Sum> {
    let mut sums = BTreeMap::new();
    for (id, loads) in loads {
        let (Some(network), Some(members)) = (snapshot.networks.get(&id), snapshot.members.get(&id))
        else {
            continue;
        };
        let services = snapshot.services.values().flat_map(|service| {
            let addresses = service.addresses.get(&id).into_iter().flatten();
            addresses.map(|address| (*address, service.as_ref()))
        });
        let services: BTreeMap<IpAddr, &Service> = services.collect();
        let backends = members.endpoints.values().filter(|e| e.service.is_some());
        let backends = backends.flat_map(|e| e.addresses.iter().map(|a| (*a, e.name.as_str())));
        let backends: BTreeMap<IpAddr, &str> = backends.collect();
        for load in loads {
            let (Front::Port { address, .. } | Front::All { address, .. }) = load.front;
            let Some(service) = services.get(&address) else { continue };
            let endpoint = backends.get(&load.backend.ip()).map(|name| (*name).to_owned());
            let outside = || service.external.iter().find(|external| external.is_at(load.backend));
            let Some(backend) = endpoint.or_else(|| outside().map(External::to_string)) else {
                continue;
            };
            let labels = [
                ("network", network.name.to_string()),
                ("service", service.name.to_string()),
                ("backend", backend),
            ];
            let sum: &mut Sum = sums.entry(labels).or_default();
            sum.active += u64::from(load.active);
            sum.connections += load.connections;
            sum.incoming += load.incoming_bytes;
            sum.outgoing += load.outgoing_bytes;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::app::metrics::Metrics;
    use crate::model::{Network, NetworkId, Protocol, Versioned};

    /// Sums that somebody else brings.
    #[derive(Debug)]
    struct Given(BTreeMap<Labels, Sum>);

    impl Collector for Given {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            encode(&mut encoder, &self.0)
        }
    }

    #[test]
    fn a_target_outside_counts_for_the_service_that_led_there() {
        let id: NetworkId = "aaaaaaaaaaaa".parse().unwrap();
        let network: Network = serde_json::from_value(json!({
            "id": id, "name": "shop", "vni": 4097, "uplink": 3, "subnets": [{"cidr": "10.9.0.0/24"}],
        }))
        .unwrap();
        let service = |name: &str, vip: &str, target: &str| {
            let external: External = target.parse().unwrap();
            let service: Service = serde_json::from_value(json!({
                "id": "dddddddddddd", "name": name, "networks": [id], "replicas": 0,
                "addresses": {id.to_string(): [vip]}, "endpoint_mode": "vip",
                "update_order": "stop-first", "update_parallelism": 1, "external": [external],
            }))
            .unwrap();
            (service.name.clone(), Arc::new(service))
        };
        let services =
            [service("db", "10.9.0.2", "192.0.2.10:5432"), service("old", "10.9.0.3", "192.0.2.10")];
        let snapshot = Snapshot {
            networks: Arc::new([(id, Arc::new(Versioned { value: network, revision: 1 }))].into()),
            services: Arc::new(services.into()),
            members: [(id, Arc::default())].into(),
            ..Snapshot::default()
        };
        let load = |vip: &str, backend: &str, connections| Load {
            front: Front::Port { protocol: Protocol::Tcp, address: vip.parse().unwrap(), port: 80 },
            backend: backend.parse().unwrap(),
            weight: 1,
            active: 1,
            inactive: 0,
            connections,
            incoming_bytes: 0,
            outgoing_bytes: 0,
        };
        let loads = vec![
            load("10.9.0.2", "192.0.2.10:5432", 1),
            load("10.9.0.2", "192.0.2.10:99", 2),
            load("10.9.0.3", "192.0.2.10:80", 4),
            load("10.9.0.3", "192.0.2.10:81", 8),
            load("10.9.0.9", "192.0.2.10:81", 16),
        ];
        let sums = sums(&snapshot, [(id, loads)]);
        let shown: Vec<_> = sums
            .iter()
            .map(|([_, service, backend], sum)| {
                format!("{} {} {}", service.1, backend.1, sum.connections)
            })
            .collect();
        assert_eq!(shown, ["db 192.0.2.10:5432 1", "old 192.0.2.10 12"]);
    }

    #[test]
    fn every_backend_has_its_samples() {
        let labels = [("network", "shop"), ("service", "web"), ("backend", "web.1")];
        let labels = labels.map(|(key, value)| (key, value.to_owned()));
        let sum = Sum { active: 2, connections: 7, incoming: 100, outgoing: 200 };
        let metrics = Metrics::new("1.2.3");
        metrics.bring(Given(BTreeMap::from([(labels, sum)])));
        let text = metrics.text();
        let names = "{network=\"shop\",service=\"web\",backend=\"web.1\"}";
        for (name, value) in [
            ("netctl_service_active_connections", 2),
            ("netctl_service_connections_total", 7),
            ("netctl_service_sent_bytes_total", 100),
            ("netctl_service_received_bytes_total", 200),
        ] {
            let line = format!("{name}{names} {value}");
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
