//! How full networks are is seen in time: in the metrics, in the API, and by people.

use std::collections::BTreeMap;

use ipnetwork::Ipv4Network;
use serde_json::{Value, json};
use world::{Node, NodeOptions, World, wait_for};

use crate::cluster::Cluster;

crate::tests![
    a_network_that_fills_is_seen_over_the_socket_and_the_port,
    the_capacity_of_subnets_and_nodes_is_what_the_store_has,
    what_somebody_breaks_is_counted_and_an_outage_is_seen,
    an_address_that_rests_and_is_kept_again_is_counted_once,
    a_network_that_services_fill_is_told_though_nobody_uses_it,
];

/// Where the agents serve their metrics over TCP, each in its machine.
const PORT: &str = "127.0.0.1:9980";

/// The samples of a text of metrics, each with its labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with("# EOF\n"), "it broke off: {text}");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            (name.to_owned(), value.parse().unwrap_or_else(|error| panic!("{line}: {error}")))
        })
        .collect()
}

/// Asks as people do.
#[track_caller]
fn curl(node: &Node, arguments: &[&str]) -> String {
    let mut command = node.space.command("curl");
    command.args(["--silent", "--show-error", "--max-time", "20"]).args(arguments);
    let output = world::output(&mut command, world::DEADLINE);
    assert!(output.success(), "curl {arguments:?} on {}: {output}", node.name());
    output.stdout
}

/// The metrics over the agent's socket.
#[track_caller]
pub(crate) fn socket(node: &Node) -> BTreeMap<String, f64> {
    let path = node.socket();
    let path = path.to_str().expect("a path in letters");
    samples(&curl(node, &["--fail", "--unix-socket", path, "http://localhost/metrics"]))
}

/// The metrics over TCP.
#[track_caller]
fn port(node: &Node) -> BTreeMap<String, f64> {
    samples(&curl(node, &["--fail", &format!("http://{PORT}/metrics")]))
}

/// One network as the API shows it.
#[track_caller]
fn view(node: &Node, network: &str) -> Value {
    node.ok(&format!("-o json network inspect {network}")).json().as_array().unwrap()[0].clone()
}

/// The last column of a network's line.
#[track_caller]
fn mark(node: &Node, network: &str) -> String {
    let table = node.ok(&format!("network ls --filter name={network}")).stdout;
    let last = table.lines().nth(1).unwrap().rsplit("  ").next().unwrap();
    // Where it grew, it is said when it will be full: that changes every second.
    last.split(" full in ").next().unwrap().trim().to_owned()
}

/// A sample of the IPv4 addresses of the network `shop`.
fn shop(metrics: &BTreeMap<String, f64>, name: &str, more: &str) -> Option<f64> {
    metrics.get(&format!("netctl_network_{name}{{network=\"shop\",family=\"ipv4\"{more}}}")).copied()
}

fn configured(world: &World) -> Cluster {
    Cluster::with(world, 2, &NodeOptions::default(), |config| {
        let config = config.set("metrics", PORT).set("rest", "0s");
        config.raw("address_warning", "50").raw("address_alarm", "75")
    })
}

/// Waits until the metrics of a node say what its API says; both ways to them say the same.
#[track_caller]
fn metrics_are_the_ledger(node: &Node, level: f64) {
    let usage = view(node, "shop")["ipv4"].clone();
    let number = |what: &str| usage[what].as_f64();
    for ask in [socket, port] {
        wait_for("the metrics are the ledger", || {
            let metrics = ask(node);
            let states = ["endpoints", "services", "resting", "reserved", "free"];
            let state = |state: &str| shop(&metrics, "addresses", &format!(",state=\"{state}\""));
            assert_eq!(states.map(state).into_iter().flatten().sum::<f64>(), 13.0, "{metrics:?}");
            states.iter().all(|name| state(name) == number(name))
                && shop(&metrics, "usable_addresses", "") == number("usable")
                && shop(&metrics, "address_level", "") == Some(level)
        });
    }
}

