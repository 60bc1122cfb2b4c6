//! The ways between nodes: how much the host's routes carry to each, and where what comes past the stack
//! enters this one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tracing::{debug, info, warn};

use super::Worker;
use crate::kernel;
use crate::model::node::inner_mtu;
use crate::model::{Node, NodeName, Snapshot};

type Nodes = BTreeMap<NodeName, Arc<Node>>;

/// What every IPv6 link carries whole (RFC 8200, 5).
const SMALLEST: u32 = 1280;

impl Worker {
    /// Has what comes by the wire skip the stack, where the underlay address is now; or nowhere. And has
    /// what is for other nodes follow what the host's routes carry there.
    pub(super) fn follow_wire(&mut self) -> Result<(), kernel::Error> {
        let found = self.host.device_of(self.me.underlay)?;
        let has_ipsec = self.host.has_ipsec().unwrap_or_else(|error| {
            warn!(%error, "nobody knows whether this host has IPsec policies: the kernel carries all");
            true
        });
        if found.is_some() {
            self.narrow()?;
        }
        let fast = self.ebpf.clone().filter(|node| node.borrow().is_fast());
        if let Some(node) = &fast {
            let unfit = self.limits.iter().filter(|(_, limit)| **limit < SMALLEST);
            let unfit = unfit.map(|(node, _)| *node).collect();
            let mut node = node.borrow_mut();
            let is_new = node.set_wired(!has_ipsec);
            if is_new && has_ipsec {
                warn!("this host has IPsec policies: what is for other nodes goes through the stack");
            }
            if node.set_unfit(unfit) || is_new {
                self.changed.extend(self.slots.keys());
            }
            self.settings.tally.events.keep(node.events()?);
        }
        if !self.swept {
            // The underlay address may have moved to another device while no agent was here.
            for error in self.host.detach_programs_but(found.as_deref()) {
                warn!(%error, "eBPF program of an earlier agent is not detached");
            }
            self.swept = true;
        }
        let fast = fast.filter(|_| !has_ipsec);
        let attached = match (&found, &fast) {
            (Some(device), Some(node)) => node.borrow().attach_wire(device)?,
            (Some(device), None) => {
                kernel::ebpf::detach(device)?;
                false
            }
            (None, _) => false,
        };
        if self.wire != found {
            if let Some(left) = &self.wire
                && let Err(error) = kernel::ebpf::detach(left)
            {
                debug!(%error, "the underlay's device of before has gone");
            }
            match (&found, &fast) {
                (Some(device), Some(_)) => info!(device, "what comes by the wire skips the stack"),
                (None, Some(_)) => warn!(
                    underlay = %self.me.underlay,
                    "no device has the underlay address: what comes by the wire goes through the stack"
                ),
                (_, None) => {}
            }
            self.wire = found;
        } else if attached {
            warn!(device = self.wire, "the eBPF program at the underlay was detached: it is back");
            self.settings.tally.repairs.inc();
        }
        Ok(())
    }

    /// Takes a new snapshot up, with the nodes as the host reaches them; gives the one before.
    pub(super) fn take_up(&mut self, mut snapshot: Snapshot) -> Snapshot {
        self.nodes = snapshot.nodes.clone();
        snapshot.nodes = narrowed(&self.nodes, &self.limits);
        std::mem::replace(&mut self.snapshot, snapshot)
    }

    /// Has routes to nodes carry what the host's own routes bring there whole, where that is less than the
    /// underlay should: who sends more is told so.
    fn narrow(&mut self) -> Result<(), kernel::Error> {
        let others: Vec<&Arc<Node>> = self.nodes.values().filter(|node| node.id != self.me.id).collect();
        let addresses: Vec<IpAddr> = others.iter().map(|node| node.underlay).collect();
        let reach = self.host.reach(self.me.underlay, &addresses)?;
        let inner = |node: &Node, outer: u32| inner_mtu(node.underlay, outer);
        let limits = others.iter().zip(reach).map(|(node, outer)| (*node, inner(node, outer)));
        let limits = limits.filter(|(node, inner)| *inner < node.mtu.min(self.me.mtu));
        let limits: BTreeMap<IpAddr, u32> = limits.map(|(node, inner)| (node.underlay, inner)).collect();
        if limits == self.limits {
            return Ok(());
        }
        for (node, limit) in limits.iter().filter(|(node, limit)| self.limits.get(*node) != Some(*limit))
        {
            warn!(%node, limit, "the host's routes carry less to this node than its underlay should");
        }
        self.limits = limits;
        self.snapshot.nodes = narrowed(&self.nodes, &self.limits);
        self.changed.extend(self.slots.keys());
        Ok(())
    }
}

/// Nodes as the host's routes reach them. One to which they carry less than IPv6 asks for stays as it is: the
/// kernel cuts packets for it, as far as it can.
fn narrowed(nodes: &Arc<Nodes>, limits: &BTreeMap<IpAddr, u32>) -> Arc<Nodes> {
    if limits.is_empty() {
        return nodes.clone();
    }
    let narrow = |node: &Arc<Node>| match limits.get(&node.underlay) {
        Some(&mtu @ SMALLEST..) if mtu < node.mtu => Arc::new(Node { mtu, ..(**node).clone() }),
        _ => node.clone(),
    };
    Arc::new(nodes.iter().map(|(name, node)| (name.clone(), narrow(node))).collect())
}
