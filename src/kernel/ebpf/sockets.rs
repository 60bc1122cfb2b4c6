//! What containers' sockets are asked: a service that one names is its backend from there on (`ebpf/socket.h`).
//! The programs are at a control group, and so at all below it, by links that are pinned beside the maps: they
//! outlive the agent.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::include_bytes_aligned;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::layout::{Datagram, DatagramKey, Namespace, Socket};
use super::link::{self, Call};
use super::map::Map;
use super::{DIRECTORY, Ebpf, Error, LAYOUT, open_map, pin_missing, sys};

/// A program: its name, its code, and what it is asked about.
#[derive(Debug, Clone, Copy)]
struct Source {
    name: &'static str,
    code: &'static [u8],
    call: Call,
}

macro_rules! source {
    ($name:literal, $file:literal, $call:ident) => {{
        static CODE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/", $file, ".o"));
        Source { name: $name, code: CODE, call: Call::$call }
    }};
}

/// They are attached in this order: what follows a socket comes before what gives it a backend.
const SOURCES: [Source; 9] = [
    source!("netctl_tcp", "tcp_state", TcpState),
    source!("netctl_peer4", "getpeername", Peer4),
    source!("netctl_peer6", "getpeername", Peer6),
    source!("netctl_receive4", "recvmsg", Receive4),
    source!("netctl_receive6", "recvmsg", Receive6),
    source!("netctl_connect4", "connect", Connect4),
    source!("netctl_connect6", "connect", Connect6),
    source!("netctl_send4", "sendmsg", Send4),
    source!("netctl_send6", "sendmsg", Send6),
];

/// The maps that only they use, in the order of [`SocketMaps::all`].
const MAPS: [&str; 3] = ["namespaces", "sockets", "datagrams"];

/// The maps of a node's asked sockets.
#[derive(Debug)]
pub struct SocketMaps {
    /// The containers whose sockets are asked, by the numbers of their namespaces.
    pub namespaces: Map<u64, Namespace>,
    /// The TCP sockets that have asked for a service, by their numbers.
    pub sockets: Map<u64, Socket>,
    /// With whom UDP sockets exchange datagrams.
    pub datagrams: Map<DatagramKey, Datagram>,
}

impl SocketMaps {
    /// Opens the maps that an agent has pinned on this node, to look at them.
    ///
    /// # Errors
    /// When one is not there.
    pub fn of_agent() -> Result<Self, Error> {
        Self::open(&Path::new(DIRECTORY).join(LAYOUT.to_string()))
    }

    fn all(&self) -> [BorrowedFd<'_>; 3] {
        [self.namespaces.fd(), self.sockets.fd(), self.datagrams.fd()]
    }

    fn open(directory: &Path) -> Result<Self, Error> {
        Ok(Self {
            namespaces: open_map(directory, "namespaces")?,
            sockets: open_map(directory, "sockets")?,
            datagrams: open_map(directory, "datagrams")?,
        })
    }
}

/// The programs at a control group, with their maps.
#[derive(Debug)]
pub struct Sockets {
    directory: PathBuf,
    cgroup: PathBuf,
    maps: SocketMaps,
    asked: Vec<Asked>,
    /// Whether one was attached anew: until then the end of a socket was not seen.
    has_gap: bool,
}

#[derive(Debug)]
struct Asked {
    source: Source,
    program: OwnedFd,
    link: OwnedFd,
    instructions: u32,
}

impl Ebpf {
    /// Has the sockets of a control group asked, in place of what an earlier agent has there.
    ///
    /// # Errors
    /// When it is no control group, or the kernel does not take a program: then none is attached.
    pub fn ask_sockets(&self, cgroup: &Path) -> Result<Sockets, Error> {
        let group = open_group(cgroup)?;
        let load = |source: Source| {
            let (program, instructions) = self.load_code(source.name, source.code, |_| {})?;
            Ok((source, program, instructions))
        };
        let loaded = SOURCES.into_iter().map(load).collect::<Result<Vec<_>, Error>>()?;
        let (mut asked, mut has_gap) = (Vec::new(), false);
        for (source, program, instructions) in loaded {
            let path = pin_of(&self.directory, source.name);
            let attached = attach(&path, &group, &program, source.call);
            let (link, is_new) = attached.map_err(attach_error("attach", cgroup))?;
            has_gap |= is_new;
            asked.push(Asked { source, program, link, instructions });
        }
        let (directory, cgroup) = (self.directory.clone(), cgroup.to_owned());
        let maps = SocketMaps::open(&directory)?;
        Ok(Sockets { directory, cgroup, maps, asked, has_gap })
    }

