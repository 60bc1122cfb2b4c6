//! Subnets that come and go while a network is used.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use serde_json::json;
use world::{KernelState, Node, NodeOptions, Transfer, World, connects, eventually, wait_for};

use crate::cluster::{Cluster, DUAL, Member, member};

crate::tests![
    a_full_network_is_expanded_while_connections_run,
    a_full_internal_network_is_expanded_while_connections_run,
    a_new_subnet_can_be_used_everywhere_as_soon_as_it_is_told,
    a_subnet_is_removed_once_nothing_has_an_address_of_it,
    a_subnet_of_an_internal_network_is_removed_once_nothing_has_an_address_of_it,
    an_expansion_that_cannot_be_is_refused_by_name_and_changes_nothing,
    an_agent_that_was_down_has_the_subnets_after_its_start,
    an_agent_that_was_down_has_the_subnets_of_an_internal_network_after_its_start,
    an_agent_that_was_killed_before_its_containers_had_a_subnet_goes_on,
    an_attach_and_a_removal_at_once_are_never_both_made,
];

/// A network of both families for five endpoints.
const SMALL: &str = "--subnet 10.9.0.0/29 --subnet fd00:9::/125 --reserve fd00:9::7";
/// More room for it.
const MORE: &str = "--subnet 10.10.0.0/24 --subnet fd00:10::/64";

/// A network of both families that has room for two endpoints over IPv4.
const TWO: &str = "--subnet 10.9.0.0/29 --reserve 10.9.0.4 --reserve 10.9.0.5 --reserve 10.9.0.6 \
                   --subnet fd00:9::/64";

fn all_reach_all(members: &[&Member]) {
    for from in members {
        for to in members {
            for address in &to.addresses {
                let (a, b) = (&from.container, &to.container);
                assert!(a.space.reaches(address), "{} to {} at {address}", a.name, b.name);
            }
        }
    }
}

fn expand_while_connections_run(world: &World, options: &str) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {SMALL} {options}"));
    let old = [member(n1, "a"), member(n1, "b"), member(n1, "c"), member(n2, "d"), member(n2, "e")];
    let late = n1.container("late");
    let output = n1.ctl(&format!("endpoint attach --network shop --name late --netns {}", late.path));
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains("5 usable"), "{output}");
    // On one machine and between two, over both families.
    let start = |from: &Member, to: &Member, family: usize| {
        Transfer::start(&from.container.space, &to.container.space, &to.addresses[family]).unwrap()
    };
    let transfers = [start(&old[0], &old[3], 0), start(&old[0], &old[3], 1), start(&old[1], &old[2], 0)];
    transfers.iter().for_each(Transfer::wait);

    n2.ok(&format!("network expand shop {MORE}"));
    // On both machines, without waiting for either to have heard of it.
    n1.ok(&format!("endpoint attach --network shop --name late --netns {}", late.path));
    let late = Member { container: late, addresses: n1.addresses("shop", "late") };
    let last = member(n2, "last");
    for new in [&late, &last] {
        assert!(new.addresses[0].starts_with("10.10.0."), "{:?}", new.addresses);
        assert!(new.addresses[1].starts_with("fd00:10::"), "{:?}", new.addresses);
    }
    all_reach_all(&[&old[0], &old[4], &late, &last]);
    for (member, node) in [(&old[0], n1), (&old[3], n2)] {
        for gateway in ["10.10.0.1", "fd00:10::1"] {
            assert!(member.container.space.reaches(gateway), "{gateway}");
        }
        let error = connects(&member.container.space, "10.10.0.200", 80).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        let internal = options.contains("internal");
        let rules = node.sandbox("shop").sh("nft list table inet netctl");
        assert!(internal || rules.contains("10.10.0.0/24") && rules.contains("fd00:10::/64"), "{rules}");
    }
    for transfer in transfers {
        transfer.wait();
        transfer.finish().unwrap();
    }
    let shown = n1.ok("network inspect shop");
    for subnet in ["10.9.0.0/29", "10.10.0.0/24, gateway 10.10.0.1", "fd00:10::/64"] {
        assert!(shown.stdout.contains(subnet), "{shown}");
    }
}

fn a_full_network_is_expanded_while_connections_run(world: &World) {
    expand_while_connections_run(world, "");
}

fn a_full_internal_network_is_expanded_while_connections_run(world: &World) {
    expand_while_connections_run(world, "--internal");
}

