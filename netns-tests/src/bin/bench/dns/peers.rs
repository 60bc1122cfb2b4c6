//! The other name servers, each with the settings that suit it: one thread, no logs.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use netctl::kernel::Datagrams;
use world::{Node, Process, Space};

use super::{DOMAIN, Name, SERVER};

/// Another name server.
pub struct Peer {
    pub name: &'static str,
    /// Writes its files into a folder, and gives the command that starts it.
    prepare: fn(&Path, &[Name], upstream: &str) -> Vec<String>,
}

/// Those that have names of their own.
pub const OWN: &[Peer] = &[
    Peer { name: "knot", prepare: knot },
    Peer { name: "nsd", prepare: nsd },
    Peer { name: "unbound", prepare: unbound },
    Peer { name: "dnsmasq", prepare: dnsmasq },
    Peer { name: "aardvark", prepare: aardvark },
];
/// Those that keep the answers of others.
pub const CACHING: &[Peer] =
    &[Peer { name: "unbound", prepare: unbound }, Peer { name: "dnsmasq", prepare: dnsmasq }];

impl Peer {
    /// Starts it on one core.
    pub fn start(&self, node: &Arc<Node>, names: &[Name], upstream: &Upstream) -> Process {
        let folder = node.dir().join(self.name);
        fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        // Names of ours only: others are asked for outside.
        let own: Vec<Name> = names.iter().filter(|name| name.0.ends_with(DOMAIN)).cloned().collect();
        let words = (self.prepare)(&folder, &own, upstream.address());
        let mut command: Command = node.space.command("taskset");
        command.args(["--cpu-list", "0"]).args(words);
        let log = File::create(folder.join("log")).expect("the folder can be written");
        Process::start(&mut command, &log)
    }
}

