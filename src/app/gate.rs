//! One at a time per key: concurrent requests for the same thing wait for each other.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Admits one holder for each key.
pub(super) struct Gate<K> {
    locks: Mutex<HashMap<K, Arc<AsyncMutex<()>>>>,
}

impl<K: Eq + Hash> Gate<K> {
    pub(super) fn new() -> Self {
        Self { locks: Mutex::new(HashMap::new()) }
    }

    /// Waits until nobody holds the key; it is held until the guard is dropped.
    pub(super) async fn pass(&self, key: K) -> OwnedMutexGuard<()> {
        self.lock(key).lock_owned().await
    }

    /// The same without waiting; `None`: somebody holds the key.
    pub(super) fn try_pass(&self, key: K) -> Option<OwnedMutexGuard<()>> {
        self.lock(key).try_lock_owned().ok()
    }

    fn lock(&self, key: K) -> Arc<AsyncMutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        // What only the map knows, nobody holds or waits for.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(key).or_default().clone()
    }
}