fn a_new_subnet_can_be_used_everywhere_as_soon_as_it_is_told(world: &World) {
    let mut cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.nodes[0].clone(), cluster.nodes[1].clone());
    n1.ok("network create shop --subnet 10.9.0.0/30");
    n2.attach("shop", "full");
    for number in 0..20 {
        let (name, octet) = (format!("c{number}"), 10 + number);
        let container = n2.container(&name);
        let mut request = json!({"network": "shop", "name": name, "netns": container.path});
        // One that is chosen, and one that is asked for.
        if number % 2 == 0 {
            request["addresses"] = json!([format!("10.{octet}.0.2")]);
        }
        let subnet = json!({"subnets": [format!("10.{octet}.0.0/30")]});
        // Every other pair, the second machine hears of the subnet when it is asked for an address.
        if number % 4 > 1 {
            cluster.freeze(1);
        }
        let expanded = n1.client().call("POST", "/v1/networks/shop/subnets", Some(&subnet)).unwrap();
        let attached = std::thread::scope(|scope| {
            let attach = || n2.client().call("POST", "/v1/endpoints", Some(&request)).unwrap();
            let attach = scope.spawn(attach);
            cluster.thaw(1);
            attach.join().unwrap()
        });
        assert_eq!((expanded.status, attached.status), (201, 201), "{expanded:?} {attached:?}");
        assert_eq!(attached.body["gateways"], json!([format!("10.{octet}.0.1")]));
        let inside = container.space.sh("ip -o -4 address show dev eth0");
        assert!(inside.contains(&format!("10.{octet}.0.2/30")), "{inside}");
        assert!(container.space.ping(&format!("10.{octet}.0.1")), "the gateway answers");
    }
}

/// Waits until a machine's kernel is as it was.
#[track_caller]
fn as_before(node: &Node, before: &KernelState) {
    let difference = || before.difference(&node.kernel_state());
    let same = eventually(world::DEADLINE, || difference().is_empty());
    assert!(same, "on {}: {}", node.name(), difference());
}

fn remove_once_unused(world: &World, options: &str) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "2s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {TWO} {options}"));
    let (a, b) = (member(n1, "a"), member(n2, "b"));
    let before = [n1.kernel_state(), n2.kernel_state()];
    n1.ok(&format!("network expand shop {MORE}"));
    // One address is chosen, and so in a block of the node's; the other is a single one.
    let user = n2.attach_with("shop", "user", "--ip fd00:10::5").space;
    let addresses = n2.addresses("shop", "user");
    assert!(addresses[0].starts_with("10.10.0."), "{addresses:?}");
    assert!(addresses.iter().all(|address| a.container.space.reaches(address)));
    assert!(user.reaches(&a.addresses[0]) && user.reaches(&a.addresses[1]));
    let (keys, used) = (cluster.etcd.keys(), n1.kernel_state());
    for (subnet, address) in [("10.10.0.0/24", &addresses[0]), ("fd00:10::/64", &addresses[1])] {
        let output = n1.ctl(&format!("network shrink shop --subnet {subnet}"));
        assert_eq!(output.code, Some(5), "{output}");
        for word in ["1 address(es) of endpoints", address, "user on node n2"] {
            assert!(output.stderr.contains(word), "{word}: {output}");
        }
    }
    assert_eq!(cluster.etcd.keys(), keys);
    assert_eq!(used.difference(&n1.kernel_state()), "");
    n2.ok("endpoint detach --network shop user");
    let output = n1.ctl("network shrink shop --subnet 10.10.0.0/24");
    assert!(output.code == Some(5) && output.stderr.contains("1 resting"), "{output}");
    n2.space.sh("ip netns del user");
    for subnet in ["10.10.0.0/24", "fd00:10::/64"] {
        let shrink = format!("network shrink shop --subnet {subnet}");
        wait_for("the address has rested", || n1.ctl(&shrink).success());
    }
    as_before(n1, &before[0]);
    as_before(n2, &before[1]);
    let left = cluster.etcd.keys().into_keys().filter(|key| key.contains("10.10.0."));
    assert_eq!(left.collect::<Vec<_>>(), [""; 0]);
    all_reach_all(&[&a, &b]);
}

fn a_subnet_is_removed_once_nothing_has_an_address_of_it(world: &World) {
    remove_once_unused(world, "");
}

fn a_subnet_of_an_internal_network_is_removed_once_nothing_has_an_address_of_it(world: &World) {
    remove_once_unused(world, "--internal");
}

