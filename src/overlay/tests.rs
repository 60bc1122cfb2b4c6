use std::net::SocketAddr;

use super::*;
use crate::lb::{Front, Spread};
use crate::model::{Name, NodeName, Protocol, Scheduler};

fn around<'a>(me: &'a Node, nodes: &'a BTreeMap<NodeName, Arc<Node>>) -> Surroundings<'a> {
    Surroundings { me, nodes, names: NameService::default(), fast: false }
}

fn node(name: &str, underlay: &str, mtu: u32) -> Arc<Node> {
    let last = underlay.as_bytes().last().copied().unwrap_or(0);
    Arc::new(
        serde_json::from_value(serde_json::json!({
            "id": format!("0000000000{last:02x}"), "name": name, "underlay": underlay,
            "vtep_mac": format!("02:00:00:00:00:{last:02x}"), "tunnel_port": 4789, "mtu": mtu,
        }))
        .unwrap(),
    )
}

fn nodes(list: &[Arc<Node>]) -> BTreeMap<NodeName, Arc<Node>> {
    list.iter().map(|node| (node.name.clone(), node.clone())).collect()
}

fn network(extra: serde_json::Value) -> Network {
    let mut json = serde_json::json!({
        "id": "aaaaaaaaaaaa", "name": "web", "vni": 4097, "uplink": 3,
        "subnets": [{"cidr": "10.9.0.0/24"}, {"cidr": "fd00:9::/64"}],
    });
    json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(json).unwrap()
}

fn endpoint(id: u8, node: &str) -> Endpoint {
    serde_json::from_value(serde_json::json!({
        "id": format!("bbbbbbbbbb{id:02x}"), "name": format!("e{id}"), "network": "aaaaaaaaaaaa",
        "node": node, "addresses": [format!("10.9.0.{id}"), format!("fd00:9::{id:x}")],
        "mac": format!("06:00:00:00:00:{id:02x}"),
        "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
    }))
    .unwrap()
}

fn show(sandbox: &Sandbox) -> Vec<String> {
    let line = |object: &Object| match object {
        Object::Link(link) => format!("link {} mtu {}", link.device, link.mtu),
        Object::Address { device, address } => format!("addr {address} dev {device}"),
        Object::Neighbour { device, address, mac } => format!("neigh {address} {mac} dev {device}"),
        Object::Fdb { mac, remote, port } => format!("fdb {mac} dst {remote} port {port}"),
        Object::Route(Route { destination, target, mtu }) => {
            let mtu = mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
            match target {
                Target::Unreachable => format!("unreachable {destination}{mtu}"),
                Target::Device(device) => format!("route {destination} dev {device}{mtu}"),
                Target::Via(device, hop) => format!("route {destination} via {hop} dev {device}{mtu}"),
            }
        }
    };
    sandbox.objects.iter().map(line).collect()
}

#[test]
fn a_remote_node_is_one_neighbour_per_family_and_one_fdb_entry_however_many_endpoints_it_has() {
    let (n1, n2) = (node("n1", "192.0.2.1", 1450), node("n2", "192.0.2.2", 1450));
    let nodes = nodes(&[n1.clone(), n2]);
    let around = around(&n1, &nodes);
    let endpoints = [endpoint(2, "n1"), endpoint(3, "n2"), endpoint(4, "n2")];
    let lines = show(&sandbox(
        around,
        &network(serde_json::json!({})),
        &Blocks::new(),
        &endpoints,
        &Balancer::default(),
    ));
    assert_eq!(
        lines,
        [
            "link lo mtu 65536",
            "link vx0 mtu 1450",
            "link up0 mtu 1450",
            "link vebbbbbbbbbb02 mtu 1450",
            "addr 10.9.0.1/32 dev lo",
            "addr fd00:9::1/128 dev lo",
            "addr 169.254.64.7/31 dev up0",
            "addr fd6e:6574:6374:6c00::7/127 dev up0",
            "neigh 192.0.2.2 02:00:00:00:00:32 dev vx0",
            "neigh fe80::ff:fe00:32 02:00:00:00:00:32 dev vx0",
            "neigh 10.9.0.2 06:00:00:00:00:02 dev vebbbbbbbbbb02",
            "neigh fd00:9::2 06:00:00:00:00:02 dev vebbbbbbbbbb02",
            "fdb 02:00:00:00:00:32 dst 192.0.2.2 port 4789",
            "route 0.0.0.0/0 via 169.254.64.6 dev up0",
            "unreachable 10.9.0.0/24",
            "route 10.9.0.2/32 dev vebbbbbbbbbb02",
            "route 10.9.0.3/32 via 192.0.2.2 dev vx0",
            "route 10.9.0.4/32 via 192.0.2.2 dev vx0",
            "route ::/0 via fd6e:6574:6374:6c00::6 dev up0",
            "unreachable fd00:9::/64",
            "route fd00:9::2/128 dev vebbbbbbbbbb02",
            "route fd00:9::3/128 via fe80::ff:fe00:32 dev vx0",
            "route fd00:9::4/128 via fe80::ff:fe00:32 dev vx0",
        ]
    );
}

