//! The way of a packet by eBPF, past the stack, beside other ways.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use netctl::kernel::ebpf::Maps;
use world::{Agent, Config, Container, Etcd, Node, Space, eventually};

use crate::lb_scale::{nft_chains, write};
use crate::report::{Better, Metric, Report};
use crate::traffic::{IPERF_PORT, PORT, Path};
use crate::{Ground, bridge, floor, plain, progress};

pub const VIP_HELP: &str = "\
a service's address: by eBPF, beside none, nftables and IPVS

The part of datapath about a service on one node, with one way more (ipvs): the same service on a node that
balances by IPVS. Runs in the virtual machine of scripts/vm where this machine's kernel has none; there
everything is ten times slower, on all sides.";

pub const HELP: &str = "\
eBPF: packets past the stack, and services, beside the kernel's own ways

Containers on two nodes, and on one: ours past the stack, ours through it (stack), the classic path of
veth, Linux bridge and VXLAN (bridge), and the nodes themselves, or two ends of a veth (bare); on two
nodes also programs at the same places that check nothing and look nothing up (floor). Then a service
on one node: its address by our programs, its backend without one (direct), and DNAT as kube-proxy's
nftables mode builds it, between containers that the node routes to (nft). At last the same where
sockets are asked (socket), beside a service whose packets are balanced (packets). In each round every
probe runs on all, the first one changing; the figures are medians.

  tcp1, tcp4     iperf3 with cubic and 1 or 4 streams, each end on a core; 1 s omitted, 2 s counted
  cpu_per_gb     seconds of all processors together for a gigabyte over 4 streams
  udp64          datagrams of 64 bytes received, one sender
  rr32           round trips of 64 bytes on 32 TCP connections, one outstanding on each
  rr1            the same on one connection, both ends on one core
  connects       TCP connections opened and closed one after the other, both ends on one core
  services       connects and round trips on one core with 10,000 services, beside the same with one";

type Probe = fn(&Path, Duration) -> f64;

const PROBES: [(&str, &str, Better, Probe); 7] = [
    ("tcp1_gbps", "TCP, 1 stream, Gb/s", Better::Higher, |path, time| path.tcp(1, time)),
    ("tcp4_gbps", "TCP, 4 streams, Gb/s", Better::Higher, |path, time| path.tcp(4, time)),
    ("cpu_per_gb", "CPU seconds per GB", Better::Lower, Path::cpu_per_gigabyte),
    ("udp64_pps", "UDP 64 bytes, packets/s", Better::Higher, Path::datagrams),
    ("rr32_per_s", "round trips, 32 at once, /s", Better::Higher, |path, time| {
        path.round_trips(32, time)
    }),
    ("rr1_per_s", "round trips, one on one core, /s", Better::Higher, |path, time| {
        path.round_trips(1, time)
    }),
    ("connects_per_s", "TCP connects on one core, /s", Better::Higher, Path::connects),
];

/// The probes of a service's address.
const OF_SERVICES: [&str; 4] = ["tcp1_gbps", "rr1_per_s", "rr32_per_s", "connects_per_s"];
/// The address of our service, and that of the peer's.
const VIP: &str = "10.9.0.200";
const PEERS_VIP: &str = "10.78.255.1";
/// The first of many services that no agent knows: the agent's own have low numbers.
const FIRST: u32 = 100_000;

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    let etcd = ground.world.etcd();
    let fast = cluster(ground, &etcd, "fast", &[("fast_path", "true")]);
    let stack = cluster(ground, &etcd, "stack", &[("fast_path", "false")]);
    across(ground, &mut report, &fast, &stack);
    within(ground, &mut report, &fast, &stack);
    let ours = service(&fast);
    vip(ground, &mut report, &ours, &[]);
    services(ground, &mut report, &fast, &ours);
    // The last one: every connect is asked from here on, also those of others.
    sockets(ground, &mut report, &etcd);
    report
}

