//! Who reaches whom, and how.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use world::{Inbox, NodeOptions, Space, Stream, World, connects, datagram, tcp_transfer, wait_for};

use crate::cluster::{Cluster, DUAL, Member, member};

crate::tests![
    containers_of_two_nodes_reach_each_other_over_an_ipv4_underlay,
    containers_of_three_nodes_reach_each_other_over_an_ipv4_underlay,
    containers_of_three_nodes_reach_each_other_over_an_ipv6_underlay,
    a_network_of_one_family_works_over_an_underlay_of_the_other,
    an_address_that_nobody_has_fails_at_once,
    an_address_that_nobody_has_in_a_block_of_another_node_fails_at_once,
    a_node_costs_a_route_for_each_block_and_borrowed_addresses_one_each,
    networks_with_the_same_subnet_do_not_see_each_other,
    the_tunnel_port_can_be_chosen,
    what_leaves_a_node_has_the_nodes_address,
    an_internal_network_has_no_way_out,
    who_leaves_a_network_finds_the_way_out_by_another,
    a_smaller_underlay_makes_smaller_interfaces,
    an_mtu_can_be_asked_for,
];

/// Every pair, from both: echo, TCP, UDP, and packets of exactly the MTU but not a byte more.
fn all_reach_all(members: &[Member], mtu: usize) {
    for (i, from) in members.iter().enumerate() {
        for (_, to) in members.iter().enumerate().filter(|(j, _)| i != *j) {
            for address in &to.addresses {
                let (a, b) = (&from.container.space, &to.container.space);
                let pair = format!("{} to {} at {address}", a.name(), b.name());
                assert!(a.reaches(address), "{pair}");
                tcp_transfer(a, b, address, 1 << 20).unwrap_or_else(|e| panic!("TCP, {pair}: {e}"));
                let stream = Stream::start(a, b, address, 1000);
                stream.wait(200);
                let report = stream.stop();
                assert_eq!((report.lost, report.duplicated), (0, 0), "UDP, {pair}: {report:?}");
                let headers = if address.contains(':') { 48 } else { 28 };
                let ping = |size: usize| {
                    a.try_sh(&format!("ping -n -c 1 -W 2 -M do -s {} {address}", size - headers))
                };
                assert!(ping(mtu).success(), "MTU {mtu}, {pair}: {}", ping(mtu));
                assert!(!ping(mtu + 1).success(), "MTU {mtu} + 1, {pair}");
            }
        }
    }
}

fn containers_of_two_nodes_reach_each_other_over_an_ipv4_underlay(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let members = [member(cluster.n1(), "a"), member(cluster.n1(), "b"), member(cluster.n2(), "c")];
    all_reach_all(&members, 1450);
}

fn containers_of_three_nodes_reach_each_other_over_an_ipv4_underlay(world: &World) {
    three_nodes(world, &NodeOptions::default(), 1450);
}

fn containers_of_three_nodes_reach_each_other_over_an_ipv6_underlay(world: &World) {
    three_nodes(world, &NodeOptions { ipv4: false, ..NodeOptions::default() }, 1430);
}

fn three_nodes(world: &World, options: &NodeOptions, mtu: usize) {
    let cluster = Cluster::with(world, 3, options, |config| config);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let members: Vec<_> =
        cluster.nodes.iter().map(|node| member(node, &format!("on-{}", node.name()))).collect();
    all_reach_all(&members, mtu);
}

fn a_network_of_one_family_works_over_an_underlay_of_the_other(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok("network create shop --subnet fd00:9::/64");
    let members = [member(cluster.n1(), "a"), member(cluster.n2(), "b")];
    assert_eq!(members[0].addresses.len(), 1);
    all_reach_all(&members, 1450);
}

/// Connections are refused before TCP would ask a second time, which is after one second (RFC 6298), and
/// a ping is told that there is nobody.
#[track_caller]
fn fails_at_once(from: &Space, address: &str) {
    // More than the kernel tells errors of in a second.
    let took: Vec<Duration> = (0..20)
        .map(|_| {
            let start = Instant::now();
            let error = connects(from, address, 80).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}: {error}");
            start.elapsed()
        })
        .collect();
    // One may have been held up by what else this machine does.
    let late = took.iter().filter(|took| **took >= Duration::from_secs(1)).count();
    assert!(late <= 1, "{address}: {took:?}");
    let ping = from.try_sh(&format!("ping -n -c 1 -W 5 {address}"));
    assert!(!ping.success() && ping.stdout.contains("nreachable"), "{address}: {ping}");
}

