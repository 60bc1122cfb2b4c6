//! The agent's HTTP API on a unix socket: types, server and client.
//!
//! JSON, version in the path, errors with a stable code. The handlers know the agent only through
//! [`Service`].

pub mod client;
mod monitor;
mod names;
pub mod server;
mod services;
mod settings;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Receiver;
use utoipa::ToSchema;

use crate::model::{
    Endpoint, EndpointId, ExpandSpec, Finding, IfName, MacAddr, Name, Network, NetworkSpec, Node,
    NodeName, ServiceSpec, ServiceUpdate,
};
use ipnetwork::IpNetwork;

pub use monitor::{Carrier, MonitorQuery, Party, Point, SAMPLE, Seen, Sighting, SightingKind};
pub use names::{NameQuery, NameSource, NameView, RecordView};
pub use services::{BackendView, Connections, ExternalView, ServiceView, TimeoutsView};
pub use settings::{SettingsView, percent};

/// What went wrong, for programs: stable over versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request cannot be used as it is (400).
    Invalid,
    /// There is no such thing (404).
    NotFound,
    /// Something else has that name, VNI, subnet, address or interface (409).
    Conflict,
    /// It is in use and therefore not removed (409).
    InUse,
    /// No address is left (409).
    Exhausted,
    /// The kernel lacks what is needed (501).
    Unsupported,
    /// The store cannot be reached; try again (503).
    Unavailable,
    /// The store is not the one this node belonged to (503).
    StoreReplaced,
    /// The network was not ready on this node in time; try again (504).
    Timeout,
    /// A failure of the agent or the kernel; the log has more (500).
    Internal,
}

impl ErrorCode {
    /// The HTTP status of an answer with this code.
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict | Self::InUse | Self::Exhausted => 409,
            Self::Unsupported => 501,
            Self::Unavailable | Self::StoreReplaced => 503,
            Self::Timeout => 504,
            Self::Internal => 500,
        }
    }
}

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize, ToSchema)]
#[error("{message}")]
pub struct ApiError {
    /// What went wrong, for programs.
    pub code: ErrorCode,
    /// What failed, on what, and what to do; for people.
    pub message: String,
}

impl ApiError {
    /// An error with this code and message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// A network as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// The network itself.
    #[serde(flatten)]
    pub network: Network,
    /// How many endpoints it has in the cluster.
    pub endpoints: usize,
    /// How its IPv4 addresses are used, where it has any; unknown while the store is away.
    pub ipv4: Option<Usage>,
    /// How its IPv6 addresses are used.
    pub ipv6: Option<Usage>,
    /// How each subnet's addresses are used, in the order of `subnets`; empty while the store is away.
    #[serde(default)]
    pub subnet_usage: Vec<SubnetUsage>,
    /// What each node that uses the network has of it, by name; empty while the store is away.
    #[serde(default)]
    pub node_usage: Vec<NodeUsage>,
    /// The MTU of its containers' interfaces on this node.
    pub effective_mtu: u32,
    /// Why the host of this node does not reach it, although the network is for that; `null`: it does,
    /// or is about to.
    #[serde(default)]
    pub host_obstacle: Option<String>,
    /// The store's revision that wrote it last.
    pub revision: u64,
}

/// An endpoint as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndpointView {
    /// The endpoint itself.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// The name of its network.
    pub network_name: Name,
    /// The gateways of its addresses, in the same order.
    #[schema(value_type = Vec<String>)]
    pub gateways: Vec<IpAddr>,
    /// The prefix lengths of its addresses' subnets, in the same order.
    pub prefix_lengths: Vec<u8>,
    /// The MTU of its interface (known on its own node).
    pub mtu: u32,
    /// How its container asks for names.
    #[serde(default)]
    pub resolver: ResolverView,
    /// Why it gets no new connections of its service, wherever they come from; `null`: it gets them,
    /// or has no service.
    #[serde(default)]
    pub out: Option<String>,
}

/// How a container asks for names: what stands in its resolv.conf(5).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResolverView {
    /// Whom it asks.
    #[schema(value_type = Vec<String>)]
    pub servers: Vec<IpAddr>,
    /// What is added to names that are not found by themselves.
    pub search: Vec<String>,
    /// Options for the resolver.
    pub options: Vec<String>,
}

/// A node as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    /// The node itself.
    #[serde(flatten)]
    pub node: Node,
    /// Whether its lease is alive.
    pub alive: bool,
    /// Whether it is drained: its endpoints get no new connections of services.
    #[serde(default)]
    pub drained: bool,
    /// Whether it is the node that answers.
    pub this: bool,
}

/// The agent's version and state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionView {
    /// The agent's version.
    pub version: String,
    /// The version of this API.
    pub api: String,
    /// The node's name.
    pub node: NodeName,
    /// The store, as people know it.
    pub store: String,
    /// The running kernel's release.
    pub kernel: String,
}

