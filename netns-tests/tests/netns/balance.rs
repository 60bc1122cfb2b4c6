//! Services: how connections are balanced. For a kernel that has IPVS.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::IpAddr;

use serde_json::{Value, json};
use world::Transport::{Sctp, Tcp};
use world::{
    Config, Container, Node, NodeOptions, Server, Session, Space, World, ask, ask_udp, wait_for,
};

use crate::cluster::{Cluster, DUAL, member};

crate::tests![
    one_machine_balances_and_a_backend_meets_itself,
    connections_go_to_each_backend_in_turn_and_show_the_clients_own_address,
    every_port_is_balanced_over_every_protocol,
];

/// Those that take many minutes in there.
pub(crate) const LONG: &[crate::Test] = &[
    (
        "who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones",
        who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones,
    ),
    (
        "an_agents_death_ends_no_connection_and_what_others_change_comes_back",
        an_agents_death_ends_no_connection_and_what_others_change_comes_back,
    ),
];

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

fn one_machine_balances_and_a_backend_meets_itself(world: &World) {
    let n1 = world.node("n1");
    let _agent = n1.agent(&Config::embedded().set("lb", "ipvs"));
    let shown = n1.ok("node inspect n1").stdout;
    assert!(
        shown.lines().any(|line| line.starts_with("Balancing") && line.ends_with("ipvs")),
        "{shown}"
    );
    n1.ok(&format!("network create shop {DUAL}"));
    let vips = create(&n1, "web", &json!({"ports": [{"port": 80, "target": 8080}]}));
    let client = member(&n1, "client");
    for vip in &vips {
        let refused = ask(&client.container.space, Tcp, vip, 80).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "no backend: {refused}");
    }
    let backends = ["b1", "b2"].map(|name| n1.attach_with("shop", name, "--service web"));
    let _servers: Vec<_> =
        backends.iter().map(|b| Server::start(&b.space, Tcp, 8080, &b.name)).collect();
    let own = n1.addresses("shop", "b1");
    wait_for("both are balanced", || ipvs(&n1).is_some_and(|table| table.matches("-w 1").count() == 4));
    for (family, vip) in vips.iter().enumerate() {
        let answers: Vec<_> =
            (0..4).map(|_| ask(&client.container.space, Tcp, vip, 80).unwrap()).collect();
        assert!(answers.iter().all(|a| a.client == parse(&client.addresses[family])), "{answers:?}");
        assert_eq!(count(answers.into_iter().map(|a| a.server)), each(&[("b1", 2), ("b2", 2)]));
        for _ in 0..4 {
            let answer = ask(&backends[0].space, Tcp, vip, 80).unwrap();
            let seen = if answer.server == "b1" { GATEWAYS[family] } else { &own[family] };
            assert_eq!(answer.client, parse(seen), "{answer:?}");
        }
    }
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

impl Shop {
    /// Changes an endpoint's record in the store.
    #[track_caller]
    fn edit(&self, name: &str, change: impl Fn(&mut Value)) {
        let prefix = format!("netctl/members/{}/endpoints/", self.cluster.n1().network_id("shop"));
        let keys = self.cluster.etcd.keys();
        let mut records = keys.iter().filter(|(key, _)| key.starts_with(&prefix));
        let named = |value: &String| value.contains(&format!("\"name\":\"{name}\""));
        let (key, value) = records.find(|(_, value)| named(value)).expect("the endpoint is there");
        self.put(key, value, change);
    }

    /// Changes the service's record in the store.
    fn edit_service(&self, change: impl Fn(&mut Value)) {
        let key = "netctl/base/services/web";
        self.put(key, &self.cluster.etcd.keys()[key], change);
    }

    fn put(&self, key: &str, value: &str, change: impl Fn(&mut Value)) {
        let mut value: Value = serde_json::from_str(value).unwrap();
        change(&mut value);
        self.cluster.etcd.put(key, &value.to_string());
    }

    /// What the machines have acknowledged of drained endpoints: how many connections are open.
    fn acks(&self) -> Vec<u64> {
        let keys = self.cluster.etcd.keys();
        let acks = keys.iter().filter(|(key, _)| key.contains("/acks/"));
        let open =
            |value: &String| serde_json::from_str::<Value>(value).unwrap()["connections"].as_u64();
        acks.filter_map(|(_, value)| open(value)).collect()
    }

    /// Who answers `times` connections from a container to an address at port 80.
    #[track_caller]
    fn answers(&self, from: &Space, vip: &str, times: usize) -> BTreeMap<String, usize> {
        count((0..times).map(|_| ask(from, Tcp, vip, 80).unwrap().server))
    }
}

