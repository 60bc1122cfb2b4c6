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

/// Attaches a program in place of ours with its name, if any.
pub(super) fn attach(
    direction: Direction,
    interface: u32,
    program: BorrowedFd<'_>,
    name: &str,
) -> Result<(), Errno> {
    let mut netlink = open()?;
    let mut discipline = message(interface, TcHandle::CLSACT);
    discipline.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    discipline.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    match netlink.request(Request::create(RouteNetlinkMessage::NewQueueDiscipline(discipline))) {
        Ok(_) => {}
        Err(error) if error.errno == Errno::EEXIST => {}
        Err(error) => return Err(error.errno),
    }
    let mut filter = filter(direction, interface);
    filter.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().unsigned_abs())),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    let replaced = netlink.request(Request::replace(RouteNetlinkMessage::NewTrafficFilter(filter)));
    replaced.map(drop).map_err(errno)
}

/// Removes our filter with this name.
pub(super) fn detach(direction: Direction, interface: u32) -> Result<(), Errno> {
    let filter = RouteNetlinkMessage::DelTrafficFilter(filter(direction, interface));
    open()?.request(Request::new(filter)).map(drop).map_err(errno)
}

/// The numbers of the programs with this name that are attached to a device.
pub(super) fn attached(direction: Direction, interface: u32, name: &str) -> Result<Vec<u32>, Errno> {
    let request = RouteNetlinkMessage::GetTrafficFilter(message(interface, parent(direction)));
    let filters = match open()?.dump(&request) {
        // There is no such discipline yet.
        Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENOENT | Errno::EOPNOTSUPP) => {
            Vec::new()
        }
        filters => filters.map_err(errno)?,
    };
    let id = |filter: RouteNetlinkMessage| {
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
    };
    Ok(filters.into_iter().filter_map(id).collect())
}

fn open() -> Result<Netlink, Errno> {
    Netlink::open().map_err(|error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
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
