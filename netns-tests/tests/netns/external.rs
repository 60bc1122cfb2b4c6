//! Services that lead outside of the overlay, and a move inside that no client notices.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Error, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde_json::{Value, json};
use world::Transport::Tcp;
use world::{
    Answer, Config, Node, Server, Session, Space, World, ask, ask_udp, gateway_frame, ipv4_udp,
    send_frame, wait_for,
};

use crate::cluster::{Cluster, DUAL, Member};
use crate::engine::lb;
use crate::shop::{Backend, GATEWAYS, call, destinations, parse, plug, texts};

crate::tests![
    a_name_leads_outside_on_every_machine_until_all_is_inside,
    what_is_not_outside_is_refused_and_leaves_nothing,
];

/// Those that need IPVS.
pub(crate) const BALANCED: &[crate::Test] = &[(
    "an_address_leads_outside_on_every_machine_until_all_is_inside",
    an_address_leads_outside_on_every_machine_until_all_is_inside,
)];

/// A machine outside that answers at TCP ports and at a UDP port.
struct Outside {
    node: Arc<Node>,
    _servers: Vec<Server>,
}

impl Outside {
    fn start(world: &World) -> Self {
        let node = world.outside("outside");
        let tcp = [8080, 5432].map(|port| Server::start(&node.space, Tcp, port, "outside"));
        let mut servers = Vec::from(tcp);
        servers.push(Server::udp(&node.space, 5000, "outside"));
        Self { node, _servers: servers }
    }

    /// Its addresses: IPv4, IPv6.
    fn addresses(&self) -> [&str; 2] {
        [self.node.ipv4(), self.node.ipv6()]
    }
}

/// What a name of both families leads to, as a container finds it.
#[track_caller]
fn found(from: &Space, name: &str) -> BTreeSet<String> {
    let dig = |kind: &str| from.sh(&format!("dig @10.9.0.1 +tries=1 +time=10 +short {name} {kind}"));
    (dig("A") + &dig("AAAA")).lines().map(str::to_owned).collect()
}

fn set(addresses: &[&str]) -> BTreeSet<String> {
    addresses.iter().map(|address| (*address).to_owned()).collect()
}

