//! What balances connections, followed by itself: who takes connections changes often, and costs no
//! more than that.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use tracing::warn;

use super::super::balancing::Load;
use super::super::changes::Endpoints;
use super::super::slot::Slot;
use super::Worker;
use crate::kernel;
use crate::lb::{self, Balancer};
use crate::model::{EndpointId, Engine, Network, NetworkId, Snapshot};
use crate::overlay;

impl Worker {
    /// Marks the networks in which something else is to be balanced, but for what their own endpoints
    /// mean.
    pub(super) fn follow_services(&mut self, old: &Snapshot) {
        let new = &self.snapshot;
        if !Arc::ptr_eq(&old.services, &new.services) {
            for (here, there) in [(old, new), (new, old)] {
                let differs = here.services.iter().filter(|(name, service)| {
                    let other = there.services.get(*name);
                    !other.is_some_and(|other| Arc::ptr_eq(service, other) || *service == other)
                });
                self.rebalance.extend(differs.flat_map(|(_, service)| service.addresses.keys()));
            }
        }
        let same_nodes = Arc::ptr_eq(&old.nodes, &new.nodes) || old.nodes == new.nodes;
        if !same_nodes || old.alive != new.alive || !old.drained.keys().eq(new.drained.keys()) {
            self.rebalance.extend(balanced(new));
        }
        self.dead.follow(new, Instant::now());
    }

    /// Marks all networks when another node is gone for good, or is not any more.
    pub(super) fn follow_dead(&mut self) {
        if self.dead.advance(Instant::now()) {
            self.rebalance.extend(balanced(&self.snapshot));
        }
    }

    /// Marks a network in which one of these endpoints belongs to a service.
    pub(super) fn follow_backends(&mut self, network: NetworkId, endpoints: &[EndpointId]) {
        let of_service = |id| self.endpoint(network, id).is_some_and(|e| e.service.is_some());
        if endpoints.iter().any(|id| of_service(*id)) {
            self.rebalance.insert(network);
        }
    }

    /// What balances a network's connections on this node.
    pub(super) fn balancer(&self, network: &Network, endpoints: &Endpoints) -> Balancer {
        match self.me.lb {
            Engine::Ipvs | Engine::Ebpf => {
                let endpoints = endpoints.values().map(Arc::as_ref);
                lb::balancer(&self.me, &self.snapshot, self.dead.gone(), network, endpoints)
            }
            Engine::None | Engine::Missing => Balancer::refusing(&self.snapshot, network),
        }
    }

    /// What the rules of a sandbox need to know of what is balanced there.
    pub(super) fn rules_of<'a>(&self, balancer: &'a Balancer) -> Cow<'a, Balancer> {
        match self.me.lb {
            Engine::Ebpf => Cow::Owned(balancer.without_translation()),
            Engine::Ipvs | Engine::None | Engine::Missing => Cow::Borrowed(balancer),
        }
    }

    /// Has the sockets of the containers that are plugged into a network asked for its services, where sockets
    /// are asked.
    pub(super) fn ask(&mut self, id: NetworkId) {
        let Some(node) = self.ebpf.clone().filter(|node| node.borrow().asks()) else { return };
        let (Some(network), Some(slot)) = (self.network(id), self.slots.get(&id)) else { return };
        let plugged = slot.plugged();
        let here = plugged.iter().filter_map(|endpoint| self.endpoint(id, *endpoint));
        // What the host itself sends there is balanced.
        let containers = here
            .filter(|e| !e.host && e.node == self.me.name && e.attachment.boot == self.settings.boot);
        let number = network.vni.number();
        let asked = node.borrow_mut().ask(number, containers.map(Arc::as_ref));
        if let Err(error) = asked {
            warn!(network = %network.name, %error, "sockets of containers are not asked");
            self.settings.tally.failures.inc();
            self.retry(Some(id));
        }
    }

    /// Puts right what somebody has changed of what sockets are asked by.
    pub(super) fn mend_asked(&mut self) {
        let Some(node) = self.ebpf.as_ref().filter(|node| node.borrow().asks()) else { return };
        let used = self.used();
        match node.borrow_mut().mend_asked(used.as_deref()) {
            Ok(mended) => drop(self.settings.tally.repairs.inc_by(mended)),
            Err(error) => {
                warn!(%error, "sockets of containers are not asked as they should be");
                self.settings.tally.failures.inc();
            }
        }
    }

    /// Removes what eBPF balances in networks that this node does not use any more.
    pub(super) fn forget_balanced(&mut self) {
        let (Some(node), Some(used)) = (&self.ebpf, self.used()) else { return };
        if let Err(error) = node.borrow_mut().keep(&used) {
            warn!(%error, "eBPF maps keep what is not used any more");
        }
    }

    /// The numbers of the networks that this node uses, where that is certain.
    fn used(&self) -> Option<Vec<u32>> {
        // A network whose record cannot be read may be any.
        let is_certain = self.synced && self.trusted && self.snapshot.unreadable.is_empty();
        let used = self.snapshot.members.keys().filter_map(|id| self.snapshot.networks.get(id));
        is_certain.then(|| used.map(|network| network.value.vni.number()).collect())
    }

    /// Brings what balances a network's connections to the desired state. Where other addresses are
    /// balanced than before the whole network converges. What is known of its endpoints comes first: who
    /// gets connections is to be reached.
    pub(super) fn balance(&mut self, id: NetworkId) {
        self.follow_touched(id);
        if self.changed.remove(&id) {
            // The host's rules come before anything that they guard.
            if self.host_changed || self.firewall.is_none() {
                self.converge_host();
            }
            self.converge_network(id);
            return;
        }
        let Some(network) = self.network(id) else { return };
        let balancer = self.balancer(&network, &self.endpoints(id));
        let rules = self.rules_of(&balancer);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if !slot.balances(&balancer) {
            self.changed.insert(id);
            return;
        }
        let firewall = overlay::sandbox_firewall(&network, self.settings.names, &rules);
        if let Err(error) = slot.balance(&firewall, &balancer) {
            warn!(network = %network.name, %error, "connections not balanced as they should be");
            self.settings.tally.failures.inc();
            self.failure = Some(error);
            self.retry(Some(id));
        }
    }

    /// What each backend of a network has on this node; nothing where nothing is balanced.
    pub(super) fn loads(&mut self, id: NetworkId) -> Result<Vec<Load>, kernel::Error> {
        if !self.me.lb.balances() || self.network(id).is_none() {
            return Ok(Vec::new());
        }
        let loads = self.slots.get_mut(&id).and_then(Slot::loads);
        loads.unwrap_or_else(|| {
            let source = std::io::Error::other("the network is not complete on this node yet");
            Err(kernel::Error::System { action: "read what is balanced", source })
        })
    }
}

/// The networks in which services have addresses.
fn balanced(snapshot: &Snapshot) -> impl Iterator<Item = NetworkId> {
    snapshot.services.values().flat_map(|service| service.addresses.keys().copied())
}
