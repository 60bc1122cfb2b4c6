//! What a check of the addresses finds, and what a repair does.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use world::{Node, NodeOptions, Output, World, wait_for};

use crate::cluster::{Cluster, DUAL};

crate::tests![
    each_leak_is_found_and_repaired_under_running_containers,
    what_cannot_be_repaired_is_told_and_left,
    a_name_or_an_address_that_cannot_be_is_told,
    endpoints_of_a_node_without_a_record_are_lost_until_it_is_back,
    nothing_is_found_while_endpoints_come_and_go,
    what_the_kernel_lacks_is_found_on_its_node,
];

pub(crate) const NOBODY: &str = "00000000000f";

/// Runs a check of every node and returns what it found, each as `kind what`, sorted; its exit status
/// must fit.
#[track_caller]
pub(crate) fn found(node: &Node, arguments: &str) -> Vec<String> {
    let output = node.ctl(&format!("-o json ipam check {arguments}"));
    let view = json(&output);
    let findings = list(&view["findings"]);
    assert_eq!(output.code, Some(i32::from(!findings.is_empty())), "{output}");
    assert_eq!(view["node"], node.name());
    for node in view["nodes"].as_array().expect("nodes are told") {
        assert_eq!(node["outcome"], "compared", "{output}");
    }
    findings
}

/// Repairs, and returns what was repaired.
#[track_caller]
fn repaired(node: &Node, arguments: &str) -> Vec<String> {
    list(&json(&node.ctl(&format!("-o json ipam check --repair {arguments}")))["repaired"])
}

/// What a check printed, whether it found something or not.
#[track_caller]
pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output}"))
}

pub(crate) fn list(findings: &Value) -> Vec<String> {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let findings = findings.as_array().cloned().unwrap_or_default();
    let mut all: Vec<String> =
        findings.iter().map(|f| format!("{} {}", text(f, "kind"), text(f, "what"))).collect();
    all.sort();
    all
}

/// The id of an endpoint.
pub(crate) fn id(node: &Node, endpoint: &str) -> String {
    let found = node.ok(&format!("-o json endpoint inspect --network shop {endpoint}")).json();
    found[0]["id"].as_str().expect("an endpoint has an id").to_owned()
}

fn each_leak_is_found_and_repaired_under_running_containers(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2, etcd) = (cluster.n1(), cluster.n2(), &cluster.etcd);
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create other --subnet 10.10.0.0/24");
    let (a, b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let address = n2.addresses("shop", "b")[0].clone();
    let reach = || assert!(a.space.reaches(&address), "{} to {}", a.name, b.name);
    reach();
    let keys = etcd.keys();
    let (shop, a_id, b_id) = (n1.network_id("shop"), id(n1, "a"), id(n1, "b"));
    let members = format!("members/{shop}");
    let named = |id: &str| format!("{id:?}");
    // The key that is set to a value or removed, and what is found then.
    let cases = [
        (format!("{members}/addresses/10.9.0.99"), Some(named(NOBODY)), "leaked_address"),
        (format!("{members}/addresses/10.9.0.98"), Some(named(&a_id)), "leaked_address"),
        // It rests, and no lease ends that.
        (format!("{members}/addresses/10.9.0.97"), Some(String::new()), "leaked_address"),
        (format!("{members}/names/nobody"), Some(named(NOBODY)), "leaked_name"),
        (format!("{members}/blocks/10.9.0.240/28"), Some(named("gone")), "leaked_block"),
        (format!("{members}/blocks/10.8.0.0/28"), Some(named("n1")), "outside_block"),
        (format!("local/n2/{shop}/{NOBODY}"), Some(String::new()), "leaked_local"),
        (format!("{members}/addresses/{address}"), None, "missing_address"),
        (format!("{members}/addresses/{address}"), Some(named(&a_id)), "missing_address"),
        (format!("{members}/names/b"), None, "missing_name"),
        (format!("local/n2/{shop}/{b_id}"), None, "missing_local"),
    ];
    for (key, value, kind) in cases {
        match &value {
            Some(value) => etcd.put(&format!("netctl/{key}"), value),
            None => etcd.delete(&format!("netctl/{key}")),
        }
        let expected = [format!("{kind} {key}")];
        for node in &cluster.nodes {
            assert_eq!(found(node, ""), expected);
            assert_eq!(found(node, "--network shop"), expected);
            assert_eq!(found(node, "--network other"), [""; 0]);
        }
        assert_eq!(repaired(n1, "--network other"), [""; 0]);
        assert_eq!(repaired(n2, ""), expected);
        assert_eq!(found(n1, ""), [""; 0]);
        assert_eq!(etcd.keys(), keys, "after {kind} {key}");
        reach();
    }
    // A network that does not exist, with more keys than one transaction takes.
    for number in 0..130 {
        etcd.put(&format!("netctl/members/{NOBODY}/addresses/10.1.0.{number}"), &named(NOBODY));
    }
    let expected = [format!("leaked_members members/{NOBODY}/")];
    assert_eq!(found(n1, ""), expected);
    assert_eq!(found(n1, &format!("--network {NOBODY}")), expected);
    assert_eq!(repaired(n1, &format!("--network {NOBODY}")), expected);
    assert_eq!(etcd.keys(), keys);
    reach();
    // What was repaired is as good as before.
    n2.ok("endpoint detach --network shop b");
    n1.ok("endpoint detach --network shop a");
    assert_eq!(found(n1, ""), [""; 0]);
}

