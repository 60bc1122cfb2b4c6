//! Balancing by eBPF: the maps of the node, and the programs of one sandbox.

mod asked;
mod entries;
mod import;
mod leave;
mod paths;
mod table;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::balancing::{Balancing, Load};
use crate::kernel::ebpf::{
    Backend, ClientKey, Counts, EVENTS, Ebpf, FastPath, Filters, Front, Meaning, Programs,
    SCHEDULER_LEAST, TunnelEnd, Tuple,
};
use crate::kernel::{self, Sandbox, ipvs};
use crate::lb::Balancer;
use crate::model::object::{Device, Object, crossing_name, endpoints, links};
use crate::model::{EndpointId, NetworkId, Vni};
use asked::Asked;
use entries::{Entries, apply, apply_paths, changes, map_error, open_connections, read, timeouts_of};
use import::Import;
use leave::forget_paths;
pub(super) use leave::{forget, remove};
use paths::{Crossing, Paths};
use table::{Numbers, Table, key_of};

/// The eBPF of the node, which all its sandboxes use.
pub(super) struct Node {
    ebpf: Ebpf,
    /// What carries packets past the stack; `None`: the kernel carries all.
    fast: Option<FastPath>,
    /// Whether what is for other nodes may skip the stack.
    wired: bool,
    /// Nodes that only the kernel reaches.
    unfit: BTreeSet<IpAddr>,
    numbers: Numbers,
    /// Containers' sockets, where they are asked.
    asked: Option<Asked>,
    /// What an earlier agent left, by network, until somebody asks for it.
    left: BTreeMap<u32, Entries>,
    scan: Option<Scan>,
    /// When all have waited for a pair to run programs where they cost less.
    hastened: Option<Instant>,
}

/// What the maps held at a moment, of all networks: what each of them looks at is read once.
struct Scan {
    at: Instant,
    /// Of networks that have not looked yet.
    entries: BTreeMap<u32, Entries>,
    looked: BTreeSet<u32>,
    /// How many connections each backend has: established ones, and others.
    open: BTreeMap<u32, (u32, u32)>,
}

/// For how long a scan will do.
const FRESH: Duration = Duration::from_millis(300);
/// How long the node is left alone after it has waited for grace periods of RCU: longer than a check of all networks
/// takes, so at each the packets of one begin to cross by TCX.
const PAUSE: Duration = Duration::from_millis(500);
/// How long nothing waits for such in a sandbox that was opened: there is much to do then, and others wait for it.
const SETTLED: Duration = Duration::from_secs(5);

impl Node {
    /// Opens the maps, and reads what is in them. Where a tunnel's end is given, packets skip the stack; where
    /// a control group is, its sockets are asked.
    pub(super) fn open(
        connections: u32,
        end: Option<TunnelEnd>,
        cgroup: Option<&Path>,
    ) -> Result<Self, kernel::Error> {
        let ebpf = Ebpf::open(connections)?;
        let fast = end.map(|end| ebpf.load_path(end)).transpose()?;
        let asked = cgroup.map(|cgroup| Asked::open(&ebpf, cgroup)).transpose()?;
        if asked.is_none() && ebpf.ask_no_sockets()? {
            info!(
                "sockets are not asked any more: what they connect to from here on, packets are balanced for"
            );
        }
        if let Err(error) = kernel::ebpf::remove_other_layouts() {
            warn!(%error, "maps of another version's eBPF programs are not removed");
        }
        let mut left = read(ebpf.maps())?;
        if fast.is_none() {
            forget_paths(ebpf.maps(), &mut left)?;
        }
        let (wired, unfit, mut numbers) = (false, BTreeSet::new(), Numbers::default());
        if let Some(asked) = &asked {
            numbers.skip_backends(asked.last_backend()?);
        }
        let mut node =
            Self { left, ebpf, fast, wired, unfit, numbers, asked, scan: None, hastened: None };
        for entries in node.left.values() {
            node.numbers.take(&entries.table);
        }
        node.forget_connections()?;
        Ok(node)
    }

