//! What a network's addresses are used for, read once, at one revision of the store.

use std::collections::BTreeMap;

use super::view::Fold;
use super::{Cluster, ClusterError, keys};
use crate::ipam::{Count, Ledger, NodeCount, SubnetCount};
use crate::model::snapshot::Members;
use crate::model::{Network, NodeName};

/// How a network's addresses are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// How many endpoints there are.
    pub endpoints: usize,
    /// How its IPv4 addresses are used.
    pub ipv4: Count,
    /// How its IPv6 addresses are used.
    pub ipv6: Count,
    /// How each subnet's are used, in the network's order.
    pub subnets: Vec<SubnetCount>,
    /// What each node has that has any.
    pub nodes: BTreeMap<NodeName, NodeShare>,
}

/// What a node has of a network's addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeShare {
    /// Of IPv4.
    pub ipv4: Share,
    /// Of IPv6.
    pub ipv6: Share,
}

/// What a node has of the addresses of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// The addresses of its endpoints, in its blocks or not.
    pub endpoints: u128,
    /// What it has in its blocks.
    pub own: NodeCount,
}

impl NodeShare {
    fn of(&mut self, ipv4: bool) -> &mut Share {
        if ipv4 { &mut self.ipv4 } else { &mut self.ipv6 }
    }
}

impl Cluster {
    /// How a network's endpoints and addresses are distributed, as the store has it now: one listing.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn survey(&self, network: &Network) -> Result<Survey, ClusterError> {
        let prefix = keys::members(network.id);
        let listing = self.store.list(&prefix).await?;
        let (mut members, mut ledger) = (Members::default(), Ledger::new(self.node.clone()));
        ledger.follow(network);
        let mut fold = Fold { members: &mut members, ledger: &mut ledger };
        let mut endpoints = 0;
        for (key, entry) in &listing.entries {
            let Some(key) = key.strip_prefix(&prefix) else { continue };
            // One that cannot be read is one too.
            endpoints += usize::from(key.starts_with("endpoints/"));
            fold.put(key, entry);
        }
        let mut nodes: BTreeMap<NodeName, NodeShare> = BTreeMap::new();
        for endpoint in members.endpoints.values() {
            let share = nodes.entry(endpoint.node.clone()).or_default();
            for address in &endpoint.addresses {
                share.of(address.is_ipv4()).endpoints += 1;
            }
        }
        for ipv4 in [true, false] {
            for (node, own) in ledger.by_node(ipv4) {
                nodes.entry(node.clone()).or_default().of(ipv4).own = own;
            }
        }
        let (ipv4, ipv6) = (ledger.count(true), ledger.count(false));
        Ok(Survey { endpoints, ipv4, ipv6, subnets: ledger.by_subnet().collect(), nodes })
    }
}
