//! The path that skips the stack: what takes it, and what does not.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;

use netctl::kernel::ebpf::{self, Maps, Tuple, detach};
use serde_json::{Value, json};
use world::Transport::Tcp;
use world::{
    Frames, Node, NodeOptions, Session, Space, Stream, Transfer, World, gateway_frame, ipv4_udp, mac_of,
    send_frames, tcp_transfer, wait_for,
};

use crate::cluster::{Cluster, DUAL, Member, member};
use crate::engine::detach_containers;
use crate::shop::{Backend, answers, call, each, open, plug, session_with, weights};

crate::tests![
    what_stays_within_a_network_skips_the_stack,
    what_stays_within_a_network_skips_the_stack_over_an_ipv6_underlay,
    what_somebody_takes_away_comes_back_and_nothing_is_lost_meanwhile,
    what_crosses_goes_on_by_one_of_two_places,
    packets_of_a_host_with_ipsec_policies_do_not_skip_the_stack,
    packets_are_as_large_as_the_hosts_routes_carry_whole,
    packets_are_as_large_as_the_hosts_routes_carry_whole_over_ipv6,
    a_tag_of_a_containers_frame_does_not_reach_the_underlay,
    a_pair_that_is_set_down_is_up_again_at_once,
    a_neighbour_that_gets_another_ethernet_address_is_found,
    a_neighbour_that_gets_another_ethernet_address_is_found_over_ipv6,
    it_is_switched_off_and_on_under_running_connections,
    what_is_open_is_reset_when_an_agent_lays_maps_out_anew,
    a_hundred_thousand_connections_are_counted_and_bounded,
    a_program_at_a_device_that_is_not_the_underlays_any_more_goes,
];

/// How many packets the kernel has forwarded in a sandbox.
#[track_caller]
fn forwarded(sandbox: &Space) -> u64 {
    let text = sandbox.sh("nstat -asz IpForwDatagrams Ip6OutForwDatagrams");
    let count = |line: &str| line.split_whitespace().nth(1).and_then(|count| count.parse().ok());
    text.lines().filter(|line| line.starts_with("Ip")).map(|line| count(line).unwrap_or(0_u64)).sum()
}

/// Machines whose packets skip the stack.
fn cluster(world: &World, options: &NodeOptions) -> Cluster {
    Cluster::with(world, 2, options, |config| config.set("lb", "ebpf"))
}

fn what_stays_within_a_network_skips_the_stack(world: &World) {
    nothing_is_forwarded(&cluster(world, &NodeOptions::default()));
}

fn what_stays_within_a_network_skips_the_stack_over_an_ipv6_underlay(world: &World) {
    let options = NodeOptions { ipv4: false, ..NodeOptions::default() };
    nothing_is_forwarded(&cluster(world, &options));
}

fn nothing_is_forwarded(cluster: &Cluster) {
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let members = [member(cluster.n1(), "a"), member(cluster.n1(), "b"), member(cluster.n2(), "c")];
    let sandboxes = [cluster.n1(), cluster.n2()].map(|node| node.sandbox("shop"));
    for (from, to) in [(0, 1), (0, 2), (2, 1)] {
        let (from, to): (&Member, &Member) = (&members[from], &members[to]);
        for address in &to.addresses {
            let (a, b) = (&from.container.space, &to.container.space);
            let pair = format!("{} to {} at {address}", a.name(), b.name());
            assert!(a.reaches(address), "{pair}");
            let before = sandboxes.each_ref().map(forwarded);
            tcp_transfer(a, b, address, 1 << 20).unwrap_or_else(|e| panic!("TCP, {pair}: {e}"));
            let stream = Stream::start(a, b, address, 1000);
            stream.wait(200);
            let report = stream.stop();
            assert_eq!((report.lost, report.duplicated), (0, 0), "UDP, {pair}: {report:?}");
            assert_eq!(sandboxes.each_ref().map(forwarded), before, "{pair}");
        }
    }
    // By which way they leave was found out once for many.
    for (node, other) in [(cluster.n1(), cluster.n2()), (cluster.n2(), cluster.n1())] {
        let [mine, theirs] = [node, other].map(|node| mac_of(&node.space, "eth0"));
        let exits = node.space.enter(|| {
            let (maps, wire) = (Maps::of_agent().unwrap(), ebpf::index("eth0").unwrap());
            let places = maps.flows.keys().unwrap();
            let flows = places.iter().flat_map(|place| maps.flows.get(place).unwrap().unwrap());
            let exits = flows.filter(|flow| flow.exit.interface == wire);
            exits.map(|flow| (flow.exit.source, flow.exit.destination)).collect::<BTreeSet<_>>()
        });
        assert_eq!(exits, [(mine, theirs)].into());
    }
}

