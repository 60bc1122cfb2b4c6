//! One network on this node: its sandbox, and what is known to be in it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::Rc;

use tracing::{debug, info, warn};

use super::balancing::{Balancing, Load};
use super::ebpf::{self, ByEbpf};
use super::ipvs::ByIpvs;
use super::tally::Drift;
use crate::kernel::{self, Host, Sandbox, nft};
use crate::lb::Balancer;
use crate::model::object::{
    self, Device, HostPair, Link, Object, Plug, Route, Step, Target, endpoints, sandbox_name,
};
use crate::model::subnet::width;
use crate::model::{EndpointId, NetworkId};
use crate::reconcile;

/// A network's sandbox and the objects last known to be there.
pub(super) struct Slot {
    sandbox: Sandbox,
    observed: BTreeSet<Object>,
    firewall: Option<Firewall>,
    engine: Way,
    /// What balances its connections; `None` where nothing does, or until it is opened.
    balancing: Option<Box<dyn Balancing>>,
    /// Whether the kernel may balance something although it is not open.
    unread: bool,
    /// Whether IPVS balances here until the engine has taken its connections over.
    replaced: bool,
    /// The addresses that are refused.
    refused: BTreeSet<IpAddr>,
    /// Endpoints whose containers do not have the network's subnets yet.
    behind: BTreeSet<EndpointId>,
    /// What somebody else did here, as far as it is not put right.
    drift: Drift,
    /// What was put right beside objects: the table, and the sandbox's name.
    mended: u64,
}

/// How many connections that end are listed one by one.
const LISTED: usize = 20;

/// A table as we installed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Firewall {
    script: String,
    fingerprint: nft::Fingerprint,
    /// Of the namespace's tables, when this one was last looked at.
    generation: Option<u32>,
}

impl Firewall {
    /// Puts the table in place of the present one.
    pub(super) fn install(netns: &kernel::Netns, script: &str) -> Result<Self, kernel::Error> {
        let (fingerprint, generation) = nft::install_alone(netns, script)?;
        Ok(Self { script: script.to_owned(), fingerprint, generation: Some(generation) })
    }

    /// Whether this script is installed.
    pub(super) fn is(&self, script: &str) -> bool {
        self.script == script
    }

    /// Whether the table is as it was installed.
    pub(super) fn stands(&mut self, netns: &kernel::Netns) -> bool {
        let generation = nft::generation(netns).ok();
        if generation.is_some() && generation == self.generation {
            return true;
        }
        self.generation = generation;
        nft::fingerprint(netns).is_ok_and(|now| now == Some(self.fingerprint))
    }
}

/// By which engine a sandbox's connections are balanced.
#[derive(Clone)]
pub(super) enum Way {
    /// By IPVS, or not at all.
    Ipvs,
    /// By the eBPF of the node.
    Ebpf(Rc<RefCell<ebpf::Node>>, ebpf::Of),
}

impl Way {
    /// Opens it, and reads what there is.
    fn open(&self, sandbox: &Sandbox) -> Result<Box<dyn Balancing>, kernel::Error> {
        Ok(match self {
            Self::Ipvs => Box::new(ByIpvs::open(sandbox)?),
            Self::Ebpf(node, of) => Box::new(ByEbpf::open(node, *of)?),
        })
    }

    /// Whether it carries packets, so that it is needed without services too.
    fn carries(&self) -> bool {
        match self {
            Self::Ipvs => false,
            Self::Ebpf(node, _) => node.borrow().is_fast(),
        }
    }
}

/// What converging could not do.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// What failed and must be tried again.
    pub(super) failure: Option<kernel::Error>,
    /// Endpoints whose container does not exist any more.
    pub(super) gone: Vec<EndpointId>,
}

impl Left {
    fn note(&mut self, result: Result<(), kernel::Error>) {
        if let Err(error) = result {
            self.failure = Some(error);
        }
    }
}

impl Slot {
    /// Opens the network's sandbox, making it where it is missing, and reads what is in it.
    pub(super) fn open(network: NetworkId, engine: Way) -> Result<Self, kernel::Error> {
        let mut sandbox = Sandbox::create(&sandbox_name(network))?;
        let observed = sandbox.observe()?;
        // What another engine has left goes: IPVS once eBPF carries its connections on.
        let mut replaced = false;
        let unread = match &engine {
            Way::Ipvs => {
                ebpf::remove(&sandbox, endpoints(&observed));
                sandbox.has_ipvs_services()?
            }
            Way::Ebpf(node, of) => {
                replaced = sandbox.has_ipvs_services()?;
                let has = node.borrow().has(of.vni.number());
                if !has {
                    // What is attached knows other maps than ours, or a network of before.
                    ebpf::remove(&sandbox, endpoints(&observed));
                }
                has
            }
        };
        Ok(Self {
            sandbox,
            observed,
            firewall: None,
            engine,
            balancing: None,
            unread,
            replaced,
            refused: BTreeSet::new(),
            behind: BTreeSet::new(),
            drift: Drift::default(),
            mended: 0,
        })
    }

