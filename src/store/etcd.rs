//! The store of several machines: an etcd cluster.
//!
//! Every call is bounded by the configured time-out, whatever etcd does. Connections are made
//! when they are needed: a store can be made while etcd is down, and works as soon as it is up.

mod fault;
mod link;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, KeyValue, PutOptions, ResponseHeader, Txn,
    TxnOp,
};
use tokio::time::{Instant, timeout_at};

use super::{
    Comparison, Entry, Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch, Write,
};
use fault::Fault;
use link::Link;

/// The largest answer that is taken: a listing of everything is one answer.
const ANSWER_BYTES: usize = 1 << 30;

/// How to reach an etcd cluster.
#[derive(Clone)]
pub struct EtcdConfig {
    /// URLs of members (`http://` or `https://`); any one that answers will do.
    pub endpoints: Vec<String>,
    /// What every key begins with. A `/` is put between it and the key where there is none.
    pub prefix: String,
    /// The authority of etcd's certificate (PEM); needed for `https://`.
    pub ca: Option<PathBuf>,
    /// The client certificate (PEM).
    pub certificate: Option<PathBuf>,
    /// The key of the client certificate (PEM).
    pub key: Option<PathBuf>,
    /// The user, where etcd has authentication.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// How long a call may take.
    pub timeout: Duration,
}

impl Default for EtcdConfig {
    /// etcd on this machine, with the prefix `netctl/` and 1.5 s for a call.
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "netctl/".to_owned(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password: None,
            timeout: Duration::from_millis(1500),
        }
    }
}

impl fmt::Debug for EtcdConfig {
    /// Everything but the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let password = self.password.as_ref().map(|_| "(hidden)");
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("ca", &self.ca)
            .field("certificate", &self.certificate)
            .field("key", &self.key)
            .field("user", &self.user)
            .field("password", &password)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl EtcdConfig {
    /// A key that may be read and that nobody writes.
    fn probe_key(&self) -> String {
        if self.prefix.is_empty() { "\0".to_owned() } else { self.prefix.clone() }
    }

    fn name(&self) -> String {
        format!("etcd {}", self.endpoints.join(","))
    }
}

/// A store in etcd.
pub struct Etcd {
    link: Arc<Link>,
    /// Dropped with the store, which ends its watches.
    open: tokio::sync::watch::Sender<()>,
}

/// Whether a request may be made a second time when it is not known whether it was done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Harmless,
    Never,
}

impl Etcd {
    /// Takes the configuration. Nothing is sent yet.
    ///
    /// # Errors
    /// [`StoreError::Failed`] when the configuration contradicts itself or a certificate cannot
    /// be read.
    pub fn new(mut config: EtcdConfig) -> Result<Self, StoreError> {
        if !config.prefix.is_empty() && !config.prefix.ends_with('/') {
            config.prefix.push('/');
        }
        Ok(Self { link: Arc::new(Link::new(config)?), open: tokio::sync::watch::Sender::new(()) })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.link.config().prefix)
    }

    fn error(&self, fault: Fault, lease: Option<i64>) -> StoreError {
        fault.into_error(self.name(), lease)
    }

    /// Makes a request within the time-out; once more over another connection where it is known
    /// that it was not done, or where that does no harm.
    async fn call<T, F>(&self, repeat: Repeat, request: impl Fn(Client) -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let config = self.link.config();
        let (start, deadline) = (Instant::now(), Instant::now() + config.timeout);
        let several = config.endpoints.len() > 1;
        let mut first = true;
        loop {
            let connection = self.link.connection(deadline).await?;
            // With one endpoint there is nothing better to do than to wait for it.
            let half = first && several && repeat == Repeat::Harmless;
            let limit = if half { start + config.timeout / 2 } else { deadline };
            let fault = match timeout_at(limit, request(connection.client.clone())).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) => Fault::from(error),
                Err(_) => self.link.late(),
            };
            let again = match fault {
                Fault::Unsent(_) => true,
                Fault::Unreachable(_) => repeat == Repeat::Harmless,
                // A token that has ended, or a password that was changed.
                Fault::Denied(_) => !connection.fresh,
                Fault::LeaseGone | Fault::NoSuchRevision(_) | Fault::Failed(_) => return Err(fault),
            };
            self.link.forget(&connection).await;
            if !again || !first || Instant::now() >= deadline {
                return Err(fault);
            }
            first = false;
        }
    }
}

