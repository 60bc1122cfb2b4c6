//! What packets do on this node, for those who watch.
//!
//! Nobody looks at a packet until somebody wants to see it. Then one task reads what the programs report
//! (eBPF) and what the kernel logs of dropped packets (NFLOG, in the host's namespace and in each sandbox),
//! gives addresses their names, and hands each watcher what that asked for. It ends with the last watcher.

mod freed;
mod names;
mod once;
mod sources;

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{info, warn};

use super::agent::Agent;
use crate::api::{ApiError, ErrorCode, MonitorQuery, Party, SAMPLE, Seen, Sighting, SightingKind};
use crate::model::{Name, NetworkId, NodeName};

use names::Names;
use once::Once;
use sources::{Found, Sources};

/// How many watchers there are at most: each costs a look at every packet that is shown.
const WATCHERS: usize = 32;
/// How much waits for a watcher that reads slowly; more is counted as lost.
const WAITING: usize = 1024;
/// How often the programs are told that somebody watches yet, and watchers are looked after.
const OFTEN: Duration = Duration::from_secs(1);

/// Who watches.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    state: Mutex<State>,
    /// Somebody else watches, or nobody is to any more.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    watchers: Vec<Watcher>,
    /// Whether a task reads for them, and the last that did.
    runs: bool,
    task: Option<JoinHandle<()>>,
    /// Whether the agent ends.
    stopped: bool,
}

/// Somebody who watches, and what.
#[derive(Debug)]
struct Watcher {
    /// Where it watches.
    node: NodeName,
    wanted: Wanted,
    sender: Sender<Sighting>,
    /// It waits until all is read that it is to see.
    ready: Option<oneshot::Sender<()>>,
    /// How many packets it was not shown since the last that it was.
    passed: u32,
    /// How many sightings it had no room for.
    lost: u64,
}

/// What somebody wants to see, found.
#[derive(Debug)]
struct Wanted {
    /// A network and its number.
    network: Option<(NetworkId, u32)>,
    /// The network and the name of an endpoint: one that is made anew under it is meant, too.
    endpoint: Option<(NetworkId, Name)>,
    service: Option<Name>,
    kind: Option<SightingKind>,
    sample: u32,
}

/// What all of them want of the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Demand {
    /// One of how many packets that go their way; 0: none.
    every: u32,
    /// The number of the only network that anybody watches, else 0.
    network: u32,
    /// Whether anybody wants to see what is dropped.
    drops: bool,
}

/// Has somebody watch from now on.
///
/// # Errors
/// When there is no such thing to watch, or nothing can be seen on this node now.
pub(super) async fn watch(
    agent: &Arc<Agent>,
    query: MonitorQuery,
) -> Result<Receiver<Sighting>, ApiError> {
    let wanted = find(agent, query).await?;
    let (sender, receiver) = channel(WAITING);
    // Whoever gets its answer is to see what it does then.
    let (ready, is_ready) = oneshot::channel();
    {
        let mut state = agent.watchers.lock();
        if state.stopped {
            return Err(ApiError::new(ErrorCode::Unavailable, "netctld is stopping"));
        }
        state.watchers.retain(|watcher| !watcher.sender.is_closed());
        if state.watchers.len() >= WATCHERS {
            let text = format!("{WATCHERS} watch packets on this node already: end one of them");
            return Err(ApiError::new(ErrorCode::Conflict, text));
        }
        let (node, ready) = (agent.me.name.clone(), Some(ready));
        state.watchers.push(Watcher { node, wanted, sender, ready, passed: 0, lost: 0 });
        // One that has failed reads for nobody.
        if !state.runs || state.task.as_ref().is_some_and(JoinHandle::is_finished) {
            let before = state.task.take();
            (state.runs, state.task) = (true, Some(tokio::spawn(run(agent.clone(), before))));
        }
    }
    agent.watchers.changed.notify_one();
    is_ready.await.map_err(|_| ApiError::new(ErrorCode::Unavailable, "netctld is stopping"))?;
    Ok(receiver)
}

async fn find(agent: &Agent, query: MonitorQuery) -> Result<Wanted, ApiError> {
    let MonitorQuery { network, endpoint, service, kind, sample } = query;
    let sample = sample.unwrap_or(SAMPLE);
    if sample == 0 {
        let text = "sample is 0: give 1 for every packet, or type=drop for none that went its way";
        return Err(ApiError::new(ErrorCode::Invalid, text));
    }
    if kind == Some(SightingKind::Lost) {
        let text = "type is lost: that something is lost is always told; give flow, or drop, or none";
        return Err(ApiError::new(ErrorCode::Invalid, text));
    }
    let endpoint = match &endpoint {
        Some(name) => {
            let view = agent.endpoint(name.as_str(), network.as_ref().map(Name::as_str)).await?;
            Some((view.endpoint.network, view.endpoint.name))
        }
        None => None,
    };
    let network = match &network {
        Some(name) => {
            let network = agent.cluster().network(name.as_str()).await?;
            Some((network.id, network.vni.number()))
        }
        None => None,
    };
    if let Some(name) = &service {
        agent.cluster().service(name).await?;
    }
    Ok(Wanted { network, endpoint, service, kind, sample })
}

