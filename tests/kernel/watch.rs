//! What the monitor tells.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use netctl::kernel::{Kind, Monitor, Notice, Scope, nft};
use netctl::model::object::Step;

use crate::world::{Container, Node, two_nodes};

const TABLE: &str = "table inet netctl { chain c { counter; }; }";

fn watch(node: &Node) -> (Monitor, Receiver<Notice>) {
    let (sender, receiver) = channel();
    let monitor = Monitor::start(move |notice| drop(sender.send(notice))).unwrap();
    monitor.add("host", node.host.netns(), Scope::Host).unwrap();
    monitor.add("sandbox", node.sandbox.netns(), Scope::Sandbox).unwrap();
    (monitor, receiver)
}

/// Waits for a notice and returns all that came until then.
fn until(news: &Receiver<Notice>, namespace: &str, kind: Kind) -> BTreeSet<Notice> {
    let wanted = Notice { namespace: namespace.to_owned(), kind };
    let mut seen = BTreeSet::new();
    while !seen.contains(&wanted) {
        let next = news.recv_timeout(Duration::from_secs(10));
        seen.insert(next.unwrap_or_else(|_| panic!("no {wanted:?} among {seen:?}")));
    }
    seen
}

pub fn what_somebody_changes_is_reported() {
    let ([mut a, b], [container, _other]) = two_nodes(["192.0.2.1", "192.0.2.2"], 24);
    let uplink = a.uplink();
    a.host.ensure_pair(&mut a.sandbox, &uplink).unwrap();
    nft::install(a.sandbox.netns(), TABLE).unwrap();
    nft::install(a.host.netns(), TABLE).unwrap();
    let (monitor, news) = watch(&a);
    let device = container.device();
    for (damage, kind) in [
        ("ip route del unreachable 10.9.0.0/24 proto 110".to_owned(), Kind::Route),
        ("ip -6 route del fd00:9::100/120".to_owned(), Kind::Route),
        ("ip addr del fd00:9::1/128 dev lo".to_owned(), Kind::Address),
        ("ip neigh del 192.0.2.2 dev vx0".to_owned(), Kind::Neighbour),
        (format!("bridge fdb del {} dev vx0", b.mac), Kind::Fdb),
        ("nft flush ruleset".to_owned(), Kind::Firewall),
        (format!("ip link set {device} mtu 1300"), Kind::Link),
        (format!("ip link del {device}"), Kind::Link),
    ] {
        a.sh(&damage);
        until(&news, "sandbox", kind);
    }
    a.space.sh("nft add rule inet netctl c drop");
    until(&news, "host", Kind::Firewall);
    a.space.sh(&format!("ip addr flush dev {}", uplink.name));
    until(&news, "host", Kind::Address);
    a.space.sh(&format!("ip link del {}", uplink.name));
    until(&news, "host", Kind::Link);
    // A namespace that is not watched any longer is not reported, and others still are.
    monitor.remove("sandbox");
    a.sh("ip addr del 10.9.0.1/32 dev lo");
    a.space.sh("nft delete table inet netctl");
    let seen = until(&news, "host", Kind::Firewall);
    let late = Notice { namespace: "sandbox".to_owned(), kind: Kind::Address };
    assert!(!seen.contains(&late), "{seen:?}");
}

pub fn what_we_change_is_not_reported() {
    let mut node = Node::alone();
    node.reconcile(&node.base());
    nft::install(node.sandbox.netns(), TABLE).unwrap();
    let (_monitor, news) = watch(&node);
    let container = Container::new(10);
    node.plug(&container.plug).unwrap();
    let more = container.objects();
    let wanted = node.base().union(&more).copied().collect();
    node.reconcile(&wanted);
    nft::install(node.sandbox.netns(), &format!("delete table inet netctl\n{TABLE}")).unwrap();
    assert!(container.reaches("10.9.0.1"));
    node.sh("ip link add other type bridge");
    node.sh("ip link set other up");
    node.sh("ip route add 10.50.0.0/24 dev other table 100");
    node.sh("nft add table inet other");
    let steps: Vec<Step> = more.iter().rev().map(|object| Step::Remove(*object)).collect();
    assert!(node.apply(&steps).is_empty());
    // The end of what was asked for: this is somebody else's.
    node.sh("ip route del unreachable 10.9.0.0/24 proto 110");
    let mut seen = until(&news, "sandbox", Kind::Route);
    seen.remove(&Notice { namespace: "sandbox".to_owned(), kind: Kind::Route });
    assert!(seen.is_empty(), "{seen:?}");
}
