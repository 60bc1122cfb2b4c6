//! In what two snapshots of the cluster differ, as far as the kernel's state depends on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{Endpoint, EndpointId, NetworkId, NodeName, Snapshot};
use crate::overlay::Blocks;

type Endpoints = BTreeMap<EndpointId, Arc<Endpoint>>;

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