impl Watchers {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends them all: the agent does.
    pub(super) async fn stop(&self) {
        let task = {
            let mut state = self.lock();
            (state.stopped, state.watchers) = (true, Vec::new());
            state.task.take()
        };
        self.changed.notify_one();
        if let Some(task) = task
            && timeout(OFTEN, task).await.is_err()
        {
            warn!("packets may be watched a while yet");
        }
    }
}

impl State {
    /// Lets go of those that do not listen any more, and tells the others what they have missed; what is wanted
    /// then. `None`: nobody is left, and the task ends.
    fn attend(&mut self) -> Option<Demand> {
        self.watchers.retain(|watcher| !watcher.sender.is_closed());
        self.runs = !self.watchers.is_empty();
        let mut flows: Vec<u32> = Vec::new();
        for watcher in &mut self.watchers {
            watcher.tell_lost();
            flows.extend(
                (watcher.wanted.kind != Some(SightingKind::Drop)).then_some(watcher.wanted.sample),
            );
        }
        let number = |watcher: &Watcher| watcher.wanted.network.map_or(0, |(_, number)| number);
        let first = number(self.watchers.first()?);
        let is_only = self.watchers.iter().all(|watcher| number(watcher) == first);
        let every = flows.into_iter().min().unwrap_or(0);
        let drops = self.watchers.iter().any(|watcher| watcher.wanted.kind != Some(SightingKind::Flow));
        Some(Demand { every, network: if is_only { first } else { 0 }, drops })
    }
}

/// Reads for the watchers until there are none; what was read before is over first.
async fn run(agent: Arc<Agent>, before: Option<JoinHandle<()>>) {
    if let Some(before) = before {
        // That it failed was told.
        let _ = before.await;
    }
    let mut sources = Sources::open(&agent);
    info!("packets are watched");
    let mut view = agent.view.subscribe();
    let snapshot = view.borrow_and_update().snapshot.clone();
    let mut names = Names::new(agent.me.name.clone(), snapshot);
    let mut once = Once::default();
    let mut tick = tokio::time::interval(OFTEN);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let found = tokio::select! {
            found = sources.next() => found.map(|found| {
                found.into_iter().flat_map(|found| once.take(found, Instant::now())).collect()
            }),
            () = until(once.next()) => Some(once.due(Instant::now())),
            _ = tick.tick() => None,
            () = agent.watchers.changed.notified() => None,
        };
        let Some(found) = found else {
            let (demand, waiting) = {
                let mut state = agent.watchers.lock();
                let waiting = state.watchers.iter_mut().filter_map(|watcher| watcher.ready.take());
                let waiting: Vec<_> = waiting.collect();
                (state.attend(), waiting)
            };
            let Some(demand) = demand else { break };
            sources.renew(demand).await;
            for ready in waiting {
                // Who asked may have gone.
                let _ = ready.send(());
            }
            continue;
        };
        if view.has_changed().unwrap_or(false) {
            names = Names::new(agent.me.name.clone(), view.borrow_and_update().snapshot.clone());
        }
        for found in found {
            show(&agent, &mut names, found);
        }
        // There may be more at once, for ever: whoever hands it on has a turn, too.
        tokio::task::yield_now().await;
    }
    sources.close().await;
    info!("packets are not watched any more");
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}

/// Shows all watchers what they want to see of it.
fn show(agent: &Agent, names: &mut Names, found: Found) {
    let share = found.share;
    let (network, sighting) = names.sighting(found);
    for watcher in &mut agent.watchers.lock().watchers {
        watcher.show(network, share, &sighting);
    }
}

impl Watcher {
    /// Shows a sighting that stands for so many packets, 0 for itself alone.
    fn show(&mut self, network: Option<NetworkId>, share: u32, sighting: &Sighting) {
        if !self.wanted.includes(network, sighting) {
            return;
        }
        // Somebody else may have asked for more than this one.
        if share > 0 {
            self.passed = self.passed.saturating_add(share);
            if self.passed < self.wanted.sample {
                return;
            }
            self.passed = 0;
        }
        self.tell_lost();
        if let Err(TrySendError::Full(_)) = self.sender.try_send(sighting.clone()) {
            self.lost += 1;
        }
    }

    /// Tells how many it has not seen, as soon as there is room.
    fn tell_lost(&mut self) {
        if self.lost == 0 {
            return;
        }
        let told = Sighting {
            time: Timestamp::now(),
            node: self.node.clone(),
            kind: SightingKind::Lost,
            reason: String::new(),
            lost: self.lost,
            packet: None,
        };
        if self.sender.try_send(told).is_ok() {
            self.lost = 0;
        }
    }
}

