use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::cluster::subnets::tests::defaults;
use crate::cluster::{Claimed, EndpointRequest};
use crate::model::{Attachment, ClusterId, EndpointId};
use crate::store::embedded::Embedded;
use crate::store::{Store, schema};

struct Ground {
    cluster: Arc<Cluster>,
    store: Arc<Embedded>,
    _folder: tempfile::TempDir,
}

impl Ground {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
        schema::identify(&*store, None, ClusterId::random(&mut rand::rng())).await.unwrap();
        let rest = Duration::from_secs(60);
        let cluster = Cluster::new(store.clone(), "n1".parse().unwrap(), rest).await.unwrap();
        Self { cluster: Arc::new(cluster), store, _folder: folder }
    }

    /// Makes a network that hosts reach, or not.
    async fn create(
        &self,
        name: &str,
        subnets: &[&str],
        reached: bool,
    ) -> Result<Versioned<Network>, ClusterError> {
        let spec = json!({"name": name, "subnets": subnets, "host_access": reached});
        self.cluster.create_network(&spec_of(spec), &defaults()).await
    }

    /// Claims an endpoint, for a host or for a container.
    async fn claim(&self, network: &Versioned<Network>, name: &str, host: bool) -> EndpointId {
        let attachment = Attachment {
            netns: "/run/netns/c".into(),
            inode: 1,
            boot: "b".to_owned(),
            interface: "eth0".parse().unwrap(),
        };
        let name = Some(name.parse().unwrap());
        let claim = EndpointRequest { name, host, ..EndpointRequest::new(attachment) };
        match self.cluster.claim(network, &claim, &BTreeSet::new()).await.unwrap() {
            Claimed::New(endpoint, _) => endpoint.id,
            Claimed::Existing(endpoint) => panic!("{endpoint:?}"),
        }
    }

    async fn keys(&self, prefix: &str) -> Vec<String> {
        self.store.list(prefix).await.unwrap().entries.into_keys().collect()
    }
}

fn spec_of(spec: Value) -> NetworkSpec {
    serde_json::from_value(spec).unwrap()
}

#[tokio::test]
async fn networks_that_hosts_reach_do_not_overlap_each_other() {
    let ground = Ground::new().await;
    let shop = ground.create("shop", &["10.9.0.0/24", "fd00:9::/64"], true).await.unwrap();
    assert!(shop.host_access);
    for subnet in ["10.9.0.0/24", "10.0.0.0/8", "10.9.0.128/25", "fd00:9::/96"] {
        let refused = ground.create("other", &["192.0.2.0/24", subnet], true).await.unwrap_err();
        assert!(matches!(refused, ClusterError::HostOverlaps { .. }), "{subnet}: {refused}");
        let text = refused.to_string();
        assert!(text.contains("of network shop") && text.contains(subnet), "{text}");
    }
    ground.create("plain", &["10.9.0.0/24"], false).await.expect("no host reaches it");
    ground.create("other", &["10.8.0.0/24"], true).await.unwrap();
    ground.create("pool", &[], true).await.unwrap();
    let record = serde_json::to_value(&ground.create("last", &[], false).await.unwrap().value).unwrap();
    assert_eq!(record.get("host_access"), None, "an older version reads the same as before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_overlapping_networks_that_hosts_reach_made_at_once_one_is_made() {
    let ground = Ground::new().await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let cluster = ground.cluster.clone();
        let name = format!("net{index}");
        let spec = json!({"name": name, "subnets": ["10.9.0.0/24"], "host_access": true});
        tasks.spawn(async move { cluster.create_network(&spec_of(spec), &defaults()).await.is_ok() });
    }
    assert_eq!(tasks.join_all().await.into_iter().filter(|made| *made).count(), 1);
}

#[tokio::test]
async fn a_network_with_hosts_only_is_removed_with_all_that_is_theirs() {
    let ground = Ground::new().await;
    let shop = ground.create("shop", &["10.9.0.0/24"], true).await.unwrap();
    ground.claim(&shop, "host-n1", true).await;
    let box_ = ground.claim(&shop, "box", false).await;
    let refused = ground.cluster.remove_network("shop").await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("1 endpoint(s), such as box on node n1"), "{text}");
    let endpoints = ground.cluster.endpoints(shop.id).await.unwrap();
    let endpoint = endpoints.iter().find(|endpoint| endpoint.id == box_).unwrap();
    ground.cluster.withdraw(endpoint).await.unwrap();
    assert_eq!(ground.cluster.local_networks().await.unwrap(), [shop.id]);
    ground.cluster.remove_network("shop").await.unwrap();
    assert_eq!(ground.keys(&keys::members(shop.id)).await, [""; 0]);
    assert!(ground.cluster.local_networks().await.unwrap().is_empty(), "no node follows it");
}

#[tokio::test]
async fn hosts_leave_a_subnet_that_goes() {
    let ground = Ground::new().await;
    ground.create("shop", &["10.9.0.0/29", "10.10.0.0/24", "fd00:9::/64"], true).await.unwrap();
    let shop = ground.cluster.network("shop").await.unwrap();
    ground.claim(&shop, "host-n1", true).await;
    let box_ = ground.claim(&shop, "box", false).await;
    let endpoints = ground.cluster.endpoints(shop.id).await.unwrap();
    let of = |id: EndpointId| endpoints.iter().find(|endpoint| endpoint.id == id).unwrap();
    let first = "10.9.0.0/29".parse().unwrap();
    let refused = ground.cluster.shrink_network("shop", first).await.unwrap_err().to_string();
    assert!(refused.contains("1 address(es)") && refused.contains("of box on node n1"), "{refused}");
    assert_eq!(ground.cluster.endpoints(shop.id).await.unwrap().len(), 2, "nobody was moved");
    ground.cluster.withdraw(of(box_)).await.unwrap();
    let host = endpoints.iter().find(|endpoint| endpoint.host).unwrap();
    let shrunk = ground.cluster.shrink_network("shop", first).await.unwrap();
    assert_eq!((shrunk.subnets.len(), shrunk.leaving.len()), (2, 0));
    assert!(ground.cluster.endpoints(shop.id).await.unwrap().is_empty());
    assert!(ground.cluster.local_networks().await.unwrap().is_empty());
    // Others may have routes to the one that stays of the network.
    let rests = keys::address(shop.id, host.addresses[1]);
    assert_eq!(ground.keys(&keys::addresses(shop.id)).await, [rests]);
}