/// The first machine's network, and how many datagrams its kernel forwards.
struct Shop {
    members: [Member; 2],
    sandbox: Space,
}

impl Shop {
    /// A container on each of two machines.
    fn new(cluster: &Cluster) -> Self {
        cluster.n1().ok(&format!("network create shop {DUAL}"));
        let members = [member(cluster.n1(), "a"), member(cluster.n2(), "b")];
        let shop = Self { members, sandbox: cluster.n1().sandbox("shop") };
        assert!(shop.members[0].container.space.reaches(shop.address()));
        shop
    }

    fn address(&self) -> &str {
        &self.members[1].addresses[0]
    }

    fn stream(&self) -> Stream {
        let [a, b] = self.members.each_ref().map(|member| &member.container.space);
        Stream::start(a, b, self.address(), 500)
    }

    /// Waits until the kernel forwards a stream's datagrams, or does not.
    #[track_caller]
    fn forwards(&self, forwards: bool) {
        wait_for(if forwards { "the kernel carries them" } else { "they skip the stack" }, || {
            let stream = self.stream();
            let before = forwarded(&self.sandbox);
            stream.wait(50);
            let report = stream.stop();
            assert_eq!(report.lost, 0, "{report:?}");
            (forwarded(&self.sandbox) - before >= 50) == forwards
        });
    }
}

fn a_neighbour_that_gets_another_ethernet_address_is_found(world: &World) {
    neighbour_is_found(&cluster(world, &NodeOptions::default()), "ipv4");
}

fn a_neighbour_that_gets_another_ethernet_address_is_found_over_ipv6(world: &World) {
    let options = NodeOptions { ipv4: false, ..NodeOptions::default() };
    neighbour_is_found(&cluster(world, &options), "ipv6");
}

fn neighbour_is_found(cluster: &Cluster, family: &str) {
    let shop = Shop::new(cluster);
    let [n1, n2] = [cluster.n1(), cluster.n2()].map(|node| &node.space);
    // What was found out is doubted after a second, not half a minute.
    for (setting, value) in
        [("base_reachable_time_ms", "500"), ("delay_first_probe_time", "1"), ("ucast_solicit", "1")]
    {
        n1.sysctl(&format!("net/{family}/neigh/eth0/{setting}"), value);
    }
    n1.sh("ip neighbour flush dev eth0");
    shop.forwards(false);
    // One way: the other machine says nothing by which it would be found.
    let stream = shop.stream();
    stream.wait(50);
    n2.sh("ip link set eth0 address 02:00:00:00:77:77");
    stream.wait(200);
    stream.stop();
    let found = n1.sh("ip neighbour show dev eth0");
    assert!(found.contains("02:00:00:00:77:77"), "{found}");
    shop.forwards(false);
}

fn detach_wire(node: &Node) {
    assert!(node.space.enter(|| detach("eth0").unwrap()));
}

fn empty_maps(node: &Node) {
    node.space.enter(|| {
        let maps = Maps::of_agent().unwrap();
        let ways: Vec<_> = maps.ways.entries().unwrap().into_iter().map(|(range, _)| range).collect();
        let places: Vec<_> =
            maps.addresses.entries().unwrap().into_iter().map(|(place, _)| place).collect();
        assert!(!ways.is_empty() && !places.is_empty());
        maps.ways.remove_all(&ways).unwrap();
        maps.addresses.remove_all(&places).unwrap();
    });
}

