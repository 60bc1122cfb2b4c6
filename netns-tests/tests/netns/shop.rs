//! The ground of the tests of services: a network `shop` with a service `web`, its backends, and what
//! the kernel balances to them.
//!
//! Much of it speaks with the API and reads what the kernel shows in /proc: where these tests run,
//! starting a program takes its time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use world::Transport::{self, Tcp};
use world::{Answer, Config, Container, Node, NodeOptions, Server, Session, Space, World, wait_for};

use crate::cluster::{Cluster, DUAL, Member};
use crate::engine::{lb, rows};

/// The gateways of `shop`.
pub(crate) const GATEWAYS: [&str; 2] = ["10.9.0.1", "fd00:9::1"];
/// How long a client waits for a connection or an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Some machines with a backend of the service `web` on each.
pub(crate) struct Shop {
    pub cluster: Cluster,
    pub backends: Vec<Backend>,
    /// The service's addresses: IPv4, IPv6.
    pub vips: Vec<String>,
    /// The network's sandbox on each machine.
    pub sandboxes: Vec<Space>,
}

/// A container that belongs to the service, with servers at the TCP ports 80 and 8080 and at the UDP
/// port 5000.
pub(crate) struct Backend {
    pub name: String,
    pub member: Member,
    _servers: Vec<Server>,
}

impl Shop {
    /// `balancing` is that of the service; its backends are `b1`, `b2`, …
    #[track_caller]
    pub fn new(
        world: &World,
        machines: usize,
        balancing: Value,
        adjust: impl Fn(Config) -> Config,
    ) -> Self {
        let cluster = Cluster::with(world, machines, &NodeOptions::default(), |config| {
            adjust(config.set("lb", &lb()).set("rest", "0s").set("lease", "20s"))
        });
        let vips = open(cluster.n1(), balancing);
        let backend = |(index, node)| Backend::start(node, &format!("b{}", index + 1));
        let nodes = cluster.nodes.iter().map(AsRef::as_ref);
        let backends: Vec<Backend> = nodes.enumerate().map(backend).collect();
        let sandboxes = cluster.nodes.iter().map(|node| node.sandbox("shop")).collect();
        let shop = Self { cluster, backends, vips, sandboxes };
        shop.wait_weights(&vec![1; machines]);
        shop
    }

    /// The weights of the backends in a machine's table, in their order; those that it has.
    pub fn weights(&self, index: usize) -> Vec<u32> {
        weights(&self.sandboxes[index], &self.backends)
    }

    /// Waits until every machine gives the backends these weights.
    #[track_caller]
    pub fn wait_weights(&self, expected: &[u32]) {
        let machines = 0..self.sandboxes.len();
        wait_for(&format!("every machine has the weights {expected:?}"), || {
            machines.clone().all(|index| self.weights(index) == expected)
        });
    }

    /// Changes the service.
    #[track_caller]
    pub fn update(&self, change: &Value) {
        call(self.cluster.n1(), "PATCH", "/v1/services/web", change);
    }

    /// Changes an endpoint's record in the store.
    #[track_caller]
    pub fn edit(&self, name: &str, change: impl Fn(&mut Value)) {
        let prefix = format!("netctl/members/{}/endpoints/", self.cluster.n1().network_id("shop"));
        let keys = self.cluster.etcd.keys();
        let mut records = keys.iter().filter(|(key, _)| key.starts_with(&prefix));
        let named = |value: &String| value.contains(&format!("\"name\":\"{name}\""));
        let (key, value) = records.find(|(_, value)| named(value)).expect("the endpoint is there");
        let mut value: Value = serde_json::from_str(value).unwrap();
        change(&mut value);
        self.cluster.etcd.put(key, &value.to_string());
    }
}

impl Backend {
    /// Plugs a backend in.
    #[track_caller]
    pub fn start(node: &Node, name: &str) -> Self {
        Self::of(node, "web", name)
    }

    /// Plugs a backend of any service in.
    #[track_caller]
    pub fn of(node: &Node, service: &str, name: &str) -> Self {
        let member = plug(node, name, Some(service));
        let space = &member.container.space;
        let mut servers: Vec<_> =
            [80, 8080].map(|port| Server::start(space, Tcp, port, name)).into_iter().collect();
        servers.push(Server::udp(space, 5000, name));
        Self { name: name.to_owned(), member, _servers: servers }
    }
}

