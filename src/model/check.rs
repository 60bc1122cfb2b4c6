//! How nodes are asked to compare their kernels with the store, and what they answer.

use serde::{Deserialize, Serialize};

use super::{Finding, NetworkId, NodeName};

/// A node asks all others to compare their kernels with the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// Who asks; it does not answer itself.
    pub node: NodeName,
    /// Only this network; `None`: all.
    pub network: Option<NetworkId>,
    /// The store's lease under which this and all answers live, so that they go together.
    pub lease: i64,
}

/// What a node says to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckAnswer {
    /// Where its kernel differs from the store; [`CheckAnswer::MOST`] at most.
    pub findings: Vec<Finding>,
    /// How many more there were.
    pub cut: u64,
    /// Why it could not compare; empty: it has.
    pub problem: String,
}

impl CheckAnswer {
    /// How many findings an answer holds: a store takes a megabyte at once.
    pub const MOST: usize = 1000;

    /// Takes as many findings as one answer holds, and counts the rest.
    pub fn of(mut findings: Vec<Finding>) -> Self {
        let cut = findings.len().saturating_sub(Self::MOST);
        findings.truncate(Self::MOST);
        Self { findings, cut: cut as u64, problem: String::new() }
    }
}
