use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;

use super::*;
use crate::model::ClusterId;
use crate::store::embedded::Embedded;
use crate::store::{Lease, Outcome, Store, StoreError, Transaction, Watch};

/// A store whose watches go on while nothing can be asked.
struct Deaf {
    inner: Arc<Embedded>,
    deaf: AtomicBool,
    asked: std::sync::atomic::AtomicUsize,
}

#[async_trait]
impl Store for Deaf {
    fn name(&self) -> String {
        "deaf".to_owned()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.deaf.load(Ordering::Relaxed) {
            let reason = "no answer".to_owned();
            return Err(StoreError::Unreachable { store: self.name(), reason });
        }
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
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }
}

/// Waits for a state of the view.
async fn known(view: &View, fact: impl Fn(&Published) -> bool) -> Published {
    let mut published = view.subscribe();
    let found = tokio::time::timeout(Duration::from_secs(20), published.wait_for(fact)).await;
    found.expect("it comes about").unwrap().clone()
}

fn drains(published: &Published) -> Vec<String> {
    published.snapshot.drained.keys().map(ToString::to_string).collect()
}

#[tokio::test]
async fn what_is_taken_away_while_the_store_cannot_be_asked_is_believed_when_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let inner = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
    schema::identify(&*inner, None, ClusterId::random(&mut rand::rng())).await.unwrap();
    let deaf = Deaf { inner: inner.clone(), deaf: AtomicBool::new(false), asked: Default::default() };
    let store = Arc::new(deaf);
    let me: NodeName = "n1".parse().unwrap();
    let cluster = Cluster::new(store.clone(), me.clone(), Duration::ZERO).await.unwrap();
    let put = async |key: String| inner.commit(Transaction::new().put(key, [])).await.unwrap();
    let drained = |name: &str| keys::drained(&name.parse().unwrap());
    put(drained("n2")).await;
    let view = View::start(Arc::new(cluster), me, Vec::new());
    known(&view, |published| published.health == Health::Current && drains(published) == ["n2"]).await;

    store.deaf.store(true, Ordering::Relaxed);
    // That a node goes has to be verified; what comes behind it in the same moment makes no sense alone.
    let gone = Transaction::new().delete(keys::node(&"n2".parse().unwrap())).delete(drained("n2"));
    inner.commit(Transaction::new().put(keys::node(&"n2".parse().unwrap()), [])).await.unwrap();
    inner.commit(gone).await.unwrap();
    put(drained("n3")).await;
    let lost = known(&view, |published| matches!(published.health, Health::Lost(_))).await;
    assert!(
        matches!(&lost.health, Health::Lost(reason) if reason.contains("deaf")),
        "{:?}",
        lost.health
    );
    assert_eq!(drains(&lost), ["n2"]);

    // It is asked again, and again, with pauses that grow.
    let asked = store.asked.load(Ordering::Relaxed);
    let more = tokio::time::timeout(Duration::from_secs(20), async {
        while store.asked.load(Ordering::Relaxed) < asked + 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    more.await.expect("it is asked again");
    assert_eq!(drains(&view.latest()), ["n2"]);

    store.deaf.store(false, Ordering::Relaxed);
    let back = known(&view, |published| published.health == Health::Current).await;
    assert_eq!(drains(&back), ["n3"]);
}