/// A request to plug a namespace into a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The network, by name or id.
    pub network: String,
    /// The endpoint's name; by default its id.
    #[serde(default)]
    pub name: Option<Name>,
    /// Other names by which its network finds it; others may have them too.
    #[serde(default)]
    pub aliases: Vec<Name>,
    /// The path of the network namespace.
    #[schema(value_type = String)]
    pub netns: PathBuf,
    /// The interface's name in the container; by default the first free of `eth0`, `eth1`, …
    #[serde(default)]
    pub interface: Option<IfName>,
    /// Addresses to take, at most one of each family; others are chosen.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// The Ethernet address; by default a random one.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// The service that it belongs to: it gets one of the addresses that are kept for that.
    #[serde(default)]
    pub service: Option<Name>,
    /// Its share of the service's connections, from 1, for schedulers with weights; by default 1.
    #[serde(default)]
    #[schema(value_type = Option<u16>, minimum = 1)]
    pub weight: Option<NonZeroU16>,
    /// Free text by key.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long to wait for the network to be there and ready on this node, in milliseconds; by
    /// default 10 seconds.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// How far a drain is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainView {
    /// Whether nothing is left to wait for.
    pub done: bool,
    /// How many endpoints are drained.
    pub endpoints: u64,
    /// The nodes that may still give one of them a new connection.
    pub waiting: Vec<NodeName>,
    /// The nodes with endpoints on their networks that are not asked, because their lease has ended.
    #[serde(default)]
    pub dead: Vec<NodeName>,
    /// How many connections to them are still open.
    pub connections: u64,
}

/// A new number of a service's containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// How many.
    pub replicas: u32,
}

/// A request to keep addresses for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReserveRequest {
    /// Under which name.
    pub name: Name,
    /// How many addresses of each network, by name or id.
    pub networks: BTreeMap<String, u64>,
    /// For how long, in seconds.
    pub ttl_s: u64,
}

/// How the addresses of one family of a network are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Addresses that may be given out. Numbers beyond 64 bits are shown as the largest.
    pub usable: u64,
    /// Those that endpoints have.
    pub endpoints: u64,
    /// Those that services have as their own.
    pub services: u64,
    /// Those that were freed a short while ago.
    pub resting: u64,
    /// Those that are kept for services' containers, and by reservations.
    pub reserved: u64,
    /// What is left.
    pub free: u64,
    /// How full that is, by the configuration of the agent that answers.
    #[serde(default)]
    pub level: Level,
    /// In how many seconds nothing will be left if it goes on as in the last hour; unknown where it
    /// did not grow, and on a node that has not seen it grow.
    #[serde(default)]
    pub full_in: Option<u64>,
}

/// How full a network is.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Enough is left.
    #[default]
    Fine,
    /// It runs full (`address_warning`), or does within a day by steady growth.
    Warning,
    /// It is about to be full (`address_alarm`), or is within an hour by steady growth.
    Alarm,
}

/// How the addresses of one subnet are used. Numbers beyond 64 bits are shown as the largest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubnetUsage {
    /// The subnet.
    #[schema(value_type = String)]
    pub cidr: IpNetwork,
    /// Addresses that may be given out.
    pub usable: u64,
    /// Those that endpoints have.
    pub endpoints: u64,
    /// Those that services have as their own.
    pub services: u64,
    /// Those that were freed a short while ago.
    pub resting: u64,
    /// Those that nobody has. What is kept for services is among them: it is kept of the network,
    /// not of a subnet.
    pub free: u64,
    /// Addresses that are not usable because the network's owner reserved them.
    pub excluded: u64,
}

/// What a node has of a network's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeUsage {
    /// The node.
    pub node: NodeName,
    /// What it has of IPv4, where the network has any.
    pub ipv4: Option<Share>,
    /// What it has of IPv6.
    pub ipv6: Option<Share>,
}

/// A node's part of a network's addresses of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Share {
    /// Blocks of addresses that it chooses from.
    pub blocks: u64,
    /// Addresses that its endpoints have, in its blocks or not.
    pub endpoints: u64,
    /// Addresses of its blocks that nobody has.
    pub free: u64,
}

/// What a check of the store and of the nodes' kernels found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckView {
    /// The node that was asked.
    pub node: NodeName,
    /// All nodes whose kernels were to be compared with the store, by name.
    pub nodes: Vec<NodeCheck>,
    /// The store's revision at which it was read.
    pub revision: u64,
    /// What was wrong and has been repaired.
    pub repaired: Vec<Finding>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl CheckView {
    /// Whether every node's kernel was compared.
    pub fn is_complete(&self) -> bool {
        self.nodes.iter().all(|node| node.outcome == CheckOutcome::Compared)
    }
}

/// What became of a check on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCheck {
    /// The node.
    pub node: NodeName,
    /// Whether its kernel was compared with the store.
    pub outcome: CheckOutcome,
    /// Why not; empty where it was.
    pub reason: String,
    /// How many of its findings are left out, because one answer holds a thousand.
    pub cut: u64,
}

