//! Programs as filters of the queueing discipline `clsact` (tc-bpf(8)). They stay until they are removed, or the
//! device goes.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::super::netlink::{Netlink, NetlinkError, Request};
use super::sys::Direction;
use crate::model::object::PROTOCOL;

/// The place of ours among the filters of a device, and its number there.
const PRIORITY: u32 = PROTOCOL as u32;
const NUMBER: u32 = 1;
/// Every protocol (`ETH_P_ALL`), in network byte order.
const ALL: u16 = 3_u16.to_be();

/// The filters of a namespace's devices.
pub struct Filters {
    netlink: Netlink,
}

/// A program that is to be at a device, in one direction, and the name by which it is found again.
#[derive(Clone, Copy)]
pub(super) struct Placed<'a> {
    pub(super) direction: Direction,
    pub(super) program: BorrowedFd<'a>,
    pub(super) name: &'static str,
}

impl Filters {
    /// Opens those of the calling thread's namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        Ok(Self { netlink: Netlink::open()? })
    }

    /// Attaches programs to a device in this order, each in place of ours that is there; after one that
    /// is refused no more.
    pub(super) fn place(&mut self, interface: u32, programs: &[Placed<'_>]) -> Result<(), Errno> {
        let mut discipline = message(interface, TcHandle::CLSACT);
        discipline.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        discipline.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        let discipline = Request::create(RouteNetlinkMessage::NewQueueDiscipline(discipline));
        match self.netlink.request(discipline) {
            Err(error) if error.errno != Errno::EEXIST => return Err(error.errno),
            _ => {}
        }
        for placed in programs {
            let mut filter = filter(placed.direction, interface);
            filter.attributes.push(TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(placed.program.as_raw_fd().unsigned_abs())),
                TcOption::Bpf(TcFilterBpfOption::ProgName(placed.name.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]));
            let filter = Request::replace(RouteNetlinkMessage::NewTrafficFilter(filter));
            self.netlink.request(filter).map_err(errno)?;
        }
        Ok(())
    }

    /// Removes our filter.
    pub(super) fn remove(&mut self, direction: Direction, interface: u32) -> Result<(), Errno> {
        let filter = RouteNetlinkMessage::DelTrafficFilter(filter(direction, interface));
        self.netlink.request(Request::new(filter)).map(drop).map_err(errno)
    }

    /// The numbers of the programs with this name that are attached to a device.
    pub(super) fn there(
        &mut self,
        direction: Direction,
        interface: u32,
        name: &str,
    ) -> Result<Vec<u32>, Errno> {
        let request = RouteNetlinkMessage::GetTrafficFilter(message(interface, parent(direction)));
        let filters = match self.netlink.dump(&request) {
            // There is no such discipline yet.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENOENT | Errno::EOPNOTSUPP) => {
                Vec::new()
            }
            filters => filters.map_err(errno)?,
        };
        Ok(filters.into_iter().filter_map(|filter| number(filter, name)).collect())
    }
}

/// The number of a filter's program, if it has this name.
fn number(filter: RouteNetlinkMessage, name: &str) -> Option<u32> {
    let RouteNetlinkMessage::NewTrafficFilter(filter) = filter else { return None };
    let options = filter.attributes.into_iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let (mut is_named, mut id) = (false, None);
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(found)) => is_named = found == name,
            TcOption::Bpf(TcFilterBpfOption::ProgId(number)) => id = Some(number),
            _ => {}
        }
    }
    id.filter(|_| is_named)
}

fn errno(error: NetlinkError) -> Errno {
    error.errno
}

fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::In => TcHandle::MIN_INGRESS,
        Direction::Out => TcHandle::MIN_EGRESS,
    };
    TcHandle { major: u16::MAX, minor }
}

fn message(interface: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.family = AddressFamily::Unspec;
    message.header.index = interface.cast_signed();
    message.header.parent = parent;
    message
}

fn filter(direction: Direction, interface: u32) -> TcMessage {
    let mut message = message(interface, parent(direction));
    message.header.handle = NUMBER.into();
    message.header.info = PRIORITY << 16 | u32::from(ALL);
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    message
}