/// How many of the backends' names, each as often.
fn each(names: &[(&str, usize)]) -> BTreeMap<String, usize> {
    names.iter().map(|(name, times)| ((*name).to_owned(), *times)).collect()
}

fn every_port_is_balanced_over_every_protocol(world: &World) {
    let shop = Shop::new(world, json!({}));
    let client = member(shop.cluster.n1(), "client");
    let from = &client.container.space;
    let _servers: Vec<_> = shop
        .backends
        .iter()
        .flat_map(|b| {
            let space = &b.container.space;
            [Server::udp(space, 5000, &b.name), Server::start(space, Sctp, 5001, &b.name)]
        })
        .collect();
    let all = each(&[("b1", 2), ("b2", 2), ("b3", 2)]);
    for (vip, own) in shop.vips.iter().zip(&client.addresses) {
        for port in [80, 8080] {
            let answers: Vec<_> = (0..6).map(|_| ask(from, Tcp, vip, port).unwrap()).collect();
            assert!(answers.iter().all(|answer| answer.client == parse(own)), "{answers:?}");
            assert_eq!(count(answers.into_iter().map(|answer| answer.server)), all, "{vip} {port}");
        }
        let answers: Vec<_> = (0..6).map(|_| ask_udp(from, vip, 5000, 0).unwrap()).collect();
        assert!(answers.iter().all(|answer| answer.client == parse(own)), "{answers:?}");
        assert_eq!(count(answers.into_iter().map(|answer| answer.server)), all, "{vip} over UDP");
        assert!(from.ping(vip), "an address with backends answers pings");
        // Nobody listens there: the backend says so.
        let refused = ask(from, Tcp, vip, 81).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    }
    let answers = count((0..6).map(|_| ask(from, Sctp, &shop.vips[0], 5001).unwrap().server));
    assert_eq!(answers, all, "over SCTP");
    // A backend of all ports meets itself too.
    let own = &shop.backends[0];
    let seen = (0..3).map(|_| ask(&own.container.space, Tcp, &shop.vips[0], 80).unwrap());
    let seen: Vec<_> = seen.filter(|answer| answer.server == own.name).collect();
    assert_eq!(seen.iter().map(|answer| answer.client).collect::<Vec<_>>(), [parse(GATEWAYS[0])]);
    // A change of the service is followed.
    shop.edit_service(|service| service["balancing"]["affinity"] = json!(300));
    wait_for("clients stay where they are", || {
        ipvs(shop.cluster.n1()).is_some_and(|table| table.matches("-p 300").count() == 2)
    });
    for vip in &shop.vips {
        assert_eq!(shop.answers(from, vip, 5).len(), 1, "{vip}");
    }
}

