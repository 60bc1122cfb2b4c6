use std::collections::BTreeMap;

use serde_json::json;

use super::super::{Kind, Rest, nothing};
use super::*;
use crate::model::snapshot::Members;
use crate::model::{Endpoint, Name, Network, Node, Service, Snapshot};

/// The networks `shop` and `mail` as the node n1 knows them.
struct Ground {
    domain: DomainName,
    zones: Vec<Arc<Zone>>,
}

fn node(name: &str) -> Node {
    serde_json::from_value(json!({
        "id": "cccccccccccc", "name": name, "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01",
        "tunnel_port": 4789, "mtu": 1450, "subnets_in_use": [], "version": "",
    }))
    .unwrap()
}

fn network(id: &str, name: &str, subnets: &[&str]) -> Network {
    let subnets: Vec<_> = subnets.iter().map(|cidr| json!({"cidr": cidr})).collect();
    serde_json::from_value(
        json!({"id": id, "name": name, "vni": 4097, "uplink": 3, "subnets": subnets, "internal": name == "mail"}),
    )
    .unwrap()
}

const SHOP: &str = "aaaaaaaaaaaa";
const MAIL: &str = "bbbbbbbbbbbb";

fn service(name: &str, mode: &str, networks: &[&str], addresses: serde_json::Value) -> Service {
    serde_json::from_value(json!({
        "id": "dddddddddddd", "name": name, "networks": networks, "replicas": 1,
        "addresses": addresses, "endpoint_mode": mode, "update_order": "stop-first",
        "update_parallelism": 1,
    }))
    .unwrap()
}

fn services() -> BTreeMap<Name, Arc<Service>> {
    let vips = json!({SHOP: ["10.9.0.80", "fd00:9::80"], MAIL: ["10.8.0.80"]});
    let all = [
        service("web", "vip", &[SHOP, MAIL], vips),
        service("db", "dnsrr", &[SHOP], json!({})),
        service("none", "dnsrr", &[SHOP], json!({})),
    ];
    all.into_iter().map(|service| (service.name.clone(), Arc::new(service))).collect()
}

fn endpoint(number: u64, name: &str, at: (&str, &str), state: &str, service: &str) -> Arc<Endpoint> {
    let (network, node) = at;
    let addresses = match network {
        SHOP => vec![format!("10.9.0.{number}"), format!("fd00:9::{number}")],
        _ => vec![format!("10.8.0.{number}")],
    };
    let service = Some(service).filter(|name| !name.is_empty());
    Arc::new(
        serde_json::from_value(json!({
            "id": format!("{number:012x}"), "name": name, "network": network, "node": node,
            "addresses": addresses, "mac": "06:00:00:00:00:01", "state": state, "service": service,
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }))
        .unwrap(),
    )
}

fn members(endpoints: &[Arc<Endpoint>]) -> Members {
    let endpoints = endpoints.iter().map(|e| (e.id, e.clone())).collect();
    Members { endpoints, ..Members::default() }
}

impl Ground {
    fn new() -> Self {
        Self::with(services())
    }

    fn with(services: BTreeMap<Name, Arc<Service>>) -> Self {
        let snapshot = Snapshot {
            alive: Arc::new(["n1", "n2", "n4"].map(|name| name.parse().unwrap()).into()),
            drained: Arc::new([("n4".parse().unwrap(), 7)].into()),
            services: Arc::new(services),
            ..Snapshot::default()
        };
        let of_shop = members(&[
            endpoint(2, "a", (SHOP, "n1"), "ready", ""),
            endpoint(3, "db1", (SHOP, "n1"), "ready", "db"),
            endpoint(4, "db2", (SHOP, "n2"), "ready", "db"),
            endpoint(5, "db3", (SHOP, "n2"), "unhealthy", "db"),
            endpoint(6, "db4", (SHOP, "n3"), "ready", "db"),
            endpoint(7, "db5", (SHOP, "n2"), "draining", "db"),
            endpoint(8, "db6", (SHOP, "n4"), "ready", "db"),
            endpoint(11, "db7", (SHOP, "n4"), "unhealthy", "db"),
            // Nobody drains what belongs to no service.
            endpoint(12, "tool", (SHOP, "n4"), "ready", ""),
            endpoint(9, "web1", (SHOP, "n1"), "ready", "web"),
            // It has the name of a service.
            endpoint(10, "web", (SHOP, "n1"), "ready", ""),
        ]);
        let of_mail = members(&[
            endpoint(2, "a", (MAIL, "n1"), "ready", ""),
            endpoint(3, "only", (MAIL, "n2"), "ready", ""),
            endpoint(4, "gateway", (MAIL, "n2"), "ready", ""),
        ]);
        let zone = |network: Network, members: &Members| {
            Arc::new(Zone::new(&node("n1"), &snapshot, &network, members))
        };
        let shop = network(SHOP, "shop", &["10.9.0.0/24", "fd00:9::/64"]);
        let zones = vec![zone(shop, &of_shop), zone(network(MAIL, "mail", &["10.8.0.0/24"]), &of_mail)];
        Self { domain: DomainName::parse("netctl.internal").unwrap(), zones }
    }