#[test]
fn an_internal_network_has_no_uplink_and_no_default_route() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    let around = around(&n1, &nodes);
    let network = network(serde_json::json!({"internal": true}));
    let sandbox = sandbox(around, &network, &Blocks::new(), &[endpoint(2, "n1")], &Balancer::default());
    let lines = show(&sandbox);
    assert!(!lines.iter().any(|line| line.contains("up0") || line.contains("/0 ")), "{lines:?}");
    assert_eq!(sandbox.pairs, []);
    assert!(!sandbox.firewall.contains("masquerade"));
    let inside = plug(around, &network, &endpoint(2, "n1"));
    assert_eq!(inside.shared_routes, [], "no names are answered at a fixed address");
    let names = NameService { address: Some([169, 254, 53, 53].into()), rate: 0 };
    let inside = plug(Surroundings { names, ..around }, &network, &endpoint(2, "n1"));
    assert_eq!(inside.shared_routes, ["169.254.53.53/32".parse().unwrap()]);
    assert!(host(around, [&network]).pairs.is_empty());
    assert!(!host(around, [&network]).forward4);
}

#[test]
fn a_node_with_a_smaller_underlay_lowers_the_mtu_of_the_routes_to_it() {
    let (n1, n2) = (node("n1", "192.0.2.1", 1450), node("n2", "192.0.2.2", 1350));
    let nodes = nodes(&[n1.clone(), n2.clone()]);
    let network = network(serde_json::json!({}));
    let endpoints = [endpoint(2, "n1"), endpoint(3, "n2")];
    let lines =
        show(&sandbox(around(&n1, &nodes), &network, &Blocks::new(), &endpoints, &Balancer::default()));
    assert!(lines.contains(&"route 10.9.0.3/32 via 192.0.2.2 dev vx0 mtu 1350".to_owned()), "{lines:?}");
    let lines =
        show(&sandbox(around(&n2, &nodes), &network, &Blocks::new(), &endpoints, &Balancer::default()));
    assert!(lines.contains(&"route 10.9.0.2/32 via 192.0.2.1 dev vx0".to_owned()), "{lines:?}");
}

#[test]
fn the_mtu_is_what_was_asked_for_as_far_as_the_underlay_carries_it() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let mtu = |asked: Option<u32>| effective_mtu(&n1, &network(serde_json::json!({"mtu": asked})));
    assert_eq!((mtu(None), mtu(Some(1300)), mtu(Some(9000))), (1450, 1300, 1450));
}

#[test]
fn endpoints_of_unknown_nodes_and_of_the_other_underlay_family_add_nothing() {
    let (n1, n2) = (node("n1", "192.0.2.1", 1450), node("n2", "2001:db8::2", 1430));
    let nodes = nodes(&[n1.clone(), n2]);
    let around = around(&n1, &nodes);
    let network = network(serde_json::json!({}));
    assert_eq!(endpoint_objects(around, &network, &Blocks::new(), &endpoint(3, "n2")), []);
    assert_eq!(endpoint_objects(around, &network, &Blocks::new(), &endpoint(3, "n9")), []);
}

