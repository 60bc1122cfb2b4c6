//! What an embedded store holds, in memory: entries, leases and the recent history. Pure: time
//! comes in as an argument, and nothing here knows the file.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::{
    Change, Comparison, Entry, Event, Lease, Listing, Outcome, Revision, StoreError, Transaction, Write,
};

/// How many changes the history keeps, and how many bytes of values.
const HISTORY_CHANGES: usize = 10_000;
const HISTORY_BYTES: usize = 16 << 20;

/// From how many changes or bytes on a report is not made larger by a further transaction.
const REPORT_CHANGES: usize = 1_000;
const REPORT_BYTES: usize = 1 << 20;

/// The revision of a store that was never written (the same as etcd's).
pub(super) const FIRST_REVISION: u64 = 1;

/// A value as it is kept: shared with the history and with what is on its way to the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) value: Arc<[u8]>,
    pub(super) modified: u64,
    pub(super) lease: Option<i64>,
}

impl Stored {
    fn size(&self) -> usize {
        self.value.len()
    }

    fn entry(&self) -> Entry {
        Entry {
            value: self.value.to_vec(),
            modified: Revision(self.modified),
            leased: self.lease.is_some(),
        }
    }
}

/// One transaction's changes; `None` is a removal.
#[derive(Debug)]
struct Past {
    revision: u64,
    changes: Vec<(Arc<str>, Option<Stored>)>,
}

impl Past {
    fn bytes(&self) -> usize {
        let value = |stored: &Option<Stored>| stored.as_ref().map_or(0, Stored::size);
        self.changes.iter().map(|(key, stored)| key.len() + value(stored)).sum()
    }
}

/// The last transactions, bounded; complete after the revision `floor`.
#[derive(Debug)]
struct History {
    floor: u64,
    past: VecDeque<Past>,
    changes: usize,
    bytes: usize,
}

impl History {
    fn since(floor: u64) -> Self {
        Self { floor, past: VecDeque::new(), changes: 0, bytes: 0 }
    }

    fn push(&mut self, past: Past) {
        self.changes += past.changes.len();
        self.bytes += past.bytes();
        self.past.push_back(past);
        while self.changes > HISTORY_CHANGES || self.bytes > HISTORY_BYTES {
            let Some(oldest) = self.past.pop_front() else { break };
            self.changes -= oldest.changes.len();
            self.bytes -= oldest.bytes();
            self.floor = oldest.revision;
        }
    }
}

/// A lease and when it ends.
#[derive(Debug, Clone, Copy)]
struct Grant {
    ttl: Duration,
    ends: Instant,
}

/// What the file says.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) revision: u64,
    pub(super) entries: BTreeMap<Arc<str>, Stored>,
    pub(super) leases: BTreeMap<i64, Duration>,
}

/// The durable state, as readers see it.
#[derive(Debug)]
pub(super) struct Content {
    revision: u64,
    entries: BTreeMap<Arc<str>, Stored>,
    leases: BTreeMap<i64, Grant>,
    history: History,
}

