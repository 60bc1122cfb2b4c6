//! Services: what programming them costs, and what a connection to one costs.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netctl::cluster::drain::Scope;
use netctl::cluster::{Claimed, Cluster, EndpointRequest};
use netctl::kernel::ipvs::{
    Change, Destination, DestinationKey, Forwarding, Ipvs, Protocol, Scheduler, Service, ServiceKey,
};
use netctl::model::{
    Attachment, Endpoint, EndpointState, Network, NetworkId, NodeName, ServiceSpec, Versioned,
};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use world::{Config, Etcd, Node, Space};

use crate::report::{Better, Metric, Report};
use crate::scale::{store_of, stranger};
use crate::traffic::Path;
use crate::{Ground, plain, progress};

pub const HELP: &str = "\
IPVS: programming 1,000 services with 10 backends each, and connections to one

Runs in the virtual machine of scripts/vm where this machine's kernel has no IPVS. First the table
alone, in turns with `ipvsadm -R` that loads the same one: read what is there (nothing) and make
1,000 services with 10 destinations each; then change the weight of one destination, in turns with
`ipvsadm -e`. Then an agent whose store has as many services (--quick: 100), and at last the same
connections straight to a backend on another node and through the service's address.

  program_ms, change_ms   the table alone; the first with reading it, the second one of its entries
  agent_start_s           from the agent's start until its sandbox balances all, where nothing was
  agent_change_ms         from an endpoint's drain in etcd until the kernel's weight of it is 0
  requests_per_s          a connection, a request and an answer of 64 bytes, one after the other
  rr32_per_s              round trips of 64 bytes on 32 connections, one outstanding on each";

const IPVSADM: &str = "ipvsadm";
pub const NETWORK: &str = "bench";
/// The network of the two nodes between which connections are measured.
const PAIR: &str = "pair";
const BACKENDS: u16 = 10;
/// Where the remote endpoints' addresses are.
const FIRST_BACKEND: u32 = u32::from_be_bytes([10, 64, 32, 0]);
/// How many transactions are under way at a time when the store is filled.
const WRITERS: usize = 16;
/// When something has not come about.
const LIMIT: Duration = Duration::from_secs(900);

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    program(ground, &mut report);
    agent(ground, &mut report);
    connections(ground, &mut report);
    report
}

// --- the table alone -------------------------------------------------------------------------

fn key(number: u16) -> ServiceKey {
    let address = IpAddr::from([10, 7, (number / 250) as u8, (number % 250) as u8 + 1]);
    ServiceKey::Address { protocol: Protocol::Tcp, address, port: 80 }
}

fn destination(number: u16, weight: u32) -> Destination {
    let address = SocketAddr::from(([10, 8, 0, number as u8], 8080));
    Destination::new(DestinationKey::from(address), Forwarding::Masquerade, weight)
}

