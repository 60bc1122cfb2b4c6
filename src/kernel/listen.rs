//! Sockets that listen in another network namespace.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};

use super::{Error, Netns};

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;

/// How many bytes of datagrams wait to be read: those of a burst, and of a restart.
const BUFFER: usize = 1 << 20;

/// A UDP socket and a TCP one, bound to one address and port.
#[derive(Debug)]
pub struct Listening {
    /// For datagrams.
    pub udp: UdpSocket,
    /// For connections.
    pub tcp: TcpListener,
}

/// Listens in a namespace, also at an address that it does not have yet.
///
/// # Errors
/// When the namespace cannot be entered, or somebody else has the port.
pub fn listen_at(netns: &Netns, address: SocketAddr) -> Result<Listening, Error> {
    let opened = netns.enter(|| {
        let udp = bound(address, SockType::Datagram)?;
        let tcp = bound(address, SockType::Stream)?;
        listen(&tcp, Backlog::new(BACKLOG)?)?;
        Ok::<_, io::Error>(Listening { udp: udp.into(), tcp: tcp.into() })
    })?;
    opened.map_err(|source| Error::System { action: "listen for queries of names", source })
}

fn bound(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, kind, flags, None)?;
    // Of a stream the port may still be in use by connections that have ended.
    setsockopt(&socket, sockopt::ReuseAddr, &(kind == SockType::Stream))?;
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    if kind == SockType::Datagram {
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}