fn an_expansion_that_cannot_be_is_refused_by_name_and_changes_nothing(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24 --subnet 10.8.0.0/24");
    n1.ok("network create other --subnet 10.7.0.0/16 --subnet fd00:7::/64");
    n1.ok("network expand shop --subnet 10.10.0.0/24 --gateway 10.10.0.254");
    n1.attach_with("shop", "c1", "--ip 10.9.0.9");
    let (keys, kernel) = (cluster.etcd.keys(), n1.kernel_state());
    let mut problems = String::new();
    let bad: &[i32] = &[1, 2];
    for (command, codes, words) in [
        ("expand shop", &[2][..], &["--subnet"][..]),
        ("expand nothing --subnet 10.20.0.0/24", &[4], &["nothing"]),
        ("expand shop --subnet nonsense", &[2], &["nonsense"]),
        ("expand shop --subnet 10.20.0.7/24", bad, &["10.20.0.7/24", "10.20.0.0/24"]),
        ("expand shop --subnet 10.20.0.0/31", bad, &["10.20.0.0/31"]),
        ("expand shop --subnet 127.0.0.0/16", bad, &["loopback"]),
        ("expand shop --subnet 169.254.64.0/20", bad, &["169.254.64.0/20", "uplinks"]),
        ("expand other --subnet fd6e:6574:6374:6c00::/80", bad, &["fd6e:6574:6374:6c00::", "uplinks"]),
        ("expand shop --subnet 10.20.0.0/24 --gateway 10.21.0.1", bad, &["10.21.0.1"]),
        ("expand shop --subnet 10.20.0.0/24 --gateway 10.20.0.255", bad, &["10.20.0.255"]),
        ("expand shop --subnet 10.20.0.0/24 --ip-range 10.21.0.0/25", bad, &["10.21.0.0/25"]),
        ("expand shop --subnet 10.20.0.0/24 --reserve 10.9.0.10", bad, &["10.9.0.10"]),
        ("expand shop --subnet 10.20.0.0/16 --subnet 10.20.1.0/24", bad, &["10.20.1.0/24"]),
        ("expand shop --subnet fd00:20::/64", bad, &["fd00:20::/64", "no IPv6"]),
        ("expand shop --subnet 10.9.0.0/25", &[5], &["shop", "its own subnet 10.9.0.0/24"]),
        ("expand shop --subnet 10.10.0.0/24", &[5], &["shop", "gateway 10.10.0.254"]),
        ("expand shop --subnet 10.7.3.0/24", &[5], &["10.7.3.0/24", "10.7.0.0/16", "other"]),
        ("expand other --subnet fd00:7::/48", &[5], &["its own subnet fd00:7::/64"]),
        ("expand shop --subnet 192.168.50.0/28", &[5], &["192.168.50.", "node n"]),
        ("expand shop --subnet 192.168.50.128/25", &[5], &["192.168.50.0/24", "in use on node n"]),
        ("expand other --subnet fd00:50::/64", &[5], &["fd00:50::/64", "in use on node n"]),
        ("expand shop --subnet 10.30.0.0/24 --subnet 10.7.3.0/24", &[5], &["10.7.3.0/24"]),
        ("shrink shop", &[2], &["--subnet"]),
        ("shrink nothing --subnet 10.9.0.0/24", &[4], &["nothing"]),
        ("shrink shop --subnet 10.20.0.0/24", &[4], &["10.20.0.0/24", "10.9.0.0/24"]),
        ("shrink shop --subnet 10.9.0.0/25", &[4], &["10.9.0.0/25"]),
        ("shrink shop --subnet 10.9.0.0/24", &[5], &["10.9.0.9", "c1"]),
    ] {
        let output = n1.ctl(&format!("network {command}"));
        let right = output.code.is_some_and(|code| codes.contains(&code))
            && words.iter().all(|word| output.stderr.contains(word));
        let difference = kernel.difference(&n1.kernel_state());
        let same = cluster.etcd.keys() == keys;
        if !(right && same && difference.is_empty()) {
            problems.push_str(&format!(
                "{command}: {output}\nwanted one of {codes:?} with {words:?}; the store is the \
                 same: {same}; the kernel: {difference}\n"
            ));
        }
    }
    assert!(problems.is_empty(), "{problems}");
    let again = n1.ok("network expand shop --subnet 10.10.0.0/24 --gateway 10.10.0.254");
    assert!(again.stderr.contains("10.10.0.0/24 already"), "{again}");
    assert_eq!(cluster.etcd.keys(), keys);
    n1.ok("network shrink other --subnet fd00:7::/64");
    let output = n1.ctl("network shrink other --subnet 10.7.0.0/16");
    assert!(output.code == Some(5) && output.stderr.contains("the only one"), "{output}");
}

