//! The one thread that owns the file of an embedded store.
//!
//! Group commit: everything that is waiting is done in order, each transaction on its own, and
//! becomes durable with one fsync. Readers see it, and callers hear of it, only after that.
//!
//! A write that fails closes the file, and the next one opens it again: what is in it then is
//! what counts, whatever was thought of it before.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::Shared;
use super::content::{Draft, Step};
use super::file::{Image, WriteError};
use super::reserve::Reserve;
use crate::store::{Lease, Outcome, StoreError, Transaction};

/// How many requests, and from how many bytes on no more of them, become durable together.
const GROUP: usize = 1024;
const GROUP_BYTES: usize = 4 << 20;

/// From how many bytes less on it is worth to make the file smaller.
const WORTH_COMPACTING: usize = 128 << 10;

/// How long after a failure the end of a lease is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long a full disk is not tried again: to find out that it still is takes as long as many
/// removals.
const FULL: Duration = Duration::from_secs(5);

pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the thread is asked for.
pub(super) enum Request {
    Commit(Transaction, Reply<Outcome>),
    Grant(Duration, Reply<Lease>),
    Revoke(Lease, Reply<()>),
}

/// An answer that is held back until the file has what it says.
enum Answer {
    Commit(Result<Outcome, StoreError>),
    Grant(Result<Lease, StoreError>),
    Revoke,
}

impl Request {
    fn size(&self) -> usize {
        match self {
            Self::Commit(transaction, _) => transaction.size(),
            Self::Grant(..) | Self::Revoke(..) => 0,
        }
    }

    fn prepare(&self, draft: &mut Draft<'_>) -> Answer {
        match self {
            Self::Commit(transaction, _) => Answer::Commit(draft.commit(transaction)),
            Self::Grant(ttl, _) => Answer::Grant(draft.grant(*ttl)),
            Self::Revoke(lease, _) => {
                draft.end_lease(lease.0);
                Answer::Revoke
            }
        }
    }

    /// Answers. Who asked may have gone: then nobody wants to know.
    fn answer(self, answer: Answer) {
        match (self, answer) {
            (Self::Commit(_, reply), Answer::Commit(result)) => drop(reply.send(result)),
            (Self::Grant(_, reply), Answer::Grant(result)) => drop(reply.send(result)),
            (Self::Revoke(_, reply), Answer::Revoke) => drop(reply.send(Ok(()))),
            // Each has the answer that it prepared itself.
            (Self::Commit(..) | Self::Grant(..) | Self::Revoke(..), _) => {}
        }
    }

