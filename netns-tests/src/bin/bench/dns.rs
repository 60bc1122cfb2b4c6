//! Names: how fast they are answered, beside name servers with the same names.

mod fresh;
mod load;
mod peers;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rand::seq::SliceRandom as _;
use world::{Config, Container, Node, Process, output, wait_for};

use crate::crowd::{self, Crowd};
use crate::report::{Better, Metric, Report};
use crate::rest;
use crate::scale::{self, REMOTES, SUBNET, remote_address, remote_endpoint};
use crate::{Ground, plain, progress};
use load::{Load, Measured};
use peers::{Peer, Upstream};

pub const HELP: &str = "\
names in a container: knot, nsd, unbound, dnsmasq and aardvark-dns beside it, one server core

A container asks for addresses over UDP with 128 queries outstanding, in random order: of 10
endpoints, of 10,000 endpoints of 200 nodes, and of 1,000 outside names that were asked for before.
Each server runs on one core, what asks on the other, and both are joined by one veth pair. The peers
have the same names as local data (the authoritative ones and aardvark-dns know no outside names, and
are left out there). Of ours the kernel answers names of ours that come one by one; what comes in one
packet, and outside names, the agent answers in its sandbox, with its firewall; only its limit of
queries per client is off. All take turns. Every answer is compared with the address that it must have.

  loop  a thread that sends every query back as it is, in the same batches: what the rest takes

  own10, own10000, cached
    …_per_s             queries a second, all from one port, as a resolver for many asks
    …_p50_us, …_p99_us  from the query to its answer, with 128 outstanding
    …_ports_per_s       queries a second, each of the 128 from a port of its own, as the C library
                        asks: who asks is the limit there
    …_ports_cpu_us      processor time of the server for each of these
    …_dnsperf_per_s     queries a second as dnsperf asks and counts them, with two threads that may use
                        both cores
    …_dnsperf_cpu_us    processor time of the server for each of these
    …_dnsperf_all_us    processor time of the whole machine for each of these
    …_dnsperf_core_per_s  the same where dnsperf has only the core that the server has not: it is the
                        limit there, and does itself what the kernel does for ours

On three further nodes: beside the 10,000 endpoints others appear and vanish in the store, and a
container on each node asks for them every 2 ms.

  fresh_p50_ms, fresh_p99_ms  from before the transaction until the last of the three is answered so";

const DOMAIN: &str = "bench.netctl.internal";
/// Where every server listens.
pub const SERVER: &str = "10.64.0.1";
/// In what steps the kernel counts processor time, in seconds: who has taken less has taken that at most.
const TICK: f64 = 0.01;
/// How many outside names there are.
const OUTSIDE: usize = 1_000;

/// A name, and the address that it has.
pub type Name = (String, Ipv4Addr);

/// Who answers, and the container that asks.
struct Side {
    name: &'static str,
    container: Container,
    /// Whether it knows names at all.
    answers: bool,
    /// What must stay there meanwhile.
    running: Running,
}

/// What answers on a side, until it is dropped.
enum Running {
    Agent(i32),
    Peer(Process),
    Loop { _server: peers::Server },
}

impl Side {
    /// The least that is told of the processor time that the server has taken. Of some it is not known: they are
    /// threads, or have others do their work.
    fn least(&self) -> f64 {
        match &self.running {
            Running::Agent(_) => TICK,
            Running::Peer(_) | Running::Loop { .. } => 0.0,
        }
    }