    pub(super) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Whether containers may be connected: the rules stand, and there is a way to other nodes.
    pub(super) fn is_ready(&self) -> bool {
        self.firewall.is_some() && self.has_device(Device::Tunnel)
    }

    /// Puts the host's end of a pair right, and makes the pair where it is missing.
    pub(super) fn ensure_pair(&mut self, host: &mut Host, pair: &HostPair) -> Result<(), kernel::Error> {
        host.ensure_pair(&mut self.sandbox, pair)
    }

    /// Reads everything again: somebody may have changed it. Gives what the backends have.
    pub(super) fn reread(&mut self) -> Result<Vec<Load>, kernel::Error> {
        if self.sandbox.netns().ensure_named(self.sandbox.name())? {
            warn!(sandbox = self.sandbox.name(), "sandbox lost its name: it has it again");
            self.mended += 1;
        }
        self.sandbox.check_settings()?;
        let before = std::mem::replace(&mut self.observed, self.sandbox.observe()?);
        self.drift = Drift::between(&before, &self.observed);
        let netns = self.sandbox.netns();
        if self.firewall.as_mut().is_some_and(|firewall| !firewall.stands(netns)) {
            warn!(sandbox = self.sandbox.name(), "nftables table was changed: it is put back");
            self.firewall = None;
            self.mended += 1;
        }
        let Some(balancing) = &mut self.balancing else { return Ok(Vec::new()) };
        Ok(balancing.reread(&self.sandbox, &self.observed).unwrap_or_else(|error| {
            warn!(sandbox = self.sandbox.name(), %error, "balancing cannot be read: it is opened anew");
            (self.balancing, self.unread) = (None, true);
            Vec::new()
        }))
    }

    /// How many things that somebody else had changed were put right since this was asked last.
    pub(super) fn repaired(&mut self) -> u64 {
        let objects = std::mem::take(&mut self.drift).mended(&self.observed);
        let balancing = self.balancing.as_mut().map_or(0, |balancing| balancing.repaired());
        objects + balancing + std::mem::take(&mut self.mended)
    }

    /// Whether the addresses of a balancer are those that are here.
    pub(super) fn balances(&self, balancer: &Balancer) -> bool {
        let here = self.balancing.as_ref().map(|balancing| &balancing.balancer().addresses);
        let same = here.map_or(balancer.addresses.is_empty(), |here| *here == balancer.addresses);
        same && self.refused == balancer.refused
    }

    /// Makes the rules and the table what they should be; the addresses stay. Goes on after a
    /// failure.
    pub(super) fn balance(&mut self, firewall: &str, balancer: &Balancer) -> Result<(), kernel::Error> {
        self.balance_after(firewall, balancer, |_| Ok(()))
    }

    /// The same, with something that needs the rules and comes before the table.
    fn balance_after(
        &mut self,
        firewall: &str,
        balancer: &Balancer,
        before: impl FnOnce(&mut Self) -> Result<(), kernel::Error>,
    ) -> Result<(), kernel::Error> {
        let needs_rules = !self.has_rules_for(balancer);
        let mut installed = Ok(());
        if needs_rules {
            installed = self.install(firewall);
        }
        let done = before(self);
        let spread = self.spread(balancer);
        if !needs_rules {
            installed = self.install(firewall);
        }
        installed.and(spread).and(done)
    }

    /// Whether a balancer's table needs no rule that is not here: then who takes connections does not
    /// wait for the rules. Otherwise a packet is known by its rules before the table is asked about it.
    fn has_rules_for(&self, balancer: &Balancer) -> bool {
        let Some(balancing) = &self.balancing else { return false };
        self.firewall.is_some() && balancing.has_rules_for(balancer)
    }

    /// Puts the rules in place where they are not.
    fn install(&mut self, firewall: &str) -> Result<(), kernel::Error> {
        if !self.firewall.as_ref().is_some_and(|installed| installed.is(firewall)) {
            self.firewall = Some(Firewall::install(self.sandbox.netns(), firewall)?);
        }
        Ok(())
    }