    /// Removes connections, clients that keep a backend, and what was counted, whose backend is gone: another
    /// one may get its number.
    fn forget_connections(&self) -> Result<(), kernel::Error> {
        let maps = self.ebpf.maps();
        let known: BTreeSet<u32> =
            self.left.values().flat_map(|left| left.table.backends.keys().copied()).collect();
        let is_gone = |number| !known.contains(&number);
        let connections = maps.connections.entries().map_err(map_error("read", "connections"))?;
        let gone = connections.into_iter().filter(|(_, connection)| is_gone(connection.backend));
        let gone: Vec<Tuple> = gone.map(|(tuple, _)| tuple).collect();
        maps.connections.remove_all(&gone).map_err(map_error("change", "connections"))?;
        let clients = maps.clients.entries().map_err(map_error("read", "clients"))?;
        let gone = clients.into_iter().filter(|(_, client)| is_gone(client.backend));
        let gone: Vec<ClientKey> = gone.map(|(key, _)| key).collect();
        maps.clients.remove_all(&gone).map_err(map_error("change", "clients"))?;
        let mut gone = maps.counts.keys().map_err(map_error("read", "counts"))?;
        gone.retain(|number| is_gone(*number));
        maps.counts.remove_all(&gone).map_err(map_error("change", "counts"))
    }

    /// Removes what is left of all networks but these.
    pub(super) fn keep(&mut self, networks: &[u32]) -> Result<(), kernel::Error> {
        let unwanted: Vec<u32> =
            self.left.keys().filter(|network| !networks.contains(network)).copied().collect();
        for network in unwanted {
            if let Some(left) = self.left.get(&network) {
                apply_paths(self.ebpf.maps(), &left.paths, &Paths::default(), &left.table)?;
                apply(self.ebpf.maps(), &left.table, &Table::default(), &Paths::default())?;
                self.left.remove(&network);
            }
        }
        self.asked.as_mut().map_or(Ok(()), |asked| asked.keep(networks))
    }

    /// What the kernel has of a network now.
    fn look(&mut self, network: u32) -> Result<Entries, kernel::Error> {
        let has_looked = self.scan.as_ref().is_none_or(|scan| scan.looked.contains(&network));
        if has_looked {
            self.scan = None;
        }
        let scan = self.scan()?;
        scan.looked.insert(network);
        Ok(scan.entries.remove(&network).unwrap_or_default())
    }

    fn scan(&mut self) -> Result<&mut Scan, kernel::Error> {
        let scan = match self.scan.take().filter(|scan| scan.at.elapsed() < FRESH) {
            Some(scan) => scan,
            None => {
                let maps = self.ebpf.maps();
                let (entries, open) = (read(maps)?, self.open_connections()?);
                Scan { at: Instant::now(), entries, looked: BTreeSet::new(), open }
            }
        };
        Ok(self.scan.insert(scan))
    }

    /// How many connections each backend has: established ones, and others.
    fn open_connections(&self) -> Result<BTreeMap<u32, (u32, u32)>, kernel::Error> {
        let maps = self.ebpf.maps();
        let timeouts = timeouts_of(maps)?;
        let mut open = open_connections(maps, &timeouts)?;
        if let Some(asked) = &self.asked {
            asked.add_open(&timeouts, &mut open)?;
        }
        Ok(open)
    }

    /// What was read before of a network is another by now.
    fn forget_scan_of(&mut self, network: u32) {
        if let Some(scan) = &mut self.scan {
            scan.looked.insert(network);
        }
    }

    /// Whether an earlier agent has left something of a network.
    pub(super) fn has(&self, network: u32) -> bool {
        self.left.contains_key(&network)
    }

    /// Whether packets skip the stack.
    pub(super) fn is_fast(&self) -> bool {
        self.fast.is_some()
    }

    /// Has what is for other nodes skip the stack, or not; tells whether it was otherwise.
    pub(super) fn set_wired(&mut self, wired: bool) -> bool {
        std::mem::replace(&mut self.wired, wired) != wired
    }

