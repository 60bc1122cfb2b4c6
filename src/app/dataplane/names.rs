//! What the kernel is to answer of names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::dns::{DomainName, Zone};

/// What is told of names on this node.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// What all names are below of.
    pub domain: DomainName,
    /// For how many seconds an answer may be kept.
    pub ttl: u32,
    /// The number of the state that is told.
    pub serial: u32,
    /// The networks by their numbers.
    pub networks: BTreeMap<u32, ToldNetwork>,
}

/// What is told on one network.
#[derive(Debug, Clone)]
pub struct ToldNetwork {
    /// Its names.
    pub zone: Arc<Zone>,
    /// Where they are asked for.
    pub servers: BTreeSet<IpAddr>,
}
