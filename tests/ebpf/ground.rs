//! A sandbox with a client and maps of its own, and what is balanced in it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use netctl::kernel::ebpf::{
    ADDRESS_GATEWAY, ADDRESS_SERVICE, Address, Backend, Connection, Counts, Ebpf, Front, FrontKey,
    Meaning, Place, Port, Programs, Timeouts, Tuple,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare};
use nix::unistd::Pid;

use crate::packet::Packet;

/// The network's number.
pub const NETWORK: u32 = 4711;
/// The client's device.
pub const DEVICE: &str = "ve0";
/// A device of another container.
pub const OTHER: &str = "ve1";
/// To the next program, and then to the kernel.
pub const PASS: i32 = -1;
/// It went back by the device that it came from (`TC_ACT_REDIRECT`).
pub const REDIRECT: i32 = 7;
/// It is dropped (`TC_ACT_SHOT`).
pub const DROP: i32 = 2;

/// The addresses of one family.
#[derive(Clone, Copy)]
pub struct Family {
    pub client: &'static str,
    pub service: &'static str,
    pub gateway: &'static str,
    pub backends: [&'static str; 3],
}

/// Both families.
pub const FAMILIES: [Family; 2] = [
    Family {
        client: "10.9.0.5",
        service: "10.9.0.80",
        gateway: "10.9.0.1",
        backends: ["10.9.1.1", "10.9.1.2", "10.9.1.3"],
    },
    Family {
        client: "fd00:9::5",
        service: "fd00:9::80",
        gateway: "fd00:9::1",
        backends: ["fd00:9:1::1", "fd00:9:1::2", "fd00:9:1::3"],
    },
];

/// A sandbox.
pub struct Ground {
    /// Where its maps are.
    pub directory: PathBuf,
    pub ebpf: Ebpf,
    pub programs: Programs,
}

impl Ground {
    /// A new one, with room for so many connections.
    pub fn new(connections: u32) -> Self {
        fresh_namespace();
        stay_on_one_processor();
        let directory = directory();
        let ebpf = Ebpf::open_in(&directory, connections).unwrap();
        let programs = ebpf.load(NETWORK).unwrap();
        let timeouts = Timeouts { tcp: 900, tcp_fin: 120, udp: 300 };
        ebpf.maps().timeouts.insert(&NETWORK, &timeouts).unwrap();
        Self { directory, ebpf, programs }
    }

    /// Balances a front over backends, by the numbers of their slots.
    pub fn balance(&self, front: &FrontKey, value: Front, backends: &[(u32, Backend)], slots: &[u32]) {
        let maps = self.ebpf.maps();
        let place = Place::new(NETWORK, front.address);
        maps.addresses.insert(&place, &Meaning::of(ADDRESS_SERVICE)).unwrap();
        for (number, backend) in backends {
            maps.backends.insert(number, backend).unwrap();
            maps.counts.remove(number).unwrap();
        }
        let (value, blocks) = value.with_slots(slots);
        maps.slots.insert_all(&blocks).unwrap();
        maps.fronts.insert(front, &value).unwrap();
    }

    /// Balances the TCP port 80 of a family's service to the port 8080 of its three backends, with the
    /// numbers 1 to 3, in turns.
    pub fn web(&self, family: Family) {
        let backends =
            [1, 2, 3].map(|number| (number, backend(family.backends[number as usize - 1], 8080)));
        self.balance(&front(family.service, 80, 6), turns(), &backends, &[1, 2, 3]);
    }

    /// A backend of this node is spoken to by the gateway when it meets itself.
    pub fn own(&self, backend: &str, gateway: &str) {
        let maps = self.ebpf.maps();
        let gateway = address(gateway);
        let place = |address| Place::new(NETWORK, address);
        maps.gateways.insert(&place(address(backend)), &gateway).unwrap();
        maps.addresses.insert(&place(gateway), &Meaning::of(ADDRESS_GATEWAY)).unwrap();
    }

