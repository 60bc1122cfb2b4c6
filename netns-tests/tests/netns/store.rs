//! The store is down, slow, gone or somebody else's.

use std::time::{Duration, Instant};

use world::{Config, Node, NodeOptions, Stream, World, wait_for};

use crate::cluster::{Cluster, alive};

crate::tests![
    traffic_and_attached_containers_do_not_need_the_store,
    a_change_without_the_store_fails_soon_and_names_the_store,
    a_frozen_store_is_as_good_as_none,
    a_wiped_store_tears_nothing_down_and_takes_no_changes,
    an_agent_starts_without_the_store_and_keeps_what_runs,
    a_dead_node_is_seen_as_dead,
    a_dead_node_is_removed_with_what_it_had,
    a_store_of_a_newer_version_is_refused,
];

/// The exit code that asks to try again later.
const AGAIN: i32 = 6;

/// Expects each change to be refused within two seconds.
#[track_caller]
fn refused_soon(node: &Node, endpoint: &str) {
    for change in [
        "network create later --subnet 10.10.0.0/24",
        "endpoint attach --network shop --name c2 --netns /run/netns/c2",
        "endpoint attach --network other --name c2 --netns /run/netns/c2",
        "endpoint detach --network shop c1",
    ] {
        // What else this machine has to do in that moment is not the agent's.
        let soon = (0..3).any(|_| {
            let start = Instant::now();
            let output = node.ctl(change);
            assert_eq!(output.code, Some(AGAIN), "{change}: {output}");
            assert!(output.stderr.contains(endpoint), "{change}: the store is named: {output}");
            start.elapsed() < Duration::from_secs(2)
        });
        assert!(soon, "{change}: it took two seconds and more, three times");
    }
}

/// A machine with the time-out that agents have by default, two networks, a container in one of them, and
/// one in none.
fn usual(world: &World) -> Cluster {
    let usual = |config: Config| config.store("timeout", "1500ms");
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), usual);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("network create other --subnet 10.8.0.0/24");
    n1.attach("shop", "c1");
    n1.container("c2");
    cluster
}

#[track_caller]
fn accepted_again(node: &Node) {
    wait_for("changes are accepted again", || {
        node.ctl("network create later --subnet 10.10.0.0/24").success()
    });
}

fn traffic_and_attached_containers_do_not_need_the_store(world: &World) {
    let mut cluster =
        Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("lease", "2s"));
    let (a, b, address) = cluster.shop();
    let before: Vec<_> = cluster.nodes.iter().map(|node| node.kernel_state()).collect();
    let stream = Stream::start(&a.space, &b.space, &address, 5000);
    cluster.etcd.stop();
    // Longer than the leases last.
    stream.wait(20_000);
    cluster.etcd.start();
    stream.wait(10_000);
    let report = stream.stop();
    assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
    for (node, before) in cluster.nodes.iter().zip(before) {
        assert_eq!(before.difference(&node.kernel_state()), "", "on {}", node.name());
    }
    accepted_again(cluster.n1());
    wait_for("both nodes are alive again", || alive(cluster.n1()) == ["n1", "n2"]);
}

fn a_change_without_the_store_fails_soon_and_names_the_store(world: &World) {
    let mut cluster = usual(world);
    let endpoint = cluster.etcd.endpoint();
    cluster.etcd.stop();
    refused_soon(cluster.n1(), &endpoint);
    cluster.etcd.start();
    accepted_again(cluster.n1());
    cluster.n1().ok("endpoint attach --network shop --name c2 --netns /run/netns/c2");
    cluster.n1().ok("endpoint detach --network shop c1");
}

fn a_frozen_store_is_as_good_as_none(world: &World) {
    let mut cluster = usual(world);
    let endpoint = cluster.etcd.endpoint();
    cluster.etcd.freeze();
    refused_soon(cluster.n1(), &endpoint);
    cluster.etcd.thaw();
    // The create that was given up may have been done after all: the name tells.
    wait_for("changes are accepted again", || {
        cluster.n1().ctl("network create after --subnet 10.11.0.0/24").success()
    });
}