    /// Makes the table what it should be. Where nothing is or was balanced it is not opened: a network
    /// without services does not depend on it.
    fn spread(&mut self, balancer: &Balancer) -> Result<(), kernel::Error> {
        let balancing = match &mut self.balancing {
            Some(balancing) => balancing,
            None if balancer.fronts.is_empty()
                && !self.unread
                && !self.replaced
                && !self.engine.carries() =>
            {
                return Ok(());
            }
            None => {
                self.unread = true;
                self.balancing.insert(self.engine.open(&self.sandbox)?)
            }
        };
        self.unread = false;
        balancing.converge(&self.sandbox, balancer)?;
        if self.replaced {
            return self.replace_ipvs();
        }
        self.follow()
    }

    /// Has what balances take the connections of IPVS over, and take its place.
    fn replace_ipvs(&mut self) -> Result<(), kernel::Error> {
        let take_over = |slot: &mut Self| {
            let connections = slot.sandbox.ipvs_connections()?;
            let Some(balancing) = &mut slot.balancing else {
                return Ok((connections.len(), connections));
            };
            let left = balancing.take_over(&slot.sandbox, &slot.observed, &connections)?;
            Ok::<_, kernel::Error>((connections.len() - left.len(), left))
        };
        // What is unknown goes on by IPVS until that has nothing more: so the second time there is also what
        // began after the first, and nothing is carried by both.
        take_over(self)?;
        self.follow()?;
        let (taken, left) = take_over(self)?;
        ByIpvs::open(&self.sandbox)?.converge(&self.sandbox, &Balancer::default())?;
        self.replaced = false;
        info!(sandbox = self.sandbox.name(), taken, "connections of IPVS go on with eBPF");
        for connection in left.iter().take(LISTED) {
            warn!(sandbox = self.sandbox.name(), %connection, "connection ends: eBPF cannot carry it on");
        }
        if left.len() > LISTED {
            warn!(sandbox = self.sandbox.name(), more = left.len() - LISTED, "and as many more end");
        }
        Ok(())
    }

    fn unfollow(&mut self, containers: &[EndpointId]) {
        if let Some(balancing) = &mut self.balancing {
            balancing.unfollow(containers);
        }
    }

    /// Has what balances follow the containers that are here.
    fn follow(&mut self) -> Result<(), kernel::Error> {
        let Some(balancing) = &mut self.balancing else { return Ok(()) };
        balancing.follow(&self.sandbox, &self.observed)
    }

    /// What each backend has; `None`: it is not open, although something is or was balanced.
    pub(super) fn loads(&mut self) -> Option<Result<Vec<Load>, kernel::Error>> {
        match &mut self.balancing {
            Some(balancing) => Some(balancing.loads(&self.sandbox)),
            None => (self.is_ready() && !self.unread).then(|| Ok(Vec::new())),
        }
    }

