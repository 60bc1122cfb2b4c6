//! The dataplane's thread: from the view and requests to the kernel.

mod balance;
mod plug;
mod wire;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc as async_mpsc, watch};
use tracing::{info, warn};

use super::batch::Batch;
use super::changes::{
    Ahead, Endpoints, as_it_stands, blocks_of, differences, has_place, same_blocks, same_ways,
};
use super::dead::Dead;
use super::ebpf;
use super::slot::{Firewall, Left, Slot, Way};
use super::tally::Tally;
use super::{Command, Sandboxes};
use crate::cluster::Health;
use crate::cluster::view::Published;
use crate::kernel::ebpf::TunnelEnd;
use crate::kernel::{self, Host, Monitor, Netns, Notice, Scope};
use crate::model::object::{self, SANDBOX_PREFIX, sandbox_name};
use crate::model::{
    Endpoint, EndpointId, Engine, Network, NetworkId, Node, NodeName, Snapshot, Versioned, Vni,
};
use crate::overlay::{self, NameService, Surroundings};

/// How long the first notice of a burst waits for the others.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// The name of the host's namespace in notices.
const HOST: &str = "host";
/// How soon what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How soon an endpoint whose container is gone is reported again, if it is still there.
const REPORT_AGAIN: Duration = Duration::from_secs(10);

/// How the dataplane works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The current boot: namespaces of another do not exist any more.
    pub boot: String,
    /// How long connections to a dead node are kept.
    pub lease: Duration,
    /// How many connections eBPF balances at once.
    pub connections: u32,
    /// Whether eBPF carries packets past the stack.
    pub fast: bool,
    /// The control group whose sockets are asked; `None`: none are.
    pub cgroup: Option<PathBuf>,
    /// How names are answered.
    pub names: NameService,
    /// How often everything is compared with the kernel, notices or not.
    pub resync: Duration,
    /// Where its work is counted.
    pub tally: Tally,
}

pub(super) struct Worker {
    me: Node,
    settings: Settings,
    view: watch::Receiver<Published>,
    gone: async_mpsc::UnboundedSender<Arc<Endpoint>>,
    /// Tells which sandboxes there are.
    open: watch::Sender<Sandboxes>,
    host: Host,
    monitor: Monitor,
    /// Where eBPF balances.
    ebpf: Option<Rc<RefCell<ebpf::Node>>>,
    /// The device of the host's that has this node's underlay address, as last seen.
    wire: Option<String>,
    firewall: Option<Firewall>,
    slots: BTreeMap<NetworkId, Slot>,
    snapshot: Snapshot,
    /// The nodes as they are published: those of the snapshot are as the host reaches them.
    nodes: Arc<BTreeMap<NodeName, Arc<Node>>>,
    /// How large packets within the tunnel the host's routes carry whole, where that is less than it should be.
    limits: BTreeMap<IpAddr, u32>,
    /// Whether the host's devices have no programs of an earlier agent's.
    swept: bool,
    /// Whether a complete snapshot has come: before that nothing is known to be superfluous.
    synced: bool,
    /// Whether the snapshot is current: only then is anything looked for to be removed.
    trusted: bool,
    /// When endpoints whose container is gone were last reported.
    reported: BTreeMap<EndpointId, Instant>,
    ahead: BTreeMap<NetworkId, Ahead>,
    /// Networks whose desired state may differ from what is known to be there.
    changed: BTreeSet<NetworkId>,
    /// Networks in which something else is to be balanced.
    rebalance: BTreeSet<NetworkId>,
    dead: Dead,
    /// Endpoints that changed where nothing else did, as they were before.
    touched: BTreeMap<NetworkId, BTreeMap<EndpointId, Option<Arc<Endpoint>>>>,
    /// New endpoints of this node that somebody is about to have plugged in, and until when.
    expected: BTreeMap<EndpointId, (NetworkId, Instant)>,
    host_changed: bool,
    /// Namespaces that must be read again; `None` is the host's.
    dirty: BTreeSet<Option<NetworkId>>,
    check_at: Option<Instant>,
    resync_at: Instant,
    /// What failed last, for requests that cannot be fulfilled because of it.
    failure: Option<kernel::Error>,
}

