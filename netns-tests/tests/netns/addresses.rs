//! Who gets which address.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use world::{Client, Config, Node, NodeOptions, Output, World, wait_for};

use crate::cluster::Cluster;

crate::tests![
    ten_thousand_concurrent_attaches_never_share_an_address_and_leak_nothing,
    many_callers_with_one_request_get_one_endpoint,
    a_requested_address_is_given_and_not_given_twice,
    a_freed_address_rests,
    a_full_subnet_is_told_and_heals,
    two_subnets_give_what_both_have,
    the_default_pool_skips_what_is_in_use,
    the_pool_gives_a_subnet_for_what_is_expected,
    a_plan_knows_how_large_the_subnets_of_the_pool_are,
];

/// How many attaches the large test does.
const ATTACHES: usize = 10_000;
/// How many namespaces each of its nodes has.
const NAMESPACES: usize = 120;
/// How many callers each of its nodes has.
const CALLERS: usize = 8;

/// Who holds an address now: `node/namespace`, by address.
type Held = Mutex<BTreeMap<String, String>>;

fn ten_thousand_concurrent_attaches_never_share_an_address_and_leak_nothing(world: &World) {
    let cluster = Cluster::with(world, 3, &NodeOptions::default(), |config| {
        config.set("rest", "1s").set("log", "info")
    });
    cluster.n1().ok("network create shop --subnet 10.9.0.0/20");
    for node in &cluster.nodes {
        (0..NAMESPACES).for_each(|index| drop(node.container(&format!("c{index}"))));
    }
    // One endpoint that stays keeps the sandbox: without any, it goes after a while.
    for node in &cluster.nodes {
        node.attach("shop", &format!("{}-stays", node.name()));
    }
    let keys = cluster.etcd.lasting_keys();
    // Routes to blocks stay as long as the blocks, and so do the programs' ways.
    let of_block = |line: &str| line.contains("/25 via ") || line.starts_with("way ");
    let shape = |node: &Node| node.kernel_state().shape().without(of_block);
    let before: Vec<_> = cluster.nodes.iter().map(|node| shape(node)).collect();
    let (held, done) = (Held::default(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for node in &cluster.nodes {
            for caller in 0..CALLERS {
                let (held, done) = (&held, &done);
                scope.spawn(move || allocate(node, caller, held, done));
            }
        }
    });
    wait_for("the store is as before", || cluster.etcd.lasting_keys() == keys);
    for (node, before) in cluster.nodes.iter().zip(before) {
        let difference = || before.difference(&shape(node));
        let same = world::eventually(world::DEADLINE, || difference().is_empty());
        assert!(same, "on {}: {}", node.name(), difference());
    }
}

/// Attaches and detaches until all callers together have done their number.
fn allocate(node: &Node, caller: usize, held: &Held, done: &AtomicUsize) {
    let client = node.client();
    let own: Vec<_> = (caller..NAMESPACES).step_by(CALLERS).collect();
    while done.load(Ordering::Relaxed) < ATTACHES {
        for index in &own {
            done.fetch_add(1, Ordering::Relaxed);
            let holder = format!("{}-c{index}", node.name());
            let address = attach(&client, &holder, *index);
            let earlier = held.lock().unwrap().insert(address.clone(), holder.clone());
            assert_eq!(earlier, None, "{address} was given to {holder} too");
        }
        for index in &own {
            let holder = format!("{}-c{index}", node.name());
            held.lock().unwrap().retain(|_, other| *other != holder);
            let path = format!("/v1/endpoints/{holder}?network=shop");
            let answer = client.call("DELETE", &path, None).unwrap();
            assert!(answer.status < 300, "{holder}: {answer:?}");
        }
    }
}

fn attach(client: &Client, name: &str, index: usize) -> String {
    let request = json!({"network": "shop", "name": name, "netns": format!("/run/netns/c{index}")});
    let answer = client.call("POST", "/v1/endpoints", Some(&request)).unwrap();
    assert_eq!(answer.status, 201, "{name}: {answer:?}");
    answer.body["addresses"][0].as_str().unwrap().to_owned()
}

