//! Endpoints: plugged in and out on request, and followed one by one where nothing else changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::super::PlugError;
use super::super::batch::{PlugRequest, UnplugRequest};
use super::super::changes::{blocks_of, has_place};
use super::super::slot::Slot;
use super::{Worker, around};
use crate::kernel;
use crate::model::object::{Device, Object, Step};
use crate::model::{Endpoint, EndpointId, Network, NetworkId, NodeName, Versioned};
use crate::overlay;

/// How long a new endpoint of this node may wait for its request to be plugged in, before it is
/// plugged in without one.
const PLUG_GRACE: Duration = Duration::from_secs(1);

impl Worker {
    pub(super) fn plug(&mut self, id: NetworkId, requests: Vec<PlugRequest>) {
        let network = match self.ready_slot(id) {
            Ok(network) => network,
            Err(error) => {
                for (_, _, reply) in requests {
                    let _ = reply.send(Err(error.clone()));
                }
                return;
            }
        };
        let (requests, early): (Vec<_>, _) =
            requests.into_iter().partition(|(endpoint, ..)| has_place(&network, endpoint));
        for (_, _, reply) in early {
            let reason = format!("network {} has no such subnet on this node yet", network.name);
            let _ = reply.send(Err(PlugError::NotReady(reason)));
        }
        let around = around(&self.me, &self.snapshot, &self.settings);
        let plugs: Vec<_> = requests.iter().map(|(e, ..)| overlay::plug(around, &network, e)).collect();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let results = slot.plug(&plugs);
        let objects = requests.iter().zip(&results).filter(|(_, result)| result.is_ok());
        let blocks = blocks_of(&self.snapshot, id);
        let objects = objects.flat_map(|((endpoint, ..), _)| {
            overlay::endpoint_objects(around, &network, &blocks, endpoint)
        });
        if let Err(error) = slot.add(&mut self.host, objects.collect::<Vec<_>>()) {
            self.failure = Some(error);
            self.retry(Some(id));
        }
        let plugged: Vec<EndpointId> = requests.iter().map(|(endpoint, ..)| endpoint.id).collect();
        let known = self.snapshot.members.get(&id).map_or(0, |members| members.revision);
        let ahead = self.ahead.entry(id).or_default();
        let mut replies = Vec::with_capacity(results.len());
        for ((endpoint, revision, reply), result) in requests.into_iter().zip(results) {
            if result.is_ok() {
                ahead.add(endpoint, revision, known);
            }
            replies.push((reply, result));
        }
        self.ask(id);
        for (reply, result) in replies {
            // The caller may have given up; then reconciliation finds what to do.
            let _ = reply.send(result.map_err(|error| Arc::new(error).into()));
        }
        self.follow_backends(id, &plugged);
    }

    /// Makes sure that a network's sandbox stands with all its rules, and the host's rules too;
    /// gives the network, or says what is missing.
    pub(super) fn ready_slot(&mut self, id: NetworkId) -> Result<Arc<Versioned<Network>>, PlugError> {
        let unknown = || PlugError::NotReady("the network is not known on this node yet".to_owned());
        let network = self.network(id).ok_or_else(unknown)?;
        if self.host_changed || self.firewall.is_none() {
            self.converge_host();
        }
        // A change of the network comes before what may need it.
        if self.changed.remove(&id) || !self.slots.get(&id).is_some_and(Slot::is_ready) {
            self.converge_network(id);
        }
        if self.firewall.is_some() && self.slots.get(&id).is_some_and(Slot::is_ready) {
            return Ok(network);
        }
        let (network, node) = (&network.name, &self.me.name);
        let reason = self.failure.as_ref().map(ToString::to_string).unwrap_or_default();
        let text = format!("network {network} is not complete on node {node}: {reason}");
        Err(match self.failure.as_ref().is_some_and(kernel::Error::is_unsupported) {
            true => PlugError::Unsupported(text),
            false => PlugError::NotReady(text),
        })
    }

