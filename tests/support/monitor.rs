//! What is seen of packets: a flow to a service and its answer, a drop, and that some are lost.

use netctl::api::{Carrier, Party, Point, Seen, Sighting, SightingKind};

pub fn sightings() -> Vec<Sighting> {
    let party = |address: &str, port: u16, endpoint: Option<&str>, service: Option<&str>| Party {
        address: address.parse().unwrap(),
        port: (port > 0).then_some(port),
        endpoint: endpoint.map(|name| name.parse().unwrap()),
        service: service.map(|name| name.parse().unwrap()),
    };
    let client = party("10.9.0.2", 52118, Some("a"), None);
    let service = party("10.9.0.9", 80, None, Some("web"));
    let backend = party("10.9.0.4", 8080, Some("web-1"), Some("web"));
    let flow = Seen {
        network: Some("shop".parse().unwrap()),
        point: Point::FromContainer,
        carrier: Some(Carrier::Direct),
        protocol: "tcp".to_owned(),
        source: client.clone(),
        destination: service.clone(),
        translated: Some(backend.clone()),
        length: 60,
        flags: "S".to_owned(),
    };
    let answer = Seen {
        point: Point::FromWire,
        source: backend,
        destination: client,
        translated: Some(service),
        flags: "SA".to_owned(),
        ..flow.clone()
    };
    let dropped = Seen {
        network: None,
        point: Point::Host,
        carrier: None,
        protocol: "icmpv6".to_owned(),
        source: party("fd00:9::77", 0, None, None),
        destination: party("fd00:9::200", 0, None, None),
        translated: None,
        length: 104,
        flags: String::new(),
    };
    let sighting = |micros: i64, kind, reason: &str, lost, packet| Sighting {
        time: jiff::Timestamp::from_microsecond(1_795_336_865_000_000 + micros).unwrap(),
        node: "n1".parse().unwrap(),
        kind,
        reason: reason.to_owned(),
        lost,
        packet,
    };
    vec![
        sighting(310_271, SightingKind::Flow, "", 0, Some(flow)),
        sighting(310_399, SightingKind::Flow, "", 0, Some(answer)),
        sighting(500_000, SightingKind::Drop, "container-to-host", 0, Some(dropped)),
        sighting(600_000, SightingKind::Lost, "", 12, None),
    ]
}
