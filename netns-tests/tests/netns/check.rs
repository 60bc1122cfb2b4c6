//! A check of the kernels of all nodes, asked of one.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use world::{Etcd, Node, NodeOptions, World, eventually, output, wait_for};

use crate::cluster::{Cluster, alive};
use crate::ipam::{NOBODY, found, id, json, list};
use crate::rest::delay_dataplane;

crate::tests![
    what_another_node_cannot_put_right_is_found_from_here,
    nodes_that_do_not_look_are_named,
    checks_that_are_asked_at_once_are_all_answered,
    a_check_whose_agent_is_killed_leaves_nothing,
    what_a_newer_version_asks_or_answers_does_no_harm,
];

/// Machines with an endpoint `e1`, `e2`, … each, whose leases outlast the test, and whose agents do
/// not look for themselves meanwhile.
fn cluster(world: &World, count: usize) -> Cluster {
    let adjust = |config: world::Config| config.set("lease", "120s").set("resync", "10m");
    let cluster = Cluster::with(world, count, &NodeOptions::default(), adjust);
    cluster.n1().ok("network create shop --subnet 10.9.0.0/24");
    let names = cluster.nodes.iter().map(|node| node.name().to_owned()).collect::<Vec<_>>();
    for (node, name) in cluster.nodes.iter().zip(["e1", "e2", "e3", "e4"]) {
        node.attach("shop", name);
    }
    wait_for("all are known to live", || alive(cluster.n1()) == names);
    cluster
}

/// What became of a check on each node.
fn outcomes(view: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let nodes = view["nodes"].as_array().expect("nodes are told");
    nodes.iter().map(|node| (text(&node["node"]), text(&node["outcome"]))).collect()
}

fn named(outcomes: &[(&str, &str)]) -> Vec<(String, String)> {
    outcomes.iter().map(|(node, outcome)| ((*node).to_owned(), (*outcome).to_owned())).collect()
}

/// The keys of checks.
fn keys(etcd: &Etcd) -> Vec<String> {
    etcd.keys().into_keys().filter(|key| key.contains("checks/")).collect()
}

/// Has a machine look different from the store for as long as the test wants.
fn stray_sandbox(node: &Node) -> String {
    node.container(&format!("netctl-{NOBODY}"));
    format!("stray_sandbox netctl-{NOBODY}")
}

fn what_another_node_cannot_put_right_is_found_from_here(world: &World) {
    let cluster = cluster(world, 3);
    let (n1, n2, n3) = (cluster.n1(), cluster.n2(), &cluster.nodes[2]);
    assert_eq!(found(n1, ""), [""; 0]);
    let mut stuck = delay_dataplane(n2, cluster.agent(1).pid());
    let (sandbox, e2) = (format!("netctl-{}", n1.network_id("shop")), id(n1, "e2"));
    n2.sandbox("shop").sh(&format!(
        "ip link del ve{e2}
         ip link add ve{NOBODY} type veth peer name ve00000000000e"
    ));
    let expected = [
        format!("no_device {sandbox}/ve{e2}"),
        format!("stray_device {sandbox}/ve00000000000e"),
        format!("stray_device {sandbox}/ve{NOBODY}"),
    ];
    for node in [n1, n3] {
        assert_eq!(found(node, ""), expected);
        assert_eq!(found(node, "--network shop"), expected);
        assert_eq!(found(node, "--local"), [""; 0]);
    }
    assert_eq!(found(n2, "--local"), expected);
    let view = json(&n1.ctl("-o json ipam check --repair"));
    assert!(view["findings"].as_array().unwrap().iter().all(|found| found["node"] == "n2"), "{view}");
    assert_eq!((list(&view["findings"]), &view["repaired"]), (expected.to_vec(), &json!([])));
    let table = n3.ctl("ipam check").stdout;
    assert!(table.lines().nth(1).unwrap().split_whitespace().nth(1) == Some("n2"), "{table}");
    assert!(table.ends_with("the kernel of 3 of 3 node(s): n1, n2, n3\n"), "{table}");
    n1.ok("network create other --subnet 10.10.0.0/24");
    assert_eq!(found(n1, "--network other"), [""; 0]);
    assert_eq!(keys(&cluster.etcd), [""; 0]);
    stuck.signal(Signal::SIGINT);
    assert!(stuck.ended(), "strace lets go");
    wait_for("it is put right", || found(n1, "").is_empty());
}