fn what_cannot_be_repaired_is_told_and_left(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2, etcd) = (cluster.n1(), cluster.n2(), &cluster.etcd);
    n1.ok("network create shop --subnet 10.9.0.0/24");
    let (a, _b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let (shop, a_id) = (n1.network_id("shop"), id(n1, "a"));
    let (first, second) = (n1.addresses("shop", "a")[0].clone(), n2.addresses("shop", "b")[0].clone());
    // Endpoint a is said to have the address of b: its own has nobody then.
    let key = format!("netctl/members/{shop}/endpoints/{a_id}");
    let record = etcd.keys()[&key].clone();
    etcd.put(&key, &record.replace(&format!("{first:?}"), &format!("{second:?}")));
    let double = format!("double_address members/{shop}/addresses/{second}");
    let leak = format!("leaked_address members/{shop}/addresses/{first}");
    assert_eq!(found(n1, ""), [double.clone(), leak]);
    let output = n2.ctl("ipam check --repair");
    assert_eq!(output.code, Some(1), "{output}");
    for word in ["done: remove the key", "detach all but one", "1 repaired, 1 left", "2 node(s): n1, n2"]
    {
        assert!(output.stdout.contains(word), "{word}: {output}");
    }
    assert_eq!(found(n1, ""), [double]);
    // What it says helps.
    n1.ok("endpoint detach --network shop a");
    wait_for("one address, one endpoint", || n2.ctl("ipam check").stdout.contains("missing address"));
    n2.ok("ipam check --repair");
    n1.ok(&format!("endpoint attach --network shop --name a --netns {}", a.path));
    wait_for("both talk", || a.space.ping(&second));
    etcd.put(&format!("netctl/members/{shop}/addresses/10.9.0.99"), "nonsense");
    assert_eq!(found(n1, ""), [format!("unreadable members/{shop}/addresses/10.9.0.99")]);
    assert_eq!(repaired(n1, ""), [""; 0]);
}

fn a_name_or_an_address_that_cannot_be_is_told(world: &World) {
    let cluster = Cluster::new(world, 1);
    let (n1, etcd) = (cluster.n1(), &cluster.etcd);
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.attach("shop", "a");
    n1.attach("shop", "b");
    let members = format!("members/{}", n1.network_id("shop"));
    let (a, b) = (id(n1, "a"), id(n1, "b"));
    let key = format!("netctl/{members}/endpoints/{b}");
    let record = etcd.keys()[&key].clone();
    etcd.put(&key, &record.replace("\"name\":\"b\"", "\"name\":\"a\""));
    let (double, leak) =
        (format!("double_name {members}/names/a"), format!("leaked_name {members}/names/b"));
    assert_eq!(found(n1, ""), [double, leak]);
    etcd.put(&key, &record);
    assert_eq!(found(n1, ""), [""; 0]);
    let key = format!("netctl/{members}/endpoints/{a}");
    let (record, address) = (etcd.keys()[&key].clone(), n1.addresses("shop", "a")[0].clone());
    etcd.put(&key, &record.replace(&address, "10.8.0.9"));
    let expected = [
        format!("leaked_address {members}/addresses/{address}"),
        format!("missing_address {members}/addresses/10.8.0.9"),
        format!("outside_address {members}/endpoints/{a}"),
    ];
    assert_eq!(found(n1, ""), expected);
    etcd.put(&key, &record);
    assert_eq!(found(n1, ""), [""; 0]);
}

