//! Services by eBPF: what programming many of them costs, and one more.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Instant;

use netctl::cluster::drain::Scope;
use netctl::kernel::ebpf::{
    ADDRESS_SERVICE, Backend, Ebpf, FRONT_SLOTS, Front, FrontKey, LAYOUT, Maps, Meaning, Place,
    SCHEDULER_TURN,
};
use world::{Config, Space};

use crate::report::{Better, Metric, Report};
use crate::services::{NETWORK, Store, milliseconds, wait};
use crate::{Ground, plain, progress};

pub const HELP: &str = "\
eBPF: programming 10,000 services with 3 backends each, and one more

The tables alone, in turns: ours are the maps of the programs, written as the agent writes them. Beside
them what kube-proxy makes: with nftables a chain for each service and each backend, and with
iptables-restore; and one flat map of nftables. All are loaded into an empty namespace, each by the
program that is meant for it, in one go. Then one more service with 3 backends. --quick: 1,000 services.

  program_ms  10,000 services with 3 backends each
  more_us     one more

Then an agent whose store has 1,000 services with 3 endpoints (--quick: 100):

  agent_change_ms  from an endpoint's drain in etcd until its weight in the map is 0";

const BACKENDS: u32 = 3;

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    tables(ground, &mut report);
    agent(ground, &mut report);
    report
}

// --- the tables alone ------------------------------------------------------------------------

fn tables(ground: &Ground, report: &mut Report) {
    let services: u32 = ground.pick(10_000, 1_000);
    let what = format!("{services} services with {BACKENDS} backends, ms");
    let mut program = Metric::new("program_ms", what, Better::Lower);
    let mut more = Metric::new("more_us", "one more, µs", Better::Lower);
    for round in 0..ground.pick(5, 3) {
        progress(&format!("the tables alone, round {}", round + 1));
        let (all, one) = ours(round, services);
        program.ours.push(all);
        more.ours.push(one);
        for peer in PEERS {
            // A chain for each takes most of a minute.
            if peer.name == "nft_chains" && round > 0 && !ground.quick {
                continue;
            }
            let space = Space::new(&format!("{}{round}", peer.name), || {});
            let text = (peer.text)(0..services, true);
            let start = Instant::now();
            load(&space, peer, &text);
            program.add_peer(peer.name, milliseconds(start));
            let text = (peer.text)(services..services + 1, false);
            let start = Instant::now();
            load(&space, peer, &text);
            more.add_peer(peer.name, milliseconds(start) * 1e3);
        }
    }
    report.metrics.extend([program, more]);
}

fn ours(round: usize, services: u32) -> (f64, f64) {
    let space = Space::new(&format!("ours{round}"), || {});
    space.enter(|| {
        let ebpf = Ebpf::open(netctl::kernel::ebpf::CONNECTIONS).expect("the kernel has eBPF");
        let maps = ebpf.maps();
        let start = Instant::now();
        write(maps, 0..services);
        let all = milliseconds(start);
        let start = Instant::now();
        write(maps, services..services + 1);
        let one = milliseconds(start) * 1e3;
        let fronts = maps.fronts.entries().expect("they can be read").len();
        assert_eq!(fronts, services as usize + 1);
        let backends = maps.backends.entries().expect("they can be read").len();
        assert_eq!(backends, (services as usize + 1) * BACKENDS as usize);
        netctl::kernel::ebpf::remove_pins().expect("they were made here");
        (all, one)
    })
}

