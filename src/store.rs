//! The shared store: one trait, two implementations that behave alike.
//!
//! A store is an ordered map from keys (text with `/` between the parts) to values (bytes), with a
//! revision that grows by one with every transaction that changed something. `embedded` keeps it
//! in a file on one machine, `etcd` in an etcd cluster; `tests/store.rs` and the network tests run
//! the same suite over both. `schema` is what every store holds first: whose it is.

mod backoff;
pub mod embedded;
pub mod etcd;
pub mod schema;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

pub use backoff::Backoff;

/// A point in the store's history: the number of the transaction that made it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease: keys written under it vanish when it is not kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease(pub i64);

/// A value and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Vec<u8>,
    /// The revision that wrote it last.
    pub modified: Revision,
    /// Whether it goes with a lease.
    pub leased: bool,
}

/// Keys and values at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// The revision of the store at which this was read.
    pub revision: Revision,
    /// What was there.
    pub entries: BTreeMap<String, Entry>,
}

/// A transaction: when every comparison holds, every write is done; else none is.
///
/// A key may be written once in a transaction, and there are [limits](Transaction::MAX_STEPS);
/// one that breaks them is an error and does nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// What must hold.
    pub comparisons: Vec<Comparison>,
    /// What is written.
    pub writes: Vec<Write>,
}

/// What must hold of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// There is no such key.
    Absent(String),
    /// The key's value was written last at this revision.
    Modified(String, Revision),
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key, under a lease or for good.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The lease it lives under.
        lease: Option<Lease>,
    },
    /// Removes a key. That there is none is no error.
    Delete(String),
}

impl Transaction {
    /// The most comparisons, and the most writes, of one transaction (what etcd takes unless it is
    /// told otherwise).
    pub const MAX_STEPS: usize = 128;

    /// The most bytes of keys and values together (etcd takes 1.5 MiB with everything around).
    pub const MAX_BYTES: usize = 1 << 20;

    /// A transaction that does nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires that a key does not exist.
    pub fn absent(mut self, key: impl Into<String>) -> Self {
        self.comparisons.push(Comparison::Absent(key.into()));
        self
    }

    /// Requires that a key was written last at this revision.
    pub fn modified(mut self, key: impl Into<String>, revision: Revision) -> Self {
        self.comparisons.push(Comparison::Modified(key.into(), revision));
        self
    }

    /// Requires that a key is as it was found: written last at this revision, or not there.
    pub fn unchanged(self, key: impl Into<String>, found: Option<Revision>) -> Self {
        match found {
            Some(revision) => self.modified(key, revision),
            None => self.absent(key),
        }
    }

    /// Sets a key.
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.writes.push(Write::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Sets a key that vanishes with a lease.
    pub fn put_leased(
        mut self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        lease: Lease,
    ) -> Self {
        self.writes.push(Write::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Removes a key.
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete(key.into()));
        self
    }

    /// The bytes of the keys and values that it writes.
    fn size(&self) -> usize {
        self.writes.iter().map(Write::size).sum()
    }

    /// What breaks the rules, so that every store refuses the same transactions.
    fn problem(&self) -> Option<String> {
        let steps = self.comparisons.len().max(self.writes.len());
        if steps > Self::MAX_STEPS {
            return Some(format!("{steps} steps in a transaction, {} are allowed", Self::MAX_STEPS));
        }
        let bytes = self.size();
        if bytes > Self::MAX_BYTES {
            return Some(format!("{bytes} bytes in a transaction, {} are allowed", Self::MAX_BYTES));
        }
        for comparison in &self.comparisons {
            let (Comparison::Absent(key) | Comparison::Modified(key, _)) = comparison;
            if key.is_empty() {
                return Some("a comparison with an empty key".to_owned());
            }
            if matches!(comparison, Comparison::Modified(_, Revision(0))) {
                return Some(format!("key {key:?} compared with revision 0, which wrote nothing"));
            }
        }
        let mut written = BTreeSet::new();
        for key in self.writes.iter().map(Write::key) {
            if key.is_empty() {
                return Some("a write with an empty key".to_owned());
            }
            if !written.insert(key) {
                return Some(format!("key {key:?} is written twice in a transaction"));
            }
        }
        None
    }
}

impl Write {
    /// The key that is set or removed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete(key) => key.len(),
        }
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is done and durable; this is the store's revision now.
    Committed(Revision),
    /// A comparison did not hold; nothing was written.
    Conflict,
}

