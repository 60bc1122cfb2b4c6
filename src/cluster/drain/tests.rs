use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::cluster::subnets::tests::defaults;
use crate::cluster::{Claimed, EndpointRequest};
use crate::model::{ClusterId, Network};
use crate::store::embedded::Embedded;
use crate::store::schema;

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
    let drain = ground.look(&one());
    assert_eq!(waiting(&drain), ["n1", "n2"]);
    assert_eq!(drain.dead, [node(3)].into(), "they are named");
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

/// Two nodes that live, and the network `shop` with the service `web`, in a store.
struct Stored {
    n1: Cluster,
    n2: Cluster,
    network: Versioned<Network>,
    _folder: tempfile::TempDir,
}

impl Stored {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
        schema::identify(&*store, None, ClusterId::random(&mut rand::rng())).await.unwrap();
        let mut clusters = Vec::new();
        for number in 1..=2 {
            let (id, name) = (format!("{number:012x}"), node(number));
            let record = json!({
                "id": id, "name": name, "vtep_mac": "02:00:00:00:00:01", "tunnel_port": 4789,
                "mtu": 1450, "underlay": format!("192.0.2.{number}"),
            });
            let cluster = Cluster::new(store.clone(), name, Duration::ZERO).await.unwrap();
            cluster.join(&serde_json::from_value(record).unwrap()).await.unwrap();
            cluster.come_alive(id.parse().unwrap(), Duration::from_secs(600)).await.unwrap();
            clusters.push(cluster);
        }
        let (n2, n1) = (clusters.pop().unwrap(), clusters.pop().unwrap());
        let spec = json!({"name": "shop", "subnets": ["10.9.0.0/24"]});
        let spec = serde_json::from_value(spec).unwrap();
        let network = n1.create_network(&spec, &defaults()).await.unwrap();
        let web = json!({"name": "web", "networks": ["shop"], "replicas": 2});
        let web = serde_json::from_value(web).unwrap();
        n1.create_service(&web, &BTreeSet::new()).await.unwrap();
        Self { n1, n2, network, _folder: folder }
    }

    async fn attach(&self, cluster: &Cluster) -> Endpoint {
        let attachment = json!({"netns": "/n", "inode": 1, "boot": "b", "interface": "eth0"});
        let request = EndpointRequest {
            any_interface: true,
            service: Some("web".parse().unwrap()),
            state: EndpointState::Ready,
            ..EndpointRequest::new(serde_json::from_value(attachment).unwrap())
        };
        let claimed = cluster.claim(&self.network, &request, &BTreeSet::new()).await.unwrap();
        let (Claimed::New(endpoint, _) | Claimed::Existing(endpoint)) = claimed;
        endpoint
    }

    /// Both nodes acknowledge an endpoint with this many connections.
    async fn acknowledge(&self, endpoint: &Endpoint, connections: u64) {
        for cluster in [&self.n1, &self.n2] {
            self.acknowledge_by(cluster, endpoint, self.cause(endpoint).await, connections).await;
        }
    }

    /// By what an endpoint is drained now, if it is.
    async fn cause(&self, endpoint: &Endpoint) -> Cause {
        let marks = self.n1.drained_since().await.unwrap();
        marks.get(&endpoint.node).map_or(Cause::Own, |mark| Cause::Node(mark.0))
    }

    /// A node acknowledges an endpoint; whether that was written.
    async fn acknowledge_by(
        &self,
        cluster: &Cluster,
        endpoint: &Endpoint,
        cause: Cause,
        connections: u64,
    ) -> bool {
        let ack = Ack { revision: u64::MAX, connections };
        cluster.acknowledge(endpoint.network, endpoint.id, cause, ack).await.unwrap()
    }

    async fn acks(&self) -> usize {
        let acks = self.n1.acks(self.network.id).await.unwrap();
        acks.values().map(BTreeMap::len).sum()
    }

    async fn is_done(&self, scope: &Scope) -> bool {
        self.n2.drain_state(scope).await.unwrap().is_done(scope)
    }
}

#[tokio::test]
async fn only_what_is_drained_is_acknowledged_and_only_as_long_as_it_is_there() {
    let ground = Stored::new().await;
    let endpoint = ground.attach(&ground.n1).await;
    let scope = Scope::Endpoint(endpoint.network, endpoint.id);
    ground.acknowledge(&endpoint, 0).await;
    assert_eq!((ground.acks().await, ground.is_done(&scope).await), (0, false));
    ground.n2.drain(&scope).await.unwrap();
    ground.acknowledge(&endpoint, 3).await;
    assert_eq!(ground.n1.drain_state(&scope).await.unwrap().connections, 6);
    ground.acknowledge(&endpoint, 0).await;
    assert_eq!((ground.acks().await, ground.is_done(&scope).await), (2, true));
    ground.n2.withdraw_acks(endpoint.network).await.unwrap();
    assert_eq!((ground.acks().await, ground.is_done(&scope).await), (1, true), "n2 has none here");
    ground.n1.release(&endpoint).await.unwrap();
    ground.acknowledge(&endpoint, 1).await;
    assert_eq!(ground.acks().await, 0);
    let gone = ground.n1.drain(&scope).await;
    assert!(matches!(gone, Err(ClusterError::NoEndpoint(_))), "{gone:?}");
}

