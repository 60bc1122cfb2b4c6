//! Where it is seen what packets do.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::os::fd::AsRawFd;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, warn};

use super::freed::{Freed, Of};
use super::{Demand, OFTEN};
use crate::api::Point;
use crate::app::agent::Agent;
use crate::app::dataplane::Sandboxes;
use crate::kernel::ebpf::{Report, Reports, nanoseconds};
use crate::kernel::{self, Dropped, Drops, Netns, network_of};
use crate::model::NetworkId;
use crate::model::object::sandbox_name;

/// For how long the programs report after they were told last: an agent that was killed tells them no more.
const WANTED_FOR: Duration = Duration::from_secs(5);
/// How many reports are read before somebody else has a turn.
const AT_ONCE: usize = 256;
/// How many dropped packets wait.
const WAITING: usize = 1024;

/// Something that was found.
#[derive(Debug)]
pub(super) struct Found {
    /// When.
    pub(super) time: Timestamp,
    /// For how many packets it stands; 0: for itself alone.
    pub(super) share: u32,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// By a program.
    Reported(Report),
    /// By a rule of a network's sandbox, or of the host; what the host drops may be of a network, too.
    Dropped(Point, Option<NetworkId>, Dropped),
    /// By the kernel, which tells of all that it drops.
    Freed(Point, Of, Dropped),
    /// So many packets could not be told.
    Lost(u64),
    /// Something is not seen at all, for this reason.
    Blind(String),
}

/// A namespace whose drops are read: the host's, or the sandbox of a network with its inode.
type Place = Option<(NetworkId, u64)>;

/// Something that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Programs,
    Kernel,
    Drops(Place),
}

/// All that is read.
pub(super) struct Sources {
    /// None where the node has no programs.
    reports: Option<AsyncFd<Reports>>,
    /// One of how many packets the programs report.
    every: u32,
    /// How many reports had no room, when it was looked at last.
    not_shown: Option<u64>,
    freed: Freed,
    sandboxes: watch::Receiver<Sandboxes>,
    readers: JoinSet<()>,
    read: BTreeMap<Place, AbortHandle>,
    /// What cannot be read, and was told.
    blind: BTreeSet<Source>,
    sender: mpsc::Sender<Found>,
    found: mpsc::Receiver<Found>,
}

impl Sources {
    /// Nothing is read yet, until [`Sources::renew`].
    pub(super) fn open(agent: &Agent) -> Self {
        let (sender, found) = mpsc::channel(WAITING);
        Self {
            reports: None,
            every: 0,
            not_shown: None,
            freed: Freed::new(agent.me.tunnel_port),
            sandboxes: agent.dataplane.sandboxes(),
            readers: JoinSet::new(),
            read: BTreeMap::new(),
            blind: BTreeSet::new(),
            sender,
            found,
        }
    }

    /// Has the programs report for a while yet, and reads the drops of all sandboxes that there are.
    pub(super) async fn renew(&mut self, demand: Demand) {
        self.every = demand.every;
        if self.reports.is_none() {
            match open_reports() {
                Ok(reports) => self.reports = reports,
                Err(error) => self.cannot_see(Source::Programs, &format!("the programs: {error}")),
            }
        }
        if let Some(reports) = self.reports.as_ref().map(AsyncFd::get_ref) {
            if let Err(error) = reports.want(demand.every, demand.network, WANTED_FOR) {
                warn!(%error, "the programs do not report");
            }
            if let Ok(count) = reports.not_shown() {
                let before = *self.not_shown.get_or_insert(count);
                if count > before && self.tell(What::Lost(count - before)) {
                    self.not_shown = Some(count);
                }
            }
        }
        let sandboxes = self.sandboxes.borrow().clone();
        let renewed = match demand.drops && !self.blind.contains(&Source::Kernel) {
            true => self.freed.renew(&sandboxes).await,
            false => {
                self.freed.stop();
                Ok(0)
            }
        };
        match renewed {
            Ok(0) => {}
            Ok(lost) => {
                if self.tell(What::Lost(lost)) {
                    self.freed.has_told(lost);
                }
            }
            Err(error) => self.cannot_see(Source::Kernel, &format!("what the kernel drops: {error}")),
        }
        self.follow().await;
    }

    /// Tells of something that is no packet, where there is room for it; else drops are being told.
    fn tell(&self, what: What) -> bool {
        self.sender.try_send(Found { time: Timestamp::now(), share: 0, what }).is_ok()
    }

    /// Tells once that something is not seen, and why.
    fn cannot_see(&mut self, source: Source, why: &str) {
        if self.blind.insert(source) {
            warn!(why, "packets are not seen");
            self.tell(What::Blind(format!("not seen: {why}")));
        }
    }

    /// Reads the drops of the namespaces that there are, and of no others: who listens keeps one alive.
    async fn follow(&mut self) {
        while self.readers.try_join_next().is_some() {}
        let sandboxes = self.sandboxes.borrow_and_update().clone();
        let is_there =
            |place: &Place| place.is_none_or(|(network, inode)| sandboxes.get(&network) == Some(&inode));
        self.read.retain(|place, reader| {
            let stays = is_there(place) && !reader.is_finished();
            if !stays {
                reader.abort();
            }
            stays
        });
        let is_known = |source: &Source| !matches!(source, Source::Drops(place) if !is_there(place));
        self.blind.retain(is_known);
        let places = sandboxes.iter().map(|(network, inode)| Some((*network, *inode)));
        let new: Vec<Place> =
            [None].into_iter().chain(places).filter(|place| !self.read.contains_key(place)).collect();
        if new.is_empty() {
            return;
        }
        let opened = tokio::task::spawn_blocking(move || {
            new.into_iter().map(|place| (place, listen(place))).collect::<Vec<_>>()
        });
        for (place, opened) in opened.await.unwrap_or_default() {
            match opened {
                Ok(Some(drops)) => {
                    let network = place.map(|(network, _)| network);
                    let reader = self.readers.spawn(read(network, drops, self.sender.clone()));
                    self.read.insert(place, reader);
                }
                // It has gone, and that is about to be told.
                Ok(None) => {}
                Err(error) => self.cannot_see(Source::Drops(place), &error.to_string()),
            }
        }
    }

