//! What an attach waits for, and what it gets.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;
use world::{Config, Node, NodeOptions, Server, Space, World, mac_of, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::shop::{call, parse, plug, plug_into};

crate::tests![
    an_attach_waits_until_the_network_is_ready_and_no_longer_than_it_may,
    what_is_sent_as_soon_as_an_endpoint_is_attached_arrives,
    a_networks_first_container_reaches_its_gateways_at_once,
    an_address_that_is_used_again_has_another_mac_and_is_reached_at_once,
    a_subnet_is_chosen_beside_what_the_nodes_have,
];

fn an_attach_waits_until_the_network_is_ready_and_no_longer_than_it_may(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet 10.9.0.0/24 --vni 77");
    let c1 = n1.container("c1");
    // The kernel has one device for a number and a port.
    n1.space.sh("ip link add name blocker type vxlan id 77 dstport 4789");
    let (keys, kernel) = (cluster.etcd.lasting_keys(), n1.container("c2"));
    let before = kernel.space.sh("ip -o link show");
    let start = Instant::now();
    let late = n1.ctl("endpoint attach --network shop --name c2 --netns /run/netns/c2 --wait 1s");
    assert_eq!(late.code, Some(6), "{late}");
    // It does not begin again when less is left than the pause before.
    assert!(start.elapsed() > Duration::from_millis(800), "it has waited {:?}", start.elapsed());
    for word in ["shop", "n1", "not complete", "vx0"] {
        assert!(late.stderr.contains(word), "{word}: {late}");
    }
    assert_eq!(cluster.etcd.lasting_keys(), keys);
    assert_eq!(kernel.space.sh("ip -o link show"), before);

    let waiting = std::thread::spawn({
        let n1 = cluster.nodes[0].clone();
        move || n1.ctl("endpoint attach --network shop --name c1 --netns /run/netns/c1 --wait 1m")
    });
    wait_for("it waits", || cluster.etcd.lasting_keys() != keys);
    n1.space.sh("ip link del blocker");
    let attached = waiting.join().unwrap();
    assert!(attached.success(), "{attached}");
    assert!(c1.space.reaches("10.9.0.1"));
}

fn what_is_sent_as_soon_as_an_endpoint_is_attached_arrives(world: &World) {
    let n1 = world.node("n1");
    let _agent = n1.agent(&Config::embedded());
    n1.ok(&format!("network create shop {DUAL}"));
    let server = plug(&n1, "server", None);
    let _server = Server::udp(&server.container.space, 5000, "server");
    let addresses = server.addresses.iter().map(|address| SocketAddr::new(parse(address), 5000));
    let addresses: Vec<_> = addresses.collect();
    let lost = |number: usize| {
        let name = format!("c{number}");
        let container = n1.container(&name);
        let to = addresses[number % addresses.len()];
        let client = socket(&container.space, to);
        plug_into(&n1, container, &name, None);
        client.send_to(b"who\n", to).and_then(|_| client.recv(&mut [0; 100])).err()
    };
    let lost: Vec<_> = (0..60).filter_map(lost).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

fn a_networks_first_container_reaches_its_gateways_at_once(world: &World) {
    let n1 = world.node("n1");
    let agent = n1.agent(&Config::embedded());
    for number in 0..20 {
        let name = format!("c{number}");
        n1.ok(&format!(
            "network create n{number} --subnet 10.9.{number}.0/24 --subnet fd00:{number}::/64"
        ));
        let container = n1.container(&name);
        let gateways = [format!("10.9.{number}.1"), format!("fd00:{number}::1")];
        let sockets = gateways.map(|gateway| {
            let nobody_there = SocketAddr::new(parse(&gateway), 9);
            (socket(&container.space, nobody_there), nobody_there)
        });
        let request = json!({"network": format!("n{number}"), "name": name, "netns": container.path});
        call(&n1, "POST", "/v1/endpoints", &request);
        // The last address first: it has had the least time.
        for (socket, gateway) in sockets.iter().rev() {
            socket.connect(gateway).unwrap();
            let answer = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 1]));
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{gateway} says no");
        }
    }
    assert!(!agent.log_tail().contains(" WARN "), "nothing was given up: {}", agent.log_tail());
}

/// A socket that can send to an address as soon as there is a way.
fn socket(from: &Space, to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.enter(|| UdpSocket::bind(any)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

fn an_address_that_is_used_again_has_another_mac_and_is_reached_at_once(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| config.set("rest", "0s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok(&format!("network create shop {DUAL}"));
    let (near, far) = (n1.attach("shop", "near"), n2.attach("shop", "far"));
    let mut macs = Vec::new();
    for (round, node) in [n1, n1, n2, n1].into_iter().enumerate() {
        let name = format!("c{round}");
        let options = "--ip 10.9.0.50 --ip fd00:9::50";
        wait_for("the address is free", || {
            let attached = node.container(&name);
            let path = &attached.path;
            let done = node
                .ctl(&format!("endpoint attach --network shop --name {name} --netns {path} {options}"));
            if !done.success() {
                node.space.sh(&format!("ip netns del {name}"));
                return false;
            }
            macs.push(mac_of(&attached.space, "eth0"));
            true
        });
        for address in ["10.9.0.50", "fd00:9::50"] {
            // Where it is made, or was just now, nothing is to be waited for. Others hear of it.
            let (here, other) = if node.name() == "n1" { (&near, &far) } else { (&far, &near) };
            assert!(here.space.ping(address), "{address} of {name}");
            wait_for("the other machine reaches it", || other.space.ping(address));
        }
        node.ok(&format!("endpoint detach --network shop {name}"));
    }
    let distinct: std::collections::BTreeSet<_> = macs.iter().collect();
    assert_eq!(distinct.len(), macs.len(), "{macs:x?}");
}

/// The subnets of a network that gets them from the pools.
#[track_caller]
fn chosen(node: &Node, name: &str) -> Vec<String> {
    let network = node.ok(&format!("-o json network create {name} --ipv6")).json();
    let network = if network.is_array() { network[0].clone() } else { network };
    let subnets = network["subnets"].as_array().unwrap().clone();
    subnets.iter().map(|subnet| subnet["cidr"].as_str().unwrap().to_owned()).collect()
}

fn a_subnet_is_chosen_beside_what_the_nodes_have(world: &World) {
    let etcd = world.etcd();
    let (n1, n2) = (world.node("n1"), world.node("n2"));
    // Another node has the first of the pools when it comes, by an interface and by a route.
    n2.space.sh("ip link add name office type bridge
                 ip link set office up
                 ip address add 10.128.0.1/24 dev office
                 ip -6 address add fd6e:6574:7063::1/64 dev office nodad
                 ip route add 10.128.1.0/25 dev office");
    let _agents = [n1.agent(&Config::etcd(&etcd)), n2.agent(&Config::etcd(&etcd))];
    assert_eq!(chosen(&n1, "one"), ["10.128.2.0/24", "fd6e:6574:7063:1::/64"]);
    // The node that is asked has got the next just now.
    n1.space.sh("ip link add name office type bridge
                 ip link set office up
                 ip address add 10.128.3.1/24 dev office
                 ip -6 address add fd6e:6574:7063:2::1/64 dev office nodad");
    assert_eq!(chosen(&n1, "two"), ["10.128.4.0/24", "fd6e:6574:7063:3::/64"]);
    // Whoever is asked next knows of it, too.
    n1.ok("network rm two");
    assert_eq!(chosen(&n2, "three"), ["10.128.4.0/24", "fd6e:6574:7063:3::/64"]);
}