/// Calls an agent's API; it must do what it is asked for.
#[track_caller]
pub(crate) fn call(node: &Node, method: &str, path: &str, body: &Value) -> Value {
    let answer = node.client().call(method, path, (!body.is_null()).then_some(body)).unwrap();
    assert!(answer.status < 300, "{method} {path} {body}: {answer:?}");
    answer.body
}

/// Makes the network and the service; gives the service's addresses.
#[track_caller]
pub(crate) fn open(node: &Node, balancing: Value) -> Vec<String> {
    node.ok(&format!("network create shop {DUAL}"));
    create(node, "web", balancing)
}

/// Creates a service on `shop`; gives its addresses.
#[track_caller]
pub(crate) fn create(node: &Node, name: &str, balancing: Value) -> Vec<String> {
    let spec = json!({
        "name": name, "networks": ["shop"], "replicas": 6, "balancing": balancing,
    });
    let made = call(node, "POST", "/v1/services", &spec);
    texts(made["addresses"].as_object().unwrap().values().next().unwrap())
}

/// Plugs a new container in.
#[track_caller]
pub(crate) fn plug(node: &Node, name: &str, service: Option<&str>) -> Member {
    plug_into(node, node.container(name), name, service)
}

/// Plugs a container in.
#[track_caller]
pub(crate) fn plug_into(node: &Node, container: Container, name: &str, service: Option<&str>) -> Member {
    let request = json!({"network": "shop", "name": name, "netns": container.path, "service": service});
    let made = call(node, "POST", "/v1/endpoints", &request);
    Member { container, addresses: texts(&made["addresses"]) }
}

/// The texts of a list.
pub(crate) fn texts(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// The weights of backends in a sandbox, in their order, by their IPv4 addresses; those that are there.
pub(crate) fn weights(sandbox: &Space, backends: &[Backend]) -> Vec<u32> {
    let table = destinations(sandbox);
    let weight = |backend: &Backend| table.get(&parse(&backend.member.addresses[0])).copied();
    backends.iter().filter_map(weight).collect()
}

/// The backends that a sandbox knows with their weights, of all services together.
pub(crate) fn destinations(sandbox: &Space) -> BTreeMap<IpAddr, u32> {
    rows(sandbox).into_iter().collect()
}

/// What answers connections to an address at a port, one after the other.
#[track_caller]
pub(crate) fn ask_all(
    from: &Space,
    transport: Transport,
    address: &str,
    port: u16,
    times: usize,
) -> Vec<Answer> {
    let to = SocketAddr::new(parse(address), port);
    let ask = || Session::connect(transport, to, PATIENCE)?.ask();
    let answers: io::Result<Vec<_>> = from.enter(|| (0..times).map(|_| ask()).collect());
    answers.unwrap_or_else(|error| panic!("{transport:?} from {} to {to}: {error}", from.name()))
}

/// Who answers how often at port 80.
#[track_caller]
pub(crate) fn answers(from: &Space, address: &str, times: usize) -> BTreeMap<String, usize> {
    servers(ask_all(from, Tcp, address, 80, times))
}

/// How often each server has answered.
pub(crate) fn servers(answers: impl IntoIterator<Item = Answer>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.server).or_default() += 1;
    }
    counts
}

/// How often each of these servers should answer.
pub(crate) fn each(servers: &[(&str, usize)]) -> BTreeMap<String, usize> {
    servers.iter().map(|(server, times)| ((*server).to_owned(), *times)).collect()
}

/// A client's requests to a service at port 80, each over a connection of its own.
pub(crate) fn requests(
    vip: &str,
    patience: Duration,
) -> impl FnMut() -> io::Result<String> + Clone + use<> {
    let address = SocketAddr::new(parse(vip), 80);
    move || Ok(Session::connect(Tcp, address, patience)?.ask()?.server)
}

/// Connects until a server has answered; gives the connection to it.
#[track_caller]
pub(crate) fn session_with(from: &Space, address: &str, port: u16, server: &str) -> Session {
    for _ in 0..10 {
        let mut session = Session::open(from, Tcp, address, port).unwrap();
        if session.ask().unwrap().server == server {
            return session;
        }
    }
    panic!("{server} has not answered one of ten connections to {address}");
}

#[track_caller]
pub(crate) fn parse(address: &str) -> IpAddr {
    address.parse().unwrap()
}
