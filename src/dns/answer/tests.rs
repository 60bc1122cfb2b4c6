use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use serde_json::json;

use super::*;
use crate::dns::Zone;
use crate::model::snapshot::Members;
use crate::model::{Endpoint, Network, Node, Service, Snapshot};

const SHOP: &str = "aaaaaaaaaaaa";

/// The network `shop` with the service `web`, which has an address, and `db`, behind which are so many
/// endpoints.
pub(in crate::dns) fn zone(count: u32) -> Arc<Zone> {
    let node: Node = serde_json::from_value(json!({
        "id": "cccccccccccc", "name": "n1", "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01",
        "tunnel_port": 4789, "mtu": 1450,
    }))
    .unwrap();
    let network: Network = serde_json::from_value(json!({
        "id": SHOP, "name": "shop", "vni": 4097, "uplink": 3,
        "subnets": [{"cidr": "10.9.0.0/16"}, {"cidr": "fd00:9::/64"}],
    }))
    .unwrap();
    let service = |name: &str, mode: &str, addresses, ports| -> Arc<Service> {
        let service = json!({
            "id": "dddddddddddd", "name": name, "networks": [SHOP], "replicas": 1,
            "addresses": addresses, "endpoint_mode": mode, "update_order": "stop-first",
            "update_parallelism": 1, "balancing": {"ports": ports},
        });
        Arc::new(serde_json::from_value(service).unwrap())
    };
    let services = [
        service(
            "web",
            "vip",
            json!({SHOP: ["10.9.200.80", "fd00:9::80"]}),
            json!([{"name": "http", "port": 80, "target": 8080}, {"port": 81, "target": 81}]),
        ),
        service("db", "dnsrr", json!({}), json!([{"name": "sql", "port": 5432, "target": 5433}])),
    ];
    let endpoints = (0..count).map(|number| {
        let address = Ipv4Addr::from(0x0a09_0100 + number);
        let endpoint: Endpoint = serde_json::from_value(json!({
            "id": format!("{number:012x}"), "name": format!("e{number}"), "network": SHOP, "node": "n1",
            "addresses": [address], "mac": "06:00:00:00:00:01", "service": "db",
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }))
        .unwrap();
        (endpoint.id, Arc::new(endpoint))
    });
    let snapshot = Snapshot {
        services: Arc::new(services.map(|service| (service.name.clone(), service)).into()),
        ..Snapshot::default()
    };
    let members = Members { endpoints: endpoints.collect(), ..Members::default() };
    Arc::new(Zone::new(&node, &snapshot, &network, &members))
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.metadata.id = 4711;
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query
}

fn with_edns(mut query: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    query.edns = Some(edns);
    query
}

/// A query as its bytes.
pub(in crate::dns) fn plain(name: &str, kind: &str, edns: Option<u16>) -> Vec<u8> {
    let mut query = query(name, kind.parse().unwrap());
    if let Some(size) = edns {
        query = with_edns(query, size);
    }
    query.to_vec().unwrap()
}

