//! A store that remembers the leases that were made through it, so that a test ends them when it
//! wants and waits for no clock.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use netctl::store::{Entry, Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch};

pub struct Granting {
    pub inner: Arc<dyn Store>,
    granted: Mutex<Vec<(Duration, Lease)>>,
}

impl Granting {
    pub fn new(inner: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { inner, granted: Mutex::default() })
    }

    /// Takes out the leases of a length.
    pub fn take(&self, which: impl Fn(Duration) -> bool) -> Vec<Lease> {
        let mut granted = self.granted.lock().unwrap();
        granted.extract_if(.., |(ttl, _)| which(*ttl)).map(|(_, lease)| lease).collect()
    }
}

#[async_trait]
impl Store for Granting {
    fn name(&self) -> String {
        self.inner.name()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.inner.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        self.inner.commit(transaction).await
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        self.inner.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let lease = self.inner.grant(ttl).await?;
        self.granted.lock().unwrap().push((ttl, lease));
        Ok(lease)
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }
}
