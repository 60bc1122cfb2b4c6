//! What the kernel drops, with its reason: a program at its tracepoint tells it while somebody watches. It needs
//! none of the maps of a node, and goes with its value.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use aya::maps::{Array, HashMap as AnyHash, MapData, MapError, RingBuf};
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Btf, Ebpf as Object, EbpfLoader, include_bytes_aligned};
use bytemuck::{Pod, Zeroable};

use super::{Error, btf};

const PROGRAM: &str = "netctl_drops";
static CODE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/drops.o"));
/// Where the kernel says what its types are (BTF).
const TYPES: &str = "/sys/kernel/btf/vmlinux";
/// The type of the reasons, and how all of them begin.
const REASONS: &str = "skb_drop_reason";
const PREFIX: &str = "SKB_DROP_REASON_";
/// How much of a packet is told.
const TOLD: usize = 128;

/// `struct drop` in `ebpf/drops.c`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Raw {
    time: u64,
    namespace: u32,
    interface: u32,
    input: u32,
    zero: u32,
    reason: u32,
    length: u32,
    packet: [u8; TOLD],
}

/// A packet that the kernel has dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelDrop {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// The inode of the namespace where that was.
    pub namespace: u64,
    /// The device there by which the packet had come, and that at which it was.
    pub interfaces: [u32; 2],
    /// Why, as the kernel calls it: `IP_RPFILTER` is `ip-rpfilter`.
    pub reason: String,
    /// The beginning of the packet, without its frame.
    pub packet: Vec<u8>,
}

/// Where it is watched what the kernel drops.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    places: BTreeMap<u32, u32>,
    devices: BTreeMap<u32, u32>,
}

impl Watched {
    /// In the host's namespace, of packets that came or go by these devices, and in sandboxes; namespaces by their
    /// inodes.
    pub fn new(host: u64, devices: &[u32], sandboxes: impl Iterator<Item = u64>) -> Self {
        // The kernel counts them in 32 bits.
        let places = sandboxes.map(|inode| (inode as u32, 0)).chain([(host as u32, 1)]).collect();
        Self { places, devices: devices.iter().map(|device| (*device, 0)).collect() }
    }
}

/// What the kernel drops in some namespaces. Dropping this ends it.
pub struct KernelDrops {
    _object: Object,
    places: AnyHash<MapData, u32, u32>,
    devices: AnyHash<MapData, u32, u32>,
    lost: Array<MapData, u64>,
    ring: RingBuf<MapData>,
    watched: Watched,
    reasons: HashMap<u32, String>,
}

impl KernelDrops {
    /// Begins to watch, nowhere yet; the tunnel has this UDP port.
    ///
    /// # Errors
    /// When the kernel does not say what its types are, or does not take the program.
    pub fn begin(port: u16) -> Result<Self, Error> {
        let maps = |error| Error::Maps { program: PROGRAM, source: Box::new(error) };
        let refused = |error| Error::Program { program: PROGRAM, source: Box::new(error) };
        let types = |error: io::Error| Error::FileSystem {
            action: "read the kernel's types in",
            path: TYPES.into(),
            source: error,
        };
        let reasons = reasons().map_err(types)?;
        let btf = Btf::from_sys_fs().map_err(|error| refused(ProgramError::Btf(error)))?;
        let port = u32::from(port.to_be());
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf)).override_global("port", &port, true);
        let mut object = loader.load(CODE).map_err(maps)?;
        let program = object.program_mut(PROGRAM).ok_or(Error::Missing { program: PROGRAM })?;
        let program: &mut BtfTracePoint = program.try_into().map_err(refused)?;
        program.load("kfree_skb", &btf).map_err(refused)?;
        program.attach().map_err(refused)?;
        let (places, devices) = (map(&mut object, "places")?, map(&mut object, "devices")?);
        let lost = map(&mut object, "lost")?;
        let ring = map(&mut object, "drops")?;
        Ok(Self { _object: object, places, devices, lost, ring, watched: Watched::default(), reasons })
    }

    /// Watches these and nothing else.
    ///
    /// # Errors
    /// When a map cannot be written.
    pub fn watch(&mut self, wanted: Watched) -> Result<(), Error> {
        let written = write(&mut self.devices, &self.watched.devices, &wanted.devices);
        written.map_err(|error| failed("write", "devices", error))?;
        let written = write(&mut self.places, &self.watched.places, &wanted.places);
        written.map_err(|error| failed("write", "places", error))?;
        self.watched = wanted;
        Ok(())
    }

    /// How many could not be told, so far, since nobody read the others in time.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn lost(&self) -> Result<u64, Error> {
        self.lost.get(&0, 0).map_err(|error| failed("read", "lost", error))
    }

    /// Takes the next one that is there.
    pub fn take(&mut self) -> Option<KernelDrop> {
        loop {
            let bytes = self.ring.next()?;
            // Nobody but the program writes there, and it writes nothing else.
            let Ok(raw) = bytemuck::try_pod_read_unaligned::<Raw>(&bytes) else { continue };
            let reason = self.reasons.get(&raw.reason).cloned();
            return Some(KernelDrop {
                time: raw.time,
                namespace: raw.namespace.into(),
                interfaces: [raw.input, raw.interface],
                reason: reason.unwrap_or_else(|| raw.reason.to_string()),
                packet: raw.packet.get(..raw.length as usize).unwrap_or_default().to_vec(),
            });
        }
    }
}

impl AsRawFd for KernelDrops {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl std::fmt::Debug for KernelDrops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelDrops").field("watched", &self.watched).finish_non_exhaustive()
    }
}

/// Makes a map of what it has.
fn write(
    map: &mut AnyHash<MapData, u32, u32>,
    now: &BTreeMap<u32, u32>,
    wanted: &BTreeMap<u32, u32>,
) -> Result<(), MapError> {
    for (key, value) in wanted.iter().filter(|(key, _)| !now.contains_key(key)) {
        map.insert(key, value, 0)?;
    }
    now.keys().filter(|key| !wanted.contains_key(key)).try_for_each(|key| map.remove(key))
}

fn map<M>(object: &mut Object, name: &'static str) -> Result<M, Error>
where
    M: TryFrom<aya::maps::Map, Error = MapError>,
{
    let map = object.take_map(name).ok_or(Error::Missing { program: PROGRAM })?;
    M::try_from(map).map_err(|error| failed("open", name, error))
}

fn failed(action: &'static str, map: &'static str, error: MapError) -> Error {
    Error::Map { action, map, source: io::Error::other(error) }
}

/// What this kernel calls its reasons.
fn reasons() -> io::Result<HashMap<u32, String>> {
    let found = btf::enumeration(&std::fs::read(TYPES)?, REASONS);
    let found = found.ok_or_else(|| io::Error::other(format!("there is no {REASONS} in it")))?;
    Ok(found.into_iter().map(|(number, name)| (number, called(&name))).collect())
}

/// A reason as it is told.
fn called(name: &str) -> String {
    name.strip_prefix(PREFIX).unwrap_or(name).to_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_as_the_kernel_calls_them() {
        assert_eq!(called("SKB_DROP_REASON_IP_RPFILTER"), "ip-rpfilter");
        assert_eq!(called("SKB_CONSUMED"), "skb-consumed");
        // All kernels that have reasons have this one (Linux 5.17).
        assert!(reasons().unwrap().values().any(|reason| reason == "no-socket"));
    }
}