/// Does something with what the client of a network is answered with.
pub(in crate::dns) fn terms<T>(zone: &Arc<Zone>, act: impl FnOnce(Terms<'_>) -> T) -> T {
    let domain = DomainName::parse("netctl.internal").unwrap();
    let names = Names { domain: &domain, zones: std::slice::from_ref(zone), short: true };
    act(Terms { names, ttl: 5, serial: 9 })
}

/// What the client of a network is answered.
fn reply(zone: &Arc<Zone>, query: &Message, transport: Transport, seed: u64) -> Reply {
    terms(zone, |terms| terms.reply(query, transport, &mut SmallRng::seed_from_u64(seed)))
}

fn answer(zone: &Arc<Zone>, query: &Message) -> Message {
    match reply(zone, query, Transport::Udp, 1) {
        Reply::Ours(message) => message,
        other => panic!("{other:?}"),
    }
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn an_answer_has_the_question_as_it_was_asked_and_what_the_name_has() {
    let zone = zone(1);
    let asked = query("WeB.Shop.netctl.internal.", RecordType::A);
    let answer = answer(&zone, &asked);
    assert_eq!(answer.metadata.id, 4711);
    let flags = answer.metadata;
    assert!(flags.authoritative && flags.recursion_available && flags.recursion_desired);
    assert_eq!(answer.queries, asked.queries);
    let [record] = &answer.answers[..] else { panic!("{answer:?}") };
    assert_eq!(record.name.to_string(), "WeB.Shop.netctl.internal.");
    assert_eq!((record.ttl, record.data.to_string().as_str()), (5, "10.9.200.80"));
    for (name, kind, expected) in [
        ("web", RecordType::AAAA, vec!["fd00:9::80"]),
        ("e0.shop", RecordType::A, vec!["10.9.1.0"]),
        ("e0", RecordType::AAAA, vec![]),
        ("web", RecordType::MX, vec![]),
        ("shop.netctl.internal", RecordType::A, vec![]),
        ("80.200.9.10.in-addr.arpa", RecordType::PTR, vec!["web.shop.netctl.internal."]),
        ("80.200.9.10.in-addr.arpa", RecordType::A, vec![]),
    ] {
        let answer = self::answer(&zone, &query(name, kind));
        assert_eq!(
            (data(&answer), answer.metadata.response_code),
            (expected.iter().map(|text| (*text).to_owned()).collect(), ResponseCode::NoError),
            "{name} {kind}"
        );
    }
}

#[test]
fn where_nothing_is_the_zones_record_says_for_how_long() {
    let zone = zone(1);
    for (name, kind, code, owner) in [
        ("no.shop.netctl.internal.", RecordType::A, ResponseCode::NXDomain, "netctl.internal."),
        ("no.netctl.internal.", RecordType::A, ResponseCode::NXDomain, "netctl.internal."),
        ("Netctl.Internal.", RecordType::A, ResponseCode::NoError, "Netctl.Internal."),
        ("e0.shop.netctl.internal.", RecordType::AAAA, ResponseCode::NoError, "netctl.internal."),
        ("e0.", RecordType::AAAA, ResponseCode::NoError, "e0."),
        ("9.9.9.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NXDomain, "9.9.10.in-addr.arpa."),
    ] {
        let answer = answer(&zone, &query(name, kind));
        assert_eq!((answer.metadata.response_code, data(&answer)), (code, Vec::new()), "{name}");
        let [record] = &answer.authorities[..] else { panic!("{answer:?}") };
        assert_eq!(record.name.to_string(), owner, "{name}");
        let RData::SOA(soa) = &record.data else { panic!("{record:?}") };
        assert_eq!((soa.serial, soa.minimum, record.ttl), (9, 5, 5));
        assert_eq!(soa.mname.to_string(), "ns.netctl.internal.");
    }
    let apex = answer(&zone, &query("netctl.internal.", RecordType::SOA));
    assert_eq!((apex.answers.len(), apex.authorities.len()), (1, 0));
}

#[test]
fn named_ports_are_found_with_who_serves_them() {
    let zone = zone(2);
    let found = |name: &str| {
        let answer = answer(&zone, &query(name, RecordType::SRV));
        let more = answer.additionals.iter().map(|record| format!("{} {}", record.name, record.data));
        let (mut data, mut more) = (data(&answer), more.collect::<Vec<_>>());
        data.sort();
        more.sort();
        (data, more)
    };
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    for name in ["_http._tcp.web", "_HTTP._TCP.web.shop", "_http._tcp.web.shop.netctl.internal"] {
        let at =
            owned(&["web.shop.netctl.internal. 10.9.200.80", "web.shop.netctl.internal. fd00:9::80"]);
        assert_eq!(found(name), (owned(&["0 0 80 web.shop.netctl.internal."]), at), "{name}");
    }
    let data = ["0 0 5433 e0.shop.netctl.internal.", "0 0 5433 e1.shop.netctl.internal."];
    let at = ["e0.shop.netctl.internal. 10.9.1.0", "e1.shop.netctl.internal. 10.9.1.1"];
    assert_eq!(found("_sql._tcp.db.shop.netctl.internal"), (owned(&data), owned(&at)));
    for name in ["_tcp.web", "web", "_http._tcp.web.shop.netctl.internal"] {
        let answer = answer(&zone, &query(name, RecordType::MX));
        assert_eq!(
            (self::data(&answer), answer.metadata.response_code),
            (Vec::new(), ResponseCode::NoError)
        );
    }
    for name in ["_http._udp.web", "_https._tcp.web", "_http._tcp.db"] {
        let name = format!("{name}.shop.netctl.internal");
        let code = answer(&zone, &query(&name, RecordType::SRV)).metadata.response_code;
        assert_eq!(code, ResponseCode::NXDomain, "{name}");
    }
}

#[test]
fn what_is_not_ours_is_left_to_others_and_what_is_no_query_is_not_answered() {
    let zone = zone(1);
    for name in ["example.org.", "no.", "no.shop.", "8.8.8.8.in-addr.arpa.", "."] {
        let asked = query(name, RecordType::A);
        assert!(matches!(reply(&zone, &asked, Transport::Udp, 1), Reply::Elsewhere), "{name}");
    }
    let mut response = query("web", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(matches!(reply(&zone, &response, Transport::Udp, 1), Reply::Nothing));
}

#[test]
fn what_floods_are_made_of_is_refused() {
    let zone = zone(1);
    let refused = |query: &Message| {
        let answer = answer(&zone, query);
        assert_eq!(data(&answer), [""; 0]);
        answer.metadata.response_code
    };
    for name in ["web", "shop.netctl.internal", "example.org"] {
        for kind in [RecordType::ANY, RecordType::AXFR, RecordType::IXFR] {
            assert_eq!(refused(&query(name, kind)), ResponseCode::Refused, "{name} {kind}");
        }
    }
    let mut chaos = query("version.bind", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(refused(&chaos), ResponseCode::Refused);
    let mut update = query("web", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(refused(&update), ResponseCode::NotImp);
    let mut two = query("web", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("db").unwrap(), RecordType::A));
    assert_eq!(refused(&two), ResponseCode::FormErr);
    two.queries.clear();
    assert_eq!(refused(&two), ResponseCode::FormErr);
    let mut newer = with_edns(query("web", RecordType::A), 1232);
    newer.edns.as_mut().unwrap().set_version(1);
    assert_eq!(refused(&newer), ResponseCode::BADVERS);
}

#[test]
fn many_addresses_come_in_another_order_each_time_and_as_many_as_fit() {
    let zone = zone(3000);
    let encoded = |query: &Message, transport, seed| {
        let Reply::Ours(message) = reply(&zone, query, transport, seed) else { panic!("ours") };
        encode(message, max_size(query, transport)).unwrap()
    };
    let asked = query("tasks.db", RecordType::A);
    let mut first = BTreeSet::new();
    for (query, transport, most) in [
        (asked.clone(), Transport::Udp, 512),
        (with_edns(asked.clone(), 100), Transport::Udp, 512),
        (with_edns(asked.clone(), 1000), Transport::Udp, 1000),
        (with_edns(asked.clone(), 65535), Transport::Udp, 1232),
        (asked.clone(), Transport::Tcp, 65535),
    ] {
        for seed in 0..8 {
            let bytes = encoded(&query, transport, seed);
            let message = Message::from_vec(&bytes).unwrap();
            // As many as there are, or as there is room for: a record has 16 bytes.
            let all = message.answers.len() == 3000;
            assert!(bytes.len() <= most && (all || bytes.len() > most - most / 10), "{}", bytes.len());
            assert_eq!(message.metadata.truncation, !all);
            assert_eq!(message.edns.is_some(), query.edns.is_some());
            let different: BTreeSet<String> = data(&message).into_iter().collect();
            assert_eq!(different.len(), message.answers.len(), "none twice");
            first.insert(data(&message).remove(0));
        }
    }
    assert!(first.len() >= 8, "{first:?}");
}

#[test]
fn an_answer_that_is_too_large_loses_what_comes_with_it_first() {
    let asked = query("example.org.", RecordType::A);
    let mut message = relayed(&asked, &asked);
    let record = |number: u8| {
        let name = Name::from_ascii("example.org.").unwrap();
        Record::from_rdata(name, 1, RData::A(A(Ipv4Addr::new(192, 0, 2, number))))
    };
    message.answers = (0..10).map(record).collect();
    message.additionals = (10..40).map(record).collect();
    let cut = Message::from_vec(&encode(message.clone(), 512).unwrap()).unwrap();
    assert_eq!((cut.answers.len(), cut.additionals.len(), cut.metadata.truncation), (10, 0, false));
    let whole = Message::from_vec(&encode(message, 1232).unwrap()).unwrap();
    assert_eq!((whole.additionals.len(), whole.metadata.truncation), (30, false));
}

#[test]
fn what_cannot_be_read_is_told_so_and_what_is_asked_inside_is_not_there() {
    let readable = plain("web", "A", None);
    let told = unreadable(&readable[..20]).unwrap();
    let answer = Message::from_vec(&told).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (4711, ResponseCode::FormErr));
    assert!(answer.metadata.recursion_desired && answer.queries.is_empty());
    assert_eq!(unreadable(&readable[..11]), None, "it has no header");
    let mut response = readable.clone();
    response[2] |= 0x80;
    assert_eq!(unreadable(&response), None, "who answers is not answered");
    let asked = query("www.example.org.", RecordType::A);
    let answer = terms(&zone(1), |terms| terms.inside(&asked));
    let [record] = &answer.authorities[..] else { panic!("{answer:?}") };
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(
        (record.name.to_string(), record.record_type()),
        ("example.org.".to_owned(), RecordType::SOA)
    );
}

/// A query as it may come: a right one of which some bytes are others, or anything.
pub(in crate::dns) fn anything() -> impl Strategy<Value = Vec<u8>> {
    let names = [
        "web",
        "_http._tcp.web.shop.netctl.internal",
        "80.200.9.10.in-addr.arpa",
        "a.example",
        "tasks.db.shop",
    ];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let changed = (
        prop::sample::select(names.to_vec()),
        prop_oneof![Just(1_u16), Just(28), any::<u16>()],
        any::<u16>(),
        changes,
        0_usize..3,
    );
    prop_oneof![
        changed.prop_map(|(name, kind, size, changes, cut)| {
            let query = with_edns(query(name, RecordType::from(kind)), size);
            let mut bytes = query.to_vec().unwrap();
            for (index, byte) in changes {
                *index.get_mut(&mut bytes) = byte;
            }
            bytes.truncate(bytes.len() - cut);
            bytes
        }),
        prop::collection::vec(any::<u8>(), 0..600),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn whatever_comes_is_answered_within_bounds_or_not_at_all(bytes in anything(), seed: u64, tcp: bool) {
        static ZONE: std::sync::LazyLock<Arc<Zone>> = std::sync::LazyLock::new(|| zone(200));
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        if let Ok(query) = Message::from_vec(&bytes)
            && let Reply::Ours(message) = reply(&ZONE, &query, transport, seed)
        {
            let max = max_size(&query, transport);
            let bytes = encode(message, max).expect("what was read can be written");
            prop_assert!(bytes.len() <= usize::from(max), "{} of {max}", bytes.len());
            let answer = Message::from_vec(&bytes).unwrap();
            prop_assert_eq!(answer.metadata.id, query.metadata.id);
            prop_assert!(answer.queries == query.queries || answer.metadata.response_code == ResponseCode::FormErr);
        }
    }
}