    /// Has what is for these nodes not skip the stack; tells whether it was otherwise.
    pub(super) fn set_unfit(&mut self, unfit: BTreeSet<IpAddr>) -> bool {
        for node in unfit.difference(&self.unfit) {
            warn!(%node, "what is for this node goes through the stack: the host's routes carry too little");
        }
        std::mem::replace(&mut self.unfit, unfit) != self.unfit
    }

    /// What the programs have counted of the node, in the order of [`EVENTS`].
    pub(super) fn events(&self) -> Result<[u64; EVENTS.len()], kernel::Error> {
        let mut sums = [0; EVENTS.len()];
        for (number, sum) in (0..).zip(&mut sums) {
            *sum = self.ebpf.maps().event(number).map_err(map_error("read", "events"))?;
        }
        Ok(sums)
    }

    /// Has what comes by the wire skip the stack where it enters this device of the host's; tells whether
    /// anything changed.
    pub(super) fn attach_wire(&self, device: &str) -> Result<bool, kernel::Error> {
        let Some(fast) = &self.fast else { return Ok(false) };
        Ok(fast.from_wire.attach(&mut filters()?, device)?.changed)
    }
}

/// Which sandbox something of eBPF is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Of {
    pub(super) network: NetworkId,
    pub(super) vni: Vni,
}

/// The balancing of one sandbox by eBPF.
pub(super) struct ByEbpf {
    node: Rc<RefCell<Node>>,
    /// The network's number.
    network: u32,
    /// The host's end of the pair by which packets cross.
    outside: String,
    programs: Programs,
    /// What the maps have.
    entries: Entries,
    balancer: Balancer,
    /// The containers whose devices have the programs, with these devices' numbers.
    followed: BTreeMap<EndpointId, u32>,
    crossing: Option<Crossing>,
    opened: Instant,
    /// How many entries somebody else changed that are not put right yet.
    drifted: u64,
    mended: u64,
}

impl ByEbpf {
    /// Loads the programs of a network, and takes what an earlier agent has left of it.
    pub(super) fn open(node: &Rc<RefCell<Node>>, of: Of) -> Result<Self, kernel::Error> {
        let network = of.vni.number();
        let mut open = node.borrow_mut();
        let programs = open.ebpf.load(network)?;
        let entries = match open.left.remove(&network) {
            Some(entries) => entries,
            None => open.look(network)?,
        };
        drop(open);
        Ok(Self {
            node: node.clone(),
            network,
            outside: crossing_name(of.network),
            programs,
            entries,
            balancer: Balancer::default(),
            followed: BTreeMap::new(),
            crossing: None,
            opened: Instant::now(),
            drifted: 0,
            mended: 0,
        })
    }

    /// Has the devices of new containers run the programs. One that is gone by now is passed over; after
    /// a failure it goes on, and returns the last one.
    fn attach(&mut self, sandbox: &Sandbox, new: &[EndpointId]) -> Result<(), kernel::Error> {
        if new.is_empty() {
            return Ok(());
        }
        sandbox.netns().enter(|| {
            let (mut filters, mut outcome) = (filters()?, Ok(()));
            for container in new {
                match self.programs.place(&mut filters, &Device::Endpoint(*container).to_string()) {
                    Ok(interface) => drop(self.followed.insert(*container, interface)),
                    Err(error) if error.device_is_gone() => {}
                    Err(error) => outcome = Err(error.into()),
                }
            }
            outcome
        })?
    }

    /// Has the devices of those containers run the programs that are to run them; tells how many did not.
    fn attach_again(&mut self, sandbox: &Sandbox) -> Result<u64, kernel::Error> {
        sandbox.netns().enter(|| {
            let (mut filters, mut missing, mut outcome) = (filters()?, 0, Ok(()));
            for (container, interface) in &mut self.followed {
                match self.programs.attach(&mut filters, &Device::Endpoint(*container).to_string()) {
                    Ok(attached) => {
                        missing += u64::from(attached.changed);
                        *interface = attached.interface;
                    }
                    Err(error) if error.device_is_gone() => {}
                    Err(error) => outcome = Err(error.into()),
                }
            }
            outcome.map(|()| missing)
        })?
    }

