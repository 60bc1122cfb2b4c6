//! Probes: traffic between two namespaces, counted exactly.
//!
//! A socket stays in the network namespace in which it was made, so only making it needs a visit;
//! the threads that use it stay outside.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::space::Space;
use crate::wait::{self, eventually, wait_for};

/// Who sent a datagram, and what was in it.
type Datagram = (SocketAddr, Vec<u8>);

/// A UDP port at which everything is kept that arrives.
#[derive(Debug)]
pub struct Inbox {
    received: Arc<Mutex<Vec<Datagram>>>,
    stop: Arc<AtomicBool>,
}

impl Inbox {
    /// Opens a port for both families.
    pub fn open(space: &Space, port: u16) -> Self {
        let socket = receiver(space, SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)));
        let inbox = Self { received: Arc::default(), stop: Arc::default() };
        let (received, stop) = (Arc::clone(&inbox.received), Arc::clone(&inbox.stop));
        thread::spawn(move || {
            let mut buffer = [0; 9000];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let mut received = received.lock().expect("no receiver panicked");
                    received.push((from, buffer[..length].to_vec()));
                }
            }
        });
        inbox
    }

    /// Whether a datagram with this content arrives within the next three seconds.
    pub fn gets(&self, content: &[u8]) -> bool {
        eventually(Duration::from_secs(3), || self.sender_of(content).is_some())
    }

    /// The source address of the first datagram with this content.
    pub fn sender_of(&self, content: &[u8]) -> Option<SocketAddr> {
        let received = self.received.lock().expect("no receiver panicked");
        received.iter().find(|(_, found)| found == content).map(|(from, _)| *from)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A stream of numbered datagrams at a fixed rate.
#[derive(Debug)]
pub struct Stream {
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<Duration>,
    receiver: JoinHandle<Vec<u32>>,
}

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamReport {
    /// Datagrams sent.
    pub sent: u64,
    /// How many that were in a second.
    pub per_second: u64,
    /// Of these, how many never arrived.
    pub lost: u64,
    /// How many arrived more than once.
    pub duplicated: u64,
}

impl Stream {
    /// Starts sending `rate` datagrams a second (fewer on a slow machine) to port 7000 of `address`,
    /// which `to` has.
    pub fn start(from: &Space, to: &Space, address: &str, rate: u32) -> Self {
        let (address, rate): (IpAddr, _) = (parse(address), wait::rate(rate));
        let inbox = receiver(to, SocketAddr::new(address, 7000));
        let outbox = from.enter(|| UdpSocket::bind(SocketAddr::new(unspecified(address), 0)));
        let outbox = outbox.expect("a UDP socket can be made");
        outbox.connect((address, 7000)).expect("there is a route");
        let (stop_sending, stop_receiving) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (sent, received) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let sender = {
            let (stop, sent) = (Arc::clone(&stop_sending), Arc::clone(&sent));
            thread::spawn(move || send(&outbox, rate, &stop, &sent))
        };
        let receiver = {
            let (stop, received) = (Arc::clone(&stop_receiving), Arc::clone(&received));
            thread::spawn(move || receive(&inbox, &stop, &received))
        };
        Self { stop_sending, stop_receiving, sent, received, sender, receiver }
    }

    /// Waits until `count` more datagrams have arrived.
    ///
    /// # Panics
    /// When that does not happen within [`DEADLINE`](crate::DEADLINE).
    #[track_caller]
    pub fn wait(&self, count: u64) {
        let goal = self.received.load(Ordering::Relaxed) + count;
        wait_for("the stream flows", || self.received.load(Ordering::Relaxed) >= goal);
    }

    /// Stops sending, waits for what is on its way, and counts.
    pub fn stop(self) -> StreamReport {
        self.stop_sending.store(true, Ordering::Relaxed);
        let took = self.sender.join().expect("the sender did not panic");
        let sent = self.sent.load(Ordering::Relaxed);
        eventually(Duration::from_secs(2), || self.received.load(Ordering::Relaxed) >= sent);
        self.stop_receiving.store(true, Ordering::Relaxed);
        let numbers = self.receiver.join().expect("the receiver did not panic");
        let distinct: std::collections::BTreeSet<_> = numbers.iter().collect();
        let arrived = distinct.len() as u64;
        let per_second = (sent as f64 / took.as_secs_f64()) as u64;
        StreamReport {
            sent,
            per_second,
            lost: sent - arrived,
            duplicated: numbers.len() as u64 - arrived,
        }
    }
}

/// Tells how long it has sent.
fn send(socket: &UdpSocket, rate: u32, stop: &AtomicBool, sent: &AtomicU64) -> Duration {
    let start = Instant::now();
    let mut number = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        let due = start.elapsed().as_micros() * u128::from(rate) / 1_000_000;
        while u128::from(number) < due {
            // What cannot be sent counts as lost: its number does not arrive.
            let _ = socket.send(&number.to_be_bytes());
            number += 1;
            sent.store(number.into(), Ordering::Relaxed);
        }
        thread::sleep(Duration::from_micros(200));
    }
    start.elapsed()
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, received: &AtomicU64) -> Vec<u32> {
    let mut numbers = Vec::new();
    let mut buffer = [0; 4];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((4, _)) = socket.recv_from(&mut buffer) {
            numbers.push(u32::from_be_bytes(buffer));
            received.fetch_add(1, Ordering::Relaxed);
        }
    }
    numbers
}

