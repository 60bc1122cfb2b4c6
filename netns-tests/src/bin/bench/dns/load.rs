//! Queries, as many at once as are to be outstanding.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmsg, setsockopt, sockopt,
};
use rand::seq::SliceRandom as _;

use super::Name;
use crate::report::percentile;

/// How many queries are outstanding.
const OUTSTANDING: usize = 128;
/// When a query counts as lost, and is asked again.
const LOST: Duration = Duration::from_millis(500);
/// What is not counted at the beginning.
const WARM_UP: Duration = Duration::from_millis(300);
/// The largest answer that is read.
const LARGEST: usize = 1500;

/// What came of asking for a while.
pub struct Measured {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// How many were asked, with those that are not counted.
    pub asked: u64,
    pub lost: u64,
}

/// Who asks.
pub struct Load {
    /// One for all queries, or one for each that is outstanding.
    sockets: Vec<UdpSocket>,
    /// The number of the query that was asked last.
    last: u16,
}

/// A query that is outstanding.
#[derive(Clone, Copy)]
struct Slot {
    /// Counts the queries of this slot: a late answer to an earlier one is none.
    turn: u8,
    name: usize,
    begun: Instant,
}

impl Load {
    /// From one port, as a resolver for many does.
    pub fn new(server: &str) -> Self {
        Self { sockets: vec![socket(server)], last: 0 }
    }

    /// Each query from a port of its own, as the C library does.
    pub fn many_ports(server: &str) -> Self {
        Self { sockets: (0..OUTSTANDING).map(|_| socket(server)).collect(), last: 0 }
    }

    /// Whether each of the names is answered with its address.
    pub fn knows(&mut self, names: &[Name]) -> bool {
        names.iter().all(|name| self.is_right(name) == Some(true))
    }

    /// Whether a name is answered with its address; `None`: it is not answered at all.
    pub fn is_right(&mut self, name: &Name) -> Option<bool> {
        let mut buffer = [0; LARGEST];
        self.last = self.last.wrapping_add(1);
        let query = query(&name.0, self.last);
        let socket = self.sockets.first()?;
        socket.send(&query).ok()?;
        loop {
            let length = socket.recv(&mut buffer).ok()?;
            // What was asked before may still be answered.
            if buffer[..2] == query[..2] {
                return Some(is_right(&buffer[..length], name));
            }
        }
    }

    /// Asks for the names as fast as they are answered.
    pub fn measure(&mut self, names: &[Name], time: Duration, check: bool) -> Measured {
        let queries: Vec<Vec<u8>> = names.iter().map(|name| query(&name.0, 0)).collect();
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.shuffle(&mut rand::rng());
        let mut next = order.iter().cycle().copied();
        let start = Instant::now();
        let slot = |name| Slot { turn: 0, name, begun: start };
        let mut slots: Vec<Slot> = next.by_ref().take(OUTSTANDING).map(slot).collect();
        let mut asked: Vec<usize> = (0..OUTSTANDING).collect();
        let (mut times, mut asked_all, mut lost) = (Vec::with_capacity(1 << 20), 0, 0);
        let (mut read, mut buffers) = (Vec::new(), vec![[0; LARGEST]; OUTSTANDING]);
        while start.elapsed() < WARM_UP + time {
            asked_all += asked.len() as u64;
            self.send(&slots, &mut asked, &queries);
            asked.clear();
            let received = match self.sockets.as_slice() {
                [socket] => receive(socket, &mut buffers, &mut read),
                sockets => receive_each(sockets, &mut buffers, &mut read),
            };
            let now = match received {
                Ok(()) => Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Instant::now(),
                Err(error) => panic!("the server is not there: {error}"),
            };
            for (answer, length) in buffers.iter().zip(read.drain(..)) {
                let (number, turn) = (usize::from(answer[0]), answer[1]);
                let Some(slot) = slots.get_mut(number).filter(|slot| slot.turn == turn) else {
                    continue;
                };
                let name = &names[slot.name];
                assert!(!check || is_right(&answer[..length], name), "{}: a wrong answer", name.0);
                if now - start > WARM_UP {
                    times.push((now - slot.begun).as_secs_f64() * 1e6);
                }
                renew(slot, &mut next, now);
                asked.push(number);
            }
            for (number, slot) in slots.iter_mut().enumerate() {
                if now - slot.begun > LOST {
                    lost += 1;
                    renew(slot, &mut next, now);
                    asked.push(number);
                }
            }
        }
        Measured {
            per_second: times.len() as f64 / time.as_secs_f64(),
            p50_us: percentile(times.iter().copied(), 50),
            p99_us: percentile(times.iter().copied(), 99),
            asked: asked_all,
            lost,
        }
    }

