//! Probes of a path: rates between two namespaces.
//!
//! Both ends are threads of this process. Where only one packet is under way at a time their cores
//! are fixed: where the scheduler puts them would decide the rate.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use world::{Process, Space, output, wait_for};

/// What is not counted at the beginning.
const WARM_UP: Duration = Duration::from_millis(300);
pub const IPERF_PORT: u16 = 5201;
/// Where the servers of the probes listen.
pub const PORT: u16 = 7100;

/// Two containers and the way between them; dropping it ends its iperf3 server.
pub struct Path {
    client: Space,
    server: Space,
    /// Where the server listens.
    address: String,
    /// Where the client finds it.
    target: String,
    _iperf: Option<Process>,
}

impl Path {
    /// Starts what waits for probes on the server's side, which has `address`.
    pub fn new(client: &Space, server: &Space, address: &str) -> Self {
        let log = std::fs::File::create("/dev/null").expect("/dev/null can be written");
        let mut command = server.command("iperf3");
        command.args(["--server", "--port", &IPERF_PORT.to_string()]);
        let iperf = Process::start(&mut command, &log);
        let listens = format!(":{IPERF_PORT:04X} ");
        wait_for("iperf3 listens", || {
            let listener = |path| std::fs::read_to_string(path).unwrap_or_default().contains(&listens);
            server.enter(|| {
                listener("/proc/thread-self/net/tcp6") || listener("/proc/thread-self/net/tcp")
            })
        });
        Self {
            client: client.clone(),
            server: server.clone(),
            address: address.into(),
            target: address.into(),
            _iperf: Some(iperf),
        }
    }

    /// The way between the same two through another address, for probes of TCP.
    pub fn through(&self, target: &str) -> Self {
        let Self { client, server, address, .. } = self;
        let (client, server, address) = (client.clone(), server.clone(), address.clone());
        Self { client, server, address, target: target.into(), _iperf: None }
    }

    /// TCP throughput, Gb/s. The congestion control is set, because the kernel's may be BBR, which
    /// measures its own clock on a path like this.
    pub fn tcp(&self, streams: usize, time: Duration) -> f64 {
        let mut command: Command = self.client.command("iperf3");
        command.args(["--client", &self.target, "--port", &IPERF_PORT.to_string(), "--json"]);
        command.args(["--congestion", "cubic", "--omit", "1", "--parallel", &streams.to_string()]);
        // Each end has a core: whether the scheduler puts them on one would decide the rate.
        command.args(["--affinity", "0,1"]);
        command.args(["--time", &time.as_secs().to_string()]);
        let report = output(&mut command, Duration::from_secs(60)).json();
        let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
        bits.unwrap_or_else(|| panic!("iperf3 says no rate: {report}")) / 1e9
    }

    /// How many seconds all processors together work for a gigabyte over 4 TCP streams.
    pub fn cpu_per_gigabyte(&self, time: Duration) -> f64 {
        let before = busy();
        let gigabits = self.tcp(4, time);
        // What is omitted costs as much as what is counted.
        (busy() - before) / (gigabits / 8.0 * (time.as_secs() + 1) as f64)
    }