    /// Makes the sandbox what it should be. Goes on after a failure.
    pub(super) fn converge(
        &mut self,
        desired: &object::Sandbox,
        balancer: &Balancer,
        host: &mut Host,
        plug_of: impl Fn(EndpointId) -> Option<Plug>,
    ) -> Left {
        let mut left = Left::default();
        let steps = reconcile::plan(&desired.objects, &self.observed);
        let Sorted { unplugged, removals, links, ways, plugged, rest } = sort(&steps);
        // They stand on the tunnel's device, so they wait for it where it is made or changed.
        let is_changed = links.iter().any(|step| device_of(step) == Some(Device::Tunnel));
        let (early, late) = if is_changed { (Vec::new(), ways) } else { (ways, Vec::new()) };
        // An address that is balanced comes when the table knows it, which knows another node's container
        // when there is a way to it.
        left.note(self.balance_after(&desired.firewall, balancer, |slot| slot.lead(host, &early)));
        // Rules come before any container that they guard.
        if !self.firewall.as_ref().is_some_and(|firewall| firewall.is(&desired.firewall)) {
            warn!(sandbox = self.sandbox.name(), "nftables table not installed");
            return left;
        }
        self.refused.clone_from(&balancer.refused);
        if steps.iter().any(is_of_subnet) {
            self.behind = self.plugged();
        }
        if steps.is_empty() && self.behind.is_empty() {
            return left;
        }
        left.note(self.apply(host, &removals));
        left.note(self.unplug(&unplugged));
        for pair in &desired.pairs {
            if links.iter().any(|step| added(step).is_some_and(|link| link.device == pair.device))
                && let Err(error) = host.ensure_pair(&mut self.sandbox, pair)
            {
                warn!(pair = pair.name, %error, "pair to the host not made");
                left.note(Err(error));
            }
        }
        left.note(self.apply(host, &links));
        left.note(self.apply(host, &late));
        // Those that are plugged in already get the routes of the network's present subnets.
        self.behind.retain(|id| !plugged.contains(id) && plug_of(*id).is_some());
        let plugged = plugged.iter().chain(&self.behind);
        let plugs: Vec<Plug> = plugged.filter_map(|id| plug_of(*id)).collect();
        for (plug, result) in plugs.iter().zip(self.plug(&plugs)) {
            let again = self.behind.contains(&plug.endpoint);
            match result {
                Ok(()) if again => debug!(endpoint = %plug.endpoint, "endpoint has the subnets"),
                Ok(()) => info!(endpoint = %plug.endpoint, "endpoint plugged in"),
                Err(error) if error.namespace_is_gone() => left.gone.push(plug.endpoint),
                Err(error) => {
                    warn!(endpoint = %plug.endpoint, %error, "endpoint not plugged in");
                    left.note(Err(error));
                    continue;
                }
            }
            self.behind.remove(&plug.endpoint);
        }
        // What stands on a container's device makes sense only where the device is.
        let present = |step: &Step| match device_of(step) {
            Some(device @ Device::Endpoint(_)) => self.has_device(device),
            _ => true,
        };
        let rest: Vec<Step> = rest.into_iter().filter(present).collect();
        left.note(self.apply(host, &rest));
        left.note(self.follow());
        left
    }

    /// Has an endpoint that is plugged in completed again, because somebody took something away.
    pub(super) fn mend(&mut self, endpoint: EndpointId) {
        self.complete(endpoint);
        self.mended += 1;
    }

    /// Has an endpoint that is plugged in completed by what it lacks yet.
    pub(super) fn complete(&mut self, endpoint: EndpointId) {
        self.behind.insert(endpoint);
    }

    /// The endpoints whose devices are known to be there.
    pub(super) fn plugged(&self) -> BTreeSet<EndpointId> {
        endpoints(&self.observed).collect()
    }

    /// Connects containers and the objects that belong to them. One result for each plug.
    pub(super) fn plug(&mut self, plugs: &[Plug]) -> Vec<Result<(), kernel::Error>> {
        let results = self.sandbox.plug_all(plugs, &mut rand::rng());
        for (plug, result) in plugs.iter().zip(&results) {
            if result.is_ok() {
                let (device, kind) = (Device::Endpoint(plug.endpoint), object::LinkKind::Veth);
                let link = Link { device, kind, mtu: plug.mtu, up: true };
                reconcile::record(&mut self.observed, &Step::Add(Object::Link(link)));
            }
        }
        let plugged: Vec<EndpointId> = plugs.iter().map(|plug| plug.endpoint).collect();
        self.unfollow(&plugged);
        if let Err(error) = self.follow() {
            // It is tried again with the next change, and at every check.
            warn!(sandbox = self.sandbox.name(), %error, "connections of containers are not balanced");
        }
        results
    }

    /// Adds objects that are not there yet.
    pub(super) fn add(
        &mut self,
        host: &mut Host,
        objects: impl IntoIterator<Item = Object>,
    ) -> Result<(), kernel::Error> {
        let missing = objects.into_iter().filter(|object| !self.observed.contains(object));
        let mut steps: Vec<Step> = missing.map(Step::Add).collect();
        // The kernel layer batches neighbouring steps of one sort.
        steps.sort_by_key(|step| match step {
            Step::Add(object) | Step::Remove(object) => *object,
            Step::Change(link) => Object::Link(*link),
        });
        let applied = self.apply(host, &steps);
        self.follow().and(applied)
    }

    /// Disconnects containers: their interfaces are gone when this returns.
    pub(super) fn unplug(&mut self, endpoints: &[EndpointId]) -> Result<(), kernel::Error> {
        if endpoints.is_empty() {
            return Ok(());
        }
        let unplugged = self.sandbox.unplug_all(endpoints);
        self.unfollow(endpoints);
        if let Err(error) = &unplugged {
            warn!(sandbox = self.sandbox.name(), %error, "endpoints not unplugged");
        } else {
            let devices: BTreeSet<Device> = endpoints.iter().map(|id| Device::Endpoint(*id)).collect();
            self.observed.retain(|object| {
                reconcile::device(object).is_none_or(|device| !devices.contains(&device))
            });
        }
        self.follow().and(unplugged)
    }