/// A service's address, beside IPVS.
pub fn run_vip(ground: &Ground) -> Report {
    let mut report = Report::default();
    let etcd = ground.world.etcd();
    let [ebpf, ipvs] =
        ["ebpf", "ipvs"].map(|engine| cluster(ground, &etcd, engine, &[("lb", &format!("{engine:?}"))]));
    let [ours, theirs] = [&ebpf, &ipvs].map(service);
    vip(ground, &mut report, &ours, &[("ipvs", &theirs.through)]);
    report
}

/// Two nodes with agents, and their networks.
struct Nodes {
    nodes: [Arc<Node>; 2],
    agents: [Agent; 2],
}

/// Two nodes with a wire between them, where they have these addresses.
fn wired(ground: &Ground, name: &str) -> ([Arc<Node>; 2], [&'static str; 2]) {
    const ENDS: [&str; 2] = ["192.168.51.1", "192.168.51.2"];
    let nodes = [1, 2].map(|number| ground.world.node(&format!("{name}{number}")));
    nodes[0]
        .space
        .sh(&format!("ip link add wire type veth peer name wire netns {}", nodes[1].space.net_path()));
    for (node, end) in nodes.iter().zip(ENDS) {
        node.space.sh(&format!("ip address add {end}/24 dev wire && ip link set wire up"));
    }
    (nodes, ENDS)
}

fn cluster(ground: &Ground, etcd: &Etcd, name: &str, settings: &[(&str, &str)]) -> Nodes {
    progress(&format!("two nodes: {name}"));
    let config = plain(Config::etcd(etcd)).store("prefix", &format!("{name}/"));
    let config = config.set("lb", "ebpf");
    let config = settings.iter().fold(config, |config, (key, value)| config.raw(key, value));
    let (nodes, ends) = wired(ground, name);
    let agents = [0, 1].map(|at| nodes[at].agent(&config.clone().set("underlay", ends[at])));
    nodes[0].ok("network create bench --subnet 10.9.0.0/24");
    Nodes { nodes, agents }
}

impl Nodes {
    /// Containers on two of the nodes, and the way from the first to the second.
    fn path(&self, on: [usize; 2], names: [&str; 2], options: &str) -> (Container, Container, Path) {
        let client = self.nodes[on[0]].attach("bench", names[0]);
        let server = self.nodes[on[1]].attach_with("bench", names[1], options);
        let address = self.nodes[on[1]].addresses("bench", names[1]).remove(0);
        assert!(client.space.reaches(&address), "the containers do not reach each other");
        let path = Path::new(&client.space, &server.space, &address);
        (client, server, path)
    }

    /// Waits until programs are where each packet costs least, if the kernel has that (TCX): agents do it at a check.
    fn settle(&self) {
        let is_settled = |agent: &Agent| agent.log_tail().contains("TCX");
        if !eventually(Duration::from_secs(15), || self.agents.iter().all(is_settled)) {
            progress("packets cross sandboxes by filters, not by TCX");
        }
    }
}

fn across(ground: &Ground, report: &mut Report, fast: &Nodes, stack: &Nodes) {
    let ours = fast.path([0, 1], ["near", "far"], "");
    fast.settle();
    let through = stack.path([0, 1], ["near", "far"], "");
    let (nodes, ends) = wired(ground, "bridge");
    let classic = bridge::make_between(&nodes, ends);
    let (bare, ends) = wired(ground, "bare");
    let classic_path = Path::new(&classic.0.space, &classic.1.space, &classic.2);
    let bare_path = Path::new(&bare[0].space, &bare[1].space, ends[1]);
    let mut peers = vec![("stack", &through.2), (bridge::NAME, &classic_path), ("bare", &bare_path)];
    let (nodes, ends) = wired(ground, floor::NAME);
    let least = floor::make_between(&nodes, ends);
    let least_path = least.as_ref().map(|floor| {
        let [client, server] = &floor.ends;
        Path::new(&client.space, &server.space, &floor.address)
    });
    peers.extend(least_path.as_ref().map(|path| (floor::NAME, path)));
    measure(ground, report, "two", &ours.2, &peers, &PROBES);
}

fn within(ground: &Ground, report: &mut Report, fast: &Nodes, stack: &Nodes) {
    let ours = fast.path([0, 0], ["left", "right"], "");
    let through = stack.path([0, 0], ["left", "right"], "");
    let classic = bridge::make_on_one(&ground.world);
    let classic_path = Path::new(&classic.0.space, &classic.1.space, &classic.2);
    let ends = ["left", "right"].map(|name| Space::new(&format!("bare-{name}"), || {}));
    let [left, right] = &ends;
    left.sh(&format!(
        "ip link set lo up
         ip link add eth0 mtu 1450 type veth peer name eth0 mtu 1450 netns {}
         ip address add 10.78.1.1/24 dev eth0 && ip link set eth0 up",
        right.net_path()
    ));
    right.sh("ip link set lo up && ip address add 10.78.1.2/24 dev eth0 && ip link set eth0 up");
    let bare_path = Path::new(left, right, "10.78.1.2");
    let peers = [("stack", &through.2), (bridge::NAME, &classic_path), ("bare", &bare_path)];
    measure(ground, report, "one", &ours.2, &peers, &PROBES);
}

/// A service on one node, and a container that uses it.
struct Served {
    /// By the service's address.
    through: Path,
    /// Straight to its backend; keeps what answers.
    direct: Path,
    _containers: [Container; 2],
}

fn service(nodes: &Nodes) -> Served {
    let ports = [PORT, IPERF_PORT].map(|port| format!("--port {port}:{port}")).join(" ");
    nodes.nodes[0].ok(&format!("service create web --network bench --vip {VIP} {ports}"));
    let (client, server, direct) = nodes.path([0, 0], ["client", "server"], "--service web");
    assert!(client.space.reaches(VIP), "the service does not answer");
    Served { through: direct.through(VIP), direct, _containers: [client, server] }
}

fn of(wanted: &[&str]) -> Vec<(&'static str, &'static str, Better, Probe)> {
    PROBES.into_iter().filter(|(name, ..)| wanted.contains(name)).collect()
}

fn vip(ground: &Ground, report: &mut Report, ours: &Served, others: &[(&'static str, &Path)]) {
    let (routed, [near, far]) = routed();
    // Its iperf3 server runs as long as this one lives.
    let theirs = Path::new(&near, &far, "10.78.0.2");
    let nft = theirs.through(PEERS_VIP);
    balance_by_nft(&routed, 1);
    let probes = of(&OF_SERVICES);
    let mut peers = vec![("direct", &ours.direct), ("nft", &nft)];
    peers.extend(others);
    measure(ground, report, "vip", &ours.through, &peers, &probes);
}

/// The same twice: with one service and with many, turn by turn, since machines are never alike.
fn services(ground: &Ground, report: &mut Report, fast: &Nodes, ours: &Served) {
    let services: u32 = ground.pick(10_000, 1_000);
    progress(&format!("{services} services"));
    let few = ["rr1_per_s", "connects_per_s"];
    let node = &fast.nodes[0].space;
    let mut metrics: Vec<Metric> = of(&few)
        .into_iter()
        .map(|(name, what, better, _)| {
            Metric::new(format!("services_{name}"), format!("{services} services: {what}"), better)
        })
        .collect();
    for round in 0..ground.pick(7, 1) {
        progress(&format!("one service and {services}, round {}", round + 1));
        for (metric, (.., probe)) in metrics.iter_mut().zip(of(&few)) {
            let time = Duration::from_millis(ground.pick(2000, 500));
            let one = probe(&ours.through, time);
            node.enter(|| {
                write(&Maps::of_agent().expect("the agent has maps"), FIRST..FIRST + services);
            });
            let many = probe(&ours.through, time);
            node.enter(|| erase(services));
            metric.add(many, "one", one);
        }
    }
    report.metrics.extend(metrics);
}

/// A service whose clients' sockets are asked, beside one whose packets are balanced, and its backend.
fn sockets(ground: &Ground, report: &mut Report, etcd: &Etcd) {
    let group = format!("{:?}", world::group());
    let packets = cluster(ground, etcd, "packets", &[]);
    let asked = cluster(ground, etcd, "asked", &[("socket_lb", "true"), ("cgroup", &group)]);
    let [balanced, ours] = [&packets, &asked].map(service);
    let probes = of(&OF_SERVICES);
    let peers = [("direct", &ours.direct), ("packets", &balanced.through)];
    measure(ground, report, "socket", &ours.through, &peers, &probes);
}

/// Removes services that were written.
fn erase(services: u32) {
    let maps = Maps::of_agent().expect("the agent has maps");
    let gone = |network: u32| network == netctl::kernel::ebpf::LAYOUT;
    let fronts = maps.fronts.entries().expect("they can be read");
    let fronts: Vec<_> =
        fronts.into_iter().map(|(key, _)| key).filter(|key| gone(key.network)).collect();
    let addresses = maps.addresses.entries().expect("they can be read");
    let addresses: Vec<_> =
        addresses.into_iter().map(|(place, _)| place).filter(|place| gone(place.network)).collect();
    assert_eq!(fronts.len(), services as usize);
    maps.fronts
        .remove_all(&fronts)
        .and_then(|()| maps.addresses.remove_all(&addresses))
        .expect("they go");
}

/// A node that routes to two containers, each by a veth of its own.
fn routed() -> (Space, [Space; 2]) {
    let node = Space::new("routed", || {});
    node.sh("ip link set lo up && echo 1 > /proc/sys/net/ipv4/ip_forward");
    let ends = [1, 2].map(|number| {
        let end = Space::new(&format!("routed-{number}"), || {});
        node.sh(&format!(
            "ip link add vr{number} mtu 1450 type veth peer name eth0 mtu 1450 netns {}
             ip link set vr{number} up && ip address add 10.78.9.1/32 dev vr{number}
             ip route add 10.78.0.{number}/32 dev vr{number}",
            end.net_path()
        ));
        end.sh(&format!(
            "ip link set lo up && ip link set eth0 up && ip address add 10.78.0.{number}/32 dev eth0
             ip route add 10.78.9.1/32 dev eth0 && ip route add default via 10.78.9.1"
        ));
        end
    });
    (node, ends)
}

/// As kube-proxy's nftables mode balances, with so many other services.
fn balance_by_nft(node: &Space, others: u32) {
    let mut text = nft_chains(0..others, true);
    for port in [PORT, IPERF_PORT] {
        let _ = write!(
            text,
            "table ip proxy {{
                 chain probed-{port}-0 {{ meta l4proto tcp dnat to 10.78.0.2:{port}\n}}
                 chain probed-{port} {{ numgen random mod 1 vmap {{ 0 : goto probed-{port}-0 }}\n}}
             }}
             add element ip proxy services {{ {PEERS_VIP} . tcp . {port} : goto probed-{port} }}\n"
        );
    }
    node.enter(|| std::fs::write("/run/proxy.nft", text)).expect("/run can be written");
    node.sh("nft -f /run/proxy.nft");
}

/// Runs probes on all paths, in turns.
fn measure(
    ground: &Ground,
    report: &mut Report,
    way: &str,
    ours: &Path,
    peers: &[(&'static str, &Path)],
    probes: &[(&str, &str, Better, Probe)],
) {
    let metric = |(name, what, better, _): &(&str, &str, Better, Probe)| {
        Metric::new(format!("{way}_{name}"), format!("{way}: {what}"), *better)
    };
    let mut metrics: Vec<Metric> = probes.iter().map(metric).collect();
    let rounds = ground.pick(7, 1);
    for round in 0..rounds {
        progress(&format!("{way}, round {} of {rounds}", round + 1));
        for (metric, (name, .., probe)) in metrics.iter_mut().zip(probes) {
            let stream = name.starts_with("tcp") || name.starts_with("cpu");
            let (long, short) = if stream { (2000, 1000) } else { (1500, 300) };
            let time = Duration::from_millis(ground.pick(long, short));
            let all: Vec<&Path> =
                std::iter::once(ours).chain(peers.iter().map(|(_, path)| *path)).collect();
            let mut values = vec![0.0; all.len()];
            for turn in 0..all.len() {
                let at = (turn + round) % all.len();
                values[at] = probe(all[at], time);
            }
            metric.ours.push(values[0]);
            for ((peer, _), value) in peers.iter().zip(&values[1..]) {
                metric.add_peer(peer, *value);
            }
        }
    }
    report.metrics.append(&mut metrics);
}