/// Sends `length` bytes over a TCP connection to port 7001 of `address`, which `to` has, and checks
/// that they arrive.
///
/// # Errors
/// When the connection fails, stalls for five seconds (longer on a slow machine), or other bytes
/// arrive.
pub fn tcp_transfer(from: &Space, to: &Space, address: &str, length: usize) -> io::Result<()> {
    let address: IpAddr = parse(address);
    let listener = to.enter(|| TcpListener::bind((address, 7001)))?;
    let limit = wait::limit(Duration::from_secs(5));
    let mut outgoing =
        from.enter(|| TcpStream::connect_timeout(&SocketAddr::new(address, 7001), limit))?;
    let (mut incoming, _) = listener.accept()?;
    outgoing.set_write_timeout(Some(limit))?;
    incoming.set_read_timeout(Some(limit))?;
    let data: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
    let expected = data.clone();
    let sender = thread::spawn(move || outgoing.write_all(&data));
    let mut arrived = Vec::with_capacity(length);
    incoming.read_to_end(&mut arrived)?;
    sender.join().expect("the sender did not panic")?;
    if arrived == expected {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} other bytes", arrived.len())))
    }
}

/// A TCP connection over which bytes flow until it is ended.
#[derive(Debug)]
pub struct Transfer {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    sender: JoinHandle<io::Result<u64>>,
    receiver: JoinHandle<io::Result<u64>>,
}

impl Transfer {
    /// Connects to port 7003 of `address`, which `to` has, and starts sending.
    ///
    /// # Errors
    /// When the connection does not come about.
    pub fn start(from: &Space, to: &Space, address: &str) -> io::Result<Self> {
        let address = SocketAddr::new(parse(address), 7003);
        let listener = to.enter(|| TcpListener::bind(address))?;
        let limit = wait::limit(Duration::from_secs(5));
        let mut outgoing = from.enter(|| TcpStream::connect_timeout(&address, limit))?;
        let (mut incoming, _) = listener.accept()?;
        outgoing.set_write_timeout(Some(limit))?;
        incoming.set_read_timeout(Some(limit))?;
        let (stop, arrived) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let sender = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    outgoing.write_all(&block(sent))?;
                    sent += 1;
                }
                Ok(sent)
            })
        };
        let receiver = {
            let arrived = Arc::clone(&arrived);
            thread::spawn(move || {
                let (mut received, mut buffer) = (0, block(0));
                while let Some(read) = read_block(&mut incoming, &mut buffer)? {
                    if buffer[..read] != block(received) {
                        let text = format!("block {received} is not what was sent");
                        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                    }
                    received += 1;
                    arrived.store(received, Ordering::Relaxed);
                }
                Ok(received)
            })
        };
        Ok(Self { stop, arrived, sender, receiver })
    }

    /// Waits until more has arrived.
    ///
    /// # Panics
    /// When that does not happen within [`DEADLINE`](crate::DEADLINE).
    #[track_caller]
    pub fn wait(&self) {
        let goal = self.arrived.load(Ordering::Relaxed) + 50;
        wait_for("bytes flow", || self.arrived.load(Ordering::Relaxed) >= goal);
    }

    /// Ends the connection.
    ///
    /// # Errors
    /// When it was cut, stalled for five seconds, or not all arrived that was sent.
    pub fn finish(self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("the sender did not panic")?;
        let received = self.receiver.join().expect("the receiver did not panic")?;
        let text = format!("{received} of {sent} blocks have arrived");
        if received == sent { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, text)) }
    }
}

/// The bytes with this number of a transfer.
fn block(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(1024)
}

/// Fills a buffer; `None`: the stream has ended. A part is a block that was cut.
fn read_block(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let mut read = 0;
    while read < buffer.len() {
        match stream.read(&mut buffer[read..])? {
            0 => break,
            more => read += more,
        }
    }
    Ok((read > 0).then_some(read))
}

/// Sends one datagram, from `source` where it is given.
///
/// # Errors
/// When the kernel refuses to send it.
pub fn datagram(
    from: &Space,
    source: Option<&str>,
    address: &str,
    port: u16,
    content: &[u8],
) -> io::Result<()> {
    let address: IpAddr = parse(address);
    let source = source.map_or_else(|| unspecified(address), parse);
    let socket = from.enter(|| UdpSocket::bind((source, 0)))?;
    socket.send_to(content, (address, port)).map(drop)
}

/// Opens a TCP connection, and closes it again.
///
/// # Errors
/// When it does not come about within three seconds, on a machine of usual speed.
pub fn connects(from: &Space, address: &str, port: u16) -> io::Result<()> {
    let address = SocketAddr::new(parse(address), port);
    let limit = wait::limit(Duration::from_secs(3));
    from.enter(|| TcpStream::connect_timeout(&address, limit)).map(drop)
}

fn receiver(space: &Space, address: SocketAddr) -> UdpSocket {
    let socket = space.enter(|| UdpSocket::bind(address));
    let socket = socket.unwrap_or_else(|error| panic!("{address} in {}: {error}", space.name()));
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).expect("root may have a large buffer");
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a socket has a time-out");
    socket
}

fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[track_caller]
fn parse(address: &str) -> IpAddr {
    address.parse().unwrap_or_else(|error| panic!("{address:?}: {error}"))
}