    /// Sends what is to be asked: queries of one length as one packet, which the kernel takes apart, so
    /// that who asks is not the limit.
    fn send(&self, slots: &[Slot], asked: &mut [usize], queries: &[Vec<u8>]) {
        let query = |slot: &usize| &queries[slots[*slot].name][2..];
        asked.sort_unstable_by_key(|slot| query(slot).len());
        let heads: Vec<[u8; 2]> = asked.iter().map(|slot| [*slot as u8, slots[*slot].turn]).collect();
        let parts: Vec<[&[u8]; 2]> =
            heads.iter().zip(&*asked).map(|(head, slot)| [&head[..], query(slot)]).collect();
        let [socket] = self.sockets.as_slice() else {
            for slot in asked {
                let head = [*slot as u8, slots[*slot].turn];
                // What is not sent counts as lost.
                let _ = self.sockets[*slot].send(&[&head, query(slot)].concat());
            }
            return;
        };
        let fd = socket.as_raw_fd();
        for alike in parts.chunk_by(|a, b| a[1].len() == b[1].len()).flat_map(|all| all.chunks(60)) {
            let length = alike.first().map_or(0, |[head, query]| head.len() + query.len()) as u16;
            let all: Vec<IoSlice<'_>> = alike.iter().flatten().map(|part| IoSlice::new(part)).collect();
            let size = [ControlMessage::UdpGsoSegments(&length)];
            // What is not sent counts as lost.
            let _ = sendmsg::<()>(fd, &all, &size, MsgFlags::empty(), None);
        }
    }
}

fn socket(server: &str) -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a free port");
    socket.connect((server, 53)).expect("there is a route");
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket has a time-out");
    setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20)).expect("root may have a large buffer");
    socket
}

fn renew(slot: &mut Slot, next: &mut impl Iterator<Item = usize>, now: Instant) {
    let name = next.next().expect("there is always another");
    *slot = Slot { turn: slot.turn.wrapping_add(1), name, begun: now };
}

/// Reads the answers that are there; waits for the first.
fn receive(socket: &UdpSocket, buffers: &mut [[u8; LARGEST]], read: &mut Vec<usize>) -> io::Result<()> {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(buffers.len(), None);
    let mut places: Vec<[IoSliceMut<'_>; 1]> =
        buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let flags = MsgFlags::MSG_WAITFORONE;
    let all = recvmmsg(socket.as_raw_fd(), &mut headers, &mut places, flags, None)?;
    read.extend(all.map(|answer| answer.bytes));
    Ok(())
}

/// The same of many sockets.
fn receive_each(
    sockets: &[UdpSocket],
    buffers: &mut [[u8; LARGEST]],
    read: &mut Vec<usize>,
) -> io::Result<()> {
    let mut all: Vec<PollFd<'_>> =
        sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    poll(&mut all, PollTimeout::from(100_u8))?;
    for (socket, _) in sockets.iter().zip(&all).filter(|(_, state)| state.any() == Some(true)) {
        match buffers.get_mut(read.len()) {
            Some(buffer) => read.push(socket.recv(buffer)?),
            None => break,
        }
    }
    Ok(())
}

/// A query for the IPv4 addresses of a name (RFC 1035, 4.1).
fn query(name: &str, id: u16) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut query = vec![high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

/// Whether an answer has the right address and nothing else.
fn is_right(answer: &[u8], (name, address): &Name) -> bool {
    // The question, then a record of 16 bytes with a pointer to its name; an authoritative server may
    // tell more after that.
    let question = 12 + name.len() + 2 + 4;
    let data = answer.get(question + 12..question + 16);
    answer.get(3).is_some_and(|code| code & 15 == 0)
        && answer.get(6..8) == Some(&[0, 1])
        && data == Some(&address.octets())
}
