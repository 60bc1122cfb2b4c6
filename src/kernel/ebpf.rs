//! eBPF: the programs of `ebpf/`, their maps, and the devices that they are attached to.
//!
//! A node has one of each map, pinned below `/sys/fs/bpf/netctl`, so that connections outlive the agent;
//! for each network two programs of its own, which know the network's number; and one of each of those that
//! carry packets past the stack. A program stays at a device until it is replaced, or the device goes: it
//! needs no agent.

mod btf;
mod clsact;
mod drops;
mod flows;
mod layout;
mod link;
mod map;
mod names;
mod program;
mod reports;
mod sockets;
mod sys;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::ProgramError;
use aya::{EbpfError, EbpfLoader};
use bytemuck::Pod;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use nix::time::{ClockId, clock_gettime};

pub use clsact::Filters;
pub use drops::{KernelDrop, KernelDrops, Watched};
pub use flows::{Exit, Flow, FlowKey};
pub use layout::*;
pub use map::{CpuMap, Map, difference};
pub use names::{Name, NameKey, NameMaps, Telling};
pub use program::{Attached, Path as FastPath, Programs, TunnelEnd, attached, detach, index};
pub use reports::{EVENTS, Reports, nanoseconds};
pub use sockets::{SocketMaps, Sockets, control_groups};

/// Where the kernel has its file system of maps and programs (`BPF_FS_MAGIC` in linux/magic.h).
const FILE_SYSTEM: &str = "/sys/fs/bpf";
const MAGIC: FsType = FsType(0xcafe_4a11);
/// Where ours are.
pub(super) const DIRECTORY: &str = "/sys/fs/bpf/netctl";
/// How many connections there are room for, where nobody says.
pub const CONNECTIONS: u32 = 131_072;

/// What eBPF could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's file system for maps cannot be used.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    FileSystem {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The maps of a program cannot be made.
    #[error("maps of the eBPF program {program} cannot be made: {}", texts(.source.as_ref()))]
    Maps {
        /// The program.
        program: &'static str,
        /// Why not.
        source: Box<EbpfError>,
    },
    /// The kernel does not take a program.
    #[error("this kernel does not take the eBPF program {program}: {}", texts(.source.as_ref()))]
    Program {
        /// The program.
        program: &'static str,
        /// Why not, with what its verifier says.
        source: Box<ProgramError>,
    },
    /// A program is not where it should be.
    #[error("the eBPF program {program} is not in its file")]
    Missing {
        /// The program.
        program: &'static str,
    },
    /// A map cannot be read or written.
    #[error("cannot {action} the eBPF map {map}: {source}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program cannot be attached or detached.
    #[error("cannot {action} eBPF programs at {device}: {source}")]
    Attach {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: String,
        /// Why not.
        source: io::Error,
    },
}

/// An error with what it comes from.
fn texts(error: &dyn std::error::Error) -> String {
    let mut texts = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        texts.push_str(": ");
        texts.push_str(&error.to_string());
        source = error.source();
    }
    texts
}

/// The maps of a node.
#[derive(Debug)]
pub struct Maps {
    /// What addresses mean.
    pub addresses: Map<Place, Meaning>,
    /// How other nodes' addresses are reached.
    pub ways: Map<Range, Way>,
    /// What is balanced.
    pub fronts: Map<FrontKey, Front>,
    /// Which backends take turns, where a front has no room for all.
    pub slots: Map<BlockKey, Block>,
    /// The backends by their numbers.
    pub backends: Map<u32, Backend>,
    /// What is counted for each.
    pub counts: CpuMap<u32, Counts>,
    /// By which gateway a backend of this node meets itself.
    pub gateways: Map<Place, Address>,
    /// The networks' timeouts.
    pub timeouts: Map<u32, Timeouts>,
    /// By what names are answered.
    pub naming: NameMaps,
    /// The connections.
    pub connections: Map<Tuple, Connection>,
    /// Who keeps a backend.
    pub clients: Map<ClientKey, Client>,
    /// Datagrams in fragments.
    pub fragments: Map<FragmentKey, Ports>,
    /// What is counted of the node, in the order of [`EVENTS`].
    pub events: CpuMap<u32, u64>,
    /// What somebody wants to see of packets.
    pub watching: Map<u32, Watching>,
    /// What there was to see; [`Reports`] reads it.
    reports: OwnedFd,
    /// What the programs remember of flows, by their places.
    pub flows: CpuMap<u32, Flow>,
    /// How often [`Maps::changed`] was called.
    generation: Map<u32, u64>,
}

/// The eBPF of a node.
#[derive(Debug)]
pub struct Ebpf {
    directory: PathBuf,
    connections: u32,
    maps: Maps,
}

