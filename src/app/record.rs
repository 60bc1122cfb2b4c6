//! This node's record in the store: its interfaces and routes change.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::warn;

use super::join;
use crate::api::ApiError;
use crate::cluster::Cluster;
use crate::model::Node;

/// How often it is compared with the interfaces and routes.
const COMPARE: Duration = Duration::from_secs(60);

/// This node's record, as the store is to have it.
pub(super) struct Record {
    cluster: Arc<Cluster>,
    node: Mutex<Node>,
    /// Whose turn it is to write it, and whether it is certain that the store has it.
    written: tokio::sync::Mutex<bool>,
}

impl Record {
    /// That of a node which has just joined.
    pub(super) fn new(cluster: Arc<Cluster>, node: Node) -> Self {
        Self { cluster, node: Mutex::new(node), written: tokio::sync::Mutex::new(true) }
    }

    /// What it says.
    pub(super) fn node(&self) -> Node {
        self.known().clone()
    }

    /// Makes it true: writes it, where the node's interfaces and routes are others by now.
    ///
    /// # Errors
    /// When they cannot be read, or the store cannot be written.
    pub(super) async fn renew(&self) -> Result<(), ApiError> {
        let mut written = self.written.lock().await;
        let subnets = join::subnets(&join::inventory().await?);
        let node = {
            let mut node = self.known();
            if node.subnets_in_use == subnets && *written {
                return Ok(());
            }
            node.subnets_in_use = subnets;
            node.clone()
        };
        *written = false;
        self.cluster.join(&node).await?;
        *written = true;
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Node> {
        // What a panic interrupts here is a whole assignment.
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps it true.
pub(super) async fn keep_true(record: Arc<Record>) {
    loop {
        tokio::time::sleep(COMPARE).await;
        if let Err(error) = record.renew().await {
            warn!(%error, "node's record not renewed");
        }
    }
}
