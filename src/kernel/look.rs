//! What stands in the sandboxes, read without changing anything.

use std::collections::{BTreeMap, BTreeSet};

use super::{Error, Netns, Sandbox};
use crate::model::object::{Device, SANDBOX_PREFIX};
use crate::model::{EndpointId, NetworkId};

/// The sandboxes of this node by network, each with the endpoints that have a device in it. Devices
/// that are just being removed do not count.
///
/// # Errors
/// When a sandbox cannot be read. One that goes meanwhile is left out.
pub fn plugged() -> Result<BTreeMap<NetworkId, BTreeSet<EndpointId>>, Error> {
    let mut plugged = BTreeMap::new();
    for name in Netns::sandboxes()? {
        let Some(id) = name.strip_prefix(SANDBOX_PREFIX).and_then(|id| id.parse().ok()) else {
            continue;
        };
        let devices = match Sandbox::open(&name) {
            Ok(mut sandbox) => sandbox.read_devices()?,
            // Only a name is left, or not even that.
            Err(Error::Path { .. } | Error::NotNetns { .. }) => continue,
            Err(error) => return Err(error),
        };
        let endpoints = devices.into_iter().filter_map(|(device, found)| match device {
            Device::Endpoint(id) if !found.leaving => Some(id),
            _ => None,
        });
        plugged.insert(id, endpoints.collect());
    }
    Ok(plugged)
}
