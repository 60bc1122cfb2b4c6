use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::cluster::endpoints::lock;
use crate::cluster::subnets::tests::defaults;
use crate::cluster::{Claimed, EndpointRequest};
use crate::ipam::Block;
use crate::model::{Attachment, ClusterId, Endpoint, NetworkSpec};
use crate::store::embedded::Embedded;
use crate::store::schema;

/// A store with the network `web`, of one subnet.
async fn cluster(folder: &tempfile::TempDir, cidr: &str) -> (Cluster, Versioned<Network>) {
    let store = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
    schema::identify(&*store, None, ClusterId::random(&mut rand::rng())).await.unwrap();
    let cluster = Cluster::new(store, "n1".parse().unwrap(), Duration::from_secs(60)).await.unwrap();
    let spec: NetworkSpec = serde_json::from_value(json!({"name": "web", "subnets": [cidr]})).unwrap();
    cluster.create_network(&spec, &defaults()).await.unwrap();
    let network = cluster.network("web").await.unwrap();
    (cluster, network)
}

fn service(name: &str, reservation: Option<&str>) -> ServiceSpec {
    serde_json::from_value(json!({
        "name": name, "networks": ["web"], "replicas": 2, "reservation": reservation,
    }))
    .unwrap()
}

fn container(number: u64, service: Option<&str>) -> EndpointRequest {
    let mut request = EndpointRequest::new(Attachment {
        netns: format!("/run/netns/c{number}").into(),
        inode: number,
        boot: "b".into(),
        interface: "eth0".parse().unwrap(),
    });
    request.service = service.map(|name| name.parse().unwrap());
    request
}

#[tokio::test]
async fn a_service_takes_over_what_is_kept_under_its_own_name() {
    let folder = tempfile::tempdir().unwrap();
    // Five usable addresses.
    let (cluster, network) = cluster(&folder, "10.9.0.0/29").await;
    let alive = BTreeSet::new();
    let wanted = BTreeMap::from([("web".to_owned(), 5)]);
    cluster.reserve(&"shop".parse().unwrap(), &wanted, Duration::from_secs(60)).await.unwrap();
    let refused = cluster.create_service(&service("shop", None), &alive).await.unwrap_err();
    assert!(matches!(refused, ClusterError::NameReserved { .. }), "{refused}");
    assert!(refused.to_string().contains("--reservation shop"), "{refused}");
    cluster.create_service(&service("shop", Some("shop")), &alive).await.unwrap();
    // Of five it needs three: its own address and two containers' are kept, the others are free.
    for number in 0..2 {
        cluster.claim(&network, &container(number, None), &alive).await.unwrap();
    }
    let refused = cluster.claim(&network, &container(2, None), &alive).await.unwrap_err();
    assert!(matches!(refused, ClusterError::Exhausted { .. }), "{refused}");
    for number in 3..5 {
        cluster.claim(&network, &container(number, Some("shop")), &alive).await.unwrap();
    }
}

#[tokio::test]
async fn targets_outside_go_with_the_networks_of_their_service() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, _) = cluster(&folder, "10.9.0.0/24").await;
    let (alive, name): (_, Name) = (BTreeSet::new(), "db".parse().unwrap());
    let inner = json!({"name": "inner", "subnets": ["10.8.0.0/24"], "internal": true});
    cluster.create_network(&serde_json::from_value(inner).unwrap(), &defaults()).await.unwrap();
    let spec = |networks: &[&str], target: &str| -> ServiceSpec {
        let external: crate::model::External = target.parse().unwrap();
        serde_json::from_value(json!({
            "name": "db", "networks": networks, "replicas": 0, "external": [external],
        }))
        .unwrap()
    };
    let update = |target: &str| -> ServiceUpdate {
        ServiceUpdate { external: vec![target.parse().unwrap()], ..ServiceUpdate::default() }
    };
    for (networks, target, words) in [
        (&["web"][..], "10.9.0.5:5432", "within subnet 10.9.0.0/24 of network web"),
        (&["web"], "2001:db8::10", "none of the service's networks has IPv6: give its IPv4 address"),
        (&["inner"], "192.0.2.10", "network inner, which is internal"),
        (&["web", "inner"], "192.0.2.10", "network inner, which is internal"),
        (&["web"], "127.0.0.1", "loopback"),
    ] {
        let refused = cluster.create_service(&spec(networks, target), &alive).await.unwrap_err();
        assert!(refused.to_string().contains(words), "{target}: {refused}");
    }
    let made = cluster.create_service(&spec(&["web"], "192.0.2.10:5432"), &alive).await.unwrap();
    assert_eq!(made.balancing.ports, ["5432".parse().unwrap()]);
    for (target, words) in
        [("10.9.0.5", "within subnet 10.9.0.0/24"), ("2001:db8::10", "has IPv6"), ("::1", "loopback")]
    {
        let refused = cluster.update_service(&name, &update(target)).await.unwrap_err();
        assert!(refused.to_string().contains(words), "{target}: {refused}");
    }
    assert_eq!(cluster.service(&name).await.unwrap().value, made, "nothing was changed");
    let changed = cluster.update_service(&name, &update("198.51.100.7")).await.unwrap();
    assert_eq!(changed.external.len(), 2);
    // What is outside stays outside.
    let more = |cidr: &str| serde_json::from_value(json!({"subnets": [cidr]})).unwrap();
    let refused = cluster.expand_network("web", &more("198.51.100.0/24")).await.unwrap_err();
    assert!(refused.to_string().contains("the external target 198.51.100.7 of service db"), "{refused}");
    cluster.expand_network("web", &more("10.7.0.0/24")).await.unwrap();
    let gone = ServiceUpdate { remove_external: changed.external, ..ServiceUpdate::default() };
    cluster.update_service(&name, &gone).await.unwrap();
    cluster.expand_network("web", &more("198.51.100.0/24")).await.unwrap();
}

