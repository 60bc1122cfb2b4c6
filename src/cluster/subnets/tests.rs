use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

use super::*;
use crate::cluster::{Claimed, Defaults, EndpointRequest};
use crate::model::{Attachment, ClusterId, NetworkSpec, Vni};
use crate::store::embedded::Embedded;
use crate::store::{Lease, Listing, Store, StoreError, Watch, schema};

pub(in crate::cluster) fn defaults() -> Defaults {
    Defaults {
        pools: vec!["10.200.0.0/22".parse().unwrap()],
        pool_prefix: 24,
        pools6: Vec::new(),
        pool6_prefix: 64,
        vnis: (Vni::new(4097).unwrap(), Vni::new(4200).unwrap()),
    }
}

type Hook = Box<dyn FnOnce() -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A store in which something else happens just behind a step of ours.
struct Interposed {
    inner: Arc<Embedded>,
    /// What happens after the next list of addresses.
    after_list: Mutex<Option<Hook>>,
    /// What happens after the next list of nodes.
    after_nodes: Mutex<Option<Hook>>,
    /// What happens after the next transaction.
    after_commit: Mutex<Option<Hook>>,
}

async fn happen(hook: &Mutex<Option<Hook>>) {
    let hook = hook.lock().unwrap().take();
    if let Some(hook) = hook {
        hook().await;
    }
}

#[async_trait]
impl Store for Interposed {
    fn name(&self) -> String {
        self.inner.name()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let listing = self.inner.list(prefix).await;
        if prefix.contains("/addresses/") {
            happen(&self.after_list).await;
        }
        if prefix == keys::NODES {
            happen(&self.after_nodes).await;
        }
        listing
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        let outcome = self.inner.commit(transaction).await;
        happen(&self.after_commit).await;
        outcome
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        self.inner.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }
}

/// Two nodes on one store; things can happen to the first in the middle of what it does.
struct Ground {
    first: Cluster,
    store: Arc<Interposed>,
    second: Arc<Cluster>,
    _folder: tempfile::TempDir,
}

impl Ground {
    async fn new(rest: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let inner = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
        schema::identify(&*inner, None, ClusterId::random(&mut rand::rng())).await.unwrap();
        let store = Arc::new(Interposed {
            inner: inner.clone(),
            after_list: Mutex::default(),
            after_nodes: Mutex::default(),
            after_commit: Mutex::default(),
        });
        let first = Cluster::new(store.clone(), "n1".parse().unwrap(), rest).await.unwrap();
        let second = Cluster::new(inner, "n2".parse().unwrap(), rest).await.unwrap();
        Self { first, store, second: Arc::new(second), _folder: folder }
    }

    async fn create(&self, name: &str, subnets: &[&str]) -> Versioned<Network> {
        let spec = json!({"name": name, "subnets": subnets});
        let spec: NetworkSpec = serde_json::from_value(spec).unwrap();
        self.second.create_network(&spec, &defaults()).await.unwrap()
    }

    async fn expand(&self, name: &str, subnets: &[&str]) -> Result<Expanded, ClusterError> {
        self.first.expand_network(name, &expansion(json!({"subnets": subnets}))).await
    }

    async fn shrink(&self, name: &str, subnet: &str) -> Result<Versioned<Network>, ClusterError> {
        self.first.shrink_network(name, subnet.parse().unwrap()).await
    }

    /// The subnets of a network: those given from, and those being removed.
    async fn subnets(&self, name: &str) -> (Vec<String>, usize) {
        let network = self.second.network(name).await.unwrap();
        let cidrs = network.subnets.iter().map(|subnet| subnet.cidr().to_string()).collect();
        (cidrs, network.leaving.len())
    }
}

fn expansion(json: serde_json::Value) -> ExpandSpec {
    serde_json::from_value(json).unwrap()
}

/// Claims an endpoint with this address; empty: with any.
async fn claim(
    cluster: &Cluster,
    network: &Versioned<Network>,
    address: &str,
) -> Result<Endpoint, ClusterError> {
    let claim = EndpointRequest {
        addresses: address.parse().into_iter().collect(),
        any_interface: true,
        ..EndpointRequest::new(Attachment {
            netns: "/run/netns/c".into(),
            inode: 1,
            boot: "b".to_owned(),
            interface: "eth0".parse().unwrap(),
        })
    };
    let claimed = cluster.claim(network, &claim, &BTreeSet::new()).await?;
    let (Claimed::New(endpoint, _) | Claimed::Existing(endpoint)) = claimed;
    Ok(endpoint)
}