fn what_somebody_takes_away_comes_back_and_nothing_is_lost_meanwhile(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("resync", "2s")
    });
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let [a, b] = shop.members.each_ref().map(|member| &member.container.space);
    let transfer = Transfer::start(a, b, shop.address()).unwrap();
    transfer.wait();
    let damages: [(&str, &dyn Fn()); 3] = [
        ("detached from containers", &|| assert_eq!(detach_containers(&shop.sandbox), 1)),
        ("detached from the underlay", &|| detach_wire(cluster.n1())),
        ("emptied maps", &|| empty_maps(cluster.n1())),
    ];
    for (what, damage) in damages {
        damage();
        let before = forwarded(&shop.sandbox);
        // The kernel's routes have it until the agent has put it right.
        if what != "detached from the underlay" {
            wait_for("the kernel carries it", || forwarded(&shop.sandbox) > before);
        }
        wait_for("it skips the stack again", || {
            let before = forwarded(&shop.sandbox);
            let stream = shop.stream();
            stream.wait(50);
            assert_eq!(stream.stop().lost, 0, "{what}");
            forwarded(&shop.sandbox) == before
        });
        transfer.wait();
    }
    transfer.finish().unwrap();
    assert!(cluster.n1().space.enter(|| detach("eth0").unwrap()), "it was there again");
}

fn what_crosses_goes_on_by_one_of_two_places(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("resync", "2s")
    });
    let (shop, n1) = (Shop::new(&cluster), cluster.n1());
    let log = n1.dir().join("netctld.log");
    let stream = shop.stream();
    wait_for("packets cross by TCX", || fs::read_to_string(&log).unwrap().contains("by TCX"));
    stream.wait(50);
    assert_eq!(stream.stop().lost, 0, "while it was attached");
    let device = format!("nf-{}", n1.network_id("shop"));
    for (space, device) in [(&n1.space, device.as_str()), (&shop.sandbox, "fp0")] {
        space.sh(&format!("tc qdisc del dev {device} clsact"));
        shop.forwards(false);
        let filters = || space.sh(&format!("tc filter show dev {device} ingress"));
        wait_for("the filter is back", || filters().contains("netctl_"));
    }
}

fn packets_of_a_host_with_ipsec_policies_do_not_skip_the_stack(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("resync", "1s")
    });
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let policy = |verb: &str| {
        let (from, to) = (n1.ipv4(), n2.ipv4());
        n1.space.sh(&format!("ip xfrm policy {verb} src {from}/32 dst {to}/32 dir out"));
    };
    policy("add");
    shop.forwards(true);
    wait_for("what comes does not either", || !n1.space.enter(|| detach("eth0").unwrap()));
    policy("delete");
    shop.forwards(false);
}

fn packets_are_as_large_as_the_hosts_routes_carry_whole(world: &World) {
    routes_get_narrower(world, true);
}

fn packets_are_as_large_as_the_hosts_routes_carry_whole_over_ipv6(world: &World) {
    routes_get_narrower(world, false);
}

fn routes_get_narrower(world: &World, ipv4: bool) {
    let options = NodeOptions { ipv4, ..NodeOptions::default() };
    let cluster =
        Cluster::with(world, 2, &options, |config| config.set("lb", "ebpf").set("resync", "1s"));
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let (n1, n2) = (cluster.n1(), cluster.n2());
    let [a, b] = shop.members.each_ref().map(|member| &member.container.space);
    let there = if ipv4 { n2.ipv4() } else { n2.ipv6() };
    let inner = if ipv4 { 1350 } else { 1330 };
    let is_narrow = || shop.sandbox.sh("ip route; ip -6 route").contains(&format!("mtu {inner}"));
    let device = |mtu: u32| format!("ip link set eth0 mtu {mtu}");
    let route = |verb: &str, mtu: u32| format!("ip route {verb} {there} dev eth0 mtu lock {mtu}");
    for (change, back) in [(device(1400), device(1500)), (route("add", 1400), route("del", 1400))] {
        n1.space.sh(&change);
        wait_for("routes to the node are narrower", is_narrow);
        // The sandbox tells the container, whose packets skip the stack when they are smaller.
        tcp_transfer(a, b, shop.address(), 1 << 20).unwrap_or_else(|e| panic!("{change}: {e}"));
        shop.forwards(false);
        n1.space.sh(&back);
        wait_for("they are as before", || !is_narrow());
    }
    if ipv4 {
        // The kernel cuts what the programs cannot.
        n1.space.sh(&route("add", 1000));
        shop.forwards(true);
        tcp_transfer(a, b, shop.address(), 1 << 20).unwrap();
        n1.space.sh(&route("del", 1000));
        shop.forwards(false);
    }
}

