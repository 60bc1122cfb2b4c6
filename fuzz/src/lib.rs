//! What the targets do, by their names. `tests/fuzz.rs` has it done with some random bytes in every run of the tests.

use std::net::Ipv4Addr;
use std::sync::{Arc, LazyLock};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use netctl::dns::answer::{Reply, Terms, Transport, encode, max_size, relayed, unreadable};
use netctl::dns::{DomainName, Names, Packed, PlainQuery, Quick, Zone};
use netctl::model::snapshot::Members;
use netctl::model::{Endpoint, External, Network, Node, Service, Snapshot};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

const SHOP: &str = "aaaaaaaaaaaa";

static DOMAIN: LazyLock<DomainName> =
    LazyLock::new(|| DomainName::parse("netctl.internal").expect("it is a name"));
static ZONE: LazyLock<Arc<Zone>> = LazyLock::new(zone);

/// Any datagram of a container: it is answered within bounds, and the short way and the long one say
/// the same.
pub fn query(bytes: &[u8]) {
    let terms = terms();
    for transport in [Transport::Udp, Transport::Tcp] {
        let mut quick = Vec::new();
        let plain = PlainQuery::read(bytes);
        let led = plain.map(|query| terms.quick(&query, transport, &mut rng(), &mut quick));
        let Ok(query) = Message::from_vec(bytes) else {
            assert_ne!(led, Some(Quick::Answered), "what cannot be read is not answered");
            assert!(unreadable(bytes).is_none_or(|answer| answer.len() == 12));
            continue;
        };
        let reply = terms.reply(&query, transport, &mut rng());
        if led == Some(Quick::Foreign) {
            // What floods are made of is refused before that.
            assert!(!matches!(reply, Reply::Nothing));
        }
        let Reply::Ours(message) = reply else {
            assert_ne!(led, Some(Quick::Answered));
            continue;
        };
        let long = encode(message, max_size(&query, transport)).expect("it can be written");
        assert!(long.len() <= usize::from(max_size(&query, transport)));
        let long = Message::from_vec(&long).expect("what we write can be read");
        if led == Some(Quick::Answered) {
            let quick = Message::from_vec(&quick).expect("what we write can be read");
            assert_eq!(sorted(quick), sorted(long));
        }
    }
}

/// Any answer of another name server: it is told, kept and told once more, the same both times.
pub fn answer(bytes: &[u8]) {
    let Ok(answer) = Message::from_vec(bytes) else { return };
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    let (name, kind) = match answer.queries.first() {
        Some(question) => (question.name().clone(), question.query_type()),
        None => (Name::from_ascii("www.example.org.").expect("it is a name"), RecordType::A),
    };
    query.add_query(Query::query(name, kind));
    let told = relayed(&query, &answer);
    let Some(long) = encode(told.clone(), max_size(&query, Transport::Udp)) else { return };
    assert!(long.len() <= usize::from(max_size(&query, Transport::Udp)));
    let bytes = query.to_vec().expect("a query can be written");
    // Only what is whole is kept.
    if answer.metadata.truncation {
        return;
    }
    if let (Some(packed), Some(plain)) = (Packed::new(&told), PlainQuery::read(&bytes)) {
        let mut written = Vec::new();
        if packed.write(&plain, 0, Transport::Udp, &mut written) {
            let read = |bytes: &[u8]| Message::from_vec(bytes).ok();
            assert_eq!(read(&written), read(&long));
        }
    }
}

/// What people and other programs write: names, and targets outside.
pub fn text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if let Some(name) = DomainName::parse(text) {
        assert!(name.wire().len() < 255);
        if text.bytes().all(is_usual) {
            assert_eq!(DomainName::parse(&name.to_string()), Some(name));
        }
    }
    if let Ok(external) = text.parse::<External>() {
        assert_eq!(external.to_string().parse(), Ok(external));
    }
}

/// With what a container on one network is answered: the service `web` has addresses and named ports,
/// `db` forty endpoints.
fn terms() -> Terms<'static> {
    let names = Names { domain: &DOMAIN, zones: std::slice::from_ref(&*ZONE), short: true };
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

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(1)
}

fn sorted(mut message: Message) -> Message {
    message.answers.sort_by_key(|record| record.data.to_string());
    message
}