    pub(super) fn unplug(&mut self, network: NetworkId, requests: Vec<UnplugRequest>) {
        let ids: Vec<EndpointId> = requests.iter().map(|(endpoint, ..)| endpoint.id).collect();
        self.follow_backends(network, &ids);
        let ahead = self.ahead.entry(network).or_default();
        for (endpoint, revision, _) in &requests {
            ahead.added.remove(&endpoint.id);
            ahead.removed.insert(endpoint.id, *revision);
        }
        // What the view has told of these is no more than what is done here.
        if let Some(touched) = self.touched.get_mut(&network) {
            touched.retain(|endpoint, _| !ids.contains(endpoint));
        }
        // Nothing is sent there any more before it goes. The view may have told of it before this.
        if self.rebalance.remove(&network) {
            self.balance(network);
        }
        let result = self.slots.get_mut(&network).map_or(Ok(()), |slot| slot.unplug(&ids));
        if result.is_err() {
            self.retry(Some(network));
        }
        self.ask(network);
        self.complete_rest(requests.iter().map(|(endpoint, ..)| &**endpoint));
        let failure = result.err().map(|error| error.to_string());
        for (_, _, reply) in requests {
            let result = failure.as_ref().map_or(Ok(()), |text| {
                let source = std::io::Error::other(text.clone());
                Err(kernel::Error::System { action: "unplug the endpoint", source })
            });
            let _ = reply.send(result);
        }
    }