fn a_name_leads_outside_on_every_machine_until_all_is_inside(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let outside = Outside::start(world);
    n1.ok(&format!("network create shop {DUAL}"));
    let (a, b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let [v4, v6] = outside.addresses();
    n1.ok(&format!(
        "service create db --network shop --endpoint-mode dnsrr --port sql=8080 --external {v4} --external {v6}"
    ));
    let view = n1.ok("-o json service inspect db").json();
    assert_eq!((&view[0]["replicas"], &view[0]["ready"]), (&json!(0), &json!(0)));
    let clients = [(&a, n1), (&b, n2)];
    let everywhere = |what: &str, names: &[&str], expected: &BTreeSet<String>| {
        wait_for(what, || {
            clients.iter().all(|(c, _)| names.iter().all(|name| found(&c.space, name) == *expected))
        });
    };
    everywhere("the name leads outside", &["db", "tasks.db", "db.shop"], &set(&[v4, v6]));
    for (client, node) in clients {
        for (address, own) in [(v4, node.ipv4()), (v6, node.ipv6())] {
            let answer = ask(&client.space, Tcp, address, 8080).unwrap();
            assert_eq!(answer, Answer { server: "outside".to_owned(), client: parse(own) });
        }
    }
    // First both, then inside only.
    let moved = n2.attach_with("shop", "d1", "--service db");
    let inside = n2.addresses("shop", "d1");
    let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
    let _server = Server::start(&moved.space, Tcp, 8080, "inside");
    everywhere("it leads to both", &["db"], &set(&[v4, v6, inside[0], inside[1]]));
    let port = a.space.sh("dig @10.9.0.1 +short _sql._tcp.db SRV");
    assert_eq!(port, "0 0 8080 d1.shop.netctl.internal.\n", "what is outside has no name");
    n2.ok(&format!("service update db --replicas 1 --external-rm {v4} --external-rm {v6}"));
    everywhere("it leads inside", &["db", "tasks.db"], &set(&inside));
    for (client, _) in clients {
        for address in &inside {
            assert_eq!(ask(&client.space, Tcp, address, 8080).unwrap().server, "inside");
        }
    }
    n1.ok(&format!("service update db --external {v4}"));
    everywhere("and back", &["db"], &set(&[v4, inside[0], inside[1]]));
    n1.ok("ipam check");
}

fn what_is_not_outside_is_refused_and_leaves_nothing(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("network create inner --internal --subnet 10.8.0.0/24");
    n1.ok("service create db --network shop --endpoint-mode dnsrr --external 192.0.2.10");
    n1.ok("service create in --network inner --endpoint-mode dnsrr --replicas 0");
    let keys = cluster.etcd.lasting_keys();
    let create = "service create x --network shop --endpoint-mode dnsrr --external";
    for (command, words) in [
        (format!("{create} 10.9.0.7"), &["10.9.0.7", "subnet 10.9.0.0/24", "--service"][..]),
        (format!("{create} 2001:db8::10"), &["none of", "IPv6", "IPv4 address"]),
        (format!("{create} 127.0.0.1"), &["127.0.0.0/8", "loopback"]),
        (format!("{create} 0.0.0.0"), &["0.0.0.0/8"]),
        (format!("{create} 169.254.169.254"), &["link-local"]),
        (format!("{create} ff02::1"), &["multicast"]),
        (format!("{create} 255.255.255.255"), &["240.0.0.0/4"]),
        (format!("{create} db.example.org"), &["db.example.org", "host names are not looked up"]),
        (format!("{create} 192.0.2.1 --external 192.0.2.1"), &["given twice"]),
        (format!("{create} 192.0.2.1:5432"), &["dnsrr", "without a port, 192.0.2.1,", "vip"]),
        (format!("{create} 192.0.2.1 --network inner"), &["inner", "internal"]),
        ("service update in --external 192.0.2.1".to_owned(), &["inner", "internal"]),
        ("service update db --external 10.9.0.7".to_owned(), &["subnet 10.9.0.0/24"]),
        ("service update db --external 192.0.2.10".to_owned(), &["is there already"]),
        ("service update db --external ::1".to_owned(), &["loopback"]),
        ("service update db --external-rm 192.0.2.11".to_owned(), &["there is 192.0.2.10"]),
    ] {
        let refused = n1.ctl(&command);
        assert_eq!(refused.code, Some(2), "{command}: {refused}");
        assert!(words.iter().all(|word| refused.stderr.contains(word)), "{command}: {refused}");
        assert_eq!(cluster.etcd.lasting_keys(), keys, "{command}");
    }
    let expand = n1.ctl("network expand shop --subnet 192.0.2.0/24");
    assert!(expand.code == Some(5) && expand.stderr.contains("192.0.2.10 of service db"), "{expand}");
}

/// A container that asks the service.
#[derive(Clone, Copy)]
struct Client<'a> {
    member: &'a Member,
    node: &'a Node,
}

impl Client<'_> {
    fn space(&self) -> &Space {
        &self.member.container.space
    }

    /// What a server sees as the client: outside the machine, inside the container itself.
    fn seen(&self, server: &str, family: usize) -> IpAddr {
        match server {
            "outside" => parse([self.node.ipv4(), self.node.ipv6()][family]),
            own if own == self.member.container.name => parse(GATEWAYS[family]),
            _ => parse(&self.member.addresses[family]),
        }
    }

    /// Asks every address at a TCP and a UDP port so often that each of these servers answers once.
    #[track_caller]
    fn meets(&self, vips: &[String], (tcp, udp): (u16, u16), servers: &[&str]) {
        for (family, vip) in vips.iter().enumerate() {
            for over_udp in [false, true] {
                let ask = |_| match over_udp {
                    true => ask_udp(self.space(), vip, udp, 0),
                    false => ask(self.space(), Tcp, vip, tcp),
                };
                let what = format!("{vip}, over UDP: {over_udp}");
                let answers: Result<Vec<Answer>, Error> = (0..servers.len()).map(ask).collect();
                let answers = answers.unwrap_or_else(|error| panic!("{what}: {error}"));
                for answer in &answers {
                    assert_eq!(answer.client, self.seen(&answer.server, family), "{what}: {answer:?}");
                }
                let found: BTreeSet<String> = answers.into_iter().map(|a| a.server).collect();
                assert_eq!(found, set(servers), "{what}");
            }
        }
    }

    /// A connection to each of these servers, over which many requests went.
    #[track_caller]
    fn sessions(&self, vip: &str, servers: &[&str]) -> BTreeMap<String, Session> {
        let sessions = servers.iter().map(|_| {
            let mut session = Session::open(self.space(), Tcp, vip, 80).unwrap();
            let server = session.ask().unwrap().server;
            assert!((0..20).all(|_| session.ask().unwrap().server == server));
            (server, session)
        });
        let sessions: BTreeMap<String, Session> = sessions.collect();
        assert_eq!(sessions.keys().cloned().collect::<BTreeSet<_>>(), set(servers), "{vip}");
        sessions
    }
}

