//! Giving out addresses: the allocator alone, through the store, and by many nodes at once.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use netctl::cluster::{Claimed, Cluster, Defaults, EndpointRequest, View};
use netctl::ipam::{Block, Ledger};
use netctl::model::snapshot::Holder;
use netctl::model::{
    Attachment, ClusterId, EndpointId, Network, NetworkId, NetworkSpec, NodeName, Subnet, Versioned, Vni,
};
use netctl::store::embedded::Embedded;
use netctl::store::etcd::{Etcd, EtcdConfig};
use netctl::store::{Lease, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch, schema};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::cni::{Cni, HOST_LOCAL};
use crate::report::{Better, Metric, Report};
use crate::{Ground, progress};

pub const HELP: &str = "\
giving out addresses: the allocator alone, through the store, and by eight nodes at once

All on a network with a /16. A round takes an address and gives it back; rates are rounds per second.

  pure_empty, pure_full   the allocator without a store, one thread: nothing is taken; all is taken
                          but 16 addresses
  embedded_1, etcd_1      one node takes from its own block and gives back at once, one at a time;
                          each step is one durable transaction
  embedded, etcd          the same with 16 at a time
  nodes                   eight nodes with 16 at a time each, over one etcd, all together
  conflicts_percent       transactions of the eight nodes that met somebody else's and were repeated

Beside the ones with a store: the reference CNI plugin host-local, ADD and DEL, one process each, as
often at a time (nodes: 16). It keeps files on the same disk, and does not wait for them to be there.
Both sides take turns. The stores are on the disk of the target directory; etcd has one member.";

const SUBNET: &str = "10.64.0.0/16";
const NAME: &str = "bench";
/// How many addresses are free in the full network.
const FREE: usize = 16;
/// How many claims a node has under way.
const CALLERS: usize = 16;
const NODES: usize = 8;
/// Where the embedded store is; removed with the other files of the benchmarks.
const FILE: &str = "/run/world/ipam.db";

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    pure(ground, &mut report);
    let peer = Peer::new(ground);
    with_embedded(ground, &peer, &mut report);
    let etcd = ground.world.etcd();
    ground.world.node("client").space.enter(|| with_etcd(ground, &etcd, &peer, &mut report));
    report
}

fn with_embedded(ground: &Ground, peer: &Peer, report: &mut Report) {
    let runtime = runtime();
    let store = Arc::new(Embedded::open(FILE).expect("the disk can be written"));
    let (node, _) = runtime.block_on(members(store, 1));
    one_node(ground, &runtime, peer, "embedded", &node, report);
}

fn with_etcd(ground: &Ground, etcd: &world::Etcd, peer: &Peer, report: &mut Report) {
    let runtime = runtime();
    let config = EtcdConfig {
        endpoints: vec![etcd.endpoint()],
        timeout: Duration::from_secs(10),
        ..EtcdConfig::default()
    };
    let store = Arc::new(Etcd::new(config).expect("the configuration is right"));
    let (node, _) = runtime.block_on(members(store.clone(), 1));
    one_node(ground, &runtime, peer, "etcd", &node, report);
    drop(node);
    let (nodes, counted) = runtime.block_on(members(store, NODES));
    let mut metric = metric("nodes", &format!("etcd, {NODES} nodes at once"));
    turns(ground, &runtime, peer, &nodes, CALLERS, &mut metric);
    report.metrics.push(metric);
    let conflicts = 100.0 * counted.conflicts() as f64 / counted.all() as f64;
    let what = "of their transactions repeated, %";
    report.metrics.push(Metric::single("conflicts_percent", what, Better::Lower, conflicts));
}

/// Its threads are in the namespace of the thread that calls this.
fn runtime() -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be made")
}

fn metric(name: &str, what: &str) -> Metric {
    Metric::new(format!("{name}_per_s"), format!("{what}, per s"), Better::Higher)
}

/// One store, one node: one claim at a time, and many.
fn one_node(
    ground: &Ground,
    runtime: &Runtime,
    peer: &Peer,
    store: &str,
    members: &[Arc<Member>],
    report: &mut Report,
) {
    for (name, what, callers) in [
        (format!("{store}_1"), format!("{store} store, one at a time"), 1),
        (store.to_owned(), format!("{store} store, {CALLERS} at a time"), CALLERS),
    ] {
        let mut metric = metric(&name, &what);
        turns(ground, runtime, peer, members, callers, &mut metric);
        report.metrics.push(metric);
    }
}

