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
    known: Mutex<Known>,
}

struct Known {
    node: Node,
    /// Whether it is not certain that the store has it.
    unwritten: bool,
}

impl Record {
    /// That of a node which has just joined.
    pub(super) fn new(cluster: Arc<Cluster>, node: Node) -> Self {
        Self { cluster, known: Mutex::new(Known { node, unwritten: false }) }
    }

    /// What it says.
    pub(super) fn node(&self) -> Node {
        self.known().node.clone()
    }

    /// Makes it true: writes it, where the node's interfaces and routes are others by now.
    ///
    /// # Errors
    /// When they cannot be read, or the store cannot be written.
    pub(super) async fn renew(&self) -> Result<(), ApiError> {
        let subnets = join::subnets(&join::inventory().await?);
        let node = {
            let mut known = self.known();
            if known.node.subnets_in_use == subnets && !known.unwritten {
                return Ok(());
            }
            known.node.subnets_in_use = subnets;
            known.unwritten = true;
            known.node.clone()
        };
        self.cluster.join(&node).await?;
        // Unless it has changed again since then.
        let mut known = self.known();
        known.unwritten &= known.node != node;
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What a panic interrupts here is a whole assignment.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
