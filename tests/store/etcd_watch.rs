//! What a watch on etcd does when etcd goes away, forgets, or comes back as another.

use netctl::store::etcd::Etcd;
use netctl::store::{Event, Revision, Store, Transaction, Watch};

use crate::ground::{Mirror, Server, Test, commit, free_port, next, tests};

pub fn tests() -> Vec<(&'static str, Test)> {
    tests![
    "etcd":
    a_watch_begun_while_etcd_is_down_begins_when_it_is_up,
    a_watch_goes_on_after_a_restart_without_a_snapshot,
    a_watch_notices_that_etcd_is_frozen_and_goes_on,
    an_outage_is_reported_once,
    a_watch_from_a_compacted_revision_gets_a_snapshot,
    a_watch_whose_history_is_compacted_while_it_is_away_gets_a_snapshot,
    a_wiped_store_is_a_snapshot_without_the_keys,
    a_wiped_store_that_has_overtaken_the_revision_is_a_snapshot,
    a_store_restored_from_a_copy_is_a_snapshot,
    a_watch_on_nothing_survives_a_wipe,
    ]
}

async fn snapshot(watch: &mut Watch) -> (Revision, Vec<String>) {
    match next(watch).await {
        Event::Snapshot(listing) => (listing.revision, listing.entries.into_keys().collect()),
        other => panic!("no snapshot but {other:?}"),
    }
}

async fn lost(watch: &mut Watch) {
    let event = next(watch).await;
    assert!(matches!(&event, Event::Lost(reason) if !reason.is_empty()), "{event:?}");
}

async fn back(watch: &mut Watch, at: Revision) {
    assert_eq!(next(watch).await, Event::Changes(at, Vec::new()));
}

async fn a_watch_begun_while_etcd_is_down_begins_when_it_is_up() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    let first = commit(&store, Transaction::new().put("a", "1")).await;
    server.stop();
    let (mut without, mut with) = (store.watch("", None), store.watch("", Some(first)));
    lost(&mut without).await;
    lost(&mut with).await;
    server.restart().await;
    assert_eq!(snapshot(&mut without).await.1, ["a"]);
    back(&mut with, first).await;
    commit(&store, Transaction::new().put("b", "2")).await;
    assert!(matches!(next(&mut without).await, Event::Changes(..)));
    assert!(matches!(next(&mut with).await, Event::Changes(..)));
}

async fn a_watch_goes_on_after_a_restart_without_a_snapshot() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("a", "1").put("b", "1")).await;
    let mut watch = store.watch("", None);
    let mut mirror = Mirror::default();
    mirror.take(next(&mut watch).await);
    for round in 0..3 {
        server.restart().await;
        let write = Transaction::new().put("a", format!("{round}")).delete("b").put("c", "1");
        let last = commit(&store, write).await;
        mirror.follow(&mut watch, last).await;
        assert_eq!((mirror.snapshots, mirror.lost), (1, round + 1));
        assert_eq!(mirror.entries.keys().collect::<Vec<_>>(), ["a", "c"]);
    }
}

async fn a_watch_notices_that_etcd_is_frozen_and_goes_on() {
    let server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    let first = commit(&store, Transaction::new().put("a", "1")).await;
    let mut watch = store.watch("", None);
    snapshot(&mut watch).await;
    server.freeze().await;
    lost(&mut watch).await;
    server.thaw();
    back(&mut watch, first).await;
    commit(&store, Transaction::new().put("a", "2")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
}

async fn an_outage_is_reported_once() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    let first = commit(&store, Transaction::new().put("a", "1")).await;
    let mut watch = store.watch("", None);
    snapshot(&mut watch).await;
    server.stop();
    lost(&mut watch).await;
    // Long enough for several attempts.
    let more = tokio::time::timeout(std::time::Duration::from_secs(4), watch.recv()).await;
    assert!(more.is_err(), "{more:?}");
    server.restart().await;
    back(&mut watch, first).await;
}

