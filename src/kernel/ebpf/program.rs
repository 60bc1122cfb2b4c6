//! The programs: loading them, and attaching them to devices.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use aya::programs::{Program, ProgramError};
use aya::{EbpfLoader, include_bytes_aligned};
use nix::errno::Errno;

use super::clsact::{Filters, Placed};
use super::layout::Address;
use super::sys::{self, Direction};
use super::{Ebpf, Error, loader};

/// A program: its name, its code, and in which direction of its device it sees packets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) name: &'static str,
    pub(super) code: &'static [u8],
    direction: Direction,
    place: Place,
}

/// What sort of device a program is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// One that comes and goes with a container: a filter of `clsact` costs some hundred microseconds. TCX has
    /// all wait for a grace period of RCU, some ten milliseconds, when a program is added and when the device
    /// goes, though not when one takes another's place.
    Passing,
    /// One that comes and goes with a network: a filter at once, and TCX before it as soon as there is time.
    Crossing,
    /// One of the host's that stays: TCX where the kernel has it (Linux 6.6), since others may attach there.
    Lasting,
}

/// How a device runs a program. What TCX has seen to the filters do not see; each packet costs less there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Filter,
    Tcx,
}

macro_rules! source {
    ($name:literal, $file:literal, $direction:ident, $place:ident) => {{
        static CODE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/", $file, ".o"));
        Source { name: $name, code: CODE, direction: Direction::$direction, place: Place::$place }
    }};
}

/// Where a container's packets leave its sandbox, and where they enter it. They are attached in this
/// order: where connections are opened their answers are known.
const OF_CONTAINER: [Source; 2] = [
    source!("netctl_to", "to_container", Out, Passing),
    source!("netctl_from", "from_container", In, Passing),
];
/// Where what the wire brought crosses a sandbox.
const INTO: Source = source!("netctl_into", "into_container", In, Crossing);
/// Where what is for the wire enters the host's namespace.
const TO_WIRE: Source = source!("netctl_wire_out", "to_wire", In, Crossing);
/// Where the wire ends.
const FROM_WIRE: Source = source!("netctl_wire_in", "from_wire", In, Lasting);

pub(super) fn sources() -> impl DoubleEndedIterator<Item = Source> {
    OF_CONTAINER.into_iter().chain([INTO, TO_WIRE, FROM_WIRE])
}

/// Programs that belong to one device.
#[derive(Debug)]
pub struct Programs {
    loaded: Vec<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    source: Source,
    fd: OwnedFd,
    /// The number that the kernel gave it.
    id: u32,
    instructions: u32,
}

impl Loaded {
    /// It, as a filter of a device.
    fn placed(&self) -> Placed<'_> {
        let Source { name, direction, .. } = self.source;
        Placed { direction, program: self.fd.as_fd(), name }
    }

    /// Has a device run it by TCX.
    fn attach(&self, interface: u32, replaced: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        sys::attach(self.source.direction, interface, self.fd.as_fd(), replaced)
    }
}

/// The programs that carry packets past the stack, of which a node has one of each.
#[derive(Debug)]
pub struct Path {
    /// For the sandboxes' ends of the pairs by which packets cross.
    pub into: Programs,
    /// For the host's ends.
    pub to_wire: Programs,
    /// For the device that has the node's underlay address.
    pub from_wire: Programs,
}

/// Where a node's tunnel ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelEnd {
    /// The node's underlay address.
    pub address: IpAddr,
    /// The UDP port.
    pub port: u16,
}

impl Ebpf {
    /// Loads the programs for the containers of the network with this number.
    ///
    /// # Errors
    /// When the kernel does not take one.
    pub fn load(&self, network: u32) -> Result<Programs, Error> {
        let load = |source| {
            self.load_one(source, |loader| {
                loader.override_global("network", &network, true);
            })
        };
        Ok(Programs { loaded: OF_CONTAINER.into_iter().map(load).collect::<Result<_, _>>()? })
    }

    /// Loads the programs that carry packets past the stack of a node whose tunnel ends there.
    ///
    /// # Errors
    /// When the kernel does not take one.
    pub fn load_path(&self, end: TunnelEnd) -> Result<Path, Error> {
        let (local, port) = (Address::from(end.address), u32::from(end.port.to_be()));
        let alone =
            |loaded: Result<Loaded, Error>| loaded.map(|loaded| Programs { loaded: vec![loaded] });
        let from_wire = self.load_one(FROM_WIRE, |loader| {
            loader.override_global("local", bytemuck::bytes_of(&local), true);
            loader.override_global("port", &port, true);
        });
        Ok(Path {
            into: alone(self.load_one(INTO, |_| {}))?,
            to_wire: alone(self.load_one(TO_WIRE, |_| {}))?,
            from_wire: alone(from_wire)?,
        })
    }

