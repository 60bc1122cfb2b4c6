//! Names of very many endpoints, whose records are written to the store at once, as if many machines
//! had been at work.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use netctl::kernel::ebpf::{EVENTS, Maps};
use serde_json::{Value, json};
use world::{Space, World, wait_for};

use crate::cluster::Cluster;
use crate::crowd::{Records, id, write};
use crate::engine::is_ebpf;
use crate::upstream::name_end;

crate::tests![no_answer_is_wrong_while_ten_thousand_endpoints_appear_and_vanish];

const COUNT: usize = 10_000;
/// Each endpoint has one of so many addresses, which no other ever has.
const ADDRESSES: u32 = 4;
const FIRST: u32 = u32::from_be_bytes([10, 64, 64, 0]);

/// What the machines of a crowd write: names on a machine that nobody has seen.
struct Crowd {
    network: String,
    pattern: Value,
}

impl Crowd {
    fn new(cluster: &Cluster) -> Self {
        let keys = cluster.etcd.keys();
        let network = cluster.n1().network_id("shop");
        let pattern = keys.iter().find(|(key, _)| key.contains("/endpoints/")).unwrap().1;
        let crowd = Self { network, pattern: serde_json::from_str(pattern).unwrap() };
        let mut node: Value = serde_json::from_str(&keys["netctl/base/nodes/n1"]).unwrap();
        let number = id(1 << 32);
        node["name"] = json!("m0");
        node["id"] = json!(number);
        node["vtep_mac"] = json!("02:00:00:01:00:00");
        node["underlay"] = json!("192.168.60.1");
        let machine = [
            ("base/nodes/m0".to_owned(), Some(node.to_string())),
            ("base/alive/m0".to_owned(), Some(json!(number).to_string())),
        ];
        write(cluster, &cluster.n1().space, &machine.into());
        crowd
    }

    /// These endpoints, each with its address of that number; without one they are gone.
    fn records(&self, which: impl Iterator<Item = usize>, address: Option<u32>) -> Records {
        let record = |number: usize| {
            let id = id(2 << 32 | number);
            let key = format!("members/{}/endpoints/{id}", self.network);
            let mut endpoint = self.pattern.clone();
            endpoint["id"] = json!(id);
            endpoint["name"] = json!(format!("e{number}"));
            endpoint["node"] = json!("m0");
            let value = address.map(|address| {
                endpoint["addresses"] = json!([Ipv4Addr::from(first(number) + address)]);
                endpoint.to_string()
            });
            (key, value)
        };
        which.map(record).collect()
    }
}

/// The first of an endpoint's addresses.
fn first(number: usize) -> u32 {
    FIRST + number as u32 * ADDRESSES
}

/// What is found of an endpoint's name: `None` where there is no such name.
fn look_up(socket: &UdpSocket, number: usize) -> Option<u32> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [&*format!("e{number}"), "shop", "netctl", "internal"] {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let mut buffer = [0; 512];
    socket.send(&query).unwrap();
    let length = socket.recv(&mut buffer).expect("every query is answered");
    let answer = &buffer[..length];
    assert_eq!(&answer[12..name_end(answer) + 4], &query[12..], "it answers the question");
    match (answer[3] & 15, answer[7]) {
        (3, 0) => None,
        (0, 1) => {
            // A pointer to the name, type, class, time to live, length; then the address.
            let data = &answer[name_end(answer) + 4 + 12..][..4];
            Some(u32::from_be_bytes(data.try_into().unwrap()))
        }
        other => panic!("e{number}: code and records {other:?}"),
    }
}

/// Asks for one name after the other until it is told to end; gives how often there was one.
fn ask_on(space: &Space, end: &Arc<AtomicBool>) -> JoinHandle<(u64, u64)> {
    let end = end.clone();
    space.spawn(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.64.0.1:53").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (mut number, mut asked, mut found) = (0, 0, 0);
        while !end.load(Ordering::Relaxed) {
            number = (number + 7919) % COUNT;
            asked += 1;
            if let Some(address) = look_up(&socket, number) {
                found += 1;
                let own = first(number)..first(number) + ADDRESSES;
                assert!(own.contains(&address), "e{number} is {}", Ipv4Addr::from(address));
            }
        }
        (asked, found)
    })
}

/// The memory of a process, in KiB.
fn memory(process: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn no_answer_is_wrong_while_ten_thousand_endpoints_appear_and_vanish(world: &World) {
    // It asks as fast as it can.
    let cluster =
        Cluster::with(world, 2, &Default::default(), |config| config.raw("dns", "{ rate = 0 }"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.64.0.0/16");
    let clients = [n1.attach("shop", "a"), n2.attach("shop", "b")];
    let crowd = Crowd::new(&cluster);
    let end = Arc::new(AtomicBool::new(false));
    let askers = clients.each_ref().map(|client| ask_on(&client.space, &end));
    let sockets = clients.each_ref().map(|client| {
        let socket = client.space.enter(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        socket.connect("10.64.0.1:53").unwrap();
        socket
    });
    let everywhere = |number: usize, address: Option<u32>| {
        let expected = address.map(|address| first(number) + address);
        wait_for(&format!("e{number} has address {address:?}"), || {
            sockets.iter().all(|socket| look_up(socket, number) == expected)
        });
    };
    let mut used = Vec::new();
    for round in 0..2 {
        // All appear; half of them get other addresses, then a third goes, then all.
        for (step, stride, address) in
            [(0, 1, Some(0)), (1, 2, Some(1 + round)), (2, 3, None), (0, 1, None)]
        {
            let which = || (0..COUNT).skip(step).step_by(stride);
            write(&cluster, &n1.space, &crowd.records(which(), address));
            everywhere(which().next().unwrap(), address);
            everywhere(which().next_back().unwrap(), address);
        }
        used.push([0, 1].map(|index| memory(cluster.agent(index).pid())));
    }
    end.store(true, Ordering::Relaxed);
    for asker in askers {
        let (asked, found) = asker.join().unwrap();
        assert!(asked > found && found > 100, "{found} of {asked} names were there");
    }
    if is_ebpf() {
        // The kernel has told many of them, and knows none that is gone.
        let told =
            |maps: &Maps| maps.event(EVENTS.iter().position(|e| *e == "name-told").unwrap() as u32);
        let known = |maps: &Maps| maps.naming.names.entries().unwrap().len();
        for node in [n1, n2] {
            let maps = node.space.enter(|| Maps::of_agent().unwrap());
            assert!(told(&maps).unwrap() > 100, "{:?}", told(&maps));
            wait_for("only the clients and the gateway have names", || known(&maps) == 3);
        }
    }
    for (before, after) in used[0].iter().zip(&used[1]) {
        assert!(after * 10 < before * 15, "the second round costs no more: {used:?} KiB");
    }
}