#[async_trait]
impl Store for Etcd {
    fn name(&self) -> String {
        self.link.config().name()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        if key.is_empty() {
            return Ok(None);
        }
        let found = self.call(Repeat::Harmless, |client| range(client, self.key(key), None)).await;
        let found = found.map_err(|fault| self.error(fault, None))?;
        Ok(found.kvs().first().map(entry))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let found = self.call(Repeat::Harmless, |client| {
            range(client, self.key(prefix), Some(GetOptions::new().with_prefix()))
        });
        let found = found.await.map_err(|fault| self.error(fault, None))?;
        Ok(listing(&self.link.config().prefix, found))
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        if let Some(reason) = transaction.problem() {
            return Err(StoreError::Failed { store: self.name(), reason });
        }
        let lease = transaction.writes.iter().find_map(|write| match write {
            Write::Put { lease, .. } => lease.map(|lease| lease.0),
            Write::Delete(_) => None,
        });
        let comparisons: Vec<_> = transaction.comparisons.iter().map(|c| self.compare(c)).collect();
        let writes: Vec<_> = transaction.writes.into_iter().map(|write| self.write(write)).collect();
        let transaction = Txn::new().when(comparisons).and_then(writes);
        let done = self.call(Repeat::Never, |client| {
            let transaction = transaction.clone();
            async move { client.kv_client().txn(transaction).await }
        });
        let done = done.await.map_err(|fault| self.error(fault, lease))?;
        match done.succeeded() {
            true => Ok(Outcome::Committed(revision(done.header()))),
            false => Ok(Outcome::Conflict),
        }
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        watch::start(self.link.clone(), self.key(prefix), from, self.open.subscribe())
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(super::whole_seconds(ttl)).unwrap_or(i64::MAX);
        // A lease that nobody hears of ends by itself.
        let granted = self.call(Repeat::Harmless, |client| async move {
            client.lease_client().grant(seconds, None).await
        });
        Ok(Lease(granted.await.map_err(|fault| self.error(fault, None))?.id()))
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        let kept = self.call(Repeat::Harmless, |client| async move {
            client.lease_client().keep_alive(lease.0).await.map(drop)
        });
        kept.await.map_err(|fault| self.error(fault, Some(lease.0)))
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        let revoked = self.call(Repeat::Harmless, |client| async move {
            client.lease_client().revoke(lease.0).await.map(drop)
        });
        match revoked.await {
            Ok(()) | Err(Fault::LeaseGone) => Ok(()),
            Err(fault) => Err(self.error(fault, Some(lease.0))),
        }
    }
}

impl Etcd {
    fn compare(&self, comparison: &Comparison) -> Compare {
        match comparison {
            Comparison::Absent(key) => Compare::create_revision(self.key(key), CompareOp::Equal, 0),
            Comparison::Modified(key, at) => {
                let at = i64::try_from(at.0).unwrap_or(i64::MAX);
                Compare::mod_revision(self.key(key), CompareOp::Equal, at)
            }
        }
    }

    fn write(&self, write: Write) -> TxnOp {
        match write {
            Write::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                TxnOp::put(self.key(&key), value, options)
            }
            Write::Delete(key) => TxnOp::delete(self.key(&key), None),
        }
    }
}

async fn range(
    client: Client,
    key: String,
    options: Option<GetOptions>,
) -> Result<GetResponse, etcd_client::Error> {
    client.kv_client().max_decoding_message_size(ANSWER_BYTES).get(key, options).await
}

/// An answer as a listing, without the configured prefix.
fn listing(prefix: &str, mut found: GetResponse) -> Listing {
    let revision = revision(found.header());
    let entries = found.take_kvs().into_iter().filter_map(|pair| {
        let key = relative(prefix, pair.key())?;
        let (modified, leased) = (modified(&pair), pair.lease() != 0);
        Some((key, Entry { value: pair.into_key_value().1, modified, leased }))
    });
    Listing { revision, entries: entries.collect() }
}

/// A key without the configured prefix. One that is not text is none of ours.
fn relative(prefix: &str, key: &[u8]) -> Option<String> {
    std::str::from_utf8(key).ok()?.strip_prefix(prefix).map(str::to_owned)
}

fn entry(pair: &KeyValue) -> Entry {
    Entry { value: pair.value().to_vec(), modified: modified(pair), leased: pair.lease() != 0 }
}

fn modified(pair: &KeyValue) -> Revision {
    Revision(u64::try_from(pair.mod_revision()).unwrap_or(0))
}

fn revision(header: Option<&ResponseHeader>) -> Revision {
    Revision(header.and_then(|header| u64::try_from(header.revision()).ok()).unwrap_or(0))
}
