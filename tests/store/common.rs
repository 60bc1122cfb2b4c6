//! What every store does: reading, and transactions.

use std::sync::Arc;

use netctl::store::{Outcome, Revision, Store, StoreError, Transaction};
use tokio::task::JoinSet;

use crate::ground::{Fact, commit, facts, value};

pub fn facts() -> Vec<(&'static str, Fact)> {
    facts![
        a_key_that_was_never_written_is_none,
        a_value_is_read_back_as_it_was_written,
        a_listing_is_in_the_order_of_keys,
        a_prefix_ends_where_it_ends,
        ten_thousand_keys_are_one_listing,
        a_transaction_has_one_revision_and_its_keys_carry_it,
        the_revision_grows_by_one_with_each_change,
        a_transaction_that_changes_nothing_has_no_revision_of_its_own,
        a_conflict_writes_nothing,
        a_comparison_with_the_last_revision_holds_and_with_another_does_not,
        a_key_that_was_removed_is_absent,
        of_concurrent_compare_and_sets_exactly_one_wins,
        a_counter_that_many_raise_at_once_loses_nothing,
        a_transaction_that_breaks_the_rules_is_an_error_and_does_nothing,
        a_transaction_may_be_as_large_as_the_limits_say,
    ]
}

async fn a_key_that_was_never_written_is_none(store: Arc<dyn Store>) {
    assert_eq!(store.get("a").await.unwrap(), None);
    assert_eq!(store.get("").await.unwrap(), None);
    assert!(store.list("").await.unwrap().entries.is_empty());
}

async fn a_value_is_read_back_as_it_was_written(store: Arc<dyn Store>) {
    let every_byte: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = every_byte.iter().copied().cycle().take(100 << 10).collect();
    for value in [Vec::new(), every_byte, large] {
        commit(&*store, Transaction::new().put("some/key", value.clone())).await;
        assert_eq!(store.get("some/key").await.unwrap().unwrap().value, value);
        assert_eq!(store.list("some").await.unwrap().entries["some/key"].value, value);
    }
}

async fn a_listing_is_in_the_order_of_keys(store: Arc<dyn Store>) {
    for key in ["b", "a/2", "a/10", "a", "ä", "a/1"] {
        commit(&*store, Transaction::new().put(key, key)).await;
    }
    let listing = store.list("").await.unwrap();
    let keys: Vec<_> = listing.entries.keys().collect();
    assert_eq!(keys, ["a", "a/1", "a/10", "a/2", "b", "ä"]);
    assert!(listing.entries.iter().all(|(key, entry)| key.as_bytes() == entry.value));
}

async fn a_prefix_ends_where_it_ends(store: Arc<dyn Store>) {
    for key in ["a", "a/", "a/b", "a/b/c", "a0", "ab", "b", "\u{7f}", "\u{10ffff}x"] {
        commit(&*store, Transaction::new().put(key, key)).await;
    }
    let keys = async |prefix| -> Vec<String> {
        store.list(prefix).await.unwrap().entries.into_keys().collect()
    };
    assert_eq!(keys("a/").await, ["a/", "a/b", "a/b/c"]);
    assert_eq!(keys("a/b").await, ["a/b", "a/b/c"]);
    assert_eq!(keys("a").await, ["a", "a/", "a/b", "a/b/c", "a0", "ab"]);
    assert_eq!(keys("\u{7f}").await, ["\u{7f}"]);
    assert_eq!(keys("\u{10ffff}").await, ["\u{10ffff}x"]);
    assert!(keys("c").await.is_empty());
}

