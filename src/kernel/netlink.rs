//! A synchronous netlink transport: many requests in one send, dumps that are whole.
//!
//! The kernel works through a request while it is being sent, so when a send returns every answer
//! is waiting. Nothing here knows what a message means: [`super::message`] makes those of rtnetlink,
//! [`super::ipvs`] those of IPVS.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_ECHO, NLM_F_EXCL,
    NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable, NlaBuffer, NlasIterator, Parseable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_SOCK_DIAG},
};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// Message types of every netlink family (include/uapi/linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The text of an extended acknowledgement (`enum nlmsgerr_attrs`).
const NLMSGERR_ATTR_MSG: u16 = 1;
/// The length of a netlink message header, and so of what an acknowledgement repeats of a request.
const HEADER: usize = 16;
/// What goes into one send: well below the default send buffer (`net.core.wmem_default`, 208 KiB).
const BATCH_BYTES: usize = 32 * 1024;
const BATCH_MESSAGES: usize = 100;
/// The largest datagram that the kernel makes for a dump (`netlink_dump`) is 32 KiB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// What may wait for us: 100 answers to `RTM_GETLINK` need about 400 KiB.
const QUEUE_BYTES: usize = 2 * 1024 * 1024;
/// The kernel answers while it takes the request; this only bounds the effect of a kernel bug.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a dump is repeated because the table changed meanwhile.
const DUMP_ATTEMPTS: usize = 50;

/// What the kernel said to a request that it refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetlinkError {
    /// Its error number.
    pub errno: Errno,
    /// Its explanation (extended acknowledgement); empty where it gave none.
    pub text: String,
}

impl std::fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.errno.desc())?;
        if self.text.is_empty() { Ok(()) } else { write!(f, " ({})", self.text) }
    }
}

impl std::error::Error for NetlinkError {}

impl From<io::Error> for NetlinkError {
    fn from(error: io::Error) -> Self {
        Self { errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)), text: String::new() }
    }
}

/// What one protocol's messages are, in the form that goes over the socket.
pub trait Message: NetlinkSerializable + NetlinkDeserializable + Clone {}

impl<M: NetlinkSerializable + NetlinkDeserializable + Clone> Message for M {}

/// A message to the kernel that it must acknowledge.
#[derive(Debug, Clone)]
pub struct Request<M = RouteNetlinkMessage> {
    message: M,
    flags: u16,
}

impl<M> Request<M> {
    /// A request that asks, changes or removes.
    pub fn new(message: M) -> Self {
        Self { message, flags: 0 }
    }

    /// A request that makes an object which must not be there yet.
    pub fn create(message: M) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_EXCL }
    }

    /// A request that makes a device. The kernel (6.2 or newer) says who made it only when asked to
    /// send the notification to the maker as well.
    pub fn create_device(message: M) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO }
    }

    /// A request that makes an object or replaces the one with the same key.
    pub fn replace(message: M) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_REPLACE }
    }
}

/// The kernel's answer to one request.
#[derive(Debug)]
pub struct Answer<M = RouteNetlinkMessage> {
    /// Whether it was done.
    pub result: Result<(), NetlinkError>,
    /// What was asked for, where something was.
    pub replies: Vec<M>,
}