fn nodes_that_do_not_look_are_named(world: &World) {
    let mut cluster = cluster(world, 4);
    cluster.kill(1);
    cluster.etcd.delete("netctl/base/alive/n2");
    cluster.freeze(2);
    // It hears nothing of the store, and tells it nothing.
    let n4 = cluster.nodes[3].clone();
    n4.space.sh("nft 'add table ip cut; add chain ip cut out { type filter hook output priority 0; policy drop; }'");
    let n1 = cluster.n1();
    let check = n1.ctl("-o json ipam check");
    let expected = named(&[("n1", "compared"), ("n2", "dead"), ("n3", "late"), ("n4", "late")]);
    assert_eq!((outcomes(&json(&check)), check.code), (expected, Some(1)), "{check}");
    assert_eq!(json(&check)["findings"], json!([]));
    let table = n1.ctl("ipam check --network shop");
    assert_eq!(table.code, Some(1), "{table}");
    for line in [
        "incomplete: node n2 was not compared: it is dead\n",
        "incomplete: node n3 was not compared: it is alive, and has not answered within 12s\n",
        "0 repaired, 0 left: ",
        ", the kernel of 1 of 4 node(s): n1\n",
    ] {
        assert!(table.stdout.contains(line), "{line}: {table}");
    }
    n1.ok("ipam check --local");
    assert_eq!(keys(&cluster.etcd), [""; 0]);
    n4.space.sh("nft delete table ip cut");
    cluster.thaw(2);
    cluster.start(1);
    let all = named(&[("n1", "compared"), ("n2", "compared"), ("n3", "compared"), ("n4", "compared")]);
    wait_for("all look again", || outcomes(&json(&cluster.n1().ctl("-o json ipam check"))) == all);
    assert_eq!(found(cluster.n2(), ""), [""; 0]);
    assert_eq!(keys(&cluster.etcd), [""; 0]);
}

fn checks_that_are_asked_at_once_are_all_answered(world: &World) {
    let cluster = cluster(world, 3);
    let stray = stray_sandbox(&cluster.nodes[2]);
    // What differs has all of them take some seconds.
    let asked = [0, 0, 1, 2];
    std::thread::scope(|scope| {
        let check = |index: usize| {
            let node = &cluster.nodes[index];
            scope.spawn(move || (found(node, ""), found(node, "--network shop")))
        };
        for answer in asked.map(check) {
            let (all, shop) = answer.join().expect("the check is complete");
            assert_eq!((all, shop), (vec![stray.clone()], Vec::new()));
        }
    });
    assert_eq!(keys(&cluster.etcd), [""; 0]);
}

fn a_check_whose_agent_is_killed_leaves_nothing(world: &World) {
    let mut cluster = cluster(world, 3);
    let stray = stray_sandbox(cluster.n2());
    // One who goes away has what was asked taken back at the end.
    let n1 = cluster.nodes[0].clone();
    let mut command = Command::new("timeout");
    let netctl = n1.netctl_command(&["ipam", "check"]);
    command.arg("1").arg(netctl.get_program()).args(netctl.get_args());
    assert_eq!(output(&mut command, Duration::from_secs(20)).code, Some(124), "it takes longer");
    assert!(!keys(&cluster.etcd).is_empty(), "it goes on");
    let ended = eventually(Duration::from_secs(9), || keys(&cluster.etcd).is_empty());
    assert!(ended, "it is taken back, before its lease ends");
    let asking = std::thread::spawn(move || n1.ctl("ipam check"));
    wait_for("one has answered, one looks", || {
        let keys = keys(&cluster.etcd);
        keys.iter().any(|key| key.ends_with("/n3")) && !keys.iter().any(|key| key.ends_with("/n2"))
    });
    cluster.kill(0);
    assert_ne!(asking.join().expect("netctl ends").code, Some(0));
    wait_for("the other answers too", || keys(&cluster.etcd).iter().any(|key| key.ends_with("/n2")));
    let gone = eventually(Duration::from_secs(40), || keys(&cluster.etcd).is_empty());
    assert!(gone, "{:?}", keys(&cluster.etcd));
    cluster.start(0);
    assert_eq!(found(cluster.n1(), ""), [stray]);
}

fn what_a_newer_version_asks_or_answers_does_no_harm(world: &World) {
    let cluster = cluster(world, 2);
    let (n1, etcd) = (cluster.n1(), &cluster.etcd);
    let newer = |number: u32, request: &Value| {
        etcd.put(&format!("netctl/base/checks/{number:012x}"), &request.to_string());
    };
    newer(1, &json!({"nodes": ["n1"], "lease": "none"}));
    newer(2, &json!("everything"));
    // Nobody could answer: its lease never was.
    newer(3, &json!({"node": "n9", "network": null, "lease": 4711, "more": true}));
    etcd.put("netctl/base/checks/this", "");
    etcd.put("netctl/checks/000000000001/n2", "{");
    let before = keys(etcd);
    assert_eq!(found(n1, ""), [""; 0]);
    n1.attach("shop", "later");
    wait_for("the other node has seen all", || cluster.n2().ok("endpoint ls").stdout.contains("later"));
    for node in &cluster.nodes {
        let listing = node.ok("-o json network ls").json();
        assert_eq!(listing[0]["ipv4"]["endpoints"], 3, "{listing}");
        assert_eq!(found(node, ""), [""; 0]);
    }
    assert_eq!(keys(etcd), before);
}
