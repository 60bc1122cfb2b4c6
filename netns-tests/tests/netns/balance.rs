//! Services: how connections are balanced. For a kernel that has IPVS.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use world::Transport::Tcp;
use world::{Container, Node, NodeOptions, Server, World, ask, wait_for};

use crate::cluster::{Cluster, DUAL, member};

crate::tests![connections_go_to_each_backend_in_turn_and_show_the_clients_own_address,];

/// A network `shop` over three machines with a service `web`, and a backend of it on each machine.
struct Shop {
    cluster: Cluster,
    backends: Vec<Backend>,
    /// The service's addresses: IPv4, IPv6.
    vips: Vec<String>,
}

/// A container that belongs to the service.
struct Backend {
    name: String,
    container: Container,
    addresses: Vec<String>,
    _servers: Vec<Server>,
}

impl Shop {
    /// `balancing` is that of the service.
    #[track_caller]
    fn new(world: &World, balancing: Value) -> Self {
        let cluster = Cluster::with(world, 3, &NodeOptions::default(), |config| {
            config.set("lb", "ipvs").set("rest", "0s").set("lease", "20s")
        });
        cluster.n1().ok(&format!("network create shop {DUAL}"));
        let vips = create(cluster.n1(), "web", &balancing);
        let mut shop = Self { cluster, backends: Vec::new(), vips };
        for index in 0..3 {
            shop.add(index, &format!("b{}", index + 1));
        }
        shop.wait_weights(&[1, 1, 1]);
        shop
    }

    /// Plugs a backend in on a machine, with servers at the ports 80 and 8080.
    #[track_caller]
    fn add(&mut self, index: usize, name: &str) {
        let node = &self.cluster.nodes[index];
        let container = node.attach_with("shop", name, "--service web");
        let addresses = node.addresses("shop", name);
        let servers = [80, 8080].map(|port| Server::start(&container.space, Tcp, port, name));
        let name = name.to_owned();
        self.backends.push(Backend { name, container, addresses, _servers: servers.into() });
    }

    /// The weights of a sandbox's destinations by backend, of the first service of the family.
    fn weights(&self, index: usize) -> Vec<u32> {
        let Some(table) = ipvs(&self.cluster.nodes[index]) else { return Vec::new() };
        let weight = |backend: &Backend| {
            let line =
                table.lines().find(|line| line.contains(&format!("-r {}:", backend.addresses[0])));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        };
        self.backends.iter().filter_map(weight).collect()
    }

    /// Waits until every machine gives the backends these weights, in their order.
    #[track_caller]
    fn wait_weights(&self, expected: &[u32]) {
        wait_for("every machine has the backends", || {
            (0..3).all(|index| self.weights(index) == expected)
        });
    }
}

/// The table of IPVS in the sandbox of `shop`, as `ipvsadm` saves it.
fn ipvs(node: &Node) -> Option<String> {
    let output = node.sandbox("shop").try_sh("ipvsadm -Sn");
    output.success().then_some(output.stdout)
}

/// Creates a service on `shop`; gives its addresses.
#[track_caller]
fn create(node: &Node, name: &str, balancing: &Value) -> Vec<String> {
    let spec = json!({
        "name": name, "networks": ["shop"], "replicas": 6, "balancing": balancing,
    });
    let made = node.client().call("POST", "/v1/services", Some(&spec)).unwrap();
    assert_eq!(made.status, 201, "{made:?}");
    let addresses = made.body["addresses"].as_object().unwrap().values().next().unwrap();
    let addresses = addresses.as_array().unwrap().iter();
    addresses.map(|address| address.as_str().unwrap().to_owned()).collect()
}

/// How many times each of the answers came.
fn count<T: Ord>(answers: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer).or_default() += 1;
    }
    counts
}

fn parse(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn connections_go_to_each_backend_in_turn_and_show_the_clients_own_address(world: &World) {
    let shop = Shop::new(world, json!({"ports": [{"port": 80, "target": 8080}]}));
    for node in &shop.cluster.nodes {
        let client = member(node, &format!("{}-client", node.name()));
        for (vip, own) in shop.vips.iter().zip(&client.addresses) {
            let answers = (0..6).map(|_| ask(&client.container.space, Tcp, vip, 80).unwrap());
            let answers: Vec<_> = answers.collect();
            assert!(answers.iter().all(|answer| answer.client == parse(own)), "{answers:?}");
            let counts = count(answers.into_iter().map(|answer| answer.server));
            assert_eq!(counts, shop.backends.iter().map(|b| (b.name.clone(), 2)).collect(), "{vip}");
        }
        // A backend is a client like any other, and meets itself.
        let (backend, of) = shop
            .backends
            .iter()
            .zip(&shop.cluster.nodes)
            .find(|(_, of)| of.name() == node.name())
            .unwrap();
        assert_eq!(of.name(), node.name());
        for (family, vip) in shop.vips.iter().enumerate() {
            for _ in 0..6 {
                let answer = ask(&backend.container.space, Tcp, vip, 80).unwrap();
                let seen = if answer.server == backend.name {
                    GATEWAYS[family]
                } else {
                    &backend.addresses[family]
                };
                assert_eq!(answer.client, parse(seen), "{answer:?}");
            }
        }
    }
}

/// The gateways of `shop`.
const GATEWAYS: [&str; 2] = ["10.9.0.1", "fd00:9::1"];