impl Error {
    /// Whether a device is not there any more.
    pub fn device_is_gone(&self) -> bool {
        matches!(self, Self::Attach { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
    }
}

impl Ebpf {
    /// Opens the node's maps, and makes those that are missing. There is room for so many connections.
    ///
    /// # Errors
    /// When the kernel's file system for maps cannot be used, or a map cannot be made.
    pub fn open(connections: u32) -> Result<Self, Error> {
        make_file_system()?;
        Self::open_in(&Path::new(DIRECTORY).join(LAYOUT.to_string()), connections)
    }

    /// The same in another directory of such a file system.
    ///
    /// # Errors
    /// As above.
    pub fn open_in(directory: &Path, connections: u32) -> Result<Self, Error> {
        let failed = |action| {
            let path = directory.to_owned();
            move |source| Error::FileSystem { action, path, source }
        };
        std::fs::create_dir_all(directory).map_err(failed("make"))?;
        for (map, entries) in sizes(connections) {
            let pinned = directory.join(map);
            // One of another size cannot grow: connections that are balanced end, and what sockets have got is
            // forgotten.
            if let Ok(map) = aya::maps::MapData::from_pin(&pinned)
                && map.info().is_ok_and(|info| info.max_entries() != entries)
            {
                std::fs::remove_file(&pinned).map_err(failed("make anew the connections in"))?;
            }
        }
        for source in program::sources() {
            let maps = |error| Error::Maps { program: source.name, source: Box::new(error) };
            loader(directory, connections).load(source.code).map_err(maps)?;
        }
        Ok(Self { directory: directory.to_owned(), connections, maps: Maps::open(directory)? })
    }

    /// The maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Pins the maps again that somebody has removed from the kernel's file system: the next agent would
    /// not find them. Tells how many.
    ///
    /// # Errors
    /// When one cannot be pinned.
    pub fn pin_again(&self) -> Result<u64, Error> {
        pin_missing(&self.directory, self.maps.all())
    }
}

/// Pins maps that are not in the directory under their names; tells how many were not.
fn pin_missing<'a>(
    directory: &Path,
    maps: impl IntoIterator<Item = (&'static str, BorrowedFd<'a>)>,
) -> Result<u64, Error> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| Error::FileSystem { action, path, source }
    };
    let mut count = 0;
    for (map, fd) in maps {
        let path = directory.join(map);
        if !path.try_exists().map_err(failed("look at", &path))? {
            std::fs::create_dir_all(directory).map_err(failed("make", directory))?;
            sys::pin(fd, &path).map_err(failed("make", &path))?;
            count += 1;
        }
    }
    Ok(count)
}

impl Maps {
    /// Opens the maps that an agent has pinned on this node, to look at them.
    ///
    /// # Errors
    /// When one is not there.
    pub fn of_agent() -> Result<Self, Error> {
        Self::open(&Path::new(DIRECTORY).join(LAYOUT.to_string()))
    }

    /// What is counted of the node at a position of [`EVENTS`], on all processors.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn event(&self, number: u32) -> io::Result<u64> {
        Ok(self.events.get(&number)?.into_iter().flatten().sum())
    }

    /// Has the programs look again at what they remember of flows: `addresses` or `ways` have changed.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn changed(&self) -> io::Result<()> {
        count_up(&self.generation)
    }

    /// All of them by their names.
    fn all(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        let own = [
            ("addresses", self.addresses.fd()),
            ("ways", self.ways.fd()),
            ("fronts", self.fronts.fd()),
            ("slots", self.slots.fd()),
            ("backends", self.backends.fd()),
            ("counts", self.counts.fd()),
            ("gateways", self.gateways.fd()),
            ("timeouts", self.timeouts.fd()),
            ("connections", self.connections.fd()),
            ("clients", self.clients.fd()),
            ("fragments", self.fragments.fd()),
            ("events", self.events.fd()),
            ("watching", self.watching.fd()),
            ("reports", self.reports.as_fd()),
            ("flows", self.flows.fd()),
            ("generation", self.generation.fd()),
        ];
        own.into_iter().chain(self.naming.all())
    }

    fn open(directory: &Path) -> Result<Self, Error> {
        let cpus = |map| move |source| Error::Map { action: "open", map, source };
        Ok(Self {
            addresses: open_map(directory, "addresses")?,
            ways: open_map(directory, "ways")?,
            fronts: open_map(directory, "fronts")?,
            slots: open_map(directory, "slots")?,
            backends: open_map(directory, "backends")?,
            counts: CpuMap::new(open_map(directory, "counts")?).map_err(cpus("counts"))?,
            gateways: open_map(directory, "gateways")?,
            timeouts: open_map(directory, "timeouts")?,
            naming: NameMaps::open(directory)?,
            connections: open_map(directory, "connections")?,
            clients: open_map(directory, "clients")?,
            fragments: open_map(directory, "fragments")?,
            events: CpuMap::new(open_map(directory, "events")?).map_err(cpus("events"))?,
            watching: open_map(directory, "watching")?,
            reports: open_pin(directory, "reports")?.0,
            flows: CpuMap::new(open_map(directory, "flows")?).map_err(cpus("flows"))?,
            generation: open_map(directory, "generation")?,
        })
    }
}

