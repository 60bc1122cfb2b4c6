//! What balances the connections of services on a node.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What balances the connections of services on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The kernel's IPVS.
    Ipvs,
    /// eBPF programs of ours.
    Ebpf,
    /// Nothing, because the node is configured so: its containers use no services.
    #[default]
    None,
    /// Nothing, because the kernel of the node takes no eBPF programs and has no IPVS.
    Missing,
}

impl Engine {
    /// Whether anything is balanced.
    pub fn balances(self) -> bool {
        matches!(self, Self::Ipvs | Self::Ebpf)
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipvs => "ipvs",
            Self::Ebpf => "ebpf",
            Self::None => "none",
            Self::Missing => "missing",
        })
    }
}
