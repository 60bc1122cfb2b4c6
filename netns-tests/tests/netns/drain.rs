//! Drains: who is told, who is waited for, and what is left of it.

use serde_json::{Value, json};
use world::{Container, Node, NodeOptions, World, binary, wait_for};

use crate::cluster::{Cluster, alive};

crate::tests![
    an_endpoint_that_nobody_balances_to_is_drained_at_once,
    a_drain_waits_for_every_live_node_and_its_last_connection,
    a_drained_node_is_waited_for_anew_each_time,
    what_was_acknowledged_goes_with_the_endpoint,
    what_is_activated_takes_connections_again,
    the_example_replaces_containers_in_the_order_that_is_asked_for,
];

/// Two machines whose leases outlast the test, with an endpoint of the service `web` on each.
fn ground(world: &World, options: &str) -> (Cluster, [Container; 2]) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("lease", "120s"));
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok(&format!("service create web --network shop --replicas 2 {options}"));
    let web = |index: usize| {
        cluster.nodes[index].attach_with("shop", &format!("w{}", index + 1), "--service web")
    };
    let containers = [web(0), web(1)];
    wait_for("both are known to live", || alive(cluster.n1()) == ["n1", "n2"]);
    (cluster, containers)
}

fn endpoint(node: &Node, name: &str) -> Value {
    node.ok(&format!("-o json endpoint inspect {name} --network shop")).json()[0].clone()
}

/// Writes what a node would of an endpoint that it has drained.
fn acknowledge(cluster: &Cluster, endpoint: &str, node: &str, revision: u64, connections: u64) {
    let key = ack(cluster, endpoint, node);
    let value = json!({"revision": revision, "connections": connections});
    cluster.etcd.put(&key, &value.to_string());
}

fn ack(cluster: &Cluster, endpoint: &str, node: &str) -> String {
    let n1 = cluster.n1();
    let id = self::endpoint(n1, endpoint)["id"].as_str().unwrap().to_owned();
    format!("netctl/members/{}/acks/{id}/{node}", n1.network_id("shop"))
}

/// Later than anything that was written.
const LATE: u64 = u64::MAX / 2;

/// Waits in vain for a drain; gives what is said of it.
#[track_caller]
fn in_vain(node: &Node, drain: &str) -> String {
    let output = node.ctl(&format!("{drain} --wait --timeout 1s"));
    assert_eq!(output.code, Some(6), "{output}");
    output.stderr
}

fn an_endpoint_that_nobody_balances_to_is_drained_at_once(world: &World) {
    let (cluster, _web) = ground(world, "--endpoint-mode dnsrr");
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let view = |body: &Value| (body["done"].clone(), body["endpoints"].clone());
    let look = |path: &str| n1.client().call("GET", path, None).unwrap();
    assert_eq!(view(&look("/v1/endpoints/w1/drain").body), (json!(false), json!(0)));
    assert_eq!(view(&look("/v1/services/web/drain").body), (json!(false), json!(0)));
    // Any node can drain it.
    n2.ok("endpoint drain w1 --wait");
    n2.ok("endpoint drain w1 --network shop");
    assert_eq!(endpoint(n1, "w1")["state"], "draining");
    assert!(n1.ok("endpoint ls").stdout.contains("draining"));
    wait_for("it is out", || n1.ok("service inspect web").stdout.contains("out (draining), weight 0"));
    assert!(n1.ok("service ls").stdout.contains("1/2"));
    assert_eq!(view(&look("/v1/endpoints/w1/drain").body), (json!(true), json!(1)));
    assert_eq!(endpoint(n1, "w2").get("state"), None, "the other one is ready");
    n1.ok("service drain web --wait");
    assert_eq!(view(&look("/v1/services/web/drain").body), (json!(true), json!(2)));
    n1.ok("endpoint detach w1");
    assert_eq!(look("/v1/endpoints/w1/drain").status, 404);
    for line in ["endpoint drain w1", "service drain none", "node drain n9", "node activate n9"] {
        assert_eq!(n1.ctl(line).code, Some(4), "{line}");
    }
}