    fn fail(self, error: StoreError) {
        match self {
            Self::Commit(_, reply) => drop(reply.send(Err(error))),
            Self::Grant(_, reply) => drop(reply.send(Err(error))),
            Self::Revoke(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Why a group of requests was not done.
struct Stopped {
    error: StoreError,
    full: bool,
}

/// The thread's state.
pub(super) struct Writer {
    pub(super) path: PathBuf,
    /// None after a failure, until it is opened again.
    pub(super) image: Option<Image>,
    pub(super) reserve: Reserve,
    /// Until when the disk is taken to be full, and what it said.
    pub(super) full: Option<(Instant, StoreError)>,
    /// How many bytes there were when the file was made smaller the last time.
    pub(super) compacted: Option<usize>,
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
                Ok(first) => self.group(first),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Err(error) = self.process(requests) {
                tracing::error!(%error, "the store's file cannot be written");
                not_before = Instant::now() + RETRY;
            }
        }
    }

    /// What is waiting, as much as is done at once.
    fn group(&self, first: Request) -> Vec<Request> {
        let mut bytes = first.size();
        let mut group = vec![first];
        while group.len() < GROUP
            && bytes < GROUP_BYTES
            && let Ok(next) = self.requests.try_recv()
        {
            bytes += next.size();
            group.push(next);
        }
        group
    }

    /// Does the requests, and ends the leases whose time is over.
    fn process(&mut self, requests: Vec<Request>) -> Result<(), StoreError> {
        let mut done = self.all(&requests);
        if let Err(Stopped { error, full: true }) = done {
            self.reserve.release();
            done = self.round(&requests, Some(error));
            // Now, so that nobody else takes the room; that it may fail the next request tells.
            drop(self.reserve.hold());
        }
        match done {
            Ok(answers) => {
                requests.into_iter().zip(answers).for_each(|(request, answer)| request.answer(answer));
                Ok(())
            }
            Err(Stopped { error, .. }) => {
                requests.into_iter().for_each(|request| request.fail(error.clone()));
                // Now, so that nobody else gets the lock; that it may fail the next request tells.
                drop(self.reopen());
                Err(error)
            }
        }
    }

    /// Makes the requests durable, unless the disk is full or was a moment ago.
    fn all(&mut self, requests: &[Request]) -> Result<Vec<Answer>, Stopped> {
        if let Some((until, error)) = &self.full
            && Instant::now() < *until
        {
            return Err(Stopped { error: error.clone(), full: true });
        }
        let mut done = self.has_room().and_then(|()| self.round(requests, None));
        // The pages that are free in the file may be such that the disk has no room for them.
        if matches!(done, Err(Stopped { full: true, .. })) && self.compact() {
            done = self.round(requests, None);
        }
        if let Err(Stopped { error, full: true }) = &done {
            self.full = Some((Instant::now() + FULL, error.clone()));
        }
        done
    }

    /// Makes the requests durable; when the disk is `full`, only those that need no room.
    fn round(&mut self, requests: &[Request], full: Option<StoreError>) -> Result<Vec<Answer>, Stopped> {
        self.reopen().map_err(|error| Stopped { error, full: false })?;
        let content = self.shared.read();
        let mut draft = match full {
            Some(error) => Draft::frugal(&content, error),
            None => Draft::new(&content),
        };
        let ended = content.ended(Instant::now());
        ended.iter().for_each(|lease| draft.end_lease(*lease));
        let answers = requests.iter().map(|request| request.prepare(&mut draft)).collect();
        let step = draft.finish();
        drop(content);
        self.persist(step)?;
        for lease in ended {
            tracing::info!(lease = format_args!("{lease:x}"), "a lease has ended");
        }
        Ok(answers)
    }

    fn persist(&mut self, step: Step) -> Result<(), Stopped> {
        let Some(image) = self.image.as_ref().filter(|_| !step.is_empty()) else { return Ok(()) };
        if let Err(WriteError { reason, full }) = image.write(&step) {
            self.image = None;
            return Err(Stopped { error: self.failed(reason), full });
        }
        let revision = step.revision;
        self.shared.write().apply(step, Instant::now());
        self.revision.send_replace(revision);
        Ok(())
    }

    /// Sees to it that there is room for removals after whatever is written now.
    fn has_room(&mut self) -> Result<(), Stopped> {
        if let Err(error) = self.reserve.hold()
            && !(self.compact() && self.reserve.hold().is_ok())
        {
            return Err(Stopped { error: self.failed(error.to_string()), full: true });
        }
        Ok(())
    }

    /// Makes the file as small as it can be; not when there is about as much in it as there was the
    /// last time.
    fn compact(&mut self) -> bool {
        let bytes = self.shared.read().bytes();
        if self.compacted.is_some_and(|then| bytes + WORTH_COMPACTING > then) {
            return false;
        }
        let Some(mut image) = self.reopen().ok().and_then(|()| self.image.take()) else {
            return false;
        };
        self.compacted = Some(bytes);
        match image.compact() {
            Ok(()) => self.image = Some(image),
            Err(reason) => tracing::debug!(reason, "the file is not made smaller"),
        }
        self.image.is_some()
    }

    fn failed(&self, reason: String) -> StoreError {
        StoreError::Failed { store: self.path.display().to_string(), reason }
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
