//! What a check finds: where the store contradicts itself, or the kernel the store.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::NodeName;

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// The node whose kernel it was found in; null: the store.
    pub node: Option<NodeName>,
    /// The network's name, or its id where it has no record; empty where it concerns none.
    pub network: String,
    /// What sort of thing is wrong.
    pub kind: FindingKind,
    /// The store's key, or the device or namespace.
    pub what: String,
    /// What is wrong with it.
    pub problem: String,
    /// What a repair does; where none is safe, what to do.
    pub repair: String,
    /// Whether a repair does it.
    pub repairable: bool,
}

/// What sort of thing is wrong, for programs: stable over versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// An address is taken by an endpoint that does not exist or does not have it.
    LeakedAddress,
    /// A name is taken by an endpoint that does not exist or has another.
    LeakedName,
    /// A node is said to have an endpoint that does not exist or is elsewhere.
    LeakedLocal,
    /// A block of addresses belongs to a node that does not exist.
    LeakedBlock,
    /// There are members of a network that does not exist.
    LeakedMembers,
    /// There is an acknowledgement of the drain of an endpoint that does not exist.
    LeakedAck,
    /// Addresses are kept for a service that does not exist or is not on the network, or for none and
    /// for ever.
    LeakedReservation,
    /// More or fewer endpoints have drawn on what is kept for a service than is written.
    WrongReservation,
    /// Nothing is kept for a service.
    MissingReservation,
    /// An endpoint's address is not marked as its own.
    MissingAddress,
    /// An endpoint's name is not marked as its own.
    MissingName,
    /// An endpoint's node is not said to have it.
    MissingLocal,
    /// Two have one address.
    DoubleAddress,
    /// Two have one name.
    DoubleName,
    /// An endpoint's address is outside of the network's subnets.
    OutsideAddress,
    /// A block is outside of the network's subnets.
    OutsideBlock,
    /// An endpoint is on a node that does not exist.
    LostEndpoint,
    /// A key or its value cannot be read.
    Unreadable,
    /// An endpoint has no device in its network's sandbox on its node.
    NoDevice,
    /// A device in a sandbox belongs to no endpoint of the node.
    StrayDevice,
    /// A sandbox belongs to no network.
    StraySandbox,
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LeakedAddress => "leaked address",
            Self::LeakedName => "leaked name",
            Self::LeakedLocal => "leaked local key",
            Self::LeakedBlock => "leaked block",
            Self::LeakedMembers => "leaked members",
            Self::LeakedAck => "leaked acknowledgement",
            Self::LeakedReservation => "leaked reservation",
            Self::WrongReservation => "wrong reservation",
            Self::MissingReservation => "missing reservation",
            Self::MissingAddress => "missing address",
            Self::MissingName => "missing name",
            Self::MissingLocal => "missing local key",
            Self::DoubleAddress => "double address",
            Self::DoubleName => "double name",
            Self::OutsideAddress => "outside address",
            Self::OutsideBlock => "outside block",
            Self::LostEndpoint => "lost endpoint",
            Self::Unreadable => "unreadable",
            Self::NoDevice => "no device",
            Self::StrayDevice => "stray device",
            Self::StraySandbox => "stray sandbox",
        })
    }
}
