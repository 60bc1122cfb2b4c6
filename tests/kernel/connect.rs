//! Containers, connected and not.

use std::collections::BTreeSet;

use netctl::kernel::{Error, Netns};
use netctl::model::object::Object;

use crate::world::{Container, Node, Space, eventually, net, sh, try_sh, two_nodes};

fn reach_each_other(underlays: [&str; 2], prefix: u8) {
    let (_nodes, [a, b]) = two_nodes(underlays, prefix);
    // The underlay's devices have just come up.
    eventually("the other node is reached", || a.reaches("10.9.0.130"));
    for address in ["10.9.0.130", "fd00:9::130", "10.9.0.1", "fd00:9::1"] {
        assert!(a.reaches(address), "{address}");
    }
    assert!(b.reaches("10.9.0.10") && b.reaches("fd00:9::10"));
}

pub fn containers_reach_each_other_over_ipv4() {
    reach_each_other(["192.0.2.1", "192.0.2.2"], 24);
}

pub fn containers_reach_each_other_over_ipv6() {
    reach_each_other(["2001:db8::1", "2001:db8::2"], 64);
}

pub fn an_address_that_nobody_has_is_unreachable_at_once() {
    let mut node = Node::alone();
    let container = Container::new(10);
    node.plug(&container.plug).unwrap();
    let wanted = node.base().union(&container.objects()).copied().collect();
    node.reconcile(&wanted);
    for address in ["10.9.0.99", "fd00:9::99"] {
        // Without an answer, ping would wait for 60 s.
        let (success, output) = container.space.try_sh(&format!("ping -n -c 1 -W 60 {address}"));
        assert!(!success);
        assert!(output.contains("nreachable"), "{output}");
        assert!(output.contains("10.9.0.1") || output.contains("fd00:9::1"), "{output}");
    }
}

pub fn two_hundred_containers_come_and_go() {
    let mut node = Node::alone();
    node.reconcile(&node.base());
    let containers: Vec<Container> = (0..200).map(|n| Container::new(10 + n)).collect();
    let plugs: Vec<_> = containers.iter().map(|container| container.plug.clone()).collect();
    for result in node.sandbox.plug_all(&plugs, &mut rand::rng()) {
        result.unwrap();
    }
    let objects = containers.iter().flat_map(Container::objects);
    let wanted: BTreeSet<Object> = node.base().into_iter().chain(objects).collect();
    node.reconcile(&wanted);
    assert_eq!(node.observe(), wanted);
    assert!(containers[0].reaches("10.9.0.209") && containers[199].reaches("fd00:9::10"));
    let endpoints: Vec<_> = plugs.iter().map(|plug| plug.endpoint).collect();
    node.sandbox.unplug_all(&endpoints).unwrap();
    for container in &containers {
        assert_eq!(container.inside(), "");
    }
    node.reconcile(&node.base());
    assert_eq!(node.observe(), node.base());
}

pub fn plugging_again_completes_what_is_missing() {
    let mut node = Node::alone();
    let container = Container::new(10);
    node.plug(&container.plug).unwrap();
    let index = |container: &Container| container.space.sh("cat /sys/class/net/eth0/ifindex");
    let settled = |container: &Container| {
        eventually("the carrier is there", || container.inside().contains("state UP"));
        (index(container), container.inside())
    };
    let before = settled(&container);
    let neighbours = container.space.sh("ip neigh show nud permanent");
    assert!(neighbours.contains("10.9.0.1") && neighbours.contains("fd00:9::1"), "{neighbours}");
    for damage in
        ["ip link set eth0 down", "ip addr flush dev eth0 scope global", "ip neigh flush nud permanent"]
    {
        container.space.sh(damage);
    }
    node.sh(&format!("ip link set {} down", container.device()));
    node.plug(&container.plug).unwrap();
    node.plug(&container.plug).unwrap();
    assert_eq!(settled(&container), before);
    let addresses = container.space.sh("ip -o addr show dev eth0 scope global");
    assert!(addresses.contains("10.9.0.10/24") && addresses.contains("fd00:9::10/64"), "{addresses}");
    assert!(!addresses.contains("tentative"), "{addresses}");
    assert_eq!(container.space.sh("ip neigh show nud permanent"), neighbours);
}

