//! Sockets of other namespaces: found, and ended (sock_diag(7)).

use std::collections::BTreeSet;

use netlink_packet_core::{Emitable as _, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DESTROY, SockDiagMessage};

use super::netlink::{Netlink, Request};
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

/// Ends the TCP sockets of a namespace that the kernel has given these numbers (`SO_COOKIE`): whoever waits on
/// one hears of it at once (`ECONNABORTED`). Tells how many ended.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel cannot list its sockets or end one.
pub fn end_connections(netns: &Netns, numbers: &BTreeSet<u64>) -> Result<usize, Error> {
    let failed = |action| Error::netlink(action, netns.label());
    let mut netlink =
        netns.enter(Netlink::sockets)?.map_err(Error::system("open a netlink socket for sockets"))?;
    let mut ended = 0;
    for family in [AF_INET, AF_INET6] {
        let all = SockDiagMessage::InetRequest(request(family, SocketId::new_v4()));
        let found = netlink.dump(&all).map_err(failed("list the sockets"))?;
        let wanted = found.into_iter().filter_map(|message| match message {
            SockDiagMessage::InetResponse(socket) => Some(socket.header.socket_id),
            _ => None,
        });
        let wanted = wanted.filter(|socket| numbers.contains(&u64::from_ne_bytes(socket.cookie)));
        let requests: Vec<_> =
            wanted.map(|socket| Request::new(Destroy(request(family, socket)))).collect();
        for outcome in netlink.batch(&requests) {
            match outcome {
                Ok(()) => ended += 1,
                // It has ended by itself.
                Err(error) if error.errno == nix::errno::Errno::ENOENT => {}
                Err(error) => return Err(failed("end a socket")(error)),
            }
        }
    }
    Ok(ended)
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    let states = StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT;
    InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::empty(), states, socket_id }
}