#[tokio::test]
async fn a_subnet_and_a_target_within_it_do_not_come_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, network) = cluster(&folder, "10.9.0.0/24").await;
    let guard = async || cluster.store.get(keys::GUARD).await.unwrap().map(|entry| entry.modified);
    let before = guard().await;
    let spec: ServiceSpec = serde_json::from_value(json!({
        "name": "db", "networks": ["web"], "replicas": 0, "external": [{"address": "192.0.2.10"}],
    }))
    .unwrap();
    let made = cluster.create_service(&spec, &BTreeSet::new()).await.unwrap();
    let after = guard().await;
    assert_ne!(before, after, "who adds a subnet compares it");
    let mut more = made.clone();
    more.external.push("192.0.2.11".parse().unwrap());
    let adding = cluster.adding_external(Transaction::new(), &made, &more).await.unwrap();
    // Meanwhile the network gets a subnet.
    let subnet = serde_json::from_value(json!({"subnets": ["192.0.2.0/26"]})).unwrap();
    let refused = cluster.expand_network("web", &subnet).await.unwrap_err();
    assert!(matches!(refused, ClusterError::SubnetOverlaps { .. }), "{refused}");
    let subnet = serde_json::from_value(json!({"subnets": ["10.7.0.0/24"]})).unwrap();
    cluster.expand_network("web", &subnet).await.unwrap();
    assert_eq!(cluster.commit(adding).await.unwrap(), Outcome::Conflict);
    let removing = cluster.adding_external(Transaction::new(), &more, &made).await.unwrap();
    assert_eq!(removing, Transaction::new(), "what only goes needs nothing");
    assert!(cluster.network("web").await.unwrap().revision > network.revision);
}

#[tokio::test]
async fn what_is_withdrawn_is_free_at_once_in_own_blocks_only() {
    let folder = tempfile::tempdir().unwrap();
    // 125 usable addresses.
    let (cluster, network) = cluster(&folder, "10.9.0.0/25").await;
    let alive = BTreeSet::from(["n1", "n2"].map(|name| name.parse().unwrap()));
    let claim = async |cluster: &Cluster, number| {
        let claimed = cluster.claim(&network, &container(number, None), &alive).await.unwrap();
        let Claimed::New(endpoint, _) = claimed else { panic!("it is new") };
        endpoint
    };
    let rests = async |endpoint: &Endpoint| {
        let entry = cluster.store.get(&keys::address(network.id, endpoint.addresses[0])).await.unwrap();
        entry.is_some_and(|entry| entry.value.is_empty())
    };
    let (own, second) = (claim(&cluster, 1).await, claim(&cluster, 2).await);
    for number in 3..125 {
        claim(&cluster, number).await;
    }
    let rest = Duration::from_secs(60);
    let other = Cluster::new(cluster.store.clone(), "n2".parse().unwrap(), rest).await.unwrap();
    let borrowed = claim(&other, 125).await;
    let blocks = lock(&other.ledger(network.id)).own_blocks_of(&borrowed.addresses);
    assert_eq!(blocks, BTreeMap::new(), "all blocks are the first's");
    other.withdraw(&borrowed).await.unwrap();
    assert!(rests(&borrowed).await, "others may have a route to it");
    // The first takes the block over while the other still thinks that it has it.
    let (_, block) =
        lock(&cluster.ledger(network.id)).own_blocks_of(&own.addresses).pop_first().unwrap();
    let before = Block { node: other.node.clone(), revision: block.revision - 1 };
    lock(&other.ledger(network.id)).own(block.range, before);
    other.withdraw(&own).await.unwrap();
    assert!(rests(&own).await, "it is in a block of another node by now");
    cluster.withdraw(&second).await.unwrap();
    assert!(!rests(&second).await, "nobody has met it");
}