fn an_address_that_nobody_has_fails_at_once(world: &World) {
    let cluster = Cluster::new(world, 1);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let a = cluster.n1().attach("shop", "a");
    for address in ["10.9.0.200", "fd00:9::200"] {
        fails_at_once(&a.space, address);
    }
}

fn an_address_that_nobody_has_in_a_block_of_another_node_fails_at_once(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let a = cluster.n1().attach("shop", "a");
    cluster.n2().attach("shop", "b");
    let in_block: Vec<String> = cluster.n2().addresses("shop", "b");
    assert!(in_block.iter().all(|address| a.space.reaches(address)));
    // Two addresses behind the one that the other node's container has: the same block.
    let nobodys: Vec<IpAddr> = in_block.iter().map(|text| text.parse().unwrap()).collect();
    for address in nobodys.into_iter().map(|address| netctl::model::subnet::address_at(address, 2)) {
        let sandbox = cluster.n1().sandbox("shop");
        assert!(sandbox.sh(&format!("ip route get {address}")).contains("dev vx0"), "{address}");
        fails_at_once(&a.space, &address.to_string());
    }
}

fn a_node_costs_a_route_for_each_block_and_borrowed_addresses_one_each(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    // Blocks of one address: 13 for containers.
    n1.ok("network create shop --subnet 10.9.0.0/28");
    n1.ok("network create wide --subnet 10.8.0.0/20");
    let on_n2: Vec<_> = (0..30).map(|index| n2.attach("wide", &format!("w{index}"))).collect();
    let a = n1.attach("wide", "a");
    let last = n2.addresses("wide", "w29").remove(0);
    assert!(a.space.reaches(&last) && on_n2[0].space.reaches(&n1.addresses("wide", "a")[0]));
    let routes = || n1.sandbox("wide").sh("ip -o route show dev vx0");
    assert_eq!(routes().lines().count(), 1, "{}", routes());

    // Addresses that were asked for belong to nobody's block, or to another's.
    let stranger = n1.attach_with("wide", "stranger", &format!("--ip {}", other_of_block(&last)));
    n1.attach_with("wide", "outside", "--ip 10.8.15.7");
    for container in &on_n2[..2] {
        for name in ["stranger", "outside"] {
            assert!(container.space.reaches(&n1.addresses("wide", name)[0]), "{name}");
        }
    }
    assert!(stranger.space.reaches(&last));

    let boxes: Vec<_> = (0..13).map(|i| cluster.nodes[i % 2].attach("shop", &format!("b{i}"))).collect();
    let n3 = &cluster.nodes[0];
    n3.container("more");
    let full = n3.ctl("endpoint attach --network shop --netns /run/netns/more");
    assert!(full.code == Some(5) && full.stderr.contains("13 usable"), "{full}");
    for index in 0..13 {
        let address = &cluster.nodes[index % 2].addresses("shop", &format!("b{index}"))[0];
        assert!(boxes[(index + 1) % 13].space.reaches(address), "{address}");
    }
}

/// An address that is far behind another in the same block of 128.
fn other_of_block(address: &str) -> String {
    let address: std::net::Ipv4Addr = address.parse().unwrap();
    std::net::Ipv4Addr::from(u32::from(address) | 0x7f).to_string()
}

fn networks_with_the_same_subnet_do_not_see_each_other(world: &World) {
    let cluster = Cluster::new(world, 2);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let mut inboxes = Vec::new();
    let mut senders = Vec::new();
    for network in ["red", "blue"] {
        n1.ok(&format!("network create {network} --subnet 10.9.0.0/24"));
        senders.push(n1.attach(network, &format!("{network}-a")));
        let to = n2.attach_with(network, &format!("{network}-b"), "--ip 10.9.0.50");
        inboxes.push((Inbox::open(&to.space, 7002), to));
    }
    n2.attach_with("blue", "blue-only", "--ip 10.9.0.60");
    assert!(senders[1].space.reaches("10.9.0.60"));
    assert!(!senders[0].space.ping("10.9.0.60"));
    for (sender, content) in senders.iter().zip([b"red", &b"blue"[..]]) {
        assert!(sender.space.reaches("10.9.0.50"));
        datagram(&sender.space, None, "10.9.0.50", 7002, content).unwrap();
    }
    assert!(inboxes[0].0.gets(b"red") && inboxes[1].0.gets(b"blue"));
    assert!(inboxes[0].0.sender_of(b"blue").is_none() && inboxes[1].0.sender_of(b"red").is_none());
}