fn change_while_an_agent_is_down(world: &World, options: &str) {
    let mut cluster =
        Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "0s"));
    cluster.n1().ok(&format!("network create shop {DUAL} {options}"));
    let (a, b) = (member(cluster.n1(), "a"), member(cluster.n2(), "b"));
    let before = cluster.n1().kernel_state();
    let transfer = Transfer::start(&a.container.space, &b.container.space, &b.addresses[0]).unwrap();
    cluster.kill(0);
    cluster.n2().ok(&format!("network expand shop {MORE}"));
    cluster.n2().attach("shop", "near");
    cluster.n2().container("far");
    cluster.n2().ok("endpoint attach --network shop --name far --netns /run/netns/far \
                     --ip 10.10.0.5 --ip fd00:10::5");
    cluster.start(0);
    for address in ["10.10.0.5", "fd00:10::5", "10.10.0.1", "fd00:10::1"] {
        assert!(a.container.space.reaches(address), "{address}");
    }
    cluster.kill(0);
    for name in ["far", "near"] {
        cluster.n2().ok(&format!("endpoint detach --network shop {name}"));
    }
    for subnet in ["10.10.0.0/24", "fd00:10::/64"] {
        cluster.n2().ok(&format!("network shrink shop --subnet {subnet}"));
    }
    cluster.start(0);
    as_before(cluster.n1(), &before);
    transfer.wait();
    transfer.finish().unwrap();
}

fn an_agent_that_was_down_has_the_subnets_after_its_start(world: &World) {
    change_while_an_agent_is_down(world, "");
}

fn an_agent_that_was_down_has_the_subnets_of_an_internal_network_after_its_start(world: &World) {
    change_while_an_agent_is_down(world, "--internal");
}

fn an_agent_that_was_killed_before_its_containers_had_a_subnet_goes_on(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    cluster.n1().ok(&format!("network create shop {DUAL} {MORE} --internal"));
    let (a, b) = (cluster.n1().attach("shop", "a"), cluster.n1().attach("shop", "b"));
    let (complete, sandbox) = (cluster.n1().kernel_state(), cluster.n1().sandbox("shop"));
    cluster.kill(0);
    // What it leaves: one container is done, and the subnet's own route would have come last.
    b.space.sh("ip route del 10.10.0.0/24 && ip -6 route del fd00:10::/64");
    sandbox.sh("ip route del unreachable 10.10.0.0/24 && ip -6 route del unreachable fd00:10::/64");
    cluster.start(0);
    as_before(cluster.n1(), &complete);
    assert!(a.space.reaches("10.10.0.1") && b.space.reaches("fd00:10::1"));
}

fn an_attach_and_a_removal_at_once_are_never_both_made(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n2.attach("shop", "stays");
    n2.container("c");
    let request = json!({
        "network": "shop", "name": "c", "netns": "/run/netns/c", "addresses": ["10.10.0.5"],
    });
    let expansion = json!({"subnets": ["10.10.0.0/24"]});
    // A little later from round to round: neither may always be the first.
    let pause = |node: &Node, calls: usize| {
        (0..calls).for_each(|_| drop(node.client().call("GET", "/v1/networks", None).unwrap()));
    };
    let mut outcomes = BTreeMap::new();
    for round in 0..30 {
        let expanded = n1.client().call("POST", "/v1/networks/shop/subnets", Some(&expansion)).unwrap();
        assert!(matches!(expanded.status, 200 | 201), "{expanded:?}");
        let (attached, shrunk) = std::thread::scope(|scope| {
            let attach = scope.spawn(|| {
                pause(n2, round / 3);
                n2.client().call("POST", "/v1/endpoints", Some(&request)).unwrap()
            });
            pause(n1, usize::from(round % 3 == 0));
            let path = "/v1/networks/shop/subnets?subnet=10.10.0.0/24";
            let shrunk = n1.client().call("DELETE", path, None).unwrap();
            (attach.join().unwrap(), shrunk)
        });
        let outcome = (attached.status, shrunk.status);
        assert!(matches!(outcome, (201, 409) | (400, 200)), "{round}: {attached:?} {shrunk:?}");
        *outcomes.entry(outcome).or_insert(0) += 1;
        if attached.status == 201 {
            assert!(n1.ok("network inspect shop").stdout.contains("10.10.0.0/24"));
            n2.ok("endpoint detach --network shop c");
        }
    }
    assert_eq!(outcomes.len(), 2, "{outcomes:?}");
}
