//! Services as they are shown.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::model::{self, EndpointId, EndpointState, External, Name, NodeName};

/// A service as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceView {
    /// The service itself.
    #[serde(flatten)]
    pub service: model::Service,
    /// The names of its networks, in the same order.
    pub network_names: Vec<String>,
    /// How many of its containers are ready, on the network where the fewest are.
    #[serde(default)]
    pub ready: u64,
    /// What is in effect on each of its networks; empty with `dnsrr`.
    #[serde(default)]
    pub timeouts_in_effect: Vec<TimeoutsView>,
    /// Its endpoints on all its networks, as this node balances to them.
    #[serde(default)]
    pub backends: Vec<BackendView>,
    /// Its targets outside of the overlay on all its networks, as this node balances to them.
    #[serde(default)]
    pub external_backends: Vec<ExternalView>,
}

/// After which silence entries for connections go on a network, in seconds: the longest that any
/// service there asks for, and what the kernel has where none does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TimeoutsView {
    /// The network's name.
    pub network_name: String,
    /// Of an established TCP connection.
    pub tcp: u32,
    /// Of a TCP connection that one side has ended.
    pub tcp_fin: u32,
    /// Of UDP.
    pub udp: u32,
}

/// An endpoint of a service, as the node that answers balances to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendView {
    /// Its id.
    pub endpoint: EndpointId,
    /// Its name.
    pub name: Name,
    /// The name of its network.
    pub network_name: String,
    /// The node on which it is.
    pub node: NodeName,
    /// Its addresses.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Whether it takes connections, by itself.
    pub state: EndpointState,
    /// Why it does not; empty where nothing is known.
    #[serde(default)]
    pub reason: String,
    /// The weight in effect; 0: it gets no new connections from this node.
    pub weight: u32,
    /// Why it gets none; `null`: it gets them.
    pub out: Option<String>,
    /// Connections from the node that answers to it; `null`: that node balances nothing there, or
    /// several services are listed, or one was changed.
    pub connections: Option<Connections>,
}

/// A target of a service outside of the overlay, as the node that answers balances to it. Nobody checks
/// whether it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExternalView {
    /// The target.
    pub external: External,
    /// The name of the network from which it is reached.
    pub network_name: String,
    /// The weight in effect; 0: it gets no new connections from this node.
    pub weight: u32,
    /// Why it gets none; `null`: it gets them.
    pub out: Option<String>,
    /// Connections from the node that answers to it, as those to endpoints.
    pub connections: Option<Connections>,
}

/// Connections to a backend, as the kernel counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Connections {
    /// Established ones.
    pub active: u64,
    /// Others, such as those that are ending.
    pub inactive: u64,
}