fn a_network_that_fills_is_seen_over_the_socket_and_the_port(world: &World) {
    let cluster = configured(world);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/28");
    // Nobody uses it yet: the API says how full it is, and nothing where that leads.
    assert_eq!(view(n1, "shop")["ipv4"]["level"], "fine");
    assert_eq!(shop(&socket(n1), "usable_addresses", ""), None);
    n1.attach("shop", "a");
    metrics_are_the_ledger(n1, 0.0);
    assert_eq!(mark(n1, "shop"), "7%");
    n1.ok("service create web --network shop --replicas 3");
    n2.attach("shop", "b");
    n2.attach("shop", "c");
    metrics_are_the_ledger(n1, 1.0);
    assert_eq!(mark(n1, "shop"), "53% !");
    let endpoints = "netctl_endpoints{network=\"shop\"}";
    assert_eq!((socket(n1)[endpoints], socket(n2)[endpoints]), (1.0, 2.0));
    let log = || std::fs::read_to_string(n1.dir().join("netctld.log")).unwrap();
    wait_for("it is told", || log().contains("network runs out of addresses"));
    for name in ["d", "e", "f"] {
        n1.attach("shop", name);
    }
    metrics_are_the_ledger(n2, 2.0);
    assert_eq!(mark(n2, "shop"), "76% !!");
    wait_for("growth leads somewhere", || {
        let (seconds, shown) =
            (shop(&socket(n1), "full_in_seconds", ""), view(n1, "shop")["ipv4"]["full_in"].clone());
        seconds.is_some_and(|seconds| seconds > 0.0) && shown.as_u64().is_some_and(|shown| shown > 0)
    });
    assert!(n1.ok("network inspect shop").stdout.contains("(76% used, alarm, full in "));
    assert!(n1.ok("network ls").stdout.contains("76% !! full in "));
    // And back, or on: both leave room.
    n1.ok("endpoint detach --network shop d e");
    n1.ok("service rm web");
    metrics_are_the_ledger(n1, 0.0);
    assert_eq!(mark(n1, "shop"), "30%");
    // Another agent's levels are its own; of the network nobody there uses anything.
    let n3 = world.node("n3");
    let config = world::Config::etcd(&cluster.etcd).raw("address_warning", "20");
    let _agent = n3.agent(&config.raw("address_alarm", "30"));
    assert_eq!(mark(&n3, "shop"), "30% !!");
    assert_eq!(
        (&view(&n3, "shop")["ipv4"]["level"], mark(n1, "shop").as_str()),
        (&json!("alarm"), "30%")
    );
    assert!(view(&n3, "shop")["ipv4"]["full_in"].is_null());
    assert_eq!(socket(&n3).get("netctl_nodes{state=\"alive\"}"), Some(&3.0));
    the_port_has_nothing_else(n1, &n3);
}

#[track_caller]
fn the_port_has_nothing_else(n1: &Node, without: &Node) {
    let status = |path: &str| {
        curl(
            n1,
            &["--output", "/dev/null", "--write-out", "%{http_code}", &format!("http://{PORT}{path}")],
        )
    };
    let paths = ["/metrics", "/v1/networks", "/", "/metrics/x"];
    assert_eq!(paths.map(status), ["200", "404", "404", "404"]);
    // Nobody listens where nothing is configured.
    let mut refused = without.space.command("curl");
    refused.args(["--silent", &format!("http://{PORT}/metrics")]);
    assert_eq!(world::output(&mut refused, world::DEADLINE).code, Some(7));
}

/// Addresses of the subnets of the next test that nobody gets.
const NOBODYS: [&str; 7] =
    ["10.9.0.0", "10.9.0.1", "10.9.0.9", "10.9.0.255", "10.10.0.0", "10.10.0.1", "10.10.0.15"];

