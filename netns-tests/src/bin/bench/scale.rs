//! Many endpoints: configuring them, converging, and what the agent takes meanwhile.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use netctl::cluster::{Cluster, EndpointRequest};
use netctl::model::{Attachment, MacAddr, Network, NodeId, NodeName, Versioned};
use netctl::store::etcd::Etcd as Store;
use tokio::task::JoinSet;
use world::{Agent, Config, Etcd, Node};

use crate::crowd::Crowd;
use crate::report::{Better, Metric, Report};
use crate::{Ground, configure, plain, progress, rest};

pub const HELP: &str = "\
1,000 local and 10,000 remote endpoints: time to configure and converge, CPU, memory

First 1,000 endpoints (--quick: 200) of a node with the embedded store are attached and detached
through the agent's API, by one client with 32 calls at a time, in turns with the same connections
made by one `ip` process for each step: three times (--quick: once).

Then a node with an etcd of one member: 200 further nodes with 10,000 endpoints are written to the
store as their agents would, and 1,000 (--quick: 200) endpoints attached on the node itself.

  attach_s, detach_s      all endpoints; from the second time on beside the addresses that rest
  crowded_attach_s        all local endpoints, beside the 10,000 remote ones
  join_s                  from the agent's start until the kernel has all, where it had nothing
  restart_s               from the agent's start until it has repaired a kernel that lacked one route
  rest_cpu_percent        of one core, at rest, with the programs it starts
  rss_mib, peak_mib       memory at rest, and at its highest";

pub const NETWORK: &str = "bench";
/// 16,381 usable addresses; the local endpoints take the first ones.
pub const SUBNET: &str = "10.64.0.0/18";
const FIRST_REMOTE: u32 = u32::from_be_bytes([10, 64, 16, 0]);
const REMOTE_NODES: usize = 200;
const PER_NODE: usize = 50;
/// How many endpoints they have together.
pub const REMOTES: usize = REMOTE_NODES * PER_NODE;
/// How many transactions are under way at a time when the store is filled.
const WRITERS: usize = 64;
/// When something has not come about.
const LIMIT: Duration = Duration::from_secs(120);

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    let count = ground.pick(1000, 200);
    configure(ground, count, &mut report);
    converge(ground, count, &mut report);
    report
}

/// Endpoints through the agent and by `ip`, in turns.
fn configure(ground: &Ground, count: usize, report: &mut Report) {
    let metric = |name: &str, what: &str| {
        Metric::new(name, format!("{what} {count} endpoints, s"), Better::Lower)
    };
    let (mut attach, mut detach) = (metric("attach_s", "attach"), metric("detach_s", "detach"));
    progress(&format!("{count} namespaces for the agent, and as many for ip"));
    let (ours, theirs) = (ground.world.node("alone"), ground.world.node("ip"));
    let agent = ours.agent(&plain(Config::embedded()));
    ours.ok(&format!("network create {NETWORK} --subnet {SUBNET}"));
    let (crowd, _others) = (Crowd::new(&ours, count), Crowd::new(&theirs, count));
    let turns = ground.pick(3, 1);
    for turn in 1..=turns {
        progress(&format!(
            "turn {turn} of {turns}: through the agent, then one ip process for each step"
        ));
        let attached = crowd.attach(NETWORK);
        let endpoints = ours.sandbox(NETWORK).enter(|| devices("ve"));
        assert_eq!(endpoints, count, "endpoints with a device");
        let detached = crowd.detach(NETWORK);
        for (metric, ours, theirs) in [
            (&mut attach, attached, configure::attach(&theirs, count)),
            (&mut detach, detached, configure::detach(&theirs, count)),
        ] {
            metric.add(ours.as_secs_f64(), configure::NAME, theirs.as_secs_f64());
        }
    }
    agent.terminate();
    report.metrics.extend([attach, detach]);
}

/// A node of a large cluster.
struct Member {
    node: Arc<Node>,
    config: Config,
    sandbox: PathBuf,
    /// How many devices and IPv4 routes its sandbox has when all is there.
    devices: usize,
    routes: usize,
}

impl Member {
    /// Starts the agent and waits for all; returns it and the time that took.
    fn start(&self) -> (Agent, Duration) {
        let start = Instant::now();
        let agent = self.node.agent_under(&self.config, &[]);
        self.wait();
        (agent, start.elapsed())
    }