    fn load_one<'a>(
        &self,
        source: Source,
        set: impl FnOnce(&mut EbpfLoader<'a>),
    ) -> Result<Loaded, Error> {
        let (fd, instructions) = self.load_code(source.name, source.code, set)?;
        let described = sys::describe(fd.as_fd());
        let (id, _) = described.map_err(|errno| Error::Program {
            program: source.name,
            source: Box::new(ProgramError::IOError(errno.into())),
        })?;
        Ok(Loaded { source, fd, id, instructions })
    }

    /// Loads one of the programs of a file; tells how many instructions the kernel's verifier has followed.
    pub(super) fn load_code<'a>(
        &self,
        program: &'static str,
        code: &'static [u8],
        set: impl FnOnce(&mut EbpfLoader<'a>),
    ) -> Result<(OwnedFd, u32), Error> {
        let maps = |error| Error::Maps { program, source: Box::new(error) };
        let refused = |error| Error::Program { program, source: Box::new(error) };
        // One that is not found would be made anew, for this program alone.
        self.pin_again()?;
        let mut loader = loader(&self.directory, self.connections);
        set(&mut loader);
        let mut object = loader.load(code).map_err(maps)?;
        let loaded = object.program_mut(program).ok_or(Error::Missing { program })?;
        let taken = match loaded {
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::SockOps(program) => program.load(),
            _ => return Err(Error::Missing { program }),
        };
        taken.map_err(refused)?;
        let instructions = loaded.info().ok().and_then(|info| info.verified_instruction_count());
        let fd = loaded.fd().map_err(refused)?.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| refused(ProgramError::IOError(error)))?;
        Ok((fd, instructions.unwrap_or(0)))
    }
}

/// A device that runs programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attached {
    /// Its number.
    pub interface: u32,
    /// Whether it did not run them before.
    pub changed: bool,
    /// Whether it could run them where each packet costs less, too: see [`Programs::hasten`].
    pub slow: bool,
}

impl Programs {
    /// Attaches them to a device of the thread's namespace, in place of ours that are there, from an
    /// earlier agent.
    ///
    /// # Errors
    /// When there is no such device, or the kernel refuses.
    pub fn attach(&self, filters: &mut Filters, device: &str) -> Result<Attached, Error> {
        let interface = index(device)?;
        let (mut changed, mut slow, mut placed) = (false, false, Vec::new());
        for loaded in &self.loaded {
            let hooks = loaded.source.hooks();
            for &hook in hooks {
                let there = loaded.source.attached(filters, hook, interface);
                let there = there.map_err(attach_error("look at", device))?;
                let replaced = match there.as_slice() {
                    [(there, _)] if *there == loaded.id => continue,
                    [] if hook != hooks[0] => {
                        slow = true;
                        continue;
                    }
                    [] => None,
                    [(_, replaced), ..] => Some(replaced.as_fd()),
                };
                changed = true;
                match hook {
                    Hook::Filter => placed.push(loaded.placed()),
                    Hook::Tcx => {
                        let attached = loaded.attach(interface, replaced);
                        attached.map_err(attach_error("attach", device))?;
                    }
                }
            }
        }
        if !placed.is_empty() {
            filters.place(interface, &placed).map_err(attach_error("attach", device))?;
        }
        Ok(Attached { interface, changed, slow })
    }

    /// The same for programs of devices that come and go, without a look at what is there. Gives the
    /// device's number.
    ///
    /// # Errors
    /// When there is no such device, or the kernel refuses.
    pub fn place(&self, filters: &mut Filters, device: &str) -> Result<u32, Error> {
        let interface = index(device)?;
        let placed: Vec<_> = self.loaded.iter().map(Loaded::placed).collect();
        let done = filters.place(interface, &placed);
        done.map(|()| interface).map_err(attach_error("attach", device))
    }

    /// Has a device that is `slow` run them by TCX too. All wait for a grace period of RCU for each.
    ///
    /// # Errors
    /// When there is no such device, or the kernel refuses.
    pub fn hasten(&self, device: &str) -> Result<(), Error> {
        let interface = index(device)?;
        for loaded in self.loaded.iter().filter(|loaded| loaded.source.hooks().len() > 1) {
            loaded.attach(interface, None).map_err(attach_error("attach", device))?;
        }
        Ok(())
    }

