//! What earlier agents have left in the kernel, where this one carries packets, or balances, otherwise.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::entries::{Entries, apply_paths, open_connections, timeouts_of};
use super::paths::Paths;
use crate::kernel::ebpf::Maps;
use crate::kernel::{self, Sandbox};
use crate::model::EndpointId;
use crate::model::object::Device;

/// Has what earlier agents attached leave all packets to the kernel, before the devices go by which they
/// cross.
pub(super) fn forget_paths(maps: &Maps, left: &mut BTreeMap<u32, Entries>) -> Result<(), kernel::Error> {
    for entries in left.values_mut() {
        apply_paths(maps, &std::mem::take(&mut entries.paths), &Paths::default(), &entries.table)?;
    }
    Ok(())
}

/// The same on a node that balances otherwise; there the maps go.
pub(in crate::app::dataplane) fn forget() -> Result<(), kernel::Error> {
    // IPVS takes no connections over.
    let open = |maps: Maps| open_connections(&maps, &timeouts_of(&maps).ok()?).ok();
    let open = Maps::of_agent().ok().and_then(open).unwrap_or_default();
    let open: u32 = open.values().map(|(active, inactive)| active + inactive).sum();
    if open > 0 {
        warn!(connections = open, "connections that eBPF balanced end: this engine carries none on");
    }
    let failed = |source| kernel::Error::System {
        action: "have the kernel carry what an earlier agent's eBPF carried",
        source,
    };
    kernel::ebpf::leave_all().map_err(failed)?;
    kernel::ebpf::remove_pins().map_err(|source| kernel::Error::System {
        action: "remove the maps of an earlier agent's eBPF",
        source,
    })
}

/// Removes all of eBPF from a node that balances otherwise.
pub(in crate::app::dataplane) fn remove(
    sandbox: &Sandbox,
    containers: impl Iterator<Item = EndpointId>,
) {
    let detached = sandbox.netns().enter(|| {
        containers
            .filter(|container| {
                let device = Device::Endpoint(*container).to_string();
                kernel::ebpf::detach(&device).unwrap_or_else(|error| {
                    warn!(%error, "eBPF programs of an earlier agent are not detached");
                    false
                })
            })
            .count()
    });
    if let Ok(count @ 1..) = detached {
        info!(sandbox = sandbox.name(), count, "eBPF programs of an earlier agent are detached");
    }
}
