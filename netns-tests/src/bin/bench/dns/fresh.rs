//! How soon a change in the store is answered on every node.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use netctl::cluster::{Claimed, Cluster};
use netctl::model::Endpoint;
use world::{Config, Container, Etcd};

use super::load::Load;
use super::{DOMAIN, Name, SERVER};
use crate::report::{Better, Metric, Report, percentile};
use crate::scale::{self, NETWORK};
use crate::{Ground, plain, progress};

const NODES: usize = 3;
/// How long it is waited between two queries: as much may be counted too many.
const PAUSE: Duration = Duration::from_millis(2);
/// When an answer has not come about.
const LIMIT: Duration = Duration::from_secs(10);

/// Endpoints appear and vanish on the network that has all others already; each time it is measured until the last of three nodes answers so,
/// from before the transaction is sent.
pub fn measure(ground: &Ground, etcd: &Etcd, report: &mut Report) {
    let nodes: Vec<_> = (0..NODES).map(|number| ground.world.node(&format!("fresh{number}"))).collect();
    let config =
        plain(Config::etcd(etcd)).store("timeout", "2s").raw("dns", "{ rate = 0 }").set("lb", "ebpf");
    let agents: Vec<_> = nodes.iter().map(|node| node.agent(&config)).collect();
    let containers: Vec<Container> =
        nodes.iter().map(|node| node.attach(NETWORK, &format!("at-{}", node.name()))).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime can be made");
    let store = Arc::new(nodes[0].space.enter(|| runtime.block_on(async { scale::store_of(etcd) })));
    let count = ground.pick(500, 100);
    progress(&format!("{count} endpoints appear and vanish, on {NODES} nodes"));
    let times: Vec<f64> = nodes[0].space.enter(|| {
        let (cluster, network) = runtime.block_on(async {
            let name = "filler".parse().expect("it is a name");
            let cluster = Cluster::new(store, name, Duration::ZERO).await.expect("etcd answers");
            let name = "filler".parse().expect("it is a name");
            let node = scale::stranger(name, Ipv4Addr::new(192, 168, 60, 1).into());
            cluster.join(&node).await.expect("the node is new");
            let network = cluster.network(NETWORK).await.expect("the network was made");
            (cluster, network)
        });
        let change = |number: u32| {
            let name = format!("new{number}");
            // After all others.
            let address = scale::remote_address(scale::REMOTES as u32 + number);
            let full = (format!("{name}.{DOMAIN}"), address);
            let claim = scale::claim(&name, address, number);
            let mut made: Option<Endpoint> = None;
            let appeared = until_all(&containers, &full, true, || {
                let claimed = runtime.block_on(cluster.claim(&network, &claim, &BTreeSet::new()));
                made = match claimed.expect("the address is free") {
                    Claimed::New(endpoint, _) | Claimed::Existing(endpoint) => Some(endpoint),
                };
            });
            let made = made.expect("it was made");
            let vanished = until_all(&containers, &full, false, || {
                runtime.block_on(cluster.withdraw(&made)).expect("it is there");
            });
            [appeared, vanished]
        };
        (0..count).flat_map(change).collect()
    });
    drop(agents);
    let mut single = |name: &str, what: &str, percent| {
        let value = percentile(times.iter().copied(), percent);
        report.metrics.push(Metric::single(name, what, Better::Lower, value));
    };
    single("fresh_p50_ms", "change until answered on 3 nodes, median, ms", 50);
    single("fresh_p99_ms", "change until answered on 3 nodes, p99, ms", 99);
}

/// Makes a change, and waits until all containers are answered so; gives how long that took, in
/// milliseconds.
fn until_all(containers: &[Container], name: &Name, exists: bool, change: impl FnOnce()) -> f64 {
    let wait = |container: &Container| {
        container.space.enter(|| {
            let (mut load, start) = (Load::new(SERVER), Instant::now());
            while load.is_right(name) != Some(exists) {
                assert!(start.elapsed() < LIMIT, "{} is not answered in {LIMIT:?}", name.0);
                // Three that ask without a break would take both cores from all agents.
                thread::sleep(PAUSE);
            }
            Instant::now()
        })
    };
    thread::scope(|scope| {
        let waiting: Vec<_> =
            containers.iter().map(|container| scope.spawn(|| wait(container))).collect();
        let begun = Instant::now();
        change();
        let last = waiting.into_iter().map(|one| one.join().expect("it is answered")).max();
        (last.expect("there are containers") - begun).as_secs_f64() * 1e3
    })
}