impl Content {
    /// Takes what the file says; every lease has its whole time again.
    pub(super) fn new(loaded: Loaded, now: Instant) -> Self {
        let grant = |(id, ttl)| (id, Grant { ttl, ends: now + ttl });
        Self {
            revision: loaded.revision,
            entries: loaded.entries,
            leases: loaded.leases.into_iter().map(grant).collect(),
            history: History::since(loaded.revision),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The bytes of all keys and values.
    pub(super) fn bytes(&self) -> usize {
        self.entries.iter().map(|(key, stored)| key.len() + stored.size()).sum()
    }

    pub(super) fn get(&self, key: &str) -> Option<Entry> {
        self.entries.get(key).map(Stored::entry)
    }

    pub(super) fn list(&self, prefix: &str) -> Listing {
        let from = self.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let within = from.take_while(|(key, _)| key.starts_with(prefix));
        let entries = within.map(|(key, stored)| (key.to_string(), stored.entry())).collect();
        Listing { revision: Revision(self.revision), entries }
    }

    /// What a watch that has seen everything up to `position` is to be told next, and up to which
    /// revision it has seen everything then.
    pub(super) fn report(&self, prefix: &str, position: Option<u64>) -> (Option<Event>, u64) {
        let Some(position) = position.filter(|at| (self.history.floor..=self.revision).contains(at))
        else {
            return (Some(Event::Snapshot(self.list(prefix))), self.revision);
        };
        let (mut changes, mut bytes, mut upto) = (Vec::new(), 0, position);
        let first = self.history.past.partition_point(|past| past.revision <= position);
        for past in self.history.past.range(first..) {
            if changes.len() >= REPORT_CHANGES || bytes >= REPORT_BYTES {
                break;
            }
            for (key, stored) in past.changes.iter().filter(|(key, _)| key.starts_with(prefix)) {
                bytes += stored.as_ref().map_or(0, Stored::size);
                changes.push(match stored {
                    Some(stored) => Change::Put(key.to_string(), stored.entry()),
                    None => Change::Delete(key.to_string()),
                });
            }
            upto = past.revision;
        }
        let event = (!changes.is_empty()).then_some(Event::Changes(Revision(upto), changes));
        (event, upto)
    }

    /// When the first lease ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.leases.values().map(|grant| grant.ends).min()
    }

    /// The leases that have ended.
    pub(super) fn ended(&self, now: Instant) -> Vec<i64> {
        self.leases.iter().filter(|(_, grant)| grant.ends <= now).map(|(id, _)| *id).collect()
    }

    /// Gives a lease its whole time again, unless it has ended.
    pub(super) fn keep_alive(&mut self, lease: Lease, now: Instant) -> Result<(), StoreError> {
        let alive = self.leases.get_mut(&lease.0).filter(|grant| grant.ends > now);
        let grant = alive.ok_or(StoreError::LeaseGone(lease.0))?;
        grant.ends = now + grant.ttl;
        Ok(())
    }

    /// Does what a draft has prepared; the file has it already.
    pub(super) fn apply(&mut self, step: Step, now: Instant) {
        for (key, stored) in step.entries {
            match stored {
                Some(stored) => self.entries.insert(key, stored),
                None => self.entries.remove(&key),
            };
        }
        for (id, ttl) in step.leases {
            match ttl {
                Some(ttl) => self.leases.insert(id, Grant { ttl, ends: now + ttl }),
                None => self.leases.remove(&id),
            };
        }
        self.revision = step.revision;
        step.past.into_iter().for_each(|past| self.history.push(past));
    }

    /// Follows the file after it was opened again. Where it says something else than what is
    /// known here, there is no history between the two: watches get a snapshot.
    pub(super) fn follow(&mut self, loaded: Loaded, now: Instant) {
        if loaded.revision == self.revision && loaded.entries == self.entries {
            return;
        }
        let ends: BTreeMap<_, _> = self.leases.iter().map(|(id, grant)| (*id, grant.ends)).collect();
        *self = Self::new(loaded, now);
        for (id, grant) in &mut self.leases {
            grant.ends = ends.get(id).copied().unwrap_or(grant.ends);
        }
    }
}

/// What is to be written in one go: the outcome of one or more transactions.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) revision: u64,
    /// The new state of every entry concerned.
    pub(super) entries: BTreeMap<Arc<str>, Option<Stored>>,
    /// The leases that are new (with their time) or ended.
    pub(super) leases: BTreeMap<i64, Option<Duration>>,
    past: Vec<Past>,
}

impl Step {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.leases.is_empty()
    }
}