    /// Waits until the kernel has everything.
    fn wait(&self) {
        let start = Instant::now();
        while !self.is_complete() {
            assert!(start.elapsed() < LIMIT, "the kernel has not everything after {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_complete(&self) -> bool {
        if !self.node.space.enter(|| self.sandbox.exists()) {
            return false;
        }
        let sandbox = self.node.space.at(NETWORK, &self.sandbox.to_string_lossy());
        sandbox.enter(|| devices("ve") == self.devices && routes() == self.routes)
    }
}

fn converge(ground: &Ground, count: usize, report: &mut Report) {
    let mut single = |name: &str, what: &str, value: f64| {
        report.metrics.push(Metric::single(name, what, Better::Lower, value));
    };
    let etcd = ground.world.etcd();
    let node = ground.world.node("member");
    let config = plain(Config::etcd(&etcd)).store("timeout", "2s");
    let agent = node.agent(&config);
    node.ok(&format!("network create {NETWORK} --subnet {SUBNET}"));
    progress(&format!("{REMOTE_NODES} nodes with {REMOTES} endpoints, written to etcd"));
    node.space.enter(|| fill(&etcd));
    progress(&format!("{count} endpoints beside them"));
    let crowd = Crowd::new(&node, count);
    single(
        "crowded_attach_s",
        "attach beside the remote endpoints, s",
        crowd.attach(NETWORK).as_secs_f64(),
    );
    let sandbox = PathBuf::from(node.sandbox_path(NETWORK));
    // Beside the endpoints: the subnet's, the default and the uplink's.
    let routes = REMOTES + count + 3;
    let member = Member { node, config, sandbox, devices: count, routes };
    member.wait();
    progress("the agent at rest");
    let pid = agent.pid();
    let time = Duration::from_secs(ground.pick(30, 10));
    single("rest_cpu_percent", "CPU at rest, % of a core", rest::cpu_percent(pid, time));
    single("rss_mib", "memory, MiB", rest::memory_mib(pid, "VmRSS"));
    single("peak_mib", "memory at its highest, MiB", rest::memory_mib(pid, "VmHWM"));

    progress("the agent started again, with the kernel as it was");
    agent.kill();
    let last = remote_address(REMOTES as u32 - 1);
    let sandbox = member.node.space.at(NETWORK, &member.sandbox.to_string_lossy());
    sandbox.sh(&format!("ip route del {last}"));
    let (agent, time) = member.start();
    single("restart_s", "restart, s", time.as_secs_f64());
    agent.kill();
    progress("the agent started again, with nothing in the kernel");
    let cleaned = member.node.netctld(&member.config, &["--cleanup"]);
    assert!(cleaned.success(), "{cleaned}");
    let (agent, time) = member.start();
    single("join_s", "converge from nothing, s", time.as_secs_f64());
    single("join_cpu_s", "CPU for that, s", rest::cpu_seconds(agent.pid()));
    single("join_peak_mib", "memory for that, MiB", rest::memory_mib(agent.pid(), "VmHWM"));
}

/// How many devices of this namespace have a name that begins so.
fn devices(prefix: &str) -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/dev").expect("the kernel lists devices");
    text.lines().filter(|line| line.trim_start().starts_with(prefix)).count()
}

/// How many IPv4 routes the main table of this namespace has.
fn routes() -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/route").expect("the kernel lists routes");
    text.lines().count().saturating_sub(1)
}

/// The store that an agent with this etcd has.
pub fn store_of(etcd: &Etcd) -> Store {
    etcd.store(Duration::from_secs(20))
}

/// The name of an endpoint of theirs.
pub fn remote_endpoint(number: u32) -> String {
    format!("remote{number}")
}

/// Its address.
pub fn remote_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_REMOTE + number)
}

/// Writes nodes with endpoints, as their agents do.
pub fn fill(etcd: &Etcd) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made").block_on(async {
        let store = Arc::new(store_of(etcd));
        let member = |name: &str| {
            let (store, name) = (Arc::clone(&store), name.parse().expect("it is a name"));
            async move { Cluster::new(store, name, Duration::ZERO).await.expect("etcd answers") }
        };
        let network = member("filler").await.network(NETWORK).await.expect("the network was made");
        let network = Arc::new(network);
        let mut writers = JoinSet::new();
        for number in 0..REMOTE_NODES {
            let cluster = member(&remote_name(number)).await;
            if writers.len() >= WRITERS {
                writers.join_next().await;
            }
            writers.spawn(populate(cluster, Arc::clone(&network), number));
        }
        writers.join_all().await;
    });
}

fn remote_name(number: usize) -> String {
    format!("remote{number}")
}

/// A node that is not there.
pub fn stranger(name: NodeName, underlay: IpAddr) -> netctl::model::Node {
    let [.., high, low] = match underlay {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4],
    };
    netctl::model::Node {
        id: NodeId::random(&mut rand::rng()),
        name,
        underlay,
        vtep_mac: MacAddr([2, 0, 0, 1, high, low]),
        tunnel_port: 4789,
        mtu: 1450,
        subnets_in_use: Vec::new(),
        labels: std::collections::BTreeMap::new(),
        lb: Default::default(),
        lb_reason: String::new(),
        socket_lb: None,
        version: String::new(),
    }
}

/// Writes one node and its endpoints.
async fn populate(cluster: Cluster, network: Arc<Versioned<Network>>, number: usize) {
    let name: NodeName = remote_name(number).parse().expect("it is a name");
    let [high, low] = (number as u16).to_be_bytes();
    let node = stranger(name, IpAddr::from([192, 168, 60 + high, low]));
    cluster.join(&node).await.expect("the node is new");
    for endpoint in 0..PER_NODE {
        let index = (number * PER_NODE + endpoint) as u32;
        let claim = claim(&remote_endpoint(index), remote_address(index), index);
        let claimed = cluster.claim(&network, &claim, &std::collections::BTreeSet::new()).await;
        claimed.expect("the address is free");
    }
}

/// What an agent asks for that plugs a container in.
pub fn claim(name: &str, address: Ipv4Addr, number: u32) -> EndpointRequest {
    EndpointRequest {
        name: Some(name.parse().expect("it is a name")),
        addresses: vec![address.into()],
        ..EndpointRequest::new(Attachment {
            netns: Path::new("/run/netns").join(name),
            inode: 4_026_532_000 + u64::from(number),
            boot: "11111111-2222-3333-4444-555555555555".into(),
            interface: "eth0".parse().expect("it is an interface's name"),
        })
    }
}