#[test]
fn over_an_ipv6_underlay_both_families_go_through_the_link_local_next_hop() {
    let (n1, n2) = (node("n1", "2001:db8::1", 1430), node("n2", "2001:db8::2", 1430));
    let nodes = nodes(&[n1.clone(), n2]);
    let around = around(&n1, &nodes);
    let hops: BTreeSet<IpAddr> =
        endpoint_objects(around, &network(serde_json::json!({})), &Blocks::new(), &endpoint(3, "n2"))
            .iter()
            .filter_map(|object| match object {
                Object::Route(Route { target: Target::Via(_, hop), .. }) => Some(*hop),
                _ => None,
            })
            .collect();
    assert_eq!(hops, BTreeSet::from(["fe80::ff:fe00:32".parse().unwrap()]));
}

#[test]
fn a_container_reaches_all_subnets_of_its_network_through_the_gateways_of_its_own() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let network = network(serde_json::json!({
        "subnets": [{"cidr": "10.8.0.0/24"}, {"cidr": "10.9.0.0/24", "gateway": "10.9.0.254"},
                    {"cidr": "fd00:9::/64"}],
    }));
    let plug = plug(around(&n1, &BTreeMap::new()), &network, &endpoint(2, "n1"));
    let text = |nets: &[IpNetwork]| nets.iter().map(IpNetwork::to_string).collect::<Vec<_>>();
    assert_eq!(text(&plug.addresses), ["10.9.0.2/24", "fd00:9::2/64"]);
    assert_eq!(plug.gateways, ["10.9.0.254".parse::<IpAddr>().unwrap(), "fd00:9::1".parse().unwrap()]);
    assert_eq!(text(&plug.routes), ["10.8.0.0/24", "10.9.0.0/24", "fd00:9::/64"]);
    assert_eq!(text(&plug.shared_routes), ["0.0.0.0/0", "::/0"]);
}

#[test]
fn the_hosts_table_admits_the_other_nodes_and_not_this_one() {
    let (n1, n2) = (node("n1", "192.0.2.1", 1450), node("n2", "192.0.2.2", 1450));
    let nodes = nodes(&[n1.clone(), n2]);
    let script = host(around(&n1, &nodes), []).firewall;
    assert!(script.contains("members4 { type ipv4_addr; elements = { 192.0.2.2 }; }"), "{script}");
    assert!(script.contains("members6 { type ipv6_addr; }"), "{script}");
    assert!(!script.contains("masquerade"), "no network in use: nothing to masquerade");
}

#[test]
fn a_host_has_single_addresses_and_no_default_route() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let host = Endpoint { host: true, ..endpoint(2, "n1") };
    let nodes = BTreeMap::new();
    let plug = plug(around(&n1, &nodes), &network(serde_json::json!({"host_access": true})), &host);
    let text = |nets: &[IpNetwork]| nets.iter().map(IpNetwork::to_string).collect::<Vec<_>>();
    assert_eq!(text(&plug.addresses), ["10.9.0.2/32", "fd00:9::2/128"]);
    assert_eq!(text(&plug.routes), ["10.9.0.0/24", "fd00:9::/64"]);
    assert_eq!(plug.shared_routes, []);
}

#[test]
fn the_hosts_table_guards_its_access_to_networks_also_where_all_are_internal() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    for (extra, uplinks, access) in [
        (serde_json::json!({}), true, false),
        (serde_json::json!({"internal": true}), false, false),
        (serde_json::json!({"host_access": true}), true, true),
        (serde_json::json!({"host_access": true, "internal": true}), false, true),
    ] {
        let script = host(around(&n1, &nodes), [&network(extra)]).firewall;
        let guarded = |prefix| {
            script.contains(&format!(
                "iifname \"{prefix}*\" ct state != {{ established, related }} counter"
            ))
        };
        assert_eq!((guarded("nc-"), guarded("nh-")), (uplinks, access), "{script}");
        assert_eq!(script.contains("        oifname \"nh-*\" counter log prefix"), access, "{script}");
        assert_eq!(script.contains("        iifname \"nh-*\" counter log prefix"), access, "{script}");
        assert_eq!(script.contains("masquerade"), uplinks, "{script}");
    }
}