fn program(ground: &Ground, report: &mut Report) {
    const SERVICES: u16 = 1000;
    let spaces = ["ours", "theirs"].map(|name| Space::new(name, || {}));
    // Without an address of its own a namespace takes none of a destination's.
    spaces.iter().for_each(|space| drop(space.sh("ip link set lo up")));
    let changes: Vec<Change> = (0..SERVICES)
        .flat_map(|number| {
            let service = Change::AddService(Service::new(key(number), Scheduler::RoundRobin));
            let add = move |index| Change::AddDestination {
                service: key(number),
                destination: destination(index, 1),
            };
            std::iter::once(service).chain((1..=BACKENDS).map(add))
        })
        .collect();
    let lines: String = (0..SERVICES)
        .flat_map(|number| {
            let at = key(number).to_string().replace("tcp ", "");
            let add = {
                let at = at.clone();
                move |index| format!("-a -t {at} -r 10.8.0.{index}:8080 -m -w 1\n")
            };
            std::iter::once(format!("-A -t {at} -s rr\n")).chain((1..=BACKENDS).map(add))
        })
        .collect();
    let mut ipvs = spaces[0].enter(Ipvs::open).expect("this kernel has IPVS");
    let expected = usize::from(SERVICES) * usize::from(BACKENDS + 1);
    let mut cold = Metric::new("program_ms", "table of 1,000 × 10, ms", Better::Lower);
    let mut one = Metric::new("change_ms", "one of its weights, ms", Better::Lower);
    for round in 0..ground.pick(7, 3) {
        progress(&format!("the table alone, round {}", round + 1));
        let mut ours = || {
            apply(&mut ipvs, &[Change::Flush]);
            let start = Instant::now();
            assert_eq!(ipvs.table().expect("IPVS can be read"), []);
            apply(&mut ipvs, &changes);
            milliseconds(start)
        };
        let theirs = || {
            spaces[1].sh("ipvsadm -C");
            let start = Instant::now();
            restore(&spaces[1], &lines);
            milliseconds(start)
        };
        let (ours, theirs) = in_turn(round, &mut ours, theirs);
        cold.add(ours, IPVSADM, theirs);
        for space in &spaces {
            assert_eq!(space.enter(entries), expected, "{}", space.name());
        }
        for weight in 2..ground.pick(22, 7) {
            let (ours, theirs) = reweigh(&mut ipvs, &spaces[1], weight);
            one.add(ours, IPVSADM, theirs);
        }
    }
    report.metrics.extend([cold, one]);
}

/// Changes one weight in both tables.
fn reweigh(ipvs: &mut Ipvs, space: &Space, weight: u32) -> (f64, f64) {
    let mut ours = || {
        let (service, destination) = (key(500), destination(5, weight));
        let start = Instant::now();
        apply(ipvs, &[Change::EditDestination { service, destination }]);
        milliseconds(start)
    };
    let theirs = || {
        let at = key(500).to_string().replace("tcp ", "");
        let mut command = space.command(IPVSADM);
        command.args(["-e", "-t", &at, "-r", "10.8.0.5:8080", "-m", "-w", &weight.to_string()]);
        let start = Instant::now();
        assert!(command.status().expect("ipvsadm runs").success());
        milliseconds(start)
    };
    in_turn(weight as usize, &mut ours, theirs)
}

/// Measures both, in an order that changes from turn to turn.
fn in_turn(turn: usize, ours: &mut impl FnMut() -> f64, theirs: impl Fn() -> f64) -> (f64, f64) {
    if turn.is_multiple_of(2) {
        let ours = ours();
        return (ours, theirs());
    }
    let theirs = theirs();
    (ours(), theirs)
}

pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn apply(ipvs: &mut Ipvs, changes: &[Change]) {
    for result in ipvs.apply(changes) {
        result.expect("the kernel takes it");
    }
}

fn restore(space: &Space, lines: &str) {
    let mut child = space.command(IPVSADM).arg("-R").stdin(Stdio::piped()).spawn().expect("it runs");
    let mut input = child.stdin.take().expect("it has an input");
    input.write_all(lines.as_bytes()).expect("it reads");
    drop(input);
    assert!(child.wait().expect("it ends").success(), "ipvsadm -R");
}

/// How many services and destinations the table of this namespace has. (/proc/net/ip_vs leaves some
/// out where other namespaces have services too.)
fn entries() -> usize {
    let mut ipvs = Ipvs::open().expect("this kernel has IPVS");
    let table = ipvs.table().expect("IPVS can be read");
    table.iter().map(|entry| 1 + entry.destinations.len()).sum()
}

// --- an agent --------------------------------------------------------------------------------