    /// How many instructions the kernel's verifier has followed in each, where it tells.
    pub fn instructions(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.loaded.iter().map(|loaded| (loaded.source.name, loaded.instructions))
    }

    /// Runs a program once on a packet, as if it had come by a device of the thread's namespace. Gives
    /// what is to be done with it, and the packet as it is then.
    ///
    /// # Errors
    /// When there is no such program or device, or the kernel refuses.
    pub fn run(&self, name: &str, device: &str, packet: &[u8]) -> Result<(i32, Vec<u8>), Error> {
        let failed = attach_error("run", device);
        let loaded = self.loaded.iter().find(|loaded| loaded.source.name == name);
        let loaded = loaded.ok_or_else(|| attach_error("run", device)(Errno::ENOENT))?;
        sys::run(loaded.fd.as_fd(), index(device)?, packet).map_err(failed)
    }
}

/// Detaches what is ours from a device of the thread's namespace; tells whether anything was.
///
/// # Errors
/// When there is no such device, or the kernel refuses.
pub fn detach(device: &str) -> Result<bool, Error> {
    let interface = index(device)?;
    let mut filters = open_filters(device)?;
    let mut changed = false;
    for source in sources().rev() {
        for &hook in source.hooks().iter().rev() {
            let there = match source.attached(&mut filters, hook, interface) {
                // Where the kernel has no eBPF, or gives none to us, nothing is attached.
                Err(Errno::ENOSYS | Errno::EPERM) => return Ok(false),
                there => there.map_err(attach_error("look at", device))?,
            };
            for (_, program) in there {
                let detached = match hook {
                    Hook::Tcx => sys::detach(source.direction, interface, program.as_fd()),
                    Hook::Filter => filters.remove(source.direction, interface),
                };
                detached.map_err(attach_error("detach", device))?;
                changed = true;
            }
        }
    }
    Ok(changed)
}

/// The names of the programs of ours that are attached to a device of the thread's namespace.
///
/// # Errors
/// When there is no such device, or the kernel refuses.
pub fn attached(device: &str) -> Result<Vec<&'static str>, Error> {
    let interface = index(device)?;
    let mut filters = open_filters(device)?;
    let mut names = Vec::new();
    for source in sources() {
        for &hook in source.hooks() {
            let there = match source.attached(&mut filters, hook, interface) {
                Err(Errno::ENOSYS | Errno::EPERM) => return Ok(Vec::new()),
                there => there.map_err(attach_error("look at", device))?,
            };
            if !there.is_empty() && !names.contains(&source.name) {
                names.push(source.name);
            }
        }
    }
    Ok(names)
}

fn open_filters(device: &str) -> Result<Filters, Error> {
    let device = device.to_owned();
    Filters::open().map_err(|source| Error::Attach { action: "look at", device, source })
}

impl Source {
    /// How its devices run it: at once by the first, and before that by another as soon as there is time.
    fn hooks(&self) -> &'static [Hook] {
        static HAS_TCX: OnceLock<bool> = OnceLock::new();
        // Every namespace has `lo`, as its first device.
        let has_tcx = || *HAS_TCX.get_or_init(|| sys::attached(Direction::In, 1) != Err(Errno::EINVAL));
        match self.place {
            Place::Lasting if has_tcx() => &[Hook::Tcx],
            Place::Crossing if has_tcx() => &[Hook::Filter, Hook::Tcx],
            _ => &[Hook::Filter],
        }
    }

    /// The programs of ours with its name that a device runs in this way, with their numbers.
    fn attached(
        &self,
        filters: &mut Filters,
        hook: Hook,
        interface: u32,
    ) -> Result<Vec<(u32, OwnedFd)>, Errno> {
        let mut ours = Vec::new();
        let attached = match hook {
            Hook::Tcx => sys::attached(self.direction, interface)?,
            Hook::Filter => filters.there(self.direction, interface, self.name)?,
        };
        for id in attached {
            // One that has gone since then is none.
            let Ok(program) = sys::program(id) else { continue };
            if sys::describe(program.as_fd())?.1 == self.name {
                ours.push((id, program));
            }
        }
        Ok(ours)
    }
}

/// The number of a device of the thread's namespace.
///
/// # Errors
/// When there is no such device.
pub fn index(device: &str) -> Result<u32, Error> {
    nix::net::if_::if_nametoindex(device).map_err(attach_error("find the device for", device))
}

fn attach_error(action: &'static str, device: &str) -> impl FnOnce(Errno) -> Error + use<> {
    let device = device.to_owned();
    move |errno| Error::Attach { action, device, source: errno.into() }
}
