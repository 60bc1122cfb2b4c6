//! What the etcd store promises when etcd is down, frozen, or partly there.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use netctl::store::etcd::{Etcd, EtcdConfig};
use netctl::store::{Store, StoreError, Transaction};

use crate::ground::{Server, Test, commit, eventually, free_port, tests, value};

pub fn tests() -> Vec<(&'static str, Test)> {
    tests![
    "etcd":
    prefixes_do_not_see_each_other,
    a_prefix_is_a_folder_and_may_be_empty,
    a_configuration_that_contradicts_itself_is_refused,
    a_store_made_while_etcd_is_down_works_when_it_is_up,
    every_call_fails_within_two_seconds_while_etcd_is_stopped,
    every_call_fails_within_two_seconds_while_etcd_is_frozen,
    many_calls_at_once_fail_within_two_seconds_while_etcd_is_frozen,
    a_first_endpoint_that_is_dead_does_not_matter,
    a_first_endpoint_that_never_answers_does_not_matter,
    another_endpoint_takes_over_while_the_store_is_used,
    ]
}

async fn prefixes_do_not_see_each_other() {
    let server = Server::start().await;
    let store =
        |prefix: &str| Etcd::new(EtcdConfig { prefix: prefix.to_owned(), ..server.config() }).unwrap();
    let (a, ab) = (store("a"), store("ab/"));
    commit(&a, Transaction::new().absent("key").put("key", "of a")).await;
    commit(&ab, Transaction::new().absent("key").put("key", "of ab")).await;
    assert_eq!(value(&a, "key").await.as_deref(), Some("of a"));
    assert_eq!(a.list("").await.unwrap().entries.len(), 1);
    commit(&ab, Transaction::new().delete("key")).await;
    assert_eq!(a.list("").await.unwrap().entries.len(), 1);
}

async fn a_prefix_is_a_folder_and_may_be_empty() {
    let server = Server::start().await;
    let some = Etcd::new(EtcdConfig { prefix: "some/where".to_owned(), ..server.config() }).unwrap();
    commit(&some, Transaction::new().put("key", "value")).await;
    let all = Etcd::new(EtcdConfig { prefix: String::new(), ..server.config() }).unwrap();
    let keys: Vec<_> = all.list("").await.unwrap().entries.into_keys().collect();
    assert_eq!(keys, ["some/where/key"]);
    assert_eq!(value(&all, "some/where/key").await.as_deref(), Some("value"));
}

