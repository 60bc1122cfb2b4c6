//! The path that skips the stack: what takes it, and what does not.

use netctl::kernel::ebpf::{Maps, detach};
use world::{Node, NodeOptions, Space, Stream, Transfer, World, tcp_transfer, wait_for};

use crate::cluster::{Cluster, DUAL, Member, member};
use crate::engine::detach_containers;

crate::tests![
    what_stays_within_a_network_skips_the_stack,
    what_stays_within_a_network_skips_the_stack_over_an_ipv6_underlay,
    what_somebody_takes_away_comes_back_and_nothing_is_lost_meanwhile,
    packets_of_a_host_with_ipsec_policies_do_not_skip_the_stack,
    it_is_switched_off_and_on_under_running_connections,
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