async fn compact(server: &Server, at: Revision) {
    let at = i64::try_from(at.0).unwrap();
    server.client().await.compact(at, None).await.unwrap();
}

async fn a_watch_from_a_compacted_revision_gets_a_snapshot() {
    let server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    let first = commit(&store, Transaction::new().put("a", "1").put("b", "1")).await;
    commit(&store, Transaction::new().delete("a")).await;
    let last = commit(&store, Transaction::new().put("c", "1")).await;
    compact(&server, last).await;
    let mut watch = store.watch("", Some(first));
    let (revision, keys) = snapshot(&mut watch).await;
    assert_eq!(revision, last);
    assert_eq!(keys, ["b", "c"]);
    commit(&store, Transaction::new().put("d", "1")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
}

async fn a_watch_whose_history_is_compacted_while_it_is_away_gets_a_snapshot() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("a", "1").put("b", "1")).await;
    let mut watch = store.watch("", None);
    snapshot(&mut watch).await;
    let here = server.port();
    server.move_to(free_port());
    server.restart().await;
    lost(&mut watch).await;
    let elsewhere = Etcd::new(server.config()).unwrap();
    commit(&elsewhere, Transaction::new().delete("a")).await;
    let last = commit(&elsewhere, Transaction::new().put("c", "1")).await;
    compact(&server, last).await;
    server.move_to(here);
    server.restart().await;
    assert_eq!(snapshot(&mut watch).await, (last, vec!["b".to_owned(), "c".to_owned()]));
    commit(&store, Transaction::new().put("d", "1")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
}

async fn a_wiped_store_is_a_snapshot_without_the_keys() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    for i in 0..10 {
        commit(&store, Transaction::new().put(format!("{i}"), "")).await;
    }
    let mut watch = store.watch("", None);
    assert_eq!(snapshot(&mut watch).await.1.len(), 10);
    server.wipe().await;
    lost(&mut watch).await;
    assert_eq!(snapshot(&mut watch).await, (Revision(1), Vec::new()));
    commit(&store, Transaction::new().put("new", "")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(Revision(2), _)));
}

async fn a_wiped_store_that_has_overtaken_the_revision_is_a_snapshot() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    for i in 0..3 {
        commit(&store, Transaction::new().put(format!("{i}"), "")).await;
    }
    let mut watch = store.watch("", None);
    assert_eq!(snapshot(&mut watch).await.1.len(), 3);
    let here = server.port();
    server.move_to(free_port());
    server.wipe().await;
    lost(&mut watch).await;
    let elsewhere = Etcd::new(server.config()).unwrap();
    for i in 0..10 {
        commit(&elsewhere, Transaction::new().put(format!("other {i}"), "")).await;
    }
    server.move_to(here);
    server.restart().await;
    let (revision, keys) = snapshot(&mut watch).await;
    assert_eq!(revision, Revision(11));
    assert!(keys.len() == 10 && keys.iter().all(|key| key.starts_with("other")), "{keys:?}");
}

async fn a_store_restored_from_a_copy_is_a_snapshot() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("old", "")).await;
    server.stop();
    let copy = server.copy();
    server.restart().await;
    commit(&store, Transaction::new().put("newer", "")).await;
    let mut watch = store.watch("", None);
    assert_eq!(snapshot(&mut watch).await.1, ["newer", "old"]);
    server.stop();
    lost(&mut watch).await;
    server.restore(&copy).await;
    let (_, keys) = snapshot(&mut watch).await;
    assert_eq!(keys, ["old"]);
}

async fn a_watch_on_nothing_survives_a_wipe() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("elsewhere/a", "")).await;
    let mut watch = store.watch("here/", None);
    assert!(snapshot(&mut watch).await.1.is_empty());
    server.wipe().await;
    lost(&mut watch).await;
    assert!(snapshot(&mut watch).await.1.is_empty());
    commit(&store, Transaction::new().put("here/b", "")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
}
