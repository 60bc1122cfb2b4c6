//! What is asked for when an endpoint is to be made.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::{Attachment, EndpointState, MacAddr, Name};

/// A request for an endpoint on this node.
#[derive(Debug, Clone)]
pub struct EndpointRequest {
    /// The name; `None`: the endpoint's id.
    pub name: Option<Name>,
    /// Other names by which its network finds it.
    pub aliases: Vec<Name>,
    /// Addresses that it must have, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// The Ethernet address that it must have.
    pub mac: Option<MacAddr>,
    /// Where it is plugged in.
    pub attachment: Attachment,
    /// Whether the interface's name was left open: then any is right.
    pub any_interface: bool,
    /// Whether it is the node's host.
    pub host: bool,
    /// The service that it belongs to: it gets what is kept for that.
    pub service: Option<Name>,
    /// Its share of the service's connections.
    pub weight: u16,
    /// Whether it takes connections of the service at once.
    pub state: EndpointState,
    /// Free text by key.
    pub labels: BTreeMap<String, String>,
}

impl EndpointRequest {
    /// A request that leaves everything open but where to plug in.
    pub fn new(attachment: Attachment) -> Self {
        Self {
            name: None,
            aliases: Vec::new(),
            addresses: Vec::new(),
            mac: None,
            attachment,
            any_interface: false,
            host: false,
            service: None,
            weight: 1,
            state: EndpointState::default(),
            labels: BTreeMap::new(),
        }
    }
}