/// What is around the networks of a node.
fn around<'a>(me: &'a Node, snapshot: &'a Snapshot, settings: &Settings) -> Surroundings<'a> {
    let fast = settings.fast && me.lb == Engine::Ebpf;
    Surroundings { me, nodes: &snapshot.nodes, names: settings.names, fast }
}

impl Worker {
    pub(super) fn new(
        me: Node,
        settings: Settings,
        view: watch::Receiver<Published>,
        (gone, open): (async_mpsc::UnboundedSender<Arc<Endpoint>>, watch::Sender<Sandboxes>),
        notify: impl Fn(Notice) + Send + 'static,
    ) -> Result<Self, kernel::Error> {
        let host = Host::open()?;
        let monitor = Monitor::start(notify)?;
        monitor.add(HOST, host.netns(), Scope::Host)?;
        let resync_at = Instant::now() + settings.resync;
        let dead = Dead::new(settings.lease);
        let ebpf = match me.lb {
            Engine::Ebpf => {
                let end = TunnelEnd { address: me.underlay, port: me.tunnel_port };
                let node = ebpf::Node::open(
                    settings.connections,
                    settings.fast.then_some(end),
                    settings.cgroup.as_deref(),
                )?;
                Some(Rc::new(RefCell::new(node)))
            }
            Engine::Ipvs | Engine::None | Engine::Missing => {
                if let Err(error) = ebpf::forget() {
                    warn!(%error, "eBPF of an earlier agent is not removed");
                }
                None
            }
        };
        Ok(Self {
            me,
            settings,
            view,
            gone,
            open,
            host,
            monitor,
            ebpf,
            wire: None,
            firewall: None,
            slots: BTreeMap::new(),
            snapshot: Snapshot::default(),
            nodes: Arc::default(),
            limits: BTreeMap::new(),
            swept: false,
            synced: false,
            trusted: false,
            reported: BTreeMap::new(),
            ahead: BTreeMap::new(),
            changed: BTreeSet::new(),
            rebalance: BTreeSet::new(),
            dead,
            touched: BTreeMap::new(),
            expected: BTreeMap::new(),
            host_changed: true,
            dirty: BTreeSet::new(),
            check_at: None,
            resync_at,
            failure: None,
        })
    }

    pub(super) fn run(&mut self, queue: &mpsc::Receiver<Command>) {
        loop {
            let timers = [self.check_at, self.dead.due()].into_iter().flatten();
            let due = timers.fold(self.resync_at, Instant::min);
            let first = match queue.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(command) => Some(command),
                Err(mpsc::RecvTimeoutError::Timeout) => None,
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            let mut batch = Batch::default();
            for command in first.into_iter().chain(queue.try_iter()) {
                batch.add(command);
            }
            if !batch.noticed.is_empty() {
                self.dirty.append(&mut batch.noticed);
                self.check_within(DEBOUNCE);
            }
            self.follow_view();
            self.follow_dead();
            // A VNI that has become free may be wanted at once.
            self.remove_unwanted();
            for (network, plugs) in batch.plugs {
                self.plug(network, plugs);
            }
            for (network, unplugs) in batch.unplugs {
                self.unplug(network, unplugs);
            }
            let all_read = self.read_again();
            self.converge();
            for (network, reply) in batch.loads {
                // Who asked may have given up.
                let _ = reply.send(self.loads(network));
            }
            for (network, endpoint, reply) in batch.plugged {
                let plugged = self.slots.get(&network).is_some_and(|slot| slot.is_plugged(endpoint));
                let _ = reply.send(plugged);
            }
            for waiting in batch.waiting {
                // Whoever waited too long is gone.
                let _ = waiting.send(());
            }
            if batch.stop {
                return;
            }
            if all_read {
                kernel::memory::give_back();
            }
        }
    }