    fn names(&self) -> Names<'_> {
        Names { domain: &self.domain, zones: &self.zones, short: true }
    }

    /// What is found, as text.
    fn find(&self, name: &str) -> String {
        show(&self.names().find(&DomainName::parse(name).unwrap()))
    }
}

fn show(found: &Found<'_>) -> String {
    match found {
        Found::Entry(zone, entry) => {
            let v4 = entry.v4.iter().map(ToString::to_string);
            let addresses: Vec<_> = v4.chain(entry.v6.iter().map(ToString::to_string)).collect();
            format!("{:?} in {zone}: {}", entry.kind, addresses.join(" ")).trim_end().to_owned()
        }
        Found::Address(name) => name.to_string(),
        other => format!("{other:?}"),
    }
}

#[test]
fn services_tasks_and_endpoints_have_names_in_every_form() {
    let ground = Ground::new();
    let forms =
        |name: &str| ["", ".shop", ".shop.netctl.internal"].map(|suffix| format!("{name}{suffix}"));
    for (name, expected) in [
        ("web", "Service in 0: 10.9.0.80 fd00:9::80"),
        ("WEB", "Service in 0: 10.9.0.80 fd00:9::80"),
        ("tasks.web", "Tasks in 0: 10.9.0.9 fd00:9::9"),
        // Neither the unhealthy, nor that of a dead node, nor the drained ones.
        ("db", "Tasks in 0: 10.9.0.3 10.9.0.4 fd00:9::3 fd00:9::4"),
        ("tasks.db", "Tasks in 0: 10.9.0.3 10.9.0.4 fd00:9::3 fd00:9::4"),
        ("none", "Tasks in 0:"),
        ("a", "Endpoint in 0: 10.9.0.2 fd00:9::2"),
        // What does not take connections now can be asked why.
        ("db3", "Endpoint in 0: 10.9.0.5 fd00:9::5"),
        ("db4", "Endpoint in 0: 10.9.0.6 fd00:9::6"),
        ("gateway", "Gateway in 0: 10.9.0.1 fd00:9::1"),
    ] {
        for form in forms(name) {
            assert_eq!(ground.find(&form), expected, "{form}");
        }
    }
}

#[test]
fn targets_outside_are_among_the_addresses_of_the_families_that_the_network_has() {
    let mut services = services();
    for (name, targets) in [
        ("db", &["192.0.2.10", "2001:db8::10"][..]),
        ("none", &["192.0.2.11"]),
        ("web", &["192.0.2.10:80", "192.0.2.10:81", "[2001:db8::10]:80"]),
    ] {
        let service = services.get_mut(&name.parse::<Name>().unwrap()).unwrap();
        let targets = targets.iter().map(|text| text.parse().unwrap());
        Arc::make_mut(service).external = targets.collect();
    }
    let db = Arc::make_mut(services.get_mut(&"db".parse::<Name>().unwrap()).unwrap());
    db.balancing.ports = vec!["sql=5432".parse().unwrap()];
    let ground = Ground::with(services);
    for (name, expected) in [
        ("db", "Tasks in 0: 10.9.0.3 10.9.0.4 192.0.2.10 fd00:9::3 fd00:9::4 2001:db8::10"),
        ("tasks.db", "Tasks in 0: 10.9.0.3 10.9.0.4 192.0.2.10 fd00:9::3 fd00:9::4 2001:db8::10"),
        ("none", "Tasks in 0: 192.0.2.11"),
        ("web", "Service in 0: 10.9.0.80 fd00:9::80"),
        ("tasks.web", "Tasks in 0: 10.9.0.9 192.0.2.10 fd00:9::9 2001:db8::10"),
        ("tasks.web.mail", "Tasks in 1: 192.0.2.10"),
        // Whose address it is, the world outside knows.
        ("10.2.0.192.in-addr.arpa", "Foreign"),
    ] {
        assert_eq!(ground.find(name), expected, "{name}");
    }
    let port = DomainName::parse("_sql._tcp.db").unwrap();
    let names: Vec<String> = ground.zones[0]
        .get(port.wire())
        .unwrap()
        .ports
        .iter()
        .map(|(name, _)| name.to_string())
        .collect();
    assert_eq!(names, ["db1.", "db2."], "what is outside has no name");
}

