//! The one thread that owns the file of an embedded store.
//!
//! Group commit: everything that is waiting is done in order, each transaction on its own, and
//! becomes durable with one fsync. Readers see it, and callers hear of it, only after that.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::Shared;
use super::content::{Draft, Step};
use super::file::Image;
use crate::store::{Lease, Outcome, StoreError, Transaction};

/// How many requests become durable together.
const GROUP: usize = 1024;

/// How long after a failure the end of a lease is tried again.
const RETRY: Duration = Duration::from_secs(1);

pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the thread is asked for.
pub(super) enum Request {
    Commit(Transaction, Reply<Outcome>),
    Grant(Duration, Reply<Lease>),
    Revoke(Lease, Reply<()>),
}

/// An answer that is held back until the file has what it says, or cannot have it.
type Answer = Box<dyn FnOnce(Result<(), StoreError>)>;

impl Request {
    fn prepare(self, draft: &mut Draft<'_>) -> Answer {
        match self {
            Self::Commit(transaction, reply) => answer(reply, draft.commit(transaction)),
            Self::Grant(ttl, reply) => answer(reply, Ok(draft.grant(ttl))),
            Self::Revoke(lease, reply) => {
                draft.end_lease(lease.0);
                answer(reply, Ok(()))
            }
        }
    }
}

fn answer<T: 'static>(reply: Reply<T>, result: Result<T, StoreError>) -> Answer {
    // Who asked may have gone: then nobody wants to know.
    Box::new(move |written| drop(reply.send(written.and(result))))
}

/// The thread's state.
pub(super) struct Writer {
    pub(super) path: PathBuf,
    /// None after a failure, until it is opened again.
    pub(super) image: Option<Image>,
    pub(super) shared: Arc<Shared>,
    pub(super) revision: watch::Sender<u64>,
    pub(super) requests: Receiver<Request>,
}

impl Writer {
    /// Works until nobody can ask any more.
    pub(super) fn run(mut self) {
        let mut not_before = Instant::now();
        loop {
            let end = self.shared.read().next_end().map(|end| end.max(not_before));
            let first = match end {
                None => self.requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => self.requests.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            let requests = match first {
                Ok(first) => {
                    std::iter::once(first).chain(self.requests.try_iter()).take(GROUP).collect()
                }
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Err(error) = self.process(requests) {
                tracing::error!(%error, "the store's file cannot be written");
                not_before = Instant::now() + RETRY;
            }
        }
    }

    /// Does the requests, and ends the leases whose time is over.
    fn process(&mut self, requests: Vec<Request>) -> Result<(), StoreError> {
        let opened = self.reopen();
        let content = self.shared.read();
        let mut draft = Draft::new(&content);
        for lease in content.ended(Instant::now()) {
            tracing::info!(lease = format_args!("{lease:x}"), "a lease has ended");
            draft.end_lease(lease);
        }
        let answers: Vec<_> = requests.into_iter().map(|request| request.prepare(&mut draft)).collect();
        let step = draft.finish();
        drop(content);
        let result = opened.and_then(|()| self.persist(step));
        for answer in answers {
            answer(result.clone());
        }
        result
    }

    fn persist(&mut self, step: Step) -> Result<(), StoreError> {
        if step.is_empty() {
            return Ok(());
        }
        let written = match &self.image {
            Some(image) => image.write(&step),
            None => Err("the file is not open".to_owned()),
        };
        if let Err(reason) = written {
            self.image = None;
            // At once, so that the lock is not left to others for long. That it may fail is dealt
            // with by the next request.
            drop(self.reopen());
            return Err(StoreError::Failed { store: self.path.display().to_string(), reason });
        }
        let revision = step.revision;
        self.shared.write().apply(step, Instant::now());
        self.revision.send_replace(revision);
        Ok(())
    }

    /// Opens the file again after a failure.
    fn reopen(&mut self) -> Result<(), StoreError> {
        if self.image.is_some() {
            return Ok(());
        }
        let (image, loaded) = Image::open(&self.path)?;
        self.image = Some(image);
        let mut content = self.shared.write();
        content.follow(loaded, Instant::now());
        self.revision.send_replace(content.revision());
        Ok(())
    }
}