/// Writes the entries of services: their tables first, as the agent makes them, then the maps.
pub fn write(maps: &Maps, services: std::ops::Range<u32>) {
    let (mut backends, mut fronts, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    for service in services {
        let id = service + 1;
        let numbers: [u32; BACKENDS as usize] =
            std::array::from_fn(|slot| service * BACKENDS + slot as u32 + 1);
        for (slot, number) in (0..).zip(numbers) {
            let address = std::net::IpAddr::from(backend(slot)).into();
            let value = Backend { address, port: 8080.into(), zero: 0, front: id, weight: 1, open: 0 };
            backends.push((number, value));
        }
        let address = std::net::IpAddr::from(vip(service)).into();
        let key = FrontKey { network: LAYOUT, address, port: 80.into(), protocol: 6, zero: 0 };
        let first = [0; FRONT_SLOTS];
        let front = Front { id, scheduler: SCHEDULER_TURN, affinity: 0, slots: 0, turn: 0, first };
        // So few need no blocks.
        fronts.push((key, front.with_slots(&numbers).0));
        addresses.push((Place::new(LAYOUT, address), Meaning::of(ADDRESS_SERVICE)));
    }
    let written = maps
        .backends
        .insert_all(&backends)
        .and_then(|()| maps.fronts.insert_all(&fronts))
        .and_then(|()| maps.addresses.insert_all(&addresses));
    written.expect("the kernel takes them");
}

fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes([10, 7, 0, 1]) + service)
}

fn backend(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes([10, 8, 0, 1]) + number)
}

/// Another way to balance: its program, what it is given, and the text for some services, which begins
/// the table or adds to it.
struct Peer {
    name: &'static str,
    program: &'static [&'static str],
    added: &'static [&'static str],
    text: fn(std::ops::Range<u32>, bool) -> String,
}

const PEERS: &[Peer] = &[
    Peer {
        name: "nft_chains",
        program: &["nft", "-f", "-"],
        added: &["nft", "-f", "-"],
        text: nft_chains,
    },
    Peer { name: "nft_map", program: &["nft", "-f", "-"], added: &["nft", "-f", "-"], text: nft_map },
    Peer {
        name: "iptables",
        program: &["iptables-restore"],
        added: &["iptables-restore", "--noflush"],
        text: iptables,
    },
];

/// As kube-proxy's nftables mode makes it.
pub fn nft_chains(services: std::ops::Range<u32>, begins: bool) -> String {
    let mut text = String::from("table ip proxy {\n");
    if begins {
        text.push_str("map services { type ipv4_addr . inet_proto . inet_service : verdict\n}\n");
    }
    for service in services.clone() {
        for slot in 0..BACKENDS {
            let _ = writeln!(
                text,
                "chain backend-{service}-{slot} {{\nmeta l4proto tcp dnat to {}:8080\n}}",
                backend(slot)
            );
        }
        let _ = writeln!(
            text,
            "chain service-{service} {{\nnumgen random mod 3 vmap {{ 0 : goto backend-{service}-0, 1 : \
             goto backend-{service}-1, 2 : goto backend-{service}-2 }}\n}}"
        );
    }
    if begins {
        text.push_str(
            "chain pre {\ntype nat hook prerouting priority dstnat\n\
             ip daddr . meta l4proto . th dport vmap @services\n}\n",
        );
    }
    text.push_str("}\n");
    for service in services {
        let _ = writeln!(
            text,
            "add element ip proxy services {{ {} . tcp . 80 : goto service-{service} }}",
            vip(service)
        );
    }
    text
}

/// One map for all.
fn nft_map(services: std::ops::Range<u32>, begins: bool) -> String {
    let mut elements = Vec::new();
    for service in services {
        for slot in 0..BACKENDS {
            elements.push(format!("{} . 80 . {slot} : {} . 8080", vip(service), backend(slot)));
        }
    }
    let elements = elements.join(",\n");
    if !begins {
        return format!("add element ip proxy flat {{ {elements} }}\n");
    }
    format!(
        "table ip proxy {{\nmap flat {{\ntypeof ip daddr . tcp dport . meta mark : ip saddr . tcp sport\n\
         elements = {{ {elements} }}\n}}\nchain pre {{\ntype nat hook prerouting priority dstnat\n\
         meta mark set numgen inc mod 3\ndnat ip to ip daddr . tcp dport . meta mark map @flat\n}}\n}}\n"
    )
}

