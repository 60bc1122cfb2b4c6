//! What the dataplane counts of its own work, and of what others do to its objects.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use super::Load;
use crate::kernel::ebpf::EVENTS;
use crate::model::NetworkId;
use crate::model::object::{Key, Object};

/// Counters of the dataplane's work since the agent started.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Comparisons of a network's sandbox, or of the host, with what should be there.
    pub(super) runs: Counter,
    /// Comparisons after which something was not as it should be.
    pub(super) failures: Counter,
    /// Objects that somebody else changed and that are as they were again.
    pub(super) repairs: Counter,
    /// What the programs of eBPF counted when it was read last.
    pub events: Events,
    /// What backends had when what is balanced was read last.
    pub loads: Loads,
}

impl Tally {
    /// Counts objects that somebody else changed and that are as they were again.
    pub fn repaired(&self, count: u64) {
        self.repairs.inc_by(count);
    }
}

/// What the programs of eBPF have counted of the node, in the order of [`EVENTS`]; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Events(Arc<Mutex<Option<[u64; EVENTS.len()]>>>);

impl Events {
    pub(super) fn keep(&self, counted: [u64; EVENTS.len()]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(counted);
    }
}

impl Collector for Events {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(counted) = *self.0.lock().unwrap_or_else(PoisonError::into_inner) else {
            return Ok(());
        };
        let help = "What the eBPF programs refused, could not do, or answered themselves";
        let mut family = encoder.encode_descriptor("ebpf_events", help, None, MetricType::Counter)?;
        for (event, count) in EVENTS.iter().zip(counted) {
            family
                .encode_family(&[("event", *event)])?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }
}

/// What backends have on this node, by network, as it was read last; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Loads(Arc<Mutex<BTreeMap<NetworkId, Vec<Load>>>>);

impl Loads {
    /// All of it.
    pub fn all(&self) -> BTreeMap<NetworkId, Vec<Load>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what a network's backends have.
    pub(super) fn keep(&self, network: NetworkId, loads: Vec<Load>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match loads.is_empty() {
            true => drop(all.remove(&network)),
            false => drop(all.insert(network, loads)),
        }
    }
}

impl Tally {
    /// Shows the counters as metrics.
    pub fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            (
                "reconcile_runs",
                "Comparisons of a network or the host with what the kernel has",
                &self.runs,
            ),
            (
                "reconcile_failures",
                "Comparisons after which something was left to be done",
                &self.failures,
            ),
            ("reconcile_repairs", "Objects put back that somebody else had changed", &self.repairs),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register_collector(Box::new(self.events.clone()));
    }
}

/// What somebody else changed, by key, as it was before: `None` where there was nothing.
#[derive(Debug, Default)]
pub(super) struct Drift(BTreeMap<Key, Option<Object>>);

impl Drift {
    /// In what two readings differ between which nothing was done.
    pub(super) fn between(before: &BTreeSet<Object>, now: &BTreeSet<Object>) -> Self {
        let mut changed: BTreeMap<Key, Option<Object>> =
            now.difference(before).map(|object| (object.key(), None)).collect();
        changed.extend(before.difference(now).map(|object| (object.key(), Some(*object))));
        Self(changed)
    }

    /// How much of it is as it was before.
    pub(super) fn mended(&self, now: &BTreeSet<Object>) -> u64 {
        if self.0.is_empty() {
            return 0;
        }
        let keys: BTreeSet<Key> = now.iter().map(Object::key).collect();
        let mended = |(key, before): &(&Key, &Option<Object>)| match before {
            Some(object) => now.contains(object),
            None => !keys.contains(key),
        };
        self.0.iter().filter(mended).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::object::{Device, Link, LinkKind, Route, Target};

    fn link(mtu: u32) -> Object {
        Object::Link(Link { device: Device::Uplink, kind: LinkKind::Veth, mtu, up: true })
    }

    fn route(destination: &str) -> Object {
        let destination = destination.parse().unwrap();
        Object::Route(Route { destination, target: Target::Unreachable, mtu: None })
    }

    #[test]
    fn what_is_put_back_is_counted_once_and_what_is_not_is_not() {
        let ours = BTreeSet::from([link(1450), route("10.9.0.0/24"), route("10.9.1.0/24")]);
        // One is changed, one removed, one added; one stays.
        let found = BTreeSet::from([link(1400), route("10.9.1.0/24"), route("10.9.2.0/24")]);
        let drift = Drift::between(&ours, &found);
        assert_eq!((drift.mended(&ours), drift.mended(&found)), (3, 0));
        let wanted = BTreeSet::from([link(1450), route("10.9.1.0/24"), route("10.9.2.0/24")]);
        assert_eq!(drift.mended(&wanted), 1);
        assert_eq!(Drift::between(&ours, &ours).mended(&ours), 0);
    }
}