/// A service on two machines, and what leads to it.
struct Scene {
    cluster: Cluster,
    nodes: Vec<Arc<Node>>,
    outside: Outside,
    vips: Vec<String>,
    /// The network's sandbox on each machine.
    sandboxes: Vec<Space>,
    /// A container on each machine that belongs to no service.
    members: Vec<Member>,
}

impl Scene {
    fn new(world: &World) -> Self {
        let ipvs = |config: Config| config.set("lb", &lb()).set("rest", "0s");
        let cluster = Cluster::with(world, 2, &Default::default(), ipvs);
        let outside = Outside::start(world);
        let network = json!({"name": "shop", "subnets": ["10.9.0.0/24", "fd00:9::/64"]});
        call(cluster.n1(), "POST", "/v1/networks", &network);
        let external = outside.addresses().map(|address| json!({ "address": address }));
        let ports = [
            json!({"port": 80, "target": 8080}),
            json!({"port": 53, "target": 5000, "protocol": "udp"}),
        ];
        let spec = json!({
            "name": "db", "networks": ["shop"], "replicas": 0, "external": external,
            "balancing": {"ports": ports},
        });
        let made = call(cluster.n1(), "POST", "/v1/services", &spec);
        let vips = texts(made["addresses"].as_object().unwrap().values().next().unwrap());
        let nodes = cluster.nodes.clone();
        let members =
            nodes.iter().map(|node| plug(node, &format!("client-{}", node.name()), None)).collect();
        let sandboxes = nodes.iter().map(|node| node.sandbox("shop")).collect();
        Self { cluster, nodes, outside, vips, sandboxes, members }
    }

    /// Changes the service, and waits until every machine balances to these containers, and outside or
    /// not.
    #[track_caller]
    fn update(&self, change: &Value, backends: &[Backend], is_outside: bool) {
        call(&self.nodes[0], "PATCH", "/v1/services/db", change);
        self.wait(backends, is_outside);
    }

    #[track_caller]
    fn wait(&self, backends: &[Backend], is_outside: bool) {
        let inside = backends.iter().flat_map(|b| &b.member.addresses);
        let outside = self.outside.addresses().map(parse).into_iter().filter(|_| is_outside);
        let expected: BTreeMap<IpAddr, u32> =
            inside.map(|address| parse(address)).chain(outside).map(|address| (address, 1)).collect();
        let is_so = |sandbox: &Space| destinations(sandbox) == expected;
        wait_for(&format!("all balance to {expected:?}"), || self.sandboxes.iter().all(is_so));
    }
}