fn a_drain_waits_for_every_live_node_and_its_last_connection(world: &World) {
    let (mut cluster, _web) = ground(world, "");
    let n1 = cluster.nodes[0].clone();
    // It lives, and can acknowledge nothing.
    cluster.freeze(1);
    let late = in_vain(&n1, "endpoint drain w1");
    assert!(late.contains("not acknowledged yet by") && late.contains("n2"), "{late}");
    assert_eq!(endpoint(&n1, "w1")["state"], "draining");
    acknowledge(&cluster, "w1", "n1", LATE, 0);
    // What it had applied before the drain is not enough.
    acknowledge(&cluster, "w1", "n2", 1, 0);
    let late = in_vain(&n1, "endpoint drain w1");
    assert!(late.contains("yet by n2;"), "only n2 is late: {late}");
    acknowledge(&cluster, "w1", "n2", LATE, 2);
    let open = in_vain(&n1, "endpoint drain w1");
    assert!(open.contains("2 open connection(s)") && !open.contains("n2"), "{open}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| n1.ctl("endpoint drain w1 --wait"));
        acknowledge(&cluster, "w1", "n2", LATE, 0);
        let output = waiting.join().unwrap();
        assert!(output.success() && output.stdout == "w1\n", "{output}");
    });
    // The other endpoint of the service is for itself.
    let late = in_vain(&n1, "service drain web");
    assert!(late.contains("n2"), "{late}");
    for node in ["n1", "n2"] {
        acknowledge(&cluster, "w2", node, LATE, 0);
    }
    assert_eq!(n1.ok("-o json service drain web --wait").json()[0]["endpoints"], 2);
}

fn a_drained_node_is_waited_for_anew_each_time(world: &World) {
    let (mut cluster, _web) = ground(world, "");
    let n1 = cluster.nodes[0].clone();
    cluster.freeze(1);
    let is_drained = || n1.ok("-o json node inspect n1").json()[0]["drained"] == true;
    for _ in 0..2 {
        // What was acknowledged of an earlier drain does not count.
        let late = in_vain(&n1, "node drain n1");
        assert!(late.contains("n2") && is_drained(), "{late}");
        for node in ["n1", "n2"] {
            acknowledge(&cluster, "w1", node, LATE, 0);
        }
        // It is drained already: nobody needs to acknowledge that again.
        n1.ok("node drain n1 --wait");
        let ls = n1.ok("node ls").stdout;
        let row: Vec<_> = ls.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row[..3], ["n1*", "alive", "yes"]);
        n1.ok("node activate n1");
        wait_for("the node is active", || !is_drained());
        assert_eq!(endpoint(&n1, "w1").get("state"), None, "its endpoints are as they were");
    }
    // Also when somebody does not see that it was active meanwhile.
    cluster.thaw(1);
    n1.ok("node drain n1 --wait");
    cluster.freeze(1);
    n1.ok("node activate n1");
    n1.ok("node drain n1");
    cluster.thaw(1);
    n1.ok("node drain n1 --wait");
    n1.ok("node activate n1");
    let look = n1.client().call("GET", "/v1/nodes/n1/drain", None).unwrap();
    assert_eq!((&look.body["done"], &look.body["endpoints"]), (&json!(false), &json!(0)));
}