fn endpoints_of_a_node_without_a_record_are_lost_until_it_is_back(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (_a, _b, address) = cluster.shop();
    let (shop, b) = (cluster.n1().network_id("shop"), id(cluster.n1(), "b"));
    cluster.kill(1);
    cluster.etcd.delete("netctl/base/nodes/n2");
    let lost = format!("lost_endpoint members/{shop}/endpoints/{b}");
    let findings = found(cluster.n1(), "");
    assert!(findings.contains(&lost), "{findings:?}");
    let others = findings.iter().filter(|finding| **finding != lost);
    assert!(others.clone().all(|finding| finding.starts_with("leaked_block ")), "{findings:?}");
    cluster.start(1);
    assert_eq!(found(cluster.n1(), ""), [""; 0]);
    assert_eq!(cluster.n2().addresses("shop", "b")[0], address);
}

fn nothing_is_found_while_endpoints_come_and_go(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "1s"));
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.attach("shop", "a");
    cluster.n2().attach("shop", "b");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for node in &cluster.nodes {
            for index in 0..3 {
                let (name, done) = (format!("{}-{index}", node.name()), &done);
                scope.spawn(move || {
                    let path = node.container(&name).path;
                    while !done.load(Ordering::Relaxed) {
                        node.ok(&format!("endpoint attach --network shop --name {name} --netns {path}"));
                        node.ok(&format!("endpoint detach --network shop {name}"));
                    }
                });
            }
        }
        let checks = |node: &Node| (0..40).flat_map(|_| found(node, "")).collect::<Vec<_>>();
        let all: Vec<_> = cluster.nodes.iter().flat_map(|node| checks(node)).collect();
        let repaired = repaired(n1, "");
        done.store(true, Ordering::Relaxed);
        assert_eq!((all, repaired), (Vec::new(), Vec::new()));
    });
}

fn what_the_kernel_lacks_is_found_on_its_node(world: &World) {
    // So that agents do not look for themselves meanwhile.
    let slow = |config: world::Config| config.set("resync", "10m");
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), slow);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/24");
    let (a, _b) = (n1.attach("shop", "a"), n2.attach("shop", "b"));
    let (sandbox, a_id) = (format!("netctl-{}", n1.network_id("shop")), id(n1, "a"));
    // Somebody takes the interface's place: it cannot be put back.
    a.space.sh("ip link add eth7 type bridge
         ip link set eth0 down && ip link set eth0 name eth8
         ip link set eth7 name eth0 && ip link del eth8");
    let missed = [format!("no_device {sandbox}/ve{a_id}")];
    wait_for("it is missed", || found(n1, "--local") == missed);
    assert_eq!(found(n2, "--local"), [""; 0], "it is not on this node");
    assert_eq!(found(n2, ""), missed);
    assert_eq!(repaired(n1, ""), [""; 0]);
    a.space.sh("ip link del eth0");
    wait_for("it is back", || found(n1, "").is_empty());
    n2.container(&format!("netctl-{NOBODY}"));
    for node in [n1, n2] {
        assert_eq!(found(node, ""), [format!("stray_sandbox netctl-{NOBODY}")]);
        assert_eq!(found(node, "--network shop"), [""; 0]);
    }
    n2.space.sh(&format!("umount /run/netns/netctl-{NOBODY} && rm /run/netns/netctl-{NOBODY}"));
    assert_eq!(found(n2, ""), [""; 0]);
}