fn who_is_drained_or_not_ready_gets_no_new_connections_and_keeps_its_old_ones(world: &World) {
    let shop = Shop::new(world, json!({"scheduler": "wrr", "ports": [{"port": 80, "target": 80}]}));
    let client = member(shop.cluster.n1(), "client");
    let from = &client.container.space;
    shop.edit("b1", |endpoint| endpoint["weight"] = json!(3));
    shop.wait_weights(&[3, 1, 1]);
    for vip in &shop.vips {
        assert_eq!(shop.answers(from, vip, 10), each(&[("b1", 6), ("b2", 2), ("b3", 2)]), "{vip}");
    }

    let mut session = Session::open(from, Tcp, &shop.vips[0], 80).unwrap();
    while session.ask().unwrap().server != "b2" {
        session = Session::open(from, Tcp, &shop.vips[0], 80).unwrap();
    }
    assert_eq!(shop.acks(), [0; 0]);
    shop.edit("b2", |endpoint| endpoint["state"] = json!("draining"));
    shop.wait_weights(&[3, 0, 1]);
    wait_for("all machines have acknowledged", || shop.acks().len() == 3);
    assert_eq!(shop.acks().iter().sum::<u64>(), 1, "one connection is open");
    for vip in &shop.vips {
        assert_eq!(shop.answers(from, vip, 8), each(&[("b1", 6), ("b3", 2)]), "{vip}");
    }
    assert_eq!(session.ask().unwrap().server, "b2", "what was open goes on");
    drop(session);
    wait_for("the drain is over", || shop.acks() == [0, 0, 0]);

    // Nobody is ready: what is open goes on, what is new is refused at once.
    let mut session = Session::open(from, Tcp, &shop.vips[0], 80).unwrap();
    let server = session.ask().unwrap().server;
    for name in ["b1", "b3"] {
        shop.edit(name, |endpoint| endpoint["state"] = json!("unhealthy"));
    }
    shop.wait_weights(&[0, 0, 0]);
    for vip in &shop.vips {
        let refused = ask(from, Tcp, vip, 80).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
        wait_for("a ping is refused at once", || {
            let ping = from.try_sh(&format!("ping -n -c 1 -W 60 {vip}"));
            !ping.success() && ping.stdout.contains("nreachable")
        });
    }
    assert_eq!(session.ask().unwrap().server, server);

    // An entry that has expired is no connection any more: the client is told.
    shop.edit_service(|service| service["balancing"]["timeouts"] = json!({"tcp": 1}));
    let sandbox = shop.cluster.n1().sandbox("shop");
    wait_for("the timeout is set", || sandbox.sh("ipvsadm -L --timeout").contains(": 1 120 300"));
    assert_eq!(session.ask().unwrap().server, server);
    let entry = format!("{}:", client.addresses[0]);
    wait_for("the entry has expired", || {
        !sandbox
            .sh("ipvsadm -Lcn")
            .lines()
            .any(|line| line.contains(&entry) && line.contains("ESTABLISHED"))
    });
    let reset = session.ask().unwrap_err();
    assert!(matches!(reset.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{reset}");

    // One that is released goes at once, with all that it had.
    for name in ["b1", "b3"] {
        shop.edit(name, |endpoint| drop(endpoint.as_object_mut().unwrap().remove("state")));
    }
    wait_for("they are back", || shop.weights(0) == [3, 0, 1]);
    shop.cluster.n1().ok("endpoint detach b1 --network shop");
    assert!(
        !ipvs(shop.cluster.n1()).unwrap().contains(&format!("-r {}:", shop.backends[0].addresses[0]))
    );
    assert_eq!(shop.answers(from, &shop.vips[1], 3), each(&[("b3", 3)]));
}

fn an_agents_death_ends_no_connection_and_what_others_change_comes_back(world: &World) {
    let mut shop = Shop::new(world, json!({"ports": [{"port": 80, "target": 8080}]}));
    let host = "ipvsadm -Sn";
    shop.cluster.n1().space.sh(
        "ipvsadm -A -t 192.168.50.99:80 -s rr && ipvsadm -a -t 192.168.50.99:80 -r 192.168.50.98:80 -m",
    );
    let hosts = shop.cluster.n1().space.sh(host);
    let client = member(shop.cluster.n1(), "client");
    let (from, vip) = (client.container.space.clone(), shop.vips[0].clone());
    let mut sessions: Vec<Session> =
        (0..3).map(|_| Session::open(&from, Tcp, &vip, 80).unwrap()).collect();
    let before: Vec<_> = sessions.iter_mut().map(|session| session.ask().unwrap()).collect();
    let table = ipvs(shop.cluster.n1()).unwrap();
    shop.cluster.kill(0);
    assert_eq!(shop.answers(&from, &vip, 3).len(), 3, "the kernel balances on");
    shop.cluster.start(0);
    wait_for("the agent has looked at the network", || {
        let log = shop.cluster.n1().ctl("-o json endpoint ls");
        log.success()
    });
    assert_eq!(ipvs(shop.cluster.n1()).unwrap(), table);
    let after: Vec<_> = sessions.iter_mut().map(|session| session.ask().unwrap()).collect();
    assert_eq!(after, before);

    let sandbox = shop.cluster.n1().sandbox("shop");
    for damage in [
        "ipvsadm -C",
        "ipvsadm -D -t $VIP:80",
        "ipvsadm -E -t $VIP:80 -s lc",
        "ipvsadm -e -t $VIP:80 -r $BACKEND:8080 -m -w 7",
        "ipvsadm -A -t $VIP:99 -s rr",
        "ipvsadm --set 5 5 5",
    ] {
        let damage = damage.replace("$VIP", &vip).replace("$BACKEND", &shop.backends[1].addresses[0]);
        sandbox.sh(&damage);
        wait_for(&format!("put right: {damage}"), || {
            ipvs(shop.cluster.n1()).is_some_and(|found| same(&found, &table))
                && sandbox.sh("ipvsadm -L --timeout").contains(": 900 120 300")
        });
    }
    assert_eq!(shop.answers(&from, &vip, 3).len(), 3);

    // A dead node's backend goes from the other tables, and comes back with it.
    shop.cluster.kill(2);
    let there = |shop: &Shop| shop.weights(0).len() == 3 && shop.weights(1).len() == 3;
    wait_for("the dead node's backend has gone", || {
        shop.weights(0).len() == 2 && shop.weights(1).len() == 2
    });
    assert_eq!(shop.answers(&from, &vip, 4), each(&[("b1", 2), ("b2", 2)]));
    shop.cluster.start(2);
    wait_for("it is back", || there(&shop));
    assert_eq!(shop.cluster.n1().space.sh(host), hosts, "the host's own table is its own");
}

/// Whether two tables have the same lines, in whatever order.
fn same(one: &str, other: &str) -> bool {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    lines(one) == lines(other)
}
