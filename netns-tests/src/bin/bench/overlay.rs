//! The way of a packet between containers on two nodes.

use std::time::Duration;

use world::Config;

use crate::report::{Better, Metric, Report};
use crate::traffic::Path;
use crate::{Ground, bridge, plain, progress};

pub const HELP: &str = "\
containers on two nodes: throughput, small packets, round trips, connects

Two nodes with real agents and a real etcd, beside two nodes with the classic path made by hand
(veth, Linux bridge, VXLAN with static entries, as Docker and flannel build it) on the same
underlay. MTU 1500 below, 1450 in the containers. In each round every probe runs on both, the
first side changing; the figures are medians.

  tcp1, tcp4     iperf3 with cubic and 1 or 4 streams; 1 s omitted, 2 s counted
  udp64          datagrams of 64 bytes received, one sender
  rr32           round trips of 64 bytes on 32 TCP connections, one outstanding on each
  rr1            the same on one connection, both ends on one core
  connects       TCP connections opened and closed one after the other, both ends on one core";

type Probe = fn(&Path, Duration) -> f64;

const PROBES: [(&str, &str, Probe); 6] = [
    ("tcp1_gbps", "TCP, 1 stream, Gb/s", |path, time| path.tcp(1, time)),
    ("tcp4_gbps", "TCP, 4 streams, Gb/s", |path, time| path.tcp(4, time)),
    ("udp64_pps", "UDP 64 bytes received, packets/s", Path::datagrams),
    ("rr32_per_s", "TCP round trips, 32 at once, /s", |path, time| path.round_trips(32, time)),
    ("rr1_per_s", "TCP round trips, one on one core, /s", |path, time| path.round_trips(1, time)),
    ("connects_per_s", "TCP connects on one core, /s", Path::connects),
];

pub fn run(ground: &Ground) -> Report {
    progress("two nodes with agents, two with bridges");
    let etcd = ground.world.etcd();
    let config = plain(Config::etcd(&etcd));
    let nodes = [ground.world.node("n1"), ground.world.node("n2")];
    let _agents = nodes.each_ref().map(|node| node.agent(&config));
    nodes[0].ok("network create bench --subnet 10.9.0.0/24");
    let boxes = [nodes[0].attach("bench", "box1"), nodes[1].attach("bench", "box2")];
    let address = nodes[1].addresses("bench", "box2").remove(0);
    let theirs = bridge::make(&ground.world);
    assert!(boxes[0].space.reaches(&address), "our containers do not reach each other");
    assert!(theirs.0.space.reaches(&theirs.2), "the bridges' containers do not reach each other");
    let ours = Path::new(&boxes[0].space, &boxes[1].space, &address);
    let theirs = Path::new(&theirs.0.space, &theirs.1.space, &theirs.2);

    let rounds = ground.pick(5, 3);
    let mut report = Report::default();
    report.metrics.extend(PROBES.map(|(name, what, _)| Metric::new(name, what, Better::Higher)));
    for round in 0..rounds {
        progress(&format!("round {} of {rounds}", round + 1));
        for (metric, (name, _, probe)) in report.metrics.iter_mut().zip(PROBES) {
            let stream = name.starts_with("tcp");
            let time = Duration::from_millis(ground.pick(2000, if stream { 1000 } else { 500 }));
            let (mine, its) = if round % 2 == 0 {
                let mine = probe(&ours, time);
                (mine, probe(&theirs, time))
            } else {
                let its = probe(&theirs, time);
                (probe(&ours, time), its)
            };
            metric.add(mine, bridge::NAME, its);
        }
    }
    report
}