fn what_was_acknowledged_goes_with_the_endpoint(world: &World) {
    let (cluster, _web) = ground(world, "");
    let n1 = cluster.n1();
    n1.ok("endpoint drain w1");
    for node in ["n1", "n2", "n3"] {
        acknowledge(&cluster, "w1", node, LATE, 1);
    }
    n1.ok("ipam check");
    let key = ack(&cluster, "w1", "n3");
    let acks = || cluster.etcd.keys().into_keys().filter(|key| key.contains("/acks/")).count();
    n1.ok("endpoint detach w1");
    assert_eq!(acks(), 0);
    cluster.etcd.put(&key, r#"{"revision":7,"connections":0}"#);
    let found = n1.ctl("ipam check");
    assert!(found.code == Some(1) && found.stdout.contains("leaked acknowledgement"), "{found}");
    n1.ok("ipam check --repair");
    assert_eq!(acks(), 0);
}

fn what_is_activated_takes_connections_again(world: &World) {
    let (cluster, _web) = ground(world, "");
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let weights = || -> Vec<u64> {
        let service = n1.ok("-o json service inspect web").json();
        let backends = service[0]["backends"].as_array().unwrap().iter();
        backends.map(|backend| backend["weight"].as_u64().unwrap()).collect()
    };
    n1.ok("endpoint drain w1 --wait");
    wait_for("it is out", || weights() == [0, 1]);
    // From any node; what is not drained stays as it is.
    assert_eq!(n2.ok("endpoint activate w1 w2").stdout, "w1\nw2\n");
    assert_eq!(endpoint(n1, "w1").get("state"), None, "it is ready, as a new one would be");
    wait_for("it is in", || weights() == [1, 1]);
    n1.ok("service drain web --wait");
    wait_for("both are out", || weights() == [0, 0]);
    assert_eq!(n1.ok("service activate web").stdout, "web\n");
    wait_for("both are in", || weights() == [1, 1]);
    // Who is to be looked after proves itself first.
    n1.ok("service update web --health-tcp 80 --health-interval 1s --health-start-period 1h");
    n1.ok("endpoint drain w1");
    n1.ok("endpoint activate w1");
    assert_eq!(endpoint(n1, "w1")["state"], "pending");
    // A drain after that is another one.
    n1.ok("endpoint drain w1 --wait");
    assert_eq!(endpoint(n1, "w1")["state"], "draining");
}

fn the_example_replaces_containers_in_the_order_that_is_asked_for(world: &World) {
    let (mut cluster, _web) = ground(world, "");
    let n1 = cluster.nodes[0].clone();
    let _containers = ["w3", "w4", "w5"].map(|name| n1.container(name));
    let (log, netctl) = (n1.dir().join("log"), binary("netctl"));
    let (log, path, socket) = (log.display(), netctl.parent().unwrap().display(), n1.socket());
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/replace-containers");
    let replace = |options: &str| {
        let attach = "netctl endpoint attach --network shop --service web --netns /run/netns/$NAME";
        let detach = "netctl endpoint detach --network shop $NAME";
        let output = n1.space.try_sh(&format!(
            "export PATH={path}:$PATH NETCTL_SOCKET={}
             for option in {options}; do set -- \"$@\" \"$option\"; done
             pair=$1
             shift
             : > {log}
             {example} \"$@\" shop 'echo + $NAME >> {log}; {attach} --name $NAME' \\
                 'echo - $NAME >> {log}; {detach}' $pair
             cat {log}",
            socket.display()
        ));
        assert!(output.success(), "{output}");
        output
    };
    let order = |output: &world::Output| -> Vec<String> {
        let steps = output.stdout.lines().filter(|line| line.starts_with(['+', '-']));
        steps.map(str::to_owned).collect()
    };
    assert_eq!(order(&replace("w3=w1")), ["+ w3", "- w1"]);
    assert_eq!(order(&replace("w4=w3 --order stop-first")), ["- w3", "+ w4"]);
    // What is not drained in time is stopped all the same.
    cluster.freeze(1);
    let late = replace("w5=w4 --timeout 1s");
    assert_eq!(order(&late), ["+ w5", "- w4"]);
    assert!(late.stderr.contains("w4 is stopped although its drain is not at its end"), "{late}");
    assert_eq!(n1.ctl("endpoint inspect w4").code, Some(4));
}