fn the_capacity_of_subnets_and_nodes_is_what_the_store_has(world: &World) {
    let cluster = configured(world);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/24 --reserve 10.9.0.9 --subnet fd00:9::/64");
    n1.ok("network expand shop --subnet 10.10.0.0/28");
    n1.attach_with("shop", "a", "--ip 10.10.0.7");
    n1.attach("shop", "b");
    n2.attach("shop", "c");
    n1.ok("service create web --network shop --replicas 4");
    let keys = cluster.etcd.keys();
    let members = format!("netctl/members/{}/", n1.network_id("shop"));
    let listed = |prefix: &str| -> Vec<(String, String)> {
        let prefix = format!("{members}{prefix}");
        let under = keys.iter().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?, value)));
        under.map(|(key, value)| (key.to_owned(), value.clone())).collect()
    };
    let (held, blocks) = (listed("addresses/"), listed("blocks/"));
    for node in [n1, n2] {
        let shop = view(node, "shop");
        let sum = |part: &str| -> u64 {
            let subnets = shop["subnet_usage"].as_array().unwrap().iter();
            let ipv4 = subnets.filter(|subnet| subnet["cidr"].as_str().unwrap().contains('.'));
            ipv4.map(|subnet| subnet[part].as_u64().unwrap()).sum()
        };
        for part in ["usable", "endpoints", "services", "resting"] {
            assert_eq!(Some(sum(part)), shop["ipv4"][part].as_u64(), "{part}: {shop}");
        }
        let free = shop["ipv4"]["free"].as_u64().unwrap() + shop["ipv4"]["reserved"].as_u64().unwrap();
        assert_eq!((sum("free"), sum("excluded")), (free, 1));
        assert_eq!(shop["endpoints"], 3);
        let small = &shop["subnet_usage"][2];
        assert_eq!((&small["cidr"], &small["endpoints"]), (&json!("10.10.0.0/28"), &json!(1)));
        assert_eq!(small["usable"], 13);
        for (index, (name, endpoints)) in [("n1", 2), ("n2", 1)].into_iter().enumerate() {
            let usage = &shop["node_usage"][index];
            assert_eq!(usage["node"], name);
            for (family, mark) in [("ipv4", '.'), ("ipv6", ':')] {
                let own = blocks
                    .iter()
                    .filter(|(range, owner)| range.contains(mark) && owner.trim_matches('"') == name);
                assert_eq!(usage[family]["blocks"], own.count(), "{name} {family}: {shop}");
                assert_eq!(usage[family]["endpoints"], endpoints, "{name} {family}: {shop}");
            }
            let own = blocks
                .iter()
                .filter(|(range, owner)| range.contains('.') && owner.trim_matches('"') == name);
            let inside = own.flat_map(|(range, _)| range.parse::<Ipv4Network>().unwrap().iter());
            let free = inside.map(|address| address.to_string()).filter(|address| {
                !NOBODYS.contains(&address.as_str()) && !held.iter().any(|(taken, _)| taken == address)
            });
            let free = free.count();
            assert!(free > 0, "{name}: {shop}");
            assert_eq!(usage["ipv4"]["free"], free, "{name}: {shop}");
        }
        let ipv4 = held.iter().filter(|(address, _)| address.contains('.')).count() as u64;
        assert_eq!(sum("endpoints") + sum("services"), ipv4);
    }
    let text = n1.ok("network inspect shop").stdout;
    assert!(text.contains("10.10.0.0/28: 13 usable, 1 endpoints, "), "{text}");
    assert!(text.contains("n2: IPv4 1 endpoints, "), "{text}");
}

fn what_somebody_breaks_is_counted_and_an_outage_is_seen(world: &World) {
    let mut cluster = configured(world);
    cluster.n1().ok("network create shop --subnet 10.9.0.0/24");
    cluster.n1().attach("shop", "a");
    let repairs = |node: &Node| socket(node)["netctl_reconcile_repairs_total"];
    let runs = socket(cluster.n1())["netctl_reconcile_runs_total"];
    assert!(runs >= 1.0);
    assert_eq!(repairs(cluster.n1()), 0.0, "what the agent did itself counts");
    let sandbox = cluster.n1().sandbox("shop");
    sandbox
        .sh("ip route del unreachable 10.9.0.0/24 && ip route add unreachable 10.77.0.0/24 proto 110");
    wait_for("both are put right", || repairs(cluster.n1()) == 2.0);
    sandbox.sh("nft delete table inet netctl");
    wait_for("the table is back", || repairs(cluster.n1()) == 3.0);
    assert!(socket(cluster.n1())["netctl_reconcile_runs_total"] > runs);
    let connected = |node: &Node| port(node)["netctl_store_connected"];
    let failures = |node: &Node| port(node)["netctl_store_request_failures_total"];
    let before = failures(cluster.n1());
    assert_eq!(connected(cluster.n1()), 1.0);
    cluster.etcd.stop();
    wait_for("the outage is seen", || connected(cluster.n1()) == 0.0);
    assert_eq!(cluster.n1().ctl("network create more").code, Some(6));
    nothing_is_planned_without_numbers(cluster.n1());
    assert!(failures(cluster.n1()) > before);
    // What is known goes on being told.
    assert_eq!(shop(&port(cluster.n1()), "addresses", ",state=\"endpoints\""), Some(1.0));
    cluster.etcd.start();
    wait_for("its end is seen", || connected(cluster.n1()) == 1.0);
}