fn a_tag_of_a_containers_frame_does_not_reach_the_underlay(world: &World) {
    let cluster = cluster(world, &NodeOptions::default());
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let from = &shop.members[0].container.space;
    let address = |member: usize| shop.members[member].addresses[0].parse::<Ipv4Addr>().unwrap();
    let frames = Frames::of(&cluster.n2().space, "eth0");
    let inbox = Frames::of(&shop.members[1].container.space, "eth0");
    for (tag, text) in [(Some(5), "with a tag"), (None, "without any")] {
        let packet = ipv4_udp((address(0), 7003), (address(1), 7004), text.as_bytes());
        send_frames(from, "eth0", [gateway_frame(from, [10, 9, 0, 1].into(), tag, &packet)]);
    }
    let has = |frames: &[Vec<u8>], text: &str| {
        frames.iter().any(|frame| frame.windows(text.len()).any(|part| part == text.as_bytes()))
    };
    let (mut seen, mut got) = (Vec::new(), Vec::new());
    wait_for("what came after it arrives", || {
        seen.extend(frames.take());
        got.extend(inbox.take());
        has(&got, "without any")
    });
    assert!(has(&seen, "without any") && !has(&seen, "with a tag") && !has(&got, "with a tag"));
}

fn a_pair_that_is_set_down_is_up_again_at_once(world: &World) {
    let cluster = Cluster::with(world, 2, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").set("resync", "10m")
    });
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let space = &cluster.n1().space;
    let shown = space.sh("ip -o link show | sed -n 's/^[0-9]*: \\(nf-[^@]*\\)@.*/\\1/p'");
    let pair = shown.trim();
    space.sh(&format!("ip link set {pair} down"));
    wait_for("it is up again", || space.sh(&format!("ip link show {pair}")).contains("state UP"));
    shop.forwards(false);
}

fn it_is_switched_off_and_on_under_running_connections(world: &World) {
    let mut cluster = cluster(world, &NodeOptions::default());
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    let [a, b] = shop.members.each_ref().map(|member| &member.container.space);
    let transfer = Transfer::start(a, b, shop.address()).unwrap();
    transfer.wait();
    let pairs = |node: &Node| node.space.sh("ip -o link show").matches(" nf-").count();
    assert_eq!(pairs(cluster.n1()), 1);
    for fast in [false, true] {
        cluster.terminate(0);
        cluster.configs[0] = cluster.configs[0].clone().raw("fast_path", &fast.to_string());
        cluster.start(0);
        shop.forwards(!fast);
        wait_for("the pair goes, or comes", || pairs(cluster.n1()) == usize::from(fast));
        transfer.wait();
    }
    transfer.finish().unwrap();
}

fn what_is_open_is_reset_when_an_agent_lays_maps_out_anew(world: &World) {
    let mut cluster = cluster(world, &NodeOptions::default());
    let ports = json!({"ports": [{"port": 80, "target": 8080}]});
    let vips = open(cluster.n1(), ports);
    let client = plug(cluster.n1(), "client", None);
    let backends = [Backend::start(cluster.n2(), "b1")];
    let (from, sandbox) = (&client.container.space, cluster.n1().sandbox("shop"));
    wait_for("it is balanced", || weights(&sandbox, &backends) == [1]);
    let mut sessions: Vec<_> = vips.iter().map(|vip| session_with(from, vip, 80, "b1")).collect();
    cluster.terminate(0);
    // As if that agent had been one with another layout.
    cluster.n1().space.sh("cd /sys/fs/bpf/netctl && mv * 0");
    for session in &mut sessions {
        assert_eq!(session.ask().unwrap().server, "b1", "it goes on without an agent");
    }
    cluster.start(0);
    let layouts = || cluster.n1().space.sh("ls /sys/fs/bpf/netctl");
    wait_for("only its own layout is there", || layouts().trim() == ebpf::LAYOUT.to_string());
    wait_for("it is balanced again", || weights(&sandbox, &backends) == [1]);
    // The programs look at the new maps a moment after those are filled.
    wait_for("it answers again", || vips.iter().all(|vip| Session::open(from, Tcp, vip, 80).is_ok()));
    for (session, vip) in sessions.iter_mut().zip(&vips) {
        let error = session.ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{vip}: {error}");
        assert_eq!(answers(from, vip, 4), each(&[("b1", 4)]), "{vip}");
    }
}