    /// Has the pair by which packets cross run the programs; tells how many ends did not, and which could where
    /// each packet costs less, too: the sandbox's, and the host's.
    fn attach_crossing(&mut self, sandbox: &Sandbox) -> Result<(u64, [bool; 2]), kernel::Error> {
        let node = self.node.borrow();
        let Some(fast) = &node.fast else { return Ok((0, [false; 2])) };
        let inside = sandbox.netns().enter(|| {
            let attached = fast.into.attach(&mut filters()?, &Device::Crossing.to_string());
            Ok::<_, kernel::Error>(attached?)
        })??;
        let outside = fast.to_wire.attach(&mut filters()?, &self.outside)?;
        self.crossing =
            Some(Crossing { inside: inside.interface, outside: outside.interface, balances: false });
        let changed = u64::from(inside.changed) + u64::from(outside.changed);
        Ok((changed, [inside.slow, outside.slow]))
    }

    /// Has the ends of that pair run them there: not while the network is being set up, nor when the node has waited
    /// for another's a moment ago.
    fn hasten_crossing(&self, sandbox: &Sandbox, slow: [bool; 2]) -> Result<(), kernel::Error> {
        let [inside, outside] = slow;
        let mut node = self.node.borrow_mut();
        let is_early =
            self.opened.elapsed() < SETTLED || node.hastened.is_some_and(|at| at.elapsed() < PAUSE);
        if is_early || !(inside || outside) {
            return Ok(());
        }
        node.hastened = Some(Instant::now());
        let Some(fast) = &node.fast else { return Ok(()) };
        if inside {
            sandbox.netns().enter(|| fast.into.hasten(&Device::Crossing.to_string()))??;
        }
        if outside {
            fast.to_wire.hasten(&self.outside)?;
        }
        info!(sandbox = sandbox.name(), "packets cross it by TCX from here on");
        Ok(())
    }

    /// Has packets carried by what is in the sandbox.
    fn carry(&mut self, objects: &BTreeSet<Object>) -> Result<(), kernel::Error> {
        let balances = !self.balancer.fronts.is_empty();
        let wired = self.node.borrow().wired;
        let crossing = self.crossing.map(|Crossing { inside, outside, .. }| Crossing {
            // No device: the kernel has them.
            inside: if wired { inside } else { 0 },
            outside,
            balances,
        });
        let paths = match crossing {
            Some(crossing) => {
                let node = self.node.borrow();
                Paths::through(self.network, crossing, &self.followed, &node.unfit, objects)
            }
            None => Paths::default(),
        };
        if paths == self.entries.paths {
            return Ok(());
        }
        let mut node = self.node.borrow_mut();
        if let Err(error) =
            apply_paths(node.ebpf.maps(), &self.entries.paths, &paths, &self.entries.table)
        {
            // What it has now is not certain.
            node.scan = None;
            self.entries.paths = node.look(self.network)?.paths;
            return Err(error);
        }
        self.entries.paths = paths;
        node.forget_scan_of(self.network);
        Ok(())
    }

    /// Puts right how many connections backends have, where that decides who is next. The programs count
    /// only what they see: not what silence ended, or what left a full table.
    fn correct(&self, counted: &BTreeMap<u32, (u32, u32)>) -> Result<(), kernel::Error> {
        let least = |front: &&Front| front.scheduler == SCHEDULER_LEAST;
        let fronts: BTreeSet<u32> =
            self.entries.table.fronts.values().filter(least).map(|f| f.id).collect();
        let node = self.node.borrow();
        let maps = node.ebpf.maps();
        for (number, _) in self.entries.table.backends.iter().filter(|(_, b)| fronts.contains(&b.front))
        {
            let open = counted.get(number).map_or(0, |(active, inactive)| active + inactive);
            let there = maps.backends.get(number).map_err(map_error("read", "backends"))?;
            if let Some(there) = there.filter(|there| there.open != open) {
                let right = Backend { open, ..there };
                maps.backends.insert(number, &right).map_err(map_error("change", "backends"))?;
            }
        }
        Ok(())
    }

