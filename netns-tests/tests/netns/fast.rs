//! The path that skips the stack: what takes it, and what does not.

use world::{NodeOptions, Space, Stream, World, tcp_transfer};

use crate::cluster::{Cluster, DUAL, Member, member};

crate::tests![
    what_stays_within_a_network_skips_the_stack,
    what_stays_within_a_network_skips_the_stack_over_an_ipv6_underlay,
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