    /// Whether an object is known to be there.
    pub(super) fn has(&self, object: &Object) -> bool {
        self.observed.contains(object)
    }

    /// Whether a device is known to be there.
    pub(super) fn has_device(&self, device: Device) -> bool {
        self.link(device).is_some()
    }

    /// Whether an endpoint of this node is known to be plugged in, and packets flow: its device comes
    /// up last.
    pub(super) fn is_plugged(&self, endpoint: EndpointId) -> bool {
        self.is_ready() && self.link(Device::Endpoint(endpoint)).is_some_and(|link| link.up)
    }

    fn link(&self, device: Device) -> Option<&Link> {
        // Links come first, and they are ordered by device first.
        let lowest = Link { device, kind: object::LinkKind::Loopback, mtu: 0, up: false };
        match self.observed.range(Object::Link(lowest)..).next() {
            Some(Object::Link(link)) if link.device == device => Some(link),
            _ => None,
        }
    }

    /// Takes steps that change the ways to other nodes' containers, and has what balances follow, because it may
    /// carry packets there itself.
    pub(super) fn lead(&mut self, host: &mut Host, steps: &[Step]) -> Result<(), kernel::Error> {
        if steps.is_empty() {
            return Ok(());
        }
        let applied = self.apply(host, steps);
        self.follow().and(applied)
    }

    /// Takes steps; goes on after a failure and returns the last one.
    pub(super) fn apply(&mut self, host: &mut Host, steps: &[Step]) -> Result<(), kernel::Error> {
        if steps.is_empty() {
            return Ok(());
        }
        let failures = self.sandbox.apply(host, steps);
        for (step, error) in &failures {
            warn!(sandbox = self.sandbox.name(), ?step, %error, "step failed");
        }
        for step in steps {
            if !failures.iter().any(|(failed, _)| failed == step) {
                reconcile::record(&mut self.observed, step);
            }
        }
        failures.into_iter().next_back().map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// The steps of a plan by what they do, in the order in which they are taken.
#[derive(Default)]
struct Sorted {
    /// Endpoints to unplug.
    unplugged: Vec<EndpointId>,
    /// Other removals.
    removals: Vec<Step>,
    /// Devices to add or change, but for those of endpoints.
    links: Vec<Step>,
    /// What leads to other nodes' endpoints by the tunnel.
    ways: Vec<Step>,
    /// Endpoints to plug.
    plugged: Vec<EndpointId>,
    /// Other additions.
    rest: Vec<Step>,
}

fn sort(steps: &[Step]) -> Sorted {
    let mut sorted = Sorted::default();
    for step in steps {
        match step {
            Step::Remove(Object::Link(Link { device: Device::Endpoint(id), .. })) => {
                sorted.unplugged.push(*id);
            }
            // Also one that only changes: its other end, in the container, must follow.
            Step::Add(Object::Link(Link { device: Device::Endpoint(id), .. }))
            | Step::Change(Link { device: Device::Endpoint(id), .. }) => sorted.plugged.push(*id),
            // Containers come first: an agent that is started after this one was killed between
            // the two sees by the subnet's route that they are not done.
            step if is_of_subnet(step) => sorted.rest.push(*step),
            Step::Remove(_) => sorted.removals.push(*step),
            Step::Add(Object::Link(_)) | Step::Change(_) => sorted.links.push(*step),
            Step::Add(object) if reconcile::device(object) == Some(Device::Tunnel) => {
                sorted.ways.push(*step);
            }
            Step::Add(_) => sorted.rest.push(*step),
        }
    }
    sorted
}

/// Whether a step adds or removes the route of a subnet: containers have one too. That of a single
/// address is a service's that is refused here.
fn is_of_subnet(step: &Step) -> bool {
    let (Step::Add(object) | Step::Remove(object)) = step else { return false };
    let Object::Route(Route { target: Target::Unreachable, destination, .. }) = object else {
        return false;
    };
    destination.prefix() < width(destination.ip())
}

fn added(step: &Step) -> Option<Link> {
    match step {
        Step::Add(Object::Link(link)) | Step::Change(link) => Some(*link),
        Step::Add(_) | Step::Remove(_) => None,
    }
}

fn device_of(step: &Step) -> Option<Device> {
    match step {
        Step::Add(object) | Step::Remove(object) => reconcile::device(object),
        Step::Change(link) => Some(link.device),
    }
}