/// What a watch reports, in the order of revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Everything under the prefix: at the start of a watch without a revision, and when the
    /// history since the last report is not to be had any more (compaction, a new connection to a
    /// store that was restored). What it does not mention does not exist.
    Snapshot(Listing),
    /// The changes of one or more transactions, complete up to this revision. A transaction's
    /// changes are never divided over two reports. Without any change in it, it says that the
    /// store is back after [`Event::Lost`] and nothing was missed.
    Changes(Revision, Vec<Change>),
    /// The store cannot be reached; the watch goes on by itself as soon as it can. Said once in
    /// an outage; the next report says that it is over.
    Lost(String),
}

/// One key's change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key was set.
    Put(String, Entry),
    /// The key was removed, by a transaction or because its lease ended.
    Delete(String),
}

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It did not answer in time, or the connection failed. A transaction may or may not have
    /// been done.
    #[error("the store {store} cannot be reached: {reason}")]
    Unreachable {
        /// Which store (endpoints or path).
        store: String,
        /// What happened.
        reason: String,
    },
    /// It refused who we are.
    #[error("the store {store} refused access: {reason}")]
    Denied {
        /// Which store.
        store: String,
        /// What it said.
        reason: String,
    },
    /// The lease has ended or never was.
    #[error("lease {0:x} does not exist any more")]
    LeaseGone(i64),
    /// It answered with an error.
    #[error("the store {store} failed: {reason}")]
    Failed {
        /// Which store.
        store: String,
        /// What it said.
        reason: String,
    },
    /// Its file cannot be used.
    #[error("cannot open the store {}: {reason}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Its content is of a newer version than this program.
    #[error(
        "the store {store} has schema {found}, this program knows schema {known}: \
         upgrade netctl on this node"
    )]
    Newer {
        /// Which store.
        store: String,
        /// The schema found.
        found: u32,
        /// The schema known.
        known: u32,
    },
}

/// A stream of a watch's reports. It ends only when the store is closed.
pub type Watch = tokio::sync::mpsc::Receiver<Event>;

/// The shared store.
///
/// Every call ends within the store's time-out. Keys are relative: an implementation may put a
/// prefix of its own before them.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Names the store for people: its endpoints or its path.
    fn name(&self) -> String;

    /// Reads one key.
    ///
    /// # Errors
    /// When the store cannot be reached or refuses; a missing key is `None`.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Reads all keys that begin with `prefix`, at one revision.
    ///
    /// # Errors
    /// When the store cannot be reached or refuses.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Does a transaction; durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] leaves open whether it was done.
    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError>;

    /// Watches all keys that begin with `prefix`: with `from`, the changes after that revision
    /// (or a snapshot, where the history is not that long); without, a snapshot first.
    ///
    /// Dropping the receiver ends the watch. A receiver that is slow delays nobody: what it has
    /// missed reaches it as one report, or as a snapshot. To be called within a Tokio runtime.
    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch;

    /// Makes a lease that ends when it is not kept alive for `ttl` (whole seconds, at least one).
    ///
    /// # Errors
    /// When the store cannot be reached or refuses.
    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError>;

    /// Gives a lease its whole time again.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`] when it has ended.
    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError>;

    /// Ends a lease: its keys are removed now. That it has ended already is no error.
    ///
    /// # Errors
    /// When the store cannot be reached or refuses.
    async fn revoke(&self, lease: Lease) -> Result<(), StoreError>;
}

/// A lease's time in the seconds that a store counts: rounded up, from 1 to etcd's highest.
fn whole_seconds(ttl: Duration) -> u64 {
    let up = ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
    up.clamp(1, 9_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_never_shorter_than_asked() {
        let cases = [(0, 1), (1, 1), (1000, 1), (1001, 2), (2500, 3)];
        for (asked, seconds) in cases {
            assert_eq!(whole_seconds(Duration::from_millis(asked)), seconds);
        }
        assert_eq!(whole_seconds(Duration::MAX), 9_000_000_000);
    }
}