#[test]
fn names_do_not_reach_the_scripts() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    let mut network = network(serde_json::json!({}));
    network.name = "evil-name".parse::<Name>().unwrap();
    let around = around(&n1, &nodes);
    assert!(
        !sandbox(around, &network, &Blocks::new(), &[], &Balancer::default()).firewall.contains("evil")
    );
    assert!(!host(around, [&network]).firewall.contains("evil"));
}

#[test]
fn a_block_of_another_node_is_one_route_and_its_endpoints_none() {
    let (n1, n2) = (node("n1", "192.0.2.1", 1450), node("n2", "192.0.2.2", 1450));
    let nodes = nodes(&[n1.clone(), n2]);
    let around = around(&n1, &nodes);
    let network = network(serde_json::json!({}));
    let block = |text: &str, node: &str| (text.parse().unwrap(), node.parse().unwrap());
    let blocks = Blocks::from([
        block("10.9.0.0/29", "n1"),
        block("10.9.0.8/29", "n2"),
        block("fd00:9::/120", "n2"),
        block("10.8.0.0/29", "n2"),
    ]);
    // 2 is in a block of n1, 9 in one of n2; both have IPv6 addresses in a block of n2.
    let endpoints = [endpoint(2, "n2"), endpoint(9, "n2")];
    let lines = show(&sandbox(around, &network, &blocks, &endpoints, &Balancer::default()));
    let routes: Vec<&str> =
        lines.iter().filter(|line| line.contains("dev vx0")).map(String::as_str).collect();
    assert_eq!(
        routes,
        [
            "neigh 192.0.2.2 02:00:00:00:00:32 dev vx0",
            "neigh fe80::ff:fe00:32 02:00:00:00:00:32 dev vx0",
            "route 10.9.0.2/32 via 192.0.2.2 dev vx0",
            "route 10.9.0.8/29 via 192.0.2.2 dev vx0",
            "route fd00:9::/120 via fe80::ff:fe00:32 dev vx0",
        ]
    );
}

/// A balancer of one front, whose address is `10.9.0.200`, or `fd00:9::200`.
fn balancer(front: impl Fn(IpAddr) -> Front, own: bool, silent: bool) -> Balancer {
    let mut balancer = Balancer::default();
    for (address, backend) in [("10.9.0.200", "10.9.0.2"), ("fd00:9::200", "fd00:9::2")] {
        let (address, backend): (IpAddr, IpAddr) = (address.parse().unwrap(), backend.parse().unwrap());
        let backends = BTreeMap::from([(SocketAddr::new(backend, 0), 1)]);
        let spread = Spread { scheduler: Scheduler::Rr, affinity: None, backends };
        balancer.addresses.insert(address);
        balancer.fronts.insert(front(address), spread);
        balancer.own.extend(own.then_some((backend, address)));
        balancer.silent.extend(silent.then_some(address));
    }
    balancer
}

fn port(address: IpAddr) -> Front {
    Front::Port { protocol: Protocol::Tcp, address, port: 80 }
}

fn all(address: IpAddr) -> Front {
    Front::All { address, mark: 9 }
}

/// The lines that one balancer adds to a sandbox's table.
fn added(network: &Network, balancer: &Balancer) -> Vec<String> {
    let plain = sandbox_firewall(network, NameService::default(), &Balancer::default());
    let script = sandbox_firewall(network, NameService::default(), balancer);
    let new = script.lines().filter(|line| !plain.lines().any(|known| known == *line));
    new.map(|line| line.trim().to_owned()).collect()
}

/// What any balancer adds: other nodes balance for themselves.
const REMOTE: [&str; 8] = [
    "chain remote {",
    "icmp type { destination-unreachable, time-exceeded, parameter-problem } accept",
    "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } accept",
    "meta l4proto tcp counter log prefix \"not-balanced-there\" group 4789 reject with tcp reset comment \"not-balanced-there\"",
    "counter log prefix \"not-balanced-there\" group 4789 reject with icmpx port-unreachable comment \"not-balanced-there\"",
    "chain input {",
    "type filter hook input priority filter; policy accept;",
    "iifname \"vx0\" jump remote",
];