#[test]
fn what_is_drained_has_no_name() {
    let ground = Ground::new();
    assert_eq!(ground.find("tool"), "Endpoint in 0: 10.9.0.12 fd00:9::12");
    for name in ["db5", "db6", "db7"] {
        assert_eq!(ground.find(name), "Foreign");
        assert_eq!(ground.find(&format!("{name}.shop.netctl.internal")), "Missing");
    }
}

#[test]
fn the_network_on_which_is_asked_comes_first() {
    let ground = Ground::new();
    assert_eq!(ground.find("only"), "Endpoint in 1: 10.8.0.3");
    assert_eq!(ground.find("a.mail"), "Endpoint in 1: 10.8.0.2");
    assert_eq!(ground.find("gateway.mail"), "Endpoint in 1: 10.8.0.4", "it is called so");
    assert_eq!(ground.find("web.mail.netctl.internal"), "Service in 1: 10.8.0.80");
    let zones: Vec<_> = ground.zones.iter().rev().cloned().collect();
    let names = Names { zones: &zones, ..ground.names() };
    let a = DomainName::parse("a").unwrap();
    assert_eq!(show(&names.find(&a)), "Endpoint in 0: 10.8.0.2");
}

#[test]
fn names_of_a_network_that_the_client_is_not_on_are_not_there() {
    let ground = Ground::new();
    let names = Names { zones: &ground.zones[..1], ..ground.names() };
    let find = |name: &str| show(&names.find(&DomainName::parse(name).unwrap()));
    assert_eq!(find("only"), "Foreign");
    assert_eq!(find("a.mail"), "Foreign");
    assert_eq!(find("a.mail.netctl.internal"), "Missing");
    assert_eq!(find("2.0.8.10.in-addr.arpa"), "Foreign");
}

#[test]
fn without_short_forms_only_names_below_the_domain_and_addresses_are_ours() {
    let ground = Ground::new();
    let names = Names { short: false, ..ground.names() };
    let find = |name: &str| show(&names.find(&DomainName::parse(name).unwrap()));
    for name in ["a", "a.mail", "web", "tasks.web", "com"] {
        assert_eq!(find(name), "Foreign", "{name}");
    }
    for name in ["a.mail.netctl.internal", "x.netctl.internal", "2.0.8.10.in-addr.arpa"] {
        assert_eq!(find(name), ground.find(name), "{name}");
        assert_ne!(find(name), "Foreign", "{name}");
    }
}

#[test]
fn names_above_others_have_nothing_and_what_is_not_below_ours_is_foreign() {
    let ground = Ground::new();
    assert_eq!(ground.find("netctl.internal"), "Branch");
    assert_eq!(ground.find("shop.netctl.internal"), "Branch");
    for missing in ["x.shop.netctl.internal", "x.web.shop.netctl.internal", "x.netctl.internal"] {
        assert_eq!(ground.find(missing), "Missing", "{missing}");
    }
    for foreign in ["x", "shop", "x.shop", "internal", "www.example.com", "arpa", "a.b.mail"] {
        assert_eq!(ground.find(foreign), "Foreign", "{foreign}");
    }
}

