//! Many datagrams with one system call (recvmmsg(2), sendmmsg(2)), and those of one length to one client
//! as one packet through the stack (`UDP_SEGMENT` in udp(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd as _, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrLike as _, SockaddrStorage, recvmmsg, sendmsg,
};

/// The most datagrams that the kernel takes as one packet (`UDP_MAX_SEGMENTS`, include/linux/udp.h, in
/// Linux 5.4; newer ones take more).
const MAX_SEGMENTS: usize = 64;
/// The most bytes of that: a packet has less than 64 KiB, with its headers.
const MAX_PACKET: usize = 65_000;

/// Datagrams that were read, and the answers to them.
pub struct Datagrams {
    /// One place after the other.
    read: Vec<u8>,
    /// The bytes that each has.
    place: usize,
    /// How many bytes came from whom.
    received: Vec<(usize, SocketAddr)>,
    /// For IPv4, and for IPv6: they keep the length of an address from one call to the next.
    incoming: [MultiHeaders<SockaddrStorage>; 2],
    answers: Vec<u8>,
    /// Which of these bytes go to whom.
    to_send: Vec<(SocketAddr, Range<usize>)>,
}

impl Datagrams {
    /// Room for so many at a time, each with at most so many bytes: what is longer is cut.
    pub fn new(count: usize, size: usize) -> Self {
        Self {
            read: vec![0; count * size],
            place: size,
            received: Vec::with_capacity(count),
            incoming: [(); 2].map(|()| MultiHeaders::preallocate(count, None)),
            answers: Vec::new(),
            to_send: Vec::with_capacity(count),
        }
    }