fn the_tunnel_port_can_be_chosen(world: &World) {
    let cluster =
        Cluster::with(world, 2, &NodeOptions::default(), |config| config.raw("tunnel_port", "4790"));
    cluster.n1().ok("network create shop --subnet 10.9.0.0/24");
    let (a, _b) = (cluster.n1().attach("shop", "a"), cluster.n2().attach("shop", "b"));
    assert!(a.space.reaches(&cluster.n2().addresses("shop", "b")[0]));
    let links = cluster.n1().sandbox("shop").sh("ip -d link show vx0");
    assert!(links.contains("dstport 4790"), "{links}");
}

fn what_leaves_a_node_has_the_nodes_address(world: &World) {
    let cluster = Cluster::new(world, 1);
    let outside = world.outside("client");
    let inbox = Inbox::open(&outside.space, 7002);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    for (address, own) in [(outside.ipv4(), n1.ipv4()), (outside.ipv6(), n1.ipv6())] {
        assert!(a.space.reaches(address), "{address}");
        datagram(&a.space, None, address, 7002, own.as_bytes()).unwrap();
        assert!(inbox.gets(own.as_bytes()), "{address}");
        let seen = inbox.sender_of(own.as_bytes()).unwrap().ip().to_canonical();
        assert_eq!(seen.to_string(), own);
        tcp_transfer(&a.space, &outside.space, address, 1 << 20).unwrap();
    }
}

fn an_internal_network_has_no_way_out(world: &World) {
    let cluster = Cluster::new(world, 2);
    let outside = world.outside("client");
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL} --internal"));
    let (a, _b) = (n1.attach("shop", "a"), cluster.n2().attach("shop", "b"));
    assert!(a.space.reaches(&cluster.n2().addresses("shop", "b")[0]));
    for address in [outside.ipv4(), outside.ipv6(), n1.ipv4(), cluster.n2().ipv4()] {
        assert!(connects(&a.space, address, 22).is_err() && !a.space.ping(address), "{address}");
    }
    let links = n1.sandbox("shop").sh("ip -o link");
    assert!(!links.contains("up0"), "{links}");
}

fn who_leaves_a_network_finds_the_way_out_by_another(world: &World) {
    let cluster = Cluster::new(world, 1);
    let outside = world.outside("client");
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    n1.ok("network create mail --subnet 10.8.0.0/24 --subnet fd00:8::/64");
    let a = n1.attach("shop", "a");
    let path = &a.path;
    n1.ok(&format!("endpoint attach --network mail --name a --netns {path} --interface eth1"));
    let leads_by = |device: &str| {
        ["-4", "-6"].iter().all(|family| {
            a.space.sh(&format!("ip {family} route show default")).contains(&format!("dev {device} "))
        })
    };
    assert!(leads_by("eth0") && !leads_by("eth1"));
    n1.ok("endpoint detach --network shop a");
    wait_for("the other network has the way out", || leads_by("eth1"));
    for address in [outside.ipv4(), outside.ipv6()] {
        assert!(a.space.reaches(address), "{address}");
    }
}

fn a_smaller_underlay_makes_smaller_interfaces(world: &World) {
    let options = NodeOptions { mtu: 1400, ..NodeOptions::default() };
    let cluster = Cluster::with(world, 2, &options, |config| config);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    all_reach_all(&[member(cluster.n1(), "a"), member(cluster.n2(), "b")], 1350);
}

fn an_mtu_can_be_asked_for(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok(&format!("network create shop {DUAL} --mtu 1300"));
    all_reach_all(&[member(cluster.n1(), "a"), member(cluster.n2(), "b")], 1300);
}
