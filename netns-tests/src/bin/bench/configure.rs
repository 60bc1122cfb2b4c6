//! Containers connected by shell: one `ip` process for each step, as scripts and simple plugins
//! do it.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use world::Node;

use crate::crowd::name;

/// The name of this peer.
pub const NAME: &str = "ip";

/// Connects that many namespaces: a pair, both ends up, an address, a route in and one out.
pub fn attach(node: &Node, count: usize) -> Duration {
    node.space.enter(|| {
        let start = Instant::now();
        for number in 0..count {
            let (near, netns) = (near(number), name(number));
            let address = Ipv4Addr::from(0x0a58_0100 + number as u32);
            let inside = |words: &str| ip(&format!("-n {netns} {words}"));
            ip(&format!("link add {near} type veth peer name eth0 netns {netns}"));
            ip(&format!("link set {near} up"));
            inside(&format!("address add {address}/16 dev eth0"));
            inside("link set eth0 up");
            inside("route add default via 10.88.0.1 dev eth0");
            ip(&format!("route add {address}/32 dev {near}"));
        }
        start.elapsed()
    })
}

/// Removes the pairs, one by one.
pub fn detach(node: &Node, count: usize) -> Duration {
    node.space.enter(|| {
        let start = Instant::now();
        (0..count).for_each(|number| ip(&format!("link del {}", near(number))));
        start.elapsed()
    })
}

fn near(number: usize) -> String {
    format!("ve{number}")
}

fn ip(words: &str) {
    let mut command = Command::new("ip");
    command.args(words.split(' ')).stdin(Stdio::null());
    let status = command.status().expect("ip starts");
    assert!(status.success(), "ip {words}: {status}");
}
