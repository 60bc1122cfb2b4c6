//! What every store does: watches.

use std::sync::Arc;

use netctl::store::{Change, Event, Revision, Store, Transaction};
use tokio::task::JoinSet;

use crate::ground::{Fact, Mirror, commit, facts, next};

pub fn facts() -> Vec<(&'static str, Fact)> {
    facts![
        a_watch_begins_with_a_snapshot_and_goes_on_with_changes,
        a_watch_from_a_revision_gets_what_came_after_it,
        a_watch_from_a_revision_of_the_future_gets_a_snapshot,
        a_watch_hears_of_its_prefix_only,
        a_transaction_is_one_report,
        a_watch_under_concurrent_writes_has_no_gap_and_no_duplicate,
        a_receiver_that_does_not_read_delays_nobody_and_catches_up,
        a_hundred_watches_see_the_same,
        a_watch_ends_with_its_store,
    ]
}

async fn a_watch_begins_with_a_snapshot_and_goes_on_with_changes(store: Arc<dyn Store>) {
    let first = commit(&*store, Transaction::new().put("a", "1").put("b", "1")).await;
    let mut watch = store.watch("", None);
    let Event::Snapshot(listing) = next(&mut watch).await else { panic!("no snapshot") };
    assert_eq!(listing, store.list("").await.unwrap());
    assert_eq!(listing.revision, first);
    let second = commit(&*store, Transaction::new().put("a", "2")).await;
    let Event::Changes(revision, changes) = next(&mut watch).await else { panic!("no changes") };
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!((revision, changes), (second, vec![Change::Put("a".to_owned(), entry)]));
    let third = commit(&*store, Transaction::new().delete("a")).await;
    let deleted = Event::Changes(third, vec![Change::Delete("a".to_owned())]);
    assert_eq!(next(&mut watch).await, deleted);
}

async fn a_watch_from_a_revision_gets_what_came_after_it(store: Arc<dyn Store>) {
    let first = commit(&*store, Transaction::new().put("a", "1")).await;
    let second = commit(&*store, Transaction::new().put("b", "2")).await;
    let third = commit(&*store, Transaction::new().put("c", "3")).await;
    let mut mirror = Mirror { revision: first, ..Mirror::default() };
    mirror.follow(&mut store.watch("", Some(first)), third).await;
    assert_eq!(mirror.puts, [("b".to_owned(), second), ("c".to_owned(), third)]);
    assert_eq!(mirror.snapshots, 0);
    let mut watch = store.watch("", Some(third));
    let fourth = commit(&*store, Transaction::new().put("d", "4")).await;
    let Event::Changes(revision, _) = next(&mut watch).await else { panic!("no changes") };
    assert_eq!(revision, fourth, "what was known is not repeated");
}

async fn a_watch_from_a_revision_of_the_future_gets_a_snapshot(store: Arc<dyn Store>) {
    let now = commit(&*store, Transaction::new().put("a", "1")).await;
    let mut watch = store.watch("", Some(Revision(now.0 + 1000)));
    let Event::Snapshot(listing) = next(&mut watch).await else { panic!("no snapshot") };
    assert_eq!(listing.revision, now);
    commit(&*store, Transaction::new().put("a", "2")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
}

async fn a_watch_hears_of_its_prefix_only(store: Arc<dyn Store>) {
    commit(&*store, Transaction::new().put("a/1", "").put("ab", "").put("a", "")).await;
    let mut watch = store.watch("a/", None);
    let Event::Snapshot(listing) = next(&mut watch).await else { panic!("no snapshot") };
    assert_eq!(listing.entries.into_keys().collect::<Vec<_>>(), ["a/1"]);
    commit(&*store, Transaction::new().put("ab", "2").put("a", "2")).await;
    let last = commit(&*store, Transaction::new().put("b", "").put("a/2", "").delete("ab")).await;
    let entry = store.get("a/2").await.unwrap().unwrap();
    let changes = Event::Changes(last, vec![Change::Put("a/2".to_owned(), entry)]);
    assert_eq!(next(&mut watch).await, changes);
}

async fn a_transaction_is_one_report(store: Arc<dyn Store>) {
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    let large = vec![7; 8000];
    for round in 0..10 {
        let transaction = (0..Transaction::MAX_STEPS)
            .fold(Transaction::new(), |t, i| t.put(format!("{round}/{i}"), large.clone()));
        commit(&*store, transaction).await;
    }
    let mut reported = 0;
    while reported < 10 * Transaction::MAX_STEPS {
        let Event::Changes(_, changes) = next(&mut watch).await else { panic!("no changes") };
        assert_eq!(changes.len() % Transaction::MAX_STEPS, 0, "a transaction was divided");
        reported += changes.len();
    }
}

async fn a_watch_under_concurrent_writes_has_no_gap_and_no_duplicate(store: Arc<dyn Store>) {
    const WRITERS: usize = 8;
    const WRITES: usize = 50;
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            let mut written = Vec::new();
            for round in 0..WRITES {
                let key = format!("{writer}/{}", round % 7);
                let transaction = Transaction::new().put(&key, format!("{round}"));
                written.push((key, commit(&*store, transaction).await));
            }
            written
        });
    }
    // These begin somewhere in the middle of it.
    let mut watches: Vec<_> = (0..4).map(|_| (Mirror::default(), store.watch("", None))).collect();
    let mut written = Vec::new();
    while let Some(ended) = writers.join_next().await {
        written.extend(ended.unwrap());
    }
    written.sort_by_key(|(_, revision)| *revision);
    let last = written.last().unwrap().1;
    let listing = store.list("").await.unwrap();
    for (mirror, watch) in &mut watches {
        mirror.take(next(watch).await);
        let start = mirror.revision;
        mirror.follow(watch, last).await;
        let after: Vec<_> = written.iter().filter(|(_, at)| *at > start).cloned().collect();
        assert_eq!(mirror.puts, after);
        assert_eq!(mirror.snapshots, 1);
        let expected = listing.entries.iter().map(|(key, entry)| (key.clone(), entry.value.clone()));
        assert_eq!(mirror.entries, expected.collect());
    }
}

async fn a_receiver_that_does_not_read_delays_nobody_and_catches_up(store: Arc<dyn Store>) {
    let mut slow = store.watch("", None);
    let mut quick = store.watch("", None);
    let mut last = Revision(0);
    let mut seen = Mirror::default();
    for round in 0..200 {
        let transaction = (0..20).fold(Transaction::new(), |transaction, key| {
            transaction.put(format!("{key}"), format!("{round:0>4000}"))
        });
        last = commit(&*store, transaction).await;
        seen.follow(&mut quick, last).await;
    }
    let mut mirror = Mirror::default();
    mirror.follow(&mut slow, last).await;
    assert_eq!(mirror.entries, seen.entries);
}

async fn a_hundred_watches_see_the_same(store: Arc<dyn Store>) {
    let mut watches: Vec<_> = (0..100).map(|_| (Mirror::default(), store.watch("k/", None))).collect();
    let mut last = Revision(0);
    for round in 0..20 {
        last = commit(&*store, Transaction::new().put(format!("k/{round}"), "")).await;
    }
    for (mirror, watch) in &mut watches {
        mirror.follow(watch, last).await;
        assert_eq!((mirror.entries.len(), mirror.lost), (20, 0));
    }
}

async fn a_watch_ends_with_its_store(store: Arc<dyn Store>) {
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    assert_eq!(Arc::strong_count(&store), 1);
    drop(store);
    let end = tokio::time::timeout(crate::ground::PATIENCE, watch.recv()).await;
    assert_eq!(end.expect("an end in time"), None);
}