fn write(folder: &Path, file: &str, text: &str) -> String {
    let path = folder.join(file);
    fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path.display().to_string()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The zone's file (RFC 1035, 5).
fn zone(folder: &Path, names: &[Name]) -> String {
    let mut text = format!("$ORIGIN {DOMAIN}.\n$TTL 5\n@ SOA ns hostmaster 1 60 10 3600 5\n@ NS ns\n");
    let _ = writeln!(text, "ns A {SERVER}");
    for (name, address) in names {
        let _ = writeln!(text, "{name}. A {address}");
    }
    write(folder, "zone", &text)
}

fn knot(folder: &Path, names: &[Name], _: &str) -> Vec<String> {
    let (zone, folder_name) = (zone(folder, names), folder.display());
    let text = format!(
        "server:
    listen: {SERVER}@53
    rundir: {folder_name}
    user: root:root
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: {folder_name}
    journal-db-max-size: 16M
    kasp-db-max-size: 16M
    timer-db-max-size: 16M
zone:
  - domain: {DOMAIN}
    file: {zone}
    journal-content: none
    zonefile-sync: -1
template:
  - id: default
    semantic-checks: off
"
    );
    words(&["knotd", "-c", &write(folder, "knot.conf", &text)])
}

fn nsd(folder: &Path, names: &[Name], _: &str) -> Vec<String> {
    let (zone, folder_name) = (zone(folder, names), folder.display());
    let text = format!(
        "server:
    ip-address: {SERVER}
    server-count: 1
    username: \"\"
    chroot: \"\"
    database: \"\"
    zonesdir: \"{folder_name}\"
    pidfile: \"{folder_name}/pid\"
    xfrdfile: \"{folder_name}/xfrd\"
    xfrdir: \"{folder_name}\"
    zonelistfile: \"{folder_name}/zones\"
    rrl-ratelimit: 0
    minimal-responses: yes
    verbosity: 0
remote-control:
    control-enable: no
zone:
    name: {DOMAIN}
    zonefile: {zone}
"
    );
    words(&["nsd", "-d", "-c", &write(folder, "nsd.conf", &text)])
}

fn unbound(folder: &Path, names: &[Name], upstream: &str) -> Vec<String> {
    let folder_name = folder.display();
    let mut text = format!(
        "server:
    interface: {SERVER}
    access-control: 0.0.0.0/0 allow
    num-threads: 1
    do-ip6: no
    do-daemonize: no
    use-syslog: no
    verbosity: 0
    chroot: \"\"
    username: \"\"
    directory: \"{folder_name}\"
    pidfile: \"\"
    module-config: \"iterator\"
    minimal-responses: yes
    rrset-roundrobin: no
    local-zone: \"{DOMAIN}.\" static
remote-control:
    control-enable: no
forward-zone:
    name: \".\"
    forward-addr: {upstream}
server:
"
    );
    for (name, address) in names {
        let _ = writeln!(text, "    local-data: \"{name}. 5 A {address}\"");
    }
    words(&["unbound", "-d", "-c", &write(folder, "unbound.conf", &text)])
}

fn dnsmasq(folder: &Path, names: &[Name], upstream: &str) -> Vec<String> {
    let hosts: String = names.iter().map(|(name, address)| format!("{address} {name}\n")).collect();
    let hosts = write(folder, "hosts", &hosts);
    let text = format!(
        "no-daemon\nuser=root\nlisten-address={SERVER}\nbind-interfaces\nno-resolv\nno-hosts\n\
         addn-hosts={hosts}\nserver={upstream}\ncache-size=10000\nlocal-ttl=5\nlocal=/{DOMAIN}/\n\
         pid-file=\nlog-facility=-\n"
    );
    words(&["dnsmasq", "--keep-in-foreground", "-C", &write(folder, "dnsmasq.conf", &text)])
}

/// What podman writes for a network.
fn aardvark(folder: &Path, names: &[Name], _: &str) -> Vec<String> {
    let mut text = format!("{SERVER}\n");
    for (number, (name, address)) in names.iter().enumerate() {
        let _ = writeln!(text, "{number:064x} {address}  {name}");
    }
    let networks = folder.join("networks");
    fs::create_dir_all(&networks).unwrap_or_else(|error| panic!("{}: {error}", networks.display()));
    write(&networks, "bench", &text);
    let networks = networks.display().to_string();
    words(&["/usr/lib/podman/aardvark-dns", "--config", &networks, "--port", "53", "run"])
}

/// A thread that answers datagrams; dropping it ends it.
pub struct Server {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Sends every query back as it is, on one core.
    pub fn echo(space: &Space) -> Self {
        Self::start(
            space,
            SERVER,
            || crate::traffic::pin(0),
            |query, answer| answer.extend_from_slice(query),
        )
    }

    fn start(
        space: &Space,
        address: &str,
        prepare: impl FnOnce() + Send + 'static,
        answer: impl Fn(&[u8], &mut Vec<u8>) + Send + 'static,
    ) -> Self {
        let socket = space.enter(|| UdpSocket::bind((address, 53))).expect("the port is free");
        let end = Arc::<AtomicBool>::default();
        let stop = end.clone();
        let thread = space.spawn(move || {
            prepare();
            serve(&socket, &stop, answer);
        });
        Self { end, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

/// A name server for outside names.
pub struct Upstream {
    address: String,
    _server: Server,
}

impl Upstream {
    pub fn start(node: &Node) -> Self {
        let server = Server::start(&node.space, node.ipv4(), || (), answer_outside);
        Self { address: node.ipv4().to_owned(), _server: server }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// One of its names.
    pub fn name(number: usize) -> Name {
        let [.., high, low] = number.to_be_bytes();
        (format!("h{number}.example.org"), Ipv4Addr::new(198, 18, high, low))
    }
}

/// Answers datagrams until the end.
fn serve(socket: &UdpSocket, end: &AtomicBool, answer: impl Fn(&[u8], &mut Vec<u8>)) {
    let mut datagrams = Datagrams::new(64, 512);
    while !end.load(Ordering::Relaxed) {
        match datagrams.receive(socket, true) {
            Ok(()) => {}
            Err(_) => {
                readable(socket);
                continue;
            }
        }
        datagrams.answer(|query, _, bytes| answer(query, bytes));
        datagrams.send(socket);
    }
}

/// Waits a moment for a datagram.
fn readable(socket: &UdpSocket) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let mut all = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    // Whatever comes of it, it is looked again.
    let _ = poll(&mut all, PollTimeout::from(100_u8));
}

/// Every name `h<number>.…` has an address of that number, for an hour.
fn answer_outside(query: &[u8], answer: &mut Vec<u8>) {
    let Some(length) = query.get(12).map(|length| usize::from(*length)) else { return };
    let label = query.get(14..13 + length).and_then(|label| std::str::from_utf8(label).ok());
    let Some(number) = label.and_then(|label| label.parse::<usize>().ok()) else { return };
    let (name, address) = Upstream::name(number);
    let question = 12 + name.len() + 2 + 4;
    let kind = query.get(question - 3).copied();
    let (records, data) = match kind {
        Some(1) => (1, Some(address)),
        _ => (0, None),
    };
    answer.extend([query[0], query[1], 0x81, 0x80, 0, 1, 0, records, 0, 0, 0, 0]);
    answer.extend_from_slice(query.get(12..question).unwrap_or_default());
    if let Some(address) = data {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
        answer.extend(address.octets());
    }
}