/// A netlink socket. It belongs to the namespace in which it was opened, for good.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens an rtnetlink socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Self::connect(NETLINK_ROUTE)
    }

    /// Opens a generic netlink socket in the calling thread's namespace.
    pub fn generic() -> io::Result<Self> {
        Self::connect(NETLINK_GENERIC)
    }

    /// Opens a netlink socket for the sockets of the calling thread's namespace.
    pub fn sockets() -> io::Result<Self> {
        Self::connect(NETLINK_SOCK_DIAG)
    }

    fn connect(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        bind_own(&mut socket)?;
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        // Linux before 4.20 does not filter dumps; what comes is checked here in any case.
        let _ = socket.set_netlink_get_strict_chk(true);
        enlarge(&socket, QUEUE_BYTES)?;
        setsockopt(
            &borrow(&socket),
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_TIMEOUT.as_secs() as i64),
        )?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Opens a socket for netfilter in the calling thread's namespace.
    pub fn netfilter() -> io::Result<Self> {
        Self::connect(NETLINK_NETFILTER)
    }

    /// The socket itself, from which nobody waits for an answer any more.
    pub(super) fn into_socket(self) -> io::Result<Socket> {
        self.socket.set_non_blocking(true)?;
        Ok(self.socket)
    }

    /// Sends the requests in order and returns a result for each. One that fails does not stop
    /// those after it.
    pub fn batch<M: Message>(&mut self, requests: &[Request<M>]) -> Vec<Result<(), NetlinkError>> {
        self.exchange(requests).into_iter().map(|answer| answer.result).collect()
    }

    /// Sends one request.
    pub fn request<M: Message>(&mut self, request: Request<M>) -> Result<Vec<M>, NetlinkError> {
        let answer = self.exchange(&[request]).pop();
        let lost = NetlinkError { errno: Errno::EIO, text: String::new() };
        let answer = answer.ok_or(lost)?;
        answer.result.map(|()| answer.replies)
    }

    /// Sends the requests in order and returns an answer for each.
    pub fn exchange<M: Message>(&mut self, requests: &[Request<M>]) -> Vec<Answer<M>> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut rest = requests;
        let mut packet = Vec::with_capacity(BATCH_BYTES);
        while !rest.is_empty() {
            packet.clear();
            let mut count = 0;
            while count < rest.len().min(BATCH_MESSAGES) && packet.len() < BATCH_BYTES {
                let request = &rest[count];
                let sequence = self.sequence.wrapping_add(1 + count as u32);
                push(&mut packet, &request.message, request.flags | NLM_F_ACK, sequence);
                count += 1;
            }
            answers.extend(self.send_and_collect(&packet, count));
            rest = &rest[count..];
        }
        answers
    }

    fn send_and_collect<M: Message>(&mut self, packet: &[u8], count: usize) -> Vec<Answer<M>> {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count as u32);
        let mut results: Vec<Option<Result<(), NetlinkError>>> = vec![None; count];
        let mut replies: Vec<Vec<M>> = vec![Vec::new(); count];
        let mut outcome = self.socket.send(packet, 0).map(|_| ());
        let mut missing = count;
        while missing > 0 && outcome.is_ok() {
            outcome = receive(&self.socket, &mut self.buffer);
            for (header, payload) in messages(if outcome.is_ok() { &self.buffer } else { &[] }) {
                // Late answers to requests that were given up are passed over.
                let index = header.sequence_number.wrapping_sub(first) as usize;
                let Some(result) = results.get_mut(index) else { continue };
                if header.message_type == NLMSG_ERROR {
                    missing -= usize::from(result.is_none());
                    *result = Some(acknowledgement(&header, payload));
                } else {
                    replies[index].extend(M::deserialize(&header, payload));
                }
            }
        }
        let lost = outcome.err().map_or(
            NetlinkError { errno: Errno::EIO, text: "no answer".to_owned() },
            NetlinkError::from,
        );
        let results = results.into_iter().map(|result| result.unwrap_or_else(|| Err(lost.clone())));
        results.zip(replies).map(|(result, replies)| Answer { result, replies }).collect()
    }

    /// Reads a whole table, again when it changed meanwhile. Entries in a form that the parser does
    /// not know are left out.
    pub fn dump<M: Message>(&mut self, request: &M) -> Result<Vec<M>, NetlinkError> {
        self.dump_some(request, Some)
    }

    /// The same, and takes of each entry what is wanted of it.
    pub fn dump_some<M: Message, T>(
        &mut self,
        request: &M,
        wanted: impl Fn(M) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(entries) = self.dump_once(request, &wanted)? {
                return Ok(entries);
            }
        }
        Err(NetlinkError { errno: Errno::EAGAIN, text: "the table changes too quickly".to_owned() })
    }

    /// `None`: the table changed, or something was lost.
    fn dump_once<M: Message, T>(
        &mut self,
        request: &M,
        wanted: impl Fn(M) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = Vec::new();
        push(&mut packet, request, NLM_F_DUMP, self.sequence);
        self.socket.send(&packet, 0)?;
        let mut entries = Vec::new();
        let mut whole = true;
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    whole = false;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            for (header, payload) in messages(&self.buffer) {
                if header.sequence_number != self.sequence {
                    continue;
                }
                whole &= header.flags & NLM_F_DUMP_INTR == 0;
                match header.message_type {
                    NLMSG_DONE | NLMSG_ERROR => {
                        acknowledgement(&header, payload)?;
                        return Ok(whole.then_some(entries));
                    }
                    _ => match M::deserialize(&header, payload) {
                        Ok(message) => entries.extend(wanted(message)),
                        Err(error) => tracing::debug!(%error, "netlink entry not understood"),
                    },
                }
            }
        }
    }
}