#[test]
fn addresses_have_the_names_of_those_who_have_them() {
    let ground = Ground::new();
    let v6 = |tail: &str| {
        format!("{tail}.{}9.0.0.0.0.0.d.f.ip6.arpa", "0.".repeat(24 - tail.split('.').count()))
    };
    for (name, expected) in [
        ("2.0.9.10.in-addr.arpa".to_owned(), "a.shop.netctl.internal."),
        ("80.0.9.10.in-addr.arpa".to_owned(), "web.shop.netctl.internal."),
        ("1.0.9.10.IN-ADDR.ARPA".to_owned(), "gateway.shop.netctl.internal."),
        ("3.0.8.10.in-addr.arpa".to_owned(), "only.mail.netctl.internal."),
        // One that is drained still has its address.
        ("7.0.9.10.in-addr.arpa".to_owned(), "db5.shop.netctl.internal."),
        ("99.0.9.10.in-addr.arpa".to_owned(), "Missing"),
        ("1.2.0.192.in-addr.arpa".to_owned(), "Foreign"),
        // Not how addresses are written.
        ("02.0.9.10.in-addr.arpa".to_owned(), "Foreign"),
        ("0.9.10.in-addr.arpa".to_owned(), "Foreign"),
        ("999.0.9.10.in-addr.arpa".to_owned(), "Foreign"),
        (v6("2"), "a.shop.netctl.internal."),
        (v6("7.7"), "Missing"),
    ] {
        assert_eq!(ground.find(&name), expected, "{name}");
    }
}

#[test]
fn an_internal_networks_zone_forwards_nothing() {
    let ground = Ground::new();
    assert_eq!(ground.zones.iter().map(|zone| zone.forwards).collect::<Vec<_>>(), [true, false]);
    assert_eq!(
        ground.zones[0].get(DomainName::parse("web").unwrap().wire()).unwrap().kind,
        Kind::Service
    );
}

#[test]
fn what_is_simple_every_client_finds_in_every_form() {
    let ground = Ground::new();
    let labels = |zone: &Zone| {
        let label = |name: &[u8]| String::from_utf8(name[1..].to_vec()).unwrap();
        let mut all: Vec<String> =
            zone.simple(&ground.domain).map(|simple| label(simple.label)).collect();
        all.sort();
        all
    };
    // Neither what has several addresses, nor what is above others.
    let of_shop = ["a", "db1", "db2", "db3", "db4", "gateway", "none", "tool", "web", "web1"];
    assert_eq!(labels(&ground.zones[0]), of_shop);
    assert_eq!(labels(&ground.zones[1]), ["a", "gateway", "only", "web"]);
    // Also where the domain is called like something else.
    for domain in ["netctl.internal", "shop", "mail", "web", "a.shop", "tasks", "shop.mail", "x.a.shop"]
    {
        let domain = DomainName::parse(domain).unwrap();
        for order in [&[0][..], &[0, 1], &[1], &[1, 0]] {
            let zones: Vec<_> = order.iter().map(|at| ground.zones[*at].clone()).collect();
            let names = Names { domain: &domain, zones: &zones, short: true };
            let alone = Rest { wire: Vec::new(), domain: None };
            let rests: Vec<Rest> = zones[0].rests(&domain).into_iter().chain([alone]).collect();
            for simple in zones[0].simple(&domain) {
                for rest in &rests {
                    let name = named(&[simple.label, &rest.wire].concat());
                    let Found::Entry(0, entry) = names.find(&name) else { panic!("{name} {domain}") };
                    assert_eq!(
                        (entry.v4.first(), entry.v6.first()),
                        (simple.v4.as_ref(), simple.v6.as_ref())
                    );
                    assert!(entry.v4.len() < 2 && entry.v6.len() < 2, "{name}");
                    let below = rest.domain.map(|at| named(&rest.wire[at..]));
                    assert_eq!(below, name.before(&domain).map(|_| domain.clone()), "{name}");
                }
            }
        }
    }
}

/// A name as the wire has it.
fn named(mut wire: &[u8]) -> DomainName {
    let mut labels = Vec::new();
    while let Some((length, rest)) = wire.split_first() {
        let (label, rest) = rest.split_at(usize::from(*length));
        labels.push(label);
        wire = rest;
    }
    DomainName::new(labels).unwrap()
}

#[test]
fn a_domain_that_leaves_no_room_for_a_label_is_told_of_by_nobody_else() {
    let long =
        |length| DomainName::parse(&[vec!["l".repeat(60); 3].join("."), "l".repeat(length)].join("."));
    assert!(nothing(&long(1).unwrap(), 5, 7).is_some());
    assert!(nothing(&long(63).unwrap(), 5, 7).is_none());
}
