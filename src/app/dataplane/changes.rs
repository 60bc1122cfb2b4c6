//! What a snapshot of the cluster means for the dataplane, and in what two of them differ.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{Endpoint, EndpointId, Network, NetworkId, Node, NodeName, Snapshot, Versioned};
use crate::overlay::Blocks;

/// The endpoints of a network.
pub(super) type Endpoints = BTreeMap<EndpointId, Arc<Endpoint>>;

/// All nodes, as a snapshot has them.
type Nodes = Arc<BTreeMap<NodeName, Arc<Node>>>;

/// What this node did itself and the view may not show yet, each with its revision.
#[derive(Default)]
pub(super) struct Ahead {
    pub(super) added: BTreeMap<EndpointId, (Arc<Endpoint>, u64)>,
    pub(super) removed: BTreeMap<EndpointId, u64>,
}

impl Ahead {
    /// Notes an endpoint that was written at a revision, unless a view of the revision `known` shows
    /// that, or what came of it since.
    pub(super) fn add(&mut self, endpoint: Arc<Endpoint>, revision: u64, known: u64) {
        if revision > known {
            self.added.insert(endpoint.id, (endpoint, revision));
        }
    }

    /// Forgets what a view of this revision shows; whether an endpoint of a service was among it.
    pub(super) fn forget_until(&mut self, known: u64) -> bool {
        let gone = self.added.extract_if(.., |_, (_, revision)| *revision <= known);
        let of_service = gone.filter(|(_, (endpoint, _))| endpoint.service.is_some()).count() > 0;
        self.removed.retain(|_, revision| *revision > known);
        of_service
    }

    /// Whether a view shows all of it.
    pub(super) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty()
    }

    /// Does the same to what the view shows.
    pub(super) fn apply(&self, endpoints: &mut Endpoints) {
        endpoints.extend(self.added.iter().map(|(id, (endpoint, _))| (*id, endpoint.clone())));
        endpoints.retain(|id, _| !self.removed.contains_key(id));
    }
}

/// A network as a node has it: a subnet stands until its removal is certain.
pub(super) fn as_it_stands(network: &Arc<Versioned<Network>>) -> Arc<Versioned<Network>> {
    match network.leaving.is_empty() {
        true => network.clone(),
        false => Arc::new(Versioned { value: network.as_it_stands(), revision: network.revision }),
    }
}

/// Whether a network has the subnets of all addresses of an endpoint. Endpoints and networks are
/// heard of on ways of their own: one of a new subnet may come before the subnet.
pub(super) fn has_place(network: &Network, endpoint: &Endpoint) -> bool {
    endpoint.addresses.iter().all(|address| network.subnet_of(*address).is_some())
}

/// Whose each block of a network's addresses is.
pub(super) fn blocks_of(snapshot: &Snapshot, network: NetworkId) -> Arc<Blocks> {
    snapshot.members.get(&network).map(|members| members.blocks.clone()).unwrap_or_default()
}

/// Whether the blocks of other nodes are the same: this node's own mean nothing to it.
pub(super) fn same_blocks(before: &Arc<Blocks>, now: &Arc<Blocks>, me: &NodeName) -> bool {
    let others = |blocks: &Arc<Blocks>| -> Vec<_> {
        let of_others = blocks.iter().filter(|(_, node)| *node != me);
        of_others.map(|(range, node)| (*range, node.clone())).collect()
    };
    Arc::ptr_eq(before, now) || others(before) == others(now)
}

/// Whether the ways to all nodes are the same: what else their records tell concerns no route.
pub(super) fn same_ways(before: &Nodes, now: &Nodes) -> bool {
    let same = |(a, b): (&Arc<Node>, &Arc<Node>)| {
        let way = |node: &Node| (node.underlay, node.vtep_mac, node.tunnel_port, node.mtu);
        a.name == b.name && way(a) == way(b)
    };
    Arc::ptr_eq(before, now)
        || (before.len() == now.len() && before.values().zip(now.values()).all(same))
}

/// The endpoints in which two versions of a network differ, as they were before.
pub(super) fn differences(
    before: &Endpoints,
    now: &Endpoints,
) -> Vec<(EndpointId, Option<Arc<Endpoint>>)> {
    let same = |a: &Arc<Endpoint>, b: &Arc<Endpoint>| Arc::ptr_eq(a, b) || a == b;
    let mut new = now.iter().peekable();
    let mut found = Vec::new();
    for (id, was) in before {
        while let Some((added, _)) = new.next_if(|(other, _)| *other < id) {
            found.push((*added, None));
        }
        match new.next_if(|(other, _)| *other == id) {
            Some((_, is)) if same(was, is) => {}
            _ => found.push((*id, Some(was.clone()))),
        }
    }
    found.extend(new.map(|(added, _)| (*added, None)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(service: Option<&str>) -> Endpoint {
        serde_json::from_value(serde_json::json!({
            "id": "bbbbbbbbbbbb", "name": "e", "network": "aaaaaaaaaaaa", "node": "n1",
            "addresses": ["10.9.0.2", "fd00:9::2"], "mac": "06:00:00:00:00:01", "service": service,
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }))
        .unwrap()
    }

    #[test]
    fn what_the_view_shows_by_now_is_newer_than_what_was_done() {
        let new = Arc::new(endpoint(Some("web")));
        let mut shown = Endpoints::from([(new.id, Arc::new(endpoint(None)))]);
        let mut ahead = Ahead::default();
        for known in [7, 8] {
            ahead.add(new.clone(), 7, known);
            assert!(ahead.is_empty(), "the view of {known} shows it, or what came of it");
        }
        ahead.add(new.clone(), 7, 6);
        assert!(!ahead.forget_until(6) && !ahead.is_empty());
        ahead.apply(&mut shown);
        assert_eq!(shown[&new.id], new);
        assert!(ahead.forget_until(7) && ahead.is_empty(), "it is balanced anew");
        ahead.add(Arc::new(endpoint(None)), 8, 7);
        assert!(!ahead.forget_until(9) && ahead.is_empty(), "it takes no connections");
    }

    #[test]
    fn an_endpoint_has_a_place_as_long_as_its_subnet_stands() {
        let network = |subnets, leaving| -> Arc<Versioned<Network>> {
            let value = serde_json::from_value(serde_json::json!({
                "id": "aaaaaaaaaaaa", "name": "web", "vni": 4097, "uplink": 3,
                "subnets": subnets, "leaving": leaving,
            }));
            Arc::new(Versioned { value: value.unwrap(), revision: 7 })
        };
        let endpoint = endpoint(None);
        let (v4, v6) =
            (serde_json::json!({"cidr": "10.9.0.0/24"}), serde_json::json!({"cidr": "fd00:9::/64"}));
        let none = Vec::<serde_json::Value>::new();
        for (network, place) in [
            (network(vec![v4.clone(), v6.clone()], none.clone()), true),
            (network(vec![v4.clone()], vec![v6]), true),
            (network(vec![v4], none), false),
        ] {
            assert_eq!(has_place(&as_it_stands(&network), &endpoint), place);
        }
    }
}