    /// The processor time that the server has taken.
    fn cpu_seconds(&self) -> f64 {
        match &self.running {
            Running::Agent(pid) => rest::cpu_seconds(*pid),
            Running::Peer(process) => rest::cpu_seconds(process.pid().as_raw()),
            // It is a thread of this process.
            Running::Loop { .. } => 0.0,
        }
    }
}

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    let upstream = Upstream::start(&ground.world.node("upstream"));
    let etcd = ground.world.etcd();
    let node = ground.world.node("netctl");
    let dns = format!("{{ rate = 0, upstreams = [\"{}\"] }}", upstream.address());
    let config = plain(Config::etcd(&etcd)).store("timeout", "2s").raw("dns", &dns).set("lb", "ebpf");
    let mut agent = node.agent_under(&config, &["taskset", "--cpu-list", "0"]);
    agent.wait_ready();
    node.ok(&format!("network create {} --subnet {SUBNET}", scale::NETWORK));
    let crowd = Crowd::new(&node, 10);
    crowd.attach(scale::NETWORK);
    let asker = node.attach(scale::NETWORK, "asker");
    let ours =
        Side { name: "netctl", container: asker, answers: true, running: Running::Agent(agent.pid()) };

    let few: Vec<Name> = (0..10).map(|number| local(&node, &crowd::name(number))).collect();
    compare(ground, &ours, "own10", "10 names", &few, peers::OWN, &mut report, &upstream);
    progress("10,000 endpoints, written to etcd");
    node.space.enter(|| scale::fill(&etcd));
    fresh::measure(ground, &etcd, &mut report);
    let remote = |number| (format!("{}.{DOMAIN}", remote_endpoint(number)), remote_address(number));
    let many: Vec<Name> = (0..REMOTES as u32).map(remote).collect();
    compare(ground, &ours, "own10000", "10,000 names", &many, peers::OWN, &mut report, &upstream);
    let outside: Vec<Name> = (0..OUTSIDE).map(Upstream::name).collect();
    compare(ground, &ours, "cached", "outside names", &outside, peers::CACHING, &mut report, &upstream);
    report
}

/// The name of an endpoint of this node.
fn local(node: &Node, endpoint: &str) -> Name {
    let addresses = node.addresses(scale::NETWORK, endpoint);
    let address = addresses.first().and_then(|address| address.parse().ok());
    (format!("{endpoint}.{DOMAIN}"), address.expect("it has an IPv4 address"))
}

/// Measures all servers in turns.
#[allow(clippy::too_many_arguments, reason = "what is compared, and with what")]
fn compare(
    ground: &Ground,
    ours: &Side,
    key: &str,
    what: &str,
    names: &[Name],
    peers: &[Peer],
    report: &mut Report,
    upstream: &Upstream,
) {
    let mut sides = Vec::new();
    for peer in peers {
        let node = ground.world.node(&format!("{}-{key}", peer.name));
        let container = join(&node);
        let running = Running::Peer(peer.start(&node, names, upstream));
        sides.push(Side { name: peer.name, container, answers: true, running });
    }
    let node = ground.world.node(&format!("loop-{key}"));
    let container = join(&node);
    let running = Running::Loop { _server: peers::Server::echo(&node.space) };
    sides.push(Side { name: "loop", container, answers: false, running });
    let (rounds, time) = ground.pick((5, Duration::from_secs(2)), (1, Duration::from_secs(1)));
    let mut metrics = [
        Metric::new(format!("{key}_per_s"), format!("{what}, queries/s"), Better::Higher),
        Metric::new(format!("{key}_p50_us"), format!("{what}, median, µs"), Better::Lower),
        Metric::new(format!("{key}_p99_us"), format!("{what}, p99, µs"), Better::Lower),
        Metric::new(format!("{key}_ports_per_s"), format!("{what}, many ports, /s"), Better::Higher),
        Metric::new(format!("{key}_ports_cpu_us"), format!("{what}, many ports, CPU µs"), Better::Lower),
        Metric::new(format!("{key}_dnsperf_per_s"), format!("{what}, dnsperf, /s"), Better::Higher),
        Metric::new(format!("{key}_dnsperf_cpu_us"), format!("{what}, dnsperf, CPU µs"), Better::Lower),
        Metric::new(
            format!("{key}_dnsperf_all_us"),
            format!("{what}, dnsperf, all CPU µs"),
            Better::Lower,
        ),
        Metric::new(
            format!("{key}_dnsperf_core_per_s"),
            format!("{what}, dnsperf, a core, /s"),
            Better::Higher,
        ),
    ];
    for side in sides.iter().chain([ours]).filter(|side| side.answers) {
        know(side, names);
    }
    for round in 0..rounds {
        progress(&format!("{what}: turn {} of {rounds}", round + 1));
        let mine = measure(ours, names, time);
        for (metric, value) in metrics.iter_mut().zip(mine) {
            metric.ours.push(value);
        }
        for side in &sides {
            let theirs = measure(side, names, time);
            let is_known = |value: &f64| *value > 0.0;
            for (metric, value) in metrics.iter_mut().zip(theirs).filter(|(_, v)| is_known(v)) {
                metric.add_peer(side.name, value);
            }
        }
    }
    report.metrics.extend(metrics);
}