    /// What was found next; `None`: the sandboxes are others now.
    pub(super) async fn next(&mut self) -> Option<Vec<Found>> {
        tokio::select! {
            Some(found) = self.found.recv() => Some(vec![found]),
            found = reported(self.reports.as_mut(), self.every) => Some(found),
            found = self.freed.next() => Some(found),
            Ok(()) = self.sandboxes.changed() => None,
        }
    }

    /// Has the programs report no more, and lets go of all sockets.
    pub(super) async fn close(mut self) {
        if let Some(reports) = &self.reports
            && let Err(error) = reports.get_ref().want(0, 0, Duration::ZERO)
        {
            debug!(%error, "the programs report a while yet");
        }
        self.readers.shutdown().await;
    }
}

/// Opens what the programs report, without what is left from somebody who watched before.
fn open_reports() -> anyhow::Result<Option<AsyncFd<Reports>>> {
    let Some(mut reports) = Reports::of_agent()? else { return Ok(None) };
    while reports.take().is_some() {}
    // SAFETY: it keeps its one descriptor open for as long as it lives.
    Ok(Some(unsafe { AsyncFd::register(reports) }.map_err(std::io::Error::from)?))
}

/// What the programs have reported; perhaps nothing.
async fn reported(reports: Option<&mut AsyncFd<Reports>>, every: u32) -> Vec<Found> {
    let Some(reports) = reports else { return pending().await };
    let (reports, now) = taken(reports, Reports::take).await;
    reports.into_iter().map(|report| as_found(report, every, now)).collect()
}

/// What there is in a ring buffer once there is something, though not more than is read at once, and when that is:
/// the time of the day, and the kernel's.
pub(super) async fn taken<S: AsRawFd, T>(
    source: &mut AsyncFd<S>,
    take: fn(&mut S) -> Option<T>,
) -> (Vec<T>, (Timestamp, u64)) {
    let Ok(mut ready) = source.readable_mut().await else { return pending().await };
    let now = (Timestamp::now(), nanoseconds().unwrap_or_default());
    let mut taken = Vec::new();
    while taken.len() < AT_ONCE {
        let Some(one) = take(ready.get_inner_mut()) else {
            ready.clear_ready();
            break;
        };
        taken.push(one);
    }
    (taken, now)
}

/// A report, at the time of the day.
fn as_found(report: Report, every: u32, now: (Timestamp, u64)) -> Found {
    /// TCP's flags FIN, SYN and RST (RFC 9293, 3.1).
    const ENDS: u8 = 7;
    let time = at(report.time, now);
    let is_sample = report.reason == 0 && report.tcp_flags & ENDS == 0;
    Found { time, share: if is_sample { every } else { 0 }, what: What::Reported(report) }
}

/// The time of the day of something, of which both are known now.
pub(super) fn at(nanoseconds: u64, (now, monotonic): (Timestamp, u64)) -> Timestamp {
    let ago = i64::try_from(monotonic.saturating_sub(nanoseconds)).unwrap_or_default();
    now.checked_sub(SignedDuration::from_nanos(ago)).unwrap_or(now)
}

/// Listens in a namespace, where it is there yet.
fn listen(place: Place) -> Result<Option<Drops>, kernel::Error> {
    let netns = match place {
        Some((network, _)) => Netns::open_named(&sandbox_name(network)),
        None => Netns::current(),
    };
    let Ok(netns) = netns else { return Ok(None) };
    if place.is_some_and(|(_, inode)| netns.inode() != inode) {
        return Ok(None);
    }
    Drops::listen(&netns).map(Some)
}

async fn read(network: Option<NetworkId>, drops: Drops, sender: mpsc::Sender<Found>) {
    // SAFETY: it keeps its one descriptor open for as long as it lives.
    let Ok(mut drops) = (unsafe { AsyncFd::register(drops) }) else { return };
    loop {
        let Ok(mut ready) = drops.readable_mut().await else { return };
        let Ok(read) = ready.try_io(|drops| drops.get_mut().read()) else { continue };
        let (dropped, lost) = match read {
            Ok(read) => read,
            Err(error) => {
                debug!(%error, "dropped packets not read");
                tokio::time::sleep(OFTEN).await;
                continue;
            }
        };
        let time = Timestamp::now();
        let lost = (lost > 0).then_some(What::Lost(lost));
        let point = if network.is_some() { Point::Sandbox } else { Point::Host };
        let dropped = dropped.into_iter().map(|dropped| {
            let [input, output] = dropped.devices;
            let network =
                network.or_else(|| input.and_then(network_of)).or_else(|| output.and_then(network_of));
            What::Dropped(point, network, dropped)
        });
        let all = dropped.chain(lost);
        for what in all {
            if sender.send(Found { time, share: 0, what }).await.is_err() {
                return;
            }
        }
    }
}