fn many_callers_with_one_request_get_one_endpoint(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.container("c1");
    let request = json!({"network": "shop", "name": "c1", "netns": "/run/netns/c1"});
    let answers: Vec<_> = std::thread::scope(|scope| {
        let call = || n1.client().call("POST", "/v1/endpoints", Some(&request)).unwrap();
        let callers: Vec<_> = (0..32).map(|_| scope.spawn(call)).collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|answer| matches!(answer.status, 200 | 201)), "{answers:?}");
    assert!(answers.iter().all(|answer| answer.body["id"] == answers[0].body["id"]), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
}

fn a_requested_address_is_given_and_not_given_twice(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/24 --ip-range 10.9.0.128/25 --reserve 10.9.0.130");
    n1.attach_with("shop", "a", "--ip 10.9.0.77");
    assert_eq!(n2.addresses("shop", "a"), ["10.9.0.77"]);
    let c2 = n2.container("c2");
    let again = format!("endpoint attach --network shop --name b --netns {} --ip 10.9.0.77", c2.path);
    let keys = cluster.etcd.keys();
    let output = n2.ctl(&again);
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains("10.9.0.77"), "{output}");
    assert_eq!(cluster.etcd.keys(), keys);
    for name in ["c", "d", "e"] {
        n2.attach("shop", name);
        let address = n2.addresses("shop", name)[0].clone();
        let last: u8 = address.rsplit('.').next().unwrap().parse().unwrap();
        assert!(last >= 128 && last != 130, "{address}");
        n2.ok(&format!("endpoint detach --network shop {name}"));
    }
    n1.ok("endpoint detach --network shop a");
    n1.ok("network rm shop");
    wait_for("nothing of the network is left", || {
        cluster
            .nodes
            .iter()
            .all(|node| !node.kernel_state().namespaces().iter().any(|name| name.starts_with("netctl-")))
    });
}

fn a_freed_address_rests(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "5s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    // Three addresses for containers: .2, .3 and .4 is reserved; .5 and .6 too.
    n1.ok("network create shop --subnet 10.9.0.0/29 --reserve 10.9.0.4 --reserve 10.9.0.5 --reserve 10.9.0.6");
    n1.attach("shop", "a");
    let first = n1.addresses("shop", "a");
    n1.ok("endpoint detach --network shop a");
    n2.attach("shop", "b");
    assert_ne!(n2.addresses("shop", "b"), first);
    let c = n2.container("c");
    let attach = format!("endpoint attach --network shop --name c --netns {}", c.path);
    let output = n2.ctl(&attach);
    assert_eq!(output.code, Some(5), "it rests still: {output}");
    wait_for("the address has rested", || n2.ctl(&attach).success());
    assert_eq!(n2.addresses("shop", "c"), first);
}

fn a_full_subnet_is_told_and_heals(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/29");
    for index in 1..=5 {
        n1.attach("shop", &format!("c{index}"));
    }
    let c6 = n1.container("c6");
    let attach = format!("endpoint attach --network shop --name c6 --netns {}", c6.path);
    let (keys, kernel) = (cluster.etcd.keys(), n1.kernel_state());
    let output = n1.ctl(&attach);
    assert_eq!(output.code, Some(5), "{output}");
    for word in ["shop", "5 usable"] {
        assert!(output.stderr.contains(word), "{word}: {output}");
    }
    assert_eq!(cluster.etcd.keys(), keys);
    assert_eq!(kernel.difference(&n1.kernel_state()), "");
    n1.ok("endpoint detach --network shop c3");
    n1.ok(&attach);
}

fn two_subnets_give_what_both_have(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/29 --subnet 10.10.0.0/29");
    let mut seen = std::collections::BTreeSet::new();
    for index in 1..=10 {
        n1.attach("shop", &format!("c{index}"));
        seen.extend(n1.addresses("shop", &format!("c{index}")));
    }
    assert_eq!(seen.len(), 10, "{seen:?}");
}