async fn ten_thousand_keys_are_one_listing(store: Arc<dyn Store>) {
    let body = "e".repeat(490);
    let mut last = Revision(0);
    for hundred in 0..100 {
        let range = hundred * 100..(hundred + 1) * 100;
        let transaction =
            range.fold(Transaction::new(), |t, i| t.put(format!("e/{i:05}"), format!("{i:05}{body}")));
        last = commit(&*store, transaction).await;
    }
    let listing = store.list("e/").await.unwrap();
    assert_eq!(listing.entries.len(), 10_000);
    assert_eq!(listing.revision, last);
    for (i, (key, entry)) in listing.entries.iter().enumerate() {
        assert_eq!(*key, format!("e/{i:05}"));
        assert!(entry.value.starts_with(format!("{i:05}").as_bytes()));
    }
}

async fn a_transaction_has_one_revision_and_its_keys_carry_it(store: Arc<dyn Store>) {
    let revision = commit(&*store, Transaction::new().put("a", "1").put("b", "2")).await;
    for key in ["a", "b"] {
        assert_eq!(store.get(key).await.unwrap().unwrap().modified, revision);
    }
    let later = commit(&*store, Transaction::new().put("b", "3").delete("c")).await;
    let listing = store.list("").await.unwrap();
    assert_eq!(listing.entries["a"].modified, revision);
    assert_eq!(listing.entries["b"].modified, later);
    assert_eq!(listing.revision, later);
}

async fn the_revision_grows_by_one_with_each_change(store: Arc<dyn Store>) {
    let mut last = store.list("").await.unwrap().revision;
    for _ in 0..10 {
        let revision = commit(&*store, Transaction::new().put("a", "same").put("b", "same")).await;
        assert_eq!(revision.0, last.0 + 1);
        last = revision;
    }
    let removed = commit(&*store, Transaction::new().delete("a")).await;
    assert_eq!(removed.0, last.0 + 1);
}

async fn a_transaction_that_changes_nothing_has_no_revision_of_its_own(store: Arc<dyn Store>) {
    let revision = commit(&*store, Transaction::new().put("a", "1")).await;
    assert_eq!(commit(&*store, Transaction::new()).await, revision);
    assert_eq!(commit(&*store, Transaction::new().modified("a", revision)).await, revision);
    assert_eq!(commit(&*store, Transaction::new().delete("never was")).await, revision);
}

async fn a_conflict_writes_nothing(store: Arc<dyn Store>) {
    let revision = commit(&*store, Transaction::new().put("a", "1")).await;
    let conflicting =
        Transaction::new().absent("b").modified("a", revision).absent("a").put("b", "2").delete("a");
    assert_eq!(store.commit(conflicting).await.unwrap(), Outcome::Conflict);
    assert_eq!(value(&*store, "a").await.as_deref(), Some("1"));
    assert_eq!(value(&*store, "b").await, None);
    assert_eq!(store.list("").await.unwrap().revision, revision);
}

async fn a_comparison_with_the_last_revision_holds_and_with_another_does_not(store: Arc<dyn Store>) {
    let first = commit(&*store, Transaction::new().put("a", "1").put("b", "1")).await;
    let second = commit(&*store, Transaction::new().modified("a", first).put("a", "2")).await;
    let stale = Transaction::new().modified("a", first).put("a", "3");
    assert_eq!(store.commit(stale).await.unwrap(), Outcome::Conflict);
    let future = Transaction::new().modified("a", Revision(second.0 + 1)).put("a", "3");
    assert_eq!(store.commit(future).await.unwrap(), Outcome::Conflict);
    let missing = Transaction::new().modified("never was", second).put("a", "3");
    assert_eq!(store.commit(missing).await.unwrap(), Outcome::Conflict);
    let both = Transaction::new().modified("a", second).modified("b", first).put("a", "3");
    commit(&*store, both).await;
    assert_eq!(value(&*store, "a").await.as_deref(), Some("3"));
}

async fn a_key_that_was_removed_is_absent(store: Arc<dyn Store>) {
    let first = commit(&*store, Transaction::new().absent("a").put("a", "1")).await;
    let again = Transaction::new().absent("a").put("a", "2");
    assert_eq!(store.commit(again.clone()).await.unwrap(), Outcome::Conflict);
    commit(&*store, Transaction::new().delete("a")).await;
    let stale = Transaction::new().modified("a", first).put("a", "3");
    assert_eq!(store.commit(stale).await.unwrap(), Outcome::Conflict);
    commit(&*store, again).await;
    assert_eq!(value(&*store, "a").await.as_deref(), Some("2"));
}

