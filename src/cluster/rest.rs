//! Freed addresses rest before they are given out again.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::endpoints::lock;
use super::{Cluster, ClusterError, keys};
use crate::model::NetworkId;
use crate::store::{Lease, StoreError, Transaction};

/// Adds to a transaction that an address is freed: it rests under the lease, or is free at once.
pub(super) fn freeing(
    transaction: Transaction,
    network: NetworkId,
    address: IpAddr,
    rest: Option<Lease>,
) -> Transaction {
    let key = keys::address(network, address);
    match rest {
        Some(lease) => transaction.put_leased(key, [], lease),
        None => transaction.delete(key),
    }
}

/// The lease under which freed addresses rest.
///
/// One lease serves all addresses freed within a window, so an address rests for the time asked
/// for and up to a window longer.
pub(super) struct Rest {
    time: Duration,
    current: Mutex<Option<(Lease, Instant)>>,
}

impl Rest {
    pub(super) fn new(time: Duration) -> Self {
        Self { time, current: Mutex::new(None) }
    }

    fn window(&self) -> Duration {
        (self.time / 4).max(Duration::from_secs(1))
    }

    fn current(&self) -> Option<Lease> {
        let current = lock(&self.current);
        current.filter(|(_, since)| since.elapsed() < self.window()).map(|(lease, _)| lease)
    }

    fn set(&self, current: Option<(Lease, Instant)>) {
        *lock(&self.current) = current;
    }
}

impl Cluster {
    /// The lease for addresses that are freed now; `None`: they do not rest.
    pub(super) async fn rest_lease(&self) -> Result<Option<Lease>, ClusterError> {
        if self.rest.time.is_zero() {
            return Ok(None);
        }
        if let Some(lease) = self.rest.current() {
            return Ok(Some(lease));
        }
        // The lease runs from before the answer comes.
        let since = Instant::now();
        match self.store.grant(self.rest.time + self.rest.window()).await {
            Ok(lease) => {
                self.rest.set(Some((lease, since)));
                Ok(Some(lease))
            }
            // A full disk takes no new lease, but a removal it takes: better without rest than not.
            Err(error @ StoreError::Failed { .. }) => {
                tracing::warn!(%error, "freed addresses do not rest");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a change failed because the lease of resting addresses had ended: then there is a
    /// new one at the next try.
    pub(super) fn is_rest_gone(&self, error: &ClusterError) -> bool {
        let gone = matches!(error, ClusterError::Store(StoreError::LeaseGone(_)));
        if gone {
            self.rest.set(None);
        }
        gone
    }
}