fn a_wiped_store_tears_nothing_down_and_takes_no_changes(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (a, _b, address) = cluster.shop();
    let before: Vec<_> = cluster.nodes.iter().map(|node| node.kernel_state()).collect();
    cluster.etcd.wipe();
    let unchanged = |cluster: &Cluster| {
        for (node, before) in cluster.nodes.iter().zip(&before) {
            assert_eq!(before.difference(&node.kernel_state()), "", "on {}", node.name());
        }
        assert!(a.space.ping(&address));
    };
    let refused = |cluster: &Cluster| {
        for node in &cluster.nodes {
            wait_for("a change is refused", || {
                let output = node.ctl("network create later --subnet 10.10.0.0/24");
                output.code == Some(AGAIN) && output.stderr.contains(&cluster.etcd.endpoint())
            });
        }
        assert!(cluster.etcd.keys().keys().all(|key| !key.contains("networks/")), "it stays empty");
    };
    refused(&cluster);
    unchanged(&cluster);
    for index in [0, 1] {
        cluster.kill(index);
        cluster.launch(index);
    }
    refused(&cluster);
    unchanged(&cluster);
}

fn an_agent_starts_without_the_store_and_keeps_what_runs(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (a, _b, address) = cluster.shop();
    let before = cluster.n1().kernel_state();
    cluster.etcd.stop();
    cluster.kill(0);
    cluster.launch(0);
    wait_for("the agent answers", || cluster.n1().ctl("version").success());
    assert_eq!(before.difference(&cluster.n1().kernel_state()), "");
    assert!(a.space.ping(&address));
    cluster.etcd.start();
    accepted_again(cluster.n1());
    assert_eq!(before.difference(&cluster.n1().kernel_state()), "");
}

fn a_dead_node_is_seen_as_dead(world: &World) {
    let mut cluster =
        Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("lease", "2s"));
    wait_for("both nodes are alive", || alive(cluster.n1()) == ["n1", "n2"]);
    cluster.kill(1);
    wait_for("the killed one is dead", || alive(cluster.n1()) == ["n1"]);
    cluster.start(1);
    wait_for("it is alive again", || alive(cluster.n1()) == ["n1", "n2"]);
    world.connect(&cluster.nodes[1], false);
    wait_for("the one that is cut off is dead", || alive(cluster.n1()) == ["n1"]);
    world.connect(&cluster.nodes[1], true);
    wait_for("it is alive again", || alive(cluster.n1()) == ["n1", "n2"]);
    cluster.terminate(1);
    wait_for("one that is stopped leaves at once", || alive(cluster.n1()) == ["n1"]);
}

fn a_dead_node_is_removed_with_what_it_had(world: &World) {
    let mut cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| {
        config.set("lease", "2s").set("rest", "0s")
    });
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("service create web --network shop --replicas 2 --endpoint-mode dnsrr");
    let _stays = n1.attach_with("shop", "w1", "--service web");
    let lost = n2.attach_with("shop", "w2", "--service web");
    wait_for("both nodes are alive", || alive(&n1) == ["n1", "n2"]);
    n1.ok("node drain n2");
    let refused = n1.ctl("node rm n2");
    assert!(refused.code == Some(5) && refused.stderr.contains("n2 is alive"), "{refused}");
    // It is cut off, and its containers go on.
    world.connect(&n2, false);
    wait_for("it is dead", || alive(&n1) == ["n1"]);
    assert_eq!(n1.ctl("endpoint detach w2 --network shop").code, Some(5), "it is another node's");
    assert_eq!(n1.ok("node rm n2").stdout, "n2\n");
    let keys = cluster.etcd.keys();
    assert!(!keys.iter().any(|(key, value)| key.contains("n2") || value.contains("\"n2\"")), "{keys:?}");
    let kept = || n1.ok("-o json network inspect shop").json()[0]["ipv4"]["reserved"].clone();
    assert_eq!(kept(), 1, "its place in the service is free again");
    let checked = n1.ok("ipam check").stdout;
    assert!(checked.contains("0 left"), "{checked}");
    assert_eq!(n1.ctl("node rm n2").code, Some(4));
    // It was not gone for good.
    world.connect(&n2, true);
    wait_for("it is alive again", || alive(&n1) == ["n1", "n2"]);
    wait_for("what it had is unplugged", || !lost.space.try_sh("ip link show eth0").success());
    let anew = n2.attach("shop", "anew");
    assert!(anew.space.reaches("10.9.0.1"));
    assert!(cluster.agent_runs(1));
    n1.ok("ipam check");
}

fn a_store_of_a_newer_version_is_refused(world: &World) {
    let etcd = world.etcd();
    let n1 = world.node("n1");
    etcd.put("netctl/base/cluster", r#"{"schema":99,"id":"0123456789ab"}"#);
    let (keys, kernel) = (etcd.keys(), n1.kernel_state());
    let output = n1.netctld(&Config::etcd(&etcd), &[]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.text().contains("schema 99") && output.text().contains("upgrade"), "{output}");
    assert_eq!(etcd.keys(), keys);
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
}