#[test]
fn addresses_that_are_refused_are_unreachable_until_an_endpoint_has_them() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    let around = around(&n1, &nodes);
    let network = network(serde_json::json!({}));
    let refused = ["10.9.0.2", "10.9.0.200", "fd00:9::200"].map(|a| a.parse().unwrap()).into();
    let balancer = Balancer { refused, ..Balancer::default() };
    assert_eq!(added(&network, &balancer), Vec::<String>::new(), "no rule");
    let lines = show(&sandbox(around, &network, &Blocks::new(), &[endpoint(2, "n1")], &balancer));
    let routes: Vec<&str> =
        lines.iter().filter(|line| line.contains("unreachable")).map(String::as_str).collect();
    let single = routes.iter().filter(|r| r.contains("/32") || r.contains("/128"));
    let single: Vec<&str> = single.copied().collect();
    assert_eq!(single, ["unreachable 10.9.0.200/32", "unreachable fd00:9::200/128"]);
    assert_eq!(routes.len(), 4, "{routes:?}");
}

#[test]
fn ports_of_backends_elsewhere_add_addresses_and_one_rule() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    let around = around(&n1, &nodes);
    let (network, balancer) = (network(serde_json::json!({})), balancer(port, false, false));
    assert_eq!(added(&network, &balancer), REMOTE.map(str::to_owned));
    let lines = show(&sandbox(around, &network, &Blocks::new(), &[], &balancer));
    for line in ["addr 10.9.0.200/32 dev lo", "addr fd00:9::200/128 dev lo"] {
        assert!(lines.iter().any(|found| found == line), "{line}: {lines:?}");
    }
}

#[test]
fn packets_to_an_address_with_all_ports_bear_its_mark_after_their_source_was_checked() {
    let network = network(serde_json::json!({}));
    let balancer = balancer(all, false, false);
    assert_eq!(
        added(&network, &balancer)[..4],
        [
            "map marks4 { type ipv4_addr : mark; elements = { 10.9.0.200 : 0x00000009 }; }",
            "map marks6 { type ipv6_addr : mark; elements = { fd00:9::200 : 0x00000009 }; }",
            "meta mark set ip daddr map @marks4",
            "meta mark set ip6 daddr map @marks6",
        ]
    );
    let script = sandbox_firewall(&network, NameService::default(), &balancer);
    let place = |text: &str| script.find(text).unwrap();
    assert!(place("fib saddr . iif") < place("meta mark set") && place("mark set") < place("notrack"));
    // What the kernel answers for is not followed as a connection.
    assert!(place("notrack") < place("fib daddr oif missing fib daddr type != local"));
}

#[test]
fn a_backend_that_meets_itself_sees_the_gateway_and_only_its_own_packets_are_tracked() {
    for internal in [false, true] {
        let network = network(serde_json::json!({ "internal": internal }));
        let script = sandbox_firewall(&network, NameService::default(), &balancer(port, true, false));
        for line in [
            "set own4 { type ipv4_addr . ipv4_addr; elements = { 10.9.0.2 . 10.9.0.1, 10.9.0.2 . 10.9.0.200 }; }",
            "ip daddr { 10.9.0.1 } meta l4proto { tcp, udp } th dport 53 notrack accept",
            "ip saddr . ip daddr @own4 accept",
            "ip6 saddr . ip6 daddr @own6 accept",
            "ip saddr . ip daddr { 10.9.0.2 . 10.9.0.2 } snat ip to 10.9.0.1",
            "ip6 saddr . ip6 daddr { fd00:9::2 . fd00:9::2 } snat ip6 to fd00:9::1",
            "ip daddr 10.9.0.0/24 notrack",
            "ip saddr . ip daddr { 10.9.0.2 . 10.9.0.2 } accept",
            "ip saddr { 10.9.0.2 } notrack",
            "ip6 saddr { fd00:9::2 } notrack",
        ] {
            assert!(script.lines().any(|found| found.trim() == line), "{line}: {script}");
        }
        let place = |text: &str| script.find(text).unwrap();
        assert!(place("dport 53 notrack") < place("@own4 accept"), "{script}");
        assert!(place("@own4 accept") < place("ip daddr 10.9.0.0/24 notrack"), "{script}");
        assert_eq!(script.contains("masquerade"), !internal);
    }
}

