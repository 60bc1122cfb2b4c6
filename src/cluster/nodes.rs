//! Nodes: joining the cluster and staying alive in it.

use std::time::Duration;

use super::{Cluster, ClusterError, TRIES, encode, keys};
use crate::model::{Node, NodeId, NodeName};
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
    /// address, or an underlay of the other address family.
    pub async fn join(&self, node: &Node) -> Result<(), ClusterError> {
        let key = keys::node(&node.name);
        for _ in 0..TRIES {
            self.refuse_taken(node).await?;
            let mut transaction = match self.read::<Node>(&key).await? {
                Some(known) if known.value == *node => return Ok(()),
                Some(known) => Transaction::new().modified(&key, Revision(known.revision)),
                None => Transaction::new().absent(&key),
            };
            // A machine that was set up anew under another name: the old one does not come back.
            for (other, predecessor) in self.read_all::<Node>(keys::NODES).await? {
                if other != key && predecessor.underlay == node.underlay {
                    transaction =
                        transaction.modified(&other, Revision(predecessor.revision)).delete(&other);
                    transaction = transaction.delete(other.replacen(keys::NODES, keys::DRAINED, 1));
                }
            }
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

    /// Has a node's endpoints get no new connections of services, or get them again.
    ///
    /// # Errors
    /// [`ClusterError::NoNode`] when there is no such node.
    pub async fn set_drained(&self, name: &NodeName, drained: bool) -> Result<(), ClusterError> {
        let (node, key) = (keys::node(name), keys::drained(name));
        for _ in 0..TRIES {
            let Some(found) = self.read::<Node>(&node).await? else {
                return Err(ClusterError::NoNode(name.to_string()));
            };
            let mark = self.store.get(&key).await?;
            // What was acknowledged since a mark counts: it is not written anew.
            if mark.is_some() == drained {
                return Ok(());
            }
            let transaction = Transaction::new()
                .modified(&node, Revision(found.revision))
                .unchanged(&key, mark.map(|entry| entry.modified));
            let transaction = if drained { transaction.put(&key, []) } else { transaction.delete(&key) };
            if let Outcome::Committed(_) = self.commit(transaction).await? {
                return Ok(());
            }
        }
        Err(ClusterError::Contention(format!("node {name}")))
    }

    /// Makes the lease of this node and shows by it that the node is alive.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one, or another machine has the name.
    pub async fn come_alive(&self, id: NodeId, ttl: Duration) -> Result<Lease, ClusterError> {
        let key = keys::alive(&self.node);
        let mut granted = None;
        for _ in 0..TRIES {
            let transaction = match self.read::<NodeId>(&key).await? {
                Some(holder) if holder.value != id => {
                    let (what, id) = (format!("node name {}", self.node), holder.value.to_string());
                    return Err(ClusterError::NodeTaken { what, node: self.node.clone(), id });
                }
                Some(ours) => Transaction::new().modified(&key, Revision(ours.revision)),
                None => Transaction::new().absent(&key),
            };
            let lease = match granted {
                Some(lease) => lease,
                None => *granted.insert(self.store.grant(ttl).await?),
            };
            let alive = transaction.put_leased(&key, encode(&id), lease);
            if let Outcome::Committed(_) = self.commit(alive).await? {
                return Ok(lease);
            }
            // Its last lease has ended just now.
        }
        Err(ClusterError::Contention(key))
    }

    /// Keeps the node's lease; one that ended is made anew, and so is the record of a node that was
    /// removed meanwhile.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn stay_alive(
        &self,
        lease: Lease,
        node: &Node,
        ttl: Duration,
    ) -> Result<Lease, ClusterError> {
        match self.store.keep_alive(lease).await {
            Ok(()) => Ok(lease),
            Err(StoreError::LeaseGone(_)) => {
                if self.store.get(&keys::node(&node.name)).await?.is_none() {
                    self.join(node).await?;
                }
                self.come_alive(node.id, ttl).await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a dead node with its endpoints, whose addresses rest, and its blocks. Should it come
    /// back, it unplugs what it still has.
    ///
    /// # Errors
    /// [`ClusterError::NoNode`] when there is none, [`ClusterError::NodeAlive`] when it lives.
    pub async fn remove_node(&self, name: &NodeName) -> Result<(), ClusterError> {
        let (node, alive) = (keys::node(name), keys::alive(name));
        let dead = async || match self.store.get(&alive).await? {
            Some(_) => Err(ClusterError::NodeAlive(name.clone())),
            None => Ok(()),
        };
        if self.store.get(&node).await?.is_none() {
            return Err(ClusterError::NoNode(name.to_string()));
        }
        dead().await?;
        for network in self.networks_of(name).await? {
            let endpoints = self.endpoints(network).await?;
            for endpoint in endpoints.iter().filter(|endpoint| endpoint.node == *name) {
                dead().await?;
                self.release(endpoint).await?;
            }
        }
        for network in self.networks().await? {
            for (key, owner) in self.read_all::<NodeName>(&keys::blocks(network.id)).await? {
                if owner.value == *name {
                    let block = Transaction::new().modified(&key, Revision(owner.revision));
                    // It is somebody else's by now, or goes.
                    self.commit(block.delete(key)).await?;
                }
            }
        }
        let gone = Transaction::new().absent(alive).delete(node).delete(keys::drained(name));
        match self.commit(gone).await? {
            Outcome::Committed(_) => Ok(()),
            Outcome::Conflict => Err(ClusterError::NodeAlive(name.clone())),
        }
    }
}