    /// Takes the latest snapshot and marks what differs from the one before.
    fn follow_view(&mut self) {
        if !self.view.has_changed().unwrap_or(false) {
            return;
        }
        let published = self.view.borrow_and_update().clone();
        // What an incomplete snapshot lacks may well exist.
        if !published.complete {
            return;
        }
        self.trusted = published.health == Health::Current;
        let (old, new) = (self.take_up(published.snapshot), &self.snapshot);
        let nodes_changed = !same_ways(&old.nodes, &new.nodes);
        let mut reshaped = false;
        for (id, members) in &new.members {
            let same_network = match (old.networks.get(id), new.networks.get(id)) {
                (Some(before), Some(now)) => {
                    let same = Arc::ptr_eq(before, now);
                    // Its families decide about the host's end of its uplink.
                    reshaped |= !same;
                    same
                }
                _ => false,
            };
            match old.members.get(id) {
                Some(before)
                    if same_network
                        && !nodes_changed
                        && same_blocks(&before.blocks, &members.blocks, &self.me.name) =>
                {
                    if !Arc::ptr_eq(before, members) {
                        let touched = self.touched.entry(*id).or_default();
                        for (endpoint, before) in differences(&before.endpoints, &members.endpoints) {
                            let now = members.endpoints.get(&endpoint);
                            if before.iter().chain(now).any(|endpoint| endpoint.service.is_some()) {
                                self.rebalance.insert(*id);
                            }
                            touched.entry(endpoint).or_insert(before);
                        }
                    }
                }
                _ => {
                    self.changed.insert(*id);
                }
            }
        }
        let used = |snapshot: &Snapshot| -> Vec<NetworkId> {
            snapshot.members.keys().filter(|id| snapshot.networks.contains_key(id)).copied().collect()
        };
        self.host_changed |= nodes_changed || used(&old) != used(new) || reshaped;
        if !self.synced {
            self.synced = true;
            self.host_changed = true;
            self.remove_stale_sandboxes();
        }
        self.follow_services(&old);
        let members = &self.snapshot.members;
        self.ahead.retain(|id, ahead| {
            if ahead.forget_until(members.get(id).map_or(0, |members| members.revision)) {
                self.rebalance.insert(*id);
            }
            !ahead.is_empty()
        });
    }

    fn network(&self, id: NetworkId) -> Option<Arc<Versioned<Network>>> {
        self.snapshot.members.get(&id)?;
        self.snapshot.networks.get(&id).map(as_it_stands)
    }

    /// The endpoints of a network: those of the snapshot, and what this node did since.
    fn endpoints(&self, network: NetworkId) -> Endpoints {
        let mut endpoints = self
            .snapshot
            .members
            .get(&network)
            .map(|members| members.endpoints.clone())
            .unwrap_or_default();
        if let Some(ahead) = self.ahead.get(&network) {
            ahead.apply(&mut endpoints);
        }
        endpoints
    }

    fn retry(&mut self, what: Option<NetworkId>) {
        self.dirty.insert(what);
        self.check_within(RETRY);
    }

