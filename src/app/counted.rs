//! The store, with its requests counted.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::store::{Entry, Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch};

/// A store whose requests are counted; watches are not requests.
pub(super) struct Counted {
    store: Arc<dyn Store>,
    requests: Counter,
    failures: Counter,
}

impl Counted {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self { store, requests: Counter::default(), failures: Counter::default() }
    }

    /// Shows the counters as metrics.
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("store_requests", "Requests to the store", self.requests.clone());
        let help = "Requests that the store did not answer, or refused";
        registry.register("store_request_failures", help, self.failures.clone());
    }

    fn count<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        self.requests.inc();
        // That a lease has ended is an answer like any other.
        if answer.as_ref().is_err_and(|error| !matches!(error, StoreError::LeaseGone(_))) {
            self.failures.inc();
        }
        answer
    }
}

#[async_trait]
impl Store for Counted {
    fn name(&self) -> String {
        self.store.name()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.count(self.store.get(key).await)
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.count(self.store.list(prefix).await)
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        self.count(self.store.commit(transaction).await)
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        self.store.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.count(self.store.grant(ttl).await)
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.count(self.store.keep_alive(lease).await)
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.count(self.store.revoke(lease).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::embedded::Embedded;

    #[tokio::test]
    async fn every_request_counts_and_a_lease_that_ended_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path().join("store.redb")).unwrap();
        let store = Counted::new(Arc::new(store));
        assert_eq!(store.get("a").await.unwrap(), None);
        assert!(store.list("a").await.unwrap().entries.is_empty());
        let lease = store.grant(Duration::from_secs(60)).await.unwrap();
        store.keep_alive(lease).await.unwrap();
        store.revoke(lease).await.unwrap();
        assert!(matches!(store.keep_alive(lease).await, Err(StoreError::LeaseGone(_))));
        assert_eq!((store.requests.get(), store.failures.get()), (6, 0));
        // A key is written twice.
        let refused = Transaction::new().put("a", []).put("a", []);
        assert!(store.commit(refused).await.is_err());
        assert_eq!((store.requests.get(), store.failures.get()), (7, 1));
    }
}