/// Transactions that are done one after the other on top of the durable state, and become
/// durable together.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    base: &'a Content,
    step: Step,
    /// What is said to a request that makes the content larger, when there is no room for it.
    full: Option<StoreError>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(base: &'a Content) -> Self {
        let (entries, leases, past) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { base, step: Step { revision: base.revision, entries, leases, past }, full: None }
    }

    /// The same, refusing with this error what makes the content larger.
    pub(super) fn frugal(base: &'a Content, full: StoreError) -> Self {
        Self { full: Some(full), ..Self::new(base) }
    }

    pub(super) fn finish(self) -> Step {
        self.step
    }

    fn find(&self, key: &str) -> Option<&Stored> {
        match self.step.entries.get(key) {
            Some(changed) => changed.as_ref(),
            None => self.base.entries.get(key),
        }
    }

    fn has_lease(&self, id: i64) -> bool {
        match self.step.leases.get(&id) {
            Some(changed) => changed.is_some(),
            None => self.base.leases.contains_key(&id),
        }
    }

    fn holds(&self, comparison: &Comparison) -> bool {
        match comparison {
            Comparison::Absent(key) => self.find(key).is_none(),
            Comparison::Modified(key, at) => self.find(key).is_some_and(|s| s.modified == at.0),
        }
    }

    /// Does one transaction, or nothing of it.
    pub(super) fn commit(&mut self, transaction: &Transaction) -> Result<Outcome, StoreError> {
        if !transaction.comparisons.iter().all(|comparison| self.holds(comparison)) {
            return Ok(Outcome::Conflict);
        }
        for write in &transaction.writes {
            if let Write::Put { lease: Some(lease), .. } = write
                && !self.has_lease(lease.0)
            {
                return Err(StoreError::LeaseGone(lease.0));
            }
        }
        if let Some(full) = self.full.as_ref().filter(|_| self.grows(transaction)) {
            return Err(full.clone());
        }
        let modified = self.step.revision + 1;
        let mut changes = Vec::with_capacity(transaction.writes.len());
        for write in &transaction.writes {
            match write {
                Write::Put { key, value, lease } => {
                    let (value, lease) = (value.as_slice().into(), lease.map(|lease| lease.0));
                    changes.push((Arc::from(key.as_str()), Some(Stored { value, modified, lease })));
                }
                Write::Delete(key) if self.find(key).is_some() => {
                    changes.push((Arc::from(key.as_str()), None));
                }
                Write::Delete(_) => {}
            }
        }
        self.record(changes);
        Ok(Outcome::Committed(Revision(self.step.revision)))
    }

    /// Whether a transaction makes the content larger.
    fn grows(&self, transaction: &Transaction) -> bool {
        let old = |key: &str| self.find(key).map_or(0, |stored| key.len() + stored.size());
        let before: usize = transaction.writes.iter().map(|write| old(write.key())).sum();
        let written = |write: &Write| match write {
            Write::Put { .. } => write.size(),
            Write::Delete(_) => 0,
        };
        transaction.writes.iter().map(written).sum::<usize>() > before
    }

    /// Makes a lease; its time begins when it is durable.
    pub(super) fn grant(&mut self, ttl: Duration) -> Result<Lease, StoreError> {
        if let Some(full) = &self.full {
            return Err(full.clone());
        }
        let id = loop {
            let id = rand::random::<i64>() & i64::MAX;
            if id != 0 && !self.has_lease(id) {
                break id;
            }
        };
        self.step.leases.insert(id, Some(ttl));
        Ok(Lease(id))
    }

    /// Ends a lease and removes its keys as one transaction.
    pub(super) fn end_lease(&mut self, id: i64) {
        if !self.has_lease(id) {
            return;
        }
        let under = |stored: &Stored| stored.lease == Some(id);
        let old = self
            .base
            .entries
            .iter()
            .filter(|(key, stored)| under(stored) && !self.step.entries.contains_key(*key));
        let new = self.step.entries.iter().filter(|(_, stored)| stored.as_ref().is_some_and(under));
        let keys = old.map(|(key, _)| key).chain(new.map(|(key, _)| key));
        let changes = keys.map(|key| (key.clone(), None)).collect();
        self.record(changes);
        self.step.leases.insert(id, None);
    }

    fn record(&mut self, changes: Vec<(Arc<str>, Option<Stored>)>) {
        if changes.is_empty() {
            return;
        }
        self.step.revision += 1;
        self.step.entries.extend(changes.iter().cloned());
        self.step.past.push(Past { revision: self.step.revision, changes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(keys: &[&str]) -> Content {
        let mut content = Content::new(Loaded { revision: FIRST_REVISION, ..Loaded::default() }, now());
        for key in keys {
            commit(&mut content, Transaction::new().put(*key, "value"));
        }
        content
    }

    fn now() -> Instant {
        Instant::now()
    }

    fn commit(content: &mut Content, transaction: Transaction) -> Outcome {
        let mut draft = Draft::new(content);
        let outcome = draft.commit(&transaction).unwrap();
        let step = draft.finish();
        content.apply(step, now());
        outcome
    }

    #[test]
    fn a_later_transaction_of_a_draft_sees_the_earlier_ones() {
        let content = content(&[]);
        let mut draft = Draft::new(&content);
        let first = draft.commit(&Transaction::new().absent("a").put("a", "1")).unwrap();
        assert_eq!(first, Outcome::Committed(Revision(2)));
        let second = draft.commit(&Transaction::new().absent("a").put("a", "2")).unwrap();
        assert_eq!(second, Outcome::Conflict);
        let third = draft.commit(&Transaction::new().modified("a", Revision(2)).delete("a")).unwrap();
        assert_eq!(third, Outcome::Committed(Revision(3)));
        assert_eq!(content.get("a"), None, "a draft changes nothing by itself");
    }

    #[test]
    fn a_frugal_draft_does_what_does_not_make_the_content_larger() {
        let content = content(&["a", "b"]);
        let full = StoreError::Failed { store: "store".to_owned(), reason: "full".to_owned() };
        let mut draft = Draft::frugal(&content, full);
        let larger = [
            Transaction::new().put("c", ""),
            Transaction::new().put("a", "a longer value"),
            Transaction::new().put("c", "a longer value").delete("a"),
        ];
        for transaction in larger {
            assert!(draft.commit(&transaction).is_err(), "{transaction:?}");
        }
        assert!(draft.grant(Duration::from_secs(1)).is_err());
        for transaction in [Transaction::new().put("a", "other").delete("b"), Transaction::new()] {
            assert!(matches!(draft.commit(&transaction), Ok(Outcome::Committed(_))));
        }
        let conflict = draft.commit(&Transaction::new().absent("a").put("c", "")).unwrap();
        assert_eq!(conflict, Outcome::Conflict, "a conflict needs no room");
    }

    #[test]
    fn a_transaction_is_reported_whole_even_when_the_report_is_full() {
        let mut content = content(&[]);
        for round in 0..20 {
            let transaction = (0..100).fold(Transaction::new(), |transaction, key| {
                transaction.put(format!("{key:03}"), format!("{round}"))
            });
            commit(&mut content, transaction);
        }
        let (mut position, mut total) = (FIRST_REVISION, 0);
        while let (Some(Event::Changes(upto, changes)), _) = content.report("", Some(position)) {
            assert_eq!(changes.len() % 100, 0);
            assert!(changes.len() <= REPORT_CHANGES);
            (position, total) = (upto.0, total + changes.len());
        }
        assert_eq!((position, total), (FIRST_REVISION + 20, 2000));
    }

    #[test]
    fn the_history_forgets_by_bytes_and_then_a_watch_gets_a_snapshot() {
        let mut content = content(&["small"]);
        for _ in 0..=HISTORY_BYTES / (512 << 10) {
            commit(&mut content, Transaction::new().put("large", vec![0; 512 << 10]));
        }
        assert!(content.history.bytes <= HISTORY_BYTES);
        assert!(matches!(content.report("", Some(FIRST_REVISION)), (Some(Event::Snapshot(_)), _)));
        let recent = content.revision() - 1;
        assert!(matches!(content.report("", Some(recent)), (Some(Event::Changes(..)), _)));
    }

    #[test]
    fn a_position_of_the_future_gets_a_snapshot() {
        let content = content(&["a"]);
        let future = content.revision() + 1;
        assert!(matches!(content.report("", Some(future)), (Some(Event::Snapshot(_)), _)));
    }

    #[test]
    fn a_file_that_says_something_else_is_followed_and_the_history_starts_anew() {
        let mut content = content(&["a", "b"]);
        let entries = content.entries.clone();
        content.follow(Loaded { revision: 3, entries, ..Loaded::default() }, now());
        assert!(matches!(content.report("", Some(2)), (Some(Event::Changes(..)), 3)));
        content.follow(Loaded { revision: 9, ..Loaded::default() }, now());
        assert_eq!(content.get("a"), None);
        assert!(matches!(content.report("", Some(3)), (Some(Event::Snapshot(_)), 9)));
    }

    #[test]
    fn a_lease_that_has_ended_is_not_kept_alive() {
        let (mut content, start) = (content(&[]), now());
        let mut draft = Draft::new(&content);
        let lease = draft.grant(Duration::from_secs(5)).unwrap();
        let step = draft.finish();
        content.apply(step, start);
        assert_eq!(content.next_end(), Some(start + Duration::from_secs(5)));
        content.keep_alive(lease, start + Duration::from_secs(4)).unwrap();
        assert!(content.ended(start + Duration::from_secs(8)).is_empty());
        assert_eq!(content.ended(start + Duration::from_secs(9)), [lease.0]);
        assert!(content.keep_alive(lease, start + Duration::from_secs(9)).is_err());
    }
}