#[test]
fn what_goes_outside_is_tracked_to_be_translated_and_what_stays_inside_no_further() {
    let network = network(serde_json::json!({}));
    let mut balancer = balancer(all, true, false);
    for (target, front) in [("192.0.2.10", "10.9.0.200"), ("2001:db8::10", "fd00:9::200")] {
        balancer.outside.insert((target.parse().unwrap(), front.parse().unwrap()));
    }
    let script = sandbox_firewall(&network, NameService::default(), &balancer);
    for line in [
        "set fronts4 { type ipv4_addr; elements = { 10.9.0.200 }; }",
        "set outside4 { type ipv4_addr; elements = { 192.0.2.10 }; }",
        "set outside6 { type ipv6_addr; elements = { 2001:db8::10 }; }",
        "ip daddr @fronts4 accept",
        "ip6 daddr @fronts6 accept",
        "ip saddr { 10.9.0.0/24 } ip daddr @outside4 ct state { invalid, untracked } counter log prefix \"not-translated\" group 4789 drop comment \"not-translated\"",
        "ip daddr { 10.9.0.0/24 } notrack",
        "ip6 daddr { fd00:9::/64 } notrack",
    ] {
        assert!(script.lines().any(|found| found.trim() == line), "{line}: {script}");
    }
    let place = |text: &str| script.find(text).unwrap();
    assert!(place("fib saddr . iif") < place("@fronts4 accept"), "{script}");
    assert!(place("meta mark set ip daddr") < place("@fronts4 accept"), "{script}");
    assert!(place("@fronts4 accept") < place("ip daddr 10.9.0.0/24 notrack"), "{script}");
    assert!(place("@outside4 ct state") < place("ip saddr { 10.9.0.2 } notrack"), "{script}");
    assert!(
        place("10.9.0.2 . 10.9.0.2 } accept") < place("ip daddr { 10.9.0.0/24 } notrack"),
        "{script}"
    );
}

#[test]
fn an_address_without_a_ready_backend_refuses_pings() {
    let network = network(serde_json::json!({}));
    let script = sandbox_firewall(&network, NameService::default(), &balancer(port, false, true));
    for line in [
        "ip daddr { 10.9.0.200 } icmp type echo-request counter log prefix \"no-backend\" group 4789 reject with icmp host-unreachable comment \"no-backend\"",
        "ip6 daddr { fd00:9::200 } icmpv6 type echo-request counter log prefix \"no-backend\" group 4789 reject with icmpv6 addr-unreachable comment \"no-backend\"",
    ] {
        assert!(script.lines().any(|found| found.trim() == line), "{line}: {script}");
    }
}

#[test]
fn every_rule_that_counts_what_it_drops_shows_it_with_the_same_reason() {
    let n1 = node("n1", "192.0.2.1", 1450);
    let nodes = nodes(std::slice::from_ref(&n1));
    let (around, network) = (around(&n1, &nodes), network(serde_json::json!({"host_access": true})));
    let sandbox = sandbox(around, &network, &Blocks::new(), &[], &Balancer::default());
    let scripts = [host(around, [&network]).firewall, sandbox.firewall];
    let mut count = 0;
    for line in scripts.iter().flat_map(|script| script.lines()) {
        let Some((_, shown)) = line.split_once("counter log prefix \"") else {
            assert!(!line.contains("counter "), "{line}");
            continue;
        };
        let (prefix, rest) = shown.split_once('"').unwrap();
        assert!(
            rest.starts_with(" group 4789 drop ") || rest.starts_with(" group 4789 reject "),
            "{line}"
        );
        assert!(rest.ends_with(&format!(" comment \"{prefix}\"")), "{line}");
        count += 1;
    }
    assert!(count > 10, "{count}: {scripts:?}");
}