fn the_default_pool_skips_what_is_in_use(world: &World) {
    let n1 = world.node("n1");
    n1.space.sh("ip link add name other type bridge
                 ip link set other up
                 ip address add 10.200.0.1/24 dev other
                 ip route add 10.200.1.128/25 via 192.168.50.99");
    let config = Config::embedded()
        .raw("pools", "[\"10.200.0.0/22\"]")
        .raw("pool_prefix", "24")
        .raw("address_alarm", "90");
    let _agent = n1.agent(&config);
    n1.ok("network create given --subnet 10.200.2.0/25");
    let made = n1.ok("-o json network create chosen").json();
    assert_eq!(made["subnets"][0]["cidr"], "10.200.3.0/24", "{made}");
    let output = n1.ctl("network create another");
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains("pools"), "{output}");
    n1.ok("network rm chosen");
    n1.ok("network create another");
}

fn the_pool_gives_a_subnet_for_what_is_expected(world: &World) {
    let cluster = Cluster::new(world, 2);
    let n1 = cluster.n1();
    wait_for("both are known", || n1.ok("-o json node ls").json().as_array().unwrap().len() == 2);
    let cidr = |output: &Output| output.json()["subnets"][0]["cidr"].as_str().unwrap().to_owned();
    for (name, expected, prefix) in [
        // Half of 300 may have to start on the other of two nodes; a quarter with four.
        ("two", "--expect-endpoints 300 --expect-services 50", "/23"),
        ("four", "--expect-endpoints 300 --expect-services 130 --nodes 4", "/23"),
        ("more", "--expect-endpoints 300 --expect-services 130 --nodes 2", "/22"),
        ("services", "--expect-services 5", "/27"),
    ] {
        let made = n1.ok(&format!("-o json network create {name} {expected}"));
        assert!(made.stderr.contains(&format!("a {prefix} subnet is chosen")), "{made}");
        assert!(cidr(&made).ends_with(prefix), "{made}");
    }
    let keys = cluster.etcd.keys();
    let alone = n1.ctl("network create alone --nodes 4");
    assert!(alone.code == Some(2) && alone.stderr.contains("--expect-endpoints"), "{alone}");
    assert_eq!(cluster.etcd.keys(), keys);
    let small = n1.ok("network create small --expect-endpoints 300 --nodes 4 --subnet 10.9.0.0/24");
    assert!(small.stderr.contains("warning: smaller than what is expected: 253 IPv4"), "{small}");
    let both = "--expect-endpoints 300 --nodes 4 --subnet 10.10.0.0/24 --subnet 10.11.0.0/24";
    assert_eq!(n1.ok(&format!("network create both {both}")).stderr, "");
}

fn a_plan_knows_how_large_the_subnets_of_the_pool_are(world: &World) {
    let n1 = world.node("n1");
    let config = Config::embedded().raw("pool_prefix", "27").raw("pool6_prefix", "120");
    let _agent = n1.agent(&config.raw("address_alarm", "90"));
    let settings = n1.client().call("GET", "/v1/settings", None).unwrap();
    let expected = json!({
        "pool_prefix": 27, "pool6_prefix": 120, "address_warning": 80, "address_alarm": 90,
        "dns_domain": "netctl.internal", "dns_host": null,
    });
    assert_eq!((settings.status, settings.body), (200, expected));
    let file = n1.dir().join("stack.yml");
    std::fs::write(&file, "services: {a: {scale: 29}}").unwrap();
    let plan = n1.ctl(&format!("plan {} --project s", file.display()));
    assert!(plan.code == Some(5) && plan.stdout.contains("29 (new, /27)"), "{plan}");
    assert!(plan.stderr.contains("short by 1 IPv4 address: 30 needed, 29 free"), "{plan}");
    // It is so, when it is made.
    n1.ok("network create s_default");
    let plan = n1.ctl(&format!("plan {} --project s", file.display()));
    assert!(plan.stderr.contains("short by 1 IPv4 address: 30 needed, 29 free"), "{plan}");
}
