//! The agent ends, at any time and in any way.

use std::time::Duration;

use serde_json::json;
use world::{Config, Load, Stream, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::engine::lb;
use crate::shop::{Backend, call, open, plug, requests};

crate::tests![
    a_killed_and_restarted_agent_loses_no_packet_and_changes_nothing,
    a_stopped_agent_leaves_the_data_path,
    an_agent_says_ready_and_stopping,
    cleanup_leaves_the_node_as_it_was,
    cleanup_beside_a_running_agent_is_refused_and_removes_nothing,
    who_takes_connections_on_another_node_is_reached_before_it_does,
    what_was_detached_while_the_agent_was_away_is_collected,
];

fn a_killed_and_restarted_agent_loses_no_packet_and_changes_nothing(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (a, b, address) = cluster.shop();
    let before: Vec<_> = cluster.nodes.iter().map(|node| node.kernel_state()).collect();
    let stream = Stream::start(&a.space, &b.space, &address, 5000);
    stream.wait(2000);
    for index in [0, 1] {
        cluster.kill(index);
        stream.wait(2000);
        cluster.start(index);
        stream.wait(2000);
    }
    let report = stream.stop();
    assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
    assert!(report.per_second >= 4900, "{report:?}");
    for (node, before) in cluster.nodes.iter().zip(before) {
        assert_eq!(before.difference(&node.kernel_state()), "", "on {}", node.name());
    }
}

fn a_stopped_agent_leaves_the_data_path(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (a, b, address) = cluster.shop();
    let stream = Stream::start(&a.space, &b.space, &address, 5000);
    stream.wait(1000);
    cluster.terminate(0);
    cluster.terminate(1);
    stream.wait(5000);
    let report = stream.stop();
    assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
}

fn an_agent_says_ready_and_stopping(world: &World) {
    let n1 = world.node("n1");
    let mut agent = n1.agent(&Config::embedded());
    agent.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(agent.told("STOPPING=1"), "{}", agent.log_tail());
    agent.terminate();
    assert_eq!(n1.ctl("version").code, Some(3));
}

fn cleanup_leaves_the_node_as_it_was(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let n1 = cluster.nodes[0].clone();
    cluster.kill(0);
    assert!(n1.netctld(&cluster.configs[0], &["--cleanup"]).success());
    let (c1, c2) = (n1.container("c1"), n1.container("c2"));
    n1.space.sh("nft add table inet admin");
    // Forwarding stays on: others may need it by then.
    n1.space.sysctl("net/ipv4/ip_forward", "1");
    n1.space.sysctl("net/ipv6/conf/all/forwarding", "1");
    let before = n1.kernel_state();
    cluster.start(0);
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create books --subnet 10.10.0.0/24 --subnet fd00:10::/64 --internal");
    n1.ok(&format!("endpoint attach --network shop --name c1 --netns {}", c1.path));
    n1.ok(&format!("endpoint attach --network books --name c2 --netns {}", c2.path));
    n1.ok(&format!("endpoint attach --network books --name c3 --netns {}", c1.path));
    assert_ne!(before.difference(&n1.kernel_state()), "");
    cluster.terminate(0);
    let output = n1.netctld(&cluster.configs[0], &["--cleanup"]);
    assert!(output.success(), "{output}");
    assert_eq!(before.difference(&n1.kernel_state()), "");
    let again = n1.netctld(&cluster.configs[0], &["--cleanup"]);
    assert!(again.success(), "{again}");
}

fn cleanup_beside_a_running_agent_is_refused_and_removes_nothing(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.attach("shop", "a");
    let before = n1.kernel_state();
    let output = n1.netctld(&cluster.configs[0], &["--cleanup"]);
    assert_eq!(output.code, Some(1), "{output}");
    for word in [n1.socket().to_str().unwrap(), "stop it"] {
        assert!(output.stderr.contains(word), "{word}: {output}");
    }
    assert_eq!(before.difference(&n1.kernel_state()), "");
}

fn who_takes_connections_on_another_node_is_reached_before_it_does(world: &World) {
    let mut cluster = Cluster::with(world, 2, &world::NodeOptions::default(), |config| {
        config.set("lb", &lb()).set("lease", "60s")
    });
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    let vips = open(&n1, json!({}));
    let _near = Backend::start(&n1, "b1");
    let clients: Vec<_> = (0..2).map(|number| plug(&n1, &format!("client{number}"), None)).collect();
    let _others: Vec<_> = (0..60).map(|number| plug(&n1, &format!("c{number}"), None)).collect();
    let loads: Vec<_> = clients
        .iter()
        .zip(&vips)
        .map(|(client, vip)| {
            Load::start([&client.container.space], requests(vip, Duration::from_secs(5)))
        })
        .collect();
    loads.iter().for_each(|load| load.goes_on(5, "the first backend answers"));
    cluster.kill(0);
    // The agent finds much to do at once: all its containers get a subnet, and another node has a backend.
    call(&n2, "POST", "/v1/networks/shop/subnets", &json!({"subnets": ["10.10.0.0/24"]}));
    let _far = Backend::start(&n2, "b2");
    cluster.start(0);
    for load in loads {
        wait_for("the other node's backend answers", || load.served().contains_key("b2"));
        let (done, failures) = load.finish();
        assert!(failures.is_empty(), "{} of {done} requests failed: {failures:?}", failures.len());
    }
}

fn what_was_detached_while_the_agent_was_away_is_collected(world: &World) {
    let mut cluster =
        Cluster::with(world, 1, &world::NodeOptions::default(), |config| config.set("rest", "0s"));
    let n1 = cluster.nodes[0].clone();
    n1.ok(&format!("network create shop {DUAL}"));
    let keys = cluster.etcd.lasting_keys();
    n1.attach("shop", "a");
    cluster.kill(0);
    n1.space.sh("ip netns del a");
    cluster.start(0);
    wait_for("the endpoint of a namespace that is gone is released", || {
        n1.ok("-o json endpoint ls").json().as_array().is_some_and(Vec::is_empty)
    });
    wait_for("nothing is left in the store", || cluster.etcd.lasting_keys() == keys);
}