/// How a check of one node ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// Its kernel was compared with the store.
    Compared,
    /// It is dead.
    Dead,
    /// It is alive, and has not answered in time.
    Late,
    /// It could not be asked, could not compare, or its answer cannot be read.
    Failed,
}

/// What a detach removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Detached {
    /// The endpoint that is gone now.
    pub id: EndpointId,
}

/// What an attach did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// A new endpoint.
    Created(EndpointView),
    /// It was there already, by the same request.
    Existing(EndpointView),
}

impl Attached {
    /// The endpoint, new or not.
    pub fn into_view(self) -> EndpointView {
        match self {
            Self::Created(view) | Self::Existing(view) => view,
        }
    }
}

/// What adding subnets did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expanded {
    /// The network has more subnets than before.
    Changed(NetworkView),
    /// It had all of them already, by the same request.
    Unchanged(NetworkView),
}

/// Which endpoints are drained or activated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One, by name or id; a name may need its network.
    Endpoint {
        /// The endpoint.
        reference: String,
        /// Its network.
        network: Option<String>,
    },
    /// All of a service.
    Service(Name),
    /// All on a node.
    Node(NodeName),
}

/// What the API does, as the agent offers it.
///
/// `reference` is a name or an id throughout.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Version and state.
    async fn version(&self) -> VersionView;
    /// What clients need of the configuration.
    async fn settings(&self) -> Result<SettingsView, ApiError>;
    /// All metrics, in the OpenMetrics text format.
    async fn metrics(&self) -> String;
    /// Makes a network.
    async fn create_network(&self, spec: NetworkSpec) -> Result<NetworkView, ApiError>;
    /// All networks, by name.
    async fn networks(&self) -> Result<Vec<NetworkView>, ApiError>;
    /// One network.
    async fn network(&self, reference: &str) -> Result<NetworkView, ApiError>;
    /// Removes a network that has no endpoints.
    async fn remove_network(&self, reference: &str) -> Result<(), ApiError>;
    /// Adds subnets to a network.
    async fn expand_network(&self, reference: &str, spec: ExpandSpec) -> Result<Expanded, ApiError>;
    /// Removes a subnet of which no address is taken.
    async fn shrink_network(&self, reference: &str, subnet: IpNetwork) -> Result<NetworkView, ApiError>;
    /// Plugs a namespace in.
    async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError>;
    /// All endpoints, or those of one network, or on one node.
    async fn endpoints(
        &self,
        network: Option<&str>,
        node: Option<&NodeName>,
    ) -> Result<Vec<EndpointView>, ApiError>;
    /// One endpoint; a name needs its network unless it is the only one of that name.
    async fn endpoint(&self, reference: &str, network: Option<&str>) -> Result<EndpointView, ApiError>;
    /// What a name is answered with, and why.
    async fn look_up(&self, query: &NameQuery) -> Result<NameView, ApiError>;
    /// Unplugs an endpoint of this node; `Ok(None)`: there was none.
    async fn detach(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<Option<EndpointId>, ApiError>;
    /// Makes a service, with all the addresses that it will need.
    async fn create_service(&self, spec: ServiceSpec) -> Result<ServiceView, ApiError>;
    /// All services, by name.
    async fn services(&self) -> Result<Vec<ServiceView>, ApiError>;
    /// One service.
    async fn service(&self, name: &Name) -> Result<ServiceView, ApiError>;
    /// Changes how many containers a service has.
    async fn scale_service(&self, name: &Name, replicas: u32) -> Result<ServiceView, ApiError>;
    /// Changes a service; what is not given stays.
    async fn update_service(&self, name: &Name, update: ServiceUpdate) -> Result<ServiceView, ApiError>;
    /// Removes a service.
    async fn remove_service(&self, name: &Name) -> Result<(), ApiError>;
    /// Keeps addresses for a while.
    async fn reserve(&self, request: ReserveRequest) -> Result<(), ApiError>;
    /// Compares the store with itself, and with the kernel of every node, or of this one only
    /// (`local`); all networks, or one.
    async fn check(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError>;
    /// Repairs what it is safe to repair of what a check finds in the store, and checks again.
    async fn repair(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError>;
    /// All nodes.
    async fn nodes(&self) -> Result<Vec<NodeView>, ApiError>;
    /// One node.
    async fn node(&self, name: &NodeName) -> Result<NodeView, ApiError>;
    /// Removes a dead node, with its endpoints.
    async fn remove_node(&self, name: &NodeName) -> Result<(), ApiError>;
    /// Has endpoints get no new connections of their services.
    async fn drain(&self, target: Target) -> Result<DrainView, ApiError>;
    /// How far a drain is.
    async fn drain_state(&self, target: Target) -> Result<DrainView, ApiError>;
    /// Has what is drained get connections again.
    async fn activate(&self, target: Target) -> Result<(), ApiError>;
    /// Tells what is seen of packets on this node from now on, until nobody listens any more.
    async fn monitor(&self, query: MonitorQuery) -> Result<Receiver<Sighting>, ApiError>;
}
