//! For how long nodes have been dead.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::{NodeName, Snapshot};

/// The nodes that are dead. What connections there are to a node whose lease has just ended may well
/// go on: only its agent may be away, or cut off from the store. After another lease it is taken for
/// gone, and they end: their clients hear of that sooner than by silence.
#[derive(Debug)]
pub(super) struct Dead {
    lease: Duration,
    since: BTreeMap<NodeName, Instant>,
    gone: BTreeSet<NodeName>,
}

impl Dead {
    pub(super) fn new(lease: Duration) -> Self {
        Self { lease, since: BTreeMap::new(), gone: BTreeSet::new() }
    }

    /// Takes over from a snapshot who is alive.
    pub(super) fn follow(&mut self, snapshot: &Snapshot, now: Instant) {
        let dead = |node: &NodeName| snapshot.nodes.contains_key(node) && !snapshot.alive.contains(node);
        self.since.retain(|node, _| dead(node));
        for node in snapshot.nodes.keys().filter(|node| dead(node)) {
            self.since.entry(node.clone()).or_insert(now);
        }
    }

    /// Finds out who is gone by now; whether that is somebody else than before.
    pub(super) fn advance(&mut self, now: Instant) -> bool {
        let ended = |since: &Instant| now.duration_since(*since) >= self.lease;
        let gone = self.since.iter().filter(|(_, since)| ended(since)).map(|(node, _)| node.clone());
        let gone = gone.collect();
        std::mem::replace(&mut self.gone, gone) != self.gone
    }

    /// When the next one is gone.
    pub(super) fn due(&self) -> Option<Instant> {
        let waited = self.since.iter().filter(|(node, _)| !self.gone.contains(*node));
        waited.map(|(_, since)| *since + self.lease).min()
    }

    /// Those that are gone.
    pub(super) fn gone(&self) -> &BTreeSet<NodeName> {
        &self.gone
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Node;

    fn snapshot(alive: &[&str]) -> Snapshot {
        let node = |name: &str| -> Arc<Node> {
            Arc::new(
                serde_json::from_value(serde_json::json!({
                    "id": "0123456789ab", "name": name, "underlay": "192.0.2.1",
                    "vtep_mac": "02:00:00:00:00:01", "tunnel_port": 4789, "mtu": 1450,
                }))
                .unwrap(),
            )
        };
        Snapshot {
            nodes: Arc::new(["n1", "n2"].map(|name| (name.parse().unwrap(), node(name))).into()),
            alive: Arc::new(alive.iter().map(|name| name.parse().unwrap()).collect()),
            ..Snapshot::default()
        }
    }

    #[test]
    fn a_node_is_gone_a_lease_after_it_died_unless_it_comes_back() {
        let (start, lease) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds| start + Duration::from_secs(seconds);
        let n2 = BTreeSet::from(["n2".parse().unwrap()]);
        let mut dead = Dead::new(lease);
        dead.follow(&snapshot(&["n1", "n2"]), at(0));
        assert_eq!((dead.advance(at(0)), dead.due()), (false, None));
        dead.follow(&snapshot(&["n1"]), at(1));
        // It is dead since it was first seen so.
        dead.follow(&snapshot(&["n1"]), at(5));
        assert_eq!((dead.advance(at(10)), dead.due()), (false, Some(at(11))));
        assert_eq!((dead.advance(at(11)), dead.due()), (true, None));
        assert_eq!((dead.advance(at(12)), dead.gone()), (false, &n2));
        dead.follow(&snapshot(&["n1", "n2"]), at(13));
        assert_eq!((dead.advance(at(13)), dead.gone()), (true, &BTreeSet::new()));
        // It dies again: all begins anew.
        dead.follow(&snapshot(&["n1"]), at(14));
        assert_eq!((dead.advance(at(20)), dead.due()), (false, Some(at(24))));
    }
}
