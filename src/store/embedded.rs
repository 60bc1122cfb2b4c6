//! The store of a single machine: one file, owned by one thread.
//!
//! The whole content is in memory, so reading waits for no disk; what can be read is durable
//! already. The file (redb) is the durable image of it.

mod content;
mod file;
mod reserve;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};

use super::{Entry, Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch};
use content::Content;
use file::Image;
use reserve::Reserve;
use writer::{Reply, Request, Writer};

/// How long a call waits for the disk.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How many reports wait for a watch's receiver; the rest stays in the history.
const REPORTS: usize = 4;

/// A store in a file, with another beside it (`.reserve`) that keeps room for removals.
///
/// Dropping it waits until the file is closed; what was asked before that is still done.
pub struct Embedded {
    path: PathBuf,
    shared: Arc<Shared>,
    /// The store's revision, for watches; it ends with the thread.
    revision: watch::Receiver<u64>,
    /// None only while it is dropped.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// The durable state, for readers. A panic of a holder leaves nothing half done that a reader
/// could see (the state is changed by one assignment per entry, after the file), so poison is
/// ignored.
struct Shared(RwLock<Content>);

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Content> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Content> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Embedded {
    /// Opens the file, or makes it where there is none (its folder must exist). Every lease in it
    /// has its whole time again.
    ///
    /// # Errors
    /// [`StoreError::Open`] when the file cannot be read, written or made, is damaged, is no
    /// store, or is open in another process; [`StoreError::Newer`] when a newer netctl wrote it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_owned();
        let (image, loaded) = Image::open(&path)?;
        let (revision, seen) = watch::channel(loaded.revision);
        let shared = Arc::new(Shared(RwLock::new(Content::new(loaded, Instant::now()))));
        let (requests, queue) = mpsc::channel();
        let mut reserve = Reserve::of(&path);
        if let Err(error) = reserve.hold() {
            tracing::warn!(path = %path.display(), %error, "no room on the disk but for removals");
        }
        let writer = Writer {
            path: path.clone(),
            image: Some(image),
            reserve,
            compacted: None,
            shared: shared.clone(),
            revision,
            requests: queue,
        };
        let thread = std::thread::Builder::new().name("store".to_owned()).spawn(|| writer.run());
        let thread =
            thread.map_err(|e| StoreError::Open { path: path.clone(), reason: e.to_string() })?;
        Ok(Self { path, shared, revision: seen, requests: Some(requests), thread: Some(thread) })
    }

    /// Has the thread do something.
    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        if let Some(requests) = &self.requests {
            // Without a thread the reply is dropped, which the answer tells.
            drop(requests.send(request(reply)));
        }
        match tokio::time::timeout(TIMEOUT, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => {
                let reason = "its thread has ended; restart netctld".to_owned();
                Err(StoreError::Failed { store: self.name(), reason })
            }
            Err(_) => {
                let reason = format!("the disk did not answer within {TIMEOUT:?}");
                Err(StoreError::Unreachable { store: self.name(), reason })
            }
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // It has said why, if it panicked.
            drop(thread.join());
        }
    }
}

#[async_trait]
impl Store for Embedded {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.shared.read().get(key))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        Ok(self.shared.read().list(prefix))
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        if let Some(reason) = transaction.problem() {
            return Err(StoreError::Failed { store: self.name(), reason });
        }
        self.ask(|reply| Request::Commit(transaction, reply)).await
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        let (reports, watch) = tokio::sync::mpsc::channel(REPORTS);
        let (prefix, shared, mut revision) =
            (prefix.to_owned(), self.shared.clone(), self.revision.clone());
        tokio::spawn(async move {
            let mut position = from.map(|revision| revision.0);
            loop {
                let seen = *revision.borrow_and_update();
                // A loop, because a report holds so many changes only.
                loop {
                    let (event, upto) = shared.read().report(&prefix, position);
                    position = Some(upto);
                    if let Some(event) = event
                        && reports.send(event).await.is_err()
                    {
                        return;
                    }
                    if upto >= seen {
                        break;
                    }
                }
                tokio::select! {
                    changed = revision.changed() => if changed.is_err() { return },
                    () = reports.closed() => return,
                }
            }
        });
        watch
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let whole = Duration::from_secs(super::whole_seconds(ttl));
        self.ask(|reply| Request::Grant(whole, reply)).await
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.shared.write().keep_alive(lease, Instant::now())
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.ask(|reply| Request::Revoke(lease, reply)).await
    }
}