async fn of_concurrent_compare_and_sets_exactly_one_wins(store: Arc<dyn Store>) {
    let mut last = commit(&*store, Transaction::new().put("contended", "-")).await;
    for _ in 0..10 {
        let mut runners = JoinSet::new();
        for runner in 0..16 {
            let store = store.clone();
            let transaction = Transaction::new()
                .modified("contended", last)
                .put("contended", format!("{runner}"))
                .put(format!("mark/{runner}"), "won");
            runners.spawn(async move { (runner, store.commit(transaction).await.unwrap()) });
        }
        let mut winners = Vec::new();
        while let Some(ended) = runners.join_next().await {
            if let (runner, Outcome::Committed(revision)) = ended.unwrap() {
                winners.push(runner);
                last = revision;
            }
        }
        let [winner] = winners[..] else { panic!("{winners:?} won") };
        assert_eq!(value(&*store, "contended").await, Some(format!("{winner}")));
        let marks = store.list("mark/").await.unwrap();
        assert_eq!(marks.entries.into_keys().collect::<Vec<_>>(), [format!("mark/{winner}")]);
        commit(&*store, Transaction::new().delete(format!("mark/{winner}"))).await;
    }
}

async fn a_counter_that_many_raise_at_once_loses_nothing(store: Arc<dyn Store>) {
    commit(&*store, Transaction::new().put("counter", "0")).await;
    let mut runners = JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        runners.spawn(async move {
            let mut done = 0;
            while done < 10 {
                let entry = store.get("counter").await.unwrap().unwrap();
                let count: u32 = String::from_utf8(entry.value).unwrap().parse().unwrap();
                let raise = Transaction::new()
                    .modified("counter", entry.modified)
                    .put("counter", format!("{}", count + 1));
                if let Outcome::Committed(_) = store.commit(raise).await.unwrap() {
                    done += 1;
                }
            }
        });
    }
    while let Some(ended) = runners.join_next().await {
        ended.unwrap();
    }
    assert_eq!(value(&*store, "counter").await.as_deref(), Some("80"));
}

async fn a_transaction_that_breaks_the_rules_is_an_error_and_does_nothing(store: Arc<dyn Store>) {
    let revision = store.list("").await.unwrap().revision;
    let many = |count| (0..count).fold(Transaction::new(), |t, i| t.put(format!("{i}"), ""));
    let wrong = [
        Transaction::new().put("a", "1").put("a", "2"),
        Transaction::new().put("a", "1").delete("a"),
        Transaction::new().delete("a").delete("a"),
        Transaction::new().put("", "1"),
        Transaction::new().absent("").put("a", "1"),
        Transaction::new().modified("a", Revision(0)).put("a", "1"),
        many(Transaction::MAX_STEPS + 1),
        Transaction::new().put("a", vec![0; Transaction::MAX_BYTES]),
    ];
    for transaction in wrong {
        let error = store.commit(transaction).await.unwrap_err();
        assert!(matches!(error, StoreError::Failed { .. }), "{error}");
    }
    let listing = store.list("").await.unwrap();
    assert_eq!((listing.revision, listing.entries.len()), (revision, 0));
}

async fn a_transaction_may_be_as_large_as_the_limits_say(store: Arc<dyn Store>) {
    let steps = (0..Transaction::MAX_STEPS).fold(Transaction::new(), |transaction, i| {
        transaction.absent(format!("{i}")).put(format!("{i}"), "")
    });
    commit(&*store, steps).await;
    commit(&*store, Transaction::new().put("a", vec![0; Transaction::MAX_BYTES - 1])).await;
    assert_eq!(store.list("").await.unwrap().entries.len(), Transaction::MAX_STEPS + 1);
}