fn agent(ground: &Ground, report: &mut Report) {
    let services: u32 = ground.pick(1000, 100);
    let etcd = ground.world.etcd();
    let node = ground.world.node("balancer");
    let config = plain(Config::etcd(&etcd)).store("timeout", "2s").set("lb", "ipvs").set("lease", "5m");
    let started = node.agent(&config);
    node.ok(&format!("network create {NETWORK} --subnet 10.64.0.0/16"));
    let _client = node.attach(NETWORK, "client");
    let Store { runtime, cluster, filled } = Store::filled(&node, &etcd, services, BACKENDS);
    let sandbox = node.sandbox(NETWORK);
    let all = services as usize * usize::from(BACKENDS + 1);
    let complete = || sandbox.enter(entries) == all;
    wait("the agent balances all", &complete);

    progress("the agent started again, with no table");
    started.kill();
    sandbox.sh("ipvsadm -C");
    let start = Instant::now();
    let _agent = node.agent_under(&config, &[]);
    wait("the agent balances all again", &complete);
    let took = start.elapsed().as_secs_f64();
    let what = format!("agent's start with {services} services, s");
    report.metrics.push(Metric::single("agent_start_s", &what, Better::Lower, took));

    progress("endpoints that are drained");
    let mut ipvs = sandbox.enter(Ipvs::open).expect("this kernel has IPVS");
    let mut change =
        Metric::new("agent_change_ms", "from a drain in etcd to the kernel, ms", Better::Lower);
    for (vip, network, endpoint) in filled.iter().step_by(filled.len() / ground.pick(40, 10)) {
        let service = ServiceKey::Address { protocol: Protocol::Tcp, address: *vip, port: 80 };
        let backend = endpoint.addresses[0];
        let start = Instant::now();
        let scope = Scope::Endpoint(*network, endpoint.id);
        node.space.enter(|| runtime.block_on(cluster.drain(&scope))).expect("etcd answers");
        loop {
            let states = ipvs.destinations(&service).expect("the service is there");
            let weight = |state: &&_| key_of(state).address == backend;
            if states.iter().find(weight).is_some_and(|state| state.destination.weight == 0) {
                break;
            }
            assert!(start.elapsed() < LIMIT, "{backend} is not out");
        }
        change.ours.push(milliseconds(start));
    }
    report.metrics.push(change);
}

fn key_of(state: &netctl::kernel::ipvs::DestinationState) -> DestinationKey {
    state.destination.key
}