    /// Gives containers that leave a network what they had by it and another of theirs has too: the way
    /// out, or the way to names.
    fn complete_rest<'a>(&mut self, left: impl Iterator<Item = &'a Endpoint>) {
        let place = |endpoint: &Endpoint| (endpoint.attachment.inode, endpoint.attachment.boot.clone());
        let places: BTreeSet<_> = left.map(place).collect();
        for (id, slot) in &mut self.slots {
            let Some(members) = self.snapshot.members.get(id) else { continue };
            let own: Vec<&Arc<Endpoint>> =
                slot.plugged().iter().filter_map(|id| members.endpoints.get(id)).collect();
            for endpoint in own.iter().filter(|e| !e.host && places.contains(&place(e))) {
                slot.complete(endpoint.id);
                self.changed.insert(*id);
            }
        }
    }

    /// Has the host's own ends completed from which somebody took something away. Of a container's only
    /// its own engine knows what is right.
    pub(super) fn look_at_ends(&mut self) {
        let ids: Vec<NetworkId> = self.slots.keys().copied().collect();
        for id in ids {
            let Some(network) = self.network(id).filter(|network| network.host_access) else { continue };
            let endpoints = self.endpoints(id);
            let own = endpoints.values().filter(|e| e.host && e.node == self.me.name);
            for endpoint in own.filter(|e| e.attachment.boot == self.settings.boot) {
                let Some(slot) = self.slots.get_mut(&id) else { continue };
                // One that is not plugged in will be.
                if !slot.has_device(Device::Endpoint(endpoint.id)) || !has_place(&network, endpoint) {
                    continue;
                }
                let around = around(&self.me, &self.snapshot, &self.settings);
                let plug = overlay::plug(around, &network, endpoint);
                match self.host.has_end(&plug) {
                    Ok(true) => {}
                    Ok(false) => {
                        warn!(network = %network.name, device = %plug.interface, "the host's access was changed: it is put back");
                        slot.mend(endpoint.id);
                        self.changed.insert(id);
                    }
                    Err(error) => {
                        warn!(network = %network.name, %error, "the host's access not looked at");
                    }
                }
            }
        }
    }

    /// Endpoints that nobody asked for in time are plugged in with the rest of their network.
    pub(super) fn give_up_expecting(&mut self, now: Instant) {
        let slots = &self.slots;
        self.expected.retain(|id, (network, _)| {
            slots.get(network).is_some_and(|slot| !slot.has_device(Device::Endpoint(*id)))
        });
        for (network, _) in self.expected.extract_if(.., |_, (_, until)| *until <= now).map(|(_, of)| of)
        {
            self.changed.insert(network);
        }
        if let Some(until) = self.expected.values().map(|(_, until)| *until).min() {
            self.check_within(until.saturating_duration_since(now));
        }
    }

    /// An endpoint of a network: as the snapshot has it, or what this node did since.
    pub(super) fn endpoint(&self, network: NetworkId, id: EndpointId) -> Option<&Arc<Endpoint>> {
        let ahead = self.ahead.get(&network);
        if ahead.is_some_and(|ahead| ahead.removed.contains_key(&id)) {
            return None;
        }
        let added = ahead.and_then(|ahead| ahead.added.get(&id)).map(|(endpoint, _)| endpoint);
        added.or_else(|| self.snapshot.members.get(&network)?.endpoints.get(&id))
    }

    /// Brings what belongs to the endpoints of a network that have changed to the desired state, where that is
    /// not the whole network's turn.
    pub(super) fn follow_touched(&mut self, id: NetworkId) {
        let Some(touched) = self.touched.remove(&id) else { return };
        if !self.changed.contains(&id) && !self.converge_endpoints(id, &touched) {
            self.changed.insert(id);
        }
    }

    /// Brings what belongs to some endpoints to the desired state: the work does not grow with
    /// the network. `false`: this is more than adding or removing, and the whole network must
    /// converge.
    fn converge_endpoints(
        &mut self,
        id: NetworkId,
        touched: &BTreeMap<EndpointId, Option<Arc<Endpoint>>>,
    ) -> bool {
        let (Some(network), Some(slot)) = (self.network(id), self.slots.get(&id)) else { return false };
        let around = around(&self.me, &self.snapshot, &self.settings);
        let blocks = blocks_of(&self.snapshot, id);
        let objects =
            |endpoint: &Endpoint| overlay::endpoint_objects(around, &network, &blocks, endpoint);
        let before: Vec<&Endpoint> = touched.values().flatten().map(Arc::as_ref).collect();
        let now = touched.keys().filter_map(|endpoint| self.endpoint(id, *endpoint));
        // One that was written just now: who wrote it is about to ask for it.
        let is_new = |e: &Endpoint| touched.get(&e.id).is_some_and(Option::is_none);
        let (expected, now): (Vec<_>, Vec<_>) = now.partition(|endpoint| {
            endpoint.node == self.me.name
                && is_new(endpoint)
                && !slot.has_device(Device::Endpoint(endpoint.id))
        });
        let now_is = Instant::now();
        let expected: Vec<_> = expected.into_iter().map(|e| (e.id, (id, now_is + PLUG_GRACE))).collect();
        let wanted: BTreeSet<Object> = now.into_iter().flat_map(|endpoint| objects(endpoint)).collect();
        let mut gone: BTreeSet<Object> = before.iter().flat_map(|endpoint| objects(endpoint)).collect();
        gone.retain(|object| !wanted.contains(object) && slot.has(object));
        if !gone.is_empty() {
            // Endpoints and blocks of one node share the way to it.
            for object in overlay::block_objects(around, &network, &blocks) {
                gone.remove(&object);
            }
            let nodes: BTreeSet<&NodeName> = before.iter().map(|endpoint| &endpoint.node).collect();
            let members = self.snapshot.members.get(&id).into_iter().flat_map(|m| m.endpoints.values());
            for endpoint in members.filter(|endpoint| nodes.contains(&endpoint.node)) {
                for object in objects(endpoint) {
                    gone.remove(&object);
                }
            }
        }
        let missing: Vec<Object> = wanted.into_iter().filter(|object| !slot.has(object)).collect();
        let devices = missing.iter().chain(&gone).any(|object| matches!(object, Object::Link(_)));
        if devices || (!gone.is_empty() && !missing.is_empty()) {
            return false;
        }
        let steps: Vec<Step> =
            gone.into_iter().rev().map(Step::Remove).chain(missing.into_iter().map(Step::Add)).collect();
        let done = self.slots.get_mut(&id).is_some_and(|slot| slot.lead(&mut self.host, &steps).is_ok());
        if !done {
            self.retry(Some(id));
        }
        if !expected.is_empty() {
            self.expected.extend(expected);
            self.check_within(PLUG_GRACE);
        }
        true
    }
}