async fn a_configuration_that_contradicts_itself_is_refused() {
    let plain = EtcdConfig::default;
    let https = || EtcdConfig { endpoints: vec!["https://127.0.0.1:1".to_owned()], ..plain() };
    let path = |name: &str| Some(std::path::PathBuf::from(name));
    let cases = [
        (EtcdConfig { endpoints: Vec::new(), ..plain() }, "no endpoint"),
        (EtcdConfig { user: Some("root".to_owned()), ..plain() }, "without a password"),
        (EtcdConfig { password: Some("secret".to_owned()), ..plain() }, "without a user"),
        (https(), "needs the certificate of its authority"),
        (EtcdConfig { ca: path("/no/such/ca"), ..https() }, "/no/such/ca: No such file"),
        (EtcdConfig { ca: path("/etc/hostname"), ..plain() }, "is not https"),
        (EtcdConfig { certificate: path("/etc/hostname"), ..plain() }, "without a ca"),
        (
            EtcdConfig { ca: path("/etc/passwd"), key: path("/etc/hostname"), ..https() },
            "/etc/hostname is given without its certificate",
        ),
    ];
    for (config, expected) in cases {
        assert!(!format!("{config:?}").contains("secret"));
        let error = Etcd::new(config).err().expect("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

async fn a_store_made_while_etcd_is_down_works_when_it_is_up() {
    let mut server = Server::start().await;
    server.stop();
    let store = Etcd::new(server.config()).unwrap();
    let error = store.get("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&server.url()), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    server.restart().await;
    commit(&store, Transaction::new().put("a", "1")).await;
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
}

/// Makes every kind of call; all must fail, each within what the contract says.
async fn all_fail_in_time(store: &Etcd) {
    let limit = Duration::from_secs(2);
    let start = Instant::now();
    let in_time = |what: &str, start: Instant, error: StoreError| {
        let elapsed = start.elapsed();
        assert!(elapsed < limit, "{what} took {elapsed:?}");
        assert!(matches!(error, StoreError::Unreachable { .. }), "{what}: {error}");
    };
    in_time("get", start, store.get("a").await.unwrap_err());
    let start = Instant::now();
    in_time("list", start, store.list("").await.unwrap_err());
    let start = Instant::now();
    let transaction = Transaction::new().put("a", "2");
    in_time("commit", start, store.commit(transaction).await.unwrap_err());
    let start = Instant::now();
    in_time("grant", start, store.grant(limit).await.unwrap_err());
    let start = Instant::now();
    in_time("keep-alive", start, store.keep_alive(netctl::store::Lease(1)).await.unwrap_err());
    let start = Instant::now();
    in_time("revoke", start, store.revoke(netctl::store::Lease(1)).await.unwrap_err());
}

async fn every_call_fails_within_two_seconds_while_etcd_is_stopped() {
    let mut server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("a", "1")).await;
    server.stop();
    all_fail_in_time(&store).await;
    server.restart().await;
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
    commit(&store, Transaction::new().put("a", "3")).await;
}

async fn every_call_fails_within_two_seconds_while_etcd_is_frozen() {
    let server = Server::start().await;
    let store = Etcd::new(server.config()).unwrap();
    commit(&store, Transaction::new().put("a", "1")).await;
    server.freeze().await;
    all_fail_in_time(&store).await;
    server.thaw();
    eventually("it works again", async || store.get("a").await.ok()).await;
    commit(&store, Transaction::new().put("a", "3")).await;
}

async fn many_calls_at_once_fail_within_two_seconds_while_etcd_is_frozen() {
    let server = Server::start().await;
    let store = std::sync::Arc::new(Etcd::new(server.config()).unwrap());
    commit(&*store, Transaction::new().put("a", "1")).await;
    server.freeze().await;
    for _ in 0..2 {
        let start = Instant::now();
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let store = store.clone();
            calls.spawn(async move { store.get("a").await.unwrap_err() });
        }
        while let Some(ended) = calls.join_next().await {
            assert!(matches!(ended.unwrap(), StoreError::Unreachable { .. }));
        }
        let elapsed = start.elapsed();
        assert!(elapsed < Duration::from_secs(2), "took {elapsed:?}");
    }
    server.thaw();
    eventually("it works again", async || store.get("a").await.ok()).await;
}

async fn a_first_endpoint_that_is_dead_does_not_matter() {
    let server = Server::start().await;
    let dead = format!("http://127.0.0.1:{}", free_port());
    let endpoints = vec![dead, server.url()];
    let store = Etcd::new(EtcdConfig { endpoints, ..server.config() }).unwrap();
    for i in 0..20 {
        commit(&store, Transaction::new().put("a", format!("{i}"))).await;
        assert_eq!(value(&store, "a").await, Some(format!("{i}")));
    }
}

async fn a_first_endpoint_that_never_answers_does_not_matter() {
    let server = Server::start().await;
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let first = format!("http://{}", silent.local_addr().unwrap());
    let endpoints = vec![first, server.url()];
    let store = Etcd::new(EtcdConfig { endpoints, ..server.config() }).unwrap();
    for i in 0..20 {
        commit(&store, Transaction::new().put("a", format!("{i}"))).await;
        assert_eq!(value(&store, "a").await, Some(format!("{i}")));
    }
}

async fn another_endpoint_takes_over_while_the_store_is_used() {
    // Two servers that know nothing of each other: what is read tells which one answered.
    let (mut first, second) = (Server::start().await, Server::start().await);
    for (server, name) in [(&first, "first"), (&second, "second")] {
        let store = Etcd::new(server.config()).unwrap();
        commit(&store, Transaction::new().put("name", name)).await;
    }
    let endpoints = vec![first.url(), second.url()];
    let store = Etcd::new(EtcdConfig { endpoints, ..first.config() }).unwrap();
    assert_eq!(value(&store, "name").await.as_deref(), Some("first"));
    first.freeze().await;
    assert_eq!(value(&store, "name").await.as_deref(), Some("second"), "within the same call");
    first.thaw();
    second.freeze().await;
    assert_eq!(value(&store, "name").await.as_deref(), Some("first"));
    second.thaw();
    first.stop();
    assert_eq!(value(&store, "name").await.as_deref(), Some("second"));
}
