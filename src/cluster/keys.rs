//! The layout of the store.
//!
//! | Key | Value |
//! | --- | --- |
//! | `base/cluster` | schema version and identity of the cluster |
//! | `base/networks-guard` | nothing; written with every network, so that changes of networks are serial |
//! | `base/networks/<network>` | a [`crate::model::Network`] |
//! | `base/nodes/<node name>` | a [`crate::model::Node`] |
//! | `base/alive/<node name>` | the node's id; lives under the node's lease |
//! | `base/drained/<node name>` | nothing; the node's endpoints get no new connections |
//! | `base/checks/<check>` | a [`crate::model::CheckRequest`], under a lease of its own |
//! | `checks/<check>/<node name>` | a [`crate::model::CheckAnswer`], under the request's lease |
//! | `members/<network>/endpoints/<endpoint>` | a [`crate::model::Endpoint`] |
//! | `members/<network>/names/<endpoint name>` | the endpoint's id |
//! | `members/<network>/addresses/<address>` | the endpoint's id; empty while it rests, then it lives under a lease |
//! | `members/<network>/usage` | nothing; written with every address that is taken |
//! | `members/<network>/reservations/<name>` | a [`crate::model::Reservation`] |
//! | `members/<network>/reservations-guard` | nothing; written with every reservation that is made or grows |
//! | `base/services/<name>` | a [`crate::model::Service`] |
//! | `members/<network>/acks/<endpoint>/<node name>` | a [`super::drain::Ack`] of a drained endpoint |
//! | `members/<network>/blocks/<range>` | the name of the node that has this block of addresses |
//! | `local/<node name>/<network>/<endpoint>` | nothing; finds a node's networks without reading all |
//!
//! What every node needs is below `base/`, so one watch sees it in one order.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::model::{CheckId, EndpointId, Name, NetworkId, NodeName};

pub(super) const BASE: &str = "base/";
pub(super) const GUARD: &str = "base/networks-guard";
pub(super) const NETWORKS: &str = "base/networks/";
pub(super) const NODES: &str = "base/nodes/";
pub(super) const SERVICES: &str = "base/services/";
pub(super) const ALIVE: &str = "base/alive/";
pub(super) const DRAINED: &str = "base/drained/";
pub(super) const CHECKS: &str = "base/checks/";

pub(super) fn network(id: NetworkId) -> String {
    format!("{NETWORKS}{id}")
}

pub(super) fn node(name: &NodeName) -> String {
    format!("{NODES}{name}")
}

pub(super) fn alive(name: &NodeName) -> String {
    format!("{ALIVE}{name}")
}

pub(super) fn drained(name: &NodeName) -> String {
    format!("{DRAINED}{name}")
}

pub(super) fn check(id: CheckId) -> String {
    format!("{CHECKS}{id}")
}

pub(super) fn answers(id: CheckId) -> String {
    format!("checks/{id}/")
}

pub(super) fn answer(id: CheckId, node: &NodeName) -> String {
    format!("checks/{id}/{node}")
}

pub(super) fn members(network: NetworkId) -> String {
    format!("members/{network}/")
}

pub(super) fn endpoints(network: NetworkId) -> String {
    format!("members/{network}/endpoints/")
}

pub(super) fn endpoint(network: NetworkId, id: EndpointId) -> String {
    format!("members/{network}/endpoints/{id}")
}

pub(super) fn name(network: NetworkId, name: &Name) -> String {
    format!("members/{network}/names/{name}")
}

pub(super) fn addresses(network: NetworkId) -> String {
    format!("members/{network}/addresses/")
}

pub(super) fn address(network: NetworkId, address: IpAddr) -> String {
    format!("members/{network}/addresses/{address}")
}

pub(super) fn blocks(network: NetworkId) -> String {
    format!("members/{network}/blocks/")
}

pub(super) fn block(network: NetworkId, range: IpNetwork) -> String {
    format!("members/{network}/blocks/{range}")
}

pub(super) fn acks(network: NetworkId) -> String {
    format!("members/{network}/acks/")
}

pub(super) fn acks_of(network: NetworkId, endpoint: EndpointId) -> String {
    format!("members/{network}/acks/{endpoint}/")
}

pub(super) fn ack(network: NetworkId, endpoint: EndpointId, node: &NodeName) -> String {
    format!("members/{network}/acks/{endpoint}/{node}")
}

/// The endpoint and the node of an ack's key, which is without the prefix of all acks.
pub(super) fn acked(rest: &str) -> Option<(EndpointId, NodeName)> {
    let (endpoint, node) = rest.split_once('/')?;
    Some((endpoint.parse().ok()?, node.parse().ok()?))
}

pub(super) fn usage(network: NetworkId) -> String {
    format!("members/{network}/usage")
}

pub(super) fn service(name: &Name) -> String {
    format!("{SERVICES}{name}")
}

pub(super) fn reservations(network: NetworkId) -> String {
    format!("members/{network}/reservations/")
}

pub(super) fn reservation(network: NetworkId, name: &Name) -> String {
    format!("members/{network}/reservations/{name}")
}

pub(super) fn reservations_guard(network: NetworkId) -> String {
    format!("members/{network}/reservations-guard")
}

pub(super) fn locals(node: &NodeName) -> String {
    format!("local/{node}/")
}

pub(super) fn local(node: &NodeName, network: NetworkId, id: EndpointId) -> String {
    format!("local/{node}/{network}/{id}")
}
