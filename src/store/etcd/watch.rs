//! Watches on etcd that outlive connections, compactions, and the store itself.
//!
//! A watch has a connection of its own, so that a receiver that is slow holds up nobody else.
//! After each interruption it makes sure, before it goes on from where it was, that this is still
//! the same history: see [`Watcher::verify`].

use std::sync::Arc;

use etcd_client::{
    Client, EventType, GetOptions, ResponseHeader, WatchOptions, WatchResponse, WatchStream,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::fault::Fault;
use super::link::Link;
use super::{ANSWER_BYTES, entry, listing, modified, range, relative, revision};
use crate::store::{Backoff, Change, Event, Listing, Revision, Watch};

/// How many reports wait for the receiver; the rest waits in etcd.
const REPORTS: usize = 4;

/// Starts a watch on the keys that begin with `key` (the configured prefix included). It ends
/// with its receiver, and when `open` is dropped.
pub(super) fn start(
    link: Arc<Link>,
    key: String,
    from: Option<Revision>,
    mut open: watch::Receiver<()>,
) -> Watch {
    let (reports, watch) = mpsc::channel(REPORTS);
    let receiver = reports.clone();
    let position = from.map(|revision| revision.0);
    let trust = from.is_some();
    let (cluster, witness, backoff, lost) = (None, None, Backoff::default(), false);
    let watcher = Watcher { link, key, reports, position, trust, cluster, witness, backoff, lost };
    tokio::spawn(async move {
        tokio::select! {
            () = watcher.run() => {}
            () = receiver.closed() => {}
            // Nothing is ever sent: this is the end of the store.
            _ = open.changed() => {}
        }
    });
    watch
}

struct Watcher {
    link: Arc<Link>,
    key: String,
    reports: mpsc::Sender<Event>,
    /// The receiver knows everything up to this revision; none: it needs a snapshot.
    position: Option<u64>,
    /// The position is what the receiver came with, and nothing else is known of the history.
    trust: bool,
    /// etcd's id of the cluster that was watched.
    cluster: Option<u64>,
    /// A key that exists at `position`, and the revision that wrote it.
    witness: Option<(String, Revision)>,
    backoff: Backoff,
    lost: bool,
}

/// Why a session ended.
enum End {
    /// The history that it needs is not there any more.
    Compacted,
    /// The receiver is gone.
    Closed,
    Fault(Fault),
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Watcher {
    async fn run(mut self) {
        loop {
            let Err(end) = self.session().await;
            match end {
                End::Closed => return,
                End::Compacted | End::Fault(Fault::NoSuchRevision(_)) => self.position = None,
                End::Fault(fault) if !self.lost => {
                    self.lost = true;
                    if self.report(Event::Lost(fault.reason().to_owned())).await.is_err() {
                        return;
                    }
                }
                End::Fault(_) => {}
            }
            sleep(self.backoff.pause()).await;
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.link.config().timeout
    }

    async fn report(&mut self, event: Event) -> Result<(), End> {
        self.reports.send(event).await.map_err(|_| End::Closed)
    }

    /// Waits for an answer of etcd, within the time-out.
    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Fault> {
        match timeout_at(self.deadline(), answer).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => Err(self.link.late()),
        }
    }

    /// Watches over one connection, until that fails.
    async fn session(&mut self) -> Result<std::convert::Infallible, End> {
        let client = self.link.separate(self.deadline()).await?;
        self.verify(&client).await?;
        let position = match self.position {
            Some(position) => position,
            None => self.snapshot(&client).await?,
        };
        let mut stream = self.create(&client, position).await?;
        self.trust = false;
        self.backoff.reset();
        if std::mem::take(&mut self.lost) {
            self.report(Event::Changes(Revision(position), Vec::new())).await?;
        }
        self.follow(&mut stream).await
    }

    /// Gives the position up unless this is the history that it belongs to: the same cluster, and
    /// a key that was written where the witness says. A store that was wiped, or restored from a
    /// copy, fails this even when its revision has overtaken the position. That the position is
    /// compacted, or not reached yet, is a fault that [`Watcher::run`] takes for the same.
    async fn verify(&mut self, client: &Client) -> Result<(), Fault> {
        let Some(position) = self.position else { return Ok(()) };
        let key = match &self.witness {
            Some((key, _)) => key.clone(),
            None if self.trust => self.link.config().probe_key(),
            None => {
                self.position = None;
                return Ok(());
            }
        };
        let at = i64::try_from(position).unwrap_or(i64::MAX);
        let options = GetOptions::new().with_keys_only().with_revision(at);
        let found = self.answer(range(client.clone(), key, Some(options))).await?;
        let cluster = found.header().map(ResponseHeader::cluster_id);
        let same_cluster = self.cluster.is_none() || self.cluster == cluster;
        let same_history = match &self.witness {
            Some((_, written)) => found.kvs().first().is_some_and(|pair| modified(pair) == *written),
            None => true,
        };
        self.cluster = cluster;
        if !same_cluster || !same_history || revision(found.header()) < Revision(position) {
            tracing::warn!(key = self.key, position, "the store was replaced, reading all of it again");
            self.position = None;
        }
        Ok(())
    }

    async fn snapshot(&mut self, client: &Client) -> Result<u64, End> {
        let options = GetOptions::new().with_prefix();
        let found = self.answer(range(client.clone(), self.key.clone(), Some(options))).await?;
        self.cluster = found.header().map(ResponseHeader::cluster_id);
        let prefix = &self.link.config().prefix;
        let Listing { revision, entries } = listing(prefix, found);
        let newest = entries.iter().max_by_key(|(_, entry)| entry.modified);
        self.witness = newest.map(|(key, entry)| (format!("{prefix}{key}"), entry.modified));
        self.lost = false;
        self.report(Event::Snapshot(Listing { revision, entries })).await?;
        self.position = Some(revision.0);
        Ok(revision.0)
    }

    /// Opens the stream, and waits until etcd has accepted it.
    async fn create(&self, client: &Client, position: u64) -> Result<WatchStream, End> {
        let next = i64::try_from(position.saturating_add(1)).unwrap_or(i64::MAX);
        let options = WatchOptions::new().with_prefix().with_start_revision(next);
        let mut watch = client.watch_client().max_decoding_message_size(ANSWER_BYTES);
        let mut stream = self.answer(watch.watch(self.key.as_str(), Some(options))).await?;
        let created = self.answer(stream.message()).await?.ok_or_else(ended)?;
        check(&created)?;
        Ok(stream)
    }

    /// Reports what comes. etcd is asked for its progress when it is silent, and has the time-out
    /// to answer: a frozen server keeps its connections.
    async fn follow(&mut self, stream: &mut WatchStream) -> Result<std::convert::Infallible, End> {
        let mut asked = false;
        let mut due = self.deadline();
        loop {
            tokio::select! {
                message = stream.message() => {
                    let message = message.map_err(Fault::from)?.ok_or_else(ended)?;
                    check(&message)?;
                    // The revision that a progress message names is not used: etcd before 3.4.25
                    // may send it ahead of the changes up to it.
                    self.changes(&message).await?;
                    (asked, due) = (false, self.deadline());
                }
                () = sleep_until(due), if asked => return Err(self.link.late().into()),
                () = sleep_until(due) => {
                    self.answer(stream.request_progress()).await?;
                    (asked, due) = (true, self.deadline());
                }
            }
        }
    }

    /// Reports a message's changes. A message holds whole transactions: only watches that ask for
    /// fragments get parts of one.
    async fn changes(&mut self, message: &WatchResponse) -> Result<(), End> {
        let prefix = &self.link.config().prefix;
        let (mut upto, mut changes) = (Revision(self.position.unwrap_or(0)), Vec::new());
        let seen = upto;
        for event in message.events() {
            let Some(pair) = event.kv().filter(|pair| modified(pair) > seen) else { continue };
            let Some(key) = relative(prefix, pair.key()) else { continue };
            upto = upto.max(modified(pair));
            let full = || format!("{prefix}{key}");
            match event.event_type() {
                EventType::Put => {
                    self.witness = Some((full(), modified(pair)));
                    changes.push(Change::Put(key, entry(pair)));
                }
                EventType::Delete => {
                    self.witness.take_if(|(witness, _)| *witness == full());
                    changes.push(Change::Delete(key));
                }
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.report(Event::Changes(upto, changes)).await?;
        self.position = Some(upto.0);
        Ok(())
    }
}

fn ended() -> Fault {
    Fault::Unreachable("etcd ended the watch".to_owned())
}

/// Finds out whether etcd has ended a watch.
fn check(message: &WatchResponse) -> Result<(), End> {
    if message.compact_revision() > 0 {
        return Err(End::Compacted);
    }
    if message.canceled() {
        let reason = message.cancel_reason();
        let reason = if reason.is_empty() { "etcd refused the watch" } else { reason };
        return Err(Fault::Unreachable(reason.to_owned()).into());
    }
    Ok(())
}
