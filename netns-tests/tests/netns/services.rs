//! Services: the addresses that are kept for them are theirs.

use std::collections::BTreeSet;

use serde_json::json;
use world::{Node, World, wait_for};

use crate::cluster::{Cluster, DUAL, alive};

crate::tests![
    a_service_that_does_not_fit_is_refused_with_the_numbers,
    what_was_kept_for_a_service_is_there_when_its_containers_come,
    services_that_are_made_at_the_same_time_never_get_more_than_there_is,
    what_is_reserved_by_a_plan_goes_to_the_service_that_names_it,
    what_a_service_cannot_be_is_refused_and_leaves_nothing,
    a_service_has_the_addresses_that_were_asked_for,
    updates_that_are_made_at_once_all_count,
    inspect_shows_what_this_node_balances_to_and_why_not,
    a_node_that_balances_nothing_sends_nothing_to_others_for_a_service,
];

/// How a network's IPv4 addresses are used.
pub(crate) fn usage(node: &Node, network: &str, what: &str) -> u64 {
    let view = node.ok(&format!("-o json network inspect {network}")).json();
    view[0]["ipv4"][what].as_u64().unwrap_or_else(|| panic!("no {what} in {view}"))
}

fn a_service_that_does_not_fit_is_refused_with_the_numbers(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/28");
    wait_for("the node shows that it lives", || alive(n1) == ["n1"]);
    let keys = cluster.etcd.keys();
    for (command, code, words) in [
        (
            "service create web --network shop --replicas 13",
            5,
            &["14 asked for, 13 free", "1 short", "network expand shop"][..],
        ),
        ("service create web --network shop --replicas 12 --update-order start-first", 5, &["1 short"]),
        (
            "service create web --network shop --replicas 7 --update-order start-first --update-parallelism 0",
            5,
            &["15 asked for"],
        ),
        ("service create web --network none", 4, &["none"]),
        ("service create web --network shop --network shop", 2, &["twice"]),
        ("service create web --network shop --replicas 2000000", 2, &["2000000"]),
        ("service create web --network shop --reservation nobodys", 2, &["nobodys"]),
        ("service scale web=3", 4, &["web"]),
        ("service rm web", 4, &["web"]),
        ("service scale web", 2, &["SERVICE=REPLICAS"]),
        ("run --network shop --service web -- true", 4, &["service web"]),
    ] {
        let output = n1.ctl(command);
        assert_eq!(output.code, Some(code), "{command}: {output}");
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{command}: {output}");
        assert_eq!(cluster.etcd.keys(), keys, "{command}");
    }
    n1.ok("service create web --network shop --replicas 12");
    let again = n1.ctl("service create web --network shop");
    assert!(again.code == Some(5) && again.stderr.contains("exists already"), "{again}");
    let in_use = n1.ctl("network rm shop");
    assert!(in_use.code == Some(5) && in_use.stderr.contains("service web"), "{in_use}");
    let view = n1.ok("-o json service inspect web").json();
    assert_eq!(view[0]["network_names"], json!(["shop"]));
    assert_eq!(view[0]["addresses"].as_object().unwrap().len(), 1);
    n1.ok("service rm web");
    assert_eq!((usage(n1, "shop", "reserved"), usage(n1, "shop", "resting")), (0, 1));
}