/// How many connections the table has room for.
const ROOM: u32 = 131_072;

fn a_hundred_thousand_connections_are_counted_and_bounded(world: &World) {
    let cluster = Cluster::with(world, 1, &NodeOptions::default(), |config| {
        config.set("lb", "ebpf").raw("lb_connections", &ROOM.to_string())
    });
    let vips = open(cluster.n1(), json!({}));
    let client = plug(cluster.n1(), "client", None);
    let backends = ["b1", "b2"].map(|name| Backend::start(cluster.n1(), name));
    let (from, sandbox) = (&client.container.space, cluster.n1().sandbox("shop"));
    wait_for("both are balanced", || weights(&sandbox, &backends) == [1, 1]);
    let mut session = session_with(from, &vips[1], 8080, "b1");
    let (own, vip) = (client.addresses[0].parse().unwrap(), vips[0].parse().unwrap());
    let frame = gateway_frame(from, [10, 9, 0, 1].into(), None, &[]);
    let connections = |target: u16| {
        let packet = |port| ipv4_udp((own, port), (vip, target), b"who\n");
        let frames = (10_000..60_000).map(|port| [&frame[..], &packet(port)].concat());
        send_frames(from, "eth0", frames);
    };
    let entries =
        || cluster.n1().space.enter(|| Maps::of_agent().unwrap().connections.entries().unwrap());
    let shown = || {
        let shown = call(cluster.n1(), "GET", "/v1/services/web", &Value::Null);
        let open = |backend: &Value| backend["connections"]["inactive"].as_u64().unwrap();
        shown["backends"].as_array().unwrap().iter().map(open).sum::<u64>()
    };
    connections(5000);
    connections(5001);
    assert_eq!(entries().len(), 2 * (100_000 + 1), "two for each, and for the session");
    assert_eq!(shown(), 100_000);
    assert_eq!(session.ask().unwrap().server, "b1");
    // More than there is room for: those that have been silent longest leave.
    for target in 5002..5006 {
        connections(target);
    }
    let left = entries();
    assert!(left.len() <= 2 * ROOM as usize, "{}", left.len());
    let of = |target: u16| {
        let is_of = |tuple: &Tuple| tuple.reply == 0 && u16::from(tuple.destination_port) == target;
        left.iter().filter(|(tuple, _)| is_of(tuple)).count()
    };
    let each_round = (5000..5006).map(of).collect::<Vec<_>>();
    println!("connections left of each round: {each_round:?}");
    // Which ones leave is the kernel's to say: about those that were not used for longest.
    assert!(each_round[5] > 49_000 && each_round[0] < each_round[5], "{each_round:?}");
    for vip in &vips {
        assert_eq!(answers(from, vip, 4), each(&[("b1", 2), ("b2", 2)]), "{vip}: what is new has room");
    }
}

fn a_program_at_a_device_that_is_not_the_underlays_any_more_goes(world: &World) {
    let mut cluster = cluster(world, &NodeOptions::default());
    let shop = Shop::new(&cluster);
    shop.forwards(false);
    cluster.terminate(0);
    // The address has moved to another device while no agent was here.
    let n1 = &cluster.n1().space.clone();
    let address = n1.sh("ip -o -4 address show eth0 | awk '{ print $4 }'");
    let address = address.trim();
    n1.sh(&format!(
        "ip link add name bridge type bridge && ip link set bridge up && ip address flush dev eth0 && \
         ip link set eth0 master bridge && ip address add {address} dev bridge"
    ));
    cluster.start(0);
    wait_for("the other device has the program", || n1.enter(|| detach("bridge").unwrap()));
    assert!(!n1.enter(|| detach("eth0").unwrap()), "it was left behind");
}
