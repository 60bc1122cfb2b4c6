//! Names that are answered where the query enters the sandbox.

use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::{DNSClass, Name as QueryName, RecordType};
use netctl::dns::answer::{Reply, Terms, Transport};
use netctl::dns::{DomainName, Names, Zone, nothing};
use netctl::kernel::ebpf::{Name, NameKey, Place, Telling, nanoseconds};
use netctl::model::snapshot::Members;
use netctl::model::{Endpoint, Network, Node, Snapshot};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;

use crate::ground::{DEVICE, Ground, NETWORK, PASS, REDIRECT};
use crate::packet::{Packet, TCP, UDP};

const TTL: u32 = 5;
const SERIAL: u32 = 0x1234_5678;
/// The container, and who is asked, by both families.
const SIDES: [(&str, &str); 2] = [("10.9.0.5", "10.9.0.1"), ("fd00:9::5", "fd00:9::1")];

/// A network's names, as a sandbox knows them.
struct Known {
    ground: Ground,
    domain: DomainName,
    zones: Vec<Arc<Zone>>,
}

fn longest() -> String {
    "l".repeat(63)
}

fn zone() -> Zone {
    let node: Node = serde_json::from_value(json!({
        "id": "cccccccccccc", "name": "n1", "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01",
        "tunnel_port": 4789, "mtu": 1450,
    }))
    .unwrap();
    let network: Network = serde_json::from_value(json!({
        "id": "aaaaaaaaaaaa", "name": "shop", "vni": NETWORK, "uplink": 3,
        "subnets": [{"cidr": "10.9.0.0/16"}, {"cidr": "fd00:9::/64"}],
    }))
    .unwrap();
    let longest = longest();
    let has: [(&str, &[&str]); 6] = [
        ("web", &["10.9.0.7", "fd00:9::7"]),
        ("four", &["10.9.0.8"]),
        ("six", &["fd00:9::9"]),
        (&longest, &["10.9.0.10"]),
        ("many", &["10.9.0.11", "10.9.0.12"]),
        ("tasks", &["10.9.0.13"]),
    ];
    let endpoints = (0..).zip(has).map(|(number, (name, addresses))| {
        let endpoint: Endpoint = serde_json::from_value(json!({
            "id": format!("{number:012x}"), "name": name, "network": "aaaaaaaaaaaa", "node": "n1",
            "addresses": addresses, "mac": "06:00:00:00:00:01",
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }))
        .unwrap();
        (endpoint.id, Arc::new(endpoint))
    });
    let members = Members { endpoints: endpoints.collect(), ..Members::default() };
    Zone::new(&node, &Snapshot::default(), &network, &members)
}

impl Known {
    fn new(domain: &str) -> Self {
        let (ground, zone) = (Ground::new(16), zone());
        let maps = &ground.ebpf.maps().naming;
        let domain = DomainName::parse(domain).unwrap();
        for (_, server) in SIDES {
            let place = Place::new(NETWORK, server.parse::<IpAddr>().unwrap());
            maps.servers.insert(&place, &1).unwrap();
        }
        for simple in zone.simple(&domain) {
            let key = NameKey::new(NETWORK, simple.label).unwrap();
            maps.names.insert(&key, &Name::with(simple.v4, simple.v6)).unwrap();
        }
        for rest in zone.rests(&domain) {
            let key = NameKey::new(NETWORK, &rest.wire).unwrap();
            maps.suffixes.insert(&key, &(rest.domain.unwrap_or(0) as u32)).unwrap();
        }
        let telling = Telling::new(later(), TTL, &nothing(&domain, TTL, SERIAL).unwrap());
        maps.telling.insert(&0, &telling).unwrap();
        Self { ground, domain, zones: vec![Arc::new(zone)] }
    }

