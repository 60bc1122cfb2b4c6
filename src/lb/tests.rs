//! Who gets connections, on which node, and who does not.

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::model::{Name, NetworkId};

const NETWORK: &str = "aaaaaaaaaaaa";

fn node(name: &str, zone: &str) -> Node {
    serde_json::from_value(json!({
        "id": "0123456789ab", "name": name, "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01",
        "tunnel_port": 4789, "mtu": 1450, "labels": {"zone": zone},
    }))
    .unwrap()
}

fn network() -> Network {
    serde_json::from_value(json!({
        "id": NETWORK, "name": "shop", "vni": 4097, "uplink": 0, "mtu": null, "internal": false,
        "labels": {}, "removing": false, "subnets": [
            {"cidr": "10.9.0.0/24", "gateway": "10.9.0.1", "block_prefix": 28},
            {"cidr": "fd00:9::/64", "gateway": "fd00:9::1", "block_prefix": 120},
        ],
    }))
    .unwrap()
}

fn service(name: &str, number: u8, balancing: Value) -> Service {
    let addresses = [format!("10.9.0.{number}"), format!("fd00:9::{number:x}")];
    serde_json::from_value(json!({
        "id": format!("cccccccccc{number:02x}"), "name": name, "networks": [NETWORK], "replicas": 3,
        "endpoint_mode": "vip", "update_order": "stop-first", "update_parallelism": 1,
        "addresses": {NETWORK: addresses}, "balancing": balancing,
    }))
    .unwrap()
}

fn endpoint(number: u8, node: &str, service: &str) -> Endpoint {
    serde_json::from_value(json!({
        "id": format!("bbbbbbbbbb{number:02x}"), "name": format!("e{number}"), "network": NETWORK,
        "node": node, "addresses": [format!("10.9.0.{number}"), format!("fd00:9::{number:x}")],
        "mac": "06:00:00:00:00:01", "service": service,
        "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
    }))
    .unwrap()
}

/// Three nodes, the first two in one zone; `web` has an endpoint on each.
struct Ground {
    snapshot: Snapshot,
    gone: BTreeSet<NodeName>,
    endpoints: Vec<Endpoint>,
}

fn ground(balancing: Value) -> Ground {
    let nodes = [("n1", "east"), ("n2", "east"), ("n3", "west")].map(|(name, zone)| node(name, zone));
    let web = service("web", 100, balancing);
    let snapshot = Snapshot {
        alive: Arc::new(nodes.iter().map(|node| node.name.clone()).collect()),
        nodes: Arc::new(nodes.into_iter().map(|node| (node.name.clone(), Arc::new(node))).collect()),
        services: Arc::new([(web.name.clone(), Arc::new(web))].into()),
        ..Snapshot::default()
    };
    let endpoints = vec![
        endpoint(11, "n1", "web"),
        endpoint(12, "n2", "web"),
        endpoint(13, "n3", "web"),
        endpoint(14, "n1", "db"),
    ];
    Ground { snapshot, gone: BTreeSet::new(), endpoints }
}

impl Ground {
    fn balancer(&self, me: &str) -> Balancer {
        let me = &self.snapshot.nodes[&me.parse::<NodeName>().unwrap()];
        balancer(me, &self.snapshot, &self.gone, &network(), &self.endpoints)
    }

    /// The weights of the IPv4 front's backends, as n1 has them, by the last part of the address.
    fn weights(&self, me: &str) -> Vec<(String, u32)> {
        let balancer = self.balancer(me);
        let ipv4 = |front: &Front| match front {
            Front::Port { address, .. } | Front::All { address, .. } => address.is_ipv4(),
        };
        let (_, spread) = balancer.fronts.iter().find(|(front, _)| ipv4(front)).unwrap();
        spread.backends.iter().map(|(at, weight)| (at.to_string(), *weight)).collect()
    }
}

fn weights(pairs: &[(&str, u32)]) -> Vec<(String, u32)> {
    pairs.iter().map(|(at, weight)| ((*at).to_owned(), *weight)).collect()
}

