//! Whose a store is.

use std::collections::BTreeSet;
use std::sync::Arc;

use netctl::model::ClusterId;
use netctl::store::schema::{Identity, KEY, identify};
use netctl::store::{Store, StoreError, Transaction};
use tokio::task::JoinSet;

use crate::ground::{Fact, commit, facts, value};

pub fn facts() -> Vec<(&'static str, Fact)> {
    facts![
        a_store_that_is_nobodys_is_given_an_identity_once,
        of_agents_that_begin_at_once_all_get_one_identity,
        a_store_with_another_identity_or_none_is_not_the_one_that_was_known,
        the_content_of_a_newer_version_is_refused,
        an_identity_that_cannot_be_read_is_refused,
    ]
}

fn fresh() -> ClusterId {
    ClusterId::random(&mut rand::rng())
}

async fn a_store_that_is_nobodys_is_given_an_identity_once(store: Arc<dyn Store>) {
    let id = fresh();
    assert_eq!(identify(&*store, None, id).await.unwrap(), Identity::Cluster(id));
    assert_eq!(value(&*store, KEY).await, Some(format!(r#"{{"schema":1,"id":"{id}"}}"#)));
    assert_eq!(identify(&*store, None, fresh()).await.unwrap(), Identity::Cluster(id));
    assert_eq!(identify(&*store, Some(id), fresh()).await.unwrap(), Identity::Cluster(id));
}

async fn of_agents_that_begin_at_once_all_get_one_identity(store: Arc<dyn Store>) {
    let mut agents = JoinSet::new();
    for _ in 0..16 {
        let store = store.clone();
        agents.spawn(async move { identify(&*store, None, fresh()).await.unwrap() });
    }
    let mut found = BTreeSet::new();
    while let Some(ended) = agents.join_next().await {
        match ended.unwrap() {
            Identity::Cluster(id) => found.insert(id),
            Identity::Replaced { .. } => panic!("nothing was known"),
        };
    }
    assert_eq!(found.len(), 1);
}

async fn a_store_with_another_identity_or_none_is_not_the_one_that_was_known(store: Arc<dyn Store>) {
    let (known, other) = (fresh(), fresh());
    let found = identify(&*store, Some(known), fresh()).await.unwrap();
    assert_eq!(found, Identity::Replaced { found: None, known });
    assert_eq!(value(&*store, KEY).await, None, "an agent with a past claims no empty store");
    identify(&*store, None, other).await.unwrap();
    let found = identify(&*store, Some(known), fresh()).await.unwrap();
    assert_eq!(found, Identity::Replaced { found: Some(other), known });
}

async fn the_content_of_a_newer_version_is_refused(store: Arc<dyn Store>) {
    commit(&*store, Transaction::new().put(KEY, r#"{"schema":2,"who":["knows"]}"#)).await;
    let error = identify(&*store, None, fresh()).await.unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 2, known: 1, .. }), "{error}");
}

async fn an_identity_that_cannot_be_read_is_refused(store: Arc<dyn Store>) {
    for text in ["", "{}", r#"{"schema":1}"#, r#"{"schema":1,"id":"x"}"#, "\u{0}\u{1}"] {
        commit(&*store, Transaction::new().put(KEY, text)).await;
        let error = identify(&*store, None, fresh()).await.unwrap_err();
        assert!(matches!(error, StoreError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("is this the right store"), "{error}");
    }
}