fn what_was_kept_for_a_service_is_there_when_its_containers_come(world: &World) {
    let cluster =
        Cluster::with(world, 2, &world::NodeOptions::default(), |config| config.set("rest", "1s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create small --subnet 10.8.0.0/28");
    n1.ok("service create web --network small --network shop --replicas 6");
    assert_eq!((usage(n1, "small", "reserved"), usage(n1, "small", "services")), (6, 1));
    // Six of thirteen are left for others.
    let others: Vec<_> =
        (0..6).map(|i| cluster.nodes[i % 2].attach("small", &format!("o{i}"))).collect();
    assert_eq!(usage(n1, "small", "free"), 0);
    n2.container("late");
    for node in [n1, n2] {
        node.container("late2");
        let refused = node.ctl("endpoint attach --network small --netns /run/netns/late2");
        assert!(refused.code == Some(5) && refused.stderr.contains("6 reserved"), "{refused}");
    }
    let web: Vec<_> = (0..6)
        .map(|i| cluster.nodes[i % 2].attach_with("small", &format!("w{i}"), "--service web"))
        .collect();
    assert_eq!((usage(n1, "small", "reserved"), usage(n1, "small", "free")), (0, 0));
    let address = n1.addresses("small", "w0").remove(0);
    assert!(web[5].space.reaches(&address) && others[1].space.reaches(&address));
    // One more than the service has is like any other.
    let refused = n2.ctl("endpoint attach --network small --netns /run/netns/late --service web");
    assert_eq!(refused.code, Some(5), "{refused}");
    // A container is replaced: its successor waits until an address has rested.
    n1.ok("endpoint detach w0 --network small");
    assert_eq!(usage(n1, "small", "reserved"), 1);
    n2.ok("endpoint attach --network small --netns /run/netns/late --service web --name w6");
    assert_eq!(usage(n1, "small", "reserved"), 0);
    // Fewer are kept for a smaller service, none for one that is gone.
    n1.ok("service scale web=4");
    n1.ok("endpoint detach w2 w4 --network small");
    n2.ok("endpoint detach w1 --network small");
    wait_for("what was freed has rested", || usage(n1, "small", "resting") == 0);
    let used = usage(n1, "small", "endpoints") + usage(n1, "small", "services");
    assert_eq!(usage(n1, "small", "free"), 13 - used - usage(n1, "small", "reserved"));
    n1.ok("ipam check");
    the_check_knows_services(&cluster);
    n1.ok("service rm web");
    assert_eq!(usage(n1, "small", "reserved"), 0);
    assert_eq!(usage(n1, "shop", "reserved"), 0);
    n1.ok("ipam check");
}

fn services_that_are_made_at_the_same_time_never_get_more_than_there_is(world: &World) {
    let cluster = Cluster::new(world, 3);
    cluster.n1().ok("network create shop --subnet 10.9.0.0/26");
    // 61 usable; ten services of ten each and their own address: five fit.
    let made: Vec<bool> = std::thread::scope(|scope| {
        let make = |index: usize| {
            let node = &cluster.nodes[index % 3];
            let output = node.ctl(&format!("service create s{index} --network shop --replicas 10"));
            assert!(matches!(output.code, Some(0 | 5)), "{output}");
            output.code == Some(0)
        };
        let threads: Vec<_> = (0..10).map(|index| scope.spawn(move || make(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 5);
    assert_eq!((usage(cluster.n1(), "shop", "reserved"), usage(cluster.n1(), "shop", "free")), (50, 6));
    // Everybody who has no service competes for the six that are left.
    let got: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12)
            .map(|index| {
                let node = &cluster.nodes[index % 3];
                node.container(&format!("c{index}"));
                scope.spawn(move || {
                    let output =
                        node.ctl(&format!("endpoint attach --network shop --netns /run/netns/c{index}"));
                    assert!(matches!(output.code, Some(0 | 5)), "{output}");
                    usize::from(output.code == Some(0))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(got, 6);
    // And every container of the services gets its own.
    let services: Vec<usize> = (0..10).filter(|index| made[*index]).collect();
    let mut addresses = BTreeSet::new();
    for service in services {
        for index in 0..10 {
            let (node, name) = (&cluster.nodes[index % 3], format!("s{service}-{index}"));
            node.attach_with("shop", &name, &format!("--service s{service}"));
            addresses.extend(node.addresses("shop", &name));
        }
    }
    assert_eq!(addresses.len(), 50);
    cluster.n1().ok("ipam check");
}

/// What somebody did to the records of a service is found, and repaired where that is safe.
fn the_check_knows_services(cluster: &Cluster) {
    let (n1, etcd) = (cluster.n1(), &cluster.etcd);
    let members = format!("netctl/members/{}", n1.network_id("small"));
    let nobody = r#"{"service":"00000000000f"}"#;
    let shop = n1.network_id("shop");
    etcd.put(&format!("netctl/members/{shop}/addresses/10.9.0.200"), nobody);
    etcd.put(
        &format!("{members}/reservations/gone"),
        r#"{"service":"00000000000f","count":3,"drawn":1}"#,
    );
    let kept = format!("{members}/reservations/web");
    let value = etcd.keys()[&kept].clone();
    let mut wrong: serde_json::Value = serde_json::from_str(&value).unwrap();
    wrong["drawn"] = json!(0);
    etcd.put(&kept, &wrong.to_string());
    let found = n1.ctl("ipam check");
    assert_eq!(found.code, Some(1), "{found}");
    for word in ["leaked address", "leaked reservation", "wrong reservation"] {
        assert!(found.stdout.contains(word), "{word}: {found}");
    }
    n1.ok("ipam check --repair");
    assert_eq!(etcd.keys()[&kept], value);
    n1.ok("ipam check");
    etcd.delete(&kept);
    let told = n1.ctl("ipam check --repair");
    assert!(told.code == Some(1) && told.stdout.contains("missing reservation"), "{told}");
    etcd.put(&kept, &value);
}

fn what_is_reserved_by_a_plan_goes_to_the_service_that_names_it(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/28");
    let file = n1.dir().join("stack.yml");
    let text = "services:\n  a: {networks: [shop], deploy: {replicas: 5}}\n  b: {networks: [shop], deploy: {replicas: 3}}\n\
                networks:\n  shop: {external: true}\n";
    std::fs::write(&file, text).unwrap();
    n1.ok(&format!("plan {} --reserve deploy --ttl 5m", file.display()));
    assert_eq!((usage(n1, "shop", "reserved"), usage(n1, "shop", "free")), (10, 3));
    let twice = n1.ctl(&format!("plan {} --reserve deploy", file.display()));
    assert_eq!(twice.code, Some(5), "{twice}");
    let refused = n1.ctl("service create other --network shop --replicas 3");
    assert_eq!(refused.code, Some(5), "{refused}");
    n1.ok("service create a --network shop --replicas 5 --reservation deploy");
    assert_eq!((usage(n1, "shop", "reserved"), usage(n1, "shop", "free")), (9, 3));
    n1.ok("service create b --network shop --replicas 3 --reservation deploy");
    assert_eq!((usage(n1, "shop", "reserved"), usage(n1, "shop", "free")), (8, 3));
    // What nobody takes over ends by itself.
    let one = n1.dir().join("one.yml");
    std::fs::write(&one, "services:\n  c: {networks: [shop]}\nnetworks:\n  shop: {external: true}\n")
        .unwrap();
    n1.ok(&format!("plan {} --reserve short --ttl 1s", one.display()));
    wait_for("the reservation has ended", || usage(n1, "shop", "free") == 3);
}

fn what_a_service_cannot_be_is_refused_and_leaves_nothing(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("network create mail --subnet 10.8.0.0/24");
    let _taken = n1.attach_with("mail", "taken", "--ip 10.8.0.7");
    n1.ok("service create one --network shop --vip 10.9.0.80 --port 80");
    n1.ok("service create names --network shop --endpoint-mode dnsrr");
    wait_for("the node shows that it lives", || alive(n1) == ["n1"]);
    let keys = cluster.etcd.keys();
    for (command, code, words) in [
        (
            "create x --network shop --vip 10.7.0.1",
            2,
            &["10.7.0.1", "none of the service's networks"][..],
        ),
        ("create x --network shop --vip 10.9.0.1", 2, &["10.9.0.1", "gateway"]),
        ("create x --network shop --vip 10.9.0.81 --vip 10.9.0.82", 2, &["another of its family"]),
        ("create x --network shop --vip 10.9.0.80", 5, &["10.9.0.80", "taken by service"]),
        ("create x --network shop --network mail --vip 10.9.0.81 --vip 10.8.0.7", 5, &["by endpoint"]),
        ("create x --network shop --port 80:81 --port 80:82", 2, &["80/tcp", "twice"]),
        ("create x --network shop --port 80:0", 2, &["80"]),
        ("create x --network shop --port 0:80", 2, &["0:80"]),
        ("create x --network shop --scheduler fastest", 2, &["fastest", "rr, wrr, lc, wlc, sh or mh"]),
        ("create x --network shop --affinity 25h", 2, &["affinity", "1 day"]),
        ("create x --network shop --timeout udp=0", 2, &["UDP timeout"]),
        ("create x --network shop --endpoint-mode dnsrr --vip 10.9.0.81", 2, &["dnsrr"]),
        (
            "create x --network shop --endpoint-mode dnsrr --port 80",
            2,
            &["dnsrr", "--endpoint-mode vip"],
        ),
        ("create x --network shop --health-tcp 80 --health-retries 0", 2, &["1 or more retries"]),
        ("create x --network shop --health-retries 4", 2, &["--health-tcp"]),
        ("update one --port-rm 80", 2, &["--all-ports"]),
        ("update one --port-rm 81", 2, &["81/tcp"]),
        ("update one --affinity 25h --label a=b", 2, &["affinity"]),
        ("update one --replicas 500", 5, &["shop"]),
        ("scale one=500", 5, &["shop", "short"]),
        ("update one --replicas 2000000", 2, &["2000000"]),
        ("update one --health-interval 5s", 2, &["--health-tcp"]),
        ("update names --port 80", 2, &["dnsrr"]),
        ("update none --scheduler lc", 4, &["none"]),
    ] {
        let output = n1.ctl(&format!("service {command}"));
        assert_eq!(output.code, Some(code), "{command}: {output}");
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{command}: {output}");
        assert_eq!(cluster.etcd.keys(), keys, "{command}");
    }
    n1.container("box");
    let attach = "endpoint attach --network shop --netns /run/netns/box --name box";
    let alone = json!({"network": "shop", "netns": "/run/netns/box", "weight": 3});
    let refused = n1.client().call("POST", "/v1/endpoints", Some(&alone)).unwrap();
    assert_eq!((refused.status, &refused.body["code"]), (400, &json!("invalid")));
    n1.ok(&format!("{attach} --service one --weight 3"));
    n1.ok(&format!("{attach} --service one --weight 3"));
    let other = n1.ctl(&format!("{attach} --service one --weight 4"));
    assert!(other.code == Some(5) && other.stderr.contains("its weight is 3"), "{other}");
    n1.ok("ipam check");
}

fn a_service_has_the_addresses_that_were_asked_for(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create mail --subnet 10.8.0.0/24");
    n1.ok("service create web --network shop --network mail --vip fd00:9::80 --vip 10.8.0.80");
    let view = n1.ok("-o json service inspect web").json();
    let (shop, mail) = (n1.network_id("shop"), n1.network_id("mail"));
    let addresses = &view[0]["addresses"];
    assert_eq!((&addresses[&shop][1], &addresses[&mail]), (&json!("fd00:9::80"), &json!(["10.8.0.80"])));
    // The other one was chosen.
    assert!(addresses[&shop][0].as_str().unwrap().starts_with("10.9.0."), "{view}");
    n1.ok("ipam check");
}

fn updates_that_are_made_at_once_all_count(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok("network create shop --subnet 10.9.0.0/24");
    cluster.n1().ok("service create web --network shop --port 80");
    std::thread::scope(|scope| {
        for number in 1..=8 {
            let node = &cluster.nodes[number % 2];
            scope.spawn(move || {
                node.ok(&format!("service update web --port {} --label l{number}=x", 80 + number));
            });
        }
    });
    let view = cluster.n1().ok("-o json service inspect web").json();
    let ports: BTreeSet<u64> = view[0]["balancing"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["port"].as_u64().unwrap())
        .collect();
    assert_eq!(ports, (80..=88).collect());
    assert_eq!(view[0]["labels"].as_object().unwrap().len(), 8);
}

/// The backends of the service `web` as a node shows them: name, weight, and why it is out.
fn backends(node: &Node) -> Vec<(String, u64, String)> {
    let view = node.ok("-o json service inspect web").json();
    let backends = view[0]["backends"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    backends.iter().map(|b| (text(&b["name"]), b["weight"].as_u64().unwrap(), text(&b["out"]))).collect()
}

fn inspect_shows_what_this_node_balances_to_and_why_not(world: &World) {
    let mut cluster =
        Cluster::with(world, 3, &world::NodeOptions::default(), |config| config.set("lease", "2s"));
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok("service create web --network shop --replicas 3 --port 80:8080 --timeout tcp=20m");
    n1.ok("service create long --network shop --timeout tcp=10m --timeout udp=20m");
    let _w1 = n1.attach_with("shop", "w1", "--service web --weight 7");
    let _w2 = n2.attach_with("shop", "w2", "--service web");
    let expected = |w1: (u64, &str), w2: (u64, &str)| {
        vec![("w1".to_owned(), w1.0, w1.1.to_owned()), ("w2".to_owned(), w2.0, w2.1.to_owned())]
    };
    // The third node has nothing on the network, and shows the same.
    for node in &cluster.nodes {
        let all = expected((7, ""), (1, ""));
        wait_for("both are ready", || backends(node) == all);
    }
    let shown = n1.ok("service inspect web").stdout;
    for part in ["3, 2 ready", "tcp 20m, tcp-fin 2m, udp 20m", "80:8080/tcp", "w1 on n1, shop 10.9.0."] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(n1.ok("service ls").stdout.contains("2/3"));
    n1.ok("service update web --prefer node");
    for (node, all) in [
        (&n1, expected((7, ""), (0, "nearer ones are preferred"))),
        (&n2, expected((0, "nearer ones are preferred"), (1, ""))),
    ] {
        wait_for("the nearer one is preferred", || backends(node) == all);
    }
    assert!(n1.ok("service ls").stdout.contains("2/3"), "those that are far are ready too");
    n1.ok("node drain n1");
    wait_for("the drained node's is out", || {
        backends(&n1) == expected((0, "its node is drained"), (1, ""))
    });
    let vain = n1.ctl("endpoint wait w1 --network shop --timeout 100ms");
    assert!(vain.code == Some(6) && vain.stderr.contains("its node is drained"), "{vain}");
    n1.ok("node activate n1");
    n1.ok("endpoint wait w1 --network shop");
    cluster.kill(1);
    wait_for("the dead node's is out", || backends(&n1) == expected((7, ""), (0, "its node is dead")));
    assert!(n1.ok("service ls").stdout.contains("1/3"));
    assert!(n1.ok("endpoint ls").stdout.contains("out (its node is dead)"));
}

fn a_node_that_balances_nothing_sends_nothing_to_others_for_a_service(world: &World) {
    let cluster = Cluster::with(world, 2, &world::NodeOptions::default(), |config| {
        config.set("rest", "0s").set("lb", "none")
    });
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let _b = n2.attach("shop", "b");
    // It has addresses of a block of n2's.
    n2.ok("service create web --network shop");
    let view = n2.ok("-o json service inspect web").json()[0].clone();
    let vips = view["addresses"].as_object().unwrap().values().next().unwrap().as_array().unwrap();
    let vips: Vec<&str> = vips.iter().map(|vip| vip.as_str().unwrap()).collect();
    let sandbox = n1.sandbox("shop");
    let refused = |vip: &str| !sandbox.try_sh(&format!("ip route get {vip}")).success();
    wait_for("it is refused", || vips.iter().all(|vip| refused(vip)));
    assert!(!a.space.ping(vips[0]));
    // Who has the address afterwards is reached.
    n2.ok("service rm web");
    wait_for("it is not refused", || !vips.iter().any(|vip| refused(vip)));
    let _c = n2.attach_with("shop", "c", &format!("--ip {} --ip {}", vips[0], vips[1]));
    wait_for("the new holder is reached", || vips.iter().all(|vip| a.space.reaches(vip)));
}
