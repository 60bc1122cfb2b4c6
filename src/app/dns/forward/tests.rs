use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, Record};

use super::*;
use std::time::Duration;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn query(text: &str) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(name(text), RecordType::A));
    query
}

fn record(ttl: u32) -> Record {
    Record::from_rdata(name("a.example."), ttl, RData::A(A(Ipv4Addr::new(192, 0, 2, 1))))
}

fn forwarder() -> Forwarder {
    let config = crate::config::DnsConfig {
        domain: DomainName::default(),
        ttl: Duration::ZERO,
        address: None,
        host: None,
        rate: 0,
        upstreams: Vec::new(),
        forward: Default::default(),
    };
    Forwarder::new(Upstreams::new(&config), DomainName::parse("netctl.internal").unwrap())
}

#[test]
fn an_answer_is_kept_for_the_shortest_time_that_it_names() {
    let mut answer = query("a.example.");
    assert_eq!(seconds(&answer), 0, "nothing says for how long");
    let soa = SOA::new(name("ns.example."), name("h.example."), 1, 60, 60, 60, 30);
    answer.authorities = vec![Record::from_rdata(name("example."), 100, RData::SOA(soa.clone()))];
    assert_eq!(seconds(&answer), 30);
    let mut forever = soa;
    forever.minimum = u32::MAX;
    answer.authorities = vec![Record::from_rdata(name("example."), u32::MAX, RData::SOA(forever))];
    assert_eq!(seconds(&answer), LONGEST_NOTHING);
    answer.answers = vec![record(300), record(20)];
    assert_eq!(seconds(&answer), 20);
    answer.answers = vec![record(u32::MAX)];
    assert_eq!(seconds(&answer), LONGEST);
    // Another name is meant, and there it is not found.
    answer.metadata.response_code = ResponseCode::NXDomain;
    assert_eq!(seconds(&answer), LONGEST_NOTHING);
    answer.authorities.clear();
    assert_eq!(seconds(&answer), 0);
}

#[test]
fn what_is_kept_is_told_to_who_asks_for_the_same() {
    let forwarder = forwarder();
    let mut answer = query("a.example.");
    answer.answers = vec![record(60)];
    let server = "192.0.2.53:53".parse().unwrap();
    forwarder.keep(&query("A.example."), &answer, server);
    let (told, source) = forwarder.kept(&query("a.EXAMPLE.")).unwrap();
    let from = |left| NameSource::Kept { server: "192.0.2.53:53".to_owned(), age: 60 - left, left };
    assert!((50..=60).any(|left| source == from(left)), "{source:?}");
    assert_eq!((told.answers.len(), told.queries[0].name().to_string()), (1, "a.EXAMPLE.".to_owned()));
    assert!(forwarder.kept(&query("b.example.")).is_none());
    let mut other = query("a.example.");
    other.queries[0].set_query_type(RecordType::AAAA);
    assert!(forwarder.kept(&other).is_none());
    let mut unchecked = query("a.example.");
    unchecked.metadata.checking_disabled = true;
    assert!(forwarder.kept(&unchecked).is_none());
    answer.answers = vec![record(0)];
    forwarder.keep(&query("zero.example."), &answer, server);
    assert!(forwarder.kept(&query("zero.example.")).is_none(), "it is not to be kept");
}

#[test]
fn names_of_ours_are_not_taken_from_others() {
    let domain = DomainName::parse("netctl.internal").unwrap();
    let tells = |change: &dyn Fn(&mut Message)| {
        let mut answer = query("x.example.");
        answer.answers = vec![record(60)];
        change(&mut answer);
        tells_of(&domain, &answer)
    };
    let (ours, other) = (name("db.shop.Netctl.internal."), name("netctl.internal.example."));
    assert!(!tells(&|_| {}));
    for (target, expected) in [(&ours, true), (&other, false)] {
        let cname = RData::CNAME(hickory_proto::rr::rdata::CNAME(target.clone()));
        let ptr = RData::PTR(hickory_proto::rr::rdata::PTR(target.clone()));
        for data in [cname, ptr] {
            let record = Record::from_rdata(name("a.example."), 60, data);
            assert_eq!(tells(&|answer| answer.answers.push(record.clone())), expected, "{record}");
        }
        let a = RData::A(A(Ipv4Addr::new(10, 9, 0, 2)));
        let record = Record::from_rdata(target.clone(), 60, a);
        assert_eq!(tells(&|answer| answer.additionals.push(record.clone())), expected, "{record}");
    }
}