/// Joins a peer's node with a container.
fn join(node: &Arc<Node>) -> Container {
    let container = node.container("asker");
    node.space.sh(&format!(
        "ip link add name ve0 type veth peer name eth1 netns {}
         ip address add {SERVER}/18 dev ve0 && ip link set ve0 up",
        container.space.net_path()
    ));
    container.space.sh("ip address add 10.64.0.2/18 dev eth1 && ip link set eth1 up");
    container
}

/// Waits until a server knows all names: some take a while to read them.
fn know(side: &Side, names: &[Name]) {
    side.container.space.enter(|| {
        let mut load = Load::new(SERVER);
        // Some need seconds for all.
        let some: Vec<Name> = names.iter().step_by(names.len() / 50 + 1).cloned().collect();
        wait_for(&format!("{} knows the names", side.name), || {
            load.knows(&names[names.len() - 1..]) && load.knows(&some)
        });
        // Names of others are kept from the first time on.
        if !names[0].0.ends_with(DOMAIN) {
            wait_for(&format!("{} has asked for all", side.name), || load.knows(names));
        }
    });
}

/// Asks one server; gives the figures in the order of the metrics.
fn measure(side: &Side, names: &[Name], time: Duration) -> [f64; 9] {
    let (one, before, many, after) = side.container.space.enter(|| {
        crate::traffic::pin(1);
        let one = Load::new(SERVER).measure(names, time, side.answers);
        let before = side.cpu_seconds();
        let many = Load::many_ports(SERVER).measure(names, time, side.answers);
        (one, before, many, side.cpu_seconds())
    });
    let lost = one.lost + many.lost;
    assert!(lost < 1000, "{}: {lost} queries were not answered", side.name);
    let cpu_us = (after - before).max(side.least()) * 1e6 / many.asked as f64;
    let Measured { per_second, p50_us, p99_us, .. } = one;
    let mut all = [per_second, p50_us, p99_us, many.per_second, cpu_us, 0.0, 0.0, 0.0, 0.0];
    if side.answers {
        let ([rate, cpu_us, all_us], [of_core, ..]) =
            (dnsperf(side, names, time, "0-1"), dnsperf(side, names, time, "1"));
        all[5..].copy_from_slice(&[rate, cpu_us, all_us, of_core]);
    }
    all
}

/// What dnsperf says on these cores: how many queries a second are answered, with as many outstanding; and the
/// processor time for each, of the server and of the whole machine, in µs.
fn dnsperf(side: &Side, names: &[Name], time: Duration, cores: &str) -> [f64; 3] {
    let mut names: Vec<String> = names.iter().map(|(name, _)| format!("{name} A\n")).collect();
    names.shuffle(&mut rand::rng());
    let file = "/run/world/queries";
    std::fs::write(file, names.concat()).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut command = side.container.space.command("taskset");
    command.args(["--cpu-list", cores, "dnsperf", "-s", SERVER, "-d", file, "-q", "128", "-c", "2"]);
    command.args(["-T", "2", "-l", &time.as_secs().to_string()]);
    let before = [side.cpu_seconds(), crate::traffic::busy()];
    let output = output(&mut command, Duration::from_secs(60));
    let after = [side.cpu_seconds(), crate::traffic::busy()];
    let figure = |label: &str| {
        let rest = output.stdout.lines().find_map(|line| line.trim().strip_prefix(label));
        let figure = rest.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        figure.unwrap_or_else(|| panic!("dnsperf does not say {label} {output}"))
    };
    let completed = figure("Queries completed:");
    let used = |at: usize| after[at] - before[at];
    let server = used(0).max(side.least());
    [figure("Queries per second:"), server * 1e6 / completed, used(1) * 1e6 / completed]
}
