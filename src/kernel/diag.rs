//! Sockets of other namespaces: found, and ended (sock_diag(7)).

use std::collections::BTreeSet;

use netlink_packet_core::{Emitable as _, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DESTROY, SockDiagMessage};

use nix::errno::Errno;

use super::netlink::{Netlink, NetlinkError, Request};
use super::{Error, Netns};

/// A request that ends a socket.
#[derive(Debug, Clone)]
struct Destroy(InetRequest);

impl NetlinkSerializable for Destroy {
    fn message_type(&self) -> u16 {
        SOCK_DESTROY
    }

    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.emit(buffer);
    }
}

impl NetlinkDeserializable for Destroy {
    type Error = std::io::Error;

    /// It has no answer but that it was done, or not.
    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, Self::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// The TCP sockets of a namespace that the kernel has given these numbers (`SO_COOKIE`).
fn find(netlink: &mut Netlink, numbers: &BTreeSet<u64>) -> Result<Vec<(u8, SocketId)>, NetlinkError> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let all = SockDiagMessage::InetRequest(request(family, SocketId::new_v4()));
        let sockets = netlink.dump_some(&all, |message| match message {
            SockDiagMessage::InetResponse(socket) => {
                let socket = socket.header.socket_id;
                numbers.contains(&number_of(&socket)).then_some((family, socket))
            }
            _ => None,
        })?;
        found.extend(sockets);
    }
    Ok(found)
}

fn number_of(socket: &SocketId) -> u64 {
    u64::from_ne_bytes(socket.cookie)
}

fn open(netns: &Netns) -> Result<Netlink, Error> {
    netns.enter(Netlink::sockets)?.map_err(Error::system("open a netlink socket for sockets"))
}

/// Which of the numbers (`SO_COOKIE`) are those of TCP sockets of a namespace that have not ended.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel cannot list its sockets.
pub fn connections_among(netns: &Netns, numbers: &BTreeSet<u64>) -> Result<BTreeSet<u64>, Error> {
    let found = find(&mut open(netns)?, numbers);
    let found = found.map_err(Error::netlink("list the sockets", netns.label()))?;
    Ok(found.iter().map(|(_, socket)| number_of(socket)).collect())
}

/// Ends the TCP sockets of a namespace that the kernel has given these numbers: whoever waits on one hears of it
/// at once (`ECONNABORTED`). Tells how many ended.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel cannot list its sockets or end one.
pub fn end_connections(netns: &Netns, numbers: &BTreeSet<u64>) -> Result<usize, Error> {
    let failed = |action| Error::netlink(action, netns.label());
    let mut netlink = open(netns)?;
    let found = find(&mut netlink, numbers).map_err(failed("list the sockets"))?;
    let requests: Vec<_> = found
        .into_iter()
        .map(|(family, socket)| Request::new(Destroy(request(family, socket))))
        .collect();
    let mut ended = 0;
    for outcome in netlink.batch(&requests) {
        match outcome {
            Ok(()) => ended += 1,
            // It has ended by itself.
            Err(error) if error.errno == Errno::ENOENT => {}
            Err(error) => return Err(failed("end a socket")(error)),
        }
    }
    Ok(ended)
}

/// Checks that this kernel can end sockets (`CONFIG_INET_DIAG_DESTROY`), with one that there is not.
///
/// # Errors
/// When it cannot.
pub fn can_end_connections() -> Result<(), Error> {
    let netns = Netns::current()?;
    let none =
        Request::new(Destroy(request(AF_INET, SocketId { cookie: [0; 8], ..SocketId::new_v4() })));
    match open(&netns)?.batch(&[none]).pop() {
        Some(Err(error)) if error.errno != Errno::ENOENT => {
            Err(Error::netlink("end sockets (CONFIG_INET_DIAG_DESTROY)", netns.label())(error))
        }
        _ => Ok(()),
    }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    let states = StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT;
    InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::empty(), states, socket_id }
}