    fn check_within(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.check_at = Some(self.check_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Reads namespaces that are due again; tells whether those are all.
    fn read_again(&mut self) -> bool {
        let now = Instant::now();
        let all = now >= self.resync_at;
        if all {
            self.resync_at = now + self.settings.resync;
            self.dirty.insert(None);
            self.dirty.extend(self.slots.keys().copied().map(Some));
            // One whose removal failed before.
            self.remove_stale_sandboxes();
            self.mend_asked();
        } else if self.check_at.is_none_or(|check| now < check) {
            return false;
        }
        self.check_at = None;
        self.give_up_expecting(now);
        for namespace in std::mem::take(&mut self.dirty) {
            match namespace {
                None => self.read_host_again(),
                Some(id) => {
                    self.changed.insert(id);
                    match self.slots.get_mut(&id).map_or(Ok(Vec::new()), Slot::reread) {
                        Ok(loads) => self.settings.tally.loads.keep(id, loads),
                        Err(error) => {
                            warn!(network = %id, %error, "sandbox cannot be read: it is opened anew");
                            self.close(id);
                        }
                    }
                }
            }
        }
        all
    }

    fn read_host_again(&mut self) {
        self.host_changed = true;
        let netns = self.host.netns();
        if self.firewall.as_mut().is_some_and(|firewall| !firewall.stands(netns)) {
            warn!("nftables table of the host was changed: it is put back");
            self.firewall = None;
            self.settings.tally.repairs.inc();
        }
        self.look_at_ends();
    }

    /// Brings the kernel to the desired state where the two may differ.
    fn converge(&mut self) {
        if !self.synced {
            return;
        }
        if self.host_changed {
            self.converge_host();
        }
        while let Some(id) = self.touched.keys().next().copied() {
            self.follow_touched(id);
        }
        for id in std::mem::take(&mut self.rebalance) {
            if !self.changed.contains(&id) {
                self.balance(id);
            }
        }
        for id in std::mem::take(&mut self.changed) {
            self.converge_network(id);
        }
    }

    /// Removes the sandboxes of networks that are not used here any more.
    fn remove_unwanted(&mut self) {
        let unwanted: Vec<NetworkId> =
            self.slots.keys().filter(|id| self.unwanted(**id)).copied().collect();
        for id in unwanted {
            self.remove(id);
        }
    }

    /// Whether it is certain that a network is not used here.
    fn unwanted(&self, id: NetworkId) -> bool {
        self.synced
            && self.trusted
            && self.network(id).is_none()
            && !self.snapshot.unreadable.contains(&id)
    }

    fn converge_host(&mut self) {
        self.host_changed = false;
        self.settings.tally.runs.inc();
        let networks: Vec<_> = self.snapshot.members.keys().filter_map(|id| self.network(*id)).collect();
        let around = around(&self.me, &self.snapshot, &self.settings);
        let desired = overlay::host(around, networks.iter().map(|network| &network.value));
        if let Err(error) = self.apply_host(&desired) {
            warn!(%error, "host's namespace not as it should be");
            self.settings.tally.failures.inc();
            self.failure = Some(error);
            self.host_changed = true;
            self.retry(None);
        }
    }

    fn apply_host(&mut self, desired: &object::Host) -> Result<(), kernel::Error> {
        if !self.firewall.as_ref().is_some_and(|firewall| firewall.is(&desired.firewall)) {
            // What is connected from here on needs the new rules.
            self.firewall = None;
            self.firewall = Some(Firewall::install(self.host.netns(), &desired.firewall)?);
        }
        self.host.forward(desired.forward4, desired.forward6)?;
        let wanted: BTreeSet<String> = desired.pairs.iter().map(|pair| pair.name.clone()).collect();
        for error in self.host.remove_pairs_but(&wanted) {
            warn!(%error, "pair to a sandbox not removed");
        }
        // A pair is made with its sandbox, here the host's end is put right.
        let mut outcome = self.follow_wire();
        for pair in &desired.pairs {
            if let Some(slot) = self.slots.get_mut(&pair.network) {
                outcome = outcome.and(slot.ensure_pair(&mut self.host, pair));
            }
        }
        outcome
    }

    fn converge_network(&mut self, id: NetworkId) {
        let Some(network) = self.network(id) else { return };
        self.settings.tally.runs.inc();
        if !self.slots.contains_key(&id) {
            match self.open(id, network.vni) {
                Ok(slot) => {
                    let inode = slot.sandbox().netns().inode();
                    self.slots.insert(id, slot);
                    self.open.send_modify(|open| {
                        open.insert(id, inode);
                    });
                }
                Err(error) => {
                    warn!(network = %network.name, %error, "sandbox not made");
                    self.settings.tally.failures.inc();
                    self.failure = Some(error);
                    self.changed.insert(id);
                    self.retry(Some(id));
                    return;
                }
            }
        }
        let endpoints = self.endpoints(id);
        let around = around(&self.me, &self.snapshot, &self.settings);
        let blocks = blocks_of(&self.snapshot, id);
        let balancer = self.balancer(&network, &endpoints);
        let members = endpoints.values().map(Arc::as_ref);
        let rules = self.rules_of(&balancer);
        let desired = overlay::sandbox(around, &network, &blocks, members, &rules);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        // A namespace's inode means nothing after a reboot.
        let this_boot = |e: &&Arc<Endpoint>| e.attachment.boot == self.settings.boot;
        let guarded = self.firewall.is_some();
        let plug_of = |endpoint| {
            let endpoint = endpoints.get(&endpoint).filter(this_boot).filter(|e| guarded || !e.host);
            let placed = endpoint.filter(|endpoint| has_place(&network, endpoint));
            placed.map(|endpoint| overlay::plug(around, &network, endpoint))
        };
        let Left { failure, mut gone } = slot.converge(&desired, &balancer, &mut self.host, plug_of);
        self.settings.tally.repairs.inc_by(slot.repaired());
        if let Some(failure) = failure {
            self.settings.tally.failures.inc();
            self.failure = Some(failure);
            self.retry(Some(id));
        }
        let local = endpoints.values().filter(|e| e.node == self.me.name);
        gone.extend(local.filter(|e| e.attachment.boot != self.settings.boot).map(|e| e.id));
        for endpoint in gone.iter().filter_map(|id| endpoints.get(id)) {
            self.report_gone(endpoint);
        }
        self.ask(id);
    }

    /// Has an endpoint released whose container does not exist any more.
    fn report_gone(&mut self, endpoint: &Arc<Endpoint>) {
        let now = Instant::now();
        self.reported.retain(|_, at| now.duration_since(*at) < REPORT_AGAIN);
        if self.reported.insert(endpoint.id, now).is_none() {
            info!(endpoint = %endpoint.id, name = %endpoint.name, "container is gone: its endpoint is released");
            // Nobody listens any more when the agent stops.
            let _ = self.gone.send(endpoint.clone());
        }
    }

    fn open(&mut self, id: NetworkId, vni: Vni) -> Result<Slot, kernel::Error> {
        let of = ebpf::Of { network: id, vni };
        let way = self.ebpf.as_ref().map_or(Way::Ipvs, |node| Way::Ebpf(node.clone(), of));
        let slot = Slot::open(id, way)?;
        self.monitor.add(&sandbox_name(id), slot.sandbox().netns(), Scope::Sandbox)?;
        Ok(slot)
    }

    fn close(&mut self, id: NetworkId) {
        self.monitor.remove(&sandbox_name(id));
        self.settings.tally.loads.keep(id, Vec::new());
        self.slots.remove(&id);
        self.open.send_modify(|open| {
            open.remove(&id);
        });
    }

    fn remove(&mut self, id: NetworkId) {
        self.close(id);
        self.ahead.remove(&id);
        self.host_changed = true;
        match kernel::delete_sandbox(&sandbox_name(id)) {
            Ok(()) => info!(network = %id, "sandbox removed: the network is not used here"),
            Err(error) => warn!(network = %id, %error, "sandbox not removed"),
        }
        self.forget_balanced();
    }

    /// Removes sandboxes of networks that this node does not use any more.
    fn remove_stale_sandboxes(&mut self) {
        let names = Netns::sandboxes().unwrap_or_else(|error| {
            warn!(%error, "sandboxes cannot be listed");
            Vec::new()
        });
        for name in names {
            let id = name.strip_prefix(SANDBOX_PREFIX).and_then(|id| id.parse::<NetworkId>().ok());
            if let Some(id) = id
                && self.unwanted(id)
            {
                self.remove(id);
            }
        }
        self.forget_balanced();
    }
}
