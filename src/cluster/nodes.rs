//! Nodes: joining the cluster and staying alive in it.

use std::time::Duration;

use super::{Cluster, ClusterError, TRIES, encode, keys};
use crate::model::{Node, NodeId};
use crate::store::{Lease, Outcome, Revision, StoreError, Transaction};

impl Cluster {
    /// All nodes, as the store has them now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn nodes(&self) -> Result<Vec<Node>, ClusterError> {
        Ok(self.read_all(keys::NODES).await?.into_iter().map(|(_, node)| node.value).collect())
    }

    /// Writes this node's record.
    ///
    /// # Errors
    /// [`ClusterError::NodeTaken`] when another machine that is alive has the name or the underlay
    /// address.
    pub async fn join(&self, node: &Node) -> Result<(), ClusterError> {
        let key = keys::node(&node.name);
        for _ in 0..TRIES {
            self.refuse_taken(node).await?;
            let transaction = match self.read::<Node>(&key).await? {
                Some(known) if known.value == *node => return Ok(()),
                Some(known) => Transaction::new().modified(&key, Revision(known.revision)),
                None => Transaction::new().absent(&key),
            };
            if let Outcome::Committed(_) = self.commit(transaction.put(&key, encode(node))).await? {
                return Ok(());
            }
        }
        Err(ClusterError::Contention(format!("node {}", node.name)))
    }

    async fn refuse_taken(&self, me: &Node) -> Result<(), ClusterError> {
        for (key, id) in self.read_all::<NodeId>(keys::ALIVE).await? {
            let Some(other) = self.read::<Node>(&key.replacen(keys::ALIVE, keys::NODES, 1)).await?
            else {
                continue;
            };
            let what = if id.value == me.id {
                continue;
            } else if other.name == me.name {
                format!("node name {}", me.name)
            } else if other.underlay == me.underlay {
                format!("underlay address {}", me.underlay)
            } else if other.underlay.is_ipv4() != me.underlay.is_ipv4() {
                format!(
                    "an underlay of the other address family ({}, here {})",
                    other.underlay, me.underlay
                )
            } else {
                continue;
            };
            return Err(ClusterError::NodeTaken {
                what,
                node: other.value.name,
                id: id.value.to_string(),
            });
        }
        Ok(())
    }

    /// Makes the lease of this node and shows by it that the node is alive.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn come_alive(&self, id: NodeId, ttl: Duration) -> Result<Lease, ClusterError> {
        let lease = self.store.grant(ttl).await?;
        let transaction = Transaction::new().put_leased(keys::alive(&self.node), encode(&id), lease);
        match self.commit(transaction).await? {
            Outcome::Committed(_) => Ok(lease),
            Outcome::Conflict => Err(ClusterError::Replaced(self.store.name())),
        }
    }

    /// Keeps the node's lease; one that ended is made anew.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn stay_alive(
        &self,
        lease: Lease,
        id: NodeId,
        ttl: Duration,
    ) -> Result<Lease, ClusterError> {
        match self.store.keep_alive(lease).await {
            Ok(()) => Ok(lease),
            Err(StoreError::LeaseGone(_)) => self.come_alive(id, ttl).await,
            Err(error) => Err(error.into()),
        }
    }
}
