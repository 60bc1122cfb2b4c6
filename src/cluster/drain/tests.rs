use serde_json::json;

use super::*;

/// What there is of network 1: endpoints `a` (n1) and `b` (n2) of service `web`, `c` (n3) of none.
struct Ground {
    endpoints: Vec<Versioned<Endpoint>>,
    acks: Acks,
    alive: BTreeSet<NodeName>,
    drained: BTreeMap<NodeName, Revision>,
    mode: EndpointMode,
}

fn node(number: u32) -> NodeName {
    format!("n{number}").parse().unwrap()
}

fn id(number: u32) -> EndpointId {
    format!("{number:012x}").parse().unwrap()
}

fn endpoint(number: u32, service: Option<&str>, revision: u64) -> Versioned<Endpoint> {
    let value = json!({
        "id": id(number), "name": format!("e{number}"), "network": "000000000001",
        "node": node(number), "addresses": [], "mac": "02:00:00:00:00:01", "service": service,
        "attachment": {"netns": "/n", "inode": 1, "boot": "b", "interface": "eth0"},
    });
    Versioned { value: serde_json::from_value(value).unwrap(), revision }
}

impl Ground {
    fn new() -> Self {
        Self {
            endpoints: vec![
                endpoint(1, Some("web"), 10),
                endpoint(2, Some("web"), 11),
                endpoint(3, None, 12),
            ],
            acks: Acks::new(),
            alive: (1..=3).map(node).collect(),
            drained: BTreeMap::new(),
            mode: EndpointMode::Vip,
        }
    }

    /// Drains an endpoint; its record is written at this revision.
    fn drain(&mut self, number: u32, revision: u64) {
        let endpoint = self.endpoints.iter_mut().find(|e| e.id == id(number)).unwrap();
        endpoint.value.state = EndpointState::Draining;
        endpoint.revision = revision;
    }

    /// A node acknowledges endpoint 1; the store writes that at revision `at`.
    fn ack(&mut self, by: u32, revision: u64, connections: u64, at: u64) {
        let ack = Versioned { value: Ack { revision, connections }, revision: at };
        self.acks.entry(id(1)).or_default().insert(node(by), ack);
    }

    fn look(&self, scope: &Scope) -> Drain {
        let modes = BTreeMap::from([("web".parse().unwrap(), Some(self.mode))]);
        let marked = matches!(scope, Scope::Node(node) if self.drained.contains_key(node));
        let mut drain = Drain { marked, ..Drain::default() };
        let Self { endpoints, acks, alive, drained, .. } = self;
        Seen { endpoints, acks, alive, drained }.add(scope, &modes, &mut drain);
        drain
    }
}

fn one() -> Scope {
    Scope::Endpoint("000000000001".parse().unwrap(), id(1))
}

fn waiting(drain: &Drain) -> Vec<&str> {
    drain.waiting.iter().map(NodeName::as_str).collect()
}

#[test]
fn every_live_node_that_uses_the_network_must_have_applied_the_drain() {
    let mut ground = Ground::new();
    assert!(!ground.look(&one()).is_done(&one()), "nothing is drained");
    ground.drain(1, 20);
    assert_eq!(waiting(&ground.look(&one())), ["n1", "n2", "n3"]);
    ground.ack(1, 20, 0, 21);
    // What was applied before does not count.
    ground.ack(2, 19, 0, 22);
    ground.ack(3, 25, 2, 23);
    let drain = ground.look(&one());
    assert_eq!((waiting(&drain), drain.connections), (vec!["n2"], 2));
    ground.ack(2, 20, 0, 24);
    assert!(!ground.look(&one()).is_done(&one()), "two connections are open");
    ground.ack(3, 25, 0, 25);
    let drain = ground.look(&one());
    assert!(drain.is_done(&one()) && drain.endpoints == 1, "{drain:?}");
}

#[test]
fn a_node_without_endpoints_counts_with_what_it_has_written() {
    let mut ground = Ground::new();
    ground.drain(1, 20);
    (1..=3).for_each(|number| ground.ack(number, 20, 0, 21));
    ground.alive.insert(node(4));
    assert!(ground.look(&one()).is_done(&one()), "n4 has nothing here");
    ground.ack(4, 20, 7, 22);
    assert_eq!(ground.look(&one()).connections, 7);
    ground.alive.remove(&node(4));
    assert!(ground.look(&one()).is_done(&one()), "connections of a dead node lead nowhere");
}

#[test]
fn dead_nodes_are_not_waited_for() {
    let mut ground = Ground::new();
    ground.drain(1, 20);
    ground.alive.remove(&node(3));
    assert_eq!(waiting(&ground.look(&one())), ["n1", "n2"]);
    ground.alive.remove(&node(1));
    assert!(ground.look(&one()).is_done(&one()), "the endpoint's own node is dead");
}

#[test]
fn what_nobody_balances_to_is_drained_at_once() {
    let mut ground = Ground::new();
    ground.drain(1, 20);
    ground.mode = EndpointMode::Dnsrr;
    assert!(ground.look(&one()).is_done(&one()));
    ground.mode = EndpointMode::Vip;
    assert!(!ground.look(&one()).is_done(&one()));
    ground.endpoints[0].value.service = None;
    assert!(ground.look(&one()).is_done(&one()));
}

#[test]
fn a_drained_node_needs_what_was_written_since() {
    let mut ground = Ground::new();
    let scope = Scope::Node(node(1));
    assert!(!ground.look(&scope).is_done(&scope));
    // Of an earlier drain.
    (1..=3).for_each(|number| ground.ack(number, 10, 0, 30));
    ground.drained.insert(node(1), Revision(40));
    assert_eq!(waiting(&ground.look(&scope)), ["n1", "n2", "n3"]);
    (1..=3).for_each(|number| ground.ack(number, 10, 0, 41));
    let drain = ground.look(&scope);
    assert!(drain.is_done(&scope) && drain.endpoints == 1, "{drain:?}");
    let empty = Scope::Node(node(9));
    ground.drained.insert(node(9), Revision(42));
    assert!(ground.look(&empty).is_done(&empty), "a node without endpoints");
}

#[test]
fn a_service_is_drained_with_those_of_its_endpoints_that_are() {
    let mut ground = Ground::new();
    let service = serde_json::from_value(json!({
        "id": "0123456789ab", "name": "web", "networks": [], "replicas": 2, "endpoint_mode": "vip",
        "update_order": "stop-first", "update_parallelism": 1, "addresses": {},
    }));
    let scope = Scope::Service(service.unwrap());
    assert!(!ground.look(&scope).is_done(&scope));
    ground.drain(1, 20);
    (1..=3).for_each(|number| ground.ack(number, 20, 0, 21));
    // The other one may be its successor.
    let drain = ground.look(&scope);
    assert!(drain.is_done(&scope) && (drain.endpoints, drain.present) == (1, 2), "{drain:?}");
    ground.drain(2, 22);
    assert_eq!(waiting(&ground.look(&scope)), ["n1", "n2", "n3"]);
    ground.endpoints.clear();
    assert!(ground.look(&scope).is_done(&scope), "all are detached");
}
