//! What every store holds first: the schema of its content, and whose it is.
//!
//! The key `base/cluster` holds `{"schema":1,"id":"0123456789ab"}`. An agent remembers the id: a store
//! that has another, or none any more, was wiped or replaced, and what it does not mention must
//! not be taken for deleted.

use serde::{Deserialize, Serialize};

use super::{Outcome, Store, StoreError, Transaction};
use crate::model::ClusterId;

/// The schema that this program reads and writes.
pub const SCHEMA: u32 = 1;

/// Where the identity is.
pub const KEY: &str = "base/cluster";

/// Whose a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The cluster that was known, or the one that is met for the first time.
    Cluster(ClusterId),
    /// Not the cluster that was known: the store was wiped, restored from elsewhere, or it is
    /// another one.
    Replaced {
        /// Whose it is now; none where it is empty.
        found: Option<ClusterId>,
        /// Whose it was.
        known: ClusterId,
    },
}

/// The schema alone: all that is read before it is known to be ours.
#[derive(Deserialize)]
struct Version {
    schema: u32,
}

#[derive(Serialize, Deserialize)]
struct Record {
    schema: u32,
    id: ClusterId,
}

/// Finds out whose a store is; one that is nobody's is given the id `fresh`, but only when no
/// cluster is `known` already. Of agents that do so at once, one wins and all get its id.
///
/// # Errors
/// [`StoreError::Newer`] when a newer netctl wrote the store, [`StoreError::Failed`] when the key
/// cannot be understood, and whatever the store itself reports.
pub async fn identify(
    store: &dyn Store,
    known: Option<ClusterId>,
    fresh: ClusterId,
) -> Result<Identity, StoreError> {
    let found = match (find(store).await?, known) {
        (None, None) => create(store, fresh).await?,
        (found, _) => found,
    };
    Ok(match (found, known) {
        (Some(id), None) => Identity::Cluster(id),
        (Some(id), Some(known)) if id == known => Identity::Cluster(id),
        (found, Some(known)) => Identity::Replaced { found, known },
        (None, None) => {
            let reason = format!("key {KEY:?} was there, and is gone again: is it being wiped?");
            return Err(StoreError::Failed { store: store.name(), reason });
        }
    })
}

/// Writes the identity, or reads the one that somebody else has just written.
async fn create(store: &dyn Store, id: ClusterId) -> Result<Option<ClusterId>, StoreError> {
    let failed = |reason| StoreError::Failed { store: store.name(), reason };
    let record = serde_json::to_vec(&Record { schema: SCHEMA, id });
    let record = record.map_err(|e| failed(e.to_string()))?;
    match store.commit(Transaction::new().absent(KEY).put(KEY, record)).await? {
        Outcome::Committed(_) => Ok(Some(id)),
        Outcome::Conflict => find(store).await,
    }
}

async fn find(store: &dyn Store) -> Result<Option<ClusterId>, StoreError> {
    let Some(entry) = store.get(KEY).await? else { return Ok(None) };
    let failed = |e: serde_json::Error| StoreError::Failed {
        store: store.name(),
        reason: format!("key {KEY:?} is not netctl's ({e}): is this the right store and prefix?"),
    };
    let Version { schema } = serde_json::from_slice(&entry.value).map_err(failed)?;
    if schema > SCHEMA {
        return Err(StoreError::Newer { store: store.name(), found: schema, known: SCHEMA });
    }
    let record: Record = serde_json::from_slice(&entry.value).map_err(failed)?;
    Ok(Some(record.id))
}