fn node(json: serde_json::Value) -> Node {
    let mut node = json!({
        "id": "000000000001", "name": "n1", "vtep_mac": "02:00:00:00:00:01", "tunnel_port": 4789,
        "mtu": 1450,
    });
    node.as_object_mut().unwrap().extend(json.as_object().unwrap().clone());
    serde_json::from_value(node).unwrap()
}

#[tokio::test]
async fn the_same_expansion_again_changes_nothing_and_another_is_refused() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/29"]).await;
    let more = expansion(json!({"subnets": ["10.10.0.0/24"], "gateways": ["10.10.0.254"]}));
    let Expanded::Changed(expanded) = ground.first.expand_network("web", &more).await.unwrap() else {
        panic!("nothing was changed")
    };
    assert_eq!(expanded.subnets[1].gateway().to_string(), "10.10.0.254");
    // Blocks would be smaller now.
    for number in 2..50 {
        let joined = json!({
            "id": format!("{number:012}"), "name": format!("n{number}"),
            "underlay": format!("192.0.2.{number}"),
        });
        ground.second.join(&node(joined)).await.unwrap();
    }
    let again = ground.first.expand_network(&expanded.id.to_string(), &more).await.unwrap();
    assert_eq!(again, Expanded::Unchanged(expanded.clone()));
    let error = ground.expand("web", &["10.10.0.0/24"]).await.unwrap_err();
    assert!(matches!(error, ClusterError::SubnetExists { .. }), "{error}");
    assert!(error.to_string().contains("gateway 10.10.0.254"), "{error}");
    assert_eq!(ground.second.network("web").await.unwrap(), expanded);
}