#[tokio::test]
async fn endpoints_of_a_drained_node_are_acknowledged_until_it_is_activated() {
    let ground = Stored::new().await;
    let endpoints = [ground.attach(&ground.n1).await, ground.attach(&ground.n2).await];
    let scope = Scope::Node(node(1));
    ground.n2.drain(&scope).await.unwrap();
    assert_eq!(waiting(&ground.n2.drain_state(&scope).await.unwrap()), ["n1", "n2"]);
    for endpoint in &endpoints {
        ground.acknowledge(endpoint, 0).await;
    }
    assert_eq!((ground.acks().await, ground.is_done(&scope).await), (2, true), "only of n1's");
    // The same again needs no new acknowledgement.
    ground.n1.drain(&scope).await.unwrap();
    assert!(ground.is_done(&scope).await);
    ground.n1.set_drained(&node(1), false).await.unwrap();
    ground.acknowledge(&endpoints[0], 5).await;
    let after = ground.n2.drain_state(&scope).await.unwrap();
    assert_eq!((after.marked, after.endpoints, after.connections), (false, 0, 0));
    ground.n1.drain(&scope).await.unwrap();
    assert_eq!(waiting(&ground.n2.drain_state(&scope).await.unwrap()), ["n1", "n2"]);
    let unknown = ground.n1.drain(&Scope::Node(node(9))).await;
    assert!(matches!(unknown, Err(ClusterError::NoNode(_))), "{unknown:?}");
}

#[tokio::test]
async fn who_has_applied_an_earlier_drain_of_a_node_does_not_acknowledge_a_later_one() {
    let ground = Stored::new().await;
    let endpoint = ground.attach(&ground.n1).await;
    let scope = Scope::Node(node(1));
    ground.n1.drain(&scope).await.unwrap();
    let earlier = ground.cause(&endpoint).await;
    ground.n1.set_drained(&node(1), false).await.unwrap();
    assert!(!ground.acknowledge_by(&ground.n2, &endpoint, earlier, 0).await);
    ground.n1.drain(&scope).await.unwrap();
    assert!(!ground.acknowledge_by(&ground.n2, &endpoint, earlier, 0).await);
    assert_eq!(ground.acks().await, 0);
    let present = ground.cause(&endpoint).await;
    assert!(ground.acknowledge_by(&ground.n2, &endpoint, present, 0).await);
    assert_eq!(waiting(&ground.n2.drain_state(&scope).await.unwrap()), ["n1"]);
    // Nor is one acknowledged that was drained by itself and is not any more.
    assert!(!ground.acknowledge_by(&ground.n1, &endpoint, Cause::Own, 0).await);
}

#[tokio::test]
async fn a_change_of_a_service_hinders_who_takes_addresses_only_where_others_are_kept() {
    let ground = Stored::new().await;
    let (cluster, name) = (&ground.n1, "web".parse().unwrap());
    let stamp = async || {
        let keys = [keys::usage(ground.network.id), keys::reservations_guard(ground.network.id)];
        let mut revisions = Vec::new();
        for key in keys {
            revisions.push(cluster.store.get(&key).await.unwrap().map(|entry| entry.modified));
        }
        revisions
    };
    let before = stamp().await;
    let update = |update: serde_json::Value| serde_json::from_value(update).unwrap();
    let changed = cluster.update_service(&name, &update(json!({"scheduler": "lc"}))).await.unwrap();
    assert_eq!(changed.balancing.scheduler, crate::model::Scheduler::Lc);
    cluster.update_service(&name, &update(json!({"replicas": 2}))).await.unwrap();
    assert_eq!(stamp().await, before);
    cluster.update_service(&name, &update(json!({"replicas": 3}))).await.unwrap();
    let after = stamp().await;
    assert!(before.iter().zip(&after).all(|(before, after)| before < after), "{after:?}");
    let key = keys::reservation(ground.network.id, &name);
    let kept = cluster.read::<crate::model::Reservation>(&key).await.unwrap().unwrap();
    assert_eq!(kept.count, 3);
}

#[tokio::test]
async fn a_service_is_drained_on_all_nodes() {
    let ground = Stored::new().await;
    let endpoints = [ground.attach(&ground.n1).await, ground.attach(&ground.n2).await];
    let service = ground.n1.service(&"web".parse().unwrap()).await.unwrap().value;
    let scope = Scope::Service(Box::new(service));
    ground.n1.drain(&scope).await.unwrap();
    for endpoint in &endpoints {
        assert!(!ground.is_done(&scope).await);
        ground.acknowledge(endpoint, 0).await;
    }
    assert!(ground.is_done(&scope).await);
    let states = ground.n1.endpoints(ground.network.id).await.unwrap();
    assert!(states.iter().all(|endpoint| endpoint.state == EndpointState::Draining));
}