    /// What the backends have, of which so many connections are open.
    fn loads_of(&self, open: &BTreeMap<u32, (u32, u32)>) -> Result<Vec<Load>, kernel::Error> {
        let node = self.node.borrow();
        let maps = node.ebpf.maps();
        let numbers = self.entries.table.numbers();
        let mut loads = Vec::new();
        for (front, spread) in &self.balancer.fronts {
            let Some(id) = self.entries.table.fronts.get(&key_of(self.network, front)) else { continue };
            for (backend, weight) in &spread.backends {
                let Some(number) = numbers.get(&(id.id, *backend)) else { continue };
                let counted = maps.counts.get(number).map_err(map_error("read", "counts"))?;
                let sum: Counts = counted.into_iter().flatten().sum();
                let (active, inactive) = open.get(number).copied().unwrap_or_default();
                loads.push(Load {
                    front: *front,
                    backend: *backend,
                    weight: *weight,
                    active,
                    inactive,
                    connections: sum.connections,
                    incoming_bytes: sum.incoming_bytes,
                    outgoing_bytes: sum.outgoing_bytes,
                });
            }
        }
        Ok(loads)
    }
}

impl Balancing for ByEbpf {
    fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    fn reread(
        &mut self,
        sandbox: &Sandbox,
        objects: &BTreeSet<Object>,
    ) -> Result<Vec<Load>, kernel::Error> {
        let found = self.node.borrow_mut().look(self.network)?;
        let changed = changes(&found, &self.entries);
        if changed > 0 {
            warn!(sandbox = sandbox.name(), changed, "eBPF maps were changed: they are put back");
        }
        (self.drifted, self.entries) = (changed, found);
        let unpinned = self.node.borrow().ebpf.pin_again()?;
        if unpinned > 0 {
            warn!(maps = unpinned, "eBPF maps were no longer pinned: they are again");
        }
        let there: BTreeSet<EndpointId> = endpoints(objects).collect();
        self.followed.retain(|container, _| there.contains(container));
        let mut detached = self.attach_again(sandbox)?;
        if self.crossing.take().is_some() && has_crossing(objects) {
            let (missing, slow) = self.attach_crossing(sandbox)?;
            detached += missing;
            // Nothing is lost without it.
            if let Err(error) = self.hasten_crossing(sandbox, slow) {
                debug!(sandbox = sandbox.name(), %error, "packets do not cross it by TCX");
            }
        }
        if detached > 0 {
            warn!(sandbox = sandbox.name(), detached, "eBPF programs were detached: they are back");
        }
        self.mended += unpinned + detached;
        let open = self.node.borrow_mut().scan()?.open.clone();
        self.correct(&open)?;
        self.loads_of(&open)
    }

    fn repaired(&mut self) -> u64 {
        std::mem::take(&mut self.mended)
    }

    fn converge(&mut self, _: &Sandbox, balancer: &Balancer) -> Result<(), kernel::Error> {
        let mut node = self.node.borrow_mut();
        if !balancer.fronts.is_empty() {
            // Answers are looked for before there are any.
            let containers = &self.entries.paths.containers;
            let silent = containers.iter().filter(|(_, meaning)| meaning.balances == 0);
            let changed: Vec<_> =
                silent.map(|(place, meaning)| (*place, Meaning { balances: 1, ..*meaning })).collect();
            if !changed.is_empty() {
                let maps = node.ebpf.maps();
                let told = maps.addresses.insert_all(&changed).and_then(|()| maps.changed());
                told.map_err(map_error("change", "addresses"))?;
            }
            self.entries.paths.containers.extend(changed);
        }
        let wanted = Table::wanted(self.network, balancer, &self.entries.table, &mut node.numbers);
        self.balancer = balancer.clone();
        if let Err(error) = apply(node.ebpf.maps(), &self.entries.table, &wanted, &self.entries.paths) {
            // What it has now is not certain.
            node.scan = None;
            self.entries.table = node.look(self.network)?.table;
            return Err(error);
        }
        let is_lost = |number: &u32| !wanted.backends.contains_key(number);
        let lost = self.entries.table.backends.keys().any(is_lost);
        self.entries.table = wanted;
        node.forget_scan_of(self.network);
        if let Some(asked) = node.asked.as_ref().filter(|_| lost)
            && let Err(error) = asked.end_lost(node.ebpf.maps())
        {
            warn!(%error, "connections of sockets go on without their backend");
        }
        self.mended += std::mem::take(&mut self.drifted);
        Ok(())
    }