/// As kube-proxy's iptables mode makes it.
fn iptables(services: std::ops::Range<u32>, begins: bool) -> String {
    let mut text = String::from("*nat\n");
    if begins {
        text.push_str(":SERVICES - [0:0]\n");
    }
    for service in services.clone() {
        let _ = writeln!(text, ":SVC-{service} - [0:0]");
        for slot in 0..BACKENDS {
            let _ = writeln!(text, ":SEP-{service}-{slot} - [0:0]");
        }
    }
    if begins {
        text.push_str("-A PREROUTING -j SERVICES\n");
    }
    for service in services {
        let _ = writeln!(text, "-A SERVICES -d {}/32 -p tcp --dport 80 -j SVC-{service}", vip(service));
        for slot in 0..BACKENDS {
            let chance = match BACKENDS - slot {
                1 => String::new(),
                left => {
                    format!("-m statistic --mode random --probability {:.8} ", 1.0 / f64::from(left))
                }
            };
            let _ = writeln!(text, "-A SVC-{service} {chance}-j SEP-{service}-{slot}");
            let _ = writeln!(
                text,
                "-A SEP-{service}-{slot} -p tcp -j DNAT --to-destination {}:8080",
                backend(slot)
            );
        }
    }
    text.push_str("COMMIT\n");
    text
}

fn load(space: &Space, peer: &Peer, text: &str) {
    let begins = text.contains("priority dstnat") || text.contains(":SERVICES ");
    let arguments = if begins { peer.program } else { peer.added };
    let mut command = space.command(arguments[0]);
    let mut child = command.args(&arguments[1..]).stdin(Stdio::piped()).spawn().expect("it runs");
    let mut input = child.stdin.take().expect("it has an input");
    input.write_all(text.as_bytes()).expect("it reads");
    drop(input);
    assert!(child.wait().expect("it ends").success(), "{}", peer.name);
}

// --- an agent --------------------------------------------------------------------------------

fn agent(ground: &Ground, report: &mut Report) {
    let services: u32 = ground.pick(1000, 100);
    let etcd = ground.world.etcd();
    let node = ground.world.node("balancer");
    let config = plain(Config::etcd(&etcd)).store("timeout", "2s").set("lb", "ebpf").set("lease", "5m");
    let _agent = node.agent(&config);
    node.ok(&format!("network create {NETWORK} --subnet 10.64.0.0/16"));
    let _client = node.attach(NETWORK, "client");
    let Store { runtime, cluster, filled } = Store::filled(&node, &etcd, services, BACKENDS as u16);
    let all = (services * BACKENDS) as usize;
    let backends = || {
        let maps = Maps::of_agent().ok()?;
        Some(maps.backends.entries().ok()?.len())
    };
    wait("the agent balances all", &|| node.space.enter(backends) == Some(all));
    let mut change =
        Metric::new("agent_change_ms", "from a drain in etcd to the map, ms", Better::Lower);
    node.space.enter(|| {
        let maps = Maps::of_agent().expect("the agent has them");
        let entries = maps.backends.entries().expect("they can be read");
        for (_, network, endpoint) in filled.iter().step_by(filled.len() / ground.pick(40, 10)) {
            let backend = endpoint.addresses[0];
            let is_meant = |(_, entry): &&(u32, Backend)| entry.socket().ip() == backend;
            let (number, _) = entries.iter().find(is_meant).expect("it is balanced");
            let start = Instant::now();
            let scope = Scope::Endpoint(*network, endpoint.id);
            runtime.block_on(cluster.drain(&scope)).expect("etcd answers");
            let weight = || maps.backends.get(number).expect("it can be read").map(|entry| entry.weight);
            while weight() != Some(0) {
                assert!(start.elapsed().as_secs() < 60, "{backend} is not out");
            }
            change.ours.push(milliseconds(start));
        }
    });
    report.metrics.push(change);
}
