//! Nodes without a kernel: each its handle on the store, and the view that keeps it current.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use netctl::cluster::view::Using;
use netctl::cluster::{Cluster, ClusterError, Defaults, EndpointRequest, View};
use netctl::model::{
    Attachment, ClusterId, MacAddr, Name, NetworkId, NetworkSpec, Node, NodeId, NodeName, Vni,
};
use netctl::store::{Lease, Store, schema};

/// A node as far as it gives out addresses.
pub struct Member {
    pub cluster: Arc<Cluster>,
    pub view: View,
    pub node: Node,
    #[allow(dead_code, reason = "whoever keeps it alive")]
    pub lease: Lease,
}

impl Member {
    /// Joins the cluster and begins to follow it.
    ///
    /// # Errors
    /// When the store fails meanwhile.
    pub async fn start(store: Arc<dyn Store>, node: &Node, plan: &Plan) -> Result<Self, ClusterError> {
        let fresh = ClusterId::random(&mut rand::rng());
        schema::identify(&*store, None, fresh).await?;
        let cluster = Arc::new(Cluster::new(store, node.name.clone(), plan.rest).await?);
        cluster.join(node).await?;
        let lease = cluster.come_alive(node.id, plan.alive).await?;
        let view = View::start(Arc::clone(&cluster), node.name.clone(), plan.networks.clone());
        Ok(Self { cluster, view, node: node.clone(), lease })
    }

    /// Follows a network, as an attach does.
    pub async fn follow(&self, network: NetworkId) -> Result<Using, String> {
        self.view.use_network(network).await
    }
}

/// How a node is started.
#[derive(Clone)]
pub struct Plan {
    /// How long freed addresses rest.
    pub rest: Duration,
    /// How long its lease is.
    pub alive: Duration,
    /// What it follows from the start.
    pub networks: Vec<NetworkId>,
}

pub fn node(number: usize) -> Node {
    let last = u8::try_from(number + 1).expect("a few nodes");
    Node {
        id: NodeId::random(&mut rand::rng()),
        name: node_name(number),
        underlay: Ipv4Addr::new(192, 0, 2, last).into(),
        vtep_mac: MacAddr::random(&mut rand::rng()),
        tunnel_port: 4789,
        mtu: 1450,
        subnets_in_use: Vec::new(),
        labels: BTreeMap::new(),
        version: String::new(),
        lb: Default::default(),
        lb_reason: String::new(),
        socket_lb: None,
    }
}

pub fn node_name(number: usize) -> NodeName {
    format!("n{number}").parse().expect("it is a name")
}

pub fn name(text: &str) -> Name {
    text.parse().expect("it is a name")
}

pub fn network_spec(name: &str, subnets: &[&str]) -> NetworkSpec {
    serde_json::from_value(serde_json::json!({ "name": name, "subnets": subnets })).expect("it is one")
}

pub fn defaults() -> Defaults {
    let vni = |number| Vni::new(number).expect("a VNI");
    Defaults {
        pools: Vec::new(),
        pool_prefix: 24,
        pools6: Vec::new(),
        pool6_prefix: 64,
        vnis: (vni(4097), vni(8000)),
    }
}

/// A request that leaves everything open.
pub fn request() -> EndpointRequest {
    EndpointRequest::new(Attachment {
        netns: "/run/netns/c1".into(),
        inode: 4_026_532_000,
        boot: "11111111-2222-3333-4444-555555555555".into(),
        interface: "eth0".parse().expect("it is an interface's name"),
    })
}