    /// UDP datagrams of 64 bytes that arrive, per second: one sender, as fast as it can.
    pub fn datagrams(&self, time: Duration) -> f64 {
        let (stop, received) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let inbox = self.server.enter(|| UdpSocket::bind(self.at(PORT))).expect("the port is free");
        inbox.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket has a time-out");
        setsockopt(&inbox, sockopt::RcvBufForce, &(4 << 20)).expect("root may have a large buffer");
        let outbox = self.client.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(self.at(PORT))?;
            std::io::Result::Ok(socket)
        });
        let outbox = outbox.expect("there is a route");
        let (stop_receiver, count) = (Arc::clone(&stop), Arc::clone(&received));
        let receiver = thread::spawn(move || {
            pin(1);
            let mut buffer = [0; 64];
            while !stop_receiver.load(Ordering::Relaxed) {
                if inbox.recv(&mut buffer).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let stop_sender = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            pin(0);
            while !stop_sender.load(Ordering::Relaxed) {
                // What does not arrive is not counted.
                let _ = outbox.send(&[0; 64]);
            }
        });
        thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
        thread::sleep(time);
        let rate = (received.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        sender.join().expect("the sender did not panic");
        receiver.join().expect("the receiver did not panic");
        rate
    }

    /// TCP round trips of 64 bytes per second, with one outstanding on each of `connections`: a
    /// thread for each end of each.
    ///
    /// With one connection both ends share a core: else it would be the time of a wake-up on
    /// another core that is measured.
    pub fn round_trips(&self, connections: usize, time: Duration) -> f64 {
        let single = connections == 1;
        let address = self.target();
        let listener = self.listen();
        let (stop, count) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut ends = Vec::with_capacity(2 * connections);
        for _ in 0..connections {
            let client = self.client.enter(|| TcpStream::connect(address)).expect("the server accepts");
            let (server, _) = listener.accept().expect("a connection comes");
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            ends.push(thread::spawn(move || ask(client, single, &stop, &count)));
            ends.push(thread::spawn(move || answer(server, single)));
        }
        thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), count.load(Ordering::Relaxed));
        thread::sleep(time);
        let rate = (count.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.join().expect("no end panicked"));
        rate
    }

    /// TCP connections that are opened and closed per second, one after the other on one core.
    pub fn connects(&self, time: Duration) -> f64 {
        self.connections(time, false)
    }

    /// The same, with a request and an answer of 64 bytes on each.
    pub fn requests(&self, time: Duration) -> f64 {
        self.connections(time, true)
    }

    fn connections(&self, time: Duration, ask: bool) -> f64 {
        let (address, listener) = (self.target(), self.listen());
        let stop = Arc::<AtomicBool>::default();
        let ended = Arc::clone(&stop);
        let server = thread::spawn(move || {
            pin(0);
            // The client's last connection finds the end.
            while !ended.load(Ordering::Relaxed) {
                let (mut stream, _) = listener.accept().expect("a connection comes");
                let mut buffer = [0; 64];
                if ask && stream.read_exact(&mut buffer).is_ok() {
                    stream.write_all(&buffer).expect("the client is there");
                }
            }
        });
        let client = self.client.spawn(move || {
            pin(0);
            let connect = || {
                let mut stream = TcpStream::connect(address).expect("the server accepts");
                if ask {
                    let mut buffer = [0; 64];
                    stream.write_all(&buffer).expect("the server is there");
                    stream.read_exact(&mut buffer).expect("the server answers");
                }
                // The server closes first; the reset then leaves no socket behind on either side.
                stream.read_exact(&mut [0]).expect_err("the server says nothing");
                let now = libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(&stream, sockopt::Linger, &now).expect("a socket has an option");
            };
            let start = Instant::now();
            while start.elapsed() < WARM_UP {
                connect();
            }
            let (start, mut count) = (Instant::now(), 0);
            while start.elapsed() < time {
                connect();
                count += 1;
            }
            let rate = f64::from(count) / start.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            connect();
            rate
        });
        let rate = client.join().expect("the client did not panic");
        server.join().expect("the server did not panic");
        rate
    }

    fn listen(&self) -> TcpListener {
        let address = self.at(PORT);
        self.server.enter(|| TcpListener::bind(address)).expect("the port is free")
    }

    fn target(&self) -> SocketAddr {
        SocketAddr::new(self.target.parse().expect("it is an address"), PORT)
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address.parse().expect("it is an address"), port)
    }
}

/// For how many seconds all processors have worked since the machine started (proc_stat(5): user, nice,
/// system, irq and softirq).
pub fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").expect("/proc/stat can be read");
    let first = text.lines().next().unwrap_or_default();
    let times: Vec<f64> =
        first.split_whitespace().skip(1).filter_map(|time| time.parse().ok()).collect();
    // They are in units of a hundredth of a second everywhere (USER_HZ).
    [0, 1, 2, 5, 6].iter().filter_map(|at| times.get(*at)).sum::<f64>() / 100.0
}

/// Asks and waits for the answer, again and again.
fn ask(mut stream: TcpStream, pinned: bool, stop: &AtomicBool, count: &AtomicU64) {
    prepare(&stream, pinned);
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&buffer).expect("the server is there");
        stream.read_exact(&mut buffer).expect("the server answers");
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Sends back what comes, until the other end has gone.
fn answer(mut stream: TcpStream, pinned: bool) {
    prepare(&stream, pinned);
    let mut buffer = [0; 64];
    while stream.read_exact(&mut buffer).is_ok() {
        stream.write_all(&buffer).expect("the client is there");
    }
}

fn prepare(stream: &TcpStream, pinned: bool) {
    stream.set_nodelay(true).expect("a socket has an option");
    if pinned {
        pin(0);
    }
}

/// Keeps the calling thread on one core; a machine with one core has only that.
pub fn pin(core: usize) {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(core % cores).expect("there are that many cores");
    sched_setaffinity(Pid::from_raw(0), &set).expect("a thread's core can be set");
}
