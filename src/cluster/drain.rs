//! Draining: who has seen that an endpoint gets no new connections.

use serde::{Deserialize, Serialize};

use super::{Cluster, ClusterError, TRIES, encode, keys};
use crate::model::{Endpoint, EndpointId, EndpointState, NetworkId};
use crate::store::{Outcome, Revision, Transaction};

/// What a node has written of a drained endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The revision of the endpoint's record that the node has applied.
    pub revision: u64,
    /// How many connections through this node are still open to it.
    pub connections: u64,
}

impl Cluster {
    /// Writes that this node has applied that an endpoint is drained, and how many connections
    /// through it are still open there. Nothing is written of an endpoint that is gone, or that gets
    /// connections again.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn acknowledge(
        &self,
        network: NetworkId,
        endpoint: EndpointId,
        revision: u64,
        connections: u64,
    ) -> Result<(), ClusterError> {
        let record = keys::endpoint(network, endpoint);
        let ack = encode(&Ack { revision, connections });
        for _ in 0..TRIES {
            let Some(found) = self.read::<Endpoint>(&record).await? else { return Ok(()) };
            let mut transaction = Transaction::new().modified(&record, Revision(found.revision));
            if found.state != EndpointState::Draining {
                let mark = keys::drained(&found.node);
                let Some(entry) = self.store.get(&mark).await? else { return Ok(()) };
                transaction = transaction.modified(mark, entry.modified);
            }
            let key = keys::ack(network, endpoint, &self.node);
            if let Outcome::Committed(_) = self.commit(transaction.put(key, ack.clone())).await? {
                return Ok(());
            }
        }
        Err(ClusterError::Contention(format!("endpoint {endpoint}")))
    }
}