    /// What the agent answers.
    fn agent(&self, query: &Message) -> Message {
        let names = Names { domain: &self.domain, zones: &self.zones, short: true };
        let terms = Terms { names, ttl: TTL, serial: SERIAL };
        match terms.reply(query, Transport::Udp, &mut SmallRng::seed_from_u64(1)) {
            Reply::Ours(message) => Message::from_vec(&message.to_vec().unwrap()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// A query is answered just as the agent does, to who has asked.
    #[track_caller]
    fn is_answered(&self, asked: &Packet, query: &Message) {
        let (verdict, answer) = self.ground.send(asked);
        assert_eq!(verdict, REDIRECT, "{query}");
        let told = Message::from_vec(&answer.data).unwrap();
        assert_eq!(told, self.agent(query), "{query}");
        let back = Packet { is_back: true, data: answer.data.clone(), ..asked.back(0) };
        assert_eq!(answer, back, "{query}");
    }
}

/// A while from now.
fn later() -> u64 {
    nanoseconds().unwrap() + 60_000_000_000
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::new(0xbeef, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(QueryName::from_ascii(name).unwrap(), kind));
    query
}

fn with_edns(query: &Message, signed: bool) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(signed);
    let mut query = query.clone();
    query.edns = Some(edns);
    query
}

fn packet((client, server): (&str, &str), data: &[u8]) -> Packet {
    Packet { data: data.to_vec(), ..Packet::new(UDP, (client, 40_000), (server, 53)) }
}

pub fn a_name_is_answered_as_the_agent_answers_it() {
    // The question ends at an even place, and at an odd one.
    for domain in ["netctl.internal", "internal", "netctl.internals"] {
        let known = Known::new(domain);
        for name in ["web", "WeB", "four", "six", &longest(), "gateway"] {
            let full = [name.to_owned(), format!("{name}.Shop"), format!("{name}.shop.{domain}")];
            for kind in [RecordType::A, RecordType::AAAA] {
                for name in &full {
                    let query = query(&format!("{name}."), kind);
                    let mut knowing = query.clone();
                    knowing.metadata.authentic_data = true;
                    let edns = [false, true].map(|signed| with_edns(&query, signed));
                    for query in [query, knowing].into_iter().chain(edns) {
                        for side in SIDES {
                            known.is_answered(&packet(side, &query.to_vec().unwrap()), &query);
                        }
                    }
                }
            }
        }
    }
}

pub fn an_answer_has_a_checksum_where_its_query_had_one() {
    let known = Known::new("netctl.internal");
    let query = query("web.", RecordType::A);
    let asked = Packet { no_checksum: true, ..packet(SIDES[0], &query.to_vec().unwrap()) };
    known.is_answered(&asked, &query);
}

pub fn what_only_the_agent_knows_goes_to_it_as_it_is() {
    let known = Known::new("netctl.internal");
    let asked = |name: &str, kind| query(name, kind).to_vec().unwrap();
    let web = asked("web.", RecordType::A);
    let full = asked("web.shop.", RecordType::A);
    let change = |at: usize, to: u8| {
        let mut bytes = web.clone();
        bytes[at] = to;
        bytes
    };
    let mut chaos = query("web.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    let mut cookie = with_edns(&query("web.", RecordType::A), false).to_vec().unwrap();
    let length = cookie.len();
    cookie[length - 2..].copy_from_slice(&[0, 12]);
    cookie.extend([0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    let mut version = with_edns(&query("web.", RecordType::A), false).to_vec().unwrap();
    version[length - 5] = 1;
    let others = [
        ("more addresses than one", asked("many.", RecordType::A)),
        ("another meaning", asked("tasks.", RecordType::A)),
        ("no such name", asked("nobody.", RecordType::A)),
        ("no such name there", asked("nobody.shop.netctl.internal.", RecordType::A)),
        ("another network", asked("web.mail.netctl.internal.", RecordType::A)),
        ("a label more", asked("a.web.shop.netctl.internal.", RecordType::A)),
        ("another domain", asked("web.shop.netctl.example.", RecordType::A)),
        ("the domain", asked("netctl.internal.", RecordType::A)),
        ("the root", asked(".", RecordType::A)),
        ("another type", asked("web.", RecordType::SRV)),
        ("a type of two bytes", asked("web.", RecordType::Unknown(0x0101))),
        ("another class", chaos.to_vec().unwrap()),
        ("an answer", change(2, 0x81)),
        ("another kind of query", change(2, 0x11)),
        ("flags", change(3, 0x10)),
        ("two questions", change(5, 2)),
        ("an answer in it", change(7, 1)),
        ("an authority in it", change(9, 1)),
        ("an addition that is not there", change(11, 1)),
        ("a label that is too long", change(12, 64)),
        ("a pointer", change(12, 0xc0)),
        ("a label that is longer than all", change(12, 60)),
        ("a label that ends too soon", change(12, 2)),
        (
            "a byte more behind the name",
            [&full[..full.len() - 4], &[0], &full[full.len() - 4..]].concat(),
        ),
        ("a byte more", [&web[..], &[0]].concat()),
        ("a byte less", web[..web.len() - 1].to_vec()),
        ("a header", web[..12].to_vec()),
        ("half a header", web[..5].to_vec()),
        ("nothing", Vec::new()),
        ("a cookie", cookie),
        ("a version of later", version),
    ];
    for (what, data) in others {
        for side in SIDES {
            let asked = packet(side, &data);
            assert_eq!(known.ground.send(&asked), (PASS, asked), "{what}");
        }
    }
}

/// Queries with some bytes that are others, and some more or less: whatever is told, the agent would tell.
pub fn what_is_told_of_any_bytes_the_agent_would_tell() {
    // Where the processor is emulated each takes ten times as long, and finds the same.
    let rounds = if std::env::var_os("NETCTL_VM").is_some() { 5_000 } else { 50_000 };
    let known = Known::new("netctl.internal");
    let mut rng = SmallRng::seed_from_u64(20_261);
    let names = ["web.", "six.shop.", "four.shop.netctl.internal.", "web.mail.", "nobody."];
    let kinds = [RecordType::A, RecordType::AAAA, RecordType::TXT];
    let mut told = 0;
    for round in 0..rounds {
        let name = *names.choose(&mut rng).unwrap();
        let plain = query(name, *kinds.choose(&mut rng).unwrap());
        let asked = if rng.random() { with_edns(&plain, rng.random()) } else { plain };
        let mut bytes = asked.to_vec().unwrap();
        for _ in 0..rng.random_range(0..3) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..4) {
                0 => bytes.insert(at, rng.random()),
                1 => drop(bytes.remove(at)),
                2 => bytes[at] ^= 1 << rng.random_range(0..8),
                _ => bytes[at] = rng.random(),
            }
        }
        let side = SIDES[round as usize % 2];
        let (verdict, answer) = known.ground.send(&packet(side, &bytes));
        if verdict == PASS {
            assert_eq!(answer.data, bytes);
            continue;
        }
        told += 1;
        let read = Message::from_vec(&bytes).unwrap_or_else(|error| panic!("{bytes:x?}: {error}"));
        assert_eq!(Message::from_vec(&answer.data).unwrap(), known.agent(&read), "{bytes:x?}");
    }
    assert!((rounds / 10..rounds).contains(&told), "{told} of {rounds}");
}

pub fn who_is_no_name_server_is_not_spoken_for() {
    let known = Known::new("netctl.internal");
    let data = query("web.", RecordType::A).to_vec().unwrap();
    let asked = packet(SIDES[0], &data);
    let others = [
        Packet { destination: "10.9.0.99".parse().unwrap(), ..asked.clone() },
        Packet { destination_port: 5353, ..asked.clone() },
        Packet { protocol: TCP, ..asked.clone() },
        Packet { fragment: Some((7, 0, true)), ..asked.clone() },
    ];
    for other in others {
        assert_eq!(known.ground.send(&other), (PASS, other));
    }
    // A part of a larger packet may be longer than it says.
    let mut frame = asked.bytes();
    frame.extend([0; 4]);
    let (verdict, bytes) = known.ground.programs.run("netctl_from", DEVICE, &frame).unwrap();
    assert_eq!((verdict, bytes), (PASS, frame));
}

pub fn what_nobody_says_any_more_is_not_told() {
    let known = Known::new("netctl.internal");
    let ask = |kind| {
        let asked = packet(SIDES[0], &query("four.", kind).to_vec().unwrap());
        known.ground.send(&asked).0
    };
    assert_eq!([RecordType::A, RecordType::AAAA].map(ask), [REDIRECT; 2]);
    assert_eq!(known.ground.event(7), 2, "they are counted");
    let telling = &known.ground.ebpf.maps().naming.telling;
    // A domain may leave no room for the record that says that there is nothing.
    telling.insert(&0, &Telling::new(later(), TTL, &[0; 1000])).unwrap();
    assert_eq!([RecordType::A, RecordType::AAAA].map(ask), [REDIRECT, PASS]);
    let nothing = nothing(&known.domain, TTL, SERIAL).unwrap();
    telling.insert(&0, &Telling::new(later() - 61_000_000_000, TTL, &nothing)).unwrap();
    assert_eq!([RecordType::A, RecordType::AAAA].map(ask), [PASS; 2]);
}