/// A socket that hears of changes in the calling thread's namespace.
pub(super) fn subscribe(protocol: isize, groups: &[u32], queue: usize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    enlarge(&socket, queue)?;
    bind_own(&mut socket)?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Reads one datagram into `buffer`, whose capacity it keeps.
pub(super) fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.reserve(RECEIVE_BYTES);
    loop {
        match socket.recv(buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(|_| ()),
        }
    }
}

/// The messages in a datagram; a malformed one ends it.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (NetlinkHeader, &[u8])> {
    std::iter::from_fn(move || {
        let buffer = NetlinkBuffer::new_checked(datagram).ok()?;
        let header = NetlinkHeader::parse(&NetlinkBuffer::new(&datagram)).ok()?;
        let payload = buffer.payload();
        let length = (header.length as usize).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
        Some((header, payload))
    })
}

/// The ports of our sockets are `base + 1`, `base + 2` …, above all process ids (at most 2^22) and
/// below those that the kernel gives out itself (from 2^32 - 4096 downwards), so that a
/// notification shows whether we made the change.
fn port_base() -> u32 {
    static BASE: OnceLock<u32> = OnceLock::new();
    *BASE.get_or_init(|| 0x4000_0000 | (rand::random::<u32>() & 0x3f00_0000))
}

const PORT_MASK: u32 = 0xff00_0000;

/// Whether a notification was caused by a request from one of our sockets. Not every kind of
/// notification carries the port of who caused it: then it is 0, which is nobody's.
pub(super) fn is_own_port(port: u32) -> bool {
    port & PORT_MASK == port_base()
}

fn bind_own(socket: &mut Socket) -> io::Result<()> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed) & !PORT_MASK;
        match socket.bind(&SocketAddr::new(port_base() | number, 0)) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
            result => return result,
        }
    }
}

/// Makes room for `bytes` that wait; beyond the system's limit only where we may.
fn enlarge(socket: &Socket, bytes: usize) -> io::Result<()> {
    match setsockopt(&borrow(socket), sockopt::RcvBufForce, &bytes) {
        Err(Errno::EPERM) => Ok(setsockopt(&borrow(socket), sockopt::RcvBuf, &bytes)?),
        result => Ok(result?),
    }
}

/// Lends the descriptor of a netlink socket.
pub(super) fn borrow(socket: &Socket) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the socket is borrowed for as long as the descriptor, so it stays open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

fn push<M: Message>(packet: &mut Vec<u8>, message: &M, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags | NLM_F_REQUEST;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message.clone()));
    message.finalize();
    let start = packet.len();
    packet.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut packet[start..]);
}

/// Reads an `NLMSG_ERROR` or `NLMSG_DONE`: a negative error number or 0, and what explains it.
fn acknowledgement(header: &NetlinkHeader, payload: &[u8]) -> Result<(), NetlinkError> {
    let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code == 0 {
        return Ok(());
    }
    let repeated = if header.message_type == NLMSG_ERROR { HEADER } else { 0 };
    let attributes = match header.flags & NLM_F_ACK_TLVS {
        0 => &[],
        _ => payload.get(4 + repeated..).unwrap_or_default(),
    };
    let text = NlasIterator::new(attributes).flatten().find_map(|nla: NlaBuffer<&[u8]>| {
        let text = String::from_utf8_lossy(nla.value()).trim_end_matches('\0').to_owned();
        (nla.kind() == NLMSGERR_ATTR_MSG).then_some(text)
    });
    Err(NetlinkError { errno: Errno::from_raw(code.wrapping_neg()), text: text.unwrap_or_default() })
}
