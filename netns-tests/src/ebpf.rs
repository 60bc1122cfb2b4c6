//! The agent's programs, and what stands in their maps, as text that can be compared.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netctl::kernel::ebpf::{self, Front, Maps, Meaning, Place, Range, Way};

use crate::dump::PASSING;
use crate::space::Space;

/// The devices among those of a namespace that run programs, with these.
pub(crate) fn attached<'a>(space: &Space, devices: impl Iterator<Item = &'a str>) -> Vec<String> {
    let devices: Vec<_> = devices.collect();
    space.enter(|| {
        let lines = devices.into_iter().filter_map(|device| match ebpf::attached(device) {
            Ok(programs) if programs.is_empty() => None,
            Ok(programs) => Some(format!("{device}: {}", programs.join(" "))),
            // One that has gone since then is none.
            Err(error) if error.device_is_gone() => None,
            Err(error) => Some(error.to_string()),
        });
        lines.collect()
    })
}

/// The files in the kernel's file system for maps, and what the agent has written into those; not what
/// connections leave there.
pub(crate) fn maps(space: &Space) -> [(&'static str, Vec<String>); 2] {
    let pins = space.try_sh("find /sys/fs/bpf -mindepth 1 | sort").stdout;
    let maps = space.enter(|| match Maps::of_agent() {
        Ok(maps) => entries(&maps),
        // Without an agent that has made them there are none.
        Err(_) if pins.is_empty() => Vec::new(),
        Err(error) => vec![error.to_string()],
    });
    [("pins", pins.lines().map(str::to_owned).collect()), ("maps", maps)]
}

fn entries(maps: &Maps) -> Vec<String> {
    const READ: &str = "a map of the agent's can be read";
    let at = |place: &Place| format!("{} in {}", IpAddr::from(place.address), place.network);
    let mut lines = Vec::new();
    for (place, Meaning { kind, interface, mtu, crossing, mac, balances }) in
        maps.addresses.entries().expect(READ)
    {
        lines.push(format!(
            "address {}: {kind} mtu {mtu} {balances}{PASSING}{mac:x?} {interface} {crossing}",
            at(&place)
        ));
    }
    for (Range { bits, network, address }, way) in maps.ways.entries().expect(READ) {
        let Way { local, remote, local_mac, remote_mac, mtu, crossing, port, .. } = way;
        let [address, local, remote] = [address, local, remote].map(IpAddr::from);
        lines.push(format!(
            "way {address}/{} in {network}: {local} to {remote} {} mtu {mtu}{PASSING}{crossing} \
             {local_mac:x?} {remote_mac:x?}",
            bits - 32,
            u16::from(port)
        ));
    }
    for (place, gateway) in maps.gateways.entries().expect(READ) {
        lines.push(format!("gateway {}: {}", at(&place), IpAddr::from(gateway)));
    }
    let fronts = maps.fronts.entries().expect(READ);
    let backends: BTreeMap<_, _> = maps.backends.entries().expect(READ).into_iter().collect();
    for (key, Front { id, scheduler, affinity, slots, .. }) in fronts {
        let (address, port) = (IpAddr::from(key.address), u16::from(key.port));
        lines.push(format!(
            "front {address} {port} {} in {}: {scheduler} {affinity} {slots}{PASSING}{id}",
            key.protocol, key.network
        ));
        for (number, backend) in backends.iter().filter(|(_, backend)| backend.front == id) {
            lines.push(format!("backend {} {}{PASSING}{number} {id}", backend.socket(), backend.weight));
        }
    }
    for (network, times) in maps.timeouts.entries().expect(READ) {
        lines.push(format!("timeouts of {network}: {times:?}"));
    }
    lines.sort();
    lines
}
