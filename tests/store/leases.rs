//! What every store does: leases.

use std::sync::Arc;
use std::time::{Duration, Instant};

use netctl::store::{Change, Entry, Event, Lease, Store, StoreError, Transaction};

use crate::ground::{Fact, commit, facts, next, value};

const TTL: Duration = Duration::from_secs(2);

pub fn facts() -> Vec<(&'static str, Fact)> {
    facts![
        the_keys_of_a_lease_vanish_when_it_ends_and_a_watch_hears_of_it,
        a_lease_that_is_kept_alive_does_not_end,
        the_keys_of_a_revoked_lease_vanish_as_one_transaction,
        a_lease_that_has_ended_cannot_be_kept_alive_and_may_be_revoked,
        a_write_under_a_lease_that_is_gone_is_an_error_and_does_nothing,
        a_key_belongs_to_the_lease_it_was_written_under_last,
        leases_are_made_without_a_revision,
    ]
}

async fn the_keys_of_a_lease_vanish_when_it_ends_and_a_watch_hears_of_it(store: Arc<dyn Store>) {
    let start = Instant::now();
    let lease = store.grant(TTL).await.unwrap();
    commit(&*store, Transaction::new().put_leased("leased", "", lease).put("stays", "")).await;
    let mut watch = store.watch("", None);
    let Event::Snapshot(listing) = next(&mut watch).await else { panic!("no snapshot") };
    assert_eq!(listing.entries.len(), 2);
    let Event::Changes(revision, changes) = next(&mut watch).await else { panic!("no changes") };
    assert!(start.elapsed() >= TTL, "it ended after {:?}", start.elapsed());
    assert_eq!(changes, [Change::Delete("leased".to_owned())]);
    let listing = store.list("").await.unwrap();
    assert_eq!(listing.revision, revision);
    assert_eq!(listing.entries.into_keys().collect::<Vec<_>>(), ["stays"]);
    assert!(matches!(store.keep_alive(lease).await, Err(StoreError::LeaseGone(id)) if id == lease.0));
}

async fn a_lease_that_is_kept_alive_does_not_end(store: Arc<dyn Store>) {
    let (kept, left) = (store.grant(TTL).await.unwrap(), store.grant(TTL).await.unwrap());
    let both = Transaction::new().put_leased("kept", "", kept).put_leased("left", "", left);
    commit(&*store, both).await;
    // Until the other one has ended for as long as both were to live.
    let mut ended: Option<Instant> = None;
    while ended.is_none_or(|at| at.elapsed() < TTL) {
        store.keep_alive(kept).await.unwrap();
        assert!(store.get("kept").await.unwrap().is_some());
        if ended.is_none() && store.get("left").await.unwrap().is_none() {
            ended = Some(Instant::now());
        }
        tokio::time::sleep(TTL / 10).await;
    }
}

async fn the_keys_of_a_revoked_lease_vanish_as_one_transaction(store: Arc<dyn Store>) {
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    commit(&*store, Transaction::new().put_leased("a", "", lease).put("b", "")).await;
    commit(&*store, Transaction::new().put_leased("c", "", lease)).await;
    let mut watch = store.watch("", None);
    let Event::Snapshot(listing) = next(&mut watch).await else { panic!("no snapshot") };
    store.revoke(lease).await.unwrap();
    let Event::Changes(revision, mut changes) = next(&mut watch).await else { panic!("no changes") };
    changes.sort_by_key(|change| format!("{change:?}"));
    assert_eq!(changes, [Change::Delete("a".to_owned()), Change::Delete("c".to_owned())]);
    assert_eq!(revision.0, listing.revision.0 + 1);
    assert_eq!(store.list("").await.unwrap().entries.len(), 1);
}

async fn a_lease_that_has_ended_cannot_be_kept_alive_and_may_be_revoked(store: Arc<dyn Store>) {
    let lease = store.grant(TTL).await.unwrap();
    store.revoke(lease).await.unwrap();
    for gone in [lease, Lease(4711)] {
        let error = store.keep_alive(gone).await.unwrap_err();
        assert!(matches!(error, StoreError::LeaseGone(id) if id == gone.0), "{error}");
        store.revoke(gone).await.unwrap();
    }
}

async fn a_write_under_a_lease_that_is_gone_is_an_error_and_does_nothing(store: Arc<dyn Store>) {
    let lease = store.grant(TTL).await.unwrap();
    store.revoke(lease).await.unwrap();
    let transaction = Transaction::new().put("a", "1").put_leased("b", "2", lease);
    let error = store.commit(transaction).await.unwrap_err();
    assert!(matches!(error, StoreError::LeaseGone(id) if id == lease.0), "{error}");
    assert!(store.list("").await.unwrap().entries.is_empty());
}

async fn a_key_belongs_to_the_lease_it_was_written_under_last(store: Arc<dyn Store>) {
    let first = store.grant(Duration::from_secs(600)).await.unwrap();
    let second = store.grant(Duration::from_secs(600)).await.unwrap();
    let transaction = Transaction::new().put_leased("free", "", first).put_leased("other", "", first);
    commit(&*store, transaction).await;
    commit(&*store, Transaction::new().put("free", "1").put_leased("other", "1", second)).await;
    let leased = |entry: Option<Entry>| entry.is_some_and(|entry| entry.leased);
    assert!(!leased(store.get("free").await.unwrap()) && leased(store.get("other").await.unwrap()));
    let listing = store.list("").await.unwrap();
    assert!(!listing.entries["free"].leased && listing.entries["other"].leased);
    store.revoke(first).await.unwrap();
    assert_eq!(store.list("").await.unwrap().entries.len(), 2);
    store.revoke(second).await.unwrap();
    assert_eq!(value(&*store, "other").await, None);
    assert_eq!(value(&*store, "free").await.as_deref(), Some("1"));
}

async fn leases_are_made_without_a_revision(store: Arc<dyn Store>) {
    let before = store.list("").await.unwrap().revision;
    let lease = store.grant(Duration::ZERO).await.unwrap();
    assert_ne!(store.grant(TTL).await.unwrap(), lease);
    store.revoke(lease).await.unwrap();
    assert_eq!(store.list("").await.unwrap().revision, before);
}