/// Measures both sides in turns.
fn turns(
    ground: &Ground,
    runtime: &Runtime,
    peer: &Peer,
    members: &[Arc<Member>],
    callers: usize,
    metric: &mut Metric,
) {
    let (rounds, time) = ground.pick((5, Duration::from_secs(4)), (3, Duration::from_millis(1200)));
    progress(&format!("{}: {rounds} turns", metric.what));
    runtime.block_on(allocate(members, callers, time / 4));
    for _ in 0..rounds {
        let ours = runtime.block_on(allocate(members, callers, time));
        let theirs = peer.allocate(callers, time / 2);
        metric.add(ours, HOST_LOCAL, theirs);
    }
}

/// The allocator alone.
fn pure(ground: &Ground, report: &mut Report) {
    let network = network();
    let (mut empty, mut full) = (ledger(&network, None), ledger(&network, Some(FREE)));
    let mut metrics = [
        ("pure_empty_per_s", "allocator, empty /16, per s"),
        ("pure_full_per_s", "allocator, nearly full /16, per s"),
    ]
    .map(|(name, what)| Metric::new(name, what, Better::Higher));
    let (turns, count) = ground.pick((15, 2_000_000), (7, 1_000_000));
    progress(&format!("the allocator: {turns} turns of {count}"));
    for _ in 0..turns {
        for (ledger, metric) in [&mut empty, &mut full].into_iter().zip(&mut metrics) {
            let start = Instant::now();
            for _ in 0..count {
                let proposal = ledger.propose(true, |_| true, 0).expect("an address is free");
                ledger.withdraw(std::hint::black_box(proposal.address));
            }
            metric.ours.push(f64::from(count) / start.elapsed().as_secs_f64());
        }
    }
    report.metrics.extend(metrics);
}

/// The network's addresses as seen by a node that has all blocks; with a number, all but so many
/// addresses are taken.
fn ledger(network: &Network, free: Option<usize>) -> Ledger {
    let me: NodeName = "n1".parse().expect("it is a name");
    let mut ledger = Ledger::new(me.clone());
    ledger.follow(network);
    let subnet = &network.subnets[0];
    let every: Vec<IpAddr> = subnet.cidr().iter().filter(|address| subnet.is_usable(*address)).collect();
    if let Some(free) = free {
        let each = every.len() / free;
        for (number, address) in every.iter().enumerate() {
            if number % each != each / 2 || number / each >= free {
                ledger.hold(*address, Holder::Endpoint(EndpointId::random(&mut rand::rng())));
            }
        }
    }
    let ranges: BTreeSet<_> = every.iter().filter_map(|address| subnet.block_of(*address)).collect();
    for range in ranges {
        ledger.own(range, Block { node: me.clone(), revision: 1 });
    }
    let taken = every.len() as u128 - ledger.count(true).free();
    assert_eq!(taken, free.map_or(0, |free| every.len() - free) as u128);
    ledger
}

fn network() -> Network {
    let subnet = Subnet::new(SUBNET.parse().expect("a range"), None, None, BTreeSet::new());
    Network {
        id: NetworkId::random(&mut rand::rng()),
        name: NAME.parse().expect("it is a name"),
        subnets: vec![subnet.expect("a subnet").with_blocks_for(NODES)],
        vni: Vni::new(4097).expect("a VNI"),
        uplink: 0,
        mtu: None,
        internal: false,
        host_access: false,
        labels: Default::default(),
        removing: false,
        leaving: Vec::new(),
    }
}

/// A node as far as it gives out addresses: its handle on the store, and the view that keeps what
/// it knows current.
struct Member {
    cluster: Arc<Cluster>,
    network: Versioned<Network>,
    view: View,
}

/// Makes nodes over one store; they all use one network.
async fn members(store: Arc<dyn Store>, count: usize) -> (Vec<Arc<Member>>, Arc<Counted>) {
    let identified = schema::identify(&*store, None, ClusterId::random(&mut rand::rng())).await;
    identified.expect("the store is ours");
    let counted =
        Arc::new(Counted { store, committed: AtomicU64::new(0), conflicts: AtomicU64::new(0) });
    let mut members: Vec<Arc<Member>> = Vec::new();
    for number in 0..count {
        let name: NodeName = format!("n{number}").parse().expect("it is a name");
        let store: Arc<dyn Store> = counted.clone();
        let cluster = Cluster::new(store, name.clone(), Duration::ZERO).await;
        let cluster = Arc::new(cluster.expect("the store answers"));
        let network = match cluster.network(NAME).await {
            Ok(network) => network,
            Err(_) => cluster.create_network(&spec(), &defaults()).await.expect("the name is free"),
        };
        let view = View::start(Arc::clone(&cluster), name, vec![network.id]);
        let mut published = view.subscribe();
        published.wait_for(|published| published.complete).await.expect("the view goes on");
        members.push(Arc::new(Member { cluster, network, view }));
    }
    (members, counted)
}