    /// What becomes of a packet of the client's.
    #[track_caller]
    pub fn send(&self, packet: &Packet) -> (i32, Packet) {
        self.send_by(DEVICE, packet)
    }

    /// The same of a packet that comes by another device.
    #[track_caller]
    pub fn send_by(&self, device: &str, packet: &Packet) -> (i32, Packet) {
        let (verdict, bytes) = self.programs.run("netctl_from", device, &packet.bytes()).unwrap();
        (verdict, Packet::read(&bytes))
    }

    /// What becomes of a packet to the client.
    #[track_caller]
    pub fn answer(&self, packet: &Packet) -> (i32, Packet) {
        let (verdict, bytes) = self.programs.run("netctl_to", DEVICE, &packet.bytes()).unwrap();
        (verdict, Packet::read(&bytes))
    }

    /// What is counted for a backend, on all processors.
    pub fn counts(&self, number: u32) -> Counts {
        self.ebpf.maps().counts.get(&number).unwrap().into_iter().flatten().sum()
    }

    /// What is counted of the node at a position.
    pub fn event(&self, position: u32) -> u64 {
        self.ebpf.maps().event(position).unwrap()
    }

    /// The connections.
    pub fn connections(&self) -> Vec<(Tuple, Connection)> {
        self.ebpf.maps().connections.entries().unwrap()
    }

    /// Changes every entry of the connections.
    pub fn change_connections(&self, change: impl Fn(&mut Connection)) {
        for (tuple, mut connection) in self.connections() {
            change(&mut connection);
            self.ebpf.maps().connections.insert(&tuple, &connection).unwrap();
        }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // The maps of all tests together would fill a small machine's memory.
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// What there is soon: nothing is remembered any more of flows before, and the kernel has done what it puts off.
#[track_caller]
pub fn soon<T>(mut find: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if let Some(it) = find() {
            return it;
        }
        std::thread::yield_now();
    }
    panic!("not within 5 seconds");
}

/// A front of the network.
pub fn front(service: &str, port: u16, protocol: u8) -> FrontKey {
    FrontKey { network: NETWORK, address: address(service), port: port.into(), protocol, zero: 0 }
}

/// A spread in turns, with the number 1.
pub fn turns() -> Front {
    Front { id: 1, ..bytemuck::Zeroable::zeroed() }
}

/// A backend of the front with the number 1.
pub fn backend(text: &str, port: u16) -> Backend {
    let (address, port) = (address(text), Port::from(port));
    Backend { address, port, zero: 0, front: 1, weight: 1, open: 0 }
}

pub fn address(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

/// A directory for maps that nobody has used.
pub fn directory() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let file_system = PathBuf::from("/run/maps");
    if !file_system.exists() {
        std::fs::create_dir(&file_system).unwrap();
        mount(Some("bpf"), &file_system, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    }
    file_system.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string())
}

/// Keeps the calling thread on the processor where it is. Linux before 6.16 gives the first 128 free
/// entries of an LRU map to the processor that first asks for one: with all of a small map's gone to one
/// processor, another one's new entry pushes out its own newest.
fn stay_on_one_processor() {
    let mut here = CpuSet::new();
    here.set(sched_getcpu().unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &here).unwrap();
}

/// Moves the calling thread into a namespace like that of a sandbox, with two containers.
pub fn fresh_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    let [v4, v6] = FAMILIES;
    let script = format!(
        "set -e
         ip link set lo up
         echo 1 > /proc/sys/net/ipv4/ip_forward
         echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
         for ve in {DEVICE} {OTHER}; do
             ip link add name $ve type veth peer name peer-$ve
             ip link set $ve address 02:00:00:00:00:01 up
             ip link set peer-$ve up
         done
         ip route add {0} dev {DEVICE}
         ip -6 route add {1} dev {DEVICE}
         ip route add 10.9.0.6 dev {OTHER}
         ip -6 route add fd00:9::6 dev {OTHER}",
        v4.client, v6.client
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
