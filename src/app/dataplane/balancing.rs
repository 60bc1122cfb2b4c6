//! What balances one sandbox's connections, whichever engine does it.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::kernel::{self, Sandbox, ipvs};
use crate::lb::{Balancer, Front};
use crate::model::EndpointId;
use crate::model::object::Object;

/// What a backend has of a front on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// What is balanced.
    pub front: Front,
    /// The backend.
    pub backend: SocketAddr,
    /// Its weight in the kernel; 0: it gets no new connections.
    pub weight: u32,
    /// Its connections that are established. UDP has none: it never says when it is done.
    pub active: u32,
    /// Its other entries: connections that begin or end, and all of UDP.
    pub inactive: u32,
    /// How many connections it got since it is a backend here.
    pub connections: u64,
    /// How many bytes clients sent to it.
    pub incoming_bytes: u64,
    /// How many bytes it sent to clients.
    pub outgoing_bytes: u64,
}

/// The balancing of one sandbox: what the kernel has, as far as it is known, and what it should have.
pub(super) trait Balancing {
    /// What it balances.
    fn balancer(&self) -> &Balancer;

    /// Reads what the kernel has again: somebody may have changed it. This is in the sandbox by now. Gives
    /// what the backends have.
    fn reread(
        &mut self,
        sandbox: &Sandbox,
        objects: &BTreeSet<Object>,
    ) -> Result<Vec<Load>, kernel::Error>;

    /// How many entries that somebody else had changed were put right since this was asked last.
    fn repaired(&mut self) -> u64;

    /// Makes it what it should be. Goes on after a failure, and returns the last one.
    fn converge(&mut self, sandbox: &Sandbox, balancer: &Balancer) -> Result<(), kernel::Error>;

    /// Has the connections of the containers whose devices are in the sandbox balanced, and what stays
    /// within the network carried by what is there.
    fn follow(&mut self, sandbox: &Sandbox, objects: &BTreeSet<Object>) -> Result<(), kernel::Error>;

    /// Carries on connections that IPVS has in the sandbox until now; gives those that it cannot.
    fn take_over(
        &mut self,
        sandbox: &Sandbox,
        objects: &BTreeSet<Object>,
        connections: &[ipvs::Connection],
    ) -> Result<Vec<ipvs::Connection>, kernel::Error>;

    /// The devices of these containers are others by now, or none.
    fn unfollow(&mut self, containers: &[EndpointId]);

    /// What each backend has of each front, as the kernel counts now.
    fn loads(&mut self, sandbox: &Sandbox) -> Result<Vec<Load>, kernel::Error>;

    /// Whether a balancer needs no rule of the firewall that is not there yet.
    fn has_rules_for(&self, balancer: &Balancer) -> bool;
}
