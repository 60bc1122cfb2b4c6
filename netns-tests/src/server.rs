//! Servers that tell who they are and whom they see, and their clients.
//!
//! A socket stays in the network namespace in which it was made; the threads that use it stay outside.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{Backlog, SockaddrStorage, bind, connect, listen, setsockopt, sockopt};

use crate::space::Space;
use crate::wait::eventually;

/// How long a client waits for a connection or an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A transport protocol with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// SCTP, one connection to a socket (RFC 6458, section 4).
    Sctp,
}

/// Whether the kernel has SCTP; that of the virtual machine must.
pub fn has_sctp() -> bool {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let tried = listener(Transport::Sctp, any).map_err(|error| error.raw_os_error());
    crate::in_vm() || !matches!(tried, Err(Some(libc::EPROTONOSUPPORT)))
}

/// A server of both families that answers every line with its name and the client's address, until
/// it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which server.
    pub server: String,
    /// The address that it saw as the client's.
    pub client: IpAddr,
}

impl Server {
    /// Serves connections at a port.
    pub fn start(space: &Space, transport: Transport, port: u16, name: &str) -> Self {
        let any =
            [SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), (Ipv4Addr::UNSPECIFIED, port).into()];
        // One for both, but for SCTP: it would tell its clients of its address of the other family.
        let addresses = match transport {
            Transport::Tcp => &any[..1],
            Transport::Sctp => &any[..],
        };
        let stop = Arc::new(AtomicBool::new(false));
        for address in addresses {
            let listener = space.enter(|| listener(transport, *address));
            let listener = listener.unwrap_or_else(|error| panic!("{name} at {address}: {error}"));
            listener.set_nonblocking(true).expect("a socket can be asked not to block");
            let (stopped, name) = (Arc::clone(&stop), name.to_owned());
            thread::spawn(move || accept(&listener, &name, &stopped));
        }
        Self { stop }
    }

    /// Answers datagrams at a port.
    pub fn udp(space: &Space, port: u16, name: &str) -> Self {
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let socket = space.enter(|| UdpSocket::bind(address)).expect("the port is free");
        let step = Some(Duration::from_millis(50));
        socket.set_read_timeout(step).expect("a socket has a time-out");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_owned());
        thread::spawn(move || {
            let mut buffer = [0; 100];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((_, from)) = socket.recv_from(&mut buffer) else { continue };
                let answer = format!("{name} {}\n", from.ip().to_canonical());
                // A client that has gone needs none.
                let _ = socket.send_to(answer.as_bytes(), from);
            }
        });
        Self { stop }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn accept(listener: &TcpListener, name: &str, stopped: &AtomicBool) {
    while !stopped.load(Ordering::Relaxed) {
        let Ok((connection, peer)) = listener.accept() else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        let name = name.to_owned();
        thread::spawn(move || serve(connection, peer.ip(), &name));
    }
}

fn serve(connection: TcpStream, peer: IpAddr, name: &str) {
    // The listener's own setting may have been taken over.
    if connection.set_nonblocking(false).is_err() {
        return;
    }
    let Ok(mut writer) = connection.try_clone() else { return };
    for line in BufReader::new(connection).lines() {
        let answer = format!("{name} {}\n", peer.to_canonical());
        if line.is_err() || writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct Session {
    reader: BufReader<TcpStream>,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// When it is refused, or does not come about in a minute.
    pub fn open(from: &Space, transport: Transport, address: &str, port: u16) -> io::Result<Self> {
        let address = SocketAddr::new(address.parse().expect("it is an address"), port);
        from.enter(|| Self::connect(transport, address, PATIENCE))
    }

    /// Connects from the network namespace of the calling thread; neither that nor an answer may take
    /// longer than `patience` (SCTP: as long as the kernel tries).
    ///
    /// # Errors
    /// When it is refused, or does not come about in time.
    pub fn connect(transport: Transport, address: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = match transport {
            Transport::Tcp => TcpStream::connect_timeout(&address, patience)?,
            Transport::Sctp => {
                let socket = socket(transport, address)?;
                connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
                TcpStream::from(socket)
            }
        };
        stream.set_read_timeout(Some(patience))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// The client's end.
    pub fn local(&self) -> SocketAddr {
        self.reader.get_ref().local_addr().expect("a connected socket has an address")
    }

    /// The server's end, as the client's socket has it.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.reader.get_ref().peer_addr()
    }

    /// Asks the server who it is.
    ///
    /// # Errors
    /// When the connection has ended, or nothing comes for a minute.
    pub fn ask(&mut self) -> io::Result<Answer> {
        self.reader.get_mut().write_all(b"who\n")?;
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        parse(&line)
    }
}

/// Connects, asks once and closes.
///
/// # Errors
/// As [`Session::open`] and [`Session::ask`].
pub fn ask(from: &Space, transport: Transport, address: &str, port: u16) -> io::Result<Answer> {
    Session::open(from, transport, address, port)?.ask()
}

/// Asks by a datagram from a port of its own, or from `local`.
///
/// # Errors
/// When it is refused, or no answer comes.
pub fn ask_udp(from: &Space, address: &str, port: u16, local: u16) -> io::Result<Answer> {
    let address = SocketAddr::new(address.parse().expect("it is an address"), port);
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = from.enter(|| UdpSocket::bind((any, local)))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let (mut buffer, mut outcome) = ([0; 100], Err(io::ErrorKind::TimedOut.into()));
    eventually(Duration::from_secs(10), || {
        let answer = socket.send(b"who\n").and_then(|_| socket.recv(&mut buffer));
        outcome = answer.and_then(|length| parse(&String::from_utf8_lossy(&buffer[..length])));
        !matches!(&outcome, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    });
    outcome
}

fn parse(line: &str) -> io::Result<Answer> {
    let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, format!("no answer but {line:?}"));
    let (server, client) = line.trim_end().split_once(' ').ok_or_else(ended)?;
    Ok(Answer { server: server.to_owned(), client: client.parse().map_err(|_| ended())? })
}

fn listener(transport: Transport, address: SocketAddr) -> io::Result<TcpListener> {
    match transport {
        Transport::Tcp => TcpListener::bind(address),
        Transport::Sctp => {
            let socket = socket(transport, address)?;
            if address.is_ipv6() {
                setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
            }
            bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
            listen(&socket, Backlog::new(64)?)?;
            Ok(TcpListener::from(socket))
        }
    }
}

fn socket(transport: Transport, address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let protocol = match transport {
        Transport::Tcp => libc::IPPROTO_TCP,
        Transport::Sctp => libc::IPPROTO_SCTP,
    };
    // SAFETY: it takes numbers only.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    let socket = Errno::result(socket)?;
    // SAFETY: the kernel has just given it to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}