#[test]
fn every_port_leads_to_its_target_in_both_families() {
    let ground = ground(json!({"scheduler": "wlc", "affinity": 60, "ports": [
        {"port": 80, "target": 8080}, {"protocol": "udp", "port": 53, "target": 53},
    ]}));
    let balancer = ground.balancer("n1");
    let vips: BTreeSet<IpAddr> = ["10.9.0.100", "fd00:9::64"].map(|a| a.parse().unwrap()).into();
    assert_eq!(balancer.addresses, vips);
    assert!(balancer.silent.is_empty());
    assert_eq!(balancer.fronts.len(), 4);
    for (front, spread) in &balancer.fronts {
        let Front::Port { protocol, address, port } = front else { panic!("{front:?}") };
        let target = if *port == 80 { 8080 } else { 53 };
        assert_eq!(*protocol, if *port == 80 { Protocol::Tcp } else { Protocol::Udp });
        assert_eq!((spread.scheduler, spread.affinity), (Scheduler::Wlc, Some(60)));
        let expected: Vec<SocketAddr> = (11u16..=13)
            .map(|n| match address {
                IpAddr::V4(_) => format!("10.9.0.{n}:{target}"),
                IpAddr::V6(_) => format!("[fd00:9::{n:x}]:{target}"),
            })
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(spread.backends.keys().copied().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn without_ports_everything_is_balanced_under_a_mark() {
    let balancer = ground(json!({})).balancer("n1");
    let marks: Vec<(IpAddr, u32)> = balancer
        .fronts
        .keys()
        .map(|front| match front {
            Front::All { address, mark } => (*address, *mark),
            Front::Port { .. } => panic!("{front:?}"),
        })
        .collect();
    assert_eq!(marks.len(), 2);
    assert_eq!(marks[0], ("10.9.0.100".parse().unwrap(), 0x0a09_0064));
    assert_ne!(marks[1].1, 0);
    assert_eq!(balancer.timeouts, Timeouts::DEFAULT);
}

#[test]
fn who_is_out_takes_no_new_connections() {
    let mut ground = ground(json!({"ports": [{"port": 80, "target": 80}]}));
    let all = [("10.9.0.11:80", 1), ("10.9.0.12:80", 1), ("10.9.0.13:80", 1)];
    assert_eq!(ground.weights("n1"), weights(&all));
    for state in [EndpointState::Pending, EndpointState::Unhealthy, EndpointState::Draining] {
        ground.endpoints[1].state = state;
        let some = [("10.9.0.11:80", 1), ("10.9.0.12:80", 0), ("10.9.0.13:80", 1)];
        assert_eq!(ground.weights("n1"), weights(&some), "{state}");
    }
    ground.endpoints[1].state = EndpointState::Ready;
    ground.endpoints[1].weight = 7;
    ground.snapshot.drained = Arc::new([("n3".parse().unwrap(), 7)].into());
    assert_eq!(ground.weights("n1")[1..], weights(&[("10.9.0.12:80", 7), ("10.9.0.13:80", 0)]));
    Arc::make_mut(&mut ground.snapshot.alive).remove(&"n2".parse::<NodeName>().unwrap());
    let others = [("10.9.0.11:80", 1), ("10.9.0.12:80", 0), ("10.9.0.13:80", 0)];
    assert_eq!(ground.weights("n1"), weights(&others), "what it has goes on for a while");
    ground.gone = BTreeSet::from(["n2".parse().unwrap()]);
    assert_eq!(ground.weights("n1"), weights(&[("10.9.0.11:80", 1), ("10.9.0.13:80", 0)]));
    // A node whose lease ended uses its own backends all the same.
    assert_eq!(ground.weights("n2")[1], ("10.9.0.12:80".to_owned(), 7));
}

#[test]
fn datagrams_go_to_no_backend_that_is_known_to_fail() {
    let mut ground = ground(json!({"ports": [{"protocol": "udp", "port": 53, "target": 53}]}));
    let mut state = |state| {
        ground.endpoints[1].state = state;
        ground.weights("n1")[1..].to_vec()
    };
    let (second, third) = (("10.9.0.12:53", 0), ("10.9.0.13:53", 1));
    assert_eq!(state(EndpointState::Draining), weights(&[second, third]));
    assert_eq!(state(EndpointState::Unhealthy), weights(&[third]));
    state(EndpointState::Ready);
    Arc::make_mut(&mut ground.snapshot.alive).remove(&"n2".parse::<NodeName>().unwrap());
    assert_eq!(ground.weights("n1")[1..], weights(&[third]));
}

#[test]
fn without_a_ready_backend_an_address_is_silent() {
    let mut ground = ground(json!({}));
    assert!(ground.balancer("n1").silent.is_empty());
    for endpoint in &mut ground.endpoints {
        endpoint.state = EndpointState::Unhealthy;
    }
    let balancer = ground.balancer("n1");
    assert_eq!(balancer.silent, balancer.addresses);
    ground.endpoints.clear();
    assert_eq!(ground.balancer("n1").silent, balancer.addresses);
}

#[test]
fn near_backends_come_first_and_far_ones_when_none_is_left() {
    for (prefer, me, near) in
        [("node", "n2", &[12][..]), ("label=zone", "n2", &[11, 12]), ("label=rack", "n2", &[11, 12, 13])]
    {
        let mut ground = ground(json!({"prefer": prefer, "ports": [{"port": 80, "target": 80}]}));
        let ready = |ground: &Ground| -> Vec<u8> {
            let weights = ground.weights(me);
            [11, 12, 13]
                .into_iter()
                .filter(|n| weights.contains(&(format!("10.9.0.{n}:80"), 1)))
                .collect()
        };
        assert_eq!(ready(&ground), near, "{prefer}");
        for number in near {
            ground.endpoints[usize::from(number - 11)].state = EndpointState::Unhealthy;
        }
        let far: Vec<u8> = [11, 12, 13].into_iter().filter(|n| !near.contains(n)).collect();
        assert_eq!(ready(&ground), far, "{prefer}");
    }
}

#[test]
fn this_nodes_backends_are_told_with_their_services_addresses() {
    let balancer = ground(json!({})).balancer("n1");
    let pairs = [("10.9.0.11", "10.9.0.100"), ("fd00:9::b", "fd00:9::64")];
    let pairs = pairs.map(|(own, vip)| (own.parse().unwrap(), vip.parse().unwrap()));
    assert_eq!(balancer.own, pairs.into());
}

/// The ground with these targets outside of `web`.
fn with_outside(balancing: Value, targets: &[&str]) -> Ground {
    let mut ground = ground(balancing);
    let name: Name = "web".parse().unwrap();
    let web = Arc::make_mut(&mut ground.snapshot.services).get_mut(&name).unwrap();
    let targets = targets.iter().map(|text| text.parse().unwrap());
    Arc::make_mut(web).external = targets.collect();
    ground
}

#[test]
fn targets_outside_stand_beside_the_endpoints_of_their_family() {
    let one = json!({"ports": [{"port": 80, "target": 8080}]});
    let targets = ["192.0.2.10:5432", "192.0.2.11", "[2001:db8::10]:5432"];
    let ground = with_outside(one, &targets);
    let balancer = ground.balancer("n1");
    let of = |vip: &str| {
        let front = Front::Port { protocol: Protocol::Tcp, address: vip.parse().unwrap(), port: 80 };
        let backends = balancer.fronts[&front].backends.iter();
        backends.map(|(at, weight)| format!("{at} {weight}")).collect::<Vec<_>>()
    };
    assert_eq!(of("10.9.0.100")[3..], ["192.0.2.10:5432 1", "192.0.2.11:8080 1"]);
    assert_eq!(of("fd00:9::64")[0], "[2001:db8::10]:5432 1");
    assert_eq!((of("10.9.0.100").len(), of("fd00:9::64").len()), (5, 4));
    let pair = |target: &str, vip: &str| (target.parse().unwrap(), vip.parse().unwrap());
    let pairs = [
        pair("192.0.2.10", "10.9.0.100"),
        pair("192.0.2.11", "10.9.0.100"),
        pair("2001:db8::10", "fd00:9::64"),
    ];
    assert_eq!(balancer.outside, pairs.into());

    let two = json!({"ports": [{"port": 80, "target": 8080}, {"port": 81, "target": 81}]});
    let balancer = with_outside(two, &["192.0.2.10"]).balancer("n1");
    let at = |text: &str| text.parse::<SocketAddr>().unwrap();
    let leads = |at: SocketAddr| balancer.fronts.values().any(|s| s.backends.get(&at) == Some(&1));
    assert!(leads(at("192.0.2.10:8080")) && leads(at("192.0.2.10:81")));
    let all = with_outside(json!({}), &["192.0.2.10"]);
    assert_eq!(all.weights("n1").last(), Some(&("192.0.2.10:0".to_owned(), 1)));
}

#[test]
fn an_address_with_a_target_outside_is_not_silent_and_datagrams_go_there() {
    let udp = json!({"ports": [{"protocol": "udp", "port": 53, "target": 53}]});
    let mut ground = with_outside(udp, &["192.0.2.10"]);
    ground.endpoints.clear();
    assert_eq!(ground.weights("n1"), weights(&[("192.0.2.10:53", 1)]));
    let silent: BTreeSet<IpAddr> = ["fd00:9::64".parse().unwrap()].into();
    assert_eq!(ground.balancer("n1").silent, silent, "it has none of that family");
}

#[test]
fn what_is_outside_is_near_to_nobody() {
    let near = json!({"prefer": "node", "ports": [{"port": 80, "target": 80}]});
    let mut ground = with_outside(near, &["192.0.2.10"]);
    let outside = |ground: &Ground, me: &str| ground.weights(me).pop().unwrap().1;
    assert_eq!(outside(&ground, "n2"), 0);
    ground.endpoints[1].state = EndpointState::Unhealthy;
    assert_eq!((outside(&ground, "n1"), outside(&ground, "n2")), (0, 1));
}

#[test]
fn a_target_outside_needs_rules_of_its_own() {
    let one = || json!({"ports": [{"port": 80, "target": 80}]});
    let (without, with) = (ground(one()), with_outside(one(), &["192.0.2.10"]));
    assert!(!without.balancer("n1").has_rules_for(&with.balancer("n1")));
    assert!(with.balancer("n1").has_rules_for(&without.balancer("n1")));
}

#[test]
fn the_longest_timeout_counts_and_the_kernels_where_none_is_asked_for() {
    let mut ground = ground(json!({"timeouts": {"tcp": 60, "udp": 10}}));
    assert_eq!(ground.balancer("n1").timeouts, Timeouts { tcp: 60, tcp_fin: 120, udp: 10 });
    let db = service("db", 101, json!({"timeouts": {"tcp": 3600}}));
    Arc::make_mut(&mut ground.snapshot.services).insert(db.name.clone(), Arc::new(db));
    assert_eq!(ground.balancer("n1").timeouts, Timeouts { tcp: 3600, tcp_fin: 120, udp: 10 });
    // Who asks for nothing does not ask for what the kernel has.
    let plain = service("plain", 102, json!({}));
    Arc::make_mut(&mut ground.snapshot.services).insert(plain.name.clone(), Arc::new(plain));
    assert_eq!(ground.balancer("n1").timeouts, Timeouts { tcp: 3600, tcp_fin: 120, udp: 10 });
    Arc::make_mut(&mut ground.snapshot.services).clear();
    assert_eq!(ground.balancer("n1"), Balancer::default());
}

#[test]
fn a_weight_needs_no_new_rule_and_a_mark_or_a_backend_here_does() {
    for balancing in [json!({}), json!({"ports": [{"port": 80, "target": 80}]})] {
        let mut ground = ground(balancing);
        let before = ground.balancer("n1");
        ground.endpoints[0].state = EndpointState::Draining;
        ground.endpoints.push(endpoint(15, "n2", "web"));
        let other = ground.balancer("n1");
        assert!(before != other && before.has_rules_for(&other));
        ground.endpoints.push(endpoint(16, "n1", "web"));
        assert!(!before.has_rules_for(&ground.balancer("n1")));
        assert!(ground.balancer("n1").has_rules_for(&before), "what is there too many does no harm");
        let all = service("all", 101, json!({}));
        let more = Arc::make_mut(&mut ground.snapshot.services);
        more.insert(all.name.clone(), Arc::new(all));
        ground.endpoints.truncate(4);
        assert!(!before.has_rules_for(&ground.balancer("n1")));
    }
}

#[test]
fn where_nothing_balances_the_addresses_of_the_networks_services_are_refused() {
    let mut ground = ground(json!({}));
    let vips: BTreeSet<IpAddr> = ["10.9.0.100", "fd00:9::64"].map(|a| a.parse().unwrap()).into();
    let refusing = Balancer::refusing(&ground.snapshot, &network());
    assert_eq!(refusing, Balancer { refused: vips, ..Balancer::default() });
    assert!(ground.balancer("n1").refused.is_empty());
    Arc::make_mut(&mut ground.snapshot.services).clear();
    assert_eq!(Balancer::refusing(&ground.snapshot, &network()), Balancer::default());
}

#[test]
fn a_service_of_another_network_or_without_an_address_is_not_here() {
    let mut ground = ground(json!({}));
    let name: Name = "web".parse().unwrap();
    let other: NetworkId = "dddddddddddd".parse().unwrap();
    let services = Arc::make_mut(&mut ground.snapshot.services);
    let web = Arc::make_mut(services.get_mut(&name).unwrap());
    let addresses = std::mem::take(&mut web.addresses).into_values().next().unwrap();
    assert_eq!(ground.balancer("n1"), Balancer::default());
    let services = Arc::make_mut(&mut ground.snapshot.services);
    Arc::make_mut(services.get_mut(&name).unwrap()).addresses.insert(other, addresses);
    assert_eq!(ground.balancer("n1"), Balancer::default());
}

#[test]
fn no_two_addresses_of_a_family_have_one_mark() {
    let mut marks = Marks::default();
    let of = |text: &str, marks: &mut Marks| marks.of(text.parse().unwrap());
    let first = of("0.0.0.0", &mut marks);
    assert_eq!(first, 1);
    assert_eq!(of("0.0.0.1", &mut marks), 2);
    let six = of("fd00:9::64", &mut marks);
    assert_ne!(six, 0);
    assert_ne!(of("fd00:9:0:1::64", &mut marks), six);
}

#[test]
fn why_an_endpoint_is_out_is_said_in_words() {
    for (out, words) in [
        (Out::NotReady(EndpointState::Pending, String::new()), "pending"),
        (Out::NotReady(EndpointState::Unhealthy, "refused".to_owned()), "unhealthy: refused"),
        (Out::NodeDead, "its node is dead"),
        (Out::NodeDrained, "its node is drained"),
        (Out::Far, "nearer ones are preferred"),
    ] {
        assert_eq!(out.to_string(), words);
    }
}