/// Opens a pinned map, whose keys and values must be of these types.
fn open_map<K: Pod, V: Pod>(directory: &Path, map: &'static str) -> Result<Map<K, V>, Error> {
    let (fd, sizes) = open_pin(directory, map)?;
    if sizes != (size_of::<K>(), size_of::<V>()) {
        let path = directory.join(map);
        let text = format!("{} is of another layout: remove it", path.display());
        return Err(Error::Map { action: "open", map, source: io::Error::other(text) });
    }
    Ok(Map::new(fd))
}

/// Opens a pinned map; tells how large its keys and values are.
fn open_pin(directory: &Path, map: &'static str) -> Result<(OwnedFd, (usize, usize)), Error> {
    let failed = |source| Error::Map { action: "open", map, source };
    let data = aya::maps::MapData::from_pin(directory.join(map));
    let data = data.map_err(|error| failed(io::Error::other(error)))?;
    let info = data.info().map_err(|error| failed(io::Error::other(error)))?;
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(failed)?;
    Ok((fd, (info.key_size() as usize, info.value_size() as usize)))
}

/// The time that entries of connections bear: seconds of `CLOCK_MONOTONIC`.
///
/// # Errors
/// When the system has no such clock.
pub fn now() -> io::Result<u32> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?.tv_sec() as u32)
}

/// Removes the pins of all layouts but this one: what is attached goes on with what it has until it is
/// replaced.
///
/// # Errors
/// When a file cannot be removed.
pub fn remove_other_layouts() -> io::Result<()> {
    let kept = LAYOUT.to_string();
    for layout in std::fs::read_dir(DIRECTORY)? {
        let layout = layout?;
        if layout.file_name() != *kept {
            // What is told from there nobody could take back.
            empty(&layout.path(), &["servers"])?;
            std::fs::remove_dir_all(layout.path())?;
        }
    }
    Ok(())
}

/// Has programs that are attached leave all packets to the kernel, and names to the agent, of whichever layout
/// their maps are.
///
/// # Errors
/// When a map cannot be read or changed.
pub fn leave_all() -> io::Result<()> {
    let layouts = match std::fs::read_dir(DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        layouts => layouts?,
    };
    for layout in layouts {
        empty(&layout?.path(), &["ways", "addresses", "servers"])?;
    }
    Ok(())
}

fn count_up(generation: &Map<u32, u64>) -> io::Result<()> {
    let before = generation.get(&0)?.unwrap_or_default();
    generation.insert(&0, &before.wrapping_add(1))
}

/// Empties maps of a layout.
fn empty(layout: &Path, maps: &[&str]) -> io::Result<()> {
    for map in maps {
        // One that nobody finds any more nobody can empty.
        let Ok(data) = aya::maps::MapData::from_pin(layout.join(map)) else { continue };
        let size = data.info().map_err(io::Error::other)?.key_size();
        map::empty(data.fd().as_fd(), size as usize)?;
    }
    // Where there is none no flows are remembered.
    if let Ok(generation) = open_map(layout, "generation") {
        count_up(&generation)?;
    }
    Ok(())
}

/// Removes all pins.
///
/// # Errors
/// When a file cannot be removed.
pub fn remove_pins() -> io::Result<()> {
    match std::fs::remove_dir_all(DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A loader that uses the maps that are pinned in a directory.
fn loader<'a>(directory: &Path, connections: u32) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(directory);
    for (map, entries) in sizes(connections) {
        loader.map_max_entries(map, entries);
    }
    // The programs touch no structure of the kernel's own, so its types need not be read.
    loader.btf(None);
    loader
}

/// How many entries the maps have whose size depends on how many connections there is room for: each that is
/// balanced has two, and so have a UDP socket and a service; a TCP socket that has asked for one has one.
fn sizes(connections: u32) -> [(&'static str, u32); 3] {
    let each_way = connections.saturating_mul(2).max(2);
    [("connections", each_way), ("sockets", connections.max(1)), ("datagrams", each_way)]
}

/// Mounts the kernel's file system for maps where it is not mounted yet.
fn make_file_system() -> Result<(), Error> {
    let failed = |action| {
        move |errno: Errno| Error::FileSystem { action, path: FILE_SYSTEM.into(), source: errno.into() }
    };
    if statfs(FILE_SYSTEM).map_err(failed("look at"))?.filesystem_type() == MAGIC {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), FILE_SYSTEM, Some("bpf"), flags, Some("mode=0700"))
        .map_err(failed("mount bpf at"))
}
