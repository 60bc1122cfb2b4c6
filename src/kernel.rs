//! The kernel's side: namespaces, devices, routes, neighbours, forwarding entries, nftables.
//!
//! Everything here is synchronous and meant for one dedicated thread; it decides nothing. It puts
//! [`crate::model::object`] values into the kernel and reads them back, and touches only what bears
//! our mark: names of ours, protocol number 110, the table `inet netctl`.

mod datagrams;
mod diag;
mod drops;
pub mod ebpf;
mod error;
mod host;
mod ipsec;
pub mod ipvs;
mod listen;
mod look;
pub mod memory;
mod message;
mod monitor;
mod netlink;
mod netns;
pub mod nft;
mod observe;
mod plug;
mod probe;
mod reach;
mod ready;
mod sandbox;
mod sysctl;
mod unplug;

pub use datagrams::Datagrams;
pub use diag::{can_end_connections, connections_among, end_connections};
pub use drops::{Dropped, Drops};
pub use error::Error;
pub use host::{Host, Interface, Inventory, network_devices, network_of};
pub use listen::{Listening, listen_at};
pub use look::plugged;
pub use monitor::{Kind, Monitor, Notice, Scope};
pub use netlink::{Netlink, NetlinkError};
pub use netns::{Netns, boot_id};
pub use probe::{has_scheduler, probe};
pub use sandbox::{Sandbox, delete_sandbox};

use probe::reports_address_protocol;

/// Removes everything of ours from the kernel: the sandboxes with all that is in them, the pairs that
/// lead to them, the host's table and programs. It goes on after errors and returns them all.
pub fn cleanup(host: &mut Host) -> Vec<Error> {
    let mut errors = Vec::new();
    match Netns::sandboxes() {
        Ok(names) => errors.extend(names.iter().filter_map(|name| delete_sandbox(name).err())),
        Err(error) => errors.push(error),
    }
    errors.extend(host.remove_pairs_but(&std::collections::BTreeSet::new()));
    errors.extend(nft::remove(host.netns()).err());
    errors.extend(host.detach_programs());
    errors.extend(ebpf::remove_pins().map_err(Error::path("remove", ebpf::DIRECTORY)).err());
    errors
}
