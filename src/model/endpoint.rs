//! An endpoint: one interface of one container on one network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{EndpointId, EndpointState, IfName, MacAddr, Name, NetworkId, NodeName, ServiceId};

/// An interface of a container as the cluster keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// Its identity.
    pub id: EndpointId,
    /// Its name, unique in its network.
    pub name: Name,
    /// Other names by which its network finds it; others may have them too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<Name>,
    /// The network.
    pub network: NetworkId,
    /// The node on which the container runs.
    pub node: NodeName,
    /// Its addresses: at most one of each family.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// The Ethernet address inside the container.
    pub mac: MacAddr,
    /// Where it is plugged in.
    pub attachment: Attachment,
    /// Whether it is the node's host, which the agent plugs in and takes out by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host: bool,
    /// The service that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Set when its addresses were drawn on what is kept for its service: releasing them puts them
    /// back there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn: Option<ServiceId>,
    /// Its share of its service's connections, for schedulers with weights.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: u16,
    /// Whether it takes connections of its service.
    #[serde(default, skip_serializing_if = "is_default")]
    pub state: EndpointState,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Free text by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u16 {
    1
}

fn is_one(weight: &u16) -> bool {
    *weight == 1
}

fn is_default(state: &EndpointState) -> bool {
    *state == EndpointState::default()
}

/// The namespace and interface of an endpoint.
///
/// A path alone does not say which namespace is meant: `/proc/PID/ns/net` can become another one.
/// The inode does within one boot, so boot and inode are kept too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The path of the network namespace.
    #[schema(value_type = String)]
    pub netns: PathBuf,
    /// The inode of the namespace in the kernel's nsfs.
    pub inode: u64,
    /// The boot (`/proc/sys/kernel/random/boot_id`) in which the inode is valid.
    pub boot: String,
    /// The interface's name in the container.
    pub interface: IfName,
}
