//! What the kernel drops: where it is watched, and which of it is ours to tell.

use std::collections::BTreeMap;
use std::future::pending;

use tokio::io::unix::AsyncFd;

use super::names::is_drop;
use super::sources::{Found, What, at, taken};
use crate::api::Point;
use crate::app::dataplane::Sandboxes;
use crate::kernel::ebpf::{KernelDrop, KernelDrops, Watched};
use crate::kernel::{Dropped, Netns, network_devices};
use crate::model::NetworkId;

/// Of which network a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Network(NetworkId),
    /// By its number in the tunnel (VNI).
    Number(u32),
}

/// What the kernel drops in the sandboxes, and of their networks' packets in the host's namespace.
pub(super) struct Freed {
    /// The port of the tunnel.
    port: u16,
    /// None where the kernel does not say what it drops, or is not to.
    kernel: Option<AsyncFd<KernelDrops>>,
    places: Places,
    /// How many had no room, of which was told.
    not_told: u64,
}

/// Namespaces by their inodes, and the host's devices that lead to networks.
#[derive(Debug, Default)]
struct Places {
    sandboxes: BTreeMap<u64, NetworkId>,
    devices: BTreeMap<u32, NetworkId>,
}

impl Freed {
    pub(super) fn new(port: u16) -> Self {
        Self { port, kernel: None, places: Places::default(), not_told: 0 }
    }

    /// Watches where there is something to watch now; gives how many more had no room.
    pub(super) async fn renew(&mut self, sandboxes: &Sandboxes) -> anyhow::Result<u64> {
        if self.kernel.is_none() {
            // It reads what all types of the kernel are.
            let port = self.port;
            let begun = tokio::task::spawn_blocking(move || KernelDrops::begin(port)).await??;
            // SAFETY: it keeps its one descriptor open for as long as it lives.
            let begun = unsafe { AsyncFd::register(begun) };
            self.kernel = Some(begun.map_err(std::io::Error::from)?);
            self.not_told = 0;
        }
        let watched = self.watch(sandboxes);
        if watched.is_err() {
            // What it watches is not certain any more: the next one begins anew.
            self.kernel = None;
        }
        watched
    }

    fn watch(&mut self, sandboxes: &Sandboxes) -> anyhow::Result<u64> {
        let Some(kernel) = self.kernel.as_mut().map(AsyncFd::get_mut) else { return Ok(0) };
        self.places.sandboxes = sandboxes.iter().map(|(network, inode)| (*inode, *network)).collect();
        self.places.devices = network_devices()?.into_iter().collect();
        let devices: Vec<u32> = self.places.devices.keys().copied().collect();
        let sandboxes = self.places.sandboxes.keys().copied();
        kernel.watch(Watched::new(Netns::current()?.inode(), &devices, sandboxes))?;
        Ok(kernel.lost()?.saturating_sub(self.not_told))
    }

    /// That so many had no room is told.
    pub(super) fn has_told(&mut self, lost: u64) {
        self.not_told += lost;
    }

    /// Watches no more.
    pub(super) fn stop(&mut self) {
        self.kernel = None;
    }

    /// What was dropped next; perhaps nothing that is ours.
    pub(super) async fn next(&mut self) -> Vec<Found> {
        let Some(kernel) = &mut self.kernel else { return pending().await };
        let (drops, now) = taken(kernel, KernelDrops::take).await;
        let found = drops.into_iter().filter_map(|drop| {
            let time = at(drop.time, now);
            self.places.tell(drop).map(|what| Found { time, share: 0, what })
        });
        found.collect()
    }
}

impl Places {
    /// What is to be told of a drop, where it is of a network.
    fn tell(&self, drop: KernelDrop) -> Option<What> {
        let KernelDrop { namespace, interfaces, reason, packet, .. } = drop;
        let found = match self.sandboxes.get(&namespace) {
            Some(network) => (Point::Sandbox, Of::Network(*network), packet),
            None => match interfaces.iter().find_map(|device| self.devices.get(device)) {
                Some(network) => (Point::Host, Of::Network(*network), packet),
                None => {
                    let (number, inner) = in_tunnel(&packet)?;
                    (Point::Host, Of::Number(number), inner.to_vec())
                }
            },
        };
        let (point, network, packet) = found;
        let dropped = Dropped { reason, packet, devices: interfaces.map(Some) };
        is_drop(&dropped).then_some(What::Freed(point, network, dropped))
    }
}

/// The network's number and the packet within one of the tunnel's datagrams (RFC 7348, 5).
fn in_tunnel(datagram: &[u8]) -> Option<(u32, &[u8])> {
    const UDP: usize = 8;
    const VXLAN: usize = 8;
    const FRAME: usize = 14;
    let ip = match datagram.first()? >> 4 {
        4 => usize::from(datagram.first()? & 0xf) * 4,
        6 => 40,
        _ => return None,
    };
    let vxlan = datagram.get(ip + UDP..)?;
    let number = u32::from_be_bytes(vxlan.get(4..8)?.try_into().ok()?) >> 8;
    Some((number, vxlan.get(VXLAN + FRAME..)?))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn drop(namespace: u64, interfaces: [u32; 2], packet: &[u8]) -> KernelDrop {
        let (reason, packet) = ("neigh-failed".to_owned(), packet.to_vec());
        KernelDrop { time: 0, namespace, interfaces, reason, packet }
    }

    fn packet() -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 3], 64)
            .udp(4000, 80)
            .write(&mut packet, &[7; 9])
            .unwrap();
        packet
    }

    #[test]
    fn a_drop_is_of_its_sandbox_or_of_the_network_by_whose_device_it_came_or_went() {
        let [shop, other] = ["aaaaaaaaaaaa", "bbbbbbbbbbbb"].map(|id| id.parse::<NetworkId>().unwrap());
        let places = Places { sandboxes: [(70, shop)].into(), devices: [(5, other)].into() };
        let told = |namespace, interfaces| match places.tell(drop(namespace, interfaces, &packet())) {
            Some(What::Freed(point, network, dropped)) => Some((point, network, dropped.packet)),
            _ => None,
        };
        assert_eq!(told(70, [5, 5]), Some((Point::Sandbox, Of::Network(shop), packet())));
        assert_eq!(told(1, [5, 2]), Some((Point::Host, Of::Network(other), packet())));
        assert_eq!(told(1, [2, 5]), Some((Point::Host, Of::Network(other), packet())));
        assert_eq!(told(1, [2, 2]), None);
    }

    #[test]
    fn what_is_in_the_tunnel_is_told_of_its_network() {
        let inner = [&[0x08, 0, 0, 0, 0, 0x10, 0x01, 0][..], &[2; 14], &packet()].concat();
        let mut datagrams = [Vec::new(), Vec::new()];
        let four = PacketBuilder::ipv4([192, 168, 0, 1], [192, 168, 0, 2], 64);
        four.udp(49152, 4789).write(&mut datagrams[0], &inner).unwrap();
        let six = PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64);
        six.udp(49152, 4789).write(&mut datagrams[1], &inner).unwrap();
        for datagram in datagrams {
            assert_eq!(in_tunnel(&datagram), Some((4097, &packet()[..])));
            for length in 0..datagram.len() {
                let _ = in_tunnel(&datagram[..length]);
            }
            assert_eq!(in_tunnel(&datagram[..40]), None);
        }
    }
}