pub fn wait(what: &str, condition: &impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "not so after {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// An endpoint with an address of its service and its network.
pub type Filled = (IpAddr, NetworkId, Endpoint);

/// A store with services, and a node that is not there.
pub struct Store {
    pub runtime: Runtime,
    pub cluster: Arc<Cluster>,
    pub filled: Vec<Filled>,
}

impl Store {
    /// Writes services and their endpoints, as if they were all on one other node.
    pub fn filled(node: &Node, etcd: &Etcd, services: u32, backends: u16) -> Self {
        progress(&format!("{services} services with {backends} endpoints each, written to etcd"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let store = Arc::new(store_of(etcd));
        let cluster = Arc::new(node.space.enter(|| runtime.block_on(remote(store))));
        let filled = node.space.enter(|| runtime.block_on(fill(&cluster, services, backends)));
        Self { runtime, cluster, filled }
    }
}

/// Joins as a node that is not there, and is taken for alive as long as this lasts.
async fn remote(store: Arc<netctl::store::etcd::Etcd>) -> Cluster {
    let name: NodeName = "remote".parse().expect("it is a name");
    let cluster = Cluster::new(store, name.clone(), Duration::ZERO).await.expect("etcd answers");
    let node = stranger(name, IpAddr::from([192, 168, 60, 1]));
    cluster.join(&node).await.expect("the node is new");
    cluster.come_alive(node.id, LIMIT * 4).await.expect("etcd grants a lease");
    cluster
}

/// Writes services and their endpoints, as if they were all on one node.
async fn fill(cluster: &Arc<Cluster>, services: u32, backends: u16) -> Vec<Filled> {
    let network = Arc::new(cluster.network(NETWORK).await.expect("the network was made"));
    // Services of one network come one after the other: each compares what the others keep.
    let mut vips = Vec::new();
    for number in 0..services {
        let spec: ServiceSpec = serde_json::from_value(serde_json::json!({
            "name": service_name(number), "networks": [NETWORK], "replicas": backends,
            "balancing": {"ports": [{"port": 80, "target": 8080}]},
        }))
        .expect("it is a service");
        let made = cluster.create_service(&spec, &BTreeSet::new()).await.expect("it is new");
        vips.push(made.addresses[&network.id][0]);
    }
    let (mut writers, mut filled) = (JoinSet::new(), Vec::new());
    for (number, vip) in (0..).zip(vips) {
        if writers.len() >= WRITERS {
            filled.extend(writers.join_next().await.into_iter().flatten().flatten());
        }
        let (cluster, network) = (Arc::clone(cluster), Arc::clone(&network));
        writers.spawn(async move {
            let endpoints = populate(&cluster, &network, number, backends).await;
            endpoints.into_iter().map(|endpoint| (vip, network.id, endpoint)).collect::<Vec<Filled>>()
        });
    }
    filled.extend(writers.join_all().await.into_iter().flatten());
    filled
}

fn service_name(number: u32) -> String {
    format!("s{number}")
}

/// Writes a service's endpoints.
async fn populate(
    cluster: &Cluster,
    network: &Versioned<Network>,
    number: u32,
    backends: u16,
) -> Vec<Endpoint> {
    let mut endpoints = Vec::new();
    for index in 0..u32::from(backends) {
        let index = number * u32::from(backends) + index;
        let request = EndpointRequest {
            name: Some(format!("e{index}").parse().expect("it is a name")),
            addresses: vec![Ipv4Addr::from(FIRST_BACKEND + index).into()],
            service: Some(service_name(number).parse().expect("it is a name")),
            state: EndpointState::Ready,
            ..EndpointRequest::new(Attachment {
                netns: format!("/run/netns/e{index}").into(),
                inode: 4_026_532_000 + u64::from(index),
                boot: "11111111-2222-3333-4444-555555555555".into(),
                interface: "eth0".parse().expect("it is an interface's name"),
            })
        };
        let claimed = cluster.claim(network, &request, &BTreeSet::new()).await;
        let Claimed::New(endpoint, _) = claimed.expect("the address is free") else {
            panic!("e{index} was there already");
        };
        endpoints.push(endpoint);
    }
    endpoints
}

// --- connections -----------------------------------------------------------------------------

fn connections(ground: &Ground, report: &mut Report) {
    progress("two nodes, a service with a backend on the other one");
    let etcd = ground.world.etcd();
    let config = plain(Config::etcd(&etcd)).store("timeout", "2s").set("lb", "ipvs").set("lease", "5m");
    let nodes: [Arc<Node>; 2] = [ground.world.node("n1"), ground.world.node("n2")];
    let _agents = nodes.each_ref().map(|node| node.agent(&config));
    nodes[0].ok(&format!("network create {PAIR} --subnet 10.9.0.0/24"));
    nodes[0].ok(&format!(
        "service create web --network {PAIR} --vip 10.9.0.200 --port {0}:{0}",
        crate::traffic::PORT
    ));
    let client = nodes[0].attach(PAIR, "client");
    let server = nodes[1].attach_with(PAIR, "server", "--service web");
    let address = nodes[1].addresses(PAIR, "server").remove(0);
    assert!(client.space.reaches(&address), "the containers do not reach each other");
    assert!(client.space.reaches("10.9.0.200"), "the service does not answer");
    let direct = Path::new(&client.space, &server.space, &address);
    let through = direct.through("10.9.0.200");
    type Probe = fn(&Path, Duration) -> f64;
    let probes: [(&str, &str, Probe); 2] = [
        ("requests_per_s", "requests through the service, /s", Path::requests),
        ("rr32_per_s", "round trips through it, 32 at once, /s", |path, time| {
            path.round_trips(32, time)
        }),
    ];
    let mut metrics = probes.map(|(name, what, _)| Metric::new(name, what, Better::Higher));
    let time = Duration::from_millis(ground.pick(3000, 1500));
    for round in 0..ground.pick(7, 3) {
        progress(&format!("connections, round {}", round + 1));
        for (metric, (.., probe)) in metrics.iter_mut().zip(probes) {
            let (ours, theirs) = in_turn(round, &mut || probe(&through, time), || probe(&direct, time));
            metric.add(ours, "direct", theirs);
        }
    }
    report.metrics.extend(metrics);
}
