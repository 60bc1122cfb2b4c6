//! The outage that this project exists for: a shared /24, 127 stacks and 128 services.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use world::{Container, Node, Transfer, World, eventually};

use crate::cluster::Cluster;
use crate::services::usage;

crate::tests![the_outage_is_refused_before_anything_starts];

/// How many stacks have a container and no address beside it.
const STACKS: usize = 127;
/// How many there are with those that are a service too: a container and an address of its own.
const ALL: usize = STACKS + 128;
/// How many containers each node plugs in at once.
const CALLERS: usize = 8;

fn mode(index: usize) -> &'static str {
    if index < STACKS { "dnsrr" } else { "vip" }
}

/// A Compose file for each stack.
fn files(node: &Node) -> Vec<String> {
    let folder = node.dir().join("stacks");
    std::fs::create_dir_all(&folder).unwrap();
    let file = |index: usize| {
        let path = folder.join(format!("stack{index}.yml"));
        let text = format!(
            "services:\n  app:\n    image: app\n    networks: [shared]\n    deploy: {{endpoint_mode: {}}}\n\
             networks:\n  shared: {{external: true}}\n",
            mode(index)
        );
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    (0..ALL).map(file).collect()
}

fn the_outage_is_refused_before_anything_starts(world: &World) {
    let cluster = Cluster::new(world, 2);
    let n1 = cluster.n1();
    n1.ok("network create shared --subnet 10.9.0.0/24");
    // What runs already, and must go on.
    let (old, other) = (n1.attach("shared", "old"), cluster.n2().attach("shared", "other"));
    let (first, second) = (address(n1, "old"), address(cluster.n2(), "other"));
    // 127 containers; 128 services with a container and an address each: 383 for 251.
    let plan = n1.ctl(&format!("plan {}", files(n1).join(" ")));
    assert_eq!(plan.code, Some(5), "{plan}");
    let told = "network shared is short by 132 IPv4 addresses: 383 needed, 251 free; add a subnet \
                (netctl network expand shared --subnet CIDR)";
    assert!(plan.stderr.contains(told), "{plan}");
    assert_eq!(usage(n1, "shared", "free"), 251);
    // The same, one after the other: the first 127 take one each, then 62 services two each.
    let refused: Vec<usize> = (0..ALL).filter(|index| !admitted(&cluster, *index)).collect();
    assert_eq!(refused, (STACKS + 62..ALL).collect::<Vec<_>>());
    assert_eq!(usage(n1, "shared", "free"), 0);

    // The network grows while connections run over it, both ways, and the rest is deployed.
    let there = Transfer::start(&old.space, &other.space, &second).unwrap();
    let back = Transfer::start(&other.space, &old.space, &first).unwrap();
    there.wait();
    back.wait();
    n1.ok("network expand shared --subnet 10.10.0.0/24");
    for index in refused {
        assert!(admitted(&cluster, index), "stack{index} is refused after the network has grown");
    }
    let start = Instant::now();
    let containers = attach_all(&cluster);
    eprintln!("{ALL} containers were plugged in within {:?}", start.elapsed());
    everything_is_deployed(&cluster);
    for (space, name) in [(&old.space, "c250"), (&other.space, "c251")] {
        let new = addresses(n1).remove(name).unwrap();
        assert!(space.reaches(&new), "{name}, {new}");
    }
    assert!(containers[0].space.reaches(&first) && containers[254].space.reaches(&second));
    for transfer in [there, back] {
        transfer.wait();
        transfer.finish().unwrap();
    }
    n1.ok("ipam check");
}

fn address(node: &Node, endpoint: &str) -> String {
    node.addresses("shared", endpoint).remove(0)
}

/// Makes a stack's service, which keeps what it needs; or it is refused, with the numbers and what
/// helps.
fn admitted(cluster: &Cluster, index: usize) -> bool {
    let node = &cluster.nodes[index % 2];
    let command =
        format!("service create stack{index} --network shared --endpoint-mode {}", mode(index));
    let output = node.ctl(&command);
    if output.code == Some(0) {
        return true;
    }
    // 2 endpoints, 62 services; 127 and 62 containers to come.
    let numbers = "network shared has too few IPv4 addresses: 2 asked for, 0 free (253 usable, 2 in use \
                   by endpoints, 62 by services, 0 resting, 189 reserved), 2 short; nothing was changed.";
    let remedy = "netctl network expand shared --subnet CIDR";
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains(numbers) && output.stderr.contains(remedy), "{output}");
    false
}

/// Plugs in the container of every stack, on both nodes and several at a time.
fn attach_all(cluster: &Cluster) -> Vec<Container> {
    let (next, done) = ([AtomicUsize::new(0), AtomicUsize::new(1)], Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for caller in 0..2 * CALLERS {
            let (node, next, done) = (&cluster.nodes[caller % 2], &next[caller % 2], &done);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(2, Ordering::Relaxed);
                    if index >= ALL {
                        return;
                    }
                    let name = format!("c{index}");
                    let container =
                        node.attach_with("shared", &name, &format!("--service stack{index}"));
                    done.lock().unwrap().push((index, container));
                }
            });
        }
    });
    let mut all = done.into_inner().unwrap();
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, container)| container).collect()
}

/// The addresses of all endpoints of the network, by name.
fn addresses(node: &Node) -> std::collections::BTreeMap<String, String> {
    let all = node.ok("-o json endpoint ls --network shared").json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = all.as_array().unwrap().iter();
    all.map(|endpoint| (text(&endpoint["name"]), text(&endpoint["addresses"][0]))).collect()
}

/// Every stack has its container, every service its address, nobody has another's, and what was
/// kept is used up.
fn everything_is_deployed(cluster: &Cluster) {
    let n1 = cluster.n1();
    let endpoints = addresses(n1);
    let services = n1.ok("-o json service ls").json();
    let services = services.as_array().unwrap();
    let id = n1.network_id("shared");
    let own = services.iter().filter_map(|service| service["addresses"][&id][0].as_str());
    let own: Vec<String> = own.map(str::to_owned).collect();
    assert_eq!((endpoints.len(), services.len(), own.len()), (ALL + 2, ALL, ALL - STACKS));
    let distinct: BTreeSet<&String> = endpoints.values().chain(&own).collect();
    assert_eq!(distinct.len(), 2 * ALL + 2 - STACKS);
    let view = n1.ok("-o json network inspect shared").json()[0]["ipv4"].clone();
    for (what, count) in [("usable", 506), ("endpoints", 257), ("services", 128), ("reserved", 0)] {
        assert_eq!(view[what], json!(count), "{what}: {view}");
    }
    assert_eq!(view["free"], 506 - 257 - 128);
    let ready = |service: &Value| service["ready"] == 1;
    let all_ready = || {
        let services = n1.ok("-o json service ls").json();
        services.as_array().unwrap().iter().all(ready)
    };
    assert!(eventually(world::DEADLINE, all_ready), "not every service has its container");
}