fn spec() -> NetworkSpec {
    serde_json::from_value(serde_json::json!({ "name": NAME, "subnets": [SUBNET] })).expect("it is one")
}

fn defaults() -> Defaults {
    let vni = |number| Vni::new(number).expect("a VNI");
    Defaults {
        pools: Vec::new(),
        pool_prefix: 24,
        pools6: Vec::new(),
        pool6_prefix: 64,
        vnis: (vni(4097), vni(8000)),
    }
}

/// Takes addresses on every node and gives them back, so long; returns the rate of all together.
async fn allocate(members: &[Arc<Member>], callers: usize, time: Duration) -> f64 {
    let (start, mut tasks) = (Instant::now(), JoinSet::new());
    for member in members {
        for _ in 0..callers {
            tasks.spawn(call(Arc::clone(member), start + time));
        }
    }
    let done: u64 = tasks.join_all().await.into_iter().sum();
    done as f64 / start.elapsed().as_secs_f64()
}

async fn call(member: Arc<Member>, until: Instant) -> u64 {
    // As an attach does: the network stays in use meanwhile.
    let using = member.view.use_network(member.network.id).await.expect("the network is there");
    let (alive, mut done) = (BTreeSet::new(), 0);
    while Instant::now() < until {
        let claimed = member.cluster.claim(&member.network, &claim(), &alive).await;
        let Ok(Claimed::New(endpoint, _)) = claimed else { panic!("no new endpoint: {claimed:?}") };
        let released = member.cluster.release(&endpoint).await;
        assert!(matches!(released, Ok(Some(_))), "not released: {released:?}");
        done += 1;
    }
    drop(using);
    done
}

fn claim() -> EndpointRequest {
    EndpointRequest::new(Attachment {
        netns: "/run/netns/c1".into(),
        inode: 4_026_532_000,
        boot: "11111111-2222-3333-4444-555555555555".into(),
        interface: "eth0".parse().expect("it is an interface's name"),
    })
}

/// A store that counts how its transactions end.
struct Counted {
    store: Arc<dyn Store>,
    committed: AtomicU64,
    conflicts: AtomicU64,
}

impl Counted {
    fn conflicts(&self) -> u64 {
        self.conflicts.load(Ordering::Relaxed)
    }

    fn all(&self) -> u64 {
        self.committed.load(Ordering::Relaxed) + self.conflicts()
    }
}

#[async_trait]
impl Store for Counted {
    fn name(&self) -> String {
        self.store.name()
    }

    async fn get(&self, key: &str) -> Result<Option<netctl::store::Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, StoreError> {
        let outcome = self.store.commit(transaction).await?;
        let counter = match outcome {
            Outcome::Committed(_) => &self.committed,
            Outcome::Conflict => &self.conflicts,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(outcome)
    }

    fn watch(&self, prefix: &str, from: Option<Revision>) -> Watch {
        self.store.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: Lease) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }
}

/// The plugin host-local on a node of its own.
struct Peer {
    cni: Cni,
    container: world::Container,
    next: AtomicU64,
}

impl Peer {
    fn new(ground: &Ground) -> Self {
        let node = ground.world.node("cni");
        let container = node.container("box");
        Self { cni: Cni::host_local(node, SUBNET), container, next: AtomicU64::new(0) }
    }

    /// Takes addresses and gives them back, so long; returns the rate of all callers together.
    fn allocate(&self, callers: usize, time: Duration) -> f64 {
        let start = Instant::now();
        let call = || {
            let mut done = 0;
            while start.elapsed() < time {
                let id = format!("box{}", self.next.fetch_add(1, Ordering::Relaxed));
                self.cni.run("ADD", &id, &self.container);
                self.cni.run("DEL", &id, &self.container);
                done += 1;
            }
            done
        };
        let done: u64 = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..callers).map(|_| scope.spawn(call)).collect();
            callers.into_iter().map(|caller| caller.join().expect("the plugin works")).sum()
        });
        done as f64 / start.elapsed().as_secs_f64()
    }
}
