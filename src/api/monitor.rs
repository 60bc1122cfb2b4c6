//! What is seen of packets on a node, while somebody watches.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::model::{Name, NodeName};

/// One of how many packets is shown where nobody says.
pub const SAMPLE: u32 = 100;

/// What somebody wants to see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct MonitorQuery {
    /// Only what is on this network (name or id).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Name>,
    /// Only what comes from this endpoint, or is for it (name or id).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    /// Only what comes from this service or its containers, or is for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Only flows, or only drops.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    #[param(inline)]
    pub kind: Option<SightingKind>,
    /// One of how many packets is shown, beside those that open or end a TCP connection: by default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1)]
    pub sample: Option<u32>,
}

/// What sort of thing was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SightingKind {
    /// A packet went its way.
    Flow,
    /// A packet was dropped, or refused.
    Drop,
    /// More was to be seen than could be told.
    Lost,
}

/// Where a packet was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// It left a container of this node.
    FromContainer,
    /// It goes into a container of this node.
    ToContainer,
    /// It came from another node.
    FromWire,
    /// It goes to another node.
    ToWire,
    /// There is none yet: a container's socket has asked for a service.
    Socket,
    /// In the network's sandbox, by a rule or the kernel.
    Sandbox,
    /// On the host, by a rule or the kernel.
    Host,
}

/// Who carried a packet on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// The node's programs, past the stack.
    Direct,
    /// The kernel's routes.
    Kernel,
}

/// An end of a packet's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Party {
    /// Its address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Its port; `null` where the protocol has none.
    pub port: Option<u16>,
    /// The endpoint that has the address.
    pub endpoint: Option<Name>,
    /// The service that has it, or to which the endpoint belongs.
    pub service: Option<Name>,
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Seen {
    /// Its network; `null` where it is none's.
    pub network: Option<Name>,
    /// Where it was seen.
    pub point: Point,
    /// Who carried it on; `null`: nobody.
    pub carrier: Option<Carrier>,
    /// Its protocol, such as `tcp`; the number of one without a name here.
    pub protocol: String,
    /// Where it came from.
    pub source: Party,
    /// Where it was for.
    pub destination: Party,
    /// Where it was sent on to, where it was for a service; from where it seems to come, where it is a
    /// service's answer.
    pub translated: Option<Party>,
    /// How long it is, without its frame; 0 where that is not known.
    pub length: u32,
    /// The flags of TCP, such as `SA`.
    pub flags: String,
}

/// Something that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sighting {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// On which node.
    pub node: NodeName,
    /// What sort of thing it is.
    #[serde(rename = "type")]
    pub kind: SightingKind,
    /// Why a packet was dropped or refused; empty with others.
    pub reason: String,
    /// How many were not told, with `lost`.
    pub lost: u64,
    /// The packet; `null` with `lost`.
    pub packet: Option<Seen>,
}

impl fmt::Display for SightingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flow => "flow",
            Self::Drop => "drop",
            Self::Lost => "lost",
        })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FromContainer => "from-container",
            Self::ToContainer => "to-container",
            Self::FromWire => "from-wire",
            Self::Socket => "socket",
            Self::ToWire => "to-wire",
            Self::Sandbox => "sandbox",
            Self::Host => "host",
        })
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.endpoint.as_ref().or(self.service.as_ref()) {
            write!(f, "{name}/")?;
        }
        match self.port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.address, port)),
            None => write!(f, "{}", self.address),
        }
    }
}