impl Wanted {
    fn includes(&self, network: Option<NetworkId>, sighting: &Sighting) -> bool {
        // What is lost may have been anything.
        let Some(packet) = &sighting.packet else { return true };
        self.kind.is_none_or(|kind| kind == sighting.kind)
            && self.network.is_none_or(|(wanted, _)| Some(wanted) == network)
            && self.endpoint.as_ref().is_none_or(|(of, name)| {
                Some(*of) == network
                    && packet.parties().any(|party| party.endpoint.as_ref() == Some(name))
            })
            && self.service.as_ref().is_none_or(|service| {
                packet.parties().any(|party| party.service.as_ref() == Some(service))
            })
    }
}

impl Seen {
    fn parties(&self) -> impl Iterator<Item = &Party> {
        [&self.source, &self.destination].into_iter().chain(&self.translated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sighting(number: u64) -> Sighting {
        Sighting {
            time: jiff::Timestamp::UNIX_EPOCH,
            node: "n1".parse().unwrap(),
            kind: SightingKind::Lost,
            reason: String::new(),
            lost: number,
            packet: None,
        }
    }

    fn watcher(sample: u32, room: usize) -> (Watcher, Receiver<Sighting>) {
        let (sender, receiver) = channel(room);
        let wanted = Wanted { network: None, endpoint: None, service: None, kind: None, sample };
        let (node, ready) = ("n1".parse().unwrap(), None);
        (Watcher { node, wanted, sender, ready, passed: 0, lost: 0 }, receiver)
    }

    #[test]
    fn each_watcher_gets_its_own_share_of_what_somebody_else_wants_more_of() {
        for (sample, every, expected) in [(1, 1, 100), (10, 1, 10), (10, 10, 100), (25, 10, 33)] {
            let (mut watcher, mut receiver) = watcher(sample, 200);
            for _ in 0..100 {
                watcher.show(None, every, &sighting(0));
            }
            assert_eq!(receiver.len(), expected, "one of {sample} of one of {every}");
            // What stands for itself is shown in any case.
            watcher.show(None, 0, &sighting(7));
            let last = std::iter::from_fn(|| receiver.try_recv().ok()).last();
            assert_eq!(last, Some(sighting(7)));
        }
    }

    #[test]
    fn the_programs_are_asked_for_what_somebody_wants_and_no_more() {
        let demand = |watchers: &[(u32, Option<SightingKind>, u32)]| {
            let (mut state, mut receivers) = (State::default(), Vec::new());
            for (network, kind, sample) in watchers {
                let (mut watcher, receiver) = watcher(*sample, 1);
                watcher.wanted.kind = *kind;
                let id = "aaaaaaaaaaaa".parse().unwrap();
                watcher.wanted.network = (*network > 0).then_some((id, *network));
                state.watchers.push(watcher);
                receivers.push(receiver);
            }
            let wants_drops = watchers.iter().any(|(_, kind, _)| *kind != Some(SightingKind::Flow));
            let demand = state.attend();
            assert!(demand.is_none_or(|demand| demand.drops == wants_drops));
            let demand = demand.map(|demand| (demand.every, demand.network));
            assert_eq!(state.runs, demand.is_some());
            demand
        };
        let (flow, drop) = (Some(SightingKind::Flow), Some(SightingKind::Drop));
        assert_eq!(demand(&[]), None);
        assert_eq!(demand(&[(0, None, 100)]), Some((100, 0)));
        assert_eq!(demand(&[(7, None, 100), (7, flow, 10), (7, drop, 1)]), Some((10, 7)));
        assert_eq!(demand(&[(7, drop, 1), (8, drop, 1)]), Some((0, 0)));
        assert_eq!(demand(&[(7, drop, 1), (0, drop, 1)]), Some((0, 0)));
        // Who does not listen any more wants nothing.
        let (gone, _) = watcher(1, 1);
        let mut state = State { watchers: vec![gone], runs: true, ..State::default() };
        assert_eq!((state.attend(), state.runs), (None, false));
    }

    #[test]
    fn what_a_watcher_has_no_room_for_is_told_to_it_later() {
        let (mut watcher, mut receiver) = watcher(1, 2);
        for number in 100..105 {
            watcher.show(None, 0, &sighting(number));
        }
        let told = |receiver: &mut Receiver<Sighting>| -> Vec<u64> {
            std::iter::from_fn(|| receiver.try_recv().ok()).map(|sighting| sighting.lost).collect()
        };
        assert_eq!(told(&mut receiver), [100, 101]);
        watcher.show(None, 0, &sighting(105));
        assert_eq!(told(&mut receiver), [3, 105]);
        // Also where nothing else comes.
        (106..109).for_each(|number| watcher.show(None, 0, &sighting(number)));
        assert_eq!(told(&mut receiver), [106, 107]);
        watcher.tell_lost();
        watcher.tell_lost();
        assert_eq!(told(&mut receiver), [1]);
        // Nobody listens any more: nothing is counted.
        drop(receiver);
        watcher.show(None, 0, &sighting(106));
        assert_eq!(watcher.lost, 0);
    }
}