/// The store is away: what it last said of the network is known, but not how much of it is left.
#[track_caller]
fn nothing_is_planned_without_numbers(node: &Node) {
    let file = node.dir().join("stack.yml");
    let text = "services: {a: {networks: [shop]}}\nnetworks: {shop: {external: true}}\n";
    std::fs::write(&file, text).unwrap();
    assert!(node.ok("network ls").stdout.contains("shop"));
    let plan = node.ctl(&format!("plan {}", file.display()));
    assert_eq!((plan.code, plan.stdout.as_str()), (Some(6), ""), "{plan}");
    let told = ["the use of network shop is not known now", "its store (etcd"];
    assert!(told.iter().all(|told| plan.stderr.contains(told)), "{plan}");
}

fn an_address_that_rests_and_is_kept_again_is_counted_once(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config.set("rest", "1h"));
    let n1 = cluster.n1();
    // Thirteen: one of the service's own, and twelve for its containers.
    n1.ok("network create shop --subnet 10.9.0.0/28");
    n1.ok("service create web --network shop --replicas 12");
    n1.attach_with("shop", "a", "--service web");
    n1.attach_with("shop", "b", "--service web");
    n1.ok("endpoint detach --network shop a");
    // It rests, and the service is to have another: together one more than there are.
    let usage = view(n1, "shop")["ipv4"].clone();
    assert_eq!(
        (&usage["resting"], &usage["reserved"], &usage["free"]),
        (&json!(1), &json!(11), &json!(0))
    );
    let states = ["endpoints", "services", "resting", "reserved", "free"];
    wait_for("each address has one state", || {
        let metrics = socket(n1);
        let state = |state: &&str| shop(&metrics, "addresses", &format!(",state=\"{state}\""));
        let counts: Vec<f64> = states.iter().filter_map(state).collect();
        counts.iter().sum::<f64>() == 13.0 && counts == [1.0, 1.0, 1.0, 10.0, 0.0]
    });
}

fn a_network_that_services_fill_is_told_though_nobody_uses_it(world: &World) {
    let cluster = Cluster::new(world, 2);
    let log = |node: &Node| std::fs::read_to_string(node.dir().join("netctld.log")).unwrap();
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/28");
    // Thirteen usable: ten are no warning, eleven are, thirteen an alarm; each is told once.
    let told = |node: &Node| {
        let log = log(node);
        ["network runs out of addresses", "network is about to be full"].map(|t| log.matches(t).count())
    };
    n1.ok("service create a --network shop --replicas 9");
    assert_eq!(told(n1), [0, 0]);
    n1.ok("service scale a=10");
    n1.ok("service update a --label x=y");
    assert_eq!((told(n1), told(n2)), ([1, 0], [0, 0]));
    let file = n2.dir().join("stack.yml");
    let text = "services: {b: {networks: [shop]}}\nnetworks: {shop: {external: true}}\n";
    std::fs::write(&file, text).unwrap();
    n2.ok(&format!("plan {} --reserve deploy", file.display()));
    assert_eq!((told(n1), told(n2)), ([1, 0], [0, 1]));
    assert_eq!((mark(n1, "shop"), mark(n2, "shop")), ("100% !!".to_owned(), "100% !!".to_owned()));
}