#[tokio::test]
async fn what_a_subnet_overlaps_is_named() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/24"]).await;
    ground.create("shop", &["10.7.0.0/16", "fd00:7::/64"]).await;
    let n1 = node(json!({"underlay": "10.5.0.1", "subnets_in_use": ["172.16.0.0/24"]}));
    ground.second.join(&n1).await.unwrap();
    for (subnet, words) in [
        ("10.9.0.0/25", vec!["web", "its own subnet 10.9.0.0/24"]),
        ("10.0.0.0/8", vec!["its own subnet"]),
        ("10.7.1.0/24", vec!["subnet 10.7.0.0/16 of network shop"]),
        ("10.5.0.0/24", vec!["underlay address 10.5.0.1 of node n1"]),
        ("172.16.0.0/16", vec!["172.16.0.0/24", "in use on node n1"]),
        ("169.254.65.0/24", vec!["used by uplinks"]),
        ("fd00:8::/64", vec!["web", "has no IPv6"]),
    ] {
        let error = ground.expand("web", &["192.0.2.0/24", subnet]).await.unwrap_err().to_string();
        assert!(error.contains(subnet), "{subnet}: {error}");
        for word in words {
            assert!(error.contains(word), "{subnet}: {word}: {error}");
        }
        assert_eq!(ground.subnets("web").await.0, ["10.9.0.0/24"]);
    }
    let uplinks6 = ground.expand("shop", &["fd6e:6574:6374:6c00::/80"]).await.unwrap_err();
    assert!(uplinks6.to_string().contains("used by uplinks"), "{uplinks6}");
    assert!(matches!(ground.expand("no", &["10.1.0.0/24"]).await, Err(ClusterError::NoNetwork(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_expansions_at_once_by_one_range_one_is_made() {
    let ground = Ground::new(Duration::ZERO).await;
    for index in 0..8 {
        ground.create(&format!("net{index}"), &[&format!("10.9.{index}.0/24")]).await;
    }
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let (cluster, name) = (ground.second.clone(), format!("net{index}"));
        // The default pool gives out the same range meanwhile.
        let spec = json!({"name": format!("pool{index}")});
        let spec: NetworkSpec = serde_json::from_value(spec).unwrap();
        tasks.spawn(async move {
            let more = expansion(json!({"subnets": ["10.200.0.0/22"]}));
            let expanded = cluster.expand_network(&name, &more).await.is_ok();
            expanded || cluster.create_network(&spec, &defaults()).await.is_err()
        });
    }
    tasks.join_all().await;
    let networks = ground.second.networks().await.unwrap();
    let ranges: Vec<IpNetwork> =
        networks.iter().flat_map(|network| network.subnets.iter().map(Subnet::cidr)).collect();
    let mut pairs = ranges.iter().enumerate().flat_map(|(i, a)| {
        ranges[i + 1..].iter().filter(move |b| subnet::overlap(*a, **b)).map(move |b| (*a, *b))
    });
    assert_eq!(pairs.next(), None);
    assert_eq!(ranges.iter().filter(|range| range.prefix() == 22).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expansions_of_one_network_at_once_are_all_made() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/24"]).await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 1..=8 {
        let cluster = ground.second.clone();
        tasks.spawn(async move {
            let more = expansion(json!({"subnets": [format!("10.9.{index}.0/24")]}));
            cluster.expand_network("web", &more).await.unwrap();
        });
    }
    tasks.join_all().await;
    let (subnets, _) = ground.subnets("web").await;
    assert_eq!(subnets.iter().collect::<BTreeSet<_>>().len(), 9, "{subnets:?}");
}

#[tokio::test]
async fn a_subnet_is_removed_when_none_of_its_addresses_is_taken() {
    let ground = Ground::new(Duration::from_secs(60)).await;
    ground.create("web", &["10.9.0.0/29"]).await;
    ground.expand("web", &["10.10.0.0/24"]).await.unwrap();
    let network = ground.second.network("web").await.unwrap();
    let endpoint = claim(&ground.second, &network, "10.10.0.5").await.unwrap();
    let error = ground.shrink("web", "10.10.0.0/24").await.unwrap_err().to_string();
    let example = format!("10.10.0.5 of {} on node n2", endpoint.name);
    assert!(error.contains("1 address(es) of endpoints") && error.contains(&example), "{error}");
    ground.second.release(&endpoint).await.unwrap();
    let error = ground.shrink("web", "10.10.0.0/24").await.unwrap_err().to_string();
    assert!(error.contains("1 resting after use, such as 10.10.0.5"), "{error}");
    let key = keys::address(network.id, "10.10.0.5".parse().unwrap());
    ground.second.store().commit(Transaction::new().delete(key)).await.unwrap();
    ground.shrink("web", "10.10.0.0/24").await.unwrap();
    assert_eq!(ground.subnets("web").await, (vec!["10.9.0.0/29".to_owned()], 0));
    let gone = ground.shrink("web", "10.10.0.0/24").await.unwrap_err();
    assert!(matches!(gone, ClusterError::NoSubnet { .. }), "{gone}");
    let last = ground.shrink("web", "10.9.0.0/29").await.unwrap_err();
    assert!(matches!(last, ClusterError::LastSubnet { .. }), "{last}");
}

#[tokio::test]
async fn the_blocks_of_a_removed_subnet_are_gone_and_the_others_stay() {
    let ground = Ground::new(Duration::ZERO).await;
    let network = ground.create("web", &["10.9.0.0/30"]).await;
    claim(&ground.second, &network, "").await.unwrap();
    ground.expand("web", &["10.10.0.0/24"]).await.unwrap();
    let network = ground.second.network("web").await.unwrap();
    let endpoint = claim(&ground.second, &network, "").await.unwrap();
    assert!(endpoint.addresses[0].to_string().starts_with("10.10.0."), "{endpoint:?}");
    ground.second.release(&endpoint).await.unwrap();
    let blocks = async || {
        let listing = ground.second.store().list(&keys::blocks(network.id)).await.unwrap();
        let (removed, others): (Vec<_>, Vec<_>) =
            listing.entries.into_keys().partition(|key| key.contains("/10.10.0."));
        (removed.len(), others.len())
    };
    assert_eq!(blocks().await, (1, 1));
    ground.shrink("web", "10.10.0.0/24").await.unwrap();
    assert_eq!(blocks().await, (0, 1));
    // The node that had one goes on.
    ground.expand("web", &["10.10.0.0/24"]).await.unwrap();
    let network = ground.second.network("web").await.unwrap();
    claim(&ground.second, &network, "").await.unwrap();
}

#[tokio::test]
async fn an_attach_between_looking_and_removing_keeps_the_subnet() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/24", "10.10.0.0/24"]).await;
    let (cluster, network) = (ground.second.clone(), ground.second.network("web").await.unwrap());
    *ground.store.after_list.lock().unwrap() = Some(Box::new(move || {
        Box::pin(async move { drop(claim(&cluster, &network, "10.10.0.5").await.unwrap()) })
    }));
    let error = ground.shrink("web", "10.10.0.0/24").await.unwrap_err();
    assert!(matches!(error, ClusterError::SubnetInUse { endpoints: 1, .. }), "{error}");
    assert!(ground.store.after_list.lock().unwrap().is_none());
    let both = vec!["10.9.0.0/24".to_owned(), "10.10.0.0/24".to_owned()];
    assert_eq!(ground.subnets("web").await, (both, 0));
}

#[tokio::test]
async fn an_attach_by_what_was_known_before_does_not_get_an_address_of_a_removed_subnet() {
    let ground = Ground::new(Duration::ZERO).await;
    let before = ground.create("web", &["10.9.0.0/24", "10.10.0.0/24"]).await;
    let (cluster, known) = (ground.second.clone(), before.clone());
    *ground.store.after_commit.lock().unwrap() = Some(Box::new(move || {
        Box::pin(async move {
            let refused = claim(&cluster, &known, "10.10.0.5").await.unwrap_err();
            assert!(matches!(refused, ClusterError::Address { .. }), "{refused}");
        })
    }));
    ground.shrink("web", "10.10.0.0/24").await.unwrap();
    assert!(ground.store.after_commit.lock().unwrap().is_none());
    let refused = claim(&ground.second, &before, "10.10.0.5").await.unwrap_err();
    assert!(matches!(refused, ClusterError::Address { .. }), "{refused}");
    assert_eq!(ground.second.endpoint_count(before.id).await.unwrap(), 0);
}

#[tokio::test]
async fn an_expansion_does_not_bring_back_a_network_that_is_removed_meanwhile() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/24"]).await;
    let cluster = ground.second.clone();
    *ground.store.after_nodes.lock().unwrap() = Some(Box::new(move || {
        Box::pin(async move { assert!(cluster.remove_network("web").await.is_ok()) })
    }));
    let error = ground.expand("web", &["10.10.0.0/24"]).await.unwrap_err();
    assert!(matches!(error, ClusterError::NoNetwork(_)), "{error}");
    assert_eq!(ground.second.networks().await.unwrap(), []);
}

#[tokio::test]
async fn a_removal_and_an_expansion_at_once_do_not_undo_each_other() {
    let ground = Ground::new(Duration::ZERO).await;
    ground.create("web", &["10.9.0.0/24", "10.10.0.0/24"]).await;
    for (hook, subnet) in
        [(&ground.store.after_list, "10.11.0.0/24"), (&ground.store.after_commit, "10.12.0.0/24")]
    {
        ground.expand("web", &["10.10.0.0/24"]).await.unwrap();
        let cluster = ground.second.clone();
        *hook.lock().unwrap() = Some(Box::new(move || {
            let more = expansion(json!({"subnets": [subnet]}));
            Box::pin(async move { drop(cluster.expand_network("web", &more).await.unwrap()) })
        }));
        ground.shrink("web", "10.10.0.0/24").await.unwrap();
        let (subnets, leaving) = ground.subnets("web").await;
        assert!(subnets.contains(&subnet.to_owned()) && leaving == 0, "{subnets:?}");
        assert!(!subnets.contains(&"10.10.0.0/24".to_owned()), "{subnets:?}");
    }
}

#[tokio::test]
async fn a_removal_that_was_interrupted_goes_on_or_is_taken_back() {
    let ground = Ground::new(Duration::ZERO).await;
    let network = ground.create("web", &["10.9.0.0/24", "10.10.0.0/24"]).await;
    let cidr = "10.10.0.0/24".parse().unwrap();
    let interrupt = async || {
        let network = ground.second.network("web").await.unwrap();
        let revision = Revision(network.revision);
        ground.second.rewrite(&leaving(&network, cidr), revision).await.unwrap().unwrap();
        assert_eq!(ground.subnets("web").await, (vec!["10.9.0.0/24".to_owned()], 1));
    };
    interrupt().await;
    let shop = ground.create("shop", &["10.7.0.0/24"]).await;
    let error = ground.expand(shop.name.as_str(), &["10.10.0.0/25"]).await.unwrap_err();
    assert!(matches!(error, ClusterError::SubnetOverlaps { .. }), "it stands still: {error}");
    ground.expand("web", &["10.10.0.0/24"]).await.unwrap();
    assert_eq!(ground.subnets("web").await.1, 0);
    let now = ground.second.network("web").await.unwrap();
    let endpoint = claim(&ground.second, &now, "10.10.0.5").await.unwrap();
    interrupt().await;
    let error = ground.shrink("web", "10.10.0.0/24").await.unwrap_err();
    assert!(matches!(error, ClusterError::SubnetInUse { .. }), "{error}");
    assert_eq!(ground.subnets("web").await.1, 0);
    ground.second.release(&endpoint).await.unwrap();
    interrupt().await;
    ground.shrink("web", "10.10.0.0/24").await.unwrap();
    assert_eq!(ground.subnets("web").await, (vec!["10.9.0.0/24".to_owned()], 0));
    assert_eq!(ground.second.network("web").await.unwrap().id, network.id);
}