    fn follow(&mut self, sandbox: &Sandbox, objects: &BTreeSet<Object>) -> Result<(), kernel::Error> {
        let there: BTreeSet<EndpointId> = endpoints(objects).collect();
        self.followed.retain(|container, _| there.contains(container));
        let new: Vec<EndpointId> =
            there.into_iter().filter(|container| !self.followed.contains_key(container)).collect();
        let attached = self.attach(sandbox, &new);
        let mut crossed = Ok(());
        if !has_crossing(objects) {
            self.crossing = None;
        } else if self.crossing.is_none() {
            crossed = self.attach_crossing(sandbox).map(drop);
        }
        self.carry(objects).and(crossed).and(attached)
    }

    fn take_over(
        &mut self,
        sandbox: &Sandbox,
        objects: &BTreeSet<Object>,
        connections: &[ipvs::Connection],
    ) -> Result<Vec<ipvs::Connection>, kernel::Error> {
        let devices = sandbox.netns().enter(|| client_devices(objects))?;
        let now = kernel::ebpf::now().map_err(map_error("read the time for", "connections"))?;
        let import = Import::new(self.network, &self.entries.table, &devices, connections, now);
        let node = self.node.borrow();
        for (tuple, connection) in import.taken.iter().flatten() {
            // One that has begun here by itself stays.
            let inserted = node.ebpf.maps().connections.insert_new(tuple, connection);
            inserted.map_err(map_error("change", "connections"))?;
        }
        Ok(import.left)
    }

    fn unfollow(&mut self, containers: &[EndpointId]) {
        for container in containers {
            self.followed.remove(container);
        }
    }

    fn loads(&mut self, _: &Sandbox) -> Result<Vec<Load>, kernel::Error> {
        // Who asks wants to know what is open now: a drain ends with the last connection.
        let open = self.node.borrow().open_connections()?;
        self.loads_of(&open)
    }

    fn has_rules_for(&self, _: &Balancer) -> bool {
        // The programs need none: no mark, no translation.
        true
    }
}

impl Drop for ByEbpf {
    fn drop(&mut self) {
        // What the sandbox has stays as it is; another agent's start, or this one's, finds it.
        let entries = std::mem::take(&mut self.entries);
        if let Ok(mut node) = self.node.try_borrow_mut()
            && !entries.is_empty()
        {
            node.left.insert(self.network, entries);
        }
    }
}

/// Opens the filters of the thread's namespace.
fn filters() -> Result<Filters, kernel::Error> {
    Filters::open().map_err(|source| kernel::Error::System { action: "open a netlink socket", source })
}

/// The devices that lead to containers, by the containers' addresses.
fn client_devices(objects: &BTreeSet<Object>) -> BTreeMap<IpAddr, u32> {
    let device = |object: &Object| match object {
        Object::Neighbour { device: device @ Device::Endpoint(_), address, .. } => {
            Some((*address, kernel::ebpf::index(&device.to_string()).ok()?))
        }
        _ => None,
    };
    objects.iter().filter_map(device).collect()
}

/// Whether the pair by which packets cross is among the objects.
fn has_crossing(objects: &BTreeSet<Object>) -> bool {
    links(objects).any(|link| link.device == Device::Crossing && link.up)
}