    /// Has sockets not asked any more that an earlier agent has had asked; tells whether any were. What they
    /// have got stays.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn ask_no_sockets(&self) -> Result<bool, Error> {
        let mut were = false;
        // What gives sockets backends goes first.
        for source in SOURCES.iter().rev() {
            were |= remove(&pin_of(&self.directory, source.name))?;
        }
        for map in MAPS {
            remove(&self.directory.join(map))?;
        }
        Ok(were)
    }
}

impl Sockets {
    /// The maps.
    pub fn maps(&self) -> &SocketMaps {
        &self.maps
    }

    /// Whether sockets may have closed and nobody has seen it, because a program was not there.
    pub fn has_gap(&self) -> bool {
        self.has_gap
    }

    /// Those that have closed are known by now.
    pub fn close_gap(&mut self) {
        self.has_gap = false;
    }

    /// Attaches again what somebody has detached, and pins what is not pinned any more; tells how many. A
    /// control group that was made anew is the one that is meant.
    ///
    /// # Errors
    /// When there is no such control group now, or the kernel refuses.
    pub fn mend(&mut self) -> Result<u64, Error> {
        // Where the directory is gone too, that makes it.
        let mut count = pin_missing(&self.directory, MAPS.into_iter().zip(self.maps.all()))?;
        let group = open_group(&self.cgroup)?;
        let here = link::number_of(group.as_fd());
        let here = here.map_err(|errno| attach_error("look at", &self.cgroup)(errno.into()))?;
        for Asked { source, program, link, .. } in &mut self.asked {
            let path = pin_of(&self.directory, source.name);
            let is_here = link::cgroup_of(link.as_fd()) == Ok(here);
            if is_here && path.exists() {
                continue;
            }
            let again = match is_here {
                true => pin(&path, link),
                false => new_link(&path, &group, program, source.call).map(|new| *link = new),
            };
            again.map_err(attach_error("attach", &self.cgroup))?;
            self.has_gap |= !is_here;
            count += 1;
        }
        Ok(count)
    }

    /// How many instructions the kernel's verifier has followed in each program, where it tells.
    pub fn instructions(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.asked.iter().map(|asked| (asked.source.name, asked.instructions))
    }
}

/// Opens a control group.
fn open_group(cgroup: &Path) -> Result<File, Error> {
    let (action, path) = ("use as a control group", cgroup.to_owned());
    let not = |source| Error::FileSystem { action, path: path.clone(), source };
    let group = File::open(cgroup).map_err(not)?;
    match fstatfs(&group).map_err(|errno| not(errno.into()))?.filesystem_type() {
        CGROUP2_SUPER_MAGIC => Ok(group),
        _ => Err(not(io::Error::other("it is not one of cgroup2"))),
    }
}

/// Removes a pin; tells whether it was there.
fn remove(path: &Path) -> Result<bool, Error> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::FileSystem { action: "remove", path: path.to_owned(), source }),
    }
}

/// Where the system has its control groups; `None`: it has none of version 2.
///
/// # Errors
/// When that cannot be read.
pub fn control_groups() -> io::Result<Option<PathBuf>> {
    // A line is: what, where, as which file system, and how.
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let place = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next()? == "cgroup2").then(|| place.into())
    };
    Ok(mounts.lines().find_map(place))
}

/// Where a program's link is pinned.
fn pin_of(directory: &Path, program: &str) -> PathBuf {
    directory.join(format!("link_{program}"))
}

/// Has the link that is pinned there keep this program from now on; a new one where that is at another group, or
/// not there. Tells whether it is new.
fn attach(path: &Path, group: &File, program: &OwnedFd, call: Call) -> io::Result<(OwnedFd, bool)> {
    let here = link::number_of(group.as_fd())?;
    match sys::open_pinned(path) {
        Ok(link) if link::cgroup_of(link.as_fd()) == Ok(here) => {
            link::update(link.as_fd(), program.as_fd())?;
            Ok((link, false))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok((new_link(path, group, program, call)?, true)),
    }
}

fn new_link(path: &Path, group: &File, program: &OwnedFd, call: Call) -> io::Result<OwnedFd> {
    let link = link::create(program.as_fd(), group.as_fd(), call)?;
    pin(path, &link)?;
    Ok(link)
}

/// Pins a link in place of another one.
fn pin(path: &Path, link: &OwnedFd) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sys::pin(link.as_fd(), path),
    }
}

fn attach_error(action: &'static str, cgroup: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let device = cgroup.display().to_string();
    move |source| Error::Attach { action, device, source }
}