fn an_address_leads_outside_on_every_machine_until_all_is_inside(world: &World) {
    let mut scene = Scene::new(world);
    let nodes = scene.nodes.clone();
    let members = std::mem::take(&mut scene.members);
    let clients = [0, 1].map(|index| Client { member: &members[index], node: &nodes[index] });
    scene.wait(&[], true);
    let vips = scene.vips.clone();
    for client in clients {
        client.meets(&vips, (80, 53), &["outside"]);
        assert!(client.space().ping(&vips[0]), "an address with a target answers pings");
    }
    let direct = ask(clients[0].space(), Tcp, scene.outside.addresses()[0], 8080).unwrap();
    assert_eq!(direct.server, "outside", "who asks it by itself reaches it too");
    what_cannot_be_translated_does_not_leave(&scene, clients[0]);
    let mut open = vips.iter().map(|vip| clients[0].sessions(vip, &["outside"])).collect();
    the_agent_is_restarted(&mut scene, clients[0], &mut open);

    // It moves inside: first there are both.
    let backends = [("b1", 0), ("b2", 1)].map(|(name, index)| Backend::of(&nodes[index], "db", name));
    scene.wait(&backends, true);
    let all = ["b1", "b2", "outside"];
    let own = Client { member: &backends[0].member, node: &nodes[0] };
    for client in [clients[0], clients[1], own] {
        client.meets(&vips, (80, 53), &all);
    }
    let mut both: Vec<_> = vips.iter().map(|vip| clients[0].sessions(vip, &all)).collect();
    let shown = call(&nodes[0], "GET", "/v1/services/db", &Value::Null);
    for external in shown["external_backends"].as_array().unwrap() {
        assert_eq!(external["connections"]["active"], json!(2), "{external}");
    }
    let targets = json!(scene.outside.addresses().map(|address| json!({ "address": address })));
    scene.update(&json!({"remove_external": targets, "replicas": 2}), &backends, false);
    for mut session in open.into_iter().chain(both.iter_mut().map(|s| s.split_off("outside"))) {
        is_reset(session.get_mut("outside").unwrap());
    }
    for (server, session) in both.iter_mut().flatten() {
        assert_eq!(session.ask().unwrap().server, *server, "what is inside goes on");
    }
    for client in [clients[0], clients[1], own] {
        client.meets(&vips, (80, 53), &["b1", "b2"]);
    }

    // And back, with every port.
    for (node, name) in [(&nodes[0], "b1"), (&nodes[1], "b2")] {
        call(node, "DELETE", &format!("/v1/endpoints/{name}?network=shop"), &Value::Null);
    }
    scene.update(&json!({"external": targets, "all_ports": true}), &[], true);
    for client in clients {
        client.meets(&vips, (8080, 5000), &["outside"]);
    }
    scene.update(&json!({"remove_external": targets}), &[], false);
    for vip in &vips {
        let refused = ask(clients[1].space(), Tcp, vip, 8080).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{vip}: {refused}");
    }
    let rules = scene.sandboxes[0].sh("nft list table inet netctl");
    assert!(!rules.contains("fronts") && !rules.contains("@outside"), "{rules}");
}

/// A datagram with a wrong checksum belongs to no connection for the kernel: it would leave as it is, under
/// the container's own address.
#[track_caller]
fn what_cannot_be_translated_does_not_leave(scene: &Scene, client: Client<'_>) {
    let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    let from = client.space();
    let (own_address, vip) = (address(&client.member.addresses[0]), address(&scene.vips[0]));
    let mut packet = ipv4_udp((own_address, 7003), (vip, 53), b"who\n");
    packet[26..28].copy_from_slice(&[0x12, 0x34]);
    send_frame(from, "eth0", &gateway_frame(from, [10, 9, 0, 1].into(), None, &packet));
    wait_for("it was dropped", || {
        let rules = scene.sandboxes[0].sh("nft list table inet netctl");
        let drops = rules.lines().filter(|line| line.contains("not-translated"));
        drops.filter(|line| !line.contains("packets 0 ")).count() == 1
    });
}

/// What is open goes on while an agent is away and when it is back, and so does what is new.
#[track_caller]
fn the_agent_is_restarted(
    scene: &mut Scene,
    client: Client<'_>,
    open: &mut Vec<BTreeMap<String, Session>>,
) {
    scene.cluster.terminate(0);
    let go_on = |open: &mut Vec<BTreeMap<String, Session>>| {
        for session in open.iter_mut().flat_map(BTreeMap::values_mut) {
            assert_eq!(session.ask().unwrap().server, "outside");
        }
    };
    go_on(open);
    client.meets(&scene.vips, (80, 53), &["outside"]);
    scene.cluster.start(0);
    go_on(open);
    client.meets(&scene.vips, (80, 53), &["outside"]);
}

#[track_caller]
fn is_reset(session: &mut Session) {
    let reset = session.ask().unwrap_err();
    assert!(matches!(reset.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{reset}");
}