pub fn plugging_again_follows_the_subnets() {
    let mut node = Node::alone();
    let container = Container::new(10);
    let mut plug = container.plug.clone();
    node.plug(&plug).unwrap();
    container.space.sh("ip route add 10.77.0.0/16 dev eth0");
    let before = container.inside();
    plug.routes.extend([net("10.10.0.0/24"), net("fd00:10::/64")]);
    node.plug(&plug).unwrap();
    let inside = container.inside();
    for route in ["10.10.0.0/24 via 10.9.0.1 dev eth0", "fd00:10::/64 via fd00:9::1 dev eth0"] {
        assert!(inside.contains(route), "{inside}");
    }
    // What is not ours stays.
    node.plug(&container.plug).unwrap();
    assert_eq!(container.inside(), before);
}

pub fn a_container_that_comes_back_is_connected_anew() {
    let mut node = Node::alone();
    let old = Container::new(10);
    node.plug(&old.plug).unwrap();
    let space = Space::new("c");
    let mut plug = old.plug.clone();
    (plug.netns, plug.inode) = (space.path(), space.netns().inode());
    node.plug(&plug).unwrap();
    assert!(space.sh("ip -o link show eth0").contains(&plug.mac.to_string()));
    assert_eq!(old.inside(), "");
}

pub fn unplugging_leaves_nothing() {
    let mut node = Node::alone();
    let (gone, stays) = (Container::new(10), Container::new(11));
    for container in [&gone, &stays] {
        node.plug(&container.plug).unwrap();
    }
    eventually("the carrier is there", || stays.inside().contains("state UP"));
    let kept = stays.inside();
    node.sandbox.unplug_all(&[gone.plug.endpoint]).unwrap();
    assert_eq!(gone.inside(), "");
    assert!(!node.sh("ip -o link").contains(&gone.device().to_string()));
    assert_eq!(stays.inside(), kept);
    // That it is gone already is success.
    node.sandbox.unplug_all(&[gone.plug.endpoint]).unwrap();
}

pub fn an_interface_that_is_taken_is_a_conflict_and_leaves_nothing() {
    let mut node = Node::alone();
    let (taken, free) = (Container::new(10), Container::new(11));
    taken.space.sh("ip link add eth0 type bridge");
    let before = taken.inside();
    let plugs = [taken.plug.clone(), free.plug.clone()];
    let results = node.sandbox.plug_all(&plugs, &mut rand::rng());
    let error = results[0].as_ref().unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("eth0") && text.contains(&taken.space.name), "{text}");
    results[1].as_ref().unwrap();
    assert_eq!(taken.inside(), before);
    assert!(!node.sh("ip -o link").contains(&taken.device().to_string()));
}

pub fn a_default_route_that_is_there_stays() {
    let mut node = Node::alone();
    let container = Container::new(10);
    container.space.sh("ip link add other type bridge");
    container.space.sh("ip link set other up");
    container.space.sh("ip route add default dev other");
    node.plug(&container.plug).unwrap();
    let routes = container.space.sh("ip route");
    let defaults: Vec<&str> = routes.lines().filter(|line| line.starts_with("default")).collect();
    assert!(matches!(defaults.as_slice(), [only] if only.contains("dev other")), "{routes}");
    assert!(routes.contains("10.9.0.0/24 via 10.9.0.1"), "{routes}");
}

pub fn another_namespace_at_the_same_path_is_refused() {
    let mut node = Node::alone();
    let container = Container::new(10);
    let name = &container.space.name;
    sh(&format!("ip netns del {name} && ip netns add {name}x && ip netns add {name}"));
    let error = node.plug(&container.plug).unwrap_err();
    assert!(matches!(error, Error::Replaced { .. }), "{error}");
    assert_eq!(container.inside(), "");
    try_sh(&format!("ip netns del {name}x"));
}

pub fn ipv6_is_switched_on_where_it_is_needed() {
    let mut node = Node::alone();
    let container = Container::new(10);
    for device in ["all", "default"] {
        container.space.sh(&format!("sysctl -qw net.ipv6.conf.{device}.disable_ipv6=1"));
    }
    node.plug(&container.plug).unwrap();
    assert!(container.space.sh("ip -6 addr show dev eth0").contains(&net("fd00:9::10/64").to_string()));
}

pub fn the_interfaces_of_a_container_that_has_gone_are_gone() {
    let mut node = Node::alone();
    let container = Container::new(10);
    let endpoint = container.plug.endpoint;
    node.plug(&container.plug).unwrap();
    let path = container.space.path();
    drop(container);
    node.sandbox.unplug_all(&[endpoint]).unwrap();
    assert!(!node.sh("ip -o link").contains(&endpoint.to_string()));
    assert!(matches!(Netns::open(&path).unwrap_err(), Error::Path { .. }));
}
