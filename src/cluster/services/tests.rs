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
