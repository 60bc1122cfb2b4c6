//! What the targets share: the names of a network.

use std::net::Ipv4Addr;
use std::sync::{Arc, LazyLock};

use netctl::dns::answer::Terms;
use netctl::dns::{DomainName, Names, Zone};
use netctl::model::snapshot::Members;
use netctl::model::{Endpoint, Network, Node, Service, Snapshot};
use serde_json::{Value, json};

const SHOP: &str = "aaaaaaaaaaaa";

static DOMAIN: LazyLock<DomainName> =
    LazyLock::new(|| DomainName::parse("netctl.internal").expect("it is a name"));
static ZONE: LazyLock<Arc<Zone>> = LazyLock::new(zone);

/// With what a container on one network is answered: the service `web` has addresses and named ports,
/// `db` forty endpoints.
pub fn terms() -> Terms<'static> {
    let names = Names { domain: &DOMAIN, zones: std::slice::from_ref(&*ZONE) };
    Terms { names, ttl: 5, serial: 9 }
}

fn zone() -> Arc<Zone> {
    let node: Node = read(json!({
        "id": "cccccccccccc", "name": "n1", "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01",
        "tunnel_port": 4789, "mtu": 1450,
    }));
    let network: Network = read(json!({
        "id": SHOP, "name": "shop", "vni": 4097, "uplink": 3,
        "subnets": [{"cidr": "10.9.0.0/16"}, {"cidr": "fd00:9::/64"}],
    }));
    let service = |name: &str, mode: &str, addresses: Value, ports: Value| -> Arc<Service> {
        Arc::new(read(json!({
            "id": "dddddddddddd", "name": name, "networks": [SHOP], "replicas": 1,
            "addresses": addresses, "endpoint_mode": mode, "update_order": "stop-first",
            "update_parallelism": 1, "balancing": {"ports": ports},
        })))
    };
    let services = [
        service(
            "web",
            "vip",
            json!({SHOP: ["10.9.200.80", "fd00:9::80"]}),
            json!([{"name": "http", "port": 80, "target": 8080}]),
        ),
        service("db", "dnsrr", json!({}), json!([{"name": "sql", "port": 5432, "target": 5433}])),
    ];
    let endpoint = |number: u32| {
        let endpoint: Endpoint = read(json!({
            "id": format!("{number:012x}"), "name": format!("e{number}"), "network": SHOP, "node": "n1",
            "addresses": [Ipv4Addr::from(0x0a09_0100 + number)], "mac": "06:00:00:00:00:01",
            "service": "db",
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }));
        (endpoint.id, Arc::new(endpoint))
    };
    let snapshot = Snapshot {
        services: Arc::new(services.map(|service| (service.name.clone(), service)).into()),
        ..Snapshot::default()
    };
    let members = Members { endpoints: (0..40).map(endpoint).collect(), ..Members::default() };
    Arc::new(Zone::new(&node, &snapshot, &network, &members))
}

fn read<T: for<'de> serde::Deserialize<'de>>(value: Value) -> T {
    serde_json::from_value(value).expect("it is as the store has it")
}