    /// Reads what has arrived at a socket of IPv4 or of IPv6, without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when nothing has; those of datagrams that were sent before, too.
    pub fn receive(&mut self, socket: impl AsFd, is_ipv4: bool) -> io::Result<()> {
        self.received.clear();
        let mut places: Vec<[IoSliceMut<'_>; 1]> =
            self.read.chunks_exact_mut(self.place).map(|place| [IoSliceMut::new(place)]).collect();
        let [v4, v6] = &mut self.incoming;
        let (fd, headers) = (socket.as_fd().as_raw_fd(), if is_ipv4 { v4 } else { v6 });
        let all = recvmmsg(fd, headers, &mut places, MsgFlags::MSG_DONTWAIT, None)?;
        for datagram in all {
            // Who cannot be answered is passed over, but keeps its place.
            let from = datagram.address.as_ref().and_then(address);
            let from = from.unwrap_or((std::net::Ipv4Addr::UNSPECIFIED, 0).into());
            self.received.push((datagram.bytes, from));
        }
        Ok(())
    }

    /// Gives each datagram that was read to a function, which adds an answer to the bytes that it gets,
    /// or nothing.
    pub fn answer(&mut self, mut each: impl FnMut(&[u8], SocketAddr, &mut Vec<u8>)) {
        self.answers.clear();
        self.to_send.clear();
        for ((length, from), place) in self.received.iter().zip(self.read.chunks_exact(self.place)) {
            let start = self.answers.len();
            each(place.get(..*length).unwrap_or_default(), *from, &mut self.answers);
            if self.answers.len() > start {
                self.to_send.push((*from, start..self.answers.len()));
            }
        }
    }

    /// Sends the answers, without waiting, in any order; gives those that could not be sent now. An
    /// answer that the kernel refuses to send is passed over.
    pub fn send(&mut self, socket: impl AsFd) -> Vec<(Vec<u8>, SocketAddr)> {
        let fd = socket.as_fd().as_raw_fd();
        let answers = &self.answers;
        let bytes = |range: &Range<usize>| answers.get(range.clone()).unwrap_or_default();
        self.to_send.sort_unstable_by_key(|(client, range)| (*client, range.len()));
        let mut single: Vec<&(SocketAddr, Range<usize>)> = Vec::new();
        let is_alike = |(a, x): &(SocketAddr, Range<usize>), (b, y): &(SocketAddr, Range<usize>)| {
            a == b && x.len() == y.len()
        };
        let at_once = |alike: &[(SocketAddr, Range<usize>)]| {
            let length = alike.first().map_or(1, |(_, range)| range.len().max(1));
            (MAX_PACKET / length).clamp(1, MAX_SEGMENTS)
        };
        let groups = self.to_send.chunk_by(is_alike);
        for alike in groups.flat_map(|alike| alike.chunks(at_once(alike))) {
            let parts: Vec<IoSlice<'_>> =
                alike.iter().map(|(_, range)| IoSlice::new(bytes(range))).collect();
            if !send_segments(fd, alike, &parts) {
                single.extend(alike);
            }
        }
        let parts: Vec<[IoSlice<'_>; 1]> =
            single.iter().map(|(_, range)| [IoSlice::new(bytes(range))]).collect();
        let clients: Vec<SockaddrStorage> = single.iter().map(|(client, _)| (*client).into()).collect();
        let mut sent = 0;
        while let (Some(parts @ [_, ..]), Some(clients)) = (parts.get(sent..), clients.get(sent..)) {
            match send_each(fd, parts, clients) {
                Ok(count) => sent += count.max(1),
                Err(Errno::EAGAIN) => break,
                Err(_) => sent += 1,
            }
        }
        let left = single.get(sent..).unwrap_or_default().iter();
        left.map(|(client, range)| (bytes(range).to_vec(), *client)).collect()
    }
}

/// Sends several datagrams of one length to one client as one packet, which becomes several where it
/// leaves the stack. Tells whether it did: not all paths can.
fn send_segments(fd: RawFd, alike: &[(SocketAddr, Range<usize>)], parts: &[IoSlice<'_>]) -> bool {
    let [(client, range), _, ..] = alike else { return false };
    let Ok(length) = u16::try_from(range.len()) else { return false };
    let size = [ControlMessage::UdpGsoSegments(&length)];
    let client = SockaddrStorage::from(*client);
    sendmsg(fd, parts, &size, MsgFlags::MSG_DONTWAIT, Some(&client)).is_ok()
}

/// Sends one datagram to each client with one call; gives how many were taken.
fn send_each(fd: RawFd, parts: &[[IoSlice<'_>; 1]], clients: &[SockaddrStorage]) -> nix::Result<usize> {
    let header = |(parts, client): (&[IoSlice<'_>; 1], &SockaddrStorage)| {
        // SAFETY: a header is plain numbers and pointers, all of which may be 0.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_name = client.as_ptr().cast_mut().cast();
        header.msg_hdr.msg_namelen = client.len();
        // A slice for IO has the layout of an iovec, which the kernel only reads here.
        header.msg_hdr.msg_iov = parts.as_ptr().cast_mut().cast();
        header.msg_hdr.msg_iovlen = parts.len();
        header
    };
    let mut headers: Vec<libc::mmsghdr> = parts.iter().zip(clients).map(header).collect();
    let count = headers.len() as libc::c_uint;
    // SAFETY: the headers, and the names and bytes that they point to, live until it returns.
    let sent = unsafe { libc::sendmmsg(fd, headers.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
    Errno::result(sent).map(|sent| sent.unsigned_abs() as usize)
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = from.as_sockaddr_in().map(|from| SocketAddrV4::from(*from).into());
    v4.or_else(|| from.as_sockaddr_in6().map(|from| SocketAddrV6::from(*from).into()))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn many_to_one_client_arrive_one_by_one() {
        let mut datagrams = Datagrams::new(200, 16);
        for any in ["127.0.0.1:0", "[::1]:0", "127.0.0.1:0"] {
            let (server, client) = (UdpSocket::bind(any).unwrap(), UdpSocket::bind(any).unwrap());
            let other = UdpSocket::bind(any).unwrap();
            for number in 0_u8..150 {
                // Of two lengths, in turns.
                let query = &[number, 0, 0][..if number % 2 == 0 { 2 } else { 3 }];
                client.send_to(query, server.local_addr().unwrap()).unwrap();
            }
            other.send_to(&[200, 0], server.local_addr().unwrap()).unwrap();
            datagrams.receive(&server, any.starts_with('1')).unwrap();
            datagrams.answer(|query, _, answer| answer.extend_from_slice(query));
            assert!(datagrams.send(&server).is_empty());
            let read = |socket: &UdpSocket| {
                let mut buffer = [0; 16];
                socket.set_nonblocking(true).unwrap();
                let length = socket.recv(&mut buffer).ok()?;
                assert_eq!(length, if buffer[0] % 2 == 0 { 2 } else { 3 });
                Some(buffer[0])
            };
            let mut seen: Vec<u8> = std::iter::from_fn(|| read(&client)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..150).collect::<Vec<u8>>());
            assert_eq!((read(&other), read(&other)), (Some(200), None));
        }
    }

    #[test]
    fn each_is_answered_and_what_is_too_long_is_cut() {
        // The same for all, as one thread reads many sockets.
        let mut datagrams = Datagrams::new(3, 4);
        for any in ["127.0.0.1:0", "[::1]:0", "127.0.0.1:0"] {
            let server = UdpSocket::bind(any).unwrap();
            let clients = [(); 5].map(|()| UdpSocket::bind(any).unwrap());
            server.set_nonblocking(true).unwrap();
            assert_eq!(
                datagrams.receive(&server, any.starts_with('1')).unwrap_err().kind(),
                io::ErrorKind::WouldBlock,
                "nothing has arrived"
            );
            for (number, client) in clients.iter().enumerate() {
                let text = ["a", "bb", "", "dddd", "eeeee"][number];
                client.send_to(text.as_bytes(), server.local_addr().unwrap()).unwrap();
            }
            let mut seen = Vec::new();
            for _ in 0..2 {
                datagrams.receive(&server, any.starts_with('1')).unwrap();
                datagrams.answer(|query, _, answer| {
                    seen.push(query.len());
                    if query.len() != 2 {
                        answer.extend_from_slice(query);
                        answer.push(b'!');
                    }
                });
                assert!(datagrams.send(&server).is_empty());
            }
            assert_eq!(seen, [1, 2, 0, 4, 4]);
            for (client, text) in clients.iter().zip([&b"a!"[..], b"", b"!", b"dddd!", b"eeee!"]) {
                let mut buffer = [0; 8];
                client.set_nonblocking(true).unwrap();
                match client.recv(&mut buffer) {
                    Ok(length) => assert_eq!(&buffer[..length], text),
                    Err(error) => assert!(text.is_empty(), "{error}"),
                }
            }
        }
    }
}
